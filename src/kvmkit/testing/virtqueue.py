"""The driver's side of virtqueues, for testing and fuzzing devices without a guest.

::

    driver = Driver(Rng("rng"))
    driver.add(0, in_=[16])
    driver.kick(0)
    assert driver.wait_used(0)[0].written_bytes == 16

`Driver` stands in for transport and guest at once: it owns a small guest memory, lays out rings in it and fills them in. What it
writes may be nonsense on purpose: `memory` and the addresses are open.
"""

import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue, QueueError
from kvmkit.kvm import GuestMemory, MemoryMap

VERSION_1 = 1 << 32
_QUEUES = 0x10000
_QUEUE_BYTES = 0x10000
_BUFFERS = 0x200000
_NEXT, _WRITE, _INDIRECT = 1, 2, 4


@dataclass(frozen=True)
class Used:
    """A request that came back."""

    head: int
    written_bytes: int
    data: bytes
    """All that its writable buffers hold."""


class _Queue(Queue):
    """Counts the chains that the device took, whole or broken."""

    chains = 0

    def _chain(self, head: int) -> Chain:
        self.chains += 1
        return super()._chain(head)


@dataclass
class _Ring:
    size: int
    desc: int
    avail: int
    used: int
    free: list[int] = field(default_factory=list)
    chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = field(default_factory=dict)
    """Head → its descriptors, and its writable buffers."""
    added: int = 0
    seen: int = 0


class Driver:
    """Activates `device` at once, with `features` (those that it offers unless given)."""

    def __init__(
        self,
        device: VirtioDevice,
        features: int | None = None,
        *,
        memory_bytes: int = 16 << 20,
        event_idx: bool = True,
    ) -> None:
        """`event_idx`: have the queues negotiate VIRTIO_RING_F_EVENT_IDX."""
        self.device = device
        self.features = device.features if features is None else features
        self.memory = MemoryMap()
        self.memory.add(0, GuestMemory(memory_bytes))
        self._end = memory_bytes
        self.interrupts = 0
        self.config_interrupts = 0
        self.broken = False
        """DEVICE_NEEDS_RESET is set."""
        self._event_idx = event_idx
        self.queues: list[_Queue] = []
        self._chains = 0
        self.activations = 0
        """How often the device was activated: what was told to it before is forgotten."""
        self._changed = threading.Condition()
        device.interrupt = self._interrupt
        device.interrupt_config = self._interrupt_config
        device.needs_reset = self._needs_reset
        self.activate()

    def activate(self) -> None:
        """Lay out empty rings and set DRIVER_OK; again after `reset`."""
        self._next_buffer = _BUFFERS
        self._chains = self.chains
        self.activations += 1
        self.broken = False
        self.rings = [self._ring(i, size) for i, size in enumerate(self.device.queue_sizes)]
        self.memory.write(_QUEUES, bytes(_QUEUE_BYTES * len(self.rings)))
        self.queues = [
            _Queue(self.memory, i, r.size, r.desc, r.avail, r.used, event_idx=self._event_idx)
            for i, r in enumerate(self.rings)
        ]

        def activate() -> None:
            self.device.active = True
            self.device.activate(self.features | VERSION_1, self.queues)

        self.device.reactor.call_and_wait(activate)

    def _ring(self, index: int, size: int) -> _Ring:
        size = min(size, 1024)
        base = _QUEUES + index * _QUEUE_BYTES
        return _Ring(size, base, base + 0x8000, base + 0xA000, list(range(size)))

    def reset(self) -> None:
        """Reset the device, as the driver does by writing 0 to the status."""
        self.device.active = False
        for reactor in self.device.reactors():
            reactor.call_and_wait(lambda: None)
        self.device.reactor.call_and_wait(self.device.reset)

    def buffer(self, size_bytes: int) -> int:
        """Return the address of a new buffer. They are never freed before `activate` but begin anew when memory is used up."""
        if self._next_buffer + size_bytes > self._end:
            self._next_buffer = _BUFFERS
        gpa = self._next_buffer
        self._next_buffer += (size_bytes + 63) // 64 * 64
        return gpa

    def add(
        self,
        queue: int,
        out: Sequence[bytes] = (),
        in_: Sequence[int] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Make a request available: buffers `out` for the device to read, `in_` sizes of those to write. Returns its head."""
        buffers: list[tuple[int, int, int]] = []
        for data in out:
            gpa = self.buffer(len(data))
            self.memory.write(gpa, data)
            buffers.append((gpa, len(data), 0))
        writable = [(self.buffer(size), size) for size in in_]
        buffers += [(gpa, size, _WRITE) for gpa, size in writable]
        return self.add_raw(queue, buffers, writable, indirect=indirect)

    def add_raw(
        self,
        queue: int,
        buffers: Sequence[tuple[int, int, int]],
        writable: Sequence[tuple[int, int]] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Make descriptors (address, length, flags) available as they are, linked by NEXT."""
        ring = self.rings[queue]
        if indirect:
            table = self.buffer(16 * len(buffers))
            self.memory.write(table, b"".join(self._descriptors(buffers, range(len(buffers)))))
            buffers = [(table, 16 * len(buffers), _INDIRECT)]
        if len(ring.free) < len(buffers):
            raise ValueError(f"queue {queue}: no {len(buffers)} free descriptors")
        taken = [ring.free.pop() for _ in buffers]
        for i, raw in zip(taken, self._descriptors(buffers, taken), strict=True):
            self.memory.write(ring.desc + 16 * i, raw)
        ring.chains[taken[0]] = (taken, list(writable))
        self.memory.write(ring.avail + 4 + 2 * (ring.added % ring.size), struct.pack("<H", taken[0]))
        ring.added += 1
        self.memory.write(ring.avail + 2, struct.pack("<H", ring.added & 0xFFFF))
        return taken[0]

    @staticmethod
    def _descriptors(buffers: Sequence[tuple[int, int, int]], indices: Sequence[int]) -> list[bytes]:
        links = [*indices[1:], 0]
        last = len(buffers) - 1
        return [
            struct.pack("<QIHH", gpa, size, flags | (_NEXT if k < last else 0), links[k])
            for k, (gpa, size, flags) in enumerate(buffers)
        ]

    @property
    def chains(self) -> int:
        """How many chains the device has taken so far, the broken ones included."""
        return self._chains + sum(queue.chains for queue in self.queues)

    def kick(self, queue: int) -> None:
        """Notify the device, and wait until it has done what it does at once."""
        self.device.reactor_for(queue).call_and_wait(self._notification(queue))

    def notify(self, queue: int) -> None:
        """Notify the device, and don't wait: it works on its own thread."""
        self.device.reactor_for(queue).call(self._notification(queue))

    def _notification(self, queue: int) -> Callable[[], None]:
        target = self.queues[queue]

        def notified() -> None:
            if self.device.active:
                try:
                    self.device.queue_notified(target)
                except QueueError as error:
                    self.device.fail(error)

        return notified

    def used(self, queue: int) -> list[Used]:
        """Take back what the device is done with."""
        ring = self.rings[queue]
        index = int.from_bytes(self.memory.read(ring.used + 2, 2), "little")
        back = []
        while ring.seen & 0xFFFF != index:
            head, written = struct.unpack(
                "<II", self.memory.read(ring.used + 4 + 8 * (ring.seen % ring.size), 8)
            )
            taken, writable = ring.chains.pop(head)
            ring.free += taken
            data = b"".join(self.memory.read(gpa, size) for gpa, size in writable)
            back.append(Used(head, written, data))
            ring.seen += 1
        # Ask for an interrupt at the next one.
        self.memory.write(ring.avail + 4 + 2 * ring.size, struct.pack("<H", ring.seen & 0xFFFF))
        return back

    def wait_used(self, queue: int, count: int = 1, timeout_s: float = 10.0) -> list[Used]:
        """Wait until `count` requests came back, and return all that did; `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        back = self.used(queue)
        while len(back) < count:
            with self._changed:
                self._changed.wait(0.01)
            back += self.used(queue)
            if time.monotonic() > deadline:
                raise TimeoutError(f"queue {queue}: {len(back)} of {count} requests came back")
        return back

    def close(self) -> None:
        """Close the device and free the memory."""
        self.device.active = False
        self.device.close()
        self._chains = self.chains
        self.queues = []
        with suppress(BufferError):  # a test still holds a view
            self.memory.close()

    def __enter__(self) -> "Driver":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _interrupt(self) -> None:
        with self._changed:
            self.interrupts += 1
            self._changed.notify_all()

    def _interrupt_config(self) -> None:
        with self._changed:
            self.config_interrupts += 1
            self._changed.notify_all()

    def _needs_reset(self) -> None:
        with self._changed:
            self.broken = True
            self._changed.notify_all()
