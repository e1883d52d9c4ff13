"""What ``<asm/kvm.h>`` defines on arm64, up to Linux 6.18, and kvm_run as arm64 lays it out."""

from ctypes import Array, Structure, Union, c_char, c_uint8, c_uint32, c_uint64
from typing import Annotated

from kvmkit.uapi import common
from kvmkit.uapi.common import KVM_REG_ARM64, KVM_REG_SIZE_U32, KVM_REG_SIZE_U64, KVM_REG_SIZE_U128
from kvmkit.uapi.layout import ior, iow, offset_of, struct, u8, u16, u32, u64

KVM_COALESCED_MMIO_PAGE_OFFSET = 1
KVM_DIRTY_LOG_PAGE_OFFSET = 64
KVM_NR_SPSR = 5
KVM_NR_IRQCHIPS = 1
KVM_ARM_MAX_DBG_REGS = 16

# KVM_CREATE_VM's type
KVM_VM_TYPE_ARM_IPA_SIZE_MASK = 0xFF


# vCPU set-up.
KVM_ARM_TARGET_GENERIC_V8 = 5
# Bits of kvm_vcpu_init.features
KVM_ARM_VCPU_POWER_OFF = 0
KVM_ARM_VCPU_EL1_32BIT = 1
KVM_ARM_VCPU_PSCI_0_2 = 2
KVM_ARM_VCPU_PMU_V3 = 3
KVM_ARM_VCPU_SVE = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC = 6
KVM_ARM_VCPU_HAS_EL2 = 7


@struct
class kvm_vcpu_init(Structure):
    """KVM_ARM_VCPU_INIT and KVM_ARM_PREFERRED_TARGET."""

    target: u32
    features: Annotated[Array[c_uint32], c_uint32 * 7]


# Registers: this is the layout that the ids of the core registers are offsets into.


@struct
class user_pt_regs(Structure):
    """``<asm/ptrace.h>``: the general registers."""

    regs: Annotated[Array[c_uint64], c_uint64 * 31]
    sp: u64
    pc: u64
    pstate: u64


@struct
class user_fpsimd_state(Structure):
    """``<asm/ptrace.h>``: V0 to V31, each two 64-bit words, low word first."""

    vregs: Annotated[Array[Array[c_uint64]], (c_uint64 * 2) * 32]
    fpsr: u32
    fpcr: u32
    _reserved: Annotated[Array[c_uint32], c_uint32 * 2]


@struct
class kvm_regs(Structure):
    """The core registers; read and written one by one with KVM_GET_ONE_REG.

    In C `fp_regs` is aligned to 16 bytes, as __uint128_t is; ctypes has no such type, hence the explicit hole.
    """

    regs: user_pt_regs
    sp_el1: u64
    elr_el1: u64
    spsr: Annotated[Array[c_uint64], c_uint64 * KVM_NR_SPSR]
    _hole: u64
    fp_regs: user_fpsimd_state


_FP_REGS = offset_of(kvm_regs, "fp_regs")

KVM_REG_ARM_COPROC_MASK = 0x000000000FFF0000
KVM_REG_ARM_COPROC_SHIFT = 16
KVM_REG_ARM_CORE = 0x0010 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_DEMUX = 0x0011 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SYSREG = 0x0013 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW = 0x0014 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SVE = 0x0015 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW_FEAT_BMAP = 0x0016 << KVM_REG_ARM_COPROC_SHIFT


def core_reg(offset_bytes: int, size: int = KVM_REG_SIZE_U64) -> int:
    """Id of the core register `offset_bytes` into `kvm_regs` (``KVM_REG_ARM_CORE_REG``)."""
    return KVM_REG_ARM64 | size | KVM_REG_ARM_CORE | offset_bytes // 4


def ARM64_SYS_REG(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """Id of a system register by its encoding."""
    return (
        KVM_REG_ARM64
        | KVM_REG_SIZE_U64
        | KVM_REG_ARM64_SYSREG
        | (op0 & 3) << 14
        | (op1 & 7) << 11
        | (crn & 15) << 7
        | (crm & 15) << 3
        | op2 & 7
    )


def x_reg(n: int) -> int:
    """Id of the general register Xn, 0 <= n <= 30."""
    return core_reg(8 * n)


def v_reg(n: int) -> int:
    """Id of the vector register Vn, 0 <= n <= 31."""
    return core_reg(_FP_REGS + 16 * n, KVM_REG_SIZE_U128)


REG_SP = core_reg(offset_of(user_pt_regs, "sp"))
REG_PC = core_reg(offset_of(user_pt_regs, "pc"))
REG_PSTATE = core_reg(offset_of(user_pt_regs, "pstate"))
REG_FPSR = core_reg(_FP_REGS + offset_of(user_fpsimd_state, "fpsr"), KVM_REG_SIZE_U32)
REG_FPCR = core_reg(_FP_REGS + offset_of(user_fpsimd_state, "fpcr"), KVM_REG_SIZE_U32)

KVM_REG_ARM_PTIMER_CTL = ARM64_SYS_REG(3, 3, 14, 2, 1)
KVM_REG_ARM_PTIMER_CVAL = ARM64_SYS_REG(3, 3, 14, 2, 2)
KVM_REG_ARM_PTIMER_CNT = ARM64_SYS_REG(3, 3, 14, 0, 1)
# CVAL and CNT of the virtual timer carry each other's encoding: an accident that became API.
KVM_REG_ARM_TIMER_CTL = ARM64_SYS_REG(3, 3, 14, 3, 1)
KVM_REG_ARM_TIMER_CVAL = ARM64_SYS_REG(3, 3, 14, 0, 2)
KVM_REG_ARM_TIMER_CNT = ARM64_SYS_REG(3, 3, 14, 3, 2)
KVM_REG_ARM_PSCI_VERSION = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 0
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 1
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 2
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | 3


# Events and debugging.
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW = 1 << 17
KVM_DEBUG_ARCH_HSR_HIGH_VALID = 1 << 0


@struct
class _events_exception(Structure):
    serror_pending: u8
    serror_has_esr: u8
    ext_dabt_pending: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 5]
    serror_esr: u64


@struct
class kvm_vcpu_events(Structure):
    """KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS."""

    exception: _events_exception
    reserved: Annotated[Array[c_uint32], c_uint32 * 12]


@struct
class kvm_guest_debug_arch(Structure):
    """Breakpoints and watchpoints for KVM_GUESTDBG_USE_HW."""

    dbg_bcr: Annotated[Array[c_uint64], c_uint64 * KVM_ARM_MAX_DBG_REGS]
    dbg_bvr: Annotated[Array[c_uint64], c_uint64 * KVM_ARM_MAX_DBG_REGS]
    dbg_wcr: Annotated[Array[c_uint64], c_uint64 * KVM_ARM_MAX_DBG_REGS]
    dbg_wvr: Annotated[Array[c_uint64], c_uint64 * KVM_ARM_MAX_DBG_REGS]


@struct
class kvm_guest_debug(Structure):
    """KVM_SET_GUEST_DEBUG."""

    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


@struct
class kvm_debug_exit_arch(Structure):
    """KVM_EXIT_DEBUG: ESR_EL2 and the faulting address."""

    hsr: u32
    hsr_high: u32
    far: u64


@struct
class kvm_sync_regs(Structure):
    """KVM_CAP_ARM_USER_IRQ: levels of the in-kernel devices' outputs."""

    device_irq_level: u64


KVM_ARM_DEV_EL1_VTIMER = 1 << 0
KVM_ARM_DEV_EL1_PTIMER = 1 << 1
KVM_ARM_DEV_PMU = 1 << 2


@struct
class _sync_union(Union):
    regs: kvm_sync_regs
    padding: Annotated[Array[c_char], c_char * common.SYNC_REGS_SIZE_BYTES]


@struct
class kvm_run_debug(Structure):
    """KVM_EXIT_DEBUG."""

    arch: kvm_debug_exit_arch


@struct
class kvm_run_exit(Union):
    """What `exit_reason` selects in kvm_run."""

    _anonymous_ = ("foreign",)
    hw: common.kvm_run_hw
    fail_entry: common.kvm_run_fail_entry
    ex: common.kvm_run_ex
    io: common.kvm_run_io
    debug: kvm_run_debug
    mmio: common.kvm_run_mmio
    hypercall: common.kvm_run_hypercall
    tpr_access: common.kvm_run_tpr_access
    internal: common.kvm_run_internal
    emulation_failure: common.kvm_run_emulation_failure
    system_event: common.kvm_run_system_event
    eoi: common.kvm_run_eoi
    hyperv: common.kvm_hyperv_exit
    arm_nisv: common.kvm_run_arm_nisv
    msr: common.kvm_run_msr
    xen: common.kvm_xen_exit
    notify: common.kvm_run_notify
    memory_fault: common.kvm_run_memory_fault
    tdx: common.kvm_run_tdx
    foreign: common._foreign_exits
    padding: Annotated[Array[c_char], c_char * 256]


@struct
class kvm_run(Structure):
    """What a vCPU's mapping starts with. C's nameless exit union is `exit`: ``run.exit.mmio.len``."""

    _anonymous_ = ("exit",)
    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[Array[c_uint8], c_uint8 * 6]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: kvm_run_exit
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: _sync_union


# KVM_EXIT_HYPERCALL's and KVM_EXIT_SYSTEM_EVENT's flags
KVM_HYPERCALL_EXIT_SMC = 1 << 0
KVM_HYPERCALL_EXIT_16BIT = 1 << 1
KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2 = 1 << 0
KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED = 1 << 0

# KVM_IRQ_LINE's irq: fields and types.
KVM_ARM_IRQ_VCPU2_SHIFT = 28
KVM_ARM_IRQ_TYPE_SHIFT = 24
KVM_ARM_IRQ_VCPU_SHIFT = 16
KVM_ARM_IRQ_NUM_SHIFT = 0
KVM_ARM_IRQ_TYPE_CPU = 0
KVM_ARM_IRQ_TYPE_SPI = 1
KVM_ARM_IRQ_TYPE_PPI = 2
KVM_ARM_IRQ_CPU_IRQ = 0
KVM_ARM_IRQ_CPU_FIQ = 1

# Interrupt controller: device attributes.
KVM_VGIC_V2_ADDR_TYPE_DIST = 0
KVM_VGIC_V2_ADDR_TYPE_CPU = 1
KVM_VGIC_V3_ADDR_TYPE_DIST = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST = 3
KVM_VGIC_ITS_ADDR_TYPE = 4
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION = 5
KVM_DEV_ARM_VGIC_GRP_ADDR = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS = 1
KVM_DEV_ARM_VGIC_GRP_CPU_REGS = 2
KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3
KVM_DEV_ARM_VGIC_GRP_CTRL = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO = 7
KVM_DEV_ARM_VGIC_GRP_ITS_REGS = 8
KVM_DEV_ARM_VGIC_CTRL_INIT = 0
KVM_DEV_ARM_ITS_SAVE_TABLES = 1
KVM_DEV_ARM_ITS_RESTORE_TABLES = 2
KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES = 3
KVM_DEV_ARM_ITS_CTRL_RESET = 4

# VM and vCPU attributes.
KVM_ARM_VM_SMCCC_CTRL = 0
KVM_ARM_VM_SMCCC_FILTER = 0
KVM_ARM_VCPU_PMU_V3_CTRL = 0
KVM_ARM_VCPU_PMU_V3_IRQ = 0
KVM_ARM_VCPU_PMU_V3_INIT = 1
KVM_ARM_VCPU_PMU_V3_FILTER = 2
KVM_ARM_VCPU_PMU_V3_SET_PMU = 3
KVM_ARM_VCPU_TIMER_CTRL = 1
KVM_ARM_VCPU_TIMER_IRQ_VTIMER = 0
KVM_ARM_VCPU_TIMER_IRQ_PTIMER = 1
KVM_ARM_VCPU_PVTIME_CTRL = 2
KVM_ARM_VCPU_PVTIME_IPA = 0


@struct
class kvm_arm_device_addr(Structure):
    """KVM_ARM_SET_DEVICE_ADDR."""

    id: u64
    addr: u64


@struct
class kvm_arm_counter_offset(Structure):
    """KVM_ARM_SET_COUNTER_OFFSET."""

    counter_offset: u64
    reserved: u64


@struct
class reg_mask_range(Structure):
    """KVM_ARM_GET_REG_WRITABLE_MASKS."""

    addr: u64
    range: u32
    reserved: Annotated[Array[c_uint32], c_uint32 * 13]


@struct
class kvm_pmu_event_filter(Structure):
    """KVM_ARM_VCPU_PMU_V3_FILTER."""

    base_event: u16
    nevents: u16
    action: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 3]


KVM_ARM_TAGS_TO_GUEST = 0
KVM_ARM_TAGS_FROM_GUEST = 1


@struct
class kvm_arm_copy_mte_tags(Structure):
    """KVM_ARM_MTE_COPY_TAGS. `addr` is where the tags lie, a byte each for 16 bytes of memory."""

    guest_ipa: u64
    length: u64
    addr: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], c_uint64 * 2]


KVM_ARM_FEATURE_ID_RANGE = 0
KVM_ARM_FEATURE_ID_RANGE_SIZE = 3 * 8 * 8


@struct
class kvm_smccc_filter(Structure):
    """KVM_ARM_VM_SMCCC_FILTER."""

    base: u32
    nr_functions: u32
    action: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 15]


# VM ioctls.
KVM_ARM_SET_DEVICE_ADDR = iow(0xAB, kvm_arm_device_addr)
KVM_ARM_PREFERRED_TARGET = ior(0xAF, kvm_vcpu_init)
KVM_ARM_MTE_COPY_TAGS = ior(0xB4, kvm_arm_copy_mte_tags)
KVM_ARM_SET_COUNTER_OFFSET = iow(0xB5, kvm_arm_counter_offset)
KVM_ARM_GET_REG_WRITABLE_MASKS = ior(0xB6, reg_mask_range)
# vCPU ioctls.
KVM_SET_GUEST_DEBUG = iow(0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS = ior(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow(0xA0, kvm_vcpu_events)
KVM_ARM_VCPU_INIT = iow(0xAE, kvm_vcpu_init)
