"""The PL011 UART (ARM DDI 0183, "PrimeCell UART (PL011) Technical Reference Manual", r1p4: FIFOs of 16).

What the line behind it does is in `kvmkit.devices.uart`. The guest has done with sending when it masks the interrupt; it listens when it
unmasked a receive interrupt, or polls UARTFR.

Not modelled: baud rate, parity, break and DMA (all accepted); the enable bits of UARTCR (early consoles don't set them, and a
UART that is off loses what they say); the modem lines, which stand for "connected", and so their interrupts.
"""

from collections.abc import Callable

from kvmkit.devices.uart import FIFO_BYTES, POLLS, Uart

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


class Pl011(Uart):
    """One port. Safe to use from any thread."""

    def __init__(
        self, irq: Callable[[int], None], write: Callable[[bytes], None], *, delay_s: float | None = 0.02
    ) -> None:
        """See `Uart`."""
        super().__init__(irq, write, delay_s=delay_s)
        self._sent = False  # the transmit interrupt, until it is cleared
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
                    return self._read_data()
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

    def _read_fr(self) -> int:
        self._polled()
        value = FR_TXFE | _CONNECTED
        if not self._received:
            value |= FR_RXFE
        elif len(self._received) >= self._capacity():
            value |= FR_RXFF
        return value

    def _store(self, offset: int, value: int) -> None:
        before, self._registers[offset] = self._registers[offset], value
        if offset == LCR_H and (before ^ value) & LCR_FEN:
            if self._registers[CR] & CR_LBE:
                self._received.clear()
            else:
                self._put_back()
        if offset == IMSC:  # a driver that is done sending masks the interrupt
            self._output.flush()
        self._take_in()
        self._update()

    def _send(self, value: int) -> None:
        if self._registers[CR] & CR_LBE:
            if not self._loop_back(value):
                self._overrun_interrupt = True
        else:
            self._output.add(value)
        # The FIFO is empty again at once: it falls through its trigger level with each byte.
        self._sent = True
        self._update()

    def _capacity(self) -> int:
        return FIFO_BYTES if self._registers[LCR_H] & LCR_FEN else 1

    def _listens(self) -> bool:
        looped = self._registers[CR] & CR_LBE
        return not looped and bool(self._registers[IMSC] & (INT_RX | INT_RT) or self._polls >= POLLS)

    def _interrupts(self) -> bool:
        return self._raw() & self._registers[IMSC] != 0

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
