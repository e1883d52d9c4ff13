import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.devices.block.backend import ImageError, cut
from kvmkit.devices.block.overlay import CLUSTER_BYTES, Overlay
from kvmkit.devices.block.raw import RawFile

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"".join(i.to_bytes(2, "little") * 256 for i in range(64)))
    return path


def read(disk: RawFile | Overlay, offset: int, size_bytes: int) -> bytes:
    buffer = bytearray(size_bytes)
    disk.readv([buffer], offset)
    return bytes(buffer)


def test_cut() -> None:
    assert [bytes(v) for v in cut([b"abc", b"", b"defg", b"h"], 1, 6)] == [b"bc", b"def"]
    assert cut([b"abc"], 3, 9) == []


@pytest.mark.parametrize("size", [0, 511, 513])
def test_image_of_a_wrong_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    with pytest.raises(ImageError, match=f"has {size} bytes"):
        RawFile(path, read_only=True)


def test_what_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ImageError, match="neither a file nor a block device"):
            RawFile(path, read_only=True)
    with pytest.raises(FileNotFoundError):
        RawFile(tmp_path / "none", read_only=False)


def test_failed_opening_leaves_no_descriptor(image: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with RawFile_(image, read_only=False):
        for make in (
            lambda: RawFile(image, read_only=False),
            lambda: RawFile(tmp_path, read_only=True),
            lambda: Overlay(image),
            lambda: Overlay.create(tmp_path / "overlay", image),
        ):
            with pytest.raises(ImageError):
                make()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "overlay").exists()


class RawFile_:
    """A RawFile for `with`."""

    def __init__(self, path: Path, read_only: bool) -> None:
        self.file = RawFile(path, read_only)

    def __enter__(self) -> RawFile:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_descriptor_is_not_inherited(image: Path) -> None:
    with RawFile_(image, read_only=False) as file:
        assert not os.get_inheritable(file._fd)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_locks(image: Path, first: bool, second: bool, allowed: bool) -> None:
    with RawFile_(image, first):
        if allowed:
            RawFile(image, second).close()
        else:
            with pytest.raises(ImageError, match="by another VM"):
                RawFile(image, second)
    RawFile(image, second).close()


@pytest.mark.parametrize("read_only", [True, False])
def test_qemu_that_writes_excludes_us(image: Path, read_only: bool) -> None:
    """QEMU holds read locks on bytes for what it does (101: write) and what others may not (201: write)."""
    with open(image, "r+b") as qemu:
        for byte in (100, 101, 201):
            fcntl.fcntl(qemu, fcntl.F_OFD_SETLK, struct.pack("hh4xqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
        with pytest.raises(ImageError, match="by another VM"):
            RawFile(image, read_only)


def test_reads_and_writes_of_several_buffers(image: Path) -> None:
    with RawFile_(image, read_only=False) as file:
        file.writev([b"ab", b"c" * 510], 1024)
        first, second = bytearray(1), bytearray(511)
        file.readv([first, second], 1024)
        assert first + second == b"ab" + b"c" * 510
        assert read(file, 1536, 2) == b"\3\0"


def test_short_reads_and_writes_go_on(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, cut(b, 0, 100), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, at: pwritev(fd, cut(b, 0, 100), at))
    with RawFile_(image, read_only=False) as file:
        data = os.urandom(1024)
        file.writev([data[:300], data[300:]], 512)
        assert read(file, 512, 1024) == data


def test_file_that_was_cut_off_is_an_io_error(image: Path) -> None:
    with RawFile_(image, read_only=False) as file:
        os.truncate(image, 1000)
        with pytest.raises(OSError, match="ends at 1000") as caught:
            read(file, 512, 1024)
        assert caught.value.errno == errno.EIO


def test_full_disk(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    with RawFile_(image, read_only=False) as file:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="full"):
            file.writev([bytes(512)], 0)


def test_flush_that_failed_fails_ever_after(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "gone")

    with RawFile_(image, read_only=False) as file:
        file.flush()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", failing)
            with pytest.raises(OSError, match="gone"):
                file.flush()
        with pytest.raises(OSError, match="gone"):
            file.flush()


def test_discarding_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    with RawFile_(path, read_only=False) as file:
        file.flush()
        before = path.stat().st_blocks
        file.discard(0, MIB // 2)
        file.flush()
        assert path.stat().st_blocks <= before - MIB // 2 // 512
        assert path.stat().st_size == MIB
        file.write_zeroes(MIB // 2, MIB // 4, unmap=False)
        assert read(file, 0, 3 * MIB // 4) == bytes(3 * MIB // 4)
        assert read(file, 3 * MIB // 4, 512) != bytes(512)


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_are_written_where_there_are_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool
) -> None:
    def unsupported(fd: int, mode: int, offset: int, size: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr("kvmkit.devices.block.raw._libc.fallocate", unsupported)
    path = tmp_path / "image"
    data = os.urandom(3 * MIB)
    path.write_bytes(data)
    with RawFile_(path, read_only=False) as file:
        file.write_zeroes(512, 2 * MIB, unmap)
        file.discard(0, 512)
        assert path.read_bytes() == data[:512] + bytes(2 * MIB) + data[2 * MIB + 512 :]


def test_errors_of_fallocate(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EINTR, errno.EINTR, errno.EIO]

    def failing(fd: int, mode: int, offset: int, size: int) -> int:
        ctypes.set_errno(answers.pop(0))
        return -1

    with RawFile_(image, read_only=False) as file:
        monkeypatch.setattr("kvmkit.devices.block.raw._libc.fallocate", failing)
        with pytest.raises(OSError, match="Input/output error"):
            file.discard(0, 512)
    assert not answers


def test_overlay_leaves_its_base_alone(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    overlay = Overlay.create(tmp_path / "overlay", image)
    overlay.writev([b"x" * 512], 512)
    overlay.flush()
    overlay.close()
    assert image.read_bytes() == before
    again = Overlay(tmp_path / "overlay")
    assert read(again, 0, again.size_bytes) == before[:512] + b"x" * 512 + before[1024:]
    again.close()


def test_overlay_takes_little_space(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.touch()
    os.truncate(base, 1 << 40)
    overlay = Overlay.create(tmp_path / "overlay", base)
    overlay.writev([b"x" * 4096], (1 << 40) - 4096)
    overlay.flush()
    overlay.close()
    assert (tmp_path / "overlay").stat().st_blocks * 512 < 100_000


def test_discarded_clusters_of_an_overlay_are_zeros_without_space(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * MIB)
    path = tmp_path / "overlay"
    overlay = Overlay.create(path, base)
    overlay.writev([b"x" * MIB], 0)
    overlay.flush()
    full = path.stat().st_blocks
    overlay.discard(512, MIB - 512)
    overlay.flush()
    overlay.close()
    assert path.stat().st_blocks < full // 2
    overlay = Overlay(path)
    assert read(overlay, 0, MIB) == b"x" * 512 + bytes(MIB - 512)
    overlay.close()


def test_temporary_overlay(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.read_bytes()
    first, second = (Overlay.temporary(RawFile(image, read_only=True)) for _ in range(2))
    first.writev([b"1" * 4096], 0)
    second.writev([b"2" * 512], 0)
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("nothing to sync"))
    first.flush()
    assert read(first, 0, 8192) == b"1" * 4096 + before[4096:8192]
    assert read(second, 0, 8192) == b"2" * 512 + before[512:8192]
    first.close()
    second.close()
    assert image.read_bytes() == before
    assert os.listdir(tmp_path) == ["image"]


def test_overlay_that_is_made_if_it_is_not_there(image: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "overlay", tmp_path / "other"
    other.write_bytes(image.read_bytes())
    overlay = Overlay.at(path, image)
    overlay.writev([b"x" * 512], 0)
    overlay.flush()
    overlay.close()
    (tmp_path / "link").symlink_to(image)
    overlay = Overlay.at(path, tmp_path / "link")
    assert read(overlay, 0, 512) == b"x" * 512
    overlay.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="is an overlay of .*/image, not of .*/other"):
        Overlay.at(path, other)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ImageError, match="no overlay of kvmkit's"):
        Overlay.at(other, image)


def test_overlay_does_not_replace_a_file(image: Path, tmp_path: Path) -> None:
    (tmp_path / "overlay").write_text("precious")
    with pytest.raises(FileExistsError):
        Overlay.create(tmp_path / "overlay", image)
    assert (tmp_path / "overlay").read_text() == "precious"


def damage(at: int, data: bytes) -> Callable[[Path, Path], None]:
    def change(overlay: Path, base: Path) -> None:
        with open(overlay, "r+b") as file:
            file.seek(at)
            file.write(data)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(0, b"kvmkitXX"), "no overlay of kvmkit's"),
        (damage(30, b"\xff"), "the header is damaged"),
        (damage(4000, b"\xff"), "the header is damaged"),
        (damage(4096, b"\2"), "the map at 0 is damaged"),
        (damage(4096 + 8, b"\1"), "the map at 0 is damaged"),  # beyond the last cluster
        (lambda overlay, _: os.truncate(overlay, MIB), "cut off"),
        (lambda overlay, _: os.truncate(overlay, 512), "no overlay of kvmkit's"),
        (lambda _, base: os.utime(base, ns=(0, 1)), "has changed since the overlay was made"),
        (lambda _, base: os.truncate(base, 512), "has changed since the overlay was made"),
        (lambda _, base: base.unlink(), "its base .*: No such file"),
        (lambda _, base: os.truncate(base, 0), "its base: .*has 0 bytes"),
    ],
)
def test_overlay_that_does_not_fit(
    image: Path, tmp_path: Path, change: Callable[[Path, Path], None], message: str
) -> None:
    path = tmp_path / "overlay"
    Overlay.create(path, image).close()
    before = len(os.listdir("/proc/self/fd"))
    change(path, image)
    with pytest.raises(ImageError, match=message):
        Overlay(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_overlay_of_another_version(image: Path, tmp_path: Path) -> None:
    import zlib

    path = tmp_path / "overlay"
    Overlay.create(path, image).close()
    with open(path, "r+b") as file:
        header = bytearray(file.read(4092))
        header[8] = 2
        file.seek(0)
        file.write(header + zlib.crc32(header).to_bytes(4, "little"))
    with pytest.raises(ImageError, match="has format 2"):
        Overlay(path)


def test_one_overlay_is_used_by_one_vm(image: Path, tmp_path: Path) -> None:
    overlay = Overlay.create(tmp_path / "overlay", image)
    with pytest.raises(ImageError, match="used by another VM"):
        Overlay(tmp_path / "overlay")
    with pytest.raises(ImageError, match="by another VM"):
        RawFile(image, read_only=False)  # the base mustn't change
    Overlay.create(tmp_path / "other", image).close()
    overlay.close()


def test_failed_flush_keeps_what_is_to_be_written(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = Overlay.create(tmp_path / "overlay", image)
    overlay.writev([b"x" * CLUSTER_BYTES], 0)
    with monkeypatch.context() as patched:
        patched.setattr(overlay._file, "flush", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
        with pytest.raises(OSError, match="gone"):
            overlay.flush()
    overlay.flush()
    overlay.close()
    overlay = Overlay(tmp_path / "overlay")
    assert read(overlay, 0, CLUSTER_BYTES) == b"x" * CLUSTER_BYTES
    overlay.close()


def test_temporary_overlay_that_cannot_be_made(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        Overlay.temporary(RawFile(image, read_only=True))
    assert len(os.listdir("/proc/self/fd")) == before
