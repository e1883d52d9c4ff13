"""The local APIC, by messages to it and by its registers. (Intel SDM volume 3, chapter 11.)

What a guest sees of it - timers, EOI, IPIs - is tested by guests in `tests/kvm`.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.kvm import Vm
from kvmkit.kvm.soft.x86.lapic import (
    CURRENT_COUNT,
    DFR,
    ESR,
    FIXED,
    ID,
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
    TMR,
    TPR,
    VERSION,
    Lapic,
)
from kvmkit.uapi import x86 as x

if find_spec("kvmkit._engine") is None:
    pytest.skip("the native module kvmkit._engine isn't built", allow_module_level=True)

LOGICAL = 1 << 2  # of an MSI's address


@pytest.fixture
def vm() -> Iterator[Vm]:
    with kvmkit.kvm.open("soft") as system, system.create_vm() as vm:
        vm.create_irqchip()
        yield vm


@pytest.fixture
def apics(vm: Vm) -> list[Lapic]:
    """Three of them, enabled by software."""
    apics = [Lapic(vm.create_vcpu(id)) for id in range(3)]
    for apic in apics:
        apic[SVR] = 0x1FF
    return apics


def msi(vm: Vm, destination: int, vector: int, mode: int = FIXED, flags: int = 0) -> int:
    return vm.signal_msi(0xFEE00000 | destination << 12 | flags, mode << 8 | vector)


def taken(apics: list[Lapic]) -> list[list[int]]:
    return [apic.vectors(IRR) for apic in apics]


def test_state_after_reset(vm: Vm) -> None:
    boot, other = (Lapic(vm.create_vcpu(id)) for id in range(2))
    assert (boot[ID], other[ID]) == (0, 1 << 24)
    assert other[VERSION] & 0xFF == 0x14 and other[VERSION] >> 16 == 5
    assert (other[SVR], other[DFR], other[LDR]) == (0xFF, 0xFFFFFFFF, 0)
    assert [other[lvt] for lvt in range(LVT_TIMER, LVT_ERROR + 1, 16)] == [MASKED] * 6
    assert boot[LVT_LINT0] == 7 << 8  # ExtINT: nobody else would let the PIC through


def test_message_to_one(vm: Vm, apics: list[Lapic]) -> None:
    assert msi(vm, 1, 0x41) == 1
    assert taken(apics) == [[], [0x41], []]


def test_broadcast(vm: Vm, apics: list[Lapic]) -> None:
    assert msi(vm, 0xFF, 0x41) == 3
    assert taken(apics) == [[0x41]] * 3


def test_nobody_there(vm: Vm, apics: list[Lapic]) -> None:
    assert msi(vm, 9, 0x41) == 0
    assert taken(apics) == [[]] * 3


def test_apic_that_software_has_disabled_takes_no_fixed_message(vm: Vm, apics: list[Lapic]) -> None:
    apics[1][SVR] = 0xFF
    assert msi(vm, 1, 0x41) == 0
    assert msi(vm, 1, 0, mode=NMI) == 1
    assert taken(apics) == [[]] * 3


def test_flat_logical_destinations(vm: Vm, apics: list[Lapic]) -> None:
    for n, apic in enumerate(apics):
        apic[LDR] = 1 << n + 24
    assert msi(vm, 0b101, 0x41, flags=LOGICAL) == 2
    assert taken(apics) == [[0x41], [], [0x41]]


def test_cluster_logical_destinations(vm: Vm, apics: list[Lapic]) -> None:
    for apic, ldr in zip(apics, (0x11, 0x12, 0x21), strict=True):
        apic[DFR] = 0x0FFFFFFF
        apic[LDR] = ldr << 24
    assert msi(vm, 0x13, 0x41, flags=LOGICAL) == 2
    assert taken(apics) == [[0x41], [0x41], []]


def test_lowest_priority_goes_to_one_with_the_lowest_task_priority(vm: Vm, apics: list[Lapic]) -> None:
    for apic, tpr in zip(apics, (0x50, 0x20, 0x30), strict=True):
        apic[TPR] = tpr
    assert msi(vm, 0xFF, 0x61, mode=LOWEST) == 1
    assert taken(apics) == [[], [0x61], []]


def test_reserved_vector_is_an_error(vm: Vm, apics: list[Lapic]) -> None:
    msi(vm, 0, 15)
    assert taken(apics) == [[]] * 3 and apics[0][ESR] == 1 << 6  # receive illegal vector


def test_trigger_mode_is_kept(vm: Vm, apics: list[Lapic]) -> None:
    vm.signal_msi(0xFEE00000, 1 << 15 | 0x51)
    msi(vm, 0, 0x52)
    assert apics[0].vectors(TMR) == [0x51]


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"), [(0, 0, 0), (0x35, 0, 0x35), (0x35, 0x42, 0x40), (0x45, 0x42, 0x45)]
)
def test_processor_priority(apics: list[Lapic], tpr: int, in_service: int, ppr: int) -> None:
    apic = apics[0]
    apic[TPR] = tpr
    if in_service:
        apic[ISR + (in_service >> 5 << 4)] = 1 << (in_service & 31)
    assert apic[PPR] == ppr


def test_stopped_timer_reads_0(apics: list[Lapic]) -> None:
    assert apics[0][CURRENT_COUNT] == 0


def test_running_timer_counts_down_from_its_initial_count(apics: list[Lapic]) -> None:
    apics[0][INITIAL_COUNT] = 0xFFFFFFFF
    first = apics[0][CURRENT_COUNT]
    second = apics[0][CURRENT_COUNT]
    assert 0 < second < first <= 0xFFFFFFFF


def test_version_is_read_only(apics: list[Lapic]) -> None:
    before = apics[0][VERSION]
    apics[0][VERSION] = 0
    assert apics[0][VERSION] == before


def test_ioapic_pin_reaches_the_apic_of_its_entry(vm: Vm, apics: list[Lapic]) -> None:
    chip = vm.get_irqchip(x.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[5].bits = 2 << 56 | 0x71
    vm.set_irqchip(chip)
    vm.irq_line(5, 1)
    assert taken(apics) == [[], [], [0x71]]
