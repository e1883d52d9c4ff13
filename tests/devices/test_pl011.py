import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices import pl011 as p
from kvmkit.devices.pl011 import Pl011
from kvmkit.devices.uart import FIFO_BYTES


class Port:
    """A UART with its line and output recorded, and shorter ways to reach its registers."""

    def __init__(self) -> None:
        self.edges: list[int] = []
        self.sent: list[bytes] = []
        self.uart = Pl011(self.edges.append, self.sent.append, delay_s=None)

    @property
    def line(self) -> int:
        return self.edges[-1] if self.edges else 0

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 4, value)

    def read_all(self) -> bytes:
        data = b""
        while not self.read(p.FR) & p.FR_RXFE:
            data += bytes([self.read(p.DR)])
        return data

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


def test_ids(port: Port) -> None:
    """What drivers/amba/bus.c puts together and amba-pl011.c matches: ARM's part 0x011, with FIFOs of 16 below revision 3."""
    periphid = sum((port.read(p.ID + 4 * i) & 0xFF) << 8 * i for i in range(4))
    cellid = sum((port.read(p.ID + 16 + 4 * i) & 0xFF) << 8 * i for i in range(4))
    assert periphid & 0x000FFFFF == 0x00041011
    assert cellid == 0xB105F00D
    assert periphid >> 20 & 0xF < 3


def test_reset_values(port: Port) -> None:
    assert (port.read(p.CR), port.read(p.IFLS), port.read(p.IMSC)) == (0x300, 0x12, 0)
    assert port.read(p.FR) & (p.FR_TXFE | p.FR_RXFE) == p.FR_TXFE | p.FR_RXFE
    assert (port.read(p.RIS), port.read(p.MIS)) == (0, 0)


@pytest.mark.parametrize(("offset", "kept"), p._STORED.items())
def test_registers_keep_their_bits(port: Port, offset: int, kept: int) -> None:
    port.write(offset, 0xFFFFFFFF & ~(p.CR_LBE if offset == p.CR else 0))
    assert port.read(offset) == kept & ~(p.CR_LBE if offset == p.CR else 0)
    port.write(offset, 0)
    assert port.read(offset) == 0


def test_output_batches(port: Port) -> None:
    for byte in b"a line\n$ ":
        port.write(p.DR, byte)
    assert port.sent == [b"a line\n"]
    port.write(p.IMSC, 0)  # a driver that is done
    assert port.sent == [b"a line\n", b"$ "]
    port.write(p.DR, ord("?"))
    for _ in range(8):  # a guest that waits for an answer
        port.read(p.FR)
    assert port.sent[-1] == b"?"


def test_transmit_interrupt(port: Port) -> None:
    """It comes with what was sent, not by being unmasked (unlike a 16550's): Linux sends until the FIFO is full to start it."""
    port.write(p.IMSC, p.INT_TX)
    assert port.line == 0
    port.write(p.DR, ord("x"))
    assert (port.line, port.read(p.MIS)) == (1, p.INT_TX)
    port.write(p.ICR, p.INT_TX)
    assert (port.line, port.read(p.RIS)) == (0, 0)
    port.write(p.DR, ord("y"))
    port.write(p.IMSC, 0)
    assert (port.line, port.read(p.MIS), port.read(p.RIS)) == (0, 0, p.INT_TX)


@pytest.mark.parametrize(("level", "enough"), [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14), (7, 14)])
def test_receive_interrupt_and_trigger(port: Port, level: int, enough: int) -> None:
    port.write(p.LCR_H, p.LCR_FEN)
    port.write(p.IFLS, level << 3)
    port.write(p.IMSC, p.INT_RX)
    port.uart.feed(bytes(range(enough - 1)))
    assert (port.line, port.read(p.RIS)) == (0, p.INT_RT)
    port.uart.feed(b"!")
    assert (port.line, port.read(p.MIS)) == (1, p.INT_RX)
    assert port.read(p.DR) == 0
    assert port.line == 0  # below the level again
    port.write(p.IMSC, p.INT_RT)
    assert port.line == 1  # the rest has waited long enough
    assert port.read_all() == bytes(range(1, enough - 1)) + b"!"
    assert (port.line, port.read(p.RIS)) == (0, 0)


def test_without_fifo_one_byte_is_enough(port: Port) -> None:
    port.write(p.IMSC, p.INT_RX)
    port.uart.feed(b"x")
    assert port.line == 1
    assert port.read(p.FR) & (p.FR_RXFE | p.FR_RXFF) == p.FR_RXFF
    assert port.read_all() == b"x"


def test_clearing_loses_no_input(port: Port) -> None:
    port.write(p.IMSC, p.INT_RT)
    port.uart.feed(b"x")
    port.write(p.ICR, 0x7FF)
    assert port.line == 1
    assert port.read_all() == b"x"


def test_input_waits_for_a_listener(port: Port) -> None:
    """pl011_startup clears the interrupts, reads what is in the FIFO away, and unmasks: nothing typed before may get lost by that."""
    feeder = port.feed(b"typed early")
    port.write(p.LCR_H, p.LCR_FEN)
    port.write(p.ICR, p.INT_RX | p.INT_RT)
    assert port.read_all() == b""
    port.write(p.IMSC, p.INT_RX | p.INT_RT)
    feeder.join(5)
    assert port.line == 1
    assert port.read_all() == b"typed early"


def test_input_comes_again_when_the_fifo_is_switched(port: Port) -> None:
    port.write(p.IMSC, p.INT_RX | p.INT_RT)
    feeder = port.feed(b"typed early")
    port.write(p.LCR_H, p.LCR_FEN)
    feeder.join(5)
    assert port.read_all() == b"typed early"


def test_input_of_a_guest_that_polls(port: Port) -> None:
    feeder = port.feed(b"ab")
    got = b""
    for _ in range(20):
        if not port.read(p.FR) & p.FR_RXFE:
            got += bytes([port.read(p.DR)])
    feeder.join(5)
    assert got == b"ab"


def test_back_pressure(port: Port) -> None:
    port.write(p.LCR_H, p.LCR_FEN)
    port.write(p.IMSC, p.INT_RX)
    data = bytes(range(100))
    feeder = port.feed(data)
    got = b""
    while len(got) < 84:
        got += bytes([port.read(p.DR)])
        assert len(port.uart._received) <= FIFO_BYTES
    feeder.join(5)
    assert not feeder.is_alive()
    assert got + port.read_all() == data
    assert not port.read(p.RSR)


def test_loopback_sends_nothing_out_and_overruns(port: Port) -> None:
    port.write(p.LCR_H, p.LCR_FEN)
    port.write(p.CR, 0x300 | p.CR_LBE)
    port.write(p.IMSC, p.INT_OE)
    for i in range(17):
        port.write(p.DR, i)
    port.uart.flush()
    assert port.sent == []
    assert (port.line, port.read(p.RSR)) == (1, p.RSR_OE)
    port.write(p.ICR, p.INT_OE)
    port.write(p.RSR, 0)
    assert (port.line, port.read(p.RSR)) == (0, 0)
    assert port.read_all() == bytes(range(16))


def test_close_releases_a_feeder(port: Port) -> None:
    feeder = port.feed(b"nobody reads this")
    port.uart.close()
    feeder.join(5)
    assert not feeder.is_alive()


OFFSET = st.one_of(st.integers(0, 0x12).map(lambda i: 4 * i), st.integers(0, 0xFFF))
ACCESS = st.tuples(st.booleans(), OFFSET, st.integers(0, 0xFFFFFFFFFFFFFFFF), st.sampled_from((1, 2, 4, 8)))


@given(st.lists(ACCESS, max_size=60))
def test_any_accesses(accesses: list[tuple[bool, int, int, int]]) -> None:
    """Whatever a guest does, registers have 32 bits, the line changes when it is said to, and the FIFO stays within 16."""
    port = Port()
    threading.Thread(target=port.uart.feed, args=(bytes(40),), daemon=True).start()
    for is_write, offset, value, size in accesses:
        if is_write:
            port.uart.write(offset, size, value)
        else:
            assert 0 <= port.uart.read(offset, size) <= 0xFFFFFFFF
        assert len(port.uart._received) <= FIFO_BYTES
        assert port.line == int(port.read(p.MIS) != 0)
    assert all(a != b for a, b in zip(port.edges, port.edges[1:], strict=False))
    port.uart.close()
