"""arm64's tables, for a vCPU made up: what no test bed has, and what AT doesn't tell."""

from collections.abc import Iterator

import pytest

from kvmkit.kvm import GuestMemory
from kvmkit.kvm.walk import Fault, Paging
from kvmkit.kvm.walk_arm64 import (
    ID_AA64MMFR0_EL1,
    MAIR_EL1,
    SCTLR_EL1,
    TCR2_EL1,
    TCR_EL1,
    TTBR0_EL1,
    TTBR1_EL1,
)
from kvmkit.uapi import arm64

from .still_vcpu import StillVcpu

VALID, TABLE, AF, EL0, RO = 1 << 0, 1 << 1, 1 << 10, 1 << 6, 1 << 7
DBM, PXN, UXN = 1 << 51, 1 << 53, 1 << 54
ROOT = 0x10000
HA, HD = 1 << 39, 1 << 40


class FakeVcpu(StillVcpu):
    """A vCPU with 256 KiB of memory at 0 and the registers given; a granule of 4 KiB and 39 bits in each half unless `tcr` says else."""

    def __init__(
        self, memory: GuestMemory, *, tcr: int = 25 | 25 << 16 | 2 << 30, sctlr: int = 1, pstate: int = 0
    ) -> None:
        super().__init__(memory)
        self.registers = {
            SCTLR_EL1: sctlr,
            TCR_EL1: tcr | 5 << 32,
            TTBR0_EL1: ROOT | 0xABCD << 48,  # an ASID
            TTBR1_EL1: 0x20000,
            MAIR_EL1: 0x00FF,
            ID_AA64MMFR0_EL1: 5,
            arm64.REG_PSTATE: pstate,
        }

    kvm_run = arm64.kvm_run()

    def get_one_reg(self, id: int) -> int:
        if id not in self.registers:
            raise OSError(2, "no such register")
        return self.registers[id]

    def paging(self, gva: int) -> Paging:
        paging = self.walk(gva).paging
        assert paging is not None
        return paging


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(0x40000) as memory:
        yield memory


def denied(paging: Paging) -> str:
    """S or U and r, w or x for each access that is."""
    return " ".join(
        f"{'U' if a.user else 'S'}{'x' if a.kind == 'execute' else a.kind[0]}"
        for a in paging.accesses
        if a.fault
    )


def test_mmu_off(memory: GuestMemory) -> None:
    walk = FakeVcpu(memory, sctlr=0).walk(0x123456789AB)
    assert walk.paging is None and walk.gpa == 0x123456789AB


def test_three_levels_in_the_upper_half(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory)
    vcpu.put(0x20000 + 1 * 8, 0x21000 | VALID | TABLE)
    vcpu.put(0x21000 + 2 * 8, 0x22000 | VALID | TABLE)
    vcpu.put(0x22000 + 3 * 8, 0x9000 | VALID | TABLE | AF | DBM | UXN | 3 << 8 | 1 << 2)
    gva = (1 << 64) - (1 << 39) | 1 << 30 | 2 << 21 | 3 << 12 | 0x456
    walk = vcpu.walk(gva)
    paging = vcpu.paging(gva)
    assert (walk.gpa, paging.page_bytes, paging.mode) == (0x9456, 4096, "VMSAv8-64, 4K granule, 39-bit")
    assert [(s.name, s.table, s.index) for s in paging.steps] == [
        ("level 1", 0x20000, 1),
        ("level 2", 0x21000, 2),
        ("level 3", 0x22000, 3),
    ]
    last = paging.steps[-1]
    assert (
        last.flags == ("valid", "RW", "AF", "DBM", "UXN", "inner", "MAIR[1]=0x00")
        and last.accessed
        and last.dirty
    )
    assert denied(paging) == "Ur Uw Ux"
    assert "ttbr1_el1" in str(walk)


@pytest.mark.parametrize(
    ("entry", "tcr", "sctlr", "pstate", "expected"),
    [
        (AF, 0, 0, 0, "Ur Uw"),
        (AF | RO, 0, 0, 0, "Sw Ur Uw"),
        (AF | EL0, 0, 0, 0, "Sx"),
        (AF | EL0 | RO, 0, 0, 0, "Sw Uw"),
        (AF | EL0 | RO | PXN | UXN, 0, 0, 0, "Sw Sx Uw Ux"),
        (AF | EL0 | RO | PXN, 0, 0, 1 << 22, "Sr Sw Sx Uw"),  # PAN
        (AF | PXN | UXN, 0, 0, 1 << 22, "Sx Ur Uw Ux"),
        (AF, 0, 1 << 19, 0, "Sx Ur Uw"),  # WXN
        (AF | EL0, 0, 1 << 19, 0, "Sx Ux"),
        (AF | EL0 | RO | DBM, 0, 0, 0, "Sw Uw"),
        (AF | EL0 | RO | DBM, HA | HD, 0, 0, "Sx"),
        (0, 0, 0, 0, "Sr Sw Sx Ur Uw Ux"),
        (0, HA, 0, 0, "Ur Uw"),
        (AF | EL0, 1 << 55, 0, 0, "Sx Ur Uw Ux"),  # E0PD0
    ],
)
def test_permissions(
    memory: GuestMemory, entry: int, tcr: int, sctlr: int, pstate: int, expected: str
) -> None:
    vcpu = FakeVcpu(memory, tcr=25 | tcr, sctlr=1 | sctlr, pstate=pstate)
    vcpu.put(ROOT, VALID | entry)
    assert denied(vcpu.paging(0)) == expected


@pytest.mark.parametrize(
    ("table", "hpd", "expected"),
    [
        (1 << 59, False, "Sx"),
        (1 << 60, False, "Sx Ux"),
        (1 << 61, False, "Ur Uw"),
        (1 << 62, False, "Sw Uw"),
        (15 << 59, True, "Sx"),
    ],
)
def test_permissions_of_tables(memory: GuestMemory, table: int, hpd: bool, expected: str) -> None:
    vcpu = FakeVcpu(memory, tcr=25 | hpd << 41)
    vcpu.put(ROOT, 0x11000 | VALID | TABLE | table)
    vcpu.put(0x11000, VALID | AF | EL0)
    assert denied(vcpu.paging(0)) == expected


@pytest.mark.parametrize(
    ("tcr", "gva", "entry", "fault"),
    [
        (25, 0, 0, Fault("data abort", 5, "the entry of level 1 is not valid")),
        (
            16,
            0,
            VALID,
            Fault("data abort", 4, "the entry of level 0 is a block, which this level can't have"),
        ),
        (25, 0, 0x80000 | VALID | TABLE, Fault("data abort", None, "no memory holds the entry of level 2")),
        (
            25,
            1 << 39,
            0,
            Fault("data abort", 4, "the address is in neither half: bits 39 to 63 aren't all alike"),
        ),
        (25 | 1 << 7, 0, 0, Fault("data abort", 4, "TCR_EL1.EPD0 is set: there are no tables at TTBR0_EL1")),
        (
            45,
            0,
            0,
            Fault("data abort", 4, "TCR_EL1 gives the addresses of TTBR0_EL1 19 bits, which there can't be"),
        ),
    ],
)
def test_where_it_ends(memory: GuestMemory, tcr: int, gva: int, entry: int, fault: Fault) -> None:
    vcpu = FakeVcpu(memory, tcr=tcr)
    vcpu.put(ROOT, entry)
    paging = vcpu.paging(gva)
    assert (paging.result, paging.end, paging.fault("read")) == (None, fault.reason, fault)
    assert fault.reason in str(vcpu.walk(gva))


def test_a_tag_is_ignored(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, tcr=25 | 1 << 37)  # TBI0
    vcpu.put(ROOT, VALID | AF)
    assert vcpu.walk(0xAB << 56 | 0x123).gpa == 0x123
    assert vcpu.walk(1 << 50).gpa is None


def test_52_bits_with_64k(memory: GuestMemory) -> None:
    """Bits 48 to 51 of an address are bits 12 to 15 of an entry, and bits 2 to 5 of TTBR0_EL1."""
    vcpu = FakeVcpu(memory, tcr=22 | 1 << 14)
    vcpu.registers[TCR_EL1] = 22 | 1 << 14 | 6 << 32
    vcpu.registers[ID_AA64MMFR0_EL1] = 6
    vcpu.put(ROOT, VALID | AF | 0xA << 12 | 1 << 29)
    assert vcpu.walk(0x1234).gpa == 0xA << 48 | 1 << 29 | 0x1234
    vcpu.registers[TTBR0_EL1] |= 1 << 2
    paging = vcpu.paging(0)
    assert paging.steps[0].table == 1 << 48 | ROOT and paging.end == "no memory holds the entry of level 2"


def test_what_isn_t_followed_is_noted(memory: GuestMemory) -> None:
    vcpu = FakeVcpu(memory, tcr=25 | 1 << 59)
    vcpu.registers[TCR2_EL1] = 2
    notes = vcpu.paging(0).notes
    assert len(notes) == 2 and "LPA2" in notes[0] and "PIR_EL1" in notes[1]
