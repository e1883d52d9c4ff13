"""The two 8259As of a PC. (Intel 8259A data sheet, 231468.)"""

import pytest

from kvmkit.kvm.soft.x86.i8259 import Pic

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
EOI, ROTATE_EOI, SPECIFIC_EOI, SET_PRIORITY = 0x20, 0xA0, 0x60, 0xC0
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C


class Bench:
    """A pair, initialised as a PC's, with vectors 0x30 to 0x3f; `intr` is the level of INTR."""

    def __init__(self) -> None:
        self.intr = False
        self.pic = Pic(self._output, lambda: None)
        self.initialise()

    def _output(self, level: bool) -> None:
        self.intr = level

    def initialise(self, icw4: int = 1) -> None:
        for base, vector, cascade in ((MASTER, 0x30, 4), (SLAVE, 0x38, 2)):
            for port, value in ((base, 0x11), (base + 1, vector), (base + 1, cascade), (base + 1, icw4)):
                self.pic.write(port, value)

    def pulse(self, *lines: int) -> None:
        for line in lines:
            self.pic.set_irq(line, 1)
            self.pic.set_irq(line, 0)

    def register(self, base: int, which: int) -> int:
        self.pic.write(base, which)
        return self.pic.read(base)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_edge_raises_intr_and_yields_its_vector(bench: Bench) -> None:
    bench.pulse(4)
    assert bench.intr and bench.register(MASTER, READ_IRR) == 1 << 4
    assert bench.pic.acknowledge() == 0x34
    assert not bench.intr
    assert (bench.register(MASTER, READ_IRR), bench.register(MASTER, READ_ISR)) == (0, 1 << 4)


def test_slaves_interrupt_goes_through_input_2(bench: Bench) -> None:
    bench.pulse(9)
    assert bench.pic.acknowledge() == 0x39
    assert (bench.register(MASTER, READ_ISR), bench.register(SLAVE, READ_ISR)) == (1 << 2, 1 << 1)


def test_held_line_is_one_edge(bench: Bench) -> None:
    bench.pic.set_irq(3, 1)
    assert bench.pic.acknowledge() == 0x33
    bench.pic.write(MASTER, EOI)
    bench.pic.set_irq(3, 1)
    assert not bench.intr


def test_masked_edge_waits_for_the_mask_to_go(bench: Bench) -> None:
    bench.pic.write(MASTER + 1, 1 << 5)
    bench.pulse(5)
    assert not bench.intr and bench.pic.read(MASTER + 1) == 1 << 5
    bench.pic.write(MASTER + 1, 0)
    assert bench.intr and bench.pic.acknowledge() == 0x35


def test_lower_inputs_wait_for_the_end_of_interrupt(bench: Bench) -> None:
    bench.pulse(4, 6)
    assert bench.pic.acknowledge() == 0x34
    assert not bench.intr
    bench.pulse(1)
    assert bench.pic.acknowledge() == 0x31  # a higher one nests
    bench.pic.write(MASTER, EOI)  # of the highest in service
    assert bench.register(MASTER, READ_ISR) == 1 << 4 and not bench.intr
    bench.pic.write(MASTER, EOI)
    assert bench.pic.acknowledge() == 0x36


def test_priorities_of_the_cascade(bench: Bench) -> None:
    bench.pulse(3, 15, 8, 0)
    vectors = []
    for _ in range(4):
        vector = bench.pic.acknowledge()
        vectors.append(vector)
        if vector >= 0x38:
            bench.pic.write(SLAVE, EOI)
        bench.pic.write(MASTER, EOI)
    assert vectors == [0x30, 0x38, 0x3F, 0x33]


def test_specific_eoi_ends_just_that_one(bench: Bench) -> None:
    bench.pulse(4)
    bench.pic.acknowledge()
    bench.pulse(1)
    bench.pic.acknowledge()
    bench.pic.write(MASTER, SPECIFIC_EOI | 4)
    assert bench.register(MASTER, READ_ISR) == 1 << 1


def test_rotation_makes_the_ended_one_the_lowest(bench: Bench) -> None:
    bench.pulse(0)
    bench.pic.acknowledge()
    bench.pic.write(MASTER, ROTATE_EOI)
    bench.pulse(0, 1)
    assert bench.pic.acknowledge() == 0x31


def test_set_priority(bench: Bench) -> None:
    bench.pic.write(MASTER, SET_PRIORITY | 5)  # 5 lowest, so 6 highest
    bench.pulse(0, 6)
    assert bench.pic.acknowledge() == 0x36


def test_automatic_eoi_leaves_nothing_in_service(bench: Bench) -> None:
    bench.initialise(icw4=3)
    bench.pulse(4, 6)
    assert [bench.pic.acknowledge(), bench.pic.acknowledge()] == [0x34, 0x36]
    assert bench.register(MASTER, READ_ISR) == 0


def test_special_mask_mode_lets_lower_ones_through(bench: Bench) -> None:
    bench.pulse(1)
    bench.pic.acknowledge()
    bench.pic.write(MASTER + 1, 1 << 1)
    bench.pic.write(MASTER, 0x68)  # special mask mode
    bench.pulse(6)
    assert bench.intr and bench.pic.acknowledge() == 0x36


def test_poll_command_acknowledges(bench: Bench) -> None:
    bench.pulse(4)
    bench.pic.write(MASTER, POLL)
    assert bench.pic.read(MASTER) == 0x84
    assert bench.register(MASTER, READ_ISR) == 1 << 4
    bench.pic.write(MASTER, POLL)
    assert not bench.pic.read(MASTER) & 0x80


def test_level_input_follows_its_line(bench: Bench) -> None:
    bench.pic.write(ELCR, 1 << 5)
    bench.pic.set_irq(5, 1)
    assert bench.pic.acknowledge() == 0x35
    bench.pic.write(MASTER, EOI)
    assert bench.intr  # still up
    bench.pic.set_irq(5, 0)
    assert not bench.intr


def test_level_input_of_the_slave_that_went_away_is_spurious(bench: Bench) -> None:
    """The master's input 2 is an edge: it has latched the slave's request, as in KVM."""
    bench.pic.write(ELCR + 1, 1 << 2)  # IRQ 10
    bench.pic.set_irq(10, 1)
    assert bench.pic.acknowledge() == 0x3A
    bench.pic.write(SLAVE, EOI)
    bench.pic.write(MASTER, EOI)
    bench.pic.set_irq(10, 0)
    assert bench.pic.acknowledge() == 0x3F


def test_elcr_keeps_the_edge_only_inputs(bench: Bench) -> None:
    bench.pic.write(ELCR, 0xFF)
    bench.pic.write(ELCR + 1, 0xFF)
    assert (bench.pic.read(ELCR), bench.pic.read(ELCR + 1)) == (0xF8, 0xDE)


def test_request_that_went_away_is_spurious(bench: Bench) -> None:
    bench.pic.write(ELCR, 1 << 5)
    bench.pic.set_irq(5, 1)
    bench.pic.set_irq(5, 0)
    assert bench.pic.acknowledge() == 0x37
    assert bench.register(MASTER, READ_ISR) == 0
    bench.pic.write(ELCR + 1, 1 << 3)
    bench.pic.set_irq(11, 1)
    bench.pic.chips[1].irr = 0
    assert bench.pic.acknowledge() == 0x3F
    assert bench.register(SLAVE, READ_ISR) == 0


def test_initialisation_clears_mask_and_service_and_keeps_lines(bench: Bench) -> None:
    bench.pic.write(MASTER + 1, 0xFF)
    bench.pic.set_irq(4, 1)
    bench.initialise()
    assert bench.pic.read(MASTER + 1) == 0
    assert not bench.intr  # an edge from before is forgotten
    assert bench.register(MASTER, READ_IRR) == 0


def test_state_carries_over(bench: Bench) -> None:
    bench.pic.write(MASTER + 1, 0xA0)
    bench.pulse(4, 12)
    bench.pic.acknowledge()
    other = Bench()
    for old, new in zip(bench.pic.chips, other.pic.chips, strict=True):
        new.set_state(old.get_state())
        assert bytes(new.get_state()) == bytes(old.get_state())
