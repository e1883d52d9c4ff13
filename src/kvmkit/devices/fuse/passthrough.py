"""A directory of the host as a FUSE file system. `kvmkit.devices.fuse` says what keeps the guest inside.

**How long the guest may believe what it was told.** Linux keeps names, attributes and data as long as the server allows, and there
is no message by which a virtio-fs server could take that back. A shared directory is one that the host works in too: a program that
writes a file and then has the guest read it must not get the old one, so nothing is valid for longer than the system call that
asked, and data is kept over an open only if the file's ctime hasn't moved since the last. A root that nobody changes while its guest
runs (`unchanging`) may be kept for an hour; there a boot would else ask for the same path components thousands of times. It has no
extended attributes either: an overlay asks for some at every name, execve(2) at every program, which was a fifth of all requests.

For the same reason there is no WRITEBACK_CACHE: with it size and mtime would be the guest's to decide.

**Owners.** `owners` is "identity": as on the host; or "squash": what belongs to the host's user (the one that this process runs as)
appears as root's in the guest, all else as nobody's, and what the guest makes becomes the host user's. A read-only directory has
identity, so that it looks right to whoever looks at it. Where the guest may write, an ordinary user can't give files away and
squashes; root has identity, and new files belong to whoever in the guest makes them: they are made with that uid and gid as this
thread's fsuid and fsgid (credentials(7)).
"""

import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import time
from collections.abc import Callable
from typing import Literal

from kvmkit.devices.fuse import protocol as fuse
from kvmkit.devices.fuse.inodes import Inodes
from kvmkit.devices.virtio.queue import Chain, total_bytes

MAX_WRITE_BYTES = 1 << 20
_MAX_REQUEST_BYTES = 128 << 10
"""A request without a WRITE's data: an extended attribute's value is up to 64 KiB."""
_FIRST_BYTES = 512
"""What is read of a request at once; hardly any but WRITE has more."""
_MAX_BACKGROUND = 64
_MAX_COPY_BYTES = 64 << 20
"""Copied by one COPY_FILE_RANGE; the guest asks for the rest."""
_MAX_XATTR_BYTES = 64 << 10
_UNCHANGING_S = 3600
_SETTLED_NS = 100_000_000
"""A ctime so long ago can't stay the same through another change; a tick of the clock that stamps files is up to 10 ms."""
_NOBODY = 65534
_READ_PLUS_NAME = fuse.entry_out.size + fuse.dirent.size

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_SYS_GETDENTS64 = {"x86_64": 217, "aarch64": 61}
_CLONE_FS = 0x200
_AT_FDCWD = -100
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_DIRENT64 = struct.Struct("<QqHB")
_TIMESPECS = struct.Struct("=qqqq")

Owners = Literal["identity", "squash"]
_Handler = Callable[["_Request"], "bytes | int | None"]


class _Request:
    """A request's header and what follows it."""

    __slots__ = ("body", "chain", "gid", "nodeid", "uid")

    def __init__(self, nodeid: int, uid: int, gid: int, body: bytes, chain: Chain) -> None:
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.body = body
        self.chain = chain


class _Handle:
    """A file or directory that the guest has open."""

    __slots__ = ("fd", "nodeid", "position")

    def __init__(self, fd: int, nodeid: int) -> None:
        self.fd = fd
        self.nodeid = nodeid
        self.position = 0
        """Of a directory: where its descriptor stands."""


class PassthroughFs:
    """Answers a guest's FUSE requests out of `directory`. One thread.

    `unchanging` promises that nobody changes it while the guest runs. `owners` is chosen if None; see the module's head.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        read_only: bool,
        unchanging: bool = False,
        owners: Owners | None = None,
    ) -> None:
        """Raises the process's soft limit of open files to the hard one. `OSError`, `ValueError`: `directory` can't be shared."""
        if unchanging and not read_only:
            raise ValueError("a directory that the guest may write to isn't unchanging")
        if not os.path.isdir("/proc/self/fd"):
            raise ValueError("sharing a directory needs /proc, which isn't mounted here")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        # Eight shares leave a quarter of it to the rest of the process.
        self._max_handles = min(limit // 16, 1 << 16)
        self._inodes = Inodes(directory, max_directories=min(limit // 32, 4096))
        self.read_only = read_only
        self._unchanging = unchanging
        self._valid_s = _UNCHANGING_S if unchanging else 0
        self._uid, self._gid = os.geteuid(), os.getegid()
        self.owners: Owners = owners or ("identity" if read_only or not self._uid else "squash")
        self._acts_as_guest = self.owners == "identity" and not self._uid
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._listing = ctypes.create_string_buffer(32768)
        self._handlers = self._make_handlers()

    def enter_thread(self) -> None:
        """Make the calling thread the one that serves: its umask becomes its own, and 0 (the guest applied one already).

        In a container that forbids unshare(2), the process's umask applies too.
        """
        if not self._libc.unshare(_CLONE_FS):
            os.umask(0)

    def reset(self) -> None:
        """Forget all that the guest knows and has open."""
        for handle in self._handles.values():
            os.close(handle.fd)
        self._handles.clear()
        self._inodes.open_files.clear()
        self._inodes.reset()

    def close(self) -> None:
        """Close everything."""
        self.reset()
        self._inodes.close()

    def handle(self, chain: Chain) -> int:
        """Answer a request. Returns how many bytes of the answer were written: 0 if there is none."""
        head = chain.read(0, _FIRST_BYTES)
        if len(head) < 40:
            return 0  # nobody to answer to
        size, opcode, unique, nodeid, uid, gid, _pid, _extlen, _ = fuse.in_header.unpack_from(head)
        answer: bytes | int | None
        try:
            if not 40 <= size <= chain.readable_bytes:
                raise OSError(errno.EINVAL, "a length that isn't the request's")
            if size > len(head) and opcode != fuse.WRITE:
                if size > _MAX_REQUEST_BYTES:
                    raise OSError(errno.E2BIG, "a request too long")
                head += chain.read(_FIRST_BYTES, size - _FIRST_BYTES)
            handler = self._handlers.get(opcode)
            if handler is None:
                raise OSError(errno.ENOSYS, "unknown opcode")
            answer = handler(_Request(nodeid, uid, gid, head[40:size], chain))
            error = 0
        except OSError as failure:
            answer, error = b"", -(failure.errno or errno.EIO)
        except (struct.error, ValueError, OverflowError):
            # A fixed part that is too short; an embedded NUL, an offset beyond what the host's types hold.
            answer, error = b"", -errno.EINVAL
        finally:
            self._inodes.trim()
        if answer is None:
            return 0
        if isinstance(answer, int):  # so many bytes stand after the header already
            written = 16 + answer
            chain.write(fuse.out_header.pack(written, error, unique))
            return written
        written = 16 + len(answer)
        if written > chain.writable_bytes:
            if chain.writable_bytes < 16:
                return 0
            written, answer, error = 16, b"", -errno.EIO
        return chain.write(fuse.out_header.pack(written, error, unique) + answer)

    def _make_handlers(self) -> dict[int, _Handler]:
        reading: dict[int, _Handler] = {
            fuse.LOOKUP: self._lookup,
            fuse.FORGET: self._forget,
            fuse.GETATTR: self._getattr,
            fuse.READLINK: self._readlink,
            fuse.OPEN: self._open,
            fuse.READ: self._read,
            fuse.STATFS: self._statfs,
            fuse.RELEASE: self._release,
            fuse.GETXATTR: self._getxattr,
            fuse.LISTXATTR: self._listxattr,
            fuse.INIT: self._init,
            fuse.OPENDIR: self._opendir,
            fuse.READDIR: self._readdir,
            fuse.RELEASEDIR: self._release,
            fuse.ACCESS: self._access,
            fuse.INTERRUPT: _no_answer,  # nothing takes long enough
            fuse.DESTROY: self._destroy,
            fuse.BATCH_FORGET: self._batch_forget,
            fuse.READDIRPLUS: self._readdirplus,
            fuse.LSEEK: self._lseek,
        }
        writing: dict[int, _Handler] = {
            fuse.SETATTR: self._setattr,
            fuse.SYMLINK: self._symlink,
            fuse.MKNOD: self._mknod,
            fuse.MKDIR: self._mkdir,
            fuse.UNLINK: self._unlink,
            fuse.RMDIR: self._rmdir,
            fuse.RENAME: self._rename,
            fuse.LINK: self._link,
            fuse.WRITE: self._write,
            fuse.SETXATTR: self._setxattr,
            fuse.REMOVEXATTR: self._removexattr,
            fuse.CREATE: self._create,
            fuse.FALLOCATE: self._fallocate,
            fuse.RENAME2: self._rename2,
            fuse.COPY_FILE_RANGE: self._copy_file_range,
        }
        # Linux takes ENOSYS for these as "nothing to do", and asks no more.
        if self._unchanging:
            del reading[fuse.GETXATTR], reading[fuse.LISTXATTR]
        if self.read_only:
            return reading | dict.fromkeys(writing, _read_only)
        flushing: dict[int, _Handler] = {
            fuse.FSYNC: self._fsync,
            fuse.FSYNCDIR: self._fsync,
            fuse.FLUSH: self._flush,
            fuse.SYNCFS: self._syncfs,
        }
        return reading | writing | flushing

    # The session.

    def _init(self, request: _Request) -> bytes:
        major, minor, max_readahead, offered = fuse.init_in.unpack_from(request.body)
        if major < fuse.VERSION or (major == fuse.VERSION and minor < fuse.MINOR_MIN):
            raise OSError(errno.EPROTO, "a protocol before Linux 5.4's")
        self.reset()
        wanted = (
            fuse.ASYNC_READ
            | fuse.ATOMIC_O_TRUNC
            | fuse.BIG_WRITES
            | fuse.DO_READDIRPLUS
            | fuse.READDIRPLUS_AUTO
            | fuse.ASYNC_DIO
            | fuse.PARALLEL_DIROPS
            | fuse.MAX_PAGES
            | fuse.HANDLE_KILLPRIV_V2
        )
        if self._unchanging:
            wanted |= fuse.CACHE_SYMLINKS
        return fuse.init_out.pack(
            fuse.VERSION,
            fuse.MINOR,
            max_readahead,
            offered & wanted,
            _MAX_BACKGROUND,
            _MAX_BACKGROUND * 3 // 4,
            MAX_WRITE_BYTES,
            1,
            MAX_WRITE_BYTES // 4096,
            0,
            0,
        )

    def _destroy(self, request: _Request) -> bytes:
        self.reset()
        return b""

    # Names and inodes.

    def _lookup(self, request: _Request) -> bytes:
        try:
            return self._entry(request.nodeid, _name(request.body))
        except FileNotFoundError:
            if self._unchanging:  # let the guest remember that, too
                return fuse.entry_out.pack(0, 0, self._valid_s, 0, 0, 0, *bytes(16))
            raise

    def _entry(self, parent: int, name: bytes) -> bytes:
        """Return a ``fuse_entry_out`` for a name, which the guest then knows."""
        inodes = self._inodes
        if inodes.is_hidden(parent):
            raise OSError(errno.ENOENT, "an interface to the host's kernel")
        st = os.stat(name, dir_fd=inodes.directory(parent), follow_symlinks=False)
        number = inodes.number(st)
        if inodes.is_hidden(number) and not stat.S_ISDIR(st.st_mode):
            raise OSError(errno.ENOENT, "an interface to the host's kernel")
        inodes.add(parent, name, number)
        valid_s = self._valid_s
        return fuse.entry_out.pack(number, 0, valid_s, valid_s, 0, 0, *self._attributes(st, number))

    def _attributes(self, st: os.stat_result, number: int) -> tuple[int, ...]:
        if self.owners == "identity":
            return fuse.attributes(st, number, st.st_uid, st.st_gid)
        uid = 0 if st.st_uid == self._uid else _NOBODY
        gid = 0 if st.st_gid == self._gid else _NOBODY
        return fuse.attributes(st, number, uid, gid)

    def _forget(self, request: _Request) -> None:
        self._inodes.forget(request.nodeid, *fuse.forget_in.unpack_from(request.body))

    def _batch_forget(self, request: _Request) -> None:
        (count,) = fuse.batch_forget_in.unpack_from(request.body)
        for nodeid, lookups in fuse.forget_one.iter_unpack(request.body[8 : 8 + 16 * count]):
            self._inodes.forget(nodeid, lookups)

    def _getattr(self, request: _Request) -> bytes:
        flags, fh = fuse.getattr_in.unpack_from(request.body)
        if flags & fuse.GETATTR_FH:
            return self._attr(request.nodeid, os.fstat(self._file(fh, request.nodeid).fd))
        return self._attr(request.nodeid, self._inodes.stat(request.nodeid))

    def _attr(self, nodeid: int, st: os.stat_result) -> bytes:
        number = self._inodes.number(st) if nodeid == fuse.ROOT_ID else nodeid
        return fuse.attr_out.pack(self._valid_s, 0, *self._attributes(st, number))

    def _readlink(self, request: _Request) -> bytes:
        return os.readlink(b"", dir_fd=self._inodes.open(request.nodeid))

    def _access(self, request: _Request) -> bytes:
        (mask,) = fuse.access_in.unpack_from(request.body)
        if self.read_only and mask & os.W_OK:
            raise OSError(errno.EROFS, "read-only")
        path = _path(self._inodes.open(request.nodeid))
        if not os.access(path, mask & 7, effective_ids=True):
            raise OSError(errno.EACCES, "no access")
        return b""

    def _statfs(self, request: _Request) -> bytes:
        st = os.fstatvfs(self._inodes.open(request.nodeid))
        return fuse.statfs_out.pack(
            st.f_blocks,
            st.f_bfree,
            st.f_bavail,
            st.f_files,
            st.f_ffree,
            st.f_bsize,
            st.f_namemax,
            st.f_frsize,
            0,
        )

    def _setattr(self, request: _Request) -> bytes:
        valid, fh, size, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid = (
            fuse.setattr_in.unpack_from(request.body)
        )
        by_handle = valid & fuse.FATTR_FH
        fd = self._file(fh, request.nodeid).fd if by_handle else self._target(request.nodeid)
        path = _path(fd)
        if valid & fuse.FATTR_MODE:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & (fuse.FATTR_UID | fuse.FATTR_GID):
            self._chown(
                path,
                uid if valid & fuse.FATTR_UID else -1,
                gid if valid & fuse.FATTR_GID else -1,
                os.fstat(fd),
            )
        if valid & fuse.FATTR_SIZE:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "no file")
            os.truncate(fd if by_handle else path, size)
            if valid & fuse.FATTR_KILL_SUIDGID:
                _kill_suidgid(fd)
        if valid & (fuse.FATTR_ATIME | fuse.FATTR_MTIME):
            if valid & fuse.FATTR_ATIME_NOW:
                atime_ns = _UTIME_NOW
            elif not valid & fuse.FATTR_ATIME:
                atime_ns = _UTIME_OMIT
            if valid & fuse.FATTR_MTIME_NOW:
                mtime_ns = _UTIME_NOW
            elif not valid & fuse.FATTR_MTIME:
                mtime_ns = _UTIME_OMIT
            times = _TIMESPECS.pack(atime, atime_ns, mtime, mtime_ns)
            self._checked(self._libc.utimensat(_AT_FDCWD, path, times, 0))
        return self._attr(request.nodeid, os.fstat(fd))

    def _chown(self, path: bytes, uid: int, gid: int, st: os.stat_result) -> None:
        if self.owners == "squash":
            # The guest's root stands for the host's user; nobody else can be given anything.
            if uid not in (-1, 0) or gid not in (-1, 0):
                raise OSError(errno.EPERM, "owners are squashed")
            uid = -1 if uid < 0 or st.st_uid == self._uid else self._uid
            gid = -1 if gid < 0 or st.st_gid == self._gid else self._gid
        os.chown(path, uid, gid)

    # Making, removing and renaming.

    def _parent(self, nodeid: int) -> int:
        """Return a descriptor of a directory whose entries are about to change."""
        self._refuse_hidden(nodeid)
        return self._inodes.directory(nodeid)

    def _target(self, nodeid: int) -> int:
        """Return a descriptor, O_PATH or not, of an inode that is about to be used as more than a name."""
        self._refuse_hidden(nodeid)
        return self._inodes.open(nodeid)

    def _refuse_hidden(self, nodeid: int) -> None:
        if self._inodes.is_hidden(nodeid):
            raise OSError(errno.EACCES, "an interface to the host's kernel")

    def _as_guest(self, request: _Request, make: Callable[[], object]) -> None:
        """Call `make` with the requester's fsuid and fsgid, if owners are identical."""
        if not self._acts_as_guest:
            make()
            return
        try:
            self._libc.setfsgid(request.gid)
            self._libc.setfsuid(request.uid)
            make()
        finally:
            self._libc.setfsuid(self._uid)
            self._libc.setfsgid(self._gid)

    def _mknod(self, request: _Request) -> bytes:
        mode, _rdev, _umask, _ = fuse.mknod_in.unpack_from(request.body)
        name = _name(request.body[fuse.mknod_in.size :])
        if not stat.S_IFMT(mode):
            mode |= stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise OSError(errno.EPERM, "no device nodes on a shared directory")
        parent = self._parent(request.nodeid)
        self._as_guest(request, lambda: os.mknod(name, mode & 0o177777, dir_fd=parent))
        return self._entry(request.nodeid, name)

    def _mkdir(self, request: _Request) -> bytes:
        mode, _umask = fuse.mkdir_in.unpack_from(request.body)
        name = _name(request.body[fuse.mkdir_in.size :])
        parent = self._parent(request.nodeid)
        self._as_guest(request, lambda: os.mkdir(name, mode & 0o1777, dir_fd=parent))
        return self._entry(request.nodeid, name)

    def _symlink(self, request: _Request) -> bytes:
        name, _, rest = request.body.partition(b"\0")
        name, target = _checked_name(name), _text(rest)
        parent = self._parent(request.nodeid)
        self._as_guest(request, lambda: os.symlink(target, name, dir_fd=parent))
        return self._entry(request.nodeid, name)

    def _link(self, request: _Request) -> bytes:
        (old,) = fuse.link_in.unpack_from(request.body)
        name = _name(request.body[fuse.link_in.size :])
        parent = self._parent(request.nodeid)
        os.link(_path(self._target(old)), name, dst_dir_fd=parent, follow_symlinks=True)
        return self._entry(request.nodeid, name)

    def _unlink(self, request: _Request) -> bytes:
        os.unlink(_name(request.body), dir_fd=self._parent(request.nodeid))
        return b""

    def _rmdir(self, request: _Request) -> bytes:
        os.rmdir(_name(request.body), dir_fd=self._parent(request.nodeid))
        return b""

    def _rename(self, request: _Request) -> bytes:
        (to,) = fuse.rename_in.unpack_from(request.body)
        return self._do_rename(request, to, 0, request.body[fuse.rename_in.size :])

    def _rename2(self, request: _Request) -> bytes:
        to, flags = fuse.rename2_in.unpack_from(request.body)
        if flags & ~(_RENAME_NOREPLACE | _RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "unknown flags")
        return self._do_rename(request, to, flags, request.body[fuse.rename2_in.size :])

    def _do_rename(self, request: _Request, to: int, flags: int, names: bytes) -> bytes:
        old, _, rest = names.partition(b"\0")
        old, new = _checked_name(old), _name(rest)
        inodes = self._inodes
        old_fd, new_fd = self._parent(request.nodeid), self._parent(to)
        moved = inodes.number(os.stat(old, dir_fd=old_fd, follow_symlinks=False))
        if flags:
            self._checked(
                self._libc.syscall(_SYS_RENAMEAT2[platform.machine()], old_fd, old, new_fd, new, flags)
            )
        else:
            os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        if flags & _RENAME_EXCHANGE:
            inodes.moved(
                inodes.number(os.stat(old, dir_fd=old_fd, follow_symlinks=False)), request.nodeid, old
            )
        inodes.moved(moved, to, new)
        return b""

    # Files.

    def _file(self, fh: int, nodeid: int) -> _Handle:
        handle = self._handles.get(fh)
        if handle is None or handle.nodeid != nodeid:
            raise OSError(errno.EBADF, "no such handle")
        return handle

    def _new_handle(self, fd: int, nodeid: int) -> int:
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = _Handle(fd, nodeid)
        self._inodes.open_files.setdefault(nodeid, []).append(fd)
        return fh

    def _check_handles(self) -> None:
        if len(self._handles) >= self._max_handles:
            raise OSError(errno.ENFILE, "too many open files")

    def _open(self, request: _Request) -> bytes:
        flags, open_flags = fuse.open_in.unpack_from(request.body)
        return self._open_file(request.nodeid, flags, open_flags)

    def _open_file(self, nodeid: int, flags: int, open_flags: int) -> bytes:
        writes = flags & (os.O_ACCMODE | os.O_TRUNC)
        if writes and self.read_only:
            raise OSError(errno.EROFS, "read-only")
        self._check_handles()
        inodes = self._inodes
        node = inodes.node(nodeid)
        path_fd = self._target(nodeid)
        st = os.fstat(path_fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(st.st_mode) else errno.EACCES, "not a regular file")
        fd = os.open(_path(path_fd), writes | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        if writes & os.O_TRUNC and open_flags & fuse.OPEN_KILL_SUIDGID:
            _kill_suidgid(fd)
        out_flags = 0 if writes & os.O_ACCMODE else fuse.FOPEN_NOFLUSH
        if self._unchanging or node.ctime_ns == st.st_ctime_ns:
            out_flags |= fuse.FOPEN_KEEP_CACHE
        elif st.st_ctime_ns < time.time_ns() - _SETTLED_NS:
            node.ctime_ns = st.st_ctime_ns
        return fuse.open_out.pack(self._new_handle(fd, nodeid), out_flags)

    def _create(self, request: _Request) -> bytes:
        flags, mode, _umask, open_flags = fuse.create_in.unpack_from(request.body)
        name = _name(request.body[fuse.create_in.size :])
        self._check_handles()
        parent = self._parent(request.nodeid)
        access = flags & os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        opened: list[int] = []
        try:
            self._as_guest(
                request, lambda: opened.append(os.open(name, access, mode & 0o7777, dir_fd=parent))
            )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            entry = self._entry(request.nodeid, name)  # the host made it meanwhile
            (nodeid,) = struct.unpack_from("<Q", entry)
            try:
                return entry + self._open_file(nodeid, flags, open_flags)
            except OSError:
                self._inodes.forget(nodeid, 1)
                raise
        st = os.fstat(opened[0])
        number = self._inodes.number(st)
        try:
            self._inodes.add(request.nodeid, name, number)
        except OSError:
            os.close(opened[0])
            raise
        entry = fuse.entry_out.pack(
            number, 0, self._valid_s, self._valid_s, 0, 0, *self._attributes(st, number)
        )
        out_flags = 0 if flags & os.O_ACCMODE else fuse.FOPEN_NOFLUSH
        return entry + fuse.open_out.pack(self._new_handle(opened[0], number), out_flags)

    def _read(self, request: _Request) -> int:
        fh, offset, size, _, _, _, _ = fuse.read_in.unpack_from(request.body)
        handle = self._file(fh, request.nodeid)
        views = request.chain.writable_views(16, min(size, MAX_WRITE_BYTES))
        return os.preadv(handle.fd, views, offset) if views else 0

    def _write(self, request: _Request) -> bytes:
        fh, offset, size, write_flags, _, flags, _ = fuse.write_in.unpack_from(request.body)
        handle = self._file(fh, request.nodeid)
        views = request.chain.readable_views(80, size)
        if total_bytes(views) != size or size > MAX_WRITE_BYTES:
            raise OSError(errno.EINVAL, "a size that isn't the request's")
        # The guest's idea of where the end is may be old: the host appends too. Not so for pages that are written back.
        append = os.RWF_APPEND if flags & os.O_APPEND and not write_flags & fuse.WRITE_CACHE else 0
        done = os.pwritev(handle.fd, views, offset, append) if views else 0
        if write_flags & fuse.WRITE_KILL_SUIDGID:
            _kill_suidgid(handle.fd)
        return fuse.write_out.pack(done)

    def _release(self, request: _Request) -> bytes:
        fh, _, _, _ = fuse.release_in.unpack_from(request.body)
        handle = self._file(fh, request.nodeid)
        del self._handles[fh]
        files = self._inodes.open_files[handle.nodeid]
        files.remove(handle.fd)
        if not files:
            del self._inodes.open_files[handle.nodeid]
        os.close(handle.fd)
        return b""

    def _flush(self, request: _Request) -> bytes:
        fh, _, _, _ = fuse.flush_in.unpack_from(request.body)
        os.close(
            os.dup(self._file(fh, request.nodeid).fd)
        )  # some file systems report errors of earlier writes here
        return b""

    def _fsync(self, request: _Request) -> bytes:
        fh, flags = fuse.fsync_in.unpack_from(request.body)
        fd = self._file(fh, request.nodeid).fd
        if flags & fuse.FSYNC_FDATASYNC:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return b""

    def _syncfs(self, request: _Request) -> bytes:
        fd = os.open(b".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._inodes.directory(fuse.ROOT_ID))
        try:
            self._checked(self._libc.syncfs(fd))
        finally:
            os.close(fd)
        return b""

    def _fallocate(self, request: _Request) -> bytes:
        fh, offset, length, mode = fuse.fallocate_in.unpack_from(request.body)
        fd = self._file(fh, request.nodeid).fd
        where = ctypes.c_int64(offset), ctypes.c_int64(length)
        self._checked(self._libc.fallocate(fd, ctypes.c_int(mode), *where))
        return b""

    def _lseek(self, request: _Request) -> bytes:
        fh, offset, whence = fuse.lseek_in.unpack_from(request.body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the guest's own to do")
        return fuse.lseek_out.pack(os.lseek(self._file(fh, request.nodeid).fd, offset, whence))

    def _copy_file_range(self, request: _Request) -> bytes:
        fh_in, off_in, nodeid_out, fh_out, off_out, size, _ = fuse.copy_file_range_in.unpack_from(
            request.body
        )
        source, target = self._file(fh_in, request.nodeid), self._file(fh_out, nodeid_out)
        done = os.copy_file_range(source.fd, target.fd, min(size, _MAX_COPY_BYTES), off_in, off_out)
        return fuse.write_out.pack(done)

    # Directories.

    def _opendir(self, request: _Request) -> bytes:
        self._check_handles()
        path_fd = self._inodes.directory(request.nodeid)
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=path_fd)
        flags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_CACHE_DIR if self._unchanging else 0
        return fuse.open_out.pack(self._new_handle(fd, request.nodeid), flags)

    def _readdir(self, request: _Request) -> bytes:
        return self._list(request, plain=True)

    def _readdirplus(self, request: _Request) -> bytes:
        return self._list(request, plain=False)

    def _list(self, request: _Request, plain: bool) -> bytes:
        """Return as many ``fuse_dirent`` (plain) or ``fuse_direntplus`` as there's room for; the host's offsets are the guest's."""
        fh, offset, size, _, _, _, _ = fuse.read_in.unpack_from(request.body)
        handle = self._file(fh, request.nodeid)
        room = min(size, request.chain.writable_bytes - 16, MAX_WRITE_BYTES)
        nodeid, inodes = request.nodeid, self._inodes
        hidden = inodes.is_hidden(nodeid)
        root_ino = inodes.number(os.fstat(handle.fd)) if nodeid == fuse.ROOT_ID else 0
        head_bytes = fuse.dirent.size if plain else _READ_PLUS_NAME
        if offset != handle.position:
            os.lseek(handle.fd, offset, os.SEEK_SET)
            handle.position = offset
        # An entry takes at least as much room in the answer as in the host's listing, with attributes about five times.
        listed = self._getdents(handle.fd, room if plain else room // 4)
        out = bytearray()
        at = 0
        while at < len(listed):
            st_ino, next_offset, record_bytes, kind = _DIRENT64.unpack_from(listed, at)
            name = listed[at + 19 : at + record_bytes]
            name = name[: name.index(0)]
            at += record_bytes
            dots = name == b"." or name == b".."
            if hidden and not dots:
                continue
            padded_bytes = head_bytes + (len(name) + 7 & ~7)
            if len(out) + padded_bytes > room:
                if not out:
                    raise OSError(errno.EINVAL, "no room for one entry")
                break
            ino = root_ino if dots and root_ino else inodes.number_in(nodeid, st_ino)
            if not plain:
                entry = b""
                if not dots:
                    try:
                        entry = self._entry(nodeid, name)
                        ino = int.from_bytes(entry[:8], "little")
                    except OSError:
                        entry = b""  # gone meanwhile, or too many: the guest asks again if it wants it
                out += entry or bytes(fuse.entry_out.size)
            out += fuse.dirent.pack(ino, next_offset & 0xFFFFFFFFFFFFFFFF, len(name), kind)
            out += name.ljust(len(name) + 7 & ~7, b"\0")
            handle.position = next_offset
        else:
            return bytes(out)
        # Stopped early: the descriptor stands further on than what was told.
        handle.position = -1
        return bytes(out)

    def _getdents(self, fd: int, room: int) -> bytes:
        size = max(min(room, len(self._listing)), 512)
        read = self._checked(self._libc.syscall(_SYS_GETDENTS64[platform.machine()], fd, self._listing, size))
        return ctypes.string_at(self._listing, read)

    # Extended attributes: those that are users' alone.

    def _getxattr(self, request: _Request) -> bytes:
        (size,) = fuse.getxattr_in.unpack_from(request.body)
        name = _xattr_name(request.body[8:])
        return _sized(os.getxattr(_path(self._target(request.nodeid)), name), size)

    def _listxattr(self, request: _Request) -> bytes:
        (size,) = fuse.getxattr_in.unpack_from(request.body)
        names = map(os.fsencode, os.listxattr(_path(self._target(request.nodeid))))
        return _sized(b"".join(name + b"\0" for name in names if name.startswith(b"user.")), size)

    def _setxattr(self, request: _Request) -> bytes:
        size, flags = fuse.setxattr_in.unpack_from(request.body)
        raw, _, rest = request.body[fuse.setxattr_in.size :].partition(b"\0")
        name = _xattr_name(raw + b"\0")
        if size > _MAX_XATTR_BYTES or len(rest) < size:
            raise OSError(errno.E2BIG, "a value's size that isn't the request's")
        os.setxattr(_path(self._target(request.nodeid)), name, rest[:size], flags)
        return b""

    def _removexattr(self, request: _Request) -> bytes:
        os.removexattr(_path(self._target(request.nodeid)), _xattr_name(request.body))
        return b""

    def _checked(self, result: int) -> int:
        """Raise what errno says if a call into the C library failed."""
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


def _no_answer(request: _Request) -> None:
    return


def _read_only(request: _Request) -> bytes:
    raise OSError(errno.EROFS, "read-only")


def _path(fd: int) -> bytes:
    """Return a path that means exactly the inode behind `fd`, whatever happens to its names."""
    return b"/proc/self/fd/%d" % fd


def _text(raw: bytes) -> bytes:
    """Return what comes before the terminating NUL."""
    end = raw.find(0)
    if end < 0:
        raise OSError(errno.EINVAL, "text without an end")
    return raw[:end]


def _name(raw: bytes) -> bytes:
    return _checked_name(_text(raw))


def _checked_name(name: bytes) -> bytes:
    """Return `name` if it names something in its directory: the check that all safety begins with."""
    if not name or name == b"." or name == b".." or b"/" in name:
        raise OSError(errno.EINVAL, "not a name in a directory")
    if len(name) > 255:
        raise OSError(errno.ENAMETOOLONG, "a name too long")
    return name


def _xattr_name(raw: bytes) -> bytes:
    name = _text(raw)
    if not name.startswith(b"user."):
        raise OSError(errno.EOPNOTSUPP, "users' attributes only")
    return name


def _sized(value: bytes, size: int) -> bytes:
    """Return an attribute's value, or how large it is if the guest asks with a size of 0."""
    if not size:
        return fuse.getxattr_out.pack(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, "larger than the guest's buffer")
    return value


def _kill_suidgid(fd: int) -> None:
    """Take away the set-user-id and set-group-id bits, as the kernel does when somebody else writes to a program."""
    mode = os.fstat(fd).st_mode
    kill = mode & stat.S_ISUID
    if mode & stat.S_IXGRP:
        kill |= mode & stat.S_ISGID
    if kill:
        os.chmod(_path(fd), stat.S_IMODE(mode) & ~kill)
