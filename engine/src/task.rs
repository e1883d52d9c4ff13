//! Task switches of protected mode (Intel SDM volume 3, chapter 8).
//!
//! Up to the point where the outgoing task is saved, a fault belongs to it and nothing has happened. From there on
//! the processor is in the new task: its registers are loaded, and what is wrong with its segments is its own fault.

use crate::access;
use crate::cpu::{CS, DS, ES, Exception, FS, GS, Res, SS, Seg, Vcpu, cr0, cr4, mmu_mode, rflags};
use crate::debug;
use crate::far::push_all;
use crate::mmu;
use crate::segment::{self, Descriptor, GP, NP, TS, read_descriptor};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    Jmp,
    Call,
    Iret,
    /// A task gate in the IDT.
    Interrupt,
}

/// Descriptor type bit: the TSS is busy.
const BUSY: u8 = 2;

/// Where a TSS holds what: 32-bit and 16-bit layout.
struct Layout {
    bytes: u64,
    /// Bytes of a register.
    size: usize,
    eip: u64,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    gpr: u64,
    /// ES, CS, SS, DS (and FS, GS), each in `size` bytes.
    segments: u64,
    segment_count: usize,
    ldt: u64,
}

const WIDE: Layout = Layout { bytes: 104, size: 4, eip: 32, gpr: 40, segments: 72, segment_count: 6, ldt: 96 };
const NARROW: Layout = Layout { bytes: 44, size: 2, eip: 14, gpr: 18, segments: 34, segment_count: 4, ldt: 42 };

/// In the order of the TSS.
const SEGMENTS: [usize; 6] = [ES, CS, SS, DS, FS, GS];

fn layout(d: Descriptor) -> &'static Layout {
    if d.kind() & 8 != 0 { &WIDE } else { &NARROW }
}

fn fault(vector: u8, sel: u16) -> Exception {
    Exception::with_error(vector, sel as u32 & 0xfffc)
}

/// Far JMP or CALL to the TSS `d`, named by `sel` itself.
pub fn direct(v: &mut Vcpu, sel: u16, d: Descriptor, cause: Cause, next: u64) -> Res<()> {
    if d.dpl() < v.cpu.cpl || d.dpl() < sel as u8 & 3 {
        return Err(fault(GP, sel).into());
    }
    switch(v, sel, cause, next, None)
}

/// Far JMP or CALL through the task gate `gate`, whose selector is `sel`.
pub fn through_gate(v: &mut Vcpu, sel: u16, gate: Descriptor, cause: Cause, next: u64) -> Res<()> {
    if gate.dpl() < v.cpu.cpl || gate.dpl() < sel as u8 & 3 {
        return Err(fault(GP, sel).into());
    }
    if !gate.present() {
        return Err(fault(NP, sel).into());
    }
    switch(v, (gate.0 >> 16) as u16, cause, next, None)
}

/// IRET with NT set: back to the task that the TSS links to.
pub fn back(v: &mut Vcpu, next: u64) -> Res<()> {
    let link = access::read_u16(v, v.cpu.tr.base, mmu_mode::KERNEL)?;
    switch(v, link, Cause::Iret, next, None)
}

/// Switch to the task whose TSS `sel` names. `next` is where the current one goes on; `error` is pushed in the new
/// one.
pub fn switch(v: &mut Vcpu, sel: u16, cause: Cause, next: u64, error: Option<u32>) -> Res<()> {
    let vector = if cause == Cause::Iret { TS } else { GP };
    if sel & 4 != 0 || sel & 0xfffc == 0 {
        return Err(fault(vector, sel).into());
    }
    let d = read_descriptor(v, sel, vector)?;
    let busy = d.kind() & BUSY != 0;
    if !matches!(d.kind() & !BUSY, 1 | 9) || busy != (cause == Cause::Iret) {
        return Err(fault(vector, sel).into());
    }
    if !d.present() {
        return Err(fault(NP, sel).into());
    }
    let new = layout(d);
    if (d.limit() as u64) < new.bytes - 1 {
        return Err(fault(TS, sel).into());
    }
    let mut image = [0u8; 104];
    access::read(v, d.base(), &mut image[..new.bytes as usize], mmu_mode::KERNEL)?;
    let trap = new.size == 4 && image[100] & 1 != 0;
    let old_tr = v.cpu.tr;
    save(v, cause, next)?;
    if matches!(cause, Cause::Call | Cause::Interrupt) {
        access::write_u16(v, d.base(), old_tr.sel, mmu_mode::KERNEL)?;
    }
    // The new task from here on.
    let word = |at: u64| match new.size {
        4 => u32::from_le_bytes(image[at as usize..at as usize + 4].try_into().unwrap()) as u64,
        _ => u16::from_le_bytes(image[at as usize..at as usize + 2].try_into().unwrap()) as u64,
    };
    let selector = |at: u64| u16::from_le_bytes(image[at as usize..at as usize + 2].try_into().unwrap());
    if cause != Cause::Iret {
        segment::set_descriptor_bits(v, sel, d, BUSY)?;
    }
    v.cpu.tr = Seg { attr: d.attr() | BUSY as u16, ..d.seg(sel) };
    v.cpu.cr0 |= cr0::TS;
    v.cpu.dr[7] &= !0x155; // L0 to L3, LE
    let mut problem = None;
    if new.size == 4 && v.cpu.paging() {
        let cr3 = word(28);
        if v.cpu.cr4 & cr4::PAE != 0 && !mmu::load_pdptrs(v, cr3) {
            problem = Some(Exception::gp(0));
        } else {
            v.cpu.cr3 = cr3;
            mmu::flush_non_global(v);
        }
    }
    v.cpu.rip = word(new.eip);
    let nested = matches!(cause, Cause::Call | Cause::Interrupt);
    v.cpu.set_rflags(word(new.eip + new.size as u64) | if nested { rflags::NT } else { 0 });
    for n in 0..8 {
        v.cpu.gpr[n] = word(new.gpr + (n * new.size) as u64);
    }
    let mut selectors = [0u16; 6];
    for (n, s) in selectors.iter_mut().take(new.segment_count).enumerate() {
        *s = selector(new.segments + (n * new.size) as u64);
    }
    let virtual_8086 = v.cpu.sysflags & rflags::VM != 0;
    v.cpu.cpl = if virtual_8086 { 3 } else { selectors[1] as u8 & 3 };
    for (&index, &s) in SEGMENTS.iter().zip(&selectors) {
        // What the checks below do not reach is not usable.
        v.cpu.segs[index] = Seg { sel: s, unusable: true, attr: (v.cpu.cpl as u16) << 5, ..Seg::default() };
    }
    v.cpu.ldtr = Seg { sel: selector(new.ldt), unusable: true, ..Seg::default() };
    if let Some(e) = problem {
        return Err(e.into());
    }
    load_ldt(v)?;
    if virtual_8086 {
        for (index, s) in SEGMENTS.into_iter().zip(selectors) {
            segment::load(v, index, s)?;
        }
    } else {
        load_segments(v, selectors)?;
    }
    if let Some(code) = error {
        push_all(v, &[code as u64], new.size)?;
    }
    if v.cpu.rip > v.cpu.segs[CS].limit as u64 {
        return Err(Exception::gp(0).into());
    }
    if trap {
        return Err(Exception { payload: debug::BT, ..Exception::new(1) }.into());
    }
    Ok(())
}

/// Save the current task in its TSS, and make that available unless the new task returns to it.
fn save(v: &mut Vcpu, cause: Cause, next: u64) -> Res<()> {
    let tr = v.cpu.tr;
    let old = if tr.attr & 8 != 0 { &WIDE } else { &NARROW };
    let mut flags = v.cpu.rflags();
    if cause == Cause::Iret {
        flags &= !rflags::NT;
    }
    let mut image = Vec::new();
    let mut put = |value: u64| image.extend_from_slice(&value.to_le_bytes()[..old.size]);
    put(next);
    put(flags);
    v.cpu.gpr[..8].iter().for_each(|&g| put(g));
    SEGMENTS[..old.segment_count].iter().for_each(|&s| put(v.cpu.segs[s].sel as u64));
    if (tr.limit as u64) < old.eip + image.len() as u64 - 1 {
        return Err(fault(TS, tr.sel).into());
    }
    access::write(v, tr.base.wrapping_add(old.eip), &image, mmu_mode::KERNEL)?;
    if matches!(cause, Cause::Jmp | Cause::Iret) {
        let d = read_descriptor(v, tr.sel, TS)?;
        segment::clear_descriptor_bits(v, tr.sel, d, BUSY)?;
    }
    Ok(())
}

fn load_ldt(v: &mut Vcpu) -> Res<()> {
    let sel = v.cpu.ldtr.sel;
    if sel & 0xfffc == 0 {
        return Ok(());
    }
    if sel & 4 != 0 {
        return Err(fault(TS, sel).into());
    }
    let d = read_descriptor(v, sel, TS)?;
    if d.kind() != 2 || !d.present() {
        return Err(fault(TS, sel).into());
    }
    v.cpu.ldtr = d.seg(sel);
    Ok(())
}

fn load_segments(v: &mut Vcpu, selectors: [u16; 6]) -> Res<()> {
    let cs = selectors[1];
    if cs & 0xfffc == 0 {
        return Err(fault(TS, cs).into());
    }
    let d = read_descriptor(v, cs, TS)?;
    let rpl = cs as u8 & 3;
    if !d.is_code() || if d.is_conforming() { d.dpl() > rpl } else { d.dpl() != rpl } {
        return Err(fault(TS, cs).into());
    }
    if !d.present() {
        return Err(fault(NP, cs).into());
    }
    let d = segment::set_descriptor_bits(v, cs, d, 1)?;
    segment::set_cs(v, cs, d, rpl);
    let ss = selectors[2];
    if ss & 0xfffc == 0 {
        return Err(fault(TS, ss).into());
    }
    for index in [SS, DS, ES, FS, GS] {
        let n = SEGMENTS.iter().position(|&s| s == index).expect("all are there");
        segment::load_or(v, index, selectors[n], TS)?;
    }
    Ok(())
}
