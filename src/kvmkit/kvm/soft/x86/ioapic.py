"""The 82093AA IOAPIC: 24 inputs, each with a redirection entry that says which message an interrupt becomes.

Software reaches it by two registers in memory: the index at offset 0 and the window at 0x10. An entry has 64 bits: vector,
delivery mode, destination mode, delivery status, polarity, **remote IRR**, trigger mode, mask, and the destination in the
top byte.

An *edge* input sends its message once as the line rises. A *level* input sends it while the line is up and remote IRR is
clear; acceptance sets remote IRR, and the local APIC's end of interrupt for that vector clears it: if the line is still up,
the message goes out again. (Intel 82093AA data sheet, order number 290566.)

Messages of edge inputs are also compiled into the engine's table (`messages`), so that an irqfd or a timer reaches the
local APIC without running Python.
"""

from collections.abc import Callable

from kvmkit.uapi import x86

PINS = x86.KVM_IOAPIC_NUM_PINS
BASE = 0xFEC00000
SIZE = 0x1000

Message = tuple[int, bool, int, int, bool]
"""Destination, whether logical, delivery mode, vector, whether level-triggered."""

_VERSION = 0x11 | PINS - 1 << 16
_MASK, _LEVEL, _REMOTE_IRR, _STATUS = 1 << 16, 1 << 15, 1 << 14, 1 << 12
_READ_ONLY = _REMOTE_IRR | _STATUS


class Ioapic:
    """The chip. `send` delivers a message and says how many took it (-1: there is nobody); `changed` is told that an entry was written."""

    def __init__(
        self,
        send: Callable[[Message], int],
        changed: Callable[[], None],
        acked: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Power up: all inputs masked. `acked` is told the pin of an interrupt that ended, before its level is looked at again."""
        self._send = send
        self._changed = changed
        self._acked = acked
        self.id = 0
        self.ioregsel = 0
        self.lines = 0
        self.redirtbl = [_MASK] * PINS

    def set_irq(self, pin: int, level: int) -> int:
        """Drive input `pin`: -1 if nobody takes it, 0 if one waits already, else how many took it (1 to lower it)."""
        bit = 1 << pin
        rises = bool(level) and not self.lines & bit
        self.lines = self.lines | bit if level else self.lines & ~bit
        if not level:
            return 1
        e = self.redirtbl[pin]
        if e & _REMOTE_IRR if e & _LEVEL else not rises:
            return 0
        return self._service(pin)

    def message(self, pin: int) -> Message:
        """Return the message of an input's entry."""
        e = self.redirtbl[pin]
        return e >> 56, bool(e & 1 << 11), e >> 8 & 7, e & 0xFF, bool(e & _LEVEL)

    def edge_message(self, pin: int) -> Message | None:
        """Return what an edge on `pin` sends, None if it is masked or level-triggered."""
        return None if self.redirtbl[pin] & (_MASK | _LEVEL) else self.message(pin)

    def is_level(self, pin: int) -> bool:
        """Whether `pin` is level-triggered."""
        return bool(self.redirtbl[pin] & _LEVEL)

    def _service(self, pin: int) -> int:
        e = self.redirtbl[pin]
        if e & _MASK:
            return -1
        if e & _LEVEL and e & _REMOTE_IRR:
            return -1
        # Remote IRR waits for an end of interrupt, which comes from a local APIC that took the message alone.
        taken = self._send(self.message(pin))
        if taken and e & _LEVEL:
            self.redirtbl[pin] |= _REMOTE_IRR
        return taken

    def eoi(self, vector: int) -> None:
        """A local APIC ended `vector`, which was level-triggered."""
        for pin, e in enumerate(self.redirtbl):
            if e & 0xFF == vector and e & _LEVEL and e & _REMOTE_IRR:
                self._acked(pin)
                self.redirtbl[pin] &= ~_REMOTE_IRR
                if self.lines & 1 << pin:
                    self._service(pin)

    def read(self, offset: int) -> int:
        """Read 32 bits at `offset` of its memory."""
        match offset & ~3:
            case 0x00:
                return self.ioregsel
            case 0x10:
                return self._read_indirect()
        return 0

    def _read_indirect(self) -> int:
        match self.ioregsel:
            case 0 | 2:
                return self.id << 24
            case 1:
                return _VERSION
        pin, high = divmod(self.ioregsel - 0x10, 2)
        if 0 <= pin < PINS:
            return self.redirtbl[pin] >> 32 * high & 0xFFFFFFFF
        return 0xFFFFFFFF

    def write(self, offset: int, value: int) -> None:
        """Write 32 bits at `offset` of its memory."""
        match offset & ~3:
            case 0x00:
                self.ioregsel = value & 0xFF
            case 0x10:
                self._write_indirect(value)
            case 0x40:
                self.eoi(value & 0xFF)

    def _write_indirect(self, value: int) -> None:
        if self.ioregsel == 0:
            self.id = value >> 24 & 0xF
            return
        pin, high = divmod(self.ioregsel - 0x10, 2)
        if not 0 <= pin < PINS:
            return
        e = self.redirtbl[pin]
        if high:
            e = e & 0xFFFFFFFF | value << 32
        else:
            e = e & ~0xFFFFFFFF | value & ~_READ_ONLY & 0x1FFFF | e & _READ_ONLY
            if not e & _LEVEL:
                e &= ~_REMOTE_IRR  # as current chips do; Linux relies on it to clear a stuck one
        self.redirtbl[pin] = e
        self._changed()
        if e & _LEVEL and self.lines & 1 << pin:
            self._service(pin)

    def get_state(self) -> x86.kvm_ioapic_state:
        """State for KVM_GET_IRQCHIP."""
        state = x86.kvm_ioapic_state(base_address=BASE, ioregsel=self.ioregsel, id=self.id, irr=self.lines)
        for pin, e in enumerate(self.redirtbl):
            state.redirtbl[pin].bits = e
        return state

    def set_state(self, state: x86.kvm_ioapic_state) -> None:
        """Take over KVM_SET_IRQCHIP's state."""
        self.ioregsel, self.id, self.lines = (
            state.ioregsel & 0xFF,
            state.id & 0xF,
            state.irr & (1 << PINS) - 1,
        )
        self.redirtbl = [int(e.bits) for e in state.redirtbl]
        self._changed()
        for pin in range(PINS):
            if self.lines & 1 << pin and self.is_level(pin):
                self._service(pin)
