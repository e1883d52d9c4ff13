//! FXSAVE, XSAVE and their kin on the state in `Cpu::fpu` (Intel SDM volume 1, chapters 10.5 and 13), gathers and
//! scatters.

use super::{address, load, register, segment_index, store};
use crate::access;
use crate::cpu::{Exception, RCX, Res, Stop, Vcpu, cr0, cr4};
use crate::segment::linear;
use crate::sys::{self, edx_eax};
use crate::xstate::{self, AVX, HEADER, HI16_ZMM, OPMASK, SSE, X87, ZMM_HI256};
use iced_x86::{EncodingKind, Instruction, Mnemonic, Register};

const MXCSR: std::ops::Range<usize> = 24..28;
const MXCSR_RESET: u32 = 0x1f80;
const COMPACTED: u64 = 1 << 63;

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
    if matches!(i.mnemonic(), Xsaves | Xsaves64 | Xrstors | Xrstors64) {
        sys::privileged(v)?;
    }
    if v.cpu.cr0 & cr0::TS != 0 {
        return Err(Exception::new(7).into());
    }
    match i.mnemonic() {
        Fxsave | Fxsave64 => fxsave(v, i),
        Fxrstor | Fxrstor64 => fxrstor(v, i),
        Xrstor | Xrstor64 => xrstor(v, i, false),
        Xrstors | Xrstors64 => xrstor(v, i, true),
        // There are no supervisor components: XSAVES saves what XSAVEC does.
        Xsavec | Xsavec64 | Xsaves | Xsaves64 => xsavec(v, i),
        m => xsave_standard(v, i, matches!(m, Xsaveopt | Xsaveopt64)),
    }
}

fn in_use(v: &Vcpu) -> u64 {
    v.cpu.fpu.0[HEADER] as u64
}

fn mxcsr(v: &Vcpu) -> u32 {
    u32::from_le_bytes(v.cpu.fpu.0[MXCSR].try_into().unwrap())
}

/// XGETBV with ECX = 1: the components that are not in their initial configuration.
pub(super) fn xinuse(v: &Vcpu) -> u64 {
    (in_use(v) | if mxcsr(v) != MXCSR_RESET { SSE } else { 0 }) & v.cpu.xcr0
}

/// The legacy region without what only the operating system's bytes 464–511 hold, and without the host's
/// addresses of the last x87 instruction and operand.
fn legacy(v: &Vcpu) -> [u8; 512] {
    let mut b: [u8; 512] = v.cpu.fpu.0[..512].try_into().unwrap();
    if in_use(v) & X87 == 0 {
        b[..24].fill(0);
        b[32..160].fill(0);
        b[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
    if in_use(v) & SSE == 0 {
        b[160..416].fill(0);
    }
    b[6..24].fill(0); // FOP, FIP, FDP
    b[28..32].copy_from_slice(&0xffffu32.to_le_bytes()); // MXCSR_MASK
    b
}

fn fxsave(v: &mut Vcpu, i: &Instruction) -> Res<()> {
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

/// The bytes of an extended component, in its initial configuration if it is not in use.
fn component(v: &Vcpu, c: &xstate::Component) -> Vec<u8> {
    if in_use(v) & c.bit != 0 { v.cpu.fpu.0[c.offset..c.offset + c.size].to_vec() } else { vec![0; c.size] }
}

/// Write the pieces at their offsets from `la`, all or none.
fn write_pieces(v: &mut Vcpu, la: u64, pieces: &[(usize, Vec<u8>)]) -> Res<()> {
    let mode = v.cpu.mmu_mode();
    for (offset, bytes) in pieces {
        access::check_write(v, la.wrapping_add(*offset as u64), bytes.len() as u64, mode)?;
    }
    for (offset, bytes) in pieces {
        access::write(v, la.wrapping_add(*offset as u64), bytes, mode)?;
    }
    Ok(())
}

/// XSAVE, and XSAVEOPT (`init`: leave out what is in its initial configuration).
fn xsave_standard(v: &mut Vcpu, i: &Instruction, init: bool) -> Res<()> {
    let mask = edx_eax(&v.cpu) & v.cpu.xcr0;
    let la = address(&v.cpu, i, xstate::standard_bytes(v.cpu.xcr0) as u64, true)?;
    aligned(la, 64)?;
    let saved = if init { mask & in_use(v) } else { mask };
    let b = legacy(v);
    let mut pieces = Vec::new();
    if saved & X87 != 0 {
        pieces.extend([(0, b[..24].to_vec()), (32, b[32..160].to_vec())]);
    }
    if mask & (SSE | AVX) != 0 {
        pieces.push((24, b[24..32].to_vec()));
    }
    if saved & SSE != 0 {
        pieces.push((160, b[160..416].to_vec()));
    }
    for c in xstate::components().iter().filter(|c| saved & c.bit != 0) {
        pieces.push((c.offset, component(v, c)));
    }
    let mode = v.cpu.mmu_mode();
    let old = access::read_u64(v, la + HEADER as u64, mode)?;
    pieces.push((HEADER, (old & !mask | in_use(v) & mask).to_le_bytes().to_vec()));
    write_pieces(v, la, &pieces)
}

/// XSAVEC and XSAVES: the compacted format, without what is in its initial configuration.
fn xsavec(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    let mask = edx_eax(&v.cpu) & v.cpu.xcr0;
    let (layout, size) = xstate::compacted(mask);
    let la = address(&v.cpu, i, size as u64, true)?;
    aligned(la, 64)?;
    let saved = mask & xinuse(v);
    let b = legacy(v);
    let mut pieces = Vec::new();
    if saved & X87 != 0 {
        pieces.extend([(0, b[..24].to_vec()), (32, b[32..160].to_vec())]);
    }
    if saved & SSE != 0 {
        pieces.extend([(24, b[24..32].to_vec()), (160, b[160..416].to_vec())]);
    }
    for (c, offset) in layout.iter().filter(|(c, _)| saved & c.bit != 0) {
        pieces.push((*offset, component(v, c)));
    }
    pieces.push((HEADER, [saved.to_le_bytes(), (mask | COMPACTED).to_le_bytes()].concat()));
    write_pieces(v, la, &pieces)
}

/// XRSTOR and XRSTORS (`supervisor`), which takes the compacted format alone.
fn xrstor(v: &mut Vcpu, i: &Instruction, supervisor: bool) -> Res<()> {
    let gp = || Err(Exception::gp(0).into());
    let mask = edx_eax(&v.cpu) & v.cpu.xcr0;
    let la = address(&v.cpu, i, xstate::EXTENDED as u64, false)?;
    aligned(la, 64)?;
    let mut b = [0u8; xstate::EXTENDED];
    let mode = v.cpu.mmu_mode();
    access::read(v, la, &mut b, mode)?;
    let word = |at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
    let (present, format) = (word(HEADER), word(HEADER + 8));
    let compact = format & COMPACTED != 0;
    let reserved = if compact { &b[HEADER + 16..] } else { &b[HEADER + 8..HEADER + 24] };
    let listed = if compact { format & !COMPACTED } else { v.cpu.xcr0 };
    if supervisor && !compact || listed & !v.cpu.xcr0 != 0 || present & !listed != 0 || reserved.iter().any(|&x| x != 0)
    {
        return gp();
    }
    // MXCSR belongs to SSE in the compacted format, to SSE and AVX alike in the standard one.
    let with_mxcsr = if compact { mask & present & SSE != 0 } else { mask & (SSE | AVX) != 0 };
    if with_mxcsr {
        check_mxcsr(&b)?;
    }
    let layout = if compact {
        xstate::compacted(listed).0
    } else {
        xstate::components().iter().map(|c| (*c, c.offset)).collect()
    };
    let mut extended = Vec::new();
    for (c, offset) in layout.into_iter().filter(|(c, _)| mask & c.bit != 0) {
        let mut bytes = vec![0; c.size];
        if present & c.bit != 0 {
            access::read(v, la.wrapping_add(offset as u64), &mut bytes, mode)?;
        }
        extended.push((c.offset, bytes));
    }
    let fpu = &mut v.cpu.fpu.0;
    for (bit, ranges) in [(X87, [0..24, 32..160]), (SSE, [160..416, 160..160])] {
        for r in ranges {
            match (mask & bit != 0, present & bit != 0) {
                (true, true) => fpu[r.clone()].copy_from_slice(&b[r]),
                (true, false) => fpu[r].fill(0),
                _ => {}
            }
        }
    }
    if with_mxcsr {
        fpu[MXCSR].copy_from_slice(&b[MXCSR]);
    } else if compact && mask & SSE != 0 {
        fpu[MXCSR].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    }
    for (offset, bytes) in extended {
        fpu[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    fpu[HEADER] = (fpu[HEADER] as u64 & !mask | present & mask) as u8;
    Ok(())
}

fn aligned(la: u64, alignment: u64) -> Res<()> {
    if la % alignment != 0 { Err(Exception::gp(0).into()) } else { Ok(()) }
}

fn check_mxcsr(b: &[u8]) -> Res<()> {
    if b[26] | b[27] != 0 { Err(Exception::gp(0).into()) } else { Ok(()) }
}

/// Where the parts of vector register `n` stand: (component, offset in the area, range in the register).
fn vector_parts(n: usize) -> Vec<(u64, usize, std::ops::Range<usize>)> {
    if n >= 16 {
        return vec![(HI16_ZMM, xstate::offset(HI16_ZMM) + 64 * (n - 16), 0..64)];
    }
    let mut parts = vec![(SSE, 160 + 16 * n, 0..16), (AVX, xstate::offset(AVX) + 16 * n, 16..32)];
    if xstate::supported() & ZMM_HI256 != 0 {
        parts.push((ZMM_HI256, xstate::offset(ZMM_HI256) + 32 * n, 32..64));
    }
    parts
}

fn vector(v: &Vcpu, r: Register) -> [u8; 64] {
    let mut b = [0; 64];
    for (bit, at, range) in vector_parts(r.number()) {
        if in_use(v) & bit != 0 {
            let len = range.len();
            b[range].copy_from_slice(&v.cpu.fpu.0[at..at + len]);
        }
    }
    b
}

/// The component `bit` in use, from its initial configuration if it was not.
fn make_use_of(v: &mut Vcpu, bit: u64) {
    if in_use(v) & bit == 0 {
        let range = match bit {
            SSE => 160..416,
            _ => xstate::components().iter().find(|c| c.bit == bit).map_or(0..0, |c| c.offset..c.offset + c.size),
        };
        v.cpu.fpu.0[range].fill(0);
        v.cpu.fpu.0[HEADER] |= bit as u8;
    }
}

fn set_vector(v: &mut Vcpu, r: Register, b: &[u8; 64]) {
    for (bit, at, range) in vector_parts(r.number()) {
        // Zero stays what it is in a component that is not in use.
        if in_use(v) & bit != 0 || b[range.clone()].iter().any(|&x| x != 0) {
            make_use_of(v, bit);
            let len = range.len();
            v.cpu.fpu.0[at..at + len].copy_from_slice(&b[range]);
        }
    }
}

fn mask_place(k: Register) -> usize {
    xstate::offset(OPMASK) + 8 * k.number()
}

/// The mask of a gather or scatter: the sign bits of a vector's elements (AVX2), or an opmask register.
#[derive(Clone, Copy)]
struct Mask {
    register: Register,
    element_bytes: usize,
}

impl Mask {
    fn is_set(self, v: &Vcpu, n: usize) -> bool {
        if self.register.is_k() {
            let at = mask_place(self.register) + n / 8;
            return in_use(v) & OPMASK != 0 && v.cpu.fpu.0[at] >> (n % 8) & 1 != 0;
        }
        vector(v, self.register)[n * self.element_bytes + self.element_bytes - 1] & 0x80 != 0
    }
    fn clear(self, v: &mut Vcpu, n: usize) {
        if self.register.is_k() {
            v.cpu.fpu.0[mask_place(self.register) + n / 8] &= !(1 << (n % 8));
        } else {
            let mut b = vector(v, self.register);
            b[n * self.element_bytes..(n + 1) * self.element_bytes].fill(0);
            set_vector(v, self.register, &b);
        }
    }
    fn clear_all(self, v: &mut Vcpu) {
        if !self.register.is_k() {
            set_vector(v, self.register, &[0; 64]);
        } else if in_use(v) & OPMASK != 0 {
            let at = mask_place(self.register);
            v.cpu.fpu.0[at..at + 8].fill(0);
        }
    }
}

/// Gathers and scatters: elements whose mask bit is set, each at an address of its own. One that faults leaves
/// those before it done and their mask bits clear, so that the instruction can start again.
pub(super) fn gather_scatter(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    use Mnemonic::*;
    let (index_size, size) = match i.mnemonic() {
        Vpgatherdd | Vgatherdps | Vpscatterdd | Vscatterdps => (4, 4),
        Vpgatherdq | Vgatherdpd | Vpscatterdq | Vscatterdpd => (4, 8),
        Vpgatherqd | Vgatherqps | Vpscatterqd | Vscatterqps => (8, 4),
        Vpgatherqq | Vgatherqpd | Vpscatterqq | Vscatterqpd => (8, 8),
        _ => return Err(Exception::ud().into()),
    };
    let evex = i.encoding() == EncodingKind::EVEX;
    let scatter = i.op0_kind() == iced_x86::OpKind::Memory;
    let data = if scatter { i.op1_register() } else { i.op0_register() };
    let index = i.memory_index();
    let mask = Mask { register: if evex { i.op_mask() } else { i.op2_register() }, element_bytes: size };
    let same = |a: Register, b: Register| a.number() == b.number();
    let refused = if evex {
        mask.register == Register::None || !scatter && same(data, index)
    } else {
        same(data, index) || same(data, mask.register) || same(index, mask.register)
    };
    if refused {
        return Err(Exception::ud().into());
    }
    let count = (data.size() / size).min(index.size() / index_size);
    let base = register(&v.cpu, i.memory_base()).wrapping_add(i.memory_displacement64());
    let indices = vector(v, index);
    for n in 0..count {
        if !mask.is_set(v, n) {
            continue;
        }
        let at = &indices[n * index_size..(n + 1) * index_size];
        let offset = match index_size {
            4 => i32::from_le_bytes(at.try_into().unwrap()) as i64 as u64,
            _ => u64::from_le_bytes(at.try_into().unwrap()),
        };
        let mut ea = base.wrapping_add(offset.wrapping_mul(i.memory_index_scale() as u64));
        if i.memory_base().size() == 4 || !v.cpu.long64() {
            ea &= 0xffff_ffff;
        }
        let la = linear(&v.cpu, segment_index(i.memory_segment()), ea, size as u64, scatter)?;
        let mut value = vector(v, data);
        let element = n * size..(n + 1) * size;
        if scatter {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&value[element]);
            store(v, la, size, u64::from_le_bytes(bytes))?;
        } else {
            let loaded = load(v, la, size)?;
            value[element].copy_from_slice(&loaded.to_le_bytes()[..size]);
            set_vector(v, data, &value);
        }
        mask.clear(v, n);
        v.io.done.clear();
        v.io.used = 0;
    }
    if !scatter {
        let mut value = vector(v, data);
        value[count * size..].fill(0);
        set_vector(v, data, &value);
    }
    mask.clear_all(v);
    Ok(())
}

/// XGETBV of XCR0, or with ECX = 1 of XINUSE, which only the state in memory tells.
pub(super) fn xgetbv(v: &mut Vcpu, fpu: bool) -> Res<()> {
    if v.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud().into());
    }
    let value = match v.cpu.gpr[RCX] as u32 {
        0 => v.cpu.xcr0,
        1 if sys::offers_xgetbv1(v) => {
            if !fpu {
                return Err(Stop::NotInterpreted);
            }
            xinuse(v)
        }
        _ => return Err(Exception::gp(0).into()),
    };
    sys::set_edx_eax(&mut v.cpu, value);
    Ok(())
}
