"""Put a Linux kernel into guest memory with everything that it expects to find there, and say how to enter it.

Three ways in: the 64-bit boot protocol, for a bzImage and an ELF vmlinux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"),
and PVH's, for a vmlinux with its note (Xen's docs/misc/pvh.pandoc). 64-bit is the default: it alone can hand over a seed for
the guest's random numbers.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvmkit.kvm import MemoryMap
from kvmkit.machine.errors import KernelError
from kvmkit.machine.kernel_file import KernelFile, load_initrd
from kvmkit.machine.x86 import bzimage, elf, layout

Protocol = Literal["linux64", "pvh"]

_SETUP_RNG_SEED = 9
_RNG_SEED_BYTES = 32
_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH, _CAN_USE_HEAP = 1 << 0, 1 << 7
_PROTOCOL_VERSION = 0x020F
_ELF_CMDLINE_BYTES = 2047  # COMMAND_LINE_SIZE of x86, less the NUL
_ELF_INITRD_ADDR_MAX = 0x7FFFFFFF
_HVM_START_MAGIC = 0x336EC578
_MAX_BZIMAGE_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """How the first processor starts: `the kernel is entered by `protocol` at address `ip`, with `parameters` in rsi (64-bit) or ebx (PVH)."""

    protocol: Protocol
    ip: int
    parameters: int


@dataclass(frozen=True)
class _Loaded:
    """A kernel in memory."""

    ip: int
    end: int
    """First address that it doesn't need before it knows its memory map."""
    initrd_addr_max: int
    cmdline_bytes: int
    header: bytes
    """The setup header for the zero page, from 0x1f1."""


def load_linux(
    memory: MemoryMap,
    memory_bytes: int,
    kernel: str | Path,
    initrd: bytes | str | Path | None,
    cmdline: str,
    *,
    protocol: Protocol = "linux64",
) -> Entry:
    """Load `kernel`, `initrd` (its bytes or a path) and `cmdline` for a board of `memory_bytes`, and write what goes with them.

    `KernelError` names what is wrong with them; `OSError` comes from reading.
    """
    low_end = layout.ram(memory_bytes)[0][1]
    with KernelFile(kernel) as file:
        if file.read(0, 4) == elf.MAGIC:
            loaded = _load_elf(memory, low_end, file, protocol)
        elif protocol == "pvh":
            raise KernelError(f"{file.name}: no ELF file: only a vmlinux has a PVH entry")
        else:
            loaded = _load_bzimage(memory, low_end, file)
    raw = cmdline.encode(errors="surrogateescape")
    limit = min(loaded.cmdline_bytes, layout.CMDLINE_MAX_BYTES - 1)
    if len(raw) > limit or b"\0" in raw:
        what = (
            "it contains a NUL"
            if b"\0" in raw
            else f"it has {len(raw)} bytes, and {kernel} takes {limit} (cmdline_size)"
        )
        raise KernelError(f"kernel command line: {what}: shorten it")
    memory.write(layout.CMDLINE, raw + b"\0")
    initrd_range = (0, 0) if initrd is None else _load_initrd(memory, low_end, loaded, initrd)
    e820 = layout.e820(memory_bytes)
    if protocol == "pvh":
        memory.write(layout.PVH_START_INFO, _start_info(e820, initrd_range))
        return Entry("pvh", loaded.ip, layout.PVH_START_INFO)
    seed = struct.pack("<QII", 0, _SETUP_RNG_SEED, _RNG_SEED_BYTES) + os.urandom(_RNG_SEED_BYTES)
    memory.write(layout.SETUP_DATA, seed)
    memory.write(layout.ZERO_PAGE, zero_page(loaded.header, e820, initrd_range))
    return Entry("linux64", loaded.ip, layout.ZERO_PAGE)


def _load_bzimage(memory: MemoryMap, low_end: int, file: KernelFile) -> _Loaded:
    if file.size_bytes > _MAX_BZIMAGE_BYTES:
        raise KernelError(f"{file.name}: {file.size_bytes} bytes: no kernel is that large")
    header = bzimage.parse(file.read(0, 4096), file.name, file.size_bytes)
    start = layout.KERNEL_MIN
    if header.relocatable and header.pref_address + header.init_size <= low_end:
        start = max(header.pref_address, start)
    elif header.relocatable:
        start = -(-start // header.kernel_alignment) * header.kernel_alignment
    end = start + header.init_size
    if end > low_end:
        raise too_small(
            f"{file.name}: the kernel takes {header.init_size} bytes (init_size) at {start:#x}", end
        )
    file.load(memory, start, header.setup_bytes, min(header.code_bytes, file.size_bytes - header.setup_bytes))
    return _Loaded(start + 0x200, end, header.initrd_addr_max, header.cmdline_size, header.raw)


def _load_elf(memory: MemoryMap, low_end: int, file: KernelFile, protocol: Protocol) -> _Loaded:
    kernel = elf.parse(file.read, file.size_bytes, file.name)
    ip = kernel.entry
    if protocol == "pvh":
        if kernel.pvh_entry is None:
            raise KernelError(
                f"{file.name}: no PVH entry (a Xen note of type 18): build it with CONFIG_PVH, or enter it by the 64-bit protocol"
            )
        ip = kernel.pvh_entry
    for segment in kernel.segments:
        if segment.paddr < layout.KERNEL_MIN:
            raise KernelError(
                f"{file.name}: a segment goes to {segment.paddr:#x} (p_paddr), below 1 MiB, where this board has other things"
            )
    if kernel.end > low_end:
        raise too_small(
            f"{file.name}: the kernel's segments end at {kernel.end:#x} (p_paddr, p_memsz)", kernel.end
        )
    for segment in kernel.segments:  # what follows in memory is zero already
        file.load(memory, segment.paddr, segment.offset, segment.filesz)
    header = bytearray(0x290 - bzimage.HEADER_OFFSET)

    def put(offset: int, format_: str, value: int | bytes) -> None:
        struct.pack_into(format_, header, offset - bzimage.HEADER_OFFSET, value)

    put(0x1FE, "<H", 0xAA55)
    put(0x202, "4s", b"HdrS")
    put(0x206, "<H", _PROTOCOL_VERSION)
    put(0x230, "<I", 2 << 20)
    return _Loaded(ip, kernel.end, _ELF_INITRD_ADDR_MAX, _ELF_CMDLINE_BYTES, bytes(header))


def _load_initrd(
    memory: MemoryMap, low_end: int, loaded: _Loaded, initrd: bytes | str | Path
) -> tuple[int, int]:
    """Put it as high as it may lie; return address and size."""
    return load_initrd(memory, initrd, lambda name, size: _place_initrd(name, size, low_end, loaded))


def _place_initrd(name: str, size_bytes: int, low_end: int, loaded: _Loaded) -> int:
    if not size_bytes:
        raise KernelError(f"{name}: an initrd of 0 bytes: is the file right?")
    limit = min(low_end, loaded.initrd_addr_max + 1)
    address = (limit - size_bytes) & -layout.PAGE_BYTES
    if address < loaded.end:
        if limit < low_end:
            raise KernelError(
                f"{name}: {size_bytes} bytes don't fit below the kernel's initrd_addr_max {loaded.initrd_addr_max:#x}: make it smaller"
            )
        raise too_small(f"{name}: {size_bytes} bytes don't fit behind the kernel", loaded.end + size_bytes)
    return address


def too_small(what: str, end: int) -> KernelError:
    """The error for what ends at address `end`, where there is no memory; `what` says what that is."""
    if end > layout.RAM_LOW_END:
        return KernelError(
            f"{what}; it has to lie below {layout.RAM_LOW_END >> 30} GiB, and doesn't fit there"
        )
    mib = -(-end // layout.MIB)
    return KernelError(
        f"{what}, and there is less memory than that: give more than {mib} MiB (--memory {2 * mib}M)"
    )


def zero_page(header: bytes, e820: Sequence[layout.E820Entry], initrd: tuple[int, int]) -> bytes:
    """Return boot_params (arch/x86/include/uapi/asm/bootparam.h, Documentation/arch/x86/zero-page.rst).

    `header` is the kernel's own setup header; `initrd` address and size in bytes, below 4 GiB.
    """
    page = bytearray(layout.PAGE_BYTES)
    page[bzimage.HEADER_OFFSET : bzimage.HEADER_OFFSET + len(header)] = header

    def put(offset: int, format_: str, value: int) -> None:
        struct.pack_into(format_, page, offset, value)

    put(0x070, "<Q", layout.ACPI)  # acpi_rsdp_addr
    put(0x1E8, "<B", len(e820))
    put(0x210, "<B", _LOADER_UNDEFINED)
    put(0x211, "<B", (page[0x211] | _LOADED_HIGH) & ~_CAN_USE_HEAP)
    put(0x218, "<I", initrd[0])
    put(0x21C, "<I", initrd[1])
    put(0x228, "<I", layout.CMDLINE)
    put(0x250, "<Q", layout.SETUP_DATA)
    for i, entry in enumerate(e820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, entry.addr, entry.size, entry.type)
    return bytes(page)


def _start_info(e820: Sequence[layout.E820Entry], initrd: tuple[int, int]) -> bytes:
    """Return hvm_start_info with its tables behind it (xen/include/public/arch-x86/hvm/start_info.h)."""
    modules = [initrd] if initrd[1] else []
    modules_at = layout.PVH_START_INFO + 56
    memmap_at = modules_at + 32 * len(modules)
    info = struct.pack(
        "<4I4QII",
        *(_HVM_START_MAGIC, 1, 0, len(modules), modules_at if modules else 0),
        *(layout.CMDLINE, layout.ACPI, memmap_at, len(e820), 0),
    )
    tables = [struct.pack("<4Q", address, size, 0, 0) for address, size in modules]
    tables += [struct.pack("<QQII", entry.addr, entry.size, entry.type, 0) for entry in e820]
    return info + b"".join(tables)
