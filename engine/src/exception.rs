//! Delivery of exceptions and interrupts through the IVT or IDT (Intel SDM volume 3, chapter 6).

use crate::cpu::{
    CS, Cpu, DS, ES, Exception, Exit, FS, GS, IoState, RSP, Res, SS, Seg, Stop, Vcpu, efer, mmu_mode, rflags,
};
use crate::mmu::{Intent, is_canonical};
use crate::segment::{
    Descriptor, GP, NP, SS_FAULT, TS, is_real, on_stack, read_descriptor, set_cs, set_descriptor_bits,
};
use crate::stats::vcpu as counter;
use crate::{access, debug, task};

/// Descriptor type.
const TASK_GATE: u8 = 5;
const DB: u8 = 1;
const DF: u8 = 8;
const PF: u8 = 14;

/// Faults that make a double fault of another of their kind.
fn contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}

/// Faults set RF in the flags they push, so that an instruction breakpoint does not hit again.
fn is_fault(e: &Exception) -> bool {
    !e.software && !matches!(e.vector, 1..=4 | 8 | 18)
}

/// Deliver `e`: afterwards rip is in its handler. Exceptions on the way become a double fault, and a
/// third one `Exit::Shutdown`.
pub fn deliver(v: &mut Vcpu, mut e: Exception) -> Res<()> {
    if e.vector == DB && !e.software {
        if let Some(exit) = debug::intercept(v, e.payload) {
            return Err(exit.into());
        }
        debug::set_dr6(&mut v.cpu, e.payload);
    }
    v.halted = false;
    v.shared.stats.count(counter::EXCEPTIONS);
    loop {
        if e.vector == PF {
            v.shared.stats.count(counter::PAGE_FAULTS);
            v.cpu.cr2 = e.payload;
        }
        v.io.done.clear();
        let rf = if is_fault(&e) { rflags::RF } else { 0 };
        match through_gate(v, e.vector, e.error, e.software, rf) {
            Err(Stop::Exception(second)) => {
                if e.vector == DF {
                    return Err(Exit::Shutdown.into());
                }
                let double = contributory(e.vector) && contributory(second.vector)
                    || e.vector == PF && (contributory(second.vector) || second.vector == PF);
                match second.vector {
                    PF => v.cpu.cr2 = second.payload,
                    // Of a task switch to a TSS with the trap bit.
                    DB => debug::set_dr6(&mut v.cpu, second.payload),
                    _ => {}
                }
                e = if double { Exception::with_error(DF, 0) } else { second };
            }
            Err(stop) => return Err(no_device(v, stop, e.vector)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Descriptor tables and stacks lie in memory: a delivery cannot wait for a device's answer (KVM ends with
/// KVM_INTERNAL_ERROR_DELIVERY_EV there).
fn no_device(v: &mut Vcpu, stop: Stop, vector: u8) -> Stop {
    match stop {
        Stop::Exit(Exit::Mmio { gpa, .. }) => {
            v.io = IoState::default();
            let what = format!("vector {vector} cannot be delivered: its tables or stack are at {gpa:#x}, not memory");
            Exit::InternalError(what).into()
        }
        other => other,
    }
}

/// Deliver a software interrupt. rip is that of the next instruction; faults on the way belong to the
/// instruction itself, at `rip`, and are not contributory.
pub fn deliver_software(v: &mut Vcpu, e: Exception, rip: u64) -> Res<()> {
    let next = v.cpu.rip;
    let result = through_gate(v, e.vector, None, true, 0);
    if result.is_err() && v.cpu.rip == next {
        v.cpu.rip = rip;
    }
    result.map_err(|stop| no_device(v, stop, e.vector))
}

/// Deliver an external interrupt or NMI.
pub fn deliver_interrupt(v: &mut Vcpu, vector: u8) -> Res<()> {
    match through_gate(v, vector, None, false, 0) {
        Err(Stop::Exception(e)) => deliver(v, e),
        Err(stop) => Err(no_device(v, stop, vector)),
        Ok(()) => Ok(()),
    }
}

/// Selector error code of a fault during delivery: EXT is set unless a software interrupt caused it.
fn table_error(vector: u8, software: bool) -> u32 {
    (vector as u32) << 3 | 2 | !software as u32
}

/// Add EXT to the error code of a fault that a descriptor or stack caused.
fn external(stop: Stop, ext: u32) -> Stop {
    match stop {
        Stop::Exception(Exception { vector: vector @ TS..=GP, error: Some(error), .. }) => {
            Exception::with_error(vector, error | ext).into()
        }
        other => other,
    }
}

fn through_gate(v: &mut Vcpu, vector: u8, error: Option<u32>, software: bool, rf: u64) -> Res<()> {
    if is_real(&v.cpu) {
        return real(v, vector);
    }
    let long = v.cpu.efer & efer::LMA != 0;
    let size = if long { 16 } else { 8 };
    let idt_fault = Exception::gp(table_error(vector, software));
    if vector as u64 * size + size - 1 > v.cpu.idtr.limit as u64 {
        return Err(idt_fault.into());
    }
    let at = v.cpu.idtr.base.wrapping_add(vector as u64 * size);
    let low = access::read_u64(v, at, mmu_mode::KERNEL)?;
    let high = if long { access::read_u64(v, at.wrapping_add(8), mmu_mode::KERNEL)? } else { 0 };
    let gate = Descriptor(low);
    let kind = gate.kind();
    match kind {
        0xe | 0xf => {}
        TASK_GATE | 6 | 7 if !long => {}
        _ => return Err(idt_fault.into()),
    }
    if software && gate.dpl() < v.cpu.cpl {
        return Err(idt_fault.into());
    }
    if !gate.present() {
        return Err(Exception::with_error(NP, table_error(vector, software)).into());
    }
    let ext = !software as u32;
    let sel = (low >> 16) as u16;
    if kind == TASK_GATE {
        v.cpu.sysflags |= rf;
        let next = v.cpu.rip;
        return task::switch(v, sel, task::Cause::Interrupt, next, error).map_err(|stop| external(stop, ext));
    }
    let gp = |sel: u16| Exception::with_error(GP, sel as u32 & 0xfffc | ext);
    if sel & 0xfffc == 0 {
        return Err(Exception::with_error(GP, ext).into());
    }
    let code = read_descriptor(v, sel, GP).map_err(|stop| external(stop, ext))?;
    if !code.is_code() || code.dpl() > v.cpu.cpl || (long && (code.attr() & Seg::L == 0 || code.attr() & Seg::DB != 0))
    {
        return Err(gp(sel).into());
    }
    if !code.present() {
        return Err(Exception::with_error(NP, sel as u32 & 0xfffc | ext).into());
    }
    let offset = low & 0xffff | low >> 48 << 16 | high << 32;
    let cpl = if code.is_conforming() { v.cpu.cpl } else { code.dpl() };
    if v.cpu.sysflags & rflags::VM != 0 && cpl != 0 {
        return Err(gp(sel).into());
    }
    let interrupt_gate = kind & 1 == 0;
    let entry = if long {
        long_mode(v, offset, sel, code, cpl, (low >> 32 & 7) as u8, error, rf)
    } else {
        protected(v, offset, sel, code, cpl, kind, error, rf)
    };
    entry.map_err(|stop| external(stop, ext))?;
    entered(&mut v.cpu, interrupt_gate);
    Ok(())
}

/// Flags after the gate.
fn entered(cpu: &mut Cpu, interrupt_gate: bool) {
    if interrupt_gate {
        cpu.iflag = 0;
    }
    cpu.sysflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    cpu.shadow = 0;
}

#[allow(clippy::too_many_arguments)]
fn long_mode(
    v: &mut Vcpu,
    offset: u64,
    sel: u16,
    code: Descriptor,
    cpl: u8,
    ist: u8,
    error: Option<u32>,
    rf: u64,
) -> Res<()> {
    let outer = v.cpu.cpl;
    let rsp = if ist != 0 {
        tss_read(v, 0x24 + (ist as u64 - 1) * 8, 8)?
    } else if cpl != outer {
        tss_read(v, 4 + cpl as u64 * 8, 8)?
    } else {
        v.cpu.gpr[RSP]
    };
    if !is_canonical(rsp) {
        return Err(Exception::with_error(SS_FAULT, 0).into());
    }
    let mut frame = [0u64; 6];
    let words = 5 + error.is_some() as usize;
    let start = 6 - words;
    frame[start..].copy_from_slice(
        &{
            let mut f = [0u64; 6];
            let mut n = 0;
            if let Some(code) = error {
                f[0] = code as u64;
                n = 1;
            }
            f[n] = v.cpu.rip;
            f[n + 1] = v.cpu.segs[CS].sel as u64;
            f[n + 2] = v.cpu.rflags() | rf;
            f[n + 3] = v.cpu.gpr[RSP];
            f[n + 4] = v.cpu.segs[SS].sel as u64;
            f
        }[..words],
    );
    let mut bytes = [0u8; 48];
    for (n, word) in frame.iter().enumerate() {
        bytes[n * 8..n * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    let top = rsp & !15;
    let new_rsp = top.wrapping_sub(words as u64 * 8);
    let mode = if cpl == 3 { mmu_mode::USER } else { mmu_mode::KERNEL };
    push(v, new_rsp, &bytes[start * 8..], 8, mode)?;
    let code = set_descriptor_bits(v, sel, code, 1)?;
    if cpl != outer {
        v.cpu.segs[SS] = Seg { sel: cpl as u16, attr: (cpl as u16) << 5, unusable: true, ..Seg::default() };
    }
    set_cs(v, sel, code, cpl);
    v.cpu.gpr[RSP] = new_rsp;
    v.cpu.rip = offset;
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn protected(
    v: &mut Vcpu,
    offset: u64,
    sel: u16,
    code: Descriptor,
    cpl: u8,
    kind: u8,
    error: Option<u32>,
    rf: u64,
) -> Res<()> {
    let wide = kind & 8 != 0;
    let outer = v.cpu.cpl;
    let (mut ss, mut esp) = (v.cpu.segs[SS], v.cpu.gpr[RSP]);
    let mut words = Vec::with_capacity(10);
    let virtual_8086 = v.cpu.sysflags & rflags::VM != 0;
    if cpl != outer {
        let (new_ss, new_esp) = inner_stack(v, cpl)?;
        if virtual_8086 {
            words.extend([GS, FS, DS, ES].map(|s| v.cpu.segs[s].sel as u64));
        }
        words.extend([v.cpu.segs[SS].sel as u64, v.cpu.gpr[RSP]]);
        (ss, esp) = (new_ss, new_esp);
    }
    words.extend([v.cpu.rflags() | rf, v.cpu.segs[CS].sel as u64, v.cpu.rip]);
    words.extend(error.map(u64::from));
    let size = if wide { 4 } else { 2 };
    let mut bytes = Vec::with_capacity(40);
    for w in words.iter().rev() {
        bytes.extend_from_slice(&w.to_le_bytes()[..size]);
    }
    let mask = if ss.db() { 0xffff_ffff } else { 0xffff };
    let new_esp = esp.wrapping_sub(bytes.len() as u64) & mask;
    let mode = if cpl == 3 { mmu_mode::USER } else { mmu_mode::KERNEL };
    let sel_of_new = if cpl != outer { ss.sel as u32 & 0xfffc } else { 0 };
    let la = on_stack(&ss, new_esp, bytes.len() as u64).ok_or(Exception::with_error(SS_FAULT, sel_of_new))?;
    push(v, la, &bytes, size, mode)?;
    if virtual_8086 {
        for s in [ES, DS, FS, GS] {
            v.cpu.segs[s] = Seg { unusable: true, ..Seg::default() };
        }
    }
    let code = set_descriptor_bits(v, sel, code, 1)?;
    v.cpu.segs[SS] = ss;
    v.cpu.gpr[RSP] = if ss.db() { new_esp } else { v.cpu.gpr[RSP] & !0xffff | new_esp };
    set_cs(v, sel, code, cpl);
    v.cpu.rip = if wide { offset & 0xffff_ffff } else { offset & 0xffff };
    Ok(())
}

/// Write a frame of words of `size` bytes at `la`. It is pushed from its top: a page fault is the first word's that faults so.
pub fn push(v: &mut Vcpu, la: u64, frame: &[u8], size: usize, mode: usize) -> Res<()> {
    let written = access::write(v, la, frame, mode);
    if let Err(Stop::Exception(e)) = &written
        && e.vector == PF
    {
        for at in (0..frame.len()).step_by(size).rev() {
            access::check_pages(v, la.wrapping_add(at as u64), size as u64, Intent::Write, mode)?;
        }
    }
    written
}

/// Stack of privilege level `cpl` from the 32- or 16-bit TSS.
pub fn inner_stack(v: &mut Vcpu, cpl: u8) -> Res<(Seg, u64)> {
    let (esp, sel) = if v.cpu.tr.attr & 8 != 0 {
        (tss_read(v, 4 + cpl as u64 * 8, 4)?, tss_read(v, 8 + cpl as u64 * 8, 2)? as u16)
    } else {
        (tss_read(v, 2 + cpl as u64 * 4, 2)?, tss_read(v, 4 + cpl as u64 * 4, 2)? as u16)
    };
    let ts = Exception::with_error(TS, sel as u32 & 0xfffc);
    if sel & 0xfffc == 0 {
        return Err(ts.into());
    }
    let d = read_descriptor(v, sel, TS)?;
    if sel as u8 & 3 != cpl || d.dpl() != cpl || !d.is_writable() {
        return Err(ts.into());
    }
    if !d.present() {
        return Err(Exception::with_error(SS_FAULT, sel as u32 & 0xfffc).into());
    }
    let d = set_descriptor_bits(v, sel, d, 1)?;
    Ok((d.seg(sel), esp))
}

/// Read `len` bytes of the TSS at `offset`; #TS if beyond its limit.
pub fn tss_read(v: &mut Vcpu, offset: u64, len: usize) -> Res<u64> {
    if offset + len as u64 - 1 > v.cpu.tr.limit as u64 {
        return Err(Exception::with_error(TS, v.cpu.tr.sel as u32 & 0xfffc).into());
    }
    let mut b = [0; 8];
    access::read(v, v.cpu.tr.base.wrapping_add(offset), &mut b[..len], mmu_mode::KERNEL)?;
    Ok(u64::from_le_bytes(b))
}

fn real(v: &mut Vcpu, vector: u8) -> Res<()> {
    let at = vector as u64 * 4;
    if at + 3 > v.cpu.idtr.limit as u64 {
        return Err(Exception::new(if vector == DF { DF } else { GP }).into());
    }
    let entry = access::read_u32(v, v.cpu.idtr.base.wrapping_add(at), mmu_mode::KERNEL)?;
    let frame = [v.cpu.rip as u16, v.cpu.segs[CS].sel, v.cpu.rflags() as u16];
    let sp = (v.cpu.gpr[RSP] as u16).wrapping_sub(6);
    let mut bytes = [0; 6];
    for (n, w) in frame.iter().enumerate() {
        bytes[n * 2..n * 2 + 2].copy_from_slice(&w.to_le_bytes());
    }
    push(v, v.cpu.segs[SS].base.wrapping_add(sp as u64), &bytes, 2, mmu_mode::KERNEL)?;
    v.cpu.gpr[RSP] = v.cpu.gpr[RSP] & !0xffff | sp as u64;
    let sel = (entry >> 16) as u16;
    v.cpu.segs[CS].sel = sel;
    v.cpu.segs[CS].base = (sel as u64) << 4;
    v.cpu.rip = entry as u64 & 0xffff;
    entered(&mut v.cpu, true);
    v.cpu.sysflags &= !rflags::AC;
    Ok(())
}
