"""The local APIC, by messages to it and by its registers. (Intel SDM volume 3, chapter 11.)

What a guest sees of it - timers, EOI, IPIs - is tested by guests in `tests/kvm`.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.kvm import Vm
from kvmkit.kvm.soft.x86.lapic import (
    CURRENT_COUNT,
    DFR,
    DIVIDE,
    EOI,
    ESR,
    FIXED,
    ICR,
    ICR2,
    ID,
    INIT,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LOWEST,
    LVT_ERROR,
    LVT_LINT0,
    LVT_TIMER,
    MASKED,
    NMI,
    PPR,
    SVR,
    TIMER_PERIODIC,
    TIMER_TSC_DEADLINE,
    TMR,
    TPR,
    VERSION,
    Lapic,
)
from kvmkit.uapi import common as c
from kvmkit.uapi import x86 as x

if find_spec("kvmkit._engine") is None:
    pytest.skip("the native module kvmkit._engine isn't built", allow_module_level=True)

LOGICAL, HINT = 1 << 2, 1 << 3  # of an MSI's address
SELF_IPI = 0x3F0
APIC_BASE, TSC_DEADLINE, X2APIC_MSRS = 0x1B, 0x6E0, 0x800
BSP, X2APIC, ENABLE = 1 << 8, 1 << 10, 1 << 11


class X2Apic(Lapic):
    """A local APIC, also by its MSRs."""

    def read_msr(self, offset: int) -> int | None:
        """The register as x2APIC's MSR; None where that raises #GP."""
        index = X2APIC_MSRS + (offset >> 4)
        return self.vcpu.get_msrs([index]).get(index)

    def write_msr(self, offset: int, value: int) -> bool:
        """Whether x2APIC's MSR took the value."""
        return self.vcpu.set_msrs({X2APIC_MSRS + (offset >> 4): value}) == 1

    def to_x2apic(self) -> None:
        base = self.vcpu.get_msrs([APIC_BASE])[APIC_BASE]
        assert self.vcpu.set_msrs({APIC_BASE: base | X2APIC}) == 1


@pytest.fixture
def vm() -> Iterator[Vm]:
    with kvmkit.kvm.open("soft") as system, system.create_vm() as vm:
        vm.create_irqchip()
        yield vm


@pytest.fixture
def apics(vm: Vm) -> list[X2Apic]:
    """Three of them, enabled by software."""
    apics = [X2Apic(vm.create_vcpu(id)) for id in range(3)]
    for apic in apics:
        apic[SVR] = 0x1FF
    return apics


def msi(vm: Vm, destination: int, vector: int, mode: int = FIXED, flags: int = 0) -> int:
    return vm.signal_msi(0xFEE00000 | destination << 12 | flags, mode << 8 | vector)


def taken(apics: Sequence[Lapic]) -> list[list[int]]:
    return [apic.vectors(IRR) for apic in apics]


def test_state_after_reset(vm: Vm) -> None:
    boot, other = (Lapic(vm.create_vcpu(id)) for id in range(2))
    assert (boot[ID], other[ID]) == (0, 1 << 24)
    assert other[VERSION] & 0xFF == 0x14 and other[VERSION] >> 16 == 5
    assert (other[SVR], other[DFR], other[LDR]) == (0xFF, 0xFFFFFFFF, 0)
    assert [other[lvt] for lvt in range(LVT_TIMER, LVT_ERROR + 1, 16)] == [MASKED] * 6
    assert boot[LVT_LINT0] == 7 << 8  # ExtINT: nobody else would let the PIC through


def test_message_to_one(vm: Vm, apics: list[X2Apic]) -> None:
    assert msi(vm, 1, 0x41) == 1
    assert taken(apics) == [[], [0x41], []]


def test_broadcast(vm: Vm, apics: list[X2Apic]) -> None:
    assert msi(vm, 0xFF, 0x41) == 3
    assert taken(apics) == [[0x41]] * 3


def test_nobody_there(vm: Vm, apics: list[X2Apic]) -> None:
    assert msi(vm, 9, 0x41) == 0
    assert taken(apics) == [[]] * 3


def test_apic_that_software_has_disabled_takes_no_fixed_message(vm: Vm, apics: list[X2Apic]) -> None:
    apics[1][SVR] = 0xFF
    assert msi(vm, 1, 0x41) == 0
    assert msi(vm, 1, 0, mode=NMI) == 1
    assert taken(apics) == [[]] * 3


def test_flat_logical_destinations(vm: Vm, apics: list[X2Apic]) -> None:
    for n, apic in enumerate(apics):
        apic[LDR] = 1 << n + 24
    assert msi(vm, 0b101, 0x41, flags=LOGICAL) == 2
    assert taken(apics) == [[0x41], [], [0x41]]


def test_cluster_logical_destinations(vm: Vm, apics: list[X2Apic]) -> None:
    for apic, ldr in zip(apics, (0x11, 0x12, 0x21), strict=True):
        apic[DFR] = 0x0FFFFFFF
        apic[LDR] = ldr << 24
    assert msi(vm, 0x13, 0x41, flags=LOGICAL) == 2
    assert taken(apics) == [[0x41], [0x41], []]


def test_lowest_priority_goes_to_one_with_the_lowest_task_priority(vm: Vm, apics: list[X2Apic]) -> None:
    for apic, tpr in zip(apics, (0x50, 0x20, 0x30), strict=True):
        apic[TPR] = tpr
    assert msi(vm, 0xFF, 0x61, mode=LOWEST) == 1
    assert taken(apics) == [[], [0x61], []]


def test_reserved_vector_is_an_error(vm: Vm, apics: list[X2Apic]) -> None:
    msi(vm, 0, 15)
    assert taken(apics) == [[]] * 3 and apics[0][ESR] == 1 << 6  # receive illegal vector


def test_trigger_mode_is_kept(vm: Vm, apics: list[X2Apic]) -> None:
    vm.signal_msi(0xFEE00000, 1 << 15 | 0x51)
    msi(vm, 0, 0x52)
    assert apics[0].vectors(TMR) == [0x51]


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"), [(0, 0, 0), (0x35, 0, 0x35), (0x35, 0x42, 0x40), (0x45, 0x42, 0x45)]
)
def test_processor_priority(apics: list[X2Apic], tpr: int, in_service: int, ppr: int) -> None:
    apic = apics[0]
    apic[TPR] = tpr
    if in_service:
        apic[ISR + (in_service >> 5 << 4)] = 1 << (in_service & 31)
    assert apic[PPR] == ppr


def test_stopped_timer_reads_0(apics: list[X2Apic]) -> None:
    assert apics[0][CURRENT_COUNT] == 0


def test_running_timer_counts_down_from_its_initial_count(apics: list[X2Apic]) -> None:
    apics[0].update({INITIAL_COUNT: 0xFFFFFFFF, CURRENT_COUNT: 0xFFFFFFFF})
    first = apics[0][CURRENT_COUNT]
    second = apics[0][CURRENT_COUNT]
    assert 0 < second < first <= 0xFFFFFFFF


def test_version_is_read_only(apics: list[X2Apic]) -> None:
    before = apics[0][VERSION]
    apics[0][VERSION] = 0
    assert apics[0][VERSION] == before


def test_ioapic_pin_reaches_the_apic_of_its_entry(vm: Vm, apics: list[X2Apic]) -> None:
    chip = vm.get_irqchip(x.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[5].bits = 2 << 56 | 0x71
    vm.set_irqchip(chip)
    vm.irq_line(5, 1)
    assert taken(apics) == [[], [], [0x71]]


def test_redirection_hint_chooses_one(vm: Vm, apics: list[X2Apic]) -> None:
    for n, apic in enumerate(apics):
        apic.update({LDR: 1 << n + 24, TPR: 0x30 - 0x10 * n})
    assert msi(vm, 0b111, 0x51, flags=LOGICAL | HINT) == 1
    assert taken(apics) == [[], [], [0x51]]


def test_timer_goes_on_where_it_was(apics: list[X2Apic]) -> None:
    """KVM_SET_LAPIC takes up the current count."""
    apics[0].update({DIVIDE: 0xA, INITIAL_COUNT: 0xF0000000, CURRENT_COUNT: 0x10000000})
    assert 0 < apics[0][CURRENT_COUNT] <= 0x10000000
    assert apics[0][INITIAL_COUNT] == 0xF0000000


def test_periodic_timer_without_current_count_starts_a_period(apics: list[X2Apic]) -> None:
    apics[0].update(
        {DIVIDE: 0xA, LVT_TIMER: TIMER_PERIODIC | 0xEC, INITIAL_COUNT: 0xF0000000, CURRENT_COUNT: 0}
    )
    assert apics[0][CURRENT_COUNT] > 0xE0000000


def test_stopped_timer_stays_stopped_when_set(apics: list[X2Apic]) -> None:
    apics[0].update({INITIAL_COUNT: 0xFFFFFFFF, CURRENT_COUNT: 0xFFFFFFFF})
    apics[0].update({INITIAL_COUNT: 0, CURRENT_COUNT: 0})
    assert apics[0][CURRENT_COUNT] == 0


def test_tsc_deadline_belongs_to_its_mode(apics: list[X2Apic]) -> None:
    vcpu, far = apics[0].vcpu, 1 << 62
    vcpu.set_msrs({TSC_DEADLINE: far})
    assert vcpu.get_msrs([TSC_DEADLINE]) == {TSC_DEADLINE: 0}
    apics[0][LVT_TIMER] = TIMER_TSC_DEADLINE | 0xEC
    vcpu.set_msrs({TSC_DEADLINE: far})
    assert vcpu.get_msrs([TSC_DEADLINE]) == {TSC_DEADLINE: far}
    vcpu.set_msrs({TSC_DEADLINE: 0})
    assert vcpu.get_msrs([TSC_DEADLINE]) == {TSC_DEADLINE: 0}


# x2APIC.


def test_x2apic_registers_are_msrs(apics: list[X2Apic]) -> None:
    apic = apics[2]
    assert apic.read_msr(ID) is None and not apic.write_msr(TPR, 0x20)
    apic.to_x2apic()
    assert (apic.read_msr(ID), apic.read_msr(LDR)) == (2, 0b100)
    assert apic.write_msr(TPR, 0x20) and apic.read_msr(PPR) == 0x20
    assert apic.read_msr(DFR) is None and apic.read_msr(ICR2) is None
    assert not apic.write_msr(ID, 5) and not apic.write_msr(LDR, 5)


def test_x2apic_state_has_the_id_in_the_top_byte(apics: list[X2Apic]) -> None:
    """Both modes alike without KVM_CAP_X2APIC_API. (api.rst, KVM_GET_LAPIC)"""
    apics[2].to_x2apic()
    assert (apics[2][ID], apics[2][LDR]) == (2 << 24, 0b100)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(EOI, 1), (ESR, 1), (TPR, 1 << 32), (SELF_IPI, 0x100), (ICR, 1 << 13), (ICR, 1 << 20)],
    ids=["EOI", "ESR", "TPR", "self IPI", "ICR 13", "ICR 20"],
)
def test_x2apic_refuses_reserved_bits(apics: list[X2Apic], offset: int, value: int) -> None:
    apics[0].to_x2apic()
    assert not apics[0].write_msr(offset, value)
    assert apics[0].write_msr(offset, 0x31 if offset in (ICR, SELF_IPI) else 0)


def test_x2apic_self_ipi(apics: list[X2Apic]) -> None:
    apics[0].to_x2apic()
    apics[0].write_msr(SELF_IPI, 0x61)
    assert taken(apics) == [[0x61], [], []]


@pytest.mark.parametrize(
    ("shorthand", "destination", "receivers"),
    [(0, 1, [1]), (0, 0xFFFFFFFF, [0, 1, 2]), (1, 0, [0]), (2, 0, [0, 1, 2]), (3, 0, [1, 2]), (0, 9, [])],
    ids=["one", "broadcast", "self", "all", "others", "nobody"],
)
def test_x2apic_ipis(apics: list[X2Apic], shorthand: int, destination: int, receivers: list[int]) -> None:
    for apic in apics:
        apic.to_x2apic()
    assert apics[0].write_msr(ICR, destination << 32 | shorthand << 18 | 0x71)
    assert taken(apics) == [[0x71] if n in receivers else [] for n in range(3)]
    assert apics[0].read_msr(ICR) == destination << 32 | shorthand << 18 | 0x71


def test_x2apic_logical_destination_is_cluster_and_set(vm: Vm) -> None:
    apics = [X2Apic(vm.create_vcpu(id)) for id in (0, 1, 17)]
    for apic in apics:
        apic[SVR] = 0x1FF
        apic.to_x2apic()
    logical = 1 << 11
    apics[0].write_msr(ICR, 0x0001_0002 << 32 | logical | 0x71)  # cluster 1, its second: ID 17
    apics[0].write_msr(ICR, 0x0000_0003 << 32 | logical | 0x72)
    assert taken(apics) == [[0x72], [0x72], [0x71]]


def test_apic_base_refuses_x2apic_without_enable_and_unknown_bits(apics: list[X2Apic]) -> None:
    vcpu = apics[0].vcpu
    base = vcpu.get_msrs([APIC_BASE])[APIC_BASE]
    assert base == 0xFEE00000 | ENABLE | BSP
    for wrong in (base & ~ENABLE | X2APIC, base | 1, base | 1 << 60):
        assert vcpu.set_msrs({APIC_BASE: wrong}) == 0
    assert vcpu.get_msrs([APIC_BASE])[APIC_BASE] == base


def test_init_resets_all_but_the_id(vm: Vm, apics: list[X2Apic]) -> None:
    apics[2].update({TPR: 0x20, LVT_LINT0: 0x700, LDR: 1 << 24})
    msi(vm, 2, 0x41)
    assert msi(vm, 2, 0, mode=INIT) == 1
    assert apics[2].vcpu.get_mp_state() == c.KVM_MP_STATE_INIT_RECEIVED
    assert apics[2][ID] == 2 << 24
    assert (apics[2][TPR], apics[2][SVR], apics[2][LVT_LINT0]) == (0, 0xFF, MASKED)
    assert apics[2].vectors(IRR) == []
