"""The 82093AA IOAPIC. (Intel 82093AA data sheet, 290566.)"""

import pytest

from kvmkit.kvm.soft.x86.ioapic import PINS, Ioapic, Message

INDEX, WINDOW, EOI = 0x00, 0x10, 0x40
MASK, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11


class Bench:
    """A chip and the messages that it sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.changes = 0
        self.takers = 1
        self.chip = Ioapic(self._send, self._changed)

    def _send(self, message: Message) -> int:
        self.sent.append(message)
        return self.takers

    def _changed(self) -> None:
        self.changes += 1

    def read(self, register: int) -> int:
        self.chip.write(INDEX, register)
        return self.chip.read(WINDOW)

    def write(self, register: int, value: int) -> None:
        self.chip.write(INDEX, register)
        self.chip.write(WINDOW, value)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * pin, destination << 24)
        self.write(0x10 + 2 * pin, low)

    def entry(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_registers_after_reset(bench: Bench) -> None:
    assert bench.read(0) == 0
    assert bench.read(1) == 0x11 | 23 << 16
    assert [bench.entry(pin) for pin in range(PINS)] == [MASK] * PINS
    assert bench.read(0x10 + 2 * PINS) == 0xFFFFFFFF


def test_id_has_four_bits(bench: Bench) -> None:
    bench.write(0, 0xFFFFFFFF)
    assert bench.read(0) == 0xF << 24


def test_version_is_read_only(bench: Bench) -> None:
    bench.write(1, 0)
    assert bench.read(1) == 0x11 | 23 << 16


def test_edge_sends_once_for_each_rise(bench: Bench) -> None:
    bench.route(4, 0x34, destination=3)
    for level in (1, 1, 0, 1):
        bench.chip.set_irq(4, level)
    assert bench.sent == [(3, False, 0, 0x34, False)] * 2


def test_message_carries_the_entrys_fields(bench: Bench) -> None:
    bench.route(2, 0xFE | 1 << 8 | LOGICAL, destination=0xAB)  # lowest priority
    bench.chip.set_irq(2, 1)
    assert bench.sent == [(0xAB, True, 1, 0xFE, False)]


def test_masked_pin_sends_nothing_and_has_no_edge_message(bench: Bench) -> None:
    bench.route(4, 0x34 | MASK)
    bench.chip.set_irq(4, 1)
    assert bench.sent == [] and bench.chip.edge_message(4) is None
    bench.route(4, 0x34)
    assert bench.chip.edge_message(4) == (0, False, 0, 0x34, False)


def test_level_waits_for_the_end_of_interrupt_and_is_sent_again(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL)
    bench.chip.set_irq(10, 1)
    bench.chip.set_irq(10, 1)
    assert len(bench.sent) == 1 and bench.entry(10) & REMOTE_IRR
    bench.chip.eoi(0x5A)
    assert len(bench.sent) == 2 and bench.entry(10) & REMOTE_IRR
    bench.chip.set_irq(10, 0)
    bench.chip.eoi(0x5A)
    assert len(bench.sent) == 2 and not bench.entry(10) & REMOTE_IRR


def test_message_that_nobody_takes_waits_for_no_end_of_interrupt(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL)
    bench.takers = 0
    bench.chip.set_irq(10, 1)
    assert len(bench.sent) == 1 and not bench.entry(10) & REMOTE_IRR
    bench.takers = 1
    bench.chip.set_irq(10, 1)
    assert len(bench.sent) == 2 and bench.entry(10) & REMOTE_IRR


def test_end_of_interrupt_of_another_vector_changes_nothing(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL)
    bench.chip.set_irq(10, 1)
    bench.chip.eoi(0x5B)
    assert bench.entry(10) & REMOTE_IRR and len(bench.sent) == 1


def test_end_of_interrupt_reaches_every_pin_of_its_vector(bench: Bench) -> None:
    for pin in (10, 11):
        bench.route(pin, 0x5A | LEVEL)
        bench.chip.set_irq(pin, 1)
        bench.chip.set_irq(pin, 0)
    bench.chip.write(EOI, 0x5A)
    assert not any(bench.entry(pin) & REMOTE_IRR for pin in (10, 11))


def test_unmasking_a_level_pin_whose_line_is_up_sends(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL | MASK)
    bench.chip.set_irq(10, 1)
    assert bench.sent == []
    bench.route(10, 0x5A | LEVEL)
    assert len(bench.sent) == 1


def test_software_cannot_write_remote_irr_or_status(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL | MASK | REMOTE_IRR | 1 << 12)
    assert bench.entry(10) == 0x5A | LEVEL | MASK
    bench.route(10, 0x5A | LEVEL)
    bench.chip.set_irq(10, 1)
    bench.route(10, 0x5A | LEVEL | MASK)
    assert bench.entry(10) & REMOTE_IRR


def test_change_to_edge_clears_remote_irr(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL)
    bench.chip.set_irq(10, 1)
    bench.route(10, 0x5A | MASK)
    assert not bench.entry(10) & REMOTE_IRR


def test_every_write_of_an_entry_is_told(bench: Bench) -> None:
    bench.route(4, 0x34)
    assert bench.changes == 2
    bench.write(0, 0)
    bench.write(0xFF, 0)
    assert bench.changes == 2


def test_state_carries_over_and_a_raised_line_is_served(bench: Bench) -> None:
    bench.write(0, 5 << 24)
    bench.route(10, 0x5A | LEVEL | MASK, destination=7)
    bench.chip.set_irq(10, 1)
    state = bench.chip.get_state()
    other = Bench()
    other.chip.set_state(state)
    assert bytes(other.chip.get_state()) == bytes(state)
    state.redirtbl[10].bits &= ~MASK
    other.chip.set_state(state)
    assert other.sent == [(7, False, 0, 0x5A, True)]
