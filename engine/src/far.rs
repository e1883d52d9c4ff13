//! Far control transfers: JMP, CALL and RET between segments, IRET, SYSCALL and SYSENTER (Intel SDM volume 2,
//! under each instruction; AMD APM volume 3 for SYSCALL and SYSRET).

use crate::cpu::{CS, DS, ES, Exception, FS, GS, RCX, RDX, RSP, Res, SS, Seg, Vcpu, efer, mmu_mode, rflags};
use crate::mmu::is_canonical;
use crate::segment::{
    Descriptor, GP, NP, SS_FAULT, is_real, is_real_or_v86, linear, load, on_stack, read_descriptor,
    read_descriptor_high, set_cs, set_descriptor_bits,
};
use crate::task::{self, Cause};
use crate::{access, exception};

fn gp(sel: u16) -> Exception {
    Exception::with_error(GP, sel as u32 & 0xfffc)
}

/// Mask of the stack pointer in the current stack segment.
pub fn stack_mask(v: &Vcpu) -> u64 {
    if v.cpu.long64() { u64::MAX } else { stack_mask_of(&v.cpu.segs[SS]) }
}

/// Set RSP under the stack mask.
pub fn set_rsp(v: &mut Vcpu, value: u64) {
    let mask = stack_mask(v);
    v.cpu.gpr[RSP] = match mask {
        0xffff => v.cpu.gpr[RSP] & !0xffff | value & 0xffff,
        _ => value & mask,
    };
}

/// Push values of `size` bytes, the first one first, as one write.
pub fn push_all(v: &mut Vcpu, values: &[u64], size: usize) -> Res<()> {
    let mut bytes = [0u8; 128];
    let len = values.len() * size;
    for (n, value) in values.iter().rev().enumerate() {
        bytes[n * size..(n + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    let sp = v.cpu.gpr[RSP].wrapping_sub(len as u64) & stack_mask(v);
    let la = linear(&v.cpu, SS, sp, len as u64, true)?;
    let mode = v.cpu.mmu_mode();
    exception::push(v, la, &bytes[..len], size, mode)?;
    set_rsp(v, sp);
    Ok(())
}

/// The `size`-byte value `index` places above the top of the stack.
pub fn peek(v: &mut Vcpu, index: u64, size: usize) -> Res<u64> {
    let sp = v.cpu.gpr[RSP].wrapping_add(index * size as u64) & stack_mask(v);
    let la = linear(&v.cpu, SS, sp, size as u64, false)?;
    let mode = v.cpu.mmu_mode();
    let mut b = [0; 8];
    access::read(v, la, &mut b[..size], mode)?;
    Ok(u64::from_le_bytes(b))
}

fn drop_stack(v: &mut Vcpu, bytes: u64) {
    let sp = v.cpu.gpr[RSP].wrapping_add(bytes);
    set_rsp(v, sp);
}

fn operand_mask(size: usize) -> u64 {
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Far JMP to `sel:offset` with an operand size of `size` bytes; `next` is the address behind it.
pub fn jmp(v: &mut Vcpu, sel: u16, offset: u64, size: usize, next: u64) -> Res<()> {
    let offset = offset & operand_mask(size);
    if is_real_or_v86(&v.cpu) {
        return real_target(v, sel, offset);
    }
    let d = target(v, sel)?;
    match d.kind() {
        CALL_GATE_16 | CALL_GATE => {
            let gate = Gate::read(v, sel, d)?;
            if !gate.code.is_conforming() && gate.code.dpl() != v.cpu.cpl {
                return Err(gp(gate.sel).into());
            }
            let cpl = v.cpu.cpl;
            go(v, gate.sel, gate.code, cpl, gate.offset)
        }
        TASK_GATE => task::through_gate(v, sel, d, Cause::Jmp, next),
        TSS_16 | TSS => task::direct(v, sel, d, Cause::Jmp, next),
        _ => {
            let cpl = check_target(v, sel, d)?;
            go(v, sel, d, cpl, offset)
        }
    }
}

/// Far CALL; `next` is the return address.
pub fn call(v: &mut Vcpu, sel: u16, offset: u64, size: usize, next: u64) -> Res<()> {
    let offset = offset & operand_mask(size);
    let cs = v.cpu.segs[CS].sel as u64;
    if is_real_or_v86(&v.cpu) {
        if offset > v.cpu.segs[CS].limit as u64 {
            return Err(Exception::gp(0).into());
        }
        push_all(v, &[cs, next], size)?;
        return real_target(v, sel, offset);
    }
    let d = target(v, sel)?;
    match d.kind() {
        CALL_GATE_16 | CALL_GATE => {
            let gate = Gate::read(v, sel, d)?;
            call_through(v, gate, next)
        }
        TASK_GATE => task::through_gate(v, sel, d, Cause::Call, next),
        TSS_16 | TSS => task::direct(v, sel, d, Cause::Call, next),
        _ => {
            let cpl = check_target(v, sel, d)?;
            check_offset(v, d, offset)?;
            push_all(v, &[cs, next], size)?;
            go(v, sel, d, cpl, offset)
        }
    }
}

fn real_target(v: &mut Vcpu, sel: u16, offset: u64) -> Res<()> {
    if offset > v.cpu.segs[CS].limit as u64 {
        return Err(Exception::gp(0).into());
    }
    v.cpu.segs[CS].sel = sel;
    v.cpu.segs[CS].base = (sel as u64) << 4;
    v.cpu.rip = offset;
    Ok(())
}

/// Types of system descriptors.
const TSS_16: u8 = 1;
const CALL_GATE_16: u8 = 4;
const TASK_GATE: u8 = 5;
const TSS: u8 = 9;
const CALL_GATE: u8 = 12;

/// The descriptor that a far JMP or CALL names: code, or what leads on in this mode.
fn target(v: &mut Vcpu, sel: u16) -> Res<Descriptor> {
    if sel & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    let d = read_descriptor(v, sel, GP)?;
    let long = v.cpu.efer & efer::LMA != 0;
    let leads_on = match d.kind() {
        CALL_GATE => true,
        TSS_16 | CALL_GATE_16 | TASK_GATE | TSS => !long,
        _ => d.is_code(),
    };
    if leads_on { Ok(d) } else { Err(gp(sel).into()) }
}

/// Check code that a far JMP or CALL names itself: the CPL there.
fn check_target(v: &Vcpu, sel: u16, d: Descriptor) -> Res<u8> {
    let (rpl, cpl) = (sel as u8 & 3, v.cpu.cpl);
    if if d.is_conforming() { d.dpl() > cpl } else { rpl > cpl || d.dpl() != cpl } {
        return Err(gp(sel).into());
    }
    check_code(v, sel, d)?;
    Ok(cpl)
}

/// A call gate that may be used, and the code behind it.
struct Gate {
    sel: u16,
    code: Descriptor,
    offset: u64,
    /// Bytes of what is pushed.
    size: usize,
    /// Parameters to copy to an inner stack.
    parameters: u64,
}

impl Gate {
    /// Of the descriptor `d` that `sel` names.
    fn read(v: &mut Vcpu, sel: u16, d: Descriptor) -> Res<Self> {
        let long = v.cpu.efer & efer::LMA != 0;
        let high = if long { read_descriptor_high(v, sel, GP)? } else { 0 };
        if d.dpl() < v.cpu.cpl || sel as u8 & 3 > d.dpl() || high >> 40 & 0x1f != 0 {
            return Err(gp(sel).into());
        }
        if !d.present() {
            return Err(Exception::with_error(NP, sel as u32 & 0xfffc).into());
        }
        let target = (d.0 >> 16) as u16;
        if target & 0xfffc == 0 {
            return Err(Exception::gp(0).into());
        }
        let code = read_descriptor(v, target, GP)?;
        if !code.is_code() || code.dpl() > v.cpu.cpl || long && code.attr() & (Seg::L | Seg::DB) != Seg::L {
            return Err(gp(target).into());
        }
        if !code.present() {
            return Err(Exception::with_error(NP, target as u32 & 0xfffc).into());
        }
        let wide = d.kind() == CALL_GATE;
        let offset = d.0 & 0xffff | if wide { d.0 >> 48 << 16 | (high & 0xffff_ffff) << 32 } else { 0 };
        let size = if long { 8 } else { 2 + 2 * wide as usize };
        Ok(Self { sel: target, code, offset, size, parameters: if long { 0 } else { d.0 >> 32 & 31 } })
    }
}

fn call_through(v: &mut Vcpu, gate: Gate, next: u64) -> Res<()> {
    let long = gate.size == 8;
    check_offset(v, gate.code, gate.offset)?;
    let inner = !gate.code.is_conforming() && gate.code.dpl() < v.cpu.cpl;
    let cpl = if inner { gate.code.dpl() } else { v.cpu.cpl };
    // From the top of the stack up.
    let mut words = vec![next, v.cpu.segs[CS].sel as u64];
    let (mut ss, mut sp) = (v.cpu.segs[SS], v.cpu.gpr[RSP]);
    if inner {
        for n in 0..gate.parameters {
            words.push(peek(v, n, gate.size)?);
        }
        words.extend([v.cpu.gpr[RSP], v.cpu.segs[SS].sel as u64]);
        if long {
            sp = exception::tss_read(v, 4 + cpl as u64 * 8, 8)?;
            ss = Seg { sel: cpl as u16, attr: (cpl as u16) << 5, unusable: true, ..Seg::default() };
        } else {
            (ss, sp) = exception::inner_stack(v, cpl)?;
        }
    }
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()[..gate.size].to_vec()).collect();
    let sel = if inner { ss.sel as u32 & 0xfffc } else { 0 };
    let mask = if long { u64::MAX } else { stack_mask_of(&ss) };
    let new = sp.wrapping_sub(bytes.len() as u64) & mask;
    let la = if long { is_canonical(new).then_some(new) } else { on_stack(&ss, new, bytes.len() as u64) };
    let la = la.ok_or(Exception::with_error(SS_FAULT, sel))?;
    let mode = if cpl == 3 { mmu_mode::USER } else { mmu_mode::KERNEL };
    exception::push(v, la, &bytes, gate.size, mode)?;
    let code = set_descriptor_bits(v, gate.sel, gate.code, 1)?;
    v.cpu.segs[SS] = ss;
    v.cpu.gpr[RSP] = if mask == 0xffff { v.cpu.gpr[RSP] & !0xffff | new } else { new };
    set_cs(v, gate.sel, code, cpl);
    v.cpu.rip = gate.offset;
    Ok(())
}

fn stack_mask_of(ss: &Seg) -> u64 {
    if ss.db() { 0xffff_ffff } else { 0xffff }
}

fn check_code(v: &Vcpu, sel: u16, d: Descriptor) -> Res<()> {
    if v.cpu.efer & efer::LMA != 0 && d.attr() & Seg::L != 0 && d.attr() & Seg::DB != 0 {
        return Err(gp(sel).into());
    }
    if !d.present() {
        return Err(Exception::with_error(NP, sel as u32 & 0xfffc).into());
    }
    Ok(())
}

fn check_offset(v: &Vcpu, d: Descriptor, offset: u64) -> Res<()> {
    let long = v.cpu.efer & efer::LMA != 0 && d.attr() & Seg::L != 0;
    if if long { !is_canonical(offset) } else { offset > d.limit() as u64 } {
        return Err(Exception::gp(0).into());
    }
    Ok(())
}

fn go(v: &mut Vcpu, sel: u16, d: Descriptor, cpl: u8, offset: u64) -> Res<()> {
    check_offset(v, d, offset)?;
    let d = set_descriptor_bits(v, sel, d, 1)?;
    set_cs(v, sel, d, cpl);
    v.cpu.rip = offset;
    Ok(())
}

/// Far RET, dropping `extra` more bytes.
pub fn ret(v: &mut Vcpu, size: usize, extra: u64) -> Res<()> {
    let offset = peek(v, 0, size)?;
    let sel = peek(v, 1, size)? as u16;
    if is_real_or_v86(&v.cpu) {
        real_target(v, sel, offset)?;
        drop_stack(v, 2 * size as u64 + extra);
        return Ok(());
    }
    return_to(v, sel, offset, size, 2, extra, None)
}

/// IRET.
pub fn iret(v: &mut Vcpu, size: usize) -> Res<()> {
    let offset = peek(v, 0, size)?;
    let sel = peek(v, 1, size)? as u16;
    let flags = peek(v, 2, size)?;
    v.nmi_masked = false;
    if v.nmi_pending {
        v.cpu.look_again();
    }
    if is_real(&v.cpu) {
        real_target(v, sel, offset)?;
        let keep = if size == 2 { !0xffff } else { rflags::VM | rflags::VIF | rflags::VIP };
        let old = v.cpu.rflags();
        v.cpu.set_rflags(old & keep & !rflags::RF | flags & !keep);
        drop_stack(v, 3 * size as u64);
        return Ok(());
    }
    if v.cpu.sysflags & rflags::VM != 0 {
        if v.cpu.sysflags & rflags::IOPL != rflags::IOPL {
            return Err(Exception::gp(0).into());
        }
        real_target(v, sel, offset)?;
        let keep = rflags::VM | rflags::IOPL | rflags::VIF | rflags::VIP | if size == 2 { !0xffff } else { 0 };
        let old = v.cpu.rflags();
        v.cpu.set_rflags(old & keep & !rflags::RF | flags & !keep);
        drop_stack(v, 3 * size as u64);
        return Ok(());
    }
    if v.cpu.sysflags & rflags::NT != 0 && v.cpu.efer & efer::LMA != 0 {
        return Err(Exception::gp(0).into());
    }
    if flags & rflags::VM != 0 && v.cpu.cpl == 0 && v.cpu.efer & efer::LMA == 0 && size == 4 {
        return enter_v86(v, sel, offset, flags);
    }
    return_to(v, sel, offset, size, 3, 0, Some(flags))
}

/// IRET to virtual-8086 mode: behind EIP, CS and EFLAGS there are ESP, SS, ES, DS, FS and GS.
fn enter_v86(v: &mut Vcpu, sel: u16, offset: u64, flags: u64) -> Res<()> {
    let mut words = [0; 6];
    for (n, word) in words.iter_mut().enumerate() {
        *word = peek(v, 3 + n as u64, 4)?;
    }
    if offset > 0xffff {
        return Err(Exception::gp(0).into());
    }
    v.cpu.set_rflags(flags);
    v.cpu.cpl = 3;
    let values = [sel, words[1] as u16, words[2] as u16, words[3] as u16, words[4] as u16, words[5] as u16];
    for (index, value) in [CS, SS, ES, DS, FS, GS].into_iter().zip(values) {
        load(v, index, value)?;
    }
    (v.cpu.gpr[RSP], v.cpu.rip) = (words[0], offset);
    Ok(())
}

/// The common part of far RET and IRET in protected and long mode: `words` values are on the stack, then
/// `extra` bytes, then RSP and SS if the privilege changes (or always, for IRET in 64-bit mode).
fn return_to(v: &mut Vcpu, sel: u16, offset: u64, size: usize, words: u64, extra: u64, flags: Option<u64>) -> Res<()> {
    if sel & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    let d = read_descriptor(v, sel, GP)?;
    let (rpl, cpl) = (sel as u8 & 3, v.cpu.cpl);
    if !d.is_code() || rpl < cpl || (if d.is_conforming() { d.dpl() > rpl } else { d.dpl() != rpl }) {
        return Err(gp(sel).into());
    }
    check_code(v, sel, d)?;
    let outward = rpl > cpl;
    let from_long = v.cpu.long64();
    let to_long = v.cpu.efer & efer::LMA != 0 && d.attr() & Seg::L != 0;
    let with_stack = outward || (from_long && flags.is_some());
    let mut stack = None;
    if with_stack {
        let base = words * size as u64 + extra;
        let read = |v: &mut Vcpu, at: u64| -> Res<u64> {
            let sp = v.cpu.gpr[RSP].wrapping_add(at) & stack_mask(v);
            let la = linear(&v.cpu, SS, sp, size as u64, false)?;
            let mode = v.cpu.mmu_mode();
            let mut b = [0; 8];
            access::read(v, la, &mut b[..size], mode)?;
            Ok(u64::from_le_bytes(b))
        };
        let rsp = read(v, base)?;
        let ss = read(v, base + size as u64)? as u16;
        let seg = if ss & 0xfffc == 0 {
            if !to_long || rpl == 3 || ss as u8 & 3 != rpl {
                return Err(Exception::gp(0).into());
            }
            Seg { sel: ss, attr: (rpl as u16) << 5, unusable: true, ..Seg::default() }
        } else {
            let s = read_descriptor(v, ss, GP)?;
            if ss as u8 & 3 != rpl || !s.is_writable() || s.dpl() != rpl {
                return Err(gp(ss).into());
            }
            if !s.present() {
                return Err(Exception::with_error(SS_FAULT, ss as u32 & 0xfffc).into());
            }
            set_descriptor_bits(v, ss, s, 1)?.seg(ss)
        };
        stack = Some((rsp, seg));
    }
    check_offset(v, d, offset)?;
    let d = set_descriptor_bits(v, sel, d, 1)?;
    if let Some(flags) = flags {
        let mut allowed = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT | rflags::RF | rflags::AC | rflags::ID;
        if cpl == 0 {
            allowed |= rflags::IOPL | rflags::VIF | rflags::VIP;
        }
        if cpl as u64 <= (v.cpu.sysflags & rflags::IOPL) >> 12 {
            allowed |= rflags::IF;
        }
        if size == 2 {
            allowed &= 0xffff;
        }
        let old = v.cpu.rflags();
        v.cpu.set_rflags(old & !allowed & !rflags::RF | flags & allowed);
    }
    match stack {
        None => drop_stack(v, words * size as u64 + extra),
        Some((rsp, seg)) => {
            v.cpu.segs[SS] = seg;
            v.cpu.gpr[RSP] = if to_long {
                rsp
            } else if seg.db() {
                rsp & 0xffff_ffff
            } else {
                v.cpu.gpr[RSP] & !0xffff | rsp & 0xffff
            };
        }
    }
    set_cs(v, sel, d, rpl);
    v.cpu.rip = offset;
    if outward {
        if flags.is_none() {
            let rsp = v.cpu.gpr[RSP].wrapping_add(extra);
            set_rsp(v, rsp);
        }
        for s in [ES, DS, FS, GS] {
            let seg = v.cpu.segs[s];
            let conforming = seg.attr & 0x1c == 0x1c;
            if !seg.unusable && seg.dpl() < rpl && !conforming {
                v.cpu.segs[s] = Seg { unusable: true, base: if to_long { seg.base } else { 0 }, ..Seg::default() };
            }
        }
    }
    Ok(())
}

fn flat(sel: u16, attr: u16) -> Seg {
    Seg { base: 0, limit: u32::MAX, sel, attr, unusable: false }
}

/// SYSCALL; `next` is the return address.
pub fn syscall(v: &mut Vcpu, next: u64) -> Res<()> {
    let c = &mut *v.cpu;
    if c.efer & efer::SCE == 0 || !c.long64() {
        return Err(Exception::ud().into());
    }
    c.gpr[RCX] = next;
    c.gpr[11] = c.rflags() & !rflags::RF;
    c.rip = c.msr.lstar;
    let flags = c.rflags() & !c.msr.sfmask & !rflags::RF;
    c.set_rflags(flags);
    let sel = (c.msr.star >> 32) as u16 & 0xfffc;
    c.segs[CS] = flat(sel, 0xa09b);
    c.segs[SS] = flat(sel.wrapping_add(8), 0xc093);
    c.cpl = 0;
    Ok(())
}

/// SYSRET with an operand size of `size` bytes.
pub fn sysret(v: &mut Vcpu, size: usize) -> Res<()> {
    let c = &mut *v.cpu;
    if c.efer & efer::SCE == 0 || !c.long64() {
        return Err(Exception::ud().into());
    }
    if c.cpl != 0 || (size == 8 && !is_canonical(c.gpr[RCX])) {
        return Err(Exception::gp(0).into());
    }
    let sel = (c.msr.star >> 48) as u16;
    if size == 8 {
        c.segs[CS] = flat(sel.wrapping_add(16) | 3, 0xa0fb);
        c.rip = c.gpr[RCX];
    } else {
        c.segs[CS] = flat(sel | 3, 0xc0fb);
        c.rip = c.gpr[RCX] & 0xffff_ffff;
    }
    let r11 = c.gpr[11];
    c.set_rflags(r11 & 0x3c_7fd7);
    c.segs[SS] = flat(sel.wrapping_add(8) | 3, 0xc0f3);
    c.cpl = 3;
    Ok(())
}

/// SYSENTER.
pub fn sysenter(v: &mut Vcpu) -> Res<()> {
    let c = &mut *v.cpu;
    if is_real(c) || c.msr.sysenter_cs & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    let long = c.efer & efer::LMA != 0;
    let sel = c.msr.sysenter_cs as u16 & 0xfffc;
    c.iflag = 0;
    c.sysflags &= !(rflags::VM | rflags::RF);
    c.segs[CS] = flat(sel, if long { 0xa09b } else { 0xc09b });
    c.segs[SS] = flat(sel.wrapping_add(8), 0xc093);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    c.gpr[RSP] = c.msr.sysenter_esp & mask;
    c.rip = c.msr.sysenter_eip & mask;
    c.cpl = 0;
    Ok(())
}

/// SYSEXIT with an operand size of `size` bytes.
pub fn sysexit(v: &mut Vcpu, size: usize) -> Res<()> {
    let c = &mut *v.cpu;
    if is_real(c) || c.cpl != 0 || c.msr.sysenter_cs & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    if size == 8 && !(is_canonical(c.gpr[RCX]) && is_canonical(c.gpr[RDX])) {
        return Err(Exception::gp(0).into());
    }
    let base = c.msr.sysenter_cs as u16 & 0xfffc;
    let (code, mask) = if size == 8 { (32, u64::MAX) } else { (16, 0xffff_ffff) };
    c.segs[CS] = flat(base.wrapping_add(code) | 3, if size == 8 { 0xa0fb } else { 0xc0fb });
    c.segs[SS] = flat(base.wrapping_add(code + 8) | 3, 0xc0f3);
    c.gpr[RSP] = c.gpr[RCX] & mask;
    c.rip = c.gpr[RDX] & mask;
    c.cpl = 3;
    Ok(())
}
