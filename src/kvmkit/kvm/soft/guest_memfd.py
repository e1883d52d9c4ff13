"""guest_memfd: guest memory behind a descriptor (``virt/kvm/guest_memfd.c``).

A memfd of which the engine has its own mappings. User space gets a descriptor that can be neither read nor mapped, unless the
memory was made to be shared with it (GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED); holes can be punched in any case.
"""

import ctypes
import errno
import fcntl
import mmap
import os

from kvmkit.uapi import common as c
from kvmkit.uapi.errors import ioctl_error

_CREATE, _BIND = "KVM_CREATE_GUEST_MEMFD", "KVM_SET_USER_MEMORY_REGION2"
_SHARED = c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED


class Binding:
    """The part of a guest_memfd that a slot has, mapped while it lives."""

    def __init__(self, memfd: "GuestMemfd", offset: int, size: int) -> None:
        """Map it."""
        self.memfd, self.offset, self.size = memfd, offset, size
        self._map = mmap.mmap(memfd.fd, size, mmap.MAP_SHARED, offset=offset)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        memfd.bindings.append(self)

    @property
    def only(self) -> bool:
        """Whether it is all the memory of its slot, shared or private: user space can map it (KVM_MEMSLOT_GMEM_ONLY)."""
        return bool(self.memfd.flags & c.GUEST_MEMFD_FLAG_MMAP)

    def close(self) -> None:
        """Give it back, once nothing uses the mapping."""
        self.memfd.bindings.remove(self)
        self._map.close()


class GuestMemfd:
    """What KVM_CREATE_GUEST_MEMFD has made."""

    def __init__(self, size: int, flags: int) -> None:
        """Make `size` bytes of zeroes."""
        self.size, self.flags = size, flags
        self.bindings: list[Binding] = []
        self.fd = os.memfd_create("kvm-gmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.identity = _identity(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    def descriptor(self) -> int:
        """A new descriptor, user space's. One for writing alone can't be mapped, and fallocate takes it."""
        if self.flags & _SHARED == _SHARED:
            return os.dup(self.fd)
        return os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)


class GuestMemfds:
    """A VM's."""

    def __init__(self, flags: int) -> None:
        """`flags`: those that may be asked for."""
        self._flags = flags
        self._memfds: dict[tuple[int, int], GuestMemfd] = {}

    def create(self, size: int, flags: int) -> int:
        """KVM_CREATE_GUEST_MEMFD."""
        if flags & ~self._flags:
            raise ioctl_error(_CREATE, errno.EINVAL, f"flags {flags:#x} of {self._flags:#x}")
        if not 0 < size < 1 << 63 or size % mmap.PAGESIZE:
            raise ioctl_error(_CREATE, errno.EINVAL, f"{size} bytes: whole pages, one at least")
        try:
            memfd = GuestMemfd(size, flags)
            self._memfds[memfd.identity] = memfd
            return memfd.descriptor()
        except OSError as error:
            raise ioctl_error(_CREATE, error.errno or errno.ENOMEM) from error

    def bind(self, fd: int, offset: int, size: int) -> Binding:
        """Have `size` bytes from `offset`, for a slot; no two slots have the same ones."""
        try:
            memfd = self._memfds.get(_identity(fd))
        except OSError as error:
            raise ioctl_error(_BIND, errno.EBADF, f"descriptor {fd} isn't open") from error
        if memfd is None:
            raise ioctl_error(_BIND, errno.EINVAL, f"descriptor {fd} is no guest_memfd of this VM")
        if offset + size > memfd.size:
            raise ioctl_error(_BIND, errno.EINVAL, f"the guest_memfd has {memfd.size} bytes")
        if any(offset < b.offset + b.size and b.offset < offset + size for b in memfd.bindings):
            raise ioctl_error(_BIND, errno.EINVAL, "another slot has a part of that")
        try:
            return Binding(memfd, offset, size)
        except OSError as error:
            raise ioctl_error(_BIND, error.errno or errno.ENOMEM) from error

    def close(self) -> None:
        """Let go of all. Descriptors of user space's stay open."""
        for memfd in self._memfds.values():
            for binding in list(memfd.bindings):
                binding.close()
            os.close(memfd.fd)
        self._memfds.clear()


def _identity(fd: int) -> tuple[int, int]:
    """What says which file a descriptor is of."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
