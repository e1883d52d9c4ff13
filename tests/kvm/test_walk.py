"""`kvmkit.kvm.walk` for a vCPU made up, with what no processor here has; what it says, and what it doesn't touch."""

import json
import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvmkit.kvm import GuestMemory
from kvmkit.kvm.memory import MemorySlot
from kvmkit.kvm.walk import Access, Host, Paging, Slot, SlotMemory, Walk
from kvmkit.uapi import x86
from kvmkit.uapi.common import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY

from .still_vcpu import StillVcpu

P, W, U, A, D, PS, G, NX = (1 << bit for bit in (0, 1, 2, 5, 6, 7, 8, 63))
PG, WP = 1 << 31, 1 << 16
PSE, PAE, LA57, SMEP, SMAP, PKE = (1 << bit for bit in (4, 5, 12, 20, 21, 22))
LMA, NXE = 1 << 10, 1 << 11
ROOT = 0x1000


class FakeVcpu(StillVcpu):
    """A vCPU with 64 KiB of memory at 0 and the registers given."""

    def __init__(self, memory: GuestMemory, **registers: int) -> None:
        super().__init__(memory)
        self.sregs = x86.kvm_sregs(**{"cr3": ROOT, **registers})
        self.rflags = 2
        self.pdptes: tuple[int, ...] | None = None
        self.cpuid = {0: {}, 0x80000001: {"edx": 1 << 26}, 0x80000008: {"eax": 46}}

    kvm_run = x86.kvm_run()

    def get_sregs(self) -> x86.kvm_sregs:
        return self.sregs

    def get_sregs2(self) -> x86.kvm_sregs2:
        if self.pdptes is None:
            return super().get_sregs2()
        sregs = x86.kvm_sregs2(flags=x86.KVM_SREGS2_FLAGS_PDPTRS_VALID)
        sregs.pdptrs[:] = list(self.pdptes)
        return sregs

    def get_regs(self) -> x86.kvm_regs:
        return x86.kvm_regs(rflags=self.rflags)

    def get_cpuid2(self) -> list[x86.kvm_cpuid_entry2]:
        return [x86.kvm_cpuid_entry2(function=leaf, **values) for leaf, values in self.cpuid.items()]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(0x10000) as memory:
        yield memory


def paging_of(walk: Walk) -> Paging:
    assert walk.paging is not None
    return walk.paging


def denied(paging: Paging) -> set[tuple[bool, str]]:
    return {(access.user, access.kind) for access in paging.accesses if access.fault}


def test_paging_off(memory: GuestMemory) -> None:
    walk = FakeVcpu(memory, cr0=1).walk(0x700002345)  # of which there are 32 bits
    assert [type(stage) for stage in walk.stages] == [Slot, Host]
    assert (walk.paging, walk.gpa, walk.hva) == (None, 0x2345, memory.address + 0x2345)
    assert "paging is off" in str(walk)


def test_five_levels(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, cr0=PG | WP, cr4=PAE | LA57, efer=LMA | NXE)
    gva = 1 << 48 | 2 << 39 | 3 << 30 | 4 << 21 | 5 << 12 | 0x678
    for level in range(5):
        target = 0x9000 | NX | G | D if level == 4 else 0x1000 * (level + 2)
        vcpu.put(0x1000 * (level + 1) + (level + 1) * 8, target | P | W | A)
    walk = vcpu.walk(gva)
    paging = paging_of(walk)
    assert (paging.mode, walk.gpa, paging.page_bytes) == ("5-level", 0x9678, 4096)
    assert [(s.name, s.table, s.index) for s in paging.steps] == [
        ("PML5E", 0x1000, 1),
        ("PML4E", 0x2000, 2),
        ("PDPTE", 0x3000, 3),
        ("PDE", 0x4000, 4),
        ("PTE", 0x5000, 5),
    ]
    assert [s.accessed for s in paging.steps] == [True] * 5
    assert [s.dirty for s in paging.steps] == [False] * 4 + [True]
    assert paging.steps[-1].flags == ("P", "W", "A", "D", "G", "NX")
    assert paging.fault("read") is None and paging.fault("write", user=True) is not None
    end = paging_of(vcpu.walk(1 << 56)).end
    assert end == "the address is not canonical: bits 56 to 63 differ"
    assert paging_of(vcpu.walk((1 << 64) - (1 << 56))).end == "the PML5E is not present"


@pytest.mark.parametrize(
    ("gbpages", "vendor", "entries", "end"),
    [
        (True, "", (0x2003, 0x40000083), None),
        (False, "", (0x2003, 0x40000083), "the PDPTE has reserved bits set: 0x80"),
        (True, "", (0x2003, 0x40002083), "the PDPTE has reserved bits set: 0x2000"),
        (True, "", (0x2003, 0x40001083), None),  # PAT
        (True, "", (0x2083, 0x40000083), "the PML4E has reserved bits set: 0x80"),
        (True, "", (0x2103, 0x40000083), None),
        (True, "cAMD", (0x2103, 0x40000083), "the PML4E has reserved bits set: 0x100"),
        (True, "", (0x2003 | 1 << 46, 0x40000083), "the PML4E has reserved bits set: 0x400000000000"),
        (True, "", (0x2003 | NX, 0), "the PML4E has reserved bits set: 0x8000000000000000"),
        (True, "", (0x2003 | 0x7FF << 52, 0x40000083), None),  # software's own
        (True, "", (0x80003, 0), "no memory holds the PDPTE"),
    ],
)
def test_reserved_bits(
    memory: GuestMemory, gbpages: bool, vendor: str, entries: tuple[int, int], end: str | None
) -> None:
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PAE, efer=LMA)
    vcpu.cpuid[0] = {"ecx": int.from_bytes(vendor.encode(), "little")}
    vcpu.cpuid[0x80000001] = {"edx": 1 << 26 if gbpages else 0}
    for at, value in zip((ROOT, 0x2000), entries, strict=True):
        vcpu.put(at, value)
    walk = vcpu.walk(0x123)
    paging = paging_of(walk)
    assert (paging.end, walk.gpa) == (end, 0x40000123 if end is None else None)
    codes = {"reserved": 0xF, "memory": None}
    fault = paging.fault("write", user=True)
    assert fault is not None
    assert fault.error_code == next((code for word, code in codes.items() if end and word in end), 7)


@pytest.mark.parametrize(
    ("physical_bits", "entry", "gpa"),
    [
        (46, 0x00C00083 | 0xFF << 13, 0xFF00C12345),
        (36, 0x00C00083 | 0xF << 13, 0xF00C12345),
        (36, 0x00C00083 | 1 << 17, None),
        (46, 0x00C00083 | 1 << 21, None),
    ],
)
def test_four_megabytes(memory: GuestMemory, physical_bits: int, entry: int, gpa: int | None) -> None:
    """PSE-36: bits 13 to 20 are address bits 32 to 39, as many as there are."""
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PSE)
    vcpu.cpuid[0x80000008] = {"eax": physical_bits}
    vcpu.put(ROOT, entry, 4)
    walk = vcpu.walk(0x7700012345)
    assert walk.gpa == gpa
    assert paging_of(walk).address == 0x12345


def test_without_pse_the_bit_means_nothing(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, cr0=PG)
    vcpu.put(ROOT, 0x2083, 4)
    vcpu.put(0x2004, 0x5001, 4)
    assert vcpu.walk(0x1ABC).gpa == 0x5ABC


def test_pae_uses_what_was_loaded(memory: GuestMemory) -> None:
    """The processor read its four PDPTEs when CR3 was written; they have no permissions."""
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PAE, efer=NXE, cr3=ROOT | 0x20)
    vcpu.put(ROOT + 0x20 + 8, 0x2001)
    vcpu.put(0x2008, 0x5000 | P | U)
    vcpu.put(0x5010, 0x9000 | P | U | W | A | D | NX)
    vcpu.put(0x3008, 0x200000 | P | PS)
    gva = 1 << 30 | 1 << 21 | 2 << 12
    walk = vcpu.walk(gva)
    assert walk.gpa == 0x9000 and denied(paging_of(walk)) == {
        (True, "write"),
        (False, "execute"),
        (True, "execute"),
    }
    vcpu.pdptes = 0, 0x3001, 0, 0
    walk = vcpu.walk(gva)
    assert walk.gpa == 0x202000 and "loaded with CR3" in paging_of(walk).steps[0].flags
    assert denied(paging_of(walk)) == {(True, "read"), (True, "write"), (True, "execute")}


@pytest.mark.parametrize(
    ("cr0", "cr4", "ac", "flags", "expected"),
    [
        (0, 0, False, 0, "Ur Uw Ux"),
        (WP, 0, False, 0, "Sw Ur Uw Ux"),
        (WP, 0, False, W, "Ur Uw Ux"),
        (WP, 0, False, U, "Sw Uw"),
        (WP, SMEP, False, U | W, "Sx"),
        (WP, SMEP | SMAP, False, U | W, "Sr Sw Sx"),
        (WP, SMEP | SMAP, True, U | W, "Sx"),
        (WP, SMEP | SMAP, False, W, "Ur Uw Ux"),
    ],
)
def test_permissions(memory: GuestMemory, cr0: int, cr4: int, ac: bool, flags: int, expected: str) -> None:
    vcpu = FakeVcpu(memory, cr0=PG | cr0, cr4=PAE | cr4, efer=LMA)
    vcpu.rflags = 1 << 18 if ac else 2
    vcpu.put(ROOT, 0x2000 | P | W | U)
    vcpu.put(0x2000, P | PS | flags)
    names = [
        f"{'U' if user else 'S'}{kind[0]}".replace("e", "x") for user, kind in denied(paging_of(vcpu.walk(0)))
    ]
    assert sorted(names) == sorted(expected.split())


def test_protection_keys_are_noted(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PAE | PKE, efer=LMA)
    vcpu.put(ROOT, 0x2000 | P | U)
    vcpu.put(0x2000, P | PS | U | 5 << 59)
    paging = paging_of(vcpu.walk(0))
    assert "key=5" in paging.steps[-1].flags
    assert "protection key 5: PKRU" in paging.notes[0] and paging.notes[0] in str(vcpu.walk(0))


def test_a_slot_that_leads_nowhere(memory: GuestMemory) -> None:
    """A slot may name any address of ours, or none: no crash, no invention."""
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PAE, efer=LMA)
    hole = mmap.mmap(-1, 0x10000)
    address = memory.address
    hole.close()
    vcpu.slots = [MemorySlot(0, 0, 0x10000, 0x1000, 0), MemorySlot(1 << 16, 0, 0x10000, address, 0)]
    paging = paging_of(vcpu.walk(0))
    assert paging.end == "no memory holds the PML4E" and paging.steps[0].entry is None
    vcpu.sregs.cr0 = 0
    walk = vcpu.walk(0x4000)
    assert walk.hva == 0x5000 and walk.hpa is None
    host = walk.stages[-1]
    assert isinstance(host, Host) and host.state in ("not mapped", "hidden")
    walk = vcpu.walk(0xFEE00000)
    assert (walk.gpa, walk.hva) == (0xFEE00000, None) and "MMIO" in str(walk)


def test_slots_at_the_end_of_the_address_space(memory: GuestMemory) -> None:
    top = (1 << 64) - 0x1000
    memory.write(0xFF8, b"12345678")
    slots = SlotMemory([MemorySlot(3, top, 0x1000, memory.address, 0)])
    assert slots.read(top + 0xFF8, 8) == int.from_bytes(b"12345678", "little")
    assert slots.read(top + 0xFF9, 8) is None and slots.read(0, 8) is None


def test_slots_flags(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, cr0=0)
    vcpu.slots = [MemorySlot(3, 0, 0x1000, memory.address, KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES)]
    assert "slot 3" in str(vcpu.walk(0)) and "LOG_DIRTY_PAGES READONLY" in str(vcpu.walk(0))


@pytest.mark.parametrize("gva", [-1, 1 << 64])
def test_addresses_have_64_bits(memory: GuestMemory, gva: int) -> None:
    with pytest.raises(ValueError, match="0 to 0xffffffffffffffff"):
        FakeVcpu(memory).walk(gva)


def test_the_hosts_page(memory: GuestMemory) -> None:
    """Not mapped before it is touched; then a page, whose address only the privileged see."""
    vcpu = FakeVcpu(memory, cr0=0)
    walk = vcpu.walk(0x8123)
    assert isinstance(walk.stages[-1], Host) and walk.stages[-1].state == "not mapped"
    memory.write(0x8000, b"x")
    host = vcpu.walk(0x8123).stages[-1]
    assert isinstance(host, Host)
    if host.state == "hidden":
        assert os.geteuid() != 0 and "CAP_SYS_ADMIN" in host.detail and host.result is None
    else:
        assert host.state == "present" and host.result is not None
        assert host.result % mmap.PAGESIZE == 0x8123 % mmap.PAGESIZE


def test_as_json(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, cr0=PG, cr4=PAE, efer=LMA)
    vcpu.put(ROOT, 0x2000 | P)
    vcpu.put(0x2000, P | PS)
    walk = vcpu.walk(0x6000)
    value: dict[str, Any] = json.loads(json.dumps(walk.as_dict()))
    assert (value["gva"], value["gpa"], value["hva"]) == (0x6000, 0x6000, memory.address + 0x6000)
    paging, slot, _ = value["stages"]
    assert [step["entry"] for step in paging["steps"]] == [0x2001, 0x81]
    assert paging["accesses"][0] == {"user": False, "kind": "read", "fault": None}
    assert slot["slot"]["gpa"] == 0
    assert Access(False, "read", None) in paging_of(walk).accesses
