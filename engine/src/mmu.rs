//! The MMU: gva → gpa by the guest's page tables, gpa → hva by the memory slots, and the TLBs that remember
//! both.
//!
//! Page tables are walked as the processor walks them (Intel SDM volume 3, chapter 4; AMD APM volume 2,
//! chapter 5): accessed and dirty bits are set by compare-and-swap in guest memory, faults carry exact error
//! codes. A data TLB entry holds a 4 KiB page of RAM only; whatever else is at an address (nothing, a device,
//! a read-only slot, a page with translated code, a page whose next write is to be logged) is never in it for the
//! access in question, so translated code always comes here for those.

use crate::cpu::{
    Cpu, Exception, Res, Stop, TLB_ENTRIES, TLB_GLOBAL, TlbEntry, Vcpu, cr0, cr4, efer, mmu_mode, tlb_invalid,
};
use crate::dirty;
use crate::guest::{self, Gone};
use crate::mem::{LOG_DIRTY, READONLY, Slots};
use crate::stats::vcpu as counter;

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
/// Page size; PAT in the last level.
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// Physical address bits that the CPUID table offers.
pub const PHYSICAL_BITS: u32 = 46;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;

/// #PF error code.
mod error {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intent {
    Read,
    Write,
    Execute,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest physical address of the 4 KiB page.
    pub gpa: u64,
    /// A write needs no further check and no change of the page tables: permitted, dirty bit set.
    pub writable: bool,
    pub global: bool,
}

/// Page of code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fetch {
    pub gpa: u64,
    /// Host address of the page.
    pub hva: u64,
    pub global: bool,
}

pub fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Atomically read the page-table entry of `BYTES` at `gpa`; outside RAM there are only ones.
fn load_entry<const BYTES: usize>(slots: &Slots, gpa: u64) -> Result<u64, Exception> {
    let Some(p) = slots.hva(gpa, BYTES as u64) else {
        if slots.is_private(gpa) {
            return Err(Exception::private_memory_fault(gpa));
        }
        return Ok(u64::MAX >> (64 - 8 * BYTES));
    };
    let mut entry = [0; 8];
    // SAFETY: `gpa` is aligned within a slot.
    match unsafe { guest::copy(entry.as_mut_ptr(), p, BYTES) } {
        Ok(()) => Ok(u64::from_le_bytes(entry)),
        Err(Gone) => Err(Exception::memory_fault(gpa)),
    }
}

fn load(slots: &Slots, gpa: u64) -> Result<u64, Exception> {
    load_entry::<8>(slots, gpa)
}

fn load32(slots: &Slots, gpa: u64) -> Result<u32, Exception> {
    load_entry::<4>(slots, gpa).map(|entry| entry as u32)
}

/// Set bits of the entry at `gpa` if it still is `old`.
fn set_bits(vcpu: &Vcpu, gpa: u64, old: u64, bits: u64, wide: bool) -> Result<bool, Exception> {
    let Some(slot) = vcpu.slots.find(gpa) else { return Ok(false) };
    if slot.flags & READONLY != 0 {
        return Ok(true);
    }
    let Some(p) = vcpu.slots.hva(gpa, if wide { 8 } else { 4 }) else { return Ok(false) };
    let done = if wide {
        // SAFETY: `gpa` is 8-aligned within a slot.
        unsafe { guest::swap8(p.cast(), old, old | bits) }
    } else {
        // SAFETY: 4-aligned within a slot.
        unsafe { guest::swap4(p.cast(), old as u32, (old | bits) as u32) }
    };
    let done = done.map_err(|Gone| Exception::memory_fault(gpa))?;
    // A page table that is also code: its blocks do not depend on accessed and dirty bits.
    if done && slot.flags & LOG_DIRTY != 0 {
        dirty::mark(vcpu, slot, gpa);
    }
    Ok(done)
}

fn fault(la: u64, intent: Intent, mode: usize, cpu: &Cpu, present: bool, reserved: bool) -> Exception {
    let mut code = 0;
    if present {
        code |= error::P;
    }
    if intent == Intent::Write {
        code |= error::W;
    }
    if mode == mmu_mode::USER {
        code |= error::U;
    }
    if reserved {
        code |= error::RSVD;
    }
    if intent == Intent::Execute && (cpu.efer & efer::NXE != 0 && cpu.cr4 & cr4::PAE != 0 || cpu.cr4 & cr4::SMEP != 0) {
        code |= error::I;
    }
    Exception::page_fault(code, la)
}

/// Translate `la` for an access of `intent` in `mode` (`cpu::mmu_mode`).
///
/// Fails with #PF, or with #GP(0) if the address is not canonical (the caller turns that into #SS where
/// it went through SS).
pub fn walk(vcpu: &Vcpu, la: u64, intent: Intent, mode: usize) -> Result<Page, Exception> {
    let cpu = &*vcpu.cpu;
    vcpu.shared.stats.count(counter::WALKS);
    if !cpu.paging() {
        // Without paging a linear address has 32 bits.
        return Ok(Page { gpa: la & 0xffff_f000, writable: true, global: false });
    }
    if cpu.efer & efer::LMA != 0 {
        if !is_canonical(la) {
            return Err(Exception::gp(0));
        }
        return walk_wide(vcpu, la, intent, mode, cpu.cr3 & ADDRESS, 4);
    }
    let la = la & 0xffff_ffff;
    if cpu.cr4 & cr4::PAE != 0 {
        return walk_wide(vcpu, la, intent, mode, cpu.cr3 & 0xffff_ffe0, 3);
    }
    walk_legacy(vcpu, la, intent, mode)
}

/// 4-level and PAE paging: 64-bit entries.
fn walk_wide(vcpu: &Vcpu, la: u64, intent: Intent, mode: usize, root: u64, levels: u32) -> Result<Page, Exception> {
    let cpu = &*vcpu.cpu;
    let nxe = cpu.efer & efer::NXE != 0;
    let reserved_high = (NX - 1) & !((1 << 52) - 1) & if levels == 4 { 0 } else { u64::MAX } // PAE: bits 52-62
        | ((1u64 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
    'again: loop {
        let (mut table, mut allowed, mut no_execute) = (root, W | U, false);
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let index = la >> shift & if levels == 3 && level == 3 { 3 } else { 511 };
            let at = table + index * 8;
            let pdpte = levels == 3 && level == 3;
            let entry = if pdpte { cpu.pdptrs[index as usize] } else { load(&vcpu.slots, at)? };
            if entry & P == 0 {
                return Err(fault(la, intent, mode, cpu, false, false));
            }
            let leaf = level == 1 || (entry & PS != 0 && level < 4 && !pdpte);
            let mut reserved = reserved_high | if nxe { 0 } else { NX };
            if level == 4 {
                reserved |= PS;
            }
            if leaf && level > 1 {
                reserved |= ((1 << shift) - 1) & !0x1fff; // bit 12 is PAT
            }
            if pdpte {
                reserved |= NX;
            }
            if entry & reserved != 0 {
                return Err(fault(la, intent, mode, cpu, true, true));
            }
            if !pdpte {
                allowed &= entry;
                no_execute |= entry & NX != 0;
            }
            if !leaf {
                if entry & A == 0 && !pdpte && !set_bits(vcpu, at, entry, A, true)? {
                    continue 'again;
                }
                table = entry & ADDRESS;
                continue;
            }
            let write = check(cpu, allowed, no_execute, la, intent, mode)?;
            let want = A | if intent == Intent::Write { D } else { 0 };
            if entry & want != want && !set_bits(vcpu, at, entry, want, true)? {
                continue 'again;
            }
            let offset = la & ((1 << shift) - 1);
            let gpa = (entry & ADDRESS & !((1 << shift) - 1) | offset) & !0xfff;
            let dirty = entry & D != 0 || intent == Intent::Write;
            let global = entry & G != 0 && cpu.cr4 & cr4::PGE != 0;
            return Ok(Page { gpa, writable: write && dirty, global });
        }
        unreachable!("level 1 is always a leaf");
    }
}

/// Load the four page-directory-pointer entries, as PAE paging does with CR3. False, and nothing is loaded, if reserved
/// bits are set in one that is present (then the load raises #GP).
pub fn load_pdptrs(vcpu: &mut Vcpu, cr3: u64) -> bool {
    let reserved = !((1u64 << PHYSICAL_BITS) - 1) | 0x1e6;
    let entries = [0, 8, 16, 24].map(|at| load(&vcpu.slots, (cr3 & 0xffff_ffe0) + at).unwrap_or(u64::MAX));
    let valid = entries.iter().all(|entry| entry & P == 0 || entry & reserved == 0);
    if valid {
        vcpu.cpu.pdptrs = entries;
    }
    valid
}

/// Two-level paging with 32-bit entries.
fn walk_legacy(vcpu: &Vcpu, la: u64, intent: Intent, mode: usize) -> Result<Page, Exception> {
    let cpu = &*vcpu.cpu;
    loop {
        let at = (cpu.cr3 & 0xffff_f000) + (la >> 22) * 4;
        let directory = load32(&vcpu.slots, at)? as u64;
        if directory & P == 0 {
            return Err(fault(la, intent, mode, cpu, false, false));
        }
        let large = directory & PS != 0 && cpu.cr4 & cr4::PSE != 0;
        let (leaf_at, leaf, allowed) = if large {
            if directory & 1 << 21 != 0 {
                return Err(fault(la, intent, mode, cpu, true, true));
            }
            (at, directory, directory)
        } else {
            if directory & A == 0 && !set_bits(vcpu, at, directory, A, false)? {
                continue;
            }
            let at = (directory & 0xffff_f000) + (la >> 12 & 1023) * 4;
            let entry = load32(&vcpu.slots, at)? as u64;
            if entry & P == 0 {
                return Err(fault(la, intent, mode, cpu, false, false));
            }
            (at, entry, directory & entry)
        };
        let write = check(cpu, allowed, false, la, intent, mode)?;
        let want = A | if intent == Intent::Write { D } else { 0 };
        if leaf & want != want && !set_bits(vcpu, leaf_at, leaf, want, false)? {
            continue;
        }
        // PSE-36: bits 13-20 of a large entry are address bits 32-39.
        let gpa =
            if large { leaf & 0xffc0_0000 | (leaf >> 13 & 0xff) << 32 | la & 0x3f_f000 } else { leaf & 0xffff_f000 };
        let dirty = leaf & D != 0 || intent == Intent::Write;
        return Ok(Page { gpa, writable: write && dirty, global: leaf & G != 0 && cpu.cr4 & cr4::PGE != 0 });
    }
}

/// Check the permissions collected on the way; returns whether a write would be permitted.
fn check(cpu: &Cpu, allowed: u64, no_execute: bool, la: u64, intent: Intent, mode: usize) -> Result<bool, Exception> {
    let user_page = allowed & U != 0;
    let denied = Err(fault(la, intent, mode, cpu, true, false));
    let write = allowed & W != 0 || (mode != mmu_mode::USER && cpu.cr0 & cr0::WP == 0);
    if mode == mmu_mode::USER {
        if !user_page {
            return denied;
        }
    } else if user_page {
        if intent == Intent::Execute {
            if cpu.cr4 & cr4::SMEP != 0 {
                return denied;
            }
        } else if cpu.cr4 & cr4::SMAP != 0 && mode == mmu_mode::KERNEL {
            return denied;
        }
    }
    if intent == Intent::Write && !write || intent == Intent::Execute && no_execute {
        return denied;
    }
    Ok(write)
}

pub fn index(la: u64) -> usize {
    (la >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Whether the 4 KiB at `host` are whole a page of the slot that holds `gpa`: what every fill of a TLB asserts. Looked up
/// without the search that found the slot, so that a mistake there shows.
fn in_a_slot(slots: &Slots, gpa: u64, host: u64) -> bool {
    gpa & 0xfff == 0
        && host & 0xfff == 0
        && slots.as_slice().iter().any(|s| {
            s.gpa <= gpa
                && gpa - s.gpa <= s.size.saturating_sub(4096)
                && host >= s.hva
                && host - s.hva <= s.size.saturating_sub(4096)
                && gpa - s.gpa == host - s.hva
        })
}

/// Put the page of `la` into the TLB of `mode`. `None`: the page is not for direct access of this kind.
#[inline(never)]
pub fn fill(vcpu: &mut Vcpu, la: u64, write: bool, mode: usize) -> Res<Option<TlbEntry>> {
    let page = walk(vcpu, la, if write { Intent::Write } else { Intent::Read }, mode)?;
    let Some(slot) = vcpu.slots.find(page.gpa) else { return Ok(None) };
    if vcpu.is_lapic(page.gpa) {
        return Ok(None);
    }
    let unlogged = slot.flags & LOG_DIRTY == 0 || vcpu.vm.dirty.has(slot, page.gpa);
    let direct = slot.flags & READONLY == 0 && unlogged && !vcpu.vm.code.has(page.gpa) && !vcpu.smm;
    if write && !direct {
        return Ok(None);
    }
    let host = slot.hva + (page.gpa - slot.gpa);
    debug_assert!(in_a_slot(&vcpu.slots, page.gpa, host), "a TLB entry for {la:#x} beyond its slot");
    let linear = la & !0xfff;
    let entry = TlbEntry {
        read: linear,
        write: if page.writable && direct { linear } else { tlb_invalid(index(la)) },
        host,
        gpa: page.gpa | if page.global { TLB_GLOBAL } else { 0 },
    };
    let i = index(la);
    vcpu.cpu.tlb[mode][i] = entry;
    vcpu.shared.stats.count(if write { counter::WRITE_MISSES } else { counter::READ_MISSES });
    if !page.global {
        vcpu.log.record(mode, i);
    }
    Ok(Some(entry))
}

/// Places filled with non-global translations since they were last flushed.
pub struct FillLog {
    len: usize,
    places: [u16; Self::CAPACITY],
}
impl FillLog {
    const CAPACITY: usize = 1024;
    pub fn new() -> Self {
        Self { len: 0, places: [0; Self::CAPACITY] }
    }
    fn record(&mut self, mode: usize, index: usize) {
        if self.len < Self::CAPACITY {
            self.places[self.len] = (mode * TLB_ENTRIES + index) as u16;
        }
        self.len += 1;
    }
}
impl Default for FillLog {
    fn default() -> Self {
        Self::new()
    }
}

/// Entries of the fetch cache of one vCPU.
const FETCH_ENTRIES: usize = 256;

/// The instruction side: which page of RAM an rip is in.
pub struct FetchCache {
    entries: [[(u64, Fetch); FETCH_ENTRIES]; mmu_mode::COUNT],
    /// There are entries of non-global and of global pages.
    local: bool,
    global: bool,
}
impl FetchCache {
    pub fn new() -> Self {
        Self { entries: [[(u64::MAX, Fetch::default()); FETCH_ENTRIES]; mmu_mode::COUNT], local: false, global: false }
    }
    fn flush(&mut self, globals_too: bool) {
        let some = self.local || globals_too && self.global;
        if !some {
            return;
        }
        for table in &mut self.entries {
            for e in table {
                if globals_too || !e.1.global {
                    e.0 = u64::MAX;
                }
            }
        }
        self.local = false;
        self.global &= !globals_too;
    }
}
impl Default for FetchCache {
    fn default() -> Self {
        Self::new()
    }
}

/// The page that code at linear address `la` is fetched from.
///
/// Code outside RAM cannot be run: `Exit::InternalError`, as KVM's emulator fails there.
pub fn fetch_page(vcpu: &mut Vcpu, la: u64) -> Res<Fetch> {
    let mode = vcpu.cpu.mmu_mode();
    let number = la >> 12;
    let slot = &vcpu.fetch.entries[mode][number as usize & (FETCH_ENTRIES - 1)];
    if slot.0 == number {
        return Ok(slot.1);
    }
    vcpu.shared.stats.count(counter::FETCH_MISSES);
    let page = walk(vcpu, la, Intent::Execute, mode)?;
    let Some(hva) = vcpu.slots.hva(page.gpa, 4096) else {
        if vcpu.slots.is_private(page.gpa) {
            return Err(Exception::private_memory_fault(page.gpa).into());
        }
        return Err(Stop::Exit(crate::cpu::Exit::InternalError(format!(
            "instruction fetch from {:#x}, which is not memory (gva {la:#x})",
            page.gpa
        ))));
    };
    debug_assert!(in_a_slot(&vcpu.slots, page.gpa, hva as u64), "a page of code at {la:#x} beyond its slot");
    let fetch = Fetch { gpa: page.gpa, hva: hva as u64, global: page.global };
    vcpu.fetch.entries[mode][number as usize & (FETCH_ENTRIES - 1)] = (number, fetch);
    vcpu.fetch.local |= !page.global;
    vcpu.fetch.global |= page.global;
    Ok(fetch)
}

/// Drop every translation of data and jumps.
pub fn clear(cpu: &mut Cpu) {
    for table in &mut cpu.tlb {
        for (i, e) in table.iter_mut().enumerate() {
            *e = TlbEntry::empty(i);
        }
    }
    cpu.jumps.clear();
}

/// Everything, global pages included: CR0.PG, CR4, memory slots.
pub fn flush_all(vcpu: &mut Vcpu) {
    vcpu.shared.stats.count(counter::TLB_FLUSH);
    clear(&mut vcpu.cpu);
    vcpu.fetch.flush(true);
    vcpu.log.len = 0;
}

/// A CR3 write: global pages stay.
pub fn flush_non_global(vcpu: &mut Vcpu) {
    vcpu.shared.stats.count(counter::TLB_FLUSH_LOCAL);
    if vcpu.log.len > FillLog::CAPACITY {
        for table in &mut vcpu.cpu.tlb {
            for (i, e) in table.iter_mut().enumerate() {
                if e.gpa & TLB_GLOBAL == 0 {
                    *e = TlbEntry::empty(i);
                }
            }
        }
    } else {
        for n in 0..vcpu.log.len {
            let place = vcpu.log.places[n] as usize;
            let i = place % TLB_ENTRIES;
            let e = &mut vcpu.cpu.tlb[place / TLB_ENTRIES][i];
            if e.gpa & TLB_GLOBAL == 0 {
                *e = TlbEntry::empty(i);
            }
        }
    }
    vcpu.log.len = 0;
    vcpu.fetch.flush(false);
    vcpu.cpu.jumps.clear_non_global();
}

/// INVLPG.
pub fn flush_page(vcpu: &mut Vcpu, la: u64) {
    vcpu.shared.stats.count(counter::INVLPG);
    for table in &mut vcpu.cpu.tlb {
        table[index(la)] = TlbEntry::empty(index(la));
    }
    let number = la >> 12;
    let mut code = false;
    for table in &mut vcpu.fetch.entries {
        let e = &mut table[number as usize & (FETCH_ENTRIES - 1)];
        if e.0 == number {
            e.0 = u64::MAX;
            code = true;
        }
    }
    // Targets in the page, and the fetch cache may have dropped its entry already: the jump table decides.
    vcpu.cpu.jumps.clear_page(la, code);
}
