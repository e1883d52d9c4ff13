"""`Vcpu.walk` on arm64, beside what the processor's own walk comes to: the guest asks it, by the instruction AT."""

import os
from collections.abc import Iterator
from random import Random

import pytest

import kvmkit.kvm
from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Mmio
from kvmkit.kvm.walk import AccessKind
from kvmkit.kvm.walk_arm64 import (
    ID_AA64MMFR0_EL1,
    MAIR_EL1,
    SCTLR_EL1,
    TCR_EL1,
    TTBR0_EL1,
    TTBR1_EL1,
)
from kvmkit.uapi.arm64 import x_reg

from .arm64_guest import CODE, ISB, MEMORY, MEMORY_BYTES, UART, Arm64Guest, mov, mrs, msr

LOWER_TABLE = MEMORY + 0x10000
TABLES = tuple(range(MEMORY + 0x20000, MEMORY + 0x80000, 0x10000))
TLBI_VMALLE1, DSB_SY, STR_X2_X1 = msr(1, 0, 8, 7, 0, 31), 0xD5033F9F, 0xF9000022
ACCESSES: tuple[tuple[bool, AccessKind], ...] = (
    (False, "read"),
    (False, "write"),
    (True, "read"),
    (True, "write"),
)
"""What AT S1E1R, S1E1W, S1E0R and S1E0W stand for."""
VALID, TABLE, AF = 1 << 0, 1 << 1, 1 << 10
GRANULES = {"4K": (12, 2, 28), "16K": (14, 1, 20), "64K": (16, 3, 24)}
"""Granule → its bits, its TCR_EL1.TG1, where ID_AA64MMFR0_EL1 says whether the processor has it."""
CASES = 150
PA_BITS = (32, 36, 40, 42, 44, 48)


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """``/dev/kvm`` of an arm64 machine."""
    if os.uname().machine != "aarch64":
        pytest.skip("not an arm64 machine")
    with kvmkit.kvm.open("linux") as system:
        yield system


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Arm64Guest]:
    """It has four kinds of access tried for the address in x0 and tells of each what PAR_EL1 says, again and again.

    Its own 2 GiB are mapped to themselves in the lower half; the upper half is for the tests.
    """
    code = [*mov(1, UART)]
    start = len(code)
    code += [DSB_SY, TLBI_VMALLE1, DSB_SY, ISB]
    for op2 in range(4):
        code += [msr(1, 0, 7, 8, op2, 0), ISB, mrs(3, 0, 7, 4, 0, 2), STR_X2_X1]
    code.append(0x14000000 | start - len(code) & 0x3FFFFFF)  # b start
    with Arm64Guest(kvm, code) as guest:
        device, normal = 1 << 2, 0
        write(guest, LOWER_TABLE, VALID | AF | device)
        write(guest, LOWER_TABLE + 8, MEMORY | VALID | AF | normal)
        yield guest


def write(guest: Arm64Guest, gpa: int, value: int) -> None:
    guest.memory.write(gpa - MEMORY, value.to_bytes(8, "little"))


def random_entry(random: Random, level: int) -> int:
    """A table's, more often than not; else a page's, or none. No table lies outside memory, which would be an abort."""
    low = random.getrandbits(10) << 2
    page = random.getrandbits(15) << 16 | low | VALID | (TABLE if level == 3 else 0)
    match random.choices(["table", "page", "page without AF", "any"], [8, 2, 1, 1])[0]:
        case "table":
            return random.choice(TABLES[1:]) | low | VALID | TABLE | random.getrandbits(4) << 59
        case "page":
            return page | AF | random.choice([0, 1 << 51, 1 << 54])
        case "page without AF":
            return page & ~AF
        case _:
            return random.getrandbits(12) & ~TABLE


@pytest.mark.parametrize("granule", GRANULES)
def test_random_tables(guest: Arm64Guest, granule: str) -> None:
    granule_bits, tg1, position = GRANULES[granule]
    vcpu = guest.vcpu
    features = vcpu.get_one_reg(ID_AA64MMFR0_EL1)
    if (features >> position & 15) == (0 if granule == "16K" else 15):
        pytest.skip(f"this processor has no granule of {granule}")
    vcpu.set_one_reg(MAIR_EL1, 0x00FF)
    vcpu.set_one_reg(TTBR0_EL1, LOWER_TABLE)
    vcpu.set_one_reg(TTBR1_EL1, TABLES[0])
    outcomes: set[str] = set()

    for seed in range(CASES):
        random = Random(seed)
        t1sz, ips = random.randint(16, 39), random.choice([0, 1, 3, 5])
        tbi1, hpd1, epd1 = random.getrandbits(1) << 38, random.getrandbits(1) << 42, (seed % 16 == 0) << 23
        tcr = 25 | t1sz << 16 | tg1 << 30 | ips << 32 | tbi1 | hpd1 | epd1
        pa_bits = min(PA_BITS[ips], PA_BITS[min(features & 15, 5)])
        wrong = random.choice([0, 0, 0, 0, 1 << 57, 1 << 50])
        gva = ((1 << 64) - (1 << 64 - t1sz) | random.getrandbits(64 - t1sz)) ^ wrong
        vcpu.set_one_reg(TCR_EL1, tcr)
        vcpu.set_one_reg(SCTLR_EL1, vcpu.get_one_reg(SCTLR_EL1) | 1)
        guest.memory.write(TABLES[0] - MEMORY, bytes(TABLES[-1] - TABLES[0] + 0x10000))
        stride, table = granule_bits - 3, TABLES[0]
        first = 4 - -(-(64 - t1sz - granule_bits) // stride)
        for level in range(first, 4):
            entry = random_entry(random, level)
            if random.randrange(10) == 0 and pa_bits < 48:
                entry |= 1 << pa_bits
            shift = granule_bits + stride * (3 - level)
            top = min(64 - t1sz, shift + stride)
            if table in TABLES:
                write(guest, table + (gva >> shift & (1 << top - shift) - 1) * 8, entry)
            table = entry & 0xFFFFFFFF0000
        before = guest.memory.read(0, MEMORY_BYTES)
        walk = vcpu.walk(gva)
        assert guest.memory.read(0, MEMORY_BYTES) == before
        paging = walk.paging
        assert paging is not None and all(step.entry is not None for step in paging.steps), str(walk)
        if "is a block" in (paging.end or ""):
            continue  # QEMU 7.2, the bed's, takes blocks at any level
        vcpu.set_one_reg(x_reg(0), gva)
        for user, kind in ACCESSES:
            exit_ = vcpu.run()
            assert isinstance(exit_, Mmio) and exit_.phys_addr == UART
            par = int.from_bytes(exit_.data, "little")
            fault = paging.fault(kind, user=user)
            if par & 1:
                assert fault is not None and par >> 1 & 0x3F == fault.error_code, (
                    hex(par),
                    user,
                    kind,
                    str(walk),
                )
                outcomes.add(f"{par >> 1 & 0x3C:#x}")
            else:
                assert fault is None and walk.gpa is not None, (hex(par), user, kind, str(walk))
                assert par >> 12 & 0xFFFFFFFFF == walk.gpa >> 12, (hex(par), str(walk))
                outcomes.add("ok")

    assert outcomes >= {"ok", "0x0", "0x4", "0x8", "0xc"}, outcomes
    assert vcpu.walk(CODE + 8).gpa == CODE + 8
