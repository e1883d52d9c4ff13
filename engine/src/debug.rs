//! Debug exceptions: single steps, the breakpoints in DR0 to DR3, and KVM_SET_GUEST_DEBUG (Intel SDM volume 3,
//! chapter 18).
//!
//! While any of them is armed nothing is translated (`run::translatable`): the interpreter asks `before` each
//! instruction and `after` it, and reports what it accesses in between. What is met is collected as DR6 bits and
//! becomes one #DB, a trap that follows the instruction, or a fault before it for a breakpoint on the instruction.

use crate::cpu::{CS, Cpu, Exception, Exit, Res, Vcpu, cr4, rflags, shadow};
use crate::interp::Done;
use iced_x86::{Instruction, Mnemonic};

/// DR6 bits.
pub const BD: u64 = 1 << 13;
pub const BS: u64 = 1 << 14;
pub const BT: u64 = 1 << 15;
/// DR6 bits that are always set.
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7: any access to a debug register raises #DB.
pub const GD: u64 = 1 << 13;
/// DR7: some breakpoint is enabled.
const ENABLED: u64 = 0xff;

/// KVM_GUESTDBG_*.
pub mod guestdbg {
    pub const ENABLE: u32 = 1;
    pub const SINGLESTEP: u32 = 2;
    pub const USE_SW_BP: u32 = 1 << 16;
    pub const USE_HW_BP: u32 = 1 << 17;
    pub const INJECT_DB: u32 = 1 << 18;
    pub const INJECT_BP: u32 = 1 << 19;
    pub const BLOCKIRQ: u32 = 1 << 20;
}

/// What kind of access a breakpoint is for: DR7.R/W.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Execute,
    Read,
    Write,
    Port,
}

#[derive(Default)]
pub struct Debug {
    /// `guestdbg` flags of KVM_SET_GUEST_DEBUG; 0 if it is not enabled.
    pub control: u32,
    /// Its DR0 to DR7, in force instead of the guest's under `USE_HW_BP`.
    pub registers: [u64; 8],
    /// An instruction runs whose accesses are to be reported to `access`.
    pub watching: bool,
    /// DR6 bits that the instruction being executed has met.
    met: u64,
    /// Those that a MOV or POP to SS has met: they wait for the next instruction.
    held: u64,
}

impl Debug {
    /// Forget what waits: INIT.
    pub fn reset(&mut self) {
        (self.watching, self.met, self.held) = (false, 0, 0);
    }
}

/// DR0 to DR3 and DR7 as they are in force.
fn registers(v: &Vcpu) -> &[u64; 8] {
    if v.debug.control & guestdbg::USE_HW_BP != 0 { &v.debug.registers } else { &v.cpu.dr }
}

/// Does an access to a debug register raise #DB?
pub fn detects(v: &Vcpu) -> bool {
    registers(v)[7] & GD != 0
}

/// Does anything need to look at every instruction?
pub fn armed(v: &Vcpu) -> bool {
    v.cpu.sysflags & rflags::TF != 0
        || registers(v)[7] & ENABLED != 0
        || v.debug.control & (guestdbg::SINGLESTEP | guestdbg::USE_HW_BP) != 0
}

/// Does a debug trap follow every instruction, and every iteration of a repeated one?
pub fn stepping(v: &Vcpu) -> bool {
    v.cpu.sysflags & rflags::TF != 0 || v.debug.control & guestdbg::SINGLESTEP != 0
}

/// Do debug exceptions go to user space?
fn intercepted(v: &Vcpu) -> bool {
    v.debug.control & (guestdbg::SINGLESTEP | guestdbg::USE_HW_BP) != 0
}

/// Linear address of the next instruction.
pub fn linear_rip(cpu: &Cpu) -> u64 {
    if cpu.long64() { cpu.rip } else { cpu.segs[CS].base.wrapping_add(cpu.rip) & 0xffff_ffff }
}

/// DR6 bits of the enabled breakpoints that an access of `kind` to `[at, at + len)` meets.
fn meets(v: &Vcpu, kind: Kind, at: u64, len: u64) -> u64 {
    let dr = registers(v);
    let mut met = 0;
    for n in 0..4 {
        let fields = dr[7] >> (16 + 4 * n) & 15;
        let wanted = match fields & 3 {
            0 => kind == Kind::Execute,
            1 => kind == Kind::Write,
            2 => kind == Kind::Port && v.cpu.cr4 & cr4::DE != 0,
            _ => matches!(kind, Kind::Read | Kind::Write),
        };
        let size = [1, 2, 8, 4][(fields >> 2) as usize];
        let first = dr[n] & !(size - 1);
        if dr[7] >> (2 * n) & 3 != 0
            && wanted
            && first <= at.wrapping_add(len - 1)
            && at <= first.wrapping_add(size - 1)
        {
            met |= 1 << n;
        }
    }
    met
}

/// The instruction at rip is about to be fetched: #DB if a breakpoint is on it.
pub fn before(v: &mut Vcpu) -> Res<()> {
    if registers(v)[7] & ENABLED == 0 || v.cpu.sysflags & rflags::RF != 0 || v.cpu.shadow & shadow::MOV_SS != 0 {
        return Ok(());
    }
    let met = meets(v, Kind::Execute, linear_rip(&v.cpu), 1);
    if met != 0 { Err(Exception { payload: met, ..Exception::new(1) }.into()) } else { Ok(()) }
}

/// The instruction begins to execute: collect what it meets.
pub fn begin(v: &mut Vcpu) {
    v.debug.met = 0;
    v.debug.watching = registers(v)[7] & ENABLED != 0;
}

/// The running instruction accesses `len` bytes at `at`, a linear address or a port.
#[inline]
pub fn access(v: &mut Vcpu, kind: Kind, at: u64, len: usize) {
    if v.debug.watching && len != 0 {
        v.debug.met |= meets(v, kind, at, len as u64);
    }
}

/// Has the running instruction met a breakpoint? A repeated one then stops between iterations.
pub fn met(v: &Vcpu) -> bool {
    v.debug.met != 0
}

/// The instruction ended without completing.
pub fn abort(v: &mut Vcpu, retried: bool) {
    v.debug.watching = false;
    if !retried {
        v.debug.held = 0;
    }
}

/// The instruction is complete: the debug trap that follows it. `stepping`: RFLAGS.TF was set before it.
pub(crate) fn after(v: &mut Vcpu, i: &Instruction, done: &Done, stepping: bool) -> Option<Exception> {
    v.debug.watching = false;
    let mut bits = std::mem::take(&mut v.debug.met) | std::mem::take(&mut v.debug.held);
    if v.cpu.shadow & shadow::MOV_SS != 0 {
        v.debug.held = bits;
        return None;
    }
    let by_flag = match i.mnemonic() {
        // The gate cleared TF before a trap could come.
        Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Int1 => false,
        Mnemonic::Into => stepping && matches!(done, Done::Next),
        // IA32_FMASK decides, or R11: a trap comes at once.
        Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq => v.cpu.sysflags & rflags::TF != 0,
        _ => stepping,
    };
    if by_flag || v.debug.control & guestdbg::SINGLESTEP != 0 {
        bits |= BS;
    }
    (bits != 0).then_some(Exception { payload: bits, ..Exception::new(1) })
}

/// RF after the instruction: it lasts for one, but stays for the iterations of a repeated one.
pub(crate) fn update_rf(cpu: &mut Cpu, i: &Instruction, done: &Done) {
    let paused = i.is_string_instruction() && cpu.rip == i.ip() && !matches!(done, Done::Next);
    if paused {
        cpu.sysflags |= rflags::RF;
    } else if !matches!(i.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Rsm) {
        cpu.sysflags &= !rflags::RF;
    }
}

/// #DB with the DR6 bits `payload` is about to be delivered: to user space instead, if it asked for that.
pub fn intercept(v: &Vcpu, payload: u64) -> Option<Exit> {
    intercepted(v).then(|| Exit::Debug {
        exception: 1,
        pc: linear_rip(&v.cpu),
        dr6: DR6_FIXED | payload,
        dr7: registers(v)[7],
    })
}

/// An exception was delivered while user space steps: it stops at the handler.
pub fn stepped_into_handler(v: &Vcpu) -> Option<Exit> {
    (v.debug.control & guestdbg::SINGLESTEP != 0).then(|| intercept(v, BS)).flatten()
}

/// INT3, for a debugger that put it there.
pub fn software_breakpoint(v: &Vcpu) -> Option<Exit> {
    (v.debug.control & guestdbg::USE_SW_BP != 0).then(|| Exit::Debug {
        exception: 3,
        pc: linear_rip(&v.cpu),
        dr6: 0,
        dr7: 0,
    })
}

/// What #DB leaves in DR6 and DR7.
pub fn set_dr6(cpu: &mut Cpu, payload: u64) {
    if payload != 0 {
        cpu.dr[6] = cpu.dr[6] & !0xf | payload;
    }
    cpu.dr[7] &= !GD;
}

/// KVM_SET_GUEST_DEBUG; false (EBUSY) if it injects an exception while another one waits.
pub fn set_guest_debug(v: &mut Vcpu, control: u32, registers: &[u64; 8]) -> bool {
    let injected = match control {
        c if c & guestdbg::INJECT_DB != 0 => Some(1),
        c if c & guestdbg::INJECT_BP != 0 => Some(3),
        _ => None,
    };
    if let Some(vector) = injected {
        if v.injected.is_some() {
            return false;
        }
        v.injected = Some(Exception::new(vector));
    }
    v.debug.control = if control & guestdbg::ENABLE != 0 { control } else { 0 };
    v.debug.registers = *registers;
    v.cpu.look_again();
    true
}
