"""Files that go into guest memory: kernels and initial RAM disks."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Self

from kvmkit.kvm import MemoryMap
from kvmkit.machine.errors import KernelError


class KernelFile:
    """A file of a user's, open. It is read out of order and its size is needed, so nothing but a regular file will do."""

    def __init__(self, path: str | Path) -> None:
        """Open `path`; `KernelError` if it is no regular file."""
        self.name = str(path)
        # Opening a FIFO would else wait for whoever writes it.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise KernelError(
                f"{path}: no regular file (a directory, pipe or device): give a file, or copy it to one"
            )
        self.size_bytes = status.st_size

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return `size_bytes` at `offset`, or what is there of them."""
        return os.pread(self._fd, size_bytes, offset)

    def load(self, memory: MemoryMap, gpa: int, offset: int, size_bytes: int) -> None:
        """Read into guest memory, which the caller has checked to be there."""
        block, at = memory.find(gpa, size_bytes)
        os.lseek(block.fd, at, os.SEEK_SET)
        end = offset + size_bytes
        while (
            offset < end
        ):  # from file to memfd: reading into our mapping would take its page faults in addition
            n = os.sendfile(block.fd, self._fd, offset, end - offset)
            if n == 0:
                raise KernelError(f"{self.name}: ends at byte {offset}, sooner than it did a moment ago")
            offset += n
        memory.written(gpa, size_bytes)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        os.close(self._fd)


def load_initrd(
    memory: MemoryMap, initrd: bytes | str | Path, place: Callable[[str, int], int]
) -> tuple[int, int]:
    """Load an initrd, its bytes or a path, where `place(name, size_bytes)` says; return address and size in bytes."""
    if isinstance(initrd, bytes):
        address = place("the initramfs", len(initrd))
        memory.write(address, initrd)
        return address, len(initrd)
    with KernelFile(initrd) as file:
        address = place(file.name, file.size_bytes)
        file.load(memory, address, 0, file.size_bytes)
        return address, file.size_bytes
