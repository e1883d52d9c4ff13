"""The whole KVM interface of x86-64 and arm64 in one table: Linux 6.18's 114 ioctls without those of other architectures.

The engines name their errors by it, ``docs/kvm-api.md`` is made of it, and tests hold it against the kernel's headers, against
the classes of `kvmkit.kvm` and against both engines.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvmkit.uapi import arm64, common, x86

DESCRIPTORS = ("system", "vm", "vcpu", "device")
ARCHITECTURES = ("x86", "arm64")
_MODULES = {"x86": x86, "arm64": arm64}

# Section of <linux/kvm.h> it is listed in, and beside it other descriptors that know it; ":" before those that do where the
# section doesn't.  Argument: a struct, "int" by value, a pointer to an integer with its size, "-" none.  Architectures.
# Capability to ask for, "-" where it is always there.
_TABLE = """
GET_API_VERSION            system            -                           both   -
CREATE_VM                  system            int                         both   -
GET_MSR_INDEX_LIST         system            kvm_msr_list                x86    -
CHECK_EXTENSION            system,vm         int                         both   -
GET_VCPU_MMAP_SIZE         system            -                           both   -
GET_SUPPORTED_CPUID        system            kvm_cpuid2                  x86    EXT_CPUID
GET_EMULATED_CPUID         system            kvm_cpuid2                  x86    EXT_EMUL_CPUID
GET_MSR_FEATURE_INDEX_LIST system            kvm_msr_list                x86    GET_MSR_FEATURES
CREATE_VCPU                vm                int                         both   -
GET_DIRTY_LOG              vm                kvm_dirty_log               both   -
SET_NR_MMU_PAGES           vm                int                         x86    MMU_SHADOW_CACHE_CONTROL
GET_NR_MMU_PAGES           vm                -                           x86    MMU_SHADOW_CACHE_CONTROL
SET_USER_MEMORY_REGION     vm                kvm_userspace_memory_region both   USER_MEMORY
SET_USER_MEMORY_REGION2    vm                kvm_userspace_memory_region2 both  USER_MEMORY2
SET_TSS_ADDR               vm                int                         x86    SET_TSS_ADDR
SET_IDENTITY_MAP_ADDR      vm                u64                         x86    SET_IDENTITY_MAP_ADDR
CREATE_IRQCHIP             vm                -                           both   IRQCHIP
IRQ_LINE                   vm                kvm_irq_level               both   IRQCHIP
GET_IRQCHIP                vm                kvm_irqchip                 x86    IRQCHIP
SET_IRQCHIP                vm                kvm_irqchip                 x86    IRQCHIP
CREATE_PIT                 vm                -                           x86    PIT
GET_PIT                    vm                kvm_pit_state               x86    PIT
SET_PIT                    vm                kvm_pit_state               x86    PIT
IRQ_LINE_STATUS            vm                kvm_irq_level               both   IRQ_INJECT_STATUS
REGISTER_COALESCED_MMIO    vm                kvm_coalesced_mmio_zone     both   COALESCED_MMIO
UNREGISTER_COALESCED_MMIO  vm                kvm_coalesced_mmio_zone     both   COALESCED_MMIO
SET_GSI_ROUTING            vm                kvm_irq_routing             both   IRQ_ROUTING
REINJECT_CONTROL           vm                kvm_reinject_control        x86    REINJECT_CONTROL
IRQFD                      vm                kvm_irqfd                   both   IRQFD
CREATE_PIT2                vm                kvm_pit_config              x86    PIT2
SET_BOOT_CPU_ID            vm                int                         x86    SET_BOOT_CPU_ID
IOEVENTFD                  vm                kvm_ioeventfd               both   IOEVENTFD
XEN_HVM_CONFIG             vm                kvm_xen_hvm_config          x86    XEN_HVM
SET_CLOCK                  vm                kvm_clock_data              x86    ADJUST_CLOCK
GET_CLOCK                  vm                kvm_clock_data              x86    ADJUST_CLOCK
GET_PIT2                   vm                kvm_pit_state2              x86    PIT_STATE2
SET_PIT2                   vm                kvm_pit_state2              x86    PIT_STATE2
SIGNAL_MSI                 vm                kvm_msi                     both   SIGNAL_MSI
ARM_SET_DEVICE_ADDR        vm                kvm_arm_device_addr         arm64  ARM_SET_DEVICE_ADDR
SET_PMU_EVENT_FILTER       vm                kvm_pmu_event_filter        x86    PMU_EVENT_FILTER
ARM_MTE_COPY_TAGS          vm                kvm_arm_copy_mte_tags       arm64  ARM_MTE
ARM_SET_COUNTER_OFFSET     vm                kvm_arm_counter_offset      arm64  COUNTER_OFFSET
ARM_GET_REG_WRITABLE_MASKS vm                reg_mask_range              arm64  ARM_SUPPORTED_REG_MASK_RANGES
CREATE_DEVICE              vm                kvm_create_device           both   DEVICE_CTRL
ARM_PREFERRED_TARGET       vm                kvm_vcpu_init               arm64  -
MEMORY_ENCRYPT_OP          vm,vcpu           ulong                       x86    VM_TYPES
MEMORY_ENCRYPT_REG_REGION  vm                kvm_enc_region              x86    VM_TYPES
MEMORY_ENCRYPT_UNREG_REGION vm               kvm_enc_region              x86    VM_TYPES
HYPERV_EVENTFD             vm                kvm_hyperv_eventfd          x86    HYPERV_EVENTFD
CLEAR_DIRTY_LOG            vm                kvm_clear_dirty_log         both   MANUAL_DIRTY_LOG_PROTECT2
X86_SET_MSR_FILTER         vm                kvm_msr_filter              x86    X86_MSR_FILTER
RESET_DIRTY_RINGS          vm                -                           both   DIRTY_LOG_RING_ACQ_REL
XEN_HVM_GET_ATTR           vm                kvm_xen_hvm_attr            x86    XEN_HVM
XEN_HVM_SET_ATTR           vm                kvm_xen_hvm_attr            x86    XEN_HVM
XEN_HVM_EVTCHN_SEND        vm                kvm_irq_routing_xen_evtchn  x86    XEN_HVM
SET_MEMORY_ATTRIBUTES      vm                kvm_memory_attributes       x86    MEMORY_ATTRIBUTES
CREATE_GUEST_MEMFD         vm                kvm_create_guest_memfd      both   GUEST_MEMFD
RUN                        vcpu              -                           both   -
GET_REGS                   vcpu              kvm_regs                    x86    -
SET_REGS                   vcpu              kvm_regs                    x86    -
GET_SREGS                  vcpu              kvm_sregs                   x86    -
SET_SREGS                  vcpu              kvm_sregs                   x86    -
GET_SREGS2                 vcpu              kvm_sregs2                  x86    SREGS2
SET_SREGS2                 vcpu              kvm_sregs2                  x86    SREGS2
TRANSLATE                  vcpu              kvm_translation             x86    -
INTERRUPT                  vcpu              kvm_interrupt               x86    -
GET_MSRS                   vcpu,system       kvm_msrs                    x86    -
SET_MSRS                   vcpu              kvm_msrs                    x86    -
SET_CPUID                  vcpu              kvm_cpuid                   x86    -
SET_CPUID2                 vcpu              kvm_cpuid2                  x86    EXT_CPUID
GET_CPUID2                 vcpu              kvm_cpuid2                  x86    EXT_CPUID
SET_SIGNAL_MASK            vcpu              kvm_signal_mask             both   -
GET_FPU                    vcpu              kvm_fpu                     x86    -
SET_FPU                    vcpu              kvm_fpu                     x86    -
GET_LAPIC                  vcpu              kvm_lapic_state             x86    IRQCHIP
SET_LAPIC                  vcpu              kvm_lapic_state             x86    IRQCHIP
TPR_ACCESS_REPORTING       vcpu              kvm_tpr_access_ctl          x86    VAPIC
SET_VAPIC_ADDR             vcpu              kvm_vapic_addr              x86    VAPIC
GET_MP_STATE               vcpu              kvm_mp_state                both   MP_STATE
SET_MP_STATE               vcpu              kvm_mp_state                both   MP_STATE
NMI                        vcpu              -                           x86    USER_NMI
SMI                        vcpu              -                           x86    X86_SMM
SET_GUEST_DEBUG            vcpu              kvm_guest_debug             both   SET_GUEST_DEBUG
X86_SETUP_MCE              vcpu              u64                         x86    MCE
X86_GET_MCE_CAP_SUPPORTED  vcpu:system       u64                         x86    MCE
X86_SET_MCE                vcpu              kvm_x86_mce                 x86    MCE
GET_VCPU_EVENTS            vcpu              kvm_vcpu_events             both   VCPU_EVENTS
SET_VCPU_EVENTS            vcpu              kvm_vcpu_events             both   VCPU_EVENTS
GET_DEBUGREGS              vcpu              kvm_debugregs               x86    DEBUGREGS
SET_DEBUGREGS              vcpu              kvm_debugregs               x86    DEBUGREGS
ENABLE_CAP                 vcpu,vm           kvm_enable_cap              both   ENABLE_CAP_VM
SET_TSC_KHZ                vcpu,vm           int                         x86    TSC_CONTROL
GET_TSC_KHZ                vcpu,vm           -                           x86    GET_TSC_KHZ
GET_XSAVE                  vcpu              kvm_xsave                   x86    XSAVE
SET_XSAVE                  vcpu              kvm_xsave                   x86    XSAVE
GET_XSAVE2                 vcpu              kvm_xsave                   x86    XSAVE2
GET_XCRS                   vcpu              kvm_xcrs                    x86    XCRS
SET_XCRS                   vcpu              kvm_xcrs                    x86    XCRS
GET_ONE_REG                vcpu              kvm_one_reg                 both   ONE_REG
SET_ONE_REG                vcpu              kvm_one_reg                 both   ONE_REG
GET_REG_LIST               vcpu              kvm_reg_list                both   ONE_REG
KVMCLOCK_CTRL              vcpu              -                           x86    KVMCLOCK_CTRL
ARM_VCPU_INIT              vcpu              kvm_vcpu_init               arm64  -
ARM_VCPU_FINALIZE          vcpu              s32                         arm64  ARM_SVE
GET_NESTED_STATE           vcpu              kvm_nested_state            x86    NESTED_STATE
SET_NESTED_STATE           vcpu              kvm_nested_state            x86    NESTED_STATE
GET_SUPPORTED_HV_CPUID     vcpu,system       kvm_cpuid2                  x86    HYPERV_CPUID
XEN_VCPU_GET_ATTR          vcpu              kvm_xen_vcpu_attr           x86    XEN_HVM
XEN_VCPU_SET_ATTR          vcpu              kvm_xen_vcpu_attr           x86    XEN_HVM
GET_STATS_FD               vcpu,vm           -                           both   BINARY_STATS_FD
PRE_FAULT_MEMORY           vcpu              kvm_pre_fault_memory        x86    PRE_FAULT_MEMORY
SET_DEVICE_ATTR            device,vm,vcpu    kvm_device_attr             both   DEVICE_CTRL
GET_DEVICE_ATTR            device,vm,vcpu,system kvm_device_attr         both   DEVICE_CTRL
HAS_DEVICE_ATTR            device,vm,vcpu,system kvm_device_attr         both   DEVICE_CTRL
"""

_SCALARS = {"u64": ctypes.c_uint64, "s32": ctypes.c_int, "ulong": ctypes.c_ulong}
_DIRECTIONS = ("", "in", "out", "in/out")


@dataclass(frozen=True)
class Ioctl:
    """One ioctl."""

    name: str
    """As the kernel has it: KVM_…"""
    section: str
    """Under which descriptor ``<linux/kvm.h>`` lists it."""
    descriptors: tuple[str, ...]
    """Which of `DESCRIPTORS` know it."""
    argument: str
    """The name of the struct that the argument points to, ``u64``, ``s32`` or ``ulong`` for a number, ``int`` for a number by
    value, ``-`` for none."""
    architectures: tuple[str, ...]
    """Those of `ARCHITECTURES` that have it."""
    capability: str | None
    """KVM_CAP_* that says whether it is there; None where it always is."""

    @property
    def method(self) -> str:
        """Its name in the classes of `kvmkit.kvm`."""
        return self.name.removeprefix("KVM_").lower()

    def number(self, architecture: str) -> int:
        """Return the second argument of ioctl(2). It holds the struct's size, so architectures may differ."""
        module: Any = _MODULES[architecture]
        return int(getattr(module, self.name, None) or getattr(common, self.name))

    def struct(self, architecture: str) -> type[Any] | None:
        """Return the type that the argument points to; None for a number by value or no argument."""
        if self.argument in ("-", "int"):
            return None
        module: Any = _MODULES[architecture]
        found: type[Any] = (
            _SCALARS.get(self.argument)
            or getattr(module, self.argument, None)
            or getattr(common, self.argument)
        )
        return found

    @property
    def direction(self) -> str:
        """As `number` encodes it: "in" to the kernel, "out" of it, "in/out", or "" without a struct."""
        return _DIRECTIONS[self.number(self.architectures[0]) >> 30]


def _rows() -> Iterator[Ioctl]:
    for line in _TABLE.split("\n"):
        if line:
            name, where, argument, architectures, capability = line.split()
            section, _, instead = where.partition(":")
            descriptors = tuple((instead or section).split(","))
            yield Ioctl(
                f"KVM_{name}",
                section.split(",")[0],
                descriptors,
                argument,
                ARCHITECTURES if architectures == "both" else (architectures,),
                None if capability == "-" else f"KVM_CAP_{capability}",
            )


IOCTLS = tuple(_rows())
