"""Memory slots, their dirty log, and memory attributes (``virt/kvm/kvm_main.c``).

The engine sets a bit for each page of a logged slot that the guest writes, and gives and clears them at once. That is
KVM_GET_DIRTY_LOG. With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 the bits are collected here until KVM_CLEAR_DIRTY_LOG names them.
With dirty rings, which hold the pages instead, there are no bits for user space (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP isn't x86's).
"""

import ctypes
import errno
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvmkit import _engine
from kvmkit.kvm.memory import MemorySlot
from kvmkit.kvm.soft.guest_memfd import Binding, GuestMemfds
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


@dataclass(frozen=True)
class _Slot:
    """A slot."""

    gpa: int
    size: int
    hva: int
    flags: int
    binding: Binding | None


class MemSlots:
    """A VM's slots, and which of its memory is private. Any thread."""

    def __init__(self, vm: _engine.Vm, protected: bool) -> None:
        """Start with none; `protected`: there may be private memory (KVM_X86_SW_PROTECTED_VM)."""
        self._vm = vm
        self.protected = protected
        self.address_spaces = 1 if protected else ADDRESS_SPACES
        self.attributes = c.KVM_MEMORY_ATTRIBUTE_PRIVATE if protected else 0
        """Those that there are."""
        # Private memory isn't user space's to begin with.
        flags = c.GUEST_MEMFD_FLAG_MMAP | (0 if protected else c.GUEST_MEMFD_FLAG_INIT_SHARED)
        self.guest_memfds = GuestMemfds(flags)
        self.guest_memfd_flags = flags
        self._slots: dict[int, _Slot] = {}
        self._private: list[tuple[int, int]] = []
        """First address of each private range, and the one behind it; in order, none touches another."""
        self._lock = threading.Lock()
        self._protect = 0  # KVM_DIRTY_LOG_*
        self._dirty: dict[int, int] = {}
        """Slot → bitmap of pages that KVM_CLEAR_DIRTY_LOG has not cleared."""
        self.ring_size_bytes = 0

    def set_region(
        self,
        name: str,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int,
        guest_memfd: tuple[int, int] | None = None,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; errors bear `name`. `guest_memfd`: descriptor and offset, None for the older ioctl."""
        known = _FLAGS
        if guest_memfd is not None and flags & c.KVM_MEM_GUEST_MEMFD:
            known = c.KVM_MEM_GUEST_MEMFD  # which can't be read-only, nor logged
            if guest_memfd[1] & _PAGE - 1 or guest_memfd[1] + size > 1 << 64:
                raise ioctl_error(name, errno.EINVAL, f"guest_memfd_offset {guest_memfd[1]:#x}")
        else:
            guest_memfd = None
        if flags & ~known or not self._exists(slot):
            raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x} or slot {slot} unknown")
        if (gpa | size | hva) & _PAGE - 1:
            raise ioctl_error(name, errno.EINVAL, "addresses and size must be multiples of 4096")
        if gpa + size > 1 << 64 or (size and gpa + size > _MAX_PHYSICAL) or hva + size >= _MAX_USER:
            raise ioctl_error(name, errno.EINVAL, "beyond the end of the address space")
        with self._lock:
            self._set(name, slot, _Slot(gpa, size, hva, flags, None), guest_memfd)

    def _set(self, name: str, slot: int, new: _Slot, guest_memfd: tuple[int, int] | None) -> None:
        old = self._slots.get(slot)
        if new.size == 0:
            if old is None:
                raise ioctl_error(name, errno.EINVAL, f"slot {slot} doesn't exist")
            del self._slots[slot]
            self._apply(slot, new)
            if old.binding is not None:
                old.binding.close()
            self._dirty.pop(slot, None)
            return
        if old:
            if (old.size, old.hva) != (new.size, new.hva) or (new.flags ^ old.flags) & c.KVM_MEM_READONLY:
                raise ioctl_error(name, errno.EINVAL, "a slot may be moved or re-flagged, not resized")
            if (new.flags | old.flags) & c.KVM_MEM_GUEST_MEMFD:
                raise ioctl_error(name, errno.EINVAL, "a slot with a guest_memfd can only be deleted")
        for number, other in self._slots.items():
            same_space = number >> _SPACE_SHIFT == slot >> _SPACE_SHIFT
            apart = new.gpa >= other.gpa + other.size or other.gpa >= new.gpa + new.size
            if number != slot and same_space and not apart:
                raise ioctl_error(name, errno.EEXIST, f"slot {number} is there")
        if guest_memfd is not None:
            new = replace(new, binding=self.guest_memfds.bind(*guest_memfd, new.size))
        self._slots[slot] = new
        self._apply(slot, new)
        if not new.flags & c.KVM_MEM_LOG_DIRTY_PAGES:
            self._dirty.pop(slot, None)
        elif slot not in self._dirty:
            self._dirty[slot] = (1 << new.size // _PAGE) - 1 if self._protect & _ALL_SET else 0

    def _apply(self, number: int, slot: _Slot) -> None:
        """Tell the engine of a slot that has changed; of size 0, that there is none."""
        if self.protected:
            self._apply_all((number, slot.size if slot.flags & c.KVM_MEM_LOG_DIRTY_PAGES else 0))
            return
        hva = slot.hva if slot.binding is None or not slot.binding.only else slot.binding.address
        self._vm.set_memory_region(number, slot.flags & _FLAGS, slot.gpa, slot.size, hva)

    def _apply_all(self, changed: tuple[int, int] | None) -> None:
        """Tell the engine of all slots; of the one that has changed, also how many bytes are logged."""
        parts = [
            (number, part.flags & _FLAGS, part.gpa, part.size_bytes, part.hva, (part.gpa - slot.gpa) // _PAGE)
            for number, slot in self._slots.items()
            for part in self._parts(number, slot)
        ]
        self._vm.set_private_memory(changed, parts, [(start, end - 1) for start, end in self._private])

    def _parts(self, number: int, slot: _Slot) -> Iterator[MemorySlot]:
        """A slot's memory, in parts that are shared or private; without those private ones that it has no memory for."""

        def part(start: int, end: int, hva: int) -> MemorySlot:
            return MemorySlot(number, start, end - start, hva + start - slot.gpa, slot.flags)

        at, end = slot.gpa, slot.gpa + slot.size
        if slot.binding is not None and slot.binding.only:
            yield part(at, end, slot.binding.address)
            return
        for first, behind in self._private:
            start, stop = max(first, slot.gpa), min(behind, end)
            if start < stop:
                if at < start:
                    yield part(at, start, slot.hva)
                if slot.binding is not None:
                    yield part(start, stop, slot.binding.address)
                at = stop
        if at < end:
            yield part(at, end, slot.hva)

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        name = "KVM_SET_MEMORY_ATTRIBUTES"
        if flags or attributes & ~self.attributes:
            raise ioctl_error(name, errno.EINVAL, f"attributes {attributes:#x} of {self.attributes:#x}")
        if size == 0 or gpa + size > 1 << 64 or (gpa | size) & _PAGE - 1:
            raise ioctl_error(name, errno.EINVAL, "whole pages, one at least")
        if not self.protected:
            return  # nothing is private, and stays so
        end = gpa + size
        with self._lock:
            ranges = [(start, min(stop, gpa)) for start, stop in self._private if start < gpa]
            ranges += [(max(start, end), stop) for start, stop in self._private if stop > end]
            if attributes:
                ranges.append((gpa, end))
            self._private = []
            for start, stop in sorted(ranges):
                if self._private and self._private[-1][1] == start:
                    start, _ = self._private.pop()
                self._private.append((start, stop))
            self._apply_all(None)

    def all(self) -> list[MemorySlot]:
        """Those that there are, and where their memory is: in parts, if some of it is private."""
        with self._lock:
            return [part for number, slot in self._slots.items() for part in self._parts(number, slot)]

    def close(self) -> None:
        """Let go of the memory that is the VM's own, once nobody uses it."""
        self.guest_memfds.close()

    def _exists(self, slot: int) -> bool:
        """Whether there can be a slot of that number."""
        space, number = divmod(slot, 1 << _SPACE_SHIFT)
        return number < MAX_SLOTS and 0 <= space < self.address_spaces

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
        if not self._exists(slot):
            raise ioctl_error(name, errno.EINVAL, f"slot {slot}")
        if slot not in self._dirty:
            raise ioctl_error(name, errno.ENOENT, f"slot {slot} isn't logged (KVM_MEM_LOG_DIRTY_PAGES)")
        return self._slots[slot].size // _PAGE

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
            at = gpa + done
            with self._lock:
                slots = [(n, slot) for n, slot in self._slots.items() if n >> _SPACE_SHIFT == space]
                parts = (part for n, slot in slots for part in self._parts(n, slot))
                found = next((part for part in parts if 0 <= at - part.gpa < part.size_bytes), None)
                private = any(start <= at < stop for start, stop in self._private)
            if found is None:
                if done:
                    break
                raise ioctl_error(
                    name,
                    errno.EFAULT if private else errno.ENOENT,
                    f"no{' private' * private} memory at {at:#x}",
                )
            offset = at - found.gpa
            n = min(size - done, found.size_bytes - offset)
            if _libc.madvise(ctypes.c_void_p(found.hva + offset), ctypes.c_size_t(n), _MADV_POPULATE_WRITE):
                raise ioctl_error(name, ctypes.get_errno())
            done += n
        return size - done


assert mmap.PAGESIZE == _PAGE  # of x86, the only host of this engine
