"""All state of an x86 VM but its memory, taken from one VM and given to another, of the same engine or of the other.

Take it while no vCPU runs and no access of a guest's waits for an answer: after `Io` and `Mmio` run the vCPU once more with
`Vcpu.immediate_exit`, which completes the access and runs nothing (Documentation/virt/kvm/api.rst, "immediate_exit").
The order of the calls is one that KVM needs: CPUID says what registers there are, the local APIC's address is in the special
registers, the deadline of its timer is an MSR, and events come last, for other calls drop them.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kvmkit.kvm.contract import Vcpu, Vm
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import KVM_CAP_ADJUST_CLOCK, KVM_CAP_GET_TSC_KHZ, KVM_CAP_XSAVE2
from kvmkit.uapi.common import kvm_clock_data

_CHIPS = (x86.KVM_IRQCHIP_PIC_MASTER, x86.KVM_IRQCHIP_PIC_SLAVE, x86.KVM_IRQCHIP_IOAPIC)
_T = TypeVar("_T")
_XSTATE_BV = slice(512, 520)  # of an XSAVE area (Intel SDM vol. 1, 13.4.2)
_TSC, _TSC_DEADLINE = 0x10, 0x6E0


@dataclass(frozen=True)
class VcpuState:
    """A vCPU's."""

    cpuid: Sequence[x86.kvm_cpuid_entry2]
    tsc_khz: int
    """The TSC's frequency; 0 if the engine doesn't tell (KVM_CAP_GET_TSC_KHZ)."""
    mp_state: int
    regs: x86.kvm_regs
    sregs: x86.kvm_sregs
    xsave: bytes
    xcrs: x86.kvm_xcrs
    debugregs: x86.kvm_debugregs
    lapic: x86.kvm_lapic_state | None
    """None without interrupt chips."""
    msrs: dict[int, int]
    events: x86.kvm_vcpu_events


@dataclass(frozen=True)
class VmState:
    """What vCPUs share."""

    irqchips: Sequence[x86.kvm_irqchip]
    """Empty without interrupt chips."""
    pit: x86.kvm_pit_state2 | None
    clock: kvm_clock_data


def save_vcpu(vm: Vm, vcpu: Vcpu, msrs: Iterable[int]) -> VcpuState:
    """Take a vCPU's state, of `msrs` (see `Kvm.get_msr_index_list`) those that it has."""
    return VcpuState(
        cpuid=vcpu.get_cpuid2(),
        tsc_khz=vcpu.get_tsc_khz() if vm.check_extension(KVM_CAP_GET_TSC_KHZ) else 0,
        mp_state=vcpu.get_mp_state(),
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        xsave=vcpu.get_xsave2() if vm.check_extension(KVM_CAP_XSAVE2) else bytes(vcpu.get_xsave()),
        xcrs=vcpu.get_xcrs(),
        debugregs=vcpu.get_debugregs(),
        lapic=_or_none(vcpu.get_lapic),
        msrs=_get_msrs(vcpu, list(msrs)),
        events=vcpu.get_vcpu_events(),
    )


def load_vcpu(vcpu: Vcpu, state: VcpuState) -> set[int]:
    """Give a vCPU that has not run a state. Returns the MSRs that it refuses: those that the other engine alone has.

    EINVAL: its TSC has another frequency, and the processor can't scale it (KVM_CAP_TSC_CONTROL).
    """
    vcpu.set_cpuid2(state.cpuid)
    if state.tsc_khz and vcpu.get_tsc_khz() != state.tsc_khz:
        vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_regs(state.regs)
    vcpu.set_sregs(state.sregs)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(_usable_xsave(state))
    vcpu.set_debugregs(state.debugregs)
    if state.lapic is not None:
        vcpu.set_lapic(state.lapic)
    # The TSC before its deadline, which is past or to come by it.
    order = sorted(state.msrs, key=lambda index: (index == _TSC_DEADLINE, index != _TSC, index))
    refused = {index for index in order if vcpu.set_msrs({index: state.msrs[index]}) != 1}
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_vcpu_events(state.events)
    return refused


def save_vm(vm: Vm) -> VmState:
    """Take the state of a VM's chips and clock."""
    chips = [chip for chip_id in _CHIPS if (chip := _or_none(partial(vm.get_irqchip, chip_id)))]
    return VmState(chips, _or_none(vm.get_pit2), vm.get_clock())


def load_vm(vm: Vm, state: VmState) -> None:
    """Give a VM that has the same chips their state, once it has its vCPUs. The clock goes on from where it was."""
    for chip in state.irqchips:
        vm.set_irqchip(chip)
    if state.pit is not None:
        vm.set_pit2(state.pit)
    if vm.check_extension(KVM_CAP_ADJUST_CLOCK):
        vm.set_clock(kvm_clock_data(clock=state.clock.clock))


def _usable_xsave(state: VcpuState) -> bytes:
    """The XSAVE area without components that CPUID doesn't offer the guest: KVM marks the host's PKRU as in use."""
    offered = 3
    for entry in state.cpuid:
        if (entry.function, entry.index) == (0xD, 0):
            offered |= entry.edx << 32 | entry.eax
    in_use = int.from_bytes(state.xsave[_XSTATE_BV], "little") & offered
    return state.xsave[: _XSTATE_BV.start] + in_use.to_bytes(8, "little") + state.xsave[_XSTATE_BV.stop :]


def _get_msrs(vcpu: Vcpu, indices: list[int]) -> dict[int, int]:
    """Get MSRs; KVM_GET_MSRS stops before one that it doesn't have, which is passed over."""
    values: dict[int, int] = {}
    while indices:
        found = vcpu.get_msrs(indices)
        values |= found
        indices = indices[len(found) + 1 :]
    return values


def _or_none(get: Callable[[], _T]) -> _T | None:
    """What isn't there, since the VM has no such chip, is None."""
    try:
        return get()
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EINVAL):
            raise
        return None
