"""Where a network device's frames go to and come from.

`slirp` is user-mode networking: TCP, UDP and ping by the sockets of an ordinary process, for every user and in every container.
`tap` is an interface of the host. `device` is what sits in front of them: `kvmkit.devices.virtio.net`.

User-mode networking was chosen by trying. passt sandboxes itself in a user namespace and refuses to start where those are
forbidden, as in a container with Docker's default seccomp profile, and Debian 12's takes port forwards only at its start.
slirp4netns needs a network namespace. libslirp needs nothing: it is a library, and forwards at run time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypedDict

from kvmkit.devices.reactor import Reactor

HEADER_BYTES = 12
"""struct virtio_net_hdr_v1, which every frame carries (virtio 1.2, section 5.1.6)."""
ETHERNET_BYTES = 14
VLAN_BYTES = 4

# Feature bits that a backend may have (virtio 1.2, section 5.1.3).
VIRTIO_NET_F_CSUM = 1 << 0
VIRTIO_NET_F_GUEST_CSUM = 1 << 1
VIRTIO_NET_F_GUEST_TSO4 = 1 << 7
VIRTIO_NET_F_GUEST_TSO6 = 1 << 8
VIRTIO_NET_F_GUEST_ECN = 1 << 9
VIRTIO_NET_F_HOST_TSO4 = 1 << 11
VIRTIO_NET_F_HOST_TSO6 = 1 << 12
VIRTIO_NET_F_HOST_ECN = 1 << 13

Packet = tuple[bytes | memoryview, bytes | memoryview]
"""A virtio_net_hdr_v1, whose num_buffers doesn't matter, and a frame. Views are good until the next `Backend.receive`."""


class GuestNetwork(TypedDict):
    """What to configure in the guest, where nobody serves it DHCP."""

    address: str
    """With its prefix: ``10.0.2.15/24``."""
    gateway: str
    nameservers: list[str]


class BackendError(OSError):
    """The host doesn't have what a backend needs; the message says what to do about it."""


class Backend(ABC):
    """One network. But for `forward` and `close`, all of it is used on the reactor that `open` gave."""

    mtu_bytes: int
    """The largest IP packet that it takes and gives."""
    features: int = 0
    """VIRTIO_NET_F_* that it honours."""
    guest_network: GuestNetwork | None = None

    @abstractmethod
    def open(self, reactor: Reactor, ready: Callable[[], object]) -> None:
        """Start. `ready` is called on the reactor whenever `receive` has something. It starts paused."""

    @abstractmethod
    def negotiated(self, features: int) -> None:
        """The driver took these of the device's features; none after a reset."""

    @abstractmethod
    def send(self, header: bytes, frame: bytes) -> None:
        """Take a frame of the guest's, its header checked. It may be dropped. `flush` follows a batch of these."""

    @abstractmethod
    def flush(self) -> None:
        """A batch of `send` is over."""

    @abstractmethod
    def receive(self) -> Packet | None:
        """Give the next packet for the guest, None if there is none now."""

    @abstractmethod
    def pause(self, paused: bool) -> None:
        """While paused the guest has no room: don't call `ready`, let senders wait."""

    def forward(self, host_port: int, guest_port: int) -> int:
        """Listen on TCP 127.0.0.1:`host_port` of the host, any free port if 0, for `guest_port` of the guest. Any thread.

        Returns the host's port. `OSError` if it is in use, `BackendError` where the guest is reached otherwise.
        """
        raise BackendError(f"{type(self).__name__} forwards no ports: the guest has an address of its own")

    @abstractmethod
    def close(self) -> None:
        """Release everything. The reactor is still there, or has ended. Closing twice does nothing."""
