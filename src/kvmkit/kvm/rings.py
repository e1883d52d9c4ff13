"""Rings that KVM shares with user space: coalesced MMIO, and the dirty ring.

The **coalesced MMIO ring** is one page for the whole VM, mapped into every vCPU's area. KVM appends the guest's writes to
registered ranges at `last`; user space takes them from `first`. A full ring makes KVM exit for the write, as without one.

A **dirty ring** belongs to a vCPU. KVM publishes a page that the guest wrote by setting an entry's DIRTY flag, after slot and
offset; user space reads the entries in order, and hands each back by setting its RESET flag. `Vm.reset_dirty_rings` then protects
those pages again. (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO and KVM_CAP_DIRTY_LOG_RING.)
"""

import ctypes
import threading
from typing import Any

from kvmkit.uapi import common as c

PAGE_SIZE = 4096
COALESCED_ENTRIES = (PAGE_SIZE - ctypes.sizeof(c.kvm_coalesced_mmio_ring)) // ctypes.sizeof(
    c.kvm_coalesced_mmio
)


class CoalescedRing:
    """User space's side of the coalesced MMIO ring."""

    def __init__(self, page: memoryview) -> None:
        """`page` is the shared page."""
        self._head = c.kvm_coalesced_mmio_ring.from_buffer(page)
        offset = ctypes.sizeof(c.kvm_coalesced_mmio_ring)
        self._entries: Any = (c.kvm_coalesced_mmio * COALESCED_ENTRIES).from_buffer(page, offset)

    def take(self) -> list[c.kvm_coalesced_mmio]:
        """Take all entries, oldest first. One thread at a time."""
        head = self._head
        taken: list[c.kvm_coalesced_mmio] = []
        while (first := head.first) != head.last:
            _fence()
            taken.append(c.kvm_coalesced_mmio.from_buffer_copy(self._entries[first % COALESCED_ENTRIES]))
            _fence()
            head.first = (first + 1) % COALESCED_ENTRIES
        return taken

    def add(self, phys_addr: int, data: bytes | memoryview, pio: bool) -> bool:
        """Append a write, as KVM does; False if the ring is full. One thread at a time."""
        head = self._head
        last = head.last % COALESCED_ENTRIES
        if (last + 1) % COALESCED_ENTRIES == head.first % COALESCED_ENTRIES:
            return False
        entry = self._entries[last]
        entry.phys_addr, entry.len, entry.pio = phys_addr, len(data), pio
        entry.data[: len(data)] = list(data)
        _fence()
        head.last = (last + 1) % COALESCED_ENTRIES
        return True


class DirtyRing:
    """User space's side of one vCPU's dirty ring."""

    def __init__(self, area: memoryview) -> None:
        """`area` is the mapped ring: kvm_dirty_gfn after kvm_dirty_gfn."""
        self.entries = len(area) // ctypes.sizeof(c.kvm_dirty_gfn)
        self._gfns: Any = (c.kvm_dirty_gfn * self.entries).from_buffer(area)
        self._next = 0

    def take(self) -> list[tuple[int, int]]:
        """Take all entries: (slot, page in the slot), in order. One thread at a time."""
        taken: list[tuple[int, int]] = []
        while True:
            gfn = self._gfns[self._next]
            if gfn.flags & c.KVM_DIRTY_GFN_F_MASK != c.KVM_DIRTY_GFN_F_DIRTY:
                return taken
            _fence()
            taken.append((gfn.slot, gfn.offset))
            _fence()
            gfn.flags = c.KVM_DIRTY_GFN_F_RESET
            self._next = (self._next + 1) % self.entries


_order = threading.Lock()


def _fence() -> None:
    """Keep the accesses before in front of those after, on a machine that would not (arm64).

    Python has no fence. Releasing a lock and then acquiring one does: what precedes a release stays in front of it, what
    follows an acquisition stays behind it, and arm64 keeps such a release in front of a later acquisition.
    """
    with _order:
        pass
    with _order:
        pass
