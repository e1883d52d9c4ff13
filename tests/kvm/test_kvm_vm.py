"""What a VM has beside memory and interrupts' delivery: the old PIT calls, line status, split chips, filters, para-virtual worlds."""

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from kvmkit.kvm import Kvm, irqchip_route, msi_route
from kvmkit.kvm.exits import HypervHcall, HypervSynic, Io, IoapicEoi, IrqWindowOpen, XenHcall
from kvmkit.testing import DATA, Guest
from kvmkit.uapi import memory_encryption as sev
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import KVM_CAP_SPLIT_IRQCHIP
from kvmkit.uapi.common import (
    KVM_CREATE_DEVICE_TEST,
    KVM_DEV_TYPE_VFIO,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)
from kvmkit.uapi.x86 import KVM_IRQCHIP_IOAPIC

LAPIC = 0xFEE00000
VECTOR = 0x31
READY, DELIVERED, DONE = 0x10, 0x11, 0x12


def refused(call: Callable[[], object], *numbers: int) -> None:
    """Assert that a call fails with one of these errnos."""
    with pytest.raises(OSError, match="KVM_") as error:
        call()
    assert error.value.errno in numbers


@pytest.mark.backs("KVM_CREATE_PIT", "KVM_GET_PIT", "KVM_SET_PIT")
def test_old_pit(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The calls of before KVM_CREATE_PIT2 see the same PIT."""
    needs("KVM_CAP_PIT")
    with Guest(kvm, "hlt", irqchip=True) as guest:
        guest.vm.create_pit()
        refused(guest.vm.create_pit, errno.EEXIST)
        refused(guest.vm.create_pit2, errno.EEXIST)
        state = guest.vm.get_pit()
        state.channels[2].count, state.channels[2].mode, state.channels[2].rw_mode = 0x4000, 3, 3
        guest.vm.set_pit(state)
        channel = guest.vm.get_pit2().channels[2]
        assert (channel.count, channel.mode, channel.rw_mode) == (0x4000, 3, 3)
        assert bytes(guest.vm.get_pit().channels[2])[:4] == bytes(channel)[:4]


@pytest.mark.backs("KVM_REINJECT_CONTROL")
def test_reinject_control(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_REINJECT_CONTROL")
    with Guest(kvm, "hlt", irqchip=True) as guest:
        refused(lambda: guest.vm.reinject_control(False), errno.ENXIO)
        guest.vm.create_pit2()
        guest.vm.reinject_control(False)
        guest.vm.reinject_control(True)


@pytest.mark.backs("KVM_IRQ_LINE_STATUS")
def test_irq_line_status(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Delivered to two chips that are unmasked, coalesced while one is pending, masked."""
    needs("KVM_CAP_IRQ_INJECT_STATUS")
    with Guest(kvm, "hlt", irqchip=True) as guest:
        vm = guest.vm
        vm.set_gsi_routing(
            [irqchip_route(4, x86.KVM_IRQCHIP_PIC_MASTER, 4), irqchip_route(5, KVM_IRQCHIP_IOAPIC, 5)]
        )
        pic = vm.get_irqchip(x86.KVM_IRQCHIP_PIC_MASTER)
        pic.chip.pic.imr = 0xFF
        vm.set_irqchip(pic)
        assert vm.irq_line_status(4, 1) < 0  # masked
        vm.irq_line_status(4, 0)
        pic = vm.get_irqchip(x86.KVM_IRQCHIP_PIC_MASTER)
        pic.chip.pic.imr, pic.chip.pic.irr, pic.chip.pic.last_irr = 0, 0, 0
        vm.set_irqchip(pic)
        assert vm.irq_line_status(4, 1) > 0
        vm.irq_line_status(4, 0)
        assert vm.irq_line_status(4, 1) == 0  # still pending
        assert vm.irq_line_status(5, 1) < 0  # a pin of the IOAPIC is masked after reset


@pytest.mark.parametrize("vcpus", [0, 1])
def test_irq_line_status_where_nobody_takes_it(kvm: Kvm, needs: Callable[[str], int], vcpus: int) -> None:
    """A message, and an unmasked pin of the IOAPIC: 0 with a local APIC that is off, -1 without any."""
    needs("KVM_CAP_IRQ_INJECT_STATUS")
    with ExitStack() as stack:
        vm = stack.enter_context(kvm.create_vm())
        vm.create_irqchip()
        for id in range(vcpus):
            stack.enter_context(vm.create_vcpu(id))
        vm.set_gsi_routing([msi_route(31, LAPIC, VECTOR), irqchip_route(5, KVM_IRQCHIP_IOAPIC, 5)])
        ioapic = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        ioapic.chip.ioapic.redirtbl[5].bits = VECTOR
        vm.set_irqchip(ioapic)
        nobody = 0 if vcpus else -1
        assert vm.irq_line_status(31, 1) == nobody
        assert vm.irq_line_status(31, 0) == -1, "a message has no other edge"
        assert vm.irq_line_status(5, 1) == nobody


@pytest.mark.backs("KVM_SET_NR_MMU_PAGES")
@pytest.mark.refuses("KVM_GET_NR_MMU_PAGES")
def test_mmu_pages(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The limit can be set; kernels no longer say what it is."""
    needs("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
    with Guest(kvm, "hlt") as guest:
        guest.vm.set_nr_mmu_pages(1000)
        refused(lambda: guest.vm.set_nr_mmu_pages(19), errno.EINVAL)
        refused(guest.vm.get_nr_mmu_pages, errno.ENOTTY)


@pytest.mark.backs("KVM_SET_PMU_EVENT_FILTER")
def test_pmu_event_filter(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_PMU_EVENT_FILTER")
    with Guest(kvm, "hlt") as guest:
        guest.vm.set_pmu_event_filter(x86.KVM_PMU_EVENT_ALLOW, [0xC0, 0x3C])
        guest.vm.set_pmu_event_filter(x86.KVM_PMU_EVENT_DENY, [])
        refused(lambda: guest.vm.set_pmu_event_filter(7, []), errno.EINVAL)
        refused(lambda: guest.vm.set_pmu_event_filter(0, [], flags=1 << 20), errno.EINVAL)
        refused(lambda: guest.vm.set_pmu_event_filter(0, [0] * 1000), errno.E2BIG)


@pytest.mark.backs("KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR")
def test_pages_for_real_mode(kvm: Kvm) -> None:
    """Room below 4 GiB that some processors need; the identity map's before the first vCPU."""
    with kvm.create_vm() as vm:
        vm.set_tss_addr(0xFFFBD000)
        refused(lambda: vm.set_tss_addr(0xFFFFE000), errno.EINVAL)
        vm.set_identity_map_addr(0xFFFBC000)
        with vm.create_vcpu(0):
            refused(lambda: vm.set_identity_map_addr(0xFFFBC000), errno.EINVAL)


@pytest.mark.backs("KVM_SET_BOOT_CPU_ID")
def test_boot_cpu(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The vCPU that runs without INIT and SIPI."""
    needs("KVM_CAP_SET_BOOT_CPU_ID")
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.set_boot_cpu_id(1)
        with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
            assert (first.get_mp_state(), second.get_mp_state()) == (
                KVM_MP_STATE_UNINITIALIZED,
                KVM_MP_STATE_RUNNABLE,
            )
            assert second.get_msrs([0x1B])[0x1B] & 1 << 8  # IA32_APIC_BASE.BSP
            assert not first.get_msrs([0x1B])[0x1B] & 1 << 8
            refused(lambda: vm.set_boot_cpu_id(0), errno.EBUSY)


@pytest.mark.backs("KVM_GET_MSR_FEATURE_INDEX_LIST", "KVM_GET_MSRS", "KVM_GET_EMULATED_CPUID")
def test_features_of_the_system(kvm: Kvm) -> None:
    """Every feature MSR that is listed can be read; what is emulated is a list of leaves."""
    indices = kvm.get_msr_feature_index_list()
    assert len(set(indices)) == len(indices)
    assert set(kvm.get_msrs(indices)) <= set(indices)
    assert kvm.get_msrs([0x12345678]) == {}
    assert all(entry.function < 1 << 32 for entry in kvm.get_emulated_cpuid())


SPLIT = f"""
    set_gate {VECTOR}, handler
    load_idt
    mov ebx, {LAPIC}
    mov dword ptr [rbx + 0xf0], 0x1ff
    sti
    out {READY}, al
idle:
    hlt
    jmp idle
handler:
    out {DELIVERED}, al
    mov ebx, {LAPIC}
    mov dword ptr [rbx + 0xb0], 0
    out {DONE}, al
    iretq
"""


def port(guest: Guest) -> int:
    """Run to the next OUT; its port."""
    exit_ = guest.run()
    assert isinstance(exit_, Io), exit_
    return exit_.port


@pytest.mark.backs("KVM_ENABLE_CAP", "KVM_SET_GSI_ROUTING", "KVM_SIGNAL_MSI", "KVM_IRQ_LINE")
def test_split_irqchip(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Local APICs alone are KVM's: messages arrive, the chips' state isn't there."""
    needs("KVM_CAP_SPLIT_IRQCHIP")
    with Guest(kvm, SPLIT, capabilities=[(KVM_CAP_SPLIT_IRQCHIP, 24)]) as guest:
        vm = guest.vm
        refused(vm.create_irqchip, errno.EEXIST)
        refused(lambda: vm.get_irqchip(KVM_IRQCHIP_IOAPIC), errno.ENXIO)
        refused(lambda: vm.set_gsi_routing([irqchip_route(4, KVM_IRQCHIP_IOAPIC, 4)]), errno.EINVAL)
        vm.set_gsi_routing([msi_route(30, LAPIC, VECTOR)])
        assert port(guest) == READY
        assert vm.signal_msi(LAPIC, VECTOR) == 1
        assert (port(guest), port(guest)) == (DELIVERED, DONE)
        vm.irq_line(30, 1)
        assert (port(guest), port(guest)) == (DELIVERED, DONE)
        guest.vcpu.interrupt(VECTOR)  # the 8259 of user space
        assert port(guest) == DELIVERED


def test_split_irqchip_and_masked_lint0(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The interrupt of user space's 8259 comes through LINT0: neither it nor a window for it, while that is masked."""
    needs("KVM_CAP_SPLIT_IRQCHIP")
    code = SPLIT.replace(
        "sti\n",
        f"mov dword ptr [rbx + 0x350], {1 << 16 | 0x700}\nsti\nout 0x20, al\nout 0x21, al\nmov dword ptr [rbx + 0x350], 0x700\n",
    )
    with Guest(kvm, code, capabilities=[(KVM_CAP_SPLIT_IRQCHIP, 24)]) as guest:
        assert port(guest) == 0x20
        run = guest.vcpu.kvm_run
        assert not run.ready_for_interrupt_injection
        run.request_interrupt_window = 1
        guest.vcpu.interrupt(VECTOR)
        refused(lambda: guest.vcpu.interrupt(VECTOR), errno.EEXIST)
        assert port(guest) == 0x21
        if (
            unmasked := port(guest)
        ) == READY:  # the kernel looks for it at its next occasion, such as this one
            guest.vcpu.set_regs(guest.vcpu.get_regs())
            unmasked = port(guest)
        assert unmasked == DELIVERED
        assert port(guest) == DONE  # in the handler, interrupts are off
        while (exit_ := guest.run()) != IrqWindowOpen():
            assert isinstance(exit_, Io)
        assert run.ready_for_interrupt_injection


def test_split_irqchip_tells_of_an_eoi(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The EOI of a level-triggered message of a route of the user space IOAPIC's exits."""
    needs("KVM_CAP_SPLIT_IRQCHIP")
    level = 1 << 15 | 1 << 14
    with Guest(kvm, SPLIT, capabilities=[(KVM_CAP_SPLIT_IRQCHIP, 24)]) as guest:
        guest.vm.set_gsi_routing([msi_route(5, LAPIC, level | VECTOR)])
        assert port(guest) == READY
        assert guest.vm.signal_msi(LAPIC, level | VECTOR) == 1
        assert port(guest) == DELIVERED
        if guest.engine == "linux" and not any(guest.vcpu.get_lapic().regs[0x100:0x180]):
            pytest.skip("linux: this KVM's local APIC ends an interrupt as it delivers it (kvm_pvm)")
        assert guest.run() == IoapicEoi(VECTOR)
        assert port(guest) == DONE


@pytest.mark.backs("KVM_CREATE_DEVICE", "KVM_HAS_DEVICE_ATTR")
@pytest.mark.refuses("KVM_SET_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR")
def test_vfio_device(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The one device of x86: groups of VFIO can be added to it; it has nothing to read."""
    needs("KVM_CAP_DEVICE_CTRL")
    with kvm.create_vm() as vm:
        refused(lambda: vm.create_device(99), errno.ENODEV)
        try:
            vm.create_device(KVM_DEV_TYPE_VFIO, KVM_CREATE_DEVICE_TEST).close()
        except OSError as error:
            assert error.errno == errno.ENODEV
            pytest.skip(f"{kvm.engine}: no VFIO device")
        with vm.create_device(KVM_DEV_TYPE_VFIO) as device:
            assert device.has_device_attr(1, 1) and not device.has_device_attr(1, 77)
            assert not device.has_device_attr(9, 1)
            fd = ctypes.c_int32(-1)
            refused(lambda: device.set_device_attr(1, 1, ctypes.addressof(fd)), errno.EBADF)
            refused(lambda: device.get_device_attr(1, 1, ctypes.addressof(fd)), errno.EPERM, errno.ENXIO)


@pytest.mark.backs("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR")
def test_system_attributes(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SYS_ATTRIBUTES")
    assert kvm.has_device_attr(x86.KVM_X86_GRP_SYSTEM, x86.KVM_X86_XCOMP_GUEST_SUPP)
    assert not kvm.has_device_attr(x86.KVM_X86_GRP_SYSTEM, 77)
    value = ctypes.c_uint64()
    kvm.get_device_attr(x86.KVM_X86_GRP_SYSTEM, x86.KVM_X86_XCOMP_GUEST_SUPP, ctypes.addressof(value))
    assert value.value & 3 == 3  # x87 and SSE


@pytest.mark.backs("KVM_GET_SUPPORTED_HV_CPUID")
def test_hyperv_cpuid(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SYS_HYPERV_CPUID")
    leaves = {entry.function: entry for entry in kvm.get_supported_hv_cpuid()}
    assert 0x40000000 in leaves and leaves[0x40000001].eax == int.from_bytes(b"Hv#1", "little")
    with Guest(kvm, "hlt", irqchip=True) as guest:
        assert {entry.function for entry in guest.vcpu.get_supported_hv_cpuid()} == set(leaves)


def offer_hyperv(kvm: Kvm, guest: Guest) -> None:
    """Give the guest Hyper-V's leaves."""
    leaves = [e for e in guest.vcpu.get_cpuid2() if e.function >> 28 != 4] + kvm.get_supported_hv_cpuid()
    guest.vcpu.set_cpuid2(leaves)


HYPERV_EVENT = f"""
    mov ecx, 0x40000000
    mov eax, 1
    xor edx, edx
    wrmsr
    mov ecx, 0x40000001
    mov eax, {DATA} | 1
    wrmsr
    mov ecx, 0x5d
    mov edx, 7
    xor r8d, r8d
    mov eax, {DATA}
    call rax
    out {READY}, al
    hlt
"""


@pytest.mark.backs("KVM_HYPERV_EVENTFD")
def test_hyperv_eventfd(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """HvSignalEvent of a connection signals its eventfd."""
    needs("KVM_CAP_HYPERV_EVENTFD")
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(kvm, HYPERV_EVENT.replace("mov ecx, 0x5d", "mov ecx, 0x1005d"), irqchip=True) as guest:
            offer_hyperv(kvm, guest)
            guest.vm.hyperv_eventfd(7, fd)
            refused(lambda: guest.vm.hyperv_eventfd(7, fd), errno.EEXIST)
            refused(lambda: guest.vm.hyperv_eventfd(1 << 24, fd), errno.EINVAL)
            assert port(guest) == READY
            assert guest.vcpu.get_regs().rax == 0  # HV_STATUS_SUCCESS
            assert os.eventfd_read(fd) == 1
            guest.vm.hyperv_eventfd(7, fd, x86.KVM_HYPERV_EVENTFD_DEASSIGN)
            refused(lambda: guest.vm.hyperv_eventfd(7, fd, x86.KVM_HYPERV_EVENTFD_DEASSIGN), errno.ENOENT)
    finally:
        os.close(fd)


def test_hyperv_exits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """A hypercall that user space handles, and the synthetic interrupt controller's registers."""
    from kvmkit.uapi.capabilities import KVM_CAP_HYPERV_SYNIC

    needs("KVM_CAP_HYPERV_SYNIC")
    code = HYPERV_EVENT.replace("mov ecx, 0x5d", "mov ecx, 0x1005d") + "\n"
    code = "mov ecx, 0x40000080\nmov eax, 1\nxor edx, edx\nwrmsr\n" + code
    with Guest(kvm, code, irqchip=True) as guest:
        guest.vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC)
        offer_hyperv(kvm, guest)
        exit_ = guest.run()
        assert isinstance(exit_, HypervSynic) and (exit_.msr, exit_.control) == (0x40000080, 1)
        exit_ = guest.run()  # nobody listens on connection 7
        assert isinstance(exit_, HypervHcall)
        assert (exit_.input & 0xFFFF, exit_.params[0]) == (0x5D, 7)
        guest.vcpu.kvm_run.exit.hyperv.u.hcall.result = 0x12
        assert port(guest) == READY
        assert guest.vcpu.get_regs().rax == 0x12


@pytest.mark.backs(
    "KVM_XEN_HVM_CONFIG", "KVM_XEN_HVM_GET_ATTR", "KVM_XEN_HVM_SET_ATTR", "KVM_XEN_HVM_EVTCHN_SEND"
)
def test_xen_vm(kvm: Kvm, needs: Callable[[str], int]) -> None:
    assert needs("KVM_CAP_XEN_HVM") & x86.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    with Guest(kvm, "hlt", irqchip=True) as guest:
        vm = guest.vm
        refused(lambda: vm.xen_hvm_config(x86.kvm_xen_hvm_config(flags=1 << 31)), errno.EINVAL)
        vm.xen_hvm_config(
            x86.kvm_xen_hvm_config(flags=x86.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=0x40000200)
        )
        attr = x86.kvm_xen_hvm_attr(type=x86.KVM_XEN_ATTR_TYPE_LONG_MODE)
        attr.u.long_mode = 1
        vm.xen_hvm_set_attr(attr)
        assert vm.xen_hvm_get_attr(x86.KVM_XEN_ATTR_TYPE_LONG_MODE).u.long_mode == 1
        attr = x86.kvm_xen_hvm_attr(type=x86.KVM_XEN_ATTR_TYPE_SHARED_INFO)
        attr.u.shared_info.gfn = DATA >> 12
        vm.xen_hvm_set_attr(attr)
        assert vm.xen_hvm_get_attr(x86.KVM_XEN_ATTR_TYPE_SHARED_INFO).u.shared_info.gfn == DATA >> 12
        vcpu = x86.kvm_xen_vcpu_attr(type=x86.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO)
        vcpu.u.gpa = DATA
        guest.vcpu.xen_vcpu_set_attr(vcpu)
        vm.xen_hvm_evtchn_send(5, 0)
        assert guest.memory.read(DATA + 0x800, 8) == (1 << 5).to_bytes(8, "little")  # evtchn_pending
        refused(lambda: vm.xen_hvm_evtchn_send(1 << 20, 0), errno.EINVAL)


@pytest.mark.backs("KVM_XEN_VCPU_GET_ATTR", "KVM_XEN_VCPU_SET_ATTR")
def test_xen_vcpu(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """A guest's hypercall exits, and the vCPU's number in Xen is its own."""
    assert needs("KVM_CAP_XEN_HVM") & x86.KVM_XEN_HVM_CONFIG_EVTCHN_SEND
    code = f"mov ecx, 0x40000200\nmov eax, {DATA}\nxor edx, edx\nwrmsr\nmov eax, {DATA}\nadd eax, 32 * 17\nmov edi, 6\ncall rax\nout {READY}, al\nhlt"
    with Guest(kvm, code, irqchip=True) as guest:
        guest.vm.xen_hvm_config(
            x86.kvm_xen_hvm_config(flags=x86.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr=0x40000200)
        )
        attr = x86.kvm_xen_vcpu_attr(type=x86.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID)
        attr.u.vcpu_id = 3
        guest.vcpu.xen_vcpu_set_attr(attr)
        assert guest.vcpu.xen_vcpu_get_attr(x86.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).u.vcpu_id == 3
        refused(lambda: guest.vcpu.xen_vcpu_get_attr(99), errno.ENOENT, errno.EINVAL)
        exit_ = guest.run()
        assert isinstance(exit_, XenHcall)
        assert (exit_.input, exit_.longmode, exit_.cpl, exit_.params[0]) == (17, True, 0, 6)
        guest.vcpu.kvm_run.exit.xen.u.hcall.result = 0x44
        assert port(guest) == READY
        assert guest.vcpu.get_regs().rax == 0x44


@pytest.mark.refuses(
    "KVM_MEMORY_ENCRYPT_OP", "KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_MEMORY_ENCRYPT_UNREG_REGION"
)
def test_memory_encryption_is_refused_without_hardware(kvm: Kvm) -> None:
    """No processor here has SEV or TDX: the calls say so, and nothing else happens."""
    if kvm.engine == "soft":
        pytest.skip("soft: no memory encryption")
    with Guest(kvm, "hlt") as guest:
        numbers = errno.ENOTTY, errno.EINVAL
        refused(lambda: guest.vm.memory_encrypt_op(None), *numbers)
        refused(lambda: guest.vm.memory_encrypt_op(sev.kvm_sev_cmd(id=sev.KVM_SEV_INIT2)), *numbers)
        refused(lambda: guest.vcpu.memory_encrypt_op(sev.kvm_tdx_cmd(id=sev.KVM_TDX_INIT_VCPU)), *numbers)
        refused(lambda: guest.vm.memory_encrypt_reg_region(guest.memory.address, 4096), *numbers)
        refused(lambda: guest.vm.memory_encrypt_unreg_region(guest.memory.address, 4096), *numbers)
