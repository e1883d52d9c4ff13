"""A tap interface of the host: the guest is a machine of its own on whatever the host connects the interface to.

A new interface takes CAP_NET_ADMIN, an existing one only that it is the user's: ``ip tuntap add NAME mode tap user USER``, once, by
root. Checksums and segmentation are left to the host's kernel as far as the driver takes that (Linux's
Documentation/networking/tuntap.rst; struct virtio_net_hdr in front of each frame).
"""

import errno
import fcntl
import logging
import os
import select
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvmkit.devices.net import (
    HEADER_BYTES,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    Backend,
    BackendError,
    Packet,
)
from kvmkit.devices.reactor import Reactor

_log = logging.getLogger(__name__)

_DEVICE = "/dev/net/tun"
_IFNAMSIZ = 16

# Linux's if_tun.h.
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETVNETLE = 0x400454CA, 0x400454D0, 0x400454D8, 0x400454DC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8

_OFFLOADS = {
    VIRTIO_NET_F_GUEST_CSUM: _TUN_F_CSUM,
    VIRTIO_NET_F_GUEST_TSO4: _TUN_F_TSO4,
    VIRTIO_NET_F_GUEST_TSO6: _TUN_F_TSO6,
    VIRTIO_NET_F_GUEST_ECN: _TUN_F_TSO_ECN,
}
_MAX_PACKET_BYTES = HEADER_BYTES + 14 + 4 + 65535


class Tap(Backend):
    """The interface `name`, which exists or can be made. `BackendError` where it can't be had."""

    features = (
        VIRTIO_NET_F_CSUM
        | VIRTIO_NET_F_HOST_TSO4
        | VIRTIO_NET_F_HOST_TSO6
        | VIRTIO_NET_F_HOST_ECN
        | VIRTIO_NET_F_GUEST_CSUM
        | VIRTIO_NET_F_GUEST_TSO4
        | VIRTIO_NET_F_GUEST_TSO6
        | VIRTIO_NET_F_GUEST_ECN
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = _open(name)
        try:
            self.mtu_bytes = int(Path("/sys/class/net", name, "mtu").read_text())
        except OSError:  # no /sys here
            self.mtu_bytes = 1500
        self._buffer = bytearray(_MAX_PACKET_BYTES)
        self._view = memoryview(self._buffer)
        self._reactor: Reactor | None = None
        self._ready: Callable[[], object]
        self._paused = True

    def open(self, reactor: Reactor, ready: Callable[[], object]) -> None:
        """Wait for packets."""
        self._reactor, self._ready = reactor, ready
        reactor.add(self._fd, 0, self._on_events)

    def _on_events(self, events: int) -> None:
        if events & select.EPOLLERR:  # somebody deleted the interface, and the descriptor says so for ever
            _log.warning("tap interface %s is gone", self.name)
            self.close()
        else:
            self._ready()

    def negotiated(self, features: int) -> None:
        """Have the kernel leave undone what the driver does itself."""
        if self._fd < 0:
            return
        offloads = sum(tun for virtio, tun in _OFFLOADS.items() if features & virtio)
        fcntl.ioctl(self._fd, _TUNSETOFFLOAD, offloads)

    def send(self, header: bytes, frame: bytes) -> None:
        """Hand a frame to the kernel, which drops what it finds wrong with it, or all while the interface is down."""
        with suppress(OSError):
            os.writev(self._fd, [header, frame])

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self) -> Packet | None:
        """Read a packet."""
        try:
            size = os.readv(self._fd, [self._buffer])
        except OSError:  # none, or the interface is down or gone
            return None
        return self._view[:HEADER_BYTES], self._view[HEADER_BYTES:size]

    def pause(self, paused: bool) -> None:
        """While paused packets queue up in the interface."""
        if paused != self._paused and self._reactor and self._fd >= 0:
            self._paused = paused
            self._reactor.modify(self._fd, 0 if paused else select.EPOLLIN)

    def close(self) -> None:
        """Let go of the interface; it vanishes unless it was made to persist."""
        if self._fd >= 0:
            if self._reactor:
                self._reactor.remove(self._fd)
            os.close(self._fd)
            self._fd = -1


def _open(name: str) -> int:
    raw = name.encode()
    if not 0 < len(raw) < _IFNAMSIZ or "/" in name or "%" in name or name in (".", ".."):
        raise BackendError(
            f"{name!r} can't be an interface's name: 1 to {_IFNAMSIZ - 1} bytes without / and %"
        )
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(
            f"tap interface {name}: can't open {_DEVICE}: {error.strerror}. Load the module tun, and let this user read and "
            "write the device (in a container, it must be passed in)"
        ) from None
    try:
        request = struct.pack(f"{_IFNAMSIZ}sH22x", raw, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
        fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    except OSError as error:
        os.close(fd)
        raise BackendError(
            f"tap interface {name}: {_REASONS.get(error.errno or 0, error.strerror)}"
        ) from None
    return fd


_REASONS = {
    errno.EPERM: "it isn't this user's, and a new one takes CAP_NET_ADMIN. As root: ip tuntap add NAME mode tap user USER",
    errno.EBUSY: "it is in use",
    errno.EINVAL: "there is an interface of that name, which isn't a tap, or is one with other options (multi_queue)",
}
