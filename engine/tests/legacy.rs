//! 32-bit code, interpreted by the engine and run by the host CPU itself in compatibility mode: same registers,
//! flags and memory. `KVMKIT_CASES` and `KVMKIT_SEED` as in `differential`.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::classify::{Class, Features, classify};
use _engine::cpu::{CS, Exit, Seg, Vcpu, cr0, rflags};
use _engine::mem::{Slot, Slots};
use _engine::run;
use _engine::vm::Vm;
use common::native::compat::{self, State};
use common::native::{Random, Region, alone, number};
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::sync::Arc;

/// The region that guest and host share, at the same addresses.
const REGION: Region = Region { base: 0x1000_0000, bytes: 1 << 20 };
const BASE: u64 = REGION.base;
const CODE: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x10_000;
const DATA_BYTES: usize = 0x8000;
const STACK: u64 = DATA + 0x7000;

fn write(at: u64, bytes: &[u8]) {
    REGION.write(at, bytes);
}

fn data() -> &'static mut [u8] {
    REGION.slice(DATA, DATA_BYTES)
}

fn machine() -> Vcpu {
    REGION.map();
    let vm = Arc::new(Vm::new(1_000_000).unwrap());
    vm.set_slots(Slots::new(vec![Slot { id: 0, flags: 0, gpa: BASE, size: REGION.bytes, hva: BASE, first_page: 0 }]));
    let mut v = Vcpu::new(vm, 0).unwrap();
    let c = &mut v.cpu;
    c.cr0 = cr0::PE | cr0::NE | cr0::ET;
    c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 8, attr: 0xc09b, unusable: false };
    for s in [0, 2, 3] {
        c.segs[s] = Seg { base: 0, limit: u32::MAX, sel: 16, attr: 0xc093, unusable: false };
    }
    v
}

/// Run `code` natively, then by the engine, from the same state; what differs in a flag of `undefined` does
/// not count. Returns the state after it.
fn compare(
    v: &mut Vcpu,
    code: &[u8],
    before: &State,
    contents: &[u8],
    undefined: u64,
    what: &dyn Fn() -> String,
) -> State {
    data().copy_from_slice(contents);
    let native = compat::run(REGION, BASE, code, CODE, before);
    let native_data = data().to_vec();

    write(CODE, &[code, &[0xf4]].concat());
    data().copy_from_slice(contents);
    let vm = v.vm.clone();
    vm.note_write(None, CODE, code.len() as u64 + 8);
    for n in 0..8 {
        v.cpu.gpr[n] = before.gpr[n] as u64;
    }
    v.cpu.set_rflags(before.flags);
    v.cpu.rip = CODE;
    let exit = run::run(v);
    assert_eq!(exit, Exit::Hlt, "rip {:#x}\n{}", v.cpu.rip, what());
    let engine = State { gpr: std::array::from_fn(|n| v.cpu.gpr[n] as u32), flags: v.cpu.rflags() };
    assert_eq!(engine.gpr, native.gpr, "engine, host; before {before:x?}\n{}", what());
    let compared = (rflags::ARITH | rflags::DF | rflags::ID) & !undefined;
    let (a, b) = (engine.flags & compared, native.flags & compared);
    assert_eq!(a, b, "flags {a:#x} {b:#x}, before {before:x?}\n{}", what());
    assert!(data() == native_data, "memory, before {before:x?}\n{}", what());
    native
}

fn listing(code: &[u8]) -> String {
    let mut text = String::new();
    for i in Decoder::with_ip(32, code, CODE, DecoderOptions::NONE).iter() {
        text += &format!("  {:#x} {:?}\n", i.ip(), i.code());
    }
    text
}

fn random_state(r: &mut Random) -> State {
    let mut gpr: [u32; 8] =
        std::array::from_fn(|_| if r.below(3) == 0 { r.below(256) as u32 } else { r.next() as u32 });
    gpr[4] = STACK as u32;
    // EBX and ESI point to data, at times across a page boundary.
    gpr[3] = DATA as u32 + 0x1000 + 8 * r.below(8) as u32;
    gpr[6] = DATA as u32 + 0x3ff0 + r.below(0x20) as u32;
    State { gpr, flags: r.next() & rflags::ARITH | rflags::IF | 2 }
}

fn random_contents(r: &mut Random) -> Vec<u8> {
    (0..DATA_BYTES / 8).flat_map(|_| r.next().to_le_bytes()).collect()
}

fn instruction(r: &mut Random, factory: &mut InstructionInfoFactory) -> Vec<u8> {
    use Mnemonic::*;
    let none = Features::NONE;
    loop {
        let mut b = Vec::with_capacity(20);
        if r.below(3) == 0 {
            b.push(0x66);
        }
        if r.below(12) == 0 {
            b.push([0xf0, 0xf3][r.below(2) as usize]);
        }
        match r.below(6) {
            0..3 => {}
            3 | 4 => b.push(0x0f),
            _ => b.extend([0x0f, 0x38]),
        }
        while b.len() < 16 {
            b.push(r.next() as u8);
        }
        let i = Decoder::with_ip(32, &b, CODE, DecoderOptions::NONE).decode();
        let wanted = matches!(classify(&i, none), Class::Plain | Class::Lea | Class::Nop)
            || matches!(i.mnemonic(), Inc | Dec | Bt | Bts | Btr | Btc | Pushfd | Pusha | Pushad | Popa | Popad)
            || matches!(i.mnemonic(), Push | Pop) && !i.op0_register().is_segment_register();
        let unwanted = matches!(i.mnemonic(), Rdrand | Rdseed | Div | Idiv | Lfence | Mfence | Sfence | Rdsspd)
            || i.is_privileged()
            || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && !i.op_register(n).is_gpr());
        if i.is_invalid() || !wanted || unwanted {
            continue;
        }
        let pops_all = matches!(i.mnemonic(), Popa | Popad);
        let moves_stack = matches!(i.mnemonic(), Push | Pop | Pushfd | Pusha | Pushad) || pops_all;
        let fixed = [Register::EBX, Register::ESI, Register::ESP];
        let writes_fixed = factory.info(&i).used_registers().iter().any(|u| {
            let full = u.register().full_register32();
            !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
                && fixed.contains(&full)
                && !(full == Register::ESP && moves_stack)
        });
        if writes_fixed || (i.mnemonic() == Pop && i.op0_register().full_register32() == Register::ESP) {
            continue;
        }
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && !matches!(i.mnemonic(), Lea | Nop) {
            let displacement = i.memory_displacement32() as i32;
            // A bit offset in a register reaches anywhere.
            let far = matches!(i.mnemonic(), Bt | Bts | Btr | Btc) && i.op1_kind() == OpKind::Register;
            if far
                || i.has_segment_prefix()
                || !fixed[..2].contains(&i.memory_base())
                || i.memory_index() != Register::None
                || !(-0x800..0x800).contains(&displacement)
            {
                continue;
            }
        } else if matches!(i.op0_kind(), OpKind::Memory) && i.has_segment_prefix() {
            continue;
        }
        b.truncate(i.len());
        return b;
    }
}

#[test]
fn random_32_bit_code_runs_as_on_the_host() {
    let _guard = alone();
    let mut v = machine();
    let mut factory = InstructionInfoFactory::new();
    let first = number("KVMKIT_SEED", 1);
    for seed in first..first + number("KVMKIT_CASES", 2000) {
        let mut r = Random(seed);
        let code: Vec<u8> = (0..1 + seed % 16).flat_map(|_| instruction(&mut r, &mut factory)).collect();
        let (before, contents) = (random_state(&mut r), random_contents(&mut r));
        compare(&mut v, &code, &before, &contents, 0, &|| format!("seed {seed}\n{}", listing(&code)));
    }
}

#[test]
fn decimal_adjustment() {
    let _guard = alone();
    let mut v = machine();
    let contents = vec![0; DATA_BYTES];
    let mut state = random_state(&mut Random(7));
    let (arith, two) = (rflags::ARITH, rflags::CF | rflags::AF);
    let three = rflags::SF | rflags::ZF | rflags::PF;
    for (code, defined) in [(0x27u8, two | three), (0x2f, two | three), (0x37, two), (0x3f, two), (0xd6, arith)] {
        for al in 0..256u32 {
            for flags in [0, rflags::CF, rflags::AF, two] {
                state.gpr[0] = 0xabcd_0000 | (((al * 7) & 0xff) << 8) | al;
                state.flags = flags | rflags::IF | 2;
                compare(&mut v, &[code], &state, &contents, arith & !defined, &|| format!("{code:#x} of {al:#x}"));
            }
        }
    }
    for code in [0xd4u8, 0xd5] {
        for n in 0..512u32 {
            let base = if n < 256 { 10 } else { n as u8 | 1 };
            state.gpr[0] = 0x1234_0000 | ((n * 0x4d3) & 0xffff);
            compare(&mut v, &[code, base], &state, &contents, arith & !three, &|| format!("{code:#x} {base} {n:#x}"));
        }
    }
}

/// Code that is not straight, with ECX, EDX and EDI free: (what, bytes). EBX and ESI point to data.
const SNIPPETS: &[(&str, &[u8])] = &[
    ("mov edi,ebx; mov ecx,300; rep movsb", &[0x89, 0xdf, 0xb9, 0x2c, 1, 0, 0, 0xf3, 0xa4]),
    // Overlapping: the first element runs through all of it.
    ("lea edi,[esi+1]; mov ecx,5000; rep movsb", &[0x8d, 0x7e, 1, 0xb9, 0x88, 0x13, 0, 0, 0xf3, 0xa4]),
    ("lea edi,[esi+6]; mov ecx,100; rep movsd", &[0x8d, 0x7e, 6, 0xb9, 0x64, 0, 0, 0, 0xf3, 0xa5]),
    (
        "lea edi,[esi-3]; mov ecx,2000; std; rep movsb; cld",
        &[0x8d, 0x7e, 0xfd, 0xb9, 0xd0, 7, 0, 0, 0xfd, 0xf3, 0xa4, 0xfc],
    ),
    (
        "lea edi,[esi+5]; mov ecx,700; std; rep movsd; cld",
        &[0x8d, 0x7e, 5, 0xb9, 0xbc, 2, 0, 0, 0xfd, 0xf3, 0xa5, 0xfc],
    ),
    (
        "lea edi,[esi-2]; mov ecx,700; std; rep movsw; cld",
        &[0x8d, 0x7e, 0xfe, 0xb9, 0xbc, 2, 0, 0, 0xfd, 0x66, 0xf3, 0xa5, 0xfc],
    ),
    ("mov edi,esi; mov ecx,3000; rep stosd", &[0x89, 0xf7, 0xb9, 0xb8, 0xb, 0, 0, 0xf3, 0xab]),
    ("mov edi,esi; mov ecx,3000; std; rep stosb; cld", &[0x89, 0xf7, 0xb9, 0xb8, 0xb, 0, 0, 0xfd, 0xf3, 0xaa, 0xfc]),
    ("mov edi,ebx; xor ecx,ecx; rep movsd", &[0x89, 0xdf, 0x31, 0xc9, 0xf3, 0xa5]),
    ("mov edi,esi; mov ecx,9000; repne scasb", &[0x89, 0xf7, 0xb9, 0x28, 0x23, 0, 0, 0xf2, 0xae]),
    ("mov edi,esi; mov ecx,7; repe scasw", &[0x89, 0xf7, 0xb9, 7, 0, 0, 0, 0x66, 0xf3, 0xaf]),
    ("mov edi,ebx; mov ecx,50; repe cmpsb", &[0x89, 0xdf, 0xb9, 0x32, 0, 0, 0, 0xf3, 0xa6]),
    ("mov edi,ebx; mov ecx,50; repne cmpsd", &[0x89, 0xdf, 0xb9, 0x32, 0, 0, 0, 0xf2, 0xa7]),
    ("mov edi,esi; mov ecx,50; repe cmpsd", &[0x89, 0xf7, 0xb9, 0x32, 0, 0, 0, 0xf3, 0xa7]),
    (
        "mov edi,ebx; cmpsb; cmpsw; scasd; lodsb; lodsd; stosw; movsb",
        &[0x89, 0xdf, 0xa6, 0x66, 0xa7, 0xaf, 0xac, 0xad, 0x66, 0xab, 0xa4],
    ),
    ("mov ecx,5; rep lodsb", &[0xb9, 5, 0, 0, 0, 0xf3, 0xac]),
    // CX counts, ECX's upper half stays.
    (
        "mov edi,ebx; mov ecx,0x10003; a16 loop $+2; mov cx,3",
        &[0x89, 0xdf, 0xb9, 3, 0, 1, 0, 0x67, 0xe2, 0, 0x66, 0xb9, 3, 0],
    ),
    ("mov ecx,9; l: add eax,ecx; loop l", &[0xb9, 9, 0, 0, 0, 1, 0xc8, 0xe2, 0xfc]),
    ("mov ecx,9; l: sub eax,eax; loope l", &[0xb9, 9, 0, 0, 0, 0x29, 0xc0, 0xe1, 0xfc]),
    ("mov ecx,9; l: inc edx; loopne l", &[0xb9, 9, 0, 0, 0, 0x42, 0xe0, 0xfd]),
    ("jecxz +1; inc eax; mov ecx,0; jecxz +1; inc edx", &[0xe3, 1, 0x40, 0xb9, 0, 0, 0, 0, 0xe3, 1, 0x42]),
    ("call +1; inc eax; inc edx; pop ecx", &[0xe8, 1, 0, 0, 0, 0x40, 0x42, 0x59]),
    ("call f; jmp end; f: push eax; ret 0; (pop)", &[0xe8, 2, 0, 0, 0, 0xeb, 5, 0x31, 0xc0, 0xc2, 0, 0]),
    ("push 1; push 2; call f; jmp end; f: ret 8", &[0x6a, 1, 0x6a, 2, 0xe8, 2, 0, 0, 0, 0xeb, 3, 0xc2, 8, 0]),
    (
        "call $+5; pop ecx; add ecx,8; call ecx; jmp +1; (nop) ret",
        &[0xe8, 0, 0, 0, 0, 0x59, 0x83, 0xc1, 8, 0xff, 0xd1, 0xeb, 1, 0xc3],
    ),
    ("push cs; call $+5; add dword [esp],7; retf", &[0x0e, 0xe8, 0, 0, 0, 0, 0x83, 4, 0x24, 5, 0xcb]),
    ("pushfd; push cs; call $+5; add dword [esp],5; iretd", &[0x9c, 0x0e, 0xe8, 0, 0, 0, 0, 0x83, 4, 0x24, 5, 0xcf]),
    ("enter 16,0; leave", &[0xc8, 16, 0, 0, 0xc9]),
    ("mov ebp,esp; enter 32,3; mov eax,[ebp-4]; leave", &[0x89, 0xe5, 0xc8, 32, 0, 3, 0x8b, 0x45, 0xfc, 0xc9]),
    ("enter 8,1; mov edx,esp; leave", &[0xc8, 8, 0, 1, 0x89, 0xe2, 0xc9]),
    ("pushad; popad", &[0x60, 0x61]),
    ("pushaw; popaw", &[0x66, 0x60, 0x66, 0x61]),
    ("push 0x200ed7; popfd; pushfd; pop edx; cld", &[0x68, 0xd7, 0xe, 0x20, 0, 0x9d, 0x9c, 0x5a, 0xfc]),
    ("push 0x2082d7 (with reserved bits); popfd; pushfd; pop edx", &[0x68, 0xd7, 0x82, 0x20, 0, 0x9d, 0x9c, 0x5a]),
    ("pushfw; popfw; lahf; sahf", &[0x66, 0x9c, 0x66, 0x9d, 0x9f, 0x9e]),
    ("pop dword [esp+8]", &[0x8f, 0x44, 0x24, 8]),
    ("push dword [esp+8]; push esp; pop eax", &[0xff, 0x74, 0x24, 8, 0x54, 0x58]),
    ("push ds; pop es; push -3; push word 0x1234", &[0x1e, 7, 0x6a, 0xfd, 0x66, 0x68, 0x34, 0x12]),
    ("xlat (ebx)", &[0xd7]),
    (
        "mov edx,-77; bts [ebx],edx; btr [ebx+40],edx; btc [ebx],edx; bt [ebx],edx",
        &[0xba, 0xb3, 0xff, 0xff, 0xff, 0x0f, 0xab, 0x13, 0x0f, 0xb3, 0x53, 40, 0x0f, 0xbb, 0x13, 0x0f, 0xa3, 0x13],
    ),
    ("mov dx,-77; o16 lock bts [ebx],dx", &[0x66, 0xba, 0xb3, 0xff, 0xf0, 0x66, 0x0f, 0xab, 0x13]),
    (
        "mov eax,[ebx]; mov edx,[ebx+4]; lock cmpxchg8b [ebx]; cmpxchg8b [esi]",
        &[0x8b, 3, 0x8b, 0x53, 4, 0xf0, 0x0f, 0xc7, 0x0b, 0x0f, 0xc7, 0x0e],
    ),
    ("bound eax,[ebx] within", &[0xc7, 3, 0, 0, 0, 0x80, 0xc7, 0x43, 4, 0xff, 0xff, 0xff, 0x7f, 0x62, 3]),
    ("arpl [ebx],cx; arpl dx,cx", &[0x63, 0x0b, 0x63, 0xca]),
    (
        "lea ecx,[esi+edx*4+7]; lea cx,[bx+si+3]; lea edx,[eax*8]",
        &[0x8d, 0x4c, 0x96, 7, 0x67, 0x66, 0x8d, 0x48, 3, 0x8d, 0x14, 0xc5, 0, 0, 0, 0],
    ),
    (
        "mov eax,[DATA+8]; mov [DATA+12],al; mov ax,[DATA+1]",
        &[0xa1, 8, 0, 1, 0x10, 0xa2, 12, 0, 1, 0x10, 0x66, 0xa1, 1, 0, 1, 0x10],
    ),
    ("mov eax,99; cdq; mov ecx,7; idiv ecx", &[0xb8, 99, 0, 0, 0, 0x99, 0xb9, 7, 0, 0, 0, 0xf7, 0xf9]),
    ("xchg [ebx],eax; lock xadd [esi],eax; lock inc byte [esi]", &[0x87, 3, 0xf0, 0x0f, 0xc1, 6, 0xf0, 0xfe, 6]),
    ("jmp short over an invalid byte", &[0xeb, 1, 0x0f]),
    ("a16 lea eax,[bx+0x11]", &[0x67, 0x8d, 0x47, 0x11]),
    (
        "multi-byte nops, rdsspd, reserved nops",
        &[0x0f, 0x1f, 0x44, 0, 0, 0xf3, 0x0f, 0x1e, 0xc8, 0x0f, 0x1c, 0xc0, 0x0f, 0x1a, 0xc1],
    ),
];

#[test]
fn snippets_of_32_bit_code_run_as_on_the_host() {
    let _guard = alone();
    let mut v = machine();
    for (what, code) in SNIPPETS {
        for seed in 1..8 {
            let mut r = Random(seed);
            let (before, mut contents) = (random_state(&mut r), random_contents(&mut r));
            if seed % 2 == 0 {
                // Comparisons that go on for a while.
                contents[0x1000..0x6000].fill(seed as u8);
            }
            let undefined = if what.contains("idiv") { rflags::ARITH } else { 0 };
            if what.contains("push cs") || what.contains("push ds") {
                run_only(&mut v, code, &before, &contents, what);
                continue;
            }
            compare(&mut v, code, &before, &contents, undefined, &|| format!("{what}, seed {seed}\n{}", listing(code)));
        }
    }
}

/// Far transfers push selectors, which differ from the host's: that they come to their end is the test.
fn run_only(v: &mut Vcpu, code: &[u8], before: &State, contents: &[u8], what: &str) {
    // GDT: code at 8, data at 16.
    write(BASE + 0x8000, &0u64.to_le_bytes());
    write(BASE + 0x8008, &0x00cf_9b00_0000_ffffu64.to_le_bytes());
    write(BASE + 0x8010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    (v.cpu.gdtr.base, v.cpu.gdtr.limit) = (BASE + 0x8000, 0x17);
    write(CODE, &[code, &[0xf4]].concat());
    data().copy_from_slice(contents);
    for n in 0..8 {
        v.cpu.gpr[n] = before.gpr[n] as u64;
    }
    v.cpu.set_rflags(before.flags);
    v.cpu.rip = CODE;
    assert_eq!(run::run(v), Exit::Hlt, "{what}");
    assert_eq!(v.cpu.rip, CODE + code.len() as u64 + 1, "{what}");
    assert_eq!(v.cpu.segs[CS].sel, 8);
}
