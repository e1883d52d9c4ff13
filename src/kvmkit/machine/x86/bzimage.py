"""bzImage: the setup header, and the kernel that is packed behind it.

(Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "Details of Header Fields".) A bzImage is the setup code of
`setup_sects` + 1 sectors, with the header at 0x1f1, followed by the protected-mode code, which decompresses its payload.
"""

import struct
from dataclasses import dataclass

from kvmkit.machine.errors import KernelError

HEADER_OFFSET = 0x1F1
_HEADER_END = 0x268  # of protocol 2.12; later fields follow, as far as the jump at 0x200 says
_SECTOR_BYTES = 512

XLF_KERNEL_64 = 1 << 0
_LOADED_HIGH = 1 << 0

MAX_VMLINUX_BYTES = 1 << 30
_LZ4_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class SetupHeader:
    """What the loader needs of the header. Addresses and sizes in bytes."""

    version: int
    setup_bytes: int
    """Where the protected-mode code starts in the file."""
    code_bytes: int
    """How long the file says that it is."""
    relocatable: bool
    kernel_alignment: int
    xloadflags: int
    initrd_addr_max: int
    cmdline_size: int
    """Longest command line, without its NUL."""
    payload_offset: int
    """In the protected-mode code."""
    payload_length: int
    pref_address: int
    init_size: int
    """Memory that the kernel needs from where it is loaded until it has read its memory map."""
    raw: bytes
    """The header itself, for the zero page."""


def parse(image: bytes, name: str, size_bytes: int) -> SetupHeader:
    """Read and check the header of a bzImage; `KernelError` names the field.

    `image` is at least the first page of a file of `size_bytes`, or all of it; `name` is for messages.
    """
    if len(image) < _HEADER_END:
        raise KernelError(
            f"{name}: {len(image)} bytes are too few for a bzImage's header: is the file truncated?"
        )
    (
        setup_sects, _root_flags, syssize, _ram_size, _vid_mode, _root_dev, boot_flag,
    ) = struct.unpack_from("<BHIHHHH", image, HEADER_OFFSET)  # fmt: skip
    jump, magic, version = struct.unpack_from("<H4sH", image, 0x200)
    if boot_flag != 0xAA55 or magic != b"HdrS":
        raise KernelError(
            f"{name}: neither an ELF file nor a bzImage (no HdrS at 0x202): give an x86-64 bzImage (vmlinuz) or vmlinux"
        )
    if version < 0x020C:
        raise KernelError(
            f"{name}: boot protocol {version >> 8}.{version & 0xFF:02}, before 2.12, has no 64-bit entry: use a kernel from 3.8 on"
        )
    loadflags = image[0x211]
    initrd_addr_max, kernel_alignment, relocatable, _min_alignment, xloadflags, cmdline_size = (
        struct.unpack_from("<IIBBHI", image, 0x22C)
    )
    payload_offset, payload_length = struct.unpack_from("<II", image, 0x248)
    pref_address, init_size = struct.unpack_from("<QI", image, 0x258)
    if not xloadflags & XLF_KERNEL_64:
        raise KernelError(
            f"{name}: a 32-bit kernel (xloadflags {xloadflags:#x} lacks XLF_KERNEL_64): use an x86-64 one"
        )
    if not loadflags & _LOADED_HIGH:
        raise KernelError(f"{name}: a zImage (loadflags {loadflags:#x} lacks LOADED_HIGH): build a bzImage")
    setup_bytes = ((setup_sects or 4) + 1) * _SECTOR_BYTES
    code_bytes = syssize * 16
    # The last paragraph may be cut short; a signature may follow.
    if not code_bytes or size_bytes + 15 < setup_bytes + code_bytes:
        raise KernelError(
            f"{name}: {size_bytes} bytes, but its header (setup_sects, syssize) says {setup_bytes + code_bytes}: "
            "the file is truncated"
        )
    if kernel_alignment & (kernel_alignment - 1) or kernel_alignment < 4096:
        raise KernelError(
            f"{name}: kernel_alignment {kernel_alignment:#x} is no power of two of at least a page"
        )
    if relocatable and pref_address % kernel_alignment:
        raise KernelError(
            f"{name}: pref_address {pref_address:#x} isn't aligned to kernel_alignment {kernel_alignment:#x}"
        )
    return SetupHeader(
        version=version,
        setup_bytes=setup_bytes,
        code_bytes=code_bytes,
        relocatable=bool(relocatable),
        kernel_alignment=kernel_alignment,
        xloadflags=xloadflags,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=cmdline_size,
        payload_offset=payload_offset,
        payload_length=payload_length,
        pref_address=pref_address,
        init_size=max(init_size, code_bytes),
        raw=bytes(image[HEADER_OFFSET : min(0x202 + (jump >> 8), 0x290)]),
    )


def extract_vmlinux(image: bytes, name: str = "bzImage") -> bytes:
    """Unpack the ELF kernel in a bzImage, whatever of gzip, bzip2, lzma, xz, lz4 and zstd it is packed with."""
    header = parse(image, name, len(image))
    start = header.setup_bytes + header.payload_offset
    payload = memoryview(image)[start : start + header.payload_length]
    if header.payload_length < 16 or len(payload) < header.payload_length:
        raise KernelError(
            f"{name}: its payload (payload_offset, payload_length) reaches out of the file: is it damaged?"
        )
    try:
        vmlinux = _decompress(payload)
    except (ImportError, MemoryError):
        raise  # nothing is wrong with the file
    except Exception as error:  # each library has its own
        raise KernelError(f"{name}: its payload can't be unpacked ({error}): the file is damaged") from error
    if vmlinux[:4] != b"\x7fELF":
        raise KernelError(f"{name}: its payload is no ELF file: the file is damaged")
    return vmlinux


def _decompress(payload: memoryview) -> bytes:
    import bz2  # here, because booting doesn't need them
    import lzma
    import zlib

    start = bytes(payload[:6])
    if start.startswith(b"\x1f\x8b"):
        gzip = zlib.decompressobj(31)
        data = gzip.decompress(payload, MAX_VMLINUX_BYTES)
        if not gzip.eof:
            raise ValueError("it ends too soon")
        return data
    # The others are followed by the length that they unpack to.
    size = int.from_bytes(payload[-4:], "little")
    if size > MAX_VMLINUX_BYTES:
        raise ValueError(f"it says that it unpacks to {size} bytes")
    packed, limit = payload[:-4], size + 1
    if start.startswith(b"BZh"):
        data = bz2.BZ2Decompressor().decompress(packed, limit)
    elif start.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        data = lzma.LZMADecompressor().decompress(packed, limit)
    elif start.startswith(b"\x02\x21\x4c\x18"):
        data = _lz4_legacy(packed[4:], limit)
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            data = reader.read(limit)
    else:
        raise ValueError(f"no known compression starts with {start.hex()}")
    if len(data) != size:
        raise ValueError(f"it unpacks to {len(data)} bytes, and should to {size}")
    return data


def _lz4_legacy(blocks: memoryview, limit: int) -> bytes:
    """LZ4's legacy frame: blocks that unpack to 8 MiB each but for the last, each after its packed length."""
    import lz4.block

    parts = []
    done = 0
    while blocks and done < limit:
        length = int.from_bytes(blocks[:4], "little")
        if not 0 < length <= len(blocks) - 4:
            raise ValueError(f"an LZ4 block of {length} bytes, with {len(blocks) - 4} left")
        part: bytes = lz4.block.decompress(blocks[4 : 4 + length], uncompressed_size=_LZ4_BLOCK_BYTES)
        parts.append(part)
        done += len(part)
        blocks = blocks[4 + length :]
    return b"".join(parts)
