"""Kernels made up here: right ones, wrong ones, and mutated ones."""

import bz2
import contextlib
import lzma
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lz4.block
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmkit.kvm import GuestMemory, MemoryMap
from kvmkit.machine.errors import KernelError
from kvmkit.machine.x86 import bzimage, elf, layout
from kvmkit.machine.x86.boot import load_linux

MIB = 1 << 20
MEMORY = 64 * MIB
CODE = b"\xf4" * 100

ZERO_PAGE_FIELDS = {
    "acpi_rsdp_addr": ("<Q", 0x070),
    "e820_entries": ("<B", 0x1E8),
    "boot_flag": ("<H", 0x1FE),
    "header": ("<4s", 0x202),
    "type_of_loader": ("<B", 0x210),
    "ramdisk_image": ("<I", 0x218),
    "ramdisk_size": ("<I", 0x21C),
    "cmd_line_ptr": ("<I", 0x228),
    "setup_data": ("<Q", 0x250),
    "init_size": ("<I", 0x260),
}


def make_elf(
    code: bytes = CODE, paddr: int = 16 * MIB, *, note: bytes | None = None, **changes: Any
) -> bytes:
    """An ELF kernel of one segment, entered at its start, with a PVH note if `note` is the descriptor."""
    e: dict[str, Any] = {
        "elf_class": 2,
        "data": 1,
        "type": 2,
        "machine": 62,
        "entry": paddr,
        "phoff": 64,
        "phentsize": 56,
        "phnum": 1,
    }
    e |= {"offset": 0x1000, "filesz": len(code), "memsz": len(code) + 0x1000, "p_type": 1} | changes
    notes = b"" if note is None else struct.pack("<III4s", 4, len(note), 18, b"Xen\0") + note
    ident = b"\x7fELF" + bytes((e["elf_class"], e["data"], 1)) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH",
        *(
            e["type"],
            e["machine"],
            1,
            e["entry"],
            e["phoff"],
            0,
            0,
            64,
            e["phentsize"],
            e["phnum"] + bool(notes),
            0,
            0,
            0,
        ),
    )
    program = struct.pack(
        "<IIQQQQQQ", e["p_type"], 7, e["offset"], paddr, paddr, e["filesz"], e["memsz"], 4096
    )
    if notes:
        program += struct.pack("<IIQQQQQQ", 4, 4, 0x800, 0, 0, len(notes), len(notes), 4)
    return (header + program).ljust(0x800, b"\0") + notes.ljust(0x800, b"\0") + code


def make_bzimage(code: bytes = CODE, **changes: Any) -> bytes:
    """A bzImage whose protected-mode code is `code`, at its entry, then a payload if `payload` is given."""
    payload = changes.pop("payload", b"")
    body: bytes = bytes(0x200) + code + payload
    body += bytes(-len(body) % 16)
    f: dict[str, Any] = {
        "setup_sects": 1,
        "syssize": len(body) // 16,
        "boot_flag": 0xAA55,
        "magic": b"HdrS",
        "version": 0x20F,
    }
    f |= {
        "loadflags": 1,
        "initrd_addr_max": 0x7FFFFFFF,
        "alignment": 2 * MIB,
        "relocatable": 1,
        "xloadflags": 1,
    }
    f |= {"cmdline_size": 255, "payload_offset": 0x200 + len(code), "payload_length": len(payload)}
    f |= {"pref_address": 16 * MIB, "init_size": MIB} | changes
    image = bytearray(1024)
    struct.pack_into("<BHIHHHH", image, 0x1F1, f["setup_sects"], 0, f["syssize"], 0, 0, 0, f["boot_flag"])
    struct.pack_into("<H4sH", image, 0x200, 0x66EB, f["magic"], f["version"])
    image[0x211] = f["loadflags"]
    fields = (f["initrd_addr_max"], f["alignment"], f["relocatable"], 21, f["xloadflags"], f["cmdline_size"])
    struct.pack_into("<IIBBHI", image, 0x22C, *fields)
    struct.pack_into("<II", image, 0x248, f["payload_offset"], f["payload_length"])
    struct.pack_into("<QI", image, 0x258, f["pref_address"], f["init_size"])
    return bytes(image) + body


@contextlib.contextmanager
def ram(memory_bytes: int = MEMORY) -> Iterator[MemoryMap]:
    memory = MemoryMap()
    try:
        for gpa, size in layout.ram(memory_bytes):
            memory.add(gpa, GuestMemory(size))
        yield memory
    finally:
        memory.close()


@pytest.fixture
def memory() -> Iterator[MemoryMap]:
    with ram() as map_:
        yield map_


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "the-kernel"
        path.write_bytes(data)
        return path

    return write


File = Callable[[bytes], Path]


def zero_page(memory: MemoryMap) -> dict[str, Any]:
    page = memory.read(layout.ZERO_PAGE, 4096)
    return {
        name: struct.unpack_from(format_, page, at)[0] for name, (format_, at) in ZERO_PAGE_FIELDS.items()
    }


@pytest.mark.parametrize(
    ("image", "code_at", "entry"),
    [(make_elf(), 16 * MIB, 16 * MIB), (make_bzimage(), 16 * MIB + 0x200, 16 * MIB + 0x200)],
    ids=["vmlinux", "bzImage"],
)
def test_64_bit_protocol(memory: MemoryMap, file: File, image: bytes, code_at: int, entry: int) -> None:
    initrd = bytes(range(256)) * 20
    start = load_linux(memory, MEMORY, file(image), initrd, "console=ttyS0 \udcff")
    assert (start.protocol, start.ip, start.parameters) == ("linux64", entry, layout.ZERO_PAGE)
    assert memory.read(code_at, len(CODE)) == CODE
    page = zero_page(memory)
    assert (page["boot_flag"], page["header"], page["type_of_loader"]) == (0xAA55, b"HdrS", 0xFF)
    assert page["acpi_rsdp_addr"] == layout.ACPI
    assert memory.read(page["cmd_line_ptr"], 16) == b"console=ttyS0 \xff\0"
    assert page["ramdisk_image"] % 4096 == 0
    assert page["ramdisk_image"] + page["ramdisk_size"] > MEMORY - 4096  # as high as it goes
    assert memory.read(page["ramdisk_image"], page["ramdisk_size"]) == initrd
    next_, type_, length = struct.unpack("<QII", memory.read(page["setup_data"], 16))
    assert (next_, type_, length) == (0, 9, 32)
    assert memory.read(page["setup_data"] + 16, 32) != bytes(32)
    raw = memory.read(layout.ZERO_PAGE, 4096)
    entries = [struct.unpack_from("<QQI", raw, 0x2D0 + 20 * i) for i in range(page["e820_entries"])]
    assert entries == [(e.addr, e.size, e.type) for e in layout.e820(MEMORY)]


def test_the_seed_differs(file: File) -> None:
    seeds = set()
    for _ in range(2):
        with ram() as memory:
            load_linux(memory, MEMORY, file(make_elf()), None, "")
            seeds.add(memory.read(layout.SETUP_DATA + 16, 32))
    assert len(seeds) == 2


def test_no_initrd(memory: MemoryMap, file: File) -> None:
    load_linux(memory, MEMORY, file(make_bzimage()), None, "")
    page = zero_page(memory)
    assert (page["ramdisk_image"], page["ramdisk_size"]) == (0, 0)
    assert page["init_size"] == MIB  # the kernel's own header is handed on


@pytest.mark.parametrize("note", [struct.pack("<I", 16 * MIB + 4), struct.pack("<Q", 16 * MIB + 4)])
def test_pvh(memory: MemoryMap, file: File, note: bytes) -> None:
    start = load_linux(memory, MEMORY, file(make_elf(note=note)), b"initrd", "a b", protocol="pvh")
    assert (start.protocol, start.ip) == ("pvh", 16 * MIB + 4)
    info = struct.unpack("<4I4QII", memory.read(start.parameters, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, _ = info
    assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
    assert memory.read(cmdline, 4) == b"a b\0"
    assert rsdp == layout.ACPI
    address, size, _, _ = struct.unpack("<4Q", memory.read(modlist, 32))
    assert memory.read(address, size) == b"initrd"
    table = memory.read(memmap, 24 * entries)
    assert [entry[:3] for entry in struct.iter_unpack("<QQII", table)] == [
        (e.addr, e.size, e.type) for e in layout.e820(MEMORY)
    ]


def test_initrd_from_a_file(memory: MemoryMap, file: File, tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(b"x" * 5000)
    load_linux(memory, MEMORY, file(make_bzimage(initrd_addr_max=32 * MIB - 1)), path, "")
    page = zero_page(memory)
    assert (page["ramdisk_image"], page["ramdisk_size"]) == (32 * MIB - 8192, 5000)
    assert memory.read(page["ramdisk_image"], 5000) == b"x" * 5000


def test_a_kernel_that_prefers_more_memory_moves(memory: MemoryMap, file: File) -> None:
    start = load_linux(memory, MEMORY, file(make_bzimage(pref_address=128 * MIB)), None, "")
    assert start.ip == 2 * MIB + 0x200


BAD = {
    "empty": (b"", "too few for a bzImage"),
    "text": (b"#!/bin/sh\n" * 1000, "neither an ELF file nor a bzImage"),
    "short ELF": (b"\x7fELF" + bytes(20), "too few for an ELF header"),
    "ELF32": (make_elf(elf_class=1), "32-bit ELF.*EI_CLASS"),
    "big-endian": (make_elf(data=2), "big-endian.*e_machine"),
    "AArch64": (make_elf(machine=183), "AArch64.*e_machine"),
    "object": (make_elf(type=1), "e_type 1"),
    "no program headers": (make_elf(phnum=0), "e_phnum 0"),
    "odd program headers": (make_elf(phentsize=32), "e_phentsize 32"),
    "headers outside": (make_elf(phoff=1 << 40), "e_phoff"),
    "truncated ELF": (make_elf()[:-1], "p_filesz.*truncated"),
    "more file than memory": (make_elf(memsz=1), "p_memsz"),
    "no PT_LOAD": (make_elf(p_type=6), "PT_LOAD"),
    "virtual entry": (make_elf(entry=0xFFFFFFFF81000000), "e_entry"),
    "too low": (make_elf(paddr=0x9000), "below 1 MiB"),
    "too high": (make_elf(paddr=80 * MIB), r"--memory"),
    "very high": (make_elf(paddr=1 << 60), "below 3 GiB"),
    "old bzImage": (make_bzimage(version=0x20B), "2.11"),
    "32-bit bzImage": (make_bzimage(xloadflags=0), "XLF_KERNEL_64"),
    "zImage": (make_bzimage(loadflags=0), "LOADED_HIGH"),
    "truncated bzImage": (make_bzimage(payload=bytes(1000))[:-20], "syssize.*truncated"),
    "no code": (make_bzimage(syssize=0), "syssize"),
    "alignment": (make_bzimage(alignment=3), "kernel_alignment"),
    "misaligned": (make_bzimage(pref_address=16 * MIB + 4096), "pref_address"),
    "too large": (make_bzimage(init_size=100 * MIB), r"init_size.*--memory"),
    "fixed and too large": (make_bzimage(init_size=100 * MIB, relocatable=0), "init_size"),
}


@pytest.mark.parametrize(("image", "message"), BAD.values(), ids=BAD)
def test_bad_kernels(memory: MemoryMap, file: File, image: bytes, message: str) -> None:
    with pytest.raises(KernelError, match=message) as raised:
        load_linux(memory, MEMORY, file(image), None, "")
    assert "the-kernel" in str(raised.value)


def test_no_pvh_entry(memory: MemoryMap, file: File) -> None:
    with pytest.raises(KernelError, match="no PVH entry"):
        load_linux(memory, MEMORY, file(make_elf()), None, "", protocol="pvh")
    with pytest.raises(KernelError, match="no PVH entry"):
        load_linux(memory, MEMORY, file(make_elf(note=b"odd")), None, "", protocol="pvh")
    with pytest.raises(KernelError, match="PVH note"):
        load_linux(memory, MEMORY, file(make_elf(note=bytes(4))), None, "", protocol="pvh")
    with pytest.raises(KernelError, match="no ELF"):
        load_linux(memory, MEMORY, file(make_bzimage()), None, "", protocol="pvh")


@pytest.mark.parametrize(
    ("cmdline", "message"), [("x" * 256, "256 bytes.*255.*cmdline_size"), ("a\0b", "NUL")]
)
def test_bad_command_lines(memory: MemoryMap, file: File, cmdline: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        load_linux(memory, MEMORY, file(make_bzimage()), None, cmdline)


def test_bad_initrds(memory: MemoryMap, file: File, tmp_path: Path) -> None:
    kernel = file(make_bzimage())
    empty = tmp_path / "empty-initrd"
    empty.touch()
    with pytest.raises(KernelError, match="empty-initrd: an initrd of 0 bytes"):
        load_linux(memory, MEMORY, kernel, empty, "")
    with pytest.raises(KernelError, match="--memory"):
        load_linux(memory, MEMORY, kernel, bytes(50 * MIB), "")
    kernel = file(make_bzimage(initrd_addr_max=18 * MIB))
    with pytest.raises(KernelError, match="initrd_addr_max"):
        load_linux(memory, MEMORY, kernel, bytes(2 * MIB), "")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_linux(memory, MEMORY, tmp_path / "nowhere", None, "")


def test_no_regular_files(memory: MemoryMap, file: File, tmp_path: Path) -> None:
    """They are refused, not waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/null")):
        with pytest.raises(KernelError, match=f"{path}: no regular file"):
            load_linux(memory, MEMORY, path, None, "")
        with pytest.raises(KernelError, match=f"{path}: no regular file"):
            load_linux(memory, MEMORY, file(make_elf()), path, "")


# What a mutation may do: any bytes at any place of the headers.
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 0x300), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
)


def mutated(image: bytes, mutations: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(image)
    for at, new in mutations:
        data[at : at + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    "image", [make_elf(note=bytes(8)), make_bzimage(payload=bytes(100))], ids=["vmlinux", "bzImage"]
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS, cut=st.integers(0, 0x2000), protocol=st.sampled_from(("linux64", "pvh")))
def test_mutated_headers(
    file: File, image: bytes, mutations: list[tuple[int, bytes]], cut: int, protocol: Any
) -> None:
    """An error that says what is wrong, or a kernel that is entered within memory."""
    data = mutated(image, mutations)
    data = data[: len(data) - cut] if cut < len(data) // 4 else data
    with ram() as memory:
        try:
            start = load_linux(memory, MEMORY, file(data), b"initrd", "", protocol=protocol)
        except KernelError as error:
            assert str(error)
        else:
            assert layout.KERNEL_MIN <= start.ip < MEMORY


@given(st.binary(max_size=300))
def test_any_notes(data: bytes) -> None:
    address = elf._pvh_entry(data)
    assert address is None or 0 <= address < 1 << 64


def lz4_legacy(data: bytes) -> bytes:
    blocks = b""
    for at in range(0, len(data), 8 * MIB):
        block = lz4.block.compress(data[at : at + 8 * MIB], store_size=False)
        blocks += len(block).to_bytes(4, "little") + block
    return b"\x02\x21\x4c\x18" + blocks


def gzip(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(data) + compressor.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
}
VMLINUX = make_elf() * 3


@pytest.mark.parametrize("name", PACKERS)
def test_extract(name: str) -> None:
    payload = PACKERS[name](VMLINUX) + len(VMLINUX).to_bytes(4, "little")
    assert bzimage.extract_vmlinux(make_bzimage(payload=payload)) == VMLINUX


def test_extract_gzip_and_many_blocks() -> None:
    assert bzimage.extract_vmlinux(make_bzimage(payload=gzip(VMLINUX))) == VMLINUX
    large = VMLINUX + bytes(17 * MIB)
    payload = lz4_legacy(large) + len(large).to_bytes(4, "little")
    assert bzimage.extract_vmlinux(make_bzimage(payload=payload)) == large


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "payload_offset, payload_length"),
        (b"nothing known at all" + bytes(4), "no known compression"),
        (gzip(b"this is no ELF file, is it? no."), "no ELF file"),
        (gzip(VMLINUX)[:-40], "no ELF|can't be unpacked|damaged"),
        (lz4_legacy(VMLINUX)[:-40] + bytes(4), "damaged"),
        (PACKERS["xz"](VMLINUX)[:-40] + len(VMLINUX).to_bytes(4, "little"), "damaged"),
        (PACKERS["zstd"](VMLINUX)[:40] + len(VMLINUX).to_bytes(4, "little"), "damaged"),
    ],
)
def test_extract_damaged(payload: bytes, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        bzimage.extract_vmlinux(make_bzimage(payload=payload), "some-kernel")


@given(MUTATIONS, st.sampled_from(sorted(PACKERS)))
def test_extract_mutated(mutations: list[tuple[int, bytes]], name: str) -> None:
    payload = PACKERS[name](VMLINUX) + len(VMLINUX).to_bytes(4, "little")
    image = make_bzimage(payload=mutated(payload, [(at % len(payload), new) for at, new in mutations]))
    try:
        assert bzimage.extract_vmlinux(image)[:4] == b"\x7fELF"
    except KernelError as error:
        assert "bzImage" in str(error)


def test_a_missing_library_is_not_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    payload = PACKERS["lz4"](VMLINUX) + len(VMLINUX).to_bytes(4, "little")
    with pytest.raises(ImportError, match="lz4"):
        bzimage.extract_vmlinux(make_bzimage(payload=payload))


@pytest.mark.parametrize("memory_bytes", [0, MIB, 16 * MIB + 1])
def test_bad_memory_sizes(memory_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"memory of {memory_bytes} bytes"):
        layout.ram(memory_bytes)


@given(st.integers(512, 4 << 20).map(lambda pages: pages * 4096))
def test_memory_maps(memory_bytes: int) -> None:
    """Sorted, without overlap, RAM in RAM, and nothing of it where devices are."""
    blocks = layout.ram(memory_bytes)
    assert sum(size for _, size in blocks) == memory_bytes
    end = 0
    for entry in layout.e820(memory_bytes):
        assert entry.size > 0 and entry.addr >= end
        end = entry.addr + entry.size
        if entry.type == layout.E820_RAM:
            assert any(start <= entry.addr and end <= start + size for start, size in blocks)
            assert end <= layout.RAM_LOW_END or entry.addr >= layout.RAM_HIGH_START
