"""The 16550A UART (National Semiconductor PC16550D data sheet).

Sending takes no time: the transmitter is always empty. What is sent is passed on in batches, because a call for every byte
would cost more than the byte: at a newline, when enough is there, when the guest says that it is done (Linux's driver then
writes IER), and after a moment anyway.

Nothing that is fed in gets lost: it waits until the guest listens, since a driver that opens the port throws away
what is in the FIFO. A guest listens when it enabled the receive interrupt, or polls LSR with nothing to send.

Not modelled: baud rate, parity and break (all accepted), the gate that OUT2 is on a PC (QEMU has none either, and guests
rely on that).
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice

FIFO_BYTES = 16

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
_POLLS = 8
"""So many reads of LSR with nothing else in between are a guest that waits for input."""


class Serial:
    """One port of eight registers. Safe to use from any thread."""

    def __init__(
        self, irq: Callable[[int], None], write: Callable[[bytes], None], *, delay_s: float | None = 0.02
    ) -> None:
        """`irq` sets the interrupt line to 1 or 0; `write` gets what the guest sends and may block.

        Output waits at most about `delay_s` seconds for more to come; None is as long as the guest lets it (see above).
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
        self._overrun = False
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
                    return self._read_rbr()
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

    def _read_lsr(self) -> int:
        self._polls += 1
        if self._polls >= _POLLS:
            self._take_in()
            self._output.flush()
        value = LSR_THRE | LSR_TEMT
        if self._received:
            value |= LSR_DR
        if self._overrun:
            value |= LSR_OE
            self._overrun = False
            self._update()
        return value

    def _read_rbr(self) -> int:
        value = self._received.popleft() if self._received else 0
        self._take_in()
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
            self._receive_looped(value)
        else:
            self._output.add(value)
        # The register is empty again at once. Whoever saw the line high must see it fall in between.
        if self._ier & IER_THRI:
            self._thre_pending = False
            self._update()
        self._thre_pending = True
        if self._ier:
            self._update()

    def _receive_looped(self, value: int) -> None:
        if len(self._received) < self._capacity():
            self._received.append(value)
        else:
            self._overrun = True

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
            # What the guest didn't read comes in again: Linux enables the interrupt before it clears the FIFO.
            if not self._mcr & MCR_LOOP:
                self._fed.extendleft(reversed(self._received))
            self._received.clear()
        # The other bits can't be written without the enable bit.
        self._fcr = value & 0xC9 if value & FCR_ENABLE_FIFO else 0
        self._take_in()
        self._update()

    def _capacity(self) -> int:
        return FIFO_BYTES if self._fcr & FCR_ENABLE_FIFO else 1

    def _take_in(self) -> None:
        """Move what was fed into the FIFO as far as it goes."""
        if not self._fed or self._mcr & MCR_LOOP or not (self._ier & IER_RDI or self._polls >= _POLLS):
            return
        room = self._capacity() - len(self._received)
        if room > 0:
            self._received.extend(islice(self._fed, room))
            for _ in range(min(room, len(self._fed))):
                self._fed.popleft()
            if not self._fed:
                self._room.notify_all()
            self._update()

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

    def _update(self) -> None:
        line = int(self._cause() != IIR_NO_INT)
        if line != self._line:
            self._line = line
            self._irq(line)


class Batches:
    """Collects bytes and passes them on together. Used with `lock` held: what comes later stays behind."""

    def __init__(self, write: Callable[[bytes], None], delay_s: float | None, lock: threading.RLock) -> None:
        self._write = write
        self._delay_s = delay_s
        self._bytes = bytearray()
        self._lock = lock
        self._wake = threading.Event()
        self._idle = True
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, value: int) -> None:
        """Add one byte."""
        self._bytes.append(value)
        if value == 10 or len(self._bytes) >= 256:
            self.flush()
        elif self._idle and self._delay_s is not None:
            self._idle = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="serial output", daemon=True)
                self._thread.start()
            self._wake.set()

    def flush(self) -> None:
        """Pass on what is there."""
        if self._bytes:
            data = bytes(self._bytes)
            self._bytes.clear()
            self._write(data)

    def close(self) -> None:
        """Pass on what is there and stop."""
        self.flush()
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        """While bytes come, pass them on every `delay_s`; sleep else."""
        pause = threading.Event()
        while not self._closed:
            self._wake.wait()
            pause.wait(self._delay_s)
            with self._lock:
                if self._bytes:
                    self.flush()
                else:
                    self._idle = True
                    self._wake.clear()
            if self._closed:
                return
