"""A guest's side of virtio-fs, for tests: FUSE requests over `kvmkit.testing.virtqueue.Driver`."""

import errno
import os
from dataclasses import dataclass

from kvmkit.devices.fuse import protocol as fuse
from kvmkit.testing.virtqueue import Driver

HIPRIO, REQUESTS = 0, 1


@dataclass(frozen=True)
class Attr:
    """A ``fuse_attr``, with times in nanoseconds."""

    ino: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int

    @staticmethod
    def unpack(raw: bytes) -> "Attr":
        """From a message."""
        ino, size, blocks, a, m, c, a_ns, m_ns, c_ns, mode, nlink, uid, gid, rdev, _, _ = (
            fuse.attr.unpack_from(raw)
        )
        billion = 1_000_000_000
        times = (a * billion + a_ns, m * billion + m_ns, c * billion + c_ns)
        return Attr(ino, size, blocks, *times, mode, nlink, uid, gid, rdev)


@dataclass(frozen=True)
class Entry:
    """A ``fuse_entry_out``."""

    nodeid: int
    valid_s: int
    attr: Attr


@dataclass(frozen=True)
class Dirent:
    """An entry of a listing; `entry` from READDIRPLUS only."""

    name: bytes
    ino: int
    offset: int
    kind: int
    entry: Entry | None = None


class Fuse:
    """Speaks FUSE to the device behind `driver`; each method is an operation and raises `OSError` with what the server says."""

    def __init__(self, driver: Driver, *, init: bool = True) -> None:
        """Begin a session, unless not `init`."""
        self.driver = driver
        self._unique = 0
        self.uid = self.gid = 0
        if init:
            self.init()

    def send(
        self, opcode: int, nodeid: int, body: bytes = b"", out_bytes: int = 4096, queue: int = REQUESTS
    ) -> bytes:
        """Send a request with `out_bytes` of room for an answer without its header, and return that. `OSError`."""
        self._unique += 1
        header = fuse.in_header.pack(
            40 + len(body), opcode, self._unique, nodeid, self.uid, self.gid, 1, 0, 0
        )
        out = [header, body] if body else [header]
        self.driver.add(queue, out, [16, out_bytes] if out_bytes else [16])
        self.driver.kick(queue)
        (used,) = self.driver.used(queue)
        size, error, unique = fuse.out_header.unpack_from(used.data)
        assert unique == self._unique and size == used.written_bytes and (not error or size == 16)
        if error:
            raise OSError(-error, os.strerror(-error))
        return used.data[16:size]

    def init(self, minor: int = fuse.MINOR, flags: int = 0xFFFFFFFF) -> tuple[int, ...]:
        """INIT. Returns the fields of ``fuse_init_out``."""
        answer = self.send(fuse.INIT, 0, fuse.init_in.pack(fuse.VERSION, minor, 1 << 17, flags), 64)
        return fuse.init_out.unpack(answer)

    def _entry(self, raw: bytes) -> Entry:
        nodeid, _, valid_s, *_ = fuse.entry_out.unpack_from(raw)
        return Entry(nodeid, valid_s, Attr.unpack(raw[40 : fuse.entry_out.size]))

    def lookup(self, parent: int, name: bytes) -> Entry:
        """LOOKUP."""
        return self._entry(self.send(fuse.LOOKUP, parent, name + b"\0", fuse.entry_out.size))

    def walk(self, path: bytes) -> int:
        """LOOKUP each component of `path` from the root; returns the last one's number."""
        nodeid = fuse.ROOT_ID
        for name in path.split(b"/"):
            nodeid = self.lookup(nodeid, name).nodeid
        return nodeid

    def forget(self, nodeid: int, lookups: int = 1) -> None:
        """FORGET, which has no answer."""
        header = fuse.in_header.pack(48, fuse.FORGET, 0, nodeid, 0, 0, 0, 0, 0)
        self.driver.add(HIPRIO, [header, fuse.forget_in.pack(lookups)])
        self.driver.kick(HIPRIO)
        (used,) = self.driver.used(HIPRIO)
        assert used.written_bytes == 0

    def getattr(self, nodeid: int, fh: int | None = None) -> Attr:
        """GETATTR."""
        body = fuse.getattr_in.pack(0 if fh is None else fuse.GETATTR_FH, fh or 0)
        return Attr.unpack(self.send(fuse.GETATTR, nodeid, body, fuse.attr_out.size)[16:])

    def setattr(
        self,
        nodeid: int,
        valid: int,
        *,
        fh: int = 0,
        size: int = 0,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        atime: tuple[int, int] = (0, 0),
        mtime: tuple[int, int] = (0, 0),
    ) -> Attr:
        """SETATTR of what the FATTR_* in `valid` say; times are seconds and nanoseconds."""
        body = fuse.setattr_in.pack(
            valid, fh, size, atime[0], mtime[0], 0, atime[1], mtime[1], 0, mode, 0, uid, gid
        )
        return Attr.unpack(self.send(fuse.SETATTR, nodeid, body, fuse.attr_out.size)[16:])

    def readlink(self, nodeid: int) -> bytes:
        """READLINK."""
        return self.send(fuse.READLINK, nodeid)

    def symlink(self, parent: int, name: bytes, target: bytes) -> Entry:
        """SYMLINK."""
        return self._entry(self.send(fuse.SYMLINK, parent, name + b"\0" + target + b"\0"))

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0) -> Entry:
        """MKNOD."""
        return self._entry(self.send(fuse.MKNOD, parent, fuse.mknod_in.pack(mode, rdev, 0, 0) + name + b"\0"))

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755) -> Entry:
        """MKDIR."""
        return self._entry(self.send(fuse.MKDIR, parent, fuse.mkdir_in.pack(mode, 0) + name + b"\0"))

    def unlink(self, parent: int, name: bytes) -> None:
        """UNLINK."""
        self.send(fuse.UNLINK, parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        """RMDIR."""
        self.send(fuse.RMDIR, parent, name + b"\0")

    def rename(self, parent: int, name: bytes, to: int, new: bytes, flags: int | None = None) -> None:
        """RENAME, or with `flags` RENAME2."""
        names = name + b"\0" + new + b"\0"
        if flags is None:
            self.send(fuse.RENAME, parent, fuse.rename_in.pack(to) + names)
        else:
            self.send(fuse.RENAME2, parent, fuse.rename2_in.pack(to, flags) + names)

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        """LINK."""
        return self._entry(self.send(fuse.LINK, parent, fuse.link_in.pack(nodeid) + name + b"\0"))

    def open(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> int:
        """OPEN. Returns the handle."""
        return self.open_raw(nodeid, flags, open_flags)[0]

    def open_raw(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> tuple[int, int]:
        """OPEN. Returns the handle and FOPEN_* flags."""
        fh, out_flags = fuse.open_out.unpack(
            self.send(fuse.OPEN, nodeid, fuse.open_in.pack(flags, open_flags))
        )
        return fh, out_flags

    def create(
        self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644
    ) -> tuple[Entry, int]:
        """CREATE. Returns the entry and the handle."""
        raw = self.send(fuse.CREATE, parent, fuse.create_in.pack(flags, mode, 0, 0) + name + b"\0")
        return self._entry(raw), fuse.open_out.unpack_from(raw, fuse.entry_out.size)[0]

    def read(self, nodeid: int, fh: int, size: int, offset: int = 0) -> bytes:
        """READ."""
        return self.send(fuse.READ, nodeid, fuse.read_in.pack(fh, offset, size, 0, 0, 0, 0), size)

    def write(
        self, nodeid: int, fh: int, data: bytes, offset: int = 0, flags: int = 0, write_flags: int = 0
    ) -> int:
        """WRITE. Returns how many bytes were written."""
        body = fuse.write_in.pack(fh, offset, len(data), write_flags, 0, flags, 0) + data
        return int(fuse.write_out.unpack(self.send(fuse.WRITE, nodeid, body))[0])

    def release(self, nodeid: int, fh: int, opcode: int = fuse.RELEASE) -> None:
        """RELEASE."""
        self.send(opcode, nodeid, fuse.release_in.pack(fh, 0, 0, 0))

    def fsync(self, nodeid: int, fh: int, flags: int = 0, opcode: int = fuse.FSYNC) -> None:
        """FSYNC."""
        self.send(opcode, nodeid, fuse.fsync_in.pack(fh, flags))

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int = 0) -> None:
        """FALLOCATE."""
        self.send(fuse.FALLOCATE, nodeid, fuse.fallocate_in.pack(fh, offset, length, mode))

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        """LSEEK."""
        body = fuse.lseek_in.pack(fh, offset, whence)
        return int(fuse.lseek_out.unpack(self.send(fuse.LSEEK, nodeid, body))[0])

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, to: int, to_fh: int, to_offset: int, size: int
    ) -> int:
        """COPY_FILE_RANGE."""
        body = fuse.copy_file_range_in.pack(fh, offset, to, to_fh, to_offset, size, 0)
        return int(fuse.write_out.unpack(self.send(fuse.COPY_FILE_RANGE, nodeid, body))[0])

    def opendir(self, nodeid: int) -> int:
        """OPENDIR. Returns the handle."""
        return int(fuse.open_out.unpack(self.send(fuse.OPENDIR, nodeid, fuse.open_in.pack(0, 0)))[0])

    def readdir(
        self, nodeid: int, fh: int, offset: int = 0, size: int = 4096, *, plus: bool = False
    ) -> list[Dirent]:
        """READDIR or READDIRPLUS, once."""
        opcode = fuse.READDIRPLUS if plus else fuse.READDIR
        raw = self.send(opcode, nodeid, fuse.read_in.pack(fh, offset, size, 0, 0, 0, 0), size)
        found = []
        while raw:
            entry = None
            if plus:
                entry = self._entry(raw)
                raw = raw[fuse.entry_out.size :]
            ino, following, name_bytes, kind = fuse.dirent.unpack_from(raw)
            found.append(
                Dirent(
                    raw[24 : 24 + name_bytes], ino, following, kind, entry if entry and entry.nodeid else None
                )
            )
            raw = raw[24 + (name_bytes + 7 & ~7) :]
        return found

    def listdir(self, nodeid: int, *, plus: bool = False, size: int = 4096) -> list[Dirent]:
        """Read all of a directory but ``.`` and ``..``."""
        fh = self.opendir(nodeid)
        found: list[Dirent] = []
        while some := self.readdir(nodeid, fh, found[-1].offset if found else 0, size, plus=plus):
            found += some
        self.release(nodeid, fh, fuse.RELEASEDIR)
        return [entry for entry in found if entry.name not in (b".", b"..")]

    def getxattr(self, nodeid: int, name: bytes, size: int = 1024) -> bytes:
        """GETXATTR."""
        return self.send(fuse.GETXATTR, nodeid, fuse.getxattr_in.pack(size) + name + b"\0")

    def listxattr(self, nodeid: int, size: int = 1024) -> bytes:
        """LISTXATTR."""
        return self.send(fuse.LISTXATTR, nodeid, fuse.getxattr_in.pack(size))

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """SETXATTR."""
        self.send(fuse.SETXATTR, nodeid, fuse.setxattr_in.pack(len(value), flags) + name + b"\0" + value)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        """REMOVEXATTR."""
        self.send(fuse.REMOVEXATTR, nodeid, name + b"\0")


def code_of(error: OSError) -> str:
    """Name an error as errno(3) does."""
    return errno.errorcode[error.errno or 0]
