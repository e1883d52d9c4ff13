"""The PL031 real-time clock (ARM DDI 0224, "PrimeCell Real Time Clock (PL031) Technical Reference Manual").

It counts seconds, from the host's time on, and keeps what the guest sets as a difference from that. It has no interrupt: the
match register keeps its value and never matches. Linux uses it only to wake up from sleep, and knows by the device tree.
"""

import threading
import time
from collections.abc import Callable

REGISTERS_BYTES = 0x1000

DR, MR, LR, CR, IMSC, RIS, MIS, ICR, ID = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C, 0xFE0

_IDS = (0x31, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
"""RTCPeriphID0 to 3 and RTCPCellID0 to 3."""
_MASK = 0xFFFFFFFF


class Pl031:
    """One clock. Safe to use from any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970 in UTC."""
        self._clock = clock
        self._lock = threading.Lock()
        self._ahead_s = 0
        self._match = 0
        self._load = 0
        self._mask = 0

    def read(self, offset: int, size: int) -> int:
        """Read a register; what is between or behind them is 0."""
        with self._lock:
            if offset >= ID:
                return _IDS[(offset - ID) // 4] if offset % 4 == 0 else 0
            match offset:
                case 0x00:
                    return int(self._clock()) + self._ahead_s & _MASK
                case 0x04:
                    return self._match
                case 0x08:
                    return self._load
                case 0x0C:
                    return 1  # once started it can't be stopped, and firmware has started it
                case 0x10:
                    return self._mask
                case _:
                    return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; those that can only be read, and what is between them, take nothing."""
        with self._lock:
            match offset:
                case 0x04:
                    self._match = value & _MASK
                case 0x08:
                    self._load = value & _MASK
                    self._ahead_s = self._load - int(self._clock())
                case 0x10:
                    self._mask = value & 1
