"""What ``<asm/kvm.h>`` and ``<asm/kvm_para.h>`` define on x86, up to Linux 6.18, and kvm_run as x86 lays it out."""

from ctypes import Array, Structure, Union, c_char, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated

from kvmkit.uapi import common
from kvmkit.uapi.layout import io, ior, iow, iowr, s32, s64, struct, u8, u16, u32, u64

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64

DE_VECTOR = 0
DB_VECTOR = 1
BP_VECTOR = 3
OF_VECTOR = 4
BR_VECTOR = 5
UD_VECTOR = 6
NM_VECTOR = 7
DF_VECTOR = 8
TS_VECTOR = 10
NP_VECTOR = 11
SS_VECTOR = 12
GP_VECTOR = 13
PF_VECTOR = 14
MF_VECTOR = 16
AC_VECTOR = 17
MC_VECTOR = 18
XM_VECTOR = 19
VE_VECTOR = 20

KVM_NR_INTERRUPTS = 256
KVM_IOAPIC_NUM_PINS = 24
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3
KVM_APIC_REG_SIZE = 0x400
KVM_MAX_XCRS = 16

# kvm_run.flags
KVM_RUN_X86_SMM = 1 << 0
KVM_RUN_X86_BUS_LOCK = 1 << 1
KVM_RUN_X86_GUEST_MODE = 1 << 2


# Interrupt chips.


@struct
class kvm_pic_state(Structure):
    """One i8259, for KVM_GET_IRQCHIP and KVM_SET_IRQCHIP."""

    last_irr: u8
    irr: u8
    imr: u8
    isr: u8
    priority_add: u8
    irq_base: u8
    read_reg_select: u8
    poll: u8
    special_mask: u8
    init_state: u8
    auto_eoi: u8
    rotate_on_auto_eoi: u8
    special_fully_nested_mode: u8
    init4: u8
    elcr: u8
    elcr_mask: u8


@struct
class _ioapic_redirect_fields(Structure):
    vector: u8
    delivery_mode: Annotated[int, c_uint8, 3]
    dest_mode: Annotated[int, c_uint8, 1]
    delivery_status: Annotated[int, c_uint8, 1]
    polarity: Annotated[int, c_uint8, 1]
    remote_irr: Annotated[int, c_uint8, 1]
    trig_mode: Annotated[int, c_uint8, 1]
    mask: Annotated[int, c_uint8, 1]
    reserve: Annotated[int, c_uint8, 7]
    reserved: Annotated[Array[c_uint8], c_uint8 * 4]
    dest_id: u8


@struct
class kvm_ioapic_redirect_entry(Union):
    """One redirection entry: `bits` as the guest reads it, or its `fields`."""

    bits: u64
    fields: _ioapic_redirect_fields


@struct
class kvm_ioapic_state(Structure):
    """The IOAPIC, for KVM_GET_IRQCHIP and KVM_SET_IRQCHIP."""

    base_address: u64
    ioregsel: u32
    id: u32
    irr: u32
    pad: u32
    redirtbl: Annotated[Array[kvm_ioapic_redirect_entry], kvm_ioapic_redirect_entry * KVM_IOAPIC_NUM_PINS]


@struct
class _irqchip_union(Union):
    dummy: Annotated[Array[c_char], c_char * 512]
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@struct
class kvm_irqchip(Structure):
    """KVM_GET_IRQCHIP and KVM_SET_IRQCHIP. `chip_id` is one of KVM_IRQCHIP_*."""

    chip_id: u32
    pad: u32
    chip: _irqchip_union


@struct
class kvm_lapic_state(Structure):
    """KVM_GET_LAPIC and KVM_SET_LAPIC: the local APIC's register page up to 0x400, each register 16 bytes apart."""

    regs: Annotated[Array[c_uint8], c_uint8 * KVM_APIC_REG_SIZE]


KVM_PIT_SPEAKER_DUMMY = 1
KVM_PIT_FLAGS_HPET_LEGACY = 0x1
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 0x2


@struct
class kvm_pit_config(Structure):
    """KVM_CREATE_PIT2."""

    flags: u32
    pad: Annotated[Array[c_uint32], c_uint32 * 15]


@struct
class kvm_pit_channel_state(Structure):
    """One counter of the i8254. `count` can be 65536; `count_load_time` is in nanoseconds."""

    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: s64


@struct
class kvm_pit_state(Structure):
    """KVM_GET_PIT and KVM_SET_PIT."""

    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state * 3]


@struct
class kvm_pit_state2(Structure):
    """KVM_GET_PIT2 and KVM_SET_PIT2."""

    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state * 3]
    flags: u32
    reserved: Annotated[Array[c_uint32], c_uint32 * 9]


@struct
class kvm_reinject_control(Structure):
    """KVM_REINJECT_CONTROL."""

    pit_reinject: u8
    reserved: Annotated[Array[c_uint8], c_uint8 * 31]


# Registers.


@struct
class kvm_regs(Structure):
    """KVM_GET_REGS and KVM_SET_REGS."""

    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@struct
class kvm_segment(Structure):
    """A segment register with its hidden part. `limit` is in bytes whatever `g` says."""

    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@struct
class kvm_dtable(Structure):
    """GDTR or IDTR."""

    base: u64
    limit: u16
    padding: Annotated[Array[c_uint16], c_uint16 * 3]


@struct
class kvm_sregs(Structure):
    """KVM_GET_SREGS and KVM_SET_SREGS."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[Array[c_uint64], c_uint64 * 4]


KVM_SREGS2_FLAGS_PDPTRS_VALID = 1


@struct
class kvm_sregs2(Structure):
    """KVM_GET_SREGS2 and KVM_SET_SREGS2."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: Annotated[Array[c_uint64], c_uint64 * 4]


@struct
class kvm_fpu(Structure):
    """KVM_GET_FPU and KVM_SET_FPU. `ftwx` is in FXSAVE's abridged format."""

    fpr: Annotated[Array[Array[c_uint8]], (c_uint8 * 16) * 8]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[Array[Array[c_uint8]], (c_uint8 * 16) * 16]
    mxcsr: u32
    pad2: u32


@struct
class kvm_xsave(Structure):
    """KVM_GET_XSAVE and KVM_SET_XSAVE: an XSAVE area in standard format."""

    region: Annotated[Array[c_uint32], c_uint32 * 1024]


@struct
class kvm_xcr(Structure):
    """One extended control register."""

    xcr: u32
    reserved: u32
    value: u64


@struct
class kvm_xcrs(Structure):
    """KVM_GET_XCRS and KVM_SET_XCRS."""

    nr_xcrs: u32
    flags: u32
    xcrs: Annotated[Array[kvm_xcr], kvm_xcr * KVM_MAX_XCRS]
    padding: Annotated[Array[c_uint64], c_uint64 * 16]


@struct
class kvm_msr_entry(Structure):
    """One model-specific register."""

    index: u32
    reserved: u32
    data: u64


@struct
class kvm_msrs(Structure):
    """The head of KVM_GET_MSRS and KVM_SET_MSRS; `nmsrs` kvm_msr_entry follow."""

    nmsrs: u32
    pad: u32


@struct
class kvm_msr_list(Structure):
    """The head of KVM_GET_MSR_INDEX_LIST; `nmsrs` __u32 follow."""

    nmsrs: u32


KVM_MSR_FILTER_MAX_BITMAP_SIZE = 0x600
KVM_MSR_FILTER_MAX_RANGES = 16
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_DEFAULT_ALLOW = 0
KVM_MSR_FILTER_DEFAULT_DENY = 1


@struct
class kvm_msr_filter_range(Structure):
    """One range of KVM_X86_SET_MSR_FILTER. `bitmap` is an address; a 1 bit allows the access."""

    flags: u32
    nmsrs: u32
    base: u32
    bitmap: u64


@struct
class kvm_msr_filter(Structure):
    """KVM_X86_SET_MSR_FILTER."""

    flags: u32
    ranges: Annotated[Array[kvm_msr_filter_range], kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES]


@struct
class kvm_cpuid_entry(Structure):
    """One CPUID leaf of KVM_SET_CPUID, which knows no sub-leaves."""

    function: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: u32


@struct
class kvm_cpuid(Structure):
    """The head of KVM_SET_CPUID; `nent` kvm_cpuid_entry follow."""

    nent: u32
    padding: u32


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
KVM_CPUID_FLAG_STATEFUL_FUNC = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT = 1 << 2


@struct
class kvm_cpuid_entry2(Structure):
    """One CPUID leaf."""

    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@struct
class kvm_cpuid2(Structure):
    """The head of KVM_SET_CPUID2 and its kin; `nent` kvm_cpuid_entry2 follow."""

    nent: u32
    padding: u32


# Events and debugging.
KVM_VCPUEVENT_VALID_NMI_PENDING = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x02
KVM_VCPUEVENT_VALID_SHADOW = 0x04
KVM_VCPUEVENT_VALID_SMM = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x20
KVM_X86_SHADOW_INT_MOV_SS = 0x01
KVM_X86_SHADOW_INT_STI = 0x02


@struct
class _events_exception(Structure):
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@struct
class _events_interrupt(Structure):
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@struct
class _events_nmi(Structure):
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@struct
class _events_smi(Structure):
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@struct
class _events_triple_fault(Structure):
    pending: u8


@struct
class kvm_vcpu_events(Structure):
    """KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS."""

    exception: _events_exception
    interrupt: _events_interrupt
    nmi: _events_nmi
    sipi_vector: u32
    flags: u32
    smi: _events_smi
    triple_fault: _events_triple_fault
    reserved: Annotated[Array[c_uint8], c_uint8 * 26]
    exception_has_payload: u8
    exception_payload: u64


@struct
class kvm_debugregs(Structure):
    """KVM_GET_DEBUGREGS and KVM_SET_DEBUGREGS."""

    db: Annotated[Array[c_uint64], c_uint64 * 4]
    dr6: u64
    dr7: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], c_uint64 * 9]


KVM_GUESTDBG_USE_SW_BP = 0x00010000
KVM_GUESTDBG_USE_HW_BP = 0x00020000
KVM_GUESTDBG_INJECT_DB = 0x00040000
KVM_GUESTDBG_INJECT_BP = 0x00080000
KVM_GUESTDBG_BLOCKIRQ = 0x00100000


@struct
class kvm_guest_debug_arch(Structure):
    """DR0 to DR7 for KVM_GUESTDBG_USE_HW_BP."""

    debugreg: Annotated[Array[c_uint64], c_uint64 * 8]


@struct
class kvm_guest_debug(Structure):
    """KVM_SET_GUEST_DEBUG."""

    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


@struct
class kvm_debug_exit_arch(Structure):
    """KVM_EXIT_DEBUG."""

    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@struct
class kvm_tpr_access_ctl(Structure):
    """KVM_TPR_ACCESS_REPORTING."""

    enabled: u32
    flags: u32
    reserved: Annotated[Array[c_uint32], c_uint32 * 8]


@struct
class kvm_vapic_addr(Structure):
    """KVM_SET_VAPIC_ADDR."""

    vapic_addr: u64


@struct
class kvm_x86_mce(Structure):
    """KVM_X86_SET_MCE: a machine check to raise."""

    status: u64
    addr: u64
    misc: u64
    mcg_status: u64
    bank: u8
    pad1: Annotated[Array[c_uint8], c_uint8 * 7]
    pad2: Annotated[Array[c_uint64], c_uint64 * 3]


KVM_PMU_EVENT_ALLOW = 0
KVM_PMU_EVENT_DENY = 1
KVM_PMU_EVENT_FLAG_MASKED_EVENTS = 1 << 0
KVM_PMU_CAP_DISABLE = 1 << 0


@struct
class kvm_pmu_event_filter(Structure):
    """The head of KVM_SET_PMU_EVENT_FILTER; `nevents` __u64 follow."""

    action: u32
    nevents: u32
    fixed_counter_bitmap: u32
    flags: u32
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


# Nested virtualization.
KVM_STATE_NESTED_FORMAT_VMX = 0
KVM_STATE_NESTED_FORMAT_SVM = 1
KVM_STATE_NESTED_GUEST_MODE = 0x1
KVM_STATE_NESTED_RUN_PENDING = 0x2
KVM_STATE_NESTED_EVMCS = 0x4
KVM_STATE_NESTED_MTF_PENDING = 0x8
KVM_STATE_NESTED_GIF_SET = 0x100
KVM_STATE_NESTED_SMM_GUEST_MODE = 0x1
KVM_STATE_NESTED_SMM_VMXON = 0x2
KVM_STATE_NESTED_VMX_VMCS_SIZE = 0x1000
KVM_STATE_NESTED_SVM_VMCB_SIZE = 0x1000
KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE = 0x1


@struct
class kvm_vmx_nested_state_data(Structure):
    """What follows kvm_nested_state with KVM_STATE_NESTED_FORMAT_VMX."""

    vmcs12: Annotated[Array[c_uint8], c_uint8 * KVM_STATE_NESTED_VMX_VMCS_SIZE]
    shadow_vmcs12: Annotated[Array[c_uint8], c_uint8 * KVM_STATE_NESTED_VMX_VMCS_SIZE]


@struct
class kvm_svm_nested_state_data(Structure):
    """What follows kvm_nested_state with KVM_STATE_NESTED_FORMAT_SVM."""

    vmcb12: Annotated[Array[c_uint8], c_uint8 * KVM_STATE_NESTED_SVM_VMCB_SIZE]


@struct
class _vmx_smm(Structure):
    flags: u16


@struct
class kvm_vmx_nested_state_hdr(Structure):
    """`kvm_nested_state.hdr.vmx`."""

    vmxon_pa: u64
    vmcs12_pa: u64
    smm: _vmx_smm
    pad: u16
    flags: u32
    preemption_timer_deadline: u64


@struct
class kvm_svm_nested_state_hdr(Structure):
    """`kvm_nested_state.hdr.svm`."""

    vmcb_pa: u64


@struct
class _nested_hdr(Union):
    vmx: kvm_vmx_nested_state_hdr
    svm: kvm_svm_nested_state_hdr
    pad: Annotated[Array[c_uint8], c_uint8 * 120]


@struct
class kvm_nested_state(Structure):
    """The head of KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE; `size` counts it and the data that follow."""

    flags: u16
    format: u16
    size: u32
    hdr: _nested_hdr


# Hyper-V.
KVM_HYPERV_CONN_ID_MASK = 0x00FFFFFF
KVM_HYPERV_EVENTFD_DEASSIGN = 1 << 0


@struct
class kvm_hyperv_eventfd(Structure):
    """KVM_HYPERV_EVENTFD."""

    conn_id: u32
    fd: s32
    flags: u32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


# Xen. KVM_CAP_XEN_HVM gives the flags.
KVM_XEN_HVM_CONFIG_HYPERCALL_MSR = 1 << 0
KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL = 1 << 1
KVM_XEN_HVM_CONFIG_SHARED_INFO = 1 << 2
KVM_XEN_HVM_CONFIG_RUNSTATE = 1 << 3
KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL = 1 << 4
KVM_XEN_HVM_CONFIG_EVTCHN_SEND = 1 << 5
KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG = 1 << 6
KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE = 1 << 7
KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA = 1 << 8


@struct
class kvm_xen_hvm_config(Structure):
    """KVM_XEN_HVM_CONFIG."""

    flags: u32
    msr: u32
    blob_addr_32: u64
    blob_addr_64: u64
    blob_size_32: u8
    blob_size_64: u8
    pad2: Annotated[Array[c_uint8], c_uint8 * 30]


KVM_XEN_INVALID_GFN = 0xFFFFFFFFFFFFFFFF
KVM_XEN_EVTCHN_DEASSIGN = 1 << 0
KVM_XEN_EVTCHN_UPDATE = 1 << 1
KVM_XEN_EVTCHN_RESET = 1 << 2
KVM_XEN_ATTR_TYPE_LONG_MODE = 0x0
KVM_XEN_ATTR_TYPE_SHARED_INFO = 0x1
KVM_XEN_ATTR_TYPE_UPCALL_VECTOR = 0x2
KVM_XEN_ATTR_TYPE_EVTCHN = 0x3
KVM_XEN_ATTR_TYPE_XEN_VERSION = 0x4
KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG = 0x5
KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA = 0x6


@struct
class _xen_shared_info(Union):
    gfn: u64
    hva: u64


@struct
class _xen_evtchn_port(Structure):
    port: u32
    vcpu: u32
    priority: u32


@struct
class _xen_evtchn_eventfd(Structure):
    port: u32
    fd: s32


@struct
class _xen_evtchn_deliver(Union):
    port: _xen_evtchn_port
    eventfd: _xen_evtchn_eventfd
    padding: Annotated[Array[c_uint32], c_uint32 * 4]


@struct
class _xen_evtchn(Structure):
    send_port: u32
    type: u32
    flags: u32
    deliver: _xen_evtchn_deliver


@struct
class _xen_hvm_attr_union(Union):
    long_mode: u8
    vector: u8
    runstate_update_flag: u8
    shared_info: _xen_shared_info
    evtchn: _xen_evtchn
    xen_version: u32
    pad: Annotated[Array[c_uint64], c_uint64 * 8]


@struct
class kvm_xen_hvm_attr(Structure):
    """KVM_XEN_HVM_GET_ATTR and KVM_XEN_HVM_SET_ATTR. `type` (KVM_XEN_ATTR_TYPE_*) selects the member of `u`."""

    type: u16
    pad: Annotated[Array[c_uint16], c_uint16 * 3]
    u: _xen_hvm_attr_union


KVM_XEN_INVALID_GPA = 0xFFFFFFFFFFFFFFFF
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO = 0x0
KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO = 0x1
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR = 0x2
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT = 0x3
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA = 0x4
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST = 0x5
KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID = 0x6
KVM_XEN_VCPU_ATTR_TYPE_TIMER = 0x7
KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR = 0x8
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA = 0x9


@struct
class _xen_runstate(Structure):
    state: u64
    state_entry_time: u64
    time_running: u64
    time_runnable: u64
    time_blocked: u64
    time_offline: u64


@struct
class _xen_timer(Structure):
    port: u32
    priority: u32
    expires_ns: u64


@struct
class _xen_vcpu_attr_union(Union):
    gpa: u64
    hva: u64
    pad: Annotated[Array[c_uint64], c_uint64 * 8]
    runstate: _xen_runstate
    vcpu_id: u32
    timer: _xen_timer
    vector: u8


@struct
class kvm_xen_vcpu_attr(Structure):
    """KVM_XEN_VCPU_GET_ATTR and KVM_XEN_VCPU_SET_ATTR. `type` (KVM_XEN_VCPU_ATTR_TYPE_*) selects the member of `u`."""

    type: u16
    pad: Annotated[Array[c_uint16], c_uint16 * 3]
    u: _xen_vcpu_attr_union


# KVM_CREATE_VM's types (KVM_CAP_VM_TYPES).
KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_X86_SEV_VM = 2
KVM_X86_SEV_ES_VM = 3
KVM_X86_SNP_VM = 4
KVM_X86_TDX_VM = 5

KVM_EXIT_HYPERCALL_LONG_MODE = 1 << 0
KVM_BUS_LOCK_DETECTION_OFF = 1 << 0
KVM_BUS_LOCK_DETECTION_EXIT = 1 << 1
KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1

# Device attributes of the system descriptor.
KVM_X86_GRP_SYSTEM = 0
KVM_X86_GRP_SEV = 1
KVM_X86_SEV_VMSA_FEATURES = 0
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
KVM_X86_XCOMP_GUEST_SUPP = 0

# kvm_run.kvm_valid_regs and kvm_dirty_regs
KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2
KVM_SYNC_X86_VALID_FIELDS = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS


@struct
class kvm_sync_regs(Structure):
    """Registers shared through kvm_run (KVM_CAP_SYNC_REGS)."""

    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


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
    """What a vCPU's mapping starts with. C's nameless exit union is `exit`: ``run.exit.io.port``."""

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


KVM_X86_QUIRK_LINT0_REENABLED = 1 << 0
KVM_X86_QUIRK_CD_NW_CLEARED = 1 << 1
KVM_X86_QUIRK_LAPIC_MMIO_HOLE = 1 << 2
KVM_X86_QUIRK_OUT_7E_INC_RIP = 1 << 3
KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
KVM_X86_QUIRK_FIX_HYPERCALL_INSN = 1 << 5
KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS = 1 << 6
KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7
KVM_X86_QUIRK_STUFF_FEATURE_MSRS = 1 << 8
KVM_X86_QUIRK_IGNORE_GUEST_PAT = 1 << 9

KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
KVM_X86_DISABLE_EXITS_HLT = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3

KVM_X2APIC_API_USE_32BIT_IDS = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1

# <asm/kvm_para.h>: what a guest sees.
KVM_CPUID_SIGNATURE = 0x40000000
KVM_CPUID_FEATURES = 0x40000001
KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_NOP_IO_DELAY = 1
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_ASYNC_PF = 4
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6
KVM_FEATURE_PV_UNHALT = 7
KVM_FEATURE_PV_TLB_FLUSH = 9
KVM_FEATURE_PV_SEND_IPI = 11
KVM_FEATURE_POLL_CONTROL = 12
KVM_FEATURE_PV_SCHED_YIELD = 13
KVM_FEATURE_ASYNC_PF_INT = 14
KVM_FEATURE_MSI_EXT_DEST_ID = 15
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24
KVM_HINTS_REALTIME = 0
MSR_KVM_WALL_CLOCK = 0x11
MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MSR_KVM_ASYNC_PF_EN = 0x4B564D02
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04
MSR_KVM_POLL_CONTROL = 0x4B564D05
MSR_KVM_ASYNC_PF_INT = 0x4B564D06
MSR_KVM_ASYNC_PF_ACK = 0x4B564D07

# System ioctls.
KVM_GET_MSR_INDEX_LIST = iowr(0x02, kvm_msr_list)
KVM_GET_SUPPORTED_CPUID = iowr(0x05, kvm_cpuid2)
KVM_GET_EMULATED_CPUID = iowr(0x09, kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = iowr(0x0A, kvm_msr_list)
KVM_GET_SUPPORTED_HV_CPUID = iowr(0xC1, kvm_cpuid2)  # also of a vCPU
KVM_X86_GET_MCE_CAP_SUPPORTED = ior(0x9D, c_uint64)
# VM ioctls.
KVM_SET_NR_MMU_PAGES = io(0x44)
KVM_GET_NR_MMU_PAGES = io(0x45)
KVM_SET_TSS_ADDR = io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(0x48, c_uint64)
KVM_GET_IRQCHIP = iowr(0x62, kvm_irqchip)
KVM_SET_IRQCHIP = ior(0x63, kvm_irqchip)
KVM_CREATE_PIT = io(0x64)
KVM_GET_PIT = iowr(0x65, kvm_pit_state)
KVM_SET_PIT = ior(0x66, kvm_pit_state)
KVM_REINJECT_CONTROL = io(0x71)
KVM_CREATE_PIT2 = iow(0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = io(0x78)
KVM_SET_CLOCK = iow(0x7B, common.kvm_clock_data)
KVM_GET_CLOCK = ior(0x7C, common.kvm_clock_data)
KVM_XEN_HVM_CONFIG = iow(0x7A, kvm_xen_hvm_config)
KVM_GET_PIT2 = ior(0x9F, kvm_pit_state2)
KVM_SET_PIT2 = iow(0xA0, kvm_pit_state2)
KVM_X86_SET_MSR_FILTER = iow(0xC6, kvm_msr_filter)
KVM_SET_PMU_EVENT_FILTER = iow(0xB2, kvm_pmu_event_filter)
KVM_HYPERV_EVENTFD = iow(0xBD, kvm_hyperv_eventfd)
KVM_XEN_HVM_GET_ATTR = iowr(0xC8, kvm_xen_hvm_attr)
KVM_XEN_HVM_SET_ATTR = iow(0xC9, kvm_xen_hvm_attr)
KVM_XEN_HVM_EVTCHN_SEND = iow(0xD0, common.kvm_irq_routing_xen_evtchn)
# VM and vCPU ioctls.
KVM_SET_TSC_KHZ = io(0xA2)
KVM_GET_TSC_KHZ = io(0xA3)
# vCPU ioctls.
KVM_GET_REGS = ior(0x81, kvm_regs)
KVM_SET_REGS = iow(0x82, kvm_regs)
KVM_GET_SREGS = ior(0x83, kvm_sregs)
KVM_SET_SREGS = iow(0x84, kvm_sregs)
KVM_GET_SREGS2 = ior(0xCC, kvm_sregs2)
KVM_SET_SREGS2 = iow(0xCD, kvm_sregs2)
KVM_GET_MSRS = iowr(0x88, kvm_msrs)
KVM_SET_MSRS = iow(0x89, kvm_msrs)
KVM_GET_FPU = ior(0x8C, kvm_fpu)
KVM_SET_FPU = iow(0x8D, kvm_fpu)
KVM_GET_LAPIC = ior(0x8E, kvm_lapic_state)
KVM_SET_LAPIC = iow(0x8F, kvm_lapic_state)
KVM_SET_CPUID = iow(0x8A, kvm_cpuid)
KVM_SET_CPUID2 = iow(0x90, kvm_cpuid2)
KVM_GET_CPUID2 = iowr(0x91, kvm_cpuid2)
KVM_TPR_ACCESS_REPORTING = iowr(0x92, kvm_tpr_access_ctl)
KVM_SET_VAPIC_ADDR = iow(0x93, kvm_vapic_addr)
KVM_NMI = io(0x9A)
KVM_SET_GUEST_DEBUG = iow(0x9B, kvm_guest_debug)
KVM_X86_SETUP_MCE = iow(0x9C, c_uint64)
KVM_X86_SET_MCE = iow(0x9E, kvm_x86_mce)
KVM_GET_VCPU_EVENTS = ior(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow(0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = ior(0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = iow(0xA2, kvm_debugregs)
KVM_GET_XSAVE = ior(0xA4, kvm_xsave)
KVM_SET_XSAVE = iow(0xA5, kvm_xsave)
KVM_GET_XSAVE2 = ior(0xCF, kvm_xsave)
KVM_GET_XCRS = ior(0xA6, kvm_xcrs)
KVM_SET_XCRS = iow(0xA7, kvm_xcrs)
KVM_KVMCLOCK_CTRL = io(0xAD)
KVM_SMI = io(0xB7)
KVM_GET_NESTED_STATE = iowr(0xBE, kvm_nested_state)
KVM_SET_NESTED_STATE = iow(0xBF, kvm_nested_state)
KVM_XEN_VCPU_GET_ATTR = iowr(0xCA, kvm_xen_vcpu_attr)
KVM_XEN_VCPU_SET_ATTR = iow(0xCB, kvm_xen_vcpu_attr)
