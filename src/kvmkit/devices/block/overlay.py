"""What a guest changed on a disk, in a file beside the read-only image that it started from.

The file, all numbers little-endian:

============== =====================================================================================================
at             what
============== =====================================================================================================
0              the header, `_HEADER` and the base's path, zeros to byte 4092, CRC-32 (IEEE) of all that
4096           the map: one byte for each cluster of 4 KiB, 0 if it is read from the base, 1 if from here; whole pages
next MiB       the clusters, each at its own place: byte N of the disk is at N bytes from here
============== =====================================================================================================

The file is sparse: map pages and clusters that nobody wrote take no space. A cluster in the map that is a hole reads as zeros;
that is also what discarding leaves, so that it doesn't bring the base's old data back to light.

What a crash leaves. The map on the disk names a cluster only after its data got there: writes go to the clusters at once and
to the map in memory; `flush` syncs the clusters, then writes the map's changed pages, then syncs again. If the host dies in
between, the map lacks clusters that no flush has acknowledged, and their data is forgotten. Entries of the map only ever turn
from 0 to 1, so a page of it that got to the disk half holds nothing that is wrong. Of a cluster that was in the map before, a
crash leaves old or new data, as on any disk with a cache.

Clusters are as small as file systems' blocks: then a guest hardly ever writes a part of one, which costs reading the rest from
the base. The map is bytes, not bits, because runs in bytes are found by `find`; it is 1/4096 of what was written.
"""

import mmap
import os
import stat
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvmkit.devices.block.backend import Backend, Buffers, ImageError, cut
from kvmkit.devices.block.raw import RawFile

CLUSTER_BYTES = 4096

_MAGIC = b"kvmkitOV"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQqH")
"""Magic, version, cluster size, the base's size and time of last change (ns; 0 for a block device), length of its path."""
_HEADER_BYTES = 4096
_DATA_ALIGN = 1 << 20
_PAGE = mmap.PAGESIZE
_BASE, _HERE = b"\0", b"\1"


class Overlay:
    """A disk that reads from its base what hasn't been written to the overlay."""

    read_only = False

    def __init__(self, path: str | Path) -> None:
        """Open an overlay that `create` has made, and its base. `ImageError` says what is wrong with either."""
        file = RawFile(path, read_only=False)
        try:
            base = _open_base(file)
        except BaseException:
            file.close()
            raise
        self._join(file, base)
        self._load_map()

    @classmethod
    def create(cls, path: str | Path, base: str | Path) -> "Overlay":
        """Make a new overlay file (`FileExistsError` if there is one) over `base`, a raw image that must not change any more."""
        base_file = RawFile(base, read_only=True)
        try:
            header = _header(base_file, os.path.abspath(base))
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(fd, _file_bytes(base_file.size_bytes))
                file = RawFile.of_descriptor(os.dup(fd), str(path))
                file.writev([header], 0)
                os.fsync(fd)
                _sync_directory(Path(path).absolute().parent)
            except BaseException:
                os.unlink(path)
                raise
            finally:
                os.close(fd)
        except BaseException:
            base_file.close()
            raise
        return cls._joined(file, base_file)

    @classmethod
    def at(cls, path: str | Path, base: str | Path) -> "Overlay":
        """Open the overlay at `path` over `base`, or make it. `ImageError` if there is one that has another base."""
        try:
            return cls.create(path, base)
        except FileExistsError:
            overlay = cls(path)
        name = _name(overlay._base)
        if not os.path.samefile(name, base):
            overlay.close()
            raise ImageError(f"{path} is an overlay of {name}, not of {base}")
        return overlay

    @classmethod
    def temporary(cls, base: Backend) -> "Overlay":
        """Make one in a file without a name, below ``$TMPDIR`` or ``/tmp``: what is written is gone when it is closed.

        `base` is its own from now on, even if it can't be made. A flush does nothing: no crash leaves anything of it.
        """
        try:
            with tempfile.TemporaryFile(prefix="kvmkit-overlay-") as unnamed:
                os.ftruncate(unnamed.fileno(), _file_bytes(base.size_bytes))
                fd = os.dup(unnamed.fileno())
            file = RawFile.of_descriptor(fd, f"temporary overlay of {_name(base)}")
        except BaseException:
            base.close()
            raise
        overlay = cls._joined(file, base)
        overlay._throw_away = True
        return overlay

    @classmethod
    def over(cls, file: Backend, base: Backend) -> "Overlay":
        """Join a file of this format, whose header was checked, and its base. They are closed with the overlay."""
        self = cls._joined(file, base)
        self._load_map()
        return self

    @classmethod
    def _joined(cls, file: Backend, base: Backend) -> "Overlay":
        self = cls.__new__(cls)
        self._join(file, base)
        return self

    def _join(self, file: Backend, base: Backend) -> None:
        self._file, self._base = file, base
        self._throw_away = False
        self.size_bytes = base.size_bytes
        self._data = _data_offset(base.size_bytes)
        # Anonymous memory: what isn't touched takes none.
        self._map = mmap.mmap(-1, _map_bytes(base.size_bytes), flags=mmap.MAP_PRIVATE)
        self._changed: set[int] = set()
        """Numbers of the map's pages that aren't in the file yet."""
        self._allocating = threading.Lock()
        """Held by whoever adds to the map: two writes into one cluster would each fill the rest of it from the base."""
        self._flushing = threading.Lock()

    def _load_map(self) -> None:
        """Read the map from the file, or close and raise."""
        try:
            self._read_map()
        except BaseException:
            self.close()
            raise

    def _read_map(self) -> None:
        clusters, nothing = _clusters(self.size_bytes), bytes(_DATA_ALIGN)
        buffer = bytearray(_DATA_ALIGN)
        for start in range(0, len(self._map), _DATA_ALIGN):
            view = memoryview(buffer)[: len(self._map) - start]
            self._file.readv([view], _HEADER_BYTES + start)
            part = buffer[: len(view)]
            if part == nothing:
                continue  # it stays untouched
            if part.count(0) + part.count(1) != len(part) or part.find(1, max(clusters - start, 0)) >= 0:
                raise ImageError(f"{_name(self._file)}: the map at {start} is damaged")
            self._map[start : start + len(part)] = part

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> None:
        """Fill all buffers from `offset` on, from wherever each cluster is."""
        end = offset + sum(map(len, buffers))
        first, last = offset // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)
        if self._map.find(_BASE, first, last) < 0:
            self._file.readv(buffers, self._data + offset)
        elif self._map.find(_HERE, first, last) < 0:
            self._base.readv(buffers, offset)
        else:
            for here, start, stop in self._runs(offset, end):
                part = cut(buffers, start - offset, stop - offset)
                if here:
                    self._file.readv(part, self._data + start)
                else:
                    self._base.readv(part, start)

    def writev(self, buffers: Buffers, offset: int) -> None:
        """Write all buffers from `offset` on."""
        end = offset + sum(map(len, buffers))
        first, last = offset // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)
        if self._map.find(_BASE, first, last) < 0:
            self._file.writev(buffers, self._data + offset)
            return
        with self._allocating:
            head = self._rest(first * CLUSTER_BYTES, offset)
            tail = self._rest(end, min(last * CLUSTER_BYTES, self.size_bytes))
            self._file.writev([head, *buffers, tail], self._data + offset - len(head))
            self._mark(first, last)

    def flush(self) -> None:
        """Sync the clusters, then the map that names them; see the module."""
        if self._throw_away:
            return
        with self._flushing:  # an older copy of a page of the map must not be written after a newer one
            with self._allocating:
                pages = {page: self._map[page * _PAGE : (page + 1) * _PAGE] for page in self._changed}
                self._changed.clear()
            try:
                self._file.flush()
                if pages:
                    for page, data in sorted(pages.items()):
                        self._file.writev([data], _HEADER_BYTES + page * _PAGE)
                    self._file.flush()
            except BaseException:
                with self._allocating:
                    self._changed.update(pages)
                raise

    def discard(self, offset: int, size_bytes: int) -> None:
        """Fill the range with zeros that take no space."""
        self.write_zeroes(offset, size_bytes, unmap=True)

    def write_zeroes(self, offset: int, size_bytes: int, unmap: bool) -> None:
        """Fill the range with zeros."""
        end = offset + size_bytes
        first, last = -(-offset // CLUSTER_BYTES), end // CLUSTER_BYTES
        if end == self.size_bytes:
            last = _clusters(end)  # nothing of the last cluster lies beyond the disk's end
        whole, whole_end = first * CLUSTER_BYTES, min(last * CLUSTER_BYTES, end)
        if whole >= whole_end:
            self.writev([bytes(size_bytes)], offset)
            return
        if offset < whole:
            self.writev([bytes(whole - offset)], offset)
        if whole_end < end:
            self.writev([bytes(end - whole_end)], whole_end)
        with self._allocating:
            self._file.write_zeroes(self._data + whole, whole_end - whole, unmap)
            self._mark(first, last)

    def close(self) -> None:
        """Close the overlay and its base. Doesn't flush."""
        self._file.close()
        self._base.close()

    def _rest(self, start: int, end: int) -> bytes:
        """Read what a write doesn't cover of a cluster that still is the base's; empty if there is none."""
        if start >= end or self._map[start // CLUSTER_BYTES]:
            return b""
        rest = bytearray(end - start)
        self._base.readv([rest], start)
        return bytes(rest)

    def _mark(self, first: int, last: int) -> None:
        """Add clusters to the map in memory; with `_allocating` held, after their data is written."""
        self._map[first:last] = _HERE * (last - first)
        self._changed.update(range(first // _PAGE, (last - 1) // _PAGE + 1))

    def _runs(self, offset: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """Yield whether a run is here, its start and its end."""
        last = -(-end // CLUSTER_BYTES)
        while offset < end:
            cluster = offset // CLUSTER_BYTES
            here = bool(self._map[cluster])
            change = self._map.find(_BASE if here else _HERE, cluster, last)
            stop = end if change < 0 else change * CLUSTER_BYTES
            yield here, offset, stop
            offset = stop


def _clusters(size_bytes: int) -> int:
    return -(-size_bytes // CLUSTER_BYTES)


def _map_bytes(size_bytes: int) -> int:
    return -(-_clusters(size_bytes) // _PAGE) * _PAGE


def _data_offset(size_bytes: int) -> int:
    return -(-(_HEADER_BYTES + _map_bytes(size_bytes)) // _DATA_ALIGN) * _DATA_ALIGN


def _file_bytes(size_bytes: int) -> int:
    return _data_offset(size_bytes) + _clusters(size_bytes) * CLUSTER_BYTES


def _name(file: Backend) -> str:
    return str(getattr(file, "name", file))


def _mtime_ns(base: RawFile) -> int:
    known = base.stat()
    return 0 if stat.S_ISBLK(known.st_mode) else known.st_mtime_ns


def _header(base: RawFile, path: str) -> bytes:
    name = os.fsencode(path)
    if len(name) > _HEADER_BYTES - _HEADER.size - 4:
        raise ImageError(f"the path of the base has {len(name)} bytes: too long")
    header = _HEADER.pack(_MAGIC, _VERSION, CLUSTER_BYTES, base.size_bytes, _mtime_ns(base), len(name)) + name
    header = header.ljust(_HEADER_BYTES - 4, b"\0")
    return header + zlib.crc32(header).to_bytes(4, "little")


def _open_base(file: RawFile) -> RawFile:
    """Check an overlay's header and open the base that it names."""
    header = bytearray(_HEADER_BYTES)
    if file.size_bytes >= _HEADER_BYTES:
        file.readv([header], 0)
    magic, version, cluster_bytes, size_bytes, mtime_ns, path_bytes = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise ImageError(f"{file.name} is no overlay of kvmkit's")
    if zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
        raise ImageError(f"{file.name}: the header is damaged")
    if version != _VERSION or cluster_bytes != CLUSTER_BYTES:
        raise ImageError(
            f"{file.name} has format {version} with clusters of {cluster_bytes} bytes; this kvmkit knows format "
            f"{_VERSION} with {CLUSTER_BYTES}"
        )
    if file.size_bytes != _file_bytes(size_bytes):
        raise ImageError(
            f"{file.name} has {file.size_bytes} bytes and should have {_file_bytes(size_bytes)}: it was cut off, or copied in part"
        )
    path = os.fsdecode(bytes(header[_HEADER.size : _HEADER.size + path_bytes]))
    try:
        base = RawFile(path, read_only=True)
    except ImageError as error:
        raise ImageError(f"{file.name}: its base: {error}") from None
    except OSError as error:
        raise ImageError(f"{file.name}: its base {path}: {error.strerror}") from None
    if base.size_bytes != size_bytes or _mtime_ns(base) != mtime_ns:
        changed = base.size_bytes, _mtime_ns(base)
        base.close()
        raise ImageError(
            f"{file.name}: its base {path} has changed since the overlay was made (size and time of last change were {size_bytes} "
            f"and {mtime_ns} ns, are {changed[0]} and {changed[1]} ns): the two don't fit together any more"
        )
    return base


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
