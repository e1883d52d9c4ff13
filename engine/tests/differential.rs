//! Generated code, run by the engine and by the host CPU itself: same registers, flags, memory, and the same trap
//! where it ends in one.
//!
//! Guest and host see code and data at the same addresses: the guest's page tables, its memory slot and the test's
//! own mapping are the identity on one region, and pages that the guest lacks the host lacks, too. `KVMKIT_CASES` and
//! `KVMKIT_SEED` set how many cases of each kind there are and where to start; `bench/soak.py` runs a million.

#![cfg(target_arch = "x86_64")]

mod common;
use _engine::classify::{Class, Features, classify};
use _engine::cpu::{CS, Cpu, Exit, RSP, SS, Seg, Vcpu, cr0, cr4, efer, rflags};
use _engine::mem::{Slot, Slots};
use _engine::vm::Vm;
use _engine::{far, mmu, run, xstate};
use common::native::{self, Random, Region, Row, State, Trap, alone, number};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};
use std::collections::BTreeMap;
use std::sync::Arc;

const REGION: Region = Region { base: native::BASE, bytes: 16 << 20 };
const TABLES: u64 = REGION.base;
const GDT: u64 = REGION.base + 0x1_0000;
const IDT: u64 = REGION.base + 0x1_1000;
const TSS: u64 = REGION.base + 0x1_2000;
const KERNEL_STACK: u64 = REGION.base + 0x1_4000;
/// HLT at `HANDLERS + 16 * vector`.
const HANDLERS: u64 = REGION.base + 0x1_5000;
const CODE: u64 = REGION.base + 0x10_0000;
const DATA: u64 = REGION.base + 0x20_0000;
const DATA_BYTES: usize = 0x1_0000;
const STACK: u64 = REGION.base + 0x30_8000;
const STACK_BYTES: usize = 0x8000;
/// The guest's code ends with INT of this.
const END: u8 = 0x99;

/// Pages of the data that are absent, and read-only, in cases with faults; the read-only one has an absent one behind it.
const ABSENT: u64 = DATA + 0x2000;
const READ_ONLY: u64 = DATA + 0x5000;
const ABSENT_BEHIND: u64 = READ_ONLY + 0x1000;
const ALL_ABSENT: [u64; 2] = [ABSENT, ABSENT_BEHIND];

/// Registers that point to data, and small ones that are added to them: never written.
const POINTERS: [Register; 3] = [Register::RBX, Register::R9, Register::R13];
const INDEXES: [Register; 2] = [Register::R10, Register::RSI];

fn page_entry(la: u64) -> u64 {
    TABLES + 0x3000 + ((la - REGION.base) >> 12) * 8
}

/// User mode in 64-bit code, with the selectors that Linux gives its processes.
fn machine() -> Vcpu {
    REGION.map();
    let put = |at: u64, value: u64| REGION.write(at, &value.to_le_bytes());
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000 + (REGION.base >> 30) * 8, (TABLES + 0x2000) | 7);
    for n in 0..REGION.bytes >> 21 {
        put(TABLES + 0x2000 + n * 8, (TABLES + 0x3000 + n * 0x1000) | 7);
    }
    for n in 0..REGION.bytes >> 12 {
        put(TABLES + 0x3000 + n * 8, (REGION.base + (n << 12)) | 0x67);
    }
    put(GDT + 0x10, 0x00af_9b00_0000_ffff);
    put(GDT + 0x18, 0x00cf_9300_0000_ffff);
    put(GDT + 0x28, 0x00cf_f300_0000_ffff);
    put(GDT + 0x30, 0x00af_fb00_0000_ffff);
    for vector in 0..256u64 {
        let at = HANDLERS + 16 * vector;
        put(IDT + 16 * vector, at & 0xffff | 0x10 << 16 | 0xee00 << 32 | (at >> 16 & 0xffff) << 48);
        put(IDT + 16 * vector + 8, at >> 32);
        REGION.write(at, &[0xf4]);
    }
    put(TSS + 4, KERNEL_STACK);
    let vm = Arc::new(Vm::new(1_000_000).unwrap());
    let slot = Slot { id: 0, flags: 0, gpa: REGION.base, size: REGION.bytes, hva: REGION.base, first_page: 0 };
    vm.set_slots(Slots::new(vec![slot]));
    let mut v = Vcpu::new(vm, 0).unwrap();
    let c: &mut Cpu = &mut v.cpu;
    c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP | cr0::AM | cr0::MP;
    c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    c.xcr0 = xstate::supported();
    c.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    c.cr3 = TABLES;
    (c.gdtr.base, c.gdtr.limit) = (GDT, 0x37);
    (c.idtr.base, c.idtr.limit) = (IDT, 0xfff);
    c.tr = Seg { base: TSS, limit: 0x67, sel: 0x40, attr: 0x8b, unusable: false };
    v
}

fn enter_user(c: &mut Cpu) {
    c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 0x33, attr: 0xa0fb, unusable: false };
    c.segs[SS] = Seg { base: 0, limit: u32::MAX, sel: 0x2b, attr: 0xc0f3, unusable: false };
    for s in [0, 3] {
        c.segs[s] = Seg { unusable: true, ..Seg::default() };
    }
    c.cpl = 3;
}

/// What became of the guest's user code: where it stopped and why. The vCPU is in the handler.
fn stopped(v: &Vcpu) -> (Trap, [u64; 16], u64) {
    let vector = ((v.cpu.rip - 1 - HANDLERS) / 16) as u8;
    let has_error = matches!(vector, 8 | 10..=14 | 17);
    let frame = REGION.slice(v.cpu.gpr[RSP], 48);
    let word = |n: usize| u64::from_le_bytes(frame[n * 8..n * 8 + 8].try_into().unwrap());
    let at = has_error as usize;
    let error = if has_error { word(0) as u32 } else { 0 };
    let mut gpr = v.cpu.gpr;
    gpr[RSP] = word(at + 3);
    let address = if vector == 14 { v.cpu.cr2 } else { 0 };
    (Trap { vector, error, address, rip: word(at) }, gpr, word(at + 2))
}

/// Instructions by code, some of each: what a case is made of.
struct Pool {
    codes: Vec<Vec<Vec<u8>>>,
}

impl Pool {
    fn new(seed: u64, attempts: usize) -> Self {
        let mut r = Random(seed);
        let mut factory = InstructionInfoFactory::new();
        let mut found: BTreeMap<Code, Vec<Vec<u8>>> = BTreeMap::new();
        for _ in 0..attempts {
            let b = random_bytes(&mut r);
            let i = Decoder::with_ip(64, &b, CODE, DecoderOptions::NONE).decode();
            if acceptable(&i, &mut factory) {
                let list = found.entry(i.code()).or_default();
                if list.len() < 24 {
                    list.push(b[..i.len()].to_vec());
                }
            }
        }
        Self { codes: found.into_values().collect() }
    }
    fn instruction(&self, r: &mut Random) -> &[u8] {
        let list = &self.codes[r.below(self.codes.len() as u64) as usize];
        &list[r.below(list.len() as u64) as usize]
    }
}

/// Prefixes, an opcode of some map, and a ModRM byte that means a register or something near a pointer.
fn random_bytes(r: &mut Random) -> Vec<u8> {
    let mut b = Vec::with_capacity(24);
    let three: u8 = r.next() as u8;
    match r.below(8) {
        0..4 => {
            match r.below(8) {
                0 | 1 => b.push(0x66),
                2 => b.push(0xf2),
                3 => b.push(0xf3),
                4 => b.push(0xf0),
                _ => {}
            }
            if r.below(2) == 0 {
                b.push(0x40 | r.below(16) as u8);
            }
            match r.below(5) {
                0 | 1 => {}
                2 | 3 => b.push(0x0f),
                _ => b.extend([0x0f, r.pick(&[0x38, 0x3a])]),
            }
        }
        4 | 5 => b.extend([0xc4, three & 0xe0 | r.pick(&[1, 2, 3]), r.next() as u8]),
        _ => {
            let map = r.pick(&[1, 1, 2, 2, 3, 5, 6]);
            b.extend([0x62, three & 0xf0 | map, r.next() as u8 | 4, r.next() as u8]);
        }
    }
    b.push(r.next() as u8);
    let reg = (r.next() as u8 & 7) << 3;
    match r.below(4) {
        0 => b.push(0xc0 | reg | r.next() as u8 & 7),
        1 => b.extend([r.pick(&[0x40, 0x80]) | reg | 4, r.next() as u8]),
        _ => b.push(r.pick(&[0x40, 0x80]) | reg | r.pick(&[1, 3, 5])),
    }
    // A displacement of 8 or 32 bits, small; whatever follows is an immediate.
    let displacement = r.below(0x1c00) as i32 - 0xe00;
    b.extend(displacement.to_le_bytes());
    while b.len() < 20 {
        b.push(r.next() as u8);
    }
    b
}

fn acceptable(i: &Instruction, factory: &mut InstructionInfoFactory) -> bool {
    use iced_x86::Mnemonic::*;
    let class = if i.is_invalid() { Class::InterpretEnd } else { classify(i, Features::ALL) };
    // What differs between two runs by nature, moves the stack anywhere, or shows addresses of the last x87 operand.
    if !matches!(class, Class::Plain | Class::Lea | Class::Push | Class::Pop)
        || matches!(i.mnemonic(), Rdrand | Rdseed | Maskmovdqu | Maskmovq | Vmaskmovdqu | Movdiri)
        || i.is_vsib()
        || i.is_privileged()
        || (i.mnemonic() == Pop && i.op0_register() == Register::RSP)
    {
        return false;
    }
    let info = factory.info(i);
    if info.used_registers().iter().any(|u| {
        let full = u.register().full_register();
        !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
            && (POINTERS.contains(&full)
                || INDEXES.contains(&full)
                || full == Register::RSP && !matches!(i.mnemonic(), Push | Pop))
    }) {
        return false;
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) && i.mnemonic() != Lea {
        let size = i.memory_size().size() as i64;
        return POINTERS.contains(&i.memory_base())
            && (i.memory_index() == Register::None || INDEXES.contains(&i.memory_index()))
            && (-0xe00..0xe00 - size).contains(&(i.memory_displacement64() as i64))
            && !i.has_segment_prefix();
    }
    true
}

fn random_vectors(r: &mut Random, xsave: &mut [u8; native::XSAVE_BYTES]) {
    xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    // Rounding, denormals as zero, flush to zero; exceptions masked.
    let mxcsr = 0x1f80 | r.next() as u32 & 0xe040;
    xsave[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    let mut header = 1 | xstate::SSE;
    xsave[160..416].iter_mut().for_each(|x| *x = r.next() as u8);
    for c in xstate::components() {
        if r.below(4) != 0 {
            header |= c.bit;
            for word in xsave[c.offset..c.offset + c.size].chunks_exact_mut(8) {
                let value = match (c.bit == xstate::OPMASK, r.below(4)) {
                    (true, 0) => 0,
                    (true, 1) => u64::MAX,
                    (true, 2) => r.next() & 0xff,
                    _ => r.next(),
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    xsave[512..520].copy_from_slice(&header.to_le_bytes());
}

/// What of the XSAVE area is compared: without the header and the addresses of the last x87 instruction and operand,
/// and with components that are not in use as they read.
fn comparable(xsave: &[u8]) -> Vec<u8> {
    let in_use = u64::from_le_bytes(xsave[512..520].try_into().unwrap());
    let mut b = Vec::new();
    let mut part = |bit: u64, range: std::ops::Range<usize>, initial: &[u8]| {
        let len = range.len();
        if in_use & bit != 0 { b.extend(&xsave[range]) } else { b.extend(initial.iter().cycle().take(len)) }
    };
    part(1, 0..2, &[0x7f, 3]);
    part(1, 2..5, &[0]);
    part(1, 32..160, &[0]);
    part(xstate::SSE, 160..416, &[0]);
    for c in xstate::components() {
        part(c.bit, c.offset..c.offset + c.size, &[0]);
    }
    b.extend(&xsave[24..28]);
    b
}

struct Case {
    code: Vec<u8>,
    state: State,
    data: Vec<u8>,
    stack: Vec<u8>,
    /// `ALL_ABSENT` and `READ_ONLY` are.
    faults: bool,
}

impl Case {
    fn new(r: &mut Random, code: Vec<u8>, faults: bool) -> Self {
        let mut state = State::new();
        for g in state.gpr.iter_mut() {
            *g = if r.below(3) == 0 { r.below(256) } else { r.next() };
        }
        state.gpr[4] = STACK;
        state.gpr[3] = DATA + 0x3000 + 64 * r.below(8);
        state.gpr[9] = DATA + 0x6000 + r.below(64);
        state.gpr[13] = DATA + 0x8ff0 + r.below(0x20);
        state.gpr[6] = r.below(64);
        state.gpr[10] = 8 * r.below(8);
        if faults {
            // Displacements lead to both sides of the pages that fault.
            state.gpr[3] = ABSENT + r.pick(&[0, 0x1000]) + r.below(0x80) - 0x40;
            state.gpr[9] = READ_ONLY + r.pick(&[0, 0x1000]) + r.below(0x80) - 0x40;
        }
        state.flags = r.next() & rflags::ARITH | rflags::IF | 2;
        random_vectors(r, &mut state.xsave);
        let mut random = |len: usize| (0..len / 8).flat_map(|_| r.next().to_le_bytes()).collect::<Vec<u8>>();
        let (data, stack) = (random(DATA_BYTES), random(STACK_BYTES));
        Self { code, state, data, stack, faults }
    }

    fn load(&self, tail: &[u8]) {
        REGION.write(DATA, &self.data);
        REGION.write(STACK - STACK_BYTES as u64 / 2, &self.stack);
        REGION.write(CODE, &[&self.code[..], tail].concat());
    }

    fn end(&self) -> u64 {
        CODE + self.code.len() as u64
    }

    fn native<T>(&self, run: impl FnOnce(&State) -> T) -> T {
        // jmp [rip + to an aligned pointer]
        let padding = (self.end() + 6).wrapping_neg() as u8 & 7;
        let mut tail = vec![0xff, 0x25, padding, 0, 0, 0];
        tail.extend(vec![0; padding as usize]);
        tail.extend((native::exit as *const () as u64).to_le_bytes());
        self.load(&tail);
        if self.faults {
            for page in ALL_ABSENT {
                REGION.protect(page, 4096, libc::PROT_NONE);
            }
            REGION.protect(READ_ONLY, 4096, libc::PROT_READ);
        }
        let result = run(&self.state);
        if self.faults {
            for page in [ABSENT, READ_ONLY, ABSENT_BEHIND] {
                REGION.protect(page, 4096, libc::PROT_READ | libc::PROT_WRITE);
            }
        }
        result
    }

    /// Prepare the vCPU: rip at the code.
    fn start(&self, v: &mut Vcpu) {
        self.load(&[0xcd, END]);
        for page in ALL_ABSENT {
            REGION.write(page_entry(page), &(page | if self.faults { 0x66 } else { 0x67 }).to_le_bytes());
        }
        REGION.write(page_entry(READ_ONLY), &(READ_ONLY | if self.faults { 0x65 } else { 0x67 }).to_le_bytes());
        mmu::flush_all(v);
        let vm = v.vm.clone();
        vm.note_write(None, CODE, self.code.len() as u64 + 16);
        enter_user(&mut v.cpu);
        v.cpu.gpr = self.state.gpr;
        v.cpu.set_rflags(self.state.flags);
        v.cpu.fpu.0 = self.state.xsave;
        v.cpu.rip = CODE;
    }

    fn listing(&self) -> String {
        let mut text = String::new();
        for i in Decoder::with_ip(64, &self.code, CODE, DecoderOptions::NONE).iter() {
            let at = (i.ip() - CODE) as usize;
            let hex: String = self.code[at..at + i.len()].iter().map(|x| format!("{x:02x}")).collect();
            text += &format!("  {:#x} {hex:30} {:?}\n", i.ip(), i.code());
        }
        text
    }

    /// Run both; what differs.
    fn compare(&self, v: &mut Vcpu) -> Result<(), String> {
        let (after, trap) = self.native(|state| native::run(state, CODE));
        let (data, stack) = self.memory();
        self.start(v);
        let exit = run::run(v);
        if exit != Exit::Hlt || v.cpu.cpl != 0 {
            return Err(format!("{exit:?} at {:#x}\n{}", v.cpu.rip, self.listing()));
        }
        let (seen, gpr, flags) = stopped(v);
        let mut wrong = Vec::new();
        let expected = trap.unwrap_or(Trap { vector: END, error: 0, address: 0, rip: self.end() + 2 });
        if seen != expected {
            wrong.push(format!("stopped by {seen:x?}, host {expected:x?}"));
        }
        for (n, (ours, theirs)) in gpr.into_iter().zip(after.gpr).enumerate() {
            if ours != theirs {
                let before = self.state.gpr[n];
                wrong.push(format!("register {n}: {ours:#x}, host {theirs:#x}, before {before:#x}"));
            }
        }
        let compared = rflags::ARITH | rflags::DF;
        // Flags that a later instruction of the block overwrites are not kept where an exception comes between.
        let interpreted = v.interpret_only || self.state.flags & rflags::AC != 0;
        if (trap.is_none() || interpreted) && (flags ^ after.flags) & compared != 0 {
            wrong.push(format!("flags {flags:#x}, host {:#x}, before {:#x}", after.flags, self.state.flags));
        }
        let (ours, theirs) = (comparable(&v.cpu.fpu.0), comparable(&after.xsave));
        if let Some(n) = (0..ours.len()).find(|&n| ours[n] != theirs[n]) {
            let (a, b) = (&ours[n..ours.len().min(n + 16)], &theirs[n..ours.len().min(n + 16)]);
            wrong.push(format!("x87 or vector state from byte {n}: {a:x?}, host {b:x?}"));
        }
        if (data, stack) != self.memory() {
            wrong.push("memory".into());
        }
        if wrong.is_empty() { Ok(()) } else { Err(format!("{}\n{}", wrong.join("\n"), self.listing())) }
    }

    fn memory(&self) -> (Vec<u8>, Vec<u8>) {
        let stack = REGION.slice(STACK - STACK_BYTES as u64 / 2, STACK_BYTES);
        (REGION.slice(DATA, DATA_BYTES).to_vec(), stack.to_vec())
    }

    /// Run both step by step; what differs.
    fn compare_steps(&self, v: &mut Vcpu) -> Result<(), String> {
        let (theirs, _, trap) = self.native(|state| native::steps(state, CODE, self.end()));
        self.start(v);
        v.cpu.sysflags |= rflags::TF;
        let mut ours: Vec<Row> = Vec::new();
        let last = loop {
            let exit = run::run(v);
            if exit != Exit::Hlt {
                return Err(format!("{exit:?} at {:#x}\n{}", v.cpu.rip, self.listing()));
            }
            let (seen, gpr, flags) = stopped(v);
            if seen.vector != 1 {
                break Some(seen);
            }
            if seen.rip == self.end() {
                break None;
            }
            ours.push((gpr, flags & !rflags::TF, seen.rip));
            far::iret(v, 8).map_err(|stop| format!("{stop:?}"))?;
        };
        let compared = rflags::ARITH | rflags::DF | rflags::RF;
        for n in 0..ours.len().max(theirs.len()) {
            let differs = match (ours.get(n), theirs.get(n)) {
                (Some(a), Some(b)) => a.0 != b.0 || a.2 != b.2 || (a.1 ^ b.1) & compared != 0,
                _ => true,
            };
            if differs {
                let (a, b) = (ours.get(n), theirs.get(n));
                return Err(format!("step {n}: {a:x?}\nhost   {b:x?}\n{}", self.listing()));
            }
        }
        if last != trap { Err(format!("{last:x?}, host {trap:x?}\n{}", self.listing())) } else { Ok(()) }
    }
}

/// Straight code.
fn straight(pool: &Pool, r: &mut Random, length: u64) -> Vec<u8> {
    (0..length).flat_map(|_| pool.instruction(r).to_vec()).collect()
}

/// Code with jumps, calls, loops, string instructions and flags that come from the stack.
fn winding(pool: &Pool, r: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..1 + r.below(6) {
        let length = 1 + r.below(2);
        let inner = straight(pool, r, length);
        let skip = inner.len() as u8;
        match r.below(9) {
            // A jump over something, or not.
            0 | 1 => {
                code.extend([0x70 | r.next() as u8 & 15, skip]);
                code.extend(inner);
            }
            // mov ecx, n; l: inc edx; loop l
            2 => {
                code.extend([0xb9, 1 + r.below(4) as u8, 0, 0, 0, 0xff, 0xc2, r.pick(&[0xe0, 0xe1, 0xe2]), 0xfc]);
            }
            // call f; jmp over; f: ret
            3 => code.extend([0xe8, 2, 0, 0, 0, 0xeb, 1, 0xc3]),
            // mov ecx, n; lea rdi, [r9+..]; push rsi; lea rsi, [rbx+..]; (std); rep ..; cld; pop rsi
            4 | 5 => {
                code.extend([0xb9, r.below(6) as u8, 0, 0, 0, 0x49, 0x8d, 0x79, r.next() as u8]);
                code.extend([0x56, 0x48, 0x8d, 0x73, r.next() as u8, r.pick(&[0xfc, 0xfd])]);
                code.push(r.pick(&[0xf2, 0xf3]));
                if r.below(2) == 0 {
                    code.push(0x48);
                }
                code.extend([r.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]), 0xfc, 0x5e]);
            }
            // pushfq; popfq
            6 => code.extend([0x9c, 0x9d]),
            // mov eax, ss; mov ss, eax: no trap behind it
            7 => code.extend([0x8c, 0xd0, 0x8e, 0xd0]),
            _ => code.extend(inner),
        }
    }
    // The last one has a trap.
    code.push(0x90);
    code
}

/// Code that changes itself: a loop whose ADD has another immediate each time, and that runs over what it stores.
fn self_modifying(pool: &Pool, r: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    // mov ebp, n
    code.extend([0xbd, 2 + r.below(3) as u8, 0, 0, 0]);
    let top = code.len();
    let before = r.below(2) == 0;
    let immediate_at = |add: usize| add + 2;
    // inc byte [rip + to the immediate]
    let store = |code: &mut Vec<u8>, target: usize| {
        let next = code.len() + 6;
        code.extend([0xfe, 0x05]);
        code.extend((target as i32 - next as i32).to_le_bytes());
    };
    let filler: Vec<u8> = (0..r.below(4)).flat_map(|_| harmless(pool, r)).collect();
    if before {
        let add = code.len();
        code.extend([0x83, 0xc0, r.below(100) as u8]);
        code.extend(&filler);
        store(&mut code, immediate_at(add));
    } else {
        let add = code.len() + 6 + filler.len();
        store(&mut code, immediate_at(add));
        code.extend(&filler);
        code.extend([0x83, 0xc0, r.below(100) as u8]);
    }
    // dec ebp; jnz top
    code.extend([0xff, 0xcd, 0x0f, 0x85]);
    let next = code.len() + 4;
    code.extend((top as i32 - next as i32).to_le_bytes());
    code
}

/// An instruction without a memory operand that leaves RBP alone and doesn't trap.
fn harmless(pool: &Pool, r: &mut Random) -> Vec<u8> {
    let mut factory = InstructionInfoFactory::new();
    loop {
        let b = pool.instruction(r);
        let i = Decoder::with_ip(64, b, CODE, DecoderOptions::NONE).decode();
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let uses = factory.info(&i).used_registers().iter().any(|u| u.register().full_register() == Register::RBP);
        if !memory && !uses && !matches!(i.mnemonic(), iced_x86::Mnemonic::Div | iced_x86::Mnemonic::Idiv) {
            return b.to_vec();
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Straight,
    Faults,
    SelfModifying,
    Steps,
    /// With RFLAGS.AC.
    Alignment,
}

/// Case `seed` of `kind`: what differs.
fn run_case(v: &mut Vcpu, pool: &Pool, kind: Kind, seed: u64) -> Result<(), String> {
    let mut r = Random(seed);
    let length = 1 + seed % 24;
    match kind {
        Kind::Straight => Case::new(&mut r, straight(pool, &mut Random(!seed), length), false).compare(v),
        Kind::Faults => Case::new(&mut r, straight(pool, &mut Random(!seed), length), true).compare(v),
        Kind::SelfModifying => Case::new(&mut r, self_modifying(pool, &mut Random(!seed)), false).compare(v),
        Kind::Alignment => {
            let mut case = Case::new(&mut r, straight(pool, &mut Random(!seed), length), seed % 2 == 0);
            case.state.flags |= rflags::AC;
            case.compare(v)
        }
        Kind::Steps => Case::new(&mut r, winding(pool, &mut Random(!seed)), seed % 3 == 0).compare_steps(v),
    }
    .map_err(|e| format!("{kind:?} seed {seed}: {e}"))
}

const ATTEMPTS: usize = 1_500_000;
/// Cases of one pool in the soak.
const POOL_CASES: u64 = 20_000;

fn cases(kind: Kind, interpret_only: bool, share: u64) {
    let _guard = alone();
    let mut v = machine();
    v.interpret_only = interpret_only;
    let first = number("KVMKIT_SEED", 1);
    let pool = Pool::new(first, ATTEMPTS);
    for seed in first..first + number("KVMKIT_CASES", 2000) / share {
        run_case(&mut v, &pool, kind, seed).unwrap_or_else(|e| panic!("pool {first}, {e}"));
    }
}

#[test]
fn code_runs_as_on_the_host() {
    cases(Kind::Straight, false, 1);
}

#[test]
fn code_is_interpreted_as_on_the_host() {
    cases(Kind::Straight, true, 1);
}

#[test]
fn code_faults_as_on_the_host() {
    cases(Kind::Faults, false, 1);
}

#[test]
fn interpreted_code_faults_as_on_the_host() {
    cases(Kind::Faults, true, 1);
}

#[test]
fn code_that_changes_itself_runs_as_on_the_host() {
    cases(Kind::SelfModifying, false, 4);
}

#[test]
fn single_steps_are_those_of_the_host() {
    cases(Kind::Steps, false, 2);
}

#[test]
fn alignment_is_checked_as_on_the_host() {
    cases(Kind::Alignment, false, 1);
}

/// The pool reaches most of what is copied, of every kind.
#[test]
fn the_pool_holds_most_instructions() {
    let pool = Pool::new(1, ATTEMPTS);
    println!("{} codes", pool.codes.len());
    assert!(pool.codes.len() > 2000, "{}", pool.codes.len());
}

/// Stores of an x87 register are two of the processor's, of which the first may be done when the second faults.
#[test]
fn a_wide_store_over_the_end_of_a_page_faults_as_on_the_host() {
    let _guard = alone();
    let mut v = machine();
    for (interpret, modrm) in [(false, 0x3b), (true, 0x3b), (false, 0x33), (true, 0x33)] {
        v.interpret_only = interpret;
        for (page, offset) in [ABSENT, READ_ONLY].into_iter().flat_map(|page| (1..12).map(move |n| (page, n))) {
            // fldpi; fstp/fbstp [rbx]
            let mut case =
                Case::new(&mut Random(offset), vec![0xd9, 0xeb, if modrm == 0x3b { 0xdb } else { 0xdf }, modrm], true);
            case.state.gpr[3] = page - offset;
            let done = case.compare(&mut v);
            assert!(done.is_ok(), "{offset} bytes before {page:#x}, interpreted: {interpret}: {}", done.unwrap_err());
        }
    }
}

/// An unmasked x87 exception comes with the next instruction; what was to be stored is not, and faults nowhere.
#[test]
fn a_store_that_is_invalid_touches_no_memory() {
    let _guard = alone();
    let mut v = machine();
    for interpret in [false, true] {
        v.interpret_only = interpret;
        // fnclex; fldcw [r9]; fst qword [rbx], of an empty register; then, waiting for the exception, fnop
        let ends = [ABSENT, DATA + 0x9000].into_iter().flat_map(|end| (0..9).map(move |n| (end, n)));
        for (end, offset, waits) in ends.flat_map(|(end, n)| [(end, n, false), (end, n, true)]) {
            let mut code = vec![0xdb, 0xe2, 0x41, 0xd9, 0x29, 0xdd, 0x13];
            code.extend(if waits { &[0xd9, 0xd0][..] } else { &[] });
            let mut case = Case::new(&mut Random(offset), code, true);
            case.state.gpr[3] = end - offset;
            case.state.gpr[9] = DATA;
            case.state.xsave[4] = 0;
            case.data[..2].copy_from_slice(&0x27e_u16.to_le_bytes());
            let done = case.compare(&mut v);
            assert!(
                done.is_ok(),
                "{offset} bytes before {end:#x}, waits: {waits}, interpreted: {interpret}: {}",
                done.unwrap_err()
            );
        }
    }
}

/// `bench/soak.py`: all kinds by turns, differences counted and shown.
#[test]
#[ignore = "takes as long as KVMKIT_CASES says"]
fn soak() {
    let _guard = alone();
    let mut v = machine();
    let (first, count) = (number("KVMKIT_SEED", 1), number("KVMKIT_CASES", 100_000));
    let mut differences = 0;
    let mut pool = Pool::new(first - first % POOL_CASES, ATTEMPTS);
    let kinds = [Kind::Straight, Kind::Faults, Kind::Straight, Kind::Faults];
    let kinds: Vec<Kind> = kinds.into_iter().chain([Kind::SelfModifying, Kind::Steps, Kind::Alignment]).collect();
    for seed in first..first + count {
        if seed % POOL_CASES == 0 {
            pool = Pool::new(seed, ATTEMPTS);
            println!("{} of {count} cases, {differences} differences", seed - first);
        }
        v.interpret_only = seed % 4 == 1;
        if let Err(e) = run_case(&mut v, &pool, kinds[(seed % kinds.len() as u64) as usize], seed) {
            differences += 1;
            println!("{e}");
        }
    }
    println!("{count} cases from seed {first}, {differences} differences");
    assert_eq!(differences, 0);
}
