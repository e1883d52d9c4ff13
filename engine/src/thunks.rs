//! The border between Rust and translated code.
//!
//! Inside translated code RSP is the address of `Cpu`, guest registers are in their homes (`emit::home`),
//! guest x87 and vector state is in the host's registers, and DF is 0. `enter` and `leave` cross the
//! border for good and swap the x87/SSE/AVX state; a helper thunk visits Rust from within: it writes every
//! guest register to `Cpu::gpr`, keeps the vector registers, and continues either behind the call or at
//! `Cpu::jump`. It runs with the guest's MXCSR and x87 control word: it must not compute with floating-point numbers.
//! Flags are the translator's affair: at every crossing they are in `Cpu::flags_saved`.

use crate::cpu::Cpu;
use std::arch::naked_asm;
use std::mem::offset_of;

/// State components that guest and host exchange: x87, SSE, AVX; `Cpu::avx512` comes with them. XSAVE and XRSTOR ignore those
/// that the host does not have.
const XSAVE_MASK: u32 = 7;
const AVX512: u32 = crate::xstate::AVX512 as u32;

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
        "stmxcsr [rdi+{mxcsr}]",
        "fnstcw [rdi+{fcw}]",
        "mov eax, {mask}",
        "xor edx, edx",
        "xrstor64 [rdi+{fpu}]",
        "jmp {light}",
        mxcsr = const offset_of!(Cpu, host_mxcsr),
        fcw = const offset_of!(Cpu, host_fcw),
        fpu = const offset_of!(Cpu, fpu),
        mask = const XSAVE_MASK | AVX512,
        light = sym enter_light,
    )
}

/// Jumped to from translated code: return from `enter` with the guest's state complete in `Cpu`.
#[unsafe(naked)]
pub unsafe extern "C" fn leave() {
    naked_asm!(
        "mov rdi, rax",
        "mov rsi, rdx",
        "mov eax, [rsp+{avx512}]",
        "or eax, {mask}",
        "xor edx, edx",
        "xsave64 [rsp+{fpu}]",
        "fninit",
        "fldcw [rsp+{fcw}]",
        "ldmxcsr [rsp+{mxcsr}]",
        "vzeroupper",
        "mov rax, rdi",
        "mov rdx, rsi",
        "jmp {light}",
        mxcsr = const offset_of!(Cpu, host_mxcsr),
        fcw = const offset_of!(Cpu, host_fcw),
        fpu = const offset_of!(Cpu, fpu),
        avx512 = const offset_of!(Cpu, avx512),
        mask = const XSAVE_MASK,
        light = sym leave_light,
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
                "cmp byte ptr [rsp+8+{avx512}], 0",
                "jne 3f",
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
                "4:",
                "mov rdi, rax",
                fill!("8"),
                "cmp qword ptr [rsp+8+{jump}], 0",
                "jne 2f",
                "ret",
                "2:",
                "lea rsp, [rsp+8]",
                "jmp [rsp+{jump}]",
                // The same with all of AVX-512's state.
                "3:",
                "sub rsp, 2120",
                "vmovups [rsp+0], zmm0", "vmovups [rsp+64], zmm1",
                "vmovups [rsp+128], zmm2", "vmovups [rsp+192], zmm3",
                "vmovups [rsp+256], zmm4", "vmovups [rsp+320], zmm5",
                "vmovups [rsp+384], zmm6", "vmovups [rsp+448], zmm7",
                "vmovups [rsp+512], zmm8", "vmovups [rsp+576], zmm9",
                "vmovups [rsp+640], zmm10", "vmovups [rsp+704], zmm11",
                "vmovups [rsp+768], zmm12", "vmovups [rsp+832], zmm13",
                "vmovups [rsp+896], zmm14", "vmovups [rsp+960], zmm15",
                "vmovups [rsp+1024], zmm16", "vmovups [rsp+1088], zmm17",
                "vmovups [rsp+1152], zmm18", "vmovups [rsp+1216], zmm19",
                "vmovups [rsp+1280], zmm20", "vmovups [rsp+1344], zmm21",
                "vmovups [rsp+1408], zmm22", "vmovups [rsp+1472], zmm23",
                "vmovups [rsp+1536], zmm24", "vmovups [rsp+1600], zmm25",
                "vmovups [rsp+1664], zmm26", "vmovups [rsp+1728], zmm27",
                "vmovups [rsp+1792], zmm28", "vmovups [rsp+1856], zmm29",
                "vmovups [rsp+1920], zmm30", "vmovups [rsp+1984], zmm31",
                "kmovq [rsp+2048], k0", "kmovq [rsp+2056], k1",
                "kmovq [rsp+2064], k2", "kmovq [rsp+2072], k3",
                "kmovq [rsp+2080], k4", "kmovq [rsp+2088], k5",
                "kmovq [rsp+2096], k6", "kmovq [rsp+2104], k7",
                "vzeroupper",
                "call {function}",
                "vmovups zmm0, [rsp+0]", "vmovups zmm1, [rsp+64]",
                "vmovups zmm2, [rsp+128]", "vmovups zmm3, [rsp+192]",
                "vmovups zmm4, [rsp+256]", "vmovups zmm5, [rsp+320]",
                "vmovups zmm6, [rsp+384]", "vmovups zmm7, [rsp+448]",
                "vmovups zmm8, [rsp+512]", "vmovups zmm9, [rsp+576]",
                "vmovups zmm10, [rsp+640]", "vmovups zmm11, [rsp+704]",
                "vmovups zmm12, [rsp+768]", "vmovups zmm13, [rsp+832]",
                "vmovups zmm14, [rsp+896]", "vmovups zmm15, [rsp+960]",
                "vmovups zmm16, [rsp+1024]", "vmovups zmm17, [rsp+1088]",
                "vmovups zmm18, [rsp+1152]", "vmovups zmm19, [rsp+1216]",
                "vmovups zmm20, [rsp+1280]", "vmovups zmm21, [rsp+1344]",
                "vmovups zmm22, [rsp+1408]", "vmovups zmm23, [rsp+1472]",
                "vmovups zmm24, [rsp+1536]", "vmovups zmm25, [rsp+1600]",
                "vmovups zmm26, [rsp+1664]", "vmovups zmm27, [rsp+1728]",
                "vmovups zmm28, [rsp+1792]", "vmovups zmm29, [rsp+1856]",
                "vmovups zmm30, [rsp+1920]", "vmovups zmm31, [rsp+1984]",
                "kmovq k0, [rsp+2048]", "kmovq k1, [rsp+2056]",
                "kmovq k2, [rsp+2064]", "kmovq k3, [rsp+2072]",
                "kmovq k4, [rsp+2080]", "kmovq k5, [rsp+2088]",
                "kmovq k6, [rsp+2096]", "kmovq k7, [rsp+2104]",
                "add rsp, 2120",
                "jmp 4b",
                gpr = const GPR,
                jump = const offset_of!(Cpu, jump),
                avx512 = const offset_of!(Cpu, avx512),
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

/// Called by translated code before it uses AVX-512 state that was not in use: helpers have left anything there.
#[unsafe(naked)]
pub unsafe extern "C" fn note_512() {
    naked_asm!(
        "mov byte ptr [rsp+8+{avx512}], {components}",
        "vmovdqa ymm0, ymm0", "vmovdqa ymm1, ymm1",
        "vmovdqa ymm2, ymm2", "vmovdqa ymm3, ymm3",
        "vmovdqa ymm4, ymm4", "vmovdqa ymm5, ymm5",
        "vmovdqa ymm6, ymm6", "vmovdqa ymm7, ymm7",
        "vmovdqa ymm8, ymm8", "vmovdqa ymm9, ymm9",
        "vmovdqa ymm10, ymm10", "vmovdqa ymm11, ymm11",
        "vmovdqa ymm12, ymm12", "vmovdqa ymm13, ymm13",
        "vmovdqa ymm14, ymm14", "vmovdqa ymm15, ymm15",
        "vpxorq zmm16, zmm16, zmm16", "vpxorq zmm17, zmm17, zmm17",
        "vpxorq zmm18, zmm18, zmm18", "vpxorq zmm19, zmm19, zmm19",
        "vpxorq zmm20, zmm20, zmm20", "vpxorq zmm21, zmm21, zmm21",
        "vpxorq zmm22, zmm22, zmm22", "vpxorq zmm23, zmm23, zmm23",
        "vpxorq zmm24, zmm24, zmm24", "vpxorq zmm25, zmm25, zmm25",
        "vpxorq zmm26, zmm26, zmm26", "vpxorq zmm27, zmm27, zmm27",
        "vpxorq zmm28, zmm28, zmm28", "vpxorq zmm29, zmm29, zmm29",
        "vpxorq zmm30, zmm30, zmm30", "vpxorq zmm31, zmm31, zmm31",
        "kxorq k0, k0, k0", "kxorq k1, k1, k1",
        "kxorq k2, k2, k2", "kxorq k3, k3, k3",
        "kxorq k4, k4, k4", "kxorq k5, k5, k5",
        "kxorq k6, k6, k6", "kxorq k7, k7, k7",
        "ret",
        avx512 = const offset_of!(Cpu, avx512),
        components = const AVX512,
    )
}

/// Where translated code finds the thunks: a table at the start of the code cache.
pub const TABLE: [unsafe extern "C" fn(); 9] =
    [leave, memory, interpret, indirect, link, poll, leave_light, step, note_512];

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
    Note512,
}
