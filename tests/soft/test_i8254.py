"""The 8254 on a clock of the test's. (Intel 8254 data sheet, 231164, "Mode Definitions" and "Read Operations".)"""

import pytest

from kvmkit.kvm.soft.x86.i8254 import FREQUENCY_HZ, I8254

CONTROL, SPEAKER = 0x43, 0x61


class Bench:
    """A chip, its clock in ticks, and the edge on IRQ 0 that it has asked for."""

    def __init__(self) -> None:
        self.ns = 10**9
        self.armed: tuple[int, int] | None = None
        self.chip = I8254(lambda: self.ns, self._arm, self._cancel)

    def _arm(self, at_ns: int, period_ns: int) -> None:
        self.armed = (at_ns - self.ns, period_ns)

    def _cancel(self) -> None:
        self.armed = None

    def program(self, n: int, mode: int, count: int, access: int = 3, bcd: bool = False) -> None:
        self.chip.write(CONTROL, n << 6 | access << 4 | mode << 1 | bcd)
        if access & 1:
            self.chip.write(0x40 + n, count & 0xFF)
        if access & 2:
            self.chip.write(0x40 + n, count >> 8)

    def after(self, ticks: int) -> None:
        """Go on to the middle of the tick that is `ticks` from now's."""
        base = 10**9
        tick = (self.ns - base) * FREQUENCY_HZ // 10**9 + ticks
        self.ns = base + (2 * tick + 1) * 10**9 // (2 * FREQUENCY_HZ)

    def read16(self, n: int) -> int:
        return self.chip.read(0x40 + n) | self.chip.read(0x40 + n) << 8


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_mode_0_rises_at_the_terminal_count_and_counts_on(bench: Bench) -> None:
    bench.program(1, 0, 100)
    seen = []
    for ticks in (0, 99, 1, 1):
        bench.after(ticks)
        seen.append((bench.read16(1), bench.chip.output(1)))
    assert seen == [(100, False), (1, False), (0, True), (0xFFFF, True)]


def test_control_word_lowers_the_output_of_mode_0_and_raises_the_others(bench: Bench) -> None:
    for mode in range(6):
        bench.chip.write(CONTROL, 1 << 6 | 3 << 4 | mode << 1)
        assert bench.chip.output(1) == (mode != 0)


def test_mode_2_is_low_for_the_last_tick_of_each_period(bench: Bench) -> None:
    bench.program(1, 2, 4)
    seen = []
    for _ in range(9):
        seen.append((bench.read16(1), bench.chip.output(1)))
        bench.after(1)
    period = [(4, True), (3, True), (2, True), (1, False)]
    assert seen == [*period, *period, (4, True)]


@pytest.mark.parametrize(("count", "high"), [(6, 3), (5, 3)])
def test_mode_3_is_a_square_wave_with_the_longer_half_high(bench: Bench, count: int, high: int) -> None:
    bench.program(2, 3, count)
    bench.chip.write(SPEAKER, 1)
    bench.after(0)
    levels = []
    for _ in range(2 * count):
        levels.append(bench.chip.read(SPEAKER) >> 5 & 1)
        bench.after(1)
    assert levels == ([1] * high + [0] * (count - high)) * 2


def test_mode_3_counts_down_by_two(bench: Bench) -> None:
    bench.program(1, 3, 8)
    seen = []
    for _ in range(5):
        seen.append(bench.read16(1))
        bench.after(1)
    assert seen == [8, 6, 4, 2, 8]


def test_mode_4_strobes_for_one_tick(bench: Bench) -> None:
    bench.program(1, 4, 3)
    levels = []
    for _ in range(6):
        levels.append(bench.chip.output(1))
        bench.after(1)
    assert levels == [True, True, True, False, True, True]


def test_count_0_means_65536(bench: Bench) -> None:
    bench.program(0, 2, 0)
    assert bench.armed is not None
    assert bench.armed[1] == 65536 * 10**9 // FREQUENCY_HZ
    assert bench.read16(0) == 0


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    bench.program(0, 2, 0x1000, bcd=True)
    assert bench.armed == (1000 * 10**9 // FREQUENCY_HZ,) * 2
    assert bench.read16(0) == 0x1000
    bench.after(1)
    assert bench.read16(0) == 0x0999


@pytest.mark.parametrize(("mode", "repeats"), [(0, False), (2, True), (3, True), (4, False)])
def test_counter_0_asks_for_its_edges(bench: Bench, mode: int, repeats: bool) -> None:
    bench.program(0, mode, 1000)
    period = 1000 * 10**9 // FREQUENCY_HZ
    assert bench.armed == (period, period if repeats else 0)
    bench.chip.write(CONTROL, 0x30)  # a new mode stops it until a count is written
    assert bench.armed is None


def test_lone_low_byte_loads_nothing(bench: Bench) -> None:
    bench.chip.write(CONTROL, 0x34)
    bench.chip.write(0x40, 0x10)
    assert bench.armed is None
    bench.chip.write(0x40, 0)
    assert bench.armed is not None


def test_access_to_one_byte_alone(bench: Bench) -> None:
    bench.program(1, 2, 0x12, access=1)
    assert bench.chip.read(0x41) == 0x12
    bench.program(1, 2, 0x1200, access=2)
    assert bench.chip.read(0x41) == 0x12


def test_latched_count_stays_until_read_and_a_second_latch_is_ignored(bench: Bench) -> None:
    bench.program(1, 2, 0x1234)
    bench.chip.write(CONTROL, 1 << 6)
    bench.after(0x10)
    bench.chip.write(CONTROL, 1 << 6)
    bench.after(0x10)
    assert bench.read16(1) == 0x1234
    assert bench.read16(1) == 0x1214


def test_read_back_gives_status_then_count(bench: Bench) -> None:
    bench.program(1, 2, 0x1234)
    bench.chip.write(CONTROL, 0xC0 | 1 << 2)  # status and count of counter 1
    bench.after(4)
    assert bench.chip.read(0x41) == 0x80 | 3 << 4 | 2 << 1
    assert bench.read16(1) == 0x1234


def test_status_has_null_count_until_a_count_is_loaded(bench: Bench) -> None:
    bench.chip.write(CONTROL, 1 << 6 | 3 << 4)
    bench.chip.write(CONTROL, 0xE0 | 1 << 2)  # status alone
    assert bench.chip.read(0x41) & 0x40
    bench.program(1, 0, 5)
    bench.chip.write(CONTROL, 0xE0 | 1 << 2)
    assert not bench.chip.read(0x41) & 0x40


def test_gate_of_counter_2_starts_mode_1(bench: Bench) -> None:
    bench.program(2, 1, 10)
    bench.chip.write(SPEAKER, 1)
    assert not bench.chip.output(2)
    bench.after(10)
    assert bench.chip.output(2)
    bench.chip.write(SPEAKER, 0)
    bench.chip.write(SPEAKER, 1)  # another edge, another shot
    assert not bench.chip.output(2)


def test_low_gate_holds_mode_0(bench: Bench) -> None:
    bench.chip.write(SPEAKER, 1)
    bench.program(2, 0, 100)
    bench.after(40)
    bench.chip.write(SPEAKER, 0)
    bench.after(500)
    assert (bench.read16(2), bench.chip.output(2)) == (60, False)
    bench.chip.write(SPEAKER, 1)
    bench.after(60)
    assert bench.chip.output(2)


def test_speaker_port_reads_back_and_shows_the_refresh_toggle(bench: Bench) -> None:
    bench.chip.write(SPEAKER, 3)
    assert bench.chip.read(SPEAKER) & 3 == 3
    seen = set()
    for _ in range(4):
        seen.add(bench.chip.read(SPEAKER) & 0x10)
        bench.ns += 15_100
    assert seen == {0, 0x10}


def test_state_carries_over(bench: Bench) -> None:
    bench.program(0, 2, 1000)
    bench.program(2, 3, 0x4321)
    bench.chip.write(SPEAKER, 1)
    other = Bench()
    other.chip.set_state(bench.chip.get_state())
    assert other.armed == bench.armed
    for name in ("count", "mode", "gate", "rw_mode"):
        old, new = (
            [getattr(ch, name) for ch in chip.get_state().channels] for chip in (bench.chip, other.chip)
        )
        assert old == new


def test_state_carries_an_access_that_is_half_done(bench: Bench) -> None:
    bench.program(2, mode=0, count=0x1234)
    bench.chip.write(0x43, 2 << 6)  # latch
    bench.chip.read(0x42)
    bench.program(0, mode=2, count=0x5678)
    bench.chip.read(0x40)
    bench.chip.write(0x41 + 2, 1 << 6 | 3 << 4)
    bench.chip.write(0x41, 0xCD)
    other = Bench()
    other.chip.set_state(bench.chip.get_state())
    assert other.chip.read(0x42) == 0x12  # the latch's high byte
    assert other.chip.read(0x40) == 0x56  # the count's
    other.chip.write(0x41, 0xAB)
    assert other.chip.channels[1].count == 0xABCD
