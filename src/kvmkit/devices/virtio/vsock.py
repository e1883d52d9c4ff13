r"""The virtio socket device (virtio 1.2, section 5.10): stream sockets between the guest and unix sockets of the host.

The host's side is the convention that Firecracker's users know. One unix socket, PATH, is how the host reaches the guest: a client
connects, writes ``CONNECT <port>\n`` and gets ``OK <host port>\n`` when a program in the guest has accepted; if none listens, the
connection is closed. The guest reaches the host, CID 2, at port P if a program listens at the unix socket ``PATH_P``.

**Flow control.** Each side tells in every packet how much it can hold of a connection (buf_alloc) and how much it has passed on
(fwd_cnt, modulo 2^32); the other one never has more than buf_alloc bytes under way. What the guest sends goes from its memory
straight into the host's socket. What that doesn't take is kept, up to `BUF_ALLOC_BYTES`: a guest that sends more is reset. The other
way nothing is read from a host's socket for which the guest has given no credit, but a read takes `_READ_BYTES`, for many packets
(Linux gives buffers of 4 KiB and one system call for each costs more than copying), and of those some may have to wait.

**Waiting.** A packet for the guest is made when there is a buffer for it. Until then a connection stands in `_ready` once, whatever
it has to say, so what waits is bounded. Only refusals (RST) of packets that belong to no connection need a list; when it is full the
device stops taking packets from the guest until the guest takes some of its own (section 5.10.6.1 asks for such a limit).

**Ends.** SHUTDOWN has a flag for each direction, as shutdown(2) has. A connection is over when its peer has got both flags and
answered with RST. If the host closes first, the device sends both flags and remembers the ports for `CLOSE_TIMEOUT_S`. If the guest
does, what it had sent before still goes to the host, even if it sends RST in the meantime (Linux loses patience after 8 s).

Descriptors are watched edge-triggered, so nothing needs to be told to the kernel when a connection has to wait.
"""

import errno
import os
import random
import re
import select
import socket
import stat
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from pathlib import Path

from kvmkit.devices.reactor import Timer
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue, QueueError

VIRTIO_VSOCK_F_STREAM = 0
VIRTIO_VSOCK_TYPE_STREAM = 1
VIRTIO_VSOCK_OP_REQUEST = 1
VIRTIO_VSOCK_OP_RESPONSE = 2
VIRTIO_VSOCK_OP_RST = 3
VIRTIO_VSOCK_OP_SHUTDOWN = 4
VIRTIO_VSOCK_OP_RW = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7
VIRTIO_VSOCK_SHUTDOWN_RCV = 1
VIRTIO_VSOCK_SHUTDOWN_SEND = 2
VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0
VMADDR_CID_HOST = 2

HEADER = struct.Struct("<QQIIIHHIII")
"""virtio_vsock_hdr: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt."""

BUF_ALLOC_BYTES = 256 * 1024
"""What the device keeps of one connection for a host that doesn't read."""
MAX_CONNECTIONS = 512
"""Connections of one guest, whatever their state. With `BUF_ALLOC_BYTES` it bounds the memory that a guest can take."""
FIRST_HOST_PORT = 1 << 30
"""Ports that stand for clients of the host are counted up from here."""
CONNECT_LINE_TIMEOUT_S = 10.0
"""How long a client may take to say where it wants to go."""
CLOSE_TIMEOUT_S = 8.0
"""How long the guest may take to answer the end of a connection; Linux's VSOCK_CLOSE_TIMEOUT."""

_BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND
_RX, _TX, _EVENT = 0, 1, 2
_READ_BYTES = 64 * 1024
_MAX_REFUSALS = 128
_TX_BATCH = 64
_RX_TURNS = 16
_PACKETS_PER_TURN = 64
_ACCEPT_RETRY_S = 1.0
_MAX_LINE_BYTES = 32
_CONNECT_LINE = re.compile(rb"CONNECT[ \t]+([0-9]{1,10})[ \t\r]*\n", re.IGNORECASE)
_IOV_MAX = 1024
_SUN_PATH_BYTES = 107
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_GONE = select.EPOLLHUP | select.EPOLLERR


def credit_bytes(buf_alloc: int, fwd_cnt: int, sent: int) -> int:
    """How much may be sent to a peer that said `buf_alloc` and `fwd_cnt`, after `sent` bytes; negative if it went back on its word."""
    return buf_alloc - (sent - fwd_cnt & 0xFFFFFFFF)


class _State(Enum):
    GREETING = auto()  # a client of the host that hasn't finished its CONNECT line
    CONNECTING = auto()  # the guest will be, or was, asked
    OPEN = auto()
    CLOSED = auto()  # no socket any more; the guest hasn't answered yet
    DRAINING = auto()  # over for the guest; the host still has to read


class _Connection:
    """A stream between a socket of the host and a port of the guest. The counters aren't reduced modulo 2^32."""

    __slots__ = (
        "credit_requested",
        "fwd_cnt",
        "guest_port",
        "guest_shutdown",
        "host_port",
        "host_shutdown",
        "hung_up",
        "kept",
        "peer_buf_alloc",
        "peer_fwd_cnt",
        "readable",
        "sent",
        "sock",
        "staged",
        "state",
        "timer",
        "to_say",
        "told_fwd_cnt",
        "told_shutdown",
        "update",
    )

    def __init__(self, sock: socket.socket, state: _State) -> None:
        self.sock = sock
        self.state = state
        self.host_port = 0
        self.guest_port = 0
        self.timer: Timer | None = None
        self.to_say = 0  # REQUEST or RESPONSE, before anything else
        # From the guest to the host.
        self.kept = bytearray()  # what the host's socket didn't take
        self.fwd_cnt = 0
        self.told_fwd_cnt = 0
        self.update = False  # a CREDIT_UPDATE is due
        self.guest_shutdown = 0  # the flags that the guest sent
        # From the host to the guest.
        self.readable = False  # no read has said otherwise since the last event
        self.hung_up = False  # the host's end is closed, or both directions are
        self.staged = b""  # read, and the guest had no buffer for it
        self.sent = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.credit_requested = False
        self.host_shutdown = 0  # the flags to send to the guest
        self.told_shutdown = 0  # those of them that were

    @property
    def key(self) -> tuple[int, int]:
        return self.host_port, self.guest_port


class Vsock(VirtioDevice):
    """The socket device of a guest whose CID is `guest_cid`. `path` is the unix socket through which the host reaches it.

    The socket is made at once, for the user alone (mode 0600), and removed by `close`. One that nobody listens at any more is
    replaced; `FileExistsError` if somebody does, or if `path` is something else.
    """

    device_id = 19
    queue_sizes = (256, 256, 16)
    features = 1 << VIRTIO_VSOCK_F_STREAM

    def __init__(self, guest_cid: int, path: str | Path) -> None:
        """`ValueError` for a reserved `guest_cid` (0, 1, 2 and 2^32-1) and for a path too long for a unix socket."""
        if not VMADDR_CID_HOST < guest_cid < 0xFFFFFFFF:
            raise ValueError(f"guest CID {guest_cid}: it must lie between 3 and {0xFFFFFFFE}")
        self.guest_cid = guest_cid
        self.path = os.path.abspath(path)
        longest = len(os.fsencode(self.path)) + len("_4294967295")
        if longest > _SUN_PATH_BYTES:
            raise ValueError(
                f"vsock path {self.path!r} with a port after it has {longest} bytes; unix sockets take {_SUN_PATH_BYTES}"
            )
        self._listener, self._inode = _listen(self.path)
        self._queues: Sequence[Queue | None] = (None, None, None)
        self._all: set[_Connection] = set()
        self._connections: dict[tuple[int, int], _Connection] = {}
        """Those that the guest knows, or will, by host's and guest's port."""
        self._ready: dict[_Connection, None] = {}
        """Those that have something for the guest, in turn."""
        self._refusals: deque[bytes] = deque()
        """RST packets."""
        self._out_of_buffers = False
        self._event_due = False
        self._work_later: Timer | None = None
        self._accept_later: Timer | None = None
        # Not always the same: a guest restored from a snapshot may still hold connections with another device's ports.
        self._next_port = random.randrange(FIRST_HOST_PORT, 2 * FIRST_HOST_PORT)
        self._read_buffer = memoryview(bytearray(_READ_BYTES))
        super().__init__(f"vsock {guest_cid}")
        self.reactor.add(self._listener.fileno(), select.EPOLLIN | select.EPOLLET, lambda _: self._accept())

    def config(self) -> bytes:
        """virtio_vsock_config: the guest's CID."""
        return struct.pack("<Q", self.guest_cid)

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Start with these queues. Clients may have come before."""
        self._queues = queues
        self._work()

    def queue_notified(self, queue: Queue) -> None:
        """Packets of the guest, buffers for packets to it, or for events."""
        if queue.index == _EVENT:
            self._send_event()
        else:
            self._work()

    def reset(self) -> None:
        """End all connections, but for those that the guest doesn't know of yet: they wait for its next driver."""
        self._queues = (None, None, None)
        self._event_due = False
        self._end_connections()

    def transport_reset(self) -> None:
        """End all connections and tell the driver that they are gone (section 5.10.6.7): the guest now runs elsewhere. Any thread."""

        def run() -> None:
            self._end_connections()
            self._event_due = self.active
            self._send_event()

        self.reactor.call(run)

    def close(self) -> None:
        """End everything and remove the socket."""
        super().close()
        self._queues = (None, None, None)
        for connection in list(self._all):
            self._forget(connection)
        self._listener.close()
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self.path)

    def fail(self, error: Exception) -> None:
        """The device stands still until it is reset: nobody should wait for its connections."""
        super().fail(error)
        self._end_connections()

    # Between the queues.

    def _work(self) -> None:
        """Take packets from the guest and send to it, as far as it goes; what takes long in turns with everything else."""
        if not self.active:
            return
        more = self._take_packets()
        more |= self._send_packets()
        if self._out_of_buffers and len(self._refusals) >= _MAX_REFUSALS:
            more = False  # until the guest gives buffers
        if more and self._work_later is None:
            self._work_later = self.reactor.call_later(0, self._work_on)

    def _work_on(self) -> None:
        self._work_later = None
        self._work()

    def _take_packets(self) -> bool:
        """Process packets of the guest. True if there may be more."""
        queue = self._queues[_TX]
        if queue is None:
            return False
        for _ in range(_TX_BATCH):
            if len(self._refusals) >= _MAX_REFUSALS:
                break
            chain = queue.pop()
            if chain is None:
                self.signal(queue)
                return False
            self._packet(chain)
            queue.push(chain, 0)
        self.signal(queue)
        return True

    def _send_packets(self) -> bool:
        """Send what waits for the guest. True if more can go at once; else the guest has no buffers left or nothing waits."""
        queue = self._queues[_RX]
        self._out_of_buffers = queue is None
        if queue is None:
            return False
        for _ in range(_MAX_REFUSALS):
            if not self._refusals or not self._send(self._refusals[0]):
                break
            self._refusals.popleft()
        for _ in range(_RX_TURNS):
            if self._out_of_buffers or not self._ready:
                break
            connection = next(iter(self._ready))
            more = self._serve(connection)
            self.signal(queue)  # each time: the guest's processor works on it while this thread reads more
            if self._out_of_buffers:
                break  # it keeps its turn
            self._ready.pop(connection, None)
            if more:
                self._ready[connection] = None
        self.signal(queue)
        return not self._out_of_buffers and bool(self._ready or self._refusals)

    # To the guest.

    def _rx_chain(self) -> Chain | None:
        queue = self._queues[_RX]
        chain = queue.pop() if queue else None
        if chain is None:
            self._out_of_buffers = True
        elif chain.writable_bytes <= HEADER.size:
            raise QueueError(
                f"queue 0: a buffer of {chain.writable_bytes} bytes; a packet has more than {HEADER.size}"
            )
        return chain

    def _send(self, packet: bytes) -> bool:
        """Send a packet without data; False if the guest has no buffer."""
        chain = self._rx_chain()
        if chain is None:
            return False
        chain.write(packet)
        self._queues[_RX].push(chain, len(packet))  # type: ignore[union-attr]
        return True

    def _say(self, connection: _Connection, op: int, flags: int = 0) -> bool:
        """Send a packet without data for `connection`; False if the guest has no buffer."""
        if not self._send(self._header(connection, op, flags, 0)):
            return False
        connection.told_fwd_cnt = connection.fwd_cnt
        connection.update = False
        return True

    def _header(self, connection: _Connection, op: int, flags: int, size_bytes: int) -> bytes:
        return HEADER.pack(
            VMADDR_CID_HOST,
            self.guest_cid,
            connection.host_port,
            connection.guest_port,
            size_bytes,
            VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags,
            BUF_ALLOC_BYTES,
            connection.fwd_cnt & 0xFFFFFFFF,
        )

    def _serve(self, connection: _Connection) -> bool:
        """Send what `connection` has for the guest, one read's worth of data. True if there may be more."""
        if connection.to_say:
            if not self._say(connection, connection.to_say):
                return True
            connection.to_say = 0
        if connection.state is not _State.OPEN:
            return False
        more = self._send_data(connection)
        if not connection.staged and connection.host_shutdown != connection.told_shutdown:
            if not self._say(connection, VIRTIO_VSOCK_OP_SHUTDOWN, connection.host_shutdown):
                return True
            connection.told_shutdown = connection.host_shutdown
            if connection.told_shutdown == _BOTH:
                self._linger(connection)
        if connection.update:
            self._say(connection, VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        return more

    def _send_data(self, connection: _Connection) -> bool:
        """Read from the host and send. True if there may be more."""
        if connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV:
            if connection.hung_up:
                connection.host_shutdown = _BOTH
            return False
        if not connection.readable and not connection.staged:
            return False
        credit = credit_bytes(connection.peer_buf_alloc, connection.peer_fwd_cnt, connection.sent)
        if credit <= 0:
            # Asked once: a guest that has none left answers so at once, and tells by itself when it has some.
            if not connection.credit_requested:
                connection.credit_requested = self._say(connection, VIRTIO_VSOCK_OP_CREDIT_REQUEST)
            return False
        data = memoryview(connection.staged) if connection.staged else self._read(connection, credit)
        at, end = 0, min(len(data), credit)
        queue = self._queues[_RX]
        for _ in range(_PACKETS_PER_TURN):
            if at == end or queue is None or (chain := self._rx_chain()) is None:
                break
            size = min(end - at, chain.writable_bytes - HEADER.size)
            header = self._header(connection, VIRTIO_VSOCK_OP_RW, 0, size)
            chain.write(header + data[at : at + size])
            queue.push(chain, HEADER.size + size)
            at += size
        if at:
            connection.sent += at
            connection.credit_requested = False
            connection.told_fwd_cnt = connection.fwd_cnt
            connection.update = False
        connection.staged = bytes(data[at:])
        return connection.readable or bool(connection.staged)

    def _read(self, connection: _Connection, credit: int) -> memoryview:
        """Read from the host what the guest can take, and see if it was the last."""
        try:
            size = connection.sock.recv_into(self._read_buffer[:credit])
        except BlockingIOError:
            connection.readable = False
            return self._read_buffer[:0]
        except OSError:  # it went with data of the guest unread
            size = 0
            connection.hung_up = True
        if not size:
            connection.readable = False
            connection.host_shutdown |= VIRTIO_VSOCK_SHUTDOWN_SEND
            if (
                connection.hung_up
                or connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND
                and not connection.kept
            ):
                connection.host_shutdown = _BOTH
        return self._read_buffer[:size]

    def _send_event(self) -> None:
        queue = self._queues[_EVENT]
        if not self._event_due or not self.active or queue is None:
            return
        chain = queue.pop()
        if chain is None:
            return
        event = struct.pack("<I", VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
        if chain.write(event) != len(event):
            raise QueueError(f"queue 2: a buffer of {chain.writable_bytes} bytes; an event has {len(event)}")
        self._event_due = False
        queue.push(chain, len(event))
        self.signal(queue)

    # From the guest.

    def _packet(self, chain: Chain) -> None:
        """Process a packet of the guest."""
        raw = chain.read(0, HEADER.size)
        if len(raw) < HEADER.size:
            return
        src_cid, dst_cid, guest_port, host_port, size, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack(
            raw
        )
        if src_cid != self.guest_cid:
            return
        if dst_cid != VMADDR_CID_HOST or kind != VIRTIO_VSOCK_TYPE_STREAM:
            self._refuse(host_port, guest_port, op, dst_cid, kind)
            return
        connection = self._connections.get((host_port, guest_port))
        if op == VIRTIO_VSOCK_OP_REQUEST:
            if connection is not None and connection.state is not _State.CLOSED:
                self._abort(connection)
                return
            if connection is not None:
                self._forget(connection)
            connection = self._connect(host_port, guest_port)
        if connection is None:
            self._refuse(host_port, guest_port, op)
            return
        connection.peer_buf_alloc = buf_alloc
        connection.peer_fwd_cnt = fwd_cnt
        if op == VIRTIO_VSOCK_OP_RW:
            self._data(connection, chain, size)
        elif op == VIRTIO_VSOCK_OP_RST:
            self._end(connection)
        elif (
            op == VIRTIO_VSOCK_OP_RESPONSE and connection.state is _State.CONNECTING and not connection.to_say
        ):
            self._accepted(connection)
        elif op == VIRTIO_VSOCK_OP_SHUTDOWN and connection.state is not _State.CONNECTING:
            self._shutdown(connection, flags & _BOTH)
        elif op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            connection.update = True
            self._ready[connection] = None
        elif op not in (VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_CREDIT_UPDATE):
            self._abort(connection)
        if (
            connection.state is _State.OPEN
            and connection in self._all
            and (connection.readable or connection.staged)
        ):
            self._ready[connection] = None  # it may have got credit

    def _connect(self, host_port: int, guest_port: int) -> _Connection | None:
        """Connect to the host's program at ``PATH_<host_port>``; None if there is none."""
        if len(self._all) >= MAX_CONNECTIONS:
            return None
        try:
            sock = socket.socket(socket.AF_UNIX)
        except OSError:  # no descriptors left
            return None
        try:
            sock.setblocking(False)
            sock.connect(f"{self.path}_{host_port}")  # never in progress: EAGAIN is a backlog that is full
        except OSError:
            sock.close()
            return None
        connection = _Connection(sock, _State.OPEN)
        connection.to_say = VIRTIO_VSOCK_OP_RESPONSE
        self._name(connection, host_port, guest_port)
        self._add(connection)
        return connection

    def _accepted(self, connection: _Connection) -> None:
        """A program in the guest took the connection: tell the client."""
        connection.state = _State.OPEN
        greeting = b"OK %d\n" % connection.host_port
        if self._write(connection, [memoryview(greeting)]) != len(greeting):
            self._abort(connection)

    def _data(self, connection: _Connection, chain: Chain, size: int) -> None:
        """`size` bytes for the host, by the packet's header."""
        if connection.state is _State.CLOSED:
            return
        if (
            connection.state is _State.CONNECTING
            or connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND
            or size > BUF_ALLOC_BYTES - len(connection.kept)
            or size > chain.readable_bytes - HEADER.size
        ):
            self._abort(connection)
            return
        done = 0
        if connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV:
            done = size  # for nobody
        elif size and not connection.kept:
            done = self._write(connection, chain.readable_views(HEADER.size, size)[:_IOV_MAX])
        if done < size:
            connection.kept += chain.read(HEADER.size + done, size - done)
        self._forwarded(connection, done)

    def _shutdown(self, connection: _Connection, flags: int) -> None:
        """The guest won't send, or take, any more."""
        connection.guest_shutdown |= flags
        if connection.state is _State.CLOSED:
            if connection.guest_shutdown == _BOTH:
                self._abort(connection)
            return
        if flags & VIRTIO_VSOCK_SHUTDOWN_RCV:
            connection.staged = b""
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RD)
        if not connection.kept:
            self._flushed(connection)

    # To the host.

    def _write(self, connection: _Connection, views: Sequence[memoryview]) -> int:
        """Write to the host's socket. Returns how many bytes are done with: all of them if nobody will read them."""
        try:
            return connection.sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            connection.host_shutdown |= VIRTIO_VSOCK_SHUTDOWN_RCV
            self._ready[connection] = None
            return sum(map(len, views))

    def _forwarded(self, connection: _Connection, size: int) -> None:
        """Count what is done with. The guest is told before it runs out of credit, but not of each bit."""
        connection.fwd_cnt += size
        if (
            connection.fwd_cnt - connection.told_fwd_cnt >= BUF_ALLOC_BYTES // 2
            and connection.state is _State.OPEN
        ):
            connection.update = True
            self._ready[connection] = None

    def _flush(self, connection: _Connection) -> None:
        """Write what is kept."""
        if connection.kept:
            with memoryview(connection.kept) as view:
                done = self._write(connection, [view])
            del connection.kept[:done]
            self._forwarded(connection, done)
            if not connection.kept:
                self._flushed(connection)

    def _flushed(self, connection: _Connection) -> None:
        """Nothing is kept: what the guest wanted to be done after its data can be done."""
        if connection.state is _State.DRAINING:
            self._forget(connection)
        elif connection.guest_shutdown == _BOTH:
            self._abort(connection)
        elif connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            if connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND:
                connection.host_shutdown = _BOTH
                self._ready[connection] = None

    # From the host.

    def _accept(self) -> None:
        """Take new clients, as many as there is room for. Called again when there is more."""
        while len(self._all) < MAX_CONNECTIONS:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors left
                if self._accept_later is None:
                    self._accept_later = self.reactor.call_later(_ACCEPT_RETRY_S, self._accept_again)
                return
            sock.setblocking(False)
            connection = _Connection(sock, _State.GREETING)
            connection.timer = self.reactor.call_later(
                CONNECT_LINE_TIMEOUT_S, partial(self._forget, connection)
            )
            self._add(connection)

    def _accept_again(self) -> None:
        self._accept_later = None
        self._accept()

    def _host_event(self, connection: _Connection, events: int) -> None:
        """Something changed at the host's socket. Edge-triggered: `readable` holds until a read finds nothing."""
        if events & (select.EPOLLIN | select.EPOLLRDHUP | _GONE):
            connection.readable = True
        if events & _GONE:
            connection.hung_up = True
        if connection.state is _State.GREETING:
            self._greet(connection, ended=bool(events & (select.EPOLLRDHUP | _GONE)))
        elif connection.state is not _State.CONNECTING and events & (select.EPOLLOUT | _GONE):
            self._flush(connection)
        if connection in self._all:
            if connection.state is _State.CONNECTING and connection.hung_up:
                self._abort(connection)
            elif connection.state is _State.OPEN and connection.readable:
                self._ready[connection] = None
        self._work()

    def _greet(self, connection: _Connection, *, ended: bool) -> None:
        """Look for the CONNECT line. What follows it stays in the socket until the guest has accepted."""
        try:
            line = connection.sock.recv(_MAX_LINE_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            line = b""
        end = line.find(b"\n") + 1
        if not end and 0 < len(line) < _MAX_LINE_BYTES and not ended:
            return
        match = _CONNECT_LINE.fullmatch(line[:end])
        if match is None or (port := int(match[1])) > 0xFFFFFFFF:
            self._forget(connection)
            return
        connection.sock.recv(end)
        while (self._next_port, port) in self._connections:
            self._advance_port()
        connection.state = _State.CONNECTING
        connection.to_say = VIRTIO_VSOCK_OP_REQUEST
        if connection.timer:
            connection.timer.cancel()
        self._name(connection, self._next_port, port)
        self._advance_port()
        self._ready[connection] = None

    def _advance_port(self) -> None:
        self._next_port = self._next_port + 1 if self._next_port < 0xFFFFFFFE else FIRST_HOST_PORT

    # The connections.

    def _name(self, connection: _Connection, host_port: int, guest_port: int) -> None:
        connection.host_port, connection.guest_port = host_port, guest_port
        self._connections[host_port, guest_port] = connection
        if connection.to_say:
            self._ready[connection] = None

    def _add(self, connection: _Connection) -> None:
        self._all.add(connection)
        self.reactor.add(connection.sock.fileno(), _EVENTS, partial(self._host_event, connection))

    def _linger(self, connection: _Connection) -> None:
        """The host is gone and the guest was told: only its answer is missing."""
        self._close_socket(connection)
        connection.state = _State.CLOSED
        connection.kept.clear()

        def run() -> None:
            self._abort(connection)
            self._work()

        connection.timer = self.reactor.call_later(CLOSE_TIMEOUT_S, run)

    def _refuse(
        self, host_port: int, guest_port: int, op: int, cid: int = VMADDR_CID_HOST, kind: int = 1
    ) -> None:
        """Answer a packet `op` that belongs to no connection: RST, if it isn't one."""
        if op != VIRTIO_VSOCK_OP_RST:
            self._refusals.append(
                HEADER.pack(cid, self.guest_cid, host_port, guest_port, 0, kind, VIRTIO_VSOCK_OP_RST, 0, 0, 0)
            )

    def _abort(self, connection: _Connection) -> None:
        """End a connection with RST."""
        if connection.to_say != VIRTIO_VSOCK_OP_REQUEST:  # else the guest doesn't know of it
            self._refusals.append(self._header(connection, VIRTIO_VSOCK_OP_RST, 0, 0))
        self._forget(connection)

    def _end(self, connection: _Connection) -> None:
        """The guest ended a connection. What it sent before it said that it was done is still the host's."""
        if not (connection.kept and connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND):
            self._forget(connection)
            return
        del self._connections[connection.key]
        self._ready.pop(connection, None)
        connection.state = _State.DRAINING

    def _end_connections(self) -> None:
        for connection in list(self._all):
            unknown = connection.to_say == VIRTIO_VSOCK_OP_REQUEST
            if connection.state not in (_State.GREETING, _State.DRAINING) and not unknown:
                self._end(connection)
        self._refusals.clear()

    def _forget(self, connection: _Connection) -> None:
        """End a connection for the host, and make room for another."""
        self._all.discard(connection)
        self._ready.pop(connection, None)
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        if connection.timer:
            connection.timer.cancel()
        self._close_socket(connection)
        self._accept()

    def _close_socket(self, connection: _Connection) -> None:
        if connection.sock.fileno() >= 0:
            self.reactor.remove(connection.sock.fileno())
            connection.sock.close()


def _listen(path: str) -> tuple[socket.socket, tuple[int, int]]:
    """Listen at the unix socket `path`. Returns the socket, and device and inode of its file."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        os.fchmod(
            listener.fileno(), 0o600
        )  # what bind makes inherits it, so there is no moment with another mode
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"vsock socket: {error.strerror}", path) from None
            _remove_stale(path)
            listener.bind(path)
        listener.listen(128)
        made = os.lstat(path)
    except BaseException:
        listener.close()
        raise
    return listener, (made.st_dev, made.st_ino)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at; `FileExistsError` if somebody does, or if it is no socket."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "vsock socket: there is something that isn't a socket", path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full
            pass
        raise FileExistsError(errno.EEXIST, "vsock socket: another program listens at it", path)
