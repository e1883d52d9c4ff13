"""From what others make to images in the cache, and what a root's name finds."""

import fcntl
import gzip
import io
import json
import os
import re
import shutil
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kvmkit.errors import ImageError
from kvmkit.images import DirectoryRoot, ImageConfig, ImageRoot, Store, build, import_image, oci, resolve
from kvmkit.images.debian import _deb822_sources, _one_line_sources, _sources, debian
from kvmkit.images.store import Content
from kvmkit.images.tree import Tree

from .conftest import (
    Entry,
    debugfs,
    directory,
    e2fsck,
    files_of,
    gzipped,
    layer,
    sha256,
    symlink,
    write_docker,
    write_layout,
    write_tar,
)

LAYERS = [
    layer(
        directory("bin"), Entry("bin/sh", b"shell", mode=0o755), Entry("etc/old"), symlink("lib", "usr/lib")
    ),
    layer(Entry("etc/.wh.old"), Entry("etc/new", b"two", uid=1000), Entry("lib/x")),
]
CONFIG = {
    "Env": ["PATH=/bin", "EMPTY=", "X=a=b"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["true"],
    "WorkingDir": "/srv",
    "User": "1000:100",
}


@pytest.fixture(autouse=True)
def amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci, "ARCHITECTURE", "amd64")


def quiet(_: str) -> None:
    pass


def check(image: Path) -> None:
    e2fsck(image)
    new, lib = debugfs(image, "stat etc/new", "ls usr/lib")
    assert "User:  1000" in new
    assert " x " in lib
    assert "old" not in debugfs(image, "ls etc")[0]


@pytest.mark.parametrize("pack", [bytes, gzipped, zstandard.compress])
def test_a_layout(pack: Callable[[bytes], bytes], tmp_path: Path, cache: Path) -> None:
    digest = write_layout(tmp_path / "layout", LAYERS, CONFIG, pack=pack, name="app:1")
    image = import_image(tmp_path / "layout", progress=quiet)
    check(image.path)
    assert image.path == cache / "app:1/root.ext4"
    assert (image.name, image.build_id, image.architecture, image.fstype) == (
        "app:1",
        digest,
        "amd64",
        "ext4",
    )
    assert image.config == ImageConfig(
        env=(("PATH", "/bin"), ("EMPTY", ""), ("X", "a=b")),
        entrypoint=("/bin/sh", "-c"),
        cmd=("true",),
        cwd="/srv",
        user="1000:100",
    )
    assert image.config.command == ("/bin/sh", "-c", "true")
    assert image.path.stat().st_mode & 0o222 == 0
    assert image.size_bytes == image.path.stat().st_size
    assert Store().images() == [image]


@pytest.mark.parametrize("pack", [bytes, gzipped, zstandard.compress])
def test_a_docker_archive(pack: Callable[[bytes], bytes], tmp_path: Path, cache: Path) -> None:
    write_docker(tmp_path / "app.tar", LAYERS, CONFIG)
    path = tmp_path / "app.tar.x"
    path.write_bytes(pack((tmp_path / "app.tar").read_bytes()))
    image = import_image(path, progress=quiet)
    check(image.path)
    assert (image.name, image.source, image.config.cwd) == ("app:1", str(path), "/srv")


def test_an_oci_archive(tmp_path: Path, cache: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS)
    write_tar(tmp_path / "app.tar", files_of(tmp_path / "layout"))
    image = import_image(tmp_path / "app.tar", "mine", progress=quiet)
    check(image.path)
    assert (image.name, image.config) == ("mine", ImageConfig())


def test_what_docker_linked(tmp_path: Path, cache: Path) -> None:
    """Docker once wrote a layer that was there already as a symbolic link."""
    write_docker(tmp_path / "a.tar", [LAYERS[1], LAYERS[1]])
    out = io.BytesIO()
    with tarfile.open(tmp_path / "a.tar") as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            if member.name == "1/layer.tar":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "../0/layer.tar", 0
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    assert " x " in debugfs(import_image(tmp_path / "a.tar", progress=quiet).path, "ls lib")[0]


def test_the_same_image_gives_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS)
    first = import_image(tmp_path / "layout", "a", 1 << 20, progress=quiet)
    second = import_image(tmp_path / "layout", "b", 1 << 20, progress=quiet)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_one_of_several_platforms(tmp_path: Path, cache: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS[:1], architecture="arm64")
    arm = json.loads((tmp_path / "layout/index.json").read_text())["manifests"]
    write_layout(tmp_path / "layout", LAYERS)
    amd = json.loads((tmp_path / "layout/index.json").read_text())["manifests"]
    for manifests in (
        [{**arm[0], "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}, *amd],
        [*amd, *amd],
    ):
        (tmp_path / "layout/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        check(import_image(tmp_path / "layout", progress=quiet).path)


def nothing_left(cache: Path) -> bool:
    return list(cache.iterdir()) == []


def damage(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the files of a layout."""
    files = files_of(path)
    change(files)
    for file in path.rglob("*"):
        if file.is_file():
            file.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)


def blob(data: bytes) -> str:
    return "blobs/" + sha256(data).replace(":", "/")


def cut(files: dict[str, bytes]) -> None:
    files[blob(gzipped(LAYERS[0]))] = gzipped(LAYERS[0])[:-9]


def other_layer(files: dict[str, bytes]) -> None:
    files[blob(gzipped(LAYERS[0]))] = gzipped(LAYERS[1])


def no_layer(files: dict[str, bytes]) -> None:
    del files[blob(gzipped(LAYERS[0]))]


def other_json(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if b'"diff_ids"' in data:
            files[name] = data.replace(b"amd64", b"amd46")


def index(value: Any) -> Callable[[dict[str, bytes]], None]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda files: files.update({"index.json": data})


def itself(files: dict[str, bytes]) -> None:
    """An index that names another, and so on: it can't name itself, for that takes its digest."""
    data = files["index.json"]
    for _ in range(10):
        files[blob(data)] = data
        item = {
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": sha256(data),
            "size": len(data),
        }
        data = json.dumps({"manifests": [item]}).encode()
    files["index.json"] = data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "layer 1 of 2 is damaged"),
        (other_layer, f"layer 1 of 2 is damaged: its digest is {sha256(gzipped(LAYERS[1]))}"),
        (no_layer, "layer 1 of 2 is missing"),
        (other_json, "is damaged: its digest is"),
        (itself, "indexes within indexes"),
        (index(b"no JSON"), "no JSON"),
        (index(b"[" * 100_000), "no JSON"),
        (index(b" " * (9 << 20)), "more than 8 MiB"),
        (index([]), "an object"),
        (index({}), "a list"),
        (index({"manifests": []}), "no image for linux/amd64"),
        (index({"manifests": [{"digest": "sha256:../../../../etc/passwd"}]}), "digest"),
        (index({"manifests": [{"digest": "sha256:" + "0" * 64}]}), "is missing"),
        (index({"manifests": [{"digest": "sha256:" + number * 64} for number in "01"]}), "holds 2 images"),
        (
            index({"manifests": [{"platform": {"os": "windows", "architecture": "amd64"}}]}),
            "only for: windows/amd64",
        ),
    ],
)
def test_a_damaged_layout(
    change: Callable[[dict[str, bytes]], None], message: str, tmp_path: Path, cache: Path
) -> None:
    write_layout(tmp_path / "layout", LAYERS)
    damage(tmp_path / "layout", change)
    with pytest.raises(ImageError) as error:
        resolve(str(tmp_path / "layout"), quiet)
    assert message in str(error.value)
    assert "layout" in str(error.value)
    assert nothing_left(cache)


def test_a_damaged_docker_archive(tmp_path: Path, cache: Path) -> None:
    write_docker(tmp_path / "a.tar", LAYERS)
    whole = (tmp_path / "a.tar").read_bytes()
    for old, new, message in (
        (b"shell", b"shelf", "layer 1 of 2 is damaged: its digest is"),
        (b"linux", b"linus", "is damaged: its digest is"),
        (b'"0/layer.tar"', b'"9/layer.tar"', "layer 1 of 2 is missing (9/layer.tar)"),
        (b'"Layers"', b'"layers"', "a list"),
        (b'"Config"', b'"config"', "names the configuration None"),
        (b"manifest.json", b"manifesto.jso", "no image: neither"),
    ):
        assert old in whole
        files = {}
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file
                files[member.name.replace(old.decode(), new.decode())] = file.read().replace(old, new)
        write_tar(tmp_path / "a.tar", files)
        with pytest.raises(ImageError) as error:
            resolve(str(tmp_path / "a.tar"), quiet)
        assert message in str(error.value)
    (tmp_path / "a.tar").write_bytes(whole[:20000])
    with pytest.raises(ImageError):
        resolve(str(tmp_path / "a.tar"), quiet)
    assert nothing_left(cache)


def test_malicious_layers_change_nothing_outside(tmp_path: Path, cache: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for number, entries in enumerate(
        (
            [Entry("../../../../escaped", b"x")],
            [symlink("out", str(tmp_path)), Entry("out/../../escaped")],
        )
    ):
        write_layout(tmp_path / f"bad{number}", [layer(*entries)])
        with pytest.raises(ImageError, match=r"'\.\.'"):
            resolve(str(tmp_path / f"bad{number}"), quiet)
    write_layout(tmp_path / "bad2", [layer(symlink("out", str(tmp_path)), Entry("out/escaped"))])
    root = resolve(str(tmp_path / "bad2"), quiet)
    assert isinstance(root, ImageRoot)
    assert "escaped" in debugfs(root.path, f"ls {tmp_path}")[0]
    after = sorted(
        path
        for path in tmp_path.rglob("*")
        if not path.is_relative_to(tmp_path / "cache") and "bad" not in str(path)
    )
    assert [path for path in before if "cache" not in str(path)] == after


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_bomb(
    compress: Callable[[bytes], bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci, "MAX_IMAGE_BYTES", 1 << 20)
    write_layout(tmp_path / "layout", [layer(Entry("zeros", bytes(4 << 20)))], pack=compress)
    with pytest.raises(ImageError, match="unpacked: refused"):
        resolve(str(tmp_path / "layout"), quiet)
    (tmp_path / "a.tar.x").write_bytes(compress(bytes(4 << 20)))
    with pytest.raises(ImageError, match="unpacked: refused"):
        resolve(str(tmp_path / "a.tar.x"), quiet)
    assert nothing_left(cache)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"Env": ["novalue"]}, "NAME=VALUE"),
        ({"Env": ["=x"]}, "NAME=VALUE"),
        ({"Env": "A=b"}, "Env can't be"),
        ({"Cmd": [1]}, "Cmd can't be"),
        ({"Cmd": ["a\0b"]}, "without NUL"),
        ({"WorkingDir": []}, None),
        ({"User": 5}, "User can't be"),
        ({"Cmd": None, "Env": None}, None),
        ({"Cmd": {}}, None),
        ({"Entrypoint": {"a": 1}}, "Entrypoint can't be"),
    ],
)
def test_configurations(config: dict[str, Any], message: str | None, tmp_path: Path, cache: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS, config)
    if message is None:
        assert import_image(tmp_path / "layout", progress=quiet).config == ImageConfig()
    else:
        with pytest.raises(ImageError, match=message):
            import_image(tmp_path / "layout", progress=quiet)


def test_another_architecture(tmp_path: Path, cache: Path) -> None:
    write_docker(tmp_path / "a.tar", LAYERS)
    data = (tmp_path / "a.tar").read_bytes()
    about = data[data.index(b'{"architecture') :].split(b"\0")[0].replace(b"amd64", b"s390x")
    name = sha256(about)[7:] + ".json"
    manifest = json.dumps([{"Config": name, "Layers": []}]).encode()
    write_tar(tmp_path / "a.tar", {name: about, "manifest.json": manifest})
    with pytest.raises(ImageError, match="is for linux/s390x, and machines here are linux/amd64"):
        import_image(tmp_path / "a.tar", progress=quiet)


def test_a_root_that_is_imported_on_first_use(tmp_path: Path, cache: Path) -> None:
    write_layout(tmp_path / "layout", LAYERS, CONFIG)
    said: list[str] = []
    root = resolve(str(tmp_path / "layout"), said.append)
    assert isinstance(root, ImageRoot)
    assert root.config.cwd == "/srv"
    check(root.path)
    assert "unpacking layout: layer 1 of 2" in said
    said.clear()
    assert resolve(str(tmp_path / "layout"), said.append) == root
    assert said == []
    # It changes: another image, and the old one goes
    write_layout(tmp_path / "layout", LAYERS[1:], CONFIG)
    other = resolve(str(tmp_path / "layout"), quiet)
    assert isinstance(other, ImageRoot)
    assert other.path != root.path
    assert not root.path.exists()
    # Its name in the cache is a root as well
    assert resolve(Store().images()[0].name, quiet) == other


def test_other_roots(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("/", quiet) == DirectoryRoot(Path("/"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="neither bin nor usr/bin"):
        resolve(str(tmp_path / "empty"), quiet)
    write_layout(tmp_path / "layout", LAYERS)
    image = import_image(tmp_path / "layout", progress=quiet)
    assert resolve(str(image.path), quiet) == ImageRoot(image.path, "ext4", ImageConfig())
    monkeypatch.chdir(image.path.parent)
    assert resolve("root.ext4", quiet) == ImageRoot(image.path, "ext4", ImageConfig())
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("no image" * 1000)
    for name, message in (
        ("none", "no such image or file"),
        ("no/such/path", "no such image or file"),
        (str(tmp_path / "fifo"), "neither a file nor a directory"),
        (str(tmp_path / "text"), "no OCI layout and no docker save archive, nor an ext4 image"),
        ("image.json", "nor an ext4 image"),
        ("debian:Bookworm", "no such image or file"),
    ):
        with pytest.raises(ImageError, match=message):
            resolve(name, quiet)


def content(data: bytes) -> Content:
    tree = Tree()
    tree.apply_layer(io.BytesIO(layer(Entry(data.decode()))), "layer")
    return Content(tree, ImageConfig(), sha256(data), "amd64")


def add(store: Store, name: str, data: bytes, **more: Any) -> Any:
    return store.add(name, lambda: content(data), quiet, source="test", size_bytes=1 << 20, **more)


def test_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    add(store, "b", b"first")
    image = add(store, "a:1", b"a")
    assert [image.name for image in store.images()] == ["a:1", "b"]
    assert store.find("a:1") == image
    assert add(store, "b", b"second", replace=False).build_id == sha256(b"first")
    assert add(store, "b", b"second").build_id == sha256(b"second")
    assert "second" in debugfs(tmp_path / "b/root.ext4", "ls")[0]
    assert image.disk_bytes < image.size_bytes
    store.remove("b")
    assert store.images() == [image]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a:1"]
    for name in ("b", "..", "", "a/../b", ".a:1.lock"):
        with pytest.raises(ImageError, match="no image"):
            store.remove(name)
    for name in ("../x", "", ".x", "x" * 200, "a b"):
        with pytest.raises(ImageError, match="no name"):
            add(store, name, b"x")


@pytest.mark.parametrize("about", ["", "{}", "[]", "null", '{"config": 5}', '{"fstype": 1}'], ids=str)
def test_a_damaged_image(about: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    add(store, "x", b"x")
    (tmp_path / "x/image.json").write_text(about)
    assert store.images() == []
    with pytest.raises(ImageError, match="damaged.*kvmkit image remove x"):
        store.find("x")
    store.remove("x")
    assert store.find("x") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ImageError, OSError])
def test_interrupted_it_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted() -> Content:
        assert (tmp_path / ".x.new").is_dir()
        raise error

    with pytest.raises(ImageError if error is OSError else error):
        store.add("x", interrupted, quiet, source="test")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.new").mkdir()
    (tmp_path / ".x.new/root.ext4").write_text("half")
    (tmp_path / ".x.old").mkdir()
    for name in ("killed", "alive"):
        (tmp_path / f".{name}.lock").touch()
        (tmp_path / f".{name}.new").mkdir()
        (tmp_path / f".{name}.old").mkdir()
    with open(tmp_path / ".alive.lock") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        add(Store(tmp_path), "x", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".alive.lock",
        ".alive.new",
        ".alive.old",
        "x",
    ]


def test_two_at_once(tmp_path: Path) -> None:
    """The second waits, says so, and takes what the first made."""
    store, said, results = Store(tmp_path), [], []
    waiting = threading.Event()

    def second() -> None:
        def progress(text: str) -> None:
            said.append(text)
            waiting.set()

        results.append(
            store.add("x", lambda: content(b"2"), progress, source="test", size_bytes=1 << 20, replace=False)
        )

    def first() -> Content:
        thread.start()
        assert waiting.wait(30)
        return content(b"1")

    thread = threading.Thread(target=second)
    image = store.add("x", first, quiet, source="test", size_bytes=1 << 20)
    thread.join(30)
    assert results == [image]
    assert said == ["waiting for another kvmkit, which makes x right now"]


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="set XDG_CACHE_HOME"):
        Store(tmp_path / "file")


def test_apts_sources(tmp_path: Path) -> None:
    assert list(
        _one_line_sources(
            "# deb http://no.example bookworm main\ndeb-src http://no.example bookworm main\n"
            "deb [ arch=amd64 signed-by=/x ] http://a.example/debian bookworm main contrib # yes\n"
            "deb http://a.example/other bookworm contrib\n\nnonsense\ndeb\n"
        )
    ) == [("http://a.example/debian", "bookworm")]
    deb822 = (
        "Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm\n  bookworm-updates\n"
        "Components: main\nSigned-By:\n -----BEGIN\n\nTypes: deb\nEnabled: no\nURIs: http://b.example\nSuites: bookworm\n"
        "Components: main\n"
    )
    assert list(_deb822_sources(deb822)) == [
        ("http://a.example/debian", "bookworm"),
        ("http://a.example/debian", "bookworm-updates"),
    ]
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(deb822)
    (tmp_path / "sources.list").write_text(
        "deb http://s.example bookworm-security main\ndeb http://x sid main\n"
    )
    assert _sources("bookworm", tmp_path) == [
        "deb http://s.example bookworm-security main",
        "deb http://a.example/debian bookworm main",
        "deb http://a.example/debian bookworm-updates main",
    ]
    assert _sources("trixie", tmp_path) == []


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(ImageError, match="apt install mmdebstrap fakechroot fakeroot"),
        debian("bookworm", (), tmp_path, quiet),
    ):
        pass


def fake_mmdebstrap(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = directory / "mmdebstrap"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_what_mmdebstrap_makes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").write_bytes(
        layer(
            Entry("usr/bin/python3", b"x"),
            Entry("etc/hostname"),
            Entry("etc/hosts"),
            Entry("etc/resolv.conf"),
            Entry("etc/apt/apt.conf.d/99mmdebstrap"),
        )
    )
    fake_mmdebstrap(
        tmp_path, f'echo "I: installing..." >&2; echo "$@" >{tmp_path}/said; cat {tmp_path}/made', monkeypatch
    )
    said: list[str] = []
    root = resolve("debian:bookworm", said.append)
    assert isinstance(root, ImageRoot)
    assert root.path == cache / "debian:bookworm/root.ext4"
    assert root.config.command == ("/bin/bash",)
    assert "installing" in said
    arguments = (tmp_path / "said").read_text()
    assert "--include=python3 " in arguments
    assert " bookworm - " in arguments
    assert "hosts" in debugfs(root.path, "ls etc")[0]
    for path in ("etc/hostname", "etc/resolv.conf", "etc/apt/apt.conf.d/99mmdebstrap"):
        assert (
            "not found" in debugfs(root.path, f"stat {path}")[0]
            or debugfs(root.path, f"stat {path}")[0] == ""
        )
    (tmp_path / "said").unlink()
    assert resolve("debian:bookworm", quiet) == root
    assert not (tmp_path / "said").exists()


def test_mmdebstraps_last_words(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mmdebstrap(tmp_path, 'echo "E: no such suite" >&2; exit 3', monkeypatch)
    with pytest.raises(ImageError, match=r"(?s)status 3.*E: no such suite"):
        resolve("debian:nosuch", quiet)
    assert nothing_left(cache)


def test_interrupted_mmdebstrap_is_stopped(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_mmdebstrap(
        tmp_path,
        f'trap "touch {tmp_path}/cleaned; exit 1" TERM; echo "I: go..." >&2; sleep 100 & wait',
        monkeypatch,
    )

    def progress(text: str) -> None:
        if text == "go":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("debian:bookworm", progress)
    assert (tmp_path / "cleaned").exists()
    assert nothing_left(cache)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="no mmdebstrap here: package mmdebstrap")
def test_debian_for_real(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    try:
        image = build("debian:bookworm", ["hello"], "hello", progress=said.append)
    except ImageError as error:
        if re.search("apt install|Failed to fetch|Could not|Temporary failure", str(error)):
            pytest.skip(f"Debian's packages can't be had here: {error}")
        raise
    e2fsck(image.path)
    assert image.disk_bytes < 200_000_000
    for path, mode, user, group in (
        ("usr/bin/python3.11", 0o755, 0, 0),
        ("usr/bin/hello", 0o755, 0, 0),
        ("etc/shadow", 0o640, 0, 42),
        ("usr/bin/su", 0o4755, 0, 0),
        ("tmp", 0o1777, 0, 0),
    ):
        about = debugfs(image.path, f"stat {path}")[0]
        assert re.search(rf"Mode:  0?{mode:04o} .*\nUser: +{user} +Group: +{group} ", about, re.S), about
    assert "downloading packages with apt" in said
    out = tmp_path / "hosts"
    debugfs(image.path, f"dump etc/hosts {out}", f"dump etc/apt/sources.list {out}.list")
    assert "no-languages" in debugfs(image.path, "ls etc/apt/apt.conf.d")[0]
    assert "127.0.0.1 localhost" in out.read_text()
    assert " bookworm main" in (tmp_path / "hosts.list").read_text()
