//! Guest memory whose host pages are gone: an exit that names the page, the state that of before the instruction.

mod common;
use _engine::cpu::Exit;
use _engine::mem::{Slot, Slots};
use _engine::run;
use common::*;

/// RAM of the slot that goes away, mapped by the low 2 MiB's tables.
const LOST: u64 = 0x18_0000;
const BYTES: u64 = 0x4000;

/// A machine in 64-bit mode with a slot of four pages at `LOST`.
fn machine() -> (Machine, *mut u8) {
    let mut m = Machine::new(1 << 20);
    m.long_mode();
    // SAFETY: a fresh anonymous mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BYTES as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    let mut slots = m.v.vm.slots.read().unwrap().as_slice().to_vec();
    slots.push(Slot { id: 1, flags: 0, gpa: LOST, size: BYTES, hva: p as u64, first_page: 0 });
    m.v.vm.set_slots(Slots::new(slots));
    (m, p.cast())
}

fn protect(p: *mut u8, page: u64, protection: i32) {
    // SAFETY: pages of the test's own mapping.
    unsafe { libc::mprotect(p.add((page << 12) as usize).cast(), 4096, protection) };
}

/// Run `code` at FREE, with rbx at `at`, until the fault; then give the memory back and run on.
fn check(code: &[u8], at: u64, page: u64, kept: i32, touch_first: bool) {
    for interpret_only in [false, true] {
        let (mut m, p) = machine();
        m.v.interpret_only = interpret_only;
        m.write(FREE, code);
        m.write(FREE + code.len() as u64, &[0xf4]);
        let (rax, rcx) = (0x0102_0304_0506_0708, 0x800);
        let start = |m: &mut Machine| {
            let c = &mut m.v.cpu;
            (c.gpr[3], c.gpr[7], c.gpr[6], c.gpr[0], c.gpr[1], c.rip) = (at, at, FREE, rax, rcx, FREE);
        };
        if touch_first {
            // The TLB has the page before it goes.
            start(&mut m);
            assert_eq!(run::run(&mut m.v), Exit::Hlt, "{code:x?}");
        }
        start(&mut m);
        protect(p, page, kept);
        let exit = Exit::MemoryFault { gpa: LOST + (page << 12), private: false };
        assert_eq!(run::run(&mut m.v), exit, "{code:x?} {interpret_only}");
        assert_eq!(run::run(&mut m.v), exit, "it stays away");
        assert_eq!(m.v.cpu.rip, FREE, "{code:x?}");
        protect(p, page, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(run::run(&mut m.v), Exit::Hlt, "{code:x?}");
        // SAFETY: the test's own mapping.
        unsafe { libc::munmap(p.cast(), BYTES as usize) };
    }
}

#[test]
fn loads_and_stores() {
    let gone = libc::PROT_NONE;
    for touched in [false, true] {
        check(&[0x48, 0x8b, 0x03], LOST + 0x1010, 1, gone, touched); // mov rax, [rbx]
        check(&[0x48, 0x89, 0x03], LOST + 0x1010, 1, gone, touched); // mov [rbx], rax
        check(&[0x48, 0x89, 0x03], LOST + 0x1010, 1, libc::PROT_READ, touched);
        check(&[0xf0, 0x48, 0x01, 0x03], LOST + 0x1010, 1, gone, touched); // lock add [rbx], rax
        check(&[0x0f, 0x28, 0x03], LOST + 0x1010, 1, gone, touched); // movaps xmm0, [rbx]
        check(&[0xd9, 0x33], LOST + 0x1010, 1, gone, touched); // fnstenv [rbx]
        check(&[0x0f, 0xba, 0x2b, 5], LOST + 0x1010, 1, gone, touched); // bts dword [rbx], 5
        check(&[0xf3, 0xaa], LOST + 0x1010, 1, gone, touched); // rep stosb
        check(&[0xf3, 0xa4], LOST + 0x1010, 1, gone, touched); // rep movsb
    }
}

#[test]
fn operands_across_pages() {
    // Neither half is written: the instruction runs as a whole later.
    let (mut m, p) = machine();
    m.write(FREE, &[0x48, 0x01, 0x03, 0xf4]); // add [rbx], rax
    (m.v.cpu.gpr[3], m.v.cpu.gpr[0]) = (LOST + 0xffc, 0x0101_0101_0101_0101);
    protect(p, 1, libc::PROT_READ);
    assert_eq!(run::run(&mut m.v), Exit::MemoryFault { gpa: LOST + 0x1000, private: false });
    protect(p, 1, libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(run::run(&mut m.v), Exit::Hlt);
    // SAFETY: the test's own mapping.
    assert_eq!(unsafe { p.add(0xffc).cast::<u64>().read_unaligned() }, 0x0101_0101_0101_0101);
}

#[test]
fn a_repeated_move_stops_where_memory_ends() {
    for (code, at, step) in [(&[0xf3, 0xa4, 0xf4][..], LOST + 0xf00, 1), (&[0xfd, 0xf3, 0xa4, 0xf4], LOST + 0x20ff, -1)]
    {
        let (mut m, p) = machine();
        m.write(FREE, code);
        let from = 0x2_0000 + 0x800;
        m.write(from - 0x400, &[7; 0x800]);
        let c = &mut m.v.cpu;
        (c.gpr[7], c.gpr[6], c.gpr[1]) = (at, from, 0x200);
        protect(p, 1, libc::PROT_NONE);
        assert_eq!(run::run(&mut m.v), Exit::MemoryFault { gpa: LOST + 0x1000, private: false });
        assert_eq!((m.v.cpu.gpr[7], m.v.cpu.gpr[1]), (at.wrapping_add_signed(step * 0x100), 0x100));
        protect(p, 1, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(run::run(&mut m.v), Exit::Hlt);
        assert_eq!(m.v.cpu.gpr[1], 0);
        // SAFETY: the test's own mapping.
        assert_eq!(unsafe { p.add((at - LOST) as usize).offset(step as isize * 0x1ff).read() }, 7);
    }
}

#[test]
fn code_and_page_tables() {
    let (mut m, p) = machine();
    // SAFETY: the test's own mapping.
    unsafe { p.write(0xf4) };
    m.v.cpu.rip = LOST;
    protect(p, 0, libc::PROT_NONE);
    assert_eq!(run::run(&mut m.v), Exit::MemoryFault { gpa: LOST, private: false });
    protect(p, 0, libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(run::run(&mut m.v), Exit::Hlt);

    let (mut m, p) = machine();
    let top = m.read64(PML4);
    // SAFETY: the test's own mapping.
    unsafe { p.add(0x2000).cast::<u64>().write(top & !A) };
    m.write(FREE, &[0xf4]);
    m.v.cpu.cr3 = LOST + 0x2000;
    for kept in [libc::PROT_NONE, libc::PROT_READ] {
        // Read-only: its accessed bit cannot be set.
        protect(p, 2, kept);
        assert_eq!(run::run(&mut m.v), Exit::MemoryFault { gpa: LOST + 0x2000, private: false });
    }
    protect(p, 2, libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(run::run(&mut m.v), Exit::Hlt);
}
