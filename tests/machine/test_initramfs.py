import io
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.machine.initramfs import CpioWriter, build_initramfs


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Parse an archive strictly: name → mode, data and device number."""
    entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    inodes = set()
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, _, _, _, mtime, size, _, _, major, minor, name_bytes, check = numbers
        raw = archive[at + 110 : at + 110 + name_bytes]
        assert raw.endswith(b"\0")
        name = raw[:-1].decode(errors="surrogateescape")
        at += (110 + name_bytes + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return entries
        assert inode not in inodes and mtime == check == 0
        inodes.add(inode)
        entries[name] = (mode, archive[at : at + size], (major, minor))
        at += (size + 3) & ~3


NAMES = st.text(min_size=1, max_size=20).filter(
    lambda name: not name.startswith("/") and "\0" not in name and ".." not in name and name != "TRAILER!!!"
).filter(lambda name: name.encode(errors="surrogatepass").decode(errors="replace") == name)  # fmt: skip


@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=8))
def test_any_files(files: dict[str, bytes]) -> None:
    output = io.BytesIO()
    archive = CpioWriter(output)
    for name, data in files.items():
        archive.file(name, data)
    archive.close()
    assert read_newc(output.getvalue()) == {
        name: (stat.S_IFREG | 0o644, data, (0, 0)) for name, data in files.items()
    }


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a\0b", "../x", "a/.."])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="initramfs"):
        CpioWriter(io.BytesIO()).file(name, b"")


def test_cpio_reads_it(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("no cpio")
    output = io.BytesIO()
    archive = CpioWriter(output)
    archive.directory("d")
    archive.file("d/f", b"data", 0o600)
    archive.symlink("l", "d/f")
    archive.close()
    subprocess.run(["cpio", "-id", "--quiet"], input=output.getvalue(), cwd=tmp_path, check=True)
    assert (tmp_path / "l").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "d/f").stat().st_mode) == 0o600


def test_the_agent_s_initramfs(tmp_path: Path) -> None:
    module = tmp_path / "virtio.ko"
    module.write_bytes(b"module!")
    boot = {"hostname": "h", "environment": {"USER": "x"}}
    made = build_initramfs(b"agent!", boot, [module], busybox=b"busybox!", applets=["ls", "[", "busybox"])
    assert made == build_initramfs(b"agent!", boot, [module], busybox=b"busybox!", applets=["[", "ls"])
    entries = read_newc(made)
    assert entries["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert entries["bin/busybox"] == (stat.S_IFREG | 0o755, b"busybox!", (0, 0))
    assert entries["bin/["] == entries["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox", (0, 0))
    assert entries["init"] == (stat.S_IFREG | 0o755, b"agent!", (0, 0))
    assert entries["lib/modules/virtio.ko"][1] == b"module!"
    settings = json.loads(entries["etc/kvmkit/boot.json"][1])
    assert settings["hostname"] == "h" and settings["modules"] == ["/lib/modules/virtio.ko"]
    assert settings["environment"]["USER"] == "x" and "/bin" in settings["environment"]["PATH"]
    parents = {name.rpartition("/")[0] for name in entries} - {""}
    assert parents <= entries.keys()
    assert "bin/busybox" not in read_newc(build_initramfs(b"agent!", boot))
