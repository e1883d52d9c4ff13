"""The MC146818A real-time clock and its CMOS memory (Motorola's data sheet; the century byte is the one that the FADT names).

It tells the time in UTC, keeps what the guest sets as a difference from the host's clock, and holds 128 bytes. It has no
interrupts: alarm, periodic and update-ended flags never set. Linux uses its own timers for those, except to wake up from sleep.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

RAM_BYTES = 128

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
CENTURY = 0x32

A_UIP = 0x80
B_SET, B_BINARY, B_24H = 0x80, 0x04, 0x02
D_VALID = 0x80

_PM = 0x80
_DIVIDER_ON = 0x20
_UPDATE_S = 0.002228
"""How long UIP stands before the time steps: 244 µs warning, 1984 µs update."""

_TIME_REGISTERS = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))


class Rtc:
    """Two ports: index at 0, data at 1. Safe to use from any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970 in UTC."""
        self._clock = clock
        self._lock = threading.Lock()
        self._index = 0
        self._ram = bytearray(RAM_BYTES)
        self._ram[REG_A] = 0x26  # 32768 Hz, 1024 Hz rate
        self._ram[REG_B] = B_24H
        self._ahead = timedelta()

    def set_ram(self, index: int, value: int) -> None:
        """Preset a byte of the CMOS memory, as firmware would."""
        self._ram[index] = value

    def read(self, offset: int, size: int) -> int:
        """The index can't be read."""
        if offset == 0:
            return 0xFF
        with self._lock:
            index = self._index
            if index in _TIME_REGISTERS and not self._stands():
                self._load_time(self._now())
            if index == REG_A:
                updating = not self._stands() and self._now().microsecond / 1e6 >= 1 - _UPDATE_S
                return self._ram[REG_A] | (A_UIP if updating else 0)
            if index == REG_C:
                return 0
            if index == REG_D:
                return D_VALID
            return self._ram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a byte or change it; a write of two bytes at the index does both."""
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F  # the top bit masks NMIs; there are none
                if size > 1:
                    self._write_data(value >> 8 & 0xFF)
            else:
                self._write_data(value & 0xFF)

    def _write_data(self, value: int) -> None:
        index = self._index
        if index in (REG_C, REG_D):
            return
        if index in _TIME_REGISTERS or index in (REG_A, REG_B):
            if not self._stands():
                self._load_time(self._now())
            # A new format leaves the time registers as they are, to be written anew, on the real one too.
            stood = self._stands()
            self._ram[index] = value & ~A_UIP if index == REG_A else value
            if not self._stands() and (stood or index in _TIME_REGISTERS):
                self._ahead = self._registers() - self._host_now()
        else:
            self._ram[index] = value

    def _stands(self) -> bool:
        """Whether the clock is stopped, which is how a guest sets it."""
        return bool(self._ram[REG_B] & B_SET) or self._ram[REG_A] & 0x70 != _DIVIDER_ON

    def _host_now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _now(self) -> datetime:
        try:
            return self._host_now() + self._ahead
        except OverflowError:  # set so near to the end of time that it has come
            return self._host_now()

    def _load_time(self, now: datetime) -> None:
        """Put a time into the registers, in the format that the guest chose."""
        ram = self._ram
        hour, afternoon = now.hour, 0
        if not ram[REG_B] & B_24H:
            hour, afternoon = now.hour % 12 or 12, _PM if now.hour >= 12 else 0
        ram[SECONDS] = self._encode(now.second)
        ram[MINUTES] = self._encode(now.minute)
        ram[HOURS] = self._encode(hour) | afternoon
        ram[WEEKDAY] = self._encode(now.isoweekday() % 7 + 1)
        ram[DAY] = self._encode(now.day)
        ram[MONTH] = self._encode(now.month)
        ram[YEAR] = self._encode(now.year % 100)
        ram[CENTURY] = self._encode(now.year // 100)

    def _registers(self) -> datetime:
        """Return the time that stands in the registers; the host's if what the guest left there is no time."""
        ram = self._ram
        hour = self._decode(ram[HOURS])
        if not ram[REG_B] & B_24H:
            hour = self._decode(ram[HOURS] & ~_PM) % 12 + (12 if ram[HOURS] & _PM else 0)
        year = 100 * self._decode(ram[CENTURY]) + self._decode(ram[YEAR])
        month, day, minute, second = map(self._decode, (ram[MONTH], ram[DAY], ram[MINUTES], ram[SECONDS]))
        try:
            return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            return self._host_now()

    def _encode(self, number: int) -> int:
        return number if self._ram[REG_B] & B_BINARY else number // 10 << 4 | number % 10

    def _decode(self, byte: int) -> int:
        return byte if self._ram[REG_B] & B_BINARY else (byte >> 4) * 10 + (byte & 15)
