"""File system device (virtio 1.2, section 5.11): carries FUSE requests to a server, `kvmkit.devices.fuse`.

Queue 0 is for what mustn't wait behind other requests (FORGET), then come request queues. We have one, and one thread for both: a
request takes tens of microseconds, and a disk so slow that this hurts is slow for whatever waits next, too.
"""

from collections.abc import Sequence
from typing import Protocol

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue

_TAG_BYTES = 36


class FuseServer(Protocol):
    """What answers, as `kvmkit.devices.fuse.passthrough.PassthroughFs`. All but the constructor on the device's thread."""

    def enter_thread(self) -> None:
        """Called once, first."""

    def handle(self, chain: Chain) -> int:
        """Answer a request into its chain. Returns the bytes written."""

    def reset(self) -> None:
        """Forget the guest."""

    def close(self) -> None:
        """Release everything."""


class Fs(VirtioDevice):
    """The guest mounts `server`'s files by ``mount -t virtiofs TAG DIR``; `tag` is 1 to 36 bytes in UTF-8."""

    device_id = 26
    queue_sizes = (128, 1024)  # the latter holds a request of 256 pages even without indirect descriptors

    def __init__(self, tag: str, server: FuseServer, *, name: str) -> None:
        """The device closes `server`."""
        raw = tag.encode()
        if not 0 < len(raw) <= _TAG_BYTES or "\0" in tag:
            raise ValueError(f"a tag is 1 to {_TAG_BYTES} bytes, not {tag!r}")
        super().__init__(name)
        self._config = raw.ljust(_TAG_BYTES, b"\0") + (1).to_bytes(4, "little")
        self._server = server
        self.reactor.call_and_wait(server.enter_thread)

    def config(self) -> bytes:
        """``tag``, ``num_request_queues``."""
        return self._config

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Nothing to prepare: the session begins with FUSE_INIT."""

    def queue_notified(self, queue: Queue) -> None:
        """Answer what waits."""
        handle = self._server.handle
        for chain in queue:
            queue.push(chain, handle(chain))
            self.signal(queue)

    def reset(self) -> None:
        """The guest is gone, with its files."""
        self._server.reset()

    def close(self) -> None:
        """End the thread, close all files."""
        super().close()
        self._server.close()
