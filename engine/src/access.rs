//! Memory accesses of instructions that do not run as translated code: any mode, any page, any device.
//!
//! All take linear addresses and an MMU mode (`cpu::mmu_mode`). A read or write either happens as a whole or
//! stops the instruction before it changed anything; see `IoState` for how devices fit in.

use crate::cpu::{Cpu, Exception, Exit, Res, Source, Stop, TlbEntry, Vcpu, cr0, mmu_mode, rflags};
use crate::debug::{self, Kind};
use crate::dirty;
use crate::guest::{self, Gone};
use crate::mem::{LOG_DIRTY, READONLY, Slot};
use crate::mmu::{self, Intent};
use crate::smm;

/// Device accesses are split as KVM splits them.
const FRAGMENT_BYTES: usize = 8;

/// Parts of `[la, la + len)` that lie in one page each: (offset, length).
pub fn parts(la: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let here = la.wrapping_add(at as u64);
        let n = (4096 - (here & 0xfff) as usize).min(len - at);
        let part = (at, n);
        at += n;
        (n != 0).then_some(part)
    })
}

/// Host address of `len` bytes at `la` if the TLB has their page with the tag that `tag` picks.
fn hit(cpu: &Cpu, la: u64, len: usize, mode: usize, tag: impl Fn(&TlbEntry) -> u64) -> Option<*mut u8> {
    let e = &cpu.tlb[mode][mmu::index(la)];
    let offset = la.wrapping_sub(tag(e));
    (offset <= (4096 - len.min(4096)) as u64 && len <= 4096).then(|| (e.host + offset) as *mut u8)
}

/// An operand of user mode that is not aligned, where CR0.AM and RFLAGS.AC ask for that (Intel SDM volume 3, 6.15).
pub fn is_misaligned(cpu: &Cpu, la: u64, len: usize, mode: usize) -> bool {
    let alignment = match len {
        2 | 4 | 8 => len as u64,
        10 => 8,
        // The x87 environment and state of 16- and 32-bit code.
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    };
    la & (alignment - 1) != 0 && mode == mmu_mode::USER && checks_alignment(cpu)
}

pub const MISALIGNED: Exception = Exception::with_error(17, 0);

pub fn check_alignment(cpu: &Cpu, la: u64, len: usize, mode: usize) -> Res<()> {
    if is_misaligned(cpu, la, len, mode) { Err(MISALIGNED.into()) } else { Ok(()) }
}

/// Must accesses be aligned? Translated code knows nothing of it.
pub fn checks_alignment(cpu: &Cpu) -> bool {
    cpu.cpl == 3 && cpu.cr0 & cr0::AM != 0 && cpu.sysflags & rflags::AC != 0
}

/// Read `to.len()` bytes at `la`.
pub fn read(vcpu: &mut Vcpu, la: u64, to: &mut [u8], mode: usize) -> Res<()> {
    check_alignment(&vcpu.cpu, la, to.len(), mode)?;
    read_part(vcpu, la, to, mode)
}

/// `read` of what may be a part of the operand: how it lies does not matter.
pub fn read_part(vcpu: &mut Vcpu, la: u64, to: &mut [u8], mode: usize) -> Res<()> {
    let len = to.len();
    debug::access(vcpu, Kind::Read, la, len);
    if let Some(p) = hit(&vcpu.cpu, la, len, mode, |e| e.read) {
        // SAFETY: the TLB holds pages of guest memory only; the access lies within one.
        unsafe { copy_from_guest(vcpu, p, to)? };
        return Ok(());
    }
    let mut gpas = [0u64; 2];
    if len > 4096 {
        for (offset, n) in parts(la, len) {
            read_part(vcpu, la.wrapping_add(offset as u64), &mut to[offset..offset + n], mode)?;
        }
        return Ok(());
    }
    // All translations first: no device is read for an instruction that faults.
    for (k, (offset, _)) in parts(la, len).enumerate() {
        let here = la.wrapping_add(offset as u64);
        gpas[k] = mmu::walk(vcpu, here, Intent::Read, mode)?.gpa + (here & 0xfff);
    }
    for (k, (offset, n)) in parts(la, len).enumerate() {
        read_physical(vcpu, gpas[k], &mut to[offset..offset + n])?;
    }
    Ok(())
}

/// Read within one page of guest physical memory.
pub fn read_physical(vcpu: &mut Vcpu, gpa: u64, to: &mut [u8]) -> Res<()> {
    if vcpu.is_lapic(gpa) {
        return vcpu.lapic_read(gpa, to);
    }
    if read_memory(vcpu, gpa, to)? {
        return Ok(());
    }
    check_private(vcpu, gpa)?;
    for (n, part) in to.chunks_mut(FRAGMENT_BYTES).enumerate() {
        let at = gpa + (n * FRAGMENT_BYTES) as u64;
        let io = &mut vcpu.io;
        match io.done.get(io.used) {
            Some((address, data)) if *address == at && data.len() == part.len() => {
                part.copy_from_slice(data);
                io.used += 1;
            }
            _ => {
                io.waiting = Some((at, part.len(), Source::Memory));
                io.used = 0;
                return Err(Exit::Mmio { gpa: at, len: part.len() as u8, write: false, data: [0; 8] }.into());
            }
        }
    }
    Ok(())
}

/// Read from memory, within one page, whatever else is there. False if there is none.
pub fn read_memory(vcpu: &Vcpu, gpa: u64, to: &mut [u8]) -> Res<bool> {
    let Some(p) = vcpu.slots.hva(gpa, to.len() as u64) else { return Ok(false) };
    // SAFETY: inside a slot.
    unsafe { copy_from_guest(vcpu, p, to)? };
    Ok(true)
}

/// Write to memory, within one page, whatever else is there. False if there is none that can be written.
pub fn write_memory(vcpu: &mut Vcpu, gpa: u64, from: &[u8]) -> Res<bool> {
    let Some(slot) = vcpu.slots.find(gpa).filter(|s| s.flags & READONLY == 0).copied() else { return Ok(false) };
    let Some(p) = vcpu.slots.hva(gpa, from.len() as u64) else { return Ok(false) };
    // SAFETY: inside a slot.
    unsafe { copy_to_guest(vcpu, from, p)? };
    written(vcpu, &slot, gpa, from.len() as u64);
    Ok(true)
}

/// Fail as a write of `len` bytes at `la` would fail, without writing.
pub fn check_write(vcpu: &mut Vcpu, la: u64, len: u64, mode: usize) -> Res<()> {
    check_alignment(&vcpu.cpu, la, len as usize, mode)?;
    check_pages(vcpu, la, len, Intent::Write, mode)
}

/// Fail as a read of `len` bytes at `la` would fail, without reading.
pub fn check_read(vcpu: &mut Vcpu, la: u64, len: u64, mode: usize) -> Res<()> {
    check_alignment(&vcpu.cpu, la, len as usize, mode)?;
    check_pages(vcpu, la, len, Intent::Read, mode)
}

pub fn check_pages(vcpu: &mut Vcpu, la: u64, len: u64, intent: Intent, mode: usize) -> Res<()> {
    for (offset, _) in parts(la, len as usize) {
        mmu::walk(vcpu, la.wrapping_add(offset as u64), intent, mode)?;
    }
    Ok(())
}

/// Write `from` at `la`. The last thing that an instruction does.
pub fn write(vcpu: &mut Vcpu, la: u64, from: &[u8], mode: usize) -> Res<()> {
    check_alignment(&vcpu.cpu, la, from.len(), mode)?;
    write_part(vcpu, la, from, mode)
}

/// `write` of what may be a part of the operand: how it lies does not matter.
pub fn write_part(vcpu: &mut Vcpu, la: u64, from: &[u8], mode: usize) -> Res<()> {
    debug::access(vcpu, Kind::Write, la, from.len());
    if let Some(p) = hit(&vcpu.cpu, la, from.len(), mode, |e| e.write) {
        // SAFETY: as in `read`; a write tag says that nobody else need know.
        unsafe { copy_to_guest(vcpu, from, p)? };
        return Ok(());
    }
    check_pages(vcpu, la, from.len() as u64, Intent::Write, mode)?;
    if (la & 0xfff) as usize + from.len() > 4096 {
        check_there(vcpu, la, from.len(), mode)?;
    }
    for (offset, n) in parts(la, from.len()) {
        let here = la.wrapping_add(offset as u64);
        let gpa = mmu::walk(vcpu, here, Intent::Write, mode)?.gpa + (here & 0xfff);
        write_physical(vcpu, gpa, &from[offset..offset + n])?;
    }
    Ok(())
}

/// Fail if one of several pages is gone, before the others are written.
fn check_there(vcpu: &mut Vcpu, la: u64, len: usize, mode: usize) -> Res<()> {
    for (offset, _) in parts(la, len) {
        let here = la.wrapping_add(offset as u64);
        let gpa = mmu::walk(vcpu, here, Intent::Write, mode)?.gpa + (here & 0xfff);
        if vcpu.slots.find(gpa).is_none() && !vcpu.is_lapic(gpa) {
            check_private(vcpu, gpa)?;
        }
        let slot = vcpu.slots.find(gpa).filter(|s| s.flags & READONLY == 0);
        if let Some(p) = slot.and_then(|_| vcpu.slots.hva(gpa, 1)) {
            // SAFETY: in a slot. A byte that is 0 becomes 0, any other stays.
            unsafe { guest::swap1(p, 0, 0) }.map_err(|Gone| gone(vcpu, p))?;
        }
    }
    Ok(())
}

/// Write within one page of guest physical memory.
pub fn write_physical(vcpu: &mut Vcpu, gpa: u64, from: &[u8]) -> Res<()> {
    if vcpu.is_lapic(gpa) {
        return vcpu.lapic_write(gpa, from);
    }
    if write_memory(vcpu, gpa, from)? {
        return Ok(());
    }
    check_private(vcpu, gpa)?;
    for (n, part) in from.chunks(FRAGMENT_BYTES).enumerate() {
        let at = gpa + (n * FRAGMENT_BYTES) as u64;
        if !vcpu.vm.ioeventfd_mmio(at, part) {
            vcpu.io.writes.push_back((at, part.to_vec()));
        }
    }
    Ok(())
}

/// Fail where `gpa`, which no slot has, is private memory.
fn check_private(vcpu: &Vcpu, gpa: u64) -> Res<()> {
    if vcpu.slots.is_private(gpa) { Err(Exception::private_memory_fault(gpa).into()) } else { Ok(()) }
}

/// What follows a write of `len` bytes to RAM at `gpa`, within one page.
pub fn written(vcpu: &mut Vcpu, slot: &Slot, gpa: u64, len: u64) {
    if slot.flags & LOG_DIRTY != 0 {
        dirty::mark(vcpu, slot, gpa);
    }
    if vcpu.smm {
        smm::written(vcpu, slot, gpa, len);
    } else if vcpu.vm.code.has(gpa) {
        let vm = vcpu.vm.clone();
        vm.note_write(Some(&vcpu.shared), gpa, len);
        vcpu.refresh();
    }
}

/// Host address of `len` bytes at `la` for an atomic read-modify-write, if they are RAM within one page.
/// `written` must be called afterwards, and the alignment checked before.
pub fn direct(vcpu: &mut Vcpu, la: u64, len: u64, mode: usize) -> Res<Option<(*mut u8, Slot, u64)>> {
    if (la & 0xfff) + len > 4096 {
        return Ok(None);
    }
    debug::access(vcpu, Kind::Write, la, len as usize);
    let gpa = mmu::walk(vcpu, la, Intent::Write, mode)?.gpa + (la & 0xfff);
    if vcpu.is_lapic(gpa) {
        return Ok(None);
    }
    let Some(slot) = vcpu.slots.find(gpa).filter(|s| s.flags & READONLY == 0).copied() else { return Ok(None) };
    Ok(vcpu.slots.hva(gpa, len).map(|p| (p, slot, gpa)))
}

/// What happens to an instruction for which the host memory at `p` is gone.
fn gone(vcpu: &Vcpu, p: *const u8) -> Stop {
    Exception::memory_fault(vcpu.slots.page_at(p as u64).unwrap_or(0)).into()
}

/// # Safety
/// `from` points to as many bytes of a slot.
unsafe fn copy_from_guest(vcpu: &Vcpu, from: *const u8, to: &mut [u8]) -> Res<()> {
    // SAFETY: by the caller.
    unsafe { guest::copy(to.as_mut_ptr(), from, to.len()) }.map_err(|Gone| gone(vcpu, from))
}

/// # Safety
/// `to` points to as many bytes of a slot.
unsafe fn copy_to_guest(vcpu: &Vcpu, from: &[u8], to: *mut u8) -> Res<()> {
    // SAFETY: by the caller.
    unsafe { guest::copy(to, from.as_ptr(), from.len()) }.map_err(|Gone| gone(vcpu, to))
}

macro_rules! typed {
    ($read:ident, $write:ident, $type:ty) => {
        pub fn $read(vcpu: &mut Vcpu, la: u64, mode: usize) -> Res<$type> {
            let mut b = [0; size_of::<$type>()];
            read(vcpu, la, &mut b, mode)?;
            Ok(<$type>::from_le_bytes(b))
        }
        pub fn $write(vcpu: &mut Vcpu, la: u64, value: $type, mode: usize) -> Res<()> {
            write(vcpu, la, &value.to_le_bytes(), mode)
        }
    };
}
typed!(read_u8, write_u8, u8);
typed!(read_u16, write_u16, u16);
typed!(read_u32, write_u32, u32);
typed!(read_u64, write_u64, u64);
