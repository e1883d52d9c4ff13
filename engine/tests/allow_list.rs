//! The allow-list holds what it promises: a copied instruction has no effect beside its operands, the implicit
//! registers whose homes are the guest's own, flags, and x87 or vector state.

use _engine::classify::{Class, Features, classify};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use std::collections::BTreeMap;

/// Every opcode byte under every map and mandatory prefix, with all ModRM bytes.
fn all_encodings(mut visit: impl FnMut(&[u8])) {
    let legacy: [&[u8]; 4] = [&[], &[0x66], &[0xf2], &[0xf3]];
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    let tail = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x08];
    for prefix in legacy {
        for rex in [None, Some(0x41), Some(0x48), Some(0x4f)] {
            for map in maps {
                for opcode in 0..=255u8 {
                    for modrm in 0..=255u8 {
                        let mut b = Vec::with_capacity(20);
                        b.extend(prefix);
                        b.extend(rex);
                        b.extend(map);
                        b.extend([opcode, modrm]);
                        b.extend(tail);
                        visit(&b);
                    }
                }
            }
        }
    }
    for map in 1..=3u8 {
        for payload in 0..=255u8 {
            for opcode in 0..=255u8 {
                for modrm in [0x00, 0x05, 0x44, 0x81, 0xc1, 0xd0, 0xd8, 0xe3, 0xfa] {
                    let mut b = vec![0xc4, 0xe0 | map, payload, opcode, modrm];
                    b.extend(tail);
                    visit(&b);
                }
            }
        }
    }
}

#[test]
fn copied_instructions_touch_only_what_they_name() {
    let features = Features { x87: true, sse: true, avx: true };
    let none = Features { x87: false, sse: false, avx: false };
    let mut factory = InstructionInfoFactory::new();
    let mut seen: BTreeMap<&str, std::collections::HashSet<Code>> = BTreeMap::new();
    all_encodings(|b| {
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
