"""File system images, as e2fsprogs sees them."""

import io
import os
import re
import stat
import tarfile
import tempfile
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmkit.errors import ImageError
from kvmkit.images import ext4
from kvmkit.images.ext4 import BLOCK_BYTES, write_ext4
from kvmkit.images.tree import FileData, Inode, Tree

from .conftest import Entry, debugfs, directory, e2fsck, hard_link, layer, symlink

UUID_ = UUID("01234567-89ab-cdef-0123-456789abcdef")


def tree_of(*entries: Entry) -> Tree:
    tree = Tree()
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the tree
    file.write(layer(*entries))
    tree.apply_layer(file, "layer")
    return tree


def written(tree: Tree, directory: Path, size_bytes: int | None = None) -> Path:
    image = directory / "image"
    assert write_ext4(tree, image, UUID_, size_bytes) == image.stat().st_size
    return image


def test_everything_that_a_root_holds(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    long_target = "/" + "/".join(["x" * 80] * 40)
    image = written(
        tree_of(
            directory("./", 0o751, uid=7),
            Entry("file", b"hello" * 10000, mode=0o4750, uid=70000, gid=1_000_000, mtime=5_000_000_000),
            hard_link("d/link", "file"),
            directory("d", 0o1777, mtime=-5),
            symlink("s", "d/link"),
            symlink("fast", "f" * 59),
            symlink("slow", long_target),
            Entry("null", type=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
            Entry("disk", type=tarfile.BLKTYPE, device=(259, 70000)),
            Entry("fifo", type=tarfile.FIFOTYPE),
            Entry("ping", b"x", xattrs={"security.capability": capability}),
            Entry("odd \"'\udcff", b"name"),
            Entry("many", xattrs={f"user.{number}": b"v" * number for number in range(60)}),
            Entry("empty"),
        ),
        tmp_path,
    )
    e2fsck(image)
    names = ["/", "file", "d", "fast", "slow", "null", "disk", "fifo", "empty", "s"]
    stats = dict(zip(names, debugfs(image, *(f"stat {name}" for name in names)), strict=True))
    assert re.search(r"Mode: +0751 .*\nUser: +7 ", stats["/"], re.S)
    assert re.search(
        r"Type: regular +Mode: +04750 .*\nUser: +70000 +Group: 1000000 .*Size: 50000", stats["file"], re.S
    )
    assert "Links: 2" in stats["file"]
    assert "mtime: 0x2a05f200:00000001" in stats["file"]  # 5e9
    assert re.search(r"Type: directory +Mode: +01777", stats["d"])
    assert "mtime: 0xfffffffb:00000000" in stats["d"]
    assert f'Fast link dest: "{"f" * 59}"' in stats["fast"]
    assert 'Fast link dest: "d/link"' in stats["s"]
    assert re.search(f"Type: symlink.*Size: {len(long_target)}", stats["slow"], re.S)
    assert "Device major/minor number: 01:03" in stats["null"]
    assert "Device major/minor number: 259:70000" in stats["disk"]
    assert "Type: FIFO" in stats["fifo"]
    assert "Size: 0" in stats["empty"]
    (tmp_path / "out").mkdir()
    debugfs(
        image, f"dump file {tmp_path}/out/file", f"dump slow {tmp_path}/out/slow", f"rdump d {tmp_path}/out"
    )
    assert (tmp_path / "out/file").read_bytes() == b"hello" * 10000
    assert (tmp_path / "out/d/link").read_bytes() == b"hello" * 10000
    assert (tmp_path / "out/slow").read_bytes() == long_target.encode()
    _, many = debugfs(image, f"ea_get -f {tmp_path}/ea ping security.capability", "ea_list many")
    assert (tmp_path / "ea").read_bytes() == capability
    assert all(f"user.{number} ({number})" in many for number in range(60))
    assert "odd \"'\\xff" in debugfs(image, "ls")[0]


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    entries = [Entry("b", b"1" * 5000), directory("a"), Entry("a/z", xattrs={"user.b": b"1", "user.a": b"2"})]
    images = []
    for name, order in (("1", entries), ("2", [entries[1], entries[2], entries[0]])):
        (tmp_path / name).mkdir()
        images.append(written(tree_of(*order), tmp_path / name, 1 << 20).read_bytes())
    assert images[0] == images[1]


def test_free_space_costs_nothing(tmp_path: Path) -> None:
    image = written(tree_of(Entry("a", b"x" * 100_000)), tmp_path)
    e2fsck(image)
    assert image.stat().st_size > 4 << 30
    assert image.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("size_bytes", [300_000, 1 << 20, (128 << 20) + 8192, 3 * (128 << 20), 1 << 40])
def test_sizes(size_bytes: int, tmp_path: Path) -> None:
    image = written(tree_of(Entry("a", b"x" * 100_000)), tmp_path, size_bytes)
    assert image.stat().st_size == size_bytes // BLOCK_BYTES * BLOCK_BYTES
    if size_bytes < 1 << 40:  # e2fsck takes a while for that one
        e2fsck(image)


def test_too_small(tmp_path: Path) -> None:
    tree = tree_of(Entry("a", b"x" * 3_000_000))
    with pytest.raises(ImageError, match=r"at least (\d+)M") as error:
        written(tree, tmp_path, 2_000_000)
    least = re.search(r"(\d+)M", str(error.value))
    assert least
    e2fsck(written(tree, tmp_path, int(least[1]) << 20))
    assert int(least[1]) < 300
    with pytest.raises(ImageError, match="16 TiB"):
        write_ext4(tree, tmp_path / "large", UUID_, 1 << 50)


def test_big_directories(tmp_path: Path) -> None:
    names = [f"{number:05}-{'n' * (number % 200)}" for number in range(3000)]
    image = written(
        tree_of(*(Entry(f"d/{name}") for name in names), *(directory(f"e/{name}") for name in names)),
        tmp_path,
    )
    e2fsck(image)
    listing = debugfs(image, "ls -p d")[0]
    assert [line.split("/")[5] for line in listing.splitlines() if line] == [".", "..", *names]
    assert "Links: 3002" in debugfs(image, "stat e")[0]


def test_more_links_than_ext4_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4, "_MAX_LINKS", 1000)
    tree = Tree()
    tree.root.entries = {b"%d" % number: Inode(stat.S_IFDIR | 0o755) for number in range(1100)}
    assert "Links: 1\n" in debugfs(written(tree, tmp_path), "stat /")[0].replace("   Blockcount", "\n")
    file = Inode(stat.S_IFREG)
    tree.root.entries = dict.fromkeys((b"%d" % number for number in range(1001)), file)
    (tmp_path / "image").unlink()
    with pytest.raises(ImageError, match="1000 hard links"):
        written(tree, tmp_path)


def test_many_small_files_get_enough_inodes(tmp_path: Path) -> None:
    tree = Tree()
    tree.root.entries = {b"%d" % number: Inode(stat.S_IFREG) for number in range(34000)}
    e2fsck(written(tree, tmp_path))
    (tmp_path / "image").unlink()
    e2fsck(written(tree, tmp_path, 200 << 20))


@pytest.mark.parametrize("pieces", [1, 4, 5, 340 * 4 + 1])
def test_fragments(pieces: int, tmp_path: Path) -> None:
    """Holes make extents; an inode has room for 4, a block for 340."""
    source = tempfile.TemporaryFile()  # noqa: SIM115
    source.write(b"".join(b"%08d" % number for number in range(pieces)))
    source.flush()
    chunks = tuple((number * 3 * BLOCK_BYTES + 4092, number * 8, 8) for number in range(pieces))
    size_bytes = pieces * 3 * BLOCK_BYTES
    tree = Tree()
    tree.root.entries[b"s"] = Inode(stat.S_IFREG | 0o644, data=FileData(source, size_bytes, chunks))
    image = written(tree, tmp_path)
    e2fsck(image)
    debugfs(image, f"dump s {tmp_path}/s")
    expected = bytearray(size_bytes)
    for offset, position, length in chunks:
        expected[offset : offset + length] = b"%08d" % (position // 8)
    assert (tmp_path / "s").read_bytes() == bytes(expected)


def test_files_longer_than_an_extent(tmp_path: Path) -> None:
    """An extent has 128 MiB at most; a file of 1 TiB with little in it costs little."""
    source = tempfile.TemporaryFile()  # noqa: SIM115
    source.truncate(140 << 20)
    os.pwrite(source.fileno(), b"end", (140 << 20) - 3)
    tree = Tree()
    tree.root.entries[b"long"] = Inode(stat.S_IFREG, data=FileData(source, 140 << 20, ((0, 0, 140 << 20),)))
    chunks = ((0, (140 << 20) - 3, 3), ((1 << 40) - 3, (140 << 20) - 3, 3))
    tree.root.entries[b"sparse"] = Inode(stat.S_IFREG, data=FileData(source, 1 << 40, chunks))
    image = written(tree, tmp_path)
    e2fsck(image)
    assert "Size: 1099511627776" in debugfs(image, "stat sparse")[0]
    (tmp_path / "out").mkdir()
    debugfs(image, f"dump long {tmp_path}/out/long")
    with open(tmp_path / "out/long", "rb") as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"\0end"


def test_what_ext4_does_not_take(tmp_path: Path) -> None:
    tree = Tree()
    tree.root.entries[b"f"] = Inode(stat.S_IFREG, data=FileData(io.BytesIO(), 1 << 60, ()))
    with pytest.raises(ImageError, match="too long"):
        written(tree, tmp_path)
    tree.root.entries[b"f"] = Inode(stat.S_IFREG, xattrs={b"user.x": b"1" * 5000})
    with pytest.raises(ImageError, match="extended attributes than ext4 takes"):
        written(tree, tmp_path)


def test_an_image_with_lost_found(tmp_path: Path) -> None:
    image = written(tree_of(directory("lost+found", 0o755), Entry("lost+found/x")), tmp_path)
    e2fsck(image)
    assert "x" in debugfs(image, "ls lost+found")[0]


XATTRS = st.dictionaries(
    st.text("abcd", min_size=1, max_size=12).map(lambda name: b"user." + name.encode()),
    st.binary(max_size=40),
    max_size=5,
)
LEAVES = st.builds(
    Inode,
    st.sampled_from([stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFREG]),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(-(1 << 62), 1 << 62),
    XATTRS,
)
INODES = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        lambda entries: Inode(stat.S_IFDIR | 0o755, entries=entries),
        st.dictionaries(
            st.binary(min_size=1, max_size=255).filter(
                lambda n: not set(n) & {0, 47} and n not in (b".", b"..")
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=30,
)


@settings(deadline=None, max_examples=15)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3).map(str.encode), INODES), st.integers(0, 1 << 20)
)
def test_any_tree_is_a_sound_file_system(entries: dict[bytes, Inode], more_bytes: int) -> None:
    tree = Tree()
    tree.root.entries = entries
    with tempfile.TemporaryDirectory() as name:
        e2fsck(written(tree, Path(name), (1 << 21) + more_bytes))
