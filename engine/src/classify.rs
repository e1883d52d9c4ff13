//! Which instructions translated code may contain, and how each is treated: the allow-list.
//!
//! Same-ISA translation copies an instruction only if the list names it; everything else goes to the
//! interpreter, which raises #UD for what it does not know either. An instruction belongs on the list if
//! all it does is read and write explicit operands, the implicit registers whose homes are the same as the
//! guest's (rax, rcx, rdx, rbx), arithmetic flags, and x87 or vector state.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Copied, operands rewritten.
    Plain,
    /// No architectural effect.
    Nop,
    Lea,
    Push,
    Pop,
    Leave,
    Cli,
    Sti,
    Rdtsc,
    Rdtscp,
    /// BT and its kin with a register offset into memory.
    Bit,
    Pushf,
    /// Executed by the interpreter from within the block, which goes on behind it.
    Interpret,
    /// The same, but the block ends: mode, mapping or rip may have changed.
    InterpretEnd,
    /// x87 or vector state as a whole: the interpreter, with that state in memory.
    InterpretFpu,
    /// Copied, but its operand always goes through a buffer (careful path).
    Careful,
    Hlt,
    Jcc,
    Jrcxz,
    Loop,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
}

impl Class {
    pub fn ends_block(self) -> bool {
        use Class::*;
        matches!(
            self,
            InterpretEnd
                | InterpretFpu
                | Careful
                | Hlt
                | Jcc
                | Jrcxz
                | Loop
                | Jmp
                | JmpIndirect
                | Call
                | CallIndirect
                | Ret
        )
    }
}

/// What the current mode allows beside integer instructions.
#[derive(Clone, Copy)]
pub struct Features {
    pub x87: bool,
    pub sse: bool,
    pub avx: bool,
    pub avx512: bool,
}

impl Features {
    pub const ALL: Self = Self { x87: true, sse: true, avx: true, avx512: true };
    pub const NONE: Self = Self { x87: false, sse: false, avx: false, avx512: false };
}

fn is_special(register: Register) -> bool {
    register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr()
}

pub fn classify(i: &Instruction, features: Features) -> Class {
    use Mnemonic::*;
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    match i.mnemonic() {
        Add | Adc | Sub | Sbb | And | Or | Xor | Cmp | Test | Movzx | Movsx | Movsxd | Xchg | Cmpxchg | Cmpxchg8b
        | Cmpxchg16b | Xadd | Inc | Dec | Neg | Not | Mul | Imul | Div | Idiv | Shl | Sal | Shr | Sar | Rol | Ror
        | Rcl | Rcr | Shld | Shrd | Bsf | Bsr | Bswap | Cbw | Cwde | Cdqe | Cwd | Cdq | Cqo | Lahf | Sahf | Clc
        | Stc | Cmc | Movbe | Popcnt | Lzcnt | Tzcnt | Crc32 | Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Pdep
        | Pext | Rorx | Sarx | Shlx | Shrx | Mulx | Adcx | Adox | Lfence | Mfence | Sfence | Rdrand | Rdseed
        | Movnti | Movdiri | Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp
        | Setnp | Setl | Setge | Setle | Setg | Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova
        | Cmovs | Cmovns | Cmovp | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => Class::Plain,
        Mov if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is_special(i.op_register(n))) => {
            // Reading a segment register changes nothing; loading one may shadow interrupts or fault.
            if i.op1_kind() == OpKind::Register && (i.op1_register().is_segment_register() || i.op1_register().is_cr())
            {
                Class::Interpret
            } else {
                Class::InterpretEnd
            }
        }
        Mov => Class::Plain,
        // A register bit offset reaches beyond the operand in memory.
        Bt | Bts | Btr | Btc if memory && i.op1_kind() == OpKind::Register => {
            if i.op1_register().size() >= 4 {
                Class::Bit
            } else {
                Class::Interpret
            }
        }
        Bt | Bts | Btr | Btc => Class::Plain,
        Nop | Reservednop | Endbr64 | Endbr32 | Rdsspd | Rdsspq | Cldemote | Prefetchnta | Prefetcht0 | Prefetcht1
        | Prefetcht2 | Prefetchw | Prefetchwt1 | Prefetchit0 | Prefetchit1 | Prefetch => Class::Nop,
        Lea => Class::Lea,
        Push => match i.code() {
            Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Class::Push,
            _ => Class::Interpret,
        },
        Pop => match i.code() {
            Code::Pop_r64 | Code::Pop_rm64 => Class::Pop,
            _ => Class::InterpretEnd,
        },
        Leave if i.code() == Code::Leaveq => Class::Leave,
        Cli => Class::Cli,
        Sti => Class::Sti,
        Rdtsc => Class::Rdtsc,
        Rdtscp => Class::Rdtscp,
        Pushfq => Class::Pushf,
        Pause | Clflush | Clflushopt | Clwb | Rdpid | Cpuid | Rdmsr | Movsb | Movsw | Movsd | Movsq | Stosb | Stosw
        | Stosd | Stosq | Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq | Lodsb | Lodsw | Lodsd
        | Lodsq | Rdfsbase | Wrfsbase | Rdgsbase | Wrgsbase | Swapgs | Cld | Std | Xlatb | Enter | Xgetbv
            if i.op_count() == 0 || !has_vector(i) =>
        {
            Class::Interpret
        }
        // Raises what an x87 instruction before it left pending.
        Wait => {
            if features.x87 {
                Class::Plain
            } else {
                Class::InterpretEnd
            }
        }
        Hlt => Class::Hlt,
        Jo | Jno | Jb | Jae | Je | Jne | Jbe | Ja | Js | Jns | Jp | Jnp | Jl | Jge | Jle | Jg => {
            if i.op0_kind() == OpKind::NearBranch64 { Class::Jcc } else { Class::InterpretEnd }
        }
        Jrcxz => Class::Jrcxz,
        Mnemonic::Loop if i.code() == Code::Loop_rel8_64_RCX => Class::Loop,
        Jmp => match i.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Class::Jmp,
            Code::Jmp_rm64 => Class::JmpIndirect,
            _ => Class::InterpretEnd,
        },
        Call => match i.code() {
            Code::Call_rel32_64 => Class::Call,
            Code::Call_rm64 => Class::CallIndirect,
            _ => Class::InterpretEnd,
        },
        Ret => match i.code() {
            Code::Retnq | Code::Retnq_imm16 => Class::Ret,
            _ => Class::InterpretEnd,
        },
        _ => vector(i, features),
    }
}

fn has_vector(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_vector_register())
}

/// x87, MMX, SSE and AVX instructions.
fn vector(i: &Instruction, features: Features) -> Class {
    use Mnemonic::*;
    match i.mnemonic() {
        // The whole state at once, in memory as the guest's CPUID describes it.
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64
        | Xsaves | Xsaves64 | Xrstor | Xrstor64 | Xrstors | Xrstors64 => return Class::InterpretFpu,
        // These write the address of the last x87 instruction: the host's, which the careful path clears.
        Fnstenv | Fnsave => return if features.x87 { Class::Careful } else { Class::InterpretEnd },
        _ => {}
    }
    if i.is_vsib() {
        return Class::InterpretEnd;
    }
    if i.is_privileged() || !i.cpuid_features().iter().all(|f| is_copied(*f)) || i.cpuid_features().is_empty() {
        return Class::InterpretEnd;
    }
    let x87 = i.cpuid_features().iter().any(|f| {
        use CpuidFeature::*;
        // FCMOVcc and FCOMI have CMOV beside the FPU.
        matches!(f, FPU | FPU287 | FPU387 | MMX | CMOV)
    });
    let allowed = if uses_avx512(i) {
        features.avx512
    } else if i.encoding() == EncodingKind::VEX {
        features.avx
    } else if x87 {
        // What moves between MMX and SSE registers needs both.
        features.x87 && (features.sse || !i.cpuid_features().iter().any(|f| is_vector(*f)))
    } else {
        features.sse
    };
    if !allowed {
        return Class::InterpretEnd;
    }
    // Their operand is at [rdi].
    if matches!(i.mnemonic(), Maskmovdqu | Vmaskmovdqu | Maskmovq) { Class::Careful } else { Class::Plain }
}

/// Does `i` use opmask or EVEX state?
pub fn uses_avx512(i: &Instruction) -> bool {
    i.encoding() == EncodingKind::EVEX
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_k())
}

fn is_vector(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        SSE | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AES
            | PCLMULQDQ
            | SHA
            | GFNI
            | AVX
            | AVX2
            | FMA
            | F16C
            | VAES
            | VPCLMULQDQ
            | AVX_VNNI
            | AVX512F
            | AVX512CD
            | AVX512DQ
            | AVX512BW
            | AVX512VL
            | AVX512_IFMA
            | AVX512_VBMI
            | AVX512_VBMI2
            | AVX512_VNNI
            | AVX512_BITALG
            | AVX512_VPOPCNTDQ
            | AVX512_BF16
            | AVX512_FP16
    )
}

/// Features whose instructions only compute on x87, MMX and vector registers.
fn is_copied(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(feature, FPU | FPU287 | FPU387 | MMX | CMOV) || is_vector(feature)
}
