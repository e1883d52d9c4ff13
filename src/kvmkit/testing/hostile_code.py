"""Machine code for hostile guests: made of bytes, so that it needs no assembler and a seed always gives the same."""

import struct
from collections.abc import Callable, Sequence
from random import Random

REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))

_ERROR_CODE_VECTORS = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))

_PREFIXES = (0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65)


def skip_handlers(bits: int, address: int, r: Random) -> tuple[bytes, bytes]:
    """Return an IDT (an IVT for 16 bits) and, to lie at `address`, handlers that skip some bytes at the fault and go on."""
    table, code = b"", b""
    for vector in range(256):
        at = address + len(code)
        skip = r.choice((1, 1, 2, 3, 7)) if vector < 32 and vector != 2 else 0
        if bits == 64:
            if vector in _ERROR_CODE_VECTORS:
                code += bytes.fromhex("4883c408")  # add rsp, 8
            code += bytes.fromhex("48830424") + bytes([skip])  # add qword ptr [rsp], skip
            code += bytes.fromhex("48cf")
            table += (at & 0xFFFF).to_bytes(2, "little") + bytes.fromhex("0800008e")
            table += (at >> 16).to_bytes(6, "little") + bytes(4)
        elif bits == 32:
            if vector in _ERROR_CODE_VECTORS:
                code += bytes.fromhex("83c404")
            code += bytes.fromhex("830424") + bytes([skip]) + b"\xcf"
            table += (
                (at & 0xFFFF).to_bytes(2, "little")
                + bytes.fromhex("0800008e")
                + (at >> 16).to_bytes(2, "little")
            )
        else:
            # push bp; mov bp, sp; add word ptr [bp + 2], skip; pop bp; iret
            code += bytes.fromhex("5589e5834602") + bytes([skip]) + bytes.fromhex("5dcf")
            table += (at & 0xF).to_bytes(2, "little") + (at >> 4).to_bytes(2, "little")
    return table, code


def _modrm(r: Random, bits: int) -> bytes:
    """ModRM with whatever SIB and displacement it asks for (by the rules of 32-bit and 64-bit addressing)."""
    mod, reg, rm = r.choice((0, 0, 1, 2, 3, 3)), r.randrange(8), r.randrange(8)
    out = bytes([mod << 6 | reg << 3 | rm])
    if mod == 3 or bits == 16:
        return out + (r.randbytes(mod) if mod in (1, 2) else b"")
    base = rm
    if rm == 4:
        sib = r.getrandbits(8)
        out += bytes([sib])
        base = sib & 7
    small = r.choice((0, 4, 8, 0x1000 - 3, 0xFFC, 0x100)).to_bytes(4, "little")
    if mod == 1:
        out += r.randbytes(1)
    elif mod == 2 or (mod == 0 and base == 5):
        out += r.choice((small, small, r.randbytes(4)))
    return out


def instruction(r: Random, bits: int) -> bytes:
    """Return one instruction, likely but not certain to be valid: prefixes, opcode of any map, operands, an immediate."""
    out = bytes(r.choice(_PREFIXES) for _ in range(r.choice((0, 0, 0, 0, 1, 1, 2, 3))))
    if bits == 64 and r.random() < 0.5:
        out += bytes([0x40 | r.randrange(16)])
    pick = r.random()
    opcode = r.getrandbits(8)
    if pick < 0.45:
        while opcode in _PREFIXES or 0xE8 <= opcode <= 0xEB or opcode in (0xF4, 0xCC):
            opcode = r.getrandbits(8)
        out += bytes([opcode])
    elif pick < 0.75:
        out += bytes([0x0F, opcode])
    elif pick < 0.82:
        out += bytes([0x0F, r.choice((0x38, 0x3A)), opcode])
    elif pick < 0.95:
        out += bytes([0xC4, r.choice((0xE0, 0x00, 0xC0)) | r.randrange(1, 4), r.getrandbits(8), opcode])
    elif pick < 0.98:
        out += bytes([0xD8 | r.randrange(8)])
    else:
        out += bytes([0x62]) + r.randbytes(3) + bytes([opcode])
    return out + _modrm(r, bits) + r.choice((b"", b"", b"", r.randbytes(1), r.randbytes(4)))


def random_code(r: Random, bits: int, length: int) -> bytes:
    """Return about `length` bytes of random instructions, with a jump back to the start."""
    out = b""
    while len(out) < length:
        out += instruction(r, bits)
        if r.random() < 0.02:
            out += bytes([r.choice((0x75, 0x74, 0x72, 0xEB, 0xE2)), r.getrandbits(8)])
    return _loop(out, bits)


def _loop(code: bytes, bits: int) -> bytes:
    size = 2 if bits == 16 else 4
    back = -(len(code) + 1 + size)
    if bits == 16:
        back = (back + 0x8000) % 0x10000 - 0x8000
    return code + b"\xe9" + back.to_bytes(size, "little", signed=True)


def _load(r: Random, bits: int, register: int, value: int) -> bytes:
    """Return MOV of `value` to `register`."""
    if bits == 64:
        return bytes([0x48, 0xB8 | register]) + (value & (1 << 64) - 1).to_bytes(8, "little")
    prefix = b"\x66" if bits == 16 else b""
    return prefix + bytes([0xB8 | register]) + (value & 0xFFFFFFFF).to_bytes(4, "little")


# Instructions with an operand at [rdi], and string and stack instructions.
_ACCESS_CODES = """
    8a07 8b07 668b07 488b07 8807 8907 668907 488907 0107 480107 f0480107 f00fb10f f0480fb10f 870f
    0f104700 0f1007 0f1107 660f6f07 660f7f07 c5fc1007 c5fc1107 c5fd6f07 c5fd7f07 f30f6f07 f30f7f07
    0fae07 0fae0f 480fae27 480fae2f 480fae37 dd07 dd1f db2f db3f dd27 dd37 df27 df37 d927 d92f a4 48a5
    48ab 48ad 48a7 48af f348a5 f348ab f3a4 f3aa f3a6 f2ae 480fc70f f0480fc70f 0fc70f f00fc70f ff07
    48ff0f f6db 0fab07 480fab07 f0480fb307 480fbb07 660f3a140700 660f3a0f0700 0f2b07 660fe707 660f2b07
    0fc307 480fc307 660ff7c1 0ff7c1 8f07 ff37 58 50 5c 488f07 48ff37 0fb607 480fbf07 486307 8607
    f00fc107 480fc107 d7 6e 6f 6c f36e f36f 0f010f 0f0117 0f011f 0f0137 0f0107 0f0027 0fae3f 660fae3f
    0f0d07 0f1807 0fb207 0fb407 0fb507 c8100001 c9 c4e27d9007 c4e26d901417 c4e26d8c07 c4e26d8e07
    c4e2fd8c07 c4e2fd8e07 c4e27d5a07 ff27 ff17 ff2f ff1f 48ff2f 48ff1f ff6ffc
"""
_ACCESSES = [bytes.fromhex(code) for code in _ACCESS_CODES.split()]


_STRING_CODES = "f3a4 f3a5 f348a5 f3aa f3ab f348ab f3a6 f2ae f36c f36e a5 ab"
_STRINGS = [bytes.fromhex(code) for code in _STRING_CODES.split()]


def access_code(r: Random, bits: int, count: int, pointer: Callable[[], int]) -> bytes:
    """Return `count` accesses of memory through rdi and rsi, which often point at the edge of something."""
    out = b""
    for _ in range(count):
        for register in r.sample((6, 7), r.randrange(1, 3)):
            out += _load(r, bits, register, pointer())
        if r.random() < 0.3:
            out += _load(r, bits, 1, r.choice((0, 1, 7, 300, 5000, r.getrandbits(16))))
        if r.random() < 0.05:
            out += r.choice((b"\xfd", b"\xfc"))
        out += r.choice(_ACCESSES if r.random() < 0.8 else _STRINGS)
        if r.random() < 0.1:
            out += instruction(r, bits)
    return _loop(out, bits)


def control_code(r: Random, bits: int, count: int, pointer: Callable[[], int]) -> bytes:
    """Return `count` writes of control, debug and model-specific registers and system tables, between other code."""
    out = b""
    for _ in range(count):
        value = r.choice(
            (pointer(), 1 << r.randrange(64), r.getrandbits(64), 0x80000011 ^ 1 << r.randrange(32), 0x6A0)
        )
        match r.randrange(12):
            case 0 | 1:
                out += _load(r, bits, 0, value) + bytes(
                    [0x0F, 0x22, 0xC0 | r.choice((0, 2, 3, 4, 4, 0, 3)) << 3]
                )
            case 2:
                # Set or clear one bit of CR0, CR4.
                reg = r.choice((0, 4))
                bit = r.randrange(32)
                btc = bytes([0x0F, 0xBA, 0xF8, bit])
                out += bytes([0x0F, 0x20, 0xC0 | reg << 3]) + btc + bytes([0x0F, 0x22, 0xC0 | reg << 3])
            case 3:
                out += _load(r, bits, 0, value) + bytes([0x0F, 0x23, 0xC0 | r.randrange(8) << 3])
            case 4 | 5:
                msr = r.choice(
                    (
                        0xC0000080 + r.randrange(5),
                        0xC0000100 + r.randrange(4),
                        0x1B,
                        0x10,
                        0x174 + r.randrange(3),
                    )
                )
                msr = r.choice(
                    (msr, 0x200 + r.randrange(16), 0x277, 0x6E0, 0x4B564D00 + r.randrange(8), 0x11, 0x12)
                )
                msr = r.choice((msr, msr, 0x800 + r.randrange(64), r.getrandbits(32)))
                out += _load(r, bits, 1, msr) + _load(r, bits, 0, value) + _load(r, bits, 2, value >> 32)
                out += r.choice((b"\x0f\x30", b"\x0f\x30", b"\x0f\x32"))
            case 6:
                out += _load(r, bits, 7, pointer()) + r.choice(
                    (
                        b"\x0f\x01\x17",
                        b"\x0f\x01\x1f",
                        b"\x0f\x01\x37",
                        b"\x0f\x00\x17",
                        b"\x0f\x00\x1f",
                        b"\x0f\x01\x3f",
                    )
                )
            case 7:
                out += _load(r, bits, 0, r.getrandbits(16) & r.choice((0x1F, 0xFFFF)))
                out += bytes([0x8E, 0xC0 | r.randrange(6) << 3])
            case 8:
                out += (
                    _load(r, bits, 0, r.choice((7, 0xE7, 3, 1, value)))
                    + _load(r, bits, 2, 0)
                    + _load(r, bits, 1, 0)
                )
                out += b"\x0f\x01\xd1"
            case 9:
                out += r.choice(
                    (b"\x0f\x05", b"\x0f\x07", b"\x48\x0f\x07", b"\x0f\x34", b"\x0f\x35", b"\x0f\x01\xf8")
                )
            case 10 if r.random() < 0.3:
                # XSAVES, XRSTORS, XSAVEC, INVPCID, FXSAVE, a call gate or task by [rdi].
                out += _load(r, bits, 7, pointer() & r.choice((-1, -64))) + r.choice(
                    (
                        b"\x0f\xc7\x2f",
                        b"\x0f\xc7\x1f",
                        b"\x0f\xc7\x27",
                        b"\x66\x0f\x38\x82\x07",
                        b"\x0f\xae\x07",
                        b"\xff\x1f",
                        b"\xff\x2f",
                    )
                )
            case 10:
                out += r.choice(
                    (
                        b"\x9d",
                        b"\x48\xcf",
                        b"\xcf",
                        b"\xcb",
                        b"\x48\xcb",
                        b"\xfb",
                        b"\x0f\x06",
                        b"\x0f\xa2",
                        b"\xf4",
                    )
                )
            case _:
                out += bytes([0xCD, r.getrandbits(8)])
        for _ in range(r.randrange(3)):
            out += instruction(r, bits)
    return _loop(out, bits)


def device_code(r: Random, bits: int, count: int) -> bytes:
    """Return writes to the local APIC, IOAPIC, PIC and PIT, and halts."""
    out = b""
    ports = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x42, 0x43, 0x61, 0xCF8, 0x3F8)
    for _ in range(count):
        match r.randrange(8):
            case 0 | 1 | 2:
                register = r.choice(
                    (0x80, 0xB0, 0xD0, 0xE0, 0xF0, 0x300, 0x310, 0x320, 0x350, 0x360, 0x380, 0x3E0)
                )
                register = r.choice((register, r.randrange(0, 0x1000, 4)))
                out += _load(r, bits, 7, 0xFEE00000 + register) + _load(
                    r, bits, 0, r.choice((r.getrandbits(32), r.getrandbits(8)))
                )
                out += r.choice((b"\x89\x07", b"\x89\x07", b"\x8b\x07", b"\x88\x07"))
            case 3:
                out += _load(r, bits, 7, 0xFEC00000) + _load(r, bits, 0, r.randrange(0x42)) + b"\x89\x07"
                out += (
                    _load(r, bits, 7, 0xFEC00010)
                    + _load(r, bits, 0, r.getrandbits(r.choice((8, 17, 32))))
                    + b"\x89\x07"
                )
            case 4 | 5:
                out += _load(r, bits, 2, r.choice(ports)) + _load(r, bits, 0, r.getrandbits(32))
                out += r.choice((b"\xee", b"\xee", b"\xec", b"\xef", b"\xed", b"\x66\xef"))
            case 6:
                msr = r.choice((0x6E0, 0x1B, 0x80B, 0x838, 0x830, 0x80F))
                out += (
                    _load(r, bits, 1, msr)
                    + _load(r, bits, 0, r.getrandbits(32))
                    + _load(r, bits, 2, r.getrandbits(4))
                )
                out += b"\x0f\x30"
            case _:
                out += r.choice((b"\xfb", b"\xfa", b"\xfb\xf4", b"\xcd\x40", instruction(r, bits)))
    return _loop(out, bits)


def table_code(
    r: Random, bits: int, count: int, table: int, window: int, pointer: Callable[[], int]
) -> bytes:
    """Return code that rewrites entries of the page table at `table` and uses the pages at `window` that they map.

    Some entries are flushed afterwards, in one way or another, and others not.
    """
    out = b""
    for _ in range(count):
        page = r.randrange(16)
        entry = (pointer() & ~0xFFF & (1 << 52) - 1) | r.choice(
            (7, 7, 3, 5, 1, 0, 0x107, 0x67, r.getrandbits(12))
        )
        if bits == 64 and r.random() < 0.1:
            entry |= 1 << 63
        out += _load(r, bits, 7, table + page * (8 if bits == 64 else 4)) + _load(r, bits, 0, entry)
        wide = b"\x48" if bits == 64 else b""
        # A store, XCHG, or a locked flip of P, R/W or U/S.
        out += r.choice(
            (wide + b"\x89\x07", wide + b"\x87\x07", b"\xf0\x0f\xba\x3f" + bytes([r.randrange(3)]))
        )
        out += _load(r, bits, 7, window + page * 4096 + r.choice((0, 8, 0xFF8, 0xFFC, 0xFFF)))
        # INVLPG, a reload of CR3, or nothing.
        out += r.choice((b"\x0f\x01\x3f", b"\x0f\x01\x3f", b"\x0f\x20\xd8\x0f\x22\xd8", b""))
        for _ in range(r.randrange(1, 4)):
            out += r.choice(_ACCESSES)
        if r.random() < 0.2:
            # RET (C3) there, and call it.
            out += b"\xc6\x07\xc3\xff\xd7"
    return _loop(out, bits)


def storm_code(r: Random, bits: int, count: int, pages: Sequence[int]) -> bytes:
    """Return interrupt commands to some or all processors between other code; those started start at one of `pages`."""
    out = b""
    for _ in range(count):
        # Fixed, lowest priority, SMI, NMI, INIT, SIPI; to a processor, itself, all, all others.
        command = r.choice((0x000, 0x100, 0x200, 0x400, 0x400, 0x500, 0x600, 0x600, r.randrange(8) << 8))
        command |= r.choice(pages) >> 12 if command == 0x600 else r.randrange(256)
        command |= (
            r.choice((0, 1, 2, 3, 3)) << 18 | r.choice((0x4000, 0x4000, 0xC000, 0)) | r.choice((0, 0, 0x800))
        )
        target = r.choice((r.randrange(4), 0xFF, r.getrandbits(8)))
        if r.random() < 0.2:  # x2APIC
            out += (
                _load(r, bits, 1, 0x830)
                + _load(r, bits, 0, command)
                + _load(r, bits, 2, target)
                + b"\x0f\x30"
            )
        else:
            out += _load(r, bits, 7, 0xFEE00310) + _load(r, bits, 0, target << 24) + b"\x89\x07"
            out += _load(r, bits, 7, 0xFEE00300) + _load(r, bits, 0, command) + b"\x89\x07"
        match r.randrange(6):
            case 0:  # the timer: its vector and mode, then its count
                lvt = r.randrange(16, 256) | r.choice((0, 1 << 17))
                for register, value in (
                    (0x320, lvt),
                    (0x3E0, 0xB),
                    (0x380, r.getrandbits(r.choice((4, 12, 20)))),
                ):
                    out += _load(r, bits, 7, 0xFEE00000 + register) + _load(r, bits, 0, value) + b"\x89\x07"
            case 1:  # a breakpoint on data or code
                for register, value in (
                    (r.randrange(4), r.choice(pages) + r.randrange(64)),
                    (7, r.getrandbits(32) & ~0x2000),
                ):
                    out += _load(r, bits, 0, value) + bytes([0x0F, 0x23, 0xC0 | register << 3])
            case 2:  # the end of an interrupt
                out += _load(r, bits, 7, 0xFEE000B0) + b"\x89\x07"
            case _:
                out += r.choice((b"\xfb", b"\xfb\xf4", b"\xfa", b"\xf3\x90", instruction(r, bits)))
    return _loop(out, bits)


def patched_code(r: Random, bits: int, address: int) -> bytes:
    """Return code that stores random bytes over itself, then runs what it stored."""
    out = b""
    for _ in range(40):
        target = address + r.randrange(1200)
        out += _load(r, bits, 7, target) + _load(r, bits, 0, r.getrandbits(64))
        out += r.choice((b"\x88\x07", b"\x89\x07", b"\xf0\x01\x07", b"\xaa", b"\xab"))
        for _ in range(r.randrange(4)):
            out += instruction(r, bits)
    return _loop(out, bits)


_VALID_64 = (
    # A sum in a loop; a call; memory by rep; SSE and AVX; x87; atomic add.
    bytes.fromhex("b90a00000031c001c8ffc975fae610"),
    bytes.fromhex("e802000000eb0650b8070000005ac3"),
    bytes.fromhex("bf00600000be00610000b940000000fcf3a4f348ab"),
    bytes.fromhex("0f57c0f30f58c10f2807c5fc5801c5fc1102c5f877"),
    bytes.fromhex("d9e8d9eeded9dbe3dfe0"),
    bytes.fromhex("bf00600000f0480fc107f0480fb117480fbaef05"),
    bytes.fromhex("0fa20f31b9800000c00f3248c1e22009d0"),
    bytes.fromhex("6a00489d9c58fafb0f20c00f22c00f20d80f22d8"),
    bytes.fromhex("ba10000000ecee66edef6a105f488b04254000000048890425006000000f013d00600000"),
)
_VALID_32 = (
    bytes.fromhex("b90a00000031c001c84975fbe610"),
    bytes.fromhex("bf00600000be00610000b940000000fcf3a4f3ab"),
    bytes.fromhex("606a055858610fa20f31c8100000c9"),
    bytes.fromhex("9c58fafb0f20c00f22c00fb2255060000066b81000"),
)
_VALID_16 = (
    bytes.fromhex("b90a0031c001c84975fbe610"),
    bytes.fromhex("bf0060be0061b94000fcf3a4f3ab"),
    bytes.fromhex("b800068ed8a11000a31200cd40"),
    bytes.fromhex("606a0558610fa20f310f20c00f22c0"),
)


def valid_code(r: Random, bits: int) -> bytes:
    """Return a valid little guest that runs for ever."""
    pieces = {64: _VALID_64, 32: _VALID_32, 16: _VALID_16}[bits]
    return _loop(b"".join(r.choices(pieces, k=12)), bits)


def kernel_file(r: Random) -> bytes:
    """Return a little vmlinux or bzImage with a few of its header's fields wrong."""
    code = random_code(r, 64, 2000)
    if r.random() < 0.5:
        ident = b"\x7fELF\2\1\1" + bytes(9)
        header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100000)
        load = struct.pack("<IIQQQQQQ", 1, 7, 0x200, 0, 0x100000, len(code), 0x4000, 4096)
        notes = struct.pack("<IIQQQQQQ", 4, 4, 0x100, 0, 0, len(note), len(note), 4)
        image = bytearray((header + load + notes).ljust(0x100, b"\0") + note.ljust(0x100, b"\0") + code)
        fields = [
            (16, 2),
            (18, 2),
            (24, 8),
            (32, 8),
            (54, 2),
            (56, 2),
            *((0x40 + 56 * i + f, 8) for i in (0, 1) for f in range(0, 56, 8)),
        ]
        fields += [(0x100, 4), (0x104, 4), (0x108, 4), (0x110, 4)]
    else:
        image = bytearray(1024) + bytes(0x200) + code
        image += bytes(-len(image) % 16)
        image[0x1F1] = 1
        struct.pack_into("<I", image, 0x1F4, (len(image) - 1024) // 16)
        struct.pack_into("<HH4sH", image, 0x1FE, 0xAA55, 0x66EB, b"HdrS", 0x20F)
        image[0x211] = 1
        struct.pack_into("<IIBBHI", image, 0x22C, 0x7FFFFFFF, 4096, 1, 12, 1, 255)
        struct.pack_into("<II", image, 0x248, 0, 16)
        struct.pack_into("<QI", image, 0x258, 0x100000, 0x10000)
        fields = [
            (0x1F1, 1),
            (0x1F4, 4),
            (0x201, 1),
            (0x206, 2),
            (0x211, 1),
            (0x22C, 4),
            (0x230, 4),
            (0x234, 1),
            (0x236, 2),
        ]
        fields += [(0x238, 4), (0x258, 8), (0x260, 4)]
    for _ in range(r.choice((0, 1, 1, 2, 3))):
        at, size = r.choice(fields)
        old = int.from_bytes(image[at : at + size], "little")
        new = r.choice(
            (
                0,
                1,
                1 << 8 * size - 1,
                (1 << 8 * size) - 1,
                old + 1,
                old ^ 1 << r.randrange(8 * size),
                r.getrandbits(8 * size),
            )
        )
        image[at : at + size] = (new & (1 << 8 * size) - 1).to_bytes(size, "little")
    if r.random() < 0.1:
        del image[r.randrange(len(image)) :]
    return bytes(image)
