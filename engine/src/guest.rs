//! Accesses to guest memory that may be gone: the host's mapping behind a slot is user space's to change at any time.
//!
//! Each is one of the routines below. Where it faults, `signal::handler` lets the thread continue at the end of the last of
//! them, which returns what is left to do: never zero. Translated code needs none of this: its faults are told apart by
//! where they happen.

use std::arch::global_asm;
use std::ffi::c_void;

global_asm!(
    ".hidden kvmkit_guest_first",
    ".global kvmkit_guest_first",
    "kvmkit_guest_first:",
    // (to, from) → 0
    ".hidden kvmkit_guest_copy1",
    ".global kvmkit_guest_copy1",
    "kvmkit_guest_copy1:",
    "mov ecx, 1",
    "mov al, [rsi]",
    "mov [rdi], al",
    "xor eax, eax",
    "ret",
    ".hidden kvmkit_guest_copy2",
    ".global kvmkit_guest_copy2",
    "kvmkit_guest_copy2:",
    "mov ecx, 1",
    "mov ax, [rsi]",
    "mov [rdi], ax",
    "xor eax, eax",
    "ret",
    ".hidden kvmkit_guest_copy4",
    ".global kvmkit_guest_copy4",
    "kvmkit_guest_copy4:",
    "mov ecx, 1",
    "mov eax, [rsi]",
    "mov [rdi], eax",
    "xor eax, eax",
    "ret",
    ".hidden kvmkit_guest_copy8",
    ".global kvmkit_guest_copy8",
    "kvmkit_guest_copy8:",
    "mov ecx, 1",
    "mov rax, [rsi]",
    "mov [rdi], rax",
    "xor eax, eax",
    "ret",
    ".hidden kvmkit_guest_copy64",
    ".global kvmkit_guest_copy64",
    "kvmkit_guest_copy64:",
    "mov ecx, 1",
    "movdir64b rdi, [rsi]",
    "xor eax, eax",
    "ret",
    // (at, old, new) → 0: done, 2: it is not `old`
    ".hidden kvmkit_guest_swap1",
    ".global kvmkit_guest_swap1",
    "kvmkit_guest_swap1:",
    "mov ecx, 1",
    "mov eax, esi",
    "lock cmpxchg [rdi], dl",
    "setne al",
    "movzx eax, al",
    "add eax, eax",
    "ret",
    ".hidden kvmkit_guest_swap4",
    ".global kvmkit_guest_swap4",
    "kvmkit_guest_swap4:",
    "mov ecx, 1",
    "mov eax, esi",
    "lock cmpxchg [rdi], edx",
    "setne al",
    "movzx eax, al",
    "add eax, eax",
    "ret",
    ".hidden kvmkit_guest_swap8",
    ".global kvmkit_guest_swap8",
    "kvmkit_guest_swap8:",
    "mov ecx, 1",
    "mov rax, rsi",
    "lock cmpxchg [rdi], rdx",
    "setne al",
    "movzx eax, al",
    "add eax, eax",
    "ret",
    // (to, from, bytes) → bytes left; for few, where REP MOVS takes long to start
    ".hidden kvmkit_guest_copy",
    ".global kvmkit_guest_copy",
    "kvmkit_guest_copy:",
    "mov rcx, rdx",
    "2:",
    "cmp rcx, 8",
    "jb 3f",
    "mov rax, [rsi]",
    "mov [rdi], rax",
    "add rsi, 8",
    "add rdi, 8",
    "sub rcx, 8",
    "jmp 2b",
    "3:",
    "test rcx, rcx",
    "jz kvmkit_guest_fault",
    "mov al, [rsi]",
    "mov [rdi], al",
    "inc rsi",
    "inc rdi",
    "dec rcx",
    "jmp 3b",
    // (to, from, count, log2 of the element's size) → elements left
    ".hidden kvmkit_guest_move",
    ".global kvmkit_guest_move",
    "kvmkit_guest_move:",
    "xchg rcx, rdx",
    "cmp edx, 1",
    "jb 3f",
    "je 2f",
    "cmp edx, 2",
    "je 4f",
    "rep movsq",
    "jmp kvmkit_guest_fault",
    "3: rep movsb",
    "jmp kvmkit_guest_fault",
    "2: rep movsw",
    "jmp kvmkit_guest_fault",
    "4: rep movsd",
    "jmp kvmkit_guest_fault",
    // The same from the last to the first.
    ".hidden kvmkit_guest_move_down",
    ".global kvmkit_guest_move_down",
    "kvmkit_guest_move_down:",
    "std",
    "jmp kvmkit_guest_move",
    // (to, value, count, log2 of the element's size) → elements left
    ".hidden kvmkit_guest_fill",
    ".global kvmkit_guest_fill",
    "kvmkit_guest_fill:",
    "xchg rcx, rdx",
    "mov rax, rsi",
    "cmp edx, 1",
    "jb 3f",
    "je 2f",
    "cmp edx, 2",
    "je 4f",
    "rep stosq",
    "jmp kvmkit_guest_fault",
    "3: rep stosb",
    "jmp kvmkit_guest_fault",
    "2: rep stosw",
    "jmp kvmkit_guest_fault",
    "4: rep stosd",
    // What follows a fault, and the end of all that count.
    ".hidden kvmkit_guest_fault",
    ".global kvmkit_guest_fault",
    "kvmkit_guest_fault:",
    "cld",
    "mov rax, rcx",
    "ret",
);

unsafe extern "C" {
    fn kvmkit_guest_first();
    fn kvmkit_guest_fault();
    fn kvmkit_guest_copy1(to: *mut c_void, from: *const c_void) -> u64;
    fn kvmkit_guest_copy2(to: *mut c_void, from: *const c_void) -> u64;
    fn kvmkit_guest_copy4(to: *mut c_void, from: *const c_void) -> u64;
    fn kvmkit_guest_copy8(to: *mut c_void, from: *const c_void) -> u64;
    fn kvmkit_guest_copy(to: *mut c_void, from: *const c_void, bytes: u64) -> u64;
    fn kvmkit_guest_copy64(to: *mut c_void, from: *const c_void) -> u64;
    fn kvmkit_guest_swap1(at: *mut u8, old: u8, new: u8) -> u64;
    fn kvmkit_guest_swap4(at: *mut u32, old: u32, new: u32) -> u64;
    fn kvmkit_guest_swap8(at: *mut u64, old: u64, new: u64) -> u64;
    fn kvmkit_guest_move(to: *mut c_void, from: *const c_void, count: u64, log2_size: u64) -> u64;
    fn kvmkit_guest_move_down(to: *mut c_void, from: *const c_void, count: u64, log2_size: u64) -> u64;
    fn kvmkit_guest_fill(to: *mut c_void, value: u64, count: u64, log2_size: u64) -> u64;
}

/// The host page behind guest memory cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

fn done(left: u64) -> Result<(), Gone> {
    if left == 0 { Ok(()) } else { Err(Gone) }
}

/// Where a thread continues whose access at `pc` faulted, if `pc` is in one of these routines.
pub fn recovery(pc: u64) -> Option<u64> {
    let (first, fault) = (kvmkit_guest_first as *const () as u64, kvmkit_guest_fault as *const () as u64);
    (first..fault).contains(&pc).then_some(fault)
}

/// Copy `len` bytes; 1, 2, 4 and 8 by one access, as the processor does if they are aligned.
///
/// # Safety
/// One side is the caller's own; the other lies in a memory slot, or at least where nothing but guest memory is ever mapped.
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> Result<(), Gone> {
    let (to, from) = (to.cast(), from.cast());
    // SAFETY: by the caller; a fault is recovered from.
    done(unsafe {
        match len {
            1 => kvmkit_guest_copy1(to, from),
            2 => kvmkit_guest_copy2(to, from),
            4 => kvmkit_guest_copy4(to, from),
            8 => kvmkit_guest_copy8(to, from),
            n @ ..=64 => kvmkit_guest_copy(to, from, n as u64),
            n => kvmkit_guest_move(to, from, n as u64, 0),
        }
    })
}

/// Copy 64 bytes by MOVDIR64B, which the processor must have.
///
/// # Safety
/// `to` is aligned and in a memory slot, `from` the caller's own.
pub unsafe fn copy64(to: *mut u8, from: &[u8; 64]) -> Result<(), Gone> {
    // SAFETY: by the caller; a fault is recovered from.
    done(unsafe { kvmkit_guest_copy64(to.cast(), from.as_ptr().cast()) })
}

macro_rules! swap {
    ($name:ident, $routine:ident, $type:ty) => {
        /// Replace the integer at `at` if it is `old`: whether it was.
        ///
        /// # Safety
        /// `at` is aligned and in a memory slot.
        pub unsafe fn $name(at: *mut $type, old: $type, new: $type) -> Result<bool, Gone> {
            // SAFETY: by the caller; a fault is recovered from.
            match unsafe { $routine(at, old, new) } {
                0 => Ok(true),
                2 => Ok(false),
                _ => Err(Gone),
            }
        }
    };
}
swap!(swap1, kvmkit_guest_swap1, u8);
swap!(swap4, kvmkit_guest_swap4, u32);
swap!(swap8, kvmkit_guest_swap8, u64);

/// REP MOVS of elements of 1, 2, 4 or 8 bytes, `down` from the last to the first, whose addresses these are then: how many
/// elements were moved before memory that is gone.
///
/// # Safety
/// All elements lie in memory slots.
pub unsafe fn repeat_movs(to: *mut u8, from: *const u8, count: u64, size: usize, down: bool) -> u64 {
    let routine = if down { kvmkit_guest_move_down } else { kvmkit_guest_move };
    // SAFETY: by the caller; a fault is recovered from.
    count - unsafe { routine(to.cast(), from.cast(), count, size.trailing_zeros() as u64) }
}

/// REP STOS: how many elements were written.
///
/// # Safety
/// All elements lie in memory slots.
pub unsafe fn repeat_stos(to: *mut u8, value: u64, count: u64, size: usize) -> u64 {
    // SAFETY: by the caller; a fault is recovered from.
    count - unsafe { kvmkit_guest_fill(to.cast(), value, count, size.trailing_zeros() as u64) }
}
