//! Exceptions, interrupts, segments, far transfers, flags and control registers (Intel SDM volume 3, chapters
//! 2, 5, 6 and 18).

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{
    CS, CpuidEntry, DS, ES, Exception, Exit, FS, GS, RAX, RBX, RCX, RDI, RSI, RSP, SS, Stop, cr0, cr4, efer, rflags,
    shadow,
};
use _engine::debug::guestdbg;
use _engine::{debug, exception, far, interp, msr, segment, state, sys, xstate};
use common::*;

fn long() -> Machine {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m
}
fn protected() -> Machine {
    let mut m = Machine::new(4 << 20);
    m.protected_mode();
    m
}
/// Real mode with the IVT at 0, CS:IP 1000:0 (= `FREE`), SS:SP 0:8000.
fn real() -> Machine {
    let mut m = Machine::new(4 << 20);
    let c = &mut m.v.cpu;
    (c.segs[CS].sel, c.segs[CS].base, c.rip) = (0x1000, FREE, 0);
    c.gpr[RSP] = 0x8000;
    for vector in 0..256u64 {
        let at = HANDLERS + 16 * vector;
        m.write(vector * 4, &[at as u8 & 0xf, 0, (at >> 4) as u8, (at >> 12) as u8]);
        m.write(at, &[0xf4]);
    }
    m
}

/// Where the memory ends that `Machine::long_mode` maps.
const MAPPED: u64 = 2 << 20;

/// Execute one instruction.
fn step(m: &mut Machine, code: &[u8]) -> Result<(), Stop> {
    let at = m.v.cpu.segs[CS].base * !m.v.cpu.long64() as u64 + m.v.cpu.rip;
    m.write(at, code);
    interp::step(&mut m.v)
}
fn raised(vector: u8, error: u32) -> Result<(), Stop> {
    Err(Exception::with_error(vector, error).into())
}
const UD: Result<(), Stop> = Err(Stop::Exception(Exception::ud()));

fn frame(m: &Machine) -> [u64; 6] {
    std::array::from_fn(|n| m.read64(m.v.cpu.gpr[RSP] + 8 * n as u64))
}

// Delivery in long mode.

#[test]
fn an_exception_in_long_mode_pushes_its_frame_on_the_aligned_stack() {
    let mut m = long();
    m.v.cpu.gpr[RSP] = FREE - 5;
    m.v.cpu.set_rflags(rflags::IF | rflags::TF | rflags::ZF | rflags::NT);
    exception::deliver(&mut m.v, Exception::page_fault(6, 0x1234_5678)).unwrap();
    assert_eq!(m.v.cpu.gpr[RSP], FREE - 16 - 48);
    let flags = rflags::IF | rflags::TF | rflags::ZF | rflags::NT | rflags::RF | 2;
    assert_eq!(frame(&m), [6, FREE, 8, flags, FREE - 5, 0x10]);
    assert_eq!((m.v.cpu.rip, m.v.cpu.cr2), (HANDLERS + 14 * 16, 0x1234_5678));
    assert_eq!(m.v.cpu.rflags(), rflags::ZF | 2);
}

#[test]
fn an_interrupt_from_user_mode_takes_the_stack_of_the_tss() {
    let mut m = long();
    m.user();
    m.v.cpu.set_rflags(rflags::IF | rflags::AC);
    exception::deliver_interrupt(&mut m.v, 0x30).unwrap();
    assert_eq!(m.v.cpu.gpr[RSP], FREE - 0x800 - 40);
    assert_eq!(frame(&m)[..5], [FREE, 0x2b, rflags::IF | rflags::AC | 2, FREE, 0x23]);
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.segs[CS].sel, c.segs[SS].sel, c.segs[SS].unusable), (0, 8, 0, true));
    assert_eq!(c.rflags() & (rflags::IF | rflags::RF), 0);
    // And back.
    far::iret(&mut m.v, 8).unwrap();
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.rip, c.gpr[RSP], c.segs[CS].sel, c.segs[SS].sel), (3, FREE, FREE, 0x2b, 0x23));
    assert_eq!(c.rflags(), rflags::IF | rflags::AC | 2);
}

#[test]
fn ist_and_trap_gates() {
    let mut m = long();
    m.write64(TSS + 0x24 + 8, FREE - 0x400); // IST 2
    let gate = m.read64(IDT + 2 * 16);
    m.write64(IDT + 2 * 16, gate | 2 << 32 | 1 << 40);
    m.v.cpu.set_rflags(rflags::IF);
    exception::deliver_interrupt(&mut m.v, 2).unwrap();
    assert_eq!(m.v.cpu.gpr[RSP], FREE - 0x400 - 40);
    assert_eq!(m.v.cpu.rflags() & rflags::IF, rflags::IF, "a trap gate leaves IF alone");
}

#[test]
fn a_page_fault_of_delivery_is_the_first_push_that_faults() {
    for (rsp, first) in [(MAPPED + 0x100, MAPPED + 0xf8), (MAPPED + 0x20, MAPPED + 0x18)] {
        let mut m = long();
        m.write64(TSS + 0x24, FREE - 0x400); // IST 1, for #DF
        m.write64(IDT + 8 * 16, m.read64(IDT + 8 * 16) | 1 << 32);
        m.v.cpu.gpr[RSP] = rsp;
        exception::deliver(&mut m.v, Exception::page_fault(0, 0x1234_5678)).unwrap();
        assert_eq!((m.v.cpu.rip - HANDLERS) / 16, 8);
        assert_eq!(m.v.cpu.cr2, first, "{rsp:#x}");
    }
}

#[test]
fn faults_of_delivery_name_what_caused_them() {
    // Gate (low half), expected fault for a hardware exception and for INT n from user mode.
    let gate = |m: &Machine, vector: u64| m.read64(IDT + vector * 16);
    type Fault = (u8, u32);
    type Row = (&'static str, fn(u64) -> u64, Fault, Fault);
    let rows: &[Row] = &[
        ("not present", |g| g & !(1 << 47), (11, 0x203), (11, 0x202)),
        ("a call gate", |g| g & !(0x1f << 40) | 0xc << 40, (13, 0x203), (13, 0x202)),
        ("null selector", |g| g & !0xffff_0000, (13, 1), (13, 0)),
        ("data selector", |g| g & !0xffff_0000 | 0x10 << 16, (13, 0x11), (13, 0x10)),
        ("selector beyond the GDT", |g| g & !0xffff_0000 | 0x100 << 16, (13, 0x101), (13, 0x100)),
        ("32-bit code", |g| g & !0xffff_0000 | 0x40 << 16, (13, 0x41), (13, 0x40)),
    ];
    for (what, edit, hardware, software) in rows {
        for (is_software, expected) in [(false, hardware), (true, software)] {
            let mut m = long();
            m.user();
            let old = gate(&m, 0x40) | 3 << 45;
            m.write64(IDT + 0x40 * 16, edit(old));
            if is_software {
                assert_eq!(step(&mut m, &[0xcd, 0x40]), raised(expected.0, expected.1), "{what}, INT");
                assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[RSP]), (FREE, FREE), "{what}: nothing changed");
            } else {
                exception::deliver_interrupt(&mut m.v, 0x40).unwrap();
                assert_eq!((m.v.cpu.rip - HANDLERS) / 16, expected.0 as u64, "{what}");
                assert_eq!(frame(&m)[0], expected.1 as u64, "{what}");
            }
        }
    }
    // A gate whose DPL forbids it.
    let mut m = long();
    m.user();
    assert_eq!(step(&mut m, &[0xcd, 0x40]), raised(13, 0x202));
    assert_eq!(step(&mut m, &[0xcc]), raised(13, 3 << 3 | 2));
    // INT1 does not ask.
    assert_eq!(step(&mut m, &[0xf1]), Ok(()));
    assert_eq!((m.v.cpu.rip, frame(&m)[0]), (HANDLERS + 16, FREE + 1));
}

#[test]
fn double_and_triple_faults() {
    // First exception, vector whose gate is missing, vector that is reached: the SDM's table 6-5.
    for (first, missing, reached) in [(13u8, 13u8, 8u8), (11, 11, 8), (6, 6, 11), (3, 3, 11), (14, 14, 8), (0, 0, 8)] {
        let mut m = long();
        let gate = m.read64(IDT + missing as u64 * 16);
        m.write64(IDT + missing as u64 * 16, gate & !(1 << 47));
        let e = if matches!(first, 11 | 13 | 14) { Exception::with_error(first, 0) } else { Exception::new(first) };
        exception::deliver(&mut m.v, e).unwrap();
        assert_eq!((m.v.cpu.rip - HANDLERS) / 16, reached as u64, "{first}");
        assert_eq!(frame(&m)[0], if reached == 8 { 0 } else { (missing as u64) << 3 | 3 }, "{first}");
    }
    // #PF while delivering #GP comes as itself.
    let mut m = long();
    m.v.cpu.idtr.base = 0x20_0000 - 13 * 16; // that of vector 13 is the first that is not mapped
    m.write64(0x20_0000 - 16, m.read64(IDT + 12 * 16));
    assert_eq!(exception::deliver(&mut m.v, Exception::gp(0)), Err(Exit::Shutdown.into()));
    assert_eq!(m.v.cpu.cr2, 0x20_0000 + 16, "the first was #GP's, the next #PF's");
    // No IDT at all.
    let mut m = long();
    m.v.cpu.idtr.limit = 0;
    assert_eq!(m.run(&[0x0f, 0x0b]), Exit::Shutdown);
}

#[test]
fn tables_on_a_device_are_an_error_not_an_exit() {
    let mut m = long();
    m.write64(PML4 + 0x3000 + 8 * 0x80, 0xd000_0000 | P | W);
    m.v.cpu.idtr.base = 0x8_0000;
    let result = exception::deliver(&mut m.v, Exception::ud());
    assert!(matches!(&result, Err(Stop::Exit(Exit::InternalError(text))) if text.contains("vector 6")), "{result:?}");
    assert!(m.v.io.waiting.is_none());
}

#[test]
fn delivery_ends_a_halt() {
    let mut m = long();
    m.v.halted = true;
    exception::deliver(&mut m.v, Exception::new(1)).unwrap();
    assert!(!m.v.halted);
}

// Other modes.

#[test]
fn real_mode_interrupts() {
    let mut m = real();
    m.v.cpu.set_rflags(rflags::IF | rflags::CF);
    assert_eq!(step(&mut m, &[0xcd, 0x21]), Ok(()));
    assert_eq!(m.v.cpu.segs[CS].base + m.v.cpu.rip, HANDLERS + 0x21 * 16);
    assert_eq!((m.v.cpu.gpr[RSP], m.v.cpu.rflags()), (0x7ffa, rflags::CF | 2));
    assert_eq!(m.read::<6>(0x7ffa), [2, 0, 0, 0x10, 3, 2]);
    assert_eq!(step(&mut m, &[0xcf]), Ok(()));
    assert_eq!((m.v.cpu.segs[CS].sel, m.v.cpu.rip), (0x1000, 2));
    assert_eq!((m.v.cpu.gpr[RSP], m.v.cpu.rflags()), (0x8000, rflags::IF | rflags::CF | 2));
}

#[test]
fn protected_mode_interrupts_change_stacks() {
    let mut m = protected();
    m.write(TSS + 4, &((FREE - 0x800) as u32).to_le_bytes());
    m.write(TSS + 8, &0x10u16.to_le_bytes());
    m.v.cpu.cpl = 3;
    m.v.cpu.segs[CS] = segment::Descriptor(m.read64(GDT + 0x18)).seg(0x1b);
    for s in [ES, SS, DS, FS, GS] {
        m.v.cpu.segs[s] = segment::Descriptor(m.read64(GDT + 0x20)).seg(0x23);
    }
    m.v.cpu.set_rflags(rflags::IF);
    exception::deliver(&mut m.v, Exception::gp(0x58)).unwrap();
    let sp = m.v.cpu.gpr[RSP];
    assert_eq!(sp, FREE - 0x800 - 24);
    let words: [u32; 6] = std::array::from_fn(|n| u32::from_le_bytes(m.read(sp + 4 * n as u64)));
    assert_eq!(words, [0x58, FREE as u32, 0x1b, 0x1_0202, FREE as u32, 0x23]);
    assert_eq!((m.v.cpu.cpl, m.v.cpu.segs[SS].sel, m.v.cpu.rip), (0, 0x10, HANDLERS + 13 * 16));
    // IRETD pops the error code's place first, as a handler does.
    m.v.cpu.gpr[RSP] += 4;
    far::iret(&mut m.v, 4).unwrap();
    assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (3, FREE, FREE));
    // A stack segment of the wrong privilege.
    m.write(TSS + 8, &0x20u16.to_le_bytes());
    let mut e = Exception::gp(0x58);
    e.vector = 11;
    assert_eq!(exception::deliver(&mut m.v, e), Err(Exit::Shutdown.into()), "#TS, #DF, #TS");
}

// Single step and shadows.

#[test]
fn single_step() {
    let tf = rflags::TF;
    let db = Err(Exception { payload: 1 << 14, ..Exception::new(1) }.into());
    let start = |flags: u64| {
        let mut m = long();
        m.v.cpu.set_rflags(flags);
        m
    };
    assert_eq!(step(&mut start(tf), &[0x90]), db);
    assert_eq!(step(&mut start(tf), &[0xeb, 0xfe]), db, "a jump to itself");
    assert_eq!(step(&mut start(tf), &[0x0f, 0x0b]), UD, "a fault is not a step");
    // MOV SS holds it back, the next instruction brings it.
    let mut m = start(tf);
    m.v.cpu.gpr[0] = 0x10;
    assert_eq!(step(&mut m, &[0x8e, 0xd0]), Ok(()));
    assert_eq!(step(&mut m, &[0x90]), db);
    // STI does not.
    assert_eq!(step(&mut start(tf), &[0xfb]), db);
    // POPF that sets TF: after the next instruction; one that clears it: at once.
    let mut m = start(0);
    m.write64(FREE, 0);
    m.v.cpu.gpr[RSP] = FREE - 8;
    m.write64(FREE - 8, tf);
    assert_eq!(step(&mut m, &[0x9d]), Ok(()));
    assert_eq!(step(&mut m, &[0x90]), db);
    let mut m = start(tf);
    m.v.cpu.gpr[RSP] = FREE - 8;
    m.write64(FREE - 8, 0);
    assert_eq!(step(&mut m, &[0x9d]), db);
    // INT goes through a gate that clears TF.
    assert_eq!(step(&mut start(tf), &[0xcc]), Ok(()));
    // SYSCALL: the flag that IA32_FMASK leaves.
    for (mask, expected) in [(tf, Ok(())), (0, db.clone())] {
        let mut m = start(tf);
        m.v.cpu.msr.star = 8 << 32;
        m.v.cpu.msr.sfmask = mask;
        assert_eq!(step(&mut m, &[0x0f, 5]), expected, "mask {mask:#x}");
    }
    // One iteration at a time.
    let mut m = start(tf);
    (m.v.cpu.gpr[1], m.v.cpu.gpr[7]) = (3, FREE + 0x100);
    for left in [2, 1, 0] {
        assert_eq!(step(&mut m, &[0xf3, 0xaa]), db);
        assert_eq!(m.v.cpu.gpr[1], left);
    }
    assert_eq!(m.v.cpu.rip, FREE + 2);
}

#[test]
fn a_single_step_over_out_comes_after_the_exit() {
    let mut m = long();
    m.v.cpu.set_rflags(rflags::TF);
    assert!(matches!(m.run(&[0xe6, 0x80, 0x90]), Exit::Io { input: false, port: 0x80, .. }));
    assert_eq!(m.v.cpu.rip, FREE + 2);
    assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
    assert_eq!(m.halted_in(), Some(1));
    assert_eq!(frame(&m)[0], FREE + 2, "before the next instruction");
    assert_eq!(m.v.cpu.dr[6] & 1 << 14, 1 << 14);
}

#[test]
fn shadows() {
    let mut m = long();
    assert_eq!(step(&mut m, &[0xfb]), Ok(()));
    assert_eq!(m.v.cpu.shadow, shadow::STI);
    assert_eq!(step(&mut m, &[0xfb]), Ok(()));
    assert_eq!(m.v.cpu.shadow, 0, "only the first of several");
    m.v.cpu.gpr[0] = 0x10;
    assert_eq!(step(&mut m, &[0x8e, 0xd0]), Ok(()));
    assert_eq!(m.v.cpu.shadow, shadow::MOV_SS);
    assert_eq!(step(&mut m, &[0x8e, 0xd8]), Ok(()), "DS has none");
    assert_eq!(m.v.cpu.shadow, 0);
}

// Decoding.

#[test]
fn instructions_at_their_limits() {
    // Fifteen bytes are one instruction, sixteen are #GP.
    let mut m = long();
    assert_eq!(step(&mut m, &[&[0x66; 14][..], &[0x90]].concat()), Ok(()));
    assert_eq!(m.v.cpu.rip, FREE + 15);
    assert_eq!(step(&mut m, &[&[0x66; 15][..], &[0x90]].concat()), raised(13, 0));
    assert_eq!(step(&mut m, &[0x06]), UD, "PUSH ES");
    assert_eq!(step(&mut m, &[0xf0, 0x01, 0xc0]), UD, "LOCK on a register");
    // An invalid instruction at the end of a page needs no byte of the next.
    let mut m = long();
    m.write64(PML4 + 0x3000 + 8 * 0x21, 0);
    m.v.cpu.rip = 0x2_0ffe;
    assert_eq!(step(&mut m, &[0x8d, 0xc0]), UD, "LEA of a register");
    m.v.cpu.rip = 0x2_0fff;
    let next = Exception::page_fault(0x10, 0x2_1000);
    assert_eq!(step(&mut m, &[0x48]), Err(next.into()), "a prefix there does");
    // CS.limit.
    let mut m = protected();
    m.v.cpu.segs[CS].limit = FREE as u32 + 1;
    assert_eq!(step(&mut m, &[0x89, 0xc0]), Ok(()));
    assert_eq!(step(&mut m, &[0x90]), raised(13, 0));
    m.v.cpu.rip = FREE;
    assert_eq!(step(&mut m, &[0xb8, 0, 0, 0, 0]), raised(13, 0));
}

#[test]
fn hints_do_nothing() {
    // RDSSPQ rax, CLDEMOTE, reserved, prefetches.
    for code in [
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8][..],
        &[0x0f, 0x1c, 0x00],
        &[0x0f, 0x1d, 0xc0],
        &[0x0f, 0x1a, 0xc1],
        &[0x0f, 0x0d, 0x10],
        &[0x0f, 0x18, 0x38],
        &[0xf3, 0x0f, 0x1e, 0xfa],
    ] {
        let mut m = long();
        m.v.cpu.gpr[0] = 0xdead_0000_0000_0000;
        assert_eq!(step(&mut m, code), Ok(()), "{code:x?}");
        assert_eq!(m.v.cpu.gpr[0], 0xdead_0000_0000_0000);
        assert_eq!(m.run(&[code, &[0xf4]].concat()), Exit::Hlt, "translated {code:x?}");
        assert_eq!(m.v.cpu.rip, FREE + code.len() as u64 + 1);
    }
}

#[test]
fn a_call_that_cannot_go_there_pushes_nothing() {
    let mut m = protected();
    m.v.cpu.segs[CS].limit = 0x2_0000;
    m.v.cpu.gpr[0] = 0x3_0000;
    assert_eq!(step(&mut m, &[0xff, 0xd0]), raised(13, 0));
    assert_eq!(m.v.cpu.gpr[RSP], FREE);
    m.v.cpu.gpr[1] = 5;
    m.v.cpu.rip = 0x1_fff0;
    assert_eq!(step(&mut m, &[0xe2, 0x7f]), raised(13, 0), "LOOP");
    assert_eq!(m.v.cpu.gpr[1], 5);
}

#[test]
fn bound() {
    let mut m = protected();
    m.write(FREE + 0x100, &[0xfb, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
    m.v.cpu.gpr[3] = FREE + 0x100;
    for (value, inside) in [(0u64, true), (5, true), (6, false), (0xffff_fffb, true), (0xffff_fffa, false)] {
        m.v.cpu.rip = FREE;
        m.v.cpu.gpr[0] = value;
        let expected = if inside { Ok(()) } else { Err(Exception::new(5).into()) };
        assert_eq!(step(&mut m, &[0x62, 0x03]), expected, "{value:#x}");
    }
}

// Segments.

#[test]
fn segment_loads_in_protected_mode() {
    // Extra descriptors from 0x50: (descriptor, what).
    type Row = (&'static str, usize, u64, u16, u8, Result<(), Stop>);
    let rows: &[Row] = &[
        // what, register, descriptor, RPL, CPL, result
        ("data", DS, 0x00cf_9200_0000_ffff, 0, 0, Ok(())),
        ("data, DPL 0, RPL 3", DS, 0x00cf_9200_0000_ffff, 3, 0, raised(13, 0x50)),
        ("data, DPL 3, CPL 3", DS, 0x00cf_f200_0000_ffff, 3, 3, Ok(())),
        ("data, DPL 0, CPL 3", DS, 0x00cf_9200_0000_ffff, 0, 3, raised(13, 0x50)),
        ("not present", DS, 0x00cf_1200_0000_ffff, 0, 0, raised(11, 0x50)),
        ("execute-only", DS, 0x00cf_9800_0000_ffff, 0, 0, raised(13, 0x50)),
        ("readable code", DS, 0x00cf_9a00_0000_ffff, 0, 0, Ok(())),
        ("conforming code, CPL 3", DS, 0x00cf_9e00_0000_ffff, 3, 3, Ok(())),
        ("a TSS", DS, 0x00cf_8900_0000_ffff, 0, 0, raised(13, 0x50)),
        ("stack", SS, 0x00cf_9200_0000_ffff, 0, 0, Ok(())),
        ("stack, RPL 3", SS, 0x00cf_9200_0000_ffff, 3, 0, raised(13, 0x50)),
        ("stack, DPL 3", SS, 0x00cf_f200_0000_ffff, 0, 0, raised(13, 0x50)),
        ("stack, read-only", SS, 0x00cf_9000_0000_ffff, 0, 0, raised(13, 0x50)),
        ("stack, not present", SS, 0x00cf_1200_0000_ffff, 0, 0, raised(12, 0x50)),
    ];
    for (what, register, descriptor, rpl, cpl, expected) in rows {
        let mut m = protected();
        m.write64(GDT + 0x50, *descriptor);
        m.v.cpu.gdtr.limit = 0x57;
        m.v.cpu.cpl = *cpl;
        let old = m.v.cpu.segs[*register];
        assert_eq!(&segment::load(&mut m.v, *register, 0x50 | rpl), expected, "{what}");
        let s = m.v.cpu.segs[*register];
        if expected.is_ok() {
            assert_eq!((s.sel, s.limit, s.base), (0x50 | rpl, u32::MAX, 0), "{what}");
            assert_eq!(m.read64(GDT + 0x50) & 1 << 40, 1 << 40, "{what}: accessed");
        } else {
            assert_eq!((s.sel, s.attr), (old.sel, old.attr), "{what}: nothing changed");
        }
    }
    let mut m = protected();
    assert_eq!(segment::load(&mut m.v, DS, 0x50), raised(13, 0x50), "beyond the GDT");
    assert_eq!(segment::load(&mut m.v, DS, 0xc), raised(13, 0xc), "no LDT");
    assert_eq!(segment::load(&mut m.v, SS, 0), raised(13, 0), "null SS");
    assert_eq!(segment::load(&mut m.v, DS, 3), Ok(()), "null DS");
    m.v.cpu.gpr[3] = FREE;
    assert_eq!(step(&mut m, &[0x8b, 0x03]), raised(13, 0), "but not usable");
    assert_eq!(step(&mut m, &[0x8e, 0xc8]), UD, "MOV CS");
}

#[test]
fn limits_and_types() {
    let mut m = protected();
    m.write64(GDT + 0x50, 0x0040_9200_0000_0fff); // 4 KiB of data
    m.write64(GDT + 0x58, 0x0040_9600_0000_0fff); // expand-down: above 4 KiB
    m.write64(GDT + 0x60, 0x00cf_9000_0000_ffff); // read-only
    m.v.cpu.gdtr.limit = 0x67;
    let rows = [
        (0x50, 0xffc, 4, false, true),
        (0x50, 0xffd, 4, false, false),
        (0x50, 0xffff_ffff, 4, false, false),
        (0x58, 0xfff, 1, true, false),
        (0x58, 0x1000, 4, true, true),
        (0x58, 0xffff_fffd, 4, true, false),
        (0x60, 0, 4, false, true),
        (0x60, 0, 4, true, false),
    ];
    for (sel, offset, len, write, allowed) in rows {
        segment::load(&mut m.v, ES, sel).unwrap();
        let result = segment::linear(&m.v.cpu, ES, offset, len, write);
        assert_eq!(result, if allowed { Ok(offset) } else { Err(Exception::gp(0)) }, "{sel:#x} {offset:#x}");
    }
    segment::load(&mut m.v, SS, 0x50).unwrap();
    assert_eq!(segment::linear(&m.v.cpu, SS, 0xffd, 4, true), Err(Exception::with_error(12, 0)));
    assert_eq!(segment::linear(&m.v.cpu, CS, 0, 4, true), Err(Exception::gp(0)), "code is not written");
    let m = long();
    assert_eq!(segment::linear(&m.v.cpu, DS, 0x7fff_ffff_fffd, 4, false), Err(Exception::gp(0)));
    assert_eq!(segment::linear(&m.v.cpu, SS, 1 << 63, 4, false), Err(Exception::with_error(12, 0)));
}

#[test]
fn system_segments() {
    let mut m = long();
    m.write64(GDT + 0x30, m.read64(GDT + 0x30) & !(2 << 40)); // available
    segment::ltr(&mut m.v, 0x30).unwrap();
    assert_eq!((m.v.cpu.tr.base, m.v.cpu.tr.limit, m.v.cpu.tr.attr & 0xf), (TSS, 0x67, 0xb));
    assert_eq!(m.read64(GDT + 0x30) >> 40 & 0xf, 0xb, "busy");
    assert_eq!(segment::ltr(&mut m.v, 0x30), raised(13, 0x30), "busy already");
    assert_eq!(segment::ltr(&mut m.v, 0), raised(13, 0));
    assert_eq!(segment::ltr(&mut m.v, 0x10), raised(13, 0x10));
    assert_eq!(segment::lldt(&mut m.v, 0x10), raised(13, 0x10));
    assert_eq!(segment::lldt(&mut m.v, 0), Ok(()));
    assert!(m.v.cpu.ldtr.unusable);
    m.user();
    assert_eq!(segment::lldt(&mut m.v, 0), raised(13, 0));
    assert_eq!(step(&mut real(), &[0x0f, 0x00, 0xd8]), UD, "LTR in real mode");
}

#[test]
fn lar_and_lsl() {
    for (sel, visible) in [(0x08, true), (0x23, true), (0x30, true), (0x38, false), (0, false), (0x1000, false)] {
        let mut m = long();
        m.v.cpu.gpr[0] = sel;
        m.v.cpu.gpr[1] = 0x5555;
        assert_eq!(step(&mut m, &[0x0f, 0x02, 0xc8]), Ok(())); // lar ecx, ax
        assert_eq!(m.v.cpu.aflags & rflags::ZF != 0, visible, "{sel:#x}");
        let d = m.read64(GDT + (sel & 0xf8));
        assert_eq!(m.v.cpu.gpr[1], if visible { d >> 32 & 0xff_ff00 } else { 0x5555 }, "{sel:#x}");
    }
    let mut m = long();
    m.user();
    m.v.cpu.gpr[0] = 8;
    assert_eq!(step(&mut m, &[0x0f, 0x03, 0xc8]), Ok(())); // lsl ecx, ax
    assert_eq!(m.v.cpu.aflags & rflags::ZF, 0, "not visible to user mode");
}

// Far transfers.

#[test]
fn far_transfers() {
    // Long mode to 32-bit code and back, by RETF and by a far jump through memory.
    let mut m = long();
    m.write64(FREE - 16, FREE + 0x100);
    m.write64(FREE - 8, 0x40);
    m.v.cpu.gpr[RSP] = FREE - 16;
    assert_eq!(step(&mut m, &[0x48, 0xcb]), Ok(()));
    assert_eq!((m.v.cpu.segs[CS].sel, m.v.cpu.rip, m.v.cpu.long64()), (0x40, FREE + 0x100, false));
    assert_eq!(step(&mut m, &[0xea, 0, 2, 1, 0, 8, 0]), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.long64()), (FREE + 0x200, true));
    let rows = [(0u16, 0u32), (0x10, 0x10), (0x1b, 0x18), (0x2b, 0x28), (0x1000, 0x1000)];
    for (sel, error) in rows {
        assert_eq!(far::jmp(&mut m.v, sel, 0, 8, 0), raised(13, error), "{sel:#x}");
        assert_eq!(far::call(&mut m.v, sel, 0, 8, 0), raised(13, error), "{sel:#x}");
    }
    // There are no tasks in long mode; elsewhere one that is not busy is switched to (`tasks`).
    m.write64(GDT + 0x30, m.read64(GDT + 0x30) & !(2 << 40));
    assert_eq!(far::jmp(&mut m.v, 0x30, 0, 8, 0), raised(13, 0x30));
    let mut p = protected();
    assert_eq!(far::jmp(&mut p.v, 0x30, 0, 4, 0), raised(13, 0x30), "busy");
    assert_eq!(far::jmp(&mut m.v, 8, 1 << 63, 8, 0), raised(13, 0));
    // Real mode.
    let mut m = real();
    assert_eq!(step(&mut m, &[0x9a, 0x34, 0x12, 0x00, 0x20]), Ok(()));
    assert_eq!((m.v.cpu.segs[CS].base, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (0x2_0000, 0x1234, 0x7ffc));
    assert_eq!(m.read::<4>(0x7ffc), [5, 0, 0, 0x10]);
    assert_eq!(step(&mut m, &[0xcb]), Ok(()));
    assert_eq!((m.v.cpu.segs[CS].sel, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (0x1000, 5, 0x8000));
}

#[test]
fn a_page_fault_of_several_pushes_is_the_first_one_s() {
    // As a processor shows where each of them would fault.
    let mut m = long();
    m.write64(FREE + 0x100, FREE);
    m.write64(FREE + 0x108, 8);
    (m.v.cpu.gpr[RAX], m.v.cpu.gpr[RSP]) = (FREE + 0x100, MAPPED + 0x100);
    let fault = Exception::page_fault(2, MAPPED + 0xf8);
    assert_eq!(step(&mut m, &[0x48, 0xff, 0x18]), Err(fault.into()), "CALL far");
    m.v.cpu.gpr[RSP] = MAPPED + 8;
    let fault = Exception::page_fault(2, MAPPED);
    assert_eq!(step(&mut m, &[0x48, 0xff, 0x18]), Err(fault.into()), "over two pages");
    assert_eq!(m.v.cpu.gpr[RSP], MAPPED + 8);
}

#[test]
fn popa_keeps_what_it_popped_in_front_of_a_fault() {
    // As a processor shows; the stack pointer stays, so that it can begin anew.
    let mut m = long();
    m.v.cpu.segs[CS].attr = 0xc09b;
    m.write64(MAPPED - 8, 0x2222_2222_1111_1111);
    (m.v.cpu.gpr[RDI], m.v.cpu.gpr[RSI], m.v.cpu.gpr[RSP]) = (3, 4, MAPPED - 8);
    assert_eq!(step(&mut m, &[0x61]), Err(Exception::page_fault(0, MAPPED).into()));
    let c = &m.v.cpu;
    assert_eq!((c.gpr[RDI], c.gpr[RSI], c.gpr[RSP]), (0x1111_1111, 0x2222_2222, MAPPED - 8));
}

#[test]
fn iret_checks() {
    let push = |m: &mut Machine, words: [u64; 5]| {
        for (n, w) in words.iter().enumerate() {
            m.write64(FREE - 40 + 8 * n as u64, *w);
        }
        m.v.cpu.gpr[RSP] = FREE - 40;
    };
    let rows = [
        ("to itself", [FREE, 8, 2, FREE, 0x10], Ok(())),
        ("null SS at CPL 0", [FREE, 8, 2, FREE, 0], Ok(())),
        ("to user", [FREE, 0x2b, 2, FREE, 0x23], Ok(())),
        ("null CS", [FREE, 0, 2, FREE, 0x10], raised(13, 0)),
        ("data as code", [FREE, 0x10, 2, FREE, 0x10], raised(13, 0x10)),
        ("RPL that the DPL is not", [FREE, 0x0b, 2, FREE, 0x23], raised(13, 8)),
        ("null SS for user", [FREE, 0x2b, 2, FREE, 3], raised(13, 0)),
        ("kernel stack for user", [FREE, 0x2b, 2, FREE, 0x13], raised(13, 0x10)),
        ("rip not canonical", [1 << 63, 8, 2, FREE, 0x10], raised(13, 0)),
    ];
    for (what, words, expected) in rows {
        let mut m = long();
        push(&mut m, words);
        assert_eq!(step(&mut m, &[0x48, 0xcf]), expected, "{what}");
        if expected.is_err() {
            assert_eq!((m.v.cpu.gpr[RSP], m.v.cpu.rip, m.v.cpu.segs[CS].sel), (FREE - 40, FREE, 8), "{what}");
        }
    }
    let mut m = long();
    m.v.cpu.set_rflags(rflags::NT);
    push(&mut m, [FREE, 8, 2, FREE, 0x10]);
    assert_eq!(step(&mut m, &[0x48, 0xcf]), raised(13, 0), "NT in long mode");
    // User mode may not change IF and IOPL.
    m.user();
    m.v.cpu.set_rflags(rflags::IF);
    push(&mut m, [FREE, 0x2b, rflags::IOPL | rflags::AC | 0x28, FREE, 0x23]);
    assert_eq!(step(&mut m, &[0x48, 0xcf]), Ok(()));
    assert_eq!(m.v.cpu.rflags(), rflags::IF | rflags::AC | 2);
}

#[test]
fn a_return_outward_hides_inner_segments() {
    let mut m = long();
    m.v.cpu.segs[FS] = segment::Descriptor(m.read64(GDT + 0x20)).seg(0x23);
    for (n, w) in [FREE, 0x2b, 2, FREE, 0x23].iter().enumerate() {
        m.write64(FREE - 40 + 8 * n as u64, *w);
    }
    m.v.cpu.gpr[RSP] = FREE - 40;
    far::iret(&mut m.v, 8).unwrap();
    let c = &m.v.cpu;
    assert_eq!((c.segs[DS].sel, c.segs[DS].unusable), (0, true));
    assert_eq!((c.segs[FS].sel, c.segs[FS].unusable), (0x23, false));
}

#[test]
fn syscall_and_sysret() {
    let mut m = long();
    m.user();
    m.v.cpu.msr.star = 0x18 << 48 | 8 << 32;
    m.v.cpu.msr.lstar = FREE + 0x100;
    m.v.cpu.msr.sfmask = rflags::IF | rflags::DF;
    m.v.cpu.set_rflags(rflags::IF | rflags::DF | rflags::CF);
    assert_eq!(step(&mut m, &[0x0f, 5]), Ok(()));
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.rip, c.gpr[1], c.rflags()), (0, FREE + 0x100, FREE + 2, rflags::CF | 2));
    assert_eq!((c.segs[CS].sel, c.segs[SS].sel, c.gpr[11]), (8, 0x10, rflags::IF | rflags::DF | rflags::CF | 2));
    assert_eq!(step(&mut m, &[0x48, 0x0f, 7]), Ok(()));
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.rip, c.segs[CS].sel, c.segs[SS].sel), (3, FREE + 2, 0x2b, 0x23));
    assert_eq!(c.rflags(), rflags::IF | rflags::DF | rflags::CF | 2);
    assert_eq!(step(&mut m, &[0x48, 0x0f, 7]), raised(13, 0), "user mode");
    let mut m = long();
    m.v.cpu.gpr[1] = 1 << 63;
    assert_eq!(step(&mut m, &[0x48, 0x0f, 7]), raised(13, 0), "rcx not canonical");
    m.v.cpu.efer &= !efer::SCE;
    assert_eq!(step(&mut m, &[0x0f, 5]), UD);
}

// Flags and control registers.

#[test]
fn popf_by_privilege() {
    // (CPL, IOPL) and which of IF, IOPL change when all flags are popped.
    for (cpl, iopl, changes) in [(0, 0, rflags::IF | rflags::IOPL), (3, 3, rflags::IF), (3, 0, 0)] {
        let mut m = long();
        if cpl == 3 {
            m.user();
        }
        let old = iopl << 12;
        m.v.cpu.set_rflags(old);
        sys::popf(&mut m.v, !rflags::TF, 8).unwrap();
        let always = rflags::ARITH | rflags::DF | rflags::NT | rflags::AC | rflags::ID | 2;
        assert_eq!(m.v.cpu.rflags(), always | changes | old, "CPL {cpl} IOPL {iopl}");
        sys::popf(&mut m.v, 0, 2).unwrap();
        assert_eq!(m.v.cpu.rflags() & (rflags::AC | rflags::ID), rflags::AC | rflags::ID, "16 bits");
    }
    let mut m = real();
    m.v.cpu.gpr[RSP] = 0x7ffe;
    m.write(0x7ffe, &[0xff, 0xfe]);
    assert_eq!(step(&mut m, &[0x9d]), Ok(()));
    assert_eq!(m.v.cpu.rflags() & 0x8028, 0, "reserved bits");
    for vector in [(0xfau8, raised(13, 0)), (0xfb, raised(13, 0)), (0xf4, raised(13, 0))] {
        let mut m = long();
        m.user();
        assert_eq!(step(&mut m, &[vector.0]), vector.1);
    }
}

#[test]
fn control_registers() {
    type Row = (&'static str, usize, u64, Result<(), Stop>);
    let gp = || raised(13, 0);
    let long_cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
    let rows: &[Row] = &[
        ("CR0: PG without PE", 0, cr0::PG, gp()),
        ("CR0: NW without CD", 0, long_cr0 | cr0::NW, gp()),
        ("CR0: upper half", 0, long_cr0 | 1 << 32, gp()),
        ("CR0: paging off in 64-bit code", 0, long_cr0 & !cr0::PG, gp()),
        ("CR0: reserved bits are ignored", 0, long_cr0 | 1 << 6 | 1 << 28, Ok(())),
        ("CR1", 1, 0, UD),
        ("CR3: beyond the physical address", 3, 1 << 46, gp()),
        ("CR3", 3, PML4 | 0x18, Ok(())),
        ("CR4: PAE off in long mode", 4, 0, gp()),
        ("CR4: what CPUID does not offer", 4, cr4::PAE | cr4::SMEP, gp()),
        ("CR4: LA57", 4, cr4::PAE | cr4::LA57, gp()),
        ("CR4", 4, cr4::PAE | cr4::PGE | cr4::OSFXSR, Ok(())),
        ("CR8: 16", 8, 16, gp()),
        ("CR8: 15", 8, 15, Ok(())),
        ("CR9", 9, 0, UD),
    ];
    for (what, n, value, expected) in rows {
        let mut m = long();
        assert_eq!(&sys::write_cr(&mut m.v, *n, *value), expected, "{what}");
        if expected.is_ok() {
            let ignored = if *n == 0 { 1 << 6 | 1 << 28 } else { 0 };
            assert_eq!(sys::read_cr(&mut m.v, *n), Ok(value & !ignored), "{what}");
        }
        let mut m = long();
        m.user();
        let expected = if matches!(n, 1 | 9) { UD } else { gp() };
        assert_eq!(sys::write_cr(&mut m.v, *n, *value), expected, "{what} from user mode");
    }
    // Long mode is entered by paging under LME, with PAE.
    let on = cr0::PE | cr0::NE | cr0::ET | cr0::PG;
    let mut m = protected();
    m.v.cpu.efer = efer::LME;
    assert_eq!(sys::write_cr(&mut m.v, 0, on), gp());
    sys::write_cr(&mut m.v, 4, cr4::PAE).unwrap();
    sys::write_cr(&mut m.v, 0, on).unwrap();
    assert_eq!(m.v.cpu.efer, efer::LME | efer::LMA);
    assert_eq!(msr::write(&mut m.v, 0xc000_0080, 0, false), Err(msr::Refused::Invalid), "LME under paging");
    sys::write_cr(&mut m.v, 0, on & !cr0::PG).unwrap();
    assert_eq!(m.v.cpu.efer, efer::LME);
    // PAE paging loads the directory pointers.
    let mut m = protected();
    m.v.cpu.cr4 = cr4::PAE;
    m.write64(0x3_0000, 0x1000 | P | W);
    m.v.cpu.cr3 = 0x3_0000;
    assert_eq!(sys::write_cr(&mut m.v, 0, on), gp());
    m.v.cpu.cr3 = 0x3_1000;
    assert_eq!(sys::write_cr(&mut m.v, 0, on), Ok(()));
    assert_eq!(sys::write_cr(&mut m.v, 3, 0x3_0000), gp());
}

#[test]
fn debug_registers() {
    let mut m = long();
    assert_eq!(sys::write_dr(&mut m.v, 7, 1 << 32), raised(13, 0));
    sys::write_dr(&mut m.v, 5, u32::MAX as u64 & !(1 << 13)).unwrap();
    assert_eq!(m.v.cpu.dr[7], 0xffff_0fff & !(1 << 12), "DR5 is DR7, fixed bits");
    sys::write_dr(&mut m.v, 6, 0).unwrap();
    assert_eq!(sys::read_dr(&mut m.v, 4), Ok(0xffff_0ff0));
    m.v.cpu.cr4 |= cr4::DE;
    assert_eq!(sys::read_dr(&mut m.v, 4), Err(Exception::ud().into()));
    m.v.cpu.dr[7] |= debug::GD;
    let detect = Exception { payload: debug::BD, ..Exception::new(1) };
    assert_eq!(sys::read_dr(&mut m.v, 0), Err(detect.into()));
    exception::deliver(&mut m.v, detect).unwrap();
    assert_eq!((m.v.cpu.dr[7] & debug::GD, m.v.cpu.dr[6]), (0, debug::DR6_FIXED | debug::BD), "GD is cleared");
}

// Breakpoints.

/// DR7 for breakpoint `n`: R/W and the length's code.
fn dr7(n: u32, kind: u64, len: u64) -> u64 {
    0x400 | 1 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
}
fn trap(bits: u64) -> Result<(), Stop> {
    Err(Exception { payload: bits, ..Exception::new(1) }.into())
}

#[test]
fn data_breakpoints() {
    let at = FREE + 0x108;
    // What, kind, length code, code with rbx = FREE + 0x100, whether it hits.
    let rows: &[(&str, u64, u64, &[u8], bool)] = &[
        ("write", 1, 0, &[0xc6, 0x43, 8, 1], true),
        ("write beside", 1, 0, &[0xc6, 0x43, 9, 1], false),
        ("read of a write breakpoint", 1, 3, &[0x8b, 0x43, 8], false),
        ("read", 3, 3, &[0x8b, 0x43, 8], true),
        ("read that ends in it", 3, 3, &[0x48, 0x8b, 0x43, 1], true),
        ("read that ends before it", 3, 3, &[0x48, 0x8b, 0x03], false),
        ("the last of eight bytes", 3, 2, &[0x8a, 0x43, 0xf], true),
        ("behind eight bytes", 3, 2, &[0x8a, 0x43, 0x10], false),
        ("LOCK ADD", 1, 0, &[0xf0, 0x01, 0x43, 8], true),
        ("PUSH m", 3, 3, &[0xff, 0x73, 8], true),
        ("MOVUPS", 3, 0, &[0x0f, 0x10, 0x43, 1], true),
        ("FXSAVE", 1, 0, &[0x0f, 0xae, 0x03], true),
        ("BTS with an offset", 1, 0, &[0x0f, 0xab, 0x03], true),
        ("LEA", 3, 3, &[0x8d, 0x43, 8], false),
        ("a port", 2, 0, &[0x8a, 0x43, 8], false),
    ];
    for (what, kind, len, code, hits) in rows {
        let mut m = long();
        (m.v.cpu.gpr[3], m.v.cpu.gpr[0]) = (FREE + 0x100, 64);
        m.v.cpu.dr[2] = at;
        m.v.cpu.dr[7] = dr7(2, *kind, *len);
        assert_eq!(step(&mut m, code), if *hits { trap(4) } else { Ok(()) }, "{what}");
        assert_eq!(m.v.cpu.rip, FREE + code.len() as u64, "{what}: a trap");
    }
    // With a single step; disabled; one that faults.
    let mut m = long();
    (m.v.cpu.gpr[3], m.v.cpu.dr[0], m.v.cpu.dr[7]) = (at, at, dr7(0, 1, 0));
    m.v.cpu.set_rflags(rflags::TF);
    assert_eq!(step(&mut m, &[0xc6, 3, 1]), trap(debug::BS | 1));
    m.v.cpu.set_rflags(0);
    m.v.cpu.dr[7] &= !0xff;
    assert_eq!(step(&mut m, &[0xc6, 3, 1]), Ok(()));
    m.v.cpu.dr[7] = dr7(0, 3, 0);
    (m.v.cpu.gpr[0], m.v.cpu.gpr[2]) = (0, 0);
    m.write64(at, 0);
    assert_eq!(step(&mut m, &[0xf7, 0x33]), Err(Exception::new(0).into()), "DIV by what it read");
    assert_eq!(step(&mut m, &[0x90]), Ok(()), "nothing is left over");
}

#[test]
fn breakpoints_in_repeated_strings() {
    // MOVSB x 8 forward; the third element is watched.
    let mut m = long();
    (m.v.cpu.gpr[1], m.v.cpu.gpr[6], m.v.cpu.gpr[7]) = (8, FREE + 0x100, FREE + 0x200);
    (m.v.cpu.dr[1], m.v.cpu.dr[7]) = (FREE + 0x202, dr7(1, 1, 0));
    assert_eq!(step(&mut m, &[0xf3, 0xa4]), trap(2));
    assert_eq!((m.v.cpu.gpr[1], m.v.cpu.rip), (5, FREE));
    assert_eq!(m.v.cpu.rflags() & rflags::RF, rflags::RF, "iterations are left");
    assert_eq!(step(&mut m, &[0xf3, 0xa4]), Ok(()));
    assert_eq!((m.v.cpu.gpr[1], m.v.cpu.rip, m.v.cpu.rflags()), (0, FREE + 2, 2));
}

#[test]
fn instruction_breakpoints() {
    let mut m = long();
    (m.v.cpu.dr[3], m.v.cpu.dr[7]) = (FREE + 1, dr7(3, 0, 0));
    assert_eq!(step(&mut m, &[0x90, 0x90]), Ok(()));
    assert_eq!(step(&mut m, &[0x90]), trap(8));
    assert_eq!(m.v.cpu.rip, FREE + 1, "a fault");
    exception::deliver(&mut m.v, Exception { payload: 8, ..Exception::new(1) }).unwrap();
    assert_eq!((frame(&m)[0], frame(&m)[2]), (FREE + 1, 2), "RF is the handler's to set");
    m.write64(m.v.cpu.gpr[RSP] + 16, rflags::RF | 2);
    m.v.cpu.rip = FREE + 0x40;
    assert_eq!(step(&mut m, &[0x48, 0xcf]), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.rflags()), (FREE + 1, rflags::RF | 2));
    assert_eq!(step(&mut m, &[0x90]), Ok(()), "IRET set RF");
    assert_eq!((m.v.cpu.rip, m.v.cpu.rflags()), (FREE + 2, 2), "for one instruction");
    // A fault keeps it for when the instruction is tried again.
    m.v.cpu.set_rflags(rflags::RF);
    m.v.cpu.dr[3] = FREE + 2;
    assert_eq!(step(&mut m, &[0x0f, 0x0b]), UD);
    assert_eq!(m.v.cpu.rflags(), rflags::RF | 2);
    // POPF clears it; so does SYSCALL.
    m.v.cpu.set_rflags(rflags::RF);
    m.v.cpu.gpr[RSP] = FREE - 8;
    m.write64(FREE - 8, rflags::RF | rflags::ZF);
    assert_eq!(step(&mut m, &[0x9d]), Ok(()));
    assert_eq!(m.v.cpu.rflags(), rflags::ZF | 2);
}

#[test]
fn debug_exceptions_wait_behind_mov_ss() {
    let prepare = || {
        let mut m = long();
        m.write64(FREE + 0x100, 0x10);
        (m.v.cpu.gpr[3], m.v.cpu.dr[0]) = (FREE + 0x100, FREE + 0x100);
        m.v.cpu.dr[7] = dr7(0, 3, 1) | dr7(1, 0, 0);
        m.v.cpu.dr[1] = FREE + 2;
        assert_eq!(step(&mut m, &[0x8e, 0x13]), Ok(()), "MOV SS, [rbx]");
        m
    };
    // The breakpoint on the next instruction is lost, the one met comes behind it.
    let mut m = prepare();
    assert_eq!(step(&mut m, &[0x90]), trap(1));
    assert_eq!(m.v.cpu.rip, FREE + 3);
    // Behind INT3: in the handler.
    let mut m = prepare();
    assert_eq!(step(&mut m, &[0xcc]), trap(1));
    assert_eq!(m.v.cpu.rip, HANDLERS + 3 * 16);
    // A fault makes it forgotten.
    let mut m = prepare();
    assert_eq!(step(&mut m, &[0x0f, 0x0b]), UD);
    m.v.cpu.rip = FREE + 0x80;
    assert_eq!(step(&mut m, &[0x90]), Ok(()));
}

#[test]
fn port_breakpoints() {
    for de in [true, false] {
        let mut m = long();
        if de {
            m.v.cpu.cr4 |= cr4::DE;
        }
        (m.v.cpu.dr[0], m.v.cpu.dr[7]) = (0x80, dr7(0, 2, 1)); // two bytes
        assert!(matches!(m.run(&[0xe6, 0x81, 0x90, 0xf4]), Exit::Io { input: false, port: 0x81, .. }));
        assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
        assert_eq!(m.halted_in(), de.then_some(1), "DE {de}");
        if de {
            assert_eq!((frame(&m)[0], m.v.cpu.dr[6]), (FREE + 2, debug::DR6_FIXED | 1));
        }
        assert!(matches!(m.run(&[0xe4, 0x82, 0xf4]), Exit::Io { input: true, port: 0x82, .. }), "beside it");
        m.v.io.waiting = None;
        m.v.io.done.push((0x82, vec![7]));
        assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
        assert_eq!(m.v.cpu.rip, FREE + 3);
    }
}

#[test]
fn breakpoints_are_met_by_code_that_was_translated() {
    let mut m = long();
    m.v.cpu.gpr[3] = FREE + 0x100;
    let code = [0xc6, 0x03, 1, 0x90, 0xf4];
    assert_eq!(m.run(&code), Exit::Hlt);
    assert_eq!(m.v.cpu.rip, FREE + 5);
    (m.v.cpu.dr[0], m.v.cpu.dr[7]) = (FREE + 0x100, dr7(0, 1, 0));
    assert_eq!(m.run(&code), Exit::Hlt);
    assert_eq!((m.halted_in(), frame(&m)[0]), (Some(1), FREE + 3));
    (m.v.cpu.dr[0], m.v.cpu.dr[7]) = (FREE + 3, dr7(0, 0, 0));
    assert_eq!(m.run(&code), Exit::Hlt);
    assert_eq!((m.halted_in(), frame(&m)[0]), (Some(1), FREE + 3));
}

// KVM_SET_GUEST_DEBUG.

fn debug_exit(pc: u64, bits: u64, dr7: u64) -> Exit {
    Exit::Debug { exception: 1, pc, dr6: debug::DR6_FIXED | bits, dr7 }
}

#[test]
fn user_space_steps() {
    let on = guestdbg::ENABLE | guestdbg::SINGLESTEP;
    let mut m = long();
    assert!(debug::set_guest_debug(&mut m.v, on, &[0; 8]));
    m.v.cpu.gpr[1] = 2;
    // mov edi, ..; rep stosb; pushfq; pop rax; ud2
    let code = [0xbf, 0, 2, 1, 0, 0xf3, 0xaa, 0x9c, 0x58, 0x0f, 0x0b];
    let mut exits = vec![m.run(&code)];
    exits.extend((0..5).map(|_| _engine::run::run(&mut m.v)));
    let expected = [5, 5, 7, 8, 9].map(|at| debug_exit(FREE + at, debug::BS, 0x400));
    assert_eq!(exits[..5], expected);
    assert_eq!(exits[5], debug_exit(HANDLERS + 6 * 16, debug::BS, 0x400), "at the handler");
    assert_eq!((m.v.cpu.gpr[0] & rflags::TF, frame(&m)[2] & rflags::TF), (0, 0), "the guest sees no TF");
    assert_eq!(m.v.cpu.dr[6], debug::DR6_FIXED, "nor DR6");
    // OUT: its own exit, then the step. HLT: it halts.
    assert!(matches!(m.run(&[0xe6, 0x80, 0xf4]), Exit::Io { .. }));
    assert_eq!(_engine::run::run(&mut m.v), debug_exit(FREE + 2, debug::BS, 0x400));
    assert_eq!(_engine::run::run(&mut m.v), debug_exit(FREE + 3, debug::BS, 0x400));
    assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
    assert!(debug::set_guest_debug(&mut m.v, 0, &[0; 8]));
    assert_eq!(m.run(&[0x90, 0x90, 0xf4]), Exit::Hlt);
}

#[test]
fn breakpoints_of_user_space() {
    // Its own breakpoint instead of the guest's.
    let mut m = long();
    (m.v.cpu.dr[0], m.v.cpu.dr[7]) = (FREE, dr7(0, 0, 0));
    let mut registers = [0; 8];
    (registers[1], registers[7]) = (FREE + 1, dr7(1, 0, 0));
    assert!(debug::set_guest_debug(&mut m.v, guestdbg::ENABLE | guestdbg::USE_HW_BP, &registers));
    assert_eq!(m.run(&[0x90, 0x90, 0xf4]), debug_exit(FREE + 1, 2, registers[7]));
    assert_eq!(m.v.cpu.dr[6], debug::DR6_FIXED);
    // INT3 that a debugger put there; the guest's own otherwise.
    let mut m = long();
    assert!(debug::set_guest_debug(&mut m.v, guestdbg::ENABLE | guestdbg::USE_SW_BP, &[0; 8]));
    let breakpoint = Exit::Debug { exception: 3, pc: FREE + 1, dr6: 0, dr7: 0 };
    assert_eq!(m.run(&[0x90, 0xcc, 0xf4]), breakpoint);
    assert_eq!(m.v.cpu.rip, FREE + 1);
    assert!(debug::set_guest_debug(&mut m.v, 0, &[0; 8]));
    assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
    assert_eq!(m.halted_in(), Some(3));
    // Injection.
    for (flag, vector) in [(guestdbg::INJECT_DB, 1), (guestdbg::INJECT_BP, 3)] {
        let mut m = long();
        assert!(debug::set_guest_debug(&mut m.v, flag, &[0; 8]));
        assert!(!debug::set_guest_debug(&mut m.v, flag, &[0; 8]), "one waits");
        assert_eq!(m.run(&[0x90, 0xf4]), Exit::Hlt);
        assert_eq!((m.halted_in(), frame(&m)[0]), (Some(vector), FREE));
    }
}

#[test]
fn a_waiting_debug_trap_is_part_of_the_events() {
    let mut m = long();
    m.v.cpu.set_rflags(rflags::TF);
    assert!(matches!(m.run(&[0xe6, 0x80, 0xf4]), Exit::Io { .. }));
    let events = state::get_events(&mut m.v);
    assert_eq!((events[0], events[1], events[2]), (1, 1, 0));
    assert_eq!(m.v.cpu.dr[6], debug::DR6_FIXED | debug::BS);
    m.v.injected = None;
    assert!(state::set_events(&mut m.v, &events));
    assert_eq!(_engine::run::run(&mut m.v), Exit::Hlt);
    assert_eq!((m.halted_in(), frame(&m)[0]), (Some(1), FREE + 2));
    // With an error code.
    let mut events = [0; state::EVENTS_BYTES];
    (events[0], events[1], events[2], events[4]) = (1, 13, 1, 0x50);
    assert!(state::set_events(&mut m.v, &events));
    m.v.cpu.gpr[RSP] = FREE;
    assert_eq!(m.run(&[0x90]), Exit::Hlt);
    assert_eq!((m.halted_in(), frame(&m)[0]), (Some(13), 0x50));
    events[1] = 32;
    assert!(!state::set_events(&mut m.v, &events));
}

#[test]
fn cpuid_as_kvm_answers() {
    let mut m = long();
    let entry =
        |function, index, flags, eax, ecx| CpuidEntry { function, index, flags, eax, ecx, ..CpuidEntry::default() };
    m.v.cpuid = vec![
        entry(0, 0, 0, 0xd, u32::from_le_bytes(*b"ntel")),
        entry(1, 0, 0, 0x600, 0),
        entry(4, 1, 1, 0x44, 0),
        entry(0xd, 0, 1, 7, 832),
        entry(0x4000_0000, 0, 0, 0x4000_0001, 0),
        entry(0x8000_0000, 0, 0, 0x8000_0008, 0),
    ];
    let mut ask = |leaf: u64, index: u64| {
        (m.v.cpu.gpr[0], m.v.cpu.gpr[1]) = (leaf, index);
        sys::cpuid(&mut m.v);
        m.v.cpu.gpr[0]
    };
    assert_eq!(ask(1, 0), 0x600);
    assert_eq!((ask(4, 1), ask(4, 2)), (0x44, 0));
    assert_eq!(ask(5, 0), 0, "within the range, not in the table");
    assert_eq!(ask(0x20, 0), 7, "beyond it: the highest basic leaf");
    assert_eq!(ask(0x4000_0002, 0), 7);
    assert_eq!(ask(0x8000_0009, 0), 7);
    assert_eq!(ask(0x8000_0001, 0), 0);
    // OSXSAVE follows CR4, the APIC bit IA32_APIC_BASE.
    ask(1, 0);
    assert_eq!(m.v.cpu.gpr[1] & 1 << 27, 1 << 27);
    m.v.cpu.cr4 &= !cr4::OSXSAVE;
    m.v.cpu.gpr[0] = 1;
    sys::cpuid(&mut m.v);
    assert_eq!(m.v.cpu.gpr[1] & 1 << 27, 0);
}

#[test]
fn msrs() {
    // Canonical addresses, reserved bits, unknown numbers: #GP.
    let rows = [
        (0xc000_0082u32, 1u64 << 63, false),
        (0xc000_0082, 0xffff_8000_0000_0000, true),
        (0xc000_0101, 1 << 47, false),
        (0xc000_0080, 1 << 12, false),
        (0xc000_0103, 1 << 32, false),
        (0x277, 0x0007_0406_0007_0406, true),
        (0x277, 0x0007_0406_0007_0402, false),
        (0x48, 1 << 10, false),
        (0x1234, 0, false),
        (0xfe, 0, false),
        (0x4b56_4d09, 0, false),
    ];
    for (index, value, allowed) in rows {
        let mut m = long();
        (m.v.cpu.gpr[1], m.v.cpu.gpr[0], m.v.cpu.gpr[2]) = (index as u64, value & 0xffff_ffff, value >> 32);
        let expected = if allowed { Ok(()) } else { raised(13, 0) };
        assert_eq!(step(&mut m, &[0x0f, 0x30]), expected, "WRMSR {index:#x} {value:#x}");
        if allowed {
            assert_eq!(msr::read(&mut m.v, index, false), Ok(value));
        }
        m.user();
        assert_eq!(step(&mut m, &[0x0f, 0x30]), raised(13, 0), "user mode");
    }
}

#[test]
fn xsetbv() {
    let mut m = long();
    m.v.cpuid = vec![CpuidEntry { function: 0xd, flags: 1, eax: 0xe7, ..CpuidEntry::default() }];
    let avx512 = xstate::supported() & xstate::AVX512 != 0;
    let refused = [0, 5, 2, 0x27, 0x107].map(|value| (value, false));
    for (value, allowed) in [(1, true), (3, true), (7, true), (0xe7, avx512)].into_iter().chain(refused) {
        (m.v.cpu.gpr[0], m.v.cpu.gpr[1], m.v.cpu.gpr[2]) = (value, 0, 0);
        let expected = if allowed { Ok(()) } else { raised(13, 0) };
        m.v.cpu.rip = FREE;
        assert_eq!(step(&mut m, &[0x0f, 0x01, 0xd1]), expected, "{value:#x}");
    }
    m.v.cpu.cr4 &= !cr4::OSXSAVE;
    assert_eq!(step(&mut m, &[0x0f, 0x01, 0xd1]), UD);
}

#[test]
fn x87_and_vectors_by_mode() {
    let nm = || Err(Exception::new(7).into());
    // CR0 and CR4 bits to set (+) and clear; the instruction; what happens.
    let (fld1, pxor, vpxor): (&[u8], &[u8], &[u8]) =
        (&[0xd9, 0xe8], &[0x66, 0x0f, 0xef, 0xc0], &[0xc5, 0xf9, 0xef, 0xc0]);
    type Row<'a> = (&'a [u8], u64, u64, u64, Result<(), Stop>);
    let rows: &[Row] = &[
        (fld1, 0, 0, 7, Ok(())),
        (fld1, cr0::TS, 0, 7, nm()),
        (fld1, cr0::EM, 0, 7, nm()),
        (pxor, 0, 0, 7, Ok(())),
        (pxor, cr0::TS, 0, 7, nm()),
        (pxor, cr0::EM, 0, 7, UD),
        (pxor, 0, cr4::OSFXSR, 7, UD),
        (vpxor, 0, 0, 7, Ok(())),
        (vpxor, cr0::TS, 0, 7, nm()),
        (vpxor, 0, cr4::OSXSAVE, 7, UD),
        (vpxor, 0, 0, 3, UD),
    ];
    for (code, set, clear, xcr0, expected) in rows {
        if code == &vpxor && !std::arch::is_x86_feature_detected!("avx") {
            continue;
        }
        let mut m = long();
        m.v.cpu.cr0 |= set;
        m.v.cpu.cr4 &= !clear;
        m.v.cpu.xcr0 = *xcr0;
        m.v.cpu.fpu.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        assert_eq!(&step(&mut m, code), expected, "{code:x?} {set:#x} {clear:#x} {xcr0}");
    }
}

#[test]
fn ports_ask_the_io_bitmap() {
    let mut m = long();
    m.user();
    m.v.cpu.tr.limit = 0x200;
    m.write(TSS + 102, &0x68u16.to_le_bytes());
    m.write(TSS + 0x68, &[0xff; 0x80]);
    m.write(TSS + 0x68 + 0x10, &[0x00, 0x80]); // 0x80-0x8e allowed, 0x8f not
    for (port, size, allowed) in
        [(0x80, 4, true), (0x8c, 2, true), (0x8e, 2, false), (0x8f, 1, false), (0x3f8, 1, false)]
    {
        let expected = if allowed { Ok(()) } else { raised(13, 0) };
        assert_eq!(sys::check_port(&mut m.v, port, size), expected, "{port:#x}");
    }
    assert_eq!(sys::check_port(&mut m.v, 0xffff, 1), raised(13, 0), "beyond the TSS");
    m.v.cpu.sysflags |= rflags::IOPL;
    assert_eq!(sys::check_port(&mut m.v, 0x3f8, 1), Ok(()));
}

#[test]
fn a_pending_nmi_is_looked_at_after_iret() {
    let mut m = long();
    (m.v.nmi_masked, m.v.nmi_pending) = (true, true);
    for (n, w) in [FREE + 2, 8, 2, FREE, 0x10].iter().enumerate() {
        m.write64(FREE - 40 + 8 * n as u64, *w);
    }
    m.v.cpu.gpr[RSP] = FREE - 40;
    assert_eq!(m.run(&[0x48, 0xcf, 0xf4]), Exit::Hlt);
    assert_eq!(m.halted_in(), Some(2));
}

// Newer instructions.

#[test]
fn direct_stores_and_the_like() {
    for interpret in [false, true] {
        let mut m = long();
        m.v.interpret_only = interpret;
        m.v.cpu.msr.tsc_aux = 0x1234;
        // rdpid rax; serialize; clwb [rbx]; cldemote [rbx]; hlt
        m.v.cpu.gpr[3] = FREE + 0x200;
        let code = [0xf3, 0x0f, 0xc7, 0xf8, 0x0f, 0x01, 0xe8, 0x66, 0x0f, 0xae, 0x33, 0x0f, 0x1c, 0x03, 0xf4];
        assert_eq!(m.run(&code), Exit::Hlt);
        assert_eq!((m.halted_in(), m.v.cpu.gpr[0]), (None, 0x1234));
        // movdir64b rdi, [rbx]: 64-byte aligned
        if !host_has(7, 0, 2, 28) {
            continue;
        }
        m.write(FREE + 0x203, &std::array::from_fn::<u8, 64, _>(|n| n as u8));
        for (to, vector) in [(FREE + 0x240, None), (FREE + 0x248, Some(13))] {
            (m.v.cpu.gpr[3], m.v.cpu.gpr[7], m.v.cpu.gpr[RSP]) = (FREE + 0x203, to, FREE);
            assert_eq!(m.run(&[0x66, 0x0f, 0x38, 0xf8, 0x3b, 0xf4]), Exit::Hlt);
            assert_eq!(m.halted_in(), vector, "{to:#x}");
        }
        assert_eq!(m.read::<64>(FREE + 0x240), std::array::from_fn(|n| n as u8));
    }
}

#[test]
fn process_context_identifiers() {
    let offering = || {
        let mut m = long();
        let entry = |function, ebx, ecx| CpuidEntry { function, ebx, ecx, ..CpuidEntry::default() };
        m.v.cpuid = vec![entry(1, 0, 1 << 17), entry(7, 1 << 10, 0)];
        m
    };
    let mut m = offering();
    m.v.cpu.cr3 |= 8;
    let cr4 = m.v.cpu.cr4 & !cr4::OSXSAVE;
    assert_eq!(sys::write_cr(&mut m.v, 4, cr4 | cr4::PCIDE), raised(13, 0), "CR3's low bits must be clear");
    assert_eq!(sys::write_cr(&mut m.v, 3, PML4 | 1 << 63), raised(13, 0), "without PCIDE");
    m.v.cpu.cr3 = PML4;
    assert_eq!(sys::write_cr(&mut m.v, 4, cr4 | cr4::PCIDE), Ok(()));
    assert_eq!(sys::write_cr(&mut m.v, 3, PML4 | 0x123 | 1 << 63), Ok(()));
    assert_eq!(m.v.cpu.cr3, PML4 | 0x123);
    m.v.cpu.segs[CS].attr &= !segment::Descriptor(0x00af_9b00_0000_ffff).attr() | 0x9f;
    assert_eq!(sys::write_cr(&mut m.v, 0, cr0::PE | cr0::ET), raised(13, 0), "paging stays on");
    assert_eq!(sys::write_cr(&mut long().v, 4, cr4 | cr4::PCIDE), raised(13, 0), "not offered");
    // A translation that changed: seen after each kind of flush that concerns it.
    // mov eax, [rbx]; mov [rcx], rdx (the entry); cr3 with no flush, or invpcid rsi, [rdi]; mov eax, [rbx]; hlt
    let no_flush = &[0x41, 0x0f, 0x22, 0xd8][..]; // mov cr3, r8
    let invpcid = &[0x66, 0x0f, 0x38, 0x82, 0x37][..];
    for (middle, kind, global, fresh) in [
        (no_flush, 0, false, false),
        (invpcid, 0, false, true),
        (invpcid, 0, true, true),
        (invpcid, 1, false, true),
        (invpcid, 1, true, false),
        (invpcid, 2, true, true),
        (invpcid, 3, false, true),
        (invpcid, 3, true, false),
    ] {
        let mut m = offering();
        m.v.cpu.cr4 |= cr4::PCIDE | cr4::PGE;
        m.v.cpu.cr3 = PML4 | 5;
        let (page, entry) = (0x18_0000, PML4 + 0x3000 + 8 * 0x180);
        let flags = P | W | A | D | if global { G } else { 0 };
        m.write64(entry, page | flags);
        m.write64(page, 1);
        m.write64(page + 0x1000, 2);
        m.write64(FREE + 0x100, 5);
        m.write64(FREE + 0x108, page);
        let g = &mut m.v.cpu.gpr;
        (g[3], g[1], g[2], g[6], g[7]) = (page, entry, (page + 0x1000) | flags, kind, FREE + 0x100);
        g[8] = PML4 | 5 | 1 << 63;
        let code = [&[0x8b, 0x03, 0x48, 0x89, 0x11][..], middle, &[0x8b, 0x03, 0xf4]].concat();
        assert_eq!(m.run(&code), Exit::Hlt);
        assert_eq!((m.halted_in(), m.v.cpu.gpr[0]), (None, 1 + fresh as u64), "kind {kind} {global} {middle:x?}");
    }
    for (kind, pcid, la, expected) in [
        (4, 0, 0, raised(13, 0)),
        (0, 1 << 12, 0, raised(13, 0)),
        (0, 0, 1 << 63, raised(13, 0)),
        (1, 1, 0, raised(13, 0)),
        (3, 1, 1 << 63, Ok(())),
    ] {
        assert_eq!(sys::invpcid(&mut offering().v, kind, [pcid, la]), expected, "{kind} {pcid:#x} {la:#x}");
    }
    let mut m = offering();
    m.user();
    assert_eq!(step(&mut m, invpcid), raised(13, 0));
    assert_eq!(step(&mut long(), invpcid), UD, "not offered");
}

#[test]
fn alignment_checks() {
    // mov eax, [rbx + 1], push rax with rsp odd; by whom, with what.
    let all = |m: &mut Machine| {
        m.user();
        m.v.cpu.cr0 |= cr0::AM;
        m.v.cpu.set_rflags(rflags::AC);
        m.v.cpu.gpr[3] = FREE;
    };
    let load: &[u8] = &[0x8b, 0x43, 1];
    let mut m = long();
    all(&mut m);
    assert_eq!(step(&mut m, load), raised(17, 0));
    assert_eq!(step(&mut m, &[0x8b, 0x43, 4]), Ok(()));
    m.v.cpu.gpr[RSP] = FREE - 4;
    assert_eq!(step(&mut m, &[0x50]), raised(17, 0), "PUSH");
    m.v.cpu.gpr[2] = 0;
    assert_eq!(m.run(load), Exit::Hlt);
    assert_eq!((m.halted_in(), frame(&m)[0]), (Some(17), 0), "by the run loop, with its error code");
    for (what, undo) in [
        ("AM", (|m| m.v.cpu.cr0 &= !cr0::AM) as fn(&mut Machine)),
        ("AC", |m| m.v.cpu.set_rflags(0)),
        ("CPL", |m| m.v.cpu.cpl = 0),
    ] {
        let mut m = long();
        all(&mut m);
        undo(&mut m);
        assert_eq!(step(&mut m, load), Ok(()), "{what}");
    }
}

/// The processor checks privileges before it touches the operand: LMSW from user mode is #GP wherever its operand is.
#[test]
fn lmsw_of_user_mode_reads_no_memory() {
    let mut m = long();
    m.user();
    assert_eq!(step(&mut m, &[0x0f, 0x01, 0x34, 0x25, 0, 0, 0, 0x7f]), raised(13, 0)); // lmsw [0x7f000000]
}

/// Of CMPS's operands, ES:RDI is read first, as a page fault of both shows.
#[test]
fn cmps_reads_its_second_operand_first() {
    let mut m = long();
    (m.v.cpu.gpr[RSI], m.v.cpu.gpr[RDI]) = (0x7f00_0000, 0x7f10_0000);
    assert_eq!(step(&mut m, &[0xa6]), Err(Exception::page_fault(0, 0x7f10_0000).into()));
}

/// BTS, BTR and BTC with a bit offset in a register write a whole operand, the page behind it included.
#[test]
fn bit_instructions_access_their_whole_operand() {
    let mut m = long();
    m.v.cpu.gpr[RBX] = MAPPED - 2;
    let fault = || Err(Exception::page_fault(2, MAPPED).into());
    assert_eq!(step(&mut m, &[0x0f, 0xab, 0x03]), fault()); // bts [rbx], eax
    (m.v.cpu.gpr[RBX], m.v.cpu.gpr[RAX]) = (MAPPED + 4, (-16i32) as u32 as u64);
    assert_eq!(step(&mut m, &[0x0f, 0xb3, 0x03]), fault()); // btr [rbx], eax: the dword below, bit 16
}

/// A page fault of a repeated string instruction that goes backward is at the element that it comes to first.
#[test]
fn backward_strings_fault_at_the_highest_element() {
    let mut m = long();
    m.v.cpu.set_rflags(rflags::DF);
    (m.v.cpu.gpr[RSI], m.v.cpu.gpr[RDI], m.v.cpu.gpr[RCX]) = (0x7f00_0800, FREE, 16);
    assert_eq!(step(&mut m, &[0xf3, 0xa4]), Err(Exception::page_fault(0, 0x7f00_0800).into())); // rep movsb
    m.v.cpu.gpr[RDI] = 0x7f10_0800;
    assert_eq!(step(&mut m, &[0xf3, 0xaa]), Err(Exception::page_fault(2, 0x7f10_0800).into())); // rep stosb
}
