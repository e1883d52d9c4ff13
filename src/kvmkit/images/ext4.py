"""A tree written as an ext4 file system image, by an ordinary user and with nothing but Python.

Why not ``mke2fs -d``: it takes owners and devices from the host's files, so that only root, or fakeroot with a
second copy of everything, could use it; from an archive it takes them in newer versions than many machines have.
Neither is reproducible. An image that is written once, in one go, needs none of what makes ext4 complicated:
nothing is ever freed, so what is in use is the file system's beginning, without a gap.

The layout (structures: the kernel's ``Documentation/filesystems/ext4/``, cited below by their names there)::

    block 0           the superblock, without copies (sparse_super2)
    …                 group descriptors
    …                 block bitmaps of all groups, inode bitmaps of all groups, inode tables of all groups (flex_bg)
    …                 directories, files, in the order of their paths; each file's blocks in a row
    …                 free

The same tree gives the same bytes. Free space costs nothing on the host: the image is a sparse file. There is no
journal, for the base of VMs is only read.
"""

import os
import stat
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from kvmkit.errors import ImageError
from kvmkit.images.tree import FileData, Inode, Tree

__all__ = ["BLOCK_BYTES", "DEFAULT_FREE_BYTES", "write_ext4"]

BLOCK_BYTES = 4096
DEFAULT_FREE_BYTES = 4 << 30

_GROUP_BLOCKS = 8 * BLOCK_BYTES  # as many as a bitmap of one block has bits
_MAX_GROUP_INODES = 8 * BLOCK_BYTES
_BYTES_PER_INODE = 16384  # as mke2fs has it
_INODE_BYTES = 256
_EXTRA_BYTES = 32  # of an inode's fields past the first 128 bytes
_DESCRIPTOR_BYTES = 32
_MAX_BLOCKS = 1 << 32  # without the feature 64bit

_ROOT_INO = 2
_FIRST_INO = 11  # of those that nothing is reserved for
_LOST_FOUND = b"lost+found"  # e2fsck wants one

_EXTENTS_FL = 0x80000
_EXTENT_MAGIC = 0xF30A
_MAX_EXTENT_BLOCKS = 32768
_ROOT_EXTENTS = 4
_NODE_EXTENTS = (BLOCK_BYTES - 12) // 12
_MAX_FAST_SYMLINK_BYTES = 59
_MAX_LINKS = 65000

_XATTR_MAGIC = 0xEA020000
_XATTR_PREFIXES = {b"user.": 1, b"trusted.": 4, b"security.": 6}
_XATTR_IN_INODE_BYTES = _INODE_BYTES - 128 - _EXTRA_BYTES - 4

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}

_COMPAT = 0x8 | 0x20 | 0x200  # ext_attr, dir_index, sparse_super2
_INCOMPAT = 0x2 | 0x40 | 0x200  # filetype, extent, flex_bg
_RO_COMPAT = 0x1 | 0x2 | 0x8 | 0x20 | 0x40  # sparse_super, large_file, huge_file, dir_nlink, extra_isize


def write_ext4(tree: Tree, path: Path, uuid: UUID, size_bytes: int | None = None) -> int:
    """Write `tree` to the new file `path` and return the file system's size in bytes.

    `size_bytes` is rounded down to blocks; None is as much as the tree takes and `DEFAULT_FREE_BYTES`. `ImageError`
    if that is too small, or for a file that ext4 doesn't take.
    """
    plan = _Plan(tree, uuid, size_bytes)
    with open(path, "xb") as file:
        plan.write(file.fileno())
        file.flush()
        os.fsync(file.fileno())
    return plan.blocks * BLOCK_BYTES


@dataclass(slots=True)
class _File:
    """What an inode becomes."""

    inode: Inode
    ino: int
    path: bytes
    links: int = 0
    parent_ino: int = 0
    content: bytes = b""
    """Of directories and long symbolic links."""
    size_bytes: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(First logical block, number of blocks), in order, with holes between."""
    xattr_entries: bytes = b""
    """In the inode, or else in a block of their own."""
    xattr_block: bytes = b""


class _Plan:
    """What goes where."""

    def __init__(self, tree: Tree, uuid: UUID, size_bytes: int | None) -> None:
        self._uuid = uuid
        self._files = _files(tree)
        self._used_inodes = max(file.ino for file in self._files)
        self._content_blocks = sum(_block_count(file) for file in self._files)
        if size_bytes is None:
            self._fit(DEFAULT_FREE_BYTES // BLOCK_BYTES)
        else:
            self._lay_out(size_bytes // BLOCK_BYTES)
            if self._missing_blocks():
                self._fit(0)
                raise ImageError(
                    f"a file system of {size_bytes} bytes is too small for this image: "
                    f"give it at least {-(-self.blocks * BLOCK_BYTES // (1 << 20))}M"
                )

    def _fit(self, free_blocks: int) -> None:
        """Lay out as many blocks as the tree takes, and `free_blocks`."""
        self._lay_out(self._content_blocks + free_blocks)
        while missing := self._missing_blocks(free_blocks):  # metadata grow with what they describe
            self._lay_out(self.blocks + missing)

    def _missing_blocks(self, free_blocks: int = 0) -> int:
        if self._used_inodes > self._groups * self._group_inodes:
            return _GROUP_BLOCKS
        return max(0, self._used_blocks + free_blocks - self.blocks)

    def _lay_out(self, blocks: int) -> None:
        if blocks > _MAX_BLOCKS:
            raise ImageError(
                f"the image would have {blocks * BLOCK_BYTES} bytes, and ext4 takes 16 TiB at most"
            )
        self.blocks = blocks
        self._groups = -(-blocks // _GROUP_BLOCKS)
        inodes = max(self._used_inodes * 5 // 4, blocks * BLOCK_BYTES // _BYTES_PER_INODE)
        per_block = BLOCK_BYTES // _INODE_BYTES
        self._table_blocks = -(-inodes // (max(1, self._groups) * per_block))
        self._table_blocks = min(self._table_blocks, _MAX_GROUP_INODES // per_block)
        self._group_inodes = self._table_blocks * per_block
        self._first_bitmap_block = 1 + -(-self._groups * _DESCRIPTOR_BYTES // BLOCK_BYTES)
        self._first_table_block = self._first_bitmap_block + 2 * self._groups
        self._first_content_block = self._first_table_block + self._groups * self._table_blocks
        self._used_blocks = self._first_content_block + self._content_blocks

    def write(self, fd: int) -> None:
        """Write all of it to an empty file."""
        os.ftruncate(fd, self.blocks * BLOCK_BYTES)
        self._write_metadata(fd)
        self._next_block = self._first_content_block
        for file in self._files:
            inode = self._write_content(fd, file)
            _pwrite(fd, inode, self._first_table_block * BLOCK_BYTES + (file.ino - 1) * _INODE_BYTES)
        assert self._next_block == self._used_blocks

    def _write_metadata(self, fd: int) -> None:
        _pwrite(fd, self._superblock(), 1024)
        descriptors = []
        directories = [0] * self._groups
        for file in self._files:
            directories[(file.ino - 1) // self._group_inodes] += file.inode.is_directory
        for group in range(self._groups):
            size = min(_GROUP_BLOCKS, self.blocks - group * _GROUP_BLOCKS)
            used = min(max(self._used_blocks - group * _GROUP_BLOCKS, 0), size)
            used_inodes = min(max(self._used_inodes - group * self._group_inodes, 0), self._group_inodes)
            block_bitmap = self._first_bitmap_block + group
            inode_bitmap = block_bitmap + self._groups
            # block_group_descriptors.rst
            descriptors.append(
                struct.pack(
                    "<IIIHHH14x",
                    block_bitmap,
                    inode_bitmap,
                    self._first_table_block + group * self._table_blocks,
                    size - used,
                    self._group_inodes - used_inodes,
                    directories[group],
                )
            )
            _pwrite(fd, _bitmap(used, size), block_bitmap * BLOCK_BYTES)
            _pwrite(fd, _bitmap(used_inodes, self._group_inodes), inode_bitmap * BLOCK_BYTES)
        _pwrite(fd, b"".join(descriptors), BLOCK_BYTES)

    def _superblock(self) -> bytes:
        inodes = self._groups * self._group_inodes
        fields = [  # super.rst
            (0x00, "I", inodes),
            (0x04, "I", self.blocks),
            (0x0C, "I", self.blocks - self._used_blocks),
            (0x10, "I", inodes - self._used_inodes),
            (0x18, "I", 2),  # s_log_block_size, from 1024
            (0x1C, "I", 2),  # s_log_cluster_size
            (0x20, "I", _GROUP_BLOCKS),
            (0x24, "I", _GROUP_BLOCKS),
            (0x28, "I", self._group_inodes),
            (0x36, "H", 0xFFFF),  # s_max_mnt_count: never check for having been mounted often
            (0x38, "H", 0xEF53),  # s_magic
            (0x3A, "H", 1),  # s_state: clean
            (0x3C, "H", 1),  # s_errors: continue
            (0x4C, "I", 1),  # s_rev_level
            (0x54, "I", _FIRST_INO),  # s_first_ino
            (0x58, "H", _INODE_BYTES),
            (0x5C, "I", _COMPAT),
            (0x60, "I", _INCOMPAT),
            (0x64, "I", _RO_COMPAT),
            (0x68, "16s", self._uuid.bytes),
            (0xEC, "16s", self._uuid.bytes),  # s_hash_seed
            (0xFC, "B", 1),  # s_def_hash_version: half MD4
            (0x100, "I", 0xC),  # s_default_mount_opts: user_xattr, acl
            (0x15C, "H", _EXTRA_BYTES),
            (0x15E, "H", _EXTRA_BYTES),
            (0x160, "I", 2),  # s_flags: unsigned directory hash
            (0x174, "B", 4),  # s_log_groups_per_flex
        ]
        superblock = bytearray(1024)
        for offset, form, value in fields:
            struct.pack_into("<" + form, superblock, offset, value)
        return bytes(superblock)

    def _allocate(self, blocks: int) -> int:
        first = self._next_block
        self._next_block += blocks
        return first

    def _write_content(self, fd: int, file: _File) -> bytes:
        """Write what `file` has outside of its inode, and return the inode."""
        inode = file.inode
        before = self._next_block
        flags, block = 0, b""
        if stat.S_ISLNK(inode.mode) and not file.runs:
            block = inode.target
        elif stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
            block = _device(*inode.device)
        elif stat.S_ISREG(inode.mode) or file.runs:
            flags = _EXTENTS_FL
            starts = [self._allocate(count) for _, count in file.runs]
            if file.content:
                _pwrite(fd, file.content, starts[0] * BLOCK_BYTES)
            elif inode.data is not None:
                _copy(fd, inode.data, file.runs, starts)
            block = self._write_extents(fd, file.runs, starts)
        xattr_block = 0
        if file.xattr_block:
            xattr_block = self._allocate(1)
            _pwrite(fd, file.xattr_block, xattr_block * BLOCK_BYTES)
        sectors = (self._next_block - before) * (BLOCK_BYTES // 512)
        mtime_s = min(max(inode.mtime_s, -(1 << 31)), (1 << 34) - (1 << 31) - 1)
        seconds = mtime_s & 0xFFFFFFFF
        epoch = (mtime_s + (1 << 31)) >> 32  # inodes.rst, Inode Timestamps
        return struct.pack(  # inodes.rst
            "<HHIIIIIHHIII60sIIIIHHHHI" + "HHIIIIIII",
            inode.mode,
            inode.uid & 0xFFFF,
            file.size_bytes & 0xFFFFFFFF,
            *(seconds, seconds, seconds, 0),  # read, changed, modified, deleted
            inode.gid & 0xFFFF,
            file.links if file.links <= _MAX_LINKS else 1,
            sectors & 0xFFFFFFFF,
            flags,
            0,
            block,
            0,
            xattr_block,
            file.size_bytes >> 32,
            0,
            sectors >> 32,
            0,
            inode.uid >> 16,
            inode.gid >> 16,
            0,
            *(_EXTRA_BYTES, 0),
            *(epoch, epoch, epoch, seconds, epoch),
            *(0, 0),
        ) + (struct.pack("<I", _XATTR_MAGIC) + file.xattr_entries if file.xattr_entries else b"")

    def _write_extents(self, fd: int, runs: list[tuple[int, int]], starts: list[int]) -> bytes:
        """The root of the extent tree; its nodes are written (ifork.rst, Extent Tree)."""
        records = []
        for (logical, count), start in zip(runs, starts, strict=True):
            for done in range(0, count, _MAX_EXTENT_BLOCKS):
                length = min(count - done, _MAX_EXTENT_BLOCKS)
                records.append(
                    (logical + done, struct.pack("<IHHI", logical + done, length, 0, start + done))
                )
        depth = 0
        while len(records) > _ROOT_EXTENTS:
            above = []
            for index in range(0, len(records), _NODE_EXTENTS):
                node = records[index : index + _NODE_EXTENTS]
                block = self._allocate(1)
                _pwrite(fd, _extent_node(node, _NODE_EXTENTS, depth), block * BLOCK_BYTES)
                above.append((node[0][0], struct.pack("<IIHH", node[0][0], block, 0, 0)))
            records, depth = above, depth + 1
        return _extent_node(records, _ROOT_EXTENTS, depth)


def _files(tree: Tree) -> list[_File]:
    """What the tree's inodes become, by inode number."""
    root = _File(tree.root, _ROOT_INO, b"", links=2, parent_ino=_ROOT_INO)
    files = {tree.root: root}
    next_ino = _FIRST_INO
    entries = tree.root.entries
    if _LOST_FOUND not in entries:
        made = Inode(stat.S_IFDIR | 0o700, mtime_s=tree.root.mtime_s)
        files[made] = _File(made, next_ino, _LOST_FOUND, links=2)
        next_ino += 1
        entries = {**entries, _LOST_FOUND: made}
    for path, inode in tree.walk():
        file = files.get(inode)
        if file is None:
            file = files[inode] = _File(inode, next_ino, path)
            next_ino += 1
        file.links += 2 if inode.is_directory else 1
        if file.links > _MAX_LINKS and not inode.is_directory:
            raise ImageError(f"{_shown(path)} has more than {_MAX_LINKS} hard links")
    for file in files.values():  # directories before what they hold, which learns its parent from them
        inode = file.inode
        if inode.is_directory:
            names = sorted((entries if file is root else inode.entries).items())
            children = {name: files[child] for name, child in names}
            for child in children.values():
                if child.inode.is_directory:
                    child.parent_ino = file.ino
                    file.links += 1
            file.content = _directory(file, children)
        elif len(inode.target) > _MAX_FAST_SYMLINK_BYTES:
            file.content = inode.target
        file.size_bytes = inode.data.size_bytes if inode.data else len(inode.target) or len(file.content)
        file.runs = (
            _runs(inode.data) if inode.data else [(0, _blocks(len(file.content)))] if file.content else []
        )
        if file.size_bytes > _MAX_BLOCKS * BLOCK_BYTES - BLOCK_BYTES:
            raise ImageError(f"{_shown(file.path)} has {file.size_bytes} bytes: too long for ext4")
        file.xattr_entries, file.xattr_block = _xattrs(file)
    return sorted(files.values(), key=lambda file: file.ino)


def _shown(path: bytes) -> str:
    return repr(path.decode("utf-8", "replace"))


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES)


def _runs(data: FileData) -> list[tuple[int, int]]:
    """The blocks that have data: (first logical block, number of blocks)."""
    runs: list[list[int]] = []
    for offset, _, size_bytes in sorted(data.chunks):
        first, end = offset // BLOCK_BYTES, _blocks(offset + size_bytes)
        if runs and first <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([first, end])
    return [(first, end - first) for first, end in runs]


def _block_count(file: _File) -> int:
    """How many blocks `_Plan._write_content` takes."""
    count = sum(blocks for _, blocks in file.runs) + bool(file.xattr_block)
    records = sum(-(-blocks // _MAX_EXTENT_BLOCKS) for _, blocks in file.runs)
    while records > _ROOT_EXTENTS:
        records = -(-records // _NODE_EXTENTS)
        count += records
    return count


def _extent_node(records: list[tuple[int, bytes]], maximum: int, depth: int) -> bytes:
    header = struct.pack("<HHHHI", _EXTENT_MAGIC, len(records), maximum, depth, 0)
    return header + b"".join(record for _, record in records)


def _directory(file: _File, children: dict[bytes, _File]) -> bytes:
    """A directory's blocks (directory.rst, Linear Directories)."""
    entries = [(b".", file.ino, 2), (b"..", file.parent_ino, 2)]
    for name, child in children.items():
        entries.append((name, child.ino, _FILE_TYPES[stat.S_IFMT(child.inode.mode)]))
    blocks: list[bytearray] = [bytearray()]
    last = 0  # where the last entry of the last block begins
    for name, ino, file_type in entries:
        length = 8 + -(-len(name) // 4) * 4
        if len(blocks[-1]) + length > BLOCK_BYTES:
            _extend_to_end(blocks[-1], last)
            blocks.append(bytearray())
        last = len(blocks[-1])
        blocks[-1] += struct.pack("<IHBB", ino, length, len(name), file_type) + name.ljust(length - 8, b"\0")
    _extend_to_end(blocks[-1], last)
    return b"".join(blocks)


def _extend_to_end(block: bytearray, last: int) -> None:
    struct.pack_into("<H", block, last + 4, BLOCK_BYTES - last)
    block.extend(bytes(BLOCK_BYTES - len(block)))


def _device(major: int, minor: int) -> bytes:
    """How ext4 keeps a device number: the old 16 bits where they do, as `old_valid_dev()` decides."""
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def _xattrs(file: _File) -> tuple[bytes, bytes]:
    """Extended attributes as they stand in the inode, or else in a block (attributes.rst); both empty: none."""
    attributes = []
    for full_name, value in file.inode.xattrs.items():
        for prefix, index in _XATTR_PREFIXES.items():
            if full_name.startswith(prefix):
                name = full_name.removeprefix(prefix)
                if not 0 < len(name) < 256:
                    raise ImageError(f"{_shown(file.path)} has an extended attribute with an impossible name")
                attributes.append((index, len(name), name, value))
    if not attributes:
        return b"", b""
    attributes.sort()
    size_bytes = 4 + sum(16 + _padded(length) + _padded(len(value)) for _, length, _, value in attributes)
    if size_bytes <= _XATTR_IN_INODE_BYTES:
        return _packed_xattrs(attributes, _XATTR_IN_INODE_BYTES, 0), b""
    if size_bytes > BLOCK_BYTES - 32:
        raise ImageError(
            f"{_shown(file.path)} has more extended attributes than ext4 takes, {size_bytes} bytes"
        )
    header = struct.pack("<IIIII12x", _XATTR_MAGIC, 1, 1, 0, 0)
    return b"", header + _packed_xattrs(attributes, BLOCK_BYTES - 32, 32)


def _packed_xattrs(attributes: list[tuple[int, int, bytes, bytes]], space_bytes: int, base: int) -> bytes:
    """Names from the beginning on, values from the end; offsets of values count from `base` before the beginning."""
    entries, values = b"", b""
    for index, length, name, value in attributes:
        values = value.ljust(_padded(len(value)), b"\0") + values
        offset = base + space_bytes - len(values) if value else 0
        entries += struct.pack("<BBHIII", length, index, offset, 0, len(value), _xattr_hash(name, value))
        entries += name.ljust(_padded(length), b"\0")
    return entries.ljust(space_bytes - len(values), b"\0") + values


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // 4) * 4


def _xattr_hash(name: bytes, value: bytes) -> int:
    """The kernel's `ext4_xattr_hash_entry()`."""
    result = 0
    for byte in name:
        result = (result << 5 & 0xFFFFFFFF) ^ (result >> 27) ^ byte
    for (word,) in struct.iter_unpack("<I", value.ljust(_padded(len(value)), b"\0")):
        result = (result << 16 & 0xFFFFFFFF) ^ (result >> 16) ^ word
    return result


def _bitmap(used: int, size: int) -> bytes:
    """A bitmap's block: the first `used` bits, and those that stand for nothing, from `size` on."""
    bits = (1 << used) - 1 | (1 << 8 * BLOCK_BYTES) - (1 << size)
    return bits.to_bytes(BLOCK_BYTES, "little")


def _copy(fd: int, data: FileData, runs: list[tuple[int, int]], starts: list[int]) -> None:
    firsts = [first for first, _ in runs]
    for offset, position, size_bytes in data.chunks:
        run = bisect_right(firsts, offset // BLOCK_BYTES) - 1
        os.lseek(fd, (starts[run] - firsts[run]) * BLOCK_BYTES + offset, os.SEEK_SET)
        while size_bytes:
            copied = os.sendfile(fd, data.source.fileno(), position, size_bytes)
            if copied == 0:
                raise ImageError("a layer changed while it was read")
            position += copied
            size_bytes -= copied


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
