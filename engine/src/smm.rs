//! System management mode: SMI, RSM and what lies between (AMD APM volume 2, chapter 10), as KVM does it: the state-save area
//! as `arch/x86/kvm/smm.h` lays it out, and without I/O restart and auto-halt restart.
//!
//! In it a vCPU sees memory slots of its own (KVM_CAP_MULTI_ADDRESS_SPACE). Code is not translated there, and no TLB entry
//! lets it write directly: the code cache and its guards go by guest physical addresses of the other slots. A write is
//! looked up by its host address, so that no translation of what it changes is left (`written`).

use crate::access;
use crate::cpu::{CS, Cpu, Exception, Exit, RAX, Res, SS, Seg, Vcpu, cr0, cr4, efer, rflags, shadow};
use crate::interp::Done;
use crate::mem::Slot;
use crate::vm::request;
use crate::{mmu, msr, sys};

/// SMBASE after power-up.
pub const DEFAULT_BASE: u64 = 0x3_0000;

/// Execution starts here, from SMBASE.
const ENTRY: u64 = 0x8000;
/// The state-save area, from SMBASE.
const AREA: u64 = 0xfe00;
const AREA_BYTES: usize = 512;
const REVISION_32: u32 = 0x2_0000;
const REVISION_64: u32 = 0x2_0064;
const EFER: u32 = 0xc000_0080;

/// A state-save area. Offsets are from SMBASE, as in the manuals.
struct Area([u8; AREA_BYTES]);

impl Area {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let at = at - AREA as usize;
        self.0[at..at + N].try_into().expect("N bytes")
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
    fn put(&mut self, at: usize, bytes: &[u8]) {
        let at = at - AREA as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
    fn put64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Selector, attributes, limit, base.
    fn put_segment_64(&mut self, at: usize, s: &Seg) {
        self.put(at, &s.sel.to_le_bytes());
        self.put(at + 2, &attributes(s).to_le_bytes());
        self.put32(at + 4, s.limit);
        self.put64(at + 8, s.base);
    }
    fn segment_64(&self, at: usize) -> Seg {
        segment(self.u16(at), self.u16(at + 2), self.u32(at + 4), self.u64(at + 8))
    }
    /// Attributes, limit and base at `at`, the selector elsewhere.
    fn put_segment_32(&mut self, at: usize, selector_at: usize, s: &Seg) {
        self.put32(selector_at, s.sel.into());
        self.put32(at, (attributes(s) as u32) << 8);
        self.put32(at + 4, s.limit);
        self.put32(at + 8, s.base as u32);
    }
    fn segment_32(&self, at: usize, selector_at: usize) -> Seg {
        let attributes = (self.u32(at) >> 8) as u16;
        segment(self.u32(selector_at) as u16, attributes, self.u32(at + 4), self.u32(at + 8).into())
    }
}

/// Descriptor bits, of which P also says that the segment is usable.
fn attributes(s: &Seg) -> u16 {
    if s.unusable { s.attr & !PRESENT } else { s.attr }
}
fn segment(sel: u16, attributes: u16, limit: u32, base: u64) -> Seg {
    let attr = attributes & ATTRIBUTES;
    Seg { base, limit, sel, attr, unusable: attr & PRESENT == 0 }
}
const PRESENT: u16 = 1 << 7;
const ATTRIBUTES: u16 = 0xf0ff;

/// Where the 32-bit area has ES, CS, SS, DS, FS and GS, and their selectors.
fn places_32() -> impl Iterator<Item = (usize, usize, usize)> {
    const AT: [usize; 6] = [0xff84, 0xff90, 0xff9c, 0xff2c, 0xff38, 0xff44];
    AT.into_iter().enumerate().map(|(n, at)| (n, at, 0xffa8 + n * 4))
}

fn save_64(v: &Vcpu) -> Area {
    let (c, mut a): (&Cpu, _) = (&v.cpu, Area([0; AREA_BYTES]));
    for (n, s) in c.segs.iter().enumerate() {
        a.put_segment_64(0xfe00 + n * 16, s);
    }
    for (at, table) in [(0xfe64, &c.gdtr), (0xfe84, &c.idtr)] {
        a.put32(at, table.limit.into());
        a.put64(at + 4, table.base);
    }
    a.put_segment_64(0xfe70, &c.ldtr);
    a.put_segment_64(0xfe90, &c.tr);
    a.put(0xfecb, &[c.shadow]);
    a.put64(0xfed0, c.efer);
    a.put32(0xfefc, REVISION_64);
    a.put32(0xff00, v.smbase as u32);
    let registers = [(0xff48, c.cr4), (0xff50, c.cr3), (0xff58, c.cr0), (0xff60, c.dr[7]), (0xff68, c.dr[6])];
    for (at, value) in registers.into_iter().chain([(0xff70, c.rflags()), (0xff78, c.rip)]) {
        a.put64(at, value);
    }
    for (n, value) in c.gpr.iter().enumerate() {
        a.put64(0xfff8 - n * 8, *value);
    }
    a
}

fn save_32(v: &Vcpu) -> Area {
    let (c, mut a): (&Cpu, _) = (&v.cpu, Area([0; AREA_BYTES]));
    a.put32(0xfef8, v.smbase as u32);
    a.put32(0xfefc, REVISION_32);
    a.put(0xff1a, &[c.shadow]);
    for (n, at, selector_at) in places_32() {
        a.put_segment_32(at, selector_at, &c.segs[n]);
    }
    a.put_segment_32(0xff5c, 0xffc4, &c.tr);
    a.put_segment_32(0xff78, 0xffc0, &c.ldtr);
    for (at, table) in [(0xff54, &c.idtr), (0xff70, &c.gdtr)] {
        a.put32(at, table.limit.into());
        a.put32(at + 4, table.base as u32);
    }
    let registers = [(0xff14, c.cr4), (0xfff8, c.cr3), (0xfffc, c.cr0), (0xffc8, c.dr[7]), (0xffcc, c.dr[6])];
    for (at, value) in registers.into_iter().chain([(0xfff4, c.rflags()), (0xfff0, c.rip)]) {
        a.put32(at, value as u32);
    }
    for n in 0..8 {
        a.put32(0xffd0 + n * 4, c.gpr[RAX + n] as u32);
    }
    a
}

/// An SMI is taken. Without memory for the state-save area the VM is dead, as KVM has it.
pub fn enter(v: &mut Vcpu) -> Result<(), Exit> {
    let area = if sys::offers_long_mode(v) { save_64(v) } else { save_32(v) };
    switch(v, true);
    for (offset, n) in access::parts(v.smbase.wrapping_add(AREA), AREA_BYTES) {
        let gpa = v.smbase.wrapping_add(AREA + offset as u64);
        if access::write_memory(v, gpa, &area.0[offset..offset + n]) != Ok(true) {
            v.vm.die();
            return Err(Exit::VmDead);
        }
    }
    v.smm_inside_nmi = v.nmi_masked;
    v.nmi_masked = true;
    v.halted = false;
    v.debug.reset();
    let base = v.smbase;
    let c: &mut Cpu = &mut v.cpu;
    let data = Seg { base: 0, limit: u32::MAX, sel: 0, attr: Seg::G | PRESENT | 0x13, unusable: false };
    c.segs = [data; 6];
    c.segs[CS] = Seg { base, sel: (base >> 4) as u16, ..data };
    c.set_rflags(0);
    (c.rip, c.shadow, c.cpl) = (ENTRY, 0, 0);
    c.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
    (c.cr4, c.dr[7]) = (0, 0x400);
    c.idtr = Default::default();
    if sys::offers_long_mode(v) {
        v.cpu.efer = 0;
    }
    mmu::flush_all(v);
    Ok(())
}

/// RSM. What is not to be loaded shuts the processor down.
pub(crate) fn rsm(v: &mut Vcpu) -> Res<Done> {
    if !v.smm {
        return Err(Exception::ud().into());
    }
    Ok(if leave(v).is_some() { Done::Jumped } else { Done::Exit(Exit::Shutdown) })
}

fn leave(v: &mut Vcpu) -> Option<()> {
    let mut area = Area([0; AREA_BYTES]);
    for (offset, n) in access::parts(v.smbase.wrapping_add(AREA), AREA_BYTES) {
        let gpa = v.smbase.wrapping_add(AREA + offset as u64);
        let there = access::read_memory(v, gpa, &mut area.0[offset..offset + n]) == Ok(true);
        there.then_some(())?;
    }
    if !v.smm_inside_nmi {
        v.nmi_masked = false;
    }
    switch(v, false);
    let long = sys::offers_long_mode(v);
    let c = &mut *v.cpu;
    // From real mode, whatever the handler has left.
    c.cr0 &= !(cr0::PE | cr0::PG);
    c.cpl = 0;
    if long {
        c.cr4 &= !(cr4::PAE | cr4::PCIDE);
        c.efer = 0;
        c.segs[CS].attr &= !Seg::L;
        load_64(v, &area)?;
    } else {
        load_32(v, &area)?;
    }
    let c = &mut *v.cpu;
    let protected = c.cr0 & cr0::PE != 0;
    let v86 = c.sysflags & rflags::VM != 0;
    if v86 && (!protected || c.efer & efer::LMA != 0) {
        return None;
    }
    c.cpl = if v86 {
        3
    } else if protected {
        c.segs[SS].dpl()
    } else {
        0
    };
    mmu::flush_all(v);
    Some(())
}

fn load_64(v: &mut Vcpu, a: &Area) -> Option<()> {
    load_debug_registers(v, a.u64(0xff68), a.u64(0xff60))?;
    v.smbase = a.u32(0xff00).into();
    msr::write(v, EFER, a.u64(0xfed0) & !efer::LMA, false).ok()?;
    load_control_registers(v, a.u64(0xff58), a.u64(0xff50), a.u64(0xff48))?;
    let c: &mut Cpu = &mut v.cpu;
    for (n, value) in c.gpr.iter_mut().enumerate() {
        *value = a.u64(0xfff8 - n * 8);
    }
    for (n, s) in c.segs.iter_mut().enumerate() {
        *s = a.segment_64(0xfe00 + n * 16);
    }
    (c.ldtr, c.tr) = (a.segment_64(0xfe70), a.segment_64(0xfe90));
    for (at, table) in [(0xfe64, &mut c.gdtr), (0xfe84, &mut c.idtr)] {
        (table.limit, table.base) = (a.u32(at) as u16, a.u64(at + 4));
    }
    c.rip = a.u64(0xff78);
    c.set_rflags(a.u32(0xff70).into());
    c.shadow = a.bytes::<1>(0xfecb)[0] & (shadow::MOV_SS | shadow::STI);
    Some(())
}

fn load_32(v: &mut Vcpu, a: &Area) -> Option<()> {
    load_debug_registers(v, a.u32(0xffcc).into(), a.u32(0xffc8).into())?;
    v.smbase = a.u32(0xfef8).into();
    let c: &mut Cpu = &mut v.cpu;
    for n in 0..8 {
        c.gpr[RAX + n] = a.u32(0xffd0 + n * 4).into();
    }
    for (n, at, selector_at) in places_32() {
        c.segs[n] = a.segment_32(at, selector_at);
    }
    (c.tr, c.ldtr) = (a.segment_32(0xff5c, 0xffc4), a.segment_32(0xff78, 0xffc0));
    for (at, table) in [(0xff54, &mut c.idtr), (0xff70, &mut c.gdtr)] {
        (table.limit, table.base) = (a.u32(at) as u16, a.u32(at + 4).into());
    }
    c.rip = a.u32(0xfff0).into();
    c.set_rflags(a.u32(0xfff4).into());
    c.shadow = a.bytes::<1>(0xff1a)[0] & (shadow::MOV_SS | shadow::STI);
    load_control_registers(v, a.u32(0xfffc).into(), a.u32(0xfff8).into(), a.u32(0xff14).into())
}

fn load_debug_registers(v: &mut Vcpu, dr6: u64, dr7: u64) -> Option<()> {
    sys::load_dr(&mut v.cpu, 6, dr6)?;
    sys::load_dr(&mut v.cpu, 7, dr7)
}

/// PAE before paging, and PCIDs once in long mode: `rsm_enter_protected_mode` in arch/x86/kvm/smm.c.
fn load_control_registers(v: &mut Vcpu, cr0: u64, cr3: u64, cr4: u64) -> Option<()> {
    let pcid = if cr4 & cr4::PCIDE != 0 { cr3 & 0xfff } else { 0 };
    (cr3 >> mmu::PHYSICAL_BITS == 0).then_some(())?;
    sys::write_cr(v, 3, cr3 & !pcid).ok()?;
    sys::write_cr(v, 4, cr4 & !cr4::PCIDE).ok()?;
    sys::write_cr(v, 0, cr0).ok()?;
    if cr4 & cr4::PCIDE != 0 {
        sys::write_cr(v, 4, cr4).ok()?;
        sys::write_cr(v, 3, cr3).ok()?;
    }
    Some(())
}

/// Enter or leave the mode, but for the registers.
pub fn switch(v: &mut Vcpu, smm: bool) {
    v.smm = smm;
    v.slots = v.vm.space(smm).read().unwrap().clone();
    if !smm {
        v.smm_inside_nmi = false;
        if std::mem::take(&mut v.init_latched) {
            v.shared.request(request::INIT);
        }
    }
    mmu::flush_all(v);
    v.cpu.look_again();
}

/// Run `f` with the memory that there is outside the mode: that of what KVM itself writes for the guest.
pub fn outside<R>(v: &mut Vcpu, f: impl FnOnce(&mut Vcpu) -> R) -> R {
    if !v.smm {
        return f(v);
    }
    let slots = v.vm.space(false).read().unwrap().clone();
    let inside = std::mem::replace(&mut v.slots, slots);
    v.smm = false;
    let result = f(v);
    (v.smm, v.slots) = (true, inside);
    // A safepoint meanwhile may have brought other slots.
    v.refresh();
    result
}

/// RAM at `gpa` of `slot`, within one page, was written in the mode: forget what was translated from it.
pub fn written(v: &mut Vcpu, slot: &Slot, gpa: u64, len: u64) {
    let vm = v.vm.clone();
    let hva = slot.hva + (gpa - slot.gpa);
    let outside = vm.space(false).read().unwrap().clone();
    for s in outside.as_slice().iter().filter(|s| hva.wrapping_sub(s.hva) < s.size) {
        vm.note_write(Some(&v.shared), s.gpa + (hva - s.hva), len);
    }
    v.refresh();
}
