//! Two to four vCPUs at once: the order in which they see each other's stores, shootdowns by interrupts, code that changes.
//!
//! `KVMKIT_CASES` sets how many times each test is repeated, each time in another of a dozen ways.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exit, RBP, RBX, RDI, RDX, RSI, Vcpu, mp_state};
use _engine::lapic;
use _engine::mem::{LOG_DIRTY, Slot, Slots};
use _engine::vm::Vm;
use _engine::{dirty, run};
use common::native::number;
use common::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// What all wait for each other with: a counter.
const BARRIER: u64 = 0x8_0000;
/// Where a vCPU that has seen something wrong says so.
const WRONG: u64 = 0x8_0040;
/// What a vCPU has seen, 8 bytes for each round.
const SEEN: u64 = 0x9_0000;
const SEEN_BYTES: u64 = 0x1_0000;
/// The first variables.
const VARIABLES: u64 = 0xe_0000;

fn repetitions(default: u64) -> usize {
    number("KVMKIT_CASES", default) as usize
}

/// A 64-bit word of guest memory that vCPUs write meanwhile.
fn word(m: &Machine, gpa: u64) -> &AtomicU64 {
    let hva = m.v.vm.slots.read().unwrap().hva(gpa, 8).unwrap();
    // SAFETY: aligned, in memory that lives as long as the machine.
    unsafe { &*hva.cast() }
}

/// Code with short jumps.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }
    fn here(&self) -> usize {
        self.0.len()
    }
    /// The short jump `opcode` back to `target`.
    fn back(&mut self, opcode: u8, target: usize) -> &mut Self {
        let distance = target as i64 - (self.here() as i64 + 2);
        self.put(&[opcode, i8::try_from(distance).unwrap() as u8])
    }
    /// The short jump `opcode` to where `land` is told of it.
    fn ahead(&mut self, opcode: u8) -> usize {
        self.put(&[opcode, 0]).here()
    }
    fn land(&mut self, jump: usize) -> &mut Self {
        self.0[jump - 1] = i8::try_from(self.here() - jump).unwrap() as u8;
        self
    }
    /// Wait until all of `count` vCPUs are here: r13 at the barrier, r14 what it was before.
    fn barrier(&mut self, count: u8) -> &mut Self {
        // add r14, count; lock inc qword [r13]
        self.put(&[0x49, 0x83, 0xc6, count, 0xf0, 0x49, 0xff, 0x45, 0x00]);
        self.wait(&[0x4d, 0x39, 0x75, 0x00]) // cmp [r13], r14
    }
    /// Wait until what `compare` compares isn't below.
    fn wait(&mut self, compare: &[u8]) -> &mut Self {
        let start = self.ahead(0xeb);
        let again = self.here();
        self.put(&[0xf3, 0x90]).land(start).put(compare).back(0x72, again)
    }
}

const JE: u8 = 0x74;
const JNE: u8 = 0x75;
const JMP: u8 = 0xeb;
const HLT: u8 = 0xf4;
/// out 0, al: the end where HLT waits for interrupts.
const OUT: &[u8] = &[0xe6, 0];

/// What the host does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Host {
    Waits,
    /// Switches logging of writes on and off, by which all translations go, and takes the log.
    Disturbs,
}

/// Run all until they are done.
fn all(m: &Machine, vcpus: &mut [Vcpu], host: Host) {
    let (vm, progress, halted) = (&*m.v.vm, word(m, BARRIER), AtomicBool::new(false));
    let exits: Vec<Exit> = thread::scope(|scope| {
        if host == Host::Disturbs {
            scope.spawn(|| disturb(vm, progress, &halted));
        }
        let threads: Vec<_> = vcpus.iter_mut().map(|v| scope.spawn(|| run::run(v))).collect();
        let exits = threads.into_iter().map(|t| t.join().unwrap()).collect();
        halted.store(true, Ordering::SeqCst);
        exits
    });
    assert!(exits.iter().all(|exit| matches!(exit, Exit::Hlt | Exit::Io { port: 0, .. })), "{exits:?}");
}

fn disturb(vm: &Vm, progress: &AtomicU64, halted: &AtomicBool) {
    let slot = vm.slots.read().unwrap().as_slice()[0];
    let mut on = true;
    while !halted.load(Ordering::SeqCst) {
        let before = progress.load(Ordering::SeqCst);
        let flags = if on { LOG_DIRTY } else { 0 };
        vm.dirty.set_slot(slot.id, on, slot.size, false);
        vm.set_slots(Slots::new(vec![Slot { flags, ..slot }]));
        for _ in 0..3 {
            dirty::take(vm, slot.id);
            // They get on in between.
            while progress.load(Ordering::SeqCst) < before + 16 && !halted.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        }
        on = !on;
    }
}

/// A litmus test: what each vCPU does to the variables x at rbx and y at rbx + 64, zero before. What it sees it leaves in eax
/// and ecx, which are zero before, too.
struct Litmus {
    name: &'static str,
    vcpus: Vec<Vec<u8>>,
    /// May it end so? By vCPU, eax and ecx; and x and y at last.
    allowed: fn(&[[u32; 2]], u32, u32) -> bool,
    /// What may be seen, but not on a machine that is sequentially consistent.
    relaxed: fn(&[[u32; 2]]) -> bool,
}

const X: u8 = 0;
const Y: u8 = 64;
const MFENCE: &[u8] = &[0x0f, 0xae, 0xf0];
/// lock or dword [rsp - 64], 0
const LOCK_OR: &[u8] = &[0xf0, 0x83, 0x4c, 0x24, 0xc0, 0x00];

fn store(variable: u8, value: u8) -> Vec<u8> {
    vec![0xc7, 0x43, variable, value, 0, 0, 0]
}
/// To eax.
fn load(variable: u8) -> Vec<u8> {
    vec![0x8b, 0x43, variable]
}
/// To ecx.
fn load_2(variable: u8) -> Vec<u8> {
    vec![0x8b, 0x4b, variable]
}
/// mov edx, 1; xchg [variable], edx
fn exchange(variable: u8) -> Vec<u8> {
    vec![0xba, 1, 0, 0, 0, 0x87, 0x53, variable]
}
/// Instructions that serialize, with eax and ecx zero afterwards; rbx and rdx stay.
fn serializing() -> Vec<(&'static str, Vec<u8>)> {
    let clear = [0x31, 0xc0, 0x31, 0xc9];
    // mov rsi, rbx; cpuid; mov rbx, rsi
    let cpuid = [&[0x48, 0x89, 0xde, 0x0f, 0xa2, 0x48, 0x89, 0xf3][..], &clear].concat();
    // mov rax, cr3; mov cr3, rax
    let cr3 = [&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8][..], &clear].concat();
    // mov rax, rsp; mov edx, ss; push rdx; push rax; pushfq; mov edx, cs; push rdx; lea rdx, [rip + 3]; push rdx; iretq
    let iret = [
        &[
            0x48, 0x89, 0xe0, 0x8c, 0xd2, 0x52, 0x50, 0x9c, 0x8c, 0xca, 0x52, 0x48, 0x8d, 0x15, 3, 0, 0, 0, 0x52, 0x48,
            0xcf,
        ][..],
        &clear,
    ]
    .concat();
    vec![("CPUID", cpuid), ("MOV to CR3", cr3), ("INVLPG", vec![0x0f, 0x01, 0x3b]), ("IRET", iret)]
}

fn litmus_tests() -> Vec<Litmus> {
    let never: fn(&[[u32; 2]]) -> bool = |_| false;
    let both_old: fn(&[[u32; 2]], u32, u32) -> bool = |r, _, _| r[0][0] != 0 || r[1][0] != 0;
    let store_buffering = |name, between: &[u8]| Litmus {
        name,
        vcpus: vec![
            [store(X, 1), between.to_vec(), load(Y)].concat(),
            [store(Y, 1), between.to_vec(), load(X)].concat(),
        ],
        allowed: both_old,
        relaxed: never,
    };
    let mut tests = vec![
        Litmus {
            allowed: |_, _, _| true,
            relaxed: |r| r[0][0] == 0 && r[1][0] == 0,
            ..store_buffering("store buffering", &[])
        },
        Litmus {
            name: "store buffering, what is stored read again",
            vcpus: vec![[store(X, 1), load(X), load_2(Y)].concat(), [store(Y, 1), load(Y), load_2(X)].concat()],
            allowed: |r, _, _| r[0][0] == 1 && r[1][0] == 1,
            relaxed: |r| r[0][1] == 0 && r[1][1] == 0,
        },
        store_buffering("store buffering with MFENCE", MFENCE),
        store_buffering("store buffering with LOCK", LOCK_OR),
        Litmus {
            vcpus: vec![[exchange(X), load(Y)].concat(), [exchange(Y), load(X)].concat()],
            ..store_buffering("store buffering with XCHG", &[])
        },
        Litmus {
            name: "message passing",
            vcpus: vec![[store(X, 1), store(Y, 1)].concat(), [load(Y), load_2(X)].concat()],
            allowed: |r, _, _| r[1] != [1, 0],
            relaxed: never,
        },
        Litmus {
            name: "load buffering",
            vcpus: vec![[load(X), store(Y, 1)].concat(), [load(Y), store(X, 1)].concat()],
            allowed: |r, _, _| r[0][0] == 0 || r[1][0] == 0,
            relaxed: never,
        },
        Litmus {
            name: "S",
            vcpus: vec![[store(X, 2), store(Y, 1)].concat(), [load(Y), store(X, 1)].concat()],
            allowed: |r, x, _| r[1][0] == 0 || x == 1,
            relaxed: never,
        },
        Litmus {
            name: "2+2W",
            vcpus: vec![[store(X, 1), store(Y, 2)].concat(), [store(Y, 1), store(X, 2)].concat()],
            allowed: |_, x, y| (x, y) != (1, 1),
            relaxed: never,
        },
        Litmus {
            name: "write to read causality",
            vcpus: vec![store(X, 1), [load(X), store(Y, 1)].concat(), [load(Y), load_2(X)].concat()],
            // Without what was read it is no write for the third.
            allowed: |r, _, _| r[1][0] == 0 || r[2] != [1, 0],
            relaxed: never,
        },
        Litmus {
            name: "coherence",
            vcpus: vec![store(X, 1), store(X, 2), [load(X), load_2(X)].concat(), [load(X), load_2(X)].concat()],
            allowed: |r, x, _| {
                let last = if x == 2 { [1, 2] } else { [2, 1] };
                let order = |value| if value == 0 { 0 } else { 1 + (value == last[1]) as u32 };
                r[2..].iter().all(|&[first, second]| order(first) <= order(second))
            },
            relaxed: never,
        },
        Litmus {
            name: "independent reads of independent writes",
            vcpus: vec![store(X, 1), store(Y, 1), [load(X), load_2(Y)].concat(), [load(Y), load_2(X)].concat()],
            allowed: |r, _, _| r[2] != [1, 0] || r[3] != [1, 0],
            relaxed: never,
        },
    ];
    for (name, instruction) in serializing() {
        tests.push(Litmus { name, ..store_buffering("", &instruction) });
    }
    tests
}

/// Where the variables of each round are.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: u64,
    stride: u64,
    rounds: u64,
}
const APART: Place = Place { first: VARIABLES, stride: 128, rounds: 1000 };
/// x lies across two pages: the interpreter takes it.
const ACROSS: Place = Place { first: VARIABLES + 0xffd, stride: 0x1000, rounds: 200 };

/// Run a litmus test at all `place.rounds` variables: in how many rounds a relaxed outcome was seen.
fn litmus(test: &Litmus, place: Place, interpreted: fn(usize) -> bool, host: Host) -> usize {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    let count = test.vcpus.len();
    let mut vcpus = Vec::new();
    for (n, body) in test.vcpus.iter().enumerate() {
        let at = FREE + n as u64 * 0x1000;
        let mut code = Code::default();
        let again = code.here();
        code.barrier(count as u8);
        // A moment, another one for each: rdtsc; and eax, 31; 1: dec eax; jns 1b
        code.put(&[0x0f, 0x31, 0x83, 0xe0, 31, 0xff, 0xc8, 0x79, 0xfc]);
        // xor eax, eax; xor ecx, ecx; then mov [r12], eax; mov [r12 + 4], ecx; add r12, 8; add rbx, rdi; dec rbp
        code.put(&[0x31, 0xc0, 0x31, 0xc9]).put(body);
        code.put(&[0x41, 0x89, 0x04, 0x24, 0x41, 0x89, 0x4c, 0x24, 0x04, 0x49, 0x83, 0xc4, 8, 0x48, 0x01, 0xfb]);
        code.put(&[0x48, 0xff, 0xcd]).back(JNE, again).put(&[HLT]);
        m.write(at, &code.0);
        let mut v = m.another(1 + n as u32, FREE + 0x8000 + n as u64 * 0x1000);
        v.interpret_only = interpreted(n);
        let c = &mut v.cpu;
        (c.gpr[RBX], c.gpr[RDI], c.gpr[RBP]) = (place.first, place.stride, place.rounds);
        (c.gpr[12], c.gpr[13], c.gpr[14], c.rip) = (SEEN + SEEN_BYTES * n as u64, BARRIER, 0, at);
        vcpus.push(v);
    }
    all(&m, &mut vcpus, host);
    let variable = |at: u64| u32::from_le_bytes(m.read(at));
    let outcome = |round: u64| {
        let of = |n: usize| m.read64(SEEN + SEEN_BYTES * n as u64 + 8 * round);
        let seen: Vec<[u32; 2]> = (0..count).map(of).map(|r| [r as u32, (r >> 32) as u32]).collect();
        let at = place.first + place.stride * round;
        let (x, y) = (variable(at + X as u64), variable(at + Y as u64));
        assert!((test.allowed)(&seen, x, y), "{}: {seen:?}, x = {x}, y = {y} ({place:?}, {host:?})", test.name);
        (test.relaxed)(&seen)
    };
    (0..place.rounds).filter(|&round| outcome(round)).count()
}

#[test]
fn stores_are_seen_in_the_order_of_x86() {
    let interpreted: [fn(usize) -> bool; 3] = [|_| false, |_| true, |n| n % 2 == 0];
    for (first, test) in litmus_tests().iter().enumerate() {
        let mut relaxed = 0;
        // Each repetition another way to run it.
        for n in (first..).take(repetitions(2)) {
            let (place, host) = ([APART, ACROSS][n % 2], [Host::Waits, Host::Disturbs][n / 2 % 2]);
            relaxed += litmus(test, place, interpreted[n / 4 % 3], host);
        }
        println!("{}: {relaxed} rounds that no sequentially consistent machine has", test.name);
    }
}

/// A page whose entry the table holds: two pages of memory, of which it shows one.
const WINDOW: u64 = 0x20_0000;
const TABLE: u64 = 0xc_0000;
const PAGES: [u64; 2] = [0xc_1000, 0xc_2000];
/// What is in a page that the window no longer shows.
const SPOILED: u32 = 0xdead;
/// How many have flushed the window.
const ACKNOWLEDGED: u64 = 0x8_0080;
/// Set when all is done.
const END: u64 = 0x8_00c0;
const APIC: u64 = 0x1f_f000;
const VECTOR: u8 = 0x40;

/// vCPUs with local APICs, which long mode finds at `APIC`.
fn with_apics(m: &mut Machine, count: u32) -> Vec<Vcpu> {
    m.v.vm.has_lapics.store(true, Ordering::SeqCst);
    m.write64(PML4 + 0x3000 + (APIC >> 12) * 8, lapic::DEFAULT_BASE | P | W);
    let mut vcpus: Vec<Vcpu> = (0..count).map(|n| m.another(1 + n, FREE + 0x8000 + n as u64 * 0x1000)).collect();
    for v in &mut vcpus {
        v.mp_state = mp_state::RUNNABLE;
        v.lapic_write(lapic::DEFAULT_BASE + lapic::reg::SVR as u64, &0x1ffu32.to_le_bytes()).unwrap();
    }
    vcpus
}

/// One vCPU has the window show the other page, sends all others an interrupt, whose handler flushes it, and spoils the page
/// that it showed once all have said so: none may see that. The last of them sleeps between interrupts.
fn shootdowns(count: u32, rounds: u64, interpreted: fn(usize) -> bool, host: Host) {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write64(PML4 + 0x2000 + 8, TABLE | P | W);
    m.write64(TABLE, PAGES[0] | P | W);
    let (first, reader, sleeper, handler) = (FREE, FREE + 0x1000, FREE + 0x2000, FREE + 0x3000);
    // rbx: the window, rsi: the APIC, r8: `WRONG`, r9: `END`, r11: `ACKNOWLEDGED`, r13: the barrier, which counts rounds.
    let mut code = Code::default();
    // The first has r12, r15: the page that is shown and the other one; rdi: the table; r10, rdx: entries for r15 and r12.
    let again = code.here();
    // mov dword [r15], 0; mov [rdi], r10; mov qword [r11], 0; invlpg [rbx]
    code.put(&[0x41, 0xc7, 0x07, 0, 0, 0, 0, 0x4c, 0x89, 0x17, 0x49, 0xc7, 0x03, 0, 0, 0, 0, 0x0f, 0x01, 0x3b]);
    // mov dword [rsi + ICR], all but self | fixed | VECTOR
    code.put(&[0xc7, 0x86, 0x00, 0x03, 0, 0, VECTOR, 0x40, 0x0c, 0x00]);
    // cmp dword [r11], count - 1
    code.wait(&[0x41, 0x83, 0x3b, count as u8 - 1]);
    // mov dword [r12], SPOILED; xchg r12, r15; xchg r10, rdx; inc qword [r13]; cmp dword [r8], 0
    code.put(&[0x41, 0xc7, 0x04, 0x24]).put(&SPOILED.to_le_bytes());
    code.put(&[0x4d, 0x87, 0xe7, 0x49, 0x87, 0xd2, 0x49, 0xff, 0x45, 0x00, 0x41, 0x83, 0x38, 0x00]);
    let wrong = code.ahead(JNE);
    // dec rbp; at last mov dword [r9], 1 and an interrupt for who sleeps
    code.put(&[0x48, 0xff, 0xcd]).back(JNE, again).land(wrong);
    code.put(&[0x41, 0xc7, 0x01, 1, 0, 0, 0, 0xc7, 0x86, 0x00, 0x03, 0, 0, VECTOR, 0x40, 0x0c, 0x00]).put(OUT);
    m.write(first, &code.0);
    // cmp dword [rbx], SPOILED
    let compare = [&[0x81, 0x3b][..], &SPOILED.to_le_bytes()].concat();
    for (at, sleeps) in [(reader, false), (sleeper, true)] {
        let mut code = Code::default();
        let again = code.here();
        code.put(&compare);
        let right = code.ahead(JNE);
        // mov dword [r8], 1
        code.put(&[0x41, 0xc7, 0x00, 1, 0, 0, 0]).land(right);
        if sleeps {
            // cli; cmp dword [r9], 0; jne end; sti; hlt
            code.put(&[0xfa, 0x41, 0x83, 0x39, 0x00]);
            let end = code.ahead(JNE);
            code.put(&[0xfb, HLT]).back(JMP, again).land(end).put(OUT);
        } else {
            // pause; cmp dword [r9], 0
            code.put(&[0xf3, 0x90, 0x41, 0x83, 0x39, 0x00]).back(JE, again).put(&[0xfa]).put(OUT);
        }
        m.write(at, &code.0);
    }
    // invlpg [rbx]; lock inc dword [r11]; mov dword [rsi + EOI], 0; iretq
    m.write(handler, &[0x0f, 0x01, 0x3b, 0xf0, 0x41, 0xff, 0x03, 0xc7, 0x86, 0xb0, 0, 0, 0, 0, 0, 0, 0, 0x48, 0xcf]);
    m.write64(IDT + VECTOR as u64 * 16, handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48);
    let mut vcpus = with_apics(&mut m, count);
    for (n, v) in vcpus.iter_mut().enumerate() {
        v.interpret_only = interpreted(n);
        let c = &mut v.cpu;
        (c.gpr[RBX], c.gpr[RSI], c.gpr[RDI]) = (WINDOW, APIC, TABLE);
        (c.gpr[8], c.gpr[9], c.gpr[11], c.gpr[13]) = (WRONG, END, ACKNOWLEDGED, BARRIER);
        (c.gpr[10], c.gpr[RDX], c.gpr[RBP]) = (PAGES[1] | P | W, PAGES[0] | P | W, rounds);
        (c.gpr[12], c.gpr[15]) = (PAGES[0], PAGES[1]);
        c.rip = match n as u32 {
            0 => first,
            n if n == count - 1 => sleeper,
            _ => reader,
        };
        c.iflag = (n != 0) as u8;
    }
    all(&m, &mut vcpus, host);
    assert_eq!(m.read64(WRONG), 0, "a vCPU read through a translation that it had flushed: {count} vCPUs, {host:?}");
    assert_eq!(m.read64(BARRIER), rounds);
}

#[test]
fn nobody_uses_what_it_has_flushed() {
    let interpreted: [fn(usize) -> bool; 3] = [|_| false, |n| n == 1, |n| n == 0];
    for n in 0..repetitions(12) {
        let host = [Host::Waits, Host::Disturbs][n % 2];
        shootdowns(2 + n as u32 / 2 % 3, 200, interpreted[n / 6 % 3], host);
    }
}

/// The vCPUs take turns in changing a function that all call, and serialize before they do (Intel SDM volume 3, 9.1.3).
fn changing_code(count: u8, rounds: u64, interpreted: fn(usize) -> bool, host: Host) {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    let function = FREE + 0x7000;
    // Its result is aligned: db 3 dup nop; mov eax, 0; ret
    m.write(function, &[0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3]);
    let mut vcpus = Vec::new();
    for n in 0..count {
        let at = FREE + n as u64 * 0x1000;
        let mut code = Code::default();
        // rdi: the round, rsi: whose turn it is, r9: the round that has been written.
        let again = code.here();
        // inc edi; inc esi; cmp esi, count
        code.put(&[0xff, 0xc7, 0xff, 0xc6, 0x83, 0xfe, count]);
        let same = code.ahead(JNE);
        // xor esi, esi
        code.put(&[0x31, 0xf6]).land(same);
        // cmp esi, n
        code.put(&[0x83, 0xfe, n]);
        let mine = code.ahead(JE);
        // cmp [r9], edi
        code.wait(&[0x41, 0x39, 0x39]);
        let written = code.ahead(JMP);
        // mov [r10 + 4], edi; mov [r9], edi
        code.land(mine).put(&[0x41, 0x89, 0x7a, 0x04, 0x41, 0x89, 0x39]).land(written);
        // cpuid; call r10; cmp eax, edi
        code.put(&[0x0f, 0xa2, 0x41, 0xff, 0xd2, 0x39, 0xf8]);
        let right = code.ahead(JE);
        // mov dword [r8], 1
        code.put(&[0x41, 0xc7, 0x00, 1, 0, 0, 0]).land(right);
        code.barrier(count);
        // dec rbp
        code.put(&[0x48, 0xff, 0xcd]).back(JNE, again).put(&[HLT]);
        m.write(at, &code.0);
        let mut v = m.another(1 + n as u32, FREE + 0x8000 + n as u64 * 0x1000);
        v.interpret_only = interpreted(n as usize);
        let c = &mut v.cpu;
        (c.gpr[8], c.gpr[9], c.gpr[10], c.gpr[13], c.gpr[14]) = (WRONG, END, function, BARRIER, 0);
        (c.gpr[RDI], c.gpr[RSI], c.gpr[RBP], c.rip) = (0, 0, rounds, at);
        vcpus.push(v);
    }
    all(&m, &mut vcpus, host);
    assert_eq!(m.read64(WRONG), 0, "a vCPU ran code that had been changed: {count} vCPUs, {host:?}");
    assert_eq!(m.read64(BARRIER), rounds * count as u64);
}

#[test]
fn nobody_runs_code_that_was_changed() {
    let interpreted: [fn(usize) -> bool; 3] = [|_| false, |n| n == 1, |n| n == 0];
    for n in 0..repetitions(12) {
        let host = [Host::Waits, Host::Disturbs][n % 2];
        changing_code(2 + n as u8 / 2 % 3, 200, interpreted[n / 6 % 3], host);
    }
}
