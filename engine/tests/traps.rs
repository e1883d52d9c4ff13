//! What traps on the host when copied code runs is the guest's exception, at the guest's instruction.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exit, rflags};
use common::*;

const DATA: u64 = 0x2_0000;

struct Case {
    name: &'static str,
    code: &'static [u8],
    /// Where in `code` the trapping instruction is.
    at: u64,
    vector: u8,
}

const CASES: &[Case] = &[
    // xor edx, edx; xor ecx, ecx; div rcx
    Case { name: "div by zero", code: &[0x31, 0xd2, 0x31, 0xc9, 0x48, 0xf7, 0xf1], at: 4, vector: 0 },
    // mov rdx, -1 (sign-extended); idiv rbx: the quotient does not fit
    Case {
        name: "idiv overflow",
        code: &[0x48, 0xc7, 0xc2, 0xff, 0xff, 0xff, 0x7f, 0x48, 0xf7, 0xfb],
        at: 7,
        vector: 0,
    },
    // div r11: a register that lives in memory
    Case { name: "div by a spilled zero", code: &[0x31, 0xd2, 0x49, 0xf7, 0xf3], at: 2, vector: 0 },
    // div qword [rdi + 8]
    Case { name: "div by zero in memory", code: &[0x31, 0xd2, 0x48, 0xf7, 0x77, 0x08], at: 2, vector: 0 },
    // movaps xmm0, [rdi + 8]
    Case { name: "misaligned movaps", code: &[0x90, 0x0f, 0x28, 0x47, 0x08], at: 1, vector: 13 },
    // movaps [rdi + 4], xmm0
    Case { name: "misaligned movaps store", code: &[0x0f, 0x29, 0x47, 0x04], at: 0, vector: 13 },
    // cmpxchg16b [rdi + 8]
    Case { name: "misaligned cmpxchg16b", code: &[0x48, 0x0f, 0xc7, 0x4f, 0x08], at: 0, vector: 13 },
    // ldmxcsr [rdi + 0x20] (divide by zero unmasked); xorps xmm1, xmm1; divss xmm0, xmm1
    Case {
        name: "unmasked SSE exception",
        code: &[0x0f, 0xae, 0x57, 0x20, 0x0f, 0x57, 0xc9, 0xf3, 0x0f, 0x5e, 0xc1],
        at: 7,
        vector: 19,
    },
    // fldcw [rdi + 0x24] (zero divide unmasked); fld1; fldz; fdivp; fwait
    Case {
        name: "unmasked x87 exception",
        code: &[0xd9, 0x6f, 0x24, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b],
        at: 9,
        vector: 16,
    },
    // ldmxcsr [rdi + 0x28] with a reserved bit
    Case { name: "reserved MXCSR bit", code: &[0x0f, 0xae, 0x57, 0x28], at: 0, vector: 13 },
];

fn trap(case: &Case, interpret: bool) {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.v.interpret_only = interpret;
    m.write(DATA + 0x20, &0x1d80u32.to_le_bytes());
    m.write(DATA + 0x24, &0x37bu16.to_le_bytes());
    m.write(DATA + 0x28, &0x0100_1f80u32.to_le_bytes());
    let c = &mut m.v.cpu;
    for (n, g) in c.gpr.iter_mut().enumerate() {
        *g = 0x1000 + n as u64;
    }
    (c.gpr[3], c.gpr[4], c.gpr[7], c.gpr[11]) = (1, FREE - 0x100, DATA, 0);
    // The one vector register that the cases read: 1.0.
    c.fpu.0[160..164].copy_from_slice(&1.0f32.to_le_bytes());
    c.set_rflags(rflags::CF | rflags::SF | 2);
    let before = c.gpr;
    let mut code = case.code.to_vec();
    code.push(0xf4);
    let exit = m.run(&code);
    assert_eq!(exit, Exit::Hlt, "{}, interpreted: {interpret}", case.name);
    assert_eq!(
        m.halted_in(),
        Some(case.vector),
        "{}, interpreted: {interpret}, frame {:x?}",
        case.name,
        m.read::<48>(m.v.cpu.gpr[4])
    );
    let frame = m.v.cpu.gpr[4] + if case.vector == 13 { 8 } else { 0 };
    assert_eq!(m.read64(frame), FREE + case.at, "{}: rip", case.name);
    for n in [0, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] {
        assert_eq!(m.v.cpu.gpr[n], before[n], "{}: register {n}", case.name);
    }
    if case.at == 0 {
        let flags = m.read64(frame + 16);
        assert_eq!(flags & rflags::ARITH, rflags::CF | rflags::SF, "{}: flags", case.name);
    }
}

#[test]
fn traps_of_translated_code() {
    for case in CASES {
        trap(case, false);
    }
}

#[test]
fn traps_of_the_careful_path() {
    for case in CASES {
        trap(case, true);
    }
}
