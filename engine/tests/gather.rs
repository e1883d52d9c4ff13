//! AVX2 gathers against the host's own, and their faults half-way.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::Exit;
use common::*;
use std::arch::asm;

const TABLE: u64 = 0x18_0000;

/// Registers 0 (destination), 1 (indices), 2 (mask).
fn set(m: &mut Machine, ymm: &[[u8; 32]; 3]) {
    let fpu = &mut m.v.cpu.fpu.0;
    for (n, y) in ymm.iter().enumerate() {
        fpu[160 + 16 * n..][..16].copy_from_slice(&y[..16]);
        fpu[576 + 16 * n..][..16].copy_from_slice(&y[16..]);
    }
    fpu[512] = 7;
}
fn get(m: &Machine) -> [[u8; 32]; 3] {
    let fpu = &m.v.cpu.fpu.0;
    std::array::from_fn(|n| {
        let mut y = [0; 32];
        y[..16].copy_from_slice(&fpu[160 + 16 * n..][..16]);
        y[16..].copy_from_slice(&fpu[576 + 16 * n..][..16]);
        y
    })
}

macro_rules! native {
    ($text:literal, $state:expr, $table:expr) => {{
        let s: &mut [[u8; 32]; 3] = $state;
        // SAFETY: the indices stay within the table; AVX2 was checked for.
        unsafe {
            asm!(
                "vmovdqu ymm0, [{s}]", "vmovdqu ymm1, [{s}+32]", "vmovdqu ymm2, [{s}+64]",
                $text,
                "vmovdqu [{s}], ymm0", "vmovdqu [{s}+32], ymm1", "vmovdqu [{s}+64], ymm2", "vzeroupper",
                s = in(reg) s.as_mut_ptr(), in("rax") $table, out("ymm0") _, out("ymm1") _, out("ymm2") _,
            )
        }
    }};
}

#[test]
fn gathers_as_the_host_does() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        println!("no AVX2 here");
        return;
    }
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u32
    };
    type Native = fn(&mut [[u8; 32]; 3], *const u8);
    let forms: [(&[u8], usize, Native); 6] = [
        (&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x88], 4, |s, t| native!("vpgatherdd ymm0, [rax+ymm1*4], ymm2", s, t)),
        (&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x88], 4, |s, t| native!("vpgatherdd xmm0, [rax+xmm1*4], xmm2", s, t)),
        (&[0xc4, 0xe2, 0xed, 0x90, 0x04, 0xc8], 4, |s, t| native!("vpgatherdq ymm0, [rax+xmm1*8], ymm2", s, t)),
        (&[0xc4, 0xe2, 0x6d, 0x91, 0x04, 0x88], 8, |s, t| native!("vpgatherqd xmm0, [rax+ymm1*4], xmm2", s, t)),
        (&[0xc4, 0xe2, 0x69, 0x91, 0x04, 0x88], 8, |s, t| native!("vpgatherqd xmm0, [rax+xmm1*4], xmm2", s, t)),
        (&[0xc4, 0xe2, 0xed, 0x91, 0x04, 0xc8], 8, |s, t| native!("vpgatherqq ymm0, [rax+ymm1*8], ymm2", s, t)),
    ];
    let table: Vec<u8> = (0..0x1000).map(|_| random() as u8).collect();
    for interpret in [false, true] {
        let mut m = Machine::new(4 << 20);
        m.v.interpret_only = interpret;
        m.long_mode();
        m.write(TABLE, &table);
        for (code, index, native) in forms {
            for _ in 0..20 {
                let mut state: [[u8; 32]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| random() as u8));
                for at in (0..32).step_by(index) {
                    let n = random() as i32 % 200;
                    state[1][at..at + index].copy_from_slice(&(n as i64).to_le_bytes()[..index]);
                }
                set(&mut m, &state);
                m.v.cpu.gpr[0] = TABLE + 0x800;
                assert_eq!(m.run(&[code, &[0xf4]].concat()), Exit::Hlt);
                native(&mut state, table[0x800..].as_ptr());
                assert_eq!(get(&m), state, "{code:x?}");
            }
        }
    }
}

#[test]
fn a_fault_shows_the_lanes_that_are_done() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.write64(PML4 + 0x3000 + 8 * 0x181, 0); // the page behind the table's
    m.write64(TABLE, 0x1111_1111_2222_2222);
    let mut state = [[0x55; 32], [0; 32], [0xff; 32]];
    state[1][8..12].copy_from_slice(&0x400u32.to_le_bytes());
    set(&mut m, &state);
    m.v.cpu.gpr[0] = TABLE;
    assert_eq!(m.run(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x88, 0xf4]), Exit::Hlt);
    assert_eq!((m.halted_in(), m.v.cpu.cr2), (Some(14), TABLE + 0x1000));
    let after = get(&m);
    assert_eq!(after[0][..12], [0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x55, 0x55, 0x55, 0x55]);
    assert_eq!((&after[2][..8], &after[2][8..]), (&[0u8; 8][..], &[0xffu8; 24][..]));
}
