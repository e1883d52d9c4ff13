"""The MMU made visible: how a guest virtual address becomes a host physical one, step by step.

A `Walk` is a list of stages, each of which takes an address of one kind to the next kind:

- `Paging`: gva → gpa by the guest's page tables (`kvmkit.kvm.walk_x86`, `kvmkit.kvm.walk_arm64`). Absent while paging is off:
  the address then is a guest physical one. A nested guest's walk will begin with another one, ngva → ngpa.
- `Slot`: gpa → hva by the memory slots.
- `Host`: hva → hpa by the host kernel's page tables, as far as ``/proc/self/pagemap`` shows them.

It ends with the first stage whose `result` is None. The tables are what is in memory now: a processor may still use what it has
in its TLBs. The guest wrote them, so nothing in them is trusted: each table's address is looked up in the slots, its entry is
read by process_vm_readv(2), which fails where the host has no memory, and the levels bound the loop. Nothing is written.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from kvmkit.kvm.memory import MemorySlot, load_bytes
from kvmkit.uapi import common, x86

if TYPE_CHECKING:
    from kvmkit.kvm.contract import Vcpu

_SLOT_FLAGS = {
    common.KVM_MEM_LOG_DIRTY_PAGES: "LOG_DIRTY_PAGES",
    common.KVM_MEM_READONLY: "READONLY",
    common.KVM_MEM_GUEST_MEMFD: "GUEST_MEMFD",
}
_SLOTS_OF_SMM = 1 << 16
"""Slots from here on belong to the address space that x86 has in system management mode (api.rst 4.35)."""

# Documentation/admin-guide/mm/pagemap.rst
_PAGEMAP_PRESENT, _PAGEMAP_SWAPPED = 1 << 63, 1 << 62
_PAGEMAP_PFN = (1 << 55) - 1


@dataclass(frozen=True)
class Step:
    """One table's entry."""

    name: str
    """The architecture's: "PML4E", "PDE", "level 2"."""
    level: int
    """As the architecture counts: down to 1 on x86, up to 3 on arm64."""
    table: int
    """The table's address; a gpa in the stage gva → gpa."""
    index: int
    address: int
    """The entry's address."""
    size_bytes: int
    entry: int | None
    """Its value; None where no memory is at its address."""
    flags: tuple[str, ...]
    """The names of the bits that are set, and what else the entry says beside an address."""
    accessed: bool
    dirty: bool
    page_bytes: int | None
    """If it maps a page, how large that is."""


@dataclass(frozen=True)
class Fault:
    """The exception that an access gets."""

    exception: str
    """"#PF" or "#GP"; "data abort" or "instruction abort" on arm64."""
    error_code: int | None
    """The exception's error code, on arm64 the fault status code (DFSC, IFSC) of ESR_EL1. None: it depends on the engine."""
    reason: str


AccessKind = Literal["read", "write", "execute"]
ACCESS_KINDS: tuple[AccessKind, ...] = get_args(AccessKind)


@dataclass(frozen=True)
class Access:
    """Whether one kind of access is permitted, as far as this stage goes."""

    user: bool
    """By user code (CPL 3, EL0), else by the supervisor (EL1)."""
    kind: AccessKind
    fault: Fault | None


@dataclass(frozen=True)
class Paging:
    """A stage that goes through page tables."""

    source: str
    """The kind of address that it starts from: "gva"."""
    target: str
    """The kind that it leads to: "gpa"."""
    address: int
    mode: str
    """"32-bit", "PAE", "4-level", "5-level" (Intel SDM vol. 3, 4.1.1); "VMSAv8-64, 4K granule, 48 bits" and such on arm64."""
    registers: dict[str, int]
    """Those that control it: "cr3", …"""
    controls: tuple[str, ...]
    """The bits of them that are set and matter: "WP", "SMEP", "NXE", …"""
    steps: tuple[Step, ...]
    end: str | None
    """Why it led nowhere, or None."""
    result: int | None
    page_bytes: int | None
    """Size of the page that maps the address."""
    accesses: tuple[Access, ...]
    """All six: supervisor and user, read, write and execute."""
    notes: tuple[str, ...]
    """What more there is to know of it."""

    def fault(self, kind: AccessKind, *, user: bool = False) -> Fault | None:
        """What an access would get; None if it is permitted."""
        return next(a.fault for a in self.accesses if (a.kind, a.user) == (kind, user))


@dataclass(frozen=True)
class Slot:
    """The stage gpa → hva."""

    source: str
    target: str
    address: int
    slot: MemorySlot | None
    """None: an access there is an MMIO exit."""
    flags: tuple[str, ...]
    """KVM_MEM_* by name."""
    result: int | None


@dataclass(frozen=True)
class Host:
    """The stage hva → hpa."""

    source: str
    target: str
    address: int
    state: str
    """What the host says of the page: "present", "hidden", "swapped out", "not mapped"."""
    detail: str
    result: int | None


Stage = Paging | Slot | Host


@dataclass(frozen=True)
class Walk:
    """An address's way; ``str`` of it is a table for people."""

    gva: int
    stages: tuple[Stage, ...]

    @property
    def gpa(self) -> int | None:
        """The guest physical address, if the walk came so far."""
        return self._address("gpa")

    @property
    def hva(self) -> int | None:
        """Where that is in this process."""
        return self._address("hva")

    @property
    def hpa(self) -> int | None:
        """Where that is in the host's memory."""
        return self._address("hpa")

    @property
    def paging(self) -> Paging | None:
        """The stage gva → gpa; None while paging is off."""
        return next((stage for stage in self.stages if isinstance(stage, Paging)), None)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: dictionaries, lists, whole numbers, strings."""
        return {"gva": self.gva, "gpa": self.gpa, "hva": self.hva, "hpa": self.hpa} | asdict(self)

    def __str__(self) -> str:
        """Many lines of text."""
        return "\n".join(_text(self))

    def _address(self, kind: str) -> int | None:
        for stage in self.stages:
            if stage.source == kind:
                return stage.address
            if stage.target == kind:
                return stage.result
        return None


class SlotMemory:
    """Guest physical memory as slots have it, to read alone."""

    def __init__(self, slots: Sequence[MemorySlot]) -> None:
        """Look at `slots`, but for those of system management mode."""
        self._slots = [slot for slot in slots if slot.slot < _SLOTS_OF_SMM]

    def find(self, gpa: int, size_bytes: int = 1) -> MemorySlot | None:
        """The slot that holds the whole range."""
        for slot in self._slots:
            if slot.gpa <= gpa and gpa + size_bytes <= slot.gpa + slot.size_bytes:
                return slot
        return None

    def read(self, gpa: int, size_bytes: int) -> int | None:
        """A little-endian number in memory; None where there is no slot, or where the host has no memory for it."""
        slot = self.find(gpa, size_bytes)
        if slot is None:
            return None
        try:
            return int.from_bytes(load_bytes(slot.hva + gpa - slot.gpa, size_bytes), "little")
        except OSError:
            return None


def walk(vcpu: "Vcpu", gva: int) -> Walk:
    """See `Vcpu.walk`."""
    if not 0 <= gva < 1 << 64:
        raise ValueError(f"address {gva:#x}: 0 to {(1 << 64) - 1:#x}")
    memory = SlotMemory(vcpu.memory_slots)
    if isinstance(vcpu.kvm_run, x86.kvm_run):
        from kvmkit.kvm import walk_x86

        paging, bits_without = walk_x86.walk_tables(vcpu, memory, gva), 32
    else:
        from kvmkit.kvm import walk_arm64

        paging, bits_without = walk_arm64.walk_tables(vcpu, memory, gva), 64
    stages: list[Stage] = [paging] if paging is not None else []
    gpa = gva & (1 << bits_without) - 1 if paging is None else paging.result
    if gpa is not None:
        slot = memory.find(gpa)
        hva = None if slot is None else slot.hva + gpa - slot.gpa
        names = () if slot is None else tuple(n for bit, n in _SLOT_FLAGS.items() if slot.flags & bit)
        stages.append(Slot("gpa", "hva", gpa, slot, names, hva))
        if hva is not None:
            stages.append(_host(hva))
    return Walk(gva, tuple(stages))


def ones(low: int, high: int) -> int:
    """Ones from bit `low` to bit `high`; none if that is below `low`."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


def _host(hva: int) -> Host:
    """What the host's kernel tells of a page of this process."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(hva // page_bytes * 8)
            entry = int.from_bytes(file.read(8), "little")
    except OSError as error:
        return Host("hva", "hpa", hva, "hidden", f"/proc/self/pagemap: {error.strerror}", None)
    if entry & _PAGEMAP_SWAPPED:
        return Host("hva", "hpa", hva, "swapped out", "the next access brings the page back", None)
    if not entry & _PAGEMAP_PRESENT:
        return Host("hva", "hpa", hva, "not mapped", "the next access maps a page", None)
    if not entry & _PAGEMAP_PFN:
        detail = "a page is there, but which one takes CAP_SYS_ADMIN to see"
        return Host("hva", "hpa", hva, "hidden", detail, None)
    hpa = (entry & _PAGEMAP_PFN) * page_bytes + hva % page_bytes
    return Host("hva", "hpa", hva, "present", "", hpa)


# Text.


def size_text(size_bytes: int) -> str:
    """4K, 2M, 512G, 256T."""
    for unit in ("", "K", "M", "G", "T"):
        if size_bytes % 1024 or unit == "T":
            return f"{size_bytes}{unit}"
        size_bytes //= 1024
    raise AssertionError


def _text(walk: Walk) -> list[str]:
    lines = [f"gva {walk.gva:#x}"]
    if walk.paging is None:
        lines.append("├─ paging is off: the address is a guest physical one")
    for stage in walk.stages:
        last = stage is walk.stages[-1]
        title, rest = _stage_text(stage)
        lines.append(f"{'└─' if last else '├─'} {stage.source} → {stage.target}: {title}")
        lines += [f"{'   ' if last else '│  '}  {line}" for line in rest]
    return lines


def _stage_text(stage: Stage) -> tuple[str, list[str]]:
    result = "" if stage.result is None else f"{stage.target} {stage.result:#x}"
    match stage:
        case Paging():
            registers = "  ".join(f"{name} {value:#x}" for name, value in stage.registers.items())
            lines = [f"{registers}  ({' '.join(stage.controls)})", *_table(stage.steps)]
            page = f", in a page of {size_text(stage.page_bytes)}" if stage.page_bytes else ""
            lines.append(f"{result}{page}" if result else f"ends here: {stage.end}")
            return f"{stage.mode} paging", [*lines, *_access_text(stage), *stage.notes]
        case Slot(slot=None):
            return "no memory slot: an access is an MMIO exit", []
        case Slot(slot=MemorySlot() as slot):
            flags = f", {' '.join(stage.flags)}" if stage.flags else ""
            where = f"gpa {slot.gpa:#x} + {size_text(slot.size_bytes)} at hva {slot.hva:#x}{flags}"
            return f"slot {slot.slot}: {where}", [result]
        case Host():
            return stage.state + (f": {stage.detail}" if stage.detail else ""), [result] if result else []
    raise AssertionError


def _table(steps: Sequence[Step]) -> list[str]:
    rows = [("ENTRY", "TABLE", "INDEX", "VALUE", "MAPS", "FLAGS")]
    for step in steps:
        value = "no memory" if step.entry is None else f"{step.entry:#0{2 + 2 * step.size_bytes}x}"
        page = size_text(step.page_bytes) if step.page_bytes else "table" if step.flags else ""
        rows.append((step.name, f"{step.table:#x}", str(step.index), value, page, " ".join(step.flags)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in (1, 2, 3) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _access_text(stage: Paging) -> list[str]:
    """A line for each kind of code, if they differ."""
    lines = []
    for user in (False, True):
        told = []
        for access in stage.accesses:
            if access.user == user:
                fault = access.fault
                what = "ok" if fault is None else fault.exception
                if fault is not None and fault.error_code is not None:
                    what += f" {fault.error_code:#x}"
                told.append(f"{access.kind} {what}")
        lines.append(f"{'user' if user else 'supervisor'}: {', '.join(told)}")
    reasons = dict.fromkeys(a.fault.reason for a in stage.accesses if a.fault is not None)
    return lines + [f"  {reason}" for reason in reasons if reason != stage.end]
