"""virtio-fs and our FUSE server, as a guest's driver sees them."""

import errno
import json
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvmkit.devices.fuse import inodes as inodes_module
from kvmkit.devices.fuse import protocol as fuse
from kvmkit.devices.fuse.inodes import Inodes
from kvmkit.devices.fuse.passthrough import Owners, PassthroughFs
from kvmkit.devices.virtio.fs import Fs
from kvmkit.testing.fuse import HIPRIO, REQUESTS, Fuse, code_of
from kvmkit.testing.fuzz.fs import mutate_and_feed
from kvmkit.testing.virtqueue import Driver

ROOT = fuse.ROOT_ID


@contextmanager
def serve(
    directory: Path, *, read_only: bool = False, unchanging: bool = False, owners: Owners | None = None
) -> Iterator[Fuse]:
    server = PassthroughFs(directory, read_only=read_only, unchanging=unchanging, owners=owners)
    with Driver(Fs("tag", server, name="fs")) as driver:
        yield Fuse(driver)
        assert not driver.broken


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Fuse]:
    with serve(tmp_path) as guest:
        yield guest


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert code_of(caught.value) == code


def open_fds() -> list[str]:
    return sorted(
        f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    )


# The device and the session.


def test_the_configuration_names_the_tag_and_one_queue(guest: Fuse) -> None:
    assert guest.driver.device.config() == b"tag".ljust(36, b"\0") + b"\1\0\0\0"


@pytest.mark.parametrize("tag", ["", "x" * 37, "a\0b"])
def test_a_tag_is_checked(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a tag is"):
        Fs(tag, PassthroughFs(tmp_path, read_only=True), name="fs")


def test_init_takes_what_is_offered_and_known(guest: Fuse) -> None:
    major, minor, readahead, flags, *_, max_pages, _, flags2 = guest.init()
    assert (major, minor, readahead, max_pages, flags2) == (7, 38, 1 << 17, 256, 0)
    assert flags & fuse.DO_READDIRPLUS and not flags & fuse.CACHE_SYMLINKS
    assert not flags & 1 << 16  # WRITEBACK_CACHE
    assert guest.init(flags=fuse.ASYNC_READ | 1 << 31)[3] == fuse.ASYNC_READ
    with refused("EPROTO"):
        guest.init(minor=30)


def test_a_session_begins_anew_after_reset(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"x")
    before = open_fds()
    node = guest.lookup(ROOT, b"f").nodeid
    fh = guest.open(node)
    guest.driver.reset()
    assert open_fds() == before
    guest.driver.activate()
    guest.init()
    with refused("EBADF"):
        guest.read(node, fh, 1)
    with refused("ESTALE"):
        guest.getattr(node)


def test_closing_closes_every_descriptor(tmp_path: Path) -> None:
    tmp_path.joinpath("d").mkdir()
    tmp_path.joinpath("d/f").write_bytes(b"x")
    before = open_fds()
    with serve(tmp_path) as guest:
        guest.open(guest.walk(b"d/f"))
        guest.opendir(guest.walk(b"d"))
    assert open_fds() == before


# Reading.


def test_attributes_are_the_hosts(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"hello")
    path.chmod(0o640)
    os.utime(path, ns=(-1_500_000_000, 1_700_000_000_123_456_789))
    entry = guest.lookup(ROOT, b"f")
    st = path.stat()
    assert entry.attr == guest.getattr(entry.nodeid)
    assert (entry.attr.ino, entry.attr.size, entry.attr.mode) == (st.st_ino, 5, 0o100640)
    assert entry.attr.mtime_ns == st.st_mtime_ns == 1_700_000_000_123_456_789
    assert entry.attr.atime_ns - (1 << 64) * 10**9 == st.st_atime_ns  # Linux reads the seconds as signed
    assert entry.valid_s == 0
    assert guest.getattr(ROOT).ino == tmp_path.stat().st_ino


def test_data_comes_from_the_file(guest: Fuse, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(300_000)
    tmp_path.joinpath("f").write_bytes(data)
    node = guest.lookup(ROOT, b"f").nodeid
    fh = guest.open(node)
    assert guest.read(node, fh, 4096) == data[:4096]
    assert guest.read(node, fh, 300_000, 7) == data[7:]
    assert guest.read(node, fh, 10, 299_995) == data[-5:]
    assert guest.read(node, fh, 10, 300_000) == b""
    with refused("EINVAL"):
        guest.read(node, fh, 10, 1 << 63)
    guest.release(node, fh)
    with refused("EBADF"):
        guest.read(node, fh, 1)


def test_a_read_gets_no_more_than_its_buffers_hold(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"0123456789")
    node = guest.lookup(ROOT, b"f").nodeid
    fh = guest.open(node)
    assert guest.send(fuse.READ, node, fuse.read_in.pack(fh, 0, 1 << 31, 0, 0, 0, 0), 4) == b"0123"
    assert guest.send(fuse.READ, node, fuse.read_in.pack(fh, 0, 1 << 31, 0, 0, 0, 0), 0) == b""


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_a_listing_is_complete(guest: Fuse, tmp_path: Path, plus: bool, size: int) -> None:
    names = {b"n%d" % i * (i % 40 + 1) for i in range(200)}
    for name in names:
        os.mknod(tmp_path / os.fsdecode(name))
    found = guest.listdir(ROOT, plus=plus, size=size)
    assert sorted(entry.name for entry in found) == sorted(names)
    for entry in found:
        st = (tmp_path / os.fsdecode(entry.name)).stat()
        assert (entry.ino, entry.kind) == (st.st_ino, stat.S_IFREG >> 12)
        assert not plus or (entry.entry and entry.entry.attr.ino == st.st_ino)


def test_a_listing_goes_on_from_any_entry(guest: Fuse, tmp_path: Path) -> None:
    for i in range(100):
        os.mknod(tmp_path / f"file{i}")
    fh = guest.opendir(ROOT)
    entries = guest.readdir(ROOT, fh, size=1 << 16)
    assert {b".", b".."} <= {entry.name for entry in entries}
    for i in (50, 3, 99, 0):
        assert guest.readdir(ROOT, fh, entries[i].offset, 256)[0] == entries[i + 1]
    assert guest.readdir(ROOT, fh, entries[-1].offset) == []
    with refused("EINVAL"):
        guest.readdir(ROOT, fh, size=8)


def test_readdirplus_counts_as_lookups(guest: Fuse, tmp_path: Path) -> None:
    os.mknod(tmp_path / "f")
    (entry,) = guest.listdir(ROOT, plus=True)
    assert entry.entry
    node = guest.lookup(ROOT, b"f").nodeid
    assert node == entry.entry.nodeid
    guest.forget(node)
    guest.getattr(node)
    guest.forget(node)
    with refused("ESTALE"):
        guest.getattr(node)


def test_forgetting(guest: Fuse, tmp_path: Path) -> None:
    os.mknod(tmp_path / "f")
    os.mknod(tmp_path / "g")
    f, g = guest.lookup(ROOT, b"f").nodeid, guest.lookup(ROOT, b"g").nodeid
    guest.lookup(ROOT, b"f")
    body = fuse.batch_forget_in.pack(2) + fuse.forget_one.pack(f, 2) + fuse.forget_one.pack(g, 9)
    header = fuse.in_header.pack(40 + len(body), fuse.BATCH_FORGET, 1, 0, 0, 0, 0, 0, 0)
    guest.driver.add(HIPRIO, [header, body])
    guest.driver.kick(HIPRIO)
    assert guest.driver.used(HIPRIO)[0].written_bytes == 0
    for node in (f, g):
        with refused("ESTALE"):
            guest.getattr(node)
    guest.forget(ROOT, 1 << 60)
    guest.forget(12345)
    assert guest.getattr(ROOT).nlink


def test_statfs(guest: Fuse, tmp_path: Path) -> None:
    os.mknod(tmp_path / "f")
    st = os.statvfs(tmp_path)
    raw = guest.send(fuse.STATFS, guest.lookup(ROOT, b"f").nodeid)
    blocks, *_, bsize, namelen, frsize, _ = fuse.statfs_out.unpack(raw)
    assert (blocks, bsize, namelen, frsize) == (st.f_blocks, st.f_bsize, st.f_namemax, st.f_frsize)


def test_access(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"")
    node = guest.lookup(ROOT, b"f").nodeid
    guest.send(fuse.ACCESS, node, fuse.access_in.pack(os.R_OK | os.W_OK))
    with refused("EACCES"):
        guest.send(fuse.ACCESS, node, fuse.access_in.pack(os.X_OK))


# Writing.


def test_create_write_read(guest: Fuse, tmp_path: Path) -> None:
    entry, fh = guest.create(ROOT, b"f", mode=0o606)
    assert entry.attr.mode == 0o100606  # whatever umask this process has
    assert guest.write(entry.nodeid, fh, b"hello") == 5
    assert guest.write(entry.nodeid, fh, b"J") == 1
    assert guest.read(entry.nodeid, fh, 9) == b"Jello"
    guest.fsync(entry.nodeid, fh)
    guest.fsync(entry.nodeid, fh, fuse.FSYNC_FDATASYNC)
    guest.send(fuse.FLUSH, entry.nodeid, fuse.flush_in.pack(fh, 0, 0, 0))
    guest.release(entry.nodeid, fh)
    assert tmp_path.joinpath("f").read_bytes() == b"Jello"
    with refused("EEXIST"):
        guest.create(ROOT, b"f", os.O_EXCL | os.O_RDWR)
    again, fh = guest.create(ROOT, b"f", os.O_RDWR)  # the host was quicker
    assert again.nodeid == entry.nodeid and guest.read(entry.nodeid, fh, 9) == b"Jello"
    fh = guest.open(entry.nodeid, os.O_RDWR | os.O_TRUNC)
    assert guest.getattr(entry.nodeid, fh).size == 0


def test_appending_goes_to_where_the_end_is_now(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a")
    node = guest.lookup(ROOT, b"log").nodeid
    fh = guest.open(node, os.O_WRONLY | os.O_APPEND)
    with path.open("ab") as file:
        file.write(b"host")
    guest.write(node, fh, b"b", 1, os.O_APPEND)
    assert path.read_bytes() == b"ahostb"
    guest.write(node, fh, b"A", 0, os.O_APPEND, fuse.WRITE_CACHE)  # a page of a mapping
    assert path.read_bytes() == b"Ahostb"


def test_a_write_can_lie_about_its_size(guest: Fuse, tmp_path: Path) -> None:
    entry, fh = guest.create(ROOT, b"f")
    for size in (6, 1 << 20, 0xFFFFFFFF):
        with refused("EINVAL"):
            guest.send(fuse.WRITE, entry.nodeid, fuse.write_in.pack(fh, 0, size, 0, 0, 0, 0) + b"hello")
    with refused("EINVAL"):
        guest.write(entry.nodeid, fh, b"x", 1 << 63)
    assert guest.write(entry.nodeid, fh, b"") == 0
    assert tmp_path.joinpath("f").stat().st_size == 0


def test_a_handle_writes_only_if_opened_so(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"x")
    tmp_path.joinpath("g").write_bytes(b"x")
    node = guest.lookup(ROOT, b"f").nodeid
    fh = guest.open(node)
    with refused("EBADF"):
        guest.write(node, fh, b"y")
    with refused("EBADF"):
        guest.read(guest.lookup(ROOT, b"g").nodeid, fh, 1)  # of another inode


def test_setattr(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"hello")
    node = guest.lookup(ROOT, b"f").nodeid
    assert guest.setattr(node, fuse.FATTR_MODE, mode=0o100755).mode == 0o100755
    assert guest.setattr(node, fuse.FATTR_SIZE, size=2).size == 2
    attr = guest.setattr(node, fuse.FATTR_ATIME, atime=(-5, 7))
    assert path.stat().st_atime_ns == -5_000_000_000 + 7
    assert attr.mtime_ns == path.stat().st_mtime_ns
    guest.setattr(node, fuse.FATTR_MTIME, mtime=(1000, 9))
    assert (path.stat().st_mtime_ns, path.stat().st_atime_ns) == (1_000_000_000_009, -5_000_000_000 + 7)
    guest.setattr(node, fuse.FATTR_MTIME | fuse.FATTR_MTIME_NOW)
    assert path.stat().st_mtime > 1e9
    with refused("EINVAL"):
        guest.setattr(node, fuse.FATTR_SIZE, size=1 << 63)
    with refused("EINVAL"):
        guest.setattr(node, fuse.FATTR_MTIME, mtime=(0, 1 << 31))
    with refused("EINVAL"):
        guest.setattr(ROOT, fuse.FATTR_SIZE, size=0)
    fh = guest.open(node, os.O_RDWR)
    assert guest.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_FH, fh=fh, size=9).size == 9
    with refused("EBADF"):
        guest.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_FH, fh=fh + 1, size=9)


def test_attributes_of_a_symlink_are_its_own(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"")
    before = tmp_path.joinpath("f").stat()
    node = guest.symlink(ROOT, b"l", b"f").nodeid
    guest.setattr(node, fuse.FATTR_MTIME, mtime=(5, 0))
    assert tmp_path.joinpath("l").lstat().st_mtime == 5
    guest.setattr(node, fuse.FATTR_UID, uid=os.geteuid())
    with refused("ENOTSUP"):
        guest.setattr(node, fuse.FATTR_MODE, mode=0o777)
    assert tmp_path.joinpath("f").stat() == before


def test_set_user_id_is_lost_by_writing(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    node = guest.lookup(ROOT, b"f").nodeid

    def lost(act: Callable[[], object]) -> bool:
        path.chmod(0o6755)
        act()
        return path.stat().st_mode & 0o7777 == 0o755

    fh = guest.open(node, os.O_RDWR)
    assert lost(lambda: guest.write(node, fh, b"y", write_flags=fuse.WRITE_KILL_SUIDGID))
    assert lost(lambda: guest.open(node, os.O_RDWR | os.O_TRUNC, fuse.OPEN_KILL_SUIDGID))
    assert lost(lambda: guest.setattr(node, fuse.FATTR_SIZE | fuse.FATTR_KILL_SUIDGID, size=3))
    assert not lost(lambda: guest.open(node))


def test_names_come_and_go(guest: Fuse, tmp_path: Path) -> None:
    directory = guest.mkdir(ROOT, b"d", 0o1751)
    assert directory.attr.mode == 0o041751
    file = guest.mknod(directory.nodeid, b"f", stat.S_IFREG | 0o642)
    assert file.attr.mode == 0o100642
    assert guest.mknod(directory.nodeid, b"fifo", stat.S_IFIFO | 0o600).attr.mode == 0o010600
    assert guest.link(file.nodeid, ROOT, b"hard").nodeid == file.nodeid
    link = guest.symlink(ROOT, b"soft", b"../../etc/passwd")
    assert guest.readlink(link.nodeid) == b"../../etc/passwd"
    assert guest.link(link.nodeid, ROOT, b"soft2").nodeid == link.nodeid
    assert tmp_path.joinpath("soft2").is_symlink()
    guest.rename(directory.nodeid, b"f", ROOT, b"g")
    assert guest.getattr(file.nodeid).nlink == 2
    with refused("ENOTEMPTY"):
        guest.rmdir(ROOT, b"d")
    guest.unlink(directory.nodeid, b"fifo")
    guest.rmdir(ROOT, b"d")
    for name in (b"hard", b"g", b"soft", b"soft2"):
        guest.unlink(ROOT, name)
    assert list(tmp_path.iterdir()) == []
    with refused("ESTALE"):
        guest.getattr(file.nodeid)
    for mode in (stat.S_IFCHR, stat.S_IFBLK):
        with refused("EPERM"):
            guest.mknod(ROOT, b"null", mode | 0o666, 1 << 8 | 3)


def test_rename2(guest: Fuse, tmp_path: Path) -> None:
    tmp_path.joinpath("a").write_bytes(b"a")
    tmp_path.joinpath("b").mkdir()
    tmp_path.joinpath("b/f").write_bytes(b"f")
    a, b = guest.lookup(ROOT, b"a").nodeid, guest.lookup(ROOT, b"b").nodeid
    f = guest.lookup(b, b"f").nodeid
    with refused("EEXIST"):
        guest.rename(ROOT, b"a", ROOT, b"b", 1)
    guest.rename(ROOT, b"a", ROOT, b"b", 2)
    assert (guest.getattr(a).size, guest.getattr(f).size) == (1, 1)
    assert tmp_path.joinpath("b").is_file() and tmp_path.joinpath("a/f").is_file()
    with refused("EINVAL"):
        guest.rename(ROOT, b"a", ROOT, b"c", 4)


def test_an_open_file_outlives_its_name(guest: Fuse) -> None:
    entry, fh = guest.create(ROOT, b"f")
    guest.unlink(ROOT, b"f")
    guest.write(entry.nodeid, fh, b"still")
    assert guest.read(entry.nodeid, fh, 9) == b"still"
    assert guest.getattr(entry.nodeid).size == 5
    assert guest.setattr(entry.nodeid, fuse.FATTR_SIZE, size=1).size == 1
    guest.release(entry.nodeid, fh)
    with refused("ESTALE"):
        guest.getattr(entry.nodeid)


def test_holes_and_copies(guest: Fuse, tmp_path: Path) -> None:
    entry, fh = guest.create(ROOT, b"f")
    node = entry.nodeid
    guest.write(node, fh, b"x" * 200_000)
    guest.fallocate(node, fh, 65536, 65536, 3)  # PUNCH_HOLE | KEEP_SIZE
    assert tmp_path.joinpath("f").read_bytes() == b"x" * 65536 + bytes(65536) + b"x" * (200_000 - 131072)
    assert guest.lseek(node, fh, 0, os.SEEK_HOLE) == 65536
    assert guest.lseek(node, fh, 65536, os.SEEK_DATA) == 131072
    with refused("ENXIO"):
        guest.lseek(node, fh, 200_000, os.SEEK_DATA)
    with refused("EINVAL"):
        guest.lseek(node, fh, 0, os.SEEK_SET)
    guest.fallocate(node, fh, 0, 300_000)
    assert guest.getattr(node).size == 300_000
    with refused("ENOTSUP"):
        guest.fallocate(node, fh, 0, 4096, 1 << 30)
    other, other_fh = guest.create(ROOT, b"g")
    assert guest.copy_file_range(node, fh, 65530, other.nodeid, other_fh, 2, 10) == 10
    assert tmp_path.joinpath("g").read_bytes() == bytes(2) + b"x" * 6 + bytes(4)


def test_extended_attributes_of_users(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"")
    try:
        os.setxattr(path, "user.one", b"1")
    except OSError:
        pytest.skip("no user.* attributes on this file system")
    node = guest.lookup(ROOT, b"f").nodeid
    guest.setxattr(node, b"user.two", b"\0two")
    with refused("EEXIST"):
        guest.setxattr(node, b"user.two", b"", 1)  # XATTR_CREATE
    assert os.getxattr(path, "user.two") == b"\0two"
    assert guest.getxattr(node, b"user.two") == b"\0two"
    assert guest.getxattr(node, b"user.two", 0) == struct.pack("<II", 4, 0)
    with refused("ERANGE"):
        guest.getxattr(node, b"user.two", 3)
    assert sorted(guest.listxattr(node).split(b"\0")) == [b"", b"user.one", b"user.two"]
    guest.removexattr(node, b"user.one")
    with refused("ENODATA"):
        guest.getxattr(node, b"user.one")
    for name in (b"security.capability", b"trusted.x", b"system.posix_acl_access", b"user"):
        for act in (guest.getxattr, guest.removexattr, lambda n, name: guest.setxattr(n, name, b"x")):
            with refused("ENOTSUP"):
                act(node, name)
    with refused("E2BIG"):
        body = fuse.setxattr_in.pack(0xFFFFFFFF, 0) + b"user.x\0value"
        guest.send(fuse.SETXATTR, node, body)


# What may be cached, and what not.


def test_data_is_kept_over_an_open_while_the_file_stays(guest: Fuse, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    node = guest.lookup(ROOT, b"f").nodeid
    assert not guest.open_raw(node)[1] & fuse.FOPEN_KEEP_CACHE
    # Changed a moment ago: it might change again without its ctime showing that.
    assert not guest.open_raw(node)[1] & fuse.FOPEN_KEEP_CACHE
    while time.time_ns() - path.stat().st_ctime_ns < 110_000_000:
        threading.Event().wait(0.01)
    assert not guest.open_raw(node)[1] & fuse.FOPEN_KEEP_CACHE
    assert guest.open_raw(node)[1] & fuse.FOPEN_KEEP_CACHE
    path.write_bytes(b"new")
    assert not guest.open_raw(node)[1] & fuse.FOPEN_KEEP_CACHE


def test_an_unchanging_directory_is_cached_for_long(tmp_path: Path) -> None:
    tmp_path.joinpath("f").write_bytes(b"x")
    with serve(tmp_path, read_only=True, unchanging=True) as guest:
        assert guest.init()[3] & fuse.CACHE_SYMLINKS
        entry = guest.lookup(ROOT, b"f")
        assert entry.valid_s >= 3600
        assert guest.open_raw(entry.nodeid)[1] & fuse.FOPEN_KEEP_CACHE
        missing = guest.lookup(ROOT, b"missing")
        assert missing.nodeid == 0 and missing.valid_s >= 3600
        with refused("ENOSYS"):
            guest.getxattr(entry.nodeid, b"user.x")
    with pytest.raises(ValueError, match="unchanging"):
        PassthroughFs(tmp_path, read_only=False, unchanging=True)


# A read-only directory.


def test_read_only_refuses_whatever_writes(tmp_path: Path) -> None:
    tmp_path.joinpath("d").mkdir()
    tmp_path.joinpath("f").write_bytes(b"x")
    with serve(tmp_path, read_only=True) as guest:
        f, d = guest.lookup(ROOT, b"f").nodeid, guest.lookup(ROOT, b"d").nodeid
        fh = guest.open(f)
        attempts: list[Callable[[], object]] = [
            lambda: guest.open(f, os.O_RDWR),
            lambda: guest.open(f, os.O_WRONLY),
            lambda: guest.open(f, os.O_RDONLY | os.O_TRUNC),
            lambda: guest.create(ROOT, b"new"),
            lambda: guest.create(ROOT, b"f", os.O_RDONLY),
            lambda: guest.write(f, fh, b"y"),
            lambda: guest.setattr(f, fuse.FATTR_SIZE, size=0),
            lambda: guest.setattr(f, fuse.FATTR_MODE, mode=0),
            lambda: guest.mkdir(ROOT, b"new"),
            lambda: guest.mknod(ROOT, b"new", stat.S_IFREG),
            lambda: guest.symlink(ROOT, b"new", b"f"),
            lambda: guest.link(f, ROOT, b"new"),
            lambda: guest.unlink(ROOT, b"f"),
            lambda: guest.rmdir(ROOT, b"d"),
            lambda: guest.rename(ROOT, b"f", d, b"f"),
            lambda: guest.rename(ROOT, b"f", d, b"f", 2),
            lambda: guest.setxattr(f, b"user.x", b"y"),
            lambda: guest.removexattr(f, b"user.x"),
            lambda: guest.fallocate(f, fh, 0, 10),
            lambda: guest.copy_file_range(f, fh, 0, f, fh, 5, 1),
            lambda: guest.send(fuse.ACCESS, f, fuse.access_in.pack(os.W_OK)),
        ]
        for attempt in attempts:
            with refused("EROFS"):
                attempt()
        assert guest.read(f, fh, 9) == b"x"
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


# Owners.


def test_identity_gives_files_to_whoever_makes_them(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    tmp_path.chmod(0o777)
    with serve(tmp_path) as guest:
        guest.uid, guest.gid = 1234, 5678
        directory = guest.mkdir(ROOT, b"d")
        guest.create(directory.nodeid, b"f")
        guest.symlink(directory.nodeid, b"l", b"f")
        guest.mknod(directory.nodeid, b"n", stat.S_IFREG)
        for path in ("d", "d/f", "d/l", "d/n"):
            st = tmp_path.joinpath(path).lstat()
            assert (st.st_uid, st.st_gid) == (1234, 5678)
        guest.uid = 4321
        with refused("EACCES"):
            guest.mkdir(directory.nodeid, b"mine")
        guest.uid = guest.gid = 0
        assert guest.mkdir(directory.nodeid, b"roots").attr.uid == 0
        node = guest.walk(b"d/f")
        attr = guest.setattr(node, fuse.FATTR_UID | fuse.FATTR_GID, uid=7, gid=8)
        assert (attr.uid, attr.gid) == (7, 8)
    assert os.stat(tmp_path / "d/f").st_uid == 7


def test_squashed_owners(tmp_path: Path) -> None:
    me, my_group = os.geteuid(), os.getegid()
    tmp_path.joinpath("mine").write_bytes(b"")
    with serve(tmp_path, owners="squash") as guest:
        guest.uid = guest.gid = 77
        entry, _ = guest.create(ROOT, b"f")
        st = tmp_path.joinpath("f").stat()
        assert (st.st_uid, st.st_gid, entry.attr.uid, entry.attr.gid) == (me, my_group, 0, 0)
        node = guest.lookup(ROOT, b"mine").nodeid
        guest.setattr(node, fuse.FATTR_UID | fuse.FATTR_GID, uid=0, gid=0)
        with refused("EPERM"):
            guest.setattr(node, fuse.FATTR_UID, uid=77)
        if not me:
            os.chown(tmp_path / "mine", 77, 77)
            attr = guest.getattr(node)
            assert (attr.uid, attr.gid) == (65534, 65534)


def as_user(uid: int, act: Callable[[], object]) -> object:
    """Return what `act` returns in a child process that belongs to `uid`, as JSON."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(write_end, json.dumps(act()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        output = pipe.read()
    os.waitpid(child, 0)
    return json.loads(output)


def error_of(act: Callable[[], object]) -> str | None:
    try:
        act()
    except OSError as error:
        return code_of(error)
    return None


def test_an_ordinary_user_shares_a_directory() -> None:
    if os.geteuid():
        pytest.skip("this takes another user")
    uid = 65533
    with tempfile.TemporaryDirectory() as directory:
        for name, mode in (("roots", 0o644), ("secret", 0o600)):
            Path(directory, name).write_bytes(b"x")
            Path(directory, name).chmod(mode)
        os.chown(directory, uid, uid)

        def share() -> object:
            with serve(Path(directory)) as guest:
                entry, _ = guest.create(ROOT, b"new", mode=0o600)
                secret = guest.lookup(ROOT, b"secret").nodeid
                return {
                    "new": [entry.attr.uid, entry.attr.gid, entry.attr.mode],
                    "roots": guest.lookup(ROOT, b"roots").attr.uid,
                    "secret": error_of(lambda: guest.open(secret)),
                    "chown": error_of(lambda: guest.setattr(entry.nodeid, fuse.FATTR_UID, uid=5)),
                    "chown secret": error_of(lambda: guest.setattr(secret, fuse.FATTR_UID, uid=0)),
                }

        assert as_user(uid, share) == {
            "new": [0, 0, 0o100600],
            "roots": 65534,
            "secret": "EACCES",
            "chown": "EPERM",
            "chown secret": "EPERM",
        }
        assert Path(directory, "new").stat().st_uid == uid


def test_an_ordinary_user_shares_the_root() -> None:
    if os.geteuid():
        pytest.skip("this takes another user")
    program = os.path.realpath("/bin/sh").encode()[1:]

    def share() -> object:
        with serve(Path("/"), read_only=True, unchanging=True) as guest:
            node = guest.walk(program)
            shadow = guest.walk(b"etc/shadow")
            return {
                "owner": guest.getattr(node).uid,
                "data": guest.read(node, guest.open(node), 4).hex(),
                "shadow": error_of(lambda: guest.open(shadow)),
            }

    assert as_user(65533, share) == {"owner": 0, "data": b"\x7fELF".hex(), "shadow": "EACCES"}


# No way out.


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[tuple[Fuse, Path]]:
    """A guest in `tmp_path`/shared, beside which lies a secret."""
    shared = tmp_path / "shared"
    shared.mkdir()
    tmp_path.joinpath("secret").write_bytes(b"secret")
    with serve(shared) as guest:
        yield guest, shared


@pytest.mark.parametrize(
    "name", [b"..", b".", b"", b"../secret", b"/etc/passwd", b"d/f", b"d/", b"/", b"../shared/d"]
)
def test_only_single_components_are_names(secret: tuple[Fuse, Path], name: bytes) -> None:
    guest, shared = secret
    d = guest.mkdir(ROOT, b"d").nodeid
    f = guest.mknod(d, b"f", stat.S_IFREG).nodeid
    attempts: list[Callable[[], object]] = [
        lambda: guest.lookup(ROOT, name),
        lambda: guest.lookup(d, name),
        lambda: guest.create(ROOT, name),
        lambda: guest.mkdir(ROOT, name),
        lambda: guest.mknod(ROOT, name, stat.S_IFREG),
        lambda: guest.symlink(ROOT, name, b"f"),
        lambda: guest.link(f, ROOT, name),
        lambda: guest.unlink(d, name),
        lambda: guest.rmdir(ROOT, name),
        lambda: guest.rename(ROOT, name, ROOT, b"x"),
        lambda: guest.rename(ROOT, b"d", ROOT, name),
        lambda: guest.rename(ROOT, b"d", ROOT, name, 2),
    ]
    for attempt in attempts:
        with refused("EINVAL"):
            attempt()
    assert shared.joinpath("d/f").exists() and os.listdir(shared) == ["d"]


def test_names_end_and_have_an_end(guest: Fuse) -> None:
    with refused("ENAMETOOLONG"):
        guest.lookup(ROOT, b"x" * 256)
    with refused("ENOENT"):
        guest.lookup(ROOT, b"x" * 255)
    with refused("EINVAL"):
        guest.send(fuse.LOOKUP, ROOT, b"no end")
    with refused("EINVAL"):
        guest.send(fuse.LOOKUP, ROOT)
    with refused("ENOENT"):  # what comes after the NUL is nothing
        guest.lookup(ROOT, b"a\0/etc")
    with refused("EINVAL"):
        guest.send(fuse.SYMLINK, ROOT, b"name\0target without end")
    with refused("ENAMETOOLONG"):
        guest.symlink(ROOT, b"l", b"x" * 4097)
    with refused("E2BIG"):
        guest.send(fuse.LOOKUP, ROOT, b"x" * (1 << 18) + b"\0")


def test_a_symlink_is_text(secret: tuple[Fuse, Path]) -> None:
    guest, _ = secret
    for i, target in enumerate((b"../secret", b"/etc/passwd", b"/proc/self/root", b"..")):
        name = b"l%d" % i
        node = guest.symlink(ROOT, name, target).nodeid
        assert guest.readlink(node) == target
        with refused("EACCES"):
            guest.open(node)
        with refused("ESTALE"):
            guest.opendir(node)
        with refused("ESTALE"):
            guest.lookup(node, b"secret")
        with refused("EEXIST"):
            guest.create(ROOT, name, os.O_RDWR | os.O_EXCL)
        with refused("EACCES"):
            guest.create(ROOT, name)
        with refused("EINVAL"):
            guest.setattr(node, fuse.FATTR_SIZE, size=0)


def test_an_inode_swapped_for_a_symlink_is_stale(secret: tuple[Fuse, Path]) -> None:
    guest, shared = secret
    shared.joinpath("f").write_bytes(b"x")
    shared.joinpath("d").mkdir()
    shared.joinpath("d/secret").write_bytes(b"fine")
    f, d = guest.lookup(ROOT, b"f").nodeid, guest.lookup(ROOT, b"d").nodeid
    inner = guest.lookup(d, b"secret").nodeid
    shared.joinpath("f").rename(shared / "g")
    shared.joinpath("f").symlink_to("../secret")
    shared.joinpath("d").rename(shared / "e")
    shared.joinpath("d").symlink_to("..")
    with refused("ESTALE"):
        guest.open(f)
    with refused("ESTALE"):
        guest.setattr(f, fuse.FATTR_MODE, mode=0o777)
    # `d` is still held open: it's the directory, not the name.
    assert guest.read(inner, guest.open(inner), 9) == b"fine"


def test_the_dots_of_the_root_are_the_root(secret: tuple[Fuse, Path]) -> None:
    guest, shared = secret
    fh = guest.opendir(ROOT)
    assert {entry.ino for entry in guest.readdir(ROOT, fh)} == {shared.stat().st_ino}


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_special_files_are_seen_and_never_opened(tmp_path: Path, kind: str) -> None:
    if kind == "device":
        if os.geteuid():
            pytest.skip("device nodes are root's to make")
        os.mknod(tmp_path / "s", stat.S_IFCHR | 0o666, os.makedev(5, 300))
    else:
        os.mknod(tmp_path / "s", (stat.S_IFIFO if kind == "fifo" else stat.S_IFSOCK) | 0o666)
    with serve(tmp_path) as guest:
        entry = guest.lookup(ROOT, b"s")
        assert entry.attr.mode == (tmp_path / "s").stat().st_mode
        if kind == "device":
            assert entry.attr.rdev == 300 % 256 | 5 << 8 | (300 & ~255) << 12
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with refused("EACCES"):
                guest.open(entry.nodeid, flags)
        with refused("EACCES"):
            guest.create(ROOT, b"s")
        with refused("EINVAL"):
            guest.setattr(entry.nodeid, fuse.FATTR_SIZE, size=0)


SWAP = """
import os, sys
os.chdir(sys.argv[1])
print("ready", flush=True)
while True:
    for name, target in (("dir", ".."), ("file", "../secret")):
        os.rename(name, "spare")
        try:
            os.symlink(target, name)
            os.unlink(name)
        except OSError:  # the guest makes such a file too
            pass
        os.rename("spare", name)
"""


def test_a_race_against_symlinks_is_never_lost(secret: tuple[Fuse, Path]) -> None:
    """A process of the host's swaps what the guest uses, all the time; the guest must get what is shared, or an error."""
    guest, shared = secret
    shared.joinpath("dir").mkdir()
    shared.joinpath("dir", "secret").write_bytes(b"public")
    shared.joinpath("file").write_bytes(b"public")
    got, errors = 0, set()
    with (
        subprocess.Popen([sys.executable, "-c", SWAP, shared], stdout=subprocess.PIPE) as swapper,
        ExitStack() as stack,
    ):
        stack.callback(swapper.kill)
        assert swapper.stdout and swapper.stdout.readline()
        for i in range(2000):
            try:
                if i % 3 == 0:
                    node = guest.lookup(ROOT, b"file").nodeid
                    fh = guest.open(node)
                elif i % 3 == 1:
                    node = guest.lookup(guest.lookup(ROOT, b"dir").nodeid, b"secret").nodeid
                    fh = guest.open(node)
                else:
                    entry, fh = guest.create(ROOT, b"file", os.O_RDWR)
                    node = entry.nodeid
                data = guest.read(node, fh, 9)
                guest.release(node, fh)
                guest.forget(node, 100)  # so that the next turn finds it by its name
                assert data in (b"public", b"")
                got += data == b"public"
            except OSError as error:
                errors.add(code_of(error))
    assert got > 100
    assert errors <= {"ENOENT", "ESTALE", "EACCES", "ENOTDIR", "ELOOP", "EEXIST"}
    assert shared.parent.joinpath("secret").read_bytes() == b"secret"


def test_interfaces_to_the_kernel_are_empty_directories() -> None:
    with serve(Path("/"), read_only=True) as guest:
        for name in (b"proc", b"sys"):
            entry = guest.lookup(ROOT, name)
            assert stat.S_ISDIR(entry.attr.mode)
            assert guest.listdir(entry.nodeid) == guest.listdir(entry.nodeid, plus=True) == []
            for inner in (b"self", b"kernel", str(os.getpid()).encode()):
                with refused("ENOENT"):
                    guest.lookup(entry.nodeid, inner)
    for directory in ("/proc", f"/proc/{os.getpid()}/task"):
        with pytest.raises(ValueError, match="interface to the host's kernel"):
            PassthroughFs(directory, read_only=True)


def test_file_systems_below_have_numbers_of_their_own(tmp_path: Path) -> None:
    with serve(Path("/"), read_only=True) as guest:
        root = os.stat("/")
        below = next(
            (name for name in ("dev", "run", "tmp") if os.path.ismount(f"/{name}")), pytest.skip.Exception
        )
        if not isinstance(below, str):
            pytest.skip("nothing is mounted here")
        entry = guest.lookup(ROOT, below.encode())
        assert os.stat(f"/{below}").st_dev != root.st_dev
        assert entry.nodeid >> 48 == 1 and entry.nodeid & (1 << 48) - 1 == os.stat(f"/{below}").st_ino
        assert guest.getattr(entry.nodeid).ino == entry.nodeid


# A hostile guest.


def test_unknown_opcodes(guest: Fuse) -> None:
    for opcode in (
        0,
        7,
        19,
        fuse.IOCTL,
        fuse.POLL,
        fuse.GETLK,
        fuse.SETLK,
        fuse.SETUPMAPPING,
        999,
        0xFFFFFFFF,
    ):
        with refused("ENOSYS"):
            guest.send(opcode, ROOT, bytes(100))


def test_interrupt_has_no_answer(guest: Fuse) -> None:
    header = fuse.in_header.pack(48, fuse.INTERRUPT, 5, 0, 0, 0, 0, 0, 0)
    guest.driver.add(HIPRIO, [header, bytes(8)], [64])
    guest.driver.kick(HIPRIO)
    assert guest.driver.used(HIPRIO)[0].written_bytes == 0


@pytest.mark.parametrize("size", [0, 39, 1000, 0xFFFFFFFF])
def test_a_request_can_lie_about_its_length(guest: Fuse, size: int) -> None:
    header = fuse.in_header.pack(size, fuse.GETATTR, 5, ROOT, 0, 0, 0, 0, 0)
    guest.driver.add(REQUESTS, [header, bytes(16)], [128])
    guest.driver.kick(REQUESTS)
    (used,) = guest.driver.used(REQUESTS)
    assert used.data[:16] == fuse.out_header.pack(16, -errno.EINVAL, 5)


def test_requests_without_room(guest: Fuse) -> None:
    body = fuse.getattr_in.pack(0, 0)
    header = fuse.in_header.pack(56, fuse.GETATTR, 5, ROOT, 0, 0, 0, 0, 0)
    for out, in_, written in (
        ([header[:39]], [128], 0),
        ([header, body], [], 0),
        ([header, body], [15], 0),
        ([header, body], [16], 16),
        ([header, body], [119], 16),
        ([header, body], [1] * 120, 120),
        ([], [128], 0),
    ):
        guest.driver.add(REQUESTS, out, in_)
        guest.driver.kick(REQUESTS)
        (used,) = guest.driver.used(REQUESTS)
        assert used.written_bytes == written
        if written == 16:
            assert used.data[:16] == fuse.out_header.pack(16, -errno.EIO, 5)


def test_short_bodies_are_refused(guest: Fuse) -> None:
    no_body = {fuse.READLINK, fuse.STATFS, fuse.OPENDIR, fuse.DESTROY, fuse.INTERRUPT, fuse.SYNCFS}
    for opcode in range(1, 52):
        if opcode not in no_body | {fuse.FORGET, fuse.BATCH_FORGET}:
            with pytest.raises(OSError) as caught:
                guest.send(opcode, ROOT, b"\1\2")
            assert code_of(caught.value) in ("EINVAL", "ENOSYS")


def test_inodes_and_handles_that_never_were(guest: Fuse) -> None:
    for node in (0, 2, 999, 1 << 48, (1 << 64) - 1):
        for opcode in (fuse.GETATTR, fuse.OPEN, fuse.OPENDIR, fuse.STATFS, fuse.READLINK):
            with refused("ESTALE"):
                guest.send(opcode, node, bytes(16))
        with refused("ESTALE"):
            guest.lookup(node, b"f")
    for fh in (0, 1, (1 << 64) - 1):
        with refused("EBADF"):
            guest.read(ROOT, fh, 10)
        with refused("EBADF"):
            guest.release(ROOT, fh)
        with refused("EBADF"):
            guest.getattr(ROOT, fh)
    with refused("ESTALE"):
        guest.open(ROOT)
    with refused("EISDIR"):
        guest.open(guest.mkdir(ROOT, b"d").nodeid)
    with refused("EISDIR"):
        guest.read(ROOT, guest.opendir(ROOT), 10)


def test_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes_module, "MAX_NODES", 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, 128))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    for i in range(12):
        os.mknod(tmp_path / f"f{i}")
    with serve(tmp_path) as guest:
        nodes = [guest.lookup(ROOT, b"f%d" % i).nodeid for i in range(10)]
        for name in (b"f10", b"f11"):
            with refused("ENFILE"):
                guest.lookup(ROOT, name)
        with refused("ENFILE"):
            guest.create(ROOT, b"new")
        # A listing goes on without what can't be remembered.
        listed = guest.listdir(ROOT, plus=True, size=1 << 16)
        assert len(listed) == 13 and sum(entry.entry is None for entry in listed) == 3
        handles = [guest.open(nodes[0]) for _ in range(8)]
        for refuse in (
            lambda: guest.open(nodes[1]),
            lambda: guest.opendir(ROOT),
            lambda: guest.create(ROOT, b"f0"),
        ):
            with refused("ENFILE"):
                refuse()
        guest.release(nodes[0], handles[0])
        guest.open(nodes[1])


def test_directories_are_found_again_after_their_descriptor_was_closed(tmp_path: Path) -> None:
    path = tmp_path
    for i in range(30):
        path = path / f"d{i}"
        path.mkdir()
    for i in range(20):
        tmp_path.joinpath(f"e{i}").mkdir()
        tmp_path.joinpath(f"e{i}", "f").write_bytes(b"x")
    inodes = Inodes(tmp_path, max_directories=3)
    base = len(open_fds())

    def lookup(parent: int, name: bytes) -> int:
        st = os.stat(name, dir_fd=inodes.directory(parent), follow_symlinks=False)
        number = inodes.number(st)
        inodes.add(parent, name, number)
        inodes.trim()
        return number

    deep = [ROOT]
    for i in range(30):
        deep.append(lookup(deep[-1], b"d%d" % i))
    leaves = [lookup(lookup(ROOT, b"e%d" % i), b"f") for i in range(20)]
    for leaf in leaves:
        assert os.fstat(inodes.open(leaf)).st_size == 1
        inodes.trim()
        assert len(open_fds()) <= base + 3
    assert os.path.samestat(os.fstat(inodes.directory(deep[-1])), path.stat())
    inodes.trim()
    # Renaming moves all that is below.
    tmp_path.joinpath("d0").rename(tmp_path / "moved")
    inodes.moved(deep[1], ROOT, b"moved")
    for leaf in leaves:
        inodes.open(leaf)
        inodes.trim()
    assert inodes.number(os.fstat(inodes.directory(deep[20]))) == deep[20]
    inodes.close()


def test_a_walk_in_a_circle_ends(tmp_path: Path) -> None:
    inodes = Inodes(tmp_path, max_directories=3)
    inodes.add(101, b"a", 100)
    inodes.add(100, b"b", 101)
    with refused("ESTALE"):
        inodes.directory(100)
    with refused("ESTALE"):
        inodes.stat(101)
    inodes.close()


def test_numbers_that_do_not_fit_are_replaced(tmp_path: Path) -> None:
    inodes = Inodes(tmp_path, max_directories=3)
    real = tmp_path.stat()

    def fake(ino: int, device: int = real.st_dev) -> os.stat_result:
        return os.stat_result((real.st_mode, ino, device, *real[3:]))

    numbers = [inodes.number(fake(ino)) for ino in (1, 1 << 48, 1 << 63, (1 << 64) - 1)]
    assert len(set(numbers)) == 4 and all(number >> 48 == 0xFFFF for number in numbers)
    assert numbers == [inodes.number(fake(ino)) for ino in (1, 1 << 48, 1 << 63, (1 << 64) - 1)]
    inodes.add(ROOT, b"x", numbers[1])
    inodes.forget(numbers[1], 1)
    assert inodes.number(fake(1 << 48)) not in numbers
    assert inodes.number(fake(1, real.st_dev + 1000)) == 1 << 48 | 1
    inodes.close()


def test_garbage_breaks_nothing(tmp_path: Path) -> None:
    rng = random.Random(20)
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    shared = tmp_path / "shared"
    shared.joinpath("dir").mkdir(parents=True)
    shared.joinpath("a").write_bytes(b"content")
    shared.joinpath("link").symlink_to("../outside")
    before = open_fds()
    with serve(shared) as guest:
        for _ in range(3000):
            mutate_and_feed(rng, guest.driver)
        assert not guest.driver.broken
        assert guest.getattr(ROOT).mode
    assert open_fds() == before
    assert outside.read_bytes() == b"untouched"
