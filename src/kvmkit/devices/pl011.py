"""The PL011 UART (ARM DDI 0183, "PrimeCell UART (PL011) Technical Reference Manual", r1p4: FIFOs of 16).

As with `kvmkit.devices.serial`, sending takes no time and output is passed on in batches; nothing that is fed in gets lost: it
waits until the guest listens, because a driver that opens the port empties the FIFO first. A guest listens when it unmasked a
receive interrupt, or polls UARTFR with nothing to send.

Not modelled: baud rate, parity, break and DMA (all accepted); the enable bits of UARTCR (early consoles don't set them, and a
UART that is off loses what they say); the modem lines, which stand for "connected", and so their interrupts.
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice

from kvmkit.devices.serial import Batches

FIFO_BYTES = 16
REGISTERS_BYTES = 0x1000

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR = 0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30
IFLS, IMSC, RIS, MIS, ICR, DMACR, ID = 0x34, 0x38, 0x3C, 0x40, 0x44, 0x48, 0xFE0

FR_CTS, FR_DSR, FR_DCD, FR_RXFE, FR_RXFF, FR_TXFE = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7
LCR_FEN = 1 << 4
CR_LBE = 1 << 7
RSR_OE = 1 << 3
INT_RX, INT_TX, INT_RT, INT_OE = 1 << 4, 1 << 5, 1 << 6, 1 << 10

_CONNECTED = FR_CTS | FR_DSR | FR_DCD
_IDS = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
"""UARTPeriphID0 to 3 and UARTPCellID0 to 3: the revision, 1, says how long the FIFOs are."""
_TRIGGER_BYTES = (2, 4, 8, 12, 14)
_POLLS = 8
"""So many reads of UARTFR with nothing else in between are a guest that waits for input."""

_STORED = {
    ILPR: 0xFF,
    IBRD: 0xFFFF,
    FBRD: 0x3F,
    LCR_H: 0xFF,
    CR: 0xFF87,
    IFLS: 0x3F,
    IMSC: 0x7FF,
    DMACR: 0x7,
}
"""Registers that keep what is written, and which bits of it."""


class Pl011:
    """One port. Safe to use from any thread."""

    def __init__(
        self, irq: Callable[[int], None], write: Callable[[bytes], None], *, delay_s: float | None = 0.02
    ) -> None:
        """`irq` sets the interrupt line to 1 or 0; `write` gets what the guest sends and may block.

        Output waits at most about `delay_s` seconds for more to come; None is as long as the guest lets it.
        """
        self._irq = irq
        self._lock = threading.RLock()
        self._output = Batches(write, delay_s, self._lock)
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._line = 0
        self._received: deque[int] = deque()
        self._fed: deque[int] = deque()
        self._polls = 0
        self._sent = False  # the transmit interrupt, until it is cleared
        self._overrun = False  # UARTRSR's bit
        self._overrun_interrupt = False
        self._registers = dict.fromkeys(_STORED, 0) | {CR: 0x300, IFLS: 0x12}

    def read(self, offset: int, size: int) -> int:
        """Read a register; what is between or behind them is 0."""
        with self._lock:
            if offset == FR:
                return self._read_fr()
            self._polls = 0
            if offset in self._registers:
                return self._registers[offset]
            if offset >= ID:
                return _IDS[(offset - ID) // 4] if offset % 4 == 0 else 0
            match offset:
                case 0x00:
                    return self._read_dr()
                case 0x04:
                    return RSR_OE if self._overrun else 0
                case 0x3C:
                    return self._raw()
                case 0x40:
                    return self._raw() & self._registers[IMSC]
                case _:
                    return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; those that can only be read, and what is between them, take nothing."""
        with self._lock:
            self._polls = 0
            if offset in _STORED:
                self._store(offset, value & _STORED[offset])
            elif offset == DR:
                self._send(value & 0xFF)
            elif offset == RSR:
                self._overrun = False
            elif offset == ICR:
                if value & INT_TX:
                    self._sent = False
                if value & INT_OE:
                    self._overrun_interrupt = False
                self._update()

    def feed(self, data: bytes) -> None:
        """Let `data` come in on the line. Returns when the guest has taken all but the last few bytes of it, or at `close`."""
        with self._room:
            self._fed.extend(data)
            self._take_in()
            self._room.wait_for(lambda: self._closed or not self._fed)

    def flush(self) -> None:
        """Pass on what was sent."""
        with self._lock:
            self._output.flush()

    def close(self) -> None:
        """Pass on what was sent and release whoever waits in `feed`."""
        with self._room:
            self._closed = True
            self._room.notify_all()
            self._output.close()

    def _read_fr(self) -> int:
        self._polls += 1
        if self._polls >= _POLLS:
            self._take_in()
            self._output.flush()
        value = FR_TXFE | _CONNECTED
        if not self._received:
            value |= FR_RXFE
        elif len(self._received) >= self._capacity():
            value |= FR_RXFF
        return value

    def _read_dr(self) -> int:
        value = self._received.popleft() if self._received else 0
        self._take_in()
        self._update()
        return value

    def _store(self, offset: int, value: int) -> None:
        before, self._registers[offset] = self._registers[offset], value
        if offset == LCR_H and (before ^ value) & LCR_FEN:
            # What the guest didn't read comes in again.
            if not self._registers[CR] & CR_LBE:
                self._fed.extendleft(reversed(self._received))
            self._received.clear()
        if offset == IMSC:  # a driver that is done sending masks the interrupt
            self._output.flush()
        self._take_in()
        self._update()

    def _send(self, value: int) -> None:
        if self._registers[CR] & CR_LBE:
            if len(self._received) < self._capacity():
                self._received.append(value)
            else:
                self._overrun = self._overrun_interrupt = True
        else:
            self._output.add(value)
        # The FIFO is empty again at once: it falls through its trigger level with each byte.
        self._sent = True
        self._update()

    def _capacity(self) -> int:
        return FIFO_BYTES if self._registers[LCR_H] & LCR_FEN else 1

    def _take_in(self) -> None:
        """Move what was fed into the FIFO as far as it goes."""
        listens = self._registers[IMSC] & (INT_RX | INT_RT) or self._polls >= _POLLS
        if not self._fed or self._registers[CR] & CR_LBE or not listens:
            return
        room = self._capacity() - len(self._received)
        if room > 0:
            self._received.extend(islice(self._fed, room))
            for _ in range(min(room, len(self._fed))):
                self._fed.popleft()
            if not self._fed:
                self._room.notify_all()
            self._update()

    def _raw(self) -> int:
        """UARTRIS. Clearing the receive interrupts doesn't help while there is something to read: nothing can be missed."""
        value = INT_TX if self._sent else 0
        if self._overrun_interrupt:
            value |= INT_OE
        if self._received:
            value |= INT_RT  # it waits for 32 bits' time on the real one; here that time has always passed
            level = self._registers[IFLS] >> 3 & 7
            enough = _TRIGGER_BYTES[min(level, 4)] if self._registers[LCR_H] & LCR_FEN else 1
            if len(self._received) >= enough:
                value |= INT_RX
        return value

    def _update(self) -> None:
        line = int(self._raw() & self._registers[IMSC] != 0)
        if line != self._line:
            self._line = line
            self._irq(line)
