//! A small assembler for what surrounds the guest's own instructions in translated code.
//!
//! Guest registers live in host registers as `home` says. The host stack pointer holds the address of
//! [`Cpu`](crate::cpu::Cpu), RDI and RSI are scratch: neither needs REX, so an instruction on AH..BH can
//! still address memory through them.

use iced_x86::Register;

pub const S0: u8 = 7; // rdi
pub const S1: u8 = 6; // rsi
/// Host register of guest RSP.
pub const GSP: u8 = 9;

/// Host register of a guest register, or `None` if it lives in `Cpu::gpr`.
pub const fn home(guest: usize) -> Option<u8> {
    match guest {
        4 => Some(GSP),
        6 => Some(11),
        7 => Some(10),
        9..=11 => None,
        g => Some(g as u8),
    }
}

pub const R64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
pub const R32: [Register; 16] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::ESP,
    Register::EBP,
    Register::ESI,
    Register::EDI,
    Register::R8D,
    Register::R9D,
    Register::R10D,
    Register::R11D,
    Register::R12D,
    Register::R13D,
    Register::R14D,
    Register::R15D,
];
pub const R16: [Register; 16] = [
    Register::AX,
    Register::CX,
    Register::DX,
    Register::BX,
    Register::SP,
    Register::BP,
    Register::SI,
    Register::DI,
    Register::R8W,
    Register::R9W,
    Register::R10W,
    Register::R11W,
    Register::R12W,
    Register::R13W,
    Register::R14W,
    Register::R15W,
];
pub const R8: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// The host register `number` in the width of `like`.
pub fn resized(number: u8, like: Register) -> Register {
    let n = number as usize;
    match like.size() {
        8 => R64[n],
        4 => R32[n],
        2 => R16[n],
        _ => R8[n],
    }
}

#[derive(Default)]
pub struct Asm {
    pub buf: Vec<u8>,
}

/// ModRM reg field of the group-1 operations.
#[derive(Clone, Copy)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Cmp = 7,
}

impl Asm {
    pub fn pos(&self) -> usize {
        self.buf.len()
    }
    pub fn bytes(&mut self, b: &[u8]) {
        self.buf.extend_from_slice(b);
    }
    fn imm32(&mut self, v: i32) {
        self.buf.extend_from_slice(&v.to_le_bytes());
    }
    fn rex(&mut self, w: bool, reg: u8, index: u8, base: u8) {
        let rex = 0x40 | (w as u8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
    }
    /// ModRM (and SIB) for `[base + disp]`.
    fn modrm_disp(&mut self, reg: u8, base: u8, disp: i32) {
        let (m, r) = (base & 7, (reg & 7) << 3);
        let mode = if disp == 0 && m != 5 {
            0
        } else if i8::try_from(disp).is_ok() {
            0x40
        } else {
            0x80
        };
        self.buf.push(mode | r | m);
        if m == 4 {
            self.buf.push(0x24);
        }
        match mode {
            0x40 => self.buf.push(disp as u8),
            0x80 => self.imm32(disp),
            _ => {}
        }
    }
    /// ModRM + SIB for `[rsp + index + disp]`, the shape of a table look-up in `Cpu`.
    fn modrm_cpu_index(&mut self, reg: u8, index: u8, disp: i32) {
        self.buf.push(0x80 | (reg & 7) << 3 | 4);
        self.buf.push((index & 7) << 3 | 4);
        self.imm32(disp);
    }
    pub fn load(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(true, reg, 0, base);
        self.buf.push(0x8b);
        self.modrm_disp(reg, base, disp);
    }
    pub fn load32(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(false, reg, 0, base);
        self.buf.push(0x8b);
        self.modrm_disp(reg, base, disp);
    }
    pub fn load_u8(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(false, reg, 0, base);
        self.bytes(&[0x0f, 0xb6]);
        self.modrm_disp(reg, base, disp);
    }
    pub fn store(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(true, reg, 0, base);
        self.buf.push(0x89);
        self.modrm_disp(reg, base, disp);
    }
    pub fn store32(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(false, reg, 0, base);
        self.buf.push(0x89);
        self.modrm_disp(reg, base, disp);
    }
    pub fn store16(&mut self, reg: u8, base: u8, disp: i32) {
        self.buf.push(0x66);
        self.rex(false, reg, 0, base);
        self.buf.push(0x89);
        self.modrm_disp(reg, base, disp);
    }
    pub fn store8(&mut self, reg: u8, base: u8, disp: i32) {
        // Always a REX: SIL and DIL need one.
        self.buf.push(0x40 | (reg >> 3) << 2 | base >> 3);
        self.buf.push(0x88);
        self.modrm_disp(reg, base, disp);
    }
    pub fn store8_imm(&mut self, base: u8, disp: i32, value: u8) {
        self.rex(false, 0, 0, base);
        self.buf.push(0xc6);
        self.modrm_disp(0, base, disp);
        self.buf.push(value);
    }
    pub fn store32_imm(&mut self, base: u8, disp: i32, value: u32) {
        self.rex(false, 0, 0, base);
        self.buf.push(0xc7);
        self.modrm_disp(0, base, disp);
        self.imm32(value as i32);
    }
    /// Store a sign-extended 32-bit constant to 8 bytes.
    pub fn store64_simm(&mut self, base: u8, disp: i32, value: i32) {
        self.rex(true, 0, 0, base);
        self.buf.push(0xc7);
        self.modrm_disp(0, base, disp);
        self.imm32(value);
    }
    pub fn lea(&mut self, reg: u8, base: u8, disp: i32) {
        self.rex(true, reg, 0, base);
        self.buf.push(0x8d);
        self.modrm_disp(reg, base, disp);
    }
    /// `lea reg, [base + index * 2^shift + disp]`; `base` may be absent; 32-bit results are zero-extended.
    pub fn lea_full(&mut self, wide: bool, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let b = base.unwrap_or(5);
        let Some((x, shift)) = index else {
            match base {
                Some(base) => {
                    self.rex(wide, reg, 0, base);
                    self.buf.push(0x8d);
                    self.modrm_disp(reg, base, disp);
                }
                None => {
                    self.rex(wide, reg, 0, 0);
                    self.bytes(&[0x8d, (reg & 7) << 3 | 4, 0x25]);
                    self.imm32(disp);
                }
            }
            return;
        };
        self.rex(wide, reg, x, if base.is_some() { b } else { 0 });
        self.buf.push(0x8d);
        let sib = shift << 6 | (x & 7) << 3 | b & 7;
        if base.is_none() {
            self.bytes(&[(reg & 7) << 3 | 4, sib]);
            self.imm32(disp);
        } else if let (Ok(d), false) = (i8::try_from(disp), disp == 0 && b & 7 != 5) {
            self.bytes(&[0x40 | (reg & 7) << 3 | 4, sib, d as u8]);
        } else if disp == 0 {
            self.bytes(&[(reg & 7) << 3 | 4, sib]);
        } else {
            self.bytes(&[0x80 | (reg & 7) << 3 | 4, sib]);
            self.imm32(disp);
        }
    }
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.rex(true, src, 0, dst);
        self.bytes(&[0x89, 0xc0 | (src & 7) << 3 | dst & 7]);
    }
    pub fn mov32(&mut self, dst: u8, src: u8) {
        self.rex(false, src, 0, dst);
        self.bytes(&[0x89, 0xc0 | (src & 7) << 3 | dst & 7]);
    }
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if value <= u32::MAX as u64 {
            self.rex(false, 0, 0, reg);
            self.buf.push(0xb8 | reg & 7);
            self.imm32(value as u32 as i32);
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.rex(true, 0, 0, reg);
            self.bytes(&[0xc7, 0xc0 | reg & 7]);
            self.imm32(v);
        } else {
            self.rex(true, 0, 0, reg);
            self.buf.push(0xb8 | reg & 7);
            self.buf.extend_from_slice(&value.to_le_bytes());
        }
    }
    pub fn alu_imm(&mut self, op: Alu, wide: bool, reg: u8, value: i32) {
        self.rex(wide, 0, 0, reg);
        if i8::try_from(value).is_ok() {
            self.bytes(&[0x83, 0xc0 | (op as u8) << 3 | reg & 7, value as u8]);
        } else {
            self.bytes(&[0x81, 0xc0 | (op as u8) << 3 | reg & 7]);
            self.imm32(value);
        }
    }
    /// `op reg, [base + disp]`
    pub fn alu_load(&mut self, op: Alu, reg: u8, base: u8, disp: i32) {
        self.rex(true, reg, 0, base);
        self.buf.push((op as u8) << 3 | 3);
        self.modrm_disp(reg, base, disp);
    }
    /// `mul qword [base + disp]`: RDX:RAX = RAX * memory.
    pub fn mul_load(&mut self, base: u8, disp: i32) {
        self.rex(true, 0, 0, base);
        self.buf.push(0xf7);
        self.modrm_disp(4, base, disp);
    }
    /// `shrd dst, src, count`
    pub fn shrd(&mut self, dst: u8, src: u8, count: u8) {
        self.rex(true, src, 0, dst);
        self.bytes(&[0x0f, 0xac, 0xc0 | (src & 7) << 3 | dst & 7, count]);
    }
    pub fn alu_reg(&mut self, op: Alu, dst: u8, src: u8) {
        self.rex(true, src, 0, dst);
        self.bytes(&[(op as u8) << 3 | 1, 0xc0 | (src & 7) << 3 | dst & 7]);
    }
    /// `op reg, [rsp + index + disp]`
    pub fn alu_cpu_index(&mut self, op: Alu, reg: u8, index: u8, disp: i32) {
        self.rex(true, reg, index, 4);
        self.buf.push((op as u8) << 3 | 3);
        self.modrm_cpu_index(reg, index, disp);
    }
    /// `cmp [rsp + index + disp], reg`
    pub fn cmp_cpu_index(&mut self, index: u8, disp: i32, reg: u8) {
        self.rex(true, reg, index, 4);
        self.buf.push(0x39);
        self.modrm_cpu_index(reg, index, disp);
    }
    pub fn jmp_cpu_index(&mut self, index: u8, disp: i32) {
        self.rex(false, 0, index, 4);
        self.buf.push(0xff);
        self.modrm_cpu_index(4, index, disp);
    }
    pub fn jmp_mem(&mut self, base: u8, disp: i32) {
        self.rex(false, 0, 0, base);
        self.buf.push(0xff);
        self.modrm_disp(4, base, disp);
    }
    pub fn call_mem(&mut self, base: u8, disp: i32) {
        self.rex(false, 0, 0, base);
        self.buf.push(0xff);
        self.modrm_disp(2, base, disp);
    }
    pub fn movsxd(&mut self, dst: u8, src: u8) {
        self.rex(true, dst, 0, src);
        self.bytes(&[0x63, 0xc0 | (dst & 7) << 3 | src & 7]);
    }
    pub fn movsxd_load(&mut self, dst: u8, base: u8, disp: i32) {
        self.rex(true, dst, 0, base);
        self.buf.push(0x63);
        self.modrm_disp(dst, base, disp);
    }
    pub fn sar(&mut self, reg: u8, count: u8) {
        self.rex(true, 0, 0, reg);
        self.bytes(&[0xc1, 0xf8 | reg & 7, count]);
    }
    /// `or dst8, src8`
    pub fn alu_reg8_or(&mut self, dst: u8, src: u8) {
        self.buf.push(0x40 | (src >> 3) << 2 | dst >> 3);
        self.bytes(&[0x08, 0xc0 | (src & 7) << 3 | dst & 7]);
    }
    pub fn shr32(&mut self, reg: u8, count: u8) {
        self.rex(false, 0, 0, reg);
        self.bytes(&[0xc1, 0xe8 | reg & 7, count]);
    }
    pub fn shl(&mut self, wide: bool, reg: u8, count: u8) {
        self.rex(wide, 0, 0, reg);
        self.bytes(&[0xc1, 0xe0 | reg & 7, count]);
    }
    pub fn shr(&mut self, reg: u8, count: u8) {
        self.rex(true, 0, 0, reg);
        self.bytes(&[0xc1, 0xe8 | reg & 7, count]);
    }
    /// `jcc rel32` to be patched; returns the place of the displacement.
    pub fn jcc(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.imm32(0);
        self.pos() - 4
    }
    pub fn jmp(&mut self) -> usize {
        self.buf.push(0xe9);
        self.imm32(0);
        self.pos() - 4
    }
    /// Point the displacement at `site` to `target` (both offsets in this buffer).
    pub fn patch(&mut self, site: usize, target: usize) {
        let rel = target as i64 - (site as i64 + 4);
        self.buf[site..site + 4].copy_from_slice(&(rel as i32).to_le_bytes());
    }
    pub fn patch_here(&mut self, site: usize) {
        self.patch(site, self.pos());
    }
}

/// Condition codes of Jcc.
pub mod cc {
    pub const A: u8 = 7;
    pub const NE: u8 = 5;
}
