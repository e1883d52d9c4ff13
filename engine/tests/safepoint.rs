//! Two vCPUs and the host: what one changes, the other notices, and nobody waits for ever.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exit, Vcpu};
use _engine::mem::{LOG_DIRTY, Slots};
use _engine::run;
use _engine::vm::request;
use common::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

/// Counter of the first vCPU, of the second, and a flag that stops both.
const COUNTERS: u64 = 0x10_0000;
const STOP: u64 = 0x10_1000;
/// Code that one vCPU calls and the other rewrites.
const PATCHED: u64 = 0x11_0000;

/// A second vCPU of `m`'s VM in the same state.
fn second(m: &Machine) -> Vcpu {
    m.another(1, FREE - 0x400)
}

/// `inc`s the counter at rbx until the flag at rcx is set, then halts.
const COUNT: &[u8] = &[0x48, 0xff, 0x03, 0x80, 0x39, 0x00, 0x74, 0xf8, 0xf4];

/// Run both vCPUs until they halt, `disturb` meanwhile.
fn both(m: &mut Machine, other: Vcpu, disturb: impl FnOnce(&Machine)) -> (Exit, Exit) {
    let (mine, others) = together(m, vec![other], disturb);
    (mine, others.into_iter().next().unwrap().0)
}

/// Run `m`'s vCPU and `others` until they halt, `disturb` meanwhile.
fn together(m: &mut Machine, others: Vec<Vcpu>, disturb: impl FnOnce(&Machine)) -> (Exit, Vec<(Exit, Vcpu)>) {
    struct Alone(*mut Vcpu);
    // SAFETY: the thread below is the only one to use the vCPU until it is joined.
    unsafe impl Send for Alone {}
    let mine = Alone(&raw mut m.v);
    let first = thread::spawn(move || {
        let mine = mine;
        // SAFETY: see `Alone`; `m` outlives the thread, which is joined below.
        run::run(unsafe { &mut *mine.0 })
    });
    let others: Vec<_> = others.into_iter().map(|mut v| thread::spawn(move || (run::run(&mut v), v))).collect();
    disturb(m);
    (first.join().unwrap(), others.into_iter().map(|t| t.join().unwrap()).collect())
}

fn wait_for(m: &Machine, gpa: u64, more_than: u64) {
    while m.read64(gpa) <= more_than {
        thread::yield_now();
    }
}

#[test]
fn slots_change_under_running_vcpus() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write(FREE, COUNT);
    let mut other = second(&m);
    for (v, n) in [(&mut m.v, 0), (&mut other, 1)] {
        (v.cpu.gpr[3], v.cpu.gpr[1]) = (COUNTERS + n * 8, STOP);
        v.cpu.rip = FREE;
    }
    let vm = m.v.vm.clone();
    let exits = both(&mut m, other, |m| {
        let slot = vm.slots.read().unwrap().as_slice()[0];
        for round in 0..50 {
            // Dirty logging goes on and off: every TLB entry and translation goes.
            let flags = if round % 2 == 0 { LOG_DIRTY } else { 0 };
            let before = (m.read64(COUNTERS), m.read64(COUNTERS + 8));
            vm.set_slots(Slots::new(vec![_engine::mem::Slot { flags, ..slot }]));
            wait_for(m, COUNTERS, before.0);
            wait_for(m, COUNTERS + 8, before.1);
        }
        stop(m);
    });
    assert_eq!(exits, (Exit::Hlt, Exit::Hlt));
}

fn stop(m: &Machine) {
    let slot = m.v.vm.slots.read().unwrap().as_slice()[0];
    // SAFETY: guest memory of the test, written while vCPUs poll it.
    unsafe { ((slot.hva + STOP) as *mut u8).write_volatile(1) };
}

#[test]
fn one_vcpu_patches_what_the_other_runs() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // First: call the patched function until it returns 100.
    //   again: call [rip + ...] via rdx; cmp eax, 100; jne again; hlt
    m.write(FREE, &[0xff, 0xd2, 0x83, 0xf8, 100, 0x75, 0xf9, 0xf4]);
    // mov eax, 0; ret
    m.write(PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3]);
    // Second: write 1, 2, … 100 into the immediate, with a pause in between.
    //   next: inc byte [rdx + 1]; mov ecx, 20000; spin: dec ecx; jnz spin; cmp byte [rdx + 1], 100; jne next; hlt
    m.write(
        FREE + 0x1000,
        &[0xfe, 0x42, 0x01, 0xb9, 0x20, 0x4e, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0x80, 0x7a, 0x01, 100, 0x75, 0xee, 0xf4],
    );
    let mut other = second(&m);
    (m.v.cpu.gpr[2], m.v.cpu.rip) = (PATCHED, FREE);
    (other.cpu.gpr[2], other.cpu.rip) = (PATCHED, FREE + 0x1000);
    let exits = both(&mut m, other, |_| {});
    assert_eq!(exits, (Exit::Hlt, Exit::Hlt));
    assert_eq!(m.v.cpu.gpr[0], 100);
}

#[test]
fn locked_increments_add_up_even_across_pages() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // again: lock inc qword [rbx]; dec rcx; jnz again; hlt
    m.write(FREE, &[0xf0, 0x48, 0xff, 0x03, 0x48, 0xff, 0xc9, 0x75, 0xf7, 0xf4]);
    for counter in [COUNTERS, COUNTERS + 0xffc] {
        let mut other = second(&m);
        for v in [&mut m.v, &mut other] {
            (v.cpu.gpr[3], v.cpu.gpr[1], v.cpu.rip) = (counter, 3000, FREE);
        }
        m.write64(counter, 0);
        assert_eq!(both(&mut m, other, |_| {}), (Exit::Hlt, Exit::Hlt));
        assert_eq!(m.read64(counter), 6000, "counter at {counter:#x}");
    }
}

/// The upper half of what one vCPU increments is code that the other runs: between a look at that and the locked operation, the
/// page turns into one with code.
#[test]
fn a_locked_operand_may_reach_into_code() {
    const ROUNDS: u64 = 20_000;
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // again: lock inc qword [rbx]; dec rcx; jnz again; hlt
    m.write(FREE, &[0xf0, 0x48, 0xff, 0x03, 0x48, 0xff, 0xc9, 0x75, 0xf7, 0xf4]);
    // again: call rdx; dec rcx; jnz again; hlt
    m.write(FREE + 0x1000, &[0xff, 0xd2, 0x48, 0xff, 0xc9, 0x75, 0xf9, 0xf4]);
    // ret
    m.write(PATCHED, &[0xc3]);
    let mut other = second(&m);
    (m.v.cpu.gpr[3], m.v.cpu.gpr[1], m.v.cpu.rip) = (PATCHED - 4, ROUNDS, FREE);
    (other.cpu.gpr[2], other.cpu.gpr[1], other.cpu.rip) = (PATCHED, ROUNDS, FREE + 0x1000);
    assert_eq!(both(&mut m, other, |_| {}), (Exit::Hlt, Exit::Hlt));
    assert_eq!(m.read64(PATCHED - 4), 0xc3 << 32 | ROUNDS);
}

/// Others change the slots before and after a vCPU has the machine to itself.
#[test]
fn a_vcpu_is_up_to_date_around_a_safepoint() {
    let mut m = Machine::new(4 << 20);
    let vm = m.v.vm.clone();
    let running = AtomicBool::new(true);
    let outdated = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let slots = vm.slots.read().unwrap().clone();
                while running.load(Relaxed) {
                    vm.set_slots(Slots::clone(&slots));
                }
            });
        }
        let v = &mut m.v;
        let is_current = |v: &Vcpu| Arc::ptr_eq(&v.slots, &vm.slots.read().unwrap());
        let mut outdated = 0;
        for _ in 0..100_000 {
            vm.start_running(&v.shared);
            v.refresh();
            outdated += v.exclusive(|v, _| !is_current(v)) as u32;
            outdated += !is_current(v) as u32;
            vm.stop_running(&v.shared);
        }
        running.store(false, Relaxed);
        outdated
    });
    assert_eq!(outdated, 0);
}

#[test]
fn a_kick_gets_through_to_a_tight_loop() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write(FREE, &[0xeb, 0xfe]); // jmp $
    let mut other = second(&m);
    (m.v.cpu.rip, other.cpu.rip) = (FREE, FREE);
    let shared = [m.v.shared.clone(), other.shared.clone()];
    let exits = both(&mut m, other, |_| {
        for s in &shared {
            s.request(request::EXIT);
        }
    });
    assert_eq!(exits, (Exit::Intr, Exit::Intr));
}

/// One vCPU maps a page elsewhere, tells two others, waits until both have flushed it, and only then spoils the old page:
/// neither may see that. The host has every translation dropped and every write logged meanwhile, on and off.
#[test]
fn no_translation_outlives_its_shootdown() {
    const TABLE: u64 = 0x12_0000;
    const PAGES: [u64; 2] = [0x13_0000, 0x13_1000];
    const WINDOW: u64 = 0x20_0000;
    const FLAGS: u64 = 0x63; // present, writable, accessed, dirty
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write64(PML4 + 0x2000 + 8, TABLE | 3);
    m.write64(TABLE, PAGES[0] | FLAGS);
    // again: mov rax, [rbx]; cmp rax, rsi; je same; mov rsi, rax; invlpg [rdx]; mov [rcx], rsi
    // same: mov rdi, [rdx]; cmp edi, 0xdead; je stale; cmp byte [r8], 0; je again; hlt
    // stale: mov r9d, 1; mov byte [r8], 1; hlt
    m.write(
        FREE,
        &[
            0x48, 0x8b, 0x03, 0x48, 0x39, 0xf0, 0x74, 0x09, 0x48, 0x89, 0xc6, 0x0f, 0x01, 0x3a, 0x48, 0x89, 0x31, 0x48,
            0x8b, 0x3a, 0x81, 0xff, 0xad, 0xde, 0, 0, 0x74, 0x07, 0x41, 0x80, 0x38, 0x00, 0x74, 0xde, 0xf4, 0x41, 0xb9,
            1, 0, 0, 0, 0x41, 0xc6, 0x00, 0x01, 0xf4,
        ],
    );
    // again: mov qword [r13], 1; mov [rdx], r11; inc qword [rbx]; mov rax, [rbx]
    // wait: cmp byte [r8], 0; jne end; cmp [rcx], rax; jne wait; cmp [rcx + 8], rax; jne wait
    // mov qword [r12], 0xdead; xchg r10, r11; xchg r12, r13; dec rbp; jnz again; end: mov byte [r8], 1; hlt
    m.write(
        FREE + 0x1000,
        &[
            0x49, 0xc7, 0x45, 0x00, 1, 0, 0, 0, 0x4c, 0x89, 0x1a, 0x48, 0xff, 0x03, 0x48, 0x8b, 0x03, 0x41, 0x80, 0x38,
            0x00, 0x75, 0x1e, 0x48, 0x39, 0x01, 0x75, 0xf5, 0x48, 0x39, 0x41, 0x08, 0x75, 0xef, 0x49, 0xc7, 0x04, 0x24,
            0xad, 0xde, 0, 0, 0x4d, 0x87, 0xda, 0x4d, 0x87, 0xec, 0x48, 0xff, 0xcd, 0x75, 0xcb, 0x41, 0xc6, 0x00, 0x01,
            0xf4,
        ],
    );
    let (epoch, acknowledged) = (COUNTERS, COUNTERS + 0x100);
    let mut readers = vec![second(&m), m.another(2, FREE - 0x600)];
    for (n, v) in readers.iter_mut().enumerate() {
        let c = &mut v.cpu;
        (c.gpr[3], c.gpr[1], c.gpr[2], c.gpr[8]) = (epoch, acknowledged + 8 * n as u64, WINDOW, STOP);
        (c.gpr[6], c.gpr[9], c.rip) = (0, 0, FREE);
    }
    let c = &mut m.v.cpu;
    (c.gpr[3], c.gpr[1], c.gpr[2], c.gpr[8], c.gpr[5]) = (epoch, acknowledged, TABLE, STOP, 100);
    (c.gpr[10], c.gpr[11]) = (PAGES[0] | FLAGS, PAGES[1] | FLAGS);
    (c.gpr[12], c.gpr[13], c.rip) = (PAGES[0], PAGES[1], FREE + 0x1000);
    let vm = m.v.vm.clone();
    let (mine, readers) = together(&mut m, readers, |m| {
        let slot = vm.slots.read().unwrap().as_slice()[0];
        let mut flags = 0;
        while m.read64(STOP) == 0 {
            flags ^= LOG_DIRTY;
            let before = m.read64(epoch);
            vm.set_slots(Slots::new(vec![_engine::mem::Slot { flags, ..slot }]));
            while m.read64(epoch) == before && m.read64(STOP) == 0 {
                thread::yield_now();
            }
        }
    });
    assert_eq!(mine, Exit::Hlt);
    for (exit, v) in readers {
        assert_eq!((exit, v.cpu.gpr[9]), (Exit::Hlt, 0), "read through a translation that was shot down");
    }
    assert_eq!(m.read64(epoch), 100);
}
