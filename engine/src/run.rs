//! KVM_RUN: choose between translated code and the interpreter, attend to interrupts, produce exits.

use crate::cpu::{CS, Exception, Exit, Stop, Vcpu, mp_state, rflags};
use crate::helpers::{find_entry, pack_flags, unpack_flags};
use crate::stats::vcpu as counter;
use crate::vm::request;
use crate::xstate::{AVX512, HEADER};
use crate::{access, debug, exception, interp, pvclock, signal, smm, thunks, vapic};
use std::sync::atomic::Ordering;

/// Why translated code returned from `thunks::enter`.
pub mod leave {
    /// `Vcpu::exit` says it.
    pub const EXIT: u32 = 1;
    /// The next instruction is not for translated code: mode, single step, interrupt shadow.
    pub const MODE: u32 = 2;
    /// The interpreter takes the instruction at rip, x87 and vector state in memory.
    pub const INTERPRET: u32 = 3;
    /// The instruction at rip runs on a copy of its memory operand.
    pub const CAREFUL: u32 = 4;
    /// The careful instruction is done.
    pub const CAREFUL_DONE: u32 = 5;
    /// The host trapped at `Cpu::trap_pc`.
    pub const TRAP: u32 = 6;
}

/// Instructions that the interpreter runs between looks at what else there is.
const INTERPRET_BATCH: u32 = 1000;

pub fn translatable(v: &Vcpu) -> bool {
    v.cpu.long64() && !v.smm && !debug::armed(v) && !v.interpret_only && !access::checks_alignment(&v.cpu)
}

/// Run the vCPU until something leaves for user space.
pub fn run(v: &mut Vcpu) -> Exit {
    signal::install();
    if let Some((gpa, data)) = v.io.writes.pop_front() {
        let exit = mmio_write(gpa, &data);
        count_exit(v, &exit);
        return exit;
    }
    v.vm.clone().start_running(&v.shared);
    v.refresh();
    let exit = run_loop(v);
    v.vm.stop_running(&v.shared);
    count_exit(v, &exit);
    exit
}

fn count_exit(v: &Vcpu, exit: &Exit) {
    // Neither is an exit to who called KVM_RUN.
    if matches!(exit, Exit::Signals | Exit::Extint) {
        return;
    }
    v.shared.stats.count(counter::EXITS);
    v.shared.stats.count(match exit {
        Exit::Io { .. } => counter::IO_EXITS,
        Exit::Mmio { .. } => counter::MMIO_EXITS,
        Exit::Hlt => counter::HALT_EXITS,
        Exit::IrqWindowOpen => counter::IRQ_WINDOW_EXITS,
        Exit::IoapicEoi(_) => counter::EOI_EXITS,
        Exit::Debug { .. } => counter::DEBUG_EXITS,
        Exit::Shutdown => counter::SHUTDOWN_EXITS,
        Exit::InternalError(_) => counter::ERROR_EXITS,
        // The kernel has no counter for them either.
        Exit::Msr { .. } => return,
        Exit::DirtyRingFull => counter::RING_FULL_EXITS,
        Exit::MemoryFault { .. } | Exit::TprAccess(_) | Exit::VmDead => return,
        Exit::Intr | Exit::Signals | Exit::Extint => counter::SIGNAL_EXITS,
    });
}

/// Handle what other threads asked for, device writes of the last instruction, HLT and interrupts: `Some`
/// if KVM_RUN must return.
pub fn attend(v: &mut Vcpu) -> Option<Exit> {
    if let Some((gpa, data)) = v.io.writes.pop_front() {
        return Some(mmio_write(gpa, &data));
    }
    if let Some(access) = v.tpr_access.take() {
        return Some(Exit::TprAccess(access));
    }
    if let Some(vector) = v.eois.pop() {
        return Some(Exit::IoapicEoi(vector));
    }
    loop {
        let idle = v.halted || v.mp_state != mp_state::RUNNABLE;
        if !v.cpu.polled() && !idle {
            return None;
        }
        v.cpu.poll.store(0, Ordering::SeqCst);
        let requests = v.shared.bell.take();
        if let Some(exit) = handle(v, requests) {
            return Some(exit);
        }
        if v.mp_state == mp_state::RUNNABLE
            && let Some(exit) = inject(v)
        {
            return Some(exit);
        }
        vapic::show(v);
        if !v.halted && v.mp_state == mp_state::RUNNABLE {
            return None;
        }
        if v.shared.lapic.is_none() {
            v.halted = false;
            return Some(Exit::Hlt);
        }
        let vm = v.vm.clone();
        vm.stop_running(&v.shared);
        v.shared.wait();
        vm.start_running(&v.shared);
        v.refresh();
    }
}

/// Requests from other threads.
fn handle(v: &mut Vcpu, requests: u32) -> Option<Exit> {
    if requests & request::SAFEPOINT != 0 {
        let vm = v.vm.clone();
        vm.stop_running(&v.shared);
        vm.start_running(&v.shared);
        v.refresh();
    }
    // What an exit leaves undone waits for the next KVM_RUN.
    let leave = |done: u32, exit: Exit| {
        v.shared.bell.put_back(requests & !(done | request::SAFEPOINT));
        v.cpu.look_again();
        Some(exit)
    };
    if v.vm.is_dead() {
        return Some(Exit::VmDead);
    }
    if requests & request::EXIT != 0 {
        return leave(request::EXIT, Exit::Intr);
    }
    if requests & request::SIGNALS != 0 && v.shared.looks_for_signals.load(Ordering::Relaxed) {
        return leave(request::SIGNALS, Exit::Signals);
    }
    if requests & request::RING_FULL != 0 && v.shared.ring.as_ref().is_some_and(|r| r.lock().unwrap().is_soft_full()) {
        // Asked again until it has room.
        return leave(0, Exit::DirtyRingFull);
    }
    if requests & request::CLOCK != 0 {
        pvclock::update(v);
    }
    accept(v, requests);
    None
}

/// NMI, SMI, INIT and SIPI become state, so that reading the state does not miss them.
pub fn accept_events(v: &mut Vcpu) {
    let events = request::NMI | request::SMI | request::INIT | request::SIPI;
    let requests = v.shared.bell.take_some(events);
    accept(v, requests);
    v.cpu.look_again();
}

fn accept(v: &mut Vcpu, requests: u32) {
    if requests & request::NMI != 0 {
        v.nmi_pending = true;
    }
    if requests & request::SMI != 0 {
        v.smi_pending = true;
    }
    if v.smm {
        // INIT waits, SIPI gets lost.
        v.init_latched |= requests & request::INIT != 0;
        return;
    }
    if requests & request::INIT != 0 {
        v.init();
        if let Some(lapic) = &v.shared.lapic {
            lapic.state.lock().unwrap().reset();
        }
        let boot = v.cpu.msr.apic_base & crate::lapic::BASE_BSP != 0;
        v.mp_state = if boot { mp_state::RUNNABLE } else { mp_state::INIT_RECEIVED };
    }
    if requests & request::SIPI != 0 && v.mp_state == mp_state::INIT_RECEIVED {
        let vector = v.shared.lapic.as_ref().map_or(0, |l| l.state.lock().unwrap().sipi_vector);
        v.cpu.segs[CS].sel = (vector as u16) << 8;
        v.cpu.segs[CS].base = (vector as u64) << 12;
        v.cpu.rip = 0;
        v.mp_state = mp_state::RUNNABLE;
    }
}

/// Deliver an NMI or interrupt if one is pending and allowed.
fn inject(v: &mut Vcpu) -> Option<Exit> {
    let delivered = |v: &mut Vcpu, vector: u8| {
        v.halted = false;
        v.shared.stats.count(if vector == 2 { counter::NMI_INJECTIONS } else { counter::IRQ_INJECTIONS });
        match exception::deliver_interrupt(v, vector) {
            Err(Stop::Exit(exit)) => Some(exit),
            _ => None,
        }
    };
    if std::mem::take(&mut v.triple_fault) {
        return Some(Exit::Shutdown);
    }
    if let Some(e) = v.injected.take()
        && let Err(Stop::Exit(exit)) = exception::deliver(v, e)
    {
        return Some(exit);
    }
    if v.smi_pending && !v.smm && v.debug.control & debug::guestdbg::BLOCKIRQ == 0 {
        v.smi_pending = false;
        v.smi_count += 1;
        if let Err(exit) = smm::enter(v) {
            return Some(exit);
        }
    }
    if v.cpu.shadow != 0 || v.debug.control & debug::guestdbg::BLOCKIRQ != 0 {
        // Not before the next instruction.
        v.cpu.look_again();
        return None;
    }
    if v.nmi_pending && !v.nmi_masked {
        (v.nmi_pending, v.nmi_masked) = (false, true);
        return delivered(v, 2);
    }
    // Through LINT0 come the PIC's interrupts, and user space's.
    let (pending, lint0, extint) = match &v.shared.lapic {
        Some(lapic) => {
            let s = lapic.state.lock().unwrap();
            (s.pending(), s.accepts_extint(), s.extint)
        }
        None => (None, true, false),
    };
    let extint = extint && lint0;
    let waits = pending.is_some() || lint0 && (v.user_irq.is_some() || extint || v.window_requested);
    if v.cpu.iflag == 0 || !waits {
        v.cpu.irq_waiting = waits as u8;
        return None;
    }
    // Others may follow as soon as the handler sets IF again.
    v.cpu.irq_waiting = 1;
    if lint0 && let Some(vector) = v.user_irq.take() {
        return delivered(v, vector);
    }
    if extint {
        return Some(Exit::Extint);
    }
    if let Some(vector) = pending {
        let shared = v.shared.clone();
        let mut s = shared.lapic.as_ref().expect("it had a vector").state.lock().unwrap();
        s.acknowledge(vector);
        drop(s);
        return delivered(v, vector);
    }
    Some(Exit::IrqWindowOpen)
}

pub fn mmio_write(gpa: u64, bytes: &[u8]) -> Exit {
    let mut data = [0; 8];
    data[..bytes.len()].copy_from_slice(bytes);
    Exit::Mmio { gpa, len: bytes.len() as u8, write: true, data }
}

/// Finish the instruction whose device access user space has just answered, and run nothing else.
pub fn complete(v: &mut Vcpu) {
    if v.io.done.is_empty() {
        return;
    }
    signal::install();
    v.vm.clone().start_running(&v.shared);
    v.refresh();
    match interp::step(v) {
        // Should it want another access, it starts again at the next KVM_RUN.
        Err(Stop::Exit(_)) => v.io.waiting = None,
        Err(Stop::Exception(e)) => {
            v.io.done.clear();
            v.injected = Some(e);
            v.cpu.look_again();
        }
        Ok(()) | Err(Stop::NotInterpreted) => {}
    }
    v.vm.stop_running(&v.shared);
}

fn run_loop(v: &mut Vcpu) -> Exit {
    // What user space has just answered is used before an interrupt can come between.
    let mut answered = !v.io.done.is_empty();
    loop {
        if !answered && let Some(exit) = attend(v) {
            return exit;
        }
        let result = if std::mem::take(&mut answered) {
            interp::step(v)
        } else if translatable(v) && v.cpu.shadow == 0 {
            translated(v)
        } else if v.cpu.shadow != 0 || v.cpu.long64() {
            interp::step(v)
        } else {
            interp::run(v, INTERPRET_BATCH)
        };
        vapic::take(v);
        match result {
            Ok(()) => {}
            Err(Stop::Exit(exit)) => return exit,
            Err(Stop::Exception(e)) => match exception::deliver(v, e) {
                Ok(()) => {
                    if let Some(exit) = debug::stepped_into_handler(v) {
                        return exit;
                    }
                }
                Err(Stop::Exit(exit)) => return exit,
                Err(other) => return Exit::InternalError(format!("{other:?} while delivering {e:?}")),
            },
            Err(Stop::NotInterpreted) => {
                return Exit::InternalError(format!("no part of the engine runs the code at {:#x}", v.cpu.rip));
            }
        }
    }
}

/// Run translated code until it leaves.
fn translated(v: &mut Vcpu) -> Result<(), Stop> {
    let entry = find_entry(v)?;
    // It lasts for one instruction, and matters to breakpoints alone.
    v.cpu.sysflags &= !rflags::RF;
    v.shared.stats.count(counter::ENTRIES);
    enter(v, entry);
    match v.cpu.leave {
        leave::EXIT => Err(Stop::Exit(v.exit.take().unwrap_or(Exit::Intr))),
        leave::MODE => Ok(()),
        leave::INTERPRET | leave::CAREFUL => interp::step(v),
        leave::TRAP => trap(v),
        other => Err(Stop::Exit(Exit::InternalError(format!("translated code left for reason {other}")))),
    }
}

pub fn enter(v: &mut Vcpu, entry: u64) {
    v.cpu.flags_saved = pack_flags(v.cpu.aflags);
    // What XRSTOR refuses must not be there, whoever wrote it.
    v.cpu.fpu.sanitize();
    v.cpu.avx512 = if v.cpu.fpu.0[HEADER] as u64 & AVX512 != 0 { AVX512 } else { 0 };
    let cpu = v.cpu.as_ptr();
    v.cpu.vcpu = v;
    signal::inside(cpu, || {
        // SAFETY: `entry` comes from the live code cache and this vCPU is running. Helpers reach it by `vcpu` alone meanwhile.
        unsafe { thunks::enter(cpu, entry) }
    });
    v.cpu.aflags = unpack_flags(v.cpu.flags_saved);
}

/// The host trapped in translated code: the guest's exception.
fn trap(v: &mut Vcpu) -> Result<(), Stop> {
    let place = v.vm.cache.lock().unwrap().guest_rip(v.cpu.trap_pc);
    if let Some((rip, saved)) = place {
        v.cpu.rip = rip;
        if !saved {
            v.cpu.aflags = v.cpu.trap_flags & rflags::ARITH;
        }
    }
    Err(trap_exception(v))
}

pub fn trap_exception(v: &Vcpu) -> Stop {
    if v.cpu.trap_number == 14
        && let Some(gpa) = v.slots.page_at(v.cpu.trap_address)
    {
        return Exit::MemoryFault { gpa, private: false }.into();
    }
    match v.cpu.trap_number {
        0 => Exception::new(0).into(),
        6 => Exception::ud().into(),
        13 => Exception::gp(0).into(),
        16 => Exception::new(16).into(),
        19 => Exception::new(19).into(),
        n => Exit::InternalError(format!(
            "host trap {n} (error {:#x}) in translated code for rip {:#x}",
            v.cpu.trap_error, v.cpu.rip
        ))
        .into(),
    }
}
