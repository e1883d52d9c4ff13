"""The network device, with a network in memory."""

import random
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices.net import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
)
from kvmkit.devices.reactor import Reactor
from kvmkit.devices.virtio.net import (
    RECEIVE,
    TRANSMIT,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    Net,
    checked_header,
    random_mac,
)
from kvmkit.testing import frames
from kvmkit.testing.fuzz.net import fuzz_driver, mutate_and_feed
from kvmkit.testing.net import MemoryBackend
from kvmkit.testing.virtqueue import Driver

MAC = bytes.fromhex("020000000001")
OFFLOADS = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4
PLAIN = bytes(12)
FRAME = frames.arp_request("10.0.2.15", "10.0.2.2")


class Card:
    """A device with its driver and backend."""

    def __init__(self, features: int | None = None, *, offloads: int = 0, mtu_bytes: int = 1500) -> None:
        self.backend = MemoryBackend(offloads, mtu_bytes)
        self.driver = Driver(Net(self.backend, mac=MAC), features)

    def send(self, *buffers: bytes) -> None:
        self.driver.add(TRANSMIT, buffers)
        self.driver.kick(TRANSMIT)
        assert [used.written_bytes for used in self.driver.used(TRANSMIT)] == [0]

    def room(self, *sizes: int, chains: int = 1) -> None:
        for _ in range(chains):
            self.driver.add(RECEIVE, (), sizes)
        self.driver.kick(RECEIVE)

    def received(self) -> list[bytes]:
        return [used.data[: used.written_bytes] for used in self.driver.used(RECEIVE)]


Cards = Callable[..., Card]


@pytest.fixture
def card() -> Iterator[Cards]:
    made: list[Card] = []

    def make(features: int | None = None, **options: int) -> Card:
        made.append(Card(features, **options))
        return made[-1]

    yield make
    for one in made:
        one.driver.close()
        assert one.backend.closed


def test_config(card: Cards) -> None:
    net = card(mtu_bytes=65520).driver.device
    assert net.config() == MAC + struct.pack("<HHH", 1, 1, 65520)
    assert net.features & VIRTIO_NET_F_MAC and net.features & VIRTIO_NET_F_MTU


@pytest.mark.parametrize("mac", [b"", bytes(6), bytes.fromhex("010000000000"), bytes(7)])
def test_a_mac_that_no_card_has(mac: bytes) -> None:
    with pytest.raises(ValueError, match="unicast"):
        Net(MemoryBackend(), mac=mac)


def test_random_macs_are_local_unicast_and_differ() -> None:
    macs = {random_mac() for _ in range(10)}
    assert len(macs) == 10
    assert all(len(mac) == 6 and mac[0] & 3 == 2 for mac in macs)


def test_a_backend_that_cannot_open_leaves_no_thread() -> None:
    class Closed(MemoryBackend):
        def open(self, reactor: Reactor, ready: Callable[[], object]) -> None:
            raise OSError("no")

    backend = Closed()
    with pytest.raises(OSError, match="no"):
        Net(backend, mac=MAC, name="no card")
    assert backend.closed
    assert "no card" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("cut", [1, 12, 20])
def test_transmit_whatever_the_layout(card: Cards, cut: int) -> None:
    one = card()
    data = PLAIN + FRAME
    one.send(data[:cut], data[cut:])
    assert one.backend.sent == [(PLAIN, FRAME)]


def test_one_interrupt_for_a_batch(card: Cards) -> None:
    one = card()
    for i in range(20):
        one.driver.add(TRANSMIT, [PLAIN, FRAME + bytes([i])])
    one.driver.kick(TRANSMIT)
    assert len(one.driver.used(TRANSMIT)) == 20
    assert [frame[-1] for _, frame in one.backend.sent] == list(range(20))
    assert one.driver.interrupts == 1


def test_a_long_batch_lets_others_in_between(card: Cards) -> None:
    one = card()
    for _ in range(256):
        one.driver.add(TRANSMIT, [PLAIN + FRAME])
    one.driver.kick(TRANSMIT)
    assert len(one.backend.sent) == 256
    one.driver.used(TRANSMIT)
    one.driver.device.reactor.call_and_wait(lambda: None)
    one.send(PLAIN + FRAME)
    assert len(one.backend.sent) == 257


@pytest.mark.parametrize(
    "data", [b"", PLAIN[:11], PLAIN, PLAIN + FRAME[:13], PLAIN + bytes(1519), PLAIN + bytes(80000)]
)
def test_what_is_no_frame_is_dropped(card: Cards, data: bytes) -> None:
    one = card(offloads=OFFLOADS)
    if data:
        one.send(data)
    else:
        one.driver.add(TRANSMIT, (), [64])  # nothing to read at all
        one.driver.kick(TRANSMIT)
        assert [used.written_bytes for used in one.driver.used(TRANSMIT)] == [0]
    assert one.backend.sent == []
    one.send(PLAIN + FRAME)
    assert len(one.backend.sent) == 1
    assert not one.driver.broken


def test_a_frame_of_the_mtu_passes(card: Cards) -> None:
    one = card()
    one.send(PLAIN + bytes(1518))
    assert len(one.backend.sent) == 1


def header(flags: int, gso: int, hdr_len: int, gso_size: int, start: int, offset: int) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, 0)


def test_offloads_that_were_negotiated(card: Cards) -> None:
    one = card(offloads=OFFLOADS)
    asked = header(1, 1, 54, 1448, 34, 16)
    one.send(asked, bytes(60000))
    assert one.backend.sent == [(asked, bytes(60000))]


@pytest.mark.parametrize(
    "asked",
    [
        header(1, 0, 0, 0, 34, 4096),
        header(1, 0, 0, 0, 0xFFFF, 0xFFFF),
        header(1, 0, 0, 0, 59, 0),  # the checksum would end one byte behind the frame
        header(0, 1, 54, 1448, 0, 0),  # segments without a checksum
        header(1, 1, 54, 0, 34, 16),  # of no size
        header(1, 1, 61, 1448, 34, 16),  # headers beyond the frame
        header(1, 4, 54, 1448, 34, 16),  # not negotiated
        header(1, 0x81, 54, 1448, 34, 16),
        header(1, 3, 54, 1448, 34, 16),  # UFO
        header(1, 0x80, 54, 1448, 34, 16),
        header(1, 0x7F, 54, 1448, 34, 16),
    ],
)
def test_absurd_offloads_are_dropped(card: Cards, asked: bytes) -> None:
    one = card(offloads=OFFLOADS)
    one.send(asked, bytes(60))
    assert one.backend.sent == []


def test_offloads_that_the_driver_did_not_take_are_dropped(card: Cards) -> None:
    one = card(VIRTIO_NET_F_MRG_RXBUF, offloads=OFFLOADS)
    one.send(header(1, 0, 0, 0, 34, 16), bytes(60))
    assert one.backend.sent == []


@given(st.binary(min_size=12, max_size=12), st.integers(14, 70000), st.integers(0, (1 << 17) - 1))
def test_checked_headers_are_sane(raw: bytes, frame_bytes: int, features: int) -> None:
    checked = checked_header(raw, frame_bytes, features, 1500)
    if checked is None:
        return
    flags, gso, hdr_len, gso_size, start, offset, buffers = struct.unpack("<BBHHHHH", checked)
    assert flags in (0, 1) and buffers == 0
    assert not flags or (features & VIRTIO_NET_F_CSUM and start + offset + 2 <= frame_bytes)
    assert flags or not (start or offset)
    if gso:
        assert flags and gso_size and hdr_len <= frame_bytes
        assert gso & 0x7F in (1, 4)
        assert not gso & 0x80 or features & VIRTIO_NET_F_HOST_ECN
    else:
        assert frame_bytes <= 1518 and not gso_size and not hdr_len
    assert checked_header(checked, frame_bytes, features, 1500) == checked


@given(st.integers(0, 1), st.integers(14, 1518), st.data())
def test_sane_headers_pass_unchanged(flags: int, frame_bytes: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, min(frame_bytes - 2, 0xFFFF))) if flags else 0
    start = data.draw(st.integers(0, frame_bytes - 2 - offset)) if flags else 0
    sane = header(flags, 0, 0, 0, start, offset)
    assert checked_header(sane, frame_bytes, VIRTIO_NET_F_CSUM, 1500) == sane


def test_receive(card: Cards) -> None:
    one = card()
    one.room(2000, chains=3)
    one.backend.give(FRAME, FRAME + b"2", header=b"\2" + bytes(11))
    expected = b"\2" + bytes(9) + b"\1\0"
    assert one.received() == [expected + FRAME, expected + FRAME + b"2"]
    assert one.driver.interrupts == 1


def test_a_packet_over_several_buffers(card: Cards) -> None:
    one = card(mtu_bytes=65520)
    one.room(700, 800, chains=10)
    frame = random.Random(1).randbytes(4000)
    one.backend.give(frame)
    first, second, third = one.received()
    assert first[:12] == bytes(10) + b"\3\0"
    assert len(first) == len(second) == 1500
    assert first[12:] + second + third == frame
    one.backend.give(FRAME)  # the buffers that weren't needed are the next packet's
    assert one.received() == [bytes(10) + b"\1\0" + FRAME]


def test_the_driver_sees_all_buffers_of_a_packet_at_once(card: Cards) -> None:
    one = card()
    one.room(100, chains=20)
    indices = []
    ring = one.driver.rings[RECEIVE]
    one.driver.memory.on_write(
        lambda gpa, size: (
            indices.append(one.driver.memory.read(ring.used + 2, 2)[0])
            if ring.used <= gpa < ring.used + 0x2000
            else None
        )
    )
    one.backend.give(bytes(1000))
    assert set(indices) == {0, 11}


def test_no_room(card: Cards) -> None:
    one = card()
    one.room(500)
    one.backend.give(bytes(range(256)) * 4, FRAME)
    assert one.received() == [] and one.backend.paused
    one.room(500)
    assert one.received() == [] and one.backend.paused
    one.room(500)
    assert b"".join(one.received())[12:] == bytes(range(256)) * 4
    assert one.backend.paused  # the other one waits now
    one.room(500)
    assert one.received() == [bytes(10) + b"\1\0" + FRAME]
    assert not one.backend.paused


def test_without_mergeable_buffers(card: Cards) -> None:
    one = card(0)
    one.room(100, chains=2)
    one.backend.give(bytes(89), FRAME, bytes(88))  # the first never fits
    assert one.received() == [bytes(10) + b"\1\0" + FRAME, bytes(10) + b"\1\0" + bytes(88)]


def test_a_packet_too_large_for_the_whole_queue(card: Cards) -> None:
    one = card()
    one.room(20, chains=256)
    one.backend.give(bytes(256 * 20 - 11), FRAME)
    assert b"".join(one.received())[12:] == FRAME


@pytest.mark.parametrize("size", [1, 11])
def test_a_receive_buffer_without_room_for_the_header(
    card: Cards, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    one = card()
    one.room(size)
    one.backend.give(FRAME)
    assert one.driver.broken
    assert f"a receive buffer of {size} bytes" in caplog.text
    one.backend.give(FRAME)
    one.driver.reset()
    one.driver.activate()
    one.room(100)
    assert one.received() == [bytes(10) + b"\1\0" + FRAME] and not one.driver.broken


def test_reset_forgets_buffers(card: Cards) -> None:
    one = card(VIRTIO_NET_F_MRG_RXBUF | VIRTIO_NET_F_GUEST_CSUM, offloads=VIRTIO_NET_F_GUEST_CSUM)
    assert one.backend.driver_features & VIRTIO_NET_F_GUEST_CSUM
    one.room(500, chains=2)
    one.backend.give(bytes(1200))  # takes both and waits for a third
    one.driver.reset()
    assert one.backend.paused and not one.backend.driver_features
    one.backend.give(FRAME)
    one.driver.activate()
    one.room(500)
    assert one.received() == [bytes(10) + b"\1\0" + FRAME]


def test_close_lets_go_of_the_guests_memory(card: Cards) -> None:
    one = card()
    one.room(500, chains=3)
    one.backend.give(bytes(600), bytes(3000))
    one.driver.close()
    one.driver.memory.close()  # BufferError if any view of it were left


def test_hostile_packets() -> None:
    rng = random.Random(3)
    for _ in range(8):
        with fuzz_driver(rng) as driver:
            for _ in range(20):
                mutate_and_feed(rng, driver)
