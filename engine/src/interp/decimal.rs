//! Decimal adjustment, which 64-bit mode does not have (Intel SDM volume 2, under each instruction).

use crate::cpu::{Exception, RAX, Res, Vcpu, rflags};
use iced_x86::{Instruction, Mnemonic};

pub(super) fn execute(v: &mut Vcpu, i: &Instruction) -> Res<()> {
    use Mnemonic::*;
    let ax = v.cpu.gpr[RAX] as u16;
    let [al, ah] = ax.to_le_bytes();
    let (carry, adjust) = (v.cpu.aflags & rflags::CF != 0, v.cpu.aflags & rflags::AF != 0);
    let low = al & 15 > 9 || adjust;
    let high = al > 0x99 || carry;
    let (ax, flags) = match i.mnemonic() {
        Daa | Das => {
            let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
            let add = i.mnemonic() == Daa;
            let result = if add { al.wrapping_add(correction) } else { al.wrapping_sub(correction) };
            // Without a high correction, only DAS keeps the borrow of the low one.
            let carry = high || (!add && low && al < 6);
            (u16::from_le_bytes([result, ah]), result_flags(result) | bits(carry, low))
        }
        Aaa | Aas => {
            let ax = match (low, i.mnemonic()) {
                (false, _) => ax,
                (_, Aaa) => ax.wrapping_add(0x106),
                _ => ax.wrapping_sub(0x106),
            };
            (ax & 0xff0f, bits(low, low))
        }
        Aam => {
            let base = i.immediate8();
            if base == 0 {
                return Err(Exception::new(0).into());
            }
            (u16::from_le_bytes([al % base, al / base]), result_flags(al % base))
        }
        Aad => {
            let result = ah.wrapping_mul(i.immediate8()).wrapping_add(al);
            (result as u16, result_flags(result))
        }
        // SALC
        _ => (u16::from_le_bytes([if carry { 0xff } else { 0 }, ah]), v.cpu.aflags),
    };
    v.cpu.gpr[RAX] = v.cpu.gpr[RAX] & !0xffff | ax as u64;
    v.cpu.aflags = flags;
    Ok(())
}

fn set(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

fn bits(carry: bool, adjust: bool) -> u64 {
    set(carry, rflags::CF) | set(adjust, rflags::AF)
}

fn result_flags(al: u8) -> u64 {
    set(al.count_ones() % 2 == 0, rflags::PF) | set(al == 0, rflags::ZF) | set(al >> 7 != 0, rflags::SF)
}
