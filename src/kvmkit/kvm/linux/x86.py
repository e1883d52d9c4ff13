"""The x86 part of the kernel's KVM (``arch/x86/kvm``)."""

import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence

from kvmkit.kvm.linux import main
from kvmkit.kvm.linux.main import Fd, Flexible
from kvmkit.uapi import arm64, common
from kvmkit.uapi import common as c
from kvmkit.uapi import memory_encryption as sev
from kvmkit.uapi import x86 as x
from kvmkit.uapi.capabilities import KVM_CAP_XSAVE2
from kvmkit.uapi.errors import ioctl_error

_UNTOUCHED = b"\xff" * ctypes.sizeof(x.kvm_cpuid_entry2)


class _Tables(Fd):
    """CPUID and MSR tables, which the system and vCPUs share."""

    def _cpuid(self, request: int) -> list[x.kvm_cpuid_entry2]:
        count = 64
        while True:
            table = Flexible(x.kvm_cpuid2, x.kvm_cpuid_entry2, count)
            if request == x.KVM_GET_CPUID2:
                # Older kernels (6.1) leave `nent` as it was: what they didn't fill in is known by this pattern. (Others of
                # these ioctls want zeros.)
                ctypes.memset(table.entries, 0xFF, ctypes.sizeof(table.entries))
            table.head.nent = count
            try:
                self._ioctl(request, table.buffer)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                count *= 2
            else:
                return [entry for entry in table.entries[: table.head.nent] if bytes(entry) != _UNTOUCHED]

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS."""
        wanted = list(indices)
        table = Flexible(x.kvm_msrs, x.kvm_msr_entry, len(wanted))
        table.head.nmsrs = len(wanted)
        for entry, index in zip(table.entries, wanted, strict=True):
            entry.index = index
        count = self._ioctl(x.KVM_GET_MSRS, table.buffer)
        return {entry.index: entry.data for entry in table.entries[:count]}


class Kvm(_Tables, main.Kvm):
    """``/dev/kvm`` on x86."""

    def __init__(self, path: str) -> None:
        """Open `path`."""
        self.vm_class = Vm
        super().__init__(path)

    def get_supported_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        return self._cpuid(x.KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID."""
        return self._cpuid(x.KVM_GET_EMULATED_CPUID)

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST."""
        return self._msr_list(x.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""
        return self._msr_list(x.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def get_supported_hv_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID."""
        return self._cpuid(x.KVM_GET_SUPPORTED_HV_CPUID)

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        value = ctypes.c_uint64()
        self._ioctl(x.KVM_X86_GET_MCE_CAP_SUPPORTED, value)
        return value.value

    def _msr_list(self, request: int) -> list[int]:
        count = 0
        while True:
            table = Flexible(x.kvm_msr_list, ctypes.c_uint32, count)
            table.head.nmsrs = count
            try:
                self._ioctl(request, table.buffer)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                count = table.head.nmsrs  # the kernel says how many there are
            else:
                return list(table.entries[: table.head.nmsrs])


class Vm(main.Vm):
    """A virtual machine on x86."""

    def __init__(self, fd: int, mmap_size_bytes: int) -> None:
        """Take over `fd`."""
        super().__init__(fd, mmap_size_bytes)
        self.vcpu_class = Vcpu

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR."""
        self._ioctl(x.KVM_SET_TSS_ADDR, addr)

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR."""
        self._ioctl(x.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(addr))

    def get_irqchip(self, chip_id: int) -> x.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        chip = x.kvm_irqchip(chip_id=chip_id)
        self._ioctl(x.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: x.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self._ioctl(x.KVM_SET_IRQCHIP, chip)

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES."""
        self._ioctl(x.KVM_SET_NR_MMU_PAGES, pages)

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES."""
        return self._ioctl(x.KVM_GET_NR_MMU_PAGES)

    def create_pit(self) -> None:
        """KVM_CREATE_PIT."""
        self._ioctl(x.KVM_CREATE_PIT)

    def get_pit(self) -> x.kvm_pit_state:
        """KVM_GET_PIT."""
        return self._get(x.KVM_GET_PIT, x.kvm_pit_state)

    def set_pit(self, state: x.kvm_pit_state) -> None:
        """KVM_SET_PIT."""
        self._ioctl(x.KVM_SET_PIT, state)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2."""
        self._ioctl(x.KVM_CREATE_PIT2, x.kvm_pit_config(flags=flags))

    def get_pit2(self) -> x.kvm_pit_state2:
        """KVM_GET_PIT2."""
        return self._get(x.KVM_GET_PIT2, x.kvm_pit_state2)

    def set_pit2(self, state: x.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        self._ioctl(x.KVM_SET_PIT2, state)

    def reinject_control(self, pit_reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        self._ioctl(x.KVM_REINJECT_CONTROL, x.kvm_reinject_control(pit_reinject=pit_reinject))

    def get_clock(self) -> common.kvm_clock_data:
        """KVM_GET_CLOCK."""
        return self._get(x.KVM_GET_CLOCK, c.kvm_clock_data)

    def set_clock(self, data: common.kvm_clock_data) -> None:
        """KVM_SET_CLOCK."""
        self._ioctl(x.KVM_SET_CLOCK, data)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        self._ioctl(x.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self._ioctl(x.KVM_GET_TSC_KHZ)

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID."""
        self._ioctl(x.KVM_SET_BOOT_CPU_ID, id)

    def x86_set_msr_filter(self, filter: x.kvm_msr_filter) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        self._ioctl(x.KVM_X86_SET_MSR_FILTER, filter)

    def set_pmu_event_filter(
        self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER."""
        table = Flexible(x.kvm_pmu_event_filter, ctypes.c_uint64, len(events))
        head = table.head
        head.action, head.nevents = action, len(events)
        head.fixed_counter_bitmap, head.flags = fixed_counter_bitmap, flags
        table.entries[:] = events
        self._ioctl(x.KVM_SET_PMU_EVENT_FILTER, table.buffer)

    def memory_encrypt_op(self, command: sev.kvm_sev_cmd | sev.kvm_tdx_cmd | None) -> None:
        """KVM_MEMORY_ENCRYPT_OP."""
        self._ioctl(c.KVM_MEMORY_ENCRYPT_OP, 0 if command is None else command)

    def memory_encrypt_reg_region(self, addr: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION."""
        self._ioctl(c.KVM_MEMORY_ENCRYPT_REG_REGION, c.kvm_enc_region(addr, size))

    def memory_encrypt_unreg_region(self, addr: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
        self._ioctl(c.KVM_MEMORY_ENCRYPT_UNREG_REGION, c.kvm_enc_region(addr, size))

    def hyperv_eventfd(self, conn_id: int, fd: int, flags: int = 0) -> None:
        """KVM_HYPERV_EVENTFD."""
        self._ioctl(x.KVM_HYPERV_EVENTFD, x.kvm_hyperv_eventfd(conn_id, fd, flags))

    def xen_hvm_config(self, config: x.kvm_xen_hvm_config) -> None:
        """KVM_XEN_HVM_CONFIG."""
        self._ioctl(x.KVM_XEN_HVM_CONFIG, config)

    def xen_hvm_get_attr(self, type: int) -> x.kvm_xen_hvm_attr:
        """KVM_XEN_HVM_GET_ATTR."""
        attr = x.kvm_xen_hvm_attr(type=type)
        self._ioctl(x.KVM_XEN_HVM_GET_ATTR, attr)
        return attr

    def xen_hvm_set_attr(self, attr: x.kvm_xen_hvm_attr) -> None:
        """KVM_XEN_HVM_SET_ATTR."""
        self._ioctl(x.KVM_XEN_HVM_SET_ATTR, attr)

    def xen_hvm_evtchn_send(
        self, port: int, vcpu: int, priority: int = c.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
    ) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND."""
        self._ioctl(x.KVM_XEN_HVM_EVTCHN_SEND, c.kvm_irq_routing_xen_evtchn(port, vcpu, priority))


class Vcpu(_Tables, main.Vcpu):
    """A virtual processor on x86."""

    run_class = x.kvm_run
    coalesced_mmio_page = x.KVM_COALESCED_MMIO_PAGE_OFFSET

    def __init__(self, vm: main.Vm, fd: int, id: int) -> None:
        """Take over `fd`; without KVM_GET_XSAVE2 its XSAVE area has the size that KVM_GET_XSAVE gives."""
        super().__init__(vm, fd, id)
        self._xsave_size_bytes = vm.check_extension(KVM_CAP_XSAVE2) or ctypes.sizeof(x.kvm_xsave)

    def get_regs(self) -> x.kvm_regs:
        """KVM_GET_REGS."""
        return self._get(x.KVM_GET_REGS, x.kvm_regs)

    def set_regs(self, regs: x.kvm_regs) -> None:
        """KVM_SET_REGS."""
        self._ioctl(x.KVM_SET_REGS, regs)

    def get_sregs(self) -> x.kvm_sregs:
        """KVM_GET_SREGS."""
        return self._get(x.KVM_GET_SREGS, x.kvm_sregs)

    def set_sregs(self, sregs: x.kvm_sregs) -> None:
        """KVM_SET_SREGS."""
        self._ioctl(x.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> x.kvm_sregs2:
        """KVM_GET_SREGS2."""
        return self._get(x.KVM_GET_SREGS2, x.kvm_sregs2)

    def set_sregs2(self, sregs: x.kvm_sregs2) -> None:
        """KVM_SET_SREGS2."""
        self._ioctl(x.KVM_SET_SREGS2, sregs)

    def get_fpu(self) -> x.kvm_fpu:
        """KVM_GET_FPU."""
        return self._get(x.KVM_GET_FPU, x.kvm_fpu)

    def set_fpu(self, fpu: x.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._ioctl(x.KVM_SET_FPU, fpu)

    def get_xsave(self) -> x.kvm_xsave:
        """KVM_GET_XSAVE."""
        return self._get(x.KVM_GET_XSAVE, x.kvm_xsave)

    def get_xsave2(self) -> bytes:
        """KVM_GET_XSAVE2."""
        buffer = ctypes.create_string_buffer(self._xsave_size_bytes)
        self._ioctl(x.KVM_GET_XSAVE2, buffer)
        return buffer.raw

    def set_xsave(self, xsave: x.kvm_xsave | bytes) -> None:
        """KVM_SET_XSAVE."""
        data = bytes(xsave)
        # The kernel reads the whole area whatever the caller gives.
        self._ioctl(x.KVM_SET_XSAVE, _at_least(data, self._xsave_size_bytes))

    def get_xcrs(self) -> x.kvm_xcrs:
        """KVM_GET_XCRS."""
        return self._get(x.KVM_GET_XCRS, x.kvm_xcrs)

    def set_xcrs(self, xcrs: x.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        self._ioctl(x.KVM_SET_XCRS, xcrs)

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS."""
        table = Flexible(x.kvm_msrs, x.kvm_msr_entry, len(values))
        table.head.nmsrs = len(values)
        for entry, (index, data) in zip(table.entries, values.items(), strict=True):
            entry.index, entry.data = index, data
        return self._ioctl(x.KVM_SET_MSRS, table.buffer)

    def get_cpuid2(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        return self._cpuid(x.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Sequence[x.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2."""
        table = Flexible(x.kvm_cpuid2, x.kvm_cpuid_entry2, len(entries))
        table.head.nent = len(entries)
        table.entries[:] = entries
        self._ioctl(x.KVM_SET_CPUID2, table.buffer)

    def set_cpuid(self, entries: Sequence[x.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID."""
        table = Flexible(x.kvm_cpuid, x.kvm_cpuid_entry, len(entries))
        table.head.nent = len(entries)
        table.entries[:] = entries
        self._ioctl(x.KVM_SET_CPUID, table.buffer)

    def get_supported_hv_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID."""
        return self._cpuid(x.KVM_GET_SUPPORTED_HV_CPUID)

    def get_lapic(self) -> x.kvm_lapic_state:
        """KVM_GET_LAPIC."""
        return self._get(x.KVM_GET_LAPIC, x.kvm_lapic_state)

    def set_lapic(self, lapic: x.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""
        self._ioctl(x.KVM_SET_LAPIC, lapic)

    def get_vcpu_events(self) -> x.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        return self._get(x.KVM_GET_VCPU_EVENTS, x.kvm_vcpu_events)

    def set_vcpu_events(self, events: x.kvm_vcpu_events | arm64.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._ioctl(x.KVM_SET_VCPU_EVENTS, events)

    def get_debugregs(self) -> x.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        return self._get(x.KVM_GET_DEBUGREGS, x.kvm_debugregs)

    def set_debugregs(self, debugregs: x.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._ioctl(x.KVM_SET_DEBUGREGS, debugregs)

    def set_guest_debug(self, debug: x.kvm_guest_debug | arm64.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        self._ioctl(x.KVM_SET_GUEST_DEBUG, debug)

    def translate(self, linear_address: int) -> common.kvm_translation:
        """KVM_TRANSLATE."""
        translation = c.kvm_translation(linear_address=linear_address)
        self._ioctl(c.KVM_TRANSLATE, translation)
        return translation

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT."""
        self._ioctl(c.KVM_INTERRUPT, c.kvm_interrupt(irq))

    def nmi(self) -> None:
        """KVM_NMI."""
        self._ioctl(x.KVM_NMI)

    def smi(self) -> None:
        """KVM_SMI."""
        self._ioctl(x.KVM_SMI)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        self._ioctl(x.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self._ioctl(x.KVM_GET_TSC_KHZ)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL."""
        self._ioctl(x.KVM_KVMCLOCK_CTRL)

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING."""
        self._ioctl(x.KVM_TPR_ACCESS_REPORTING, x.kvm_tpr_access_ctl(enabled=enabled))

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR."""
        self._ioctl(x.KVM_SET_VAPIC_ADDR, x.kvm_vapic_addr(vapic_addr))

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE."""
        self._ioctl(x.KVM_X86_SETUP_MCE, ctypes.c_uint64(mcg_cap))

    def x86_set_mce(self, mce: x.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE."""
        self._ioctl(x.KVM_X86_SET_MCE, mce)

    def get_nested_state(self) -> bytes:
        """KVM_GET_NESTED_STATE."""
        size_bytes = ctypes.sizeof(x.kvm_nested_state)
        while True:
            buffer = ctypes.create_string_buffer(size_bytes)
            head = x.kvm_nested_state.from_buffer(buffer)
            head.size = size_bytes
            try:
                self._ioctl(x.KVM_GET_NESTED_STATE, buffer)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                size_bytes = head.size  # the kernel says how much there is
            else:
                return buffer.raw[: head.size]

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE."""
        buffer = _at_least(state, ctypes.sizeof(x.kvm_nested_state))
        size_bytes = x.kvm_nested_state.from_buffer(buffer).size
        if size_bytes > len(buffer):  # the kernel believes it
            raise ioctl_error(
                "KVM_SET_NESTED_STATE", errno.EINVAL, f"size {size_bytes} of {len(state)} bytes"
            )
        self._ioctl(x.KVM_SET_NESTED_STATE, buffer)

    def xen_vcpu_get_attr(self, type: int) -> x.kvm_xen_vcpu_attr:
        """KVM_XEN_VCPU_GET_ATTR."""
        attr = x.kvm_xen_vcpu_attr(type=type)
        self._ioctl(x.KVM_XEN_VCPU_GET_ATTR, attr)
        return attr

    def xen_vcpu_set_attr(self, attr: x.kvm_xen_vcpu_attr) -> None:
        """KVM_XEN_VCPU_SET_ATTR."""
        self._ioctl(x.KVM_XEN_VCPU_SET_ATTR, attr)

    def memory_encrypt_op(self, command: sev.kvm_tdx_cmd) -> None:
        """KVM_MEMORY_ENCRYPT_OP."""
        self._ioctl(c.KVM_MEMORY_ENCRYPT_OP, command)

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> int:
        """KVM_PRE_FAULT_MEMORY."""
        request = c.kvm_pre_fault_memory(gpa, size, flags)
        self._ioctl(c.KVM_PRE_FAULT_MEMORY, request)
        return int(request.size)


def _at_least(data: bytes, size_bytes: int) -> "ctypes.Array[ctypes.c_char]":
    """Copy `data` to a buffer of `size_bytes` or more: what the kernel reads whatever the caller gives."""
    return ctypes.create_string_buffer(data, max(len(data), size_bytes))
