"""The descriptors of the software KVM (``virt/kvm/kvm_main.c``, ``arch/x86/kvm/x86.c``).

Errors are the kernel's: the same errno for the same mistake.
"""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from kvmkit import _engine
from kvmkit.kvm import contract
from kvmkit.kvm.exits import Decoder, Exit, InternalError, Intr
from kvmkit.kvm.memory import MemorySlot, load_bytes, store_bytes
from kvmkit.kvm.rings import DirtyRing
from kvmkit.kvm.soft import eventfd
from kvmkit.kvm.soft.coalesced_mmio import CoalescedMmio
from kvmkit.kvm.soft.irqchip import MAX_GSIS, IrqChip, SplitIrqChip
from kvmkit.kvm.soft.memslots import ADDRESS_SPACES, MANUAL_PROTECT, MAX_RING_BYTES, MAX_SLOTS, MemSlots
from kvmkit.kvm.soft.x86 import ioapic
from kvmkit.kvm.soft.x86.cpuid import get_supported_cpuid
from kvmkit.uapi import arm64, capabilities, common
from kvmkit.uapi import common as c
from kvmkit.uapi import x86 as x
from kvmkit.uapi.errors import ioctl_error

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PAGE = 4096
_MMAP_BYTES = 3 * _PAGE
_MAX_VCPUS = 64
_EXTINT = 1 << 16
"""The engine's own exit reason: the PIC is asked for a vector."""

_CR4_NOT_OFFERED = 1 << 13 | 1 << 14 | 1 << 15 | 1 << 19
"""VMX, SMX, a reserved bit, key locker."""

_EVENT_FLAGS = (
    x.KVM_VCPUEVENT_VALID_NMI_PENDING
    | x.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | x.KVM_VCPUEVENT_VALID_SHADOW
    | x.KVM_VCPUEVENT_VALID_SMM
)

_CLOCK_FLAGS = c.KVM_CLOCK_TSC_STABLE | c.KVM_CLOCK_REALTIME | c.KVM_CLOCK_HOST_TSC

_MSR_ACCESS = x.KVM_MSR_FILTER_READ | x.KVM_MSR_FILTER_WRITE
_MSR_EXIT_REASONS = c.KVM_MSR_EXIT_REASON_INVAL | c.KVM_MSR_EXIT_REASON_UNKNOWN | c.KVM_MSR_EXIT_REASON_FILTER

_GUEST_DEBUG = (
    c.KVM_GUESTDBG_ENABLE
    | c.KVM_GUESTDBG_SINGLESTEP
    | x.KVM_GUESTDBG_USE_SW_BP
    | x.KVM_GUESTDBG_USE_HW_BP
    | x.KVM_GUESTDBG_INJECT_DB
    | x.KVM_GUESTDBG_INJECT_BP
    | x.KVM_GUESTDBG_BLOCKIRQ
)

_REG_MSR = c.KVM_REG_X86 | c.KVM_REG_SIZE_U64 | 2 << 32
"""KVM_X86_REG_TYPE_MSR: to be or-ed with the index."""

_XSAVE_BYTES = 4096
_MAX_TSC_KHZ = (1 << 31) - 1

_CAPABILITIES = {
    capabilities.KVM_CAP_IRQCHIP: 1,
    capabilities.KVM_CAP_VAPIC: 1,
    capabilities.KVM_CAP_X86_SMM: 1,
    capabilities.KVM_CAP_MULTI_ADDRESS_SPACE: ADDRESS_SPACES,
    capabilities.KVM_CAP_HLT: 1,
    capabilities.KVM_CAP_USER_MEMORY: 1,
    capabilities.KVM_CAP_SET_TSS_ADDR: 1,
    capabilities.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    capabilities.KVM_CAP_EXT_CPUID: 1,
    capabilities.KVM_CAP_CLOCKSOURCE: 1,
    capabilities.KVM_CAP_NR_VCPUS: 2,
    capabilities.KVM_CAP_MAX_VCPUS: _MAX_VCPUS,
    capabilities.KVM_CAP_MAX_VCPU_ID: _MAX_VCPUS,
    capabilities.KVM_CAP_NR_MEMSLOTS: MAX_SLOTS,
    capabilities.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    capabilities.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    capabilities.KVM_CAP_READONLY_MEM: 1,
    capabilities.KVM_CAP_SET_BOOT_CPU_ID: 1,
    capabilities.KVM_CAP_MP_STATE: 1,
    capabilities.KVM_CAP_USER_NMI: 1,
    capabilities.KVM_CAP_PIT2: 1,
    capabilities.KVM_CAP_PIT_STATE2: 1,
    capabilities.KVM_CAP_IRQ_ROUTING: 1,
    capabilities.KVM_CAP_IRQFD: 1,
    capabilities.KVM_CAP_IRQFD_RESAMPLE: 1,
    capabilities.KVM_CAP_IOEVENTFD: 1,
    capabilities.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    capabilities.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    capabilities.KVM_CAP_SIGNAL_MSI: 1,
    capabilities.KVM_CAP_BINARY_STATS_FD: 1,
    capabilities.KVM_CAP_VCPU_EVENTS: 1,
    capabilities.KVM_CAP_DEBUGREGS: 1,
    capabilities.KVM_CAP_SET_GUEST_DEBUG: 1,
    capabilities.KVM_CAP_SET_GUEST_DEBUG2: _GUEST_DEBUG,
    capabilities.KVM_CAP_XSAVE: 1,
    capabilities.KVM_CAP_XSAVE2: _XSAVE_BYTES,
    capabilities.KVM_CAP_XCRS: 1,
    capabilities.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    capabilities.KVM_CAP_GET_TSC_KHZ: 1,
    capabilities.KVM_CAP_ADJUST_CLOCK: _CLOCK_FLAGS,
    capabilities.KVM_CAP_IMMEDIATE_EXIT: 1,
    capabilities.KVM_CAP_CHECK_EXTENSION_VM: 1,
    capabilities.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    capabilities.KVM_CAP_COALESCED_MMIO: x.KVM_COALESCED_MMIO_PAGE_OFFSET,
    capabilities.KVM_CAP_COALESCED_PIO: 1,
    capabilities.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: MANUAL_PROTECT,
    capabilities.KVM_CAP_DIRTY_LOG_RING: MAX_RING_BYTES,
    capabilities.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: MAX_RING_BYTES,
    capabilities.KVM_CAP_USER_MEMORY2: 1,
    capabilities.KVM_CAP_PRE_FAULT_MEMORY: 1,
    capabilities.KVM_CAP_MEMORY_FAULT_INFO: 1,
    capabilities.KVM_CAP_VM_TYPES: 1 << x.KVM_X86_DEFAULT_VM | 1 << x.KVM_X86_SW_PROTECTED_VM,
    capabilities.KVM_CAP_GUEST_MEMFD: 1,
    capabilities.KVM_CAP_GUEST_MEMFD_FLAGS: c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED,
    capabilities.KVM_CAP_MEMORY_ATTRIBUTES: c.KVM_MEMORY_ATTRIBUTE_PRIVATE,
    capabilities.KVM_CAP_SYNC_REGS: x.KVM_SYNC_X86_VALID_FIELDS,
    capabilities.KVM_CAP_SREGS2: 1,
    capabilities.KVM_CAP_PIT: 1,
    capabilities.KVM_CAP_IRQ_INJECT_STATUS: 1,
    capabilities.KVM_CAP_SPLIT_IRQCHIP: 1,
    capabilities.KVM_CAP_DEVICE_CTRL: 1,
    capabilities.KVM_CAP_ENABLE_CAP: 1,
    capabilities.KVM_CAP_ENABLE_CAP_VM: 1,
    capabilities.KVM_CAP_SYS_ATTRIBUTES: 1,
    capabilities.KVM_CAP_MCE: 32,
    capabilities.KVM_CAP_REINJECT_CONTROL: 1,
    capabilities.KVM_CAP_ONE_REG: 1,
    capabilities.KVM_CAP_TSC_CONTROL: 1,
    capabilities.KVM_CAP_VM_TSC_CONTROL: 1,
    capabilities.KVM_CAP_VCPU_ATTRIBUTES: 1,
    capabilities.KVM_CAP_KVMCLOCK_CTRL: 1,
    capabilities.KVM_CAP_X86_MSR_FILTER: 1,
    capabilities.KVM_CAP_X86_USER_SPACE_MSR: 1,
}


class _Descriptor(contract.Descriptor):
    """Close state that all descriptors share."""

    _closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check(self, name: str) -> None:
        if self._closed:
            raise ioctl_error(name, errno.EBADF)


class Kvm(_Descriptor, contract.Kvm):
    """The software KVM as a whole."""

    engine = "soft"

    def close(self) -> None:
        """Release it; VMs live on."""
        self._closed = True

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        self._check("KVM_GET_API_VERSION")
        return c.KVM_API_VERSION

    def create_vm(self, type: int = 0) -> "Vm":
        """KVM_CREATE_VM."""
        self._check("KVM_CREATE_VM")
        if type not in (x.KVM_X86_DEFAULT_VM, x.KVM_X86_SW_PROTECTED_VM):
            raise ioctl_error("KVM_CREATE_VM", errno.EINVAL, f"VM type {type}: 0 or 1")
        return Vm(type)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        self._check("KVM_CHECK_EXTENSION")
        return _CAPABILITIES.get(cap, 0)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE."""
        self._check("KVM_GET_VCPU_MMAP_SIZE")
        return _MMAP_BYTES

    def get_supported_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        self._check("KVM_GET_SUPPORTED_CPUID")
        return get_supported_cpuid()

    def get_emulated_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID: nothing that the host lacks."""
        self._check("KVM_GET_EMULATED_CPUID")
        return []

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST."""
        self._check("KVM_GET_MSR_INDEX_LIST")
        return _engine.msr_list()

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: none."""
        self._check("KVM_GET_MSR_FEATURE_INDEX_LIST")
        return []

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        self._check("KVM_X86_GET_MCE_CAP_SUPPORTED")
        return _engine.supported_mce_cap()

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR."""
        if not self.has_device_attr(group, attr):
            raise ioctl_error("KVM_GET_DEVICE_ATTR", errno.ENXIO, f"attribute {attr} of group {group}")
        _named("KVM_GET_DEVICE_ATTR", store_bytes, addr, _engine.supported_xcr0().to_bytes(8, "little"))

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR."""
        self._check("KVM_HAS_DEVICE_ATTR")
        return (group, attr) == (x.KVM_X86_GRP_SYSTEM, x.KVM_X86_XCOMP_GUEST_SUPP)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: there are no feature MSRs."""
        self._check("KVM_GET_MSRS")
        return {}


class Vm(_Descriptor, contract.Vm):
    """A virtual machine."""

    def __init__(self, type: int) -> None:
        """Create one without memory or vCPUs."""
        self._vm = _engine.Vm(_engine.host_tsc_khz())
        self.slots = MemSlots(self._vm, type == x.KVM_X86_SW_PROTECTED_VM)
        self.coalesced = CoalescedMmio()
        self._vcpus: dict[int, Vcpu] = {}
        self._pid = os.getpid()
        self.irqchip: IrqChip | SplitIrqChip | None = None
        self._tsc_khz = _engine.host_tsc_khz()
        self.dead = False
        """A vCPU failed in a way that leaves no state to go on from: every ioctl fails."""

    def _check(self, name: str) -> None:
        super()._check(name)
        if self.dead:
            raise ioctl_error(
                name, errno.EIO, "the VM is dead: an SMI found no memory for the state-save area"
            )

    def close(self) -> None:
        """Release it with its vCPUs and chips. vCPUs must have left `run`. In a child of os.fork it is the parent's still."""
        if self._closed:
            return
        self._closed = True
        if self.forked:
            return
        for vcpu in list(self._vcpus.values()):
            vcpu.close()
        self._vcpus.clear()
        if self.irqchip:
            self.irqchip.close()
        self._vm.close()
        self.slots.close()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the VM belongs to."""
        return os.getpid() != self._pid

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        self._check("KVM_CHECK_EXTENSION")
        match cap:
            case capabilities.KVM_CAP_MULTI_ADDRESS_SPACE:
                return self.slots.address_spaces
            case capabilities.KVM_CAP_MEMORY_ATTRIBUTES:
                return self.slots.attributes
            case capabilities.KVM_CAP_GUEST_MEMFD_FLAGS:
                return self.slots.guest_memfd_flags
        return _CAPABILITIES.get(cap, 0)

    def set_memory_attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        self._check("KVM_SET_MEMORY_ATTRIBUTES")
        self.slots.set_attributes(address, size, attributes, flags)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD."""
        self._check("KVM_CREATE_GUEST_MEMFD")
        return self.slots.guest_memfds.create(size, flags)

    def create_vcpu(self, id: int) -> "Vcpu":
        """KVM_CREATE_VCPU."""
        self._check("KVM_CREATE_VCPU")
        if not 0 <= id < _MAX_VCPUS:
            raise ioctl_error("KVM_CREATE_VCPU", errno.EINVAL, f"vCPU id {id}: 0 to {_MAX_VCPUS - 1}")
        if id in self._vcpus:
            raise ioctl_error("KVM_CREATE_VCPU", errno.EEXIST)
        vcpu = Vcpu(self, self._vm, id, self._tsc_khz)
        self._vcpus[id] = vcpu
        return vcpu

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        name = "KVM_SET_USER_MEMORY_REGION"
        self._check(name)
        self.slots.set_region(name, slot, guest_phys_addr, memory_size, userspace_addr, flags)

    def set_user_memory_region2(self, region: common.kvm_userspace_memory_region2) -> None:
        """KVM_SET_USER_MEMORY_REGION2."""
        name = "KVM_SET_USER_MEMORY_REGION2"
        self._check(name)
        r = region
        guest_memfd = r.guest_memfd, r.guest_memfd_offset
        self.slots.set_region(
            name, r.slot, r.guest_phys_addr, r.memory_size, r.userspace_addr, r.flags, guest_memfd
        )

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """The slots."""
        return self.slots.all()

    def memory_written(self, gpa: int, size_bytes: int) -> None:
        """Drop translations of guest memory that host code changed."""
        self._vm.notify_write(gpa, size_bytes)

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG."""
        self._check("KVM_GET_DIRTY_LOG")
        return self.slots.get_dirty_log(slot)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        self._check("KVM_CLEAR_DIRTY_LOG")
        self.slots.clear_dirty_log(slot, first_page, num_pages, dirty_bitmap)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS."""
        self._check("KVM_RESET_DIRTY_RINGS")
        if not self.slots.ring_size_bytes:
            raise ioctl_error("KVM_RESET_DIRTY_RINGS", errno.EINVAL, "there are no dirty rings")
        return self._vm.reset_dirty_rings()

    def register_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        self._check("KVM_REGISTER_COALESCED_MMIO")
        self.coalesced.register(addr, size, pio)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO."""
        self._check("KVM_UNREGISTER_COALESCED_MMIO")
        self.coalesced.unregister(addr, size, pio)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP."""
        name = "KVM_ENABLE_CAP"
        self._check(name)
        argument = args[0] if args else 0
        if flags:
            raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x}")
        match cap:
            case capabilities.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
                self.slots.enable_manual_protect(argument)
            case capabilities.KVM_CAP_DIRTY_LOG_RING | capabilities.KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
                self.slots.enable_rings(argument, bool(self._vcpus))
            case capabilities.KVM_CAP_SPLIT_IRQCHIP:
                if not 0 <= argument <= MAX_GSIS:
                    raise ioctl_error(name, errno.EINVAL, f"{argument} pins: at most {MAX_GSIS}")
                if self.irqchip or self._vcpus:
                    raise ioctl_error(name, errno.EEXIST, "there are interrupt chips or vCPUs")
                self._vm.create_lapics()
                self.irqchip = SplitIrqChip(self._vm, argument)
            case capabilities.KVM_CAP_X86_USER_SPACE_MSR:
                if argument & ~_MSR_EXIT_REASONS:
                    raise ioctl_error(name, errno.EINVAL, f"exit reasons {argument:#x}")
                self._vm.set_msr_exits(argument)
            case _:
                raise ioctl_error(name, errno.EINVAL, f"capability {cap} can't be enabled")
        return 0

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR: nothing here needs it."""
        self._check("KVM_SET_TSS_ADDR")
        if not 0 <= addr <= 0xFFFFFFFF - 3 * _PAGE:
            raise ioctl_error("KVM_SET_TSS_ADDR", errno.EINVAL)

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: nothing here needs it."""
        self._check("KVM_SET_IDENTITY_MAP_ADDR")
        if self._vcpus:
            raise ioctl_error("KVM_SET_IDENTITY_MAP_ADDR", errno.EINVAL, "a vCPU exists")

    # Interrupts.

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP."""
        self._check("KVM_CREATE_IRQCHIP")
        if self.irqchip:
            raise ioctl_error("KVM_CREATE_IRQCHIP", errno.EEXIST)
        if self._vcpus:
            raise ioctl_error("KVM_CREATE_IRQCHIP", errno.EINVAL)
        self._vm.create_lapics()
        self.irqchip = IrqChip(self._vm)

    def _apics(self, name: str, number: int = errno.ENXIO) -> IrqChip | SplitIrqChip:
        """What interrupts go through: the chips, or local APICs alone."""
        self._check(name)
        if self.irqchip is None:
            raise ioctl_error(name, number)
        return self.irqchip

    def _chip(self, name: str, number: int = errno.ENXIO) -> IrqChip:
        """Return the chips of KVM_CREATE_IRQCHIP."""
        self._check(name)
        if not isinstance(self.irqchip, IrqChip):
            raise ioctl_error(name, number)
        return self.irqchip

    def get_irqchip(self, chip_id: int) -> x.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        return self._chip("KVM_GET_IRQCHIP").get(chip_id)

    def set_irqchip(self, chip: x.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self._chip("KVM_SET_IRQCHIP").set(chip)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self._apics("KVM_IRQ_LINE").line(irq, level)

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return self._apics("KVM_IRQ_LINE_STATUS").line(irq, level)

    def set_gsi_routing(self, entries: Sequence[common.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING."""
        self._apics("KVM_SET_GSI_ROUTING", errno.EINVAL).set_routing(entries)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD."""
        self._check("KVM_IRQFD")
        if not flags & c.KVM_IRQFD_FLAG_DEASSIGN:
            self._apics("KVM_IRQFD", errno.EINVAL)
        resamplers = self.irqchip.resamplers if isinstance(self.irqchip, IrqChip) else None
        eventfd.irqfd(self._vm, resamplers, fd, gsi, flags, resamplefd)

    def ioeventfd(self, addr: int, len: int, fd: int, datamatch: int = 0, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""
        self._check("KVM_IOEVENTFD")
        eventfd.ioeventfd(self._vm, addr, len, fd, datamatch, flags)

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI."""
        self._apics("KVM_SIGNAL_MSI", errno.EINVAL)
        if flags & ~c.KVM_MSI_VALID_DEVID:
            raise ioctl_error("KVM_SIGNAL_MSI", errno.EINVAL, f"flags {flags:#x}")
        taken = self._vm.signal_msi(address, data)
        if taken < 0:  # the kernel's -1 for "nobody", which is this errno's number
            raise ioctl_error("KVM_SIGNAL_MSI", errno.EPERM, "there is no local APIC")
        return taken

    def create_device(self, type: int, flags: int = 0) -> contract.Device:
        """KVM_CREATE_DEVICE: there are none."""
        self._check("KVM_CREATE_DEVICE")
        raise ioctl_error("KVM_CREATE_DEVICE", errno.ENODEV, f"no device of type {type}")

    # x86.

    def create_pit(self) -> None:
        """KVM_CREATE_PIT."""
        self._create_pit("KVM_CREATE_PIT")

    def get_pit(self) -> x.kvm_pit_state:
        """KVM_GET_PIT."""
        return x.kvm_pit_state(self._get_pit("KVM_GET_PIT").channels)

    def set_pit(self, state: x.kvm_pit_state) -> None:
        """KVM_SET_PIT."""
        self._set_pit("KVM_SET_PIT", x.kvm_pit_state2(state.channels))

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2. Port 0x61 is always answered (KVM_PIT_SPEAKER_DUMMY)."""
        self._create_pit("KVM_CREATE_PIT2")

    def get_pit2(self) -> x.kvm_pit_state2:
        """KVM_GET_PIT2."""
        return self._get_pit("KVM_GET_PIT2")

    def set_pit2(self, state: x.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        self._set_pit("KVM_SET_PIT2", state)

    def reinject_control(self, pit_reinject: bool) -> None:
        """KVM_REINJECT_CONTROL."""
        if not self._chip("KVM_REINJECT_CONTROL").pit:
            raise ioctl_error("KVM_REINJECT_CONTROL", errno.ENXIO, "there is no PIT")
        self._vm.set_pit_reinject(pit_reinject)

    def _create_pit(self, name: str) -> None:
        chip = self._chip(name, errno.ENOENT)
        if chip.pit:
            raise ioctl_error(name, errno.EEXIST)
        chip.create_pit()

    def _get_pit(self, name: str) -> x.kvm_pit_state2:
        chip = self._chip(name)
        if not chip.pit:
            raise ioctl_error(name, errno.ENXIO)
        with chip.lock:
            return chip.pit.get_state()

    def _set_pit(self, name: str, state: x.kvm_pit_state2) -> None:
        chip = self._chip(name)
        if not chip.pit:
            raise ioctl_error(name, errno.ENXIO)
        with chip.lock:
            chip.pit.set_state(state)

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID."""
        self._check("KVM_SET_BOOT_CPU_ID")
        if self._vcpus:
            raise ioctl_error("KVM_SET_BOOT_CPU_ID", errno.EBUSY)
        self._vm.set_boot_cpu(id)

    def get_clock(self) -> common.kvm_clock_data:
        """KVM_GET_CLOCK."""
        self._check("KVM_GET_CLOCK")
        clock, realtime, host_tsc = self._vm.clock()
        return c.kvm_clock_data(clock=clock, flags=_CLOCK_FLAGS, realtime=realtime, host_tsc=host_tsc)

    def set_clock(self, data: common.kvm_clock_data) -> None:
        """KVM_SET_CLOCK. With KVM_CLOCK_REALTIME, the time that has passed since `realtime` is added."""
        self._check("KVM_SET_CLOCK")
        if data.flags & ~_CLOCK_FLAGS:
            raise ioctl_error("KVM_SET_CLOCK", errno.EINVAL, f"flags {data.flags:#x}")
        passed_ns = 0
        if data.flags & c.KVM_CLOCK_REALTIME:
            passed_ns = max(time.clock_gettime_ns(time.CLOCK_REALTIME) - data.realtime, 0)
        self._vm.set_clock_ns(data.clock + passed_ns & (1 << 64) - 1)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: of the vCPUs to come."""
        khz = _tsc_khz(self, khz)
        if self._vcpus:
            raise ioctl_error("KVM_SET_TSC_KHZ", errno.EINVAL, "a vCPU exists")
        self._tsc_khz = khz

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        self._check("KVM_GET_TSC_KHZ")
        return self._tsc_khz

    def x86_set_msr_filter(self, filter: x.kvm_msr_filter) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        name = "KVM_X86_SET_MSR_FILTER"
        self._check(name)
        deny = bool(filter.flags & x.KVM_MSR_FILTER_DEFAULT_DENY)
        used = [r for r in filter.ranges if r.nmsrs]
        if filter.flags & ~x.KVM_MSR_FILTER_DEFAULT_DENY or (deny and not used):
            raise ioctl_error(name, errno.EINVAL, f"flags {filter.flags:#x} and {len(used)} ranges")
        ranges = []
        for r in used:
            size_bytes = (r.nmsrs + 63) // 64 * 8
            if not r.flags or r.flags & ~_MSR_ACCESS or size_bytes > x.KVM_MSR_FILTER_MAX_BITMAP_SIZE:
                raise ioctl_error(name, errno.EINVAL, f"flags {r.flags:#x}, {r.nmsrs} MSRs from {r.base:#x}")
            ranges.append((r.flags, r.base, r.nmsrs, _named(name, load_bytes, r.bitmap, size_bytes)))
        self._vm.set_msr_filter(deny, ranges)

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD."""
        self._check("KVM_GET_STATS_FD")
        return _named("KVM_GET_STATS_FD", self._vm.stats_fd)

    def stats(self) -> dict[str, int]:
        """Return counters of the engine (no ioctl)."""
        return dict(self._vm.stats())


class Vcpu(_Descriptor, contract.Vcpu):
    """A virtual processor."""

    def __init__(self, vm: Vm, native: _engine.Vm, id: int, tsc_khz: int) -> None:
        """Create it in the state after power-up; those but number 0 wait for INIT and SIPI."""
        self.id = id
        self._machine = vm
        self._mmap = mmap.mmap(-1, _MMAP_BYTES)
        self._area = memoryview(self._mmap)
        self._run: x.kvm_run | None = x.kvm_run.from_buffer(self._mmap)
        self._decode = Decoder(self._run, self._area).decode
        address = ctypes.addressof(self._run)
        self._vcpu = native.create_vcpu(id, address, _MMAP_BYTES)
        self._vcpu.set_tsc_khz(tsc_khz)
        self._dirty_ring: DirtyRing | None = None
        if (ring := self._vcpu.dirty_ring()) is not None:
            address, size_bytes = ring  # mapped as long as the native vCPU lives
            self._dirty_ring = DirtyRing(memoryview((ctypes.c_ubyte * size_bytes).from_address(address)))

    def close(self) -> None:
        """Release it. It must have left `run`."""
        if not self._closed:
            self._closed = True
            if not self._machine.forked:
                self._vcpu.close()

    def _check(self, name: str) -> None:
        super()._check(name)
        self._machine._check(name)

    @property
    def kvm_run(self) -> x.kvm_run:
        """The shared kvm_run, live."""
        if self._run is None or self._closed:
            raise ioctl_error("kvm_run", errno.EBADF, "the vCPU is closed")
        return self._run

    def run(self) -> Exit:
        """KVM_RUN. Accesses to the chips that KVM_CREATE_IRQCHIP made are handled here.

        On the main thread, Python's signal handlers run meanwhile, within 50 ms; one that raises (Ctrl-C does) ends the run, and
        one that wants `run` to return calls `kick`.
        """
        run = self.kvm_run
        if run.kvm_valid_regs or run.kvm_dirty_regs:
            return self._run_synced(run)
        return self._run_to_exit(run)

    def _run_to_exit(self, run: x.kvm_run) -> Exit:
        main = threading.get_ident() == threading.main_thread().ident
        chip, coalesced = self._machine.irqchip, self._machine.coalesced
        while True:
            try:
                reason, message = self._vcpu.run(main)
            except OSError as error:
                self._machine.dead |= error.errno == errno.EIO
                self._check("KVM_RUN")
                raise
            if coalesced.zones and (
                (reason == c.KVM_EXIT_MMIO and run.exit.mmio.is_write and coalesced.take_mmio(run.exit.mmio))
                or (
                    reason == c.KVM_EXIT_IO
                    and run.exit.io.direction == c.KVM_EXIT_IO_OUT
                    and coalesced.take_pio(run.exit.io, self._area)
                )
            ):
                continue
            if isinstance(chip, SplitIrqChip):
                if reason == c.KVM_EXIT_IOAPIC_EOI and not chip.handles(run.exit.eoi.vector):
                    continue
            elif chip is not None:
                if reason == c.KVM_EXIT_IO:
                    if chip.owns_port(run.exit.io.port):
                        self._chip_port(chip, run)
                        continue
                elif reason == c.KVM_EXIT_MMIO:
                    if 0 <= run.exit.mmio.phys_addr - ioapic.BASE < ioapic.SIZE:
                        self._chip_memory(chip, run)
                        continue
                elif reason == c.KVM_EXIT_IOAPIC_EOI:
                    with chip.lock:
                        chip.ioapic.eoi(run.exit.eoi.vector)
                    continue
                elif reason == _EXTINT:
                    with chip.lock:
                        if chip.pic.intr:  # no other vCPU was faster
                            self._vcpu.interrupt(chip.pic.acknowledge())
                    continue
            if reason == c.KVM_EXIT_INTR:
                return Intr()
            if message is not None:
                exit_ = self._decode()
                assert isinstance(exit_, InternalError)
                self.error_message = message
                return exit_
            return self._decode()

    def _run_synced(self, run: x.kvm_run) -> Exit:
        """KVM_RUN with registers shared through kvm_run (KVM_CAP_SYNC_REGS)."""
        if (run.kvm_valid_regs | run.kvm_dirty_regs) & ~x.KVM_SYNC_X86_VALID_FIELDS:
            raise ioctl_error("KVM_RUN", errno.EINVAL, "unknown bits in kvm_valid_regs or kvm_dirty_regs")
        shared = run.s.regs
        try:
            if run.kvm_dirty_regs & x.KVM_SYNC_X86_REGS:
                self.set_regs(shared.regs)
            if run.kvm_dirty_regs & x.KVM_SYNC_X86_SREGS:
                self.set_sregs(shared.sregs)
            if run.kvm_dirty_regs & x.KVM_SYNC_X86_EVENTS:
                self.set_vcpu_events(shared.events)
        except OSError as error:
            raise ioctl_error("KVM_RUN", errno.EINVAL, str(error)) from error
        run.kvm_dirty_regs = 0
        try:
            return self._run_to_exit(run)
        finally:
            if run.kvm_valid_regs & x.KVM_SYNC_X86_REGS:
                shared.regs = self.get_regs()
            if run.kvm_valid_regs & x.KVM_SYNC_X86_SREGS:
                shared.sregs = self.get_sregs()
            if run.kvm_valid_regs & x.KVM_SYNC_X86_EVENTS:
                shared.events = self.get_vcpu_events()

    error_message = ""
    """What the engine says of the last `InternalError`."""

    def _chip_port(self, chip: IrqChip, run: x.kvm_run) -> None:
        io = run.exit.io
        port, offset, step = io.port, io.data_offset, io.size
        for i in range(offset, offset + io.count * step, step):
            # The chips are 8 bits wide: a wider access reaches the ports that follow.
            for k in range(step):
                if io.direction == c.KVM_EXIT_IO_OUT:
                    if chip.owns_port(port + k):
                        chip.port_out(port + k, self._area[i + k])
                else:
                    self._area[i + k] = chip.port_in(port + k) if chip.owns_port(port + k) else 0xFF

    def _chip_memory(self, chip: IrqChip, run: x.kvm_run) -> None:
        access = run.exit.mmio
        offset = access.phys_addr - ioapic.BASE
        with chip.lock:
            if access.is_write:
                if access.len >= 4:
                    chip.ioapic.write(offset, int.from_bytes(bytes(access.data)[:4], "little"))
            else:
                value = chip.ioapic.read(offset)
                access.data[:] = list(value.to_bytes(8, "little"))

    def kick(self) -> None:
        """Set `immediate_exit` and interrupt a running guest. Any thread."""
        run = self._run
        if run is not None and not self._closed:
            run.immediate_exit = 1
            self._vcpu.kick()

    def take_coalesced_mmio(self) -> list[common.kvm_coalesced_mmio]:
        """Take the guest's writes from the coalesced MMIO ring."""
        self._check("the coalesced MMIO ring")
        return self._machine.coalesced.ring.take()

    def take_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what this vCPU wrote from its dirty ring."""
        self._check("the dirty ring")
        if self._dirty_ring is None:
            raise ioctl_error("the dirty ring", errno.EINVAL, "enable KVM_CAP_DIRTY_LOG_RING_ACQ_REL first")
        return self._dirty_ring.take()

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> int:
        """KVM_PRE_FAULT_MEMORY: the host allocates the pages."""
        self._check("KVM_PRE_FAULT_MEMORY")
        smm = self.kvm_run.flags & x.KVM_RUN_X86_SMM != 0
        return self._machine.slots.pre_fault(gpa, size, flags, int(smm))

    # State.

    def get_regs(self) -> x.kvm_regs:
        """KVM_GET_REGS."""
        self._check("KVM_GET_REGS")
        return x.kvm_regs.from_buffer_copy(self._vcpu.get_regs())

    def set_regs(self, regs: x.kvm_regs) -> None:
        """KVM_SET_REGS."""
        self._check("KVM_SET_REGS")
        self._vcpu.set_regs(bytes(regs))

    def get_sregs(self) -> x.kvm_sregs:
        """KVM_GET_SREGS."""
        self._check("KVM_GET_SREGS")
        return x.kvm_sregs.from_buffer_copy(self._vcpu.get_sregs())

    def set_sregs(self, sregs: x.kvm_sregs) -> None:
        """KVM_SET_SREGS."""
        self._check("KVM_SET_SREGS")
        _check_sregs("KVM_SET_SREGS", sregs)
        _named("KVM_SET_SREGS", self._vcpu.set_sregs, bytes(sregs))

    def get_sregs2(self) -> x.kvm_sregs2:
        """KVM_GET_SREGS2."""
        self._check("KVM_GET_SREGS2")
        sregs = self.get_sregs()
        sregs2 = x.kvm_sregs2.from_buffer_copy(bytes(sregs).ljust(ctypes.sizeof(x.kvm_sregs2), b"\0"))
        sregs2.flags = 0
        sregs2.pdptrs[:] = [0] * 4
        if _has_pdptrs(sregs2):
            sregs2.flags = x.KVM_SREGS2_FLAGS_PDPTRS_VALID
            sregs2.pdptrs[:] = list(self._vcpu.get_pdptrs())
        return sregs2

    def set_sregs2(self, sregs: x.kvm_sregs2) -> None:
        """KVM_SET_SREGS2."""
        name = "KVM_SET_SREGS2"
        self._check(name)
        valid = sregs.flags & x.KVM_SREGS2_FLAGS_PDPTRS_VALID
        if sregs.flags & ~x.KVM_SREGS2_FLAGS_PDPTRS_VALID or (valid and not _has_pdptrs(sregs)):
            raise ioctl_error(name, errno.EINVAL, f"flags {sregs.flags:#x}")
        _check_sregs(name, sregs)
        old = x.kvm_sregs.from_buffer_copy(bytes(sregs)[: ctypes.sizeof(x.kvm_sregs)])
        old.interrupt_bitmap[:] = [0] * 4  # kvm_sregs2 says nothing of the interrupt that waits: it stays
        events = self._vcpu.get_vcpu_events()
        _named(name, self._vcpu.set_sregs, bytes(old))
        if valid:
            a, b, c, d = sregs.pdptrs
            self._vcpu.set_pdptrs((a, b, c, d))
        self._vcpu.set_vcpu_events(events)

    def get_fpu(self) -> x.kvm_fpu:
        """KVM_GET_FPU."""
        self._check("KVM_GET_FPU")
        return x.kvm_fpu.from_buffer_copy(self._vcpu.get_fpu())

    def set_fpu(self, fpu: x.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._check("KVM_SET_FPU")
        self._vcpu.set_fpu(bytes(fpu))

    def get_xsave(self) -> x.kvm_xsave:
        """KVM_GET_XSAVE."""
        self._check("KVM_GET_XSAVE")
        return x.kvm_xsave.from_buffer_copy(self._vcpu.get_xsave())

    def get_xsave2(self) -> bytes:
        """KVM_GET_XSAVE2: no component lies beyond what KVM_GET_XSAVE returns."""
        self._check("KVM_GET_XSAVE2")
        return self._vcpu.get_xsave()

    def set_xsave(self, xsave: x.kvm_xsave | bytes) -> None:
        """KVM_SET_XSAVE."""
        self._check("KVM_SET_XSAVE")
        _named("KVM_SET_XSAVE", self._vcpu.set_xsave, bytes(xsave)[:_XSAVE_BYTES].ljust(_XSAVE_BYTES, b"\0"))

    def get_xcrs(self) -> x.kvm_xcrs:
        """KVM_GET_XCRS."""
        self._check("KVM_GET_XCRS")
        xcrs = x.kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = self._vcpu.get_xcr0()
        return xcrs

    def set_xcrs(self, xcrs: x.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        self._check("KVM_SET_XCRS")
        if xcrs.nr_xcrs > 16 or xcrs.flags:
            raise ioctl_error("KVM_SET_XCRS", errno.EINVAL)
        offered = 1  # x87, and what the guest's CPUID says
        for function, index, _, eax, _, _, edx in self._vcpu.get_cpuid():
            if (function, index) == (0xD, 0):
                offered |= edx << 32 | eax
        for entry in xcrs.xcrs[: xcrs.nr_xcrs]:
            if entry.xcr == 0:
                if entry.value & ~offered:
                    raise ioctl_error(
                        "KVM_SET_XCRS", errno.EINVAL, f"XCR0 {entry.value:#x}: CPUID offers {offered:#x}"
                    )
                _named("KVM_SET_XCRS", self._vcpu.set_xcr0, entry.value)
                break  # the first counts

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: stops at the first that doesn't exist, as the kernel does."""
        self._check("KVM_GET_MSRS")
        values: dict[int, int] = {}
        for index in indices:
            value = self._vcpu.get_msr(index)
            if value is None:
                break
            values[index] = value
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS: how many were set before the first that couldn't be."""
        self._check("KVM_SET_MSRS")
        for n, (index, value) in enumerate(values.items()):
            if not self._vcpu.set_msr(index, value):
                return n
        return len(values)

    def get_one_reg(self, id: int) -> int:
        """KVM_GET_ONE_REG."""
        name = "KVM_GET_ONE_REG"
        value = self._vcpu.get_msr(self._msr_of(name, id))
        if value is None:
            raise ioctl_error(name, errno.EINVAL, f"no MSR {id & 0xFFFFFFFF:#x}")
        return value

    def set_one_reg(self, id: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        name = "KVM_SET_ONE_REG"
        if not self._vcpu.set_msr(self._msr_of(name, id), value):
            raise ioctl_error(name, errno.EINVAL, f"MSR {id & 0xFFFFFFFF:#x} can't be {value:#x}")

    def _msr_of(self, name: str, id: int) -> int:
        self._check(name)
        if id & ~0xFFFFFFFF != _REG_MSR:
            raise ioctl_error(
                name, errno.EINVAL, f"register {id:#x}: there are MSRs alone, {_REG_MSR:#x} | index"
            )
        return id & 0xFFFFFFFF

    def get_reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST: nothing beside the MSRs, which it doesn't list."""
        self._check("KVM_GET_REG_LIST")
        return []

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE."""
        self._check("KVM_X86_SETUP_MCE")
        _named("KVM_X86_SETUP_MCE", self._vcpu.setup_mce, mcg_cap)

    def x86_set_mce(self, mce: x.kvm_x86_mce) -> None:
        """KVM_X86_SET_MCE."""
        self._check("KVM_X86_SET_MCE")
        args = mce.status, mce.addr, mce.misc, mce.mcg_status, mce.bank
        _named("KVM_X86_SET_MCE", self._vcpu.set_mce, *args)

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK. A signal that comes while the guest runs, and isn't masked, is noticed within 50 ms."""
        self._check("KVM_SET_SIGNAL_MASK")
        self._vcpu.set_signal_mask(
            None if signals is None else sum({1 << (number - 1) for number in signals})
        )

    def get_cpuid2(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        self._check("KVM_GET_CPUID2")
        return [x.kvm_cpuid_entry2(*entry) for entry in self._vcpu.get_cpuid()]

    def set_cpuid(self, entries: Sequence[x.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID."""
        self._check("KVM_SET_CPUID")
        if len(entries) > 256:
            raise ioctl_error("KVM_SET_CPUID", errno.E2BIG)
        self._vcpu.set_cpuid([(e.function, 0, 0, e.eax, e.ebx, e.ecx, e.edx) for e in entries])

    def set_cpuid2(self, entries: Sequence[x.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2."""
        self._check("KVM_SET_CPUID2")
        if len(entries) > 256:
            raise ioctl_error("KVM_SET_CPUID2", errno.E2BIG)
        self._vcpu.set_cpuid([(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries])

    def get_lapic(self) -> x.kvm_lapic_state:
        """KVM_GET_LAPIC."""
        self._check("KVM_GET_LAPIC")
        return x.kvm_lapic_state.from_buffer_copy(_named("KVM_GET_LAPIC", self._vcpu.get_lapic))

    def set_lapic(self, lapic: x.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""
        self._check("KVM_SET_LAPIC")
        _named("KVM_SET_LAPIC", self._vcpu.set_lapic, bytes(lapic))

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING."""
        self._check("KVM_TPR_ACCESS_REPORTING")
        self._vcpu.set_tpr_reporting(enabled)

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR."""
        self._check("KVM_SET_VAPIC_ADDR")
        _named("KVM_SET_VAPIC_ADDR", self._vcpu.set_vapic, vapic_addr)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE."""
        self._check("KVM_GET_MP_STATE")
        return self._vcpu.get_mp_state()

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        self._check("KVM_SET_MP_STATE")
        if not 0 <= mp_state <= 4 or (mp_state and self._machine.irqchip is None):
            raise ioctl_error("KVM_SET_MP_STATE", errno.EINVAL)
        _named("KVM_SET_MP_STATE", self._vcpu.set_mp_state, mp_state)

    def get_vcpu_events(self) -> x.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        self._check("KVM_GET_VCPU_EVENTS")
        return x.kvm_vcpu_events.from_buffer_copy(self._vcpu.get_vcpu_events())

    def set_vcpu_events(self, events: x.kvm_vcpu_events | arm64.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._check("KVM_SET_VCPU_EVENTS")
        if events.flags & ~_EVENT_FLAGS:
            raise ioctl_error("KVM_SET_VCPU_EVENTS", errno.EINVAL, f"flags {events.flags:#x}")
        _named("KVM_SET_VCPU_EVENTS", self._vcpu.set_vcpu_events, bytes(events))

    def get_debugregs(self) -> x.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        self._check("KVM_GET_DEBUGREGS")
        return x.kvm_debugregs.from_buffer_copy(self._vcpu.get_debugregs())

    def set_debugregs(self, debugregs: x.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._check("KVM_SET_DEBUGREGS")
        if debugregs.flags:
            raise ioctl_error("KVM_SET_DEBUGREGS", errno.EINVAL)
        _named("KVM_SET_DEBUGREGS", self._vcpu.set_debugregs, bytes(debugregs))

    def set_guest_debug(self, debug: x.kvm_guest_debug | arm64.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        self._check("KVM_SET_GUEST_DEBUG")
        if not isinstance(debug, x.kvm_guest_debug) or debug.control & ~_GUEST_DEBUG:
            raise ioctl_error("KVM_SET_GUEST_DEBUG", errno.EINVAL)
        registers = list(debug.arch.debugreg)
        _named("KVM_SET_GUEST_DEBUG", self._vcpu.set_guest_debug, debug.control, registers)

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD."""
        self._check("KVM_GET_STATS_FD")
        return _named("KVM_GET_STATS_FD", self._vcpu.stats_fd)

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """The VM's slots."""
        return self._machine.slots.all()

    def translate(self, linear_address: int) -> common.kvm_translation:
        """KVM_TRANSLATE."""
        self._check("KVM_TRANSLATE")
        gpa = self._vcpu.translate(linear_address)
        return c.kvm_translation(
            linear_address=linear_address,
            physical_address=(1 << 64) - 1 if gpa is None else gpa,
            valid=gpa is not None,
            writeable=1,
        )

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT."""
        self._check("KVM_INTERRUPT")
        if not 0 <= irq < 256:
            raise ioctl_error("KVM_INTERRUPT", errno.EINVAL)
        if isinstance(self._machine.irqchip, IrqChip):
            raise ioctl_error("KVM_INTERRUPT", errno.ENXIO)
        try:
            self._vcpu.interrupt(irq)
        except FileExistsError as error:
            if self._machine.irqchip is not None:
                raise ioctl_error("KVM_INTERRUPT", errno.EEXIST) from error
            events = self.get_vcpu_events()  # without local APICs, the later one counts
            events.interrupt.injected, events.interrupt.nr, events.flags = 1, irq, 0
            self.set_vcpu_events(events)

    def nmi(self) -> None:
        """KVM_NMI."""
        self._check("KVM_NMI")
        self._vcpu.nmi()

    def smi(self) -> None:
        """KVM_SMI."""
        self._check("KVM_SMI")
        self._vcpu.smi()

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        _named("KVM_SET_TSC_KHZ", self._vcpu.set_tsc_khz, _tsc_khz(self, khz))

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        self._check("KVM_GET_TSC_KHZ")
        return self._vcpu.get_tsc_khz()

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL."""
        self._check("KVM_KVMCLOCK_CTRL")
        _named("KVM_KVMCLOCK_CTRL", self._vcpu.kvmclock_ctrl)

    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR: the TSC's offset."""
        name = "KVM_SET_DEVICE_ATTR"
        self._tsc_offset(name, group, attr)
        self._vcpu.set_tsc_offset(int.from_bytes(_named(name, load_bytes, addr, 8), "little"))

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR: the TSC's offset."""
        name = "KVM_GET_DEVICE_ATTR"
        self._tsc_offset(name, group, attr)
        _named(name, store_bytes, addr, self._vcpu.get_tsc_offset().to_bytes(8, "little"))

    def _tsc_offset(self, name: str, group: int, attr: int) -> None:
        if not self.has_device_attr(group, attr):
            raise ioctl_error(name, errno.ENXIO, f"attribute {attr} of group {group}")

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR."""
        self._check("KVM_HAS_DEVICE_ATTR")
        return (group, attr) == (x.KVM_VCPU_TSC_CTRL, x.KVM_VCPU_TSC_OFFSET)


def _tsc_khz(descriptor: Vm | Vcpu, khz: int) -> int:
    """The argument of KVM_SET_TSC_KHZ: 0 is the host's frequency."""
    name = "KVM_SET_TSC_KHZ"
    descriptor._check(name)
    if not 0 <= khz < _MAX_TSC_KHZ:
        raise ioctl_error(name, errno.EINVAL, f"{khz} kHz: below {_MAX_TSC_KHZ}")
    return khz or _engine.host_tsc_khz()


def _check_sregs(name: str, sregs: x.kvm_sregs | x.kvm_sregs2) -> None:
    """What the engine doesn't look at: a 64-bit code segment outside long mode, and CR4 bits that no guest is offered."""
    if sregs.cs.l and not sregs.efer & 1 << 10:
        raise ioctl_error(name, errno.EINVAL, "cs.l without EFER.LMA")
    if sregs.cr4 & _CR4_NOT_OFFERED:
        raise ioctl_error(name, errno.EINVAL, f"cr4 {sregs.cr4:#x}")


def _has_pdptrs(sregs: x.kvm_sregs2) -> bool:
    """Whether paging is PAE's: CR0.PG and CR4.PAE without EFER.LMA."""
    return bool(sregs.cr0 & 1 << 31 and sregs.cr4 & 1 << 5 and not sregs.efer & 1 << 10)


def _named(name: str, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call into the engine; an error of its bears the ioctl's name."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise ioctl_error(name, error.errno or errno.EINVAL) from error
