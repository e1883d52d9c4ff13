//! The state of one virtual CPU.
//!
//! [`Cpu`] is what translated code addresses off the host stack pointer, so its first fields lie within
//! reach of an 8-bit displacement and its layout is fixed. Everything else that a vCPU owns is in
//! [`Vcpu`]. Outside translated code the state in `Cpu` is complete and precise.

use crate::mem::Slots;
use crate::vm::{Stopped, VcpuShared, Vm};
use std::marker::PhantomPinned;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;

pub mod rflags {
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// Every bit that is not reserved (bits 1, 3, 5, 15 and from 22 up are).
    pub const DEFINED: u64 = 0x3f_7fd5;
    /// The flags that instructions compute; in translated code they live in the host's EFLAGS.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Interrupt shadows, numbered as KVM_X86_SHADOW_INT_* are.
pub mod shadow {
    /// After MOV or POP SS: debug traps wait, too.
    pub const MOV_SS: u8 = 1;
    pub const STI: u8 = 2;
}

/// A segment register: the selector and the cached descriptor.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Seg {
    pub base: u64,
    /// In bytes, granularity already applied.
    pub limit: u32,
    pub sel: u16,
    /// Descriptor bits 40–47 in bits 0–7 (type, S, DPL, P) and bits 52–55 in bits 12–15 (AVL, L, D/B, G).
    pub attr: u16,
    pub unusable: bool,
}

impl Seg {
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    pub fn long(&self) -> bool {
        self.attr & Self::L != 0
    }
    pub fn db(&self) -> bool {
        self.attr & Self::DB != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct Table {
    pub base: u64,
    pub limit: u16,
}

/// Entries of one software TLB; a power of two.
pub const TLB_ENTRIES: usize = 1024;
/// Tag of TLB entry `index` while it is invalid: a page that another entry is for. A lookup subtracts the tag
/// from an address that the guest is free to choose, so no one value would do for all entries.
pub const fn tlb_invalid(index: usize) -> u64 {
    ((index ^ 1) << 12) as u64
}

/// One translation, of the 4 KiB page whose linear address is in the tag.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// The page's linear address if reads through this entry are allowed, else `tlb_invalid`.
    pub read: u64,
    /// The same for writes (dirty bit set, no code in the page, no dirty logging pending).
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// gpa of the page | `TLB_GLOBAL`.
    pub gpa: u64,
}
pub const TLB_GLOBAL: u64 = 1;

impl TlbEntry {
    /// What place `index` of a TLB holds when it holds nothing.
    pub const fn empty(index: usize) -> Self {
        Self { read: tlb_invalid(index), write: tlb_invalid(index), host: 0, gpa: 0 }
    }
}

/// Which TLB an access uses; also part of a block's key.
pub mod mmu_mode {
    /// Supervisor; user pages are refused if CR4.SMAP.
    pub const KERNEL: usize = 0;
    /// Supervisor with EFLAGS.AC (SMAP lifted).
    pub const KERNEL_AC: usize = 1;
    pub const USER: usize = 2;
    pub const COUNT: usize = 3;
}

/// Bits of `Cpu::poll`.
pub mod poll {
    /// Something happened, set by any thread (kick, interrupt, timer, safepoint request).
    pub const REQUEST: u32 = 1;
    /// Re-evaluate interrupts, set by this vCPU alone.
    pub const LOOK_AGAIN: u32 = 1 << 8;
}

/// The state that translated code reaches off the host stack pointer. **Field order is ABI.**
#[repr(C, align(64))]
pub struct Cpu {
    /// `poll::*`; unless 0, the vCPU leaves translated code at the start of the next block.
    pub poll: AtomicU32,
    /// RFLAGS.IF as 0 or 1.
    pub iflag: u8,
    /// An interrupt waits for IF; `sti` copies this to the byte of `poll::LOOK_AGAIN`.
    pub irq_waiting: u8,
    pub cpl: u8,
    /// What holds interrupts off until after the next instruction, `shadow::*`; 0 if nothing does.
    pub shadow: u8,
    /// Arithmetic flags saved by translated code: LAHF's AH in bits 8–15, SETO's byte in bits 0–7.
    pub flags_saved: u64,
    pub tmp: [u64; 2],
    /// In x86 encoding order. Complete outside translated code.
    pub gpr: [u64; 16],
    pub rip: u64,
    /// `rflags::ARITH` bits; valid outside translated code.
    pub aflags: u64,
    /// All other RFLAGS bits but IF (bit 1 is always set in the architectural value).
    pub sysflags: u64,
    pub segs: [Seg; 6],
    pub ldtr: Seg,
    pub tr: Seg,
    pub gdtr: Table,
    pub idtr: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    pub dr: [u64; 8],
    /// Guest TSC = host TSC * `tsc_ratio` / 2^48 + `tsc_offset`.
    pub tsc_ratio: u64,
    pub tsc_offset: u64,
    /// PAE's page-directory pointers, as they were when CR3 was loaded.
    pub pdptrs: [u64; 4],
    pub msr: Msrs,
    /// The owner, for helpers called from translated code; set by `run::enter`.
    pub vcpu: *mut Vcpu,
    /// The host's stack pointer while translated code runs, and its control words.
    pub host_rsp: u64,
    pub host_mxcsr: u32,
    pub host_fcw: u32,
    /// Set by a helper: host address to continue at, or 0 to go on behind the call.
    pub jump: u64,
    /// Why translated code left, `run::leave::*`, and its argument (a link).
    pub leave: u32,
    pub leave_arg: u32,
    /// Set by the signal handler: where in translated code the host trapped, trap number and error code.
    pub trap_pc: u64,
    pub trap_number: u32,
    pub trap_error: u32,
    pub trap_flags: u64,
    /// The address that a page fault was for.
    pub trap_address: u64,
    /// The code cache as translated code sees it: first address and the one behind the last.
    pub code_bounds: (u64, u64),
    /// Where a trapped thread continues: the thunk that leaves translated code.
    pub trap_exit: u64,
    /// Where an instruction of the careful path finds its memory operand.
    pub operand: u64,
    /// XSAVE components of AVX-512 (opmask and what of ZMM is beyond AVX) if one of them is in use, else 0: set by translated
    /// code that touches one.
    pub avx512: u64,
    /// XSAVE area (standard format) of the guest's x87 and vector state; valid outside translated code.
    pub fpu: XsaveArea,
    pub tlb: [[TlbEntry; TLB_ENTRIES]; mmu_mode::COUNT],
    pub jumps: crate::jumps::Jumps,
    /// Others change `poll` while a `&mut Cpu` lives, of which the compiler must not take it to be the only way there. Rust's
    /// sign for that is to come (`UnsafePinned`); until then it is not to be `Unpin` (RFC 3467).
    pub pinned: PhantomPinned,
}

#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; 4096]);

impl XsaveArea {
    /// MXCSR bits that exist.
    const MXCSR_MASK: u32 = 0xffff;

    /// Clear what would make XRSTOR fault: it reads this area for the guest, and must not fail.
    pub fn sanitize(&mut self) {
        let mxcsr = u32::from_le_bytes(self.0[24..28].try_into().unwrap());
        self.0[24..28].copy_from_slice(&(mxcsr & Self::MXCSR_MASK).to_le_bytes());
        let components = self.0[512] & crate::xstate::supported() as u8;
        self.0[512..576].fill(0);
        self.0[512] = components;
    }
}

/// MSRs that are plain state.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub apic_base: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 16],
    pub spec_ctrl: u64,
    pub tsc_adjust: u64,
    /// IA32_BIOS_SIGN_ID: the microcode's revision in the upper half.
    pub microcode: u64,
    pub kvm_wall_clock: u64,
    pub kvm_system_time: u64,
    pub kvm_async_pf: u64,
    pub kvm_steal_time: u64,
    pub kvm_pv_eoi: u64,
    pub kvm_poll_control: u64,
}

impl Cpu {
    /// Does something want attention?
    pub fn polled(&self) -> bool {
        self.poll.load(Ordering::SeqCst) != 0
    }
    /// Attend to interrupts before the next block.
    pub fn look_again(&self) {
        self.poll.fetch_or(poll::LOOK_AGAIN, Ordering::SeqCst);
    }
    /// RFLAGS as the architecture shows it.
    pub fn rflags(&self) -> u64 {
        self.aflags & rflags::ARITH | self.sysflags | (self.iflag as u64) << 9 | 2
    }
    pub fn set_rflags(&mut self, value: u64) {
        self.aflags = value & rflags::ARITH;
        self.iflag = (value >> 9 & 1) as u8;
        self.sysflags = value & rflags::DEFINED & !(rflags::ARITH | rflags::IF);
    }
    /// 64-bit code: long mode active and CS.L.
    pub fn long64(&self) -> bool {
        self.efer & efer::LMA != 0 && self.segs[CS].long()
    }
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }
    pub fn mmu_mode(&self) -> usize {
        if self.cpl == 3 {
            mmu_mode::USER
        } else if self.sysflags & rflags::AC != 0 {
            mmu_mode::KERNEL_AC
        } else {
            mmu_mode::KERNEL
        }
    }
}

/// A guest exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u32>,
    /// CR2 for #PF, the DR6 bits for #DB.
    pub payload: u64,
    /// Raised by INT n, INT3, INTO or INT1: a trap whose gate's DPL is checked, delivered with the
    /// address of the next instruction (already in `rip`).
    pub software: bool,
}

impl Exception {
    pub const fn new(vector: u8) -> Self {
        Self { vector, error: None, payload: 0, software: false }
    }
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), payload: 0, software: false }
    }
    pub const fn ud() -> Self {
        Self::new(6)
    }
    pub const fn gp(error: u32) -> Self {
        Self::with_error(13, error)
    }
    /// None of the processor's: stands for `Exit::MemoryFault`, which it becomes as a `Stop`.
    pub const fn memory_fault(gpa: u64) -> Self {
        Self { vector: 14, error: Some(Self::MEMORY_FAULT), payload: gpa & !0xfff, software: false }
    }
    /// The same of private memory that isn't there.
    pub const fn private_memory_fault(gpa: u64) -> Self {
        Self { vector: 14, error: Some(Self::MEMORY_FAULT), payload: gpa & !0xfff | Self::PRIVATE, software: false }
    }
    /// In the payload.
    const PRIVATE: u64 = 1;
    /// No #PF has that error code.
    const MEMORY_FAULT: u32 = u32::MAX;
    pub const fn is_memory_fault(&self) -> bool {
        matches!(self.error, Some(Self::MEMORY_FAULT))
    }
    pub const fn page_fault(error: u32, cr2: u64) -> Self {
        Self { vector: 14, error: Some(error), payload: cr2, software: false }
    }
}

/// KVM_MP_STATE_*.
pub mod mp_state {
    pub const RUNNABLE: u32 = 0;
    pub const UNINITIALIZED: u32 = 1;
    pub const INIT_RECEIVED: u32 = 2;
    pub const HALTED: u32 = 3;
    pub const SIPI_RECEIVED: u32 = 4;
}

/// An access to the task priority that KVM_TPR_ACCESS_REPORTING reports, and the rip of its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TprAccess {
    pub rip: u64,
    pub write: bool,
}

/// Why KVM_RUN returns; the run loop writes it to `kvm_run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `data` holds `size * count` bytes for OUT, and is empty for IN (filled by the caller on re-entry).
    Io {
        input: bool,
        size: u8,
        port: u16,
        count: u32,
        data: Vec<u8>,
    },
    Mmio {
        gpa: u64,
        len: u8,
        write: bool,
        data: [u8; 8],
    },
    Hlt,
    Shutdown,
    IrqWindowOpen,
    Intr,
    /// Not for user space: signals are due for a look (`request::SIGNALS`).
    Signals,
    /// The host memory behind the page at `gpa` cannot be accessed, or the page is private memory that isn't there: KVM_RUN
    /// fails with EFAULT.
    MemoryFault {
        gpa: u64,
        private: bool,
    },
    /// Nothing runs before entries of the dirty ring are handed back.
    DirtyRingFull,
    /// A level-triggered vector ended; the IOAPIC is told.
    IoapicEoi(u8),
    TprAccess(TprAccess),
    /// KVM_RUN fails with EIO, now and for ever.
    VmDead,
    /// The PIC's INTR line is up and the vCPU accepts: the vector comes back by KVM_INTERRUPT.
    Extint,
    Debug {
        exception: u32,
        pc: u64,
        dr6: u64,
        dr7: u64,
    },
    /// RDMSR or WRMSR that user space decides.
    Msr {
        write: bool,
        reason: u32,
        index: u32,
        data: u64,
    },
    InternalError(String),
}

/// What ends an instruction early. The state is that before the instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    Exception(Exception),
    Exit(Exit),
    /// An x87 or vector instruction: allowed in this mode, but not the interpreter's.
    NotInterpreted,
}
impl From<Exception> for Stop {
    fn from(e: Exception) -> Self {
        if e.is_memory_fault() {
            let private = e.payload & Exception::PRIVATE != 0;
            return Stop::Exit(Exit::MemoryFault { gpa: e.payload & !0xfff, private });
        }
        Stop::Exception(e)
    }
}
impl From<Exit> for Stop {
    fn from(e: Exit) -> Self {
        Stop::Exit(e)
    }
}
pub type Res<T> = Result<T, Stop>;

/// Accesses that left for user space and came back.
///
/// An instruction that reads a device stops with `Exit` before it changed anything; on re-entry it runs
/// again and its device reads are served from `done` in order. Device writes happen last: they are queued
/// in `writes` while the instruction completes, and each leaves by an exit of its own before the next
/// instruction starts.
#[derive(Default)]
pub struct IoState {
    /// Fragments read so far by the instruction at `rip`: gpa, port or `IoState::msr`, data.
    pub done: Vec<(u64, Vec<u8>)>,
    /// How many of `done` the current attempt has used.
    pub used: usize,
    /// The read that user space is answering now: address, length in bytes, and what of.
    pub waiting: Option<(u64, usize, Source)>,
    /// Device writes (gpa, data) of a completed instruction that have not left yet.
    pub writes: std::collections::VecDeque<(u64, Vec<u8>)>,
}

impl IoState {
    /// Where the answer to an access to an MSR stands in `done`: beyond guest physical addresses and ports.
    pub fn msr(index: u32) -> u64 {
        1 << 63 | index as u64
    }
}

/// What user space answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Memory,
    Port,
    /// `kvm_run.msr`, whole.
    Msr,
}

/// CPUID entry as KVM_SET_CPUID2 gives it (`kvm_cpuid_entry2`).
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub padding: [u32; 3],
}

/// `Cpu` at the top of the stack that translated code and its helpers run on.
pub struct CpuBox {
    map: *mut u8,
    len: usize,
    cpu: *mut Cpu,
}

// SAFETY: the mapping is owned by this box alone; a vCPU is used by one thread at a time.
unsafe impl Send for CpuBox {}

/// Stack below `Cpu` for helpers called from translated code.
const STACK_BYTES: usize = 512 << 10;

impl CpuBox {
    pub fn new() -> std::io::Result<Self> {
        let len = (STACK_BYTES + size_of::<Cpu>()).next_multiple_of(4096) + 4096;
        // SAFETY: an anonymous mapping of our own; the lowest page becomes a guard.
        let map = unsafe {
            let p = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if p == libc::MAP_FAILED || libc::mprotect(p, 4096, libc::PROT_NONE) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            p as *mut u8
        };
        // SAFETY: inside the mapping, page-aligned; all-zero is a valid `Cpu`.
        let cpu = unsafe { map.add(4096 + STACK_BYTES) as *mut Cpu };
        let mut this = Self { map, len, cpu };
        this.jumps.init();
        for table in this.tlb.iter_mut() {
            for (i, e) in table.iter_mut().enumerate() {
                *e = TlbEntry::empty(i);
            }
        }
        Ok(this)
    }
    pub fn as_ptr(&self) -> *mut Cpu {
        self.cpu
    }
}
impl Drop for CpuBox {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, not used after this.
        unsafe { libc::munmap(self.map.cast(), self.len) };
    }
}
impl std::ops::Deref for CpuBox {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        // SAFETY: valid for the box's life.
        unsafe { &*self.cpu }
    }
}
impl std::ops::DerefMut for CpuBox {
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: valid for the box's life; uniquely borrowed.
        unsafe { &mut *self.cpu }
    }
}

/// One virtual CPU: owned by the thread that runs it.
pub struct Vcpu {
    pub cpu: CpuBox,
    pub vm: Arc<Vm>,
    /// What other threads may touch: kick, wake, local APIC.
    pub shared: Arc<VcpuShared>,
    /// The memory slots as of the last safepoint.
    pub slots: Arc<Slots>,
    pub cpuid: Vec<CpuidEntry>,
    pub io: IoState,
    /// An exception that comes before the next instruction: the debug trap of one that left for user space, or what
    /// user space injected.
    pub injected: Option<Exception>,
    pub debug: crate::debug::Debug,
    pub nmi_masked: bool,
    /// In system management mode; see `smm`.
    pub smm: bool,
    pub smi_pending: bool,
    /// The SMI came while NMIs were masked: RSM leaves them so.
    pub smm_inside_nmi: bool,
    /// An INIT waits for RSM.
    pub init_latched: bool,
    pub smbase: u64,
    /// MSR_SMI_COUNT.
    pub smi_count: u64,
    /// Mode of the block being executed.
    pub block_mode: crate::translate::Mode,
    /// Generation of the code cache that this vCPU last saw.
    pub generation: u64,
    /// The exit that translated code left for.
    pub exit: Option<Exit>,
    /// HLT was executed and nothing has woken the vCPU since.
    pub halted: bool,
    pub mp_state: u32,
    /// CR8 of a vCPU without a local APIC.
    pub cr8_value: u64,
    /// Level-triggered vectors whose end the IOAPIC must be told of.
    pub eois: Vec<u8>,
    /// KVM_TPR_ACCESS_REPORTING.
    pub reports_tpr: bool,
    /// What it reports before the next instruction.
    pub tpr_access: Option<TprAccess>,
    /// KVM_SET_VAPIC_ADDR: guest physical address of the word that shows the task priority; 0: none.
    pub vapic: u64,
    /// KVM_INTERRUPT: a vector from user space.
    pub user_irq: Option<u8>,
    /// kvm_run.request_interrupt_window.
    pub window_requested: bool,
    pub nmi_pending: bool,
    /// For single integer instructions (`careful`).
    pub scratch: CpuBox,
    /// Non-global TLB entries since the last flush.
    pub log: Box<crate::mmu::FillLog>,
    pub fetch: Box<crate::mmu::FetchCache>,
    pub mce: crate::mce::Mce,
    /// A machine check that can't be delivered: the processor shuts down.
    pub triple_fault: bool,
    /// What KVM_SET_TSC_KHZ asked for; see `guest_tsc_khz`.
    pub tsc_khz: u32,
    /// KVM_KVMCLOCK_CTRL: tell the guest that it was stopped.
    pub tell_stopped: bool,
    /// Translate nothing (tests, debugging).
    pub interpret_only: bool,
    /// The timer `timer::SIGNALS` runs.
    pub signals_armed: bool,
    pub spin: crate::spin::Spin,
}

impl Vcpu {
    /// A new vCPU in reset state is made by `Vm`; this is the plain state.
    pub fn new(vm: Arc<Vm>, id: u32) -> std::io::Result<Self> {
        let (mut cpu, mut scratch) = (CpuBox::new()?, CpuBox::new()?);
        {
            let cache = vm.cache.lock().unwrap();
            cpu.jumps.set_miss([cache.miss_host, cache.miss_saved]);
            (cpu.code_bounds, scratch.code_bounds) = (cache.bounds(), cache.bounds());
            cpu.trap_exit = crate::thunks::leave as *const () as u64;
            scratch.trap_exit = crate::thunks::leave_light as *const () as u64;
        }
        let boot = vm.boot_cpu.load(std::sync::atomic::Ordering::Relaxed);
        let lapic =
            vm.has_lapics.load(std::sync::atomic::Ordering::Relaxed).then(|| crate::lapic::Lapic::new(id, id == boot));
        let ring = match vm.dirty_ring_bytes.load(std::sync::atomic::Ordering::Relaxed) {
            0 => None,
            size_bytes => Some(crate::dirty::Ring::new(size_bytes)?),
        };
        let shared = Arc::new(VcpuShared::new(id, cpu.as_ptr(), lapic, ring)?);
        let slots = vm.slots.read().unwrap().clone();
        cpu.tsc_ratio = crate::sys::TSC_RATIO_ONE;
        let tsc_khz = vm.tsc_khz;
        let mut this = Self {
            cpu,
            vm,
            shared,
            slots,
            cpuid: Vec::new(),
            io: IoState::default(),
            injected: None,
            debug: Default::default(),
            nmi_masked: false,
            smm: false,
            smi_pending: false,
            smm_inside_nmi: false,
            init_latched: false,
            smbase: crate::smm::DEFAULT_BASE,
            smi_count: 0,
            block_mode: Default::default(),
            generation: 0,
            exit: None,
            halted: false,
            mp_state: 0,
            cr8_value: 0,
            eois: Vec::new(),
            reports_tpr: false,
            tpr_access: None,
            vapic: 0,
            user_irq: None,
            window_requested: false,
            nmi_pending: false,
            scratch,
            log: Box::default(),
            fetch: Box::default(),
            mce: Default::default(),
            triple_fault: false,
            tsc_khz,
            tell_stopped: false,
            interpret_only: false,
            signals_armed: false,
            spin: crate::spin::Spin::default(),
        };
        this.reset();
        this.mp_state =
            if id == boot || this.shared.lapic.is_none() { mp_state::RUNNABLE } else { mp_state::UNINITIALIZED };
        // From here on others visit its state, unless it runs.
        this.vm.vcpus.write().unwrap().push(this.shared.clone());
        Ok(this)
    }

    /// State after power-up (Intel SDM volume 3, table 10-1).
    pub fn reset(&mut self) {
        let c = &mut *self.cpu;
        (c.cr0, c.xcr0) = (cr0::CD | cr0::NW, 1);
        let (apic_base, tsc_adjust) = (c.msr.apic_base, c.msr.tsc_adjust);
        let (pat, microcode) = (0x0007_0406_0007_0406, 1 << 32);
        c.msr = Msrs { apic_base, tsc_adjust, pat, microcode, misc_enable: 1, ..Msrs::default() };
        if apic_base == 0 {
            c.msr.apic_base = crate::lapic::DEFAULT_BASE
                | crate::lapic::BASE_ENABLE
                | if self.shared.id == self.vm.boot_cpu.load(std::sync::atomic::Ordering::Relaxed) {
                    crate::lapic::BASE_BSP
                } else {
                    0
                };
        }
        c.fpu.0.fill(0);
        c.fpu.0[0..2].copy_from_slice(&0x40u16.to_le_bytes());
        c.fpu.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        c.fpu.0[512] = 3;
        self.init();
    }

    /// State after INIT (the same table): x87 and vector state, MSRs and CR0's cache bits stay, but for those MSRs by which
    /// KVM writes to the guest's memory.
    pub fn init(&mut self) {
        let c = &mut *self.cpu;
        let data = Seg { base: 0, limit: 0xffff, sel: 0, attr: 0x93, unusable: false };
        c.segs = [data; 6];
        c.segs[CS] = Seg { base: 0xffff_0000, sel: 0xf000, attr: 0x9b, ..data };
        c.ldtr = Seg { attr: 0x82, ..data };
        c.tr = Seg { attr: 0x8b, ..data };
        (c.gdtr, c.idtr) = (Table { base: 0, limit: 0xffff }, Table { base: 0, limit: 0xffff });
        (c.cr0, c.cr2, c.cr3, c.cr4, c.efer) = (cr0::ET | c.cr0 & (cr0::CD | cr0::NW), 0, 0, 0, 0);
        c.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        c.gpr = [0; 16];
        c.gpr[RDX] = 0x600;
        c.rip = 0xfff0;
        c.set_rflags(2);
        (c.cpl, c.shadow) = (0, 0);
        let m = &mut c.msr;
        (m.kvm_system_time, m.kvm_async_pf, m.kvm_steal_time, m.kvm_pv_eoi) = (0, 0, 0, 0);
        (self.halted, self.nmi_masked, self.nmi_pending, self.user_irq) = (false, false, false, None);
        (self.smi_pending, self.smi_count) = (false, 0);
        self.io = IoState::default();
        self.injected = None;
        self.debug.reset();
        crate::mmu::flush_all(self);
    }

    /// `Vm::exclusive` by this vCPU, which runs. Others may come before and after `f`; it is up to date in both cases.
    pub fn exclusive<R>(&mut self, f: impl FnOnce(&mut Self, &Stopped) -> R) -> R {
        let (vm, shared) = (self.vm.clone(), self.shared.clone());
        let result = vm.exclusive(Some(&shared), |stopped| {
            self.refresh();
            f(self, stopped)
        });
        self.refresh();
        result
    }

    /// After a safepoint: take up what may have changed.
    pub fn refresh(&mut self) {
        let slots = self.vm.space(self.smm).read().unwrap().clone();
        if !Arc::ptr_eq(&slots, &self.slots) {
            // The TLBs were emptied with the change; the fetch cache is this thread's own.
            self.slots = slots;
            crate::mmu::flush_all(self);
        }
        self.generation = self.vm.cache.lock().unwrap().generation;
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.detach();
        self.vm.timers.cancel(crate::timer::SIGNALS | self.shared.id as u64);
        self.vm.vcpus.write().unwrap().retain(|v| !Arc::ptr_eq(v, &self.shared));
    }
}
