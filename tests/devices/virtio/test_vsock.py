"""The socket device: a driver in Python is the guest, and unix sockets are the host."""

import os
import random
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmkit.devices.virtio import vsock
from kvmkit.devices.virtio.queue import QueueError
from kvmkit.devices.virtio.vsock import BUF_ALLOC_BYTES, HEADER, Vsock, credit_bytes
from kvmkit.testing.fuzz.vsock import Host, mutate_and_feed
from kvmkit.testing.virtqueue import Driver
from kvmkit.testing.vsock import (
    BOTH,
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    GUEST_PORT,
    PORT,
    RCV,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SEND,
    SHUTDOWN,
    TIMEOUT_S,
    TX,
    Packet,
    client,
    listening,
)


class Guest:
    """The guest's end: packets out and in."""

    def __init__(self, device: Vsock, *, buffers: int = 64, buffer_bytes: int = 4096) -> None:
        self.device = device
        self.driver = Driver(device)
        self.buffer_bytes = buffer_bytes
        self.inbox: list[Packet] = []
        self.give(buffers)

    def give(self, buffers: int) -> None:
        """Receive buffers for the device."""
        for _ in range(buffers):
            self.driver.add(RX, in_=[self.buffer_bytes])
        self.driver.kick(RX)

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            if not self.driver.rings[TX].free:
                self.driver.wait_used(TX, 1)
            self.driver.add(TX, out=[packet.pack()])
        self.driver.kick(TX)
        self.driver.used(TX)

    def collect(self, *, refill: bool = True) -> None:
        """Take what the device has sent."""
        back = self.driver.used(RX)
        self.inbox += [Packet.from_device(u.data[: u.written_bytes]) for u in back]
        if back and refill:
            self.give(len(back))

    def receive(self) -> Packet:
        """The next packet; waits for it."""
        for _ in range(int(TIMEOUT_S / 0.01)):
            self.collect()
            if self.inbox:
                return self.inbox.pop(0)
            with self.driver._changed:
                self.driver._changed.wait(0.01)
        raise TimeoutError("no packet from the device")

    def expect(self, op: int) -> Packet:
        packet = self.receive()
        assert packet.op == op, packet
        return packet

    def nothing_comes(self) -> bool:
        """Whether the device has no more to say, once it has done all that it can."""
        settle(self.device)
        self.collect()
        return not self.inbox

    def connect(self, **fields: int) -> None:
        """Connect to the host's `PORT`."""
        self.send(Packet(REQUEST, **fields))  # type: ignore[arg-type]
        self.expect(RESPONSE)

    def close(self) -> None:
        self.driver.close()


def settle(device: Vsock) -> None:
    """Return when the device's thread has seen all that happened before, and done what it put off."""
    idle = False
    while not idle:
        done = threading.Event()
        # The second is only heard of in a turn that began, with a look at all descriptors, after the first ran.
        device.reactor.call_later(0, lambda done=done: device.reactor.call_later(0, done.set))  # type: ignore[misc]
        assert done.wait(TIMEOUT_S)
        idle = device._work_later is None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v"


@pytest.fixture
def device(path: Path) -> Iterator[Vsock]:
    device = Vsock(CID, path)
    yield device
    device.close()


@pytest.fixture
def guest(device: Vsock) -> Iterator[Guest]:
    guest = Guest(device)
    yield guest
    guest.close()


@pytest.fixture
def server(path: Path) -> Iterator[socket.socket]:
    """A program of the host that listens at `PORT`."""
    with listening(path, PORT) as sock:
        yield sock


def accepted(guest: Guest, server: socket.socket, **fields: int) -> socket.socket:
    """The host's end of a new connection from the guest."""
    guest.connect(**fields)
    sock, _ = server.accept()
    sock.settimeout(TIMEOUT_S)
    return sock


def answered(guest: Guest, path: Path, **fields: int) -> tuple[socket.socket, Packet]:
    """The host's end of a new connection to the guest, and the request."""
    sock = client(path, b"CONNECT %d\n" % GUEST_PORT)
    request = guest.expect(REQUEST)
    guest.send(Packet(RESPONSE, host_port=request.host_port, **fields))  # type: ignore[arg-type]
    assert sock.recv(64) == b"OK %d\n" % request.host_port
    return sock, request


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def exactly(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size and (part := sock.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def ended(sock: socket.socket) -> bool:
    """Whether the other end closed (waits for it)."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # it closed with something unread
        return True


# The device and its socket.


def test_configuration_holds_the_cid(device: Vsock) -> None:
    assert device.config() == bytes([CID]) + bytes(7)
    assert device.device_id == 19
    assert len(device.queue_sizes) == 3


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32])
def test_reserved_cids(cid: int, path: Path) -> None:
    with pytest.raises(ValueError, match="CID"):
        Vsock(cid, path)
    assert not path.exists()


def test_a_path_that_leaves_no_room_for_ports() -> None:
    with pytest.raises(ValueError, match="107"):
        Vsock(CID, "/" + 97 * "x")


def test_the_socket_is_the_users_alone_and_goes_with_the_device(path: Path) -> None:
    device = Vsock(CID, path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        device.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    Vsock(CID, path).close()


def test_a_live_socket_is_left_alone(device: Vsock, path: Path) -> None:
    with pytest.raises(FileExistsError, match="listens"):
        Vsock(CID, path)
    assert path.is_socket()


def test_another_file_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="isn't a socket"):
        Vsock(CID, path)
    assert path.read_text() == "mine"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Vsock(CID, tmp_path / "none" / "v")


def test_close_leaves_a_socket_of_somebody_else(path: Path) -> None:
    device = Vsock(CID, path)
    path.rename(path.with_name("moved"))  # keeps the inode in use
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        device.close()
        assert path.is_socket()


# Connections from the host.


def test_a_client_reaches_a_program_in_the_guest(guest: Guest, path: Path) -> None:
    sock = client(path, b"CONNECT %d\n" % GUEST_PORT)
    request = guest.expect(REQUEST)
    assert (request.guest_port, request.src_cid, request.dst_cid, request.kind) == (GUEST_PORT, 2, CID, 1)
    assert request.host_port >= 1 << 30
    assert request.buf_alloc == BUF_ALLOC_BYTES
    guest.send(
        Packet(RESPONSE, host_port=request.host_port), Packet(RW, b"hello", host_port=request.host_port)
    )
    expected = b"OK %d\nhello" % request.host_port
    assert exactly(sock, len(expected)) == expected
    sock.sendall(b"back")
    assert guest.expect(RW).data == b"back"
    sock.close()


def test_clients_have_their_own_ports(guest: Guest, path: Path) -> None:
    (a, first), (b, second) = answered(guest, path), answered(guest, path)
    assert first.host_port != second.host_port
    guest.send(Packet(RW, b"2", host_port=second.host_port), Packet(RW, b"1", host_port=first.host_port))
    assert (a.recv(9), b.recv(9)) == (b"1", b"2")
    a.close()
    b.close()


def test_refused_by_the_guest(guest: Guest, path: Path) -> None:
    with client(path, b"CONNECT 1\n") as sock:
        request = guest.expect(REQUEST)
        guest.send(Packet(RST, host_port=request.host_port, guest_port=1))
        assert ended(sock)
    assert guest.nothing_comes()


def test_what_follows_the_line_waits_for_the_guest(guest: Guest, path: Path) -> None:
    sock = client(path, b"CONNECT 4000\nearly")
    request = guest.expect(REQUEST)
    assert guest.nothing_comes()
    guest.send(Packet(RESPONSE, host_port=request.host_port))
    assert guest.expect(RW).data == b"early"
    sock.close()


def test_a_line_in_pieces(guest: Guest, device: Vsock, path: Path) -> None:
    with client(path) as sock:
        for byte in b"CONNECT 77\n":
            assert guest.nothing_comes()
            sock.sendall(bytes([byte]))
        assert guest.expect(REQUEST).guest_port == 77


@pytest.mark.parametrize("line", [b"connect 77\n", b"CONNECT  77 \r\n", b"CONNECT\t00077\n"])
def test_lines_that_are_taken_too(guest: Guest, path: Path, line: bytes) -> None:
    with client(path, line):
        assert guest.expect(REQUEST).guest_port == 77


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 2\n",
        b"CONNECT 0x10\n",
        b"CONNECT \xd9\xa1\n",
        b"CONNECT 1" + 32 * b"0",
        32 * b"x",
    ],
)
def test_wrong_lines(guest: Guest, path: Path, line: bytes) -> None:
    with client(path, line) as sock:
        assert ended(sock)
    assert guest.nothing_comes()
    assert not guest.device._all


@pytest.mark.parametrize("part", [b"", b"CONNECT 40"])
@pytest.mark.parametrize("end", [socket.socket.close, lambda sock: sock.shutdown(socket.SHUT_WR)])
def test_a_client_that_ends_within_its_line(
    guest: Guest, path: Path, part: bytes, end: Callable[[socket.socket], None]
) -> None:
    with client(path, part) as sock:
        settle(guest.device)
        assert len(guest.device._all) == 1
        end(sock)
        settle(guest.device)
        assert not guest.device._all
    assert guest.nothing_comes()


def test_a_client_that_never_finishes_its_line(
    guest: Guest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "CONNECT_LINE_TIMEOUT_S", 0.0)
    with client(path) as sock:
        assert ended(sock)


def test_a_client_that_goes_before_the_guest_answers(guest: Guest, path: Path) -> None:
    with client(path, b"CONNECT 4000\n"):
        request = guest.expect(REQUEST)
    guest.expect(RST)
    guest.send(Packet(RESPONSE, host_port=request.host_port))
    guest.expect(RST)  # it answered to nobody
    assert not guest.device._all


def test_a_client_that_goes_while_there_is_no_driver(device: Vsock, path: Path) -> None:
    client(path, b"CONNECT 4000\n").close()
    settle(device)
    assert not device._all
    guest = Guest(device)
    assert guest.nothing_comes()


def test_clients_wait_for_the_driver(device: Vsock, path: Path) -> None:
    with client(path, b"CONNECT 4000\n"):
        settle(device)
        device.reactor.call_and_wait(device.reset)  # a driver begins so
        guest = Guest(device)
        assert guest.expect(REQUEST).guest_port == 4000


# Connections from the guest.


def test_the_guest_reaches_a_program_of_the_host(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    sock.sendall(b"hello")
    packet = guest.expect(RW)
    assert packet == Packet(RW, b"hello", buf_alloc=BUF_ALLOC_BYTES, src_cid=2, dst_cid=CID)
    guest.send(Packet(RW, b"back"))
    assert sock.recv(9) == b"back"
    sock.close()


def test_nobody_listens(guest: Guest, path: Path) -> None:
    guest.send(Packet(REQUEST))
    packet = guest.expect(RST)
    assert (packet.host_port, packet.guest_port, packet.src_cid) == (PORT, GUEST_PORT, 2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{path}_{PORT}")
        guest.send(Packet(REQUEST))
        guest.expect(RST)
    assert not guest.device._all


def test_a_backlog_that_is_full(guest: Guest, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{path}_{PORT}")
        sock.listen(0)
        guest.connect()
        guest.send(Packet(REQUEST, guest_port=1))
        guest.expect(RST)


def test_a_second_request_for_a_connection_resets_it(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.send(Packet(REQUEST))
    guest.expect(RST)
    assert ended(sock)
    accepted(guest, server).close()


# Credit.


@pytest.mark.parametrize(
    ("buf_alloc", "fwd_cnt", "sent", "credit"),
    [
        (100, 0, 0, 100),
        (100, 0, 100, 0),
        (100, 50, 100, 50),
        (100, 0xFFFFFFF0, 0x1_0000_0010, 100 - 0x20),
        (0xFFFFFFFF, 5, 0x2_0000_0005, 0xFFFFFFFF),
        (10, 0, 100, -90),
    ],
)
def test_credit_is_counted_modulo_2_32(buf_alloc: int, fwd_cnt: int, sent: int, credit: int) -> None:
    assert credit_bytes(buf_alloc, fwd_cnt, sent) == credit


def test_the_host_waits_for_credit(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server, buf_alloc=10)
    sock.sendall(b"0123456789abcdef")
    assert guest.expect(RW).data == b"0123456789"
    guest.expect(CREDIT_REQUEST)
    guest.send(Packet(CREDIT_UPDATE, buf_alloc=10))  # it has none
    assert guest.nothing_comes()  # and isn't asked again
    guest.send(Packet(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4))
    assert guest.expect(RW).data == b"abcd"
    guest.expect(CREDIT_REQUEST)
    guest.send(Packet(CREDIT_UPDATE, buf_alloc=5, fwd_cnt=4))  # less than is under way
    assert guest.nothing_comes()
    guest.send(Packet(RW, b"x", buf_alloc=10, fwd_cnt=14))  # any packet tells
    assert guest.expect(RW).data == b"ef"
    sock.close()


def test_the_guests_data_waits_for_the_host(guest: Guest, server: socket.socket) -> None:
    """A host that doesn't read: the device keeps what it promised to, and no byte more."""
    sock = accepted(guest, server)
    data = random.Random(1).randbytes(4 << 20)
    sent = fwd_cnt = 0
    while (credit := BUF_ALLOC_BYTES - (sent - fwd_cnt)) > 0:
        part = data[sent : sent + min(credit, 65536)]
        guest.send(Packet(RW, part))
        sent += len(part)
        guest.send(Packet(CREDIT_REQUEST))
        fwd_cnt = guest.expect(CREDIT_UPDATE).fwd_cnt
    (connection,) = guest.device._all
    assert len(connection.kept) == BUF_ALLOC_BYTES
    assert sent < len(data)
    # It is told when there is room again.
    assert exactly(sock, sent // 2) == data[: sent // 2]
    assert guest.expect(CREDIT_UPDATE).fwd_cnt > fwd_cnt
    guest.send(Packet(SHUTDOWN, flags=SEND))
    assert read_all(sock) == data[sent // 2 : sent]
    sock.close()


def test_a_guest_that_ignores_credit_is_reset(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    for _ in range(100):
        guest.send(Packet(RW, bytes(65536)))
        assert sum(len(c.kept) for c in guest.device._all) <= BUF_ALLOC_BYTES
        if not guest.device._all:
            break
    else:
        pytest.fail("a host that doesn't read took 6 MB")
    while (packet := guest.receive()).op == CREDIT_UPDATE:
        pass
    assert packet.op == RST
    read_all(sock)
    sock.close()


def test_counters_wrap_around(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    (connection,) = guest.device._all

    def age() -> None:
        connection.fwd_cnt = connection.told_fwd_cnt = connection.sent = 0xFFFFFFFF

    guest.device.reactor.call_and_wait(age)
    guest.send(
        Packet(RW, b"abc", buf_alloc=16, fwd_cnt=0xFFFFFFFF), Packet(CREDIT_REQUEST, fwd_cnt=0xFFFFFFFF)
    )
    assert guest.expect(CREDIT_UPDATE).fwd_cnt == 2
    guest.send(Packet(CREDIT_UPDATE, buf_alloc=16, fwd_cnt=0xFFFFFFFF))
    sock.sendall(bytes(20))
    assert len(guest.expect(RW).data) == 16
    guest.expect(CREDIT_REQUEST)
    guest.send(Packet(CREDIT_UPDATE, buf_alloc=16, fwd_cnt=15))
    assert len(guest.expect(RW).data) == 4
    sock.close()


def test_the_guest_hears_of_credit_before_it_runs_out(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    for _ in range(BUF_ALLOC_BYTES // 2 // 4096):
        guest.send(Packet(RW, bytes(4096)))
        exactly(sock, 4096)
    assert guest.expect(CREDIT_UPDATE).fwd_cnt == BUF_ALLOC_BYTES // 2
    assert guest.nothing_comes()
    sock.close()


# Ends.


def test_the_host_stops_sending(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    sock.sendall(b"last")
    sock.shutdown(socket.SHUT_WR)
    assert guest.expect(RW).data == b"last"
    assert guest.expect(SHUTDOWN).flags == SEND
    guest.send(Packet(RW, b"still"))
    assert sock.recv(9) == b"still"
    guest.send(Packet(SHUTDOWN, flags=SEND))
    assert ended(sock)
    assert guest.expect(SHUTDOWN).flags == BOTH
    guest.send(Packet(RST))
    assert guest.nothing_comes()
    assert not guest.device._all
    sock.close()


def test_the_guest_stops_sending(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.send(Packet(RW, b"last"), Packet(SHUTDOWN, flags=SEND))
    assert read_all(sock) == b"last"
    sock.sendall(b"still")
    assert guest.expect(RW).data == b"still"
    sock.shutdown(socket.SHUT_WR)
    assert guest.expect(SHUTDOWN).flags == BOTH
    sock.close()


def test_the_guest_stops_taking(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.send(Packet(SHUTDOWN, flags=RCV))
    with pytest.raises(BrokenPipeError):
        sock.sendall(b"x")
    guest.send(Packet(RW, b"more"))
    assert sock.recv(9) == b"more"
    sock.close()
    assert guest.expect(SHUTDOWN).flags == BOTH


def test_the_host_stops_taking(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    sock.shutdown(socket.SHUT_RD)
    guest.send(Packet(RW, b"x"))
    assert guest.expect(SHUTDOWN).flags == RCV
    sock.sendall(b"still")
    assert guest.expect(RW).data == b"still"
    guest.send(Packet(RW, b"under way"))  # for nobody
    assert guest.nothing_comes()
    sock.close()
    assert guest.expect(SHUTDOWN).flags == BOTH


def test_the_host_closes(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    sock.sendall(b"last")
    sock.close()
    assert guest.expect(RW).data == b"last"
    assert guest.expect(SHUTDOWN).flags in (SEND, BOTH)
    if not guest.nothing_comes():
        assert guest.expect(SHUTDOWN).flags == BOTH
    guest.send(Packet(RW, b"under way"))
    assert guest.nothing_comes()
    guest.send(Packet(RST))
    assert not guest.device._all


def test_both_close_at_once(guest: Guest, server: socket.socket) -> None:
    accepted(guest, server).close()
    while guest.expect(SHUTDOWN).flags != BOTH:
        pass
    guest.send(Packet(SHUTDOWN, flags=BOTH))
    guest.expect(RST)
    assert not guest.device._all


def test_a_guest_that_does_not_answer_an_end(
    guest: Guest, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "CLOSE_TIMEOUT_S", 0.0)
    accepted(guest, server).close()
    while guest.expect(SHUTDOWN).flags != BOTH:
        pass
    guest.expect(RST)
    assert not guest.device._all


def test_ports_are_free_again_at_once_for_a_guest_that_reuses_them(
    guest: Guest, server: socket.socket
) -> None:
    accepted(guest, server).close()
    while guest.expect(SHUTDOWN).flags != BOTH:
        pass
    sock = accepted(guest, server)
    guest.send(Packet(RW, b"new"))
    assert sock.recv(9) == b"new"
    sock.close()


def test_the_guest_closes(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.send(Packet(RW, b"last"), Packet(SHUTDOWN, flags=BOTH))
    guest.expect(RST)
    assert read_all(sock) == b"last"
    sock.close()
    assert not guest.device._all


@pytest.mark.parametrize("impatient", [False, True])
def test_the_guest_closes_and_the_host_reads_late(
    guest: Guest, server: socket.socket, impatient: bool
) -> None:
    sock = accepted(guest, server)
    data = random.Random(2).randbytes(BUF_ALLOC_BYTES)
    guest.send(*(Packet(RW, data[i : i + 65536]) for i in range(0, len(data), 65536)))
    guest.send(Packet(SHUTDOWN, flags=BOTH))
    if guest.device._all:  # else the socket takes it all
        packets = [p.op for p in guest.inbox]
        assert RST not in packets
        if impatient:
            guest.send(Packet(RST))
    assert read_all(sock) == data
    settle(guest.device)
    assert not guest.device._all
    guest.collect()
    assert (RST in [p.op for p in guest.inbox]) != impatient
    sock.close()


def test_the_guest_resets(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.send(Packet(RST))
    assert ended(sock)
    assert guest.nothing_comes()
    assert not guest.device._all


# Limits.


def test_connections_are_limited(
    guest: Guest, path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "MAX_CONNECTIONS", 2)
    first, _ = answered(guest, path)
    second = accepted(guest, server)
    guest.send(Packet(REQUEST, guest_port=9))
    guest.expect(RST)
    with client(path, b"CONNECT 7\n"):
        assert guest.nothing_comes()
        guest.send(Packet(RST))  # room for one
        assert guest.expect(REQUEST).guest_port == 7
    first.close()
    second.close()


def test_packets_wait_for_buffers(device: Vsock, server: socket.socket) -> None:
    guest = Guest(device, buffers=0)
    guest.send(Packet(REQUEST))
    sock, _ = server.accept()
    sock.sendall(10000 * b"x" + b"end")
    sock.shutdown(socket.SHUT_WR)
    guest.send(Packet(CREDIT_REQUEST))
    assert guest.nothing_comes()
    got: list[Packet] = []
    while not got or got[-1].op != SHUTDOWN:
        guest.give(1)
        settle(device)
        guest.collect(refill=False)
        got += guest.inbox
        guest.inbox.clear()
    assert [p.op for p in got] == [RESPONSE, RW, RW, RW, SHUTDOWN]
    assert b"".join(p.data for p in got) == 10000 * b"x" + b"end"
    sock.close()


def test_refusals_wait_for_buffers_and_are_bounded(device: Vsock) -> None:
    guest = Guest(device, buffers=0)
    count = 250
    for i in range(count):
        guest.driver.add(TX, out=[Packet(RW, guest_port=i).pack()])
    guest.driver.kick(TX)
    settle(device)
    taken = len(guest.driver.used(TX))
    assert taken == len(device._refusals) < count  # the rest stays in the queue
    guest.give(64)
    ports = [guest.expect(RST).guest_port for _ in range(count)]
    assert ports == list(range(count))
    assert taken + len(guest.driver.used(TX)) == count


def test_packets_that_waited_for_refusals_are_taken_without_another_kick(device: Vsock) -> None:
    guest = Guest(device, buffers=0)
    for i in range(250):
        guest.driver.add(TX, out=[Packet(RW, guest_port=i).pack()])
    guest.driver.kick(TX)
    settle(device)
    guest.give(256)
    settle(device)
    guest.collect(refill=False)
    assert [p.op for p in guest.inbox] == 250 * [RST]


def test_no_receive_queue_at_all(device: Vsock) -> None:
    guest = Guest(device, buffers=0)
    guest.driver.queues[RX] = None  # type: ignore[call-overload]
    guest.device.reactor.call_and_wait(lambda: device.activate(0, guest.driver.queues))
    for i in range(250):
        guest.driver.add(TX, out=[Packet(RW, guest_port=i).pack()])
    guest.driver.kick(TX)
    settle(device)
    assert device._work_later is None  # it doesn't try again and again
    assert len(device._refusals) == 128


def test_a_connection_without_credit_does_not_hold_up_others(guest: Guest, server: socket.socket) -> None:
    first = accepted(guest, server, buf_alloc=0)
    second = accepted(guest, server, guest_port=1)
    first.sendall(b"waits")
    guest.expect(CREDIT_REQUEST)
    second.sendall(b"goes")
    assert guest.expect(RW).data == b"goes"
    first.close()
    second.close()


def test_many_small_packets_are_kept_in_little_memory(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    while not (kept := next(iter(guest.device._all)).kept):
        guest.send(Packet(RW, bytes(65536)))
    before = len(kept)
    for _ in range(50):
        guest.send(Packet(RW, b"x"))
    assert len(kept) == before + 50
    assert isinstance(kept, bytearray)
    sock.close()


# Transport.


def test_reset_ends_all_connections(guest: Guest, path: Path, server: socket.socket) -> None:
    first, _ = answered(guest, path)
    second = accepted(guest, server)
    guest.send(Packet(RW, host_port=1, guest_port=1))
    guest.driver.reset()
    assert ended(first)
    assert ended(second)
    assert not guest.device._all
    assert not guest.device._refusals
    guest.driver.activate()
    guest.inbox.clear()
    guest.give(8)
    accepted(guest, server).close()


def test_transport_reset(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    guest.driver.add(EVENT, in_=[8])
    guest.driver.kick(EVENT)
    guest.device.transport_reset()
    (event,) = guest.driver.wait_used(EVENT)
    assert (event.written_bytes, event.data[:4]) == (4, bytes(4))
    assert ended(sock)
    assert guest.nothing_comes()


def test_transport_reset_waits_for_a_buffer(guest: Guest) -> None:
    guest.device.transport_reset()
    settle(guest.device)
    guest.driver.add(EVENT, in_=[4])
    guest.driver.add(EVENT, in_=[4])
    guest.driver.kick(EVENT)
    assert len(guest.driver.used(EVENT)) == 1


def test_transport_reset_without_a_driver(device: Vsock) -> None:
    device.transport_reset()
    settle(device)
    guest = Guest(device)
    guest.driver.add(EVENT, in_=[4])
    guest.driver.kick(EVENT)
    assert not guest.driver.used(EVENT)


@pytest.mark.parametrize(("queue", "size"), [(RX, HEADER.size), (EVENT, 3)])
def test_a_buffer_too_small_is_a_broken_queue(
    device: Vsock, server: socket.socket, queue: int, size: int
) -> None:
    guest = Guest(device, buffers=0)
    guest.driver.add(queue, in_=[size])
    guest.driver.kick(queue)
    guest.send(Packet(REQUEST))
    device.transport_reset()
    settle(device)
    assert guest.driver.broken
    assert not device._all


def test_close_ends_everything(path: Path, server: socket.socket) -> None:
    guest = Guest(Vsock(CID, path))
    before = len(os.listdir("/proc/self/fd"))
    first, _ = answered(guest, path)
    second = accepted(guest, server)
    third = client(path, b"CONN")
    guest.close()
    assert ended(first) and ended(second) and ended(third)
    for sock in first, second, third:
        sock.close()
    assert len(os.listdir("/proc/self/fd")) < before


# Wrong packets.


@pytest.mark.parametrize(
    "packet",
    [
        Packet(0),
        Packet(8),
        Packet(0xFFFF),
        Packet(RESPONSE),
        Packet(RW, b"x", size=2),
        Packet(RW, size=0xFFFFFFFF),
        Packet(REQUEST),
    ],
)
def test_wrong_packets_reset_their_connection(guest: Guest, server: socket.socket, packet: Packet) -> None:
    sock, other = accepted(guest, server), accepted(guest, server, guest_port=1)
    guest.send(packet)
    guest.expect(RST)
    assert ended(sock)
    guest.send(Packet(RW, b"y", guest_port=1))
    assert other.recv(9) == b"y"
    sock.close()
    other.close()


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 99])
def test_packets_of_no_connection_are_refused(guest: Guest, op: int) -> None:
    guest.send(Packet(op, flags=3))
    packet = guest.expect(RST)
    assert packet == Packet(RST, src_cid=2, dst_cid=CID, buf_alloc=0)
    assert guest.nothing_comes()


@pytest.mark.parametrize("fields", [{"kind": 2}, {"kind": 0}, {"dst_cid": 5}, {"dst_cid": 1 << 40}])
def test_other_types_and_hosts_are_refused(
    guest: Guest, server: socket.socket, fields: dict[str, int]
) -> None:
    packet = replace(Packet(REQUEST), **fields)  # type: ignore[arg-type]
    guest.send(packet)
    answer = guest.expect(RST)
    assert (answer.kind, answer.src_cid, answer.dst_cid) == (packet.kind, packet.dst_cid, CID)
    guest.send(replace(packet, op=RST))
    assert guest.nothing_comes()


def test_packets_from_another_guest_are_dropped(guest: Guest) -> None:
    guest.send(Packet(REQUEST, src_cid=4), Packet(REQUEST, src_cid=2))
    assert guest.nothing_comes()


@pytest.mark.parametrize("op", [RW, SHUTDOWN, REQUEST, 0])
def test_wrong_answers_to_a_request(guest: Guest, path: Path, op: int) -> None:
    with client(path, b"CONNECT 4000\n") as sock:
        request = guest.expect(REQUEST)
        guest.send(Packet(op, host_port=request.host_port))
        guest.expect(RST)
        assert ended(sock)


def test_a_guest_that_guesses_a_connection_to_come(device: Vsock, path: Path) -> None:
    guest = Guest(device, buffers=0)
    with client(path, b"CONNECT 4000\n") as sock:
        settle(device)
        (connection,) = device._all
        guest.send(Packet(RESPONSE, host_port=connection.host_port))
        assert ended(sock)
    guest.give(4)
    assert guest.nothing_comes()


def test_short_packets_are_dropped(guest: Guest) -> None:
    guest.driver.add(TX, out=[Packet(REQUEST).pack()[:43]])
    guest.driver.add(TX, in_=[100])
    guest.driver.kick(TX)
    assert len(guest.driver.used(TX)) == 2
    assert guest.nothing_comes()


def test_packets_in_many_buffers(guest: Guest, server: socket.socket) -> None:
    sock = accepted(guest, server)
    raw = Packet(RW, bytes(range(200))).pack()
    guest.driver.add(TX, out=[raw[i : i + 1] for i in range(len(raw))])
    guest.driver.kick(TX)
    assert sock.recv(999) == bytes(range(200))
    raw = Packet(RW, bytes(range(250)) * 6).pack()
    guest.driver.add(
        TX, out=[raw[:50], *(raw[i : i + 1] for i in range(50, len(raw) - 500)), raw[-500:]], indirect=True
    )
    guest.driver.kick(TX)
    assert exactly(sock, 1500) == bytes(range(250)) * 6
    sock.close()


# Streams.


@pytest.mark.parametrize("buffer_bytes", [100, 4096, 65536])
def test_a_stream_both_ways(device: Vsock, server: socket.socket, buffer_bytes: int) -> None:
    """The guest echoes; what comes back is what went in, and nobody exceeds what the other allows."""
    guest = Guest(device, buffer_bytes=buffer_bytes)
    window = 32768
    sock = accepted(guest, server, buf_alloc=window)
    data = random.Random(3).randbytes(buffer_bytes * 40 + 5)

    def write() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    result: list[bytes] = []
    reader = threading.Thread(target=lambda: result.append(read_all(sock)))
    writer.start()
    reader.start()
    received = sent = fwd_cnt = 0
    waiting = bytearray()
    done = False
    while not done or waiting:
        if not done and not (waiting and guest.nothing_comes()):
            packet = guest.receive()
            fwd_cnt = packet.fwd_cnt
            if packet.op == RW:
                received += len(packet.data)
                waiting += packet.data
            else:
                assert packet.op in (SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST)
                done |= packet.op == SHUTDOWN
        assert len(waiting) <= window
        part = bytes(waiting[: min(buffer_bytes // 3, BUF_ALLOC_BYTES - (sent - fwd_cnt))])
        del waiting[: len(part)]
        sent += len(part)
        guest.send(Packet(RW, part, buf_alloc=window, fwd_cnt=sent))
    guest.send(Packet(SHUTDOWN, flags=SEND))
    writer.join(TIMEOUT_S)
    reader.join(TIMEOUT_S)
    assert result == [data]
    sock.close()


class Watched(Vsock):
    """Tells failures that aren't the guest's apart."""

    bugs: tuple[Exception, ...] = ()

    def fail(self, error: Exception) -> None:
        if not isinstance(error, QueueError):
            self.bugs += (error,)
        super().fail(error)


def check(device: Watched) -> None:
    """What always holds."""

    def run() -> None:
        assert not device.bugs
        assert len(device._all) <= vsock.MAX_CONNECTIONS
        assert len(device._refusals) <= vsock.MAX_CONNECTIONS + vsock._MAX_REFUSALS
        assert set(device._connections.values()) <= device._all
        assert set(device._ready) <= set(device._connections.values())
        for c in device._all:
            assert len(c.kept) <= BUF_ALLOC_BYTES
            assert len(c.staged) <= 65536
            assert 0 <= c.fwd_cnt - c.told_fwd_cnt
            assert c.told_shutdown & ~c.host_shutdown == 0

    device.reactor.call_and_wait(run)


RELAXED = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

PACKETS = st.builds(
    Packet,
    op=st.sampled_from([REQUEST, RW, SHUTDOWN, RST, CREDIT_UPDATE, CREDIT_REQUEST, RESPONSE])
    | st.integers(0, 0xFFFF),
    data=st.sampled_from([b"", b"x", bytes(5000), bytes(65536)]),
    flags=st.integers(0, 3) | st.integers(0, 0xFFFFFFFF),
    host_port=st.sampled_from([PORT, PORT, PORT, 1]),
    guest_port=st.sampled_from([1, 2]),
    buf_alloc=st.sampled_from([0, 100, 1 << 20, 0xFFFFFFFF]),
    fwd_cnt=st.sampled_from([0, 0, 100, 0xFFFFFFFF]),
    size=st.sampled_from([None, None, None, 0, 4, 0xFFFFFFFF]),
)


@RELAXED
@given(st.lists(PACKETS | st.integers(0, 5), max_size=40), st.integers(0, 20))
def test_whatever_the_guest_sends(tmp_path: Path, steps: list[Packet | int], buffers: int) -> None:
    """Packets, and in between what programs of the host do (the integers)."""
    with ExitStack() as stack:
        device, server = hostile_setting(stack, tmp_path / "v")
        guest = Guest(device, buffers=buffers)
        stack.callback(guest.close)
        host = Host(stack, server, tmp_path / "v", random.Random(0))
        for step in steps:
            if isinstance(step, Packet):
                guest.send(step)
            else:
                host.act(step)
            check(device)
        assert not guest.driver.broken
        still_works(guest, tmp_path / "v", host)


@RELAXED
@given(st.integers(0, 1 << 32), st.integers(1, 25))
def test_whatever_the_fuzzer_does(tmp_path: Path, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        device, server = hostile_setting(stack, tmp_path / "v")
        guest = Guest(device)
        stack.callback(guest.close)
        host = Host(stack, server, tmp_path / "v", rng)
        for _ in range(steps):
            mutate_and_feed(rng, guest.driver)
            host.act(rng.randrange(6))
            check(device)
        still_works(guest, tmp_path / "v", host)


@RELAXED
@given(
    st.integers(4000, 20_000), st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)), max_size=6)
)
def test_the_device_keeps_to_the_guests_credit(
    tmp_path: Path, window: int, steps: list[tuple[int, int]]
) -> None:
    """Each step: the host sends so much, the guest's program reads so much of what came."""
    with ExitStack() as stack:
        device, server = hostile_setting(stack, tmp_path / "v")
        guest = Guest(device)
        stack.callback(guest.close)
        guest.connect(buf_alloc=window)
        sock = stack.enter_context(server.accept()[0])
        sent, received, fwd_cnt = b"", b"", 0
        for size, read in [*steps, *[(0, 1 << 20)] * (sum(size for size, _ in steps) // window + 1)]:
            sock.setblocking(False)
            data = bytes(i * 31 & 0xFF for i in range(size))
            with suppress(BlockingIOError):
                sent += data[: sock.send(data)] if data else b""
            settle(device)
            guest.collect()
            received += b"".join(p.data for p in guest.inbox if p.op == RW)
            guest.inbox.clear()
            assert len(received) - fwd_cnt <= window
            assert len(received) == min(len(sent), fwd_cnt + window)
            fwd_cnt = min(len(received), fwd_cnt + read)
            guest.send(Packet(CREDIT_UPDATE, buf_alloc=window, fwd_cnt=fwd_cnt))
        assert received == sent


@RELAXED
@given(st.lists(st.tuples(st.integers(0, 65536), st.integers(0, 200_000)), max_size=30))
def test_a_guest_that_keeps_to_the_devices_credit_is_served(
    tmp_path: Path, steps: list[tuple[int, int]]
) -> None:
    """Each step: the guest sends so much if it may, the host reads so much."""
    with ExitStack() as stack:
        device, server = hostile_setting(stack, tmp_path / "v")
        guest = Guest(device)
        stack.callback(guest.close)
        guest.connect()
        sock = stack.enter_context(server.accept()[0])
        sock.setblocking(False)
        sent, received, fwd_cnt = b"", b"", 0
        for size, read in steps:
            data = random.Random(size).randbytes(min(size, BUF_ALLOC_BYTES - (len(sent) - fwd_cnt)))
            sent += data
            guest.send(Packet(RW, data))
            with suppress(BlockingIOError):
                received += sock.recv(read) if read else b""
            settle(device)
            guest.collect()
            for packet in guest.inbox:
                assert packet.op == CREDIT_UPDATE
                assert len(received) <= packet.fwd_cnt <= len(sent)
                fwd_cnt = packet.fwd_cnt
            guest.inbox.clear()
            check(device)
        guest.send(Packet(SHUTDOWN, flags=SEND))
        sock.settimeout(TIMEOUT_S)
        assert received + read_all(sock) == sent


def hostile_setting(stack: ExitStack, path: Path) -> tuple[Watched, socket.socket]:
    server = stack.enter_context(listening(path, PORT))
    stack.callback(os.unlink, f"{path}_{PORT}")
    server.setblocking(False)
    return Watched(CID, path), server


def still_works(guest: Guest, path: Path, host: Host) -> None:
    """After a reset, the device works as it did at first."""
    guest.driver.reset()
    for sock in host.sockets:
        sock.close()
    guest.driver.activate()
    guest.inbox.clear()
    guest.give(64)
    while not guest.nothing_comes():  # of clients that waited
        guest.inbox.clear()
    with listening(path, 7) as server:
        host.stack.callback(os.unlink, f"{path}_7")
        guest.send(Packet(REQUEST, host_port=7))
        guest.expect(RESPONSE)
        with server.accept()[0] as sock:
            sock.sendall(b"alive")
            assert guest.expect(RW).data == b"alive"
            guest.send(Packet(RW, b"too", host_port=7))
            assert exactly(sock, 3) == b"too"
