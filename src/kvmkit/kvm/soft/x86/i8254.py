"""The 8254 interval timer: three 16-bit counters that count down at 1.193182 MHz.

Counter 0's output is IRQ 0. Counter 2's gate is bit 0 of port 0x61 and its output bit 5 there; Linux measures other clocks
with it. A write to port 0x43 chooses a counter, how its 16 bits are accessed (low byte, high byte, both in turn), and a mode:

===== ============================== ================================================
mode  output                         counts
===== ============================== ================================================
0     rises at 0                     once
1     low from the gate's edge to 0  once an edge
2     low for the last tick          over and over
3     high for half the period       over and over
4, 5  low for one tick at 0          once; 5 from the gate's edge
===== ============================== ================================================

Nothing ticks here: the count follows from the time since it was loaded, and a timer of the engine's raises IRQ 0 when it is
due. (Intel 8254 data sheet, order number 231164.)
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvmkit.uapi import x86

FREQUENCY_HZ = 1193182
PORTS = (0x40, 0x41, 0x42, 0x43, 0x61)

_SECOND_BYTE = 4
"""In `kvm_pit_channel_state`: of an access in two bytes, the high one is next."""


@dataclass
class Channel:
    """One counter."""

    count: int = 0x10000
    mode: int = 0
    bcd: bool = False
    access: int = 3
    gate: bool = True
    loaded_ns: int = 0
    loaded: bool = False
    held_ns: int | None = None
    """Since when a low gate has stopped it."""
    triggered: bool = False
    """Modes 1 and 5: the gate has risen since the count was written."""
    read_high: bool = False
    write_low: int | None = None
    latched: int | None = None
    latched_high: bool = False
    status: int | None = None


class I8254:
    """The chip.

    `clock` gives nanoseconds; `arm(at_ns, period_ns)` asks for an edge on IRQ 0 (repeated if `period_ns` isn't 0), `cancel()`
    takes that back.
    """

    def __init__(
        self, clock: Callable[[], int], arm: Callable[[int, int], None], cancel: Callable[[], None]
    ) -> None:
        """Power up."""
        self._clock, self._arm, self._cancel = clock, arm, cancel
        self.channels = [Channel(), Channel(), Channel(gate=False)]
        self.speaker = 0

    def _ticks(self, ch: Channel) -> int:
        now = self._clock() if ch.held_ns is None else ch.held_ns
        return (now - ch.loaded_ns) * FREQUENCY_HZ // 10**9

    def current(self, n: int) -> int:
        """Return what counter `n` shows."""
        ch = self.channels[n]
        if not ch.loaded or (ch.mode in (1, 5) and not ch.triggered):
            return self._shown(ch, ch.count)
        ticks = self._ticks(ch)
        match ch.mode:
            case 2:
                value = ch.count - ticks % ch.count
            case 3:
                value = ch.count - ticks * 2 % ch.count
            case _:
                value = ch.count - ticks
        return self._shown(ch, value)

    @staticmethod
    def _shown(ch: Channel, value: int) -> int:
        if not ch.bcd:
            return value & 0xFFFF
        return sum(value // 10**i % 10 << 4 * i for i in range(4))

    def output(self, n: int) -> bool:
        """Return the level of counter `n`'s output."""
        ch = self.channels[n]
        if not ch.loaded:
            return ch.mode != 0
        if (ch.mode in (1, 5) and not ch.triggered) or (ch.mode in (2, 3) and not ch.gate):
            return True
        ticks = self._ticks(ch)
        match ch.mode:
            case 0 | 1:
                return ticks >= ch.count
            case 2:
                return ticks % ch.count != ch.count - 1
            case 3:
                return ticks % ch.count < (ch.count + 1) // 2
        return ticks != ch.count

    def _load(self, n: int, value: int) -> None:
        ch = self.channels[n]
        if ch.bcd:
            value = sum((value >> 4 * i & 0xF) * 10**i for i in range(4)) or 10000
        ch.count = value or 0x10000
        ch.loaded_ns = self._clock()
        ch.loaded, ch.triggered = True, False
        ch.held_ns = None if ch.gate else ch.loaded_ns
        if n == 0:
            self._schedule()

    def _schedule(self) -> None:
        ch = self.channels[0]
        if not ch.loaded:
            self._cancel()
            return
        period_ns = ch.count * 10**9 // FREQUENCY_HZ
        if ch.mode in (2, 3):
            self._arm(ch.loaded_ns + period_ns, period_ns)
        elif ch.mode in (0, 4):
            self._arm(ch.loaded_ns + period_ns, 0)
        else:
            self._cancel()  # the gate of counter 0 is tied high and never has an edge

    def read(self, port: int) -> int:
        """Read one of `PORTS`."""
        if port == 0x61:
            refresh = self._clock() // 15085 & 1
            return self.speaker & 2 | self.channels[2].gate | refresh << 4 | self.output(2) << 5
        if port == 0x43:
            return 0xFF
        n = port & 3
        ch = self.channels[n]
        if ch.status is not None:
            status, ch.status = ch.status, None
            return status
        if ch.latched is not None:
            value = ch.latched
            high = ch.access == 2 or (ch.access == 3 and ch.latched_high)
            if ch.access == 3 and not ch.latched_high:
                ch.latched_high = True
            else:
                ch.latched, ch.latched_high = None, False
        else:
            value = self.current(n)
            high = ch.access == 2 or (ch.access == 3 and ch.read_high)
            if ch.access == 3:
                ch.read_high = not ch.read_high
        return value >> 8 & 0xFF if high else value & 0xFF

    def write(self, port: int, value: int) -> None:
        """Write one of `PORTS`."""
        if port == 0x61:
            self.speaker = value & 2
            self._set_gate(self.channels[2], bool(value & 1))
        elif port == 0x43:
            self._control(value)
        else:
            self._write_counter(port & 3, value)

    def _set_gate(self, ch: Channel, gate: bool) -> None:
        now = self._clock()
        if gate and not ch.gate:
            if ch.mode in (0, 4):
                ch.loaded_ns += now - ch.held_ns if ch.held_ns is not None else 0
            else:
                ch.loaded_ns, ch.triggered = now, ch.loaded
            ch.held_ns = None
        elif ch.gate and not gate and ch.mode not in (1, 5):
            ch.held_ns = now
        ch.gate = gate

    def _write_counter(self, n: int, value: int) -> None:
        ch = self.channels[n]
        match ch.access:
            case 1:
                self._load(n, value)
            case 2:
                self._load(n, value << 8)
            case _ if ch.write_low is None:
                ch.write_low = value
            case _:
                low, ch.write_low = ch.write_low, None
                self._load(n, low | value << 8)

    def _control(self, value: int) -> None:
        n = value >> 6
        if n == 3:
            for i in range(3):
                if value & 2 << i:
                    self._read_back(i, latch=not value & 0x20, status=not value & 0x10)
            return
        access = value >> 4 & 3
        if access == 0:
            self._read_back(n, latch=True, status=False)
            return
        mode = value >> 1 & 7
        gate = self.channels[n].gate
        self.channels[n] = Channel(
            mode=mode - 4 if mode > 5 else mode, bcd=bool(value & 1), access=access, gate=gate
        )
        if n == 0:
            self._cancel()

    def _read_back(self, n: int, latch: bool, status: bool) -> None:
        ch = self.channels[n]
        if latch and ch.latched is None:
            ch.latched = self.current(n)
        if status and ch.status is None:
            null_count = not ch.loaded
            ch.status = self.output(n) << 7 | null_count << 6 | ch.access << 4 | ch.mode << 1 | ch.bcd

    def get_state(self) -> x86.kvm_pit_state2:
        """State for KVM_GET_PIT2."""
        state = x86.kvm_pit_state2()
        for s, ch in zip(state.channels, self.channels, strict=True):
            s.count, s.mode, s.bcd, s.gate, s.rw_mode = ch.count, ch.mode, ch.bcd, ch.gate, ch.access
            s.count_load_time = ch.loaded_ns if ch.loaded else 0
            s.latched_count = ch.latched or 0
            s.count_latched = ch.access + ch.latched_high if ch.latched is not None else 0
            s.status, s.status_latched = ch.status or 0, ch.status is not None
            s.read_state, s.write_state = ch.access + ch.read_high, ch.access + (ch.write_low is not None)
            s.write_latch = ch.write_low or 0
        return state

    def set_state(self, state: x86.kvm_pit_state2) -> None:
        """Take over KVM_SET_PIT2's state. Counting starts afresh, as the kernel's does."""
        now = self._clock()
        for s, ch in zip(state.channels, self.channels, strict=True):
            ch.count = min(s.count, 0x10000) or 0x10000
            ch.mode, ch.bcd, ch.gate, ch.access = s.mode % 6, bool(s.bcd), bool(s.gate), s.rw_mode & 3 or 3
            ch.loaded, ch.loaded_ns = bool(s.count_load_time or s.count), now
            ch.held_ns, ch.triggered = None if ch.gate else now, False
            ch.latched = s.latched_count if s.count_latched else None
            ch.latched_high = s.count_latched == _SECOND_BYTE
            ch.status = s.status if s.status_latched else None
            ch.read_high = s.read_state == _SECOND_BYTE
            ch.write_low = s.write_latch if s.write_state == _SECOND_BYTE else None
        self._schedule()
