import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices import serial as s
from kvmkit.devices.serial import Serial

RBR, THR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 0, 1, 2, 2, 3, 4, 5, 6, 7


class Port:
    """A UART with its line and output recorded, and shorter ways to reach its registers."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        self.sent: list[bytes] = []
        self.uart = Serial(self.edges.append, self.sent.append, delay_s=None)

    @property
    def line(self) -> int:
        return self.edges[-1] if self.edges else 0

    def inb(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def outb(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def feed(self, data: bytes) -> threading.Thread:
        """Feed from another thread; return it when it can get no further."""
        thread = threading.Thread(target=self.uart.feed, args=(data,), daemon=True)
        thread.start()
        with self.uart._room:
            self.uart._room.wait_for(lambda: self.uart._fed or self.uart._received, timeout=5)
        return thread


@pytest.fixture
def port() -> Port:
    return Port()


def test_linux_probe(port: Port) -> None:
    """What drivers/tty/serial/8250 looks at until it says 16550A and trusts the interrupts."""
    port.outb(IER, 0)
    assert port.inb(IER) == 0
    port.outb(IER, 0x0F)
    assert port.inb(IER) == 0x0F
    port.outb(IER, 0xF0)
    assert port.inb(IER) == 0
    port.outb(MCR, s.MCR_LOOP | 0x0A)
    assert port.inb(MSR) & 0xF0 == 0x90
    port.outb(MCR, 0)
    assert port.inb(MSR) & 0xF0 == 0xB0
    port.outb(FCR, 1)
    assert port.inb(IIR) >> 6 == 3
    port.outb(LCR, 0xBF)
    assert port.inb(2) != 0  # no EFR: neither a 16650 nor a 16750
    port.outb(LCR, 0)
    port.outb(FCR, 0x21)
    assert port.inb(IIR) >> 5 == 6
    for _ in range(2):  # THRE comes back each time it is enabled
        port.outb(IER, s.IER_THRI)
        assert port.inb(IIR) & 0x0F == s.IIR_THRI
        port.outb(IER, 0)
        assert port.inb(IIR) & 0x0F == s.IIR_NO_INT


def test_divisor_latch_and_scratch(port: Port) -> None:
    port.outb(LCR, 0x83)
    port.outb(0, 0x0C)
    port.outb(1, 0x01)
    assert (port.inb(0), port.inb(1)) == (0x0C, 0x01)
    port.outb(LCR, 0x03)
    assert (port.inb(LCR), port.inb(IER), port.inb(RBR)) == (0x03, 0, 0)
    port.outb(SCR, 0x5A)
    assert port.inb(SCR) == 0x5A


def test_output_batches(port: Port) -> None:
    for byte in b"a line\n$ ":
        port.outb(THR, byte)
    assert port.sent == [b"a line\n"]
    port.outb(IER, 0)  # a driver that is done
    assert port.sent == [b"a line\n", b"$ "]
    port.outb(THR, ord("?"))
    for _ in range(8):  # a guest that waits for an answer
        assert port.inb(LSR) == s.LSR_THRE | s.LSR_TEMT
    assert port.sent[-1] == b"?"
    for _ in range(300):
        port.outb(THR, ord("x"))
    assert port.sent[-1] == b"x" * 256
    port.uart.flush()
    assert port.sent[-1] == b"x" * 44
    port.uart.flush()
    assert port.sent[-1] == b"x" * 44


def test_output_of_a_silent_guest_comes_out_by_itself() -> None:
    came = threading.Event()
    sent: list[bytes] = []

    def write(data: bytes) -> None:
        sent.append(data)
        came.set()

    uart = Serial(lambda _: None, write, delay_s=0.001)
    for byte in (b"a", b"b"):  # twice: it sleeps in between
        came.clear()
        uart.write(THR, 1, byte[0])
        assert came.wait(5)
    uart.close()
    assert sent == [b"a", b"b"]


def test_thre_interrupt(port: Port) -> None:
    port.outb(IER, s.IER_THRI)
    assert port.line == 1
    assert port.inb(IIR) & 0x0F == s.IIR_THRI
    assert port.line == 0  # reading IIR acknowledges it
    port.outb(THR, ord("x"))
    assert port.edges == [1, 0, 1]
    port.outb(THR, ord("y"))
    assert port.edges == [1, 0, 1, 0, 1]  # an edge for each byte


def test_receive_interrupt_and_trigger(port: Port) -> None:
    port.outb(FCR, 0x81)  # trigger at 8
    port.outb(IER, s.IER_RDI)
    port.uart.feed(b"1234567")
    assert (port.line, port.inb(IIR) & 0x0F) == (1, s.IIR_RX_TIMEOUT)
    port.uart.feed(b"8")
    assert port.inb(IIR) & 0x0F == s.IIR_RDI
    got = []
    while port.inb(LSR) & s.LSR_DR:
        got.append(port.inb(RBR))
    assert bytes(got) == b"12345678"
    assert (port.line, port.inb(IIR) & 0x0F) == (0, s.IIR_NO_INT)


def test_priorities(port: Port) -> None:
    port.outb(FCR, 1)
    port.outb(MCR, s.MCR_LOOP)
    port.inb(MSR)
    port.outb(IER, 0x0F)
    for i in range(17):
        port.outb(THR, i)
    port.outb(MCR, s.MCR_LOOP | s.MCR_RTS)
    assert port.inb(IIR) & 0x0F == s.IIR_RLSI
    assert port.inb(LSR) & s.LSR_OE
    assert port.inb(IIR) & 0x0F == s.IIR_RDI
    port.outb(FCR, 3)
    assert port.inb(IIR) & 0x0F == s.IIR_THRI
    assert port.inb(IIR) & 0x0F == s.IIR_MSI
    assert port.inb(MSR) == s.MSR_CTS | 1
    assert port.inb(MSR) == s.MSR_CTS
    assert port.inb(IIR) & 0x0F == s.IIR_NO_INT
    assert port.line == 0


def test_ring_counts_at_its_end_alone(port: Port) -> None:
    port.outb(MCR, s.MCR_LOOP)
    port.inb(MSR)
    port.outb(MCR, s.MCR_LOOP | s.MCR_OUT1)
    assert port.inb(MSR) == s.MSR_RI
    port.outb(MCR, s.MCR_LOOP)
    assert port.inb(MSR) == s.MSR_TERI


def test_loopback_sends_nothing_out(port: Port) -> None:
    port.outb(MCR, s.MCR_LOOP)
    port.outb(THR, 0xAE)
    port.uart.flush()
    assert port.sent == []
    assert (port.inb(LSR) & s.LSR_DR, port.inb(RBR), port.inb(LSR) & s.LSR_DR) == (1, 0xAE, 0)


def test_input_waits_for_a_listener(port: Port) -> None:
    """A driver that opens the port clears the FIFO and reads RBR: nothing typed before may get lost by that."""
    feeder = port.feed(b"typed early")
    port.outb(FCR, 1)
    port.outb(FCR, 7)
    for offset in (LSR, RBR, IIR, MSR):
        port.inb(offset)
    assert not port.inb(LSR) & s.LSR_DR
    port.outb(IER, s.IER_RDI)
    feeder.join(5)
    assert port.line == 1
    assert bytes(port.inb(RBR) for _ in range(11)) == b"typed early"


def test_input_that_is_cleared_comes_again(port: Port) -> None:
    """Linux enables the receive interrupt without FIFO when it opens the port, then clears and enables the FIFO."""
    port.outb(IER, s.IER_RDI)
    feeder = port.feed(b"typed early")
    feeder.join(0)
    while not port.inb(LSR) & s.LSR_DR:
        pass
    port.outb(FCR, 1)
    port.outb(FCR, 7)
    feeder.join(5)
    assert port.line == 1
    assert bytes(port.inb(RBR) for _ in range(11)) == b"typed early"


def test_input_of_a_guest_that_polls(port: Port) -> None:
    feeder = port.feed(b"ab")
    got = b""
    for _ in range(20):
        if port.inb(LSR) & s.LSR_DR:
            got += bytes([port.inb(RBR)])
    feeder.join(5)
    assert got == b"ab"


def test_back_pressure(port: Port) -> None:
    port.outb(FCR, 1)
    port.outb(IER, s.IER_RDI)
    data = bytes(range(100))
    feeder = port.feed(data)
    got = b""
    while len(got) < 84:
        got += bytes([port.inb(RBR)])
        assert len(port.uart._received) <= 16
    feeder.join(5)
    assert not feeder.is_alive()
    assert got + bytes(port.inb(RBR) for _ in range(16)) == data
    assert not port.inb(LSR) & s.LSR_OE


def test_close_releases_a_feeder(port: Port) -> None:
    feeder = port.feed(b"nobody reads this")
    port.uart.close()
    feeder.join(5)
    assert not feeder.is_alive()


ACCESS = st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 0xFFFFFFFF), st.sampled_from((1, 2, 4)))


@given(st.lists(ACCESS, max_size=60))
def test_any_accesses(accesses: list[tuple[bool, int, int, int]]) -> None:
    """Whatever a guest does, registers are bytes, the line changes when it is said to, and the FIFO stays within 16."""
    port = Port()
    threading.Thread(target=port.uart.feed, args=(bytes(40),), daemon=True).start()
    for is_write, offset, value, size in accesses:
        if is_write:
            port.uart.write(offset, size, value)
        else:
            assert 0 <= port.uart.read(offset, size) <= 0xFF
        assert len(port.uart._received) <= 16
        assert port.line == int(port.uart._cause() != s.IIR_NO_INT)
    assert all(a != b for a, b in zip(port.edges, port.edges[1:], strict=False))
    port.uart.close()
