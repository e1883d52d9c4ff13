"""Kernel modules for the guest's virtio devices: which are needed, and in which order they load.

Debian's cloud kernel has virtio, vsock, FUSE and overlayfs as modules, others have ext4 too. A package has no modules.dep, so
dependencies are read out of the modules themselves (``depends=`` in .modinfo).
"""

import lzma
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "rng-core",
    "virtio-rng",
    "virtio_console",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "fuse",
    "virtiofs",
    "overlay",
    "crc16",
    "crc32c_generic",
    "jbd2",
    "mbcache",
    "ext4",
)
"""All that a guest of ours may load; what a kernel has built in is in no file."""

_FILE = "(?:{})".format("|".join(NAMES).replace("_", "[_-]")) + r"\.ko(?:\.xz|\.zst)?"
PATTERN = re.compile(r"(?:\./)?(?:usr/)?lib/modules/[^/]+/(?:.*/)?" + _FILE)
"""The files in a kernel's package."""


@dataclass(frozen=True)
class Module:
    """A module's file, uncompressed, and the names of those that load before it."""

    name: str
    data: bytes
    depends: tuple[str, ...]


def parse(file_name: str, data: bytes) -> Module:
    """Read a module's file, compressed by xz or zstd if its name ends so."""
    stem = file_name.rpartition("/")[2]
    if stem.endswith(".xz"):
        data, stem = lzma.decompress(data), stem.removesuffix(".xz")
    elif stem.endswith(".zst"):
        import zstandard  # seldom needed

        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            data, stem = reader.read(), stem.removesuffix(".zst")
    match = re.search(rb"\0depends=([^\0]*)\0", data)
    depends = match[1].decode() if match else ""
    return Module(
        normal(stem.removesuffix(".ko")), data, tuple(map(normal, filter(None, depends.split(","))))
    )


def normal(name: str) -> str:
    """A module's name as the kernel has it: file names may have dashes."""
    return name.replace("-", "_")


def load_order(modules: Iterable[Module]) -> list[Module]:
    """Sort so that each comes after those it depends on. What isn't among them is taken to be built in."""
    by_name = {module.name: module for module in modules}
    order: dict[str, Module] = {}

    def visit(name: str) -> None:
        module = by_name.pop(name, None)  # popped first, so that a cycle ends
        if module is not None:
            for other in module.depends:
                visit(other)
            order[name] = module

    for name in sorted(by_name):
        visit(name)
    return list(order.values())


def choose(directory: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the files in `directory` (as `save` leaves it) that the `wanted` modules and their dependencies are, in load order."""
    lines = (directory / "order").read_text().splitlines() if (directory / "order").exists() else []
    depends = {name: others.split() for name, _, others in (line.partition(":") for line in lines)}
    needed: set[str] = set()
    left = [normal(name) for name in wanted]
    while left:
        name = left.pop()
        if name in depends and name not in needed:
            needed.add(name)
            left += depends[name]
    return [directory / f"{name}.ko" for name in depends if name in needed]


@contextmanager
def indexed(directory: Path) -> Iterator[Path]:
    """A directory for `choose`: `directory` itself as `save` leaves it, or a temporary one if it is a kernel's ``lib/modules/VERSION``.

    `ValueError` if no module that we may load is in it.
    """
    if (directory / "order").exists():
        yield directory
        return
    files = [path for path in directory.rglob("*.ko*") if re.fullmatch(_FILE, path.name)]
    if not files:
        raise ValueError(
            f"{directory} holds no modules for a guest (virtio_mmio.ko, …): give lib/modules/VERSION of the kernel"
        )
    with tempfile.TemporaryDirectory(prefix="kvmkit-modules-") as temporary:
        save(Path(temporary) / "modules", (parse(path.name, path.read_bytes()) for path in files))
        yield Path(temporary) / "modules"


def save(directory: Path, modules: Iterable[Module]) -> None:
    """Write modules to `directory`, and an index of them in load order to the file `order` there."""
    directory.mkdir()
    ordered = load_order(modules)
    for module in ordered:
        (directory / f"{module.name}.ko").write_bytes(module.data)
    (directory / "order").write_text("".join(f"{m.name}: {' '.join(m.depends)}\n" for m in ordered))
