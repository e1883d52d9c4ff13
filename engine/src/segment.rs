//! Segments: descriptors, and loading them into segment registers (Intel SDM volume 3, chapters 3 and 5).

use crate::access;
use crate::cpu::{CS, Cpu, Exception, FS, GS, Res, SS, Seg, Vcpu, cr0, efer, mmu_mode, rflags};

pub const NP: u8 = 11;
pub const SS_FAULT: u8 = 12;
pub const GP: u8 = 13;
pub const TS: u8 = 10;

/// An 8-byte descriptor as it stands in a table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | (self.0 >> 56) << 24
    }
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attr() & Seg::G != 0 { raw << 12 | 0xfff } else { raw }
    }
    pub fn attr(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }
    /// Type and S: bits 0–4.
    pub fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 0x1f
    }
    pub fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }
    pub fn present(self) -> bool {
        self.0 >> 47 & 1 != 0
    }
    pub fn is_code(self) -> bool {
        self.kind() & 0x18 == 0x18
    }
    pub fn is_conforming(self) -> bool {
        self.kind() & 0x1c == 0x1c
    }
    pub fn is_readable(self) -> bool {
        // Data always, code if bit 1.
        self.kind() & 0x10 != 0 && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    pub fn is_writable(self) -> bool {
        self.kind() & 0x1a == 0x12
    }
    pub fn seg(self, sel: u16) -> Seg {
        Seg { base: self.base(), limit: self.limit(), sel, attr: self.attr(), unusable: false }
    }
}

pub fn is_real(cpu: &Cpu) -> bool {
    cpu.cr0 & cr0::PE == 0
}

/// Real-address rules for segment loads: real mode and virtual-8086 mode.
pub fn is_real_or_v86(cpu: &Cpu) -> bool {
    is_real(cpu) || cpu.sysflags & rflags::VM != 0
}

fn fault(vector: u8, sel: u16) -> Exception {
    Exception::with_error(vector, sel as u32 & 0xfffc)
}

/// Linear address of the descriptor that `sel` names, if it lies within its table.
fn descriptor_address(cpu: &Cpu, sel: u16, len: u64) -> Option<u64> {
    let offset = sel as u64 & 0xfff8;
    let (base, limit) = if sel & 4 != 0 {
        if cpu.ldtr.unusable || cpu.ldtr.sel & 0xfffc == 0 {
            return None;
        }
        (cpu.ldtr.base, cpu.ldtr.limit as u64)
    } else {
        (cpu.gdtr.base, cpu.gdtr.limit as u64)
    };
    (offset + len - 1 <= limit).then_some(base.wrapping_add(offset))
}

/// Read the descriptor of `sel`; `vector` is raised with the selector if it is beyond its table.
pub fn read_descriptor(v: &mut Vcpu, sel: u16, vector: u8) -> Res<Descriptor> {
    let at = descriptor_address(&v.cpu, sel, 8).ok_or(fault(vector, sel))?;
    Ok(Descriptor(access::read_u64(v, at, mmu_mode::KERNEL)?))
}

/// Upper half of a 16-byte system descriptor (long mode).
pub fn read_descriptor_high(v: &mut Vcpu, sel: u16, vector: u8) -> Res<u64> {
    let at = descriptor_address(&v.cpu, sel, 16).ok_or(fault(vector, sel))?;
    access::read_u64(v, at.wrapping_add(8), mmu_mode::KERNEL)
}

/// Set type bits (accessed, busy) of the descriptor in memory.
pub fn set_descriptor_bits(v: &mut Vcpu, sel: u16, d: Descriptor, bits: u8) -> Res<Descriptor> {
    let new = Descriptor(d.0 | (bits as u64) << 40);
    if new.0 != d.0
        && let Some(at) = descriptor_address(&v.cpu, sel, 8)
    {
        access::write_u8(v, at.wrapping_add(5), (new.0 >> 40) as u8, mmu_mode::KERNEL)?;
    }
    Ok(new)
}

/// Clear type bits of the descriptor in memory.
pub fn clear_descriptor_bits(v: &mut Vcpu, sel: u16, d: Descriptor, bits: u8) -> Res<()> {
    let new = d.0 & !((bits as u64) << 40);
    match descriptor_address(&v.cpu, sel, 8) {
        Some(at) => access::write_u8(v, at.wrapping_add(5), (new >> 40) as u8, mmu_mode::KERNEL),
        None => Ok(()),
    }
}

/// MOV to, POP of, or LxS of a data segment register or SS.
pub fn load(v: &mut Vcpu, index: usize, sel: u16) -> Res<()> {
    load_or(v, index, sel, GP)
}

/// `load` where `vector` says that the selector or its descriptor is wrong: #GP, or #TS in a task switch.
pub fn load_or(v: &mut Vcpu, index: usize, sel: u16, vector: u8) -> Res<()> {
    let cpu = &mut v.cpu;
    if is_real_or_v86(cpu) {
        let v86 = cpu.sysflags & rflags::VM != 0;
        let s = &mut cpu.segs[index];
        (s.sel, s.base, s.unusable) = (sel, (sel as u64) << 4, false);
        if v86 {
            (s.limit, s.attr) = (0xffff, 0xf3);
        }
        return Ok(());
    }
    let cpl = cpu.cpl;
    if sel & 0xfffc == 0 {
        if index == SS && (!cpu.long64() || cpl == 3 || sel as u8 & 3 != cpl) {
            return Err(fault(vector, 0).into());
        }
        // In long mode the base of a null FS or GS is left alone by AMD, cleared by Intel.
        cpu.segs[index] =
            Seg { sel, attr: if index == SS { (cpl as u16) << 5 } else { 0 }, unusable: true, ..Seg::default() };
        return Ok(());
    }
    let d = read_descriptor(v, sel, vector)?;
    let rpl = sel as u8 & 3;
    if index == SS {
        if rpl != cpl || !d.is_writable() || d.dpl() != cpl {
            return Err(fault(vector, sel).into());
        }
        if !d.present() {
            return Err(fault(SS_FAULT, sel).into());
        }
    } else {
        if !d.is_readable() || (!d.is_conforming() && (rpl > d.dpl() || cpl > d.dpl())) {
            return Err(fault(vector, sel).into());
        }
        if !d.present() {
            return Err(fault(NP, sel).into());
        }
    }
    let d = set_descriptor_bits(v, sel, d, 1)?;
    v.cpu.segs[index] = d.seg(sel);
    Ok(())
}

/// Install a checked code segment with `cpl` as its RPL.
pub fn set_cs(v: &mut Vcpu, sel: u16, d: Descriptor, cpl: u8) {
    v.cpu.segs[CS] = d.seg(sel & 0xfffc | cpl as u16);
    v.cpu.cpl = cpl;
}

/// LLDT.
pub fn lldt(v: &mut Vcpu, sel: u16) -> Res<()> {
    require_protected(v, 0)?;
    if sel & 0xfffc == 0 {
        v.cpu.ldtr = Seg { sel, unusable: true, ..Seg::default() };
        return Ok(());
    }
    v.cpu.ldtr = read_system(v, sel, &[2])?.0;
    Ok(())
}

/// LTR.
pub fn ltr(v: &mut Vcpu, sel: u16) -> Res<()> {
    require_protected(v, 0)?;
    if sel & 0xfffc == 0 {
        return Err(Exception::gp(0).into());
    }
    let kinds: &[u8] = if v.cpu.efer & efer::LMA != 0 { &[9] } else { &[1, 9] };
    let (seg, d) = read_system(v, sel, kinds)?;
    let d = set_descriptor_bits(v, sel, d, 2)?;
    v.cpu.tr = Seg { attr: d.attr(), ..seg };
    Ok(())
}

/// The system segment of one of `kinds` that `sel` names in the GDT.
fn read_system(v: &mut Vcpu, sel: u16, kinds: &[u8]) -> Res<(Seg, Descriptor)> {
    if sel & 4 != 0 {
        return Err(fault(GP, sel).into());
    }
    let d = read_descriptor(v, sel, GP)?;
    if !kinds.contains(&d.kind()) {
        return Err(fault(GP, sel).into());
    }
    if !d.present() {
        return Err(fault(NP, sel).into());
    }
    let mut seg = d.seg(sel);
    if v.cpu.efer & efer::LMA != 0 {
        let high = read_descriptor_high(v, sel, GP)?;
        seg.base |= high << 32;
        if high >> 40 & 0x1f != 0 || !crate::mmu::is_canonical(seg.base) {
            return Err(fault(GP, sel).into());
        }
    }
    Ok((seg, d))
}

/// #UD outside protected mode, #GP(0) above `cpl`.
pub fn require_protected(v: &Vcpu, cpl: u8) -> Res<()> {
    if is_real_or_v86(&v.cpu) {
        return Err(Exception::ud().into());
    }
    if v.cpu.cpl > cpl { Err(Exception::gp(0).into()) } else { Ok(()) }
}

/// LAR, LSL, VERR, VERW: the descriptor, if the selector is valid and visible for that use.
pub fn visible(v: &mut Vcpu, sel: u16, code: Inspect) -> Res<Option<Descriptor>> {
    require_protected(v, 3)?;
    if sel & 0xfffc == 0 || descriptor_address(&v.cpu, sel, 8).is_none() {
        return Ok(None);
    }
    let d = read_descriptor(v, sel, GP)?;
    let long = v.cpu.efer & efer::LMA != 0;
    let kind_ok = match code {
        Inspect::Access => {
            d.kind() & 0x10 != 0
                || if long { matches!(d.kind(), 2 | 9 | 11 | 12) } else { matches!(d.kind(), 1..=5 | 9 | 11 | 12) }
        }
        Inspect::Limit => {
            d.kind() & 0x10 != 0
                || if long { matches!(d.kind(), 2 | 9 | 11) } else { matches!(d.kind(), 1..=3 | 9 | 11) }
        }
        Inspect::Read => d.is_readable(),
        Inspect::Write => d.is_writable(),
    };
    let privileged = d.is_conforming() || (v.cpu.cpl <= d.dpl() && sel as u8 & 3 <= d.dpl());
    Ok((kind_ok && privileged).then_some(d))
}

#[derive(Clone, Copy)]
pub enum Inspect {
    Access,
    Limit,
    Read,
    Write,
}

/// Linear address of `len` bytes on the stack `ss`, which is about to be installed; `None` if it does not hold them.
pub fn on_stack(ss: &Seg, sp: u64, len: u64) -> Option<u64> {
    let last = sp + len - 1;
    let top = if ss.db() { 0xffff_ffff } else { 0xffff };
    let inside = if ss.attr & 4 != 0 { sp > ss.limit as u64 && last <= top } else { last <= ss.limit as u64 };
    inside.then_some(ss.base.wrapping_add(sp) & 0xffff_ffff)
}

/// Linear address of `offset` in a segment, checked for an access of `len` bytes.
///
/// 64-bit mode: canonical form only (by the MMU), bases of FS and GS. Else limits, types and #SS or #GP.
pub fn linear(cpu: &Cpu, index: usize, offset: u64, len: u64, write: bool) -> Result<u64, Exception> {
    let s = &cpu.segs[index];
    if cpu.long64() {
        let base = if matches!(index, FS | GS) { s.base } else { 0 };
        let la = base.wrapping_add(offset);
        if !crate::mmu::is_canonical(la) || !crate::mmu::is_canonical(la.wrapping_add(len.max(1) - 1)) {
            return Err(Exception::with_error(if index == SS { SS_FAULT } else { GP }, 0));
        }
        return Ok(la);
    }
    let bad = Exception::with_error(if index == SS { SS_FAULT } else { GP }, 0);
    let last = offset.wrapping_add(len.max(1) - 1);
    if !is_real_or_v86(cpu) {
        let kind = s.attr as u8 & 0x1f;
        let code = kind & 8 != 0;
        // Bit 1: data that may be written, code that may be read.
        if s.unusable || (write && code) || (kind & 2 == 0 && (write || code)) {
            return Err(bad);
        }
        if !code && kind & 4 != 0 {
            // Expand-down: valid offsets lie above the limit.
            let top = if s.db() { 0xffff_ffff } else { 0xffff };
            if offset <= s.limit as u64 || last > top {
                return Err(bad);
            }
            return Ok(s.base.wrapping_add(offset) & 0xffff_ffff);
        }
    }
    if last > s.limit as u64 || last < offset {
        return Err(bad);
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}
