"""What all virtio devices have in common (virtio 1.2, chapter 2): features, configuration, activation, reset, failure.

A device's state belongs to the thread of its reactor. Its transport calls `activate`, `reset`, `write_config` and
`queue_notified` there; only `config` is called on a vCPU's thread, so it returns what doesn't change half-way.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from kvmkit.devices.reactor import Reactor
from kvmkit.devices.virtio.queue import Queue, QueueError

_log = logging.getLogger(__name__)

_MAX_LOGGED = 16
"""Failures of one device that are logged: a guest may bring about as many as it likes."""


class VirtioDevice(ABC):
    """A device behind whatever transport. `name` is for its thread and for messages."""

    device_id: ClassVar[int]
    """VIRTIO_ID_* (section 5)."""
    queue_sizes: Sequence[int]
    """The largest size of each virtqueue, a power of two."""
    features: int = 0
    """The device's own feature bits. What belongs to queues and transports is the transport's to offer."""

    def __init__(self, name: str) -> None:
        """Start its thread."""
        self.name = name
        self.reactor = Reactor(name, self.fail)
        self.active = False
        """Between `activate` and a reset or a failure."""
        self.interrupt: Callable[[], None] = _nothing
        """Set by the transport: interrupt the guest for used buffers."""
        self.interrupt_config: Callable[[], None] = _nothing
        """Set by the transport: interrupt the guest for a change of the configuration."""
        self.needs_reset: Callable[[], None] = _nothing
        """Set by the transport: DEVICE_NEEDS_RESET."""
        self._failures = 0

    @abstractmethod
    def config(self) -> bytes:
        """The whole configuration space, little-endian. Any thread."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space; most devices take nothing."""
        return

    @abstractmethod
    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """The driver is ready (DRIVER_OK), with these of the offered features; None is a queue that it doesn't use."""

    @abstractmethod
    def queue_notified(self, queue: Queue) -> None:
        """The driver put requests into `queue`. On the thread of ``reactor_for(queue.index)``."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the queues and all that the driver told. No thread of the device uses them any more."""

    def close(self) -> None:
        """The VM is gone: end the threads, release what the device holds."""
        for reactor in self.reactors():
            reactor.close()

    def reactor_for(self, index: int) -> Reactor:
        """Whose thread works on queue `index`."""
        return self.reactor

    def reactors(self) -> list[Reactor]:
        """Every reactor once."""
        return list(
            {id(r): r for r in (self.reactor, *map(self.reactor_for, range(len(self.queue_sizes))))}.values()
        )

    def signal(self, queue: Queue) -> None:
        """Interrupt the guest for what was pushed to `queue`, if it wants that."""
        if queue.needs_interrupt():
            self.interrupt()

    def config_changed(self) -> None:
        """Tell the driver that `config` changed."""
        if self.active:
            self.interrupt_config()

    def fail(self, error: Exception) -> None:
        """The guest broke a queue, or the device has a bug: it does nothing more until the driver resets it."""
        self.active = False
        self._failures += 1
        if self._failures <= _MAX_LOGGED:
            if isinstance(error, QueueError):
                _log.warning("%s: %s; it needs a reset", self.name, error)
            else:
                _log.error("%s failed; it needs a reset", self.name, exc_info=error)
        self.needs_reset()


def _nothing() -> None:
    """No transport yet."""
