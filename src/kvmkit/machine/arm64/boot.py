"""Put an arm64 kernel into guest memory with all that it expects, and say how to enter it (Documentation/arch/arm64/booting.rst).

An Image is the kernel as it lies in memory, with a header of 64 bytes; compressed with gzip it is unpacked here, since
arm64 kernels don't do that themselves.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from kvmkit.kvm import MemoryMap
from kvmkit.machine.arm64 import fdt, layout
from kvmkit.machine.errors import KernelError
from kvmkit.machine.kernel_file import KernelFile, load_initrd

HEADER = struct.Struct("<IIQQQQQQII")
"""code0, code1, text_offset, image_size, flags, three that are reserved, magic, and where an EFI loader finds its header."""
MAGIC = 0x644D5241
"""``ARM\\x64``."""
FLAG_BIG_ENDIAN = 1 << 0

MAX_IMAGE_BYTES = 512 << 20
_ALIGNMENT_BYTES = 2 << 20
_CMDLINE_BYTES = 2047
"""COMMAND_LINE_SIZE of arm64, less the NUL."""
_GZIP, _ZBOOT = b"\x1f\x8b", b"MZ\0\0zimg"


@dataclass(frozen=True)
class ImageHeader:
    """What the loader needs of the header, in bytes."""

    text_offset: int
    """Where the image lies, and is entered, counted from a multiple of 2 MiB."""
    image_size: int
    """How much memory it takes from there on, which is more than the file holds."""


@dataclass(frozen=True)
class Entry:
    """How the first processor starts: at `pc`, with `fdt`, the device tree's address, in x0."""

    pc: int
    fdt: int


def parse(header: bytes, name: str, size_bytes: int) -> ImageHeader:
    """Read and check the header of an Image of `size_bytes`; `KernelError` names the field. `name` is for messages."""
    if header.startswith(_ZBOOT):
        raise KernelError(
            f"{name}: an EFI program that unpacks itself (CONFIG_EFI_ZBOOT): give the Image that it was made of"
        )
    if len(header) < HEADER.size:
        raise KernelError(
            f"{name}: {len(header)} bytes are too few for an Image's header: is the file truncated?"
        )
    _, _, text_offset, image_size, flags, _, _, _, magic, _ = HEADER.unpack_from(header)
    if magic != MAGIC:
        raise KernelError(f"{name}: no arm64 Image (no ARM\\x64 at 0x38): give an arm64 Image or Image.gz")
    if not image_size:
        raise KernelError(f"{name}: image_size is 0, as in kernels before 3.17: use a newer one")
    if flags & FLAG_BIG_ENDIAN:
        raise KernelError(
            f"{name}: a big-endian kernel (flags {flags:#x}): use a little-endian one, as this board's devices are"
        )
    if size_bytes > image_size:
        raise KernelError(
            f"{name}: {size_bytes} bytes, but its header says that it takes {image_size} in memory (image_size): "
            "the file is damaged"
        )
    if text_offset >= _ALIGNMENT_BYTES or text_offset % 4096:
        raise KernelError(f"{name}: text_offset {text_offset:#x} isn't a whole page below 2 MiB")
    return ImageHeader(text_offset, image_size)


def load_linux(
    memory: MemoryMap,
    memory_bytes: int,
    cpus: int,
    kernel: str | Path,
    initrd: bytes | str | Path | None,
    cmdline: str,
    virtio: int = 0,
) -> Entry:
    """Load `kernel`, `initrd` (its bytes or a path) and a device tree with `cmdline` for a board of `memory_bytes`, `cpus` and
    as many `virtio` devices.

    `KernelError` names what is wrong with them; `OSError` comes from reading.
    """
    raw = cmdline.encode(errors="surrogateescape")
    if b"\0" in raw or len(raw) > _CMDLINE_BYTES:
        what = (
            "it contains a NUL"
            if b"\0" in raw
            else f"it has {len(raw)} bytes, and arm64 takes {_CMDLINE_BYTES}"
        )
        raise KernelError(f"kernel command line: {what}: shorten it")
    ram_end = layout.RAM + memory_bytes
    with KernelFile(kernel) as file:
        pc, end = _load_image(memory, ram_end, file)
    initrd_range = None if initrd is None else _load_initrd(memory, ram_end, end, initrd)
    memory.write(layout.FDT, fdt.build(memory_bytes, cpus, raw, initrd_range, virtio))
    return Entry(pc, layout.FDT)


def _load_image(memory: MemoryMap, ram_end: int, file: KernelFile) -> tuple[int, int]:
    """Return where the kernel lies and where the memory that it takes ends."""
    if file.size_bytes > MAX_IMAGE_BYTES:
        raise KernelError(f"{file.name}: {file.size_bytes} bytes: no kernel is that large")
    image = None
    if file.read(0, 2) == _GZIP:
        image = _gunzip(file)
        header = parse(image[: HEADER.size], file.name, len(image))
    else:
        header = parse(file.read(0, HEADER.size), file.name, file.size_bytes)
    start = layout.KERNEL + header.text_offset
    end = start + header.image_size
    if end > ram_end:
        raise _too_small(
            f"{file.name}: the kernel takes {header.image_size} bytes (image_size) at {start:#x}", end
        )
    if image is None:
        file.load(memory, start, 0, file.size_bytes)
    else:
        memory.write(start, image)
    return start, end


def _gunzip(file: KernelFile) -> bytes:
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        image = unpacker.decompress(file.read(0, file.size_bytes), MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise KernelError(f"{file.name}: it can't be unpacked ({error}): the file is damaged") from error
    if not unpacker.eof:
        what = (
            f"it unpacks to more than {MAX_IMAGE_BYTES} bytes"
            if unpacker.unconsumed_tail
            else "it ends early"
        )
        raise KernelError(f"{file.name}: {what}: the file is damaged")
    return image


def _load_initrd(
    memory: MemoryMap, ram_end: int, kernel_end: int, initrd: bytes | str | Path
) -> tuple[int, int]:
    """Put it as high as it may lie; return address and size."""
    limit = min(ram_end, layout.RAM + layout.KERNEL_WINDOW_BYTES)
    return load_initrd(memory, initrd, lambda name, size: _place_initrd(name, size, limit, kernel_end))


def _place_initrd(name: str, size_bytes: int, limit: int, kernel_end: int) -> int:
    if not size_bytes:
        raise KernelError(f"{name}: an initrd of 0 bytes: is the file right?")
    address = (limit - size_bytes) & -layout.PAGE_BYTES
    if address < kernel_end:
        raise _too_small(f"{name}: {size_bytes} bytes don't fit behind the kernel", kernel_end + size_bytes)
    return address


def _too_small(what: str, end: int) -> KernelError:
    mib = -(-(end - layout.RAM) // layout.MIB)
    return KernelError(
        f"{what}, and there is less memory than that: give more than {mib} MiB (--memory {2 * mib}M)"
    )
