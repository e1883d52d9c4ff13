"""Merging layers."""

import io
import stat
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmkit.errors import ImageError
from kvmkit.images import tree as tree_module
from kvmkit.images.tree import Inode, Tree

from .conftest import Entry, directory, hard_link, layer, symlink


def merged(*layers: bytes) -> Tree:
    tree = Tree()
    for number, data in enumerate(layers):
        tree.apply_layer(io.BytesIO(data), f"layer {number}")
    return tree


def paths(tree: Tree) -> list[str]:
    return [path.decode() for path, _ in tree.walk()]


def content(inode: Inode) -> bytes:
    if inode.data is None:
        return b""
    result = bytearray(inode.data.size_bytes)
    for offset, position, size_bytes in inode.data.chunks:
        inode.data.source.seek(position)
        result[offset : offset + size_bytes] = inode.data.source.read(size_bytes)
    return bytes(result)


def at(tree: Tree, path: str) -> Inode:
    return dict(tree.walk())[path.encode()]


def test_an_entry_replaces_what_is_below() -> None:
    tree = merged(
        layer(Entry("a/f", b"old", uid=1), directory("d"), Entry("d/x"), symlink("s", "a")),
        layer(
            Entry("./a/f", b"new", mode=0o4755, uid=1000, gid=70000), Entry("d"), directory("s"), Entry("s/y")
        ),
    )
    assert paths(tree) == ["a", "a/f", "d", "s", "s/y"]
    file = at(tree, "a/f")
    assert content(file) == b"new"
    assert (file.mode, file.uid, file.gid) == (stat.S_IFREG | 0o4755, 1000, 70000)


def test_a_directory_keeps_what_it_holds_and_takes_the_attributes() -> None:
    tree = merged(layer(directory("d"), Entry("d/x")), layer(directory("d", 0o1777, uid=5, mtime=7.9)))
    assert paths(tree) == ["d", "d/x"]
    assert (at(tree, "d").mode, at(tree, "d").uid, at(tree, "d").mtime_s) == (stat.S_IFDIR | 0o1777, 5, 7)


def test_the_root_has_attributes() -> None:
    root = merged(layer(directory("./", 0o711, uid=3))).root
    assert (root.mode, root.uid) == (stat.S_IFDIR | 0o711, 3)


def test_whiteouts() -> None:
    tree = merged(
        layer(Entry("a"), Entry("b"), Entry("d/x"), Entry("d/e/y"), Entry("gone/z")),
        layer(Entry(".wh.a"), Entry("d/.wh.x"), Entry(".wh.gone"), Entry(".wh.never"), Entry("no/.wh.where")),
    )
    assert paths(tree) == ["b", "d", "d/e", "d/e/y"]


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_mean_lower_layers_alone(first: bool) -> None:
    new = [Entry("d/new"), Entry("a", b"again")]
    marks = [Entry("d/.wh..wh..opq"), Entry(".wh.a")]
    tree = merged(
        layer(Entry("a", b"old"), Entry("d/x"), Entry("d/e/y")),
        layer(*(marks + new if first else new + marks)),
    )
    assert paths(tree) == ["a", "d", "d/new"]
    assert content(at(tree, "a")) == b"again"


def test_aufs_metadata_mean_nothing() -> None:
    assert paths(merged(layer(Entry("a")), layer(Entry(".wh..wh.aufs"), directory(".wh..wh.plnk")))) == ["a"]


def test_an_opaque_root() -> None:
    assert paths(merged(layer(Entry("a"), Entry("d/x")), layer(Entry(".wh..wh..opq"), Entry("b")))) == ["b"]


def test_hard_links_share() -> None:
    tree = merged(
        layer(Entry("a", b"1"), hard_link("d/b", "/a")), layer(hard_link("c", "./d/b")), layer(Entry(".wh.a"))
    )
    assert paths(tree) == ["c", "d", "d/b"]
    assert at(tree, "c") is at(tree, "d/b")
    assert content(at(tree, "c")) == b"1"


def test_symbolic_links_are_followed_within_the_root() -> None:
    tree = merged(
        layer(
            symlink("lib", "usr/lib"),
            symlink("up", "../../../etc"),
            symlink("abs", "/etc"),
            symlink("e/l", "../usr"),
        ),
        layer(Entry("lib/a"), Entry("up/b"), Entry("abs/c"), Entry("e/l/d"), hard_link("h", "lib/a")),
    )
    assert [path for path, inode in tree.walk() if stat.S_ISREG(inode.mode)] == [
        *(b"etc/b", b"etc/c", b"h", b"usr/d", b"usr/lib/a")
    ]
    # … but not a link at the end, which an entry replaces, and a hard link links
    tree = merged(layer(symlink("s", "/etc/passwd")), layer(hard_link("t", "s")), layer(Entry("s", b"mine")))
    assert at(tree, "t").target == b"/etc/passwd"
    assert paths(tree) == ["s", "t"]


def test_absolute_names_are_the_images() -> None:
    assert paths(merged(layer(Entry("/etc//./passwd")))) == ["etc", "etc/passwd"]


def test_devices_fifos_and_attributes() -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    tree = merged(
        layer(
            Entry("null", type=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
            Entry("disk", type=tarfile.BLKTYPE, device=(259, 70000)),
            Entry("fifo", type=tarfile.FIFOTYPE),
            Entry(
                "ping", b"x", xattrs={"security.capability": capability, "user.\xe4": b"1", "system.no": b"2"}
            ),
        )
    )
    assert (at(tree, "null").mode, at(tree, "null").device) == (stat.S_IFCHR | 0o666, (1, 3))
    assert (stat.S_IFMT(at(tree, "disk").mode), at(tree, "disk").device) == (stat.S_IFBLK, (259, 70000))
    assert stat.S_ISFIFO(at(tree, "fifo").mode)
    assert at(tree, "ping").xattrs == {b"security.capability": capability, "user.\xe4".encode(): b"1"}


def test_a_name_that_is_no_utf8() -> None:
    assert dict(merged(layer(Entry("a\udcff"))).walk()).keys() == {b"a\xff"}


def test_a_sparse_file() -> None:
    # GNU's format as tar --sparse writes it: tarfile reads but doesn't write it.
    info = tarfile.TarInfo("s")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 8
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for index, (offset, size) in enumerate([(4096, 3), (9000, 5)]):
        header[386 + 24 * index : 386 + 24 * index + 24] = b"%011o\0%011o\0" % (offset, size)
    header[483:495] = b"%011o\0" % 10000
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    tree = merged(bytes(header) + b"abcdefgh".ljust(512, b"\0") + bytes(1024))
    expected = bytearray(10000)
    expected[4096:4099], expected[9000:9005] = b"abc", b"defgh"
    assert content(at(tree, "s")) == bytes(expected)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("../x")], "'..'"),
        ([Entry("a/../../x")], "'..'"),
        ([Entry("/..")], "'..'"),
        ([hard_link("a", "../../etc/passwd")], "'..'"),
        ([hard_link("a", "/etc/passwd")], "no such file"),
        ([directory("d"), hard_link("a", "d")], "no such file"),
        ([hard_link("a", "a")], "no such file"),
        ([hard_link("a", "")], "no such file"),
        ([symlink("a", "b"), symlink("b", "a"), Entry("a/x")], "too many symbolic links"),
        ([Entry("f"), Entry("f/x")], "'f' is no directory"),
        ([Entry("n" * 256)], "no path"),
        ([Entry("/".join("n" * 1500))], "no path"),
        ([symlink("a", "n" * 300), Entry("a/x")], "no path"),
        ([symlink("a", "n" * 5000)], "symbolic link to"),
        ([symlink("a", "")], "symbolic link to"),
        ([Entry("a", type=tarfile.CHRTYPE, device=(5000, 1))], "5000:1"),
        ([Entry("a", uid=1 << 33)], "8589934592:0"),
        ([Entry("a", uid=-1)], "-1:0"),
        ([Entry("a", type=b"Z")], "unknown type"),
    ],
)
def test_malicious_entries_are_refused(entries: list[Entry], message: str) -> None:
    with pytest.raises(ImageError, match="layer 0") as error:
        merged(layer(*entries))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"no tar" * 1000,
        layer(Entry("a", b"x" * 2000))[:1500],  # a file cut off
        layer(Entry("a", b"x"))[:300],  # a header cut off
        layer(Entry("a"), Entry("b")).replace(b"b\0\0\0", b"c\0\0\0"),  # a checksum
    ],
)
def test_a_damaged_archive(damaged: bytes) -> None:
    with pytest.raises(ImageError, match="layer 0"):
        merged(damaged)


@pytest.mark.parametrize("mtime", ["nan", "inf", "-inf", "1e300", "-1e300"])
def test_odd_times(mtime: str) -> None:
    assert paths(merged(layer(Entry("a", mtime=float(mtime) if "e" in mtime else 0)))) == ["a"]
    data = layer(Entry("a", mtime=1234567890.5)).replace(
        b"mtime=1234567890.5", b"mtime=" + mtime.rjust(12).encode()
    )
    assert paths(merged(data)) == ["a"]


def test_a_header_of_gigabytes_is_not_read() -> None:
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32

    class Endless(io.BytesIO):
        def read(self, size_bytes: int | None = -1) -> bytes:
            assert size_bytes is not None
            assert 0 <= size_bytes <= 1 << 20
            return super().read(size_bytes)

    with pytest.raises(ImageError, match="headers are too long"):
        Tree().apply_layer(Endless(info.tobuf(tarfile.PAX_FORMAT)), "layer")


def test_the_number_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_MAX_FILES", 5)
    merged(layer(Entry("a/b/c/d")))
    with pytest.raises(ImageError, match="more than 5 files"):
        merged(layer(Entry("a/b/c/d/e")))
    with pytest.raises(ImageError, match="more than 5 entries"):
        merged(layer(*[Entry("a")] * 6))


# The model: a file system is a flat dictionary of paths; a file is its content and a token that hard links share.

Path = tuple[str, ...]
Model = dict[Path, object]
NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
OPERATIONS = st.tuples(st.sampled_from(["file", "dir", "link", "remove", "opaque"]), PATHS, PATHS)


def remove(model: Model, path: Path, *, itself: bool) -> None:
    for other in list(model):
        if other[: len(path)] == path and (itself or other != path):
            del model[other]


def model_apply(model: Model, operations: list[tuple[str, Path, Path]], number: int) -> bool:
    """False if an operation can't be."""
    for kind, path, _ in operations:
        if all(model.get(path[:end]) == "dir" for end in range(1, len(path))):
            if kind == "remove":
                remove(model, path, itself=True)
            if kind == "opaque" and model.get(path) == "dir":
                remove(model, path, itself=False)
    for index, (kind, path, target) in enumerate(operations):
        if kind in ("remove", "opaque"):
            continue
        for end in range(1, len(path)):
            if model.setdefault(path[:end], "dir") != "dir":
                return False
        if kind == "dir":
            if model.get(path) != "dir":
                model[path] = "dir"
        elif kind == "file":
            remove(model, path, itself=True)
            model[path] = (number, index)
        else:
            linked = model.get(target)
            if linked in (None, "dir"):
                return False
            remove(model, path, itself=True)
            model[path] = linked
    return True


def entry(kind: str, path: Path, target: Path, data: bytes) -> Entry:
    name = "/".join(path)
    match kind:
        case "file":
            return Entry(name, data)
        case "dir":
            return directory(name)
        case "link":
            return hard_link(name, "/".join(target))
        case "remove":
            return Entry("/".join([*path[:-1], ".wh." + path[-1]]))
    return Entry(name + "/.wh..wh..opq")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(OPERATIONS, max_size=8), min_size=1, max_size=4))
def test_merging_agrees_with_the_model(layers: list[list[tuple[str, Path, Path]]]) -> None:
    model: Model = {}
    tree = Tree()
    for number, operations in enumerate(layers):
        data = layer(
            *(entry(*operation, f"{number} {index}".encode()) for index, operation in enumerate(operations))
        )
        if not model_apply(model, operations, number):
            with pytest.raises(ImageError):
                tree.apply_layer(io.BytesIO(data), "layer")
            return
        tree.apply_layer(io.BytesIO(data), "layer")
    real = {
        tuple(path.decode().split("/")): "dir" if inode.is_directory else content(inode).decode()
        for path, inode in tree.walk()
    }
    assert real == {path: "dir" if what == "dir" else "{} {}".format(*what) for path, what in model.items()}  # type: ignore[misc]
    shared: dict[Inode, set[object]] = {}
    for path, inode in tree.walk():
        shared.setdefault(inode, set()).add(model[tuple(path.decode().split("/"))])
    assert all(len(tokens) == 1 for tokens in shared.values())


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(
            [
                b"\0",
                b"/",
                b"..",
                b"7",
                b"-",
                b"\x80",
                b"\xff" * 12,
                b"77777777777",
                *(b"%d" % n for n in range(7)),
                b"x",
                b"g",
                b"S",
                b"L",
            ]
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(MUTATIONS)
def test_a_damaged_archive_is_refused_or_merged(mutations: list[tuple[int, bytes]]) -> None:
    """Whatever a header says (with a right checksum, or `tarfile` would look no further), nothing but `ImageError`."""
    data = bytearray(
        layer(
            Entry("a/b", b"x", xattrs={"user.a": b"v"}),
            symlink("s", "a"),
            hard_link("h", "a/b"),
            Entry("d/.wh..wh..opq"),
        )
    )
    for position, change in mutations:
        data[position % len(data) : position % len(data) + len(change)] = change
    for start in range(0, len(data) - 511, 512):
        header = data[start : start + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    with suppress(ImageError):
        merged(bytes(data)).walk()
