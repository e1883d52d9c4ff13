"""A file tree in memory, merged from layers: the names, owners and modes of a root; the bytes stay where they are.

Nothing of an image is ever unpacked onto the host: a layer's names, links and devices only change this tree, and
`kvmkit.images.ext4` writes it into a file system image. So no name in a layer can reach outside, however it is spelt,
and nobody needs to be root to keep owners and devices.

Layers are tar archives as the OCI image specification has them (``layer.md``): an entry replaces what lower layers
have at its path; ``.wh.NAME`` removes ``NAME`` of the lower layers, ``.wh..wh..opq`` all that they have in its
directory.
"""

import math
import stat
import tarfile
from dataclasses import dataclass, field
from typing import IO, cast

from kvmkit.errors import ImageError

__all__ = ["FileData", "HeaderReader", "Inode", "Tree"]

_MAX_FILES = 1_000_000
"""Entries of a layer, files of a tree: what an image costs us in memory is bounded."""
_MAX_HEADER_BYTES = 1 << 20
_MAX_HEADERS_BYTES = 1 << 30
"""Of all headers of a layer."""
_MAX_LINKS = 40
"""As many symbolic links the kernel follows on a path (`MAXSYMLINKS`)."""
_MAX_DEPTH = 1024
_MAX_NAME_BYTES = 255
_MAX_TARGET_BYTES = 4095
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_XATTR = "SCHILY.xattr."


@dataclass(frozen=True, slots=True)
class FileData:
    """Where a file's bytes are: `chunks` of (offset in the file, offset in `source`, bytes); zeros between them."""

    source: IO[bytes]
    size_bytes: int
    chunks: tuple[tuple[int, int, int], ...]


@dataclass(slots=True, eq=False)
class Inode:
    """A file of any type; hard links share it."""

    mode: int
    """Type and permissions, as in `st_mode`."""
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    """By their full names, like ``security.capability``."""
    data: FileData | None = None
    """Of a regular file that isn't empty."""
    target: bytes = b""
    """Of a symbolic link."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device."""
    entries: dict[bytes, "Inode"] = field(default_factory=dict)
    """Of a directory."""

    @property
    def is_directory(self) -> bool:
        """Whether it has entries."""
        return stat.S_ISDIR(self.mode)


class Tree:
    """A root directory and all below it; empty to begin with."""

    def __init__(self) -> None:
        self._made = 0
        self.root = self._make(stat.S_IFDIR | 0o755, "")

    def walk(self) -> list[tuple[bytes, Inode]]:
        """Every path but the root's, relative to it, and what is there.

        Directories come before what they hold, names in byte order.
        """
        found = []
        pending = [(b"", self.root)]
        while pending:
            path, inode = pending.pop()
            if path:
                found.append((path, inode))
            prefix = path + b"/" if path else b""
            pending.extend(
                (prefix + name, inode.entries[name]) for name in sorted(inode.entries, reverse=True)
            )
        return found

    def apply_layer(self, layer: IO[bytes], what: str) -> None:
        """Change the tree as the tar archive `layer` says.

        `layer` is seekable and stays open as long as the tree is used, which refers to its bytes. `what` names it in
        errors. `ImageError` if it isn't a tar archive, or holds what can't be in one or shouldn't: paths with ``..``,
        hard links to what isn't there, names that no file system takes. The tree is then half changed.
        """
        size_bytes = layer.seek(0, 2)
        members = _members(layer, what)
        # Whiteouts speak of the layers below alone, wherever they stand in this one: they come first.
        for _, path in members:
            if path and path[-1].startswith(_WHITEOUT):
                self._white_out(path, what)
        for member, path in members:
            if not (path and path[-1].startswith(_WHITEOUT)):
                try:
                    self._apply(member, path, layer, size_bytes, what)
                except _Refused as refused:
                    raise ImageError(f"{what}: {_shown(b'/'.join(path))} is {refused}") from None

    def _make(self, mode: int, what: str) -> Inode:
        if self._made == _MAX_FILES:
            raise ImageError(
                f"{what}: the image has more than {_MAX_FILES} files: that is no root of a system"
            )
        self._made += 1
        return Inode(mode)

    def _white_out(self, path: list[bytes], what: str) -> None:
        directory = self._directory(path[:-1], what)
        if directory is None:
            return  # of what isn't there
        if path[-1] == _OPAQUE:
            directory.entries.clear()
        elif not path[-1].startswith(_WHITEOUT * 2):  # aufs's own, which mean nothing to others
            directory.entries.pop(path[-1].removeprefix(_WHITEOUT), None)

    def _apply(
        self, member: tarfile.TarInfo, path: list[bytes], layer: IO[bytes], layer_bytes: int, what: str
    ) -> None:
        if not path:
            if member.isdir():
                _set_attributes(self.root, member)
            return
        parent = self._directory(path[:-1], what, create=True)
        assert parent is not None
        old = parent.entries.get(path[-1])
        if member.islnk():
            parent.entries[path[-1]] = self._link_target(member, what)
        elif member.isdir() and old is not None and old.is_directory:
            _set_attributes(old, member)
        else:
            inode = self._make(_type(member), what)
            if member.issym():
                inode.target = _target(member)
            elif member.ischr() or member.isblk():
                inode.device = _device(member)
            elif member.isreg():
                inode.data = _data(member, layer, layer_bytes)
            _set_attributes(inode, member)
            parent.entries[path[-1]] = inode

    def _link_target(self, member: tarfile.TarInfo, what: str) -> Inode:
        """What a hard link stands for. link(2) doesn't follow a symbolic link at its end, so neither do we."""
        path = _components(_bytes(member.linkname), what)
        directory = self._directory(path[:-1], what) if path else None
        inode = directory.entries.get(path[-1]) if directory else None
        if inode is None or inode.is_directory:
            raise _Refused(
                f"a hard link to {_shown(_bytes(member.linkname))}, and the image has no such file"
            )
        return inode

    def _directory(self, path: list[bytes], what: str, *, create: bool = False) -> Inode | None:
        """The directory at `path`, symbolic links followed as in a chroot; None if there is none.

        With `create` missing directories are made.
        """
        todo, here, links = list(reversed(path)), [self.root], 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(here) > 1:
                    here.pop()
                continue
            inode = here[-1].entries.get(name)
            if inode is None:
                if not create:
                    return None
                if len(here) > _MAX_DEPTH or len(name) > _MAX_NAME_BYTES:  # by symbolic links
                    raise ImageError(
                        f"{what}: {_shown(b'/'.join(path))} leads to no path that a file system takes"
                    )
                inode = here[-1].entries[name] = self._make(stat.S_IFDIR | 0o755, what)
            if stat.S_ISLNK(inode.mode):
                links += 1
                if links > _MAX_LINKS:
                    raise ImageError(f"{what}: too many symbolic links on the path {_shown(b'/'.join(path))}")
                if inode.target.startswith(b"/"):
                    del here[1:]
                todo.extend(reversed(inode.target.split(b"/")))
            elif inode.is_directory:
                here.append(inode)
            elif create:
                raise ImageError(
                    f"{what}: on the path {_shown(b'/'.join(path))}, {_shown(name)} is no directory"
                )
            else:
                return None
        return here[-1]


class _Refused(Exception):
    """An entry is something that can't be; says what."""


class HeaderReader:
    """A file that bounds what `tarfile` reads of it, which is headers: it takes one in at once, however long it is."""

    def __init__(self, file: IO[bytes], what: str) -> None:
        self._file = file
        self._what = what
        self._left_bytes = _MAX_HEADERS_BYTES
        self.seek = file.seek
        self.tell = file.tell

    def as_file(self) -> IO[bytes]:
        """Return itself, as `tarfile` wants it typed."""
        return cast(IO[bytes], self)

    def read(self, size_bytes: int) -> bytes:
        """Read, within the bounds."""
        self._left_bytes -= size_bytes
        if not 0 <= size_bytes <= _MAX_HEADER_BYTES or self._left_bytes < 0:
            raise ImageError(f"{self._what}: its headers are too long: it is damaged or malicious")
        return self._file.read(size_bytes)


def _members(layer: IO[bytes], what: str) -> list[tuple[tarfile.TarInfo, list[bytes]]]:
    layer.seek(0)
    members: list[tuple[tarfile.TarInfo, list[bytes]]] = []
    try:
        reader = HeaderReader(layer, what).as_file()
        with tarfile.open(fileobj=reader, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                if len(members) == _MAX_FILES:
                    raise ImageError(
                        f"{what} has more than {_MAX_FILES} entries: that is no root of a system"
                    )
                members.append((member, _components(_bytes(member.name), what)))
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise ImageError(f"{what} is no sound tar archive: {error}") from error
    layer.seek(end)
    if layer.read(tarfile.BLOCKSIZE).strip(b"\0"):  # a header that `tarfile` takes for the end
        raise ImageError(f"{what} is no sound tar archive: damaged at byte {end}")
    return members


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _shown(path: bytes) -> str:
    text = repr(path.decode("utf-8", "replace"))
    return text if len(text) < 200 else text[:200] + "…"


def _components(path: bytes, what: str) -> list[bytes]:
    """The names on `path`; a leading slash is the image's root."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise ImageError(f"{what}: the path {_shown(path)} has a '..' in it: refused")
    if any(len(name) > _MAX_NAME_BYTES or b"\0" in name for name in names) or len(names) > _MAX_DEPTH:
        raise ImageError(f"{what}: {_shown(path)} is no path that a file system takes")
    return names


def _type(member: tarfile.TarInfo) -> int:
    for is_type, file_type in (
        (member.isreg, stat.S_IFREG),
        (member.isdir, stat.S_IFDIR),
        (member.issym, stat.S_IFLNK),
        (member.ischr, stat.S_IFCHR),
        (member.isblk, stat.S_IFBLK),
        (member.isfifo, stat.S_IFIFO),
    ):
        if is_type():
            return file_type
    raise _Refused(f"of the unknown type {member.type!r}")


def _target(member: tarfile.TarInfo) -> bytes:
    target = _bytes(member.linkname)
    if not 0 < len(target) <= _MAX_TARGET_BYTES or b"\0" in target:
        raise _Refused(f"a symbolic link to {_shown(target)}, which no file system takes")
    return target


def _device(member: tarfile.TarInfo) -> tuple[int, int]:
    if not (0 <= member.devmajor < 1 << 12 and 0 <= member.devminor < 1 << 20):  # the kernel's MINORBITS
        raise _Refused(f"a device with the impossible number {member.devmajor}:{member.devminor}")
    return member.devmajor, member.devminor


def _data(member: tarfile.TarInfo, layer: IO[bytes], layer_bytes: int) -> FileData | None:
    chunks, position = [], member.offset_data
    # GNU's map of what isn't zeros, (offset, bytes) each; those bytes follow each other in the archive.
    sparse = cast(list[tuple[int, int]], member.sparse) if member.issparse() else [(0, member.size)]
    for offset, size_bytes in sparse:
        if size_bytes < 0 or offset < 0 or offset + size_bytes > member.size:
            raise _Refused("a sparse file with an impossible map")
        if size_bytes:
            chunks.append((offset, position, size_bytes))
        position += size_bytes
    if member.size < 0 or position > layer_bytes:
        raise _Refused("cut off: the archive ends before it does")
    return FileData(layer, member.size, tuple(chunks)) if member.size else None


def _set_attributes(inode: Inode, member: tarfile.TarInfo) -> None:
    if not (0 <= member.uid < 1 << 32 and 0 <= member.gid < 1 << 32):
        raise _Refused(f"owned by the impossible {member.uid}:{member.gid}")
    file_type = stat.S_IFMT(inode.mode)
    inode.mode = file_type | (0o777 if stat.S_ISLNK(file_type) else member.mode & 0o7777)
    inode.uid, inode.gid = member.uid, member.gid
    inode.mtime_s = math.floor(member.mtime) if math.isfinite(member.mtime) else 0
    inode.xattrs = {
        _bytes(name.removeprefix(_XATTR)): _bytes(value)
        for name, value in member.pax_headers.items()
        # Access lists (system.*) have another form on each file system; images of Linux don't carry them.
        if name.startswith((_XATTR + "user.", _XATTR + "trusted.", _XATTR + "security."))
    }
