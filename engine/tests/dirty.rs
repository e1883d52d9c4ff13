//! The dirty log while vCPUs write: no write is lost, whatever user space does with the rings.

mod common;
use _engine::cpu::{Exit, Vcpu};
use _engine::dirty;
use _engine::mem::{LOG_DIRTY, Slot, Slots};
use _engine::run;
use common::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

const RAM_BYTES: u64 = 2 << 20;
/// A flag that stops all vCPUs, below what they write to.
const STOP: u64 = 0x1_2000;

/// User space's side of a ring.
struct Reader {
    address: u64,
    entries: u64,
    next: u64,
}

impl Reader {
    fn new(v: &Vcpu) -> Self {
        let (address, size_bytes) = v.shared.ring.as_ref().unwrap().lock().unwrap().area();
        Self { address, entries: (size_bytes / 16) as u64, next: 0 }
    }
    /// Flags, slot, offset of entry `n`.
    fn entry(&self, n: u64) -> (&AtomicU32, &AtomicU32, &AtomicU64) {
        let at = self.address + n % self.entries * 16;
        // SAFETY: inside the ring's mapping, which the vCPU keeps.
        unsafe { (&*(at as *const AtomicU32), &*((at + 4) as *const AtomicU32), &*((at + 8) as *const AtomicU64)) }
    }
    fn take(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        loop {
            let (flags, slot, offset) = self.entry(self.next);
            if flags.load(Ordering::Acquire) != 1 {
                return pages;
            }
            assert_eq!(slot.load(Ordering::Relaxed), 0);
            pages.push(offset.load(Ordering::Relaxed));
            flags.store(2, Ordering::Release);
            self.next += 1;
        }
    }
}

/// A machine whose RAM is logged, and `n` vCPUs of it with rings of `ring_bytes` (0: none).
fn logged(n: usize, ring_bytes: u32) -> (Machine, Slot, Vec<Vcpu>) {
    let mut m = Machine::new(RAM_BYTES as usize);
    m.long_mode();
    let vm = m.v.vm.clone();
    vm.dirty_ring_bytes.store(ring_bytes, Ordering::Relaxed);
    let slot = Slot { flags: LOG_DIRTY, ..vm.slots.read().unwrap().as_slice()[0] };
    vm.dirty.set_slot(slot.id, true, slot.size, false);
    vm.set_slots(Slots::new(vec![slot]));
    let vcpus = (0..n).map(|k| {
        let mut v = Vcpu::new(vm.clone(), k as u32 + 1).unwrap();
        let (from, c) = (&m.v.cpu, &mut v.cpu);
        (c.cr0, c.cr3, c.cr4, c.efer, c.xcr0) = (from.cr0, from.cr3, from.cr4, from.efer, from.xcr0);
        (c.segs, c.gdtr, c.idtr, c.tr, c.gpr) = (from.segs, from.gdtr, from.idtr, from.tr, from.gpr);
        c.rip = FREE;
        v.refresh();
        v
    });
    let vcpus = vcpus.collect();
    (m, slot, vcpus)
}

/// Writes at random to the upper MiB, across pages too, until the byte at rcx is set; rdi is the seed.
const RANDOM_WRITES: &[u8] = &[
    0x48, 0x0f, 0xaf, 0xfe, // again: imul rdi, rsi
    0x48, 0x01, 0xef, // add rdi, rbp
    0x48, 0x89, 0xfb, // mov rbx, rdi
    0x48, 0xc1, 0xeb, 0x2c, // shr rbx, 44
    0x81, 0xcb, 0, 0, 0x10, 0, // or ebx, 0x100000
    0x83, 0xe3, 0xf7, // and ebx, ~8
    0x48, 0x89, 0x3b, // mov [rbx], rdi
    0x80, 0x39, 0x00, // cmp byte [rcx], 0
    0x74, 0xe1, // je again
    0xf4,
];

/// Four vCPUs write at random, and a copy takes over the pages that the log names, once they are protected again.
fn no_write_is_lost(ring_bytes: u32) {
    let (mut m, slot, mut vcpus) = logged(4, ring_bytes);
    m.write(FREE, RANDOM_WRITES);
    for (k, v) in vcpus.iter_mut().enumerate() {
        let c = &mut v.cpu;
        (c.gpr[1], c.gpr[7]) = (STOP, k as u64 + 1);
        (c.gpr[6], c.gpr[5]) = (6364136223846793005, 1442695040888963407);
    }
    let mut readers: Vec<Reader> = if ring_bytes == 0 { vec![] } else { vcpus.iter().map(Reader::new).collect() };
    let mut copy = vec![[0u8; 4096]; (RAM_BYTES >> 12) as usize];
    for (page, to) in copy.iter_mut().enumerate() {
        *to = m.read((page as u64) << 12);
    }
    let vm = m.v.vm.clone();
    let mut harvest = |m: &Machine| {
        let pages: BTreeSet<u64> = if ring_bytes == 0 {
            let words = dirty::take(&vm, slot.id).unwrap();
            (0..RAM_BYTES >> 12).filter(|p| words[(p >> 6) as usize] >> (p & 63) & 1 != 0).collect()
        } else {
            let pages = readers.iter_mut().flat_map(Reader::take).collect();
            dirty::reset_rings(&vm);
            pages
        };
        for &page in &pages {
            copy[page as usize] = m.read(page << 12);
        }
        pages.len()
    };
    let (running, full) = (AtomicU32::new(vcpus.len() as u32), AtomicU32::new(0));
    thread::scope(|s| {
        for v in &mut vcpus {
            s.spawn(|| {
                loop {
                    match run::run(v) {
                        Exit::Hlt => break,
                        Exit::DirtyRingFull => full.fetch_add(1, Ordering::Relaxed),
                        other => panic!("{other:?}"),
                    };
                    thread::yield_now();
                }
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let (mut harvested, mut rounds) = (0, 0);
        while running.load(Ordering::SeqCst) != 0 {
            harvested += harvest(&m);
            rounds += 1;
            // The bound on rounds ends the test where nothing is ever protected again.
            if harvested > 4_000 || rounds > 200_000 {
                // SAFETY: guest memory of the test, written while vCPUs poll it.
                unsafe { ((slot.hva + STOP) as *mut u8).write_volatile(1) };
            }
        }
    });
    harvest(&m);
    copy[(STOP >> 12) as usize] = m.read(STOP & !0xfff); // the host's own write
    let lost: Vec<usize> = (0..copy.len()).filter(|&n| copy[n] != m.read::<4096>((n as u64) << 12)).collect();
    assert_eq!(lost, []);
    assert!(ring_bytes != 4096 || full.into_inner() > 0, "no ring was ever full");
}

#[test]
fn no_write_is_lost_with_the_bitmap() {
    no_write_is_lost(0);
}

#[test]
fn no_write_is_lost_with_small_rings() {
    no_write_is_lost(4096);
}

#[test]
fn no_write_is_lost_with_large_rings() {
    no_write_is_lost(1 << 16);
}

#[test]
fn what_finds_the_ring_full_comes_later() {
    let (m, slot, vcpus) = logged(1, 4096);
    let (v, pages) = (&vcpus[0], 300);
    for page in 0..pages {
        dirty::mark(v, &slot, page << 12);
        dirty::mark(v, &slot, page << 12);
    }
    let mut reader = Reader::new(v);
    assert_eq!(reader.take(), (0..256).collect::<Vec<_>>());
    assert!(v.shared.ring.as_ref().unwrap().lock().unwrap().is_soft_full());
    assert_eq!(dirty::reset_rings(&m.v.vm), 256);
    assert!(!v.shared.ring.as_ref().unwrap().lock().unwrap().is_soft_full());
    assert_eq!(reader.take(), (256..pages).collect::<Vec<_>>());
}

#[test]
fn user_space_may_write_anything_to_a_ring() {
    let (m, slot, vcpus) = logged(1, 4096);
    let v = &vcpus[0];
    let reader = Reader::new(v);
    // Entries that nothing was put into.
    (0..256).for_each(|n| reader.entry(n).0.store(2, Ordering::Relaxed));
    assert_eq!(dirty::reset_rings(&m.v.vm), 0);
    for (n, (id, offset)) in
        [(0, u64::MAX), (u32::MAX, 3), (0, 512), (0, 1 << 52), (1 << 16, 0)].into_iter().enumerate()
    {
        dirty::mark(v, &slot, (n as u64) << 12);
        let entry = reader.entry(n as u64);
        entry.1.store(id, Ordering::Relaxed);
        entry.2.store(offset, Ordering::Relaxed);
        entry.0.store(u32::MAX, Ordering::Relaxed);
    }
    assert_eq!(dirty::reset_rings(&m.v.vm), 5);
    // The pages whose entries were lost are not reported again, as no entry told that they were looked at.
    (0..5).for_each(|page| dirty::mark(v, &slot, page << 12));
    assert_eq!(reader.entry(5).0.load(Ordering::Relaxed) & 1, 0);
}
