"""ELF kernels (vmlinux): segments, the 64-bit entry, and the PVH entry that a note tells.

(System V ABI, "Object Files"; Documentation/arch/x86/boot.rst; Xen's docs/misc/pvh.pandoc for XEN_ELFNOTE_PHYS32_ENTRY.)
Only what a boot takes: a general library took longer to import than all this to run.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from kvmkit.machine.errors import KernelError

MAGIC = b"\x7fELF"

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_CLASS_64, _LITTLE_ENDIAN, _EM_X86_64 = 2, 1, 62
_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_NOTE = 1, 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_MAX_NOTES_BYTES = 1 << 20
_MACHINES = {
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S/390",
    40: "Arm",
    183: "AArch64",
    243: "RISC-V",
}

Read = Callable[[int, int], bytes]
"""Reads (offset, size) of the file; shorter at its end."""


@dataclass(frozen=True)
class Segment:
    """`filesz` bytes at `offset` in the file go to physical address `paddr`; zeros follow up to `memsz`."""

    paddr: int
    offset: int
    filesz: int
    memsz: int


@dataclass(frozen=True)
class ElfKernel:
    """What there is to load, and where it may be entered."""

    segments: tuple[Segment, ...]
    entry: int
    """Physical address of the 64-bit entry."""
    pvh_entry: int | None
    """Physical address of the 32-bit PVH entry, where the kernel has one."""

    @property
    def end(self) -> int:
        """First address after the kernel."""
        return max(segment.paddr + segment.memsz for segment in self.segments)


def parse(read: Read, size_bytes: int, name: str) -> ElfKernel:
    """Read and check the headers of a file of `size_bytes` that starts with `MAGIC`; `KernelError` names the field."""
    raw = read(0, _HEADER.size)
    if len(raw) < _HEADER.size:
        raise KernelError(f"{name}: {len(raw)} bytes are too few for an ELF header: is the file truncated?")
    ident, type_, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = _HEADER.unpack(raw)
    if ident[4] != _CLASS_64:
        raise KernelError(
            f"{name}: a 32-bit ELF file (EI_CLASS {ident[4]}): use an x86-64 vmlinux, or --testdev if it is a bare-metal test"
        )
    if ident[5] != _LITTLE_ENDIAN or machine != _EM_X86_64:
        what = _MACHINES.get(machine, f"machine {machine}") if ident[5] == _LITTLE_ENDIAN else "big-endian"
        raise KernelError(f"{name}: an ELF file for {what} (e_machine): use an x86-64 vmlinux")
    if type_ not in (_ET_EXEC, _ET_DYN):
        raise KernelError(f"{name}: an ELF file, but no executable (e_type {type_}): use the linked vmlinux")
    if phentsize != _PROGRAM_HEADER.size or not phnum:
        raise KernelError(
            f"{name}: e_phnum {phnum}, e_phentsize {phentsize}: no program headers say what to load"
        )
    headers = read(phoff, phnum * phentsize) if phoff < size_bytes else b""
    if len(headers) < phnum * phentsize:
        raise KernelError(
            f"{name}: its program headers (e_phoff {phoff:#x}) lie outside the file: is it truncated?"
        )
    segments = []
    pvh_entry = None
    for i, (p_type, _, offset, _, paddr, filesz, memsz, _) in enumerate(_PROGRAM_HEADER.iter_unpack(headers)):
        if p_type not in (_PT_LOAD, _PT_NOTE) or not (filesz or memsz):
            continue
        if offset + filesz > size_bytes:
            raise KernelError(
                f"{name}: segment {i} (p_offset, p_filesz) ends at byte {offset + filesz} of {size_bytes}: the file is truncated"
            )
        if p_type == _PT_NOTE:
            pvh_entry = pvh_entry or _pvh_entry(read(offset, min(filesz, _MAX_NOTES_BYTES)))
        elif filesz > memsz:
            raise KernelError(
                f"{name}: segment {i} has more bytes in the file (p_filesz) than in memory (p_memsz)"
            )
        else:
            segments.append(Segment(paddr, offset, filesz, memsz))
    if not segments:
        raise KernelError(f"{name}: no PT_LOAD segment: there is nothing to load")
    kernel = ElfKernel(tuple(segments), entry, pvh_entry)
    for what, address in (("e_entry", entry), ("the PVH note", pvh_entry)):
        if address is not None and not any(s.paddr <= address < s.paddr + s.memsz for s in segments):
            raise KernelError(
                f"{name}: {what} {address:#x} lies in no segment's physical addresses (p_paddr): is this a Linux kernel?"
            )
    return kernel


def _pvh_entry(notes: bytes) -> int | None:
    at = 0
    while at + _NOTE.size <= len(notes):
        namesz, descsz, type_ = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        desc_at = name_at + (namesz + 3 & ~3)
        if (
            type_ == _XEN_ELFNOTE_PHYS32_ENTRY
            and notes[name_at : name_at + namesz] == b"Xen\0"
            and descsz in (4, 8)
        ):
            desc = notes[desc_at : desc_at + descsz]
            return int.from_bytes(desc, "little") if len(desc) == descsz else None
        at = desc_at + (descsz + 3 & ~3)
    return None
