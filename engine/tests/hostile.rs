//! What a guest might try against the engine's own bookkeeping.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{Exit, FS, GS, RAX, RDI, cr4};
use common::*;

/// Invalid entries of the TLB and the jump table must not answer to any address that code can form.
#[test]
fn invalid_entries_answer_to_nobody() {
    // A page that reads but does not write, at an address whose TLB entry is that of the address tried; then a
    // store to where an invalid entry might seem to be.
    for interpret in [false, true] {
        for address in [0xa000_0000_0000_0000u64, 0x8000_0000_0000_0000, 0x8000_0000_0000_1000] {
            let mut m = Machine::new(4 << 20);
            m.v.interpret_only = interpret;
            m.long_mode();
            // PD entry 1: 2 MiB at 0x200000, read-only.
            m.write64(PML4 + 0x2000 + 8, 0x20_0000 | P | U | PS);
            m.write64(0x20_0000, 0x1234);
            m.user();
            // mov rbx, [rcx]; mov [rax], rdx; hlt
            (m.v.cpu.gpr[0], m.v.cpu.gpr[1], m.v.cpu.gpr[2]) = (address, 0x20_0000 | address & 0x1000, 0x6666);
            let exit = m.run(&[0x48, 0x8b, 0x19, 0x48, 0x89, 0x10, 0xf4]);
            assert_eq!(exit, Exit::Hlt);
            assert_eq!(m.halted_in(), Some(13), "{address:#x} rip {:#x}", m.v.cpu.rip);
            assert_eq!(m.read64(0x20_0000), 0x1234);
        }
    }
}

#[test]
fn a_jump_to_the_last_byte_faults_in_the_guest() {
    for interpret in [false, true] {
        for target in [u64::MAX, 0, 1, 0xfff] {
            let mut m = Machine::new(4 << 20);
            m.v.interpret_only = interpret;
            m.long_mode();
            m.write64(PML4 + 0x3000, 0); // page 0 is absent
            m.v.cpu.gpr[0] = target;
            let exit = m.run(&[0xff, 0xe0]); // jmp rax
            assert_eq!(exit, Exit::Hlt);
            assert_eq!(m.halted_in(), Some(14), "{target:#x} rip {:#x}", m.v.cpu.rip);
            assert_eq!(m.v.cpu.cr2, target);
        }
    }
}

#[test]
fn nor_does_one_left_by_an_invalidated_block() {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    // The last byte of a page and of the address space share their place in the jump table.
    let last = FREE + 0x1fff;
    m.write(last, &[0xc3]);
    m.write(FREE + 0x2000, &[0xf4]);
    // call rax; mov byte [rax], 0xc3; mov rbx, -1; jmp rbx
    m.v.cpu.gpr[0] = last;
    let code = [0xff, 0xd0, 0xc6, 0x00, 0xc3, 0x48, 0xc7, 0xc3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xe3];
    assert_eq!(m.run(&code), Exit::Hlt);
    assert_eq!((m.halted_in(), m.v.cpu.cr2), (Some(14), u64::MAX));
}

/// The operand at [rdi] of a masked store is where the guest's prefixes of size and segment say, not where they would lead
/// in the host: its FS is another, and host addresses have more than 32 bits.
#[test]
fn prefixes_of_masked_stores_are_the_guests() {
    let data = FREE + 0x1000;
    for interpret in [false, true] {
        for (prefixes, rdi) in [
            (&[][..], data),
            (&[0x67], data | 0x7777 << 32),
            (&[0x64], data - 0x3000),
            (&[0x65, 0x67], (data - 0x4000) | 0x7777 << 32),
        ] {
            let mut m = Machine::new(4 << 20);
            m.v.interpret_only = interpret;
            m.long_mode();
            m.v.cpu.cr4 |= cr4::OSFXSR;
            (m.v.cpu.segs[FS].base, m.v.cpu.segs[GS].base) = (0x3000, 0x4000);
            (m.v.cpu.gpr[RDI], m.v.cpu.gpr[RAX]) = (rdi, 0x1122_3344_5566_8899);
            // movq mm0, rax; movq xmm0, rax; maskmovq mm0, mm0; add rdi, 8; maskmovdqu xmm0, xmm0; hlt
            let mut code = vec![0x48, 0x0f, 0x6e, 0xc0, 0x66, 0x48, 0x0f, 0x6e, 0xc0];
            code.extend(prefixes);
            code.extend([0x0f, 0xf7, 0xc0, 0x48, 0x83, 0xc7, 0x08]);
            code.extend(prefixes);
            code.extend([0x66, 0x0f, 0xf7, 0xc0, 0xf4]);
            assert_eq!(m.run(&code), Exit::Hlt);
            assert_eq!(m.halted_in(), None, "{prefixes:x?}");
            assert_eq!([m.read64(data), m.read64(data + 8)], [0x8899; 2], "{prefixes:x?}");
        }
    }
}
