"""Network device (virtio 1.2, section 5.1): one pair of queues between the guest's driver and a `kvmkit.devices.net.Backend`.

A packet costs Python some 20 µs whatever its size, so what makes it fast is large packets: the backend's MTU, or segmentation
offload where the backend has that. Each wake-up handles what there is, and interrupts once.

Where the guest has no room for a packet, that packet waits and the backend is paused until the guest adds buffers. What the guest
sends is dropped where it isn't a frame, or its header says what can't be or wasn't negotiated.
"""

import secrets
import struct
from collections import deque
from collections.abc import Sequence

from kvmkit.devices.net import (
    ETHERNET_BYTES,
    HEADER_BYTES,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VLAN_BYTES,
    Backend,
    Packet,
)
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue, QueueError

VIRTIO_NET_F_MTU = 1 << 3
VIRTIO_NET_F_MAC = 1 << 5
VIRTIO_NET_F_MRG_RXBUF = 1 << 15
VIRTIO_NET_F_STATUS = 1 << 16

RECEIVE, TRANSMIT = 0, 1

_S_LINK_UP = 1
_CONFIG = struct.Struct("<6sHHH")
_HEADER = struct.Struct("<BBHHHHH")
_F_NEEDS_CSUM = 1
_GSO_NONE, _GSO_ECN = 0, 0x80
_GSO_FEATURE = {1: VIRTIO_NET_F_HOST_TSO4, 4: VIRTIO_NET_F_HOST_TSO6}
_MAX_GSO_BYTES = 65535
"""The largest IP packet that is to be segmented: its length has 16 bits."""

_BATCH = 256
"""Packets of one direction before the reactor looks at anything else."""


def random_mac() -> bytes:
    """Return a locally administered unicast address, different each time."""
    return b"\x02" + secrets.token_bytes(5)


class Net(VirtioDevice):
    """A network card with address `mac` (6 bytes) on `backend`, which it opens, and closes with itself."""

    device_id = 1
    queue_sizes = (256, 256)

    def __init__(self, backend: Backend, *, mac: bytes, name: str = "net") -> None:
        """`ValueError` for a MAC address that isn't a station's; what `Backend.open` raises."""
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(f"{mac.hex(':')} isn't a unicast MAC address of 6 bytes")
        self.features = (
            VIRTIO_NET_F_MTU
            | VIRTIO_NET_F_MAC
            | VIRTIO_NET_F_MRG_RXBUF
            | VIRTIO_NET_F_STATUS
            | backend.features
        )
        super().__init__(name)
        self.backend = backend
        self._config = _CONFIG.pack(mac, _S_LINK_UP, 1, backend.mtu_bytes)
        self._receive_queue: Queue | None = None
        self._transmit_queue: Queue | None = None
        self._features = 0
        self._chains: deque[Chain] = deque()
        """Receive buffers that were popped and not used yet."""
        self._chains_bytes = 0
        self._waiting: Packet | None = None
        """The packet that the guest has no room for."""
        self._closed = False
        try:
            self.reactor.call_and_wait(lambda: backend.open(self.reactor, self._receive))
        except BaseException:
            self.close()
            raise

    def config(self) -> bytes:
        """Struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu."""
        return self._config

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Connect the guest to the backend."""
        self._features = features
        self._receive_queue, self._transmit_queue = queues[RECEIVE], queues[TRANSMIT]
        self.backend.negotiated(features)
        self.backend.pause(False)
        self._receive()
        self._transmit()

    def queue_notified(self, queue: Queue) -> None:
        """The guest has room for packets, or sends some."""
        if queue.index == TRANSMIT:
            self._transmit()
        else:
            self.backend.pause(False)
            self._receive()

    def reset(self) -> None:
        """Forget the guest's buffers. Connections of the backend live on, as on a card that is reset."""
        self._forget()
        self.backend.pause(True)
        self.backend.negotiated(0)

    def _forget(self) -> None:
        self._receive_queue = self._transmit_queue = None
        self._chains.clear()
        self._chains_bytes = 0
        self._waiting = None

    def close(self) -> None:
        """Close the backend, then the reactor."""
        if not self._closed:
            self._closed = True
            try:
                self.reactor.call_and_wait(self.backend.close)
            finally:
                super().close()
                self._forget()  # or its views would keep the guest's memory

    def _transmit(self) -> None:
        queue = self._transmit_queue
        if not self.active or queue is None:
            return
        for _ in range(_BATCH):
            chain = queue.pop()
            if chain is None:
                break
            self._send(chain)
            queue.push(chain, 0)
        else:
            self.reactor.call(self._transmit)
        self.backend.flush()  # may answer at once: then one interrupt is for both
        self.signal(queue)

    def _send(self, chain: Chain) -> None:
        frame_bytes = chain.readable_bytes - HEADER_BYTES
        if not ETHERNET_BYTES <= frame_bytes <= _MAX_GSO_BYTES + ETHERNET_BYTES + VLAN_BYTES:
            return
        header = checked_header(
            chain.read(0, HEADER_BYTES), frame_bytes, self._features, self.backend.mtu_bytes
        )
        if header is not None:
            self.backend.send(header, chain.read(HEADER_BYTES))

    def _receive(self) -> None:
        """Give the guest what the backend has, as far as there is room."""
        queue = self._receive_queue
        if not self.active or queue is None:
            self.backend.pause(True)
            return
        for _ in range(_BATCH):
            packet = self._waiting or self.backend.receive()
            self._waiting = None
            if packet is None:
                break
            if not self._deliver(queue, *packet):
                self._waiting = bytes(packet[0]), bytes(packet[1])
                self.backend.pause(True)
                break
        else:
            self.reactor.call(self._receive)
        self.signal(queue)

    def _deliver(self, queue: Queue, header: bytes | memoryview, frame: bytes | memoryview) -> bool:
        """Write a packet to receive buffers, or drop it if it can never fit. False if that needs more buffers than there are."""
        size = HEADER_BYTES + len(frame)
        merge = self._features & VIRTIO_NET_F_MRG_RXBUF
        while not self._chains or (merge and self._chains_bytes < size and len(self._chains) < queue.size):
            chain = queue.pop()
            if chain is None:
                return False
            if chain.writable_bytes < HEADER_BYTES:
                raise QueueError(f"queue {RECEIVE}: a receive buffer of {chain.writable_bytes} bytes")
            self._chains.append(chain)
            self._chains_bytes += chain.writable_bytes
        if (self._chains_bytes if merge else self._chains[0].writable_bytes) < size:
            return True
        used: list[tuple[Chain, int]] = []
        left = memoryview(frame)
        offset = HEADER_BYTES
        while left or not used:
            chain = self._chains.popleft()
            self._chains_bytes -= chain.writable_bytes
            written = chain.write(left[: chain.writable_bytes - offset], offset)
            used.append((chain, offset + written))
            left = left[written:]
            offset = 0
        first = used[0][0]
        first.write(bytes(header[:10]) + len(used).to_bytes(2, "little"))
        queue.push_all(used)
        return True


def checked_header(header: bytes, frame_bytes: int, features: int, mtu_bytes: int) -> bytes | None:
    """Check a struct virtio_net_hdr_v1 of the driver's for a frame of `frame_bytes`, with the negotiated `features`.

    Returns the header with all else cleared, None if it is to be dropped: it lies about the frame, asks for what wasn't
    negotiated, or the frame is longer than `mtu_bytes` allows.
    """
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = _HEADER.unpack(header)
    flags &= _F_NEEDS_CSUM
    if flags:
        if not features & VIRTIO_NET_F_CSUM or csum_start + csum_offset + 2 > frame_bytes:
            return None
    else:
        csum_start = csum_offset = 0
    if gso_type == _GSO_NONE:
        if frame_bytes > mtu_bytes + ETHERNET_BYTES + VLAN_BYTES:
            return None
        return _HEADER.pack(flags, gso_type, 0, 0, csum_start, csum_offset, 0)
    if not flags or not gso_size or hdr_len > frame_bytes:
        return None
    if not features & _GSO_FEATURE.get(gso_type & ~_GSO_ECN, 0):
        return None
    if gso_type & _GSO_ECN and not features & VIRTIO_NET_F_HOST_ECN:
        return None
    return _HEADER.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, 0)
