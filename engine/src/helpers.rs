//! What translated code calls: TLB misses, instructions left to the interpreter, unresolved jumps, polls.
//!
//! Each helper either lets the block go on (`Cpu::jump` = 0) or names the host address to continue at: the
//! block at the guest's rip, or the thunk that leaves translated code with `Cpu::leave` telling why.

use crate::cache::{Key, Target, revoke_writes};
use crate::cpu::{Cpu, Exception, Exit, RSP, Res, Stop, Vcpu, rflags};
use crate::guest::{self, Gone};
use crate::mem::{CodePages, LOG_DIRTY};
use crate::run::{self, leave};
use crate::stats::vcpu as counter;
use crate::translate::{Decoded, Mode};
use crate::{access, exception, interp, mmu, thunks, vapic};
use iced_x86::FlowControl;

/// Longest stretch of guest code that one block is translated from.
const WINDOW_BYTES: usize = 320;

/// RFLAGS arithmetic bits from what LAHF and SETO left.
pub fn unpack_flags(saved: u64) -> u64 {
    saved >> 8 & 0xd5 | (saved & 1) << 11
}
pub fn pack_flags(flags: u64) -> u64 {
    (flags & 0xd5) << 8 | (flags & rflags::OF) >> 11
}

/// # Safety
/// `cpu` is what translated code has in RSP: live, and used by this thread alone.
unsafe fn vcpu<'a>(cpu: *mut Cpu) -> &'a mut Vcpu {
    // SAFETY: by the caller; `run::enter` has set `vcpu`, and uses what it points to only once translated code has left.
    unsafe { &mut *(*cpu).vcpu }
}

/// TLB miss: the host address of `size` bytes at `address`, or the instruction is finished another way.
pub unsafe extern "C" fn memory(cpu: *mut Cpu, address: u64, info: u64, return_pc: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::MEMORY);
    v.cpu.jump = 0;
    let (size, write, mode) = (info & 0xffff, info >> 16 & 1 != 0, (info >> 24) as usize);
    let offset = address & 0xfff;
    if offset + size <= 4096
        && let Ok(Some(entry)) = mmu::fill(v, address, write, mode)
    {
        return entry.host + offset;
    }
    // Before anything that waits for a safepoint, where this block may go.
    let place = place(v, return_pc);
    if write
        && offset + size <= 4096
        && let Some(host) = write_beside_code(v, address, size, mode, return_pc)
    {
        return host;
    }
    // A fault, a device, a page-crossing access, or a page with code: the interpreter takes the whole
    // instruction, of which nothing has happened yet.
    let Some(rip) = place else { return lost(v) };
    v.shared.stats.count(counter::SLOW);
    v.cpu.rip = rip;
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    let result = interp::step_integer(v);
    go_on(v, result)
}

/// A write to a page that holds code, by the only vCPU: what it overwrites is forgotten beforehand, and the
/// store itself goes straight to memory. `None` if the running block is among that, or more is to be done.
fn write_beside_code(v: &mut Vcpu, address: u64, size: u64, mode: usize, return_pc: u64) -> Option<u64> {
    let vm = v.vm.clone();
    if vm.vcpus.read().unwrap().len() != 1 {
        // Another vCPU could translate what is there before the store arrives.
        return None;
    }
    let (p, slot, gpa) = access::direct(v, address, size, mode).ok()??;
    if slot.flags & LOG_DIRTY != 0 {
        return None;
    }
    let overlaps = vm.cache.lock().unwrap().overlaps(gpa, gpa + size - 1);
    if overlaps {
        let generation = v.generation;
        vm.note_write(Some(&v.shared), gpa, size);
        v.refresh();
        // A change of the memory slots in between took all code along, and with it what `p` was.
        if v.generation != generation || !vm.cache.lock().unwrap().is_valid_at(return_pc) {
            return None;
        }
    }
    Some(p as u64)
}

/// The instruction at `decoded` by the interpreter; `next` is where the block goes on, or 0.
pub unsafe extern "C" fn interpret(cpu: *mut Cpu, decoded: u64, next: u64, _return_pc: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::INTERPRET);
    // SAFETY: owned by the code cache for as long as the calling block exists; copied because running the
    // instruction may flush the cache.
    let (i, bytes) = unsafe {
        let d = &*(decoded as *const Decoded);
        (d.instruction, d.bytes)
    };
    v.cpu.jump = 0;
    v.cpu.rip = i.ip();
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    let (mode, generation) = (v.block_mode, v.generation);
    let result = interp::run_decoded(v, &i, &bytes);
    if next != 0
        && v.cpu.rip == next
        && result == Ok(())
        && v.io.writes.is_empty()
        && v.tpr_access.is_none()
        && v.cpu.shadow == 0
        && Mode::of(&v.cpu) == mode
        && v.generation == generation
    {
        v.cpu.flags_saved = pack_flags(v.cpu.aflags);
        return 0;
    }
    go_on(v, result)
}

/// The instruction at `rip`, which could not be decoded within its page.
pub unsafe extern "C" fn step(cpu: *mut Cpu, rip: u64, _: u64, _: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::STEP);
    v.cpu.rip = rip;
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    let result = interp::step_integer(v);
    go_on(v, result)
}

/// Indirect jump, call or return to `target` that the jump table does not hold.
pub unsafe extern "C" fn indirect(cpu: *mut Cpu, target: u64, _: u64, return_pc: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::INDIRECT);
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    if !mmu::is_canonical(target) {
        let Some(rip) = place(v, return_pc) else { return lost(v) };
        let result = not_taken(v, rip);
        return go_on(v, result);
    }
    v.cpu.rip = target;
    go_on(v, Ok(()))
}

/// What leads to an address that is not canonical faults itself, with the stack as it was (Intel SDM volume 2, JMP, CALL
/// and RET). The block has done it but for the jump: undo that, and let the interpreter find out.
fn not_taken(v: &mut Vcpu, rip: u64) -> Res<()> {
    v.cpu.rip = rip;
    let (i, bytes) = interp::decode(v)?;
    let popped = match i.flow_control() {
        FlowControl::Return if i.op_count() == 1 => 8 + i.immediate16() as u64,
        FlowControl::Return => 8,
        FlowControl::IndirectCall => 8u64.wrapping_neg(),
        _ => 0,
    };
    v.cpu.gpr[RSP] = v.cpu.gpr[RSP].wrapping_sub(popped);
    interp::run_decoded(v, &i, &bytes)
}

/// Something wants attention at the start of the block at `rip`.
pub unsafe extern "C" fn poll(cpu: *mut Cpu, rip: u64, _: u64, _: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::POLL);
    v.cpu.rip = rip;
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    go_on(v, Ok(()))
}

/// A direct jump whose link `id` is not resolved.
pub unsafe extern "C" fn link(cpu: *mut Cpu, id: u64, _: u64, _: u64) -> u64 {
    // SAFETY: called by a thunk.
    let v = unsafe { vcpu(cpu) };
    v.shared.stats.count(counter::LINK);
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
    let Some(link) = v.vm.cache.lock().unwrap().link(id as u32) else {
        return leave_with(v, Exit::InternalError("translated code has a link that nobody made".into()));
    };
    v.cpu.rip = link.target;
    let generation = v.generation;
    match find_block(v) {
        Ok((target, global)) => {
            // A flush in between took the link along.
            if v.generation == generation
                && let Some(host) = v.vm.cache.lock().unwrap().resolve(id as u32, target.block)
            {
                v.cpu.jumps.set_link(id as u32, host, global);
            }
            v.cpu.flags_saved = pack_flags(v.cpu.aflags);
            v.cpu.jump = target.host;
            0
        }
        Err(stop) => go_on(v, Err(stop)),
    }
}

/// The guest's rip where translated code called from `return_pc`.
fn place(v: &Vcpu, return_pc: u64) -> Option<u64> {
    v.vm.cache.lock().unwrap().guest_rip(return_pc).map(|(rip, _)| rip)
}

fn lost(v: &mut Vcpu) -> u64 {
    leave_with(v, Exit::InternalError("translated code lost its place".into()))
}

fn leave_with(v: &mut Vcpu, exit: Exit) -> u64 {
    v.exit = Some(exit);
    leave_for(v, leave::EXIT)
}

fn leave_for(v: &mut Vcpu, reason: u32) -> u64 {
    v.cpu.leave = reason;
    v.cpu.flags_saved = pack_flags(v.cpu.aflags);
    v.cpu.jump = thunks::leave as *const () as u64;
    0
}

/// After an instruction that ended with `result`: continue at the guest's rip, wherever that leads.
fn go_on(v: &mut Vcpu, mut result: Result<(), Stop>) -> u64 {
    loop {
        match result {
            Ok(()) => {}
            Err(Stop::NotInterpreted) => return leave_for(v, leave::CAREFUL),
            Err(Stop::Exit(exit)) => return leave_with(v, exit),
            Err(Stop::Exception(e)) => {
                result = exception::deliver(v, e);
                continue;
            }
        }
        vapic::take(v);
        if let Some(exit) = run::attend(v) {
            return leave_with(v, exit);
        }
        if !run::translatable(v) || v.cpu.shadow != 0 {
            return leave_for(v, leave::MODE);
        }
        match find_entry(v) {
            Ok(host) => {
                // It lasts for one instruction, and matters to breakpoints alone.
                v.cpu.sysflags &= !rflags::RF;
                v.cpu.flags_saved = pack_flags(v.cpu.aflags);
                v.cpu.jump = host;
                return 0;
            }
            Err(stop) => result = Err(stop),
        }
    }
}

/// Host address of the block at rip, entered with flags saved.
pub fn find_entry(v: &mut Vcpu) -> Result<u64, Stop> {
    let mode = Mode::of(&v.cpu);
    let rip = v.cpu.rip;
    if mode != v.block_mode {
        // The jump table is by MMU mode alone: another bit of the mode changed.
        if mode.mmu() == v.block_mode.mmu() || mode.0 >> 2 != v.block_mode.0 >> 2 {
            v.cpu.jumps.clear();
        }
        v.block_mode = mode;
    }
    if let Some(host) = v.cpu.jumps.lookup(mode.mmu(), rip) {
        return Ok(host);
    }
    let (target, global) = find_block(v)?;
    v.cpu.jumps.insert(mode.mmu(), rip, target.host, global);
    Ok(target.host)
}

/// The block at rip, translated if need be, and whether its page is global.
fn find_block(v: &mut Vcpu) -> Result<(Target, bool), Stop> {
    let rip = v.cpu.rip;
    loop {
        let page = mmu::fetch_page(v, rip)?;
        let key = Key { rip, page: page.gpa & !0xfff, mode: Mode::of(&v.cpu) };
        if key.page >= CodePages::LIMIT {
            return Err(Exit::InternalError("code above 1 TiB of guest physical memory".into()).into());
        }
        let vm = v.vm.clone();
        let mut cache = vm.cache.lock().unwrap();
        if let Some(target) = cache.find(&key) {
            return Ok((target, page.global));
        }
        if cache.is_full() {
            drop(cache);
            v.exclusive(|_, stopped| stopped.drop_all_code());
            continue;
        }
        if !vm.code.has(key.page) {
            // From here on stores to the page are seen, by every vCPU, before its code is read.
            drop(cache);
            v.exclusive(|_, stopped| {
                vm.code.set(key.page, true);
                stopped.each_cpu(|cpu| revoke_writes(cpu, |page| page == key.page));
            });
            continue;
        }
        let offset = (rip & 0xfff) as usize;
        let len = (4096 - offset).min(WINDOW_BYTES);
        let mut code = [0u8; WINDOW_BYTES];
        // SAFETY: `fetch_page` gave the host address of a whole page of guest memory, valid while this
        // vCPU runs. The guest may write it meanwhile: then the copy is one of the states it went through,
        // and the write has been noted (`code`) and waits for the lock to invalidate what is made here.
        unsafe { guest::copy(code.as_mut_ptr(), (page.hva as *const u8).add(offset), len) }
            .map_err(|Gone| Exception::memory_fault(page.gpa))?;
        let target = cache.translate(key, &code[..len]);
        return Ok((target, page.global));
    }
}
