import lzma
from pathlib import Path

import pytest
import zstandard

from kvmkit.machine import modules
from kvmkit.machine.modules import Module


def ko(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.mark.parametrize("name", ["./lib/modules/6.1/kernel/drivers/virtio/virtio-rng.ko", "virtio_rng.ko"])
def test_a_module_is_read(name: str) -> None:
    data = ko("virtio,virtio-ring")
    assert modules.parse(name, data) == Module("virtio_rng", data, ("virtio", "virtio_ring"))
    assert modules.parse(name + ".xz", lzma.compress(data)).data == data


def test_a_package_s_files_are_told_apart() -> None:
    base = "./usr/lib/modules/6.1.0/kernel/"
    for name in ("fs/fuse/fuse.ko", "fs/fuse/virtiofs.ko.xz", "drivers/char/hw_random/virtio-rng.ko"):
        assert modules.PATTERN.fullmatch(base + name)
    for name in ("fs/fuse/cuse.ko", "fs/fuse/fuse.ko.gz", "x/virtio_rng.c"):
        assert not modules.PATTERN.fullmatch(base + name)


def test_the_wanted_and_what_they_depend_on_load_in_order(tmp_path: Path) -> None:
    made = [
        modules.parse("a-b.ko", ko("c,builtin")),
        modules.parse("c.ko", ko("d")),
        modules.parse("d.ko", ko("")),
        modules.parse("e.ko", ko("f")),
        modules.parse("f.ko", ko("e")),  # a cycle, which no kernel has
    ]
    directory = tmp_path / "modules"
    modules.save(directory, made)
    assert [path.name for path in modules.choose(directory, ["a_b"])] == ["d.ko", "c.ko", "a_b.ko"]
    assert [path.name for path in modules.choose(directory, ["a-b", "d"])] == ["d.ko", "c.ko", "a_b.ko"]
    assert len(modules.choose(directory, ["e"])) == 2
    assert modules.choose(directory, ["not-there"]) == []
    assert (directory / "a_b.ko").read_bytes() == made[0].data


def test_a_kernel_without_modules(tmp_path: Path) -> None:
    assert modules.choose(tmp_path, ["virtio_mmio"]) == []


def test_the_modules_of_an_installed_kernel(tmp_path: Path) -> None:
    tree = tmp_path / "lib/modules/6.1"
    for name, data in {
        "drivers/virtio/virtio_ring.ko": ko(""),
        "drivers/virtio/virtio_mmio.ko.xz": lzma.compress(ko("virtio_ring")),
        "fs/fuse/virtiofs.ko.zst": zstandard.compress(ko("fuse")),
        "fs/fuse/cuse.ko": b"not for us",
    }.items():
        file = tree / "kernel" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tree / "build").symlink_to(tmp_path)
    with modules.indexed(tree) as directory:
        chosen = modules.choose(directory, ["virtio_mmio", "virtiofs"])
        assert [path.name for path in chosen] == ["virtio_ring.ko", "virtio_mmio.ko", "virtiofs.ko"]
        assert chosen[1].read_bytes() == ko("virtio_ring")
        with modules.indexed(directory) as same:
            assert same == directory
    assert not directory.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no modules for a guest"), modules.indexed(tmp_path / "empty"):
        pass
