"""The same operations on a directory through virtio-fs and on another one directly must leave the same, and fail alike."""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmkit.devices.fuse import protocol as fuse
from kvmkit.devices.fuse.passthrough import PassthroughFs
from kvmkit.devices.virtio.fs import Fs
from kvmkit.testing.fuse import Fuse, code_of
from kvmkit.testing.virtqueue import Driver

PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)
DATA = st.binary(max_size=8)
OFFSETS = st.integers(0, 20)
MODES = st.sampled_from([0o600, 0o644, 0o755, 0o4711, 0o2755, 0o1777])


def outcome(act: Callable[[], object]) -> object:
    """What `act` returns, or the name of its error."""
    try:
        return act()
    except OSError as error:
        return code_of(error)


class InlineDriver(Driver):
    """Has the device work on the test's own thread: many times faster."""

    def kick(self, queue: int) -> None:
        self.device.queue_notified(self.queues[queue])


class SharedDirectory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.umask = os.umask(0)
        self.top = Path(tempfile.mkdtemp())
        self.shared, self.model = self.top / "shared", self.top / "model"
        self.shared.mkdir()
        self.model.mkdir()
        server = PassthroughFs(self.shared, read_only=False)
        server._inodes._max_directories = 1  # so that they are closed and found again all the time
        self.driver = InlineDriver(Fs("x", server, name="fs"))
        self.guest = Fuse(self.driver)
        self.open: list[tuple[int, int, int]] = []
        """Files that are open in both: node, handle and the model's descriptor."""
        self.directories: list[tuple[int, int]] = []
        """Working directories in both, which may be renamed and removed meanwhile: node and the model's descriptor."""

    def teardown(self) -> None:
        os.umask(self.umask)
        for *_, fd in [*self.open, *self.directories]:
            os.close(fd)
        self.driver.close()
        shutil.rmtree(self.top)

    # The kernel's part: paths.

    def walk(self, path: str) -> tuple[int, bytes]:
        """Look up all but the last component as a guest's kernel does. Returns the directory and the last component."""
        node = fuse.ROOT_ID
        *parents, name = path.encode().split(b"/")
        for parent in parents:
            entry = self.guest.lookup(node, parent)
            if stat.S_ISLNK(entry.attr.mode):
                raise FileNotFoundError(2, "all our symbolic links lead nowhere")
            if not stat.S_ISDIR(entry.attr.mode):
                raise NotADirectoryError(20, "not a directory")
            node = entry.nodeid
        return node, name

    def node(self, path: str) -> int:
        parent, name = self.walk(path)
        return self.guest.lookup(parent, name).nodeid

    def same(self, guest: Callable[[], object], model: Callable[[], object]) -> None:
        expected = outcome(model)
        assert outcome(guest) == (expected if isinstance(expected, str | bytes) else None)

    @rule(path=PATHS, mode=MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.same(
            lambda: void(self.guest.mkdir(*self.walk(path), mode)),
            lambda: os.mkdir(self.model / path, mode),
        )

    @rule(path=PATHS, data=DATA, mode=MODES)
    def make_file(self, path: str, data: bytes, mode: int) -> None:
        def guest() -> None:
            entry, fh = self.guest.create(*self.walk(path), os.O_RDWR | os.O_EXCL, mode)
            self.guest.write(entry.nodeid, fh, data)
            self.guest.release(entry.nodeid, fh)

        def model() -> None:
            fd = os.open(self.model / path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            os.write(fd, data)
            os.close(fd)

        self.same(guest, model)

    @rule(path=PATHS)
    def symlink(self, path: str) -> None:
        self.same(
            lambda: void(self.guest.symlink(*self.walk(path), b"no/where")),
            lambda: os.symlink("no/where", self.model / path),
        )
        if (self.model / path).is_symlink():
            assert self.guest.readlink(self.node(path)) == b"no/where"

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        def guest() -> None:
            node = self.node(old)
            if stat.S_ISDIR(self.guest.getattr(node).mode):
                raise PermissionError(1, "a directory has one name")  # says the guest's kernel
            self.guest.link(node, *self.walk(new))

        def model() -> None:
            if (self.model / old).is_dir():
                raise PermissionError(1, "a directory has one name")
            os.link(self.model / old, self.model / new, follow_symlinks=False)

        self.same(guest, model)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.same(lambda: self.guest.unlink(*self.walk(path)), lambda: os.unlink(self.model / path))

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.same(lambda: self.guest.rmdir(*self.walk(path)), lambda: os.rmdir(self.model / path))

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        def guest() -> None:
            self.guest.rename(*self.walk(old), *self.walk(new))

        self.same(guest, lambda: os.rename(self.model / old, self.model / new))
        self.list_directories()

    @rule(old=PATHS, new=PATHS)
    def exchange(self, old: str, new: str) -> None:
        def guest() -> None:
            self.guest.rename(*self.walk(old), *self.walk(new), 2)

        def model() -> None:
            old_path, new_path = self.model / old, self.model / new
            for parent in (old_path.parent, new_path.parent):
                os.stat(f"{parent}/")
            os.lstat(old_path)
            os.lstat(new_path)
            if old_path == new_path:
                return
            if old_path in new_path.parents or new_path in old_path.parents:
                raise OSError(22, "one within the other")
            spare = self.model / "spare"
            old_path.rename(spare)
            new_path.rename(old_path)
            spare.rename(new_path)

        self.same(guest, model)
        self.list_directories()

    @rule(path=PATHS, size=OFFSETS)
    def truncate(self, path: str, size: int) -> None:
        if (self.model / path).is_file():
            self.guest.setattr(self.node(path), fuse.FATTR_SIZE | fuse.FATTR_KILL_SUIDGID, size=size)
            os.truncate(self.model / path, size)
            self.kill_suidgid(os.stat(self.model / path).st_mode, self.model / path)

    @rule(path=PATHS, mode=MODES, seconds=st.integers(0, 1 << 33))
    def chmod_and_utime(self, path: str, mode: int, seconds: int) -> None:
        target = self.model / path
        if target.exists():
            valid = fuse.FATTR_MODE | fuse.FATTR_MTIME
            self.guest.setattr(self.node(path), valid, mode=mode, mtime=(seconds, 5))
            target.chmod(mode)
            attr = self.guest.getattr(self.node(path))
            assert (attr.mode & 0o7777, attr.mtime_ns) == (mode, seconds * 10**9 + 5)

    @precondition(lambda self: len(self.open) < 5)
    @rule(path=PATHS)
    def open_file(self, path: str) -> None:
        target = self.model / path
        if target.is_file():
            node = self.node(path)
            self.open.append((node, self.guest.open(node, os.O_RDWR), os.open(target, os.O_RDWR)))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 4), data=DATA, offset=OFFSETS)
    def write(self, which: int, data: bytes, offset: int) -> None:
        node, fh, fd = self.open[which % len(self.open)]
        assert self.guest.write(node, fh, data, offset) == os.pwrite(fd, data, offset)
        assert self.guest.read(node, fh, 40) == os.pread(fd, 40, 0)
        st = os.fstat(fd)
        attr = self.guest.getattr(node, fh if offset % 2 else None)
        assert (attr.size, attr.nlink) == (st.st_size, st.st_nlink)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 4))
    def close(self, which: int) -> None:
        node, fh, fd = self.open.pop(which % len(self.open))
        self.guest.release(node, fh)
        os.close(fd)

    @precondition(lambda self: len(self.directories) < 3)
    @rule(path=PATHS)
    def enter(self, path: str) -> None:
        target = self.model / path
        if target.is_dir():
            self.directories.append((self.node(path), os.open(target, os.O_RDONLY)))

    @precondition(lambda self: self.directories)
    @rule(which=st.integers(0, 2))
    def leave(self, which: int) -> None:
        self.list_directories()
        os.close(self.directories.pop(which % len(self.directories))[1])

    def list_directories(self) -> None:
        """List the working directories, before `trees_are_the_same` has told the server where they are now."""
        for node, fd in self.directories:
            if os.fstat(fd).st_nlink:
                names = {name.encode() for name in os.listdir(fd)}
                assert {entry.name for entry in self.guest.listdir(node)} == names

    @rule(path=PATHS)
    def forget(self, path: str) -> None:
        if os.path.lexists(self.model / path):
            node = self.node(path)
            if node not in [held for held, *_ in [*self.open, *self.directories]]:
                self.guest.forget(node, 1000)

    @staticmethod
    def kill_suidgid(mode: int, path: Path) -> None:
        kill = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
        path.chmod(mode & 0o7777 & ~kill)

    @invariant()
    def trees_are_the_same(self) -> None:
        assert tree(self.shared) == tree(self.model) == self.guest_tree(fuse.ROOT_ID, "")

    def guest_tree(self, node: int, prefix: str) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for listed in self.guest.listdir(node, plus=True):
            entry = listed.entry
            assert entry
            attr = self.guest.getattr(entry.nodeid)
            assert attr == entry.attr
            path = prefix + listed.name.decode()
            content: bytes = b""
            if stat.S_ISLNK(attr.mode):
                content = self.guest.readlink(entry.nodeid)
            elif stat.S_ISREG(attr.mode):
                fh = self.guest.open(entry.nodeid)
                content = self.guest.read(entry.nodeid, fh, 100)
                self.guest.release(entry.nodeid, fh)
            found[path] = (attr.mode, attr.nlink, content)
            if stat.S_ISDIR(attr.mode):
                found |= self.guest_tree(entry.nodeid, path + "/")
        return found


def void(_: object) -> None:
    """Operations whose results aren't compared."""


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    """Mode, links and content of all below `top`."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(directory, name)
            st = path.lstat()
            content: bytes = b""
            if path.is_symlink():
                content = os.readlink(os.fsencode(path))
            elif path.is_file():
                content = path.read_bytes()
            found[str(path.relative_to(top))] = (st.st_mode, st.st_nlink, content)
    return found


SharedDirectory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSharedDirectory = SharedDirectory.TestCase
