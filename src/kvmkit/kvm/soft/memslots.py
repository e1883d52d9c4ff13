"""Memory slots and their dirty log (``virt/kvm/kvm_main.c``).

The engine sets a bit for each page of a logged slot that the guest writes, and gives and clears them at once. That is
KVM_GET_DIRTY_LOG. With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 the bits are collected here until KVM_CLEAR_DIRTY_LOG names them.
With dirty rings, which hold the pages instead, there are no bits for user space (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP isn't x86's).
"""

import ctypes
import errno
import mmap
import threading

from kvmkit import _engine
from kvmkit.kvm.memory import MemorySlot
from kvmkit.uapi import common as c
from kvmkit.uapi.errors import ioctl_error

MAX_SLOTS = 512
ADDRESS_SPACES = 2
"""The second one is system management mode's: slots from ``1 << 16`` (KVM_CAP_MULTI_ADDRESS_SPACE)."""
_SPACE_SHIFT = 16
_PAGE = 4096
_MAX_PHYSICAL = 1 << 46
_MAX_USER = 1 << 47
_FLAGS = c.KVM_MEM_LOG_DIRTY_PAGES | c.KVM_MEM_READONLY
_MANUAL, _ALL_SET = c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, c.KVM_DIRTY_LOG_INITIALLY_SET
MANUAL_PROTECT = _MANUAL | _ALL_SET
MAX_RING_BYTES = 65536 * ctypes.sizeof(c.kvm_dirty_gfn)  # KVM_DIRTY_RING_MAX_ENTRIES

_libc = ctypes.CDLL(None, use_errno=True)
_MADV_POPULATE_WRITE = 23


class MemSlots:
    """A VM's slots. Any thread."""

    def __init__(self, vm: _engine.Vm) -> None:
        """Start with none."""
        self._vm = vm
        self._slots: dict[int, tuple[int, int, int, int]] = {}  # gpa, size, hva, flags
        self._lock = threading.Lock()
        self._protect = 0  # KVM_DIRTY_LOG_*
        self._dirty: dict[int, int] = {}
        """Slot → bitmap of pages that KVM_CLEAR_DIRTY_LOG has not cleared."""
        self.ring_size_bytes = 0

    def set_region(self, name: str, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        """KVM_SET_USER_MEMORY_REGION; errors bear `name`."""
        if flags & ~_FLAGS or not _exists(slot):
            raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x} or slot {slot} unknown")
        if (gpa | size | hva) & _PAGE - 1:
            raise ioctl_error(name, errno.EINVAL, "addresses and size must be multiples of 4096")
        if gpa + size > 1 << 64 or (size and gpa + size > _MAX_PHYSICAL) or hva + size >= _MAX_USER:
            raise ioctl_error(name, errno.EINVAL, "beyond the end of the address space")
        with self._lock:
            self._set(name, slot, gpa, size, hva, flags)

    def _set(self, name: str, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        old = self._slots.get(slot)
        if size == 0:
            if old is None:
                raise ioctl_error(name, errno.EINVAL, f"slot {slot} doesn't exist")
            self._vm.set_memory_region(slot, 0, 0, 0, 0)
            del self._slots[slot]
            self._dirty.pop(slot, None)
            return
        if old:
            _, old_size, old_hva, old_flags = old
            if (old_size, old_hva) != (size, hva) or (flags ^ old_flags) & c.KVM_MEM_READONLY:
                raise ioctl_error(name, errno.EINVAL, "a slot may be moved or re-flagged, not resized")
        for other, (other_gpa, other_size, _, _) in self._slots.items():
            same_space = other >> _SPACE_SHIFT == slot >> _SPACE_SHIFT
            if other != slot and same_space and gpa < other_gpa + other_size and other_gpa < gpa + size:
                raise ioctl_error(name, errno.EEXIST, f"slot {other} is there")
        self._vm.set_memory_region(slot, flags, gpa, size, hva)
        self._slots[slot] = (gpa, size, hva, flags)
        if not flags & c.KVM_MEM_LOG_DIRTY_PAGES:
            self._dirty.pop(slot, None)
        elif slot not in self._dirty:
            self._dirty[slot] = (1 << size // _PAGE) - 1 if self._protect & _ALL_SET else 0

    def all(self) -> list[MemorySlot]:
        """Those that there are."""
        with self._lock:
            return [MemorySlot(slot, *values) for slot, values in self._slots.items()]

    def enable_manual_protect(self, options: int) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. KVM_DIRTY_LOG_INITIALLY_SET goes with KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE alone."""
        if options & ~(MANUAL_PROTECT if options & _MANUAL else _MANUAL):
            raise ioctl_error("KVM_ENABLE_CAP", errno.EINVAL, f"options {options:#x}")
        self._protect = options

    def enable_rings(self, size_bytes: int, have_vcpus: bool) -> None:
        """KVM_CAP_DIRTY_LOG_RING: vCPUs to come have dirty rings. It looks at 32 bits of the size."""
        size_bytes &= 0xFFFFFFFF
        if size_bytes.bit_count() != 1 or size_bytes < _PAGE:
            raise ioctl_error(
                "KVM_ENABLE_CAP", errno.EINVAL, f"{size_bytes} bytes: a power of two from {_PAGE}"
            )
        if size_bytes > MAX_RING_BYTES:
            raise ioctl_error("KVM_ENABLE_CAP", errno.E2BIG, f"{size_bytes} bytes: at most {MAX_RING_BYTES}")
        if self.ring_size_bytes or have_vcpus:
            raise ioctl_error("KVM_ENABLE_CAP", errno.EINVAL, "there are dirty rings or vCPUs already")
        self._vm.set_dirty_ring(size_bytes)
        self.ring_size_bytes = size_bytes

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG."""
        with self._lock:
            self._without_rings("KVM_GET_DIRTY_LOG")
            pages = self._logged("KVM_GET_DIRTY_LOG", slot)
            dirty = self._collect(slot)
            if not self._protect & _MANUAL:
                self._dirty[slot] = 0
            return dirty.to_bytes((pages + 63) // 64 * 8, "little")

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG: parts are whole 64-bit words, but for the slot's last."""
        name = "KVM_CLEAR_DIRTY_LOG"
        with self._lock:
            self._without_rings(name)
            if first_page % 64:
                raise ioctl_error(name, errno.EINVAL, f"first_page {first_page} is no multiple of 64")
            left = self._logged(name, slot) - first_page
            if not 0 <= num_pages <= left or (num_pages < left and num_pages % 64):
                raise ioctl_error(name, errno.EINVAL, f"num_pages {num_pages} of {left}")
            if len(dirty_bitmap) * 8 < num_pages:
                raise ioctl_error(name, errno.EINVAL, f"{len(dirty_bitmap)} bytes hold no {num_pages} pages")
            named = int.from_bytes(dirty_bitmap, "little") & (1 << num_pages) - 1
            self._dirty[slot] = self._collect(slot) & ~(named << first_page)

    def _without_rings(self, name: str) -> None:
        if self.ring_size_bytes:
            raise ioctl_error(name, errno.ENXIO, "this VM logs by dirty rings")

    def _logged(self, name: str, slot: int) -> int:
        """Pages of a slot that is logged."""
        if not _exists(slot):
            raise ioctl_error(name, errno.EINVAL, f"slot {slot}")
        if slot not in self._dirty:
            raise ioctl_error(name, errno.ENOENT, f"slot {slot} isn't logged (KVM_MEM_LOG_DIRTY_PAGES)")
        return self._slots[slot][1] // _PAGE

    def _collect(self, slot: int) -> int:
        self._dirty[slot] |= int.from_bytes(self._vm.get_dirty_log(slot), "little")
        return self._dirty[slot]

    def pre_fault(self, gpa: int, size: int, flags: int, space: int) -> int:
        """KVM_PRE_FAULT_MEMORY in an address space: what is left to do, 0 unless memory ends inside the range."""
        name = "KVM_PRE_FAULT_MEMORY"
        if flags or (gpa | size) & _PAGE - 1 or size <= 0 or gpa + size > 1 << 64:
            raise ioctl_error(name, errno.EINVAL, "whole pages, and no flags")
        done = 0
        while done < size:
            with self._lock:
                slots = [values for slot, values in self._slots.items() if slot >> _SPACE_SHIFT == space]
            found = next((s for s in slots if 0 <= gpa + done - s[0] < s[1]), None)
            if found is None:
                if done:
                    break
                raise ioctl_error(name, errno.ENOENT, f"no memory at {gpa:#x}")
            start, length, hva, _ = found
            offset = gpa + done - start
            n = min(size - done, length - offset)
            if _libc.madvise(ctypes.c_void_p(hva + offset), ctypes.c_size_t(n), _MADV_POPULATE_WRITE):
                raise ioctl_error(name, ctypes.get_errno())
            done += n
        return size - done


def _exists(slot: int) -> bool:
    """Whether there can be a slot of that number."""
    return slot & (1 << _SPACE_SHIFT) - 1 < MAX_SLOTS and 0 <= slot >> _SPACE_SHIFT < ADDRESS_SPACES


assert mmap.PAGESIZE == _PAGE  # of x86, the only host of this engine
