//! Random straight-line code, run by the engine and by the host CPU itself: same registers, flags, memory.
//!
//! Guest and host see the code and its data at the same addresses: the guest's page tables, memory slot and
//! the test's own mapping are all the identity on one region. `KVMKIT_CASES` and `KVMKIT_SEED` set how many
//! sequences and where to start.

use _engine::classify::{Class, Features, classify};
use _engine::cpu::{CS, Cpu, Exit, Seg, Vcpu, cr0, cr4, efer, rflags};
use _engine::mem::{Slot, Slots};
use _engine::run;
use _engine::vm::Vm;
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, OpKind, Register};
use std::arch::naked_asm;
use std::sync::{Arc, Mutex};

const BASE: u64 = 0x1_0000_0000;
const SIZE: u64 = 16 << 20;
/// Page tables, code, data and stack within the region.
const TABLES: u64 = BASE;
const CODE: u64 = BASE + 0x10_0000;
const DATA: u64 = BASE + 0x20_0000;
const STACK: u64 = BASE + 0x30_8000;

#[repr(C, align(64))]
#[derive(Clone)]
struct State {
    fx: [u8; 512],
    gpr: [u64; 16],
    flags: u64,
}

static mut NATIVE: State = State { fx: [0; 512], gpr: [0; 16], flags: 0 };
static mut HOST_RSP: u64 = 0;
static mut TARGET: u64 = 0;
static LOCK: Mutex<()> = Mutex::new(());

#[unsafe(naked)]
extern "C" fn native_enter() {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip+{rsp}], rsp",
        "fxrstor64 [rip+{s}]",
        "push [rip+{s}+640]", "popfq",
        "mov rax, [rip+{s}+512]", "mov rcx, [rip+{s}+520]", "mov rdx, [rip+{s}+528]", "mov rbx, [rip+{s}+536]",
        "mov rbp, [rip+{s}+552]", "mov rsi, [rip+{s}+560]", "mov rdi, [rip+{s}+568]",
        "mov r8, [rip+{s}+576]", "mov r9, [rip+{s}+584]", "mov r10, [rip+{s}+592]", "mov r11, [rip+{s}+600]",
        "mov r12, [rip+{s}+608]", "mov r13, [rip+{s}+616]", "mov r14, [rip+{s}+624]", "mov r15, [rip+{s}+632]",
        "mov rsp, [rip+{s}+544]",
        "jmp [rip+{target}]",
        rsp = sym HOST_RSP, s = sym NATIVE, target = sym TARGET,
    )
}

#[unsafe(naked)]
extern "C" fn native_exit() {
    naked_asm!(
        "mov [rip+{s}+512], rax", "mov [rip+{s}+520], rcx", "mov [rip+{s}+528], rdx", "mov [rip+{s}+536], rbx",
        "mov [rip+{s}+544], rsp",
        "mov [rip+{s}+552], rbp", "mov [rip+{s}+560], rsi", "mov [rip+{s}+568], rdi",
        "mov [rip+{s}+576], r8", "mov [rip+{s}+584], r9", "mov [rip+{s}+592], r10", "mov [rip+{s}+600], r11",
        "mov [rip+{s}+608], r12", "mov [rip+{s}+616], r13", "mov [rip+{s}+624], r14", "mov [rip+{s}+632], r15",
        "mov rsp, [rip+{rsp}]",
        "pushfq", "pop [rip+{s}+640]",
        "cld",
        "fxsave64 [rip+{s}]",
        "emms",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        rsp = sym HOST_RSP, s = sym NATIVE,
    )
}

struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn write(at: u64, bytes: &[u8]) {
    // SAFETY: inside the region that `machine` mapped.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}
fn slice(at: u64, len: usize) -> &'static mut [u8] {
    // SAFETY: inside the region that `machine` mapped; one test at a time (LOCK).
    unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) }
}

fn machine() -> Vcpu {
    // SAFETY: a fixed mapping in an address range that nothing else uses.
    unsafe {
        let p = libc::mmap(
            BASE as *mut _,
            SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        );
        assert_eq!(p as u64, BASE);
    }
    // PML4 -> PDPT -> 1 GiB page at BASE, which is 4 GiB.
    write(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
    write(TABLES + 0x1000 + 4 * 8, &(BASE | 0xe7).to_le_bytes());
    let vm = Arc::new(Vm::new(1_000_000).unwrap());
    vm.set_slots(Slots::new(vec![Slot { id: 0, flags: 0, gpa: BASE, size: SIZE, hva: BASE }]));
    let mut v = Vcpu::new(vm, 0).unwrap();
    let c: &mut Cpu = &mut v.cpu;
    c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
    c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    c.xcr0 = 7;
    c.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    c.cr3 = TABLES;
    c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 8, attr: 0xa09b, unusable: false };
    for s in [0, 2, 3] {
        c.segs[s] = Seg { base: 0, limit: u32::MAX, sel: 16, attr: 0xc093, unusable: false };
    }
    v
}

/// Registers that point to data and are never written.
const POINTERS: [Register; 3] = [Register::RBX, Register::R9, Register::R13];

/// One random instruction: its bytes.
fn instruction(r: &mut Random, factory: &mut InstructionInfoFactory) -> Vec<u8> {
    let features = Features { x87: true, sse: true, avx: true };
    loop {
        let mut b = Vec::with_capacity(20);
        match r.below(8) {
            0 => b.push(0x66),
            1 if r.below(3) == 0 => b.push(0xf2),
            2 if r.below(3) == 0 => b.push(0xf3),
            _ => {}
        }
        let vex = r.below(6) == 0;
        if vex {
            b.clear();
            b.extend([0xc4, (r.next() as u8 & 0xe0) | (1 + r.below(3) as u8), r.next() as u8]);
        } else {
            if r.below(2) == 0 {
                b.push(0x40 | r.below(16) as u8);
            }
            match r.below(5) {
                0 | 1 => {}
                2 | 3 => b.push(0x0f),
                _ => b.extend([0x0f, if r.below(2) == 0 { 0x38 } else { 0x3a }]),
            }
        }
        while b.len() < 16 {
            b.push(r.next() as u8);
        }
        let i = Decoder::with_ip(64, &b, CODE, DecoderOptions::NONE).decode();
        if i.is_invalid() || !matches!(classify(&i, features), Class::Plain | Class::Lea | Class::Push | Class::Pop) {
            continue;
        }
        use iced_x86::Mnemonic::*;
        // What differs between two runs by nature, traps, or moves the stack out of bounds.
        if matches!(
            i.mnemonic(),
            Rdrand
                | Rdseed
                | Div
                | Idiv
                | Maskmovdqu
                | Maskmovq
                | Vmaskmovdqu
                | Ldmxcsr
                | Vldmxcsr
                | Fldenv
                | Frstor
                | Fldcw
        ) || i.is_privileged()
            || (i.mnemonic() == Pop && i.op0_register() == Register::RSP)
        {
            continue;
        }
        let info = factory.info(&i);
        if info.used_registers().iter().any(|u| {
            let full = u.register().full_register();
            u.access() != OpAccess::Read
                && u.access() != OpAccess::CondRead
                && (POINTERS.contains(&full) || full == Register::RSP && !matches!(i.mnemonic(), Push | Pop))
        }) {
            continue;
        }
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && i.mnemonic() != Lea {
            let size = i.memory_size().size() as i64;
            let displacement = i.memory_displacement64() as i64;
            let aligned = size < 16 || i.memory_base() == Register::RBX && displacement % 32 == 0;
            if !aligned
                || !POINTERS.contains(&i.memory_base())
                || i.memory_index() != Register::None
                || !(-0x1000..0x1000 - size).contains(&displacement)
                || i.has_segment_prefix()
            {
                continue;
            }
        }
        b.truncate(i.len());
        return b;
    }
}

fn run_case(v: &mut Vcpu, seed: u64, length: usize) {
    let mut r = Random(seed);
    let mut factory = InstructionInfoFactory::new();
    let mut code = Vec::new();
    let mut rows = Vec::new();
    for _ in 0..length {
        let b = instruction(&mut r, &mut factory);
        rows.push(b.clone());
        code.extend(b);
    }
    let mut state = State { fx: [0; 512], gpr: [0; 16], flags: 0 };
    for g in state.gpr.iter_mut() {
        *g = if r.below(3) == 0 { r.below(256) } else { r.next() };
    }
    state.gpr[4] = STACK;
    state.gpr[3] = DATA + 0x1000 + 32 * r.below(8);
    state.gpr[9] = DATA + 0x4000 + r.below(64);
    state.gpr[13] = DATA + 0x6ff0 + r.below(0x20);
    state.flags = r.next() & rflags::ARITH | 2;
    state.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    state.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for x in state.fx[160..416].iter_mut() {
        *x = r.next() as u8;
    }
    let mut data = vec![0u8; 0x10000];
    data.iter_mut().for_each(|x| *x = r.next() as u8);
    let stack = data[..0x8000].to_vec();
    let end = CODE + code.len() as u64;
    let load = |tail: &[u8]| {
        slice(DATA, data.len()).copy_from_slice(&data);
        slice(STACK - 0x4000, stack.len()).copy_from_slice(&stack);
        write(CODE, &code);
        write(end, tail);
    };
    // Natively.
    let mut tail = vec![0xff, 0x25, 0, 0, 0, 0];
    tail.extend((native_exit as *const () as u64).to_le_bytes());
    load(&tail);
    // SAFETY: one test at a time; the code ends in `native_exit`.
    let native = unsafe {
        NATIVE = state.clone();
        TARGET = CODE;
        native_enter();
        let result = &raw const NATIVE;
        (*result).clone()
    };
    let native_data = slice(DATA, data.len()).to_vec();
    let native_stack = slice(STACK - 0x4000, stack.len()).to_vec();
    // By the engine.
    load(&[0xf4]);
    let vm = v.vm.clone();
    vm.note_write(None, CODE, code.len() as u64 + 16);
    v.cpu.gpr = state.gpr;
    v.cpu.set_rflags(state.flags);
    v.cpu.fpu.0[..512].copy_from_slice(&state.fx);
    v.cpu.fpu.0[512..576].fill(0);
    v.cpu.fpu.0[512] = 3;
    v.cpu.rip = CODE;
    let exit = run::run(v);
    let show = || {
        let mut text = String::new();
        let mut at = CODE;
        for b in &rows {
            let i = Decoder::with_ip(64, b, at, DecoderOptions::NONE).decode();
            let hex: String = b.iter().map(|x| format!("{x:02x}")).collect();
            text += &format!("  {at:#x} {hex:30} {:?}\n", i.code());
            at += b.len() as u64;
        }
        text
    };
    assert_eq!(exit, Exit::Hlt, "seed {seed} rip {:#x}\n{}", v.cpu.rip, show());
    for g in 0..16 {
        assert_eq!(
            v.cpu.gpr[g],
            native.gpr[g],
            "seed {seed}: register {g}: engine {:#x}, host {:#x}, before {:#x}\n{}",
            v.cpu.gpr[g],
            native.gpr[g],
            state.gpr[g],
            show()
        );
    }
    let (a, b) = (v.cpu.rflags() & rflags::ARITH, native.flags & rflags::ARITH);
    assert_eq!(a, b, "seed {seed}: flags {a:#x} {b:#x} before {:#x}\n{}", state.flags, show());
    assert!(native_data == slice(DATA, data.len()), "seed {seed}: memory\n{}", show());
    assert!(native_stack == slice(STACK - 0x4000, stack.len()), "seed {seed}: stack\n{}", show());
    assert_eq!(v.cpu.fpu.0[160..416], native.fx[160..416], "seed {seed}: xmm\n{}", show());
    assert_eq!(v.cpu.fpu.0[32..160], native.fx[32..160], "seed {seed}: x87\n{}", show());
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn random_code_runs_as_on_the_host() {
    let _guard = LOCK.lock();
    let mut v = machine();
    let first = number("KVMKIT_SEED", 1);
    for seed in first..first + number("KVMKIT_CASES", 3000) {
        run_case(&mut v, seed, 1 + (seed % 24) as usize);
    }
}

/// The same through the interpreter alone.
#[test]
fn random_code_is_interpreted_as_on_the_host() {
    let _guard = LOCK.lock();
    let mut v = machine();
    v.interpret_only = true;
    let first = number("KVMKIT_SEED", 1);
    for seed in first..first + number("KVMKIT_CASES", 3000) {
        run_case(&mut v, seed, 1 + (seed % 24) as usize);
    }
}
