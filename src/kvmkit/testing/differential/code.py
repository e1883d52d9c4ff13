"""Random instructions as source text, integer and system, for every mode of the processor.

An `Item` is one instruction, or a few that make sense only together (a far call with the pointer that it needs). Flags that the
manual leaves undefined are cleared by code right behind, so that no later difference comes from them (Intel SDM vol. 2, "Flags
Affected" of each instruction).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvmkit.testing.assembler import assemble

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
ARITHMETIC = CF | PF | AF | ZF | SF | OF

CODE, HANDLERS, IDT, GDT, LDT, TSS = 0x1000, 0x3000, 0x4000, 0x5000, 0x5800, 0x5C00
DATA, DATA_PAGES = 0x6000, 4
USER_STACK, KERNEL_STACK, IST_STACK, LANDING = 0xA000, 0xB000, 0xC000, 0xD000
TABLES, MEMORY_BYTES = 0x10000, 0x20000
STUB, STUB_STACK = MEMORY_BYTES, MEMORY_BYTES + 0x800
"""A page behind the memory for what a reference needs to enter a case; page tables have it."""

MSRS = {
    "SYSENTER_CS": 0x174,
    "SYSENTER_ESP": 0x175,
    "SYSENTER_EIP": 0x176,
    "EFER": 0xC0000080,
    "STAR": 0xC0000081,
    "LSTAR": 0xC0000082,
    "CSTAR": 0xC0000083,
    "FMASK": 0xC0000084,
    "FS_BASE": 0xC0000100,
    "GS_BASE": 0xC0000101,
    "KERNEL_GS_BASE": 0xC0000102,
}
"""What code reads and writes, and what is compared afterwards."""


@dataclass(frozen=True)
class Item:
    """Some source, and what it is: the name of the rule that made it."""

    source: str
    kind: str
    code: bytes = b""


class Writer:
    """Writes items for code of `bits`, of which `long` says whether the processor is in long mode."""

    def __init__(self, r: Random, bits: int, long: bool, real: bool) -> None:
        self.r, self.bits, self.long, self.real = r, bits, long, real
        self.sizes = [8, 16, 32, 64] if bits == 64 else [8, 16, 32]

    # Operands.

    def pick(self, choices: str) -> str:
        """One of some words."""
        return self.r.choice(choices.split())

    def reg(self, size: int, anything: bool = False) -> str:
        """A register, seldom one that holds an address."""
        names = ["a", "c", "d"]
        if anything or self.r.random() < 0.06:
            names += ["b", "bp", "si", "di"]
        if self.bits == 64 and self.r.random() < 0.5:
            return f"r{self.r.randrange(8, 16)}" + {8: "b", 16: "w", 32: "d", 64: ""}[size]
        name = self.r.choice(names)
        if size == 8:
            high = "l h" if self.bits != 64 else "l"  # with a REX prefix there is no AH
            return name + self.pick(high) if len(name) == 1 else "cl"
        full = name + "x" if len(name) == 1 else name
        return {16: "", 32: "e", 64: "r"}[size] + full

    def mem(self, size: int, offset: int | None = None) -> str:
        """A memory operand near a pointer."""
        kind = {8: "byte", 16: "word", 32: "dword", 64: "qword", 48: "fword", 80: "tbyte", 0: ""}[size]
        at = self.r.randrange(-24, 24) if offset is None else offset
        if self.bits == 16 and self.r.random() < 0.9:
            base = self.pick("bx bx si di bp")
        else:
            base = ("r" if self.bits == 64 else "e") + self.pick("bx bx si di bp")
            if offset is None and self.r.random() < 0.15:
                base += (
                    " + "
                    + ("r" if self.bits == 64 else "e")
                    + self.pick("ax cx")
                    + " * "
                    + self.pick("1 2 4 8")
                )
        segment = self.pick("fs: gs: ss: es: cs:") if offset is None and self.r.random() < 0.08 else ""
        return f"{kind + ' ptr ' if kind else ''}{segment}[{base} + {at}]"

    def rm(self, size: int) -> str:
        """Register or memory."""
        return self.reg(size) if self.r.random() < 0.5 else self.mem(size)

    def imm(self, size: int) -> int:
        """An immediate, edges more often than not; sign-extended from 32 bits for 64."""
        size = min(size, 32)
        value = self.r.choice(
            (0, 1, 2, 0x7F, 0x80, 0xFF, 1 << size - 1, (1 << size - 1) - 1, self.r.getrandbits(size))
        )
        value &= (1 << size) - 1
        return value - (1 << size) if value >> size - 1 else value

    def size(self, *sizes: int) -> int:
        """One of some operand sizes that there are here."""
        return self.r.choice([s for s in sizes or self.sizes if s in self.sizes])

    @property
    def word(self) -> str:
        """The accumulator in the natural size."""
        return {16: "ax", 32: "eax", 64: "rax"}[self.bits]

    def cleared(self, source: str, undefined: int) -> str:
        """The source, and behind it code that clears these flags."""
        keep = ~undefined & 0xFFFF
        if not undefined:
            return source
        if self.bits == 16:
            return f"{source}; pushf; push bp; mov bp, sp; and word ptr [bp + 2], {keep}; pop bp; popf"
        suffix, sp = ("q", "rsp") if self.bits == 64 else ("d", "esp")
        return f"{source}; pushf{suffix}; and word ptr [{sp}], {keep}; popf{suffix}"

    # Instructions of user programs.

    def _binary(self) -> str:
        op, s = self.pick("add adc sub sbb cmp and or xor test mov"), self.size()
        first, second = self.rm(s), self.reg(s)
        if op != "test" and self.r.random() < 0.3:
            first, second = self.reg(s), self.mem(s)
        elif self.r.random() < 0.3:
            second = str(self.imm(s))
        if op in ("and", "or", "xor", "test"):
            return self.cleared(f"{op} {first}, {second}", AF)
        lock = (
            "lock " if op in ("add", "adc", "sub", "sbb") and "[" in first and self.r.random() < 0.1 else ""
        )
        return f"{lock}{op} {first}, {second}"

    def _unary(self) -> str:
        return f"{self.pick('inc dec neg not')} {self.rm(self.size())}"

    def _shift(self) -> str:
        op, s = self.pick("shl shr sar rol ror rcl rcr"), self.size()
        if self.r.random() < 0.3:
            undefined = OF | AF if op[0] == "s" else OF
            if op in ("shl", "shr") and s < 32:
                undefined |= CF
            return self.cleared(f"{op} {self.rm(s)}, cl", undefined)
        count = self.r.choice((1, 1, self.r.randrange(2, s)))
        undefined = (OF if count > 1 else 0) | (AF if op[0] == "s" else 0)
        return self.cleared(f"{op} {self.rm(s)}, {count}", undefined)

    def _double_shift(self) -> str:
        s = self.size(16, 32, 64)
        count = str(self.r.randrange(1, 16)) if s == 16 or self.r.random() < 0.5 else "cl"
        return self.cleared(f"{self.pick('shld shrd')} {self.rm(s)}, {self.reg(s)}, {count}", OF | AF)

    def _multiply(self) -> str:
        s = self.size(16, 32, 64)
        form = self.r.randrange(3)
        if form == 0:
            source = f"{self.pick('mul imul')} {self.rm(self.size())}"
        elif form == 1:
            source = f"imul {self.reg(s)}, {self.rm(s)}"
        else:
            source = f"imul {self.reg(s)}, {self.rm(s)}, {self.imm(s)}"
        return self.cleared(source, SF | ZF | AF | PF)

    def _divide(self) -> str:
        s = self.size()
        prepare = ""
        if self.r.random() < 0.7:
            prepare = {8: "mov ah, 0; ", 16: "mov dx, 0; ", 32: "mov edx, 0; ", 64: "mov edx, 0; "}[s]
        return self.cleared(f"{prepare}{self.pick('div idiv')} {self.rm(s)}", ARITHMETIC)

    def _bits(self) -> str:
        s, op = self.size(16, 32, 64), self.pick("bt bts btr btc bsf bsr")
        if op in ("bsf", "bsr"):
            register = self.reg(s)
            return self.cleared(
                f"or {register}, 8; add dx, 0; {op} {self.reg(s)}, {register}", CF | OF | SF | AF | PF
            )
        second = str(self.r.randrange(s)) if self.r.random() < 0.6 else self.reg(s)
        return self.cleared(f"{op} {self.rm(s)}, {second}", OF | SF | AF | PF)

    def _exchange(self) -> str:
        s = self.size()
        op = self.pick("xchg xadd cmpxchg")
        first = self.rm(s)
        lock = "lock " if "[" in first and self.r.random() < 0.3 else ""
        if self.r.random() < 0.15:
            return f"{lock}cmpxchg8b {self.mem(64)}"
        if op == "xchg" and self.r.random() < 0.5:
            return f"xchg {self.reg(s)}, {self.mem(s)}"
        return f"{lock}{op} {first}, {self.reg(s)}"

    def _extend(self) -> str:
        s = self.size(16, 32, 64)
        if s == 64 and self.r.random() < 0.4:
            return f"movsxd {self.reg(64)}, {self.rm(32)}"
        if self.r.random() < 0.3:
            return self.pick("cbw cwde cwd cdq" + (" cdqe cqo" if self.bits == 64 else ""))
        narrow = 8 if s == 16 else self.r.choice((8, 16))
        register = self.reg(s)
        return f"{self.pick('movzx movsx')} {register}, {self.mem(narrow)}"

    def _condition(self) -> str:
        cc = self.pick("o no b ae e ne be a s ns p np l ge le g")
        form = self.r.randrange(3)
        if form == 0:
            return f"set{cc} {self.rm(8)}"
        if form == 1:
            s = self.size(16, 32, 64)
            return f"cmov{cc} {self.reg(s)}, {self.rm(s)}"
        return f"j{cc} 1f; inc {self.reg(self.size(16, 32))}; 1:"

    def _flags(self) -> str:
        return self.pick("clc stc cmc cld std lahf sahf")

    def _stack(self) -> str:
        wide = self.bits if self.bits == 64 else self.size(16, 32)
        form = self.r.randrange(9)
        if form == 0:
            return f"push {self.reg(wide, True)}"
        if form == 1:
            return f"pop {self.reg(wide)}"
        if form == 2:
            return f"push {self.mem(wide)}"
        if form == 3:
            return f"pop {self.mem(wide)}"
        if form == 4:
            return f"push {self.r.choice((self.imm(8), self.imm(16)))}"
        if form == 5:
            return f"enter {self.r.choice((0, 8, 0x20, 0x1000))}, {self.r.choice((0, 0, 1, 2, 3))}"
        if form == 6:
            return "leave"
        if form == 7 and self.bits != 64:
            return self.pick("pusha popa pushad popad")
        return f"push {self.word}; pop {self.word}"

    def _string(self) -> str:
        count = "ecx" if self.bits != 16 else "cx"
        letter = self.pick("b w d" + (" q" if self.bits == 64 else ""))
        op = self.pick("movs cmps stos lods scas")
        rep = self.pick("rep rep") if op in ("movs", "stos", "lods") else self.pick("repe repne")
        if self.r.random() < 0.3:
            return f"{op}{letter}"
        return f"mov {count}, {self.r.randrange(0, 20)}; {rep} {op}{letter}"

    def _decimal(self) -> str:
        op, undefined = self.r.choice(
            (
                ("daa", OF),
                ("das", OF),
                ("aaa", OF | SF | ZF | PF),
                ("aas", OF | SF | ZF | PF),
                ("aam 10", OF | AF | CF),
                ("aad 10", OF | AF | CF),
            )
        )
        if self.r.random() < 0.1:
            return "aam 0"
        return self.cleared(op, undefined)

    def _call(self) -> str:
        form = self.r.randrange(4)
        if form == 0:
            return "call 1f; jmp 2f; 1: ret; 2:"
        if form == 1:
            return f"mov {self.word}, {LANDING}; {self.pick('jmp call')} {self.word}"
        if form == 2:
            return f"{self.pick('jmp call')} {self.mem(self.bits)}"
        return self.pick("loop loope loopne") + " 1f; nop; 1:"

    def _other(self) -> str:
        if self.bits != 64 and self.r.random() < 0.5:
            s = self.size(16, 32)
            return self.r.choice((f"bound {self.reg(s)}, {self.mem(0)}", "into", "xlatb"))
        s = self.size(16, 32, 64)
        return self.r.choice(
            (
                f"lea {self.reg(s)}, {self.mem(0)}",
                "xlatb",
                "nop",
                "ud2",
                f"bswap {self.reg(self.size(32, 64))}",
            )
        )

    # System instructions.

    def selector(self) -> int:
        """A selector: of the fixed segments, of the random ones, of the LDT, of nothing."""
        if self.real:
            return self.r.choice((0, 0x600, 0x5FF, 0x601))
        kind = self.r.random()
        if kind < 0.2:
            return self.r.choice((0x08, 0x10, 0x1B, 0x23, 0x28, 0x38, 0, 3))
        if kind < 0.8:
            return 0x48 + 8 * self.r.randrange(20) | self.r.choice((0, 0, 3, 3, 1))
        return self.r.choice(
            (4 | 8 * self.r.randrange(8) | 3, 4 | 8 * self.r.randrange(8), self.r.randrange(0x10000))
        )

    def _load_segment(self) -> str:
        segment = self.pick("ds es fs gs ss")
        form = self.r.randrange(5)
        pops = "fs gs" if self.bits == 64 else "ds es fs gs ss"
        if form == 0:
            return f"mov {self.reg(16)}, {segment}"
        if form == 1:
            return f"push {self.pick(pops)}; pop {self.pick(pops)}"
        if form == 2:
            return f"push {self.selector()}; pop {self.pick(pops)}"
        if form == 3:
            name = self.pick("les lds lss lfs lgs") if self.bits != 64 else self.pick("lss lfs lgs")
            s = self.size(16, 32)
            return f"mov word ptr {self.mem(0, s // 8)}, {self.selector()}; {name} {self.reg(s)}, {self.mem(0, 0)}".replace(
                "ptr word ptr", "ptr"
            )
        return f"mov ax, {self.selector()}; mov {segment}, ax"

    def _examine(self) -> str:
        s = self.size(16, 32)
        op = self.pick("lar lsl verr verw arpl sldt str smsw")
        if op == "lar" and s == 32:  # bits 16 to 19 are undefined
            return f"mov cx, {self.selector()}; lar edx, cx; setz al; and edx, 0xf0ff00; add al, 0"
        if op in ("lar", "lsl"):
            return f"mov cx, {self.selector()}; {op} {self.reg(s)}, cx"
        if op in ("verr", "verw"):
            return f"mov ax, {self.selector()}; {op} ax"
        if op == "arpl":
            return f"arpl {self.rm(16)}, {self.reg(16)}" if self.bits != 64 else "nop"
        return f"{op} {self.reg(16)}" if self.r.random() < 0.5 else f"{op} {self.mem(16)}"

    def _tables(self) -> str:
        op = self.pick("sgdt sidt lgdt lidt lldt ltr")
        if op in ("lldt", "ltr"):
            return f"mov ax, {self.r.choice((self.selector(), 0x38, 0x28, 0))}; {op} ax"
        if op in ("lgdt", "lidt") and self.r.random() < 0.8:
            store = op.replace("l", "s", 1)
            return f"{store} {self.mem(0, 0)}; {op} {self.mem(0, 0)}"
        return f"{op} {self.mem(0)}"

    def _control(self) -> str:
        a = "rax" if self.bits == 64 else "eax"
        form = self.r.randrange(9)
        if form <= 2:
            register = self.r.choice((0, 0, 4, 4))
            bit = (
                self.r.choice((0, 1, 2, 3, 5, 16, 18, 29, 30, 31, 6))
                if register == 0
                else self.r.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 20, 21, 31))
            )
            return f"mov {a}, cr{register}; btc {a}, {bit}; add dx, 0; mov cr{register}, {a}"
        if form == 3:
            return f"mov {a}, cr3; mov cr3, {a}"
        if form == 4:
            return f"mov cr2, {a}; mov {a}, cr2"
        if form == 5:
            return f"mov {a}, cr{self.r.choice((0, 2, 3, 4))}"
        if form == 6:
            return self.r.choice(
                (
                    f"smsw ax; xor ax, {1 << self.r.randrange(1, 4)}; add dx, 0; lmsw ax",
                    "clts",
                    "lmsw word ptr " + self.mem(0),
                )
            )
        if form == 7:
            n = self.r.randrange(8)
            value = self.r.choice((0, 0x400, 0x1, 0x155, 0xFFFF0FF0, 0x6000))
            return f"mov eax, {value}; mov dr{n}, {a}; mov {a}, dr{n}"
        return f"mov {a}, cr{self.r.choice((1, 5, 8, 7))}"

    def _far(self) -> str:
        selector, form = self.r.choice((self.selector(), 0x08, 0x1B)), self.r.randrange(4)
        if self.real:
            selector = self.r.choice((0, LANDING >> 4 & 0xF000, 0x0D00))
            offset = LANDING - 16 * selector if selector == 0x0D00 or selector == 0 else LANDING
            if not 0 <= offset < 0x10000:
                selector, offset = 0, LANDING
        else:
            offset = LANDING
        suffix = {16: "w", 32: "d", 64: "q"}[self.bits]
        if form == 0 and self.bits != 64:
            width = ".word" if self.bits == 16 else ".long"
            return f".byte {self.pick('0xea 0x9a')}; {width} {offset}; .word {selector}"
        if form == 1:
            modrm = {16: ("0x2f", "0x1f")}.get(self.bits, ("0x2b", "0x1b"))
            rex = ".byte 0x48; " if self.bits == 64 else ""
            ptr = {16: "bx", 32: "ebx", 64: "rbx"}[self.bits]
            store = f"mov {suffix_ptr(self.bits)} [{ptr}], {offset}; mov word ptr [{ptr} + {self.bits // 8}], {selector}"
            return f"{store}; {rex}.byte 0xff, {self.r.choice(modrm)}"
        if form == 2:
            rex = ".byte 0x48; " if self.bits == 64 else ""
            return f"push {selector}; push {offset}; {rex}{self.r.choice(('.byte 0xcb', '.byte 0xca, 8, 0'))}"
        flags = self.r.choice((2, 0x202, 0x3202, 0x40CD7, 0x4002, 0x10002, 0x203002, self.r.getrandbits(16)))
        flags &= ~0x100  # single stepping has cases of its own
        if self.bits == 16:
            flags &= 0xFFFF
        stack = ""
        if self.bits == 64 or (selector & 3) == 3:
            ss = self.r.choice((0x23, 0x10, self.selector()))
            stack = f"push {ss}; push {USER_STACK + 0x800}; "
        return f"{stack}push {flags}; push {selector}; push {offset}; iret{suffix if self.bits != 16 else ''}"

    def _interrupt(self) -> str:
        # Vectors that have error codes are left out: whose frame it is must be clear from the vector.
        vector = self.r.choice(
            (0, 1, 3, 4, 5, 9, 15, 16, self.r.randrange(18, 256), self.r.randrange(0x60, 256))
        )
        return self.r.choice(("int3", f"int {vector}", f"int {vector}", ".byte 0xf1"))

    def _flags_image(self) -> str:
        flags = self.r.choice((2, 0x202, 0x3202, 0x240CD7, 0x4002, 0x10002, 0x1A3002)) & ~0x100
        if self.bits == 16:
            return f"push {flags & 0xFFFF}; popf; pushf"
        s = "q" if self.bits == 64 else "d"
        return f"push {flags}; popf{s}; pushf{s}"

    def _msr(self) -> str:
        index = self.r.choice([*MSRS.values(), 0x10, 0x12345678])
        if index in (0x10, 0x12345678):
            return f"mov ecx, {index}; rdmsr; mov eax, 0; mov edx, 0"
        if self.r.random() < 0.5:
            return f"mov ecx, {index}; rdmsr"
        if index == 0xC0000080:
            bit = self.r.choice((0, 8, 11, 1, 10, 13, 31))
            return f"mov ecx, {index}; rdmsr; btc eax, {bit}; add cx, 0; wrmsr"
        low = self.r.choice((LANDING, self.r.getrandbits(32), 8))
        return f"mov ecx, {index}; mov eax, {low}; mov edx, {self.r.choice((0, 0, 0x0010_0008, 0xFFFFFFFF, 0x8000) if index != MSRS['FMASK'] else (0,))}; wrmsr"

    def _syscall(self) -> str:
        star = f"mov ecx, 0xc0000082; mov eax, {LANDING}; mov edx, 0; wrmsr; mov ecx, 0xc0000081; mov edx, 0x00100008; wrmsr; "
        star += "mov ecx, 0xc0000080; rdmsr; bts eax, 0; add cx, 0; wrmsr; "
        if self.r.random() < 0.4:
            return self.r.choice(("syscall", ".byte 0x0f, 0x07"))
        if self.r.random() < 0.5:
            return f"{star}mov ecx, {LANDING}; {'.byte 0x48; ' if self.bits == 64 and self.r.random() < 0.7 else ''}.byte 0x0f, 0x07"
        return f"{star}syscall"

    def _sysenter(self) -> str:
        code = self.r.choice((8, 0, 3))
        setup = f"mov edx, 0; mov ecx, 0x174; mov eax, {code}; wrmsr; mov ecx, 0x175; mov eax, {KERNEL_STACK + 0x800}; wrmsr; "
        setup += f"mov ecx, 0x176; mov eax, {LANDING}; wrmsr; "
        if self.r.random() < 0.3:
            return self.r.choice(("sysenter", ".byte 0x0f, 0x35"))
        if self.r.random() < 0.5:
            setup += f"mov ecx, {USER_STACK + 0x800}; mov edx, {LANDING}; "
            return f"{setup}{'.byte 0x48; ' if self.bits == 64 and self.r.random() < 0.5 else ''}.byte 0x0f, 0x35"
        return f"{setup}sysenter"

    def _privileged(self) -> str:
        choices = [
            "cli",
            "sti",
            "hlt",
            "invd",
            "wbinvd",
            f"invlpg {self.mem(0)}",
            "fnop",
            "rdtsc; mov eax, 0; mov edx, 0",
        ]
        if self.bits == 64:
            choices += ["swapgs", "swapgs"]
        return self.r.choice(choices)

    def _port(self) -> str:
        return self.r.choice(
            (
                "in al, dx",
                "out dx, al",
                "in ax, 0x40",
                "out 0x42, eax",
                "in eax, dx",
                "mov dx, 0x7f; in al, dx",
            )
        )

    def item(self) -> Item:
        """One item."""
        user: list[Callable[[], str]] = [
            self._binary, self._binary, self._unary, self._shift, self._double_shift, self._multiply, self._divide, self._bits,
            self._exchange, self._extend, self._condition, self._flags, self._stack, self._stack, self._string, self._call, self._other,
        ]  # fmt: skip
        if self.bits != 64:
            user.append(self._decimal)
        system: list[Callable[[], str]] = [
            self._load_segment, self._load_segment, self._examine, self._tables, self._control, self._control, self._far, self._far,
            self._interrupt, self._flags_image, self._msr, self._syscall, self._sysenter, self._privileged, self._port,
        ]  # fmt: skip
        make = self.r.choice(user if self.r.random() < 0.5 else system)
        return Item(make(), make.__name__.strip("_"))


def suffix_ptr(bits: int) -> str:
    """What Intel syntax calls an operand of a code segment's size."""
    return {16: "word ptr", 32: "dword ptr", 64: "qword ptr"}[bits]


def pool(seed: int, bits: int, long: bool, real: bool, size: int) -> list[Item]:
    """Return `size` items, assembled in one go. Code is position-independent."""
    writer = Writer(Random(f"{seed} {bits} {long} {real}"), bits, long, real)
    items = [writer.item() for _ in range(size)]
    text = "".join(
        f"{900000 + 2 * n}: {item.source}\n{900001 + 2 * n}:\n".replace(";", "\n")
        for n, item in enumerate(items)
    )
    lengths = "".join(f".word {900001 + 2 * n}b - {900000 + 2 * n}b\n" for n in range(size))
    binary = assemble(text + lengths, bits)
    table = binary[len(binary) - 2 * size :]
    found, at = [], 0
    for n, item in enumerate(items):
        length = int.from_bytes(table[2 * n : 2 * n + 2], "little")
        found.append(Item(item.source, item.kind, binary[at : at + length]))
        at += length
    return found
