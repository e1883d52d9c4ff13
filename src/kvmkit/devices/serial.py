"""The 16550A UART (National Semiconductor PC16550D data sheet).

What the line behind it does is in `kvmkit.devices.uart`. The guest has done with sending when Linux's driver writes IER; it listens
when it enabled the receive interrupt, or polls LSR.

Not modelled: baud rate, parity and break (all accepted), the gate that OUT2 is on a PC (QEMU has none either, and guests
rely on that).
"""

from collections.abc import Callable

from kvmkit.devices.uart import FIFO_BYTES, POLLS, Uart

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 1, 2, 4, 8
IIR_NO_INT, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_RX_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE_FIFO, FCR_CLEAR_RCVR = 1, 2
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_TERI, MSR_ANY_DELTA = 0x04, 0x0F

_TRIGGER_BYTES = (1, 4, 8, 14)
_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD


class Serial(Uart):
    """One port of eight registers. Safe to use from any thread."""

    def __init__(
        self, irq: Callable[[int], None], write: Callable[[bytes], None], *, delay_s: float | None = 0.02
    ) -> None:
        """See `Uart`."""
        super().__init__(irq, write, delay_s=delay_s)
        self._thre_pending = False
        self._ier = 0
        self._fcr = 0
        self._lcr = 3  # 8N1
        self._mcr = 0
        self._msr_deltas = 0
        self._scratch = 0
        self._divisor = 1

    def read(self, offset: int, size: int) -> int:
        """Read a register; the UART is a byte wide, so wider reads give one register and zeros."""
        if offset == 5 and not self._polls and not self._received and not self._overrun:
            self._polls = 1  # by far the most frequent: ready to send, nothing received
            return LSR_THRE | LSR_TEMT
        with self._lock:
            if offset == 5:
                return self._read_lsr()
            self._polls = 0
            if self._lcr & LCR_DLAB and offset < 2:
                return self._divisor >> 8 * offset & 0xFF
            match offset:
                case 0:
                    return self._read_data()
                case 1:
                    return self._ier
                case 2:
                    return self._read_iir()
                case 3:
                    return self._lcr
                case 4:
                    return self._mcr
                case 6:
                    value = self._modem_lines() | self._msr_deltas
                    self._msr_deltas = 0
                    self._update()
                    return value
                case _:
                    return self._scratch

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        value &= 0xFF
        with self._lock:
            self._polls = 0
            if self._lcr & LCR_DLAB and offset < 2:
                shift = 8 * offset
                self._divisor = self._divisor & ~(0xFF << shift) | value << shift
                return
            match offset:
                case 0:
                    self._send(value)
                case 1:
                    self._write_ier(value & 0x0F)
                case 2:
                    self._write_fcr(value)
                case 3:
                    self._lcr = value
                case 4:
                    before = self._modem_lines()
                    self._mcr = value & 0x1F
                    changed = before ^ self._modem_lines()
                    if not before & MSR_RI:  # only its trailing edge counts
                        changed &= ~MSR_RI
                    self._msr_deltas |= changed >> 4
                    self._update()
                case 7:
                    self._scratch = value

    def _read_lsr(self) -> int:
        self._polled()
        value = LSR_THRE | LSR_TEMT
        if self._received:
            value |= LSR_DR
        if self._overrun:
            value |= LSR_OE
            self._overrun = False
            self._update()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:  # reading it is what acknowledges it
            self._thre_pending = False
            self._update()
        return cause | (IIR_FIFO_ENABLED if self._fcr & FCR_ENABLE_FIFO else 0)

    def _send(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._output.add(value)
        # The register is empty again at once. Whoever saw the line high must see it fall in between.
        if self._ier & IER_THRI:
            self._thre_pending = False
            self._update()
        self._thre_pending = True
        if self._ier:
            self._update()

    def _write_ier(self, value: int) -> None:
        changed, self._ier = self._ier ^ value, value
        if changed & IER_THRI:  # enabling it raises it if the transmitter is empty, which it is
            self._thre_pending = bool(value & IER_THRI)
        if value & IER_RDI:
            self._take_in()
        self._update()
        self._output.flush()

    def _write_fcr(self, value: int) -> None:
        if (self._fcr ^ value) & FCR_ENABLE_FIFO or value & FCR_CLEAR_RCVR:
            if self._mcr & MCR_LOOP:
                self._received.clear()
            else:
                self._put_back()  # Linux enables the interrupt before it clears the FIFO
        # The other bits can't be written without the enable bit.
        self._fcr = value & 0xC9 if value & FCR_ENABLE_FIFO else 0
        self._take_in()
        self._update()

    def _capacity(self) -> int:
        return FIFO_BYTES if self._fcr & FCR_ENABLE_FIFO else 1

    def _listens(self) -> bool:
        return not self._mcr & MCR_LOOP and bool(self._ier & IER_RDI or self._polls >= POLLS)

    def _interrupts(self) -> bool:
        return self._cause() != IIR_NO_INT

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return _CONNECTED
        return (
            (MSR_CTS if self._mcr & MCR_RTS else 0)
            | (MSR_DSR if self._mcr & MCR_DTR else 0)
            | (MSR_RI if self._mcr & MCR_OUT1 else 0)
            | (MSR_DCD if self._mcr & MCR_OUT2 else 0)
        )

    def _cause(self) -> int:
        """The pending interrupt of the highest priority."""
        if self._ier & IER_RLSI and self._overrun:
            return IIR_RLSI
        if self._ier & IER_RDI and self._received:
            enough = _TRIGGER_BYTES[self._fcr >> 6] if self._fcr & FCR_ENABLE_FIFO else 1
            # Fewer wait for four characters' time on the real one; here that time has always passed.
            return IIR_RDI if len(self._received) >= enough else IIR_RX_TIMEOUT
        if self._ier & IER_THRI and self._thre_pending:
            return IIR_THRI
        if self._ier & IER_MSI and self._msr_deltas & MSR_ANY_DELTA:
            return IIR_MSI
        return IIR_NO_INT
