//! The host CPU as the reference: run code of the test's own making natively, at addresses that a guest has, too,
//! from a given state to its end, to the first trap, or step by step.

#![allow(dead_code)] // Each test program uses its part.

use std::arch::naked_asm;
use std::sync::{Mutex, MutexGuard, Once};

pub struct Random(pub u64);
impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A number from the environment: `KVMKIT_CASES`, `KVMKIT_SEED`.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Where regions may be: beyond 32 bits, but where AddressSanitizer keeps its tables.
pub const BASE: u64 = if cfg!(sanitized) { 0x4000_0000 } else { 0x1_0000_0000 };

/// Memory at a fixed address, for the host's code and the guest's alike.
#[derive(Clone, Copy)]
pub struct Region {
    pub base: u64,
    pub bytes: u64,
}

impl Region {
    /// Map it anew, executable and zero.
    pub fn map(self) {
        // SAFETY: a fixed mapping in an address range that nothing else uses.
        unsafe {
            let p = libc::mmap(
                self.base as *mut _,
                self.bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            );
            assert_eq!(p as u64, self.base);
        }
    }
    pub fn write(self, at: u64, bytes: &[u8]) {
        self.slice(at, bytes.len()).copy_from_slice(bytes);
    }
    #[allow(clippy::mut_from_ref)]
    pub fn slice(&self, at: u64, len: usize) -> &'static mut [u8] {
        assert!(at >= self.base && at + len as u64 <= self.base + self.bytes);
        // SAFETY: inside the mapping; one test at a time (`alone`).
        unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) }
    }
    /// What native code may do with `len` bytes at `at` (`libc::PROT_*`).
    pub fn protect(self, at: u64, len: usize, protection: i32) {
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { libc::mprotect(at as *mut _, len, protection) }, 0);
    }
}

static LOCK: Mutex<()> = Mutex::new(());

/// One native run at a time: its state is global.
pub fn alone() -> MutexGuard<'static, ()> {
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}

pub const XSAVE_BYTES: usize = 4096;

/// Registers of 64-bit code.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct State {
    /// x87 and vector registers, in XSAVE's standard format.
    pub xsave: [u8; XSAVE_BYTES],
    /// In encoding order.
    pub gpr: [u64; 16],
    pub flags: u64,
}

impl State {
    pub const fn new() -> Self {
        Self { xsave: [0; XSAVE_BYTES], gpr: [0; 16], flags: 2 }
    }
}

/// A trap that ended a native run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u8,
    pub error: u32,
    /// Of a page fault.
    pub address: u64,
    pub rip: u64,
}

static mut NATIVE: State = State::new();
static mut HOST_RSP: u64 = 0;
static mut TARGET: u64 = 0;
static mut TRAP: Option<Trap> = None;
/// Registers after each step, rip last.
static mut STEPS: Vec<([u64; 16], u64, u64)> = Vec::new();
/// Where stepping ends.
static mut STOP_AT: u64 = 0;
static mut RUNNING: bool = false;

/// Offset of `State::gpr`.
const G: usize = XSAVE_BYTES;
const FLAGS: usize = G + 128;
/// x87, SSE, AVX and what there is of AVX-512.
const COMPONENTS: u32 = 0xe7;

#[unsafe(naked)]
extern "C" fn enter() {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip+{rsp}], rsp",
        "mov eax, {components}", "xor edx, edx", "xrstor64 [rip+{s}]",
        "mov rax, [rip+{s}+{g}]", "mov rcx, [rip+{s}+{g}+8]", "mov rdx, [rip+{s}+{g}+16]", "mov rbx, [rip+{s}+{g}+24]",
        "mov rbp, [rip+{s}+{g}+40]", "mov rsi, [rip+{s}+{g}+48]", "mov rdi, [rip+{s}+{g}+56]",
        "mov r8, [rip+{s}+{g}+64]", "mov r9, [rip+{s}+{g}+72]", "mov r10, [rip+{s}+{g}+80]", "mov r11, [rip+{s}+{g}+88]",
        "mov r12, [rip+{s}+{g}+96]", "mov r13, [rip+{s}+{g}+104]", "mov r14, [rip+{s}+{g}+112]",
        "mov r15, [rip+{s}+{g}+120]",
        "push [rip+{s}+{flags}]", "popfq",
        "mov rsp, [rip+{s}+{g}+32]",
        "jmp [rip+{target}]",
        rsp = sym HOST_RSP, s = sym NATIVE, target = sym TARGET, g = const G, flags = const FLAGS,
        components = const COMPONENTS,
    )
}

/// Where 64-bit native code ends: jump here.
#[unsafe(naked)]
pub extern "C" fn exit() {
    naked_asm!(
        "mov [rip+{s}+{g}], rax", "mov [rip+{s}+{g}+8], rcx", "mov [rip+{s}+{g}+16], rdx", "mov [rip+{s}+{g}+24], rbx",
        "mov [rip+{s}+{g}+32], rsp",
        "mov [rip+{s}+{g}+40], rbp", "mov [rip+{s}+{g}+48], rsi", "mov [rip+{s}+{g}+56], rdi",
        "mov [rip+{s}+{g}+64], r8", "mov [rip+{s}+{g}+72], r9", "mov [rip+{s}+{g}+80], r10", "mov [rip+{s}+{g}+88], r11",
        "mov [rip+{s}+{g}+96], r12", "mov [rip+{s}+{g}+104], r13", "mov [rip+{s}+{g}+112], r14",
        "mov [rip+{s}+{g}+120], r15",
        "mov rsp, [rip+{rsp}]",
        "pushfq", "pop [rip+{s}+{flags}]",
        "push 2", "popfq",
        "mov eax, {components}", "xor edx, edx", "xsave64 [rip+{s}]",
        "fninit", "vzeroupper",
        "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        rsp = sym HOST_RSP, s = sym NATIVE, g = const G, flags = const FLAGS, components = const COMPONENTS,
    )
}

/// The kernel leaves AC as it was; a compiler aligns what it likes.
#[unsafe(naked)]
extern "C" fn handler() {
    naked_asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq", "jmp {}", sym trapped)
}

extern "C" fn trapped(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; the statics are this thread's while `RUNNING` (`alone`).
    unsafe {
        let g = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if !RUNNING {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let rip = g[libc::REG_RIP as usize] as u64;
        if signal == libc::SIGTRAP {
            use libc::{
                REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX,
                REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP,
            };
            let order = [
                REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
                REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
            ];
            let steps = &raw mut STEPS;
            let steps = &mut *steps;
            if rip == STOP_AT || steps.len() == 10_000 {
                g[libc::REG_EFL as usize] &= !0x100;
                g[libc::REG_RIP as usize] = exit as *const () as i64;
                return;
            }
            // The steps from `enter` to the first instruction do not count.
            if rip.abs_diff(TARGET) < 1 << 20 && (rip != TARGET || !steps.is_empty()) {
                steps.push((order.map(|n| g[n as usize] as u64), g[libc::REG_EFL as usize] as u64 & !0x100, rip));
            }
            return;
        }
        let vector = g[libc::REG_TRAPNO as usize] as u8;
        let error = g[libc::REG_ERR as usize] as u32;
        let address = if vector == 14 { (*info).si_addr() as u64 } else { 0 };
        TRAP = Some(Trap { vector, error, address, rip });
        g[libc::REG_EFL as usize] &= !0x100;
        g[libc::REG_RIP as usize] = exit as *const () as i64;
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            // SAFETY: a valid structure; the handler is async-signal-safe but for what it pushes to `STEPS`, which
            // interrupts nothing but the code under test.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
    });
    // The engine gives its threads such a stack, too; this is for those that have not run a vCPU.
    const STACK_BYTES: usize = 64 << 10;
    thread_local! {
        static STACK: Vec<u8> = vec![0; STACK_BYTES];
    }
    STACK.with(|stack| {
        let ours = libc::stack_t { ss_sp: stack.as_ptr() as *mut _, ss_flags: 0, ss_size: STACK_BYTES };
        // SAFETY: memory that lives as long as the thread.
        assert_eq!(unsafe { libc::sigaltstack(&ours, std::ptr::null_mut()) }, 0);
    });
}

/// Run the code at `target` until it jumps to `exit` or traps. Call under `alone`.
pub fn run(state: &State, target: u64) -> (State, Option<Trap>) {
    install();
    // SAFETY: one at a time (`alone`); the code ends in `exit` or in a trap.
    unsafe {
        NATIVE = state.clone();
        (TARGET, TRAP, RUNNING) = (target, None, true);
        enter();
        RUNNING = false;
        let after = &raw const NATIVE;
        ((*after).clone(), TRAP)
    }
}

/// A row of `steps`: registers in encoding order, flags without TF, rip.
pub type Row = ([u64; 16], u64, u64);

/// Run the code at `target` with TF set until it is at `stop_at` or traps: the state after every instruction.
pub fn steps(state: &State, target: u64, stop_at: u64) -> (Vec<Row>, State, Option<Trap>) {
    let mut state = state.clone();
    state.flags |= 0x100;
    // SAFETY: as in `run`.
    unsafe {
        STOP_AT = stop_at;
        let rows = &raw mut STEPS;
        (*rows).clear();
        (*rows).reserve(10_000);
    }
    let (after, trap) = run(&state, target);
    // SAFETY: as in `run`; nothing steps any more.
    let rows = unsafe {
        let rows = &raw mut STEPS;
        std::mem::take(&mut *rows)
    };
    (rows, after, trap)
}

/// Compatibility mode: 32-bit code within a region below 4 GiB.
pub mod compat {
    use super::*;

    /// Code and data selectors of 32-bit processes, and the code selector of 64-bit ones, on Linux
    /// (arch/x86/include/asm/segment.h).
    const USER32_CS: u64 = 0x23;
    const USER_DS: u8 = 0x2b;
    const USER_CS: u8 = 0x33;

    static mut AFTER: [u64; 9] = [0; 9];
    static mut FRAME: u64 = 0;
    static mut ENTRY: u64 = 0;

    #[unsafe(naked)]
    extern "C" fn enter() {
        naked_asm!(
            "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
            "mov [rip+{rsp}], rsp",
            "mov rcx, [rip+{frame}]",
            "mov rax, [rip+{entry}]",
            "mov rsp, rcx",
            "push {cs}", "push rax",
            "retfq",
            rsp = sym HOST_RSP, frame = sym FRAME, entry = sym ENTRY, cs = const USER32_CS,
        )
    }

    #[unsafe(naked)]
    extern "C" fn exit() {
        naked_asm!(
            "mov [rip+{s}], eax", "mov [rip+{s}+8], ecx", "mov [rip+{s}+16], edx", "mov [rip+{s}+24], ebx",
            "mov [rip+{s}+32], esp", "mov [rip+{s}+40], ebp", "mov [rip+{s}+48], esi", "mov [rip+{s}+56], edi",
            "mov rsp, [rip+{rsp}]",
            "pushfq", "pop [rip+{s}+64]",
            "cld",
            "mov eax, 0", "mov ds, eax", "mov es, eax",
            "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
            "ret",
            rsp = sym HOST_RSP, s = sym AFTER,
        )
    }

    #[derive(Clone, Debug, PartialEq)]
    pub struct State {
        /// In encoding order.
        pub gpr: [u32; 8],
        pub flags: u64,
    }

    /// Run `code` at `at`; a page at `scratch` serves to get there and back. Call under `alone`.
    pub fn run(region: Region, scratch: u64, code: &[u8], at: u64, before: &State) -> State {
        let (entry, leave, frame) = (scratch, scratch + 0x100, scratch + 0x800);
        // mov eax, ds; mov ds, eax; mov es, eax; popfd; popad; mov esp, imm32; jmp code
        let mut b = vec![0xb8, USER_DS, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x9d, 0x61, 0xbc];
        b.extend(before.gpr[4].to_le_bytes());
        b.push(0xe9);
        b.extend((at as u32).wrapping_sub(entry as u32 + b.len() as u32 + 4).to_le_bytes());
        region.write(entry, &b);
        // jmp far leave; there jmp [exit]
        let mut tail = vec![0xea];
        tail.extend((leave as u32).to_le_bytes());
        tail.extend([USER_CS, 0]);
        region.write(at, &[code, &tail].concat());
        let mut b = vec![0xff, 0x25, 0, 0, 0, 0];
        b.extend((exit as *const () as u64).to_le_bytes());
        region.write(leave, &b);
        let mut b = (before.flags as u32).to_le_bytes().to_vec();
        (0..8).rev().for_each(|n| b.extend(before.gpr[n].to_le_bytes()));
        region.write(frame, &b);
        // SAFETY: one at a time (`alone`); the code ends in `exit`.
        let after = unsafe {
            (FRAME, ENTRY) = (frame, entry);
            enter();
            (&raw const AFTER).read()
        };
        State { gpr: std::array::from_fn(|n| after[n] as u32), flags: after[8] }
    }
}
