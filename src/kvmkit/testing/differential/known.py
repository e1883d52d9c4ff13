"""Differences from a reference that are the reference's: each a rule with its reason, as narrow as it can be.

The references are QEMU's TCG in two ages: Unicorn 2 is made of QEMU 5, and the processor under kvm-amd in the test bed is that of
QEMU 7. "SDM" is Intel's Software Developer's Manual, Volume 2 under the instruction's name unless said otherwise.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import FLAT_BYTES, MODES, Case
from kvmkit.testing.differential.run import Outcome

Differences = dict[str, tuple[int, int]]
Test = Callable[[Case, Outcome, Outcome, Differences], bool]

RF, ZF, OF = 1 << 16, 1 << 6, 1 << 11
PORTS = b"\xe4\xe5\xe6\xe7\xec\xed\xee\xef\x6c\x6d\x6e\x6f"


@dataclass(frozen=True)
class Rule:
    """One kind of difference: its name, why it is the reference that is wrong, and whether a difference is of this kind."""

    name: str
    reason: str
    applies: Test
    part: str = ".*"
    """Names of the differences that it explains, and that `applies` sees: a regular expression. Others may stand beside them."""

    def explains(self, case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> Differences:
        """The differences of this kind."""
        part = {name: values for name, values in found.items() if re.fullmatch(self.part, name)}
        return part if part and self.applies(case, ours, theirs, part) else {}


def opcode(outcome: Outcome, case: Case) -> bytes:
    """Three bytes of the instruction at RIP, without its prefixes."""
    at = outcome.values.get("rip", 0)
    code = case.image()[at : at + 12]
    prefixes = b"\x66\x67\x2e\x36\x3e\x26\x64\x65\xf0\xf2\xf3" + (
        bytes(range(0x40, 0x50)) if case.mode.bits == 64 else b""
    )
    return code.lstrip(prefixes)[:3]


def refused(*opcodes: str, vector: int = 13) -> Test:
    """Whether we fault at one of these instructions, and the reference goes on, or faults otherwise."""
    starts = tuple(bytes.fromhex(text) for text in opcodes)

    def applies(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
        differs = theirs.end != ours.end or "rip" in found
        return ours.vector == vector and differs and opcode(ours, case).startswith(starts)

    return applies


SYSTEM = (
    # What faults for other reasons
    *(
        bytes.fromhex(code)
        for code in ("0f20", "0f21", "0f22", "0f23", "0f30", "0f32", "f4", "fa", "fb", "8e")
    ),
)


def contains(*codes: str) -> Test:
    """Whether one of these byte sequences is in the case."""
    wanted = [bytes.fromhex(text) for text in codes]
    return lambda case, ours, theirs, found: any(code in item.code for item in case.items for code in wanted)


def _undelivered(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    if (
        ours.end == "shutdown"
        or ours.vector == 8
        or (ours.vector != theirs.vector and opcode(theirs, case)[:1] in (b"\xcd", b"\xcc"))
    ):
        return True
    v, before = ours.values, case.control
    if not case.mode.protected and ours.memory[:0x400] != case.memory[:0x400]:
        return theirs.vector is not None or ours.end != theirs.end
    changed = any(v[name] != before[name] for name in ("gdt", "idt")) or any(
        v[f"{name}.limit"] != before[f"{name}_limit"] for name in ("gdt", "idt")
    )
    if (v["cr0"] ^ before["cr0"]) & 0x80000001 and theirs.vector is not None:
        return True  # by the tables of another mode
    return (
        theirs.vector is not None
        and ours.end != theirs.end
        and (changed or opcode(ours, case)[:1] in (b"\xcd", b"\xcc", b"\xf1", b"\xce"))
    )


def _stepping_over_hlt(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return ours.vector == 1 and theirs.end == "halt" and case.image()[ours.values["rip"] - 1] == 0xF4


def _port(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return ours.vector == 13 and case.user and opcode(ours, case)[:1] in [bytes([b]) for b in PORTS]


OVERRIDES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
STRINGS = frozenset(range(0xA4, 0xA8)) | frozenset(range(0xAA, 0xB0)) | {0x6C, 0x6D}


def _limited(case: Case, ours: Outcome, name: str) -> bool:
    """Whether an access by this segment register can fault: it is null, of a kind that forbids something, or its limit is low."""
    selector = ours.values[name]
    if case.mode.real:
        return True
    if selector == case.segments[name].selector and ours.values["gdt"] == case.control["gdt"]:
        return case.segments[name].limit == 0  # the flat ones are all memory
    if selector & 0xFFFC == 0:
        return True
    entry = int.from_bytes(
        case.memory[(c.LDT if selector & 4 else c.GDT) + (selector & 0xFFF8) :][:8], "little"
    )
    limit = (entry & 0xFFFF) | (entry >> 32 & 0xF0000)
    if entry >> 55 & 1:
        limit = limit << 12 | 0xFFF
    wrong_kind = name != "cs" and entry >> 40 & 0xE != 2  # no data that is writable and grows upwards
    return wrong_kind or limit != (0xFFFFFFFF if case.mode.paging else FLAT_BYTES)


def _segments(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    if (
        ours.vector not in (12, 13)
        or ours.values["error code"]
        or not (ours.end != theirs.end or {"rip", "error code"} & set(found))
    ):
        return False
    if case.mode.bits == 64 and ours.values["cs"] == case.segments["cs"].selector:
        return False
    at = opcode(ours, case)
    prefixes = case.image()[ours.values["rip"] :][:12].partition(at)[0]
    override = next((OVERRIDES[byte] for byte in prefixes if byte in OVERRIDES), "ds")
    used = {"ss", "cs", override} | ({"es"} if at[0] in STRINGS else set())
    # A write by CS is one to code.
    limited = override == "cs" or any(_limited(case, ours, name) for name in used)
    return limited and not at.startswith(SYSTEM)


def _pushed_rf(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return all(a ^ b == 1 for a, b in found.values())


def _second_page(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    size = 4 if case.mode.paging == "32" else 8
    at, length = ours.frame
    pushed = {at >> 12, at + length - 1 >> 12}
    for name, (a, b) in found.items():
        if int(name.split()[1], 16) < c.TABLES or (a ^ b) & ~0x60:
            return False
        if ours.vector != 14 and (int(name.split()[1], 16) & 0xFFF) // size not in pushed:
            return False
    return ours.vector is not None


def _two_pages(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("cr2", (0, 0))
    return ours.vector == theirs.vector == 14 and set(found) == {"cr2"} and b & 0xFFF == 0 and b - 8 < a < b


def _table_base(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return case.mode.bits == 64 and refused("0f01")(case, ours, theirs, found)


def _target(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = theirs.values.get("rip", 0)
    return (
        ours.vector == 13
        and theirs.vector in (13, 1)  # with TF behind the jump
        and (
            not -(1 << 47) <= at - (at >> 63 << 64) < 1 << 47
            if case.mode.bits == 64
            else at != ours.values["rip"] and at >= case.segments["cs"].limit
        )
    )


def _returned_beyond_the_limit(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    returns = (
        ours.vector == 13
        and ours.values["error code"] == 0
        and opcode(ours, case)[:1] in (b"\xcf", b"\xca", b"\xcb")
    )
    return (
        returns
        and ours.values["cs"] != theirs.values["cs"]
        and c.LANDING <= theirs.values["rip"] <= c.LANDING + 1
    )


def _jump_to_a_handler(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = theirs.values.get("rip", 0) - 1
    return theirs.end == "halt" and ours.vector is not None and c.HANDLERS <= at < c.HANDLERS + 512


def _null_sysenter(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    undelivered = ours.end == "shutdown" and b"\x0f\x34" in case.code
    return undelivered or refused("0f34", "0f35")(case, ours, theirs, found)


def _sysret_flags(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found["rflags"]
    return (a ^ b) & ~(RF | 0x1A0000) == 0 and contains("0f07")(case, ours, theirs, found)


def _ignored_bits(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    stored = contains("0f22")(case, ours, theirs, found)
    multiplies = any(item.kind == "multiply" for item in case.items)  # what was read of CR0
    return stored and all(
        (multiplies and name != "cr0") or (a ^ b) & ~0x1FFAFFC0 == 0 for name, (a, b) in found.items()
    )


def _stack_address(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return case.mode.bits == 64 and (ours.vector, theirs.vector) == (12, 13)


def _tss_in_ldt(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return (ours.vector, theirs.vector) == (13, 10) and bool(ours.values["error code"] & 4)


def _time(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return set(found) <= {"rax", "rdx"} and contains("0f31")(case, ours, theirs, found)


def _small_system_segments(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    for item in case.items:
        match = re.match(r"mov cx, (\d+); (lar|lsl) ", item.source)
        if match and case.mode.long:
            selector = int(match[1])
            at = (c.LDT if selector & 4 else c.GDT) + (selector & 0xFFF8)
            if at < c.MEMORY_BYTES - 8 and case.memory[at + 5] & 0x1F in (1, 3, 4, 5, 6, 7):
                return True
    return False


def _stack_fault(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return ours.stack_fault


def _reserved_form(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = opcode(ours, case)
    if ours.vector != 6 or not (theirs.end != ours.end or "rip" in found):
        return False
    if b"\xf0" in case.image()[ours.values["rip"] :][:12].partition(at)[0]:
        return True
    return (at[:1] in (b"\x8f", b"\xc6", b"\xc7") and at[1] & 0x38 != 0) or (
        at[:2] in (b"\x0f\x71", b"\x0f\x72", b"\x0f\x73") and at[2] < 0xC0
    )


def _flags_of_cmpxchg8b(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("rflags", (0, 0))
    garbage = b & ~0x3F7FD7 != 0 or (a ^ b) & ~(c.ARITHMETIC & ~ZF) == 0
    pushed = all(
        (a ^ b) & ~(c.ARITHMETIC & ~ZF) in (0, OF >> 8) for name, (a, b) in found.items() if name != "rflags"
    )
    return garbage and pushed and contains("0fc7")(case, ours, theirs, found)


def _rotates_itself(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    rotates = any(item.source.startswith(("rcl ", "rcr ")) for item in case.items)
    return rotates and case.code != ours.memory[case.rip : case.rip + len(case.code)]


def _undefined_flags(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = ours.values["rip"] - case.rip
    masks = (c.ARITHMETIC,), (c.ARITHMETIC & 0xFF, OF >> 8)  # the register; either byte where it was pushed
    flags = all(
        any((a ^ b) & ~mask == 0 for mask in masks[name != "rflags"]) for name, (a, b) in found.items()
    )
    return flags and not 0 <= at <= len(case.code)


def _whole_register(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return contains("0fb1")(case, ours, theirs, found) and all(b == a & 0xFFFFFFFF for a, b in found.values())


def _absent_stack(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    returns = opcode(ours, case)[:1] in (b"\xcf", b"\xca", b"\xcb")
    return returns and (ours.vector, theirs.vector) == (12, 11)


def _sign_of_ret(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("rsp", (0, 0))
    jumps = any(re.match("(jmp|call) .*ptr", item.source) for item in case.items)
    return case.mode.bits != 64 and (a - b) & 0xFFFFFFFF == 0x10000 and jumps


def _null_stack(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    ss = theirs.values.get("ss", 0)
    returns = ours.vector == 13 and opcode(ours, case)[:1] in (b"\xcf", b"\xca", b"\xcb")
    return case.mode.bits == 64 and returns and 0 < ss < 4 and ss != theirs.values["cs"] & 3


def _four_gigabytes(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    over = 0xFFFFFFF0 <= theirs.values.get("cr2", 0) <= 0xFFFFFFFF
    return case.mode.bits == 32 and ours.vector in (12, 13) and theirs.vector == 14 and over


def _test_by_f6_1(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = opcode(theirs, case)
    return theirs.vector == 6 and at[:1] in (b"\xf6", b"\xf7") and at[1] & 0x38 == 8


def _base_of_64_bit_code(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    selector = theirs.values["cs"]
    at = (c.LDT if selector & 4 else c.GDT) + (selector & 0xFFF8)
    if not case.mode.long or theirs.end == ours.end or at > c.MEMORY_BYTES - 8:
        return False
    entry = case.memory[at : at + 8]
    base = int.from_bytes(entry[2:5], "little") | entry[7] << 24
    return entry[6] & 0x20 != 0 and base != 0 and theirs.vector == 14


def _pushed_before_the_limit(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at, sp = opcode(ours, case), ours.values["rsp"]
    far = at[:1] == b"\x9a" or (at[:1] == b"\xff" and at[1] >> 3 & 7 == 3)
    return (
        far
        and ours.vector == theirs.vector == 13
        and all(sp - 16 <= int(name.split()[1], 16) < sp for name in found if name != "error code")
    )


def _upper_half(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return all(b == a & 0xFFFF for a, b in found.values())


def _half_a_table_register(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    at = opcode(ours, case)
    stores = at[:2] == b"\x0f\x01" and at[2] >> 3 & 7 < 2
    return (
        ours.vector == theirs.vector == 14
        and stores
        and len(found) <= 2
        and all(name.startswith("memory") for name in found)
    )


def _broken_absent_gate(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    selector = ours.values.get("error code", 0)
    at = (c.LDT if selector & 4 else c.GDT) + (selector & 0xFFF8)
    if not case.mode.long or (ours.vector, theirs.vector) != (13, 11) or at > c.MEMORY_BYTES - 16:
        return False
    return case.memory[at + 5] & 0x9F == 0x0C and case.memory[at + 13] & 0x1F != 0


def _code_both_ways(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    selector = ours.values.get("error code", 0) & 0xFFFC
    table = c.LDT if selector & 4 else c.GDT
    flags = case.memory[table + (selector & 0xFFF8) + 6] if selector < 0x800 else 0
    return case.mode.long and ours.vector == 13 and flags & 0x60 == 0x60


UNICORN = (
    Rule("delivery", "Unicorn delivers nothing: what comes of a gate or of a table that was changed is not seen", _undelivered),
    Rule("HLT and TF", "Unicorn stops at HLT; the trap comes behind it (SDM 3, 17.3.1.4)", _stepping_over_hlt),
    Rule("unknown MSRs", "Unicorn reads unknown MSRs as 0 instead of #GP", refused("0f32")),
    Rule("WRMSR's checks", "Unicorn stores any value; addresses must be canonical, reserved bits of EFER clear", refused("0f30")),
    Rule("ICEBP", "Unicorn takes 0xf1 for invalid; it is #DB (INT1)", lambda case, ours, theirs, found: ours.vector == 1 and theirs.vector == 6),
    Rule("I/O in user mode", "Unicorn has executed IN or OUT when the permission bitmap's #GP comes, if it comes", _port),
    Rule("reserved bits of CR0 and CR4", "Unicorn stores any value (SDM 3, 2.5)", refused("0f22")),
    Rule("ignored bits of CR0", "what is reserved below bit 32 reads as 0; Unicorn stores it (SDM 3, 2.5)", _ignored_bits, "cr0|rax|rdx"),
    Rule("absent control registers", "#UD whoever asks, as a processor shows in user mode; Unicorn looks at CPL first", refused("0f20", "0f22", vector=6)),
    Rule("DR7.GD", "Unicorn has no general detect (SDM 3, 17.2.4)", refused("0f21", "0f23", vector=1)),
    Rule("SYSRET", "#UD outside 64-bit mode; Unicorn does as AMD's processors", refused("0f07", vector=6)),
    Rule("flags of SYSRET", "R11 & 3C7FD7 (SYSRET); Unicorn loads VM and leaves VIF and VIP", _sysret_flags, "rflags"),
    Rule("a null SYSENTER_CS", "only bits 2 to 15 count: 1 to 3 are null, too (SYSENTER, SYSEXIT)", _null_sysenter),
    Rule("a null TR", "LTR of a null selector is #GP(0)", refused("0f00")),
    Rule("bases of LGDT and LIDT", "they must be canonical in 64-bit mode", _table_base),
    Rule("L and D", "code that is both 64-bit and 32-bit is #GP in IA-32e mode (SDM 3, 5.2.1); Unicorn runs it", _code_both_ways),
    Rule("segments", "Unicorn checks neither limits nor kinds of segments at an access (SDM 3, 5.3 to 5.5)", _segments),
    Rule("#AC", "Unicorn checks no alignment (SDM 3, 6.15)", lambda case, ours, theirs, found: ours.vector == 17),
    Rule("PUSHF and RF", "RF is clear in what PUSHF stores; Unicorn stores it", _pushed_rf, "memory .*"),
    Rule("writes over two pages", "what is read and written faults first where its first byte lies, as processors show; Unicorn reads first", _two_pages),
    Rule("targets", "a jump to what isn't canonical or beyond the limit faults at the jump (JMP, CALL, RET); Unicorn's behind it", _target),
    Rule("stack addresses", "those that aren't canonical are #SS (SDM 3, 6.15); #GP in Unicorn", _stack_address),
    Rule("flags of the second page", "where an operand's first page faults (docs/engine.md); those of the page a frame goes to", _second_page, "memory .*"),
    Rule("SGDT over two pages", "the limit is stored when the base faults; no manual says which, and we store nothing", _half_a_table_register),
    Rule("absent call gates", "whose upper half has a type, too: #GP or #NP, no manual says which is first", _broken_absent_gate),
    Rule("the time", "RDTSC reads another time", _time),
    Rule("LAR of 16-bit system segments", "there are none in IA-32e mode (LAR, LSL: table of types)", _small_system_segments),
    Rule("x87 stack faults", "QEMU has none, as processors do (SDM 1, 8.5.1.1)", _stack_fault),
    Rule("reserved forms", "#UD, processors show: LOCK of what has none, POP and MOV by 8F, C6, C7 /1 to /7, shifts by 0F 71 to 73 of memory", _reserved_form),
    Rule("flags of CMPXCHG8B", "all but ZF are garbage in Unicorn", _flags_of_cmpxchg8b, "rflags|memory .*"),
    Rule("RCL and RCR of code", "Unicorn begins an instruction anew that writes to its own page, with the CF that it left", _rotates_itself),
    Rule("CMPXCHG of 32 bits", "a destination that isn't equal keeps its upper half, as processors show; Unicorn clears it", _whole_register, "r.*"),
    Rule("SS that isn't present", "is #SS to a return (IRET, RET); Unicorn raises #NP", _absent_stack),
    Rule("a null SS", "may be returned to in 64-bit mode with the RPL of the code (MOV, IRET), else it is #GP; Unicorn takes it", _null_stack),
    Rule("accesses over 4 GB", "of a segment of 4 GB fault by its limit or don't (SDM 3, 5.3); ours do, Unicorn's don't", _four_gigabytes),
    Rule("sign of RET's operand", "it has none (RET); Unicorn extends it to a stack pointer of 32 bits", _sign_of_ret),
    Rule("TEST by F6 /1", "is TEST to processors, and invalid to Unicorn", _test_by_f6_1),
    Rule("targets of returns", "IRET and RET look whether they are beyond the limit (IRET, RET); Unicorn doesn't", _returned_beyond_the_limit),
    Rule("a jump to a handler", "is none to Unicorn, and looks like an exception where it was delivered", _jump_to_a_handler),
    Rule("undefined flags", "of random code that the case came to (a jump through memory), where nothing clears them", _undefined_flags, "rflags|memory .*"),
    Rule("base of 64-bit code", "is not used (SDM 3, 5.2.1); Unicorn uses it", _base_of_64_bit_code),
    Rule("CALL's checks", "all come before it pushes (CALL); Unicorn pushes before it looks at the limit", _pushed_before_the_limit, "error code|memory .*"),
    Rule("upper half of SYSENTER_CS", "is stored (a register of 32 bits in VMX, too); lost in Unicorn", _upper_half, "SYSENTER_CS"),
    Rule("a TSS in the LDT", "JMP and CALL are #GP there, only IRET is #TS (SDM 3, 7.2.2); #TS in Unicorn", _tss_in_ldt),
)  # fmt: skip


def _supervisor(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return not case.user


USER_KINDS = frozenset(
    [
        "binary",
        "unary",
        "shift",
        "double_shift",
        "multiply",
        "divide",
        "bits",
        "exchange",
        "extend",
        "condition",
        "flags",
        "stack",
        "string",
        "call",
        "other",
    ]
)


def _system_code(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return any(item.kind not in USER_KINDS for item in case.items)


def _flags_of_pvm(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    for name, (a, b) in found.items():
        if name.startswith("memory"):
            if (a ^ b) & ~0x72:
                return False
        elif name != "rflags" or (a ^ b) & ~0x17200:
            return False
    return True


def _read_first(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("error code", (2, 0))
    x, y = found.get("cr2", (0, 0))
    return (
        ours.vector == theirs.vector == 14
        and a & 2 > b & 2
        and (x == y or (y & 0xFFF == 0 and y - 8 < x < y))
    )


def _accessed_pdpte(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return case.mode.paging == "pae" and set(found.values()) == {(1, 0x21)}


def _trap_of_sti(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return ours.vector == 1 and case.image()[ours.values["rip"] - 1] == 0xFB


def _gate_error_code(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("error code", (0, 0))
    return case.mode.long and set(found) == {"error code"} and a & 7 == 2 and b == (a >> 3) * 16 + 2


def _breakpoints_of_ip(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return (
        case.mode.bits == 16
        and ours.vector == theirs.vector == 1
        and all((a ^ b) & ~15 == 0 for a, b in found.values())
    )


def _sysenter_code(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return (
        case.mode.long
        and set(found.values()) == {(0xA09B, 0xE09B)}
        and contains("0f34")(case, ours, theirs, found)
    )


ADDRESSES = {
    c.MSRS[name]
    for name in ("SYSENTER_ESP", "SYSENTER_EIP", "LSTAR", "CSTAR", "FS_BASE", "GS_BASE", "KERNEL_GS_BASE")
}


def _unchecked_address(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    v = ours.values
    high = v.get("rdx", 0) >> 15 & 0x1FFFF
    wrmsr = ours.vector == 13 and opcode(ours, case)[:2] == b"\x0f\x30"
    return wrmsr and v["rcx"] & 0xFFFFFFFF in ADDRESSES and high not in (0, 0x1FFFF)


def _reserved_bit_of_a_page(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found.get("error code", (0, 0))
    return (
        ours.vector == theirs.vector == 14
        and a & 9 == 9
        and a ^ b in (1, 3)
        and b & 1 == 0
        and a & 2 >= b & 2
    )


def _beyond_memory(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return (
        case.mode.protected
        and not case.mode.paging
        and ours.vector in (12, 13)
        and ours.values["error code"] == 0
        and not opcode(ours, case).startswith(SYSTEM)
    )


def _in_a_new_task(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return ours.end == "shutdown" and theirs.vector == 10 and any(item.kind == "far" for item in case.items)


def _fast_outside_64_bits(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return (
        case.mode.bits != 64
        and ours.vector in (6, 8, 14)  # #UD, or what came of its delivery
        and opcode(ours, case)[:2] in (b"\x0f\x05", b"\x0f\x07")
    )


def _port_refused(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return case.user and theirs.vector == 13 and opcode(theirs, case)[:1] in [bytes([b]) for b in PORTS]


def _lmsle(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    v = ours.values
    return (
        ours.vector == 13
        and opcode(ours, case)[:2] == b"\x0f\x30"
        and v["rcx"] & 0xFFFFFFFF == c.MSRS["EFER"]
        and v["rax"] & 1 << 13 != 0
    )


def _segments_of_handlers(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    changed = theirs.memory[c.HANDLERS : c.GDT] != case.memory[c.HANDLERS : c.GDT]
    loaded = any("lidt" in item.source for item in case.items)
    return ours.end == "shutdown" and case.mode.protected and case.mode.bits != 64 and (changed or loaded)


def _supervisor_pushes(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found["error code"]
    return case.mode.name == "vm86" and a ^ b == 4 and opcode(ours, case)[:1] in (b"\x9a", b"\xff")


def _virtual_8086_extensions(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    wanted = ours.values["rax"] & 0xFFFFFFFF
    return (
        ours.vector == 13 and opcode(ours, case)[:2] == b"\x0f\x22" and wanted ^ case.control["cr4"] in (1, 2)
    )


def _direction_of_syscall(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    a, b = found["rflags"]
    return a == b | 0x400 and b"\x0f\x05" in case.code


def _reserved_bit_of_a_pdpte(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    loads = theirs.vector == 13 and opcode(theirs, case)[:2] == b"\x0f\x22"
    return (
        loads and case.mode.paging == "pae" and len(theirs.memory) > 0 and theirs.memory[c.TABLES] & 0x20 != 0
    )


def _attributes(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    return all(name.endswith(".flags") and (a ^ b) & ~0x8001 == 0 for name, (a, b) in found.items())


def _debug_registers(case: Case, ours: Outcome, theirs: Outcome, found: Differences) -> bool:
    reserved = {"dr6": 0xFFFF1FF0, "dr7": 0xFFFFDC00, "rax": 0xFFFFFFF0}
    stores = contains("0f23")(case, ours, theirs, found)
    return (
        stores
        and {"dr6", "dr7"} & set(found) != set()
        and all(name in reserved and (a ^ b) & ~reserved[name] == 0 for name, (a, b) in found.items())
    )


COMMON = tuple(
    rule for rule in UNICORN if rule.name in ("HLT and TF", "flags of the second page", "the time")
)
TCG = (
    Rule("A of PDPTEs", "there is none (SDM 3, 4.4.1); QEMU sets it", _accessed_pdpte, f"memory {c.TABLES:#x}"),
    *(rule for rule in UNICORN if rule.name in (
        "HLT and TF", "ICEBP", "absent control registers", "DR7.GD", "flags of SYSRET", "a null SYSENTER_CS", "a null TR",
        "bases of LGDT and LIDT", "L and D", "segments", "#AC", "PUSHF and RF", "targets", "stack addresses",
        "flags of the second page", "SGDT over two pages", "absent call gates", "the time", "LAR of 16-bit system segments",
        "a TSS in the LDT", "x87 stack faults", "reserved forms", "upper half of SYSENTER_CS", "CALL's checks",
        "targets of returns", "SS that isn't present",
    )),
    Rule("reads first", "what is read and written is a write to the processor, whose page fault says so; QEMU reads first", _read_first, "error code|cr2"),
    Rule("a page's reserved bits", "P of the error code is 1 with RSVD (SDM 3, 4.7); 0 in QEMU, as is W where it reads", _reserved_bit_of_a_page, "error code"),
    Rule("limits without paging", "the case's flat segments end with its memory, QEMU's memory goes on", _beyond_memory),
    Rule("#TS of a new task", "is pushed to a stack whose segment isn't loaded yet, which faults again; QEMU pushes it", _in_a_new_task),
    Rule("segments of handlers", "a null or limited segment faults again and again where the handlers are gone; QEMU checks neither", _segments_of_handlers),
    Rule("DF of SYSCALL", "stays where FMASK has it 0; QEMU clears it", _direction_of_syscall, "rflags"),
    Rule("far calls of vm86", "push with the user's rights; with the supervisor's in QEMU, as the error code says", _supervisor_pushes, "error code"),
    Rule("STI and TF", "STI holds back interrupts, not traps (SDM 3, 6.8.3); in QEMU traps, too", _trap_of_sti),
    Rule("error codes of IDT gates", "they hold 8 times the vector (SDM 3, 6.13), which QEMU has times 16 in long mode", _gate_error_code),
    Rule("D of SYSENTER's CS", "0 in IA-32e mode (SDM 2, SYSENTER); QEMU sets L and D", _sysenter_code, "cs.flags"),
    Rule("B0 to B3 of DR6", "a trap of TF compares IP, without CS, with DR0 to DR3 in QEMU, in whatever mode", _breakpoints_of_ip, "dr6"),
    Rule("addresses in MSRs", "WRMSR checks that they are canonical; QEMU doesn't", _unchecked_address),
    Rule("SYSCALL and SYSRET", "#UD outside 64-bit mode; QEMU does as AMD's processors", _fast_outside_64_bits),
    Rule("I/O in user mode", "QEMU takes a busy TSS for none, and so has no permission bitmap under SVM", _port_refused),
    Rule("reserved bits of DR6 and DR7", "they are fixed (SDM 3, 17.2); QEMU stores some", _debug_registers),
)  # fmt: skip
"""What QEMU's TCG, which is the processor under kvm-amd in the test bed, still has of Unicorn's, and what it has of its own."""
QEMU = (
    Rule(
        "ports",
        "there are none in QEMU's machine, or some that read as other than ours",
        lambda case, ours, theirs, found: ours.ports,
    ),
    *TCG,
    *(rule for rule in UNICORN if rule.name in ("ignored bits of CR0", "WRMSR's checks", "unknown MSRs")),
    Rule(
        "checks of CR0 and CR4", "MOV to CR0 and CR4 checks them (SDM 2); QEMU hardly does", refused("0f22")
    ),
)
AMD = (
    *TCG,
    Rule("EFER.LMSLE", "kvm-amd with nested virtualization lets the guest set it, whatever its CPUID", _lmsle),
    Rule("CR4.VME and PVI", "KVM lets the guest set them, whatever its CPUID", _virtual_8086_extensions),
    Rule("reserved bits of PDPTEs", "QEMU sets A in them, which is reserved and which KVM refuses as it loads them", _reserved_bit_of_a_pdpte),
    Rule("segment attributes", "kvm-amd makes up G of the limit and sets A (svm_get_segment)", _attributes),
)  # fmt: skip
PVM = (
    *COMMON,
    Rule("supervisor code", "is run by KVM's instruction emulator, which is no processor", _supervisor),
    Rule("system instructions", "in user mode meet the host's descriptor tables, I/O rights and control registers", _system_code),
    Rule("flags of user mode", "run with IOPL 0, IF set and NT clear, whatever the guest's flags are", _flags_of_pvm),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What one of the kernel's KVMs is good for as a reference."""

    rules: tuple[Rule, ...]
    modes: tuple[str, ...] = tuple(MODES)
    fresh: bool = False
    """Whether each case needs a new VM: shadowed page tables don't see what the host writes, nested paging does."""


KVM = {
    "kvm_amd": Kernel(AMD),
    "kvm_intel": Kernel(COMMON),
    "kvm_pvm": Kernel(PVM, ("long",), fresh=True),
}
"""By the kernel's module."""


def kernel_kvm() -> str:
    """Which of the kernel's KVMs /dev/kvm is: the name of its module. `LookupError` if none that is known."""
    for name in KVM:
        if Path("/sys/module", name).is_dir():
            return name
    raise LookupError(f"/dev/kvm is none of {', '.join(KVM)}")
