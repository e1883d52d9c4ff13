"""The split virtqueue, on the side of the device (virtio 1.2, section 2.7).

The rings lie in guest memory and the guest may rewrite them while they are read. So each value is read once, checked, and used
from the copy: a descriptor chain is taken out of the ring into a `Chain` before anybody looks at its buffers. What the buffers
hold may change under a device at any time too; it reads a request's header once, by `Chain.read`.

Notification goes by event index (VIRTIO_F_EVENT_IDX) where the driver takes it: `pop` asks for a kick when, and only when, it
finds the ring empty, and `needs_interrupt` compares with where the driver wants to be woken. Both first make what they wrote
visible (a full fence) and then look again, else a wake-up is lost.
"""

import struct
from collections.abc import Iterator, Sequence

from kvmkit.kvm import GuestAddressError, MemoryMap
from kvmkit.kvm.ordered import fence, load_u16, store_u16

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_F_NEXT, _F_WRITE, _F_INDIRECT = 1, 2, 4
_AVAIL_F_NO_INTERRUPT = 1

MAX_INDIRECT = 1024
"""Descriptors in an indirect table: more than Linux makes for any device."""

MAX_CHAIN_BYTES = 1 << 32
"""Of all buffers of a chain together (section 2.7.5). They may overlap, so that guest memory is no limit."""


class QueueError(Exception):
    """The guest broke a queue. The device needs a reset (virtio 1.2, section 2.1.2)."""


class Chain:
    """A request: buffers that the device reads, then buffers that it writes.

    Views are the guest's memory itself, checked to lie within it; the guest may change it at any time.
    """

    __slots__ = (
        "_touched_bytes",
        "head",
        "readable",
        "readable_buffers",
        "readable_bytes",
        "writable",
        "writable_buffers",
        "writable_bytes",
    )

    def __init__(self, head: int) -> None:
        """`head` is the index of its first descriptor, its name in the used ring."""
        self.head = head
        self.readable: list[tuple[int, int]] = []
        """Guest physical address and bytes of each buffer that the device reads."""
        self.writable: list[tuple[int, int]] = []
        self.readable_buffers: list[memoryview] = []
        self.writable_buffers: list[memoryview] = []
        self.readable_bytes = 0
        self.writable_bytes = 0
        self._touched_bytes = 0

    def read(self, offset: int = 0, size_bytes: int | None = None) -> bytes:
        """Copy what the device may read, from `offset`: `size_bytes` of it, fewer if there aren't as many."""
        return b"".join(self.readable_views(offset, size_bytes))

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy `data` to where the device may write, from `offset`. Returns how many bytes fitted."""
        done = 0
        data = memoryview(data)
        for view in self.writable_views(offset, len(data)):
            view[:] = data[done : done + len(view)]
            done += len(view)
        return done

    def readable_views(self, offset: int = 0, size_bytes: int | None = None) -> list[memoryview]:
        """Return up to `size_bytes` from `offset` on as views, e.g. for `os.pwritev`."""
        return _cut(self.readable_buffers, offset, self.readable_bytes, size_bytes)

    def writable_views(self, offset: int = 0, size_bytes: int | None = None) -> list[memoryview]:
        """Return up to `size_bytes` from `offset` on as views, e.g. for `os.preadv`. They count as written."""
        views = _cut(self.writable_buffers, offset, self.writable_bytes, size_bytes)
        end = self.writable_bytes if size_bytes is None else min(offset + size_bytes, self.writable_bytes)
        if end > self._touched_bytes:
            self._touched_bytes = end
        return views

    def written_ranges(self, written_bytes: int) -> Iterator[tuple[int, int]]:
        """Guest physical address and bytes of what may have been written: the first `written_bytes`, or all that was handed out."""
        left = max(written_bytes, self._touched_bytes)
        for gpa, size in self.writable:
            if left <= 0:
                return
            yield gpa, min(size, left)
            left -= size


def _cut(buffers: list[memoryview], offset: int, total: int, size_bytes: int | None) -> list[memoryview]:
    if offset == 0 and (size_bytes is None or size_bytes >= total):
        return buffers[:]
    left = total - offset if size_bytes is None else size_bytes
    views = []
    for buffer in buffers:
        if left <= 0:
            break
        if offset >= len(buffer):
            offset -= len(buffer)
            continue
        view = buffer[offset : offset + left]
        offset = 0
        left -= len(view)
        views.append(view)
    return views


class Queue:
    """One virtqueue, ready for use. One thread at a time."""

    def __init__(
        self, memory: MemoryMap, index: int, size: int, desc: int, avail: int, used: int, *, event_idx: bool
    ) -> None:
        """`desc`, `avail` and `used` are guest physical addresses. `QueueError` for what can't be a queue (section 2.7)."""
        if not 0 < size <= 32768 or size & (size - 1):
            raise QueueError(f"queue {index}: a size of {size} isn't a power of two up to 32768")
        for what, gpa, alignment in (
            ("descriptors", desc, 16),
            ("avail ring", avail, 2),
            ("used ring", used, 4),
        ):
            if gpa % alignment:
                raise QueueError(f"queue {index}: {what} at {gpa:#x} must be a multiple of {alignment}")
        self.index = index
        self.size = size
        self._memory = memory
        self._event_idx = event_idx
        try:
            self._desc = memory.view(desc, 16 * size)
            self._avail = memory.host_address(avail, 6 + 2 * size)
            self._avail_view = memory.view(avail, 6 + 2 * size)
            self._used = memory.host_address(used, 6 + 8 * size)
            self._used_view = memory.writable_view(used, 6 + 8 * size)
        except GuestAddressError as error:
            raise QueueError(f"queue {index}: {error}") from None
        self._used_gpa = used
        self.next_avail = 0
        """The device's place in the avail ring, modulo 2^16."""
        self.next_used = 0
        self._signalled = 0

    def pop(self) -> Chain | None:
        """Take the next request. None if there is none; the guest's next one then comes with a kick. `QueueError`."""
        count = load_u16(self._avail + 2) - self.next_avail & 0xFFFF
        if not count:
            if not self._event_idx:
                return None
            store_u16(self._used + 4 + 8 * self.size, self.next_avail)
            fence()
            count = load_u16(self._avail + 2) - self.next_avail & 0xFFFF
            if not count:
                return None
        if count > self.size:
            raise QueueError(f"queue {self.index}: {count} requests in a ring of {self.size}")
        at = 4 + 2 * (self.next_avail & self.size - 1)
        chain = self._chain(self._avail_view[at] | self._avail_view[at + 1] << 8)
        self.next_avail = self.next_avail + 1 & 0xFFFF
        return chain

    def __iter__(self) -> Iterator[Chain]:
        """Pop until the queue is empty."""
        return iter(self.pop, None)

    def push(self, chain: Chain, written_bytes: int) -> None:
        """Give a request back, with its first `written_bytes` written. Whoever pushes then calls `VirtioDevice.signal`."""
        self.push_all(((chain, written_bytes),))

    def push_all(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """`push` several so that the driver sees all or none of them: the buffers of one packet (section 5.1.6.4)."""
        for chain, written_bytes in chains:
            for gpa, size in chain.written_ranges(written_bytes):
                self._memory.written(gpa, size)
            at = 4 + 8 * (self.next_used & self.size - 1)
            _USED.pack_into(self._used_view, at, chain.head, written_bytes)
            self.next_used = self.next_used + 1 & 0xFFFF
            self._memory.written(self._used_gpa + at, 8)
        store_u16(self._used + 2, self.next_used)
        self._memory.written(self._used_gpa, 4)

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (section 2.7.7)."""
        if self.next_used == self._signalled:
            return False
        fence()
        old, self._signalled = self._signalled, self.next_used
        if not self._event_idx:
            return not load_u16(self._avail) & _AVAIL_F_NO_INTERRUPT
        used_event = load_u16(self._avail + 4 + 2 * self.size)
        return (self.next_used - used_event - 1 & 0xFFFF) < (self.next_used - old & 0xFFFF)

    def _chain(self, head: int) -> Chain:
        chain = Chain(head)
        table: bytes | memoryview = self._desc
        size, i, indirect = self.size, head, False
        for _ in range(max(self.size, MAX_INDIRECT)):
            if i >= size:
                raise QueueError(f"queue {self.index}: descriptor {i} of {size}")
            gpa, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * i)
            if flags & _F_INDIRECT:
                if indirect or flags & _F_NEXT:
                    raise QueueError(f"queue {self.index}: an indirect table within a chain or a table")
                table, size, i, indirect = self._indirect(gpa, length), length // 16, 0, True
                continue
            self._add(chain, gpa, length, bool(flags & _F_WRITE))
            if not flags & _F_NEXT:
                break
            i = following
        else:
            raise QueueError(f"queue {self.index}: a chain that doesn't end")
        if chain.readable_bytes + chain.writable_bytes > MAX_CHAIN_BYTES:
            raise QueueError(f"queue {self.index}: a chain of more than {MAX_CHAIN_BYTES} bytes")
        return chain

    def _indirect(self, gpa: int, length: int) -> bytes:
        if not length or length % 16 or length > 16 * MAX_INDIRECT:
            raise QueueError(f"queue {self.index}: an indirect table of {length} bytes")
        try:
            return self._memory.read(gpa, length)
        except GuestAddressError as error:
            raise QueueError(f"queue {self.index}: {error}") from None

    def _add(self, chain: Chain, gpa: int, length: int, writable: bool) -> None:
        if not length:
            raise QueueError(f"queue {self.index}: an empty buffer")
        try:
            view = self._memory.writable_view(gpa, length)
        except GuestAddressError as error:
            raise QueueError(f"queue {self.index}: {error}") from None
        if writable:
            chain.writable.append((gpa, length))
            chain.writable_buffers.append(view)
            chain.writable_bytes += length
        elif chain.writable:
            raise QueueError(f"queue {self.index}: a buffer to read after one to write")
        else:
            chain.readable.append((gpa, length))
            chain.readable_buffers.append(view)
            chain.readable_bytes += length


def total_bytes(views: Sequence[memoryview]) -> int:
    """How many bytes views hold together."""
    return sum(map(len, views))
