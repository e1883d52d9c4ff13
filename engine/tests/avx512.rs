//! AVX-512: masked operands that are partly missing, scatters, state that comes and goes, against the processor.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::Exit;
use _engine::xstate;
use common::*;

const TABLE: u64 = 0x18_0000;

/// A machine with AVX-512, or None.
fn machine(interpret: bool) -> Option<Machine> {
    if xstate::supported() & xstate::AVX512 == 0 {
        println!("no AVX-512 here");
        return None;
    }
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.v.interpret_only = interpret;
    m.v.cpu.xcr0 = xstate::supported();
    m.v.cpu.fpu.0[512] = 0xe7;
    Some(m)
}
fn set_zmm(m: &mut Machine, n: usize, z: &[u8; 64]) {
    let fpu = &mut m.v.cpu.fpu.0;
    fpu[160 + 16 * n..][..16].copy_from_slice(&z[..16]);
    fpu[xstate::offset(xstate::AVX) + 16 * n..][..16].copy_from_slice(&z[16..32]);
    fpu[xstate::offset(xstate::ZMM_HI256) + 32 * n..][..32].copy_from_slice(&z[32..]);
}
fn zmm(m: &Machine, n: usize) -> [u8; 64] {
    let (fpu, mut z) = (&m.v.cpu.fpu.0, [0; 64]);
    let in_use = fpu[512] as u64;
    for (bit, at, range) in [
        (xstate::SSE, 160 + 16 * n, 0..16),
        (xstate::AVX, xstate::offset(xstate::AVX) + 16 * n, 16..32),
        (xstate::ZMM_HI256, xstate::offset(xstate::ZMM_HI256) + 32 * n, 32..64),
    ] {
        if in_use & bit != 0 {
            let len = range.len();
            z[range].copy_from_slice(&fpu[at..at + len]);
        }
    }
    z
}
fn set_k(m: &mut Machine, n: usize, value: u64) {
    m.v.cpu.fpu.0[xstate::offset(xstate::OPMASK) + 8 * n..][..8].copy_from_slice(&value.to_le_bytes());
}
fn k(m: &Machine, n: usize) -> u64 {
    let at = xstate::offset(xstate::OPMASK) + 8 * n;
    u64::from_le_bytes(m.v.cpu.fpu.0[at..at + 8].try_into().unwrap())
}
fn pattern() -> [u8; 64] {
    std::array::from_fn(|n| n as u8 + 1)
}

/// With rax 32 bytes before a page that is absent: instruction, mask in k1, whether it faults.
#[test]
fn what_a_mask_leaves_out_need_not_be_there() {
    let rows: &[(&str, &[u8], u64, bool)] = &[
        ("vmovdqu8 zmm0{k1}{z}, [rax]", &[0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x00], 0xffff_ffff, false),
        ("vmovdqu8 zmm0{k1}{z}, [rax]", &[0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x00], 1 << 32, true),
        ("vmovdqu8 [rax]{k1}, zmm1", &[0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x08], 0x0f0f_0ff0, false),
        ("vmovdqu8 [rax]{k1}, zmm1", &[0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x08], 1 << 63 | 1, true),
        ("vpaddd zmm0{k1}, zmm1, [rax]", &[0x62, 0xf1, 0x75, 0x49, 0xfe, 0x00], 0xff, false),
        ("vpaddd zmm0{k1}, zmm1, [rax]", &[0x62, 0xf1, 0x75, 0x49, 0xfe, 0x00], 0x1ff, true),
        // A permutation needs all of its source, whatever the mask.
        ("vpermd zmm0{k1}, zmm1, [rax]", &[0x62, 0xf2, 0x75, 0x49, 0x36, 0x00], 0xff, true),
        ("vpcompressd [rax]{k1}, zmm1", &[0x62, 0xf2, 0x7d, 0x49, 0x8b, 0x08], 0x5555, false),
        ("vpcompressd [rax]{k1}, zmm1", &[0x62, 0xf2, 0x7d, 0x49, 0x8b, 0x08], 0x5557, true),
        ("vpexpandd zmm0{k1}, [rax]", &[0x62, 0xf2, 0x7d, 0x49, 0x89, 0x00], 0xaaaa, false),
        ("vpexpandd zmm0{k1}, [rax]", &[0x62, 0xf2, 0x7d, 0x49, 0x89, 0x00], 0xaaab, true),
        ("vpmovqd [rax]{k1}, zmm1", &[0x62, 0xf2, 0x7e, 0x49, 0x35, 0x08], 0xff, false),
    ];
    for interpret in [false, true] {
        for (what, code, mask, faults) in rows {
            let Some(mut m) = machine(interpret) else { return };
            let rax = TABLE + 0x1000 - 32;
            m.write64(PML4 + 0x3000 + 8 * 0x181, 0);
            m.write(TABLE + 0xf00, &[0xee; 256]);
            m.write(rax, &pattern()[..32]);
            m.write(TABLE + 0x1000, &[0x77; 64]);
            set_zmm(&mut m, 1, &[0; 64].map(|_: u8| 3));
            set_k(&mut m, 1, *mask);
            m.v.cpu.gpr[0] = rax;
            assert_eq!(m.run(&[code, &[0xf4][..]].concat()), Exit::Hlt, "{what}");
            let expected = faults.then_some((14, TABLE + 0x1000));
            let stopped = m.halted_in().map(|vector| (vector, m.v.cpu.cr2 & !0xfff));
            assert_eq!(stopped, expected, "{what} {mask:#x}");
            assert_eq!(m.read::<64>(TABLE + 0x1000), [0x77; 64], "{what}");
            let memory = m.read::<32>(rax);
            let untouched: [u8; 32] = pattern()[..32].try_into().unwrap();
            if *faults {
                assert_eq!(memory, untouched, "{what}: nothing is stored");
            } else if what.starts_with("vmovdqu8 [") {
                let stored = std::array::from_fn(|n| if mask >> n & 1 != 0 { 3 } else { untouched[n] });
                assert_eq!(memory, stored, "{what}");
            } else if what.starts_with("vmovdqu8 z") {
                let z: [u8; 64] = std::array::from_fn(|n| if n < 32 { untouched[n] } else { 0 });
                assert_eq!(zmm(&m, 0), z, "{what}");
            }
        }
    }
}

#[test]
fn a_masked_store_to_a_device_writes_the_lanes_of_the_mask() {
    for interpret in [false, true] {
        let Some(mut m) = machine(interpret) else { return };
        m.write64(PML4 + 0x3000 + 8 * 0x181, 0xd000_0000 | P | W);
        set_zmm(&mut m, 1, &pattern());
        set_k(&mut m, 1, 0b1010);
        m.v.cpu.gpr[0] = TABLE + 0x1000;
        // vmovdqu32 [rax]{k1}, zmm1
        let mut exit = m.run(&[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x08, 0xf4]);
        for (gpa, data) in [(0xd000_0004u64, [5, 6, 7, 8]), (0xd000_000c, [13, 14, 15, 16])] {
            let mut eight = [0; 8];
            eight[..4].copy_from_slice(&data);
            assert_eq!(exit, Exit::Mmio { gpa, len: 4, write: true, data: eight });
            exit = _engine::run::run(&mut m.v);
        }
        assert_eq!(exit, Exit::Hlt);
    }
}

#[test]
fn gathers_and_scatters() {
    for interpret in [false, true] {
        let Some(mut m) = machine(interpret) else { return };
        let mut index = [0; 64];
        for n in 0..16u32 {
            m.write(TABLE + 0x100 * n as u64, &(n * 0x0101_0101).to_le_bytes());
            index[n as usize * 4..][..4].copy_from_slice(&(0x40 * (15 - n)).to_le_bytes());
        }
        set_zmm(&mut m, 1, &index);
        set_zmm(&mut m, 0, &[0xff; 64]);
        set_k(&mut m, 2, 0x7ffe);
        m.v.cpu.gpr[0] = TABLE;
        // vpgatherdd zmm0{k2}, [rax+zmm1*4]
        assert_eq!(m.run(&[0x62, 0xf2, 0x7d, 0x4a, 0x90, 0x04, 0x88, 0xf4]), Exit::Hlt);
        assert_eq!(m.halted_in(), None);
        let expected = std::array::from_fn(|n| match n / 4 {
            0 | 15 => 0xff,
            lane => 15 - lane as u8,
        });
        assert_eq!((zmm(&m, 0), k(&m, 2)), (expected, 0));
        // vpscatterdd [rax+zmm1*4]{k3}, zmm0, with a fault half-way.
        m.write64(PML4 + 0x3000 + 8 * 0x180, TABLE | P);
        set_k(&mut m, 3, 0xffff);
        m.v.cpu.gpr[0] = TABLE - 0x400;
        assert_eq!(m.run(&[0x62, 0xf2, 0x7d, 0x4b, 0xa0, 0x04, 0x88, 0xf4]), Exit::Hlt);
        assert_eq!((m.halted_in(), m.v.cpu.cr2, k(&m, 3)), (Some(14), TABLE - 0x400 + 0xf00, 0xffff));
        m.write64(PML4 + 0x3000 + 8 * 0x180, TABLE | P | W | U);
        assert_eq!(m.run(&[0x62, 0xf2, 0x7d, 0x4b, 0xa0, 0x04, 0x88, 0xf4]), Exit::Hlt);
        assert_eq!((m.halted_in(), k(&m, 3)), (None, 0));
        assert_eq!(m.read::<4>(TABLE - 0x400), [0xff; 4], "the last lane");
        assert_eq!(m.read::<4>(TABLE - 0x400 + 0xe00), [14; 4]);
        // Without a mask it is no instruction.
        assert_eq!(m.run(&[0x62, 0xf2, 0x7d, 0x48, 0x90, 0x04, 0x88, 0xf4]), Exit::Hlt);
        assert_eq!(m.halted_in(), Some(6));
    }
}

/// A component that is not in use reads as zero, even after helpers of the engine have used its registers.
#[test]
fn state_that_was_not_in_use_is_zero() {
    let Some(mut m) = machine(false) else { return };
    m.v.cpu.fpu.0[512] = 7;
    for component in xstate::components() {
        m.v.cpu.fpu.0[component.offset..component.offset + component.size].fill(0x99);
    }
    // cpuid, twice (helpers); vpaddd zmm0, zmm16, zmm31; kmovq rbx, k5; hlt
    let code = [0x0f, 0xa2, 0x0f, 0xa2, 0x62, 0x91, 0x7d, 0x40, 0xfe, 0xc7, 0xc4, 0xe1, 0xfb, 0x93, 0xdd, 0xf4];
    m.v.cpu.gpr[3] = 1;
    assert_eq!(m.run(&code), Exit::Hlt);
    assert_eq!((m.halted_in(), zmm(&m, 0), m.v.cpu.gpr[3]), (None, [0; 64], 0));
}

#[test]
fn without_xcr0_there_is_no_avx_512() {
    for interpret in [false, true] {
        let Some(mut m) = machine(interpret) else { return };
        m.v.cpu.xcr0 = 7;
        // vpaddd zmm0, zmm1, zmm2; kmovw eax, k1
        for code in [&[0x62, 0xf1, 0x75, 0x48, 0xfe, 0xc2][..], &[0xc5, 0xf8, 0x93, 0xc1]] {
            assert_eq!(m.run(code), Exit::Hlt);
            assert_eq!(m.halted_in(), Some(6), "{code:x?}");
        }
    }
}
