"""Which file of the host each of the guest's inode numbers stands for.

The guest holds on to every inode that it has looked up until it forgets it: after ``find /`` that may be half a million. A
descriptor for each can't be had, file handles (open_by_handle_at) want a capability, so an inode is remembered as a parent and a
name and found again when it is needed: opened component by component below the root, and then it must have the same (st_dev,
st_ino) as the one that the guest means, else the guest gets ESTALE (Linux then walks its path anew, by LOOKUP). The descriptors of
directories are kept for a while, least recently used ones closed first; a file that the guest has open is reached by that.

An inode's number is made of the device's and the inode's number on the host, so it needs no second table, is unique across
file systems, and on the shared directory's own file system ``ls -i`` shows the host's numbers.
"""

import errno
import os
import stat
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from kvmkit.devices.fuse.protocol import ROOT_ID

MAX_NODES = 1 << 20
"""Inodes that the guest may hold at once (about 300 bytes each): more than a guest's memory can."""
_MAX_DEPTH = 4096
"""Directories between an inode and the nearest one that is open. Also ends a walk in a circle, which the host can bring about."""
_DEVICE_SHIFT = 48
_OTHER = 0xFFFF
"""The device index of inodes that don't fit into the scheme."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_KERNEL_INTERFACES = {
    *(
        "binder",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "efivarfs",
        "fusectl",
    ),
    *(
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "resctrl",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "smackfs",
        "sysfs",
    ),
    "tracefs",
}
"""File systems whose files are not data but doors into the host's kernel and its processes."""


def stale() -> OSError:
    """Return what the guest gets for an inode that isn't where it was."""
    return OSError(errno.ESTALE, "stale inode")


class Node:
    """An inode that the guest holds: where it was seen last."""

    __slots__ = ("ctime_ns", "lookups", "name", "parent")

    def __init__(self, parent: int, name: bytes) -> None:
        """It is `name` in the directory `parent` (an inode number)."""
        self.parent = parent
        self.name = name
        self.lookups = 0
        """How often the guest was told of it and has not yet forgotten."""
        self.ctime_ns = -1
        """st_ctime when it was opened last; see `PassthroughFs`."""


class Inodes:
    """The table, and the descriptors of directories. One thread at a time; `trim` after each request."""

    def __init__(self, directory: str | os.PathLike[str], *, max_directories: int) -> None:
        """`max_directories` is how many directories to keep open. `OSError`, `ValueError` if `directory` can't be shared."""
        self._root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._max_directories = max_directories
        self._nodes: dict[int, Node] = {}
        self._directories: OrderedDict[int, int] = OrderedDict()
        """O_PATH descriptors, by inode number."""
        self._transient: list[int] = []
        """Descriptors that this request opened."""
        self.open_files: dict[int, list[int]] = {}
        """Descriptors of files that the guest has open, by inode number."""
        self._devices: dict[int, int] = {}
        """st_dev → index: how often a new one was seen before."""
        self._others: dict[tuple[int, int], int] = {}
        """Inode numbers given to (st_dev, st_ino) that don't fit into the scheme, and back."""
        self._other_keys: dict[int, tuple[int, int]] = {}
        self._next_other = _OTHER << _DEVICE_SHIFT
        self._hidden: set[int] = set()
        """Indices of devices that are kernel interfaces."""
        device = os.fstat(self._root).st_dev
        if _is_kernel_interface(device):
            os.close(self._root)
            raise ValueError(
                f"{os.fspath(directory)} is an interface to the host's kernel; it can't be shared"
            )
        self._devices[device] = 0

    def close(self) -> None:
        """Close all."""
        self.reset()
        os.close(self._root)

    def reset(self) -> None:
        """Forget everything but the root."""
        self.trim()
        for fd in self._directories.values():
            os.close(fd)
        self._directories.clear()
        self._nodes.clear()
        self._others.clear()
        self._other_keys.clear()

    def number(self, st: os.stat_result) -> int:
        """Return the inode number for what stat(2) says."""
        device = self._devices.get(st.st_dev)
        if device is None:
            device = self._new_device(st.st_dev)
        ino = st.st_ino
        if ino >> _DEVICE_SHIFT or device >= _OTHER or (ino <= ROOT_ID and not device):
            return self._other_number((st.st_dev, ino))
        return device << _DEVICE_SHIFT | ino

    def _other_number(self, key: tuple[int, int]) -> int:
        number = self._others.get(key)
        if number is None:
            if len(self._others) >= 2 * MAX_NODES:
                raise OSError(errno.ENFILE, "too many inodes")
            number = self._others[key] = self._next_other
            self._other_keys[number] = key
            self._next_other += 1
        return number

    def number_in(self, directory: int, st_ino: int) -> int:
        """Return the number to show for `st_ino` in a listing of `directory`, which may be a mount point's: not exact."""
        device = 0 if directory == ROOT_ID else directory >> _DEVICE_SHIFT
        return st_ino if device == _OTHER or st_ino >> _DEVICE_SHIFT else device << _DEVICE_SHIFT | st_ino

    def is_hidden(self, number: int) -> bool:
        """Whether the inode belongs to an interface to the host's kernel."""
        return number >> _DEVICE_SHIFT in self._hidden

    def _new_device(self, st_dev: int) -> int:
        index = len(self._devices)
        if index >= _OTHER:
            return _OTHER
        self._devices[st_dev] = index
        if _is_kernel_interface(st_dev):
            self._hidden.add(index)
        return index

    def add(self, parent: int, name: bytes, number: int) -> Node:
        """The guest is told that `name` in `parent` is inode `number`, once more."""
        node = self._nodes.get(number)
        if node is None:
            if len(self._nodes) >= MAX_NODES:
                raise OSError(errno.ENFILE, "too many inodes")
            node = self._nodes[number] = Node(parent, name)
        else:
            node.parent = parent
            node.name = name
        node.lookups += 1
        return node

    def node(self, number: int) -> Node:
        """Return what is known of an inode other than the root."""
        node = self._nodes.get(number)
        if node is None:
            raise stale()
        return node

    def moved(self, number: int, parent: int, name: bytes) -> None:
        """An inode, which the guest may hold or not, was renamed."""
        if node := self._nodes.get(number):
            node.parent = parent
            node.name = name

    def forget(self, number: int, lookups: int) -> None:
        """The guest forgets having been told of an inode so many times."""
        node = self._nodes.get(number)
        if node is None:
            return
        node.lookups -= lookups
        if node.lookups <= 0:
            del self._nodes[number]
            if number in self._other_keys:
                del self._others[self._other_keys.pop(number)]
            fd = self._directories.pop(number, None)
            if fd is not None:
                os.close(fd)

    def directory(self, number: int) -> int:
        """Return an O_PATH descriptor of a directory, good for this request."""
        fd = self._directories.get(number)
        if fd is not None:
            self._directories.move_to_end(number)
            return fd
        if number == ROOT_ID:
            return self._root
        node = self.node(number)
        chain = [node.name]
        fd = self._directories.get(node.parent)
        while fd is None:
            if node.parent == ROOT_ID:
                fd = self._root
                break
            node = self.node(node.parent)
            chain.append(node.name)
            if len(chain) > _MAX_DEPTH:
                raise stale()
            fd = self._directories.get(node.parent)
        fd = _walk(fd, chain)
        self._verify(fd, number)
        self._directories[number] = fd
        return fd

    def open(self, number: int) -> int:
        """Return a descriptor of any inode, O_PATH or an open one, good for this request."""
        if number == ROOT_ID:
            return self._root
        if number in self._directories:
            return self._directories[number]
        if files := self.open_files.get(number):
            return files[0]
        node = self.node(number)
        fd = _walk(self.directory(node.parent), [node.name], 0)
        if stat.S_ISDIR(self._verify(fd, number).st_mode):
            self._directories[number] = fd
        else:
            self._transient.append(fd)
        return fd

    def stat(self, number: int) -> os.stat_result:
        """Return the attributes of an inode, without opening it if need be."""
        if number == ROOT_ID:
            return os.fstat(self._root)
        if files := self.open_files.get(number):
            return os.fstat(files[0])
        fd = self._directories.get(number)
        if fd is not None:
            return os.fstat(fd)
        node = self.node(number)
        try:
            st = os.stat(node.name, dir_fd=self.directory(node.parent), follow_symlinks=False)
        except OSError as error:
            raise (stale() if error.errno in _GONE else error) from None
        if self.number(st) != number:
            raise stale()
        return st

    def trim(self) -> None:
        """The request is done: close what nobody needs now."""
        while self._transient:
            os.close(self._transient.pop())
        while len(self._directories) > self._max_directories:
            os.close(self._directories.popitem(last=False)[1])

    def _verify(self, fd: int, number: int) -> os.stat_result:
        st = os.fstat(fd)
        if self.number(st) != number:
            os.close(fd)
            raise stale()
        return st


def _walk(fd: int, chain: list[bytes], last: int = os.O_DIRECTORY) -> int:
    """Open the last of `chain` (in reverse: the first) below `fd`, following no symbolic link."""
    opened = -1
    try:
        for i in range(len(chain) - 1, -1, -1):
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECTORY if i else last)
            below = os.open(chain[i], flags, dir_fd=fd)
            if opened >= 0:
                os.close(opened)
            fd = opened = below
    except OSError as error:
        if opened >= 0:
            os.close(opened)
        raise (stale() if error.errno in _GONE else error) from None
    return fd


def _is_kernel_interface(st_dev: int) -> bool:
    """Whether a device is mounted as one of the kernel's own file systems (proc_pid_mountinfo(5))."""
    name = f"{os.major(st_dev)}:{os.minor(st_dev)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
            if line.split(" ", 3)[2] == name:
                return line.partition(" - ")[2].split(" ")[0] in _KERNEL_INTERFACES
    return False
