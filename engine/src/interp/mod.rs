//! The interpreter: one instruction in any mode.
//!
//! It takes what translated code does not: 16-bit, 32-bit and unpaged code, system instructions, string
//! instructions, and accesses to devices, across pages, or to pages with code. It decodes operands, checks
//! segments and moves data; arithmetic it leaves to the processor. Guest and host share the instruction
//! set, so an ADD is re-encoded with its operands in host registers or a buffer, and run (`careful`): flags
//! and corner cases are the processor's own, in every mode.

mod decimal;
mod fpu;
mod string;

use crate::access;
use crate::careful;
use crate::classify::{Class, Features, classify, uses_avx512};
use crate::cpu::{
    CS, Cpu, Exception, Exit, FS, GS, RAX, RBP, RCX, RDX, RSP, Res, SS, Stop, Vcpu, cr0, cr4, efer, rflags, shadow,
};
use crate::debug;
use crate::far::{self, peek, push_all, set_rsp, stack_mask};
use crate::guest::{self, Gone};
use crate::mmu;
use crate::segment::{self, Inspect};
use crate::smm;
use crate::stats::vcpu as counter;
use crate::sys;
use crate::task;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// What an instruction did, when it did not fail.
pub(crate) enum Done {
    /// Go on behind it.
    Next,
    /// rip is set (also when a string instruction pauses).
    Jumped,
    /// Complete, rip is set or stays for more; KVM_RUN returns.
    Exit(Exit),
}

/// Bitness of the code that CS names.
fn bitness(cpu: &Cpu) -> u32 {
    if cpu.long64() {
        64
    } else if cpu.segs[CS].db() {
        32
    } else {
        16
    }
}

/// Fetch and decode the instruction at rip.
pub(crate) fn decode(v: &mut Vcpu) -> Res<(Instruction, [u8; 15])> {
    let bits = bitness(&v.cpu);
    let rip = v.cpu.rip;
    let la = if bits == 64 { rip } else { v.cpu.segs[CS].base.wrapping_add(rip) & 0xffff_ffff };
    let mut bytes = [0u8; 15];
    let mut have = (4096 - (la & 0xfff)).min(15) as usize;
    if bits != 64 {
        let limit = v.cpu.segs[CS].limit as u64;
        if rip > limit {
            return Err(Exception::gp(0).into());
        }
        have = have.min((limit - rip + 1).min(15) as usize);
    }
    fetch(v, la, &mut bytes[..have])?;
    loop {
        let mut decoder = Decoder::with_ip(bits, &bytes[..have], rip, DecoderOptions::NONE);
        let i = decoder.decode();
        if !i.is_invalid() {
            return Ok((i, bytes));
        }
        if decoder.last_error() != DecoderError::NoMoreBytes {
            // Opcodes 0F 18 to 0F 1F do nothing where they mean nothing yet.
            let options = DecoderOptions::FORCE_RESERVED_NOP;
            let hint = Decoder::with_ip(bits, &bytes[..have], rip, options).decode();
            return match hint.mnemonic() {
                Mnemonic::Reservednop => Ok((hint, bytes)),
                // No instruction is longer than 15 bytes.
                _ if i.len() == 15 => Err(Exception::gp(0).into()),
                _ => Err(Exception::ud().into()),
            };
        }
        let more = la.wrapping_add(have as u64);
        if bits != 64 && rip + have as u64 > v.cpu.segs[CS].limit as u64 {
            return Err(Exception::gp(0).into());
        }
        let n = 15 - have;
        fetch(v, more, &mut bytes[have..have + n])?;
        have = 15;
    }
}

/// Copy code bytes from within one page.
fn fetch(v: &mut Vcpu, la: u64, to: &mut [u8]) -> Res<()> {
    let page = mmu::fetch_page(v, la)?;
    let n = to.len().min(4096 - (la & 0xfff) as usize);
    // SAFETY: a whole page of guest memory at `hva`, valid while this vCPU runs; `n` does not cross it.
    unsafe { guest::copy(to.as_mut_ptr(), (page.hva as *const u8).add((la & 0xfff) as usize), n) }
        .map_err(|Gone| Exception::memory_fault(page.gpa).into())
}

/// Run instructions until something needs attention, an exit, or translated code can take over.
pub fn run(v: &mut Vcpu, max: u32) -> Res<()> {
    for _ in 0..max {
        if v.cpu.polled() || !v.io.writes.is_empty() {
            break;
        }
        step(v)?;
        if v.halted || crate::run::translatable(v) {
            break;
        }
    }
    Ok(())
}

/// Execute the instruction at rip. Integer and system instructions only when `fpu` is false: then
/// `Stop::NotInterpreted` says that the instruction works on x87 or vector state, which is still in the
/// host's registers.
pub fn step(v: &mut Vcpu) -> Res<()> {
    one(v, true)
}

/// `step` for callers inside translated code.
pub fn step_integer(v: &mut Vcpu) -> Res<()> {
    one(v, false)
}

fn one(v: &mut Vcpu, fpu: bool) -> Res<()> {
    debug::before(v)?;
    let (i, bytes) = decode(v)?;
    perform(v, &i, &bytes, fpu)
}

/// `step_integer` of an instruction that was decoded before.
pub fn run_decoded(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15]) -> Res<()> {
    perform(v, i, bytes, false)
}

fn perform(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], fpu: bool) -> Res<()> {
    v.io.used = 0;
    v.shared.stats.count(counter::INTERPRETED);
    let shadow = std::mem::take(&mut v.cpu.shadow);
    let stepping = v.cpu.sysflags & rflags::TF != 0;
    debug::begin(v);
    match execute(v, i, bytes, fpu) {
        Ok(done) => {
            let trap = debug::after(v, i, &done, stepping);
            debug::update_rf(&mut v.cpu, i, &done);
            v.io.done.clear();
            let exit = match done {
                Done::Next => {
                    let next = i.next_ip();
                    v.cpu.rip = if v.cpu.long64() { next } else { next & 0xffff_ffff };
                    None
                }
                Done::Jumped => None,
                Done::Exit(exit) => Some(exit),
            };
            if let Some(trap) = trap {
                if exit.is_none() && v.io.writes.is_empty() {
                    return Err(trap.into());
                }
                // User space sees the device access first.
                v.injected = Some(trap);
                v.cpu.look_again();
            }
            exit.map_or(Ok(()), |e| Err(e.into()))
        }
        Err(stop) => {
            let retried = matches!(stop, Stop::Exit(_) | Stop::NotInterpreted);
            if retried {
                v.cpu.shadow = shadow;
            }
            debug::abort(v, retried);
            Err(stop)
        }
    }
}

/// Value of a general-purpose register in its own width.
pub(crate) fn register(cpu: &Cpu, r: Register) -> u64 {
    let n = r.full_register().number();
    let value = if r.is_gpr() { cpu.gpr[n] } else { 0 };
    match r.size() {
        1 if is_high(r) => value >> 8 & 0xff,
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

fn is_high(r: Register) -> bool {
    matches!(r, Register::AH | Register::BH | Register::CH | Register::DH)
}

/// Write a general-purpose register; 32-bit writes clear the upper half.
pub(crate) fn set_register(cpu: &mut Cpu, r: Register, value: u64) {
    let g = &mut cpu.gpr[r.full_register().number()];
    *g = match r.size() {
        1 if is_high(r) => *g & !0xff00 | (value & 0xff) << 8,
        1 => *g & !0xff | value & 0xff,
        2 => *g & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

pub(crate) fn segment_index(r: Register) -> usize {
    match r {
        Register::ES => 0,
        Register::CS => CS,
        Register::SS => SS,
        Register::FS => FS,
        Register::GS => GS,
        _ => 3,
    }
}

/// Mask of the instruction's address size.
fn address_mask(i: &Instruction) -> u64 {
    let (base, index) = (i.memory_base(), i.memory_index());
    let size = if base != Register::None {
        base.size()
    } else if index != Register::None && index.is_gpr() {
        index.size()
    } else if i.memory_displ_size() != 0 {
        i.memory_displ_size() as usize
    } else {
        8
    };
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Effective address of the memory operand, within its segment.
pub(crate) fn effective(cpu: &Cpu, i: &Instruction) -> u64 {
    let base = i.memory_base();
    if matches!(base, Register::RIP | Register::EIP) {
        return i.ip_rel_memory_address();
    }
    let index = i.memory_index();
    let a = register(cpu, base)
        .wrapping_add(register(cpu, index).wrapping_mul(i.memory_index_scale() as u64))
        .wrapping_add(i.memory_displacement64());
    a & address_mask(i)
}

/// Linear address of the memory operand for an access of `len` bytes.
pub(crate) fn address(cpu: &Cpu, i: &Instruction, len: u64, write: bool) -> Res<u64> {
    Ok(segment::linear(cpu, segment_index(i.memory_segment()), effective(cpu, i), len, write)?)
}

pub(crate) fn load(v: &mut Vcpu, la: u64, size: usize) -> Res<u64> {
    let mode = v.cpu.mmu_mode();
    let mut b = [0; 8];
    access::read(v, la, &mut b[..size], mode)?;
    Ok(u64::from_le_bytes(b))
}

pub(crate) fn store(v: &mut Vcpu, la: u64, size: usize, value: u64) -> Res<()> {
    let mode = v.cpu.mmu_mode();
    access::write(v, la, &value.to_le_bytes()[..size], mode)
}

/// Value of register or memory operand `n`, of `size` bytes.
fn read_operand(v: &mut Vcpu, i: &Instruction, n: u32, size: usize) -> Res<u64> {
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => Ok(register(&v.cpu, i.op_register(n))),
        OpKind::Register => Ok(v.cpu.segs[segment_index(i.op_register(n))].sel as u64),
        OpKind::Memory => {
            let la = address(&v.cpu, i, size as u64, false)?;
            load(v, la, size)
        }
        _ => Ok(i.immediate(n)),
    }
}

fn write_operand(v: &mut Vcpu, i: &Instruction, n: u32, size: usize, value: u64) -> Res<()> {
    match i.op_kind(n) {
        OpKind::Register => {
            set_register(&mut v.cpu, i.op_register(n), value);
            Ok(())
        }
        _ => {
            let la = address(&v.cpu, i, size as u64, true)?;
            store(v, la, size, value)
        }
    }
}

/// Near-branch target: the operand cut to the operand size; #GP(0) if no code can be there.
fn checked_target(v: &Vcpu, target: u64, size: usize) -> Res<u64> {
    let target = match size {
        2 => target & 0xffff,
        4 => target & 0xffff_ffff,
        _ => target,
    };
    if v.cpu.long64() {
        if !mmu::is_canonical(target) {
            return Err(Exception::gp(0).into());
        }
    } else if target > v.cpu.segs[CS].limit as u64 {
        return Err(Exception::gp(0).into());
    }
    Ok(target)
}

fn branch(v: &mut Vcpu, target: u64, size: usize) -> Res<Done> {
    v.cpu.rip = checked_target(v, target, size)?;
    Ok(Done::Jumped)
}

fn near_size(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        OpKind::Register => i.op_register(n).size(),
        _ => i.memory_size().size(),
    }
}

/// Operand size of PUSH, POP, RET and the like.
fn stack_size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

fn condition(flags: u64, code: u8) -> bool {
    let f = |bit: u64| flags & bit != 0;
    let result = match code >> 1 {
        0 => f(rflags::OF),
        1 => f(rflags::CF),
        2 => f(rflags::ZF),
        3 => f(rflags::CF) || f(rflags::ZF),
        4 => f(rflags::SF),
        5 => f(rflags::PF),
        6 => f(rflags::SF) != f(rflags::OF),
        _ => f(rflags::ZF) || f(rflags::SF) != f(rflags::OF),
    };
    result != (code & 1 != 0)
}

fn far_operand(v: &mut Vcpu, i: &Instruction) -> Res<(u16, u64, usize)> {
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), i.far_branch16() as u64, 2)),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), i.far_branch32() as u64, 4)),
        _ => {
            let size = i.memory_size().size() - 2;
            let la = address(&v.cpu, i, size as u64 + 2, false)?;
            let offset = load(v, la, size)?;
            let sel = load(v, la.wrapping_add(size as u64), 2)? as u16;
            Ok((sel, offset, size))
        }
    }
}

fn is_far(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || (i.op0_kind() == OpKind::Memory && matches!(i.memory_size().size(), 6 | 10)
            || i.memory_size() == iced_x86::MemorySize::SegPtr16)
}

fn execute(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], fpu: bool) -> Res<Done> {
    use Mnemonic::*;
    let long = v.cpu.long64();
    match i.mnemonic() {
        // Stack.
        Push => {
            let size = stack_size(i);
            let value = match i.op0_kind() {
                OpKind::Immediate8
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate32to64 => i.immediate(0),
                _ => read_operand(v, i, 0, size)?,
            };
            push_all(v, &[value], size)?;
        }
        Pop => {
            let size = stack_size(i);
            let value = peek(v, 0, size)?;
            if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
                segment::load(v, segment_index(i.op0_register()), value as u16)?;
                v.cpu.shadow = if i.op0_register() == Register::SS { shadow::MOV_SS } else { 0 };
                let sp = v.cpu.gpr[RSP].wrapping_add(size as u64);
                set_rsp(v, sp);
            } else {
                let old = v.cpu.gpr[RSP];
                set_rsp(v, old.wrapping_add(size as u64));
                if let Err(stop) = write_operand(v, i, 0, size, value) {
                    v.cpu.gpr[RSP] = old;
                    return Err(stop);
                }
            }
        }
        Pusha | Pushad => {
            let size = if i.mnemonic() == Pusha { 2 } else { 4 };
            let g = v.cpu.gpr;
            push_all(v, &g[..8], size)?;
        }
        Popa | Popad => {
            let size = if i.mnemonic() == Popa { 2 } else { 4 };
            let registers = if size == 2 { crate::emit::R16 } else { crate::emit::R32 };
            for n in [0, 1, 2, 4, 5, 6, 7] {
                let value = peek(v, n, size)?;
                set_register(&mut v.cpu, registers[7 - n as usize], value);
            }
            let sp = v.cpu.gpr[RSP].wrapping_add(8 * size as u64);
            set_rsp(v, sp);
        }
        Pushf | Pushfd | Pushfq => {
            let value = sys::pushf_value(v)?;
            push_all(v, &[value], stack_size(i))?;
        }
        Popf | Popfd | Popfq => {
            let size = stack_size(i);
            let value = peek(v, 0, size)?;
            sys::popf(v, value, size)?;
            let sp = v.cpu.gpr[RSP].wrapping_add(size as u64);
            set_rsp(v, sp);
        }
        Enter => {
            let size = if long {
                if i.code() == iced_x86::Code::Enterw_imm16_imm8 { 2 } else { 8 }
            } else if i.code() == iced_x86::Code::Enterw_imm16_imm8 {
                2
            } else {
                4
            };
            enter(v, i.immediate16() as u64, i.immediate8_2nd() & 31, size)?;
        }
        Leave => {
            let size = match i.code() {
                iced_x86::Code::Leavew => 2,
                iced_x86::Code::Leaved => 4,
                _ => 8,
            };
            let old = v.cpu.gpr[RSP];
            let bp = v.cpu.gpr[RBP];
            set_rsp(v, bp);
            match peek(v, 0, size) {
                Ok(value) => {
                    let sp = v.cpu.gpr[RSP].wrapping_add(size as u64);
                    set_rsp(v, sp);
                    let r = [Register::BP, Register::EBP, Register::RBP][size.trailing_zeros() as usize - 1];
                    set_register(&mut v.cpu, r, value);
                }
                Err(stop) => {
                    v.cpu.gpr[RSP] = old;
                    return Err(stop);
                }
            }
        }
        // Near and far transfers.
        Jmp if is_far(i) => {
            let (sel, offset, size) = far_operand(v, i)?;
            far::jmp(v, sel, offset, size, i.next_ip())?;
            return Ok(Done::Jumped);
        }
        Call if is_far(i) => {
            let (sel, offset, size) = far_operand(v, i)?;
            far::call(v, sel, offset, size, i.next_ip())?;
            return Ok(Done::Jumped);
        }
        Jmp | Call => {
            let size = near_size(i, 0);
            let target = match i.op0_kind() {
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => i.near_branch_target(),
                _ => read_operand(v, i, 0, size)?,
            };
            if i.mnemonic() == Call {
                checked_target(v, target, size)?;
                push_all(v, &[i.next_ip()], size)?;
            }
            return branch(v, target, size);
        }
        Ret => {
            let size = if long {
                8
            } else if matches!(i.code(), iced_x86::Code::Retnw | iced_x86::Code::Retnw_imm16) {
                2
            } else {
                4
            };
            let target = peek(v, 0, size)?;
            let extra = if i.op_count() != 0 { i.immediate16() as u64 } else { 0 };
            let done = branch(v, target, size)?;
            let sp = v.cpu.gpr[RSP].wrapping_add(size as u64 + extra);
            set_rsp(v, sp);
            return Ok(done);
        }
        Retf => {
            use iced_x86::Code::*;
            let size = match i.code() {
                Retfw | Retfw_imm16 => 2,
                Retfd | Retfd_imm16 => 4,
                _ => 8,
            };
            far::ret(v, size, if i.op_count() != 0 { i.immediate16() as u64 } else { 0 })?;
            return Ok(Done::Jumped);
        }
        Iret | Iretd | Iretq => {
            let size = match i.mnemonic() {
                Iret => 2,
                Iretd => 4,
                _ => 8,
            };
            let nested = v.cpu.sysflags & (rflags::NT | rflags::VM) == rflags::NT;
            if nested && v.cpu.cr0 & cr0::PE != 0 && v.cpu.efer & efer::LMA == 0 {
                task::back(v, i.next_ip())?;
            } else {
                far::iret(v, size)?;
            }
            sys::reconsider_interrupts(&mut v.cpu);
            return Ok(Done::Jumped);
        }
        Jo | Jno | Jb | Jae | Je | Jne | Jbe | Ja | Js | Jns | Jp | Jnp | Jl | Jge | Jle | Jg => {
            if condition(v.cpu.aflags, i.condition_code() as u8 - 1) {
                return branch(v, i.near_branch_target(), near_size(i, 0));
            }
        }
        Jcxz | Jecxz | Jrcxz | Mnemonic::Loop | Loope | Loopne => {
            let counter = match i.mnemonic() {
                Jcxz => Register::CX,
                Jecxz => Register::ECX,
                Jrcxz => Register::RCX,
                _ => {
                    // The counter's width is the address size.
                    use iced_x86::Code::*;
                    match i.code() {
                        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
                        | Loopne_rel8_32_CX => Register::CX,
                        Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX | Loop_rel8_16_RCX
                        | Loope_rel8_16_RCX | Loopne_rel8_16_RCX => Register::RCX,
                        _ => Register::ECX,
                    }
                }
            };
            let count = register(&v.cpu, counter);
            let zero = v.cpu.aflags & rflags::ZF != 0;
            let loops = !matches!(i.mnemonic(), Jcxz | Jecxz | Jrcxz);
            let taken = match i.mnemonic() {
                Jcxz | Jecxz | Jrcxz => count == 0,
                m => count != 1 && (m == Mnemonic::Loop || zero == (m == Loope)),
            };
            let target = if taken { Some(checked_target(v, i.near_branch_target(), near_size(i, 0))?) } else { None };
            if loops {
                set_register(&mut v.cpu, counter, count.wrapping_sub(1));
            }
            if let Some(target) = target {
                v.cpu.rip = target;
                return Ok(Done::Jumped);
            }
        }
        Int1 => {
            // As the processor's own debug exceptions: no check of the gate's DPL, nothing new in DR6.
            v.cpu.rip = i.next_ip();
            v.cpu.sysflags &= !rflags::RF;
            crate::exception::deliver(v, Exception::new(1))?;
            return Ok(Done::Jumped);
        }
        Int3 | Int | Into => {
            let vector = match i.mnemonic() {
                Int3 => 3,
                Into => 4,
                _ => i.immediate8(),
            };
            if i.mnemonic() == Int3
                && let Some(exit) = debug::software_breakpoint(v)
            {
                return Err(exit.into());
            }
            let flags = v.cpu.sysflags;
            if i.mnemonic() == Int && flags & rflags::VM != 0 && flags & rflags::IOPL != rflags::IOPL {
                return Err(Exception::gp(0).into());
            }
            if i.mnemonic() != Into || v.cpu.aflags & rflags::OF != 0 {
                // The frame shows the next instruction, but a fault on the way shows this one.
                let rip = v.cpu.rip;
                v.cpu.rip = i.next_ip();
                v.cpu.sysflags &= !rflags::RF;
                let e = Exception { software: true, ..Exception::new(vector) };
                crate::exception::deliver_software(v, e, rip)?;
                return Ok(Done::Jumped);
            }
        }
        Ud0 | Ud1 | Ud2 => return Err(Exception::ud().into()),
        Rsm => return smm::rsm(v),
        Syscall => {
            far::syscall(v, i.next_ip())?;
            return Ok(Done::Jumped);
        }
        Sysret | Sysretq => {
            far::sysret(v, if i.mnemonic() == Sysretq { 8 } else { 4 })?;
            sys::reconsider_interrupts(&mut v.cpu);
            return Ok(Done::Jumped);
        }
        Sysenter => {
            far::sysenter(v)?;
            return Ok(Done::Jumped);
        }
        Sysexit | Sysexitq => {
            far::sysexit(v, if i.mnemonic() == Sysexitq { 8 } else { 4 })?;
            return Ok(Done::Jumped);
        }
        // Segments.
        Mov if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() => {
            let index = segment_index(i.op0_register());
            if index == CS {
                return Err(Exception::ud().into());
            }
            let sel = read_operand(v, i, 1, 2)? as u16;
            segment::load(v, index, sel)?;
            v.cpu.shadow = if index == SS { shadow::MOV_SS } else { 0 };
        }
        Mov if i.op1_kind() == OpKind::Register && i.op1_register().is_segment_register() => {
            let sel = v.cpu.segs[segment_index(i.op1_register())].sel;
            write_operand(v, i, 0, 2, sel as u64)?;
        }
        Mov if i.op0_kind() == OpKind::Register && (i.op0_register().is_cr() || i.op0_register().is_dr()) => {
            let (r, mut value) = (i.op0_register(), register(&v.cpu, i.op1_register()));
            if !long {
                value &= 0xffff_ffff;
            }
            if r.is_cr() { sys::write_cr(v, r.number(), value)? } else { sys::write_dr(v, r.number(), value)? }
        }
        Mov if i.op1_kind() == OpKind::Register && (i.op1_register().is_cr() || i.op1_register().is_dr()) => {
            let r = i.op1_register();
            let value = if r.is_cr() { sys::read_cr(v, r.number())? } else { sys::read_dr(v, r.number())? };
            set_register(&mut v.cpu, i.op0_register(), value);
        }
        Lds | Les | Lfs | Lgs | Lss => {
            let index = match i.mnemonic() {
                Lds => 3,
                Les => 0,
                Lfs => FS,
                Lgs => GS,
                _ => SS,
            };
            let size = i.op0_register().size();
            let la = address(&v.cpu, i, size as u64 + 2, false)?;
            let offset = load(v, la, size)?;
            let sel = load(v, la.wrapping_add(size as u64), 2)? as u16;
            segment::load(v, index, sel)?;
            set_register(&mut v.cpu, i.op0_register(), offset);
        }
        Lgdt | Lidt => {
            sys::privileged(v)?;
            let wide = if long { 8 } else { 4 };
            let la = address(&v.cpu, i, 2 + wide as u64, false)?;
            let limit = load(v, la, 2)? as u16;
            let mut base = load(v, la.wrapping_add(2), wide)?;
            if matches!(i.code(), iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16) {
                base &= 0xff_ffff;
            }
            if long && !mmu::is_canonical(base) {
                return Err(Exception::gp(0).into());
            }
            *(if i.mnemonic() == Lgdt { &mut v.cpu.gdtr } else { &mut v.cpu.idtr }) = crate::cpu::Table { base, limit };
        }
        Sgdt | Sidt => {
            sys::umip(v)?;
            let t = if i.mnemonic() == Sgdt { v.cpu.gdtr } else { v.cpu.idtr };
            let wide = if long { 8 } else { 4 };
            let la = address(&v.cpu, i, 2 + wide as u64, true)?;
            let mut b = [0; 10];
            b[..2].copy_from_slice(&t.limit.to_le_bytes());
            b[2..].copy_from_slice(&t.base.to_le_bytes());
            let mode = v.cpu.mmu_mode();
            access::write(v, la, &b[..2 + wide], mode)?;
        }
        Lldt | Ltr => {
            segment::require_protected(v, 0)?;
            let sel = read_operand(v, i, 0, 2)? as u16;
            if i.mnemonic() == Lldt { segment::lldt(v, sel)? } else { segment::ltr(v, sel)? }
        }
        Sldt | Str => {
            segment::require_protected(v, 3)?;
            sys::umip(v)?;
            let sel = if i.mnemonic() == Sldt { v.cpu.ldtr.sel } else { v.cpu.tr.sel };
            write_operand(v, i, 0, 2, sel as u64)?;
        }
        Smsw => {
            sys::umip(v)?;
            let value = v.cpu.cr0;
            write_operand(v, i, 0, 2, value)?;
        }
        Lmsw => {
            sys::privileged(v)?; // before the operand is touched
            let value = read_operand(v, i, 0, 2)? as u16;
            sys::lmsw(v, value)?;
        }
        Lar | Lsl | Verr | Verw => {
            let (n, what) = match i.mnemonic() {
                Lar => (1, Inspect::Access),
                Lsl => (1, Inspect::Limit),
                Verr => (0, Inspect::Read),
                _ => (0, Inspect::Write),
            };
            segment::require_protected(v, 3)?;
            let sel = read_operand(v, i, n, 2)? as u16;
            let d = segment::visible(v, sel, what)?;
            v.cpu.aflags &= !rflags::ZF;
            if let Some(d) = d {
                v.cpu.aflags |= rflags::ZF;
                match what {
                    Inspect::Access => set_register(&mut v.cpu, i.op0_register(), d.0 >> 32 & 0xff_ff00),
                    Inspect::Limit => set_register(&mut v.cpu, i.op0_register(), d.limit() as u64),
                    _ => {}
                }
            }
        }
        // Flags.
        Cli => sys::cli(v)?,
        Sti => sys::sti(v)?,
        Cld => v.cpu.sysflags &= !rflags::DF,
        Std => v.cpu.sysflags |= rflags::DF,
        Clac | Stac => {
            if v.cpu.cr4 & cr4::SMAP == 0 && !smap_offered(v) || v.cpu.cpl != 0 {
                return Err(Exception::ud().into());
            }
            if i.mnemonic() == Clac { v.cpu.sysflags &= !rflags::AC } else { v.cpu.sysflags |= rflags::AC }
        }
        // System.
        Clts => sys::clts(v)?,
        Invlpg => {
            sys::privileged(v)?;
            let la = if long {
                let index = segment_index(i.memory_segment());
                let base = if matches!(index, FS | GS) { v.cpu.segs[index].base } else { 0 };
                base.wrapping_add(effective(&v.cpu, i))
            } else {
                v.cpu.segs[segment_index(i.memory_segment())].base.wrapping_add(effective(&v.cpu, i)) & 0xffff_ffff
            };
            mmu::flush_page(v, la);
        }
        Invpcid => {
            if !sys::offers_invpcid(v) || segment::is_real_or_v86(&v.cpu) && v.cpu.sysflags & rflags::VM == 0 {
                return Err(Exception::ud().into());
            }
            sys::privileged(v)?;
            let la = address(&v.cpu, i, 16, false)?;
            let descriptor = [load(v, la, 8)?, load(v, la.wrapping_add(8), 8)?];
            let kind = register(&v.cpu, i.op0_register());
            sys::invpcid(v, kind, descriptor)?;
        }
        Wbinvd | Invd => sys::privileged(v)?,
        Clflush | Clflushopt | Clwb => {
            let la = address(&v.cpu, i, 1, false)?;
            load(v, la, 1)?;
        }
        Cpuid => sys::cpuid(v),
        Rdmsr => sys::rdmsr(v)?,
        Wrmsr => sys::wrmsr(v)?,
        Rdtsc => sys::rdtsc(v)?,
        Rdtscp => {
            sys::rdtsc(v)?;
            v.cpu.gpr[RCX] = v.cpu.msr.tsc_aux & 0xffff_ffff;
        }
        Pause => v.spin.pause(&v.shared.stats),
        Rdpid => {
            let value = v.cpu.msr.tsc_aux & 0xffff_ffff;
            set_register(&mut v.cpu, i.op0_register(), value);
        }
        // Whatever modified code is seen at every entry to a block, by translation and interpreter alike.
        Serialize => {}
        Movdir64b => move_64_bytes(v, i)?,
        Xgetbv => fpu::xgetbv(v, fpu)?,
        Xsetbv => sys::xsetbv(v)?,
        Swapgs => sys::swapgs(v)?,
        Rdfsbase | Rdgsbase => {
            sys::fsgsbase(v)?;
            let value = v.cpu.segs[if i.mnemonic() == Rdfsbase { FS } else { GS }].base;
            set_register(&mut v.cpu, i.op0_register(), value);
        }
        Wrfsbase | Wrgsbase => {
            sys::fsgsbase(v)?;
            let value = register(&v.cpu, i.op0_register());
            sys::set_segment_base(v, if i.mnemonic() == Wrfsbase { FS } else { GS }, value)?;
        }
        Hlt => {
            sys::privileged(v)?;
            v.cpu.rip = i.next_ip();
            v.halted = true;
            return Ok(Done::Jumped);
        }
        In => {
            let size = i.op0_register().size();
            let port = if i.op1_kind() == OpKind::Register { v.cpu.gpr[RDX] as u16 } else { i.immediate8() as u16 };
            sys::check_port(v, port, size)?;
            let data = sys::port_in(v, port, size, 1)?;
            let mut b = [0; 8];
            b[..size].copy_from_slice(&data);
            set_register(&mut v.cpu, i.op0_register(), u64::from_le_bytes(b));
        }
        Out => {
            let size = i.op1_register().size();
            let port = if i.op0_kind() == OpKind::Register { v.cpu.gpr[RDX] as u16 } else { i.immediate8() as u16 };
            sys::check_port(v, port, size)?;
            let data = v.cpu.gpr[RAX].to_le_bytes();
            if let Some(exit) = sys::port_out(v, port, size, &data[..size]) {
                v.cpu.rip = i.next_ip();
                return Ok(Done::Exit(exit));
            }
        }
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd | Lodsq | Scasb
        | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq | Insb | Insw | Insd | Outsb | Outsw | Outsd
            if i.is_string_instruction() =>
        {
            return string::execute(v, i);
        }
        // Data that the native path cannot address.
        Lea => {
            let value = effective(&v.cpu, i);
            set_register(&mut v.cpu, i.op0_register(), value);
        }
        Xlatb => {
            let mask = match i.memory_base().size() {
                2 => 0xffff,
                4 => 0xffff_ffff,
                _ => u64::MAX,
            };
            let offset = register(&v.cpu, i.memory_base()).wrapping_add(v.cpu.gpr[RAX] & 0xff) & mask;
            let la = segment::linear(&v.cpu, segment_index(i.memory_segment()), offset, 1, false)?;
            let value = load(v, la, 1)?;
            set_register(&mut v.cpu, Register::AL, value);
        }
        Bt | Bts | Btr | Btc if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register => {
            // The bit offset is signed and reaches beyond the operand: the address moves with it.
            let size = i.op1_register().size();
            let bits = size as i64 * 8;
            let raw = register(&v.cpu, i.op1_register());
            let offset = match size {
                2 => raw as i16 as i64,
                4 => raw as i32 as i64,
                _ => raw as i64,
            };
            let ea = effective(&v.cpu, i).wrapping_add((offset.div_euclid(bits) * size as i64) as u64);
            let ea = ea & address_mask(i);
            let la = segment::linear(&v.cpu, segment_index(i.memory_segment()), ea, size as u64, i.mnemonic() != Bt)?;
            bit_in_memory(v, i.mnemonic(), la, size, offset.rem_euclid(bits) as u64)?;
        }
        // Hints, and what does nothing where control-flow enforcement and the like are not offered.
        Nop | Reservednop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote | Prefetchnta | Prefetcht0 | Prefetcht1
        | Prefetcht2 | Prefetchw | Prefetchwt1 | Prefetchit0 | Prefetchit1 | Prefetch => {}
        Rdpmc => return Err(Exception::gp(0).into()), // no counters
        Aaa | Aas | Daa | Das | Aam | Aad | Salc => decimal::execute(v, i)?,
        Bound => {
            let size = i.op0_register().size();
            let la = address(&v.cpu, i, 2 * size as u64, false)?;
            let signed = |x: u64| if size == 2 { x as i16 as i64 } else { x as i32 as i64 };
            let (low, high) = (signed(load(v, la, size)?), signed(load(v, la.wrapping_add(size as u64), size)?));
            if !(low..=high).contains(&signed(register(&v.cpu, i.op0_register()))) {
                return Err(Exception::new(5).into());
            }
        }
        Arpl => {
            segment::require_protected(v, 3)?;
            let (to, from) = (read_operand(v, i, 0, 2)?, register(&v.cpu, i.op1_register()));
            let lower = to & 3 < from & 3;
            // The destination is written in any case, so that it faults in any case.
            write_operand(v, i, 0, 2, if lower { to & !3 | from & 3 } else { to })?;
            v.cpu.aflags = v.cpu.aflags & !rflags::ZF | if lower { rflags::ZF } else { 0 };
        }
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64
        | Xsaves | Xsaves64 | Xrstor | Xrstor64 | Xrstors | Xrstors64 => {
            if !fpu {
                return Err(Stop::NotInterpreted);
            }
            fpu::execute(v, i)?;
        }
        _ if i.is_vsib() => {
            check_fpu(&v.cpu, i)?;
            if !fpu {
                return Err(Stop::NotInterpreted);
            }
            fpu::gather_scatter(v, i)?;
        }
        _ => return native(v, i, bytes, fpu),
    }
    Ok(Done::Next)
}

/// BT, BTS, BTR or BTC of bit `bit` of the `size`-byte operand at `la`: atomic on RAM, locked or not.
fn bit_in_memory(v: &mut Vcpu, mnemonic: Mnemonic, la: u64, size: usize, bit: u64) -> Res<()> {
    let mode = v.cpu.mmu_mode();
    access::check_alignment(&v.cpu, la, size, mode)?;
    let mask = 1u64 << bit;
    let update = |old: u64| match mnemonic {
        Mnemonic::Bts => old | mask,
        Mnemonic::Btr => old & !mask,
        _ => old ^ mask,
    };
    let old = if mnemonic == Mnemonic::Bt {
        load(v, la, size)?
    } else {
        // The whole operand is accessed, and faults as such; the byte that holds the bit is always aligned.
        access::check_pages(v, la, size as u64, mmu::Intent::Write, mode)?;
        match access::direct(v, la.wrapping_add(bit / 8), 1, mode)? {
            Some((p, slot, gpa)) => {
                let byte_mask = 1u8 << (bit & 7);
                let old = loop {
                    let mut old = 0;
                    // SAFETY: a byte of guest memory, valid while this vCPU runs, and one of our own.
                    unsafe { guest::copy(&raw mut old, p, 1) }.map_err(|Gone| Exception::memory_fault(gpa))?;
                    let new = match mnemonic {
                        Mnemonic::Bts => old | byte_mask,
                        Mnemonic::Btr => old & !byte_mask,
                        _ => old ^ byte_mask,
                    };
                    // SAFETY: as above.
                    if unsafe { guest::swap1(p, old, new) }.map_err(|Gone| Exception::memory_fault(gpa))? {
                        break old;
                    }
                };
                access::written(v, &slot, gpa, 1);
                (old as u64) << (bit & !7)
            }
            None => {
                access::check_write(v, la, size as u64, mode)?;
                let old = load(v, la, size)?;
                store(v, la, size, update(old))?;
                old
            }
        }
    };
    v.cpu.aflags = v.cpu.aflags & !rflags::CF | old >> bit & 1;
    Ok(())
}

/// Instructions that the processor itself computes.
fn native(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], fpu: bool) -> Res<Done> {
    let integer = native_class(i, Features::NONE);
    if !integer {
        if !native_class(i, Features::ALL) {
            v.shared.stats.count(counter::UNSUPPORTED);
            *v.vm.unsupported.lock().unwrap().entry(i.mnemonic()).or_default() += 1;
            return Err(Exception::ud().into());
        }
        check_fpu(&v.cpu, i)?;
        if !fpu {
            return Err(Stop::NotInterpreted);
        }
    }
    careful::run_instruction(v, i, bytes, integer)?;
    Ok(Done::Next)
}

fn native_class(i: &Instruction, features: Features) -> bool {
    use Mnemonic::*;
    matches!(classify(i, features), Class::Plain | Class::Careful)
        || matches!(i.mnemonic(), Bt | Bts | Btr | Btc | Inc | Dec)
}

/// #UD or #NM where the mode forbids x87, SSE or AVX.
fn check_fpu(c: &Cpu, i: &Instruction) -> Res<()> {
    use iced_x86::EncodingKind;
    let vex = i.encoding() != EncodingKind::Legacy;
    let is_x87 = i.cpuid_features().iter().any(|f| {
        matches!(f, iced_x86::CpuidFeature::FPU | iced_x86::CpuidFeature::FPU287 | iced_x86::CpuidFeature::FPU387)
    });
    let is_mmx = i.cpuid_features().contains(&iced_x86::CpuidFeature::MMX);
    if i.mnemonic() == Mnemonic::Wait {
        if c.cr0 & (cr0::TS | cr0::MP) == cr0::TS | cr0::MP {
            return Err(Exception::new(7).into());
        }
        return Ok(());
    }
    if is_x87 {
        if c.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(Exception::new(7).into());
        }
        return Ok(());
    }
    let allowed = if uses_avx512(i) {
        c.cr4 & cr4::OSXSAVE != 0 && c.xcr0 & 0xe6 == 0xe6 && !segment::is_real_or_v86(c)
    } else if vex {
        c.cr4 & cr4::OSXSAVE != 0 && c.xcr0 & 6 == 6 && !segment::is_real_or_v86(c)
    } else {
        c.cr0 & cr0::EM == 0 && (is_mmx || c.cr4 & cr4::OSFXSR != 0)
    };
    if !allowed {
        return Err(Exception::ud().into());
    }
    if c.cr0 & cr0::TS != 0 {
        return Err(Exception::new(7).into());
    }
    Ok(())
}

/// MOVDIR64B: 64 bytes to the address in the register operand, as one write.
fn move_64_bytes(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    static EXISTS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if !EXISTS.get_or_init(|| std::arch::x86_64::__cpuid_count(7, 0).ecx >> 28 & 1 != 0) {
        return Err(Exception::ud().into());
    }
    let from = address(&v.cpu, i, 64, false)?;
    let offset = register(&v.cpu, i.op0_register());
    let to = segment::linear(&v.cpu, 0, offset, 64, true)?;
    if to & 63 != 0 {
        return Err(Exception::gp(0).into());
    }
    let mode = v.cpu.mmu_mode();
    let mut data = Bytes64([0; 64]);
    access::check_write(v, to, 64, mode)?;
    access::read(v, from, &mut data.0, mode)?;
    match access::direct(v, to, 64, mode)? {
        Some((p, slot, gpa)) => {
            // SAFETY: 64 aligned bytes of guest memory, and of our own; the processor has the instruction.
            unsafe { guest::copy64(p, &data.0) }.map_err(|Gone| Exception::memory_fault(gpa))?;
            access::written(v, &slot, gpa, 64);
            Ok(())
        }
        None => access::write(v, to, &data.0, mode),
    }
}

#[repr(align(64))]
struct Bytes64([u8; 64]);

fn smap_offered(v: &Vcpu) -> bool {
    v.cpuid.iter().any(|e| e.function == 7 && e.index == 0 && e.ebx >> 20 & 1 != 0)
}

fn enter(v: &mut Vcpu, locals: u64, level: u8, size: usize) -> Res<()> {
    let old = (v.cpu.gpr[RSP], v.cpu.gpr[RBP]);
    let mask = stack_mask(v);
    let result = (|| {
        let bp = v.cpu.gpr[RBP];
        push_all(v, &[bp], size)?;
        let frame = v.cpu.gpr[RSP];
        for n in 1..level {
            let at = bp.wrapping_sub(n as u64 * size as u64) & mask;
            let la = segment::linear(&v.cpu, SS, at, size as u64, false)?;
            let value = load(v, la, size)?;
            push_all(v, &[value], size)?;
        }
        if level > 0 {
            push_all(v, &[frame], size)?;
        }
        let r = [Register::BP, Register::EBP, Register::RBP][size.trailing_zeros() as usize - 1];
        set_register(&mut v.cpu, r, frame);
        let sp = v.cpu.gpr[RSP].wrapping_sub(locals);
        set_rsp(v, sp);
        Ok(())
    })();
    if result.is_err() {
        (v.cpu.gpr[RSP], v.cpu.gpr[RBP]) = old;
    }
    result
}
