//! The border between Rust and translated code.
//!
//! Inside translated code RSP is the address of `Cpu`, guest registers are in their homes (`emit::home`),
//! guest x87 and vector state is in the host's registers, and DF is 0. `enter` and `leave` cross the
//! border for good and swap the x87/SSE/AVX state; a helper thunk visits Rust from within: it writes every
//! guest register to `Cpu::gpr`, keeps the vector registers, and continues either behind the call or at
//! `Cpu::jump`. Flags are the translator's affair: at every crossing they are in `Cpu::flags_saved`.

use crate::cpu::Cpu;
use std::arch::naked_asm;
use std::mem::offset_of;

/// State components that guest and host exchange: x87, SSE, AVX.
pub const XSAVE_MASK: u32 = 7;

const GPR: usize = offset_of!(Cpu, gpr);

macro_rules! spill {
    ($base:literal) => {
        concat!(
            "mov [rsp+",
            $base,
            "+{gpr}+0], rax\n",
            "mov [rsp+",
            $base,
            "+{gpr}+8], rcx\n",
            "mov [rsp+",
            $base,
            "+{gpr}+16], rdx\n",
            "mov [rsp+",
            $base,
            "+{gpr}+24], rbx\n",
            "mov [rsp+",
            $base,
            "+{gpr}+32], r9\n",
            "mov [rsp+",
            $base,
            "+{gpr}+40], rbp\n",
            "mov [rsp+",
            $base,
            "+{gpr}+48], r11\n",
            "mov [rsp+",
            $base,
            "+{gpr}+56], r10\n",
            "mov [rsp+",
            $base,
            "+{gpr}+64], r8\n",
            "mov [rsp+",
            $base,
            "+{gpr}+96], r12\n",
            "mov [rsp+",
            $base,
            "+{gpr}+104], r13\n",
            "mov [rsp+",
            $base,
            "+{gpr}+112], r14\n",
            "mov [rsp+",
            $base,
            "+{gpr}+120], r15\n",
        )
    };
}
macro_rules! fill {
    ($base:literal) => {
        concat!(
            "mov rax, [rsp+",
            $base,
            "+{gpr}+0]\n",
            "mov rcx, [rsp+",
            $base,
            "+{gpr}+8]\n",
            "mov rdx, [rsp+",
            $base,
            "+{gpr}+16]\n",
            "mov rbx, [rsp+",
            $base,
            "+{gpr}+24]\n",
            "mov r9, [rsp+",
            $base,
            "+{gpr}+32]\n",
            "mov rbp, [rsp+",
            $base,
            "+{gpr}+40]\n",
            "mov r11, [rsp+",
            $base,
            "+{gpr}+48]\n",
            "mov r10, [rsp+",
            $base,
            "+{gpr}+56]\n",
            "mov r8, [rsp+",
            $base,
            "+{gpr}+64]\n",
            "mov r12, [rsp+",
            $base,
            "+{gpr}+96]\n",
            "mov r13, [rsp+",
            $base,
            "+{gpr}+104]\n",
            "mov r14, [rsp+",
            $base,
            "+{gpr}+112]\n",
            "mov r15, [rsp+",
            $base,
            "+{gpr}+120]\n",
        )
    };
}

/// Run translated code at `entry` until it leaves.
///
/// # Safety
/// `cpu` is a live `CpuBox`'s address, `entry` an entry (flags saved) of a live block.
#[unsafe(naked)]
pub unsafe extern "C" fn enter(cpu: *mut Cpu, entry: u64) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "stmxcsr [rdi+{mxcsr}]",
        "fnstcw [rdi+{fcw}]",
        "mov [rdi+{host_rsp}], rsp",
        "mov eax, {mask}",
        "xor edx, edx",
        "xrstor64 [rdi+{fpu}]",
        "mov rsp, rdi",
        fill!("0"),
        "jmp rsi",
        mxcsr = const offset_of!(Cpu, host_mxcsr),
        fcw = const offset_of!(Cpu, host_fcw),
        host_rsp = const offset_of!(Cpu, host_rsp),
        fpu = const offset_of!(Cpu, fpu),
        gpr = const GPR,
        mask = const XSAVE_MASK,
    )
}

/// Jumped to from translated code: return from `enter` with the guest's state complete in `Cpu`.
#[unsafe(naked)]
pub unsafe extern "C" fn leave() {
    naked_asm!(
        spill!("0"),
        "mov eax, {mask}",
        "xor edx, edx",
        "xsave64 [rsp+{fpu}]",
        "fninit",
        "fldcw [rsp+{fcw}]",
        "ldmxcsr [rsp+{mxcsr}]",
        "mov rsp, [rsp+{host_rsp}]",
        "vzeroupper",
        "cld",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        mxcsr = const offset_of!(Cpu, host_mxcsr),
        fcw = const offset_of!(Cpu, host_fcw),
        host_rsp = const offset_of!(Cpu, host_rsp),
        fpu = const offset_of!(Cpu, fpu),
        gpr = const GPR,
        mask = const XSAVE_MASK,
    )
}

/// `enter` for one integer instruction on a `Cpu` of its own: vector state stays where it is.
///
/// # Safety
/// As for `enter`.
#[unsafe(naked)]
pub unsafe extern "C" fn enter_light(cpu: *mut Cpu, entry: u64) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rdi+{host_rsp}], rsp",
        "mov rsp, rdi",
        fill!("0"),
        "jmp rsi",
        host_rsp = const offset_of!(Cpu, host_rsp),
        gpr = const GPR,
    )
}

/// Jumped to from the code that `enter_light` entered.
#[unsafe(naked)]
pub unsafe extern "C" fn leave_light() {
    naked_asm!(
        spill!("0"),
        "mov rsp, [rsp+{host_rsp}]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        host_rsp = const offset_of!(Cpu, host_rsp),
        gpr = const GPR,
    )
}

/// Define a thunk through which translated code calls `fn(cpu, rdi, rsi, return_address) -> u64`.
///
/// The result comes back in RDI, unless the helper set `Cpu::jump`.
macro_rules! helper {
    ($name:ident, $function:path) => {
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            naked_asm!(
                spill!("8"),
                "mov rcx, [rsp]",
                "mov rdx, rsi",
                "mov rsi, rdi",
                "lea rdi, [rsp+8]",
                "sub rsp, 536",
                "vmovaps [rsp+0], ymm0", "vmovaps [rsp+32], ymm1", "vmovaps [rsp+64], ymm2", "vmovaps [rsp+96], ymm3",
                "vmovaps [rsp+128], ymm4", "vmovaps [rsp+160], ymm5", "vmovaps [rsp+192], ymm6", "vmovaps [rsp+224], ymm7",
                "vmovaps [rsp+256], ymm8", "vmovaps [rsp+288], ymm9", "vmovaps [rsp+320], ymm10", "vmovaps [rsp+352], ymm11",
                "vmovaps [rsp+384], ymm12", "vmovaps [rsp+416], ymm13", "vmovaps [rsp+448], ymm14", "vmovaps [rsp+480], ymm15",
                "vzeroupper",
                "call {function}",
                "vmovaps ymm0, [rsp+0]", "vmovaps ymm1, [rsp+32]", "vmovaps ymm2, [rsp+64]", "vmovaps ymm3, [rsp+96]",
                "vmovaps ymm4, [rsp+128]", "vmovaps ymm5, [rsp+160]", "vmovaps ymm6, [rsp+192]", "vmovaps ymm7, [rsp+224]",
                "vmovaps ymm8, [rsp+256]", "vmovaps ymm9, [rsp+288]", "vmovaps ymm10, [rsp+320]", "vmovaps ymm11, [rsp+352]",
                "vmovaps ymm12, [rsp+384]", "vmovaps ymm13, [rsp+416]", "vmovaps ymm14, [rsp+448]", "vmovaps ymm15, [rsp+480]",
                "add rsp, 536",
                "mov rdi, rax",
                fill!("8"),
                "cmp qword ptr [rsp+8+{jump}], 0",
                "jne 2f",
                "ret",
                "2:",
                "lea rsp, [rsp+8]",
                "jmp [rsp+{jump}]",
                gpr = const GPR,
                jump = const offset_of!(Cpu, jump),
                function = sym $function,
            )
        }
    };
}

helper!(memory, crate::helpers::memory);
helper!(interpret, crate::helpers::interpret);
helper!(step, crate::helpers::step);
helper!(indirect, crate::helpers::indirect);
helper!(link, crate::helpers::link);
helper!(poll, crate::helpers::poll);

/// Where translated code finds the thunks: a table at the start of the code cache.
pub const TABLE: [unsafe extern "C" fn(); 8] = [leave, memory, interpret, indirect, link, poll, leave_light, step];

/// Index into `TABLE`.
#[derive(Clone, Copy)]
pub enum Thunk {
    Leave,
    Memory,
    Interpret,
    Indirect,
    Link,
    Poll,
    LeaveLight,
    Step,
}
