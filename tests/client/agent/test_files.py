"""The guest's files by a real agent, and archives of a hostile one."""

import errno
import io
import os
import random
import socket
import stat
import subprocess
import tarfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.client.agent import Agent, FileStat, protocol, tar
from kvmkit.client.agent.protocol import FrameDecoder, encode
from kvmkit.errors import AgentError, GuestError, ProtocolError

DATA = random.Random(2).randbytes(10_000_000)


def tree(root: Path) -> dict[str, object]:
    """What is in a directory: kind, mode, time, and content."""
    found: dict[str, object] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        meta = path.lstat()
        what: object = None
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
            continue
        if path.is_file():
            what = path.read_bytes()
        found[str(path.relative_to(root))] = (stat.S_IMODE(meta.st_mode), int(meta.st_mtime), what)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with all that is copied."""
    root = tmp_path / "source"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(b"text")
    (root / "none").write_bytes(b"")
    (root / "deep" / "er" / "big").write_bytes(DATA[:300_001])
    (root / "deep" / "program").write_bytes(b"#!/bin/sh\n")
    (root / "deep" / "program").chmod(0o755)
    (root / "link").symlink_to("deep/program")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "nowhere").symlink_to("no/such/file")
    (root / os.fsdecode(b"not \xff utf-8")).write_bytes(b"x")
    (root / ("long" * 50)).mkdir()
    (root / ("long" * 50) / ("name" * 50)).write_bytes(b"long")
    (root / "longlink").symlink_to("target" * 40)
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1_500_000_000, 1_500_000_000), follow_symlinks=False)
    (root / "deep" / "er").chmod(0o511)
    os.utime(root / "deep" / "er", (1_400_000_000, 1_400_000_000))
    return root


def test_content_comes_back(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", b"x", DATA):
        agent.files.write_bytes(path, data)
        assert path.read_bytes() == data
        assert agent.files.read_bytes(path) == data
    agent.files.write_text(path, "é\n", mode=0o600)
    assert agent.files.read_text(path) == "é\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_has_no_size_is_read_all_the_same(agent: Agent, tmp_path: Path) -> None:
    assert b"MemTotal" in agent.files.read_bytes("/proc/meminfo")
    agent.files.get("/proc/meminfo", tmp_path / "meminfo")
    assert b"MemTotal" in (tmp_path / "meminfo").read_bytes()


def test_reading_has_a_limit(agent: Agent) -> None:
    with pytest.raises(AgentError, match="/dev/zero: longer than 1000"):
        agent.files.read_bytes("/dev/zero", limit_bytes=1000)


def test_errors_are_the_guests(agent: Agent, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for operation in (
        lambda: agent.files.read_bytes(absent),
        lambda: agent.files.write_bytes(absent / "file", b"x"),
        lambda: agent.files.stat(absent),
        lambda: agent.files.listdir(absent),
        lambda: agent.files.remove(absent),
        lambda: agent.files.mkdir(absent / "directory"),
        lambda: agent.files.rename(absent, tmp_path / "to"),
        lambda: agent.files.get(absent, tmp_path / "to"),
        lambda: agent.files.put(tmp_path, absent / "directory"),
    ):
        with pytest.raises(GuestError, match=r"absent.*No such file") as caught:
            operation()
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(GuestError) as caught:
        agent.files.read_bytes(tmp_path)
    assert caught.value.errno == errno.EISDIR
    with pytest.raises(GuestError, match="No space"):
        agent.files.write_bytes("/dev/full", DATA)


def test_stat(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "file").chmod(0o4640)
    os.utime(tmp_path / "file", ns=(0, 1_234_567_890_123_456_789))
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    meta = (tmp_path / "file").stat()
    expected = FileStat("file", 0o4640, 5, 1_234_567_890_123_456_789, meta.st_uid, meta.st_gid, None)
    assert agent.files.stat(tmp_path / "file") == expected
    assert agent.files.stat(tmp_path / "link") == expected
    link = agent.files.stat(tmp_path / "link", follow_symlinks=False)
    assert (link.kind, link.target) == ("symlink", "file")
    kinds = {path: agent.files.stat(path).kind for path in (tmp_path, tmp_path / "fifo", "/dev/null")}
    assert list(kinds.values()) == ["directory", "fifo", "character"]


def test_directories(agent: Agent, tmp_path: Path) -> None:
    files = agent.files
    files.mkdir(tmp_path / "a" / "b", parents=True)
    files.mkdir(tmp_path / "a" / "b", parents=True)
    files.mkdir(tmp_path / "a", exist_ok=True)
    with pytest.raises(GuestError, match="exists"):
        files.mkdir(tmp_path / "a")
    assert files.listdir(tmp_path / "a" / "b") == []
    names = sorted(["é", "new\nline", os.fsdecode(b"\xff"), *map(str, range(9000))])
    for name in names:
        (tmp_path / "a" / "b" / name).touch()
    assert files.listdir(tmp_path / "a" / "b") == names
    with pytest.raises(GuestError, match="not empty"):
        files.remove(tmp_path / "a")
    assert files.exists(tmp_path / "a" / "b" / "1")
    files.rename(tmp_path / "a" / "b" / "1", tmp_path / "moved")
    assert not files.exists(tmp_path / "a" / "b" / "1")
    assert not files.exists(tmp_path / "moved" / "below a file")
    files.remove(tmp_path / "a", recursive=True)
    assert os.listdir(tmp_path) == ["moved"]
    files.remove(tmp_path / "moved")
    assert os.listdir(tmp_path) == []


def test_removing_a_link_leaves_what_it_leads_to(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to("kept")
    agent.files.remove(tmp_path / "link", recursive=True)
    assert (tmp_path / "kept" / "file").exists()


def test_files_are_copied_with_mode_and_time(agent: Agent, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(DATA)
    local.chmod(0o750)
    os.utime(local, ns=(0, 1_234_567_890_123_456_789))
    (tmp_path / "directory").mkdir()
    for copy, made in ((agent.files.put, "put"), (agent.files.get, "got"), (agent.files.put, "directory")):
        copy(local, tmp_path / made)
        path = tmp_path / made / ("local" if made == "directory" else "")
        assert path.read_bytes() == DATA
        meta = path.stat()
        assert (stat.S_IMODE(meta.st_mode), meta.st_mtime_ns) == (0o750, 1_234_567_890_123_456_789)


def test_trees_are_copied(agent: Agent, directory: Path, tmp_path: Path) -> None:
    expected = tree(directory)
    agent.files.put(directory, tmp_path / "put")
    assert tree(tmp_path / "put") == expected
    agent.files.get(directory, tmp_path / "got")
    assert tree(tmp_path / "got") == expected
    agent.files.put(directory, tmp_path / "put")  # below it now
    assert tree(tmp_path / "put" / "source") == expected
    agent.files.get(tmp_path / "put" / "source", tmp_path / "got")
    assert tree(tmp_path / "got" / "source") == expected


def test_a_copy_replaces(agent: Agent, directory: Path, tmp_path: Path) -> None:
    for copy, name in ((agent.files.put, "put"), (agent.files.get, "got")):
        (tmp_path / name / "source" / "deep").mkdir(parents=True)
        (tmp_path / "outside").write_bytes(b"kept")
        (tmp_path / name / "source" / "file").symlink_to(tmp_path / "outside")
        (tmp_path / name / "source" / "link").write_bytes(b"was a file")
        copy(directory, tmp_path / name)
        assert (tmp_path / name / "source" / "file").read_bytes() == b"text"
        assert not (tmp_path / name / "source" / "file").is_symlink()
        assert (tmp_path / name / "source" / "link").is_symlink()
        assert (tmp_path / "outside").read_bytes() == b"kept"


def test_what_is_neither_file_nor_directory_stays(agent: Agent, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(source / "socket"))
    (source / "file").touch()
    agent.files.put(source, tmp_path / "put")
    agent.files.get(source, tmp_path / "got")
    assert os.listdir(tmp_path / "put") == os.listdir(tmp_path / "got") == ["file"]


def test_a_name_to_go_by(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        agent.files.get("/", tmp_path)


def test_tar_can_read_our_archives(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    data = b"".join(tar.archive(directory))
    subprocess.run(["tar", "-xpf", "-", "-C", tmp_path / "unpacked"], input=data, check=True)
    assert tree(tmp_path / "unpacked") == tree(directory)


def test_we_can_read_tar(directory: Path, tmp_path: Path) -> None:
    data = subprocess.run(
        ["tar", "--format=gnu", "-cf", "-", "-C", directory, "."], stdout=subprocess.PIPE, check=True
    ).stdout
    for piece in (1000, 512, 70_000):
        target = tmp_path / str(piece)
        target.mkdir()
        extract(data, target, piece)
        assert tree(target) == tree(directory)


def extract(data: bytes, target: Path, piece: int = 65536) -> None:
    extractor = tar.Extractor(target)
    try:
        for offset in range(0, len(data), piece):
            extractor.feed(data[offset : offset + piece])
        extractor.finish()
    finally:
        extractor.close()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"", mode: int = 0o644
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(data), mode
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        member("../out", data=b"x"),
        member("/tmp/out", data=b"x"),
        member("in/../../out", data=b"x"),
        member("l", tarfile.SYMTYPE, "..") + member("l/out", data=b"x"),
        member("l", tarfile.SYMTYPE, "..") + member("l", tarfile.DIRTYPE),
        member("d", tarfile.DIRTYPE) + member("d/l", tarfile.SYMTYPE, "../..") + member("d/l/out", data=b"x"),
        member("l", tarfile.SYMTYPE, "../out") + member("h", tarfile.LNKTYPE, "l"),
        member("h", tarfile.LNKTYPE, "../kept"),
        member("file/below", data=b"x"),
        member("fifo", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
        member(".", data=b"x"),
        member("", data=b"x"),
        member("x" * 300 + "/../../out", data=b"x"),
        b"x" * 512,
        member("file", data=b"x")[:100],
        member("file", data=b"x")[:-511],
        b"",
    ],
)  # fmt: skip
def test_archives_of_a_hostile_guest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "kept").write_bytes(b"kept")
    with pytest.raises(ProtocolError):
        extract(data + (END if len(data) % 512 == 0 and data else b""), tmp_path / "in")
    assert sorted(os.listdir(tmp_path)) == ["in", "kept"]
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_links_are_made_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "kept").chmod(0o600)
    link = member("l", tarfile.SYMTYPE, "../kept")
    extract(link + member("l", data=b"x", mode=0o6777) + END, tmp_path / "in")
    assert (tmp_path / "in" / "l").read_bytes() == b"x"
    assert stat.S_IMODE((tmp_path / "in" / "l").stat().st_mode) == 0o777  # no setuid
    extract(link + END, tmp_path / "in")
    assert (tmp_path / "in" / "l").is_symlink()
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600


def test_a_directory_that_becomes_a_link_keeps_its_targets_mode(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = stat.S_IMODE(tmp_path.stat().st_mode)
    data = member("d", tarfile.DIRTYPE, mode=0o777) + member("d", tarfile.SYMTYPE, "..") + END
    with pytest.raises((ProtocolError, OSError)):
        extract(data, tmp_path / "in")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == outside


@given(data=st.data())
def test_damaged_archives(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(
        member("d", tarfile.DIRTYPE, mode=0o755)
        + member("d/" + "n" * 120, data=b"x" * 600)
        + member("d/l", tarfile.SYMTYPE, "..")
        + END
    )
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    # The checksums are right again, so that what is behind them is tested.
    for offset in range(0, len(whole), 512):
        header = whole[offset : offset + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            whole[offset + 148 : offset + 156] = b"%06o\0 " % sum(header)
    root = tmp_path_factory.mktemp("damaged")
    (root / "in").mkdir()
    with suppress(ProtocolError, OSError):
        extract(bytes(whole), root / "in", data.draw(st.integers(1, len(whole))))
    assert os.listdir(root) == ["in"]


def answers(*frames: bytes) -> Agent:
    """An agent that says this to every request."""

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs:
                decoder = FrameDecoder()
                while not list(decoder.receive(theirs.recv(65536))):
                    pass
                theirs.sendall(b"".join(frames))

        threading.Thread(target=serve, daemon=True).start()
        return ours

    return Agent(connect)


@pytest.mark.parametrize(
    "frames",
    [
        (),
        (encode(protocol.REPLY, b"{}"),),
        (encode(protocol.REPLY, b"[]"),),
        (encode(protocol.REPLY, b'{"kind": "none"}'),),
        (encode(protocol.REPLY, b'{"kind": "file", "mode": -1}'),),
        (encode(protocol.DATA, b"x"), encode(protocol.EXIT, b"{}")),
        (encode(protocol.ERROR, b"{}"),),
    ],
)
def test_answers_that_are_none(frames: tuple[bytes, ...], tmp_path: Path) -> None:
    agent = answers(*frames)
    for operation in (
        lambda: agent.files.stat("/"),
        lambda: agent.files.read_bytes("/x"),
        lambda: agent.files.listdir("/"),
        lambda: agent.files.get("/x", tmp_path / "x"),
        agent.info,
    ):
        with pytest.raises(AgentError):
            operation()


@pytest.mark.parametrize("line", [b"x\n", b"5\n", b'"a"\nnull\n', b"[256]\n"])
def test_lists_that_are_none(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        answers(encode(protocol.DATA, line), encode(protocol.END)).files.listdir("/")


def test_info(agent: Agent) -> None:
    info = agent.info()
    assert info.kernel == os.uname().release
    assert (info.machine, info.hostname) == (os.uname().machine, os.uname().nodename)
    assert info.uptime_ns > 0
    assert info.warnings == ()


def test_a_file_that_grows_while_it_is_packed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    chunks = iter(tar.archive(tmp_path))
    seen = [next(chunks), next(chunks)]  # the directory's header, the file's
    (tmp_path / "file").write_bytes(b"y" * 10)
    with tarfile.open(fileobj=io.BytesIO(b"".join([*seen, *chunks]))) as read:
        extracted = read.extractfile("file")
        assert extracted is not None
        assert extracted.read() == b"y" * 10 + bytes(990)
