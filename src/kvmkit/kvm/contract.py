"""The contract: one class for each kind of KVM file descriptor, one method for each ioctl.

A method bears the ioctl's name in lower case without ``KVM_``. It takes the fields of a small struct as arguments and whole
structs where they are large; it returns what the kernel fills in. A failing call raises `OSError` with the errno that
``Documentation/virt/kvm/api.rst`` gives and a message that names the ioctl. What an engine or an architecture doesn't offer
raises ENOTTY, as an ioctl does that a descriptor doesn't know: that is what the methods here do, and engines override those
that they have. Ask `check_extension` first.

Threads: a vCPU's methods belong to one thread at a time, but for `kick`, `immediate_exit` and the VM methods that raise interrupts,
which any thread may call. `Vcpu.run` lets other Python threads run.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvmkit.kvm.exits import Exit
from kvmkit.kvm.memory import MemorySlot
from kvmkit.uapi import arm64, common, x86
from kvmkit.uapi import memory_encryption as sev
from kvmkit.uapi.errors import ioctl_error, not_supported

if TYPE_CHECKING:
    from kvmkit.kvm.walk import Walk


class Descriptor(ABC):
    """What stands for a KVM file descriptor: closed by `close` or at the end of a ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Release it. Closing twice does nothing; any other call on a closed one raises EBADF."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether `close` was called."""

    def _refusal(self, name: str) -> OSError:
        """What an ioctl raises that isn't offered here: ENOTTY, or EBADF once closed."""
        return ioctl_error(name, errno.EBADF) if self.closed else not_supported(name)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class Kvm(Descriptor):
    """The KVM subsystem: what ``open("/dev/kvm")`` gives."""

    engine: str
    """Which engine this is: "linux" or "soft"."""

    @abstractmethod
    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""

    @abstractmethod
    def create_vm(self, type: int = 0) -> "Vm":
        """KVM_CREATE_VM: a new VM without memory or vCPUs. `type` is machine-specific, 0 the default."""

    @abstractmethod
    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if capability `cap` (KVM_CAP_*) is absent, else 1 or a number that the capability defines."""

    @abstractmethod
    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's mapping."""

    def get_supported_cpuid(self) -> list[x86.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID (x86): what both the host and the engine support."""
        raise self._refusal("KVM_GET_SUPPORTED_CPUID")

    def get_emulated_cpuid(self) -> list[x86.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID (x86): what the engine emulates though the host lacks it."""
        raise self._refusal("KVM_GET_EMULATED_CPUID")

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST (x86): the MSRs that make up a guest's state."""
        raise self._refusal("KVM_GET_MSR_INDEX_LIST")

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (x86): the MSRs that describe features; read them with `get_msrs`."""
        raise self._refusal("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (x86, system): values of feature MSRs. See `Vcpu.get_msrs`."""
        raise self._refusal("KVM_GET_MSRS")

    def get_supported_hv_cpuid(self) -> list[x86.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID (x86, KVM_CAP_SYS_HYPERV_CPUID): the Hyper-V leaves that can be offered."""
        raise self._refusal("KVM_GET_SUPPORTED_HV_CPUID")

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED (x86): the MCG_CAP bits that `Vcpu.x86_setup_mce` may use."""
        raise self._refusal("KVM_X86_GET_MCE_CAP_SUPPORTED")

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR on the system (x86, KVM_CAP_SYS_ATTRIBUTES): the value is stored at `addr`."""
        raise self._refusal("KVM_GET_DEVICE_ATTR")

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the system (x86): whether the attribute exists."""
        raise self._refusal("KVM_HAS_DEVICE_ATTR")


class Vm(Descriptor):
    """A virtual machine."""

    @abstractmethod
    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION for this VM: may answer less than `Kvm.check_extension`."""

    @abstractmethod
    def create_vcpu(self, id: int) -> "Vcpu":
        """KVM_CREATE_VCPU. `id` is the local APIC id on x86. EEXIST: taken; EINVAL: too large."""

    # Memory.

    @abstractmethod
    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move, re-flag or (`memory_size` 0) delete a slot.

        Addresses and size are in bytes, whole pages. `flags` are KVM_MEM_*. EEXIST: overlaps another slot; EINVAL: else.
        """

    def set_user_memory_region2(self, region: common.kvm_userspace_memory_region2) -> None:
        """KVM_SET_USER_MEMORY_REGION2: the same with a guest_memfd beside it."""
        raise self._refusal("KVM_SET_USER_MEMORY_REGION2")

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """The slots that there are. No ioctl: what `set_user_memory_region` made, for the kernel doesn't tell. Any thread."""
        raise self._refusal("the memory slots")

    def memory_written(self, gpa: int, size_bytes: int) -> None:
        """Host code changed guest memory at `gpa`: an engine that keeps translations of it drops them.

        No ioctl: the processor sees to that on the kernel's KVM. Any thread.
        """

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: a bit for each page written since the last call, in 64-bit words, little-endian."""
        raise self._refusal("KVM_GET_DIRTY_LOG")

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""
        raise self._refusal("KVM_CLEAR_DIRTY_LOG")

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: number of entries that were handed back."""
        raise self._refusal("KVM_RESET_DIRTY_RINGS")

    def set_memory_attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES (x86): make a range of guest memory private or shared (KVM_MEMORY_ATTRIBUTE_*)."""
        raise self._refusal("KVM_SET_MEMORY_ATTRIBUTES")

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD: a new descriptor of `size` bytes of guest memory for `set_user_memory_region2`; the caller closes it."""
        raise self._refusal("KVM_CREATE_GUEST_MEMFD")

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES (x86): how many shadow pages KVM may use. EINVAL: below 20."""
        raise self._refusal("KVM_SET_NR_MMU_PAGES")

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES (x86)."""
        raise self._refusal("KVM_GET_NR_MMU_PAGES")

    def register_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO: collect writes to this range in the ring instead of exiting."""
        raise self._refusal("KVM_REGISTER_COALESCED_MMIO")

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO."""
        raise self._refusal("KVM_UNREGISTER_COALESCED_MMIO")

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR (x86): three pages below 4 GiB that Intel processors need for real mode."""
        raise self._refusal("KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR (x86): one page for the same purpose. EINVAL once a vCPU exists."""
        raise self._refusal("KVM_SET_IDENTITY_MAP_ADDR")

    # Interrupts.

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: on x86 two i8259, an IOAPIC, and a local APIC for each vCPU created later.

        EEXIST: done already; EINVAL: a vCPU exists.
        """
        raise self._refusal("KVM_CREATE_IRQCHIP")

    def get_irqchip(self, chip_id: int) -> x86.kvm_irqchip:
        """KVM_GET_IRQCHIP (x86): state of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        raise self._refusal("KVM_GET_IRQCHIP")

    def set_irqchip(self, chip: x86.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP (x86)."""
        raise self._refusal("KVM_SET_IRQCHIP")

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE: set GSI `irq` to `level`, 1 or 0. An edge takes both. ENXIO: no interrupt chip. Any thread."""
        raise self._refusal("KVM_IRQ_LINE")

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: the same; > 0 delivered, 0 coalesced with a pending one, < 0 masked."""
        raise self._refusal("KVM_IRQ_LINE_STATUS")

    def set_gsi_routing(self, entries: Sequence[common.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table of what each GSI leads to. See `irqchip_route`, `msi_route`."""
        raise self._refusal("KVM_SET_GSI_ROUTING")

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD: a write to eventfd `fd` raises `gsi`. `flags` are KVM_IRQFD_FLAG_*."""
        raise self._refusal("KVM_IRQFD")

    def ioeventfd(self, addr: int, len: int, fd: int, datamatch: int = 0, flags: int = 0) -> None:
        """KVM_IOEVENTFD: a guest write of `len` bytes at `addr` signals eventfd `fd` and doesn't exit.

        `flags` are KVM_IOEVENTFD_FLAG_*: PIO, DATAMATCH, DEASSIGN.
        """
        raise self._refusal("KVM_IOEVENTFD")

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI: deliver an MSI; > 0 delivered, 0 the guest blocked it. Any thread."""
        raise self._refusal("KVM_SIGNAL_MSI")

    # Timers and clocks.

    def create_pit(self) -> None:
        """KVM_CREATE_PIT (x86, old): `create_pit2` without flags."""
        raise self._refusal("KVM_CREATE_PIT")

    def get_pit(self) -> x86.kvm_pit_state:
        """KVM_GET_PIT (x86, old): `get_pit2` without its flags."""
        raise self._refusal("KVM_GET_PIT")

    def set_pit(self, state: x86.kvm_pit_state) -> None:
        """KVM_SET_PIT (x86, old)."""
        raise self._refusal("KVM_SET_PIT")

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2 (x86): an i8254 at ports 0x40 to 0x43 and 0x61. ENOENT: no interrupt chip; EEXIST: done already."""
        raise self._refusal("KVM_CREATE_PIT2")

    def get_pit2(self) -> x86.kvm_pit_state2:
        """KVM_GET_PIT2 (x86)."""
        raise self._refusal("KVM_GET_PIT2")

    def set_pit2(self, state: x86.kvm_pit_state2) -> None:
        """KVM_SET_PIT2 (x86)."""
        raise self._refusal("KVM_SET_PIT2")

    def reinject_control(self, pit_reinject: bool) -> None:
        """KVM_REINJECT_CONTROL (x86): whether PIT ticks that a late guest missed are delivered afterwards."""
        raise self._refusal("KVM_REINJECT_CONTROL")

    def get_clock(self) -> common.kvm_clock_data:
        """KVM_GET_CLOCK (x86): kvmclock in nanoseconds."""
        raise self._refusal("KVM_GET_CLOCK")

    def set_clock(self, data: common.kvm_clock_data) -> None:
        """KVM_SET_CLOCK (x86)."""
        raise self._refusal("KVM_SET_CLOCK")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (x86, KVM_CAP_VM_TSC_CONTROL): TSC frequency of vCPUs created later."""
        raise self._refusal("KVM_SET_TSC_KHZ")

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (x86)."""
        raise self._refusal("KVM_GET_TSC_KHZ")

    # The rest.

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID (x86): which vCPU boots; 0 unless set. EBUSY once a vCPU exists."""
        raise self._refusal("KVM_SET_BOOT_CPU_ID")

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP: up to four arguments that the capability defines."""
        raise self._refusal("KVM_ENABLE_CAP")

    def x86_set_msr_filter(self, filter: x86.kvm_msr_filter) -> None:
        """KVM_X86_SET_MSR_FILTER (x86)."""
        raise self._refusal("KVM_X86_SET_MSR_FILTER")

    def set_pmu_event_filter(
        self, action: int, events: Sequence[int], fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER (x86): which `events` the guest may count, or may not (KVM_PMU_EVENT_ALLOW, _DENY)."""
        raise self._refusal("KVM_SET_PMU_EVENT_FILTER")

    def memory_encrypt_op(self, command: sev.kvm_sev_cmd | sev.kvm_tdx_cmd | None) -> None:
        """KVM_MEMORY_ENCRYPT_OP (x86): a command of SEV or TDX (`kvmkit.uapi.memory_encryption`); None asks whether there are any."""
        raise self._refusal("KVM_MEMORY_ENCRYPT_OP")

    def memory_encrypt_reg_region(self, addr: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION (x86): host memory that will hold encrypted guest memory."""
        raise self._refusal("KVM_MEMORY_ENCRYPT_REG_REGION")

    def memory_encrypt_unreg_region(self, addr: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION (x86)."""
        raise self._refusal("KVM_MEMORY_ENCRYPT_UNREG_REGION")

    def hyperv_eventfd(self, conn_id: int, fd: int, flags: int = 0) -> None:
        """KVM_HYPERV_EVENTFD (x86): the guest's HvSignalEvent to `conn_id` signals eventfd `fd`. KVM_HYPERV_EVENTFD_DEASSIGN undoes it."""
        raise self._refusal("KVM_HYPERV_EVENTFD")

    def xen_hvm_config(self, config: x86.kvm_xen_hvm_config) -> None:
        """KVM_XEN_HVM_CONFIG (x86)."""
        raise self._refusal("KVM_XEN_HVM_CONFIG")

    def xen_hvm_get_attr(self, type: int) -> x86.kvm_xen_hvm_attr:
        """KVM_XEN_HVM_GET_ATTR (x86): `type` is KVM_XEN_ATTR_TYPE_*."""
        raise self._refusal("KVM_XEN_HVM_GET_ATTR")

    def xen_hvm_set_attr(self, attr: x86.kvm_xen_hvm_attr) -> None:
        """KVM_XEN_HVM_SET_ATTR (x86)."""
        raise self._refusal("KVM_XEN_HVM_SET_ATTR")

    def xen_hvm_evtchn_send(
        self, port: int, vcpu: int, priority: int = common.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
    ) -> None:
        """KVM_XEN_HVM_EVTCHN_SEND (x86): signal an event channel."""
        raise self._refusal("KVM_XEN_HVM_EVTCHN_SEND")

    def create_device(self, type: int, flags: int = 0) -> "Device":
        """KVM_CREATE_DEVICE: `type` is KVM_DEV_TYPE_*. ENODEV: not offered."""
        raise self._refusal("KVM_CREATE_DEVICE")

    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR on the VM: `addr` is where the value lies in this process."""
        raise self._refusal("KVM_SET_DEVICE_ATTR")

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR on the VM."""
        raise self._refusal("KVM_GET_DEVICE_ATTR")

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the VM: whether the attribute exists."""
        raise self._refusal("KVM_HAS_DEVICE_ATTR")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a new descriptor for binary statistics; the caller closes it."""
        raise self._refusal("KVM_GET_STATS_FD")

    def arm_preferred_target(self) -> arm64.kvm_vcpu_init:
        """KVM_ARM_PREFERRED_TARGET (arm64): what to give `Vcpu.arm_vcpu_init`."""
        raise self._refusal("KVM_ARM_PREFERRED_TARGET")

    def arm_set_device_addr(self, id: int, addr: int) -> None:
        """KVM_ARM_SET_DEVICE_ADDR (arm64, old; `Device.set_device_attr` replaces it)."""
        raise self._refusal("KVM_ARM_SET_DEVICE_ADDR")

    def arm_set_counter_offset(self, counter_offset: int) -> None:
        """KVM_ARM_SET_COUNTER_OFFSET (arm64)."""
        raise self._refusal("KVM_ARM_SET_COUNTER_OFFSET")

    def arm_get_reg_writable_masks(self, range: int = arm64.KVM_ARM_FEATURE_ID_RANGE) -> list[int]:
        """KVM_ARM_GET_REG_WRITABLE_MASKS (arm64): for each feature id register of the range, which of its bits may be changed."""
        raise self._refusal("KVM_ARM_GET_REG_WRITABLE_MASKS")

    def arm_mte_copy_tags(self, guest_ipa: int, length: int, addr: int, flags: int) -> int:
        """KVM_ARM_MTE_COPY_TAGS (arm64): copy the tags of `length` bytes from or to `addr`; the number of bytes done.

        `flags` is KVM_ARM_TAGS_TO_GUEST or KVM_ARM_TAGS_FROM_GUEST.
        """
        raise self._refusal("KVM_ARM_MTE_COPY_TAGS")


class Vcpu(Descriptor):
    """A virtual processor."""

    id: int
    """The id that it was created with."""

    @property
    @abstractmethod
    def kvm_run(self) -> x86.kvm_run | arm64.kvm_run:
        """The shared kvm_run, live."""

    @property
    def immediate_exit(self) -> bool:
        """kvm_run.immediate_exit: while set, `run` returns `Intr` without running the guest. Any thread may set it."""
        return bool(self.kvm_run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.kvm_run.immediate_exit = value

    @abstractmethod
    def run(self) -> Exit:
        """KVM_RUN: run the guest until there is something to do; finishes the last exit's access first.

        EINTR is returned as `Intr`. Other errors raise: EFAULT, ENOEXEC, … (api.rst 4.10).
        """

    @abstractmethod
    def kick(self) -> None:
        """Make `run`, now or next, return `Intr` soon: sets `immediate_exit` and interrupts a running guest. Any thread.

        Whoever runs the vCPU clears `immediate_exit` before it runs it again. No ioctl: the kernel's way is a signal.
        """

    def take_coalesced_mmio(self) -> list[common.kvm_coalesced_mmio]:
        """Take the guest's writes from the coalesced MMIO ring, oldest first: all vCPUs', whichever is asked.

        Take them before an exit is handled, for they came before it. No ioctl; see `Vm.register_coalesced_mmio`.
        """
        raise self._refusal("the coalesced MMIO ring")

    def take_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what this vCPU wrote from its dirty ring: (slot, page in the slot), in order.

        `Vm.reset_dirty_rings` makes KVM look out for these pages again. No ioctl; KVM_CAP_DIRTY_LOG_RING_ACQ_REL enables the
        rings, before the first vCPU. EINVAL: not enabled.
        """
        raise self._refusal("the dirty ring")

    def get_regs(self) -> x86.kvm_regs:
        """KVM_GET_REGS (x86)."""
        raise self._refusal("KVM_GET_REGS")

    def set_regs(self, regs: x86.kvm_regs) -> None:
        """KVM_SET_REGS (x86)."""
        raise self._refusal("KVM_SET_REGS")

    def get_sregs(self) -> x86.kvm_sregs:
        """KVM_GET_SREGS (x86)."""
        raise self._refusal("KVM_GET_SREGS")

    def set_sregs(self, sregs: x86.kvm_sregs) -> None:
        """KVM_SET_SREGS (x86). EINVAL: the state is contradictory."""
        raise self._refusal("KVM_SET_SREGS")

    def get_sregs2(self) -> x86.kvm_sregs2:
        """KVM_GET_SREGS2 (x86)."""
        raise self._refusal("KVM_GET_SREGS2")

    def set_sregs2(self, sregs: x86.kvm_sregs2) -> None:
        """KVM_SET_SREGS2 (x86)."""
        raise self._refusal("KVM_SET_SREGS2")

    def get_fpu(self) -> x86.kvm_fpu:
        """KVM_GET_FPU (x86). KVM leaves `mxcsr` out of it, here and in KVM_SET_FPU: that is in KVM_GET_XSAVE."""
        raise self._refusal("KVM_GET_FPU")

    def set_fpu(self, fpu: x86.kvm_fpu) -> None:
        """KVM_SET_FPU (x86)."""
        raise self._refusal("KVM_SET_FPU")

    def get_xsave(self) -> x86.kvm_xsave:
        """KVM_GET_XSAVE (x86): 4096 bytes of XSAVE area, standard format."""
        raise self._refusal("KVM_GET_XSAVE")

    def get_xsave2(self) -> bytes:
        """KVM_GET_XSAVE2 (x86): as many bytes as ``Vm.check_extension(KVM_CAP_XSAVE2)`` says."""
        raise self._refusal("KVM_GET_XSAVE2")

    def set_xsave(self, xsave: x86.kvm_xsave | bytes) -> None:
        """KVM_SET_XSAVE (x86)."""
        raise self._refusal("KVM_SET_XSAVE")

    def get_xcrs(self) -> x86.kvm_xcrs:
        """KVM_GET_XCRS (x86)."""
        raise self._refusal("KVM_GET_XCRS")

    def set_xcrs(self, xcrs: x86.kvm_xcrs) -> None:
        """KVM_SET_XCRS (x86)."""
        raise self._refusal("KVM_SET_XCRS")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS (x86): value by index. Ends before the first MSR that can't be read, as the kernel does."""
        raise self._refusal("KVM_GET_MSRS")

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS (x86): the number of MSRs set; fewer than given where one was refused."""
        raise self._refusal("KVM_SET_MSRS")

    def get_cpuid2(self) -> list[x86.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2 (x86)."""
        raise self._refusal("KVM_GET_CPUID2")

    def set_cpuid(self, entries: Sequence[x86.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID (x86, old): `set_cpuid2` without sub-leaves."""
        raise self._refusal("KVM_SET_CPUID")

    def set_cpuid2(self, entries: Sequence[x86.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2 (x86): what CPUID tells the guest; settable until the vCPU has run."""
        raise self._refusal("KVM_SET_CPUID2")

    def get_lapic(self) -> x86.kvm_lapic_state:
        """KVM_GET_LAPIC (x86). EINVAL: the local APIC isn't the engine's."""
        raise self._refusal("KVM_GET_LAPIC")

    def set_lapic(self, lapic: x86.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC (x86)."""
        raise self._refusal("KVM_SET_LAPIC")

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING (x86): exit as `TprAccess` when the guest touches its task priority."""
        raise self._refusal("KVM_TPR_ACCESS_REPORTING")

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR (x86): the guest page with a copy of its task priority."""
        raise self._refusal("KVM_SET_VAPIC_ADDR")

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: KVM_MP_STATE_*."""
        raise self._refusal("KVM_GET_MP_STATE")

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        raise self._refusal("KVM_SET_MP_STATE")

    def get_vcpu_events(self) -> Any:
        """KVM_GET_VCPU_EVENTS: the architecture's kvm_vcpu_events."""
        raise self._refusal("KVM_GET_VCPU_EVENTS")

    def set_vcpu_events(self, events: x86.kvm_vcpu_events | arm64.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        raise self._refusal("KVM_SET_VCPU_EVENTS")

    def get_debugregs(self) -> x86.kvm_debugregs:
        """KVM_GET_DEBUGREGS (x86)."""
        raise self._refusal("KVM_GET_DEBUGREGS")

    def set_debugregs(self, debugregs: x86.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS (x86)."""
        raise self._refusal("KVM_SET_DEBUGREGS")

    def set_guest_debug(self, debug: x86.kvm_guest_debug | arm64.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG: single steps and breakpoints that exit as `Debug`."""
        raise self._refusal("KVM_SET_GUEST_DEBUG")

    def translate(self, linear_address: int) -> common.kvm_translation:
        """KVM_TRANSLATE (x86): the guest physical address of a linear one, if `valid`."""
        raise self._refusal("KVM_TRANSLATE")

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """Its VM's; see `Vm.memory_slots`."""
        raise self._refusal("the memory slots")

    def walk(self, gva: int) -> "Walk":
        """Follow a guest virtual address step by step: gva → gpa by the guest's page tables, gpa → hva → hpa by the host's.

        No ioctl: it reads the vCPU's registers, its VM's slots and the guest's memory, and changes nothing, not even accessed
        bits (`kvmkit.kvm.walk`). `ValueError` unless ``0 <= gva < 1 << 64``.
        """
        from kvmkit.kvm.walk import walk

        return walk(self, gva)

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT (x86): queue vector `irq`. ENXIO: the interrupt chip is the engine's.

        A second one before the first is taken replaces it (EEXIST with a split interrupt chip).
        """
        raise self._refusal("KVM_INTERRUPT")

    def nmi(self) -> None:
        """KVM_NMI (x86): queue an NMI. Any thread."""
        raise self._refusal("KVM_NMI")

    def smi(self) -> None:
        """KVM_SMI (x86)."""
        raise self._refusal("KVM_SMI")

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE (x86): banks and features of machine check, as MSR_IA32_MCG_CAP has them."""
        raise self._refusal("KVM_X86_SETUP_MCE")

    def x86_set_mce(self, mce: x86.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE (x86): raise a machine check."""
        raise self._refusal("KVM_X86_SET_MCE")

    def get_nested_state(self) -> bytes:
        """KVM_GET_NESTED_STATE (x86): kvm_nested_state and what follows it, `size` bytes.

        ``x86.kvm_nested_state.from_buffer_copy`` gives the head.
        """
        raise self._refusal("KVM_GET_NESTED_STATE")

    def set_nested_state(self, state: bytes) -> None:
        """KVM_SET_NESTED_STATE (x86). EINVAL: contradictory, or of the other vendor."""
        raise self._refusal("KVM_SET_NESTED_STATE")

    def get_supported_hv_cpuid(self) -> list[x86.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_HV_CPUID (x86, KVM_CAP_HYPERV_CPUID): see `Kvm.get_supported_hv_cpuid`."""
        raise self._refusal("KVM_GET_SUPPORTED_HV_CPUID")

    def xen_vcpu_get_attr(self, type: int) -> x86.kvm_xen_vcpu_attr:
        """KVM_XEN_VCPU_GET_ATTR (x86): `type` is KVM_XEN_VCPU_ATTR_TYPE_*."""
        raise self._refusal("KVM_XEN_VCPU_GET_ATTR")

    def xen_vcpu_set_attr(self, attr: x86.kvm_xen_vcpu_attr) -> None:
        """KVM_XEN_VCPU_SET_ATTR (x86)."""
        raise self._refusal("KVM_XEN_VCPU_SET_ATTR")

    def memory_encrypt_op(self, command: sev.kvm_tdx_cmd) -> None:
        """KVM_MEMORY_ENCRYPT_OP on the vCPU (x86, TDX)."""
        raise self._refusal("KVM_MEMORY_ENCRYPT_OP")

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> int:
        """KVM_PRE_FAULT_MEMORY (x86): map guest memory before the guest touches it; the bytes that are left to do, were it interrupted."""
        raise self._refusal("KVM_PRE_FAULT_MEMORY")

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: signals blocked during `run`; None keeps the thread's own mask."""
        raise self._refusal("KVM_SET_SIGNAL_MASK")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (x86, KVM_CAP_TSC_CONTROL)."""
        raise self._refusal("KVM_SET_TSC_KHZ")

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (x86)."""
        raise self._refusal("KVM_GET_TSC_KHZ")

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (x86): tell the guest that it was paused. EINVAL: it doesn't use kvmclock."""
        raise self._refusal("KVM_KVMCLOCK_CTRL")

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP."""
        raise self._refusal("KVM_ENABLE_CAP")

    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR on the vCPU."""
        raise self._refusal("KVM_SET_DEVICE_ATTR")

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR on the vCPU."""
        raise self._refusal("KVM_GET_DEVICE_ATTR")

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the vCPU."""
        raise self._refusal("KVM_HAS_DEVICE_ATTR")

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a new descriptor for binary statistics; the caller closes it."""
        raise self._refusal("KVM_GET_STATS_FD")

    def get_one_reg(self, id: int) -> int:
        """KVM_GET_ONE_REG (arm64; x86 since 6.18): the register as an unsigned number of the size that `id` says."""
        raise self._refusal("KVM_GET_ONE_REG")

    def set_one_reg(self, id: int, value: int) -> None:
        """KVM_SET_ONE_REG (arm64)."""
        raise self._refusal("KVM_SET_ONE_REG")

    def get_reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST (arm64): ids of all registers."""
        raise self._refusal("KVM_GET_REG_LIST")

    def arm_vcpu_init(self, init: arm64.kvm_vcpu_init) -> None:
        """KVM_ARM_VCPU_INIT (arm64): must come before anything else; resets the registers."""
        raise self._refusal("KVM_ARM_VCPU_INIT")

    def arm_vcpu_finalize(self, feature: int) -> None:
        """KVM_ARM_VCPU_FINALIZE (arm64)."""
        raise self._refusal("KVM_ARM_VCPU_FINALIZE")


class Device(Descriptor):
    """A device of the kernel's (KVM_CREATE_DEVICE)."""

    @abstractmethod
    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR: `addr` is where the value lies in this process."""

    @abstractmethod
    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR: the value is stored at `addr`."""

    @abstractmethod
    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR: whether the attribute exists."""


def irqchip_route(gsi: int, irqchip: int, pin: int) -> common.kvm_irq_routing_entry:
    """Make a routing entry that wires `gsi` to a pin of KVM_IRQCHIP_*."""
    entry = common.kvm_irq_routing_entry(gsi=gsi, type=common.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip = common.kvm_irq_routing_irqchip(irqchip, pin)
    return entry


def msi_route(gsi: int, address: int, data: int, devid: int | None = None) -> common.kvm_irq_routing_entry:
    """Make a routing entry that makes `gsi` send an MSI of `data` to `address`, as from device `devid`, which arm64's ITS wants."""
    flags = 0 if devid is None else common.KVM_MSI_VALID_DEVID
    entry = common.kvm_irq_routing_entry(gsi=gsi, type=common.KVM_IRQ_ROUTING_MSI, flags=flags)
    entry.u.msi = common.kvm_irq_routing_msi(address & 0xFFFFFFFF, address >> 32, data, devid or 0)
    return entry
