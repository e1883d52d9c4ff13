"""An image that holds a disk's bytes as they are: a regular file or a block device of the host."""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from kvmkit.devices.block.backend import SECTOR_BYTES, Buffers, ImageError, cut

# <linux/falloc.h>
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE, _FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10

_ZEROS = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# The bytes of an image that QEMU locks (block/file-posix.c): one says that the holder writes, one that nobody else may.
_WRITES, _NO_OTHER_WRITER = 101, 201


class RawFile:
    """A raw image, locked against other VMs: many may read it, or one may write it. QEMU keeps to the same locks.

    Discarded ranges become holes. Where the file system has none, discarding does nothing and zeros are written out.
    """

    def __init__(self, path: str | Path, read_only: bool) -> None:
        """Open an image. `ImageError` if it is in use or can't be a disk, `OSError` if it can't be opened."""
        # O_NONBLOCK: a FIFO shall be refused, not waited for.
        flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
        self._take(os.open(path, flags), str(path), read_only)

    @classmethod
    def of_descriptor(cls, fd: int, name: str) -> "RawFile":
        """Take over an open descriptor, for reading and writing; `name` is for messages."""
        self = cls.__new__(cls)
        self._take(fd, name, read_only=False)
        return self

    def _take(self, fd: int, name: str, read_only: bool) -> None:
        self.name = name
        self.read_only = read_only
        self._fd = fd
        self._lost: OSError | None = None
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise ImageError(f"{name} is neither a file nor a block device")
            self.size_bytes = os.lseek(fd, 0, os.SEEK_END)
            if self.size_bytes <= 0 or self.size_bytes % SECTOR_BYTES:
                raise ImageError(
                    f"{name} has {self.size_bytes} bytes: a disk has a multiple of {SECTOR_BYTES}, and more than none"
                )
            _lock(fd, name, read_only)
        except BaseException:
            self.close()
            raise

    def stat(self) -> os.stat_result:
        """Return what the host's file system knows of the image."""
        return os.fstat(self._fd)

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> None:
        """Fill all buffers from `offset` on."""
        size_bytes = sum(map(len, buffers))
        done = os.preadv(self._fd, buffers, offset)
        while done < size_bytes:
            n = os.preadv(self._fd, cut(buffers, done, size_bytes), offset + done)
            if n == 0:
                raise OSError(
                    errno.EIO, f"ends at {offset + done}, was {self.size_bytes} bytes long", self.name
                )
            done += n

    def writev(self, buffers: Buffers, offset: int) -> None:
        """Write all buffers from `offset` on."""
        size_bytes = sum(map(len, buffers))
        done = os.pwritev(self._fd, buffers, offset)
        while done < size_bytes:
            done += os.pwritev(self._fd, cut(buffers, done, size_bytes), offset + done)

    def flush(self) -> None:
        """Call fdatasync(2). Once it has failed it always fails: the kernel forgets the pages that it couldn't write."""
        if self._lost is not None:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost = error
            raise

    def discard(self, offset: int, size_bytes: int) -> None:
        """Punch a hole, if the file system can."""
        self._fallocate(_FALLOC_FL_PUNCH_HOLE, offset, size_bytes)

    def write_zeroes(self, offset: int, size_bytes: int, unmap: bool) -> None:
        """Punch a hole or zero the range, by writing if need be."""
        if unmap and self._fallocate(_FALLOC_FL_PUNCH_HOLE, offset, size_bytes):
            return
        if self._fallocate(_FALLOC_FL_ZERO_RANGE, offset, size_bytes):
            return
        end = offset + size_bytes
        for at in range(offset, end, len(_ZEROS)):
            self.writev([memoryview(_ZEROS)[: end - at]], at)

    def _fallocate(self, mode: int, offset: int, size_bytes: int) -> bool:
        """Return False where the file system has no such thing."""
        while _libc.fallocate(self._fd, mode | _FALLOC_FL_KEEP_SIZE, offset, size_bytes):
            error = ctypes.get_errno()
            if error == errno.EOPNOTSUPP:
                return False
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error), self.name)
        return True

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock(fd: int, name: str, read_only: bool) -> None:
    """Lock as QEMU does (block/file-posix.c), with locks of the open file: they end when the last descriptor closes."""
    try:
        if read_only:
            _lock_byte(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, _NO_OTHER_WRITER)
            held = _lock_byte(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _WRITES)
            if held != fcntl.F_UNLCK:
                raise BlockingIOError
        else:
            _lock_byte(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _WRITES)
            _lock_byte(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _NO_OTHER_WRITER)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says fcntl(2)
        what = "written" if read_only else "used"
        raise ImageError(
            f"{name} is being {what} by another VM: stop that one, or give each VM an overlay of its own"
        ) from None


def _lock_byte(fd: int, command: int, kind: int, at: int) -> int:
    """Carry out an fcntl(2) on one byte; return the type in the answer."""
    answer = fcntl.fcntl(fd, command, struct.pack("hh4xqqi4x", kind, os.SEEK_SET, at, 1, 0))
    assert isinstance(answer, bytes)
    return int(struct.unpack_from("h", answer)[0])
