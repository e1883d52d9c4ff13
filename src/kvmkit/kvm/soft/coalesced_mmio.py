"""Writes that wait in a ring instead of exiting (``virt/kvm/coalesced_mmio.c``)."""

import errno
import mmap
import threading

from kvmkit.kvm.rings import PAGE_SIZE, CoalescedRing
from kvmkit.uapi import common as c
from kvmkit.uapi.errors import ioctl_error

_MAX_ZONES = 1000


class CoalescedMmio:
    """A VM's registered ranges and its ring."""

    def __init__(self) -> None:
        """Start with no ranges."""
        self.zones: list[tuple[int, int, int]] = []
        """Address, size and whether I/O ports; replaced as a whole."""
        self._lock = threading.Lock()
        self.ring = CoalescedRing(memoryview(mmap.mmap(-1, PAGE_SIZE)))

    def register(self, addr: int, size: int, pio: int) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        if pio not in (0, 1):
            raise ioctl_error("KVM_REGISTER_COALESCED_MMIO", errno.EINVAL, f"pio {pio}")
        with self._lock:
            if len(self.zones) >= _MAX_ZONES:
                raise ioctl_error("KVM_REGISTER_COALESCED_MMIO", errno.ENOSPC)
            self.zones = [*self.zones, (addr, size, pio)]

    def unregister(self, addr: int, size: int, pio: int) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: forget the ranges that hold this one whole."""
        if pio not in (0, 1):
            raise ioctl_error("KVM_UNREGISTER_COALESCED_MMIO", errno.EINVAL, f"pio {pio}")
        with self._lock:
            self.zones = [z for z in self.zones if z[2] != pio or not _holds(z, addr, size)]

    def take_mmio(self, access: c.kvm_run_mmio) -> bool:
        """Take a write to memory, unless nobody registered it or the ring is full."""
        return self._take(access.phys_addr, bytes(access.data)[: access.len], 0)

    def take_pio(self, io: c.kvm_run_io, area: memoryview) -> bool:
        """Take an OUT likewise. As in the kernel the first item of OUTS decides; what finds no room later is lost."""
        start, size = io.data_offset, io.size
        items = [bytes(area[at : at + size]) for at in range(start, start + io.count * size, size)]
        if not self._take(io.port, items[0], 1):
            return False
        for item in items[1:]:
            self._take(io.port, item, 1)
        return True

    def _take(self, addr: int, data: bytes, pio: int) -> bool:
        if not any(z[2] == pio and _holds(z, addr, len(data)) for z in self.zones):
            return False
        with self._lock:
            return self.ring.add(addr, data, bool(pio))


def _holds(zone: tuple[int, int, int], addr: int, size: int) -> bool:
    return zone[0] <= addr and addr + size <= zone[0] + zone[1]
