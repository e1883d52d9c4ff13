from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices import rtc as r
from kvmkit.devices.rtc import Rtc


class Clock:
    def __init__(self, *when: int) -> None:
        self.now = datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]

    def __call__(self) -> float:
        return self.now


def get(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def put(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(0, 1, index)
    rtc.write(1, 1, value)


def when(rtc: Rtc) -> tuple[int, ...]:
    return tuple(get(rtc, i) for i in (r.CENTURY, r.YEAR, r.MONTH, r.DAY, r.HOURS, r.MINUTES, r.SECONDS))


def test_time_in_bcd_and_binary() -> None:
    clock = Clock(2024, 2, 29, 23, 59, 58)
    rtc = Rtc(clock)
    assert when(rtc) == (0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58)
    assert get(rtc, r.WEEKDAY) == 5  # a Thursday; Sunday is 1
    clock.now += 2
    assert when(rtc) == (0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00)
    put(rtc, r.REG_B, r.B_24H | r.B_BINARY)
    assert when(rtc) == (20, 24, 3, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("hour", "bcd"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hours(hour: int, bcd: int) -> None:
    rtc = Rtc(Clock(2024, 1, 1, hour))
    put(rtc, r.REG_B, 0)
    assert get(rtc, r.HOURS) == bcd
    put(rtc, r.HOURS, bcd)
    put(rtc, r.REG_B, r.B_24H)
    assert get(rtc, r.HOURS) == int(str(hour), 16)


def test_uip_warns_before_the_step() -> None:
    clock = Clock(2024, 1, 1)
    rtc = Rtc(clock)
    assert get(rtc, r.REG_A) == 0x26
    clock.now += 0.999
    assert get(rtc, r.REG_A) == 0x26 | r.A_UIP
    clock.now += 0.001
    assert (get(rtc, r.REG_A), get(rtc, r.SECONDS)) == (0x26, 1)


def test_setting_the_time() -> None:
    clock = Clock(2024, 1, 1)
    rtc = Rtc(clock)
    put(rtc, r.REG_B, r.B_24H | r.B_SET)
    clock.now += 5
    assert get(rtc, r.SECONDS) == 0  # it stands
    for index, value in ((r.CENTURY, 0x19), (r.YEAR, 0x99), (r.MONTH, 0x12), (r.DAY, 0x31), (r.HOURS, 0x23)):
        put(rtc, index, value)
    put(rtc, r.MINUTES, 0x59)
    put(rtc, r.REG_B, r.B_24H)
    assert when(rtc) == (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x00)
    clock.now += 60
    assert when(rtc) == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_nonsense_leaves_the_time() -> None:
    rtc = Rtc(Clock(2024, 1, 1))
    put(rtc, r.MONTH, 0xFF)
    assert get(rtc, r.MONTH) == 0x01


def test_memory_and_fixed_registers() -> None:
    rtc = Rtc(Clock(2024, 1, 1))
    rtc.set_ram(0x34, 0x80)
    assert get(rtc, 0x34) == 0x80
    rtc.write(0, 2, 0xAA << 8 | 0x0F)
    assert (get(rtc, 0x8F), rtc.read(0, 1)) == (0xAA, 0xFF)
    put(rtc, r.REG_C, 0xFF)
    put(rtc, r.REG_D, 0)
    assert (get(rtc, r.REG_C), get(rtc, r.REG_D)) == (0, r.D_VALID)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.floats(0, 1e9)), max_size=30))
def test_any_accesses(accesses: list[tuple[int, int, float]]) -> None:
    clock = Clock(2024, 1, 1)
    rtc = Rtc(clock)
    for index, value, later in accesses:
        put(rtc, index, value)
        clock.now += later
        for i in range(128):
            assert 0 <= get(rtc, i) <= 0xFF
