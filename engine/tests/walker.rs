//! The page walker: every paging mode, permission and reserved bit, by its error code (Intel SDM volume 3,
//! chapter 4; 4.7 for the code's bits).

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exception, cr0, cr4, efer, mmu_mode};
use _engine::mem::{LOG_DIRTY, READONLY, Slot, Slots};
use _engine::mmu::{self, Intent, Page, walk};
use common::*;

use Intent::{Execute, Read, Write};
use mmu_mode::{KERNEL, KERNEL_AC, USER};

const PDPT: u64 = PML4 + 0x1000;
const PD: u64 = PML4 + 0x2000;
const PT: u64 = PML4 + 0x3000;
/// The page that the tests map: entry 0x40 of the page table.
const LA: u64 = 0x4_0123;
const PTE: u64 = PT + 0x40 * 8;
const TO: u64 = 0x9_9000;

fn fault(code: u32, la: u64) -> Exception {
    Exception::page_fault(code, la)
}

/// 64-bit mode with one entry of interest.
fn long(pte: u64) -> Machine {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write64(PTE, pte);
    m
}

/// Error code of the walk, or `None` if it succeeds.
fn code(m: &Machine, intent: Intent, mode: usize) -> Option<u32> {
    match walk(&m.v, LA, intent, mode) {
        Ok(page) => {
            assert_eq!(page.gpa, TO);
            None
        }
        Err(e) => {
            assert_eq!((e.vector, e.payload), (14, LA));
            e.error
        }
    }
}

#[test]
fn permissions() {
    // Entry; CR0.WP, SMEP, SMAP; then read, write, execute as user, as kernel, as kernel with AC.
    let smep = cr4::SMEP;
    let smap = cr4::SMAP;
    type Row = [Option<u32>; 9];
    let rows: &[(u64, bool, u64, Row)] = &[
        (0, true, 0, [Some(4), Some(6), Some(0x14), Some(0), Some(2), Some(0x10), Some(0), Some(2), Some(0x10)]),
        (P | W | U, true, 0, [None; 9]),
        (P | U, true, 0, [None, Some(7), None, None, Some(3), None, None, Some(3), None]),
        (P | U, false, 0, [None, Some(7), None, None, None, None, None, None, None]),
        (P | W, true, 0, [Some(5), Some(7), Some(0x15), None, None, None, None, None, None]),
        (P, true, 0, [Some(5), Some(7), Some(0x15), None, Some(3), None, None, Some(3), None]),
        (P | W | U | NX, true, 0, [None, None, Some(0x15), None, None, Some(0x11), None, None, Some(0x11)]),
        (P | W | U, true, smep, [None, None, None, None, None, Some(0x11), None, None, Some(0x11)]),
        (P | W | U, true, smap, [None, None, None, Some(1), Some(3), None, None, None, None]),
        (P | W | U, false, smap, [None, None, None, Some(1), Some(3), None, None, None, None]),
        (P | W, true, smep | smap, [Some(5), Some(7), Some(0x15), None, None, None, None, None, None]),
    ];
    for (flags, wp, extra, expected) in rows {
        let mut m = long(if *flags & P != 0 { TO | flags } else { TO });
        m.v.cpu.cr4 |= extra;
        if !wp {
            m.v.cpu.cr0 &= !cr0::WP;
        }
        let mut got = Vec::new();
        for mode in [USER, KERNEL, KERNEL_AC] {
            for intent in [Read, Write, Execute] {
                got.push(code(&m, intent, mode));
            }
        }
        assert_eq!(got, expected, "entry flags {flags:#x}, WP {wp}, CR4 {extra:#x}");
    }
}

#[test]
fn upper_levels_restrict() {
    for table in [PML4, PDPT, PD] {
        let mut m = long(TO | P | W | U);
        let entry = m.read64(table);
        m.write64(table, entry & !U);
        assert_eq!(code(&m, Read, USER), Some(5), "no U in {table:#x}");
        m.write64(table, entry & !W);
        assert_eq!(code(&m, Write, USER), Some(7), "no W in {table:#x}");
        m.write64(table, entry | NX);
        assert_eq!(code(&m, Execute, USER), Some(0x15), "NX in {table:#x}");
        m.write64(table, entry & !P);
        assert_eq!(code(&m, Read, USER), Some(4), "no P in {table:#x}");
    }
}

#[test]
fn reserved_bits() {
    let rows = [
        (PML4, PS, true, "page size at level 4"),
        (PML4, 1 << 46, true, "beyond the physical address"),
        (PDPT, 1 << 51, true, "beyond the physical address"),
        (PD, 1 << 47, true, "beyond the physical address"),
        (PTE, 1 << 46, true, "beyond the physical address"),
        (PTE, 1 << 52, false, "ignored"),
        (PTE, 1 << 62, false, "ignored"),
        (PTE, 7 << 9, false, "ignored"),
        (PTE, PS, false, "PAT"),
    ];
    for (table, bits, reserved, what) in rows {
        let mut m = long(TO | P | W | U);
        let entry = m.read64(table);
        m.write64(table, entry | bits);
        let expected = reserved.then_some(0xd);
        assert_eq!(code(&m, Read, USER), expected, "{what}: {bits:#x} in {table:#x}");
    }
    // Without EFER.NXE, NX is reserved, and I is not reported.
    let mut m = long(TO | P | W | U | NX);
    m.v.cpu.efer &= !efer::NXE;
    assert_eq!(code(&m, Read, USER), Some(0xd));
    assert_eq!(code(&m, Execute, USER), Some(0xd));
    m.v.cpu.cr4 |= cr4::SMEP;
    assert_eq!(code(&m, Execute, USER), Some(0x1d));
}

#[test]
fn large_pages() {
    let mut m = long(0);
    // 2 MiB at linear 2 MiB, 1 GiB at linear 1 GiB.
    m.write64(PD + 8, 0x40_0000 | P | W | U | PS | 1 << 12);
    m.write64(PDPT + 8, 0x8000_0000 | P | W | U | PS | G);
    m.v.cpu.cr4 |= cr4::PGE;
    assert_eq!(walk(&m.v, 0x2a_bcde, Read, USER), Ok(Page { gpa: 0x4a_b000, writable: false, global: false }));
    assert_eq!(m.read64(PD + 8) & (A | D), A);
    assert_eq!(walk(&m.v, 0x4567_89ab, Write, USER), Ok(Page { gpa: 0x8567_8000, writable: true, global: true }));
    assert_eq!(m.read64(PDPT + 8) & (A | D), A | D);
    for (table, bit) in [(PD + 8, 1 << 13), (PD + 8, 1 << 20), (PDPT + 8, 1 << 13), (PDPT + 8, 1 << 29)] {
        let entry = m.read64(table);
        m.write64(table, entry | bit);
        let la = if table == PD + 8 { 0x20_0000 } else { 0x4000_0000 };
        assert_eq!(walk(&m.v, la, Write, USER), Err(fault(0xf, la)), "{bit:#x} in {table:#x}");
        m.write64(table, entry);
    }
}

#[test]
fn accessed_and_dirty() {
    let mut m = long(TO | P | W | U);
    let upper = |m: &Machine| [PML4, PDPT, PD].map(|t| m.read64(t) & (A | D));
    // A walk that fails leaves the leaf alone.
    m.write64(PTE, TO | P | U);
    assert_eq!(code(&m, Write, USER), Some(7));
    assert_eq!(m.read64(PTE), TO | P | U);
    m.write64(PTE, TO | P | W | U);
    assert_eq!(walk(&m.v, LA, Read, USER), Ok(Page { gpa: TO, writable: false, global: false }));
    assert_eq!((upper(&m), m.read64(PTE) & (A | D)), ([A; 3], A));
    assert_eq!(walk(&m.v, LA, Write, USER), Ok(Page { gpa: TO, writable: true, global: false }));
    assert_eq!((upper(&m), m.read64(PTE) & (A | D)), ([A; 3], A | D));
    // Now dirty: a read says that writes may go straight there.
    assert_eq!(walk(&m.v, LA, Read, USER), Ok(Page { gpa: TO, writable: true, global: false }));
}

#[test]
fn tables_outside_memory_are_all_ones() {
    // Reserved bits are set there, so the fault says RSVD; nothing is written.
    let mut m = long(TO | P | W | U);
    for table in [PML4, PDPT, PD] {
        let entry = m.read64(table);
        m.write64(table, 0x30_0000_0000 | P | W | U);
        assert_eq!(code(&m, Write, USER), Some(0xf));
        m.write64(table, entry);
    }
    m.v.cpu.cr3 = 0x3f_ffff_f000;
    assert_eq!(code(&m, Read, KERNEL), Some(9));
}

#[test]
fn canonical_addresses() {
    let m = long(0);
    for la in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
        assert_eq!(walk(&m.v, la, Read, KERNEL), Err(Exception::gp(0)), "{la:#x}");
    }
    for la in [0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
        assert_eq!(walk(&m.v, la, Read, KERNEL), Err(fault(0, la)), "{la:#x}");
    }
}

#[test]
fn without_paging() {
    let m = Machine::new(1 << 20);
    for (la, gpa) in [(0x1234, 0x1000), (0xffff_ffff, 0xffff_f000), (0x1_0000_2345, 0x2000)] {
        assert_eq!(walk(&m.v, la, Write, KERNEL), Ok(Page { gpa, writable: true, global: false }));
    }
}

#[test]
fn two_level_paging() {
    let mut m = Machine::new(4 << 20);
    let (directory, table) = (0x1000u64, 0x2000u64);
    m.v.cpu.cr0 = cr0::PE | cr0::PG | cr0::WP;
    m.v.cpu.cr3 = directory | 0x18; // PCD and PWT are no part of the address
    let put = |m: &mut Machine, at: u64, value: u64| m.write(at, &(value as u32).to_le_bytes());
    let get = |m: &Machine, at: u64| u32::from_le_bytes(m.read(at)) as u64;
    put(&mut m, directory + 4 * 0x300, table | P | W | U);
    put(&mut m, table + 4 * 0x12, 0x5000 | P | U);
    let la = 0xc001_2345;
    assert_eq!(walk(&m.v, la, Read, USER), Ok(Page { gpa: 0x5000, writable: false, global: false }));
    assert_eq!((get(&m, directory + 4 * 0x300) & (A | D), get(&m, table + 4 * 0x12) & (A | D)), (A, A));
    assert_eq!(walk(&m.v, la, Write, USER), Err(fault(7, la)));
    assert_eq!(walk(&m.v, la, Write, KERNEL), Err(fault(3, la)));
    m.v.cpu.cr0 &= !cr0::WP;
    assert_eq!(walk(&m.v, la, Write, KERNEL), Ok(Page { gpa: 0x5000, writable: true, global: false }));
    assert_eq!(get(&m, table + 4 * 0x12) & (A | D), A | D);
    // No NX here: I is not reported without SMEP, nor does EFER.NXE make it so without PAE.
    m.v.cpu.efer = efer::NXE;
    assert_eq!(walk(&m.v, 0x1000, Execute, USER), Err(fault(4, 0x1000)));
    // 4 MiB pages, with eight bits of the address above 4 GiB, under CR4.PSE.
    let large = 0x0080_0000 | 3 << 13 | P | W | U | PS;
    put(&mut m, directory + 4, large);
    m.v.cpu.cr4 = cr4::PSE;
    let la = 0x0065_4321;
    assert_eq!(walk(&m.v, la, Write, USER), Ok(Page { gpa: 0x3_00a5_4000, writable: true, global: false }));
    assert_eq!(get(&m, directory + 4) & (A | D), A | D);
    put(&mut m, directory + 4, large | 1 << 21);
    assert_eq!(walk(&m.v, la, Read, USER), Err(fault(0xd, la)));
}

#[test]
fn pae_paging() {
    let mut m = Machine::new(4 << 20);
    let (pointers, directory, table) = (0x1020u64, 0x2000u64, 0x3000u64);
    m.v.cpu.cr0 = cr0::PE | cr0::PG | cr0::WP;
    m.v.cpu.cr4 = cr4::PAE;
    m.v.cpu.efer = efer::NXE;
    m.v.cpu.cr3 = pointers;
    // Pointer entries have no W and U. They are those of when CR3 was loaded.
    m.write64(pointers + 3 * 8, directory | P);
    assert!(mmu::load_pdptrs(&mut m.v, pointers));
    m.write64(pointers + 3 * 8, 0);
    m.write64(directory + 8 * 5, table | P | W | U);
    m.write64(table + 8 * 7, 0x1_2345_6000 | P | W | U | NX);
    let la = 3 << 30 | 5 << 21 | 7 << 12 | 0x89;
    assert_eq!(walk(&m.v, la, Write, USER), Ok(Page { gpa: 0x1_2345_6000, writable: true, global: false }));
    assert_eq!(m.read64(pointers + 3 * 8), 0, "no accessed bit there");
    assert_eq!(walk(&m.v, la, Execute, USER), Err(fault(0x15, la)));
    m.write64(table + 8 * 7, 0x5000 | P | 1 << 52);
    assert_eq!(walk(&m.v, la, Read, KERNEL), Err(fault(9, la)), "bits 52 to 62 are reserved");
    m.write64(directory + 8 * 6, 0x20_0000 | P | W | PS);
    let la = 3 << 30 | 6 << 21 | 0x12_3456;
    assert_eq!(walk(&m.v, la, Read, KERNEL), Ok(Page { gpa: 0x32_3000, writable: false, global: false }));
    // What loading CR3 makes of them.
    assert!(mmu::load_pdptrs(&mut m.v, pointers));
    m.write64(pointers, directory | P | W);
    assert!(!mmu::load_pdptrs(&mut m.v, pointers));
    m.write64(pointers, directory | W);
    assert!(mmu::load_pdptrs(&mut m.v, pointers), "not present");
    assert!(!mmu::load_pdptrs(&mut m.v, 0x4000_0000), "not in memory");
}

#[test]
fn what_the_tlb_holds() {
    let mut m = long(TO | P | W | U);
    // Clean: a read fills for reads alone. A write sets the dirty bit and fills for both.
    let e = mmu::fill(&mut m.v, LA, false, USER).unwrap().unwrap();
    assert_eq!((e.read, e.write == LA & !0xfff), (LA & !0xfff, false));
    let e = mmu::fill(&mut m.v, LA, true, USER).unwrap().unwrap();
    assert_eq!((e.read, e.write), (LA & !0xfff, LA & !0xfff));
    mmu::flush_page(&mut m.v, LA);
    let e = mmu::fill(&mut m.v, LA, false, USER).unwrap().unwrap();
    assert_eq!((e.read, e.write), (LA & !0xfff, LA & !0xfff), "dirty already");
    // A page with code is read directly, never written.
    m.v.vm.code.set(TO, true);
    assert!(mmu::fill(&mut m.v, LA, true, USER).unwrap().is_none());
    let e = mmu::fill(&mut m.v, LA, false, USER).unwrap().unwrap();
    assert_ne!(e.write, LA & !0xfff);
    // What is not memory is never in it.
    m.write64(PTE, 0x4000_0000 | P | W | U);
    assert!(mmu::fill(&mut m.v, LA, false, USER).unwrap().is_none());
}

#[test]
fn read_only_and_logged_slots_are_not_written_directly() {
    for flags in [READONLY, LOG_DIRTY] {
        let mut m = Machine::new(4 << 20);
        m.long_mode();
        m.write64(PTE, TO | P | W | U | A | D);
        let slot = m.v.slots.as_slice()[0];
        let part = |gpa: u64, size: u64, flags, id| Slot { id, flags, gpa, size, hva: slot.hva + gpa, first_page: 0 };
        m.v.vm.set_slots(Slots::new(vec![
            part(0, TO, 0, 0),
            part(TO, 0x1000, flags, 1),
            part(TO + 0x1000, slot.size - TO - 0x1000, 0, 2),
        ]));
        m.v.refresh();
        assert!(mmu::fill(&mut m.v, LA, true, USER).unwrap().is_none());
        let e = mmu::fill(&mut m.v, LA, false, USER).unwrap().unwrap();
        assert_eq!((e.read, e.host), (LA & !0xfff, slot.hva + TO));
        assert_ne!(e.write, LA & !0xfff);
    }
}

#[test]
fn flushes() {
    let mut m = long(TO | P | W | U);
    m.v.cpu.cr4 |= cr4::PGE;
    let other = LA + 0x1000;
    m.write64(PTE + 8, (TO + 0x1000) | P | W | U | G);
    let has = |m: &Machine, la: u64| m.v.cpu.tlb[USER][mmu::index(la)].read == la & !0xfff;
    let fill = |m: &mut Machine| {
        for la in [LA, other] {
            mmu::fill(&mut m.v, la, false, USER).unwrap().unwrap();
            assert!(has(m, la));
        }
    };
    fill(&mut m);
    mmu::flush_non_global(&mut m.v);
    assert_eq!((has(&m, LA), has(&m, other)), (false, true));
    fill(&mut m);
    mmu::flush_page(&mut m.v, other);
    assert_eq!((has(&m, LA), has(&m, other)), (true, false));
    fill(&mut m);
    mmu::flush_all(&mut m.v);
    assert_eq!((has(&m, LA), has(&m, other)), (false, false));
    // More fills than the log holds.
    for _ in 0..3000 {
        mmu::fill(&mut m.v, LA, false, USER).unwrap();
    }
    fill(&mut m);
    mmu::flush_non_global(&mut m.v);
    assert_eq!((has(&m, LA), has(&m, other)), (false, true));
}

#[test]
fn fetches_follow_flushes() {
    let mut m = long(TO | P | U);
    m.v.cpu.cr4 |= cr4::PGE;
    assert_eq!(mmu::fetch_page(&mut m.v, LA).unwrap().gpa, TO);
    m.write64(PTE, 0x5_5000 | P | G);
    assert_eq!(mmu::fetch_page(&mut m.v, LA).unwrap().gpa, TO, "cached until flushed");
    mmu::flush_non_global(&mut m.v);
    assert_eq!(mmu::fetch_page(&mut m.v, LA).unwrap().gpa, 0x5_5000);
    m.write64(PTE, TO | P | G);
    mmu::flush_non_global(&mut m.v);
    assert_eq!(mmu::fetch_page(&mut m.v, LA).unwrap().gpa, 0x5_5000, "global");
    mmu::flush_page(&mut m.v, LA);
    assert_eq!(mmu::fetch_page(&mut m.v, LA).unwrap().gpa, TO);
}
