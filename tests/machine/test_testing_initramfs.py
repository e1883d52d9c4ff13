import shutil
import subprocess
from pathlib import Path

import pytest

from kvmkit.machine import modules
from kvmkit.machine.guest import DefaultGuest, Kernel
from kvmkit.testing.initramfs import initramfs


@pytest.fixture
def guest(tmp_path: Path) -> DefaultGuest:
    (tmp_path / "busybox").write_bytes(b"\x7fELF busybox")
    virtio = modules.Module("virtio", b"1", ())
    modules.save(tmp_path / "modules", [modules.Module("virtio_blk", b"2", ("virtio",)), virtio])
    kernel = Kernel(tmp_path, tmp_path, tmp_path / "modules", "linux-image", "6.1")
    return DefaultGuest(kernel, tmp_path / "busybox", ("busybox", "insmod", "sh"))


def test_contents(guest: DefaultGuest, tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("no cpio")
    archive = initramfs(guest, ["virtio_blk"], ["sleep"], "echo done\n")
    root = tmp_path / "root"
    root.mkdir()
    command = ["cpio", "-i", "--quiet", "--nonmatching", "dev/*"]
    subprocess.run(command, cwd=root, input=archive, check=True)
    assert (root / "modules/order").read_text() == "virtio.ko\nvirtio_blk.ko\n"
    assert (root / "modules/virtio_blk.ko").read_bytes() == b"2"
    assert (root / "bin/sh").readlink() == Path("busybox")
    assert (root / "script").read_text() == "echo done\n"
    sleep = shutil.which("sleep")
    assert sleep is not None
    assert (root / "bin/sleep").read_bytes() == Path(sleep).read_bytes()
    done = subprocess.run(["ldd", sleep], capture_output=True, text=True, check=False).stdout
    assert ("libc.so" in done) == bool(list(root.rglob("libc.so*")))


def test_program_that_is_not_there(guest: DefaultGuest) -> None:
    with pytest.raises(FileNotFoundError, match="no nonesuch here"):
        initramfs(guest, [], ["nonesuch"], "")
