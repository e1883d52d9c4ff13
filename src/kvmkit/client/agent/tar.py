"""Trees as tar streams: of what is here, for the guest, and of what a guest sends, which may be hostile.

`tarfile` reads and writes the headers. It doesn't unpack: its filters refuse links that lead elsewhere, which a guest's directories
are full of. Here such a link is made as it is and never followed: every directory on the way to a member is opened without
following links, from the target on, so nothing outside of it is touched whatever the names say.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

from kvmkit.errors import ProtocolError

BLOCK_BYTES = 512
_CHUNK_BYTES = 64 << 10
_MAX_NAME_BYTES = 64 << 10
_MAX_MTIME_S = 1 << 40
_ENCODING = ("utf-8", "surrogateescape")


def archive(root: Path) -> Iterator[bytes]:
    """Yield a tar archive of the directory `root`, its members' names relative to it.

    Files, directories and symbolic links alone; owners are left out. A file is as long as it was when its turn came.
    """
    pending = ["."]
    while pending:
        name = pending.pop()
        path = root / name
        meta = path.lstat()
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = stat.S_IMODE(meta.st_mode), int(meta.st_mtime)
        if stat.S_ISDIR(meta.st_mode):
            info.type = tarfile.DIRTYPE
            pending += [child if name == "." else f"{name}/{child}" for child in os.listdir(path)]
        elif stat.S_ISLNK(meta.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        elif stat.S_ISREG(meta.st_mode):
            info.size = meta.st_size
        else:
            continue
        yield info.tobuf(tarfile.GNU_FORMAT, *_ENCODING)
        if info.size:
            yield from _content(path, info.size)
    yield bytes(2 * BLOCK_BYTES)


def _content(path: Path, size_bytes: int) -> Iterator[bytes]:
    left = size_bytes
    with open(path, "rb", buffering=0) as file:
        while left:
            data = file.read(min(left, _CHUNK_BYTES)) or bytes(min(left, _CHUNK_BYTES))  # it became shorter
            left -= len(data)
            yield data
    yield bytes(-size_bytes % BLOCK_BYTES)


class Extractor:
    """Unpacks a tar stream into the directory `target`, piece by piece. Setuid and the like don't come along, nor do owners."""

    def __init__(self, target: Path) -> None:
        self._target = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._buffer = bytearray()
        self._directories: list[tuple[list[str], int, int]] = []
        self._ended = False
        self._steps = self._run()
        next(self._steps)

    def feed(self, data: bytes) -> None:
        """Take the next piece. `ProtocolError` for what isn't as an agent sends it."""
        self._steps.send(data)

    def finish(self) -> None:
        """The stream has ended: give the directories their modes and times."""
        if not self._ended:
            raise ProtocolError("an archive that ends before its end")
        for parts, mode, mtime_s in reversed(self._directories):
            fd = self._directory(parts)
            try:
                os.fchmod(fd, mode)
                os.utime(fd, (mtime_s, mtime_s))
            finally:
                os.close(fd)

    def close(self) -> None:
        """Release the target; what was unpacked stays."""
        self._steps.close()
        os.close(self._target)

    def _run(self) -> Generator[None, bytes]:
        names: dict[bytes, str] = {}
        while True:
            header = yield from self._exactly(BLOCK_BYTES)
            if not any(header):
                break
            try:
                info = tarfile.TarInfo.frombuf(header, *_ENCODING)
            except tarfile.HeaderError as error:
                raise ProtocolError(f"an archive with a header that is none: {error}") from None
            if info.size < 0 or (info.size and not info.isreg() and info.type not in _LONG):
                raise ProtocolError(f"archive member {info.name[:80]!r}: {info.size} bytes")
            if info.type in _LONG:
                if info.size > _MAX_NAME_BYTES:
                    raise ProtocolError(f"an archive with a name of {info.size} bytes")
                data = yield from self._exactly(info.size + -info.size % BLOCK_BYTES)
                names[info.type] = data[: info.size].split(b"\0")[0].decode(*_ENCODING)
                continue
            name = names.get(tarfile.GNUTYPE_LONGNAME, info.name)
            link = names.get(tarfile.GNUTYPE_LONGLINK, info.linkname)
            names.clear()
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.startswith("/") or ".." in parts:
                raise ProtocolError(f"archive member {name[:80]!r}: it would leave the directory")
            yield from self._member(info, parts, link)
        self._ended = True
        while True:  # padding
            yield

    def _member(self, info: tarfile.TarInfo, parts: list[str], link: str) -> Generator[None, bytes]:
        mode, mtime_s = info.mode & 0o777, min(max(int(info.mtime), 0), _MAX_MTIME_S)
        if info.isdir() and not parts:
            self._directories.append((parts, mode, mtime_s))
            return
        if not parts:
            raise ProtocolError("an archive whose root is no directory")
        parent, name = self._directory(parts[:-1]), parts[-1]
        try:
            if info.isdir():
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
                os.close(self._directory(parts))  # it is one
                self._directories.append((parts, mode, mtime_s))
                return
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            if info.issym():
                os.symlink(link, name, dir_fd=parent)
            elif info.isreg():
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
                    left = info.size
                    while left:
                        data = yield from self._some(left)
                        file.write(data)
                        left -= len(data)
                    os.fchmod(file.fileno(), mode)
                    os.utime(file.fileno(), (mtime_s, mtime_s))
                yield from self._exactly(-info.size % BLOCK_BYTES)
            else:
                raise ProtocolError(f"archive member {'/'.join(parts)[:80]!r}: no file, directory or link")
        finally:
            os.close(parent)

    def _directory(self, parts: list[str]) -> int:
        """Open a directory of the target without following links."""
        fd = os.dup(self._target)
        for part in parts:
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise ProtocolError(
                        f"archive member below {'/'.join(parts)[:80]!r}: that is no directory"
                    ) from None
                raise
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _exactly(self, size_bytes: int) -> Generator[None, bytes, bytes]:
        while len(self._buffer) < size_bytes:
            self._buffer += yield
        data = bytes(self._buffer[:size_bytes])
        del self._buffer[:size_bytes]
        return data

    def _some(self, limit_bytes: int) -> Generator[None, bytes, bytes]:
        """One byte at least."""
        if not self._buffer:
            self._buffer += yield
        return (yield from self._exactly(min(len(self._buffer), limit_bytes)))


_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
