//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, alone and repeated.
//!
//! A repeated one is done in steps that each leave the registers as the architecture shows them between
//! iterations, so it can stop at any of them: for a fault, a device, or because something waits.

use super::{Done, load, register, segment_index, set_register, store};
use crate::access;
use crate::cpu::{Exit, RAX, RDX, Res, Vcpu, rflags};
use crate::debug;
use crate::guest;
use crate::mem::{LOG_DIRTY, READONLY};
use crate::mmu::{self, Intent};
use crate::segment::linear;
use crate::sys;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::arch::asm;

/// Iterations between looks at what else there is.
const BATCH: u32 = 256;

struct Shape {
    size: usize,
    counter: Option<Register>,
    source: Option<(Register, usize)>,
    destination: Option<Register>,
}

fn index_register(kind: OpKind) -> Option<(Register, bool)> {
    Some(match kind {
        OpKind::MemorySegSI => (Register::SI, true),
        OpKind::MemorySegESI => (Register::ESI, true),
        OpKind::MemorySegRSI => (Register::RSI, true),
        OpKind::MemoryESDI => (Register::DI, false),
        OpKind::MemoryESEDI => (Register::EDI, false),
        OpKind::MemoryESRDI => (Register::RDI, false),
        _ => return None,
    })
}

fn shape(i: &Instruction) -> Shape {
    let mut s = Shape { size: i.memory_size().size(), counter: None, source: None, destination: None };
    let mut width = 8;
    for n in 0..i.op_count() {
        if let Some((r, is_source)) = index_register(i.op_kind(n)) {
            width = r.size();
            if is_source {
                s.source = Some((r, segment_index(i.memory_segment())));
            } else {
                s.destination = Some(r);
            }
        }
    }
    if i.has_rep_prefix() || i.has_repne_prefix() {
        s.counter = Some(match width {
            2 => Register::CX,
            4 => Register::ECX,
            _ => Register::RCX,
        });
    }
    s
}

pub(super) fn execute(v: &mut Vcpu, i: &Instruction) -> Res<Done> {
    use Mnemonic::*;
    let s = shape(i);
    let m = i.mnemonic();
    if matches!(m, Insb | Insw | Insd | Outsb | Outsw | Outsd) {
        return ports(v, i, &s);
    }
    let Some(counter) = s.counter else {
        iteration(v, i, &s)?;
        return Ok(Done::Next);
    };
    // Until it is complete, a repeated comparison shows the flags from before it (Intel SDM volume 2, REP).
    let flags = v.cpu.aflags;
    let result = repeat(v, i, &s, counter);
    if !matches!(result, Ok(Done::Next)) {
        v.cpu.aflags = flags;
    }
    result
}

fn repeat(v: &mut Vcpu, i: &Instruction, s: &Shape, counter: Register) -> Res<Done> {
    use Mnemonic::*;
    let m = i.mnemonic();
    let compares = matches!(m, Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq);
    let moves = matches!(m, Movsb | Movsw | Movsd | Movsq);
    let stores = matches!(m, Stosb | Stosw | Stosd | Stosq);
    let stepping = debug::stepping(v);
    let mut n = 0;
    while register(&v.cpu, counter) != 0 {
        // A single step is one iteration.
        if n >= BATCH && v.cpu.polled() || n != 0 && (stepping || debug::met(v)) {
            return Ok(Done::Jumped);
        }
        n += 1;
        if (moves || stores) && !stepping && !v.debug.watching && register(&v.cpu, counter) > 1 {
            let done = bulk(v, s, counter, moves)?;
            if done != 0 {
                n = BATCH;
                continue;
            }
        }
        iteration(v, i, s)?;
        let left = register(&v.cpu, counter).wrapping_sub(1);
        set_register(&mut v.cpu, counter, left);
        v.io.done.clear();
        v.io.used = 0;
        if compares && (v.cpu.aflags & rflags::ZF != 0) == i.has_repne_prefix() {
            break;
        }
        if !v.io.writes.is_empty() && left != 0 {
            return Ok(Done::Jumped);
        }
    }
    Ok(Done::Next)
}

fn advance(v: &mut Vcpu, r: Register, bytes: u64) {
    let step = if v.cpu.sysflags & rflags::DF != 0 { bytes.wrapping_neg() } else { bytes };
    let value = register(&v.cpu, r).wrapping_add(step);
    set_register(&mut v.cpu, r, value);
}

fn source(v: &Vcpu, s: &Shape) -> Res<u64> {
    let (r, segment) = s.source.unwrap_or((Register::RSI, 3));
    Ok(linear(&v.cpu, segment, register(&v.cpu, r), s.size as u64, false)?)
}
fn destination(v: &Vcpu, s: &Shape, write: bool) -> Res<u64> {
    let r = s.destination.unwrap_or(Register::RDI);
    Ok(linear(&v.cpu, 0, register(&v.cpu, r), s.size as u64, write)?)
}

fn iteration(v: &mut Vcpu, i: &Instruction, s: &Shape) -> Res<()> {
    use Mnemonic::*;
    let size = s.size;
    match i.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => {
            let (from, to) = (source(v, s)?, destination(v, s, true)?);
            let mode = v.cpu.mmu_mode();
            access::check_read(v, from, size as u64, mode)?;
            access::check_write(v, to, size as u64, mode)?;
            let value = load(v, from, size)?;
            store(v, to, size, value)?;
        }
        Stosb | Stosw | Stosd | Stosq => {
            let to = destination(v, s, true)?;
            let value = v.cpu.gpr[RAX];
            store(v, to, size, value)?;
        }
        Lodsb | Lodsw | Lodsd | Lodsq => {
            let from = source(v, s)?;
            let value = load(v, from, size)?;
            set_register(&mut v.cpu, accumulator(size), value);
        }
        Scasb | Scasw | Scasd | Scasq => {
            let to = destination(v, s, false)?;
            let value = load(v, to, size)?;
            let a = v.cpu.gpr[RAX];
            v.cpu.aflags = compare(a, value, size);
        }
        _ => {
            let (from, to) = (source(v, s)?, destination(v, s, false)?);
            // The processor reads the second operand first, which shows where both fault.
            let b = load(v, to, size)?;
            let a = load(v, from, size)?;
            v.cpu.aflags = compare(a, b, size);
        }
    }
    if let Some((r, _)) = s.source {
        advance(v, r, size as u64);
    }
    if let Some(r) = s.destination {
        advance(v, r, size as u64);
    }
    Ok(())
}

fn accumulator(size: usize) -> Register {
    [Register::AL, Register::AX, Register::EAX, Register::RAX][size.trailing_zeros() as usize]
}

/// Flags of `a - b`.
fn compare(a: u64, b: u64, size: usize) -> u64 {
    let flags: u64;
    let shift = 64 - size as u32 * 8;
    // Shifted to the top, all flags but AF and PF are those of the narrow operation; those two look at the
    // lowest byte and come from comparing that.
    let (low_flags, x, y): (u64, u64, u64);
    (x, y) = (a << shift, b << shift);
    // SAFETY: pushes and pops one word, balanced.
    unsafe {
        asm!("cmp {0}, {1}", "pushfq", "pop {2}", in(reg) x, in(reg) y, out(reg) flags);
        asm!("cmp {0}, {1}", "pushfq", "pop {2}", in(reg_byte) a as u8, in(reg_byte) b as u8, out(reg) low_flags);
    }
    let low = rflags::AF | rflags::PF;
    (flags & !low | low_flags & low) & rflags::ARITH
}

/// How many elements, the one at linear address `la` and register `r` first, lie within one page and below
/// the wrap of the register.
fn room(v: &Vcpu, la: u64, r: Register, size: u64) -> u64 {
    let (offset, value) = (la & 0xfff, register(&v.cpu, r));
    if offset + size > 4096 {
        0
    } else if v.cpu.sysflags & rflags::DF != 0 {
        (offset / size).min(value / size) + 1
    } else {
        let top = u64::MAX >> (64 - 8 * r.size());
        ((4096 - offset) / size).min((top - value) / size)
    }
}

/// Do as many iterations of MOVS or STOS as lie within one page on each side, both in RAM.
fn bulk(v: &mut Vcpu, s: &Shape, counter: Register, moves: bool) -> Res<u64> {
    let size = s.size as u64;
    let mode = v.cpu.mmu_mode();
    let backward = v.cpu.sysflags & rflags::DF != 0;
    let to = destination(v, s, true)?;
    let r = s.destination.unwrap_or(Register::RDI);
    let mut count = register(&v.cpu, counter).min(room(v, to, r, size));
    let from = match s.source {
        Some((r, _)) if moves => {
            let from = source(v, s)?;
            count = count.min(room(v, from, r, size));
            Some(from)
        }
        _ => None,
    };
    if count < 2 {
        return Ok(0);
    }
    let whole = count * size;
    // From the first element to the lowest address of all.
    let below = if backward { whole - size } else { 0 };
    // The segment must hold all of it; where it does not, single iterations find out exactly where.
    if linear(&v.cpu, 0, register(&v.cpu, r) - below, whole, true).is_err() {
        return Ok(0);
    }
    if let Some((r, segment)) = s.source
        && moves
        && linear(&v.cpu, segment, register(&v.cpu, r) - below, whole, false).is_err()
    {
        return Ok(0);
    }
    let (to, from) = (to - below, from.map(|from| from - below));
    // A fault is that of the first element, not of the lowest: the single iteration raises it.
    let from_gpa = match from {
        Some(from) => match mmu::walk(v, from, Intent::Read, mode) {
            Ok(page) => Some(page.gpa + (from & 0xfff)),
            Err(_) => return Ok(0),
        },
        None => None,
    };
    let Ok(page) = mmu::walk(v, to, Intent::Write, mode) else { return Ok(0) };
    let to_gpa = page.gpa + (to & 0xfff);
    let Some(slot) = v.slots.find(to_gpa).filter(|s| s.flags & READONLY == 0).copied() else { return Ok(0) };
    let Some(target) = v.slots.hva(to_gpa, whole) else { return Ok(0) };
    if v.is_lapic(to_gpa) || v.smm {
        return Ok(0);
    }
    let moved = match from_gpa {
        Some(gpa) => {
            if v.is_lapic(gpa) {
                return Ok(0);
            }
            let Some(origin) = v.slots.hva(gpa, whole) else { return Ok(0) };
            // SAFETY: both ranges lie within slots; element order is the guest's own.
            unsafe {
                let first = if backward { below as usize } else { 0 };
                guest::repeat_movs(target.add(first), origin.add(first), count, s.size, backward)
            }
        }
        None => {
            let value = v.cpu.gpr[RAX];
            // SAFETY: the range lies within a slot.
            unsafe { guest::repeat_stos(target, value, count, s.size) }
        }
    };
    // Fewer if the host's memory is gone: what a single iteration then says.
    if moved != 0 && (slot.flags & LOG_DIRTY != 0 || v.vm.code.has(to_gpa)) {
        access::written(v, &slot, to_gpa, whole);
    }
    advance(v, r, moved * size);
    if let Some((r, _)) = s.source {
        advance(v, r, moved * size);
    }
    let left = register(&v.cpu, counter) - moved;
    set_register(&mut v.cpu, counter, left);
    Ok(moved)
}

/// INS and OUTS. A repeated one leaves with as many items as lie within one page, as KVM does.
fn ports(v: &mut Vcpu, i: &Instruction, s: &Shape) -> Res<Done> {
    use Mnemonic::*;
    let input = matches!(i.mnemonic(), Insb | Insw | Insd);
    let port = v.cpu.gpr[RDX] as u16;
    sys::check_port(v, port, s.size)?;
    let left = s.counter.map_or(1, |c| register(&v.cpu, c));
    if left == 0 {
        return Ok(Done::Next);
    }
    let size = s.size as u64;
    let la = if input { destination(v, s, true)? } else { source(v, s)? };
    let (r, segment) = if input { (s.destination, 0) } else { (s.source.map(|x| x.0), s.source.map_or(3, |x| x.1)) };
    let r = r.unwrap_or(if input { Register::RDI } else { Register::RSI });
    let one_by_one = v.cpu.sysflags & rflags::DF != 0 || debug::stepping(v) || v.debug.watching;
    let mut count = if one_by_one { 1 } else { left.min(room(v, la, r, size)).clamp(1, 1024) as u32 };
    if linear(&v.cpu, segment, register(&v.cpu, r), count as u64 * size, input).is_err() {
        count = 1;
    }
    let len = count as usize * s.size;
    let mode = v.cpu.mmu_mode();
    let mut data = vec![0; len];
    if input {
        access::check_write(v, la, len as u64, mode)?;
        let answer = sys::port_in(v, port, s.size, count)?;
        access::write(v, la, &answer, mode)?;
    } else {
        access::read(v, la, &mut data, mode)?;
    }
    advance(v, r, len as u64);
    let rest = left - count as u64;
    if let Some(c) = s.counter {
        set_register(&mut v.cpu, c, rest);
    }
    if rest == 0 {
        v.cpu.rip = if v.cpu.long64() { i.next_ip() } else { i.next_ip() & 0xffff_ffff };
    }
    v.io.done.clear();
    if input {
        return Ok(Done::Jumped);
    }
    debug::access(v, debug::Kind::Port, port as u64, s.size);
    Ok(Done::Exit(Exit::Io { input: false, size: s.size as u8, port, count, data }))
}
