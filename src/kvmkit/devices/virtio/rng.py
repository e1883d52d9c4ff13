"""Entropy device (virtio 1.2, section 5.4): fills buffers with the host's random bytes."""

import os
from collections.abc import Sequence

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Queue

_MAX_BYTES = 4096
"""Given for one request, however large: the driver asks again."""


class Rng(VirtioDevice):
    """The host's getrandom(2)."""

    device_id = 4
    queue_sizes = (64,)

    def config(self) -> bytes:
        """It has none."""
        return b""

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Nothing to prepare."""

    def queue_notified(self, queue: Queue) -> None:
        """Fill what waits."""
        for chain in queue:
            queue.push(chain, chain.write(os.urandom(min(chain.writable_bytes, _MAX_BYTES))))
        self.signal(queue)

    def reset(self) -> None:
        """Nothing to forget."""
