"""arm64's stage 1 page tables of EL1 and EL0 (Arm ARM DDI 0487, chapter D8, "VMSAv8-64").

4, 16 and 64 KiB granules; output addresses of up to 48 bits, with 64 KiB of up to 52 (FEAT_LPA). What changes the format of
entries or the meaning of their permissions beyond that (FEAT_LPA2, FEAT_D128, FEAT_S1PIE) is noted, not followed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmkit.kvm.walk import ACCESS_KINDS, Access, AccessKind, Fault, Paging, SlotMemory, Step, ones
from kvmkit.uapi.arm64 import ARM64_SYS_REG, REG_PSTATE

if TYPE_CHECKING:
    from kvmkit.kvm.contract import Vcpu

SCTLR_EL1 = ARM64_SYS_REG(3, 0, 1, 0, 0)
TTBR0_EL1 = ARM64_SYS_REG(3, 0, 2, 0, 0)
TTBR1_EL1 = ARM64_SYS_REG(3, 0, 2, 0, 1)
TCR_EL1 = ARM64_SYS_REG(3, 0, 2, 0, 2)
TCR2_EL1 = ARM64_SYS_REG(3, 0, 2, 0, 3)
MAIR_EL1 = ARM64_SYS_REG(3, 0, 10, 2, 0)
ID_AA64MMFR0_EL1 = ARM64_SYS_REG(3, 0, 0, 7, 0)

_SCTLR_M, _SCTLR_WXN = 1 << 0, 1 << 19
_PSTATE_PAN = 1 << 22
_TCR_HA, _TCR_HD, _TCR_DS = 1 << 39, 1 << 40, 1 << 59
_TCR2_PIE, _TCR2_D128 = 1 << 1, 1 << 5

_GRANULES = ({0: 12, 1: 16, 2: 14}, {2: 12, 3: 16, 1: 14})
"""TCR_EL1.TG0 and TG1 → log2 of the granule."""
_PA_BITS = (32, 36, 40, 42, 44, 48, 52)
"""By TCR_EL1.IPS, and by ID_AA64MMFR0_EL1.PARange."""

_VALID, _TABLE = 1 << 0, 1 << 1
_AP_EL0, _AP_RO, _AF, _NG = 1 << 6, 1 << 7, 1 << 10, 1 << 11
_DBM, _CONTIGUOUS, _PXN, _UXN = 1 << 51, 1 << 52, 1 << 53, 1 << 54
_PXN_TABLE, _UXN_TABLE, _AP_NO_EL0_TABLE, _AP_RO_TABLE = 1 << 59, 1 << 60, 1 << 61, 1 << 62


# Fault status codes (DFSC and IFSC of ESR_EL1); the level is added.
_ADDRESS_SIZE, _TRANSLATION, _ACCESS_FLAG, _PERMISSION = 0x00, 0x04, 0x08, 0x0C


@dataclass(frozen=True)
class _Regime:
    """What the registers say of the half of the address space that an address is in."""

    upper: bool
    """The half of TTBR1_EL1."""
    va_bits: int
    granule_bits: int
    pa_bits: int
    has_lpa: bool
    """Physical addresses can have 52 bits, if TCR_EL1.IPS says so."""
    ttbr: int
    tcr: int
    sctlr: int
    mair: int
    pan: bool

    def flag(self, bit_of_lower_half: int) -> bool:
        """A bit of TCR_EL1 that each half has, that of the upper half next to the other."""
        return bool(self.tcr >> bit_of_lower_half + self.upper & 1)

    @property
    def stride(self) -> int:
        """Address bits that a level's index takes."""
        return self.granule_bits - 3

    @property
    def first_level(self) -> int:
        """The level of the first table, 0 to 3."""
        return 4 - -(-(self.va_bits - self.granule_bits) // self.stride)

    def shift(self, level: int) -> int:
        """The address bits below a level's index."""
        return self.granule_bits + self.stride * (3 - level)

    @property
    def root(self) -> int:
        """The first table's address."""
        entries_bits = self.va_bits - self.shift(self.first_level)
        address = self.ttbr & ones(max(entries_bits + 3, 6 if self.pa_bits == 52 else 1), 47)
        return address | (self.ttbr >> 2 & 15) << 48 if self.pa_bits == 52 else address

    def address(self, entry: int) -> int:
        """The address in an entry, of a table or of a page of the granule's size."""
        address = entry & ones(self.granule_bits, 47)
        return address | (entry >> 12 & 15) << 48 if self.pa_bits == 52 else address

    def may_be_block(self, level: int) -> bool:
        """Whether an entry of this level may map a page larger than the granule."""
        if self.granule_bits == 12:
            return level in (1, 2)
        return level == 2 or (level == 1 and self.granule_bits == 16 and self.has_lpa)


@dataclass
class _Progress:
    """What the entries so far come to."""

    steps: list[Step] = field(default_factory=list)
    end: str | None = None
    code: int | None = None
    """The fault status code with which it ends, if that is known."""
    result: int | None = None
    leaf: int = 0
    level: int = 0
    tables: int = 0
    """The permission bits of all tables' entries together."""


def walk_tables(vcpu: "Vcpu", memory: SlotMemory, gva: int) -> Paging | None:
    """Walk from TTBR0_EL1 or TTBR1_EL1; None while the MMU is off."""
    sctlr = vcpu.get_one_reg(SCTLR_EL1)
    if not sctlr & _SCTLR_M:
        return None
    tcr, tcr2 = vcpu.get_one_reg(TCR_EL1), _get_or_0(vcpu, TCR2_EL1)
    upper = bool(gva >> 55 & 1)
    ttbr = vcpu.get_one_reg(TTBR1_EL1 if upper else TTBR0_EL1)
    granule_bits = _GRANULES[upper].get(tcr >> (30 if upper else 14) & 3, 12)
    ips, pa_range = tcr >> 32 & 7, vcpu.get_one_reg(ID_AA64MMFR0_EL1) & 15
    pa_bits = min(_PA_BITS[min(ips, 6)], _PA_BITS[min(pa_range, 6)], 52 if granule_bits == 16 else 48)
    regime = _Regime(
        upper=upper,
        va_bits=64 - (tcr >> (16 if upper else 0) & 63),
        granule_bits=granule_bits,
        pa_bits=pa_bits,
        has_lpa=pa_range >= 6,
        ttbr=ttbr,
        tcr=tcr,
        sctlr=sctlr,
        mair=vcpu.get_one_reg(MAIR_EL1),
        pan=bool(vcpu.get_one_reg(REG_PSTATE) & _PSTATE_PAN),
    )
    progress = _start(regime, gva)
    if progress.end is None:
        _follow(regime, memory, gva, progress)
    controls = {
        "WXN": sctlr & _SCTLR_WXN,
        "PAN": regime.pan,
        "TBI": regime.flag(37),
        "HA": tcr & _TCR_HA,
        "HD": tcr & _TCR_HD,
        "HPD": regime.flag(41),
        "E0PD": regime.flag(55),
    }
    registers = {"sctlr_el1": sctlr, "tcr_el1": tcr, f"ttbr{int(upper)}_el1": ttbr, "mair_el1": regime.mair}
    return Paging(
        source="gva",
        target="gpa",
        address=gva,
        mode=f"VMSAv8-64, {1 << granule_bits - 10}K granule, {regime.va_bits}-bit",
        registers=registers,
        controls=tuple(name for name, value in controls.items() if value),
        steps=tuple(progress.steps),
        end=progress.end,
        result=progress.result,
        page_bytes=progress.steps[-1].page_bytes if progress.result is not None else None,
        accesses=tuple(
            Access(user, kind, _fault(regime, kind, user, progress))
            for user in (False, True)
            for kind in ACCESS_KINDS
        ),
        notes=tuple(_notes(tcr, tcr2)),
    )


def _start(regime: _Regime, gva: int) -> _Progress:
    """Whether there is a table to begin with."""
    progress = _Progress(code=_TRANSLATION)
    name = f"TTBR{int(regime.upper)}_EL1"
    top = 55 if regime.flag(37) else 63
    if not 16 - (regime.granule_bits == 16) * 4 <= 64 - regime.va_bits <= 39:
        progress.end = f"TCR_EL1 gives the addresses of {name} {regime.va_bits} bits, which there can't be"
    elif gva >> regime.va_bits & ones(0, top - regime.va_bits) != (
        ones(0, top - regime.va_bits) if regime.upper else 0
    ):
        progress.end = f"the address is in neither half: bits {regime.va_bits} to {top} aren't all alike"
    elif regime.tcr >> (23 if regime.upper else 7) & 1:
        progress.end = f"TCR_EL1.EPD{int(regime.upper)} is set: there are no tables at {name}"
    elif regime.root >> regime.pa_bits:
        progress.end = f"the address in {name} has more than {regime.pa_bits} bits"
        progress.code = _ADDRESS_SIZE
    return progress


def _follow(regime: _Regime, memory: SlotMemory, gva: int, progress: _Progress) -> None:
    """Go from table to table."""
    table = regime.root
    for level in range(regime.first_level, 4):
        shift = regime.shift(level)
        highest = regime.va_bits - 1 if level == regime.first_level else shift + regime.stride - 1
        index = gva >> shift & ones(0, highest - shift)
        address = table + index * 8
        entry = memory.read(address, 8)
        bits = entry or 0
        valid = bool(bits & _VALID)
        leaf = valid and bool(bits & _TABLE) == (level == 3)
        progress.level = level
        progress.steps.append(
            Step(
                name=f"level {level}",
                level=level,
                table=table,
                index=index,
                address=address,
                size_bytes=8,
                entry=entry,
                flags=_flags(bits, leaf, regime.mair),
                accessed=leaf and bool(bits & _AF),
                dirty=leaf and bits & (_DBM | _AP_RO) == _DBM,
                page_bytes=1 << shift if leaf else None,
            )
        )
        output = regime.address(bits)
        progress.code = _TRANSLATION + level
        if entry is None:
            progress.end, progress.code = f"no memory holds the entry of level {level}", None
        elif not valid:
            progress.end = f"the entry of level {level} is not valid"
        elif level == 3 and not leaf:
            progress.end = "the entry of level 3 is reserved: its bit 1 is clear"
        elif leaf and level < 3 and not regime.may_be_block(level):
            progress.end = f"the entry of level {level} is a block, which this level can't have"
        elif output >> regime.pa_bits:
            progress.end = f"the address in the entry of level {level} has more than {regime.pa_bits} bits"
            progress.code = _ADDRESS_SIZE + level
        if progress.end is not None:
            return
        if leaf:
            offset = ones(0, shift - 1)
            progress.leaf, progress.result = bits, output & ~offset | gva & offset
            return
        if not regime.flag(41):  # HPD
            progress.tables |= bits
        table = output


def _fault(regime: _Regime, kind: AccessKind, user: bool, page: _Progress) -> Fault | None:
    """What an access gets."""
    exception = "instruction abort" if kind == "execute" else "data abort"
    if user and regime.flag(55):
        return Fault(exception, _TRANSLATION, f"user: TCR_EL1.E0PD{int(regime.upper)} is set")
    if page.end is not None:
        return Fault(exception, page.code, page.end)
    if not page.leaf & _AF and not regime.tcr & _TCR_HA:
        return Fault(exception, _ACCESS_FLAG + page.level, "AF is clear")
    denied = _denied(regime, kind, user, page)
    return None if denied is None else Fault(exception, _PERMISSION + page.level, denied)


def _denied(regime: _Regime, kind: AccessKind, user: bool, page: _Progress) -> str | None:
    """Why the permissions of all levels together deny an access (D8.4.1); None if they don't."""
    leaf, tables = page.leaf, page.tables
    for_el0 = bool(leaf & _AP_EL0) and not tables & _AP_NO_EL0_TABLE
    marks_dirty = bool(leaf & _DBM) and bool(regime.tcr & _TCR_HD)
    writable = (not leaf & _AP_RO or marks_dirty) and not tables & _AP_RO_TABLE
    if kind == "execute":
        if user and (leaf & _UXN or tables & _UXN_TABLE):
            return "execute by user code: UXN is set"
        if not user and (leaf & _PXN or tables & _PXN_TABLE):
            return "execute by the supervisor: PXN is set"
        if not user and for_el0 and writable:
            return "execute by the supervisor: EL0 may write the page"
        if regime.sctlr & _SCTLR_WXN and writable and (for_el0 or not user):
            return "execute: the page is writable, and SCTLR_EL1.WXN set"
        return None
    if user and not for_el0:
        return "user: EL0 has no access"
    if kind == "write" and not writable:
        return "write: the page is read-only"
    if not user and for_el0 and regime.pan:
        return f"{kind} by the supervisor: EL0 has access, and PSTATE.PAN is set"
    return None


def _flags(entry: int, leaf: bool, mair: int) -> tuple[str, ...]:
    """What an entry says beside its address."""
    if not entry & _VALID:
        return ()
    if not leaf:
        names = {
            "PXNTable": _PXN_TABLE,
            "UXNTable": _UXN_TABLE,
            "no EL0": _AP_NO_EL0_TABLE,
            "RO": _AP_RO_TABLE,
        }
        return ("valid", *(name for name, bit in names.items() if entry & bit))
    names = {
        "AF": _AF,
        "EL0": _AP_EL0,
        "nG": _NG,
        "DBM": _DBM,
        "contiguous": _CONTIGUOUS,
        "PXN": _PXN,
        "UXN": _UXN,
    }
    attribute = entry >> 2 & 7
    share = {0: "", 1: "SH=1", 2: "outer", 3: "inner"}[entry >> 8 & 3]
    return (
        "valid",
        "RO" if entry & _AP_RO else "RW",
        *(name for name, bit in names.items() if entry & bit),
        *([share] if share else []),
        f"MAIR[{attribute}]={mair >> 8 * attribute & 0xFF:#04x}",
    )


def _notes(tcr: int, tcr2: int) -> Iterable[str]:
    if tcr & _TCR_DS:
        yield "TCR_EL1.DS is set: addresses of 52 bits with a 4K or 16K granule (FEAT_LPA2) aren't followed"
    if tcr2 & _TCR2_D128:
        yield "TCR2_EL1.D128 is set: entries of 128 bits aren't followed"
    if tcr2 & _TCR2_PIE:
        yield "TCR2_EL1.PIE is set: permissions are those of PIR_EL1, which isn't looked at here"


def _get_or_0(vcpu: "Vcpu", id: int) -> int:
    """A register that not every processor has."""
    try:
        return vcpu.get_one_reg(id)
    except OSError:
        return 0
