//! The translator: one basic block of 64-bit guest code to host code.
//!
//! Most guest instructions are host instructions: they are copied, with registers renamed to their homes
//! and memory operands replaced by a host address that an inline TLB probe finds. What must not be copied
//! (`classify`) becomes a call into the interpreter.
//!
//! **Flags.** The guest's arithmetic flags live in the host's EFLAGS, but a probe destroys them. A backward
//! pass finds where flags are live. The emitter tracks two facts: the host's flags are the guest's
//! (`host_flags`), and `Cpu::flags_saved` holds them (`saved_flags`). Before a probe, live flags are saved
//! once; they come back only where an instruction needs them. Flags that a later instruction of the block
//! overwrites unread are not kept: an exception frame pushed in between shows arbitrary ones.
//!
//! **Entries.** A block may be entered with flags in the host (`entry_a`, `entry_poll`) or saved
//! (`entry_b`). Every cycle of blocks passes an entry that polls `Cpu::poll`: backward jumps take
//! `entry_poll` or `entry_b`, indirect and cross-page jumps `entry_b` (or a poll entry).

use crate::classify::{Class, Features, classify, uses_avx512};
use crate::cpu::{Cpu, TLB_ENTRIES, TlbEntry, mmu_mode};
use crate::emit::{Alu, Asm, GSP, R64, S0, S1, cc, home, resized};
use crate::jumps::{JUMP_ENTRIES, JumpEntry, Jumps};
use crate::run::leave;
use crate::thunks::Thunk;
use crate::xstate;
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, InstructionInfoOptions, MemorySize,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};
use std::mem::offset_of;

/// The mode in which a block was translated: part of its key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Mode(pub u8);

impl Mode {
    const NO_X87: u8 = 4;
    const SSE: u8 = 8;
    const AVX: u8 = 16;
    const NO_RDTSC: u8 = 32;
    const AVX512: u8 = 64;
    pub fn of(cpu: &Cpu) -> Self {
        use crate::cpu::{cr0, cr4};
        let mut m = cpu.mmu_mode() as u8;
        if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
            m |= Self::NO_X87;
        } else if cpu.cr4 & cr4::OSFXSR != 0 {
            m |= Self::SSE;
            if cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 6 == 6 {
                m |= Self::AVX;
                if cpu.xcr0 & xstate::AVX512 != 0 {
                    m |= Self::AVX512;
                }
            }
        }
        if cpu.cpl != 0 && cpu.cr4 & cr4::TSD != 0 {
            m |= Self::NO_RDTSC;
        }
        Self(m)
    }
    pub fn mmu(self) -> usize {
        (self.0 & 3) as usize
    }
    fn features(self) -> Features {
        let has = |bit| self.0 & bit != 0;
        Features { x87: !has(Self::NO_X87), sse: has(Self::SSE), avx: has(Self::AVX), avx512: has(Self::AVX512) }
    }
}

/// Most guest instructions in a block.
const MAX_INSTRUCTIONS: usize = 64;

const ALL_FLAGS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

const CPU: u8 = 4; // rsp
const POLL: i32 = offset_of!(Cpu, poll) as i32;
const IFLAG: i32 = offset_of!(Cpu, iflag) as i32;
const IRQ_WAITING: i32 = offset_of!(Cpu, irq_waiting) as i32;
const FLAGS: i32 = offset_of!(Cpu, flags_saved) as i32;
const TMP0: i32 = offset_of!(Cpu, tmp) as i32;
const TMP1: i32 = TMP0 + 8;
const RIP: i32 = offset_of!(Cpu, rip) as i32;
const LEAVE: i32 = offset_of!(Cpu, leave) as i32;
const LINKS: i32 = (offset_of!(Cpu, jumps) + offset_of!(Jumps, links)) as i32;
const TSC_AUX: i32 = (offset_of!(Cpu, msr) + offset_of!(crate::cpu::Msrs, tsc_aux)) as i32;
const AVX512: i32 = offset_of!(Cpu, avx512) as i32;
const OPERAND: i32 = offset_of!(Cpu, operand) as i32;

fn gpr(guest: usize) -> i32 {
    (offset_of!(Cpu, gpr) + guest * 8) as i32
}
fn segment_base(register: Register) -> i32 {
    (offset_of!(Cpu, segs) + register.number() * size_of::<crate::cpu::Seg>()) as i32
}
fn tlb(mode: usize) -> i32 {
    (offset_of!(Cpu, tlb) + mode * TLB_ENTRIES * size_of::<TlbEntry>()) as i32
}
fn jump_table(mode: usize) -> i32 {
    (offset_of!(Cpu, jumps) + offset_of!(Jumps, table) + mode * JUMP_ENTRIES * size_of::<JumpEntry>()) as i32
}

/// How a jump to another block hands over the flags, and whether it must poll.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Flags in the host.
    A,
    /// Flags in the host, polls.
    Poll,
    /// Flags saved, polls.
    B,
}

/// A jump from one block to another whose target is known.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub target: u64,
    pub entry: Entry,
    /// Same page: the displacement at this offset in the cache is patched, and points to `stub` when
    /// unresolved. Another page: `site` is 0 and the vCPU's link slot decides.
    pub site: u32,
    pub stub: u32,
}

/// What `translate` produced, offsets relative to the block's start in the cache.
#[derive(Default, Debug)]
pub struct Translated {
    pub guest_len: u16,
    pub entry_a: u32,
    pub entry_poll: u32,
    pub entry_b: u32,
    /// (host offset, guest offset, flags are saved) where each guest instruction begins.
    pub map: Vec<(u32, u16, bool)>,
    /// Links with their ids relative to the first free one of their kind.
    pub links: Vec<(u32, Link)>,
    /// What the block's calls into the interpreter point to; lives as long as the block's code.
    #[allow(clippy::vec_box)]
    pub decoded: Vec<Box<Decoded>>,
}

/// An instruction that a block leaves to the interpreter, decoded once.
#[derive(Debug)]
pub struct Decoded {
    pub instruction: Instruction,
    pub bytes: [u8; 15],
}

/// Supplies link ids: low ones enter with flags in the host, high ones with flags saved.
pub trait LinkIds {
    fn next(&mut self, saved: bool) -> u32;
}

struct Step {
    i: Instruction,
    class: Class,
    /// Flags read by this instruction, and those needed after it.
    live_in: u32,
    live_out: u32,
    /// Flags it always writes.
    writes: u32,
    reads: u32,
}

/// Where a stub jumps back, and what it does.
enum Stub {
    /// A TLB miss at `jump`: resolve, continue at `back`.
    Memory { jump: usize, back: usize, index_tag: i32, info: u32 },
    /// Save flags if need be, and resolve link `id`.
    Link { jump: usize, id: u32, save: bool },
    /// Poll: leave with rip at the block's start.
    Poll { jump: usize },
}

/// A guest register in a scratch register for one instruction.
#[derive(Clone, Copy, Default)]
struct Held {
    guest: usize,
    host: u8,
    loaded: bool,
    written: bool,
}

pub struct Translator {
    asm: Asm,
    encoder: Encoder,
    info: InstructionInfoFactory,
    steps: Vec<Step>,
    stubs: Vec<Stub>,
    out: Translated,
    host_flags: bool,
    saved_flags: bool,
    mode: Mode,
    rip: u64,
    /// Distance from the block's start back to the thunk table.
    to_table: i64,
    careful: bool,
    /// The block has noted that it uses AVX-512 state.
    noted_avx512: bool,
    /// Encoding of the instruction being emitted.
    bytes: [u8; 15],
}

fn flag_effects(i: &Instruction) -> (u32, u32) {
    let reads = i.rflags_read() & ALL_FLAGS;
    let mut writes = i.rflags_modified() & ALL_FLAGS;
    use Mnemonic::*;
    if matches!(i.mnemonic(), Div | Idiv) {
        // Listed as undefined; processors leave them alone.
        writes = 0;
    }
    if matches!(i.mnemonic(), Bt | Bts | Btr | Btc) {
        // Listed as undefined but for CF; processors leave them alone.
        writes &= RflagsBits::CF;
    }
    if matches!(i.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd) {
        // A count of zero leaves the flags alone.
        let last = i.op_count() - 1;
        let wide = i.op0_register().size() == 8 || i.memory_size().size() == 8;
        let zero = i.op_kind(last) == OpKind::Immediate8 && i.immediate8() & if wide { 63 } else { 31 } == 0;
        if i.op_kind(last) == OpKind::Register || zero {
            writes = 0;
        }
        if matches!(i.mnemonic(), Rol | Ror | Rcl | Rcr)
            && !(i.op_kind(last) == OpKind::Immediate8 && i.immediate8() == 1)
        {
            // OF is undefined for counts above one: left alone.
            writes &= RflagsBits::CF;
        }
    }
    (reads, writes)
}

impl Default for Translator {
    fn default() -> Self {
        Self::new()
    }
}

impl Translator {
    pub fn new() -> Self {
        Self {
            asm: Asm::default(),
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            steps: Vec::new(),
            stubs: Vec::new(),
            out: Translated::default(),
            host_flags: false,
            saved_flags: false,
            mode: Mode::default(),
            rip: 0,
            to_table: 0,
            careful: false,
            noted_avx512: false,
            bytes: [0; 15],
        }
    }

    /// Translate the block at `rip`, whose bytes up to at most the end of its page are `code`.
    ///
    /// `place` is where the result will stand relative to the thunk table. Always yields a block: what
    /// cannot be decoded within the page is left to the interpreter.
    pub fn translate(
        &mut self,
        code: &[u8],
        rip: u64,
        mode: Mode,
        place: usize,
        ids: &mut dyn LinkIds,
    ) -> (&[u8], Translated) {
        (self.rip, self.mode, self.to_table, self.careful) = (rip, mode, place as i64, false);
        self.noted_avx512 = false;
        self.asm.buf.clear();
        self.stubs.clear();
        self.out = Translated::default();
        let len = self.decode(code);
        self.liveness();
        self.out.guest_len = len.max(1) as u16;
        self.prologue();
        let mut steps = std::mem::take(&mut self.steps);
        let mut ended = false;
        for step in &steps {
            self.mark(step.i.ip());
            let at = (step.i.ip() - rip) as usize;
            self.bytes = [0; 15];
            self.bytes[..step.i.len()].copy_from_slice(&code[at..at + step.i.len()]);
            let mark = self.out.map.len() - 1;
            self.step(step, ids);
            // If it traps, this is where the flags are.
            self.out.map[mark].2 = self.saved_flags;
            ended = step.class.ends_block();
        }
        if !ended {
            let next = rip + len as u64;
            if steps.is_empty() {
                // The first instruction reaches into the next page, or is no instruction.
                self.mark(rip);
                self.save_for_call();
                self.asm.mov_imm(S0, rip);
                self.call_thunk(Thunk::Step);
            } else {
                self.exit_to(next, ids);
            }
        }
        steps.clear();
        self.steps = steps;
        self.epilogue();
        (&self.asm.buf, std::mem::take(&mut self.out))
    }

    /// What an unresolved link slot leads to, with the link's id in S0.
    pub fn link_miss(&mut self, save: bool, place: usize) -> &[u8] {
        self.to_table = place as i64;
        self.asm.buf.clear();
        if save {
            (self.host_flags, self.saved_flags) = (true, false);
            self.save_flags();
        }
        self.call_thunk(Thunk::Link);
        &self.asm.buf
    }

    /// Translate one instruction whose memory operand is at the host address in `Cpu::operand`, and
    /// which leaves translated code when done: the careful path.
    ///
    /// `light`: an integer instruction, run by `thunks::enter_light`.
    pub fn translate_one(&mut self, i: &Instruction, place: usize, light: bool) -> &[u8] {
        (self.rip, self.to_table, self.careful) = (i.ip(), place as i64, true);
        self.noted_avx512 = false;
        self.asm.buf.clear();
        self.stubs.clear();
        self.out = Translated::default();
        (self.host_flags, self.saved_flags) = (false, true);
        self.restore_flags();
        let (reads, writes) = flag_effects(i);
        let step = Step { i: *i, class: Class::Plain, live_in: ALL_FLAGS, live_out: ALL_FLAGS, writes, reads };
        self.plain(&step);
        self.save_flags();
        self.asm.store32_imm(CPU, LEAVE, leave::CAREFUL_DONE);
        self.jump_thunk(if light { Thunk::LeaveLight } else { Thunk::Leave });
        &self.asm.buf
    }

    fn decode(&mut self, code: &[u8]) -> usize {
        let mut decoder = Decoder::with_ip(64, code, self.rip, DecoderOptions::NONE);
        let features = self.mode.features();
        self.steps.clear();
        let mut end = 0;
        let mut shadow = false;
        while decoder.can_decode() && self.steps.len() < MAX_INSTRUCTIONS {
            let i = decoder.decode();
            if i.is_invalid() {
                break;
            }
            let mut class = classify(&i, features);
            match class {
                Class::Rdtsc | Class::Rdtscp if self.mode.0 & Mode::NO_RDTSC != 0 => class = Class::InterpretEnd,
                Class::Cli | Class::Sti if self.mode.mmu() == mmu_mode::USER => class = Class::InterpretEnd,
                // POPF and LAHF aside, AC lives outside the flags that are kept in the host.
                _ => {}
            }
            let (reads, writes) = match class {
                Class::Plain | Class::Jcc | Class::Bit => flag_effects(&i),
                Class::Nop
                | Class::Lea
                | Class::Push
                | Class::Pop
                | Class::Leave
                | Class::Cli
                | Class::Sti
                | Class::Rdtsc
                | Class::Rdtscp
                | Class::Jrcxz
                | Class::Loop
                | Class::Jmp
                | Class::JmpIndirect
                | Class::Call
                | Class::CallIndirect
                | Class::Ret => (0, 0),
                _ => (ALL_FLAGS, 0),
            };
            end = decoder.position();
            self.steps.push(Step { i, class, live_in: 0, live_out: 0, writes, reads });
            if class.ends_block() || shadow {
                break;
            }
            // STI holds interrupts off for one more instruction: the block ends behind that one.
            shadow = class == Class::Sti;
        }
        if self.steps.last().is_some_and(|s| s.class == Class::Sti) {
            // Nothing of the shadow fits into this block; the interpreter knows how to carry it over.
            self.steps.last_mut().unwrap().class = Class::InterpretEnd;
        }
        end
    }

    fn liveness(&mut self) {
        let mut live = ALL_FLAGS;
        for s in self.steps.iter_mut().rev() {
            s.live_out = live;
            live = live & !s.writes | s.reads;
            s.live_in = live;
        }
    }

    fn mark(&mut self, ip: u64) {
        self.out.map.push((self.asm.pos() as u32, (ip - self.rip) as u16, self.saved_flags));
    }

    /// Emit the block's entries; afterwards the flags are where the body first wants them.
    fn prologue(&mut self) {
        let live = self.steps.first().map_or(ALL_FLAGS, |s| s.live_in);
        if live == 0 {
            (self.host_flags, self.saved_flags) = (false, false);
            self.poll();
            return;
        }
        // Wanted in the host if the body uses them there before anything destroys them.
        let in_host = self.steps.iter().find_map(|s| {
            let clobbers = match s.class {
                Class::Plain => (0..s.i.op_count()).any(|n| s.i.op_kind(n) == OpKind::Memory),
                Class::Nop | Class::Lea | Class::Cli | Class::Sti | Class::Jrcxz | Class::Loop => false,
                Class::Jcc | Class::Jmp => return Some(true),
                _ => true,
            };
            if clobbers && s.live_in != 0 {
                return Some(false);
            }
            (s.reads != 0 || s.writes != 0).then_some(true)
        });
        if in_host.unwrap_or(true) {
            // B: poll, restore, body. Poll: save, B. A: body.
            self.out.entry_poll = self.asm.pos() as u32;
            (self.host_flags, self.saved_flags) = (true, false);
            self.save_flags();
            self.out.entry_b = self.asm.pos() as u32;
            self.poll();
            self.host_flags = false;
            self.restore_flags();
            self.out.entry_a = self.asm.pos() as u32;
            // Entered at A nothing is saved.
            (self.host_flags, self.saved_flags) = (true, false);
        } else {
            (self.host_flags, self.saved_flags) = (true, false);
            self.save_flags();
            self.out.entry_b = self.asm.pos() as u32;
            self.poll();
            (self.host_flags, self.saved_flags) = (false, true);
        }
    }

    fn poll(&mut self) {
        // cmp dword [rsp + POLL], 0
        self.asm.bytes(&[0x83, 0x3c, 0x24, 0]);
        const { assert!(POLL == 0) };
        let jump = self.asm.jcc(cc::NE);
        self.stubs.push(Stub::Poll { jump });
    }

    fn save_flags(&mut self) {
        if self.saved_flags {
            return;
        }
        debug_assert!(self.host_flags);
        self.asm.mov(S1, 0);
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.asm.store16(0, CPU, FLAGS);
        self.asm.mov(0, S1);
        self.saved_flags = true;
    }

    fn restore_flags(&mut self) {
        if self.host_flags {
            return;
        }
        debug_assert!(self.saved_flags);
        self.asm.mov(S1, 0);
        self.asm.load32(0, CPU, FLAGS);
        self.asm.bytes(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
        self.asm.mov(0, S1);
        self.host_flags = true;
    }

    /// The host's flags are about to be destroyed while `live` ones are needed.
    fn clobber_flags(&mut self, live: u32) {
        if live != 0 && !self.saved_flags {
            if !self.host_flags {
                // Both dead by the liveness of an earlier point: cannot happen.
                debug_assert!(false, "live flags that are nowhere");
            }
            self.save_flags();
        }
        self.host_flags = false;
    }

    /// Before an instruction that reads flags, or leaves some untouched that are needed later.
    fn want_flags(&mut self, s: &Step) {
        if (s.reads != 0 || (s.writes != 0 && s.live_out & !s.writes != 0) || self.partial(s))
            && (self.host_flags || self.saved_flags)
        {
            self.restore_flags();
        }
    }
    /// Writes no flag for certain but may write some (shifts by CL): the others must be in place.
    fn partial(&self, s: &Step) -> bool {
        s.writes == 0 && s.i.rflags_modified() & ALL_FLAGS != 0 && s.live_out != 0
    }
    fn wrote_flags(&mut self, s: &Step) {
        if s.i.rflags_modified() & ALL_FLAGS != 0 {
            (self.host_flags, self.saved_flags) = (true, false);
        }
    }

    fn call_thunk(&mut self, thunk: Thunk) {
        self.asm.bytes(&[0xff, 0x15]);
        self.thunk_displacement(thunk);
    }
    fn jump_thunk(&mut self, thunk: Thunk) {
        self.asm.bytes(&[0xff, 0x25]);
        self.thunk_displacement(thunk);
    }
    fn thunk_displacement(&mut self, thunk: Thunk) {
        let next = self.to_table + self.asm.pos() as i64 + 4;
        let rel = (thunk as i64 * 8 - next) as i32;
        self.asm.bytes(&rel.to_le_bytes());
    }

    fn step(&mut self, s: &Step, ids: &mut dyn LinkIds) {
        let i = &s.i;
        match s.class {
            Class::Plain => self.plain(s),
            Class::Nop => {}
            Class::Lea => self.lea(i),
            Class::Push => self.push(s),
            Class::Pop => self.pop(s),
            Class::Leave => {
                self.clobber_flags(s.live_in);
                self.asm.mov(S0, 5);
                self.probe(8, false);
                self.asm.load(S1, S0, 0);
                self.asm.lea(GSP, 5, 8);
                self.asm.mov(5, S1);
            }
            Class::Cli => self.asm.store8_imm(CPU, IFLAG, 0),
            Class::Sti => {
                self.asm.store8_imm(CPU, IFLAG, 1);
                self.asm.load_u8(S0, CPU, IRQ_WAITING);
                self.asm.store8(S0, CPU, POLL + 1);
            }
            Class::Rdtsc => {
                self.clobber_flags(s.live_in);
                self.rdtsc();
            }
            Class::Rdtscp => {
                self.clobber_flags(s.live_in);
                self.asm.bytes(&[0x0f, 0xae, 0xe8]); // lfence: everything before has executed
                self.rdtsc();
                self.asm.load32(1, CPU, TSC_AUX);
            }
            Class::Bit => self.bit(s),
            Class::Pushf => self.pushf(),
            Class::Interpret => self.call_interpreter(i, i.next_ip()),
            Class::InterpretEnd => self.call_interpreter(i, 0),
            Class::InterpretFpu => self.leave_at(i.ip(), leave::INTERPRET),
            Class::Careful => self.leave_at(i.ip(), leave::CAREFUL),
            Class::Hlt => self.leave_at(i.ip(), leave::INTERPRET),
            Class::Jcc => {
                self.restore_flags();
                let (target, next) = (i.near_branch64(), i.next_ip());
                if self.same_page(target) {
                    self.align_displacement(2);
                }
                let jump = self.asm.jcc(condition_code(i));
                let taken = self.entry_for(target);
                if self.same_page(target) {
                    let id = self.new_link(target, taken, jump as u32, ids);
                    self.stubs.push(Stub::Link { jump, id, save: !self.saved_flags });
                    self.exit_to(next, ids);
                } else {
                    self.exit_to(next, ids);
                    self.asm.patch_here(jump);
                    self.exit_to(target, ids);
                }
            }
            Class::Jrcxz => {
                self.asm.bytes(&[0xe3, 5]);
                let skip = self.asm.jmp();
                self.exit_to(i.near_branch64(), ids);
                self.asm.patch_here(skip);
                self.exit_to(i.next_ip(), ids);
            }
            Class::Loop => {
                self.asm.lea(1, 1, -1);
                self.asm.bytes(&[0xe3, 5]);
                let skip = self.asm.jmp();
                self.exit_to(i.next_ip(), ids);
                self.asm.patch_here(skip);
                self.exit_to(i.near_branch64(), ids);
            }
            Class::Jmp => self.exit_to(i.near_branch64(), ids),
            Class::JmpIndirect => {
                self.load_target(s);
                self.exit_indirect();
            }
            Class::Call => {
                self.clobber_flags(s.live_in);
                self.push_return(i.next_ip());
                self.exit_to(i.near_branch64(), ids);
            }
            Class::CallIndirect => {
                self.load_target(s);
                self.asm.store(S0, CPU, TMP0);
                self.clobber_flags(s.live_in);
                self.push_return(i.next_ip());
                self.asm.load(S0, CPU, TMP0);
                self.exit_indirect();
            }
            Class::Ret => {
                self.clobber_flags(s.live_in);
                self.asm.mov(S0, GSP);
                self.probe(8, false);
                self.asm.load(S0, S0, 0);
                let extra = if i.op_count() == 1 { i.immediate16() as i32 } else { 0 };
                self.asm.lea(GSP, GSP, 8 + extra);
                self.exit_indirect();
            }
        }
    }

    /// Copy an instruction with operands rewritten.
    fn plain(&mut self, s: &Step) {
        let info = self
            .info
            .info_options(&s.i, InstructionInfoOptions::NO_REGISTER_USAGE | InstructionInfoOptions::NO_MEMORY_USAGE);
        let access: [OpAccess; 5] =
            [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access(), info.op4_access()];
        let mut i = s.i;
        let count = i.op_count();
        let mut memory = false;
        if uses_avx512(&i) && !self.noted_avx512 {
            self.note_avx512();
        }
        if matches!(i.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq) {
            // The implicit operand at [rdi]: S0 is the host's rdi. Prefixes of size and segment have had their say.
            self.asm.load(S0, CPU, OPERAND);
            i.set_op0_kind(OpKind::MemorySegRDI);
            i.set_segment_prefix(Register::None);
        }
        for n in 0..count {
            if i.op_kind(n) == OpKind::Memory {
                memory = true;
                let write = matches!(
                    access[n as usize],
                    OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                );
                if self.careful {
                    self.asm.load(S0, CPU, OPERAND);
                } else {
                    self.clobber_flags(s.live_in);
                    self.address(&i);
                    self.probe(operand_size(&i), write);
                }
                direct_memory_form(&mut i);
            }
        }
        if memory {
            memory_at_s0(&mut i);
        }
        self.want_flags(s);
        // Registers.
        let high = (0..count).any(|n| i.op_kind(n) == OpKind::Register && is_high_byte(i.op_register(n)));
        let mut scratch: [Option<u8>; 2] = [Some(S1), (!memory).then_some(S0)];
        let mut used = [Held::default(); 4];
        let mut used_len = 0;
        let mut borrowed: Option<u8> = None;
        for n in 0..count {
            if i.op_kind(n) != OpKind::Register || !i.op_register(n).is_gpr() || is_high_byte(i.op_register(n)) {
                continue;
            }
            let register = i.op_register(n);
            let guest = register.full_register().number();
            let at = match home(guest) {
                Some(h) if !(high && h >= 8) => h,
                _ => {
                    let written = matches!(
                        access[n as usize],
                        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                    );
                    let read = access[n as usize] != OpAccess::Write || register.size() < 4;
                    let slot = match used[..used_len].iter().position(|u| u.guest == guest) {
                        Some(slot) => slot,
                        None => {
                            let host = scratch.iter_mut().find_map(Option::take).unwrap_or_else(|| {
                                let b = borrow(&i);
                                borrowed = Some(b);
                                self.asm.store(b, CPU, TMP1);
                                b
                            });
                            used[used_len] = Held { guest, host, ..Held::default() };
                            used_len += 1;
                            used_len - 1
                        }
                    };
                    let held = &mut used[slot];
                    held.written |= written;
                    if read && !held.loaded {
                        held.loaded = true;
                        match home(guest) {
                            Some(h) => self.asm.mov(held.host, h),
                            None => self.asm.load(held.host, CPU, gpr(guest)),
                        }
                    }
                    held.host
                }
            };
            i.set_op_register(n, resized(at, register));
        }
        self.encode(&i);
        for held in used[..used_len].iter().filter(|u| u.written) {
            match home(held.guest) {
                Some(h) => self.asm.mov(h, held.host),
                None => self.asm.store(held.host, CPU, gpr(held.guest)),
            }
        }
        if let Some(b) = borrowed {
            self.asm.load(b, CPU, TMP1);
        }
        self.wrote_flags(s);
    }

    /// Before the first instruction with AVX-512 state: helpers and the way out take care of that from now on. If it
    /// was not in use, it is made what it should be, zero. Leaves the flags alone.
    fn note_avx512(&mut self) {
        self.asm.mov(S1, 1);
        self.asm.load_u8(1, CPU, AVX512);
        self.asm.bytes(&[0xe3, 0]); // jrcxz
        let site = self.asm.pos();
        self.asm.mov(1, S1);
        let done = self.asm.jmp();
        let distance = self.asm.pos() - site;
        self.asm.buf[site - 1] = distance as u8;
        self.asm.mov(1, S1);
        self.call_thunk(Thunk::Note512);
        self.asm.patch_here(done);
        self.noted_avx512 = true;
    }

    fn encode(&mut self, i: &Instruction) {
        let buf = std::mem::take(&mut self.asm.buf);
        self.encoder.set_buffer(buf);
        let result = self.encoder.encode(i, i.ip());
        self.asm.buf = self.encoder.take_buffer();
        if result.is_err() {
            // The allow-list test encodes every listed form; should one be missed, it is #UD, not a crash.
            debug_assert!(false, "cannot encode {:?}", i.code());
            self.asm.bytes(&[0x0f, 0x0b]);
        }
    }

    /// Host register that holds `register`, loading it to `scratch` if it has no home.
    fn address_register(&mut self, register: Register, scratch: u8) -> u8 {
        let guest = register.full_register().number();
        home(guest).unwrap_or_else(|| {
            self.asm.load(scratch, CPU, gpr(guest));
            scratch
        })
    }

    /// Linear address of the memory operand to S0. Flags may be destroyed.
    fn address(&mut self, i: &Instruction) {
        self.effective_address(i, S0);
        let segment = i.memory_segment();
        if matches!(segment, Register::FS | Register::GS) {
            self.asm.alu_load(Alu::Add, S0, CPU, segment_base(segment));
        }
    }

    /// The offset part of the operand's address to `dst`, without touching flags.
    fn effective_address(&mut self, i: &Instruction, dst: u8) {
        let base = i.memory_base();
        let displacement = i.memory_displacement64();
        if matches!(base, Register::RIP | Register::EIP) {
            let a = i.ip_rel_memory_address();
            self.asm.mov_imm(dst, if base == Register::EIP { a & 0xffff_ffff } else { a });
            return;
        }
        let index = i.memory_index();
        let wide = !(base.size() == 4 || index.size() == 4);
        if base == Register::None && index == Register::None {
            let address32 = i.memory_displ_size() == 4;
            self.asm.mov_imm(dst, if address32 { displacement & 0xffff_ffff } else { displacement });
            return;
        }
        let b = (base != Register::None).then(|| self.address_register(base, S0));
        let x = (index != Register::None)
            .then(|| (self.address_register(index, S1), i.memory_index_scale().trailing_zeros() as u8));
        self.asm.lea_full(wide, dst, b, x, displacement as i32);
    }

    /// Turn the linear address in S0 into a host address, in S0; S1 is destroyed.
    fn probe(&mut self, size: usize, write: bool) {
        let mode = self.mode.mmu();
        const ENTRY: i32 = size_of::<TlbEntry>() as i32;
        const SHIFT: u8 = 12 - (ENTRY.trailing_zeros() as u8);
        let tag =
            tlb(mode) + if write { offset_of!(TlbEntry, write) as i32 } else { offset_of!(TlbEntry, read) as i32 };
        self.asm.mov32(S1, S0);
        self.asm.shr32(S1, SHIFT);
        self.asm.alu_imm(Alu::And, false, S1, (TLB_ENTRIES as i32 - 1) * ENTRY);
        self.asm.alu_cpu_index(Alu::Sub, S0, S1, tag);
        self.asm.alu_imm(Alu::Cmp, true, S0, 4096 - size as i32);
        let jump = self.asm.jcc(cc::A);
        self.asm.alu_cpu_index(Alu::Add, S0, S1, tlb(mode) + offset_of!(TlbEntry, host) as i32);
        let back = self.asm.pos();
        let info = size as u32 | (write as u32) << 16 | (mode as u32) << 24;
        self.stubs.push(Stub::Memory { jump, back, index_tag: tag, info });
        self.host_flags = false;
    }

    fn lea(&mut self, i: &Instruction) {
        let register = i.op0_register();
        let guest = register.full_register().number();
        let dst = home(guest);
        match register.size() {
            8 | 4 => {
                // An address of 64 bits cut to 32, or an address of 32 bits: both end zero-extended.
                let to = dst.unwrap_or(S0);
                self.effective_address(i, to);
                if register.size() == 4 {
                    self.asm.mov32(to, to);
                }
                if dst.is_none() {
                    self.asm.store(to, CPU, gpr(guest));
                }
            }
            _ => {
                self.effective_address(i, S0);
                match dst {
                    // mov r16, di
                    Some(h) => {
                        self.asm.bytes(&[0x66, 0x40 | h >> 3, 0x89, 0xc0 | S0 << 3 | h & 7]);
                    }
                    None => self.asm.store16(S0, CPU, gpr(guest)),
                }
            }
        }
    }

    fn push(&mut self, s: &Step) {
        let i = &s.i;
        self.clobber_flags(s.live_in);
        enum Value {
            Register(usize),
            Immediate(i32),
            Memory,
        }
        let value = match i.op0_kind() {
            OpKind::Register => Value::Register(i.op0_register().number()),
            OpKind::Memory => {
                self.address(i);
                self.probe(8, false);
                self.asm.load(S0, S0, 0);
                self.asm.store(S0, CPU, TMP0);
                Value::Memory
            }
            _ => Value::Immediate(i.immediate(0) as i64 as i32),
        };
        self.asm.lea(S0, GSP, -8);
        self.probe(8, true);
        match value {
            Value::Register(guest) => {
                let h = match home(guest) {
                    Some(h) => h,
                    None => {
                        self.asm.load(S1, CPU, gpr(guest));
                        S1
                    }
                };
                self.asm.store(h, S0, 0);
            }
            Value::Immediate(v) => self.asm.store64_simm(S0, 0, v),
            Value::Memory => {
                self.asm.load(S1, CPU, TMP0);
                self.asm.store(S1, S0, 0);
            }
        }
        self.asm.lea(GSP, GSP, -8);
    }

    fn pop(&mut self, s: &Step) {
        let i = &s.i;
        self.clobber_flags(s.live_in);
        self.asm.mov(S0, GSP);
        self.probe(8, false);
        if i.op0_kind() == OpKind::Register {
            let guest = i.op0_register().number();
            match home(guest) {
                Some(GSP) => self.asm.load(GSP, S0, 0),
                Some(h) => {
                    self.asm.load(h, S0, 0);
                    self.asm.lea(GSP, GSP, 8);
                }
                None => {
                    self.asm.load(S0, S0, 0);
                    self.asm.store(S0, CPU, gpr(guest));
                    self.asm.lea(GSP, GSP, 8);
                }
            }
            return;
        }
        self.asm.load(S0, S0, 0);
        self.asm.store(S0, CPU, TMP0);
        // An operand based on rsp sees it already incremented.
        let mut i = *i;
        if i.memory_base() == Register::RSP {
            i.set_memory_displacement64(i.memory_displacement64().wrapping_add(8));
        }
        self.address(&i);
        self.probe(8, true);
        self.asm.load(S1, CPU, TMP0);
        self.asm.store(S1, S0, 0);
        self.asm.lea(GSP, GSP, 8);
    }

    fn push_return(&mut self, next: u64) {
        self.asm.lea(S0, GSP, -8);
        self.probe(8, true);
        if let Ok(v) = i32::try_from(next as i64) {
            self.asm.store64_simm(S0, 0, v);
        } else {
            self.asm.mov_imm(S1, next);
            self.asm.store(S1, S0, 0);
        }
        self.asm.lea(GSP, GSP, -8);
    }

    /// Guest TSC to EDX:EAX. Destroys flags.
    fn rdtsc(&mut self) {
        self.asm.bytes(&[0x0f, 0x31]);
        self.asm.shl(true, 2, 32);
        self.asm.alu_reg(Alu::Or, 0, 2);
        // As `sys::tsc`; a multiplication by one costs less than to ask whether there is one.
        self.asm.mul_load(CPU, offset_of!(Cpu, tsc_ratio) as i32);
        self.asm.shrd(0, 2, crate::sys::TSC_RATIO_BITS);
        self.asm.alu_load(Alu::Add, 0, CPU, offset_of!(Cpu, tsc_offset) as i32);
        self.asm.mov(2, 0);
        self.asm.shr(2, 32);
        self.asm.mov32(0, 0);
    }

    /// BT, BTS, BTR, BTC with a bit offset in a register, which reaches beyond the operand in memory.
    fn bit(&mut self, s: &Step) {
        let mut i = s.i;
        let others = s.live_out & !RflagsBits::CF;
        self.clobber_flags(others);
        let register = i.op1_register();
        let guest = register.full_register().number();
        let size = register.size();
        self.address(&i);
        // S1 = the signed offset in whole operands.
        let load = |t: &mut Self| match home(guest) {
            Some(h) if size == 8 => t.asm.mov(S1, h),
            Some(h) => t.asm.movsxd(S1, h),
            None if size == 8 => t.asm.load(S1, CPU, gpr(guest)),
            None => t.asm.movsxd_load(S1, CPU, gpr(guest)),
        };
        load(self);
        let (log, bytes_log) = if size == 8 { (6, 3) } else { (5, 2) };
        self.asm.sar(S1, log);
        self.asm.lea_full(true, S0, Some(S0), Some((S1, bytes_log)), 0);
        self.probe(size, i.mnemonic() != Mnemonic::Bt);
        load(self);
        self.asm.alu_imm(Alu::And, false, S1, size as i32 * 8 - 1);
        memory_at_s0(&mut i);
        i.set_op_register(1, resized(S1, register));
        self.encode(&i);
        if others != 0 {
            // The other flags are saved, with CF in bit 0 of what LAHF gave.
            self.asm.bytes(&[0x40, 0x0f, 0x92, 0xc0 | S1]); // setc sil
            self.asm.load_u8(S0, CPU, FLAGS + 1);
            self.asm.alu_imm(Alu::And, false, S0, 0xfe);
            self.asm.alu_reg8_or(S0, S1);
            self.asm.store8(S0, CPU, FLAGS + 1);
            (self.host_flags, self.saved_flags) = (false, true);
        } else {
            (self.host_flags, self.saved_flags) = (true, false);
        }
    }

    fn pushf(&mut self) {
        if self.host_flags {
            self.save_flags();
        }
        self.host_flags = false;
        self.asm.load_u8(S1, CPU, FLAGS + 1);
        self.asm.alu_imm(Alu::And, false, S1, 0xd5);
        self.asm.load_u8(S0, CPU, FLAGS);
        self.asm.shl(false, S0, 11);
        self.asm.alu_reg(Alu::Or, S1, S0);
        self.asm.load_u8(S0, CPU, IFLAG);
        self.asm.shl(false, S0, 9);
        self.asm.alu_reg(Alu::Or, S1, S0);
        self.asm.alu_load(Alu::Or, S1, CPU, offset_of!(Cpu, sysflags) as i32);
        // RF and VM read as 0; bit 1 as 1.
        self.asm.alu_imm(Alu::And, false, S1, !0x30000);
        self.asm.alu_imm(Alu::Or, false, S1, 2);
        self.asm.store(S1, CPU, TMP0);
        self.asm.lea(S0, GSP, -8);
        self.probe(8, true);
        self.asm.load(S1, CPU, TMP0);
        self.asm.store(S1, S0, 0);
        self.asm.lea(GSP, GSP, -8);
    }

    /// Target of an indirect jump or call to S0.
    fn load_target(&mut self, s: &Step) {
        let i = &s.i;
        if i.op0_kind() == OpKind::Register {
            let guest = i.op0_register().number();
            match home(guest) {
                Some(h) => self.asm.mov(S0, h),
                None => self.asm.load(S0, CPU, gpr(guest)),
            }
        } else {
            self.clobber_flags(s.live_in);
            self.address(i);
            self.probe(8, false);
            self.asm.load(S0, S0, 0);
        }
    }

    fn same_page(&self, target: u64) -> bool {
        target >> 12 == self.rip >> 12
    }

    fn entry_for(&self, target: u64) -> Entry {
        if !self.host_flags {
            Entry::B
        } else if target <= self.rip || !self.same_page(target) {
            Entry::Poll
        } else {
            Entry::A
        }
    }

    fn new_link(&mut self, target: u64, entry: Entry, site: u32, ids: &mut dyn LinkIds) -> u32 {
        let id = ids.next(entry == Entry::B);
        self.out.links.push((id, Link { target, entry, site, stub: 0 }));
        id
    }

    /// Pad so that the displacement of the jump that comes next, behind `opcode` bytes, is aligned: it is
    /// patched while other vCPUs may execute it.
    fn align_displacement(&mut self, opcode: i64) {
        let pad = (-(self.to_table + self.asm.pos() as i64 + opcode)) & 3;
        self.asm.bytes([&[][..], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00]][pad as usize]);
    }

    /// End the block by going on at `target`.
    fn exit_to(&mut self, target: u64, ids: &mut dyn LinkIds) {
        let entry = self.entry_for(target);
        if self.same_page(target) {
            self.align_displacement(1);
            let jump = self.asm.jmp();
            let id = self.new_link(target, entry, jump as u32, ids);
            self.stubs.push(Stub::Link { jump, id, save: !self.saved_flags });
        } else {
            let id = self.new_link(target, entry, 0, ids);
            self.asm.mov_imm(S0, id as u64);
            self.asm.jmp_mem(CPU, LINKS + id as i32 * 8);
        }
    }

    /// End the block by going on at the address in S0.
    fn exit_indirect(&mut self) {
        if self.host_flags {
            self.save_flags();
        }
        let table = jump_table(self.mode.mmu());
        self.asm.mov32(S1, S0);
        self.asm.alu_imm(Alu::And, false, S1, JUMP_ENTRIES as i32 - 1);
        self.asm.shl(false, S1, 4);
        self.asm.cmp_cpu_index(S1, table + offset_of!(JumpEntry, rip) as i32, S0);
        let miss = self.asm.jcc(cc::NE);
        self.asm.jmp_cpu_index(S1, table + offset_of!(JumpEntry, host) as i32);
        self.asm.patch_here(miss);
        self.call_thunk(Thunk::Indirect);
    }

    /// Flags to `Cpu::flags_saved`, where helpers expect them.
    fn save_for_call(&mut self) {
        if self.host_flags {
            self.save_flags();
        }
        (self.host_flags, self.saved_flags) = (false, true);
    }

    /// Hand an instruction to the interpreter. `next`: where the block goes on, or 0 if it ends.
    fn call_interpreter(&mut self, i: &Instruction, next: u64) {
        self.save_for_call();
        let decoded = Box::new(Decoded { instruction: *i, bytes: self.bytes });
        self.asm.mov_imm(S0, &raw const *decoded as u64);
        self.out.decoded.push(decoded);
        self.asm.mov_imm(S1, next);
        self.call_thunk(Thunk::Interpret);
        if next == 0 {
            // The helper always sets `Cpu::jump`.
            self.asm.bytes(&[0x0f, 0x0b]);
        }
    }

    fn leave_at(&mut self, ip: u64, reason: u32) {
        if self.host_flags {
            self.save_flags();
        }
        self.asm.mov_imm(S0, ip);
        self.asm.store(S0, CPU, RIP);
        self.asm.store32_imm(CPU, LEAVE, reason);
        self.jump_thunk(Thunk::Leave);
    }

    fn epilogue(&mut self) {
        let stubs = std::mem::take(&mut self.stubs);
        for stub in &stubs {
            match *stub {
                Stub::Memory { jump, back, index_tag, info } => {
                    self.asm.patch_here(jump);
                    // S0 is the address less the tag; S1 the entry's offset.
                    self.asm.alu_cpu_index(Alu::Add, S0, S1, index_tag);
                    self.asm.mov_imm(S1, info as u64);
                    self.call_thunk(Thunk::Memory);
                    // The return address tells the helper which instruction this is.
                    self.out.map.push((self.asm.pos() as u32, u16::MAX, false));
                    let j = self.asm.jmp();
                    self.asm.patch(j, back);
                    let last = self.out.map.len() - 1;
                    self.out.map[last].1 = self.guest_offset_at(back);
                }
                Stub::Link { jump, id, save } => {
                    self.asm.patch_here(jump);
                    let at = self.asm.pos() as u32;
                    if let Some((_, link)) = self.out.links.iter_mut().find(|(n, _)| *n == id) {
                        link.stub = at;
                    }
                    if save {
                        (self.host_flags, self.saved_flags) = (true, false);
                        self.save_flags();
                    }
                    self.asm.mov_imm(S0, id as u64);
                    self.call_thunk(Thunk::Link);
                }
                Stub::Poll { jump } => {
                    self.asm.patch_here(jump);
                    self.asm.mov_imm(S0, self.rip);
                    self.call_thunk(Thunk::Poll);
                }
            }
        }
        self.stubs = stubs;
    }

    fn guest_offset_at(&self, host: usize) -> u16 {
        let body = self.out.map.partition_point(|m| (m.0 as usize) < host);
        // Stub entries are appended behind the body's and have larger offsets than any `back`.
        self.out.map[body - 1].1
    }
}

/// Make the memory operand `[S0]`.
fn memory_at_s0(i: &mut Instruction) {
    i.set_memory_base(R64[S0 as usize]);
    i.set_memory_index(Register::None);
    i.set_memory_index_scale(1);
    i.set_memory_displacement64(0);
    i.set_memory_displ_size(0);
    i.set_segment_prefix(Register::None);
}

fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::BH | Register::CH | Register::DH)
}

/// A host register that the instruction does not use, to lend for one instruction.
fn borrow(i: &Instruction) -> u8 {
    let uses = |host: u8| {
        (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register
                && i.op_register(n).is_gpr()
                && i.op_register(n).full_register().number() == host as usize
        })
    };
    [5u8, 12, 13, 14].into_iter().find(|&h| !uses(h)).unwrap_or(15)
}

/// Bytes that the memory operand of a copied instruction spans.
fn operand_size(i: &Instruction) -> usize {
    match i.memory_size() {
        MemorySize::Unknown => 8,
        size => size.size().max(1),
    }
}

/// MOV between the accumulator and an absolute address exists only with that address.
fn direct_memory_form(i: &mut Instruction) {
    let code = match i.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    i.set_code(code);
}

fn condition_code(i: &Instruction) -> u8 {
    // iced numbers them as the encoding does, behind `None`.
    i.condition_code() as u8 - 1
}
