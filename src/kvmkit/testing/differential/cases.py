"""A case: one machine state with some code, made from a seed; the same for every engine and reference."""

import functools
import struct
from dataclasses import dataclass, replace
from random import Random

from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.code import Item

CR0_PE, CR0_ET, CR0_NE, CR0_WP, CR0_AM, CR0_PG = 1, 0x10, 0x20, 1 << 16, 1 << 18, 1 << 31
CR4_PAE, CR4_OSFXSR = 1 << 5, 1 << 9
VM = 1 << 17
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
GPRS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))

POOL_ITEMS = 1500
POOL_CASES = 500
"""So many cases in a row share a pool of items: assembling is what costs."""


@dataclass(frozen=True)
class Mode:
    """A mode of the processor, as code meets it."""

    name: str
    bits: int
    """Default operand and address size."""
    paging: str
    """"", "32", "pae" or "long"."""
    protected: bool = True
    vm86: bool = False

    @property
    def real(self) -> bool:
        """Whether segments are what real mode makes of selectors."""
        return self.vm86 or not self.protected

    @property
    def long(self) -> bool:
        """Whether EFER.LMA is set."""
        return self.paging == "long"


MODES = {
    mode.name: mode
    for mode in (
        Mode("real", 16, "", protected=False),
        Mode("protected16", 16, ""),
        Mode("protected32", 32, ""),
        Mode("paged32", 32, "32"),
        Mode("pae32", 32, "pae"),
        Mode("vm86", 16, "32", vm86=True),
        Mode("long", 64, "long"),
        Mode("compatibility32", 32, "long"),
        Mode("compatibility16", 16, "long"),
    )
}


@dataclass(frozen=True)
class Segment:
    """A segment register, whole. `flags` is bits 40 to 55 of the descriptor without the limit's."""

    selector: int
    base: int = 0
    limit: int = 0
    flags: int = 0


@dataclass(frozen=True)
class Case:
    """What a processor starts with. Memory is at guest physical 0; linear addresses are physical ones, but for absent pages."""

    seed: int
    mode: Mode
    user: bool
    items: tuple[Item, ...]
    memory: bytes
    """Without the code, which lies at `rip`."""
    registers: dict[str, int]
    segments: dict[str, Segment]
    control: dict[str, int]

    @property
    def rip(self) -> int:
        """Where the code starts; a multiple of nothing, so that it may cross into the next page."""
        return self.registers["rip"]

    @property
    def code(self) -> bytes:
        """The items, and HLT, which is #GP to user code: both end the case."""
        return b"".join(item.code for item in self.items) + b"\xf4"

    def image(self) -> bytes:
        """The whole memory."""
        rip = self.rip
        return self.memory[:rip] + self.code + self.memory[rip + len(self.code) :]

    def only(self, items: tuple[Item, ...]) -> "Case":
        """The same with fewer items."""
        return replace(self, items=items)

    def listing(self) -> str:
        """What it is, for people."""
        lines = [f"seed {self.seed}: {self.mode.name}, {'user' if self.user else 'supervisor'}"]
        at = self.rip
        for item in self.items:
            lines.append(f"  {at:#x} {item.code.hex():24} {item.source}")
            at += len(item.code)
        lines.append("  " + " ".join(f"{name}={value:#x}" for name, value in self.registers.items()))
        lines.append("  " + " ".join(f"{name}={value:#x}" for name, value in self.control.items()))
        return "\n".join(lines)


@functools.lru_cache(maxsize=16)
def _pool(number: int, bits: int, long: bool, real: bool) -> list[Item]:
    return c.pool(number, bits, long, real, POOL_ITEMS)


def make(seed: int, modes: tuple[str, ...] = tuple(MODES)) -> Case:
    """Return case `seed` of the given modes."""
    r = Random(f"case {seed}")
    mode = MODES[r.choice(modes)]
    user = mode.vm86 or (mode.protected and r.random() < 0.4)
    items = _pool(seed // POOL_CASES, mode.bits, mode.long, mode.real)
    chosen = tuple(r.choice(items) for _ in range(r.choice((1, 2, 2, 3, 4, 6, 8))))
    memory = bytearray(r.randbytes(256) * (c.MEMORY_BYTES // 256))
    _put(memory, c.DATA, r.randbytes(4096) * c.DATA_PAGES)
    memory[c.CODE : c.HANDLERS] = bytes([0xF4]) * (c.HANDLERS - c.CODE)
    memory[c.HANDLERS : c.IDT] = bytes([0xF4]) * (c.IDT - c.HANDLERS)
    memory[c.LANDING : c.LANDING + 0x2000] = bytes([0xF4]) * 0x2000
    segments = _segments(r, mode, user)
    _descriptors(r, mode, segments, memory)
    _put(memory, c.IDT if mode.protected else 0, _idt(mode))
    _tss(r, mode, memory)
    if mode.paging:
        _tables(r, mode, memory)
    control = {
        "cr0": CR0_ET
        | CR0_NE
        | (CR0_PE if mode.protected else 0)
        | (CR0_PG | r.choice((0, CR0_WP)) if mode.paging else 0),
        "cr2": 0,
        "cr3": c.TABLES if mode.paging else 0,
        "cr4": CR4_OSFXSR | (CR4_PAE if mode.paging in ("pae", "long") else 0),
        "efer": (EFER_LME | EFER_LMA if mode.long else 0)
        | (EFER_NXE if mode.paging in ("pae", "long") else 0),
        "gdt": c.GDT,
        "gdt_limit": 0x7FF,
        "idt": c.IDT if mode.protected else 0,
        "idt_limit": 0xFFF if mode.protected else 0x3FF,
    }
    if user and r.random() < 0.1:
        control["cr0"] |= CR0_AM
    registers = _registers(r, mode, user, control)
    if not mode.long and not user:
        # An IRET that doesn't switch stacks leaves this behind: a reference may have been entered by one.
        frame = (registers["rip"], segments["cs"].selector, registers["rflags"])
        _put(memory, registers["rsp"] - 12, struct.pack("<III", *frame))
    return Case(seed, mode, user, chosen, bytes(memory), registers, segments, control)


def _put(memory: bytearray, at: int, data: bytes) -> None:
    memory[at : at + len(data)] = data


def _registers(r: Random, mode: Mode, user: bool, control: dict[str, int]) -> dict[str, int]:
    bits = 64 if mode.bits == 64 else 32
    found = {}
    for name in GPRS:
        value = r.choice(
            (
                r.getrandbits(8),
                r.getrandbits(bits),
                r.getrandbits(32),
                (1 << bits) - r.getrandbits(4) - 1,
                1 << bits - 1,
            )
        )
        found[name] = value if mode.bits == 64 or name not in GPRS[8:] else 0
    base = 0x6000 if mode.real else 0  # of DS and ES in real mode
    for name in ("rbx", "rsi", "rdi", "rbp"):
        page = (
            c.DATA + 0x1000 * r.randrange(1, c.DATA_PAGES)
            if r.random() < 0.7
            else c.DATA + r.randrange(0x100, 0x3F00)
        )
        found[name] = page + r.randrange(-16, 16) - (base if name != "rbp" else 0)
    found["rsp"] = (
        (c.USER_STACK if user else c.KERNEL_STACK) + 0x800 - (r.randrange(8) if r.random() < 0.3 else 0)
    )
    found["rip"] = r.choice((c.CODE + r.randrange(0x100), c.CODE + 0x1000 - r.randrange(1, 12)))
    arithmetic = r.getrandbits(12) & c.ARITHMETIC
    iopl = r.choice((0, 0, 0x3000)) if mode.protected else 0
    extra = r.choice((0,) * 12 + (0x400, 0x100, 0x4000, 0x40000 if control["cr0"] & CR0_AM else 0, 0x10000))
    found["rflags"] = (
        (VM if mode.vm86 else 0) | 2 | arithmetic | iopl | extra | (0x200 if r.random() < 0.3 else 0)
    )
    return found


USER = 0x60
FLAT_BYTES = c.MEMORY_BYTES - 1


def _segments(r: Random, mode: Mode, user: bool) -> dict[str, Segment]:
    system = {"tr": Segment(0x28, c.TSS, 0xFF, 0x8B), "ldt": Segment(0x38, c.LDT, 0x7F, 0x82)}
    if mode.real:
        flags = 0xF3 if mode.vm86 else 0x93
        data = Segment(0x600, 0x6000, 0xFFFF, flags)
        zero = Segment(0, 0, 0xFFFF, flags)
        if not mode.vm86:
            system = {"tr": Segment(0, 0, 0xFFFF, 0x8B), "ldt": Segment(0, 0, 0xFFFF, 0x82)}
        cs = zero if mode.vm86 else replace(zero, flags=0x9B)
        return {"cs": cs, "ds": data, "es": data, "fs": data, "gs": zero, "ss": zero, **system}
    flat = 0xFFFFFFFF if mode.paging else FLAT_BYTES
    granular = 0x8000 if mode.paging else 0
    code = {64: 0x209B, 32: 0x409B, 16: 0x009B}[mode.bits] | granular
    dpl, rpl = (USER, 3) if user else (0, 0)
    cs = Segment(0x1B if user else 0x08, 0, flat, code | dpl)
    data = Segment(0x20 | rpl if user else 0x10, 0, flat, 0x4093 | granular | dpl)
    null = Segment(0, 0, 0, 0)
    extra = null if r.random() < 0.2 else data
    return {"cs": cs, "ds": data, "es": data, "fs": extra, "gs": extra, "ss": data, **system}


def descriptor(segment: Segment) -> bytes:
    """The eight bytes of a descriptor; of the first eight for a system segment in long mode."""
    limit = segment.limit >> 12 if segment.flags & 0x8000 else segment.limit
    base, flags = segment.base, segment.flags
    value = (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | (flags & 0xFF) << 40
        | (limit >> 16 & 15) << 48
        | (flags >> 12 & 15) << 52
    )
    return (value | (base >> 24 & 0xFF) << 56).to_bytes(8, "little")


def _descriptors(r: Random, mode: Mode, segments: dict[str, Segment], memory: bytearray) -> None:
    flat = 0xFFFFFFFF if mode.paging else FLAT_BYTES
    granular = 0x8000 if mode.paging else 0
    code = {64: 0x209B, 32: 0x409B, 16: 0x009B}[mode.bits] | granular
    if mode.vm86:
        code = 0x409B | granular
    handler = code if not mode.long else 0x209B | granular  # interrupts lead to 64-bit code in long mode
    kernel = handler if mode.vm86 or segments["cs"].selector != 0x08 else segments["cs"].flags
    table = bytearray(c.TSS - c.GDT)
    for selector, flags in (
        (0x08, kernel),
        (0x10, 0x4093 | granular),
        (0x18, code | USER),
        (0x20, 0x4093 | granular | USER),
        (0xE8, handler),
    ):
        table[selector : selector + 8] = descriptor(Segment(selector, 0, flat, flags))
    for at, name in ((0x28, "tr"), (0x38, "ldt")):
        table[at : at + 8] = descriptor(segments[name]) if mode.protected else bytes(8)
    for at in range(0x48, 0xE8, 8):
        table[at : at + 8] = _random_descriptor(r, mode, flat, granular)
    for at in range(0x800, 0x880, 8):
        table[at : at + 8] = _random_descriptor(r, mode, flat, granular)
    _put(memory, c.GDT, bytes(table))


def _random_descriptor(r: Random, mode: Mode, flat: int, granular: int) -> bytes:
    if r.random() < 0.05:
        return r.randbytes(8)
    if r.random() < 0.1:  # a call gate, of either size
        kind = r.choice((0x8C, 0xEC, 0xEC, 0x84, 0x6C))
        selector = r.choice((0x08, 0x08, 0xE8, 0x1B, 0x10, 0x48))
        return struct.pack("<HHBBH", c.LANDING, selector, r.choice((0, 0, 1, 3)), kind, 0)
    access = r.choice((0x9B, 0x93, 0x91, 0x9F, 0x99, 0x97, 0x9A, 0x92, 0x90, 0x82, 0x89, 0x8B, 0x81))
    if r.random() < 0.6:
        access |= r.choice((0x60, 0x60, 0x20))
    if r.random() < 0.08:
        access &= 0x7F
    size = (
        r.choice((0x4000, 0x4000, 0x2000, 0x0000, 0x6000))
        if access & 8 and access & 0x10
        else r.choice((0x4000, 0))
    )
    limit = flat if r.random() < 0.7 else r.choice((0xFFFF, 0xFFF, 0x6FFF, 0))
    return descriptor(
        Segment(
            0,
            0 if r.random() < 0.8 else r.choice((0x100, 0x1000)),
            limit,
            access | size | (granular if limit == flat else 0),
        )
    )


@functools.cache
def _idt(mode: Mode) -> bytes:
    """The whole table; in real mode that of vectors."""
    if not mode.protected:
        return b"".join(struct.pack("<HH", c.HANDLERS + 2 * vector, 0) for vector in range(256))
    table = b""
    for vector in range(256):
        dpl = 0x60 if vector in (3, 4) or vector >= 0x60 else 0
        kind = (0x8F if vector % 8 == 7 else 0x8E) | dpl
        at = c.HANDLERS + 2 * vector
        gate = struct.pack("<HHBBH", at, 0xE8, 0, kind, 0)
        if mode.long:
            ist = 1 if vector in (8, 18) else 0
            gate = struct.pack("<HHBBHQ", at, 0xE8, ist, kind, 0, 0)
        table += gate
    return table


def _tss(r: Random, mode: Mode, memory: bytearray) -> None:
    tss = bytearray(0x100)
    if mode.long:
        struct.pack_into("<Q", tss, 4, c.KERNEL_STACK + 0xF00)
        struct.pack_into("<Q", tss, 0x24, c.IST_STACK + 0xF00)
    else:
        struct.pack_into("<II", tss, 4, c.KERNEL_STACK + 0xF00, 0x10)
    struct.pack_into("<H", tss, 0x66, 0x68)
    tss[0x68:0x70] = r.randbytes(8)
    tss[0x70:] = bytes([0xFF]) * (len(tss) - 0x70)
    _put(memory, c.TSS, bytes(tss))


def _tables(r: Random, mode: Mode, memory: bytearray) -> None:
    wide = mode.paging != "32"
    size = 8 if wide else 4
    levels = {"32": 2, "pae": 3, "long": 4}[mode.paging]
    memory[c.TABLES : c.TABLES + 0x1000 * levels] = bytes(0x1000 * levels)
    for level in range(levels - 1):
        at = c.TABLES + 0x1000 * level
        flags = 1 if mode.paging == "pae" and level == 0 else 0x27
        _put(memory, at, ((at + 0x1000) | flags).to_bytes(size, "little"))
    pages = c.TABLES + 0x1000 * (levels - 1)
    for page in range((c.STUB >> 12) + 1):
        entry = page << 12 | 0x67
        if c.DATA >> 12 <= page < (c.DATA >> 12) + c.DATA_PAGES:
            # Present, writable and for users; read-only; absent; for the supervisor; not used yet; with a reserved bit; NX
            entry = page << 12 | r.choice((0x67, 0x67, 0x67, 0x65, 0x66, 0x63, 0x07, 0x61, 0x00))
            if wide:
                entry |= r.choice((0, 0, 0, 0, 0, 1 << 63, 1 << 51 if entry & 1 else 0))
        _put(memory, pages + size * page, entry.to_bytes(size, "little"))
