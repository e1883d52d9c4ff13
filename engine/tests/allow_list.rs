//! The allow-list holds what it promises: a copied instruction has no effect beside its operands, the implicit
//! registers whose homes are the guest's own, flags, and x87 or vector state.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::classify::{Class, Features, classify};
use _engine::xstate;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use std::collections::BTreeMap;

#[test]
fn copied_instructions_touch_only_what_they_name() {
    let features = Features::ALL;
    let none = Features::NONE;
    let mut factory = InstructionInfoFactory::new();
    let mut seen: BTreeMap<&str, std::collections::HashSet<Code>> = BTreeMap::new();
    common::all_encodings(|b| {
        let i = Decoder::with_ip(64, b, 0x1000, DecoderOptions::NONE).decode();
        if i.is_invalid() {
            return;
        }
        let class = classify(&i, features);
        let name = match class {
            Class::Plain | Class::Careful => "copied",
            Class::InterpretEnd | Class::Interpret | Class::InterpretFpu => "interpreted",
            _ => "rewritten",
        };
        seen.entry(name).or_default().insert(i.code());
        if !matches!(class, Class::Plain | Class::Careful) {
            return;
        }
        assert_eq!(i.flow_control(), FlowControl::Next, "{:?}", i.code());
        assert!(!i.is_privileged() && !i.is_stack_instruction() && !i.is_string_instruction(), "{:?}", i.code());
        let masked = matches!(i.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq);
        let info = factory.info(&i);
        let explicit = |r: Register| {
            (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).full_register() == r)
                || i.memory_base().full_register() == r
                || i.memory_index().full_register() == r
        };
        for u in info.used_registers() {
            let r = u.register().full_register();
            let implicit = r.is_gpr() && !explicit(r);
            let allowed = matches!(r, Register::RAX | Register::RCX | Register::RDX | Register::RBX)
                || (masked && r == Register::RDI)
                || matches!(u.access(), OpAccess::NoMemAccess | OpAccess::None);
            assert!(!implicit || allowed, "{:?} uses {r:?}", i.code());
            assert!(
                !(r.is_segment_register() && matches!(u.access(), OpAccess::Write | OpAccess::ReadWrite)),
                "{:?} writes {r:?}",
                i.code()
            );
        }
        let explicit_memory = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Memory).count();
        assert!(
            masked || info.used_memory().len() <= explicit_memory,
            "{:?} touches memory that it does not name",
            i.code()
        );
        // With x87 and vectors off, only integer instructions may be copied.
        let vector = (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register && (i.op_register(n).is_vector_register() || i.op_register(n).is_st())
        });
        if vector {
            assert!(!matches!(classify(&i, none), Class::Plain | Class::Careful), "{:?}", i.code());
        }
    });
    for denied in [
        Code::Syscall,
        Code::Int3,
        Code::Int_imm8,
        Code::Wrfsbase_r64,
        Code::Wrgsbase_r32,
        Code::Xsetbv,
        Code::Xgetbv,
        Code::Rdtsc,
        Code::Rdtscp,
        Code::Cpuid,
        Code::Xrstor_mem,
        Code::Xsave_mem,
        Code::Fxsave_m512byte,
        Code::Sgdt_m1664,
        Code::Smsw_rm16,
        Code::Mov_Sreg_rm16,
        Code::Wrmsr,
        Code::In_AL_DX,
        Code::Hlt,
        Code::Cli,
        Code::Popfq,
        Code::Iretq,
        Code::Swapgs,
        Code::Invlpg_m,
        Code::Clts,
        Code::Wbinvd,
        Code::Lar_r32_r32m16,
    ] {
        assert!(!seen["copied"].contains(&denied), "{denied:?} must not be copied");
    }
    let counts: Vec<_> = seen.iter().map(|(name, codes)| (*name, codes.len())).collect();
    println!("codes by treatment: {counts:?}");
    assert!(seen["copied"].len() > 900, "{counts:?}");
}

/// What CPUID offers must run: by the interpreter, which leaves to translation what it does not know itself.
#[test]
fn offered_instructions_are_no_invalid_opcodes() {
    use iced_x86::CpuidFeature::*;
    let mut offered = vec![
        INTEL8086,
        INTEL8086_ONLY,
        INTEL186,
        INTEL286,
        INTEL386,
        INTEL486,
        X64,
        FPU,
        FPU287,
        FPU387,
        CMOV,
        CPUID,
        MSR,
        TSC,
        CX8,
        CMPXCHG16B,
        SSE,
        SSE2,
        SSE3,
        SSSE3,
        SSE4_1,
        SSE4_2,
        AES,
        PCLMULQDQ,
        SHA,
        AVX,
        AVX2,
        FMA,
        F16C,
        MMX,
        BMI1,
        BMI2,
        LZCNT,
        POPCNT,
        MOVBE,
        ADX,
        RDRAND,
        RDSEED,
        FXSR,
        XSAVE,
        XSAVEOPT,
        FSGSBASE,
        RDTSCP,
        SYSCALL,
        CLFSH,
        CLFLUSHOPT,
        PREFETCHW,
        MULTIBYTENOP,
        PAUSE,
        CET_IBT,
    ];
    // Feature, subleaf of CPUID leaf 7, register (EAX to EDX), bit.
    let by_leaf_7 = [
        (GFNI, 0, 2, 8),
        (VAES, 0, 2, 9),
        (VPCLMULQDQ, 0, 2, 10),
        (RDPID, 0, 2, 22),
        (CLDEMOTE, 0, 2, 25),
        (MOVDIRI, 0, 2, 27),
        (MOVDIR64B, 0, 2, 28),
        (SERIALIZE, 0, 3, 14),
        (CLWB, 0, 1, 24),
        (AVX_VNNI, 1, 0, 4),
    ];
    let avx512 = [
        (AVX512F, 0, 1, 16),
        (AVX512DQ, 0, 1, 17),
        (AVX512_IFMA, 0, 1, 21),
        (AVX512CD, 0, 1, 28),
        (AVX512BW, 0, 1, 30),
        (AVX512VL, 0, 1, 31),
        (AVX512_VBMI, 0, 2, 1),
        (AVX512_VBMI2, 0, 2, 6),
        (AVX512_VNNI, 0, 2, 11),
        (AVX512_BITALG, 0, 2, 12),
        (AVX512_VPOPCNTDQ, 0, 2, 14),
        (AVX512_FP16, 0, 3, 23),
        (AVX512_BF16, 1, 0, 5),
    ];
    let avx512 = if xstate::supported() & xstate::AVX512 != 0 { &avx512[..] } else { &[] };
    for &(feature, subleaf, register, bit) in by_leaf_7.iter().chain(avx512) {
        if common::host_has(7, subleaf, register, bit) {
            offered.push(feature);
        }
    }
    offered.extend([XSAVEC, XSAVES]);
    let mut m = common::Machine::new(4 << 20);
    let (mut seen, mut wrong) = (std::collections::HashSet::new(), Vec::new());
    common::all_encodings(|b| {
        let i = Decoder::with_ip(64, b, common::FREE, DecoderOptions::NONE).decode();
        // Jumps would run what they lead to.
        let next = matches!(i.flow_control(), FlowControl::Next | FlowControl::Exception);
        if i.is_invalid() || !next || !i.cpuid_features().iter().all(|f| offered.contains(f)) || !seen.insert(i.code())
        {
            return;
        }
        let undefined = matches!(i.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2);
        m.v.reset();
        m.long_mode();
        m.v.interpret_only = true;
        m.v.cpu.cr4 |= _engine::cpu::cr4::FSGSBASE;
        m.v.cpu.xcr0 = xstate::supported();
        m.v.cpu.gpr = [0x2_0000; 16];
        (m.v.cpu.gpr[4], m.v.cpu.gpr[1]) = (common::FREE - 0x100, 1);
        let exit = m.run(&[&b[..i.len()], &[0xf4]].concat());
        if (m.halted_in() == Some(6)) != undefined || matches!(exit, _engine::cpu::Exit::InternalError(_)) {
            wrong.push(format!("{:?} {:x?}: {exit:?}", i.code(), &b[..i.len()]));
        }
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen.len() > 1500, "{}", seen.len());
}
