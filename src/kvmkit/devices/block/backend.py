"""The contract of what is behind a block device."""

from collections.abc import Sequence
from typing import Protocol

SECTOR_BYTES = 512

Buffers = Sequence[memoryview | bytes | bytearray]


class ImageError(ValueError):
    """An image that can't be used: damaged, in use, of a wrong size, or not what it was."""


class Backend(Protocol):
    """Bytes from 0 to `size_bytes`, a multiple of 512.

    Callers keep within them. Every method may be called from any thread, several at once; each raises `OSError` when
    the host fails, and then nothing is known of the range that it was to change.
    """

    size_bytes: int
    read_only: bool

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> None:
        """Fill all buffers, one after the other, from `offset` on."""

    def writev(self, buffers: Buffers, offset: int) -> None:
        """Write all buffers, one after the other, from `offset` on. On the disk after the next `flush`."""

    def flush(self) -> None:
        """Return when all writes that have returned before are on the disk."""

    def discard(self, offset: int, size_bytes: int) -> None:
        """Give the range's space back to the host where that is possible. What it holds afterwards is undefined."""

    def write_zeroes(self, offset: int, size_bytes: int, unmap: bool) -> None:
        """Fill a range with zeros; with `unmap`, its space may be given back."""

    def close(self) -> None:
        """Release everything. Doesn't flush."""


def cut(buffers: Buffers, start: int, end: int) -> list[memoryview]:
    """Return views of the bytes from `start` to `end` of buffers that are seen as one."""
    views, at = [], 0
    for buffer in buffers:
        first, last = max(start - at, 0), min(end - at, len(buffer))
        if first < last:
            views.append(memoryview(buffer)[first:last])
        at += len(buffer)
    return views
