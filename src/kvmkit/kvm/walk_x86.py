"""x86's page tables (Intel SDM vol. 3, chapter 4; AMD APM vol. 2, chapter 5).

Linear-address masking isn't applied: give an address without its tag.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmkit.kvm.walk import ACCESS_KINDS, Access, AccessKind, Fault, Paging, SlotMemory, Step, ones
from kvmkit.uapi import x86

if TYPE_CHECKING:
    from kvmkit.kvm.contract import Vcpu

_CR0 = {"WP": 1 << 16, "PG": 1 << 31}
_CR4 = {
    "PSE": 1 << 4,
    "PAE": 1 << 5,
    "PGE": 1 << 7,
    "LA57": 1 << 12,
    "PCIDE": 1 << 17,
    "SMEP": 1 << 20,
    "SMAP": 1 << 21,
    "PKE": 1 << 22,
    "PKS": 1 << 24,
}
_EFER = {"LMA": 1 << 10, "NXE": 1 << 11}
_RFLAGS_AC = 1 << 18

_P, _W, _U, _A, _D, _PS, _G, _NX = (1 << bit for bit in (0, 1, 2, 5, 6, 7, 8, 63))
_PAT_OF_A_LARGE_PAGE = 1 << 12

_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}

# #PF error code (4.7).
_EC_P, _EC_W, _EC_U, _EC_RSVD, _EC_I = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class _Mmu:
    """What the vCPU's registers and CPUID say of its paging."""

    mode: str
    levels: int
    entry_bytes: int
    root: int
    controls: frozenset[str]
    physical_bits: int
    has_1g_pages: bool
    amd: bool

    @property
    def pae(self) -> bool:
        """PAE paging, whose third level is a register rather than a table."""
        return self.mode == "PAE"

    def index(self, gva: int, level: int) -> int:
        """The index in the table of a level."""
        if self.entry_bytes == 4:
            return gva >> self.shift(level) & 0x3FF
        return gva >> self.shift(level) & (3 if self.pae and level == 3 else 0x1FF)

    def shift(self, level: int) -> int:
        """The address bits below those that the level's index takes."""
        return 12 + (10 if self.entry_bytes == 4 else 9) * (level - 1)

    def is_leaf(self, level: int, entry: int) -> bool:
        """Whether an entry maps a page."""
        if level == 1:
            return True
        if self.entry_bytes == 4:
            return bool(entry & _PS) and "PSE" in self.controls
        return bool(entry & _PS) and level <= (2 if self.pae else 3)

    def reserved(self, level: int, leaf: bool) -> int:
        """The bits that must be 0."""
        if self.entry_bytes == 4:
            # A 4 MiB page has address bits from 32 on in its bits 13 to 20 (PSE-36).
            return ones(13 + self.bits_of_4m_pages - 32, 21) if leaf and level == 2 else 0
        mask = ones(self.physical_bits, 62 if self.pae else 51)
        if "NXE" not in self.controls:
            mask |= _NX
        if self.pae and level == 3:
            return mask | _NX | ones(1, 2) | ones(5, 8)
        if level > 3 or (level == 3 and not self.has_1g_pages):
            mask |= _PS
        if self.amd and level > 3:
            mask |= _G
        if leaf and level > 1:
            mask |= ones(13, self.shift(level) - 1)
        return mask

    @property
    def bits_of_4m_pages(self) -> int:
        """Physical address bits that a 4 MiB page can have."""
        return min(40, self.physical_bits)

    def page(self, level: int, entry: int, gva: int) -> int:
        """The physical address that a leaf maps `gva` to."""
        offset = ones(0, self.shift(level) - 1)
        base = self.next(entry) & ~offset
        if self.entry_bytes == 4 and level == 2:
            base |= (entry >> 13 & ones(0, self.bits_of_4m_pages - 33)) << 32
        return base | gva & offset

    def next(self, entry: int) -> int:
        """The address in an entry."""
        return entry & (ones(12, 31) if self.entry_bytes == 4 else ones(12, 51))


@dataclass
class _Progress:
    """What the entries so far come to."""

    steps: list[Step] = field(default_factory=list)
    writable: bool = True
    user: bool = True
    no_execute: bool = False
    end: str | None = None
    """Why it went no further."""
    error_code: int | None = 0
    """The part of #PF's error code that this decides."""
    result: int | None = None
    leaf: int = 0
    """The entry that maps the page."""


def walk_tables(vcpu: "Vcpu", memory: SlotMemory, gva: int) -> Paging | None:
    """Walk from CR3; None if paging is off. Outside long mode an address has 32 bits: more are ignored."""
    sregs = vcpu.get_sregs()
    if not sregs.cr0 & _CR0["PG"]:
        return None
    mmu = _mmu(vcpu, sregs)
    if mmu.levels < 4:
        gva &= 0xFFFFFFFF
    sign_bit = mmu.shift(mmu.levels + 1) - 1
    canonical = mmu.levels < 4 or gva >> sign_bit in (0, ones(0, 63 - sign_bit))
    if canonical:
        progress = _follow(mmu, memory, gva, _loaded_pdptes(vcpu) if mmu.pae else None)
    else:
        progress = _Progress(end=f"the address is not canonical: bits {sign_bit} to 63 differ")
    ac = bool(vcpu.get_regs().rflags & _RFLAGS_AC)
    accesses = []
    for by_user in (False, True):
        for kind in ACCESS_KINDS:
            fault: Fault | None = None
            if not canonical:
                fault = Fault("#GP", 0, progress.end or "")
            elif progress.end is not None:
                known = progress.error_code
                code = None if known is None else known | _code(mmu, kind, by_user)
                fault = Fault("#PF", code, progress.end)
            elif denied := _denied(mmu, kind, by_user, progress, ac):
                fault = Fault("#PF", _EC_P | _code(mmu, kind, by_user), denied)
            accesses.append(Access(by_user, kind, fault))
    controls = [name for name in (*_CR0, *_CR4, *_EFER) if name in mmu.controls]
    return Paging(
        source="gva",
        target="gpa",
        address=gva,
        mode=mmu.mode,
        registers={"cr0": sregs.cr0, "cr3": sregs.cr3, "cr4": sregs.cr4, "efer": sregs.efer},
        controls=(*controls, "AC") if ac else tuple(controls),
        steps=tuple(progress.steps),
        end=progress.end,
        result=progress.result,
        page_bytes=progress.steps[-1].page_bytes if progress.result is not None else None,
        accesses=tuple(accesses),
        notes=tuple(_notes(mmu, progress)),
    )


def _follow(mmu: _Mmu, memory: SlotMemory, gva: int, loaded: tuple[int, ...] | None) -> _Progress:
    """Go from table to table. `loaded` are PAE's PDPTEs if the processor has them in registers."""
    progress = _Progress()
    table = mmu.root
    for level in range(mmu.levels, 0, -1):
        pdpte = mmu.pae and level == 3  # has neither permissions nor an accessed bit
        index = mmu.index(gva, level)
        address = table + index * mmu.entry_bytes
        entry = loaded[index] if loaded and pdpte else memory.read(address, mmu.entry_bytes)
        bits = entry or 0
        present = bool(bits & _P)
        leaf = present and mmu.is_leaf(level, bits)
        progress.steps.append(
            Step(
                name=_NAMES[level],
                level=level,
                table=table,
                index=index,
                address=address,
                size_bytes=mmu.entry_bytes,
                entry=entry,
                flags=(*_flags(mmu, level, bits, leaf), *(["loaded with CR3"] if loaded and pdpte else [])),
                accessed=present and not pdpte and bool(bits & _A),
                dirty=leaf and bool(bits & _D),
                page_bytes=1 << mmu.shift(level) if leaf else None,
            )
        )
        if entry is None:
            progress.end, progress.error_code = f"no memory holds the {_NAMES[level]}", None
        elif not present:
            progress.end = f"the {_NAMES[level]} is not present"
        elif reserved := entry & mmu.reserved(level, leaf):
            progress.end = f"the {_NAMES[level]} has reserved bits set: {reserved:#x}"
            progress.error_code = _EC_P | _EC_RSVD
        if progress.end is not None:
            break
        if not pdpte:
            progress.writable &= bool(bits & _W)
            progress.user &= bool(bits & _U)
            progress.no_execute |= mmu.entry_bytes == 8 and bool(bits & _NX)
        if leaf:
            progress.leaf, progress.result = bits, mmu.page(level, bits, gva)
            break
        table = mmu.next(bits)
    return progress


def _mmu(vcpu: "Vcpu", sregs: x86.kvm_sregs) -> _Mmu:
    registers = ((_CR0, sregs.cr0), (_CR4, sregs.cr4), (_EFER, sregs.efer))
    controls = frozenset(n for names, value in registers for n, bit in names.items() if value & bit)
    cpuid = {(entry.function, entry.index): entry for entry in vcpu.get_cpuid2()}
    sizes, extended, vendor = (cpuid.get((leaf, 0)) for leaf in (0x80000008, 0x80000001, 0))
    physical_bits = sizes.eax & 0xFF if sizes else 36
    if "PAE" not in controls:
        mode, levels, root = "32-bit", 2, sregs.cr3 & ones(12, 31)
    elif "LMA" not in controls:
        mode, levels, root = "PAE", 3, sregs.cr3 & ones(5, 31)
    else:
        levels = 5 if "LA57" in controls else 4
        mode, root = f"{levels}-level", sregs.cr3 & ones(12, physical_bits - 1)
    return _Mmu(
        mode=mode,
        levels=levels,
        entry_bytes=8 if levels > 2 else 4,
        root=root,
        controls=controls,
        physical_bits=min(52, max(32, physical_bits)),
        has_1g_pages=extended is not None and bool(extended.edx & 1 << 26),
        amd=vendor is not None
        and vendor.ecx in (0x444D4163, 0x656E6975),  # "cAMD", "uine": AMD's and Hygon's
    )


def _loaded_pdptes(vcpu: "Vcpu") -> tuple[int, ...] | None:
    """PAE's four PDPTEs as the processor loaded them with CR3; None if the engine reads them from memory each time."""
    try:
        sregs = vcpu.get_sregs2()
    except OSError:  # before KVM_CAP_SREGS2
        return None
    return tuple(sregs.pdptrs) if sregs.flags & x86.KVM_SREGS2_FLAGS_PDPTRS_VALID else None


def _code(mmu: _Mmu, kind: AccessKind, user: bool) -> int:
    """The part of #PF's error code that the access alone decides."""
    code = (_EC_W if kind == "write" else 0) | (_EC_U if user else 0)
    if kind == "execute" and ({"NXE", "PAE"} <= mmu.controls or "SMEP" in mmu.controls):
        code |= _EC_I
    return code


def _denied(mmu: _Mmu, kind: AccessKind, by_user: bool, page: _Progress, ac: bool) -> str | None:
    """Why the permissions of all levels together deny an access; None if they don't (4.6.1)."""
    if kind == "execute" and page.no_execute:
        return "execute: NX is set"
    if by_user and not page.user:
        return "user: U is clear"
    if kind == "write" and not page.writable and (by_user or "WP" in mmu.controls):
        return "write: W is clear" + ("" if by_user else " and CR0.WP set")
    if by_user or not page.user:
        return None
    if kind == "execute" and "SMEP" in mmu.controls:
        return "execute by the supervisor: U and CR4.SMEP are set"
    if kind != "execute" and "SMAP" in mmu.controls and not ac:
        return f"{kind} by the supervisor: U and CR4.SMAP are set, RFLAGS.AC is clear"
    return None


def _flags(mmu: _Mmu, level: int, entry: int, leaf: bool) -> tuple[str, ...]:
    """The names of an entry's bits."""
    if not entry & _P:
        return ()
    names = {"P": _P, "W": _W, "U": _U, "PWT": 1 << 3, "PCD": 1 << 4, "A": _A}
    if mmu.pae and level == 3:
        names = {"P": _P, "PWT": 1 << 3, "PCD": 1 << 4}
    if leaf:
        names |= {"D": _D, "PAT" if level == 1 else "PS": _PS, "G": _G}
        if level > 1:
            names["PAT"] = _PAT_OF_A_LARGE_PAGE
    if mmu.entry_bytes == 8:
        names["NX"] = _NX
    found = tuple(name for name, bit in names.items() if entry & bit)
    key = entry >> 59 & 15
    return (*found, f"key={key}") if leaf and mmu.levels > 3 and key else found


def _notes(mmu: _Mmu, page: _Progress) -> Iterable[str]:
    if page.result is not None and mmu.levels > 3 and ("PKE" if page.user else "PKS") in mmu.controls:
        register = "PKRU" if page.user else "IA32_PKRS"
        key = page.leaf >> 59 & 15
        yield f"protection key {key}: {register}, which isn't looked at here, may deny reads and writes as well"
