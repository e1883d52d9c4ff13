"""Guest memory: host memory that a VM's slots point at, and access to it by guest physical address.

`GuestMemory` is one block of host memory; `MemoryMap` says where in the guest's physical address space blocks lie. Whatever
address came from the guest goes through `MemoryMap`, which checks it. Host code that changes guest memory uses `write`, or
says so afterwards with `written`: a software engine has translated the guest's code and must hear of it.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from kvmkit.kvm.contract import Vm

PAGE_SIZE = 4096

_libc = ctypes.CDLL(None)

WriteHook = Callable[[int, int], None]
"""Called with guest physical address and length in bytes after host code wrote guest memory."""


class GuestAddressError(ValueError):
    """An address range that guest memory doesn't hold."""


@dataclass(frozen=True)
class MemorySlot:
    """What KVM_SET_USER_MEMORY_REGION has made: a range of guest physical addresses, and the host's memory that is there."""

    slot: int
    gpa: int
    """Its first guest physical address."""
    size_bytes: int
    hva: int
    """Where its first byte lies in this process."""
    flags: int
    """KVM_MEM_*."""


class GuestMemory:
    """A block of host memory for a guest: a shared memfd, so that another process can map the same pages.

    `address` is where it lies in this process (``userspace_addr`` of a slot), `fd` its memfd. A child of fork doesn't get it.
    """

    def __init__(self, size_bytes: int, name: str = "guest-memory") -> None:
        """Allocate `size_bytes`, a multiple of 4096; pages are allocated by the host as they are touched."""
        if size_bytes <= 0 or size_bytes % PAGE_SIZE:
            raise ValueError(
                f"guest memory of {size_bytes} bytes: the size must be a positive multiple of {PAGE_SIZE}"
            )
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size_bytes)
            # Nobody who is handed the memfd may shrink it under us: that would be a SIGBUS.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._mmap = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED)
        except BaseException:
            os.close(self.fd)
            raise
        self._mmap.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        self.view = memoryview(self._mmap)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Read `size_bytes` bytes at `offset`; `GuestAddressError` outside."""
        self._check(offset, size_bytes)
        return self._mmap[offset : offset + size_bytes]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `offset`; `GuestAddressError` outside. Tells nobody: see `MemoryMap.write`."""
        self._check(offset, len(data))
        self.view[offset : offset + len(data)] = data

    def unmap_page(self, offset: int) -> None:
        """Have this process's mapping of the page at `offset` forgotten, and with it a VM's; its contents stay as they are."""
        self._check(offset, PAGE_SIZE)
        # On shared memory it drops the page table's entry alone, until the next access.
        self._mmap.madvise(mmap.MADV_DONTNEED, offset, PAGE_SIZE)

    def _check(self, offset: int, size_bytes: int) -> None:
        if not (0 <= offset and 0 <= size_bytes <= self.size_bytes - offset):
            raise GuestAddressError(
                f"{size_bytes} bytes at {offset:#x} lie outside a block of {self.size_bytes:#x} bytes"
            )

    def close(self) -> None:
        """Unmap and release the memory. No vCPU may run on it any more."""
        if self.fd < 0:
            return
        self.view.release()
        self._mmap.close()
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class MemoryMap:
    """Where blocks of memory lie in a guest's physical address space.

    Ranges may run across blocks that adjoin. Every access is checked; one that leaves memory raises `GuestAddressError`.
    """

    def __init__(self) -> None:
        """Start with no memory at all."""
        self._starts: list[int] = []
        self._blocks: list[GuestMemory] = []
        self._hooks: list[WriteHook] = []

    def add(self, gpa: int, memory: GuestMemory) -> None:
        """Put `memory` at guest physical address `gpa` (a multiple of 4096); `ValueError` if it overlaps another block."""
        if gpa < 0 or gpa % PAGE_SIZE:
            raise ValueError(f"memory at {gpa:#x}: the address must be a multiple of {PAGE_SIZE}")
        i = bisect_right(self._starts, gpa)
        before_end = self._starts[i - 1] + self._blocks[i - 1].size_bytes if i else 0
        if before_end > gpa or (i < len(self._starts) and gpa + memory.size_bytes > self._starts[i]):
            raise ValueError(f"memory at {gpa:#x}..{gpa + memory.size_bytes:#x} overlaps another block")
        self._starts.insert(i, gpa)
        self._blocks.insert(i, memory)

    @property
    def blocks(self) -> list[tuple[int, GuestMemory]]:
        """Guest physical address and block, in order."""
        return list(zip(self._starts, self._blocks, strict=True))

    def attach(self, vm: "Vm", first_slot: int = 0) -> None:
        """Give `vm` one slot for each block, numbered from `first_slot`, and tell it of every write from now on."""
        for i, (gpa, memory) in enumerate(self.blocks):
            vm.set_user_memory_region(first_slot + i, gpa, memory.size_bytes, memory.address)
        self.on_write(vm.memory_written)

    def detach(self, vm: "Vm") -> None:
        """Tell `vm` of no more writes. Its slots stay: none of its vCPUs may run any more."""
        self._hooks.remove(vm.memory_written)

    def on_write(self, hook: WriteHook) -> None:
        """Call `hook(gpa, size_bytes)` after each write that host code makes."""
        self._hooks.append(hook)

    def find(self, gpa: int, size_bytes: int) -> tuple[GuestMemory, int]:
        """Return the block and the offset in it that hold the whole range; `GuestAddressError` if no one block does."""
        i = bisect_right(self._starts, gpa) - 1
        if i >= 0:
            memory, offset = self._blocks[i], gpa - self._starts[i]
            if offset < memory.size_bytes and 0 <= size_bytes <= memory.size_bytes - offset:
                return memory, offset
        raise GuestAddressError(f"{size_bytes} bytes at guest physical {gpa:#x} lie outside guest memory")

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Read `size_bytes` bytes at `gpa`."""
        return b"".join(memory.read(offset, n) for memory, offset, n in self._pieces(gpa, size_bytes))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa` and tell the hooks. Nothing is written if part of the range is outside."""
        data = memoryview(data).cast("B")
        done = 0
        for memory, offset, n in self._pieces(gpa, len(data)):
            memory.write(offset, data[done : done + n])
            done += n
        self.written(gpa, done)

    def written(self, gpa: int, size_bytes: int) -> None:
        """Tell the hooks of a write that was made by other means, e.g. read(2) into the block's address."""
        for hook in self._hooks:
            hook(gpa, size_bytes)

    def host_address(self, gpa: int, size_bytes: int) -> int:
        """Return where in this process the whole range lies. Whoever writes there calls `written`."""
        memory, offset = self.find(gpa, size_bytes)
        return memory.address + offset

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        """Return the range itself, read-only; it must lie in one block."""
        memory, offset = self.find(gpa, size_bytes)
        return memory.view[offset : offset + size_bytes].toreadonly()

    def writable_view(self, gpa: int, size_bytes: int) -> memoryview:
        """Return the range itself, in one block, for e.g. `readinto`. Whoever writes there calls `written`."""
        memory, offset = self.find(gpa, size_bytes)
        return memory.view[offset : offset + size_bytes]

    def _pieces(self, gpa: int, size_bytes: int) -> list[tuple[GuestMemory, int, int]]:
        pieces = []
        if size_bytes < 0:
            raise GuestAddressError(f"{size_bytes} bytes at guest physical {gpa:#x}: a negative length")
        while size_bytes:
            memory, offset = self.find(gpa, 1)
            n = min(size_bytes, memory.size_bytes - offset)
            pieces.append((memory, offset, n))
            gpa += n
            size_bytes -= n
        return pieces

    def close(self) -> None:
        """Release all blocks. No vCPU may run on them any more."""
        for memory in self._blocks:
            memory.close()
        self._starts.clear()
        self._blocks.clear()


# This process's memory at addresses that somebody else has named: where nothing is mapped, an error instead of a SIGSEGV.


class _iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("len", ctypes.c_size_t))


def load_bytes(address: int, size_bytes: int) -> bytes:
    """Read it by process_vm_readv(2). EFAULT: not all of it is mapped."""
    data = ctypes.create_string_buffer(size_bytes)
    _copy(_libc.process_vm_readv, data, address)
    return data.raw


def store_bytes(address: int, data: bytes) -> None:
    """Write it by process_vm_writev(2). EFAULT: not all of it is mapped, or may be written."""
    _copy(_libc.process_vm_writev, ctypes.create_string_buffer(data, len(data)), address)


def _copy(call: Callable[..., int], data: ctypes.Array[ctypes.c_char], address: int) -> None:
    here, there = _iovec(ctypes.addressof(data), len(data)), _iovec(address, len(data))
    if call(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != len(data):
        raise OSError(errno.EFAULT, f"nothing is mapped at {address:#x}")
