//! Host signals that translated code raises are the guest's exceptions.
//!
//! A copied instruction may trap: division, an unaligned vector operand, an unmasked x87 or SSE exception.
//! The kernel delivers that as SIGFPE, SIGSEGV, SIGBUS or SIGILL. The handler recognises it by the thread
//! (one that runs translated code), the stack pointer and the program counter, notes where it happened, and
//! lets the thread continue at `Cpu::trap_exit`, which leaves translated code with the guest's registers as they
//! were. Accesses of our own to guest memory that is gone are told by the program counter alone (`guest`). Any other
//! signal goes to the handler that was there before; if that passes it on to this one, to the default action.
//!
//! Handlers run on an alternate stack, large enough for an AVX-512 frame: the interpreter's own (faulthandler)
//! may be smaller. Kicks do not use signals at all: they set `Cpu::poll`.

use crate::cpu::Cpu;
use crate::run::leave;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
const STACK_BYTES: usize = 64 << 10;

thread_local! {
    /// The vCPU whose translated code this thread is executing.
    static INSIDE: Cell<*mut Cpu> = const { Cell::new(null_mut()) };
    static ALT_STACK: AltStack = const { AltStack(Cell::new(null_mut())) };
    /// The handler that was there before is at work.
    static PASSING_ON: Cell<bool> = const { Cell::new(false) };
}

/// Handlers that were there before, by place in `SIGNALS`.
static PREVIOUS: [AtomicUsize; SIGNALS.len()] = [const { AtomicUsize::new(libc::SIG_DFL) }; SIGNALS.len()];

struct AltStack(Cell<*mut libc::c_void>);

impl Drop for AltStack {
    fn drop(&mut self) {
        let stack = self.0.get();
        if !stack.is_null() {
            let off = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            // SAFETY: the thread's own alternate stack, which no handler runs on now.
            unsafe {
                libc::sigaltstack(&off, null_mut());
                libc::munmap(stack, STACK_BYTES);
            }
        }
    }
}

/// Make sure that this thread may run translated code: handlers in place, alternate stack large enough.
///
/// Called at every KVM_RUN: somebody (faulthandler) may have installed a handler since, which is then kept
/// as the one to pass foreign signals to.
pub fn install() {
    for (n, &signal) in SIGNALS.iter().enumerate() {
        let mut now = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: plain system calls on valid structures.
        unsafe {
            libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr());
            let now = now.assume_init().sa_sigaction;
            if now == handler as *const () as usize {
                continue;
            }
            PREVIOUS[n].store(now, Ordering::SeqCst);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = handler as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(signal, &ours, null_mut());
        }
    }
    ALT_STACK.with(|s| {
        let mut now = MaybeUninit::<libc::stack_t>::uninit();
        // SAFETY: queries, and installs a mapping of our own that the thread keeps until it ends.
        unsafe {
            libc::sigaltstack(std::ptr::null(), now.as_mut_ptr());
            let now = now.assume_init();
            if now.ss_flags & libc::SS_DISABLE == 0 && now.ss_size >= STACK_BYTES {
                return;
            }
            let p = if s.0.get().is_null() {
                let p = libc::mmap(
                    null_mut(),
                    STACK_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                assert!(p != libc::MAP_FAILED, "no memory for a signal stack");
                p
            } else {
                s.0.get()
            };
            let stack = libc::stack_t { ss_sp: p, ss_flags: 0, ss_size: STACK_BYTES };
            libc::sigaltstack(&stack, null_mut());
            s.0.set(p);
        }
    });
}

/// While it lives, signals to this thread wait: KVM_SET_SIGNAL_MASK. Those that instructions raise do not.
pub struct Held {
    before: libc::sigset_t,
    /// The mask: bit 0 is signal 1.
    blocked: u64,
}

impl Held {
    pub fn new(blocked: u64) -> Self {
        let (mut all, mut before) = (MaybeUninit::<libc::sigset_t>::uninit(), MaybeUninit::<libc::sigset_t>::uninit());
        // SAFETY: initialises both sets; changes this thread's mask alone.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            for signal in SIGNALS {
                libc::sigdelset(all.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            Self { before: before.assume_init(), blocked }
        }
    }

    /// Whether a signal waits that the mask lets through.
    pub fn interrupted(&self) -> bool {
        let mut pending = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: initialises the set, and reads it.
        unsafe {
            libc::sigpending(pending.as_mut_ptr());
            (1..=64).any(|n| self.blocked >> (n - 1) & 1 == 0 && libc::sigismember(pending.as_ptr(), n) == 1)
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the mask that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, null_mut()) };
    }
}

/// Run `f`, which enters translated code of `cpu`.
pub fn inside(cpu: *mut Cpu, f: impl FnOnce()) {
    let outer = INSIDE.replace(cpu);
    f();
    INSIDE.set(outer);
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let cpu = INSIDE.with(Cell::get);
    // SAFETY: the kernel passes a valid context to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let pc = registers[libc::REG_RIP as usize] as u64;
    if !cpu.is_null() && registers[libc::REG_RSP as usize] as u64 == cpu as u64 {
        // SAFETY: RSP holds `Cpu`'s address only while translated code itself executes on this thread.
        let c = unsafe { &mut *cpu };
        let (first, last) = c.code_bounds;
        if pc >= first && pc < last {
            c.trap_pc = pc;
            c.trap_number = registers[libc::REG_TRAPNO as usize] as u32;
            c.trap_error = registers[libc::REG_ERR as usize] as u32;
            // SAFETY: the kernel passes a valid description to an SA_SIGINFO handler.
            c.trap_address = unsafe { (*info).si_addr() } as u64;
            c.leave = leave::TRAP;
            let flags = registers[libc::REG_EFL as usize] as u64;
            c.trap_flags = flags;
            registers[libc::REG_RIP as usize] = c.trap_exit as i64;
            return;
        }
    }
    if let Some(pc) = crate::guest::recovery(pc) {
        registers[libc::REG_RIP as usize] = pc as i64;
        return;
    }
    let n = SIGNALS.iter().position(|&s| s == signal).unwrap_or(0);
    match PREVIOUS[n].load(Ordering::SeqCst) {
        f if f != libc::SIG_DFL && f != libc::SIG_IGN && !PASSING_ON.replace(true) => {
            // SAFETY: the address of a handler. If it takes the number alone, it finds that where it expects it.
            let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(f) };
            f(signal, info, context);
            PASSING_ON.set(false);
        }
        // It happens when the instruction runs again.
        // SAFETY: a system call.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}
