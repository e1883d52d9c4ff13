//! The dirty log: which pages of slots with `LOG_DIRTY` were written.
//!
//! A page's bit says that it was written since it was last looked at, and that this has been reported: while it is set,
//! TLBs may hold the page for writing, so that later writes go unnoticed at full speed. Bits are cleared, and those TLB
//! entries revoked, only while no vCPU runs: a write is in memory before the safepoint, or it sets the bit again.
//!
//! Without dirty rings, KVM_GET_DIRTY_LOG takes the bits. With them, the vCPU that sets a page's bit also puts the page into
//! its ring, and the bit stays until KVM_RESET_DIRTY_RINGS finds the entry handed back (virt/kvm/dirty_ring.c has the
//! protocol; Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING).

use crate::cache::revoke_writes;
use crate::cpu::Vcpu;
use crate::mem::{LOG_DIRTY, Slot};
use crate::vm::{Stopped, Vm, request};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

/// Entries that a ring keeps free for what a vCPU writes between being told that it is full and leaving
/// (KVM_DIRTY_RING_RSVD_ENTRIES).
const RESERVED_ENTRIES: u32 = 64;
/// KVM_DIRTY_RING_MAX_ENTRIES.
const MAX_ENTRIES: u32 = 65536;
const ENTRY_BYTES: u32 = size_of::<Gfn>() as u32;

/// Whether rings can have this size: a power of two, a page at least.
pub fn is_ring_size(size_bytes: u32) -> bool {
    size_bytes.is_power_of_two() && (4096..=MAX_ENTRIES * ENTRY_BYTES).contains(&size_bytes)
}

/// KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// Bits by slot id, one per page.
#[derive(Default)]
pub struct Bitmaps(RwLock<HashMap<u32, Arc<[AtomicU64]>>>);

impl Bitmaps {
    /// The slot was created or changed. A slot that is new to the log starts clean, `anew` also one that is not.
    pub fn set_slot(&self, id: u32, logged: bool, size: u64, anew: bool) {
        let mut maps = self.0.write().unwrap();
        if !logged || anew {
            maps.remove(&id);
        }
        if logged {
            let words = (size >> 12).div_ceil(64);
            maps.entry(id).or_insert_with(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        }
    }
    fn with<R>(&self, id: u32, page: u64, f: impl FnOnce(&AtomicU64, u64) -> R) -> Option<R> {
        let maps = self.0.read().unwrap();
        let word = maps.get(&id)?.get((page >> 6) as usize)?;
        Some(f(word, 1 << (page & 63)))
    }
    /// Whether the page of a logged slot that holds `gpa` is known to be written.
    pub fn has(&self, slot: &Slot, gpa: u64) -> bool {
        let page = slot.page(gpa);
        self.with(slot.id, page, |word, bit| word.load(Ordering::Relaxed) & bit != 0).unwrap_or(false)
    }
    /// Set the bit; was it clear?
    fn set(&self, id: u32, page: u64) -> bool {
        self.with(id, page, |word, bit| word.fetch_or(bit, Ordering::Relaxed) & bit == 0).unwrap_or(false)
    }
    fn clear(&self, id: u32, page: u64) {
        self.with(id, page, |word, bit| word.fetch_and(!bit, Ordering::Relaxed));
    }
}

/// A vCPU wrote to RAM at `gpa`.
pub fn mark(v: &Vcpu, slot: &Slot, gpa: u64) {
    let page = slot.page(gpa);
    if !v.vm.dirty.set(slot.id, page) {
        return;
    }
    if let Some(ring) = &v.shared.ring {
        let mut ring = ring.lock().unwrap();
        ring.push(slot.id, page);
        if ring.is_soft_full() {
            v.shared.request(request::RING_FULL);
        }
    }
}

/// KVM_GET_DIRTY_LOG: take the bits of a slot. `None` if it is not logged.
pub fn take(vm: &Vm, id: u32) -> Option<Vec<u64>> {
    let bits = vm.dirty.0.read().unwrap().get(&id)?.clone();
    if bits.iter().all(|word| word.load(Ordering::Relaxed) == 0) {
        return Some(vec![0; bits.len()]);
    }
    Some(vm.exclusive(None, |stopped| {
        let taken = bits.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
        protect(vm, stopped);
        taken
    }))
}

/// KVM_RESET_DIRTY_RINGS: how many entries were handed back.
pub fn reset_rings(vm: &Vm) -> u32 {
    let vcpus = vm.vcpus.read().unwrap().clone();
    let rings: Vec<_> = vcpus.iter().filter_map(|v| v.ring.as_ref()).collect();
    // Who only looks need not stop the vCPUs.
    if rings.iter().all(|ring| !ring.lock().unwrap().is_handed_back()) {
        return 0;
    }
    vm.exclusive(None, |stopped| {
        let count = rings.iter().map(|ring| ring.lock().unwrap().reset(&vm.dirty)).sum();
        protect(vm, stopped);
        count
    })
}

/// Have the next write to each logged page noticed whose bit is clear.
fn protect(vm: &Vm, stopped: &Stopped) {
    let slots = vm.slots.read().unwrap().clone();
    let logged = |page| slots.find(page).is_some_and(|s| s.flags & LOG_DIRTY != 0);
    stopped.each_cpu(|cpu| revoke_writes(cpu, logged));
}

/// `struct kvm_dirty_gfn`. User space reads and writes it at any time.
#[repr(C)]
struct Gfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// A vCPU's dirty ring. User space has the entries mapped; what it writes there can make it lose track of pages, no more.
pub struct Ring {
    gfns: *mut Gfn,
    entries: u32,
    /// Entries ever filled, and ever handed back.
    dirty: u64,
    reset: u64,
    /// Pages (slot, page in it) that found the ring full: they follow when there is room. One instruction's page table
    /// walks can set more bits than a ring has reserved.
    late: VecDeque<(u32, u64)>,
}

// SAFETY: the mapping is the ring's own, and only accessed through atomics.
unsafe impl Send for Ring {}

impl Ring {
    pub fn new(size_bytes: u32) -> std::io::Result<Self> {
        assert!(is_ring_size(size_bytes));
        // SAFETY: a fresh anonymous mapping; zeroes are free entries.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { gfns: p.cast(), entries: size_bytes / ENTRY_BYTES, dirty: 0, reset: 0, late: VecDeque::new() })
    }
    /// Where user space finds the entries: address and size in bytes.
    pub fn area(&self) -> (u64, u32) {
        (self.gfns as u64, self.entries * ENTRY_BYTES)
    }
    fn gfn(&self, index: u64) -> &Gfn {
        // SAFETY: the mapping has that many entries.
        unsafe { &*self.gfns.add((index % self.entries as u64) as usize) }
    }
    fn push(&mut self, slot: u32, page: u64) {
        if self.dirty - self.reset >= self.entries as u64 {
            self.late.push_back((slot, page));
            return;
        }
        let gfn = self.gfn(self.dirty);
        gfn.slot.store(slot, Ordering::Relaxed);
        gfn.offset.store(page, Ordering::Relaxed);
        gfn.flags.store(DIRTY, Ordering::Release);
        self.dirty += 1;
    }
    /// Must the vCPU leave until entries are handed back?
    pub fn is_soft_full(&self) -> bool {
        self.dirty - self.reset >= (self.entries - RESERVED_ENTRIES) as u64
    }
    fn is_handed_back(&self) -> bool {
        self.reset != self.dirty && self.gfn(self.reset).flags.load(Ordering::Acquire) & RESET != 0
    }
    /// Take back what user space hands back, in order; how many that were. The pages are those that the entries name now,
    /// as with the kernel.
    fn reset(&mut self, bitmaps: &Bitmaps) -> u32 {
        let mut count = 0;
        while self.is_handed_back() {
            let gfn = self.gfn(self.reset);
            bitmaps.clear(gfn.slot.load(Ordering::Relaxed), gfn.offset.load(Ordering::Relaxed));
            gfn.flags.store(0, Ordering::Release);
            self.reset += 1;
            count += 1;
        }
        for _ in 0..count.min(self.late.len() as u32) {
            let (slot, page) = self.late.pop_front().expect("counted");
            self.push(slot, page);
        }
        count
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let (address, size_bytes) = self.area();
        // SAFETY: mapped in `new`, not used after this.
        unsafe { libc::munmap(address as *mut _, size_bytes as usize) };
    }
}
