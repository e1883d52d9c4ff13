"""User-mode networking with libslirp itself, spoken to by the frames that a guest would send."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices.net import BackendError, slirp
from kvmkit.devices.net.slirp import Slirp, allowed, opens_socket
from kvmkit.devices.virtio.net import RECEIVE, TRANSMIT, Net
from kvmkit.testing import frames
from kvmkit.testing.frames import ACK, PSH, RST, SYN, Tcp
from kvmkit.testing.fuzz.net import fuzz_driver, mutate_and_feed
from kvmkit.testing.virtqueue import Driver

GATEWAY, NAMESERVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.15"
BUFFER_BYTES = 4096


T = TypeVar("T")


class Guest:
    """A network stack of a guest, as far as these tests need one."""

    def __init__(self, backend: Slirp) -> None:
        self.backend = backend
        self.driver = Driver(Net(backend, mac=frames.GUEST_MAC))
        self.frames: list[bytes] = []
        for _ in range(100):
            self.driver.add(RECEIVE, (), [BUFFER_BYTES])
        self.driver.kick(RECEIVE)
        self.headers: set[int] = set()
        self.gateway = b""
        self.send(frames.arp_request(GUEST, GATEWAY))
        self.gateway = self.expect(lambda frame: frame if frame[12:14] == b"\x08\x06" else None)[6:12]

    def send(self, *sent: bytes) -> None:
        for frame in sent:
            self.driver.add(TRANSMIT, [bytes(12) + frame])
        self.driver.kick(TRANSMIT)
        self.driver.used(TRANSMIT)

    def _take(self, wait: bool) -> None:
        back = self.driver.wait_used(RECEIVE, 1) if wait else self.driver.used(RECEIVE)
        while back:
            first = back.pop(0)
            packet = first.data[12 : first.written_bytes]
            self.headers.add(first.data[0])
            for _ in range(int.from_bytes(first.data[10:12], "little") - 1):
                following = back.pop(0)
                packet += following.data[: following.written_bytes]
            self.frames.append(packet)
            for _ in range(-(-(len(packet) + 12) // BUFFER_BYTES)):
                self.driver.add(RECEIVE, (), [BUFFER_BYTES])
        self.driver.kick(RECEIVE)

    def expect(self, match: Callable[[bytes], T | None]) -> T:
        """The first frame that `match` makes something of, waiting for it; earlier ones are dropped."""
        while True:
            while self.frames:
                if found := match(self.frames.pop(0)):
                    return found
            self._take(wait=True)

    def expect_tcp(self, flags: int = 0) -> Tcp:
        def match(frame: bytes) -> Tcp | None:
            segment = frames.parse_tcp(frame)
            return segment if segment and segment.flags & flags == flags else None

        return self.expect(match)

    def quiet(self) -> list[bytes]:
        """What has come in answer to what was sent: libslirp answers refused frames at once, or never."""
        self.driver.device.reactor.call_and_wait(lambda: None)
        self._take(wait=False)
        back, self.frames = self.frames, []
        return back


@pytest.fixture
def guest() -> Iterator[Guest]:
    try:
        backend = Slirp()
    except BackendError as error:
        pytest.skip(str(error))
    guest = Guest(backend)
    yield guest
    guest.driver.close()


@pytest.fixture
def service() -> Iterator[socket.socket]:
    """Listens on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def own_address() -> str:
    """An address of the host that isn't loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            pytest.skip(f"this host has no network: {error.strerror}")
        address: str = probe.getsockname()[0]
        return address


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slirp, "LIBRARY", "libslirp-that-nobody-has.so.0")
    with pytest.raises(BackendError, match="libslirp0.*or run without a network"):
        Slirp()


def test_arp(guest: Guest) -> None:
    assert guest.gateway == bytes.fromhex("52550a000202")


def test_dhcp_offers_what_guest_network_says(guest: Guest) -> None:
    guest.send(frames.dhcp_discover())
    offer = guest.expect(lambda frame: frame[42:] if frame[34:38] == b"\0\x43\0\x44" else None)
    network = Slirp.guest_network
    assert network is not None
    assert f"{socket.inet_ntoa(offer[16:20])}/24" == network["address"]
    assert b"\x01\x04\xff\xff\xff\x00" in offer
    assert b"\x03\x04" + socket.inet_aton(network["gateway"]) in offer
    assert b"\x06\x04" + socket.inet_aton(network["nameservers"][0]) in offer


def test_ping_the_gateway(guest: Guest) -> None:
    guest.send(frames.echo_request(GUEST, GATEWAY, b"x" * 3000, to=guest.gateway))
    reply = guest.expect(lambda frame: frame if frame[23:24] == b"\1" else None)
    assert reply[34] == 0 and reply[42:] == b"x" * 3000


def test_udp_to_the_host(guest: Guest) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
        echo.bind((own_address(), 0))
        echo.settimeout(10)
        address = echo.getsockname()
        guest.send(frames.udp((GUEST, 4000), address, b"ping", to=guest.gateway))
        data, sender = echo.recvfrom(100)
        assert data == b"ping"
        echo.sendto(b"pong", sender)
        answer = guest.expect(lambda frame: frame if frame[23:24] == b"\x11" else None)
        assert answer[42:] == b"pong"
        assert socket.inet_ntoa(answer[26:30]) == address[0]


def test_tcp_to_the_host(guest: Guest) -> None:
    with socket.create_server((own_address(), 0)) as listener:
        listener.settimeout(10)
        address = listener.getsockname()
        guest.send(frames.tcp((GUEST, 4000), address, SYN, seq=100, to=guest.gateway))
        answer = guest.expect_tcp(SYN | ACK)
        assert answer.source == address and answer.ack == 101
        guest.send(
            frames.tcp((GUEST, 4000), address, ACK, seq=101, ack=answer.seq + 1, to=guest.gateway),
            frames.tcp(
                (GUEST, 4000), address, ACK | PSH, b"hello", seq=101, ack=answer.seq + 1, to=guest.gateway
            ),
        )
        with listener.accept()[0] as accepted:
            accepted.settimeout(10)
            assert accepted.recv(100) == b"hello"


def handshake(guest: Guest, port: int) -> tuple[socket.socket, Tcp]:
    """Connect to the guest's port 80 by a forward."""
    host = socket.create_connection(("127.0.0.1", port), timeout=10)
    syn = guest.expect_tcp(SYN)
    assert syn.source[0] == GATEWAY and syn.destination == (GUEST, 80)
    guest.send(frames.tcp(syn.destination, syn.source, SYN | ACK, seq=100, ack=syn.seq + 1, to=guest.gateway))
    return host, syn


def test_forward(guest: Guest) -> None:
    port = guest.backend.forward(0, 80)
    host, syn = handshake(guest, port)
    with host:
        host.sendall(b"request")
        data = guest.expect_tcp(PSH)
        assert data.payload == b"request"
        ack = data.seq + 7
        guest.send(
            frames.tcp(syn.destination, syn.source, ACK | PSH, b"answer", seq=101, ack=ack, to=guest.gateway)
        )
        assert host.recv(100) == b"answer"
        guest.send(frames.tcp(syn.destination, syn.source, RST, seq=107, to=guest.gateway))
        with suppress(ConnectionResetError):
            assert host.recv(100) == b""


def test_a_window_holds_four_segments(guest: Guest) -> None:
    """With fewer, both sides' avoidance of silly windows can have each wait for the other."""
    with socket.create_connection(("127.0.0.1", guest.backend.forward(0, 80)), timeout=10):
        syn = guest.expect(lambda frame: frame[34:] if frame[23:24] == b"\6" else None)
        assert syn[20:22] == b"\2\4"  # the option for the largest segment
        assert 4 * int.from_bytes(syn[22:24], "big") <= 65535


def test_forward_of_a_port_in_use(guest: Guest, service: socket.socket) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        guest.backend.forward(service.getsockname()[1], 80)


def test_a_slow_guest_holds_the_sender_up(guest: Guest) -> None:
    host, syn = handshake(guest, guest.backend.forward(0, 80))
    data = random.Random(5).randbytes(3_000_000)
    sender = threading.Thread(target=host.sendall, args=(data,))
    sender.start()
    got = bytearray()
    while len(got) < len(data):
        segment = guest.expect_tcp(ACK)
        if segment.payload and segment.seq == syn.seq + 1 + len(got) & 0xFFFFFFFF:
            got += segment.payload
        ack = syn.seq + 1 + len(got) & 0xFFFFFFFF
        guest.send(frames.tcp(syn.destination, syn.source, ACK, seq=101, ack=ack, to=guest.gateway))
    assert got == data
    sender.join()
    host.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.0.1", "0.0.0.0", "0.1.2.3", NAMESERVER])
def test_the_hosts_loopback_is_out_of_reach(guest: Guest, service: socket.socket, address: str) -> None:
    port = service.getsockname()[1]
    for options in (b"", b"\1" * 8):
        guest.send(frames.tcp((GUEST, 4000), (address, port), SYN, to=guest.gateway, options=options))
    assert guest.quiet() == []
    with pytest.raises(BlockingIOError):
        service.accept()


@pytest.mark.parametrize("address", [GATEWAY, "255.255.255.255"])
def test_the_gateway_refuses_connections(guest: Guest, service: socket.socket, address: str) -> None:
    port = service.getsockname()[1]
    guest.send(frames.tcp((GUEST, 4000), (address, port), SYN, to=guest.gateway))
    refusal = guest.expect(lambda frame: frame if frame[12:14] == b"\x08\0" else None)
    assert refusal[23] == 1 and refusal[34] == 3  # ICMP, destination unreachable
    with pytest.raises(BlockingIOError):
        service.accept()


def test_loopback_datagrams_are_dropped(guest: Guest) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        service.setblocking(False)
        port = service.getsockname()[1]
        for address in ("127.0.0.1", "0.0.0.0", GATEWAY, NAMESERVER):
            guest.send(frames.udp((GUEST, 4000), (address, port), b"x", to=guest.gateway))
        guest.quiet()
        with pytest.raises(BlockingIOError):
            service.recv(10)


def test_sockets_are_limited(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest.backend, "_max_sockets", 3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind((own_address(), 0))
        service.settimeout(10)
        for port in range(4000, 4010):
            guest.send(
                frames.udp((GUEST, port), service.getsockname(), port.to_bytes(2, "big"), to=guest.gateway)
            )
        assert [int.from_bytes(service.recv(9), "big") for _ in range(3)] == [4000, 4001, 4002]
        service.setblocking(False)
        with pytest.raises(BlockingIOError):
            service.recv(9)


def test_the_backlog_is_bounded(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slirp, "BACKLOG_BYTES", 300_000)
    ping = frames.echo_request(GUEST, GATEWAY, b"x" * 60000, to=guest.gateway)
    for _ in range(20):
        guest.send(ping)  # and take nothing back
    assert sum(map(len, guest.backend._backlog)) == guest.backend._backlog_bytes <= 300_000


def test_checksums_are_declared_valid(guest: Guest) -> None:
    assert guest.headers == {2}


def test_closing_ends_connections(guest: Guest) -> None:
    host, _ = handshake(guest, guest.backend.forward(0, 80))
    guest.driver.close()
    with host, suppress(ConnectionResetError):
        assert host.recv(1) == b""
    with pytest.raises(BackendError, match="isn't open"):
        guest.backend.forward(0, 80)


def test_hostile_guest() -> None:
    try:
        backend = Slirp()
    except BackendError as error:
        pytest.skip(str(error))
    rng = random.Random(4)
    with fuzz_driver(rng, backend) as driver:
        for _ in range(100):
            mutate_and_feed(rng, driver)


@given(st.binary(max_size=80), st.sampled_from([b"\x08\0", b"\x08\6"]))
def test_filters_take_any_frame(rest: bytes, kind: bytes) -> None:
    frame = bytes(12) + kind + rest
    assert not (allowed(frame) and kind == b"\x08\0" and rest[16:17] in (b"\0", b"\x7f"))
    opens_socket(frame)


def test_what_opens_a_socket() -> None:
    there = (GUEST, 1), ("192.0.2.1", 2)
    gateway = frames.BROADCAST
    assert opens_socket(frames.tcp(*there, SYN))
    assert not opens_socket(frames.tcp(*there, SYN | ACK))
    assert not opens_socket(frames.tcp(*there, ACK, b"data", options=b"\1" * 12))
    assert opens_socket(frames.tcp(*there, SYN, options=b"\1" * 12))
    assert opens_socket(frames.udp(*there, b""))
    assert opens_socket(frames.ipv4(GUEST, "192.0.2.1", 6, bytes(8), to=gateway, fragment=0x2000))
    assert not opens_socket(frames.arp_request(GUEST, GATEWAY))


def test_the_name_server_serves_names_alone() -> None:
    for protocol in (6, 17):
        ports = (4000).to_bytes(2, "big") + (53).to_bytes(2, "big")
        whole = frames.ipv4(GUEST, NAMESERVER, protocol, ports + bytes(20), to=frames.BROADCAST)
        assert allowed(whole)
        other = frames.ipv4(GUEST, NAMESERVER, protocol, b"\0\x35\0\x16" + bytes(20), to=frames.BROADCAST)
        assert not allowed(other)
        part = frames.ipv4(GUEST, NAMESERVER, protocol, ports, to=frames.BROADCAST, fragment=0x2000)
        assert not allowed(part)
