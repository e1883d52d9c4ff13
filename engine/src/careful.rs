//! The careful path: one instruction on a copy of its memory operand.
//!
//! Translated code accesses guest memory directly, which device memory, operands across two pages, pages that
//! hold code, and modes other than 64-bit do not allow. There the interpreter finds the operand, and the
//! instruction itself runs here, natively: on guest memory if the operand is RAM within one page (so that
//! LOCK means what it says), else on a copy that is read before and written back after.
//!
//! Integer instructions run on a second, small `Cpu` and leave the vector registers alone, so that helpers of
//! translated code can come here while the guest's vector state is in the host's registers.

use crate::cpu::{Cpu, Exception, Exit, Res, Stop, Vcpu};
use crate::helpers::{pack_flags, unpack_flags};
use crate::interp::{effective, segment_index};
use crate::run::{self, leave};
use crate::segment;
use crate::signal;
use crate::stats::vcpu as counter;
use crate::thunks;
use crate::{access, mmu};
use iced_x86::{
    Code, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

/// FNSAVE's 108 bytes are the longest operand; vectors have 32.
const OPERAND_BYTES: usize = 128;

#[repr(align(64))]
struct Buffer([u8; OPERAND_BYTES + 64]);

fn is_masked_store(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq)
}

/// Does a mask decide which parts of the operand are accessed? The others need not be there.
fn is_masked(i: &Instruction) -> bool {
    use Mnemonic::*;
    is_masked_store(i)
        || i.op_mask() != Register::None
        || matches!(i.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
}

/// How the memory operand of `i` is accessed: (bytes, read, write).
fn access_of(i: &Instruction) -> (usize, bool, bool) {
    if is_masked_store(i) {
        return (if i.mnemonic() == Mnemonic::Maskmovq { 8 } else { 16 }, true, true);
    }
    let Some(n) = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory) else { return (0, false, false) };
    thread_local! {
        static FACTORY: std::cell::RefCell<InstructionInfoFactory> = InstructionInfoFactory::new().into();
    }
    let access = FACTORY.with_borrow_mut(|f| {
        f.info_options(i, InstructionInfoOptions::NO_REGISTER_USAGE | InstructionInfoOptions::NO_MEMORY_USAGE)
            .op_access(n)
    });
    use OpAccess::*;
    let write = matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite);
    (i.memory_size().size().max(1), access != Write, write)
}

/// Run `i`; the caller moves rip. `integer`: it touches neither x87 nor vector state.
pub fn run_instruction(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], integer: bool) -> Res<()> {
    v.shared.stats.count(counter::CAREFUL);
    make_room(v);
    let (size, _, write) = access_of(i);
    if size == 0 {
        return execute(v, i, bytes, integer, 0);
    }
    let offset = if is_masked_store(i) {
        let rdi = v.cpu.gpr[crate::cpu::RDI];
        match i.op_kind(0) {
            OpKind::MemorySegDI => rdi & 0xffff,
            OpKind::MemorySegEDI => rdi & 0xffff_ffff,
            _ => rdi,
        }
    } else {
        effective(&v.cpu, i)
    };
    let la = segment::linear(&v.cpu, segment_index(i.memory_segment()), offset, size as u64, write)?;
    run_at(v, i, bytes, la, integer)
}

/// Make sure that `execute` finds room. Waits for a safepoint if it doesn't, so no host address may be held.
fn make_room(v: &mut Vcpu) {
    if v.vm.cache.lock().unwrap().is_full() {
        v.exclusive(|_, stopped| stopped.drop_all_code());
    }
}

/// Run `i` with its memory operand at linear address `la`.
fn run_at(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], la: u64, integer: bool) -> Res<()> {
    let (size, _, write) = access_of(i);
    let mode = v.cpu.mmu_mode();
    if size > OPERAND_BYTES {
        return Err(Exit::InternalError(format!("operand of {size} bytes of {:?}", i.code())).into());
    }
    if is_masked(i) || is_misaligned(v, i, la, size, mode) || !is_accessible(v, la, size, write, mode) {
        return staged(v, i, bytes, la, integer);
    }
    let scrubbed = host_pointers(i);
    if write
        && scrubbed.is_none()
        && let Some((p, slot, gpa)) = access::direct(v, la, size as u64, mode)?
    {
        execute(v, i, bytes, integer, p as u64)?;
        access::written(v, &slot, gpa, size as u64);
        return Ok(());
    }
    if is_x87_store(i) {
        return staged(v, i, bytes, la, integer);
    }
    let locked = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
    if locked && integer && v.vm.vcpus.read().unwrap().len() > 1 && is_plain_memory(v, la, size, mode)? {
        // Atomic across two pages: nobody else runs meanwhile. Until then they may have put code there, whose end would have to
        // wait for this to end.
        let done = v.exclusive(|v, _| {
            is_plain_memory(v, la, size, mode)?.then(|| on_copy(v, i, bytes, la, integer, mode)).transpose()
        })?;
        if done.is_some() {
            return Ok(());
        }
    }
    on_copy(v, i, bytes, la, integer, mode)
}

/// With an unmasked exception it stores nothing.
fn is_x87_store(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp)
}

/// Is all of `[la, la + size)` memory whose writing concerns nobody else (no code, no device)?
fn is_plain_memory(v: &mut Vcpu, la: u64, size: usize, mode: usize) -> Res<bool> {
    // There, a page with code is not known by its address.
    if v.smm {
        return Ok(false);
    }
    for end in [la, la.wrapping_add(size as u64 - 1)] {
        let gpa = mmu::walk(v, end, mmu::Intent::Write, mode)?.gpa;
        if v.vm.code.has(gpa) || v.is_lapic(gpa) || v.slots.find(gpa).is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Run `i` on a copy of its operand.
fn on_copy(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], la: u64, integer: bool, mode: usize) -> Res<()> {
    let (size, read, write) = access_of(i);
    let scrubbed = host_pointers(i);
    let mut buffer = Buffer([0; OPERAND_BYTES + 64]);
    let at = (la & 63) as usize;
    if write {
        access::check_pages(v, la, size as u64, mmu::Intent::Write, mode)?;
    }
    if read {
        access::read_part(v, la, &mut buffer.0[at..at + size], mode)?;
    }
    execute(v, i, bytes, integer, &raw mut buffer.0 as u64 + at as u64)?;
    if write {
        if let Some((first, last)) = scrubbed {
            buffer.0[at + first..at + last].fill(0);
        }
        access::write_part(v, la, &buffer.0[at..at + size], mode)?;
    }
    Ok(())
}

fn intent(write: bool) -> mmu::Intent {
    if write { mmu::Intent::Write } else { mmu::Intent::Read }
}

fn is_misaligned(v: &Vcpu, i: &Instruction, la: u64, size: usize, mode: usize) -> bool {
    // Conversions of half floats ask for no alignment (exception class 11, Intel SDM volume 2, 2.4).
    !matches!(i.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) && access::is_misaligned(&v.cpu, la, size, mode)
}

/// May all of `[la, la + size)` be accessed?
fn is_accessible(v: &Vcpu, la: u64, size: usize, write: bool, mode: usize) -> bool {
    [la, la.wrapping_add(size as u64 - 1)].into_iter().all(|at| mmu::walk(v, at, intent(write), mode).is_ok())
}

/// Run `i` where some of its operand may be missing. The processor itself finds out whether that matters (a mask
/// may leave it out) and what comes first (#GP of a misaligned operand comes before #PF): pages that the guest may
/// not access are not there for it either. What it stores is what it stores over any pattern: a masked instruction not all,
/// and FSTP m80 and FBSTP the first 8 bytes before the last 2 fault.
fn staged(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], la: u64, integer: bool) -> Res<()> {
    let (size, _, write) = access_of(i);
    let mode = v.cpu.mmu_mode();
    let no_stage = |e| Exit::InternalError(format!("no memory for an instruction's operand: {e}"));
    let stage = Stage::new().map_err(no_stage)?;
    let at = (la & 0xfff) as usize;
    let first = size.min(4096 - at);
    let misaligned = is_misaligned(v, i, la, size, mode);
    let mut faults = [None; 2];
    for (page, (offset, len)) in [(0, first), (first, size - first)].into_iter().enumerate().filter(|(_, p)| p.1 != 0) {
        let here = la.wrapping_add(offset as u64);
        let page_there = match mmu::walk(v, here, intent(write), mode) {
            _ if misaligned => Err(access::MISALIGNED),
            result => result,
        };
        match page_there {
            Err(e) if e.is_memory_fault() => return Err(e.into()),
            Err(e) => {
                stage.hide(page).map_err(no_stage)?;
                faults[page] = Some(e);
            }
            Ok(_) if !write => access::read_part(v, here, stage.bytes(at + offset, len), mode)?,
            Ok(_) => {}
        }
    }
    if !is_masked(i) && !is_x87_store(i) && faults == [None; 2] {
        // Somebody has mapped it meanwhile.
        return on_copy(v, i, bytes, la, integer, mode);
    }
    let visible = |n: usize| faults[(at + n) >> 12].is_none();
    let mut stored: Vec<[u8; OPERAND_BYTES]> = Vec::new();
    let mut stopped = None;
    let before = (v.cpu.gpr, v.cpu.aflags, v.cpu.fpu.0);
    for pattern in if write { &[0x00, 0xff][..] } else { &[0][..] } {
        // The first run may have left an x87 exception pending, or another operand in a register.
        (v.cpu.gpr, v.cpu.aflags, v.cpu.fpu.0) = before;
        if write {
            (0..size).filter(|&n| visible(n)).for_each(|n| stage.bytes(at + n, 1)[0] = *pattern);
        }
        v.cpu.trap_number = 0;
        if let Err(stop) = execute(v, i, bytes, integer, stage.address(at)) {
            let (trap, address) = (v.cpu.trap_number, v.cpu.trap_address.wrapping_sub(stage.address(0)));
            let fault = faults.get((address >> 12) as usize).copied().flatten();
            stopped = Some(match fault {
                Some(e) if trap == 14 && e.vector == 14 => {
                    Exception { payload: (la & !0xfff).wrapping_add(address), ..e }.into()
                }
                Some(e) if trap == 14 => e.into(),
                _ => stop,
            });
        }
        let mut result = [0; OPERAND_BYTES];
        (0..size).filter(|&n| visible(n)).for_each(|n| result[n] = stage.bytes(at + n, 1)[0]);
        stored.push(result);
    }
    if let [a, b] = &stored[..]
        && host_pointers(i).is_none()
    {
        let mut n = 0;
        while n < size {
            let len = (n..size).take_while(|&k| visible(k) && a[k] == b[k]).count();
            if len != 0 {
                access::write_part(v, la.wrapping_add(n as u64), &a[n..n + len], mode)?;
            }
            n += len.max(1);
        }
    }
    stopped.map_or(Ok(()), Err)
}

/// Two pages of host memory, each of which can be made inaccessible.
struct Stage(*mut u8);

impl Stage {
    fn new() -> std::io::Result<Self> {
        // SAFETY: a fresh anonymous mapping.
        let p = unsafe {
            let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), 8192, read_write, private, -1, 0)
        };
        if p == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self(p.cast())) }
    }
    fn address(&self, at: usize) -> u64 {
        self.0 as u64 + at as u64
    }
    fn hide(&self, page: usize) -> std::io::Result<()> {
        // SAFETY: one of the two pages of our own mapping.
        match unsafe { libc::mprotect(self.0.add(page << 12).cast(), 4096, libc::PROT_NONE) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
    /// `len` bytes at `at`, which no hidden page holds.
    #[allow(clippy::mut_from_ref)] // Each is gone before the next is taken.
    fn bytes(&self, at: usize, len: usize) -> &mut [u8] {
        assert!(at + len <= 8192);
        // SAFETY: inside the mapping; used by this thread alone.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.0.cast(), 8192) };
    }
}

/// Where FNSTENV and FNSAVE put the addresses of the last x87 instruction and operand: here the host's,
/// which the guest must not learn.
fn host_pointers(i: &Instruction) -> Option<(usize, usize)> {
    match i.mnemonic() {
        Mnemonic::Fnstenv | Mnemonic::Fnsave => match i.memory_size().size() {
            14 | 94 => Some((6, 14)),
            _ => Some((12, 28)),
        },
        _ => None,
    }
}

/// The same instruction as 64-bit code can encode it.
fn encodable(i: &Instruction) -> Instruction {
    use Code::*;
    let code = match i.code() {
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        Add_rm8_imm8_82 => Add_rm8_imm8,
        Or_rm8_imm8_82 => Or_rm8_imm8,
        Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
        And_rm8_imm8_82 => And_rm8_imm8,
        Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8,
        Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        _ => return *i,
    };
    let mut i = *i;
    i.set_code(code);
    i
}

/// Run `i` natively with its memory operand at host address `operand`.
fn execute(v: &mut Vcpu, i: &Instruction, bytes: &[u8; 15], integer: bool, operand: u64) -> Res<()> {
    let host = v.vm.cache.lock().unwrap().careful(&encodable(i), &bytes[..i.len()], integer);
    let ended = if integer {
        let flags = v.cpu.aflags;
        let gpr = v.cpu.gpr;
        let c: &mut Cpu = &mut v.scratch;
        (c.gpr, c.flags_saved, c.operand) = (gpr, pack_flags(flags), operand);
        let p = v.scratch.as_ptr();
        // SAFETY: live code made for this purpose, on a `Cpu` of its own.
        signal::inside(p, || unsafe { thunks::enter_light(p, host) });
        let c: &mut Cpu = &mut v.scratch;
        let (gpr, flags, ended) = (c.gpr, unpack_flags(c.flags_saved), c.leave);
        if ended == leave::CAREFUL_DONE {
            (v.cpu.gpr, v.cpu.aflags) = (gpr, flags);
        } else {
            (v.cpu.trap_number, v.cpu.trap_error) = (v.scratch.trap_number, v.scratch.trap_error);
            v.cpu.trap_address = v.scratch.trap_address;
        }
        ended
    } else {
        v.cpu.operand = operand;
        let before = v.cpu.aflags;
        run::enter(v, host);
        if v.cpu.leave == leave::TRAP {
            v.cpu.aflags = before;
        }
        v.cpu.leave
    };
    match ended {
        leave::CAREFUL_DONE => Ok(()),
        leave::TRAP => Err(run::trap_exception(v)),
        other => Err(Stop::Exit(Exit::InternalError(format!("careful code left for reason {other}")))),
    }
}
