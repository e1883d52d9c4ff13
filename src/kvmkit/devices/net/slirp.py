"""User-mode networking by libslirp: the guest's TCP, UDP and ping come out of sockets of this process.

It takes no privilege, no namespace and no process. The guest sees a network of its own, 10.0.2.0/24: 10.0.2.2 is its gateway,
10.0.2.3 its name server (the host's own, whichever that is), and 10.0.2.15 is the guest. IPv4 only.

What the guest may reach is what the host's user may reach by the network, but for the host's loopback: connections to 10.0.2.2
are refused, and frames for 127.0.0.0/8 and 0.0.0.0/8, which libslirp would connect to as they are, are dropped here, as is all
for the name server that isn't DNS: where the host's resolver listens on loopback, that address stands for it. A service of the
host's that listens on all addresses can be reached by one of the others.

libslirp is not reentrant and knows nothing of threads: all calls are on the device's reactor. Its callbacks come from within them.
They are made with the GIL held (`ctypes.PyDLL`), because they are short, and giving it up and taking it again for each
callback can cost a switch interval (5 ms) each time where another Python thread is busy.
"""

import ctypes
import logging
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from kvmkit.devices.net import (
    VIRTIO_NET_F_GUEST_CSUM,
    Backend,
    BackendError,
    GuestNetwork,
    Packet,
)
from kvmkit.devices.reactor import Reactor, Timer

_log = logging.getLogger(__name__)

LIBRARY = "libslirp.so.0"

NETWORK, NETMASK, PREFIX = "10.0.2.0", "255.255.255.0", 24
GATEWAY, NAMESERVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.15"

MTU_BYTES = 16384
"""Large, because what passes through Python costs by the packet, not by the byte. Not larger, because libslirp has no window
scaling: where a segment is half of the 64 KiB that may be under way, a guest may leave a window open that is a little smaller
than a segment, and not tell when it has grown by less than another; libslirp then waits for five seconds (seen at 65520).
"""

BACKLOG_BYTES = 4 << 20
"""Frames for a guest that has no room, most of them: what more libslirp has is dropped, as on a full link."""

MAX_SOCKETS = 4096
"""Open at once, or half of what this process may open: then new connections of the guest are dropped. libslirp keeps one
that its other end closed for another 5 to 10 seconds (TIME_WAIT).
"""

_PLAIN = bytes(12)
_DATA_VALID = b"\x02" + bytes(11)
"""VIRTIO_NET_HDR_F_DATA_VALID: libslirp made these checksums a moment ago, so the guest needn't verify them."""

_GATEWAY, _NAMESERVER = socket.inet_aton(GATEWAY), socket.inet_aton(NAMESERVER)
_DNS_PORT, _DHCP_PORT = 53, 67
_ETH_P_IP = b"\x08\x00"
_ICMP, _TCP, _UDP = 1, 6, 17
_SYN, _SYN_ACK = 2, 2 | 16

_IDLE_MS = 1000
"""How long libslirp waits at most; all of that if it has no timer of its own."""

# SLIRP_POLL_* are EPOLL* but for OUT and PRI, which are the other way round.
_TO_EPOLL = [n & 0b11001 | (n & 2) << 1 | (n & 4) >> 1 for n in range(32)]
_FROM_EPOLL = _TO_EPOLL

# The kinds of libslirp.h's callbacks.
_write = ctypes.PYFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_message = ctypes.PYFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_clock = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_timer = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_timer_new = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_timer_free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_timer_mod = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
_fd = ctypes.PYFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_notify = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_add_poll = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_get_revents = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _Callbacks(ctypes.Structure):
    """struct SlirpCb, as of configuration version 1."""

    _fields_ = [
        ("send_packet", _write),
        ("guest_error", _message),
        ("clock_get_ns", _clock),
        ("timer_new", _timer_new),
        ("timer_free", _timer_free),
        ("timer_mod", _timer_mod),
        ("register_poll_fd", _fd),
        ("unregister_poll_fd", _fd),
        ("notify", _notify),
    ]


class _Config(ctypes.Structure):
    """struct SlirpConfig, as of version 1, which every libslirp since 4.1 takes."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("restricted", ctypes.c_int),
        ("in_enabled", ctypes.c_bool),
        ("vnetwork", ctypes.c_uint32),
        ("vnetmask", ctypes.c_uint32),
        ("vhost", ctypes.c_uint32),
        ("in6_enabled", ctypes.c_bool),
        ("vprefix_addr6", ctypes.c_uint32 * 4),
        ("vprefix_len", ctypes.c_uint8),
        ("vhost6", ctypes.c_uint32 * 4),
        ("vhostname", ctypes.c_char_p),
        ("tftp_server_name", ctypes.c_char_p),
        ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p),
        ("vdhcp_start", ctypes.c_uint32),
        ("vnameserver", ctypes.c_uint32),
        ("vnameserver6", ctypes.c_uint32 * 4),
        ("vdnssearch", ctypes.c_void_p),
        ("vdomainname", ctypes.c_char_p),
        ("if_mtu", ctypes.c_size_t),
        ("if_mru", ctypes.c_size_t),
        ("disable_host_loopback", ctypes.c_bool),
        ("enable_emu", ctypes.c_bool),
    ]


class Slirp(Backend):
    """The user's network. `BackendError` if libslirp isn't installed."""

    mtu_bytes = MTU_BYTES
    features = VIRTIO_NET_F_GUEST_CSUM
    guest_network = GuestNetwork(address=f"{GUEST}/{PREFIX}", gateway=GATEWAY, nameservers=[NAMESERVER])

    def __init__(self) -> None:
        self._library = _load()
        self._slirp: int | None = None
        self._reactor: Reactor | None = None
        self._ready: Callable[[], object]
        self._header = _PLAIN
        self._paused = True
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._epoll = select.epoll()
        self._wanted: dict[int, int] = {}
        """Descriptors that libslirp waits for, and their EPOLL* events."""
        self._events: dict[int, int] = {}
        """What the descriptors of this turn are ready for."""
        self._timer: Timer | None = None
        self._sockets: set[int] = set()
        self._max_sockets = min(MAX_SOCKETS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._callbacks = _Callbacks(
            send_packet=_write(self._on_send_packet),
            guest_error=_message(lambda text, _: _log.debug("libslirp: %s", text.decode(errors="replace"))),
            clock_get_ns=_clock(lambda _: time.monotonic_ns()),
            timer_new=_timer_new(lambda *_: None),  # timers are for IPv6 alone
            timer_free=_timer_free(lambda *_: None),
            timer_mod=_timer_mod(lambda *_: None),
            register_poll_fd=_fd(lambda fd, _: self._sockets.add(fd)),
            unregister_poll_fd=_fd(lambda fd, _: self._sockets.discard(fd)),
            notify=_notify(lambda _: None),  # each turn asks anew what to wait for
        )
        self._add_poll = _add_poll(self._on_add_poll)
        self._get_revents = _get_revents(self._on_get_revents)

    def open(self, reactor: Reactor, ready: Callable[[], object]) -> None:
        """Make the network."""
        self._reactor, self._ready = reactor, ready
        config = _Config(
            version=1,
            in_enabled=True,
            vnetwork=_in_addr(NETWORK),
            vnetmask=_in_addr(NETMASK),
            vhost=_in_addr(GATEWAY),
            vdhcp_start=_in_addr(GUEST),
            vnameserver=_in_addr(NAMESERVER),
            if_mtu=MTU_BYTES,
            if_mru=MTU_BYTES,
            disable_host_loopback=True,
        )
        self._slirp = self._library.slirp_new(ctypes.byref(config), ctypes.byref(self._callbacks), None)
        if not self._slirp:
            raise BackendError("libslirp refused its configuration")
        reactor.add(self._epoll.fileno(), 0, self._on_ready)

    def negotiated(self, features: int) -> None:
        """Checksums needn't be verified by a driver that can be told so."""
        self._header = _DATA_VALID if features & VIRTIO_NET_F_GUEST_CSUM else _PLAIN
        self._backlog.clear()
        self._backlog_bytes = 0

    def send(self, header: bytes, frame: bytes) -> None:
        """Give libslirp a frame, if it may go where it wants to go."""
        if allowed(frame) and (len(self._sockets) < self._max_sockets or not opens_socket(frame)):
            self._library.slirp_input(self._slirp, frame, len(frame))

    def flush(self) -> None:
        """What was sent may have opened sockets, and may be answered already."""
        self._after()

    def receive(self) -> Packet | None:
        """Give the oldest frame."""
        if not self._backlog:
            return None
        frame = self._backlog.popleft()
        self._backlog_bytes -= len(frame)
        return self._header, frame

    def pause(self, paused: bool) -> None:
        """While paused no socket is read."""
        if paused != self._paused and self._reactor:
            self._paused = paused
            self._reactor.modify(self._epoll.fileno(), 0 if paused else select.EPOLLIN)

    def forward(self, host_port: int, guest_port: int) -> int:
        """Listen for the guest."""
        if not self._reactor:
            raise BackendError("the network isn't open")
        return self._reactor.call_and_wait(lambda: self._forward(host_port, guest_port))

    def _forward(self, host_port: int, guest_port: int) -> int:
        with socket.create_server(("127.0.0.1", host_port)) as free:  # says what is wrong if it isn't
            host_port = free.getsockname()[1]
        if self._library.slirp_add_hostfwd(
            self._slirp, 0, _in_addr("127.0.0.1"), host_port, _in_addr(GUEST), guest_port
        ):
            raise BackendError(f"libslirp can't listen on 127.0.0.1:{host_port}")
        self._fill()
        return host_port

    def close(self) -> None:
        """Close all connections."""
        if self._reactor:
            self._reactor.remove(self._epoll.fileno())
            self._reactor = None
        if self._timer:
            self._timer.cancel()
        if self._slirp:
            self._library.slirp_cleanup(self._slirp)
            self._slirp = None
        self._backlog.clear()
        self._epoll.close()

    def _on_ready(self, events: int) -> None:
        """Some sockets are ready: libslirp gets them all in one turn."""
        self._turn(dict(self._epoll.poll(0)))

    def _on_timer(self) -> None:
        self._timer = None
        self._turn({})

    def _turn(self, events: dict[int, int]) -> None:
        if self._slirp:
            self._events = events
            self._library.slirp_pollfds_poll(self._slirp, 0, self._get_revents, None)
            self._after()

    def _after(self) -> None:
        """Libslirp did something: see what it waits for now, and what it has for the guest."""
        self._fill()
        if self._backlog and not self._paused:
            self._ready()

    def _fill(self) -> None:
        """Ask libslirp what it waits for."""
        before, self._wanted = self._wanted, {}
        timeout_ms = ctypes.c_uint32(_IDLE_MS)
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout_ms), self._add_poll, None)
        for fd in before.keys() - self._wanted.keys():
            with suppress(OSError):  # closed already
                self._epoll.unregister(fd)
        for fd, events in self._wanted.items():
            try:  # even if it is the same as before: it may be another socket, which epoll hasn't
                self._epoll.modify(fd, events)
            except FileNotFoundError:
                self._epoll.register(fd, events)
        if self._wanted or timeout_ms.value < _IDLE_MS:
            self._wake_after(timeout_ms.value / 1000)

    def _wake_after(self, delay_s: float) -> None:
        assert self._reactor
        if self._timer:
            if self._timer.at_s <= time.monotonic() + delay_s:
                return
            self._timer.cancel()
        self._timer = self._reactor.call_later(delay_s, self._on_timer)

    def _on_send_packet(self, address: int, size: int, _: None) -> int:
        if self._backlog_bytes + size <= BACKLOG_BYTES:
            self._backlog.append(ctypes.string_at(address, size))
            self._backlog_bytes += size
        return size

    def _on_add_poll(self, fd: int, events: int, _: None) -> int:
        self._wanted[fd] = _TO_EPOLL[events & 31]
        return fd

    def _on_get_revents(self, fd: int, _: None) -> int:
        return _FROM_EPOLL[self._events.get(fd, 0) & 31]


def allowed(frame: bytes) -> bool:
    """Whether a guest's frame may go to libslirp: not to the host's loopback, nor to its resolver but for names."""
    if frame[12:14] != _ETH_P_IP:
        return True
    if len(frame) < 34 or frame[30] in (0, 127):
        return False
    destination = frame[30:34]
    if destination not in (_GATEWAY, _NAMESERVER) or frame[23] == _ICMP:
        return True
    if frame[23] == _TCP and destination == _GATEWAY:  # answers to forwarded connections; others are refused
        return True
    at = 14 + 4 * (frame[14] & 15)
    if _is_fragment(frame) or len(frame) < at + 4 or frame[23] not in (_TCP, _UDP):
        return False
    port = int.from_bytes(frame[at + 2 : at + 4], "big")
    return port == (_DNS_PORT if destination == _NAMESERVER else _DHCP_PORT)


def opens_socket(frame: bytes) -> bool:
    """Whether libslirp might open a socket for it: for anything but a segment of a TCP connection that there is."""
    if frame[12:14] != _ETH_P_IP:
        return False
    if len(frame) < 34 or frame[23] != _TCP or _is_fragment(frame):
        return True
    flags = frame[14 + 4 * (frame[14] & 15) + 13 :][:1]
    return not flags or flags[0] & _SYN_ACK == _SYN


def _is_fragment(frame: bytes) -> bool:
    return bool((frame[20] << 8 | frame[21]) & 0x3FFF)


def _in_addr(address: str) -> int:
    """A struct in_addr."""
    return int.from_bytes(socket.inet_aton(address), sys.byteorder)


def _load() -> ctypes.PyDLL:
    try:
        library = ctypes.PyDLL(LIBRARY)
    except OSError as error:
        raise BackendError(
            f"user-mode networking needs {LIBRARY} ({error}): install Debian's and Ubuntu's package libslirp0, "
            "Fedora's, Arch's or Alpine's libslirp, or run without a network"
        ) from None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.slirp_new.restype = pointer
    library.slirp_new.argtypes = [pointer, pointer, pointer]
    library.slirp_cleanup.restype = None
    library.slirp_cleanup.argtypes = [pointer]
    library.slirp_input.restype = None
    library.slirp_input.argtypes = [pointer, ctypes.c_char_p, number]
    library.slirp_pollfds_fill.restype = None
    library.slirp_pollfds_fill.argtypes = [pointer, pointer, _add_poll, pointer]
    library.slirp_pollfds_poll.restype = None
    library.slirp_pollfds_poll.argtypes = [pointer, number, _get_revents, pointer]
    library.slirp_add_hostfwd.argtypes = [pointer, number, ctypes.c_uint32, number, ctypes.c_uint32, number]
    return library
