//! XSAVE's family against the host's own: what is written, what is refused, what comes back.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::cpu::{CpuidEntry, Exit};
use _engine::xstate::{self, AVX, OPMASK, SSE, X87};
use common::native::{self, Random, State, alone};
use common::*;

const AREA: u64 = 0x18_0000;
const BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Xsave,
    Xsaveopt,
    Xsavec,
    Xrstor,
}

impl Form {
    /// The instruction on [rdi].
    fn code(self) -> &'static [u8] {
        match self {
            Form::Xsave => &[0x48, 0x0f, 0xae, 0x27],
            Form::Xsaveopt => &[0x48, 0x0f, 0xae, 0x37],
            Form::Xsavec => &[0x48, 0x0f, 0xc7, 0x27],
            Form::Xrstor => &[0x48, 0x0f, 0xae, 0x2f],
        }
    }
}

fn machine() -> Machine {
    let mut m = Machine::new(4 << 20);
    m.long_mode();
    m.v.cpu.xcr0 = xstate::supported();
    m.v.cpuid = vec![CpuidEntry { function: 0xd, index: 1, flags: 1, eax: 15, ..CpuidEntry::default() }];
    m
}

fn random_state(r: &mut Random) -> State {
    let mut state = State::new();
    let mut header = r.next() & (X87 | SSE);
    state.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    let mxcsr: u32 = if r.below(2) == 0 { 0x1f80 } else { 0x7fa0 };
    state.xsave[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    state.xsave[32..42].fill(0x11);
    state.xsave[160..416].iter_mut().for_each(|x| *x = r.next() as u8);
    for c in xstate::components() {
        if r.below(2) == 0 {
            header |= c.bit;
        }
        state.xsave[c.offset..c.offset + c.size].iter_mut().for_each(|x| *x = r.next() as u8);
    }
    state.xsave[512..520].copy_from_slice(&header.to_le_bytes());
    state
}

fn host_has_form(form: Form) -> bool {
    match form {
        Form::Xsaveopt => host_has(0xd, 1, 0, 0),
        Form::Xsavec => host_has(0xd, 1, 0, 1),
        _ => true,
    }
}

#[test]
fn areas_are_written_as_the_host_writes_them() {
    let _guard = alone();
    let region = native::Region { base: native::BASE, bytes: 0x4000 };
    region.map();
    let (code, area) = (region.base, region.base + 0x1000);
    for seed in 1..400 {
        let mut r = Random(seed);
        let form = r.pick(&[Form::Xsave, Form::Xsaveopt, Form::Xsavec]);
        if !host_has_form(form) {
            continue;
        }
        let mut state = random_state(&mut r);
        (state.gpr[0], state.gpr[2], state.gpr[7]) = (r.next(), r.next(), area);
        if r.below(2) == 0 {
            state.gpr[0] |= 0xe7;
        }
        let mut before = vec![0x5a; BYTES];
        before[512..576].fill(0);
        before[512] = r.next() as u8 & 7;
        let mut tail = vec![0xff, 0x25, 0, 0, 0, 0];
        tail.extend((native::exit as *const () as u64).to_le_bytes());
        region.write(code, &[form.code(), &tail].concat());
        region.write(area, &before);
        let (_, trap) = native::run(&state, code);
        assert_eq!(trap, None, "seed {seed}");
        let theirs = region.slice(area, BYTES).to_vec();

        let mut m = machine();
        m.v.cpu.fpu.0 = state.xsave;
        m.v.cpu.gpr = state.gpr;
        (m.v.cpu.gpr[7], m.v.cpu.gpr[4]) = (AREA, FREE);
        m.write(AREA, &before);
        assert_eq!(m.run(&[form.code(), &[0xf4][..]].concat()), Exit::Hlt);
        assert_eq!(m.halted_in(), None, "seed {seed} {form:?}");
        let ours = m.read::<BYTES>(AREA).to_vec();
        let (ours, theirs) = (contents(form, &before, ours), contents(form, &before, theirs));
        let header = u64::from_le_bytes(state.xsave[512..520].try_into().unwrap());
        for n in 0..ours.len() {
            let eax = state.gpr[0] as u32;
            assert_eq!(ours[n], theirs[n], "seed {seed} {form:?} eax {eax:#x} in use {header:#x} byte {n}");
        }
    }
}

/// What a written area says. A processor may take a component for being in use although it holds what it holds
/// initially, so zeros and nothing are the same; without the addresses of the last x87 instruction and operand.
fn contents(form: Form, before: &[u8], mut area: Vec<u8>) -> Vec<u8> {
    area[6..24].fill(0);
    let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
    let (present, format) = (word(512), word(520));
    let compact = format >> 63 != 0;
    let layout: Vec<_> = if compact {
        xstate::compacted(format).0
    } else {
        xstate::components().iter().map(|c| (*c, c.offset)).collect()
    };
    let mut parts = vec![(X87, 32..160), (SSE, 160..416)];
    parts.extend(layout.iter().map(|(c, at)| (c.bit, *at..at + c.size)));
    let mut b = [present.to_le_bytes(), format.to_le_bytes()].concat();
    for (bit, range) in parts {
        let bytes = &area[range.clone()];
        let initial = present & bit == 0 || bytes.iter().all(|&x| x == 0);
        if initial && bit != X87 {
            b[0] &= !(bit as u8);
        }
        if form == Form::Xsave || !initial || bit == X87 { b.extend(bytes) } else { b.extend(vec![0; bytes.len()]) }
    }
    // MXCSR goes with SSE in the compacted format.
    if !compact || area[24..28] != before[24..28] && area[24..28] != 0x1f80u32.to_le_bytes() {
        b.extend(&area[24..32]);
    }
    if form == Form::Xsave {
        b.extend(&area[..32]);
    }
    b
}

/// What goes wrong with an area, and whether it does.
#[test]
fn areas_are_read_as_the_host_reads_them() {
    let _guard = alone();
    let region = native::Region { base: native::BASE, bytes: 0x4000 };
    region.map();
    let (code, area) = (region.base, region.base + 0x1000);
    for seed in 1..600 {
        let mut r = Random(seed);
        let mut state = random_state(&mut r);
        let compact = r.below(2) == 0 && host_has(0xd, 1, 0, 1);
        let mut image = vec![0; BYTES];
        let source = random_state(&mut r);
        image[..512].copy_from_slice(&source.xsave[..512]);
        image[576..].iter_mut().for_each(|x| *x = r.next() as u8);
        let all = xstate::supported();
        let mut present = r.next() & all;
        let mut listed = if compact { (r.next() & all | present) | 1 << 63 } else { 0 };
        let mut rest = [0u8; 48];
        match r.below(12) {
            0 => present |= 1 << 20,
            1 => listed |= 1 << 20,
            2 => rest[r.below(8) as usize] = 1,
            3 => rest[8 + r.below(40) as usize] = 1,
            4 => image[27] = 1,
            5 if compact => present = all,
            6 => listed |= 1,
            _ => {}
        }
        image[512..520].copy_from_slice(&present.to_le_bytes());
        image[520..528].copy_from_slice(&listed.to_le_bytes());
        image[528..576].copy_from_slice(&rest);
        (state.gpr[0], state.gpr[2], state.gpr[7]) = (if r.below(2) == 0 { r.next() } else { 0xe7 }, 0, area);
        if r.below(20) == 0 {
            state.gpr[7] += 8;
        }
        let mut tail = vec![0xff, 0x25, 0, 0, 0, 0];
        tail.extend((native::exit as *const () as u64).to_le_bytes());
        region.write(code, &[Form::Xrstor.code(), &tail].concat());
        region.write(area, &image);
        let (after, trap) = native::run(&state, code);

        let mut m = machine();
        m.v.cpu.fpu.0 = state.xsave;
        m.v.cpu.gpr = state.gpr;
        (m.v.cpu.gpr[7], m.v.cpu.gpr[4]) = (AREA | state.gpr[7] & 63, FREE);
        m.write(AREA, &image);
        assert_eq!(m.run(&[Form::Xrstor.code(), &[0xf4][..]].concat()), Exit::Hlt);
        let what = format!("seed {seed} compact {compact} present {present:#x} listed {listed:#x} rest {rest:x?}");
        assert_eq!(m.halted_in(), trap.map(|t| t.vector), "{what}");
        let values = |xsave: &[u8]| -> Vec<u8> {
            let in_use = u64::from_le_bytes(xsave[512..520].try_into().unwrap());
            let mut b = xsave[24..28].to_vec();
            let mut part = |bit, range: std::ops::Range<usize>| {
                if in_use & bit != 0 { b.extend(&xsave[range]) } else { b.extend(vec![0; range.len()]) }
            };
            part(X87, 32..160);
            part(SSE, 160..416);
            xstate::components().iter().for_each(|c| part(c.bit, c.offset..c.offset + c.size));
            b
        };
        let (ours, theirs) = (values(&m.v.cpu.fpu.0), values(&after.xsave));
        // A #GP for MXCSR may come when some of it is loaded.
        if let Some(n) = (0..ours.len()).find(|&n| ours[n] != theirs[n])
            && trap.is_none()
        {
            panic!(
                "{what}: byte {n} {:x?} {:x?}",
                &ours[n..n.min(ours.len() - 8) + 8],
                &theirs[n..n.min(ours.len() - 8) + 8]
            );
        }
    }
}

#[test]
fn supervisor_forms_and_xinuse() {
    let mut m = machine();
    (m.v.cpu.gpr[0], m.v.cpu.gpr[2], m.v.cpu.gpr[7]) = (0xff, 0, AREA);
    m.v.cpu.fpu.0[512] = (X87 | AVX) as u8;
    let at = xstate::offset(AVX);
    m.v.cpu.fpu.0[at..at + 32].fill(0x42);
    // xsaves64 [rdi]
    assert_eq!(m.run(&[0x48, 0x0f, 0xc7, 0x2f, 0xf4]), Exit::Hlt);
    assert_eq!(m.halted_in(), None);
    // A processor may take SSE for being in use.
    assert_eq!((m.read64(AREA + 512) & !SSE, m.read64(AREA + 520)), (X87 | AVX, 1 << 63 | m.v.cpu.xcr0));
    assert_eq!(m.read::<32>(AREA + 576), [0x42; 32]);
    // xgetbv with ecx = 1
    m.v.cpu.gpr[1] = 1;
    assert_eq!(m.run(&[0x0f, 0x01, 0xd0, 0xf4]), Exit::Hlt);
    assert_eq!(m.v.cpu.gpr[0] & (AVX | OPMASK), AVX);
    // xrstors64 [rdi], which refuses the standard format
    m.v.cpu.gpr[0] = 0xff;
    m.v.cpu.fpu.0[at..at + 32].fill(0);
    assert_eq!(m.run(&[0x48, 0x0f, 0xc7, 0x1f, 0xf4]), Exit::Hlt);
    assert_eq!((m.halted_in(), &m.v.cpu.fpu.0[at..at + 32]), (None, &[0x42; 32][..]));
    m.write64(AREA + 520, 0);
    assert_eq!(m.run(&[0x48, 0x0f, 0xc7, 0x1f, 0xf4]), Exit::Hlt);
    assert_eq!(m.halted_in(), Some(13));
    // And user mode.
    for code in [[0x48, 0x0f, 0xc7, 0x1f], [0x48, 0x0f, 0xc7, 0x2f]] {
        m.write64(AREA + 520, 1 << 63 | m.v.cpu.xcr0);
        m.user();
        assert_eq!(m.run(&code), Exit::Hlt);
        assert_eq!(m.halted_in(), Some(13));
        m.long_mode();
        m.v.cpu.cpl = 0;
        m.v.cpu.gpr[7] = AREA;
    }
}

#[test]
fn sizes_follow_xcr0() {
    let mut m = machine();
    let leaf = |index, eax| CpuidEntry { function: 0xd, index, flags: 1, eax, ..CpuidEntry::default() };
    m.v.cpuid = vec![leaf(0, 0xe7), leaf(1, 15)];
    for xcr0 in [1, 3, 7, 0xe7].into_iter().filter(|&x| xstate::valid_xcr0(x, u64::MAX)) {
        m.v.cpu.xcr0 = xcr0;
        let mut size = |index| {
            (m.v.cpu.gpr[0], m.v.cpu.gpr[1]) = (0xd, index);
            _engine::sys::cpuid(&mut m.v);
            m.v.cpu.gpr[3] as usize
        };
        assert_eq!((size(0), size(1)), (xstate::standard_bytes(xcr0), xstate::compacted(xcr0).1), "{xcr0:#x}");
    }
    for (value, valid) in [(0u64, false), (1, true), (3, true), (5, false), (0x23, false), (0xe3, false), (0x27, false)]
    {
        assert_eq!(xstate::valid_xcr0(value, u64::MAX), valid, "{value:#x}");
    }
}
