"""The images, as the kernel of a guest sees them."""

import hashlib
import os
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import IO, cast
from uuid import UUID

import pytest

from kvmkit import Machine
from kvmkit.client import Disk
from kvmkit.images.ext4 import write_ext4
from kvmkit.images.tree import FileData, Inode, Tree

from .conftest import Entry, directory, e2fsck, hard_link, layer, symlink, write_layout

pytestmark = pytest.mark.slow


def run(vm: Machine, script: str) -> str:
    done = vm.run(["sh", "-euc", script], text=True, timeout_s=100)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def test_the_kernel_reads_and_writes_it(tmp_path: Path) -> None:
    """Files of every kind and shape; then it is changed all over, and is sound afterwards."""
    source = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the tree's
    source.write(
        layer(
            Entry("file", b"hello" * 10000, mode=0o4750, uid=70000, gid=100),
            hard_link("d/link", "file"),
            directory("d", 0o1777),
            symlink("fast", "d/link"),
            symlink("slow", "/mnt/" + "./" * 100 + "d/link"),
            Entry("null", type=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
            Entry("odd", type=tarfile.BLKTYPE, device=(259, 70000)),
            *(Entry(f"many/{number:05}") for number in range(3000)),
        )
    )
    tree = Tree()
    tree.apply_layer(source, "layer")
    pieces = 2000  # as many extents: two levels of their tree
    data = tempfile.TemporaryFile()  # noqa: SIM115 - as above
    data.write(os.urandom(pieces * 8))
    data.flush()
    chunks = tuple((piece * 8192, piece * 8, 8) for piece in range(pieces))
    tree.root.entries[b"holes"] = Inode(
        stat.S_IFREG | 0o644, data=FileData(cast(IO[bytes], data), pieces * 8192, chunks)
    )
    data.seek(0)
    holes = b"".join(data.read(8).ljust(8192, b"\0") for _ in range(pieces))
    image = tmp_path / "image"
    write_ext4(tree, image, UUID(int=1), 300 << 20)
    with Machine(disks=(Disk(image),)) as vm:
        run(vm, "mkdir /mnt; mount -t ext4 /dev/vda /mnt")
        assert run(vm, "cd /mnt; stat -c '%n %a %u %g %h %t:%T %s' file d null odd").splitlines() == [
            "file 4750 70000 100 2 0:0 50000",
            "d 1777 0 0 2 0:0 4096",
            "null 666 0 0 1 1:3 0",
            "odd 644 0 0 1 103:11170 0",
        ]
        assert (
            run(vm, "cd /mnt; cat fast slow | md5sum").split()[0] == hashlib.md5(b"hello" * 20000).hexdigest()
        )
        assert run(vm, "md5sum </mnt/holes").split()[0] == hashlib.md5(holes).hexdigest()
        assert run(vm, "ls /mnt/many | wc -l; stat -c %h /mnt").split() == ["3000", "5"]
        run(
            vm,
            "cd /mnt; for n in $(seq 500); do mkdir many/new$n; echo $n >many/new$n/f; done; rm many/00*; "
            "dd if=/dev/urandom of=big bs=1M count=150 2>/dev/null; dd if=/dev/zero of=holes bs=5000 seek=7 count=9 "
            "conv=notrunc 2>/dev/null; chown 5 file; rm d/link; mv many d; cd /; umount /mnt",
        )
        assert "EXT4-fs error" not in run(vm, "dmesg")
    e2fsck(image)


def test_an_image_as_the_root(tmp_path: Path, cache: Path) -> None:
    """It runs with what the image says; what the guest writes goes with it."""
    with Machine() as vm:
        busybox = vm.files.read_bytes("/bin/busybox")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    layers = [
        layer(
            directory("./"),
            Entry("bin/busybox", busybox, mode=0o755, xattrs={"security.capability": capability}),
            symlink("bin/sh", "busybox"),
            Entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nme:x:1000:100::/home:/bin/sh\n"),
            Entry("old"),
        ),
        layer(Entry(".wh.old"), directory("home", uid=1000)),
    ]
    write_layout(tmp_path / "layout", layers, {"Env": ["X=1 2"], "Cmd": ["sh"]})
    script = "/bin/busybox env | /bin/busybox grep ^X=; echo >/new; cd /; echo *"
    for _ in range(2):
        with Machine(root=tmp_path / "layout") as vm:
            assert vm.image is not None
            assert vm.image.command == ("sh",)
            done = vm.run(["/bin/sh", "-c", script], text=True, timeout_s=60)
            assert (done.returncode, done.stderr) == (0, "")
            said, names = done.stdout.splitlines()
            assert said == "X=1 2"
            assert {"bin", "etc", "home", "new"} <= set(names.split())
            assert "old" not in names.split()
