"""Tap interfaces of the host's kernel. Most of it takes the right to make one."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvmkit.devices.net import VIRTIO_NET_F_CSUM, BackendError, tap
from kvmkit.devices.net.tap import Tap
from kvmkit.devices.virtio.net import RECEIVE, TRANSMIT, Net
from kvmkit.testing import frames
from kvmkit.testing.virtqueue import Driver

KIND = 0x88B5
"""An Ethernet type for experiments (IEEE 802): nothing of the kernel's own has it."""


HOST, GUEST = "198.18.77.1", "198.18.77.2"
HOST_BYTES = socket.inet_aton(HOST)
SIOCSIFFLAGS, SIOCSIFADDR = 0x8914, 0x8916


@contextmanager
def card_on_tap(features: int | None = None) -> Iterator[tuple[Driver, socket.socket]]:
    """A card on a new interface, and a socket that is the host's side of it."""
    name = f"kvmkit{os.getpid() % 1000000}"
    try:
        backend = Tap(name)
    except BackendError as error:
        pytest.skip(str(error))
    with (
        Driver(Net(backend, mac=frames.GUEST_MAC), features) as driver,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KIND)) as host,
    ):
        with suppress(OSError):  # no IPv6, which would announce itself
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        _ioctl(name, SIOCSIFFLAGS, struct.pack("=H", 0x1 | 0x40))  # IFF_UP | IFF_RUNNING
        host.bind((name, KIND))
        host.settimeout(10)
        yield driver, host


def _ioctl(name: str, request: int, value: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, request, struct.pack("16s24s", name.encode(), value))


@pytest.fixture
def card() -> Iterator[tuple[Driver, socket.socket]]:
    with card_on_tap() as made:
        yield made


def test_both_ways(card: tuple[Driver, socket.socket]) -> None:
    driver, host = card
    frame = frames.ethernet(frames.BROADCAST, KIND, b"to the host" * 10)
    driver.add(TRANSMIT, [bytes(12), frame])
    driver.kick(TRANSMIT)
    assert host.recv(2000) == frame
    driver.add(RECEIVE, (), [2000])
    driver.kick(RECEIVE)
    answer = frames.ethernet(frames.GUEST_MAC, KIND, b"to the guest" * 10)
    host.send(answer)
    (used,) = driver.wait_used(RECEIVE)
    assert used.data[: used.written_bytes] == bytes(10) + b"\1\0" + answer


def test_packets_wait_for_room(card: tuple[Driver, socket.socket]) -> None:
    driver, host = card
    sent = [frames.ethernet(frames.GUEST_MAC, KIND, bytes([i]) * 50) for i in range(3)]
    for frame in sent:
        host.send(frame)
    driver.device.reactor.call_and_wait(lambda: None)
    for _ in sent:
        driver.add(RECEIVE, (), [2000])
    driver.kick(RECEIVE)
    back = driver.wait_used(RECEIVE, 3)
    assert [used.data[12 : used.written_bytes] for used in back] == sent


@pytest.mark.parametrize("takes_partial", [True, False])
def test_checksums_are_left_to_the_other_side(takes_partial: bool) -> None:
    with card_on_tap(None if takes_partial else VIRTIO_NET_F_CSUM) as (driver, _):
        assert isinstance(driver.device, Net) and isinstance(driver.device.backend, Tap)
        _ioctl(driver.device.backend.name, SIOCSIFADDR, struct.pack("=HH4s", socket.AF_INET, 0, HOST_BYTES))
        for _ in range(20):
            driver.add(RECEIVE, (), [2000])
        driver.kick(RECEIVE)
        driver.add(TRANSMIT, [bytes(12), frames.arp_request(GUEST, HOST)])
        driver.kick(TRANSMIT)
        mac = _expect(driver, lambda packet: packet[24:26] == b"\x08\x06")[18:24]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
            service.bind((HOST, 0))
            service.settimeout(10)
            datagram = bytearray(frames.udp((GUEST, 4000), service.getsockname(), b"ping", to=mac))
            pseudo = HOST_BYTES + socket.inet_aton(GUEST) + struct.pack(">HH", 17, 12)
            datagram[40:42] = (~frames.checksum(pseudo) & 0xFFFF).to_bytes(2, "big")
            driver.add(TRANSMIT, [struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0), bytes(datagram)])
            driver.kick(TRANSMIT)
            data, sender = service.recvfrom(100)
            assert data == b"ping"
            service.sendto(b"pong", sender)
            packet = _expect(driver, lambda packet: packet[35] == 17 and packet[54:58] == b"pong")
        whole = pseudo + packet[46:58]
        if takes_partial:
            assert struct.unpack_from("<BBHHHH", packet) == (1, 0, 0, 0, 34, 6)
        else:
            assert packet[0] == 0 and frames.checksum(whole) == 0


def _expect(driver: Driver, match: Callable[[bytes], bool]) -> bytes:
    while True:
        for used in driver.wait_used(RECEIVE):
            packet = used.data[: used.written_bytes]
            if match(packet):
                return packet


def test_a_tap_has_one_user(card: tuple[Driver, socket.socket]) -> None:
    assert isinstance(card[0].device, Net) and isinstance(card[0].device.backend, Tap)
    with pytest.raises(BackendError, match="it is in use"):
        Tap(card[0].device.backend.name)


def test_a_deleted_interface_is_let_go(
    card: tuple[Driver, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    driver, _ = card
    assert isinstance(driver.device, Net) and isinstance(driver.device.backend, Tap)
    backend = driver.device.backend
    driver.device.reactor.call_and_wait(lambda: backend._on_events(0x8))
    assert "is gone" in caplog.text
    driver.add(TRANSMIT, [bytes(12), frames.arp_request("10.0.0.1", "10.0.0.2")])
    driver.kick(TRANSMIT)
    driver.add(RECEIVE, (), [2000])
    driver.kick(RECEIVE)
    driver.reset()
    driver.activate()
    assert not driver.broken


@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "a/b", "tap%d", "."])
def test_names_that_no_interface_has(name: str) -> None:
    with pytest.raises(BackendError, match="can't be an interface's name"):
        Tap(name)


def test_an_interface_that_is_no_tap() -> None:
    with pytest.raises(BackendError, match="lo"):
        Tap("lo")


def test_says_what_the_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "_DEVICE", "/nowhere/tun")
    with pytest.raises(BackendError, match=os.strerror(errno.ENOENT)):
        Tap("tap0")
