//! Call gates, task switches and virtual-8086 mode (Intel SDM volume 3, chapters 5.8, 8 and 22).

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{CS, DS, ES, Exception, Exit, FS, GS, RSP, SS, Stop, cr0, efer, rflags};
use _engine::{debug, exception, far, interp, segment};
use common::*;

/// Where the tests put their own: descriptors from 0x50 on, TSSs, stacks.
const OTHER_TSS: u64 = 0xa400;
const NARROW_TSS: u64 = 0xa800;
const GATE: u64 = GDT + 0x50;
const OTHER: u16 = 0x58;
const NARROW: u16 = 0x60;
const TASK_GATE: u16 = 0x68;

fn tss(base: u64, kind: u64, limit: u64) -> u64 {
    limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24) << 56
}

/// 32-bit protected mode with a task at OTHER (32 bits) and one at NARROW (16 bits), both available.
fn machine() -> Machine {
    let mut m = Machine::new(4 << 20);
    m.protected_mode();
    m.write64(GDT + 0x50, 0);
    m.write64(GDT + 0x58, tss(OTHER_TSS, 0x89, 0x67));
    m.write64(GDT + 0x60, tss(NARROW_TSS, 0x81, 0x2b));
    m.write64(GDT + 0x68, (OTHER as u64) << 16 | 0xe5 << 40);
    m.v.cpu.gdtr.limit = 0x9f;
    let put = |m: &mut Machine, at: u64, value: u64| m.write(OTHER_TSS + at, &(value as u32).to_le_bytes());
    put(&mut m, 4, FREE - 0x800);
    put(&mut m, 8, 0x10);
    put(&mut m, 32, FREE + 0x100);
    put(&mut m, 36, rflags::ZF | 2);
    for n in 0..8 {
        put(&mut m, 40 + 4 * n, 0x100 * (n + 1));
    }
    put(&mut m, 56, FREE - 0x400); // ESP
    for (n, sel) in [0x10u64, 0x40, 0x10, 0x10, 0, 0x20].into_iter().enumerate() {
        put(&mut m, 72 + 4 * n as u64, sel);
    }
    put(&mut m, 96, 0);
    put(&mut m, 100, 0x67 << 16);
    let narrow = |m: &mut Machine, at: u64, value: u16| m.write(NARROW_TSS + at, &value.to_le_bytes());
    narrow(&mut m, 14, 0x1234);
    narrow(&mut m, 16, 2);
    for n in 0..8 {
        narrow(&mut m, 18 + 2 * n, 0x10 * (n as u16 + 1));
    }
    for (n, sel) in [0x10u16, 0x48, 0x10, 0x10].into_iter().enumerate() {
        narrow(&mut m, 34 + 2 * n as u64, sel);
    }
    m
}

fn step(m: &mut Machine, code: &[u8]) -> Result<(), Stop> {
    let base = if m.v.cpu.long64() { 0 } else { m.v.cpu.segs[CS].base };
    m.write(base + m.v.cpu.rip, code);
    interp::step(&mut m.v)
}
fn raised(vector: u8, error: u32) -> Result<(), Stop> {
    Err(Exception::with_error(vector, error).into())
}
fn read32(m: &Machine, at: u64) -> u32 {
    u32::from_le_bytes(m.read(at))
}
fn busy(m: &Machine, sel: u16) -> bool {
    m.read64(GDT + sel as u64) >> 41 & 1 != 0
}
/// jmp or call sel:0
fn far_to(call: bool, sel: u16) -> Vec<u8> {
    vec![if call { 0x9a } else { 0xea }, 0, 0, 0, 0, sel as u8, (sel >> 8) as u8]
}

#[test]
fn a_jump_to_a_task_and_back() {
    let mut m = machine();
    m.v.cpu.gpr[3] = 0xbbbb;
    m.v.cpu.dr[7] |= 0x155;
    m.v.cpu.set_rflags(rflags::IF | rflags::CF);
    assert_eq!(step(&mut m, &far_to(false, OTHER)), Ok(()));
    let c = &m.v.cpu;
    assert_eq!(
        (c.rip, c.rflags(), c.gpr[0], c.gpr[3], c.gpr[RSP]),
        (FREE + 0x100, rflags::ZF | 2, 0x100, 0x400, FREE - 0x400)
    );
    assert_eq!([CS, SS, DS, ES, FS, GS].map(|s| c.segs[s].sel), [0x40, 0x10, 0x10, 0x10, 0, 0x20]);
    assert_eq!((c.tr.sel, c.tr.base, c.tr.attr & 15, c.cr0 & cr0::TS), (OTHER, OTHER_TSS, 0xb, cr0::TS));
    assert_eq!(c.dr[7] & 0x155, 0);
    assert_eq!((busy(&m, OTHER), busy(&m, 0x30)), (true, false));
    // What was saved.
    assert_eq!(read32(&m, TSS + 32), FREE as u32 + 7);
    assert_eq!(read32(&m, TSS + 36) as u64, rflags::IF | rflags::CF | 2);
    assert_eq!((read32(&m, TSS + 52), read32(&m, TSS + 56)), (0xbbbb, FREE as u32));
    assert_eq!((read32(&m, TSS + 76), read32(&m, TSS + 80)), (0x40, 0x10));
    // And back.
    assert_eq!(step(&mut m, &far_to(false, 0x30)), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[3], m.v.cpu.tr.sel), (FREE + 7, 0xbbbb, 0x30));
    assert_eq!(read32(&m, OTHER_TSS + 32), FREE as u32 + 0x107);
}

#[test]
fn a_called_task_returns_by_iret() {
    for sel in [OTHER, TASK_GATE] {
        let mut m = machine();
        assert_eq!(step(&mut m, &far_to(true, sel)), Ok(()));
        assert_eq!((m.v.cpu.tr.sel, m.v.cpu.rflags()), (OTHER, rflags::NT | rflags::ZF | 2));
        assert_eq!((busy(&m, OTHER), busy(&m, 0x30), m.read::<2>(OTHER_TSS)), (true, true, [0x30, 0]));
        assert_eq!(step(&mut m, &far_to(true, 0x30)), raised(13, 0x30), "it is busy");
        assert_eq!(step(&mut m, &[0xcf]), Ok(()));
        assert_eq!((m.v.cpu.tr.sel, m.v.cpu.rip, busy(&m, OTHER), busy(&m, 0x30)), (0x30, FREE + 7, false, true));
        assert_eq!(read32(&m, OTHER_TSS + 36) as u64 & rflags::NT, 0, "not in what it saved");
    }
}

#[test]
fn an_exception_by_a_task_gate() {
    let mut m = machine();
    m.write64(IDT + 13 * 8, (OTHER as u64) << 16 | 0x85 << 40);
    m.v.cpu.set_rflags(rflags::IF);
    exception::deliver(&mut m.v, Exception::gp(0x1238)).unwrap();
    assert_eq!((m.v.cpu.tr.sel, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (OTHER, FREE + 0x100, FREE - 0x404));
    assert_eq!(read32(&m, FREE - 0x404), 0x1238);
    assert_eq!(read32(&m, TSS + 36) as u64, rflags::IF | rflags::RF | 2, "a fault");
    m.v.cpu.gpr[RSP] += 4;
    assert_eq!(step(&mut m, &[0xcf]), Ok(()));
    assert_eq!((m.v.cpu.tr.sel, m.v.cpu.rip), (0x30, FREE));
    // INT n asks for the gate's DPL.
    let mut m = machine();
    m.write64(IDT + 0x40 * 8, (OTHER as u64) << 16 | 0x85 << 40);
    m.v.cpu.cpl = 3;
    assert_eq!(step(&mut m, &[0xcd, 0x40]), raised(13, 0x202));
}

#[test]
fn sixteen_bit_tasks() {
    let mut m = machine();
    m.v.cpu.gpr[0] = 0x1_5678;
    assert_eq!(step(&mut m, &far_to(true, NARROW)), Ok(()));
    let c = &m.v.cpu;
    assert_eq!((c.rip, c.gpr[0], c.gpr[7], c.rflags()), (0x1234, 0x10, 0x80, rflags::NT | 2));
    assert_eq!([CS, SS, DS, ES, FS, GS].map(|s| c.segs[s].sel), [0x48, 0x10, 0x10, 0x10, 0, 0]);
    assert_eq!(step(&mut m, &[0xcf]), Ok(()));
    assert_eq!((m.v.cpu.tr.sel, m.v.cpu.gpr[0]), (0x30, 0x1_5678));
    assert_eq!(m.read::<2>(NARROW_TSS + 14), [0x35, 0x12]);
}

#[test]
fn faults_before_and_after_the_switch() {
    let edit = |m: &mut Machine, at: u64, value: u64| m.write64(at, value);
    type Edit<'a> = &'a dyn Fn(&mut Machine);
    let descriptor = |value: u64| move |m: &mut Machine| edit(m, GDT + OTHER as u64, value);
    let (absent, short) = (descriptor(tss(OTHER_TSS, 9, 0x67)), descriptor(tss(OTHER_TSS, 0x89, 0x66)));
    let word = |at: u64, value: u32| move |m: &mut Machine| m.write(OTHER_TSS + at, &value.to_le_bytes());
    let (ldt, null_cs, data_cs, user_cs) = (word(96, 0x10), word(76, 0), word(76, 0x10), word(76, 0x43));
    let (null_ss, bad_ss, bad_ds, eip) = (word(80, 0), word(80, 0x23), word(84, 0x50), word(32, 0x2000));
    let small_code = |m: &mut Machine| {
        eip(m);
        m.write64(GDT + 0x40, 0x0040_9b00_0000_0fff);
    };
    // What, how, expected, whether it is the new task's.
    let rows: [(&str, Edit, Result<(), Stop>, bool); 11] = [
        ("not present", &absent, raised(11, 0x58), false),
        ("too short", &short, raised(10, 0x58), false),
        ("LDT that is none", &ldt, raised(10, 0x10), true),
        ("null CS", &null_cs, raised(10, 0), true),
        ("data as CS", &data_cs, raised(10, 0x10), true),
        ("RPL of CS", &user_cs, raised(10, 0x40), true),
        ("null SS", &null_ss, raised(10, 0), true),
        ("SS of another level", &bad_ss, raised(10, 0x20), true),
        ("DS that is empty", &bad_ds, raised(10, 0x50), true),
        ("EIP beyond the limit", &small_code, raised(13, 0), true),
        ("nothing", &|_: &mut Machine| {}, Ok(()), true),
    ];
    for (what, change, expected, switched) in rows {
        let mut m = machine();
        change(&mut m);
        assert_eq!(step(&mut m, &far_to(false, OTHER)), expected, "{what}");
        assert_eq!(m.v.cpu.tr.sel == OTHER, switched, "{what}");
        if !switched {
            assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[0], busy(&m, 0x30)), (FREE, 0, true), "{what}");
        }
    }
    // The trap bit; privileges.
    let mut m = machine();
    m.write(OTHER_TSS + 100, &[1]);
    let trap = Exception { payload: debug::BT, ..Exception::new(1) };
    assert_eq!(step(&mut m, &far_to(false, OTHER)), Err(trap.into()));
    assert_eq!(m.v.cpu.rip, FREE + 0x100);
    for sel in [OTHER, TASK_GATE] {
        let mut m = machine();
        m.v.cpu.cpl = 3;
        let expected = if sel == OTHER { raised(13, 0x58) } else { Ok(()) };
        assert_eq!(step(&mut m, &far_to(false, sel)), expected, "{sel:#x} from user mode");
    }
    let mut m = machine();
    m.v.cpu.set_rflags(rflags::NT);
    m.write(TSS, &[OTHER as u8, 0]);
    assert_eq!(step(&mut m, &[0xcf]), raised(10, 0x58), "IRET to a task that is not busy");
}

// Call gates.

fn gate(sel: u64, offset: u64, kind: u64, dpl: u64, count: u64) -> u64 {
    offset & 0xffff | sel << 16 | count << 32 | (0x80 | dpl << 5 | kind) << 40 | (offset >> 16 & 0xffff) << 48
}

/// User mode at FREE with a stack below it, and an inner stack at FREE - 0x800.
fn user_32() -> Machine {
    let mut m = machine();
    m.write(TSS + 4, &((FREE - 0x800) as u32).to_le_bytes());
    m.write(TSS + 8, &0x10u16.to_le_bytes());
    m.v.cpu.cpl = 3;
    m.v.cpu.segs[CS] = segment::Descriptor(m.read64(GDT + 0x18)).seg(0x1b);
    for s in [ES, SS, DS, FS, GS] {
        m.v.cpu.segs[s] = segment::Descriptor(m.read64(GDT + 0x20)).seg(0x23);
    }
    m
}

#[test]
fn a_call_gate_to_an_inner_level_copies_parameters() {
    let mut m = user_32();
    m.write64(GATE, gate(0x40, FREE + 0x200, 12, 3, 2));
    m.v.cpu.gpr[RSP] = FREE - 8;
    m.write64(FREE - 8, 0x2222_2222_1111_1111);
    assert_eq!(step(&mut m, &far_to(true, 0x53)), Ok(()));
    let sp = FREE - 0x800 - 24;
    assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (0, FREE + 0x200, sp));
    assert_eq!((m.v.cpu.segs[CS].sel, m.v.cpu.segs[SS].sel), (0x40, 0x10));
    let words: [u32; 6] = std::array::from_fn(|n| read32(&m, sp + 4 * n as u64));
    assert_eq!(words, [FREE as u32 + 7, 0x1b, 0x1111_1111, 0x2222_2222, FREE as u32 - 8, 0x23]);
    // RETF 8 drops them on both stacks.
    assert_eq!(step(&mut m, &[0xca, 8, 0]), Ok(()));
    assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (3, FREE + 7, FREE));
    // 16-bit gate: 16-bit words.
    let mut m = user_32();
    m.write64(GATE, gate(0x40, 0x234, 4, 3, 1));
    assert_eq!(step(&mut m, &far_to(true, 0x53)), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[RSP]), (0x234, FREE - 0x800 - 10));
}

#[test]
fn call_gates_within_a_level_and_jumps() {
    let mut m = machine();
    m.write64(GATE, gate(0x40, FREE + 0x200, 12, 0, 5));
    assert_eq!(step(&mut m, &far_to(true, 0x50)), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[RSP], read32(&m, FREE - 8)), (FREE + 0x200, FREE - 8, FREE as u32 + 7));
    let mut m = machine();
    m.write64(GATE, gate(0x40, FREE + 0x200, 12, 0, 5));
    assert_eq!(step(&mut m, &far_to(false, 0x50)), Ok(()));
    assert_eq!((m.v.cpu.rip, m.v.cpu.gpr[RSP]), (FREE + 0x200, FREE));
    let mut m = user_32();
    m.write64(GATE, gate(0x40, FREE + 0x200, 12, 3, 0));
    assert_eq!(step(&mut m, &far_to(false, 0x53)), raised(13, 0x40), "a jump stays in its level");
}

#[test]
fn call_gates_that_are_refused() {
    let rows: [(&str, u64, Result<(), Stop>); 8] = [
        ("DPL of the gate", gate(0x40, 0, 12, 0, 0), raised(13, 0x50)),
        ("not present", gate(0x40, 0, 12, 3, 0) & !(1 << 47), raised(11, 0x50)),
        ("null code", gate(0, 0, 12, 3, 0), raised(13, 0)),
        ("data", gate(0x10, 0, 12, 3, 0), raised(13, 0x10)),
        ("beyond the GDT", gate(0x1000, 0, 12, 3, 0), raised(13, 0x1000)),
        ("code not present", gate(0x70, 0, 12, 3, 0), raised(11, 0x70)),
        ("an interrupt gate", gate(0x40, 0, 14, 3, 0), raised(13, 0x50)),
        ("no room on the inner stack", gate(0x40, 0, 12, 3, 0), raised(12, 0x78)),
    ];
    for (what, descriptor, expected) in rows {
        let mut m = user_32();
        m.write64(GATE, descriptor);
        m.write64(GDT + 0x70, 0x00cf_1b00_0000_ffff);
        m.write64(GDT + 0x78, 0x0040_9200_0000_000f);
        if what.contains("room") {
            m.write(TSS + 4, &0x1000u32.to_le_bytes());
            m.write(TSS + 8, &0x78u16.to_le_bytes());
        }
        assert_eq!(step(&mut m, &far_to(true, 0x53)), expected, "{what}");
        assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (3, FREE, FREE), "{what}");
    }
}

#[test]
fn call_gates_of_long_mode() {
    let long = || {
        let mut m = Machine::new(4 << 20);
        m.long_mode();
        m.v.cpu.gdtr.limit = 0x7f;
        m.write64(GATE, gate(8, FREE + 0x200, 12, 3, 0));
        m.write64(GATE + 8, 0);
        m.user();
        m
    };
    // call far [rbx] with an operand of 10 bytes
    let code = &[0x48, 0xff, 0x1b][..];
    let pointer = |m: &mut Machine| {
        m.write64(FREE + 0x100, 0);
        m.write(FREE + 0x108, &0x53u16.to_le_bytes());
        m.v.cpu.gpr[3] = FREE + 0x100;
    };
    let mut m = long();
    pointer(&mut m);
    assert_eq!(step(&mut m, code), Ok(()));
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.rip, c.gpr[RSP], c.segs[SS].sel), (0, FREE + 0x200, FREE - 0x800 - 32, 0));
    let words: [u64; 4] = std::array::from_fn(|n| m.read64(FREE - 0x820 + 8 * n as u64));
    assert_eq!(words, [FREE + 3, 0x2b, FREE, 0x23]);
    assert_eq!(step(&mut m, &[0x48, 0xcb]), Ok(()), "RETF");
    assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (3, FREE + 3, FREE));
    // From compatibility mode; to 32-bit code; with a bad upper half.
    let mut m = long();
    m.v.cpu.segs[CS] = segment::Descriptor(m.read64(GDT + 0x18)).seg(0x1b);
    assert_eq!(step(&mut m, &far_to(true, 0x53)), Ok(()));
    assert_eq!((m.v.cpu.long64(), m.v.cpu.rip, m.read64(m.v.cpu.gpr[RSP])), (true, FREE + 0x200, FREE + 7));
    let mut m = long();
    pointer(&mut m);
    m.write64(GATE, gate(0x40, FREE, 12, 3, 0));
    assert_eq!(step(&mut m, code), raised(13, 0x40));
    let mut m = long();
    pointer(&mut m);
    m.write64(GATE + 8, 1 << 40);
    assert_eq!(step(&mut m, code), raised(13, 0x50));
    let mut m = long();
    m.write64(GATE, 0xe500 << 32);
    assert_eq!(far::call(&mut m.v, 0x53, 0, 4, 0), raised(13, 0x50), "no task gates");
    assert_eq!(m.v.cpu.efer & efer::LMA, efer::LMA);
}

// Virtual-8086 mode.

/// In it, at 1000:0 with the stack at 0:8000.
fn virtual_8086(iopl: u64) -> Machine {
    let mut m = machine();
    m.write(TSS + 4, &((FREE - 0x800) as u32).to_le_bytes());
    m.write(TSS + 8, &0x10u16.to_le_bytes());
    // IRETD: EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS
    let flags = rflags::VM | rflags::IF | iopl << 12 | 2;
    let words = [0, 0x1000, flags as u32, 0x8000, 0, 0x111, 0x222, 0x333, 0x444];
    m.v.cpu.gpr[RSP] = FREE - 36;
    for (n, word) in words.into_iter().enumerate() {
        m.write(FREE - 36 + 4 * n as u64, &word.to_le_bytes());
    }
    m.v.cpu.rip = 0x3000;
    assert_eq!(step(&mut m, &[0xcf]), Ok(()));
    m
}

#[test]
fn entering_virtual_8086_mode() {
    let m = virtual_8086(0);
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.rip, c.gpr[RSP]), (3, 0, 0x8000));
    assert_eq!([CS, SS, ES, DS, FS, GS].map(|s| c.segs[s].sel), [0x1000, 0, 0x111, 0x222, 0x333, 0x444]);
    assert_eq!((c.segs[DS].base, c.segs[DS].limit, c.segs[CS].attr), (0x2220, 0xffff, 0xf3));
}

#[test]
fn code_in_virtual_8086_mode() {
    // mov ax, 0x1800; mov ds, ax; mov word [0x10], 0xbeef; call 0x1000:0x20; there: retf
    let mut m = virtual_8086(0);
    m.write(FREE + 0x20, &[0xcb]);
    for code in
        [&[0xb8, 0, 0x18][..], &[0x8e, 0xd8], &[0xc7, 6, 0x10, 0, 0xef, 0xbe], &[0x9a, 0x20, 0, 0, 0x10], &[0xcb]]
    {
        assert_eq!(step(&mut m, code), Ok(()), "{code:x?}");
    }
    assert_eq!((m.read::<2>(0x1_8010), m.v.cpu.rip), ([0xef, 0xbe], 16));
    // Beyond a segment; what only a kernel may do; what there is not.
    assert_eq!(step(&mut m, &[0xa3, 0xff, 0xff]), raised(13, 0));
    for code in [&[0xf4][..], &[0x0f, 1, 0x16, 0, 0], &[0x0f, 0x20, 0xc0], &[0x0f, 6]] {
        assert_eq!(step(&mut m, code), raised(13, 0), "{code:x?}");
    }
    for code in [&[0x0f, 0, 0xd8][..], &[0x0f, 2, 0xc8], &[0x63, 0xc8], &[0xc5, 0xf8, 0x57, 0xc0]] {
        assert_eq!(step(&mut m, code), Err(Exception::ud().into()), "{code:x?}");
    }
}

#[test]
fn iopl_decides_in_virtual_8086_mode() {
    // INT 0x40, CLI, STI, PUSHF, POPF, IRET
    for code in [&[0xcd, 0x40][..], &[0xfa], &[0xfb], &[0x9c], &[0x9d], &[0xcf]] {
        assert_eq!(step(&mut virtual_8086(0), code), raised(13, 0), "{code:x?}");
        if code[0] != 0xcd {
            assert_eq!(step(&mut virtual_8086(3), code), Ok(()), "{code:x?}");
        }
    }
    // INT n goes through the IDT like in protected mode.
    let mut m = virtual_8086(3);
    assert_eq!(step(&mut m, &[0xcd, 0x40]), raised(13, 0x202), "the gate's DPL");
    m.write64(IDT + 0x40 * 8, m.read64(IDT + 0x40 * 8) | 3 << 45);
    assert_eq!(step(&mut m, &[0xcd, 0x40]), Ok(()));
    assert_eq!(m.v.cpu.rip, HANDLERS + 0x40 * 16);
    // POPF changes neither IOPL nor VM; ports ask the bitmap whatever IOPL says.
    let mut m = virtual_8086(3);
    m.write(0x8000, &[0, 0]);
    assert_eq!(step(&mut m, &[0x9d]), Ok(()));
    assert_eq!(m.v.cpu.rflags(), rflags::VM | rflags::IOPL | 2);
    m.write(TSS + 102, &0x68u16.to_le_bytes());
    assert_eq!(step(&mut m, &[0xe6, 0x80]), raised(13, 0));
}

#[test]
fn interrupts_leave_virtual_8086_mode() {
    let mut m = virtual_8086(0);
    exception::deliver(&mut m.v, Exception::gp(0)).unwrap();
    let sp = FREE - 0x800 - 40;
    assert_eq!((m.v.cpu.cpl, m.v.cpu.rip, m.v.cpu.gpr[RSP]), (0, HANDLERS + 13 * 16, sp));
    let words: [u32; 10] = std::array::from_fn(|n| read32(&m, sp + 4 * n as u64));
    let flags = (rflags::VM | rflags::RF | rflags::IF | 2) as u32;
    assert_eq!(words, [0, 0, 0x1000, flags, 0x8000, 0, 0x111, 0x222, 0x333, 0x444]);
    assert_eq!(m.v.cpu.rflags() & rflags::VM, 0);
    assert!([ES, DS, FS, GS].iter().all(|&s| m.v.cpu.segs[s].unusable && m.v.cpu.segs[s].sel == 0));
    m.v.cpu.gpr[RSP] += 4;
    assert_eq!(step(&mut m, &[0xcf]), Ok(()));
    assert_eq!((m.v.cpu.segs[GS].sel, m.v.cpu.rip), (0x444, 0));
    // To code of another level, it is #GP.
    let mut m = virtual_8086(0);
    let user_gate = m.read64(IDT + 0x40 * 8) & !0xffff_0000 | 0x18 << 16;
    m.write64(IDT + 0x40 * 8, user_gate);
    exception::deliver_interrupt(&mut m.v, 0x40).unwrap();
    assert_eq!((m.v.cpu.rip, read32(&m, m.v.cpu.gpr[RSP])), (HANDLERS + 13 * 16, 0x19));
    // INT3 asks for no IOPL, only for the gate.
    let mut m = virtual_8086(0);
    m.write64(IDT + 3 * 8, m.read64(IDT + 3 * 8) | 3 << 45);
    assert_eq!(step(&mut m, &[0xcc]), Ok(()));
    assert_eq!(m.v.cpu.rip, HANDLERS + 3 * 16);
}

#[test]
fn a_task_may_be_one_of_virtual_8086_mode() {
    let mut m = machine();
    m.write(OTHER_TSS + 36, &((rflags::VM | 2) as u32).to_le_bytes());
    m.write(OTHER_TSS + 32, &0x10u32.to_le_bytes());
    m.write(OTHER_TSS + 76, &0x1000u32.to_le_bytes());
    assert_eq!(step(&mut m, &far_to(false, OTHER)), Ok(()));
    let c = &m.v.cpu;
    assert_eq!((c.cpl, c.segs[CS].base, c.rip, c.segs[SS].base), (3, 0x1_0000, 0x10, 0x100));
}

#[test]
fn it_runs_through_the_run_loop() {
    // In the other task: mov dword [0x20000], 0x1234; iret. Back here: hlt.
    let mut m = machine();
    m.write(FREE + 0x100, &[0xc7, 5, 0, 0, 2, 0, 0x34, 0x12, 0, 0, 0xcf]);
    assert_eq!(m.run(&[&far_to(true, OTHER)[..], &[0xf4]].concat()), Exit::Hlt);
    assert_eq!((m.v.cpu.rip, m.v.cpu.tr.sel, m.read::<2>(0x2_0000)), (FREE + 8, 0x30, [0x34, 0x12]));
}
