//! Far control transfers: JMP, CALL and RET between segments, IRET, SYSCALL and SYSENTER (Intel SDM volume 2,
//! under each instruction; AMD APM volume 3 for SYSCALL and SYSRET).

use crate::access;
use crate::cpu::{CS, DS, ES, Exception, FS, GS, RCX, RDX, RSP, Res, SS, Seg, Vcpu, efer, rflags};
use crate::mmu::is_canonical;
use crate::segment::{
    Descriptor, GP, NP, SS_FAULT, is_real, is_real_or_v86, linear, read_descriptor, set_cs, set_descriptor_bits,
    unsupported,
};

fn gp(sel: u16) -> Exception {
    Exception::with_error(GP, sel as u32 & 0xfffc)
}

/// Mask of the stack pointer in the current stack segment.
pub fn stack_mask(v: &Vcpu) -> u64 {
    if v.cpu.long64() {
        u64::MAX
    } else if v.cpu.segs[SS].db() {
        0xffff_ffff
    } else {
        0xffff
    }
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
    access::write(v, la, &bytes[..len], mode)?;
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

/// Far JMP to `sel:offset` with an operand size of `size` bytes.
pub fn jmp(v: &mut Vcpu, sel: u16, offset: u64, size: usize) -> Res<()> {
    let offset = offset & operand_mask(size);
    if is_real_or_v86(&v.cpu) {
        return real_target(v, sel, offset);
    }
    let (d, cpl) = code_target(v, sel)?;
    go(v, sel, d, cpl, offset)
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
    let (d, cpl) = code_target(v, sel)?;
    check_offset(v, d, offset)?;
    push_all(v, &[cs, next], size)?;
    go(v, sel, d, cpl, offset)
}

fn real_target(v: &mut Vcpu, sel: u16, offset: u64) -> Res<()> {
    if offset > v.cpu.segs[CS].limit as u64 && is_real(&v.cpu) {
        return Err(Exception::gp(0).into());
    }
    v.cpu.segs[CS].sel = sel;
    v.cpu.segs[CS].base = (sel as u64) << 4;
    v.cpu.rip = offset;
    Ok(())
}

/// Check the target of a far JMP or CALL without a gate: its descriptor and the CPL there.
fn code_target(v: &mut Vcpu, sel: u16) -> Res<(Descriptor, u8)> {
    if sel & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    let d = read_descriptor(v, sel, GP)?;
    if !d.is_code() {
        let long = v.cpu.efer & efer::LMA != 0;
        if d.kind() == 12 || (!long && matches!(d.kind(), 1 | 4 | 5 | 9)) {
            return unsupported("a far transfer through a call gate, task gate or TSS");
        }
        return Err(gp(sel).into());
    }
    let (rpl, cpl) = (sel as u8 & 3, v.cpu.cpl);
    if if d.is_conforming() { d.dpl() > cpl } else { rpl > cpl || d.dpl() != cpl } {
        return Err(gp(sel).into());
    }
    check_code(v, sel, d)?;
    Ok((d, cpl))
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
        v.cpu.poll[1] = 1;
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
        return unsupported("IRET in virtual-8086 mode");
    }
    if v.cpu.sysflags & rflags::NT != 0 {
        if v.cpu.efer & efer::LMA != 0 {
            return Err(Exception::gp(0).into());
        }
        return unsupported("IRET from a nested task");
    }
    if flags & rflags::VM != 0 && v.cpu.cpl == 0 && v.cpu.efer & efer::LMA == 0 && size == 4 {
        return unsupported("IRET to virtual-8086 mode");
    }
    return_to(v, sel, offset, size, 3, 0, Some(flags))
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
