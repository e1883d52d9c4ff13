"""What ``<linux/kvm.h>`` defines for every architecture, up to Linux 6.18.

A struct that ends in a C flexible array has its head alone here; `kvmkit.kvm` appends the entries.
"""

from ctypes import Array, Structure, Union, c_int, c_uint8, c_uint32, c_uint64, c_ulong
from typing import Annotated

from kvmkit.uapi.layout import io, ior, iow, iowr, s16, s32, struct, u8, u16, u32, u64

KVM_API_VERSION = 12

# Exit reasons, kvm_run.exit_reason.
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_S390_SIEIC = 13
KVM_EXIT_S390_RESET = 14
KVM_EXIT_DCR = 15
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_OSI = 18
KVM_EXIT_PAPR_HCALL = 19
KVM_EXIT_S390_UCONTROL = 20
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_S390_TSCH = 22
KVM_EXIT_EPR = 23
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_S390_STSI = 25
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_ARM_NISV = 28
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_RISCV_SBI = 35
KVM_EXIT_RISCV_CSR = 36
KVM_EXIT_NOTIFY = 37
KVM_EXIT_LOONGARCH_IOCSR = 38
KVM_EXIT_MEMORY_FAULT = 39
KVM_EXIT_TDX = 40

EXIT_REASONS = {value: name for name, value in list(globals().items()) if name.startswith("KVM_EXIT_")}
"""Exit reason → its name."""

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3
KVM_SYSTEM_EVENT_WAKEUP = 4
KVM_SYSTEM_EVENT_SUSPEND = 5
KVM_SYSTEM_EVENT_SEV_TERM = 6
KVM_SYSTEM_EVENT_TDX_FATAL = 7

KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2
KVM_NOTIFY_CONTEXT_INVALID = 1 << 0
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3

SYNC_REGS_SIZE_BYTES = 2048

# Members of kvm_run's exit union that look the same everywhere; x86 and arm64 add `debug`.


@struct
class kvm_run_hw(Structure):
    """KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: u64


@struct
class kvm_run_fail_entry(Structure):
    """KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: u64
    cpu: u32


@struct
class kvm_run_ex(Structure):
    """KVM_EXIT_EXCEPTION."""

    exception: u32
    error_code: u32


@struct
class kvm_run_io(Structure):
    """KVM_EXIT_IO. `data_offset` is relative to the start of kvm_run."""

    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@struct
class kvm_run_mmio(Structure):
    """KVM_EXIT_MMIO."""

    phys_addr: u64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: u32
    is_write: u8


@struct
class kvm_run_hypercall(Structure):
    """KVM_EXIT_HYPERCALL. `flags` was `longmode`, a __u32, before Linux 6.4."""

    nr: u64
    args: Annotated[Array[c_uint64], c_uint64 * 6]
    ret: u64
    flags: u64


@struct
class kvm_run_tpr_access(Structure):
    """KVM_EXIT_TPR_ACCESS."""

    rip: u64
    is_write: u32
    pad: u32


@struct
class kvm_run_internal(Structure):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: u32
    ndata: u32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@struct
class kvm_run_emulation_failure(Structure):
    """KVM_EXIT_INTERNAL_ERROR with suberror KVM_INTERNAL_ERROR_EMULATION."""

    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Annotated[Array[c_uint8], c_uint8 * 15]


@struct
class kvm_run_system_event(Structure):
    """KVM_EXIT_SYSTEM_EVENT."""

    type: u32
    ndata: u32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@struct
class kvm_run_eoi(Structure):
    """KVM_EXIT_IOAPIC_EOI."""

    vector: u8


@struct
class kvm_run_arm_nisv(Structure):
    """KVM_EXIT_ARM_NISV."""

    esr_iss: u64
    fault_ipa: u64


@struct
class kvm_run_msr(Structure):
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR."""

    error: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 7]
    reason: u32
    index: u32
    data: u64


@struct
class kvm_run_notify(Structure):
    """KVM_EXIT_NOTIFY."""

    flags: u32


@struct
class kvm_run_memory_fault(Structure):
    """KVM_EXIT_MEMORY_FAULT."""

    flags: u64
    gpa: u64
    size: u64


KVM_EXIT_HYPERV_SYNIC = 1
KVM_EXIT_HYPERV_HCALL = 2
KVM_EXIT_HYPERV_SYNDBG = 3


@struct
class _hyperv_synic(Structure):
    msr: u32
    pad2: u32
    control: u64
    evt_page: u64
    msg_page: u64


@struct
class _hyperv_hcall(Structure):
    input: u64
    result: u64
    params: Annotated[Array[c_uint64], c_uint64 * 2]


@struct
class _hyperv_syndbg(Structure):
    msr: u32
    pad2: u32
    control: u64
    status: u64
    send_page: u64
    recv_page: u64
    pending_page: u64


@struct
class _hyperv_union(Union):
    synic: _hyperv_synic
    hcall: _hyperv_hcall
    syndbg: _hyperv_syndbg


@struct
class kvm_hyperv_exit(Structure):
    """KVM_EXIT_HYPERV. `type` is one of KVM_EXIT_HYPERV_* and selects the member of `u`."""

    type: u32
    pad1: u32
    u: _hyperv_union


KVM_EXIT_XEN_HCALL = 1


@struct
class _xen_hcall(Structure):
    longmode: u32
    cpl: u32
    input: u64
    result: u64
    params: Annotated[Array[c_uint64], c_uint64 * 6]


@struct
class _xen_union(Union):
    hcall: _xen_hcall


@struct
class kvm_xen_exit(Structure):
    """KVM_EXIT_XEN. `type` is KVM_EXIT_XEN_HCALL."""

    type: u32
    u: _xen_union


@struct
class _tdx_unknown(Structure):
    ret: u64
    data: Annotated[Array[c_uint64], c_uint64 * 5]


@struct
class _tdx_get_quote(Structure):
    ret: u64
    gpa: u64
    size: u64


@struct
class _tdx_get_tdvmcall_info(Structure):
    ret: u64
    leaf: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64


@struct
class _tdx_setup_event_notify(Structure):
    ret: u64
    vector: u64


@struct
class _tdx_union(Union):
    unknown: _tdx_unknown
    get_quote: _tdx_get_quote
    get_tdvmcall_info: _tdx_get_tdvmcall_info
    setup_event_notify: _tdx_setup_event_notify


@struct
class kvm_run_tdx(Structure):
    """KVM_EXIT_TDX. `nr` is the TDVMCALL and selects the member; `ret` of each is the answer."""

    _anonymous_ = ("u",)
    flags: u64
    nr: u64
    u: _tdx_union


# What other architectures' KVMs exit with.


@struct
class kvm_run_s390_sieic(Structure):
    """KVM_EXIT_S390_SIEIC."""

    icptcode: u8
    ipa: u16
    ipb: u32


@struct
class kvm_run_s390_ucontrol(Structure):
    """KVM_EXIT_S390_UCONTROL."""

    trans_exc_code: u64
    pgm_code: u32


@struct
class kvm_run_s390_tsch(Structure):
    """KVM_EXIT_S390_TSCH."""

    subchannel_id: u16
    subchannel_nr: u16
    io_int_parm: u32
    io_int_word: u32
    ipb: u32
    dequeued: u8


@struct
class kvm_run_s390_stsi(Structure):
    """KVM_EXIT_S390_STSI."""

    addr: u64
    ar: u8
    reserved: u8
    fc: u8
    sel1: u8
    sel2: u16


@struct
class kvm_run_dcr(Structure):
    """KVM_EXIT_DCR (ppc)."""

    dcrn: u32
    data: u32
    is_write: u8


@struct
class kvm_run_osi(Structure):
    """KVM_EXIT_OSI (ppc)."""

    gprs: Annotated[Array[c_uint64], c_uint64 * 32]


@struct
class kvm_run_papr_hcall(Structure):
    """KVM_EXIT_PAPR_HCALL (ppc)."""

    nr: u64
    ret: u64
    args: Annotated[Array[c_uint64], c_uint64 * 9]


@struct
class kvm_run_epr(Structure):
    """KVM_EXIT_EPR (ppc)."""

    epr: u32


@struct
class kvm_run_riscv_sbi(Structure):
    """KVM_EXIT_RISCV_SBI."""

    extension_id: u64
    function_id: u64
    args: Annotated[Array[c_uint64], c_uint64 * 6]
    ret: Annotated[Array[c_uint64], c_uint64 * 2]


@struct
class kvm_run_riscv_csr(Structure):
    """KVM_EXIT_RISCV_CSR."""

    csr_num: u64
    new_value: u64
    write_mask: u64
    ret_value: u64


@struct
class kvm_run_iocsr_io(Structure):
    """KVM_EXIT_LOONGARCH_IOCSR."""

    phys_addr: u64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: u32
    is_write: u8


@struct
class _foreign_exits(Union):
    s390_sieic: kvm_run_s390_sieic
    s390_reset_flags: u64
    s390_ucontrol: kvm_run_s390_ucontrol
    s390_tsch: kvm_run_s390_tsch
    s390_stsi: kvm_run_s390_stsi
    dcr: kvm_run_dcr
    osi: kvm_run_osi
    papr_hcall: kvm_run_papr_hcall
    epr: kvm_run_epr
    riscv_sbi: kvm_run_riscv_sbi
    riscv_csr: kvm_run_riscv_csr
    iocsr_io: kvm_run_iocsr_io


# Memory.
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


@struct
class kvm_userspace_memory_region(Structure):
    """KVM_SET_USER_MEMORY_REGION."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@struct
class kvm_userspace_memory_region2(Structure):
    """KVM_SET_USER_MEMORY_REGION2."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64
    guest_memfd: u32
    pad1: u32
    pad2: Annotated[Array[c_uint64], c_uint64 * 14]


@struct
class kvm_memory_attributes(Structure):
    """KVM_SET_MEMORY_ATTRIBUTES."""

    address: u64
    size: u64
    attributes: u64
    flags: u64


@struct
class kvm_create_guest_memfd(Structure):
    """KVM_CREATE_GUEST_MEMFD."""

    size: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], c_uint64 * 6]


@struct
class kvm_pre_fault_memory(Structure):
    """KVM_PRE_FAULT_MEMORY."""

    gpa: u64
    size: u64
    flags: u64
    padding: Annotated[Array[c_uint64], c_uint64 * 5]


@struct
class kvm_dirty_log(Structure):
    """KVM_GET_DIRTY_LOG. `dirty_bitmap` is the address of one bit a page, in whole 64-bit words."""

    slot: u32
    padding1: u32
    dirty_bitmap: u64


@struct
class kvm_clear_dirty_log(Structure):
    """KVM_CLEAR_DIRTY_LOG."""

    slot: u32
    num_pages: u32
    first_page: u64
    dirty_bitmap: u64


# Flags of KVM_CREATE_GUEST_MEMFD (KVM_CAP_GUEST_MEMFD_FLAGS).
GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3


@struct
class kvm_dirty_gfn(Structure):
    """An entry of a vCPU's dirty ring."""

    flags: u32
    slot: u32
    offset: u64


@struct
class kvm_coalesced_mmio_zone(Structure):
    """KVM_REGISTER_COALESCED_MMIO and KVM_UNREGISTER_COALESCED_MMIO."""

    addr: u64
    size: u32
    pio: u32


@struct
class kvm_coalesced_mmio(Structure):
    """An entry of the coalesced MMIO ring."""

    phys_addr: u64
    len: u32
    pio: u32
    data: Annotated[Array[c_uint8], c_uint8 * 8]


@struct
class kvm_coalesced_mmio_ring(Structure):
    """The head of the coalesced MMIO ring; kvm_coalesced_mmio entries follow up to the end of the page."""

    first: u32
    last: u32


@struct
class kvm_translation(Structure):
    """KVM_TRANSLATE."""

    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: Annotated[Array[c_uint8], c_uint8 * 5]


# Interrupts.


@struct
class _irq_or_status(Union):
    irq: u32
    status: s32


@struct
class kvm_irq_level(Structure):
    """KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS. `status` shares the place of `irq`."""

    _anonymous_ = ("u",)
    u: _irq_or_status
    level: u32


@struct
class kvm_interrupt(Structure):
    """KVM_INTERRUPT."""

    irq: u32


KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQ_ROUTING_HV_SINT = 4
KVM_IRQ_ROUTING_XEN_EVTCHN = 5


@struct
class kvm_irq_routing_irqchip(Structure):
    """A GSI wired to a pin of an interrupt chip."""

    irqchip: u32
    pin: u32


@struct
class kvm_irq_routing_msi(Structure):
    """A GSI that sends an MSI."""

    address_lo: u32
    address_hi: u32
    data: u32
    devid: u32


@struct
class kvm_irq_routing_hv_sint(Structure):
    """A GSI that raises a synthetic interrupt source of Hyper-V's."""

    vcpu: u32
    sint: u32


KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL = 0xFFFFFFFF


@struct
class kvm_irq_routing_xen_evtchn(Structure):
    """A GSI that is a Xen event channel; also KVM_XEN_HVM_EVTCHN_SEND."""

    port: u32
    vcpu: u32
    priority: u32


@struct
class _irq_routing_union(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    hv_sint: kvm_irq_routing_hv_sint
    xen_evtchn: kvm_irq_routing_xen_evtchn
    pad: Annotated[Array[c_uint32], c_uint32 * 8]


@struct
class kvm_irq_routing_entry(Structure):
    """One entry of KVM_SET_GSI_ROUTING."""

    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: _irq_routing_union


@struct
class kvm_irq_routing(Structure):
    """The head of KVM_SET_GSI_ROUTING; `nr` entries follow."""

    nr: u32
    flags: u32


KVM_MSI_VALID_DEVID = 1 << 0


@struct
class kvm_msi(Structure):
    """KVM_SIGNAL_MSI."""

    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 12]


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


@struct
class kvm_irqfd(Structure):
    """KVM_IRQFD."""

    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 16]


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2


@struct
class kvm_ioeventfd(Structure):
    """KVM_IOEVENTFD. `len` is 1, 2, 4 or 8 bytes, or 0 to ignore the length."""

    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: Annotated[Array[c_uint8], c_uint8 * 36]


# vCPU state that is not bound to an architecture.
KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_MP_STATE_STOPPED = 5
KVM_MP_STATE_AP_RESET_HOLD = 9
KVM_MP_STATE_SUSPENDED = 10


@struct
class kvm_mp_state(Structure):
    """KVM_GET_MP_STATE and KVM_SET_MP_STATE."""

    mp_state: u32


@struct
class kvm_signal_mask(Structure):
    """The head of KVM_SET_SIGNAL_MASK; `len` bytes of a kernel sigset follow."""

    len: u32


KVM_GUESTDBG_ENABLE = 0x1
KVM_GUESTDBG_SINGLESTEP = 0x2


@struct
class kvm_enable_cap(Structure):
    """KVM_ENABLE_CAP."""

    cap: u32
    flags: u32
    args: Annotated[Array[c_uint64], c_uint64 * 4]
    pad: Annotated[Array[c_uint8], c_uint8 * 64]


# kvm_clock_data.flags
KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3


@struct
class kvm_clock_data(Structure):
    """KVM_GET_CLOCK and KVM_SET_CLOCK. `clock` and `realtime` are nanoseconds."""

    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


KVM_REG_ARCH_MASK = 0xFF00000000000000
KVM_REG_X86 = 0x2000000000000000
KVM_REG_ARM64 = 0x6000000000000000
KVM_REG_SIZE_SHIFT = 52
KVM_REG_SIZE_MASK = 0x00F0000000000000
KVM_REG_SIZE_U8 = 0x0000000000000000
KVM_REG_SIZE_U16 = 0x0010000000000000
KVM_REG_SIZE_U32 = 0x0020000000000000
KVM_REG_SIZE_U64 = 0x0030000000000000
KVM_REG_SIZE_U128 = 0x0040000000000000
KVM_REG_SIZE_U256 = 0x0050000000000000
KVM_REG_SIZE_U512 = 0x0060000000000000
KVM_REG_SIZE_U1024 = 0x0070000000000000
KVM_REG_SIZE_U2048 = 0x0080000000000000


def reg_size_bytes(id: int) -> int:
    """Size of the register `id` of KVM_GET_ONE_REG (``KVM_REG_SIZE`` of the kernel)."""
    return 1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)


@struct
class kvm_reg_list(Structure):
    """The head of KVM_GET_REG_LIST; `n` __u64 ids follow."""

    n: u64


@struct
class kvm_one_reg(Structure):
    """KVM_GET_ONE_REG and KVM_SET_ONE_REG. `addr` is where the value lies."""

    id: u64
    addr: u64


# Devices.
KVM_CREATE_DEVICE_TEST = 1
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_TYPE_ARM_VGIC_V2 = 5
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_TYPE_ARM_VGIC_ITS = 8
KVM_DEV_TYPE_ARM_PV_TIME = 10


@struct
class kvm_create_device(Structure):
    """KVM_CREATE_DEVICE."""

    type: u32
    fd: u32
    flags: u32


@struct
class kvm_device_attr(Structure):
    """KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR."""

    flags: u32
    group: u32
    attr: u64
    addr: u64


KVM_DEV_VFIO_FILE = 1
KVM_DEV_VFIO_FILE_ADD = 1
KVM_DEV_VFIO_FILE_DEL = 2

KVM_STATS_TYPE_MASK = 0xF
KVM_STATS_TYPE_CUMULATIVE = 0x0
KVM_STATS_TYPE_INSTANT = 0x1
KVM_STATS_TYPE_PEAK = 0x2
KVM_STATS_TYPE_LINEAR_HIST = 0x3
KVM_STATS_TYPE_LOG_HIST = 0x4
KVM_STATS_UNIT_MASK = 0xF0
KVM_STATS_UNIT_NONE = 0x00
KVM_STATS_UNIT_BYTES = 0x10
KVM_STATS_UNIT_SECONDS = 0x20
KVM_STATS_UNIT_CYCLES = 0x30
KVM_STATS_UNIT_BOOLEAN = 0x40
KVM_STATS_BASE_MASK = 0xF00
KVM_STATS_BASE_POW10 = 0x000
KVM_STATS_BASE_POW2 = 0x100


@struct
class kvm_stats_header(Structure):
    """The start of a stats fd."""

    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@struct
class kvm_stats_desc(Structure):
    """One descriptor of a stats fd; its name follows."""

    flags: u32
    exponent: s16
    size: u16
    offset: u32
    bucket_size: u32


@struct
class kvm_enc_region(Structure):
    """KVM_MEMORY_ENCRYPT_REG_REGION and KVM_MEMORY_ENCRYPT_UNREG_REGION."""

    addr: u64
    size: u64


# ioctls whose argument looks the same on every architecture.
# System.
KVM_GET_API_VERSION = io(0x00)
KVM_CREATE_VM = io(0x01)
KVM_CHECK_EXTENSION = io(0x03)
KVM_GET_VCPU_MMAP_SIZE = io(0x04)
# VM.
KVM_CREATE_VCPU = io(0x41)
KVM_GET_DIRTY_LOG = iow(0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = iow(0x46, kvm_userspace_memory_region)
KVM_SET_USER_MEMORY_REGION2 = iow(0x49, kvm_userspace_memory_region2)
KVM_CREATE_IRQCHIP = io(0x60)
KVM_IRQ_LINE = iow(0x61, kvm_irq_level)
KVM_IRQ_LINE_STATUS = iowr(0x67, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO = iow(0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = iow(0x68, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING = iow(0x6A, kvm_irq_routing)
KVM_IRQFD = iow(0x76, kvm_irqfd)
KVM_IOEVENTFD = iow(0x79, kvm_ioeventfd)
KVM_SIGNAL_MSI = iow(0xA5, kvm_msi)
KVM_MEMORY_ENCRYPT_OP = iowr(0xBA, c_ulong)
KVM_MEMORY_ENCRYPT_REG_REGION = ior(0xBB, kvm_enc_region)
KVM_MEMORY_ENCRYPT_UNREG_REGION = ior(0xBC, kvm_enc_region)
KVM_CLEAR_DIRTY_LOG = iowr(0xC0, kvm_clear_dirty_log)
KVM_RESET_DIRTY_RINGS = io(0xC7)
KVM_SET_MEMORY_ATTRIBUTES = iow(0xD2, kvm_memory_attributes)
KVM_CREATE_GUEST_MEMFD = iowr(0xD4, kvm_create_guest_memfd)
KVM_CREATE_DEVICE = iowr(0xE0, kvm_create_device)
# vCPU.
KVM_RUN = io(0x80)
KVM_TRANSLATE = iowr(0x85, kvm_translation)
KVM_INTERRUPT = iow(0x86, kvm_interrupt)
KVM_SET_SIGNAL_MASK = iow(0x8B, kvm_signal_mask)
KVM_GET_MP_STATE = ior(0x98, kvm_mp_state)
KVM_SET_MP_STATE = iow(0x99, kvm_mp_state)
KVM_ENABLE_CAP = iow(0xA3, kvm_enable_cap)
KVM_GET_ONE_REG = iow(0xAB, kvm_one_reg)
KVM_SET_ONE_REG = iow(0xAC, kvm_one_reg)
KVM_GET_REG_LIST = iowr(0xB0, kvm_reg_list)
KVM_ARM_VCPU_FINALIZE = iow(0xC2, c_int)
KVM_GET_STATS_FD = io(0xCE)
KVM_PRE_FAULT_MEMORY = iowr(0xD5, kvm_pre_fault_memory)
# Device.
KVM_SET_DEVICE_ATTR = iow(0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = iow(0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = iow(0xE3, kvm_device_attr)
