//! Two vCPUs and the host: what one changes, the other notices, and nobody waits for ever.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exit, Vcpu};
use _engine::mem::{LOG_DIRTY, Slots};
use _engine::run;
use _engine::vm::request;
use common::*;
use std::thread;

/// Counter of the first vCPU, of the second, and a flag that stops both.
const COUNTERS: u64 = 0x10_0000;
const STOP: u64 = 0x10_1000;
/// Code that one vCPU calls and the other rewrites.
const PATCHED: u64 = 0x11_0000;

/// A second vCPU of `m`'s VM in the same state.
fn second(m: &Machine) -> Vcpu {
    let mut v = Vcpu::new(m.v.vm.clone(), 1).unwrap();
    let from = &m.v.cpu;
    let c = &mut v.cpu;
    (c.cr0, c.cr3, c.cr4, c.efer, c.xcr0) = (from.cr0, from.cr3, from.cr4, from.efer, from.xcr0);
    (c.segs, c.gdtr, c.idtr, c.tr, c.gpr) = (from.segs, from.gdtr, from.idtr, from.tr, from.gpr);
    c.gpr[4] = FREE - 0x400;
    v
}

/// `inc`s the counter at rbx until the flag at rcx is set, then halts.
const COUNT: &[u8] = &[0x48, 0xff, 0x03, 0x80, 0x39, 0x00, 0x74, 0xf8, 0xf4];

/// Run both vCPUs until they halt, `disturb` meanwhile.
fn both(m: &mut Machine, mut other: Vcpu, disturb: impl FnOnce(&Machine)) -> (Exit, Exit) {
    struct Alone(*mut Vcpu);
    // SAFETY: the thread below is the only one to use the vCPU until it is joined.
    unsafe impl Send for Alone {}
    let mine = Alone(&raw mut m.v);
    let first = thread::spawn(move || {
        let mine = mine;
        // SAFETY: see `Alone`; `m` outlives the thread, which is joined below.
        run::run(unsafe { &mut *mine.0 })
    });
    let second = thread::spawn(move || run::run(&mut other));
    disturb(m);
    (first.join().unwrap(), second.join().unwrap())
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
