//! FXSAVE, XSAVE and their inverses on the state in `Cpu::fpu`, which has XSAVE's standard format (Intel SDM
//! volume 1, chapters 10.5 and 13).

use super::{address, load, register, segment_index};
use crate::access;
use crate::cpu::{Exception, Res, Vcpu, cr0, cr4};
use crate::segment::linear;
use crate::sys::{self, edx_eax};
use iced_x86::{Instruction, Mnemonic, Register};

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const HEADER: usize = 512;
const YMM: std::ops::Range<usize> = 576..832;

pub(super) fn execute(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    use Mnemonic::*;
    let xsave = !matches!(i.mnemonic(), Fxsave | Fxsave64 | Fxrstor | Fxrstor64);
    if xsave {
        if v.cpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(Exception::ud().into());
        }
    } else if v.cpu.cr0 & cr0::EM != 0 {
        return Err(Exception::new(7).into());
    }
    if v.cpu.cr0 & cr0::TS != 0 {
        return Err(Exception::new(7).into());
    }
    let wide = matches!(i.mnemonic(), Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xrstor64);
    match i.mnemonic() {
        Fxsave | Fxsave64 => fxsave(v, i, wide),
        Fxrstor | Fxrstor64 => fxrstor(v, i),
        Xrstor | Xrstor64 => xrstor(v, i),
        _ => save(v, i, wide),
    }
}

/// The legacy region without what only the operating system's bytes 464–511 hold, and without the host's
/// addresses of the last x87 instruction and operand.
fn legacy(v: &Vcpu) -> [u8; 512] {
    let mut b: [u8; 512] = v.cpu.fpu.0[..512].try_into().unwrap();
    if v.cpu.fpu.0[HEADER] as u64 & X87 == 0 {
        b[..24].fill(0);
        b[32..160].fill(0);
        b[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
    if v.cpu.fpu.0[HEADER] as u64 & SSE == 0 {
        b[160..416].fill(0);
    }
    b[6..24].fill(0); // FOP, FIP, FDP
    b[28..32].copy_from_slice(&0xffffu32.to_le_bytes()); // MXCSR_MASK
    b
}

fn fxsave(v: &mut Vcpu, i: &Instruction, _wide: bool) -> Res<()> {
    let la = address(&v.cpu, i, 512, true)?;
    aligned(la, 16)?;
    let b = legacy(v);
    let mode = v.cpu.mmu_mode();
    access::check_write(v, la, 512, mode)?;
    access::write(v, la, &b[..464], mode)
}

fn fxrstor(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    let la = address(&v.cpu, i, 512, false)?;
    aligned(la, 16)?;
    let mut b = [0u8; 512];
    let mode = v.cpu.mmu_mode();
    access::read(v, la, &mut b, mode)?;
    check_mxcsr(&b)?;
    v.cpu.fpu.0[..416].copy_from_slice(&b[..416]);
    v.cpu.fpu.0[HEADER] |= (X87 | SSE) as u8;
    Ok(())
}

fn save(v: &mut Vcpu, i: &Instruction, _wide: bool) -> Res<()> {
    let mask = edx_eax(&v.cpu) & v.cpu.xcr0;
    let size = sys::xsave_size(v.cpu.xcr0) as u64;
    let la = address(&v.cpu, i, size, true)?;
    aligned(la, 64)?;
    let mode = v.cpu.mmu_mode();
    access::check_write(v, la, size, mode)?;
    let in_use = v.cpu.fpu.0[HEADER] as u64;
    let b = legacy(v);
    if mask & X87 != 0 {
        access::write(v, la, &b[..24], mode)?;
        access::write(v, la + 32, &b[32..160], mode)?;
    }
    if mask & (SSE | AVX) != 0 {
        access::write(v, la + 24, &b[24..32], mode)?;
    }
    if mask & SSE != 0 {
        access::write(v, la + 160, &b[160..416], mode)?;
    }
    if mask & AVX != 0 {
        let mut ymm = [0u8; 256];
        if in_use & AVX != 0 {
            ymm.copy_from_slice(&v.cpu.fpu.0[YMM]);
        }
        access::write(v, la + 576, &ymm, mode)?;
    }
    let old = access::read_u64(v, la + HEADER as u64, mode)?;
    access::write_u64(v, la + HEADER as u64, old & !mask | in_use & mask, mode)
}

fn xrstor(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    let mask = edx_eax(&v.cpu) & v.cpu.xcr0;
    let size = sys::xsave_size(v.cpu.xcr0) as usize;
    let la = address(&v.cpu, i, size as u64, false)?;
    aligned(la, 64)?;
    let mut b = [0u8; 832];
    let mode = v.cpu.mmu_mode();
    access::read(v, la, &mut b[..size], mode)?;
    let header = u64::from_le_bytes(b[512..520].try_into().unwrap());
    // Compacted areas are not offered; the rest of the header is reserved.
    if header & !v.cpu.xcr0 != 0 || b[520..576].iter().any(|&x| x != 0) {
        return Err(Exception::gp(0).into());
    }
    if mask & (SSE | AVX) != 0 {
        check_mxcsr(&b)?;
        v.cpu.fpu.0[24..28].copy_from_slice(&b[24..28]);
    }
    let fpu = &mut v.cpu.fpu.0;
    for (component, ranges) in [(X87, [0..24, 32..160]), (SSE, [160..416, 160..160]), (AVX, [YMM, 576..576])] {
        if mask & component == 0 {
            continue;
        }
        if header & component != 0 {
            for r in ranges {
                fpu[r.clone()].copy_from_slice(&b[r]);
            }
            fpu[HEADER] |= component as u8;
        } else {
            for r in ranges {
                fpu[r].fill(0);
            }
            fpu[HEADER] &= !(component as u8);
        }
    }
    Ok(())
}

fn aligned(la: u64, alignment: u64) -> Res<()> {
    if la % alignment != 0 { Err(Exception::gp(0).into()) } else { Ok(()) }
}

fn check_mxcsr(b: &[u8]) -> Res<()> {
    if b[26] | b[27] != 0 { Err(Exception::gp(0).into()) } else { Ok(()) }
}

fn vector(v: &Vcpu, r: Register) -> [u8; 32] {
    let (n, mut b) = (r.number(), [0; 32]);
    let in_use = v.cpu.fpu.0[HEADER] as u64;
    if in_use & SSE != 0 {
        b[..16].copy_from_slice(&v.cpu.fpu.0[160 + n * 16..176 + n * 16]);
    }
    if in_use & AVX != 0 {
        b[16..].copy_from_slice(&v.cpu.fpu.0[576 + n * 16..592 + n * 16]);
    }
    b
}

fn set_vector(v: &mut Vcpu, r: Register, b: &[u8; 32]) {
    let n = r.number();
    let fpu = &mut v.cpu.fpu.0;
    for (component, range) in [(SSE, 160..416), (AVX, YMM)] {
        if fpu[HEADER] as u64 & component == 0 {
            fpu[range].fill(0);
            fpu[HEADER] |= component as u8;
        }
    }
    fpu[160 + n * 16..176 + n * 16].copy_from_slice(&b[..16]);
    fpu[576 + n * 16..592 + n * 16].copy_from_slice(&b[16..]);
}

/// AVX2's gathers: elements whose mask bit is set, each from an address of its own. One that faults leaves
/// those before it done and their mask bits clear, so that the instruction can start again.
pub(super) fn gather(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    use Mnemonic::*;
    let (index_size, size) = match i.mnemonic() {
        Vpgatherdd | Vgatherdps => (4, 4),
        Vpgatherdq | Vgatherdpd => (4, 8),
        Vpgatherqd | Vgatherqps => (8, 4),
        Vpgatherqq | Vgatherqpd => (8, 8),
        _ => return Err(Exception::ud().into()),
    };
    let (to, index, mask) = (i.op0_register(), i.memory_index(), i.op2_register());
    if to.number() == index.number() || to.number() == mask.number() || index.number() == mask.number() {
        return Err(Exception::ud().into());
    }
    let count = (to.size() / size).min(index.size() / index_size);
    let base = register(&v.cpu, i.memory_base()).wrapping_add(i.memory_displacement64());
    let indices = vector(v, index);
    for n in 0..count {
        let (mut value, mut left) = (vector(v, to), vector(v, mask));
        if left[n * size + size - 1] & 0x80 != 0 {
            let at = &indices[n * index_size..(n + 1) * index_size];
            let offset = match index_size {
                4 => i32::from_le_bytes(at.try_into().unwrap()) as i64 as u64,
                _ => u64::from_le_bytes(at.try_into().unwrap()),
            };
            let mut ea = base.wrapping_add(offset.wrapping_mul(i.memory_index_scale() as u64));
            if i.memory_base().size() == 4 {
                ea &= 0xffff_ffff;
            }
            let la = linear(&v.cpu, segment_index(i.memory_segment()), ea, size as u64, false)?;
            let element = load(v, la, size)?;
            value[n * size..(n + 1) * size].copy_from_slice(&element.to_le_bytes()[..size]);
            left[n * size..(n + 1) * size].fill(0);
            set_vector(v, to, &value);
            set_vector(v, mask, &left);
            v.io.done.clear();
            v.io.used = 0;
        }
    }
    let mut value = vector(v, to);
    value[count * size..].fill(0);
    set_vector(v, to, &value);
    set_vector(v, mask, &[0; 32]);
    Ok(())
}
