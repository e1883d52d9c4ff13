"""Multiboot kernels: ELF files of 32 bits with the header of the Multiboot Specification 0.6.96, as bare-metal tests are.

What is loaded are the program headers' segments, wherever in RAM they go; the address fields that the header may have count
for kernels which are no ELF files, and those aren't taken.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvmkit.kvm import MemoryMap
from kvmkit.machine.errors import KernelError
from kvmkit.machine.kernel_file import KernelFile
from kvmkit.machine.x86 import elf, layout
from kvmkit.machine.x86.boot import too_small

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
"""What marks a kernel's header, and what the kernel finds in eax."""

_SEARCH_BYTES = 8192
_FLAGS_WANTED = 0xFFFF
"""Those of the header's flags that a loader has to understand."""
_FLAGS_KNOWN = 0b11  # modules on pages, mem_lower and mem_upper
_HAS_MEMORY, _HAS_CMDLINE, _HAS_MODULES, _HAS_MMAP = 1 << 0, 1 << 2, 1 << 3, 1 << 6

_ELF_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<8I")
_CLASS_32, _LITTLE_ENDIAN, _ET_EXEC, _EM_386, _PT_LOAD = 1, 1, 2, 3, 1
_MAX_SEGMENTS = 64

_INFO_BYTES = 88
_MMAP_AT = layout.MULTIBOOT + _INFO_BYTES
_MMAP_ENTRY = struct.Struct("<IQQI")
_MODULES_AT = layout.MULTIBOOT_CMDLINE - 16
_CMDLINE_MAX_BYTES = layout.MULTIBOOT_MODULE - layout.MULTIBOOT_CMDLINE - 1
_MODULE_MAX_BYTES = layout.MULTIBOOT_END - layout.MULTIBOOT_MODULE

_OURS = (
    (layout.MULTIBOOT, layout.MULTIBOOT_END, "what the kernel is told"),
    (layout.ACPI, layout.ACPI + layout.ACPI_MAX_BYTES, "the ACPI tables"),
)


@dataclass(frozen=True)
class Entry:
    """The first processor starts at `ip` in protected mode without paging, with LOADER_MAGIC in eax and `info` in ebx."""

    ip: int
    info: int
    cmdline: str
    """All of it, the file's name first."""


def load(
    memory: MemoryMap, memory_bytes: int, kernel: str | Path, module: str | Path | None, arguments: str
) -> Entry:
    """Load `kernel` for a board of `memory_bytes`, with a file as its `module` and `arguments` behind its own name.

    `KernelError` names what is wrong with them; `OSError` comes from reading.
    """
    low_end = layout.ram(memory_bytes)[0][1]
    with KernelFile(kernel) as file:
        _check_header(file)
        segments, entry = _parse(file)
        for segment in segments:
            end = segment.paddr + segment.memsz
            if end > low_end:
                raise too_small(f"{file.name}: a segment ends at {end:#x} (p_paddr, p_memsz)", end)
            for start, stop, what in _OURS:
                if segment.paddr < stop and start < end:
                    raise KernelError(
                        f"{file.name}: a segment lies at {segment.paddr:#x} to {end:#x} (p_paddr, p_memsz), where {what} "
                        f"will be, at {start:#x} to {stop:#x}: link it elsewhere, at 4 MiB for one"
                    )
        for segment in segments:  # what follows in memory is zero already
            file.load(memory, segment.paddr, segment.offset, segment.filesz)
    # The first word is the name: one word it must be.
    cmdline = " ".join(("_".join(Path(kernel).name.split()), *filter(None, (arguments,))))
    raw = cmdline.encode(errors="surrogateescape")
    if len(raw) > _CMDLINE_MAX_BYTES or b"\0" in raw:
        what = (
            "it contains a NUL"
            if b"\0" in raw
            else f"{len(raw)} bytes, and {_CMDLINE_MAX_BYTES} are the most"
        )
        raise KernelError(f"kernel command line: {what}: shorten it")
    memory.write(layout.MULTIBOOT_CMDLINE, raw + b"\0")
    module_bytes = None if module is None else _load_module(memory, module)
    memory.write(layout.MULTIBOOT, _info(layout.e820(memory_bytes), low_end, module_bytes))
    if module_bytes is not None:
        start = layout.MULTIBOOT_MODULE
        memory.write(_MODULES_AT, struct.pack("<4I", start, start + module_bytes, 0, 0))
    return Entry(entry, layout.MULTIBOOT, cmdline)


def _check_header(file: KernelFile) -> None:
    start = file.read(0, _SEARCH_BYTES)
    for at in range(0, len(start) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", start, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            if unknown := flags & _FLAGS_WANTED & ~_FLAGS_KNOWN:
                raise KernelError(
                    f"{file.name}: its multiboot header asks for what isn't here (flags {unknown:#x}; bit 2 is a video mode)"
                )
            return
    raise KernelError(
        f"{file.name}: no multiboot header in its first {_SEARCH_BYTES} bytes: it is no test kernel; Linux boots without --testdev"
    )


def _parse(file: KernelFile) -> tuple[list[elf.Segment], int]:
    """The segments, none of which overlap, by their address, and the entry."""
    raw = file.read(0, _ELF_HEADER.size)
    if not raw.startswith(elf.MAGIC) or len(raw) < _ELF_HEADER.size:
        raise KernelError(f"{file.name}: no ELF file, which a multiboot kernel has to be here")
    ident, type_, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = _ELF_HEADER.unpack(raw)
    if (ident[4], ident[5], machine, type_) != (_CLASS_32, _LITTLE_ENDIAN, _EM_386, _ET_EXEC):
        raise KernelError(
            f"{file.name}: no executable for i386 (EI_CLASS {ident[4]}, EI_DATA {ident[5]}, e_machine {machine}, e_type {type_}): "
            "a multiboot kernel is an ELF32 one, even if it switches to 64 bits (objcopy -O elf32-i386)"
        )
    if phentsize != _PROGRAM_HEADER.size or not 0 < phnum <= _MAX_SEGMENTS:
        raise KernelError(
            f"{file.name}: e_phnum {phnum}, e_phentsize {phentsize}: 1 to {_MAX_SEGMENTS} program headers of "
            f"{_PROGRAM_HEADER.size} bytes say what to load"
        )
    headers = file.read(phoff, phnum * phentsize)
    if len(headers) < phnum * phentsize:
        raise KernelError(
            f"{file.name}: its program headers (e_phoff {phoff:#x}) lie outside the file: is it truncated?"
        )
    segments = []
    for i, (p_type, offset, _, paddr, filesz, memsz, *_) in enumerate(_PROGRAM_HEADER.iter_unpack(headers)):
        if p_type != _PT_LOAD or not memsz | filesz:
            continue
        if offset + filesz > file.size_bytes or filesz > memsz:
            raise KernelError(
                f"{file.name}: segment {i} has {filesz} bytes at {offset} (p_filesz, p_offset) for {memsz} in memory (p_memsz), "
                f"of a file of {file.size_bytes}: is it truncated?"
            )
        segments.append(elf.Segment(paddr, offset, filesz, memsz))
    segments.sort(key=lambda segment: segment.paddr)
    for before, after in pairwise(segments):
        if before.paddr + before.memsz > after.paddr:
            raise KernelError(f"{file.name}: two segments overlap at {after.paddr:#x} (p_paddr, p_memsz)")
    if not any(s.paddr <= entry < s.paddr + s.memsz for s in segments):
        raise KernelError(f"{file.name}: e_entry {entry:#x} lies in no segment (PT_LOAD, by p_paddr)")
    return segments, entry


def _load_module(memory: MemoryMap, module: str | Path) -> int:
    """Put it in its place; return its size."""
    with KernelFile(module) as file:
        if file.size_bytes > _MODULE_MAX_BYTES:
            raise KernelError(
                f"{file.name}: {file.size_bytes} bytes: a test kernel's module is its environment, NAME=value in each line, "
                f"and {_MODULE_MAX_BYTES} are the most"
            )
        file.load(memory, layout.MULTIBOOT_MODULE, 0, file.size_bytes)
        return file.size_bytes


def _info(e820: Sequence[layout.E820Entry], low_end: int, module_bytes: int | None) -> bytes:
    """The multiboot information, with the memory map behind it."""
    mmap = b"".join(_MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, e.addr, e.size, e.type) for e in e820)
    flags = _HAS_MEMORY | _HAS_CMDLINE | _HAS_MODULES | _HAS_MMAP
    modules = module_bytes is not None
    info = struct.pack(
        "<13I",
        *(flags, layout.EBDA >> 10, (low_end - layout.KERNEL_MIN) >> 10, 0),  # mem_lower, mem_upper in KiB
        *(layout.MULTIBOOT_CMDLINE, int(modules), _MODULES_AT if modules else 0),
        *(0, 0, 0, 0, len(mmap), _MMAP_AT),
    )
    return info.ljust(_INFO_BYTES, b"\0") + mmap
