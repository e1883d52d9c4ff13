//! The local APIC (Intel SDM volume 3, chapter 11): the part that runs per interrupt, without the GIL.
//!
//! `kvmkit/kvm/soft/x86/lapic.py` explains the chip to a reader. The state is in registers as the xAPIC page
//! lays them out, one 32-bit register every 16 bytes, which is also `kvm_lapic_state`. The timer counts at
//! 1 GHz before the divider, as KVM's does.

use crate::cpu::{Res, TprAccess, Vcpu};
use crate::pvclock::monotonic_ns;
use crate::sys;
use crate::timer;
use crate::vapic;
use crate::vm::{VcpuShared, Vm, request};
use std::sync::Mutex;

pub mod reg {
    pub const ID: usize = 0x20;
    pub const VERSION: usize = 0x30;
    pub const TPR: usize = 0x80;
    pub const APR: usize = 0x90;
    pub const PPR: usize = 0xa0;
    pub const EOI: usize = 0xb0;
    pub const LDR: usize = 0xd0;
    pub const DFR: usize = 0xe0;
    pub const SVR: usize = 0xf0;
    pub const ISR: usize = 0x100;
    pub const TMR: usize = 0x180;
    pub const IRR: usize = 0x200;
    pub const ESR: usize = 0x280;
    pub const CMCI: usize = 0x2f0;
    pub const ICR: usize = 0x300;
    pub const ICR2: usize = 0x310;
    pub const LVT_TIMER: usize = 0x320;
    pub const LVT_LINT0: usize = 0x350;
    pub const LVT_LINT1: usize = 0x360;
    pub const LVT_ERROR: usize = 0x370;
    pub const INITIAL_COUNT: usize = 0x380;
    pub const CURRENT_COUNT: usize = 0x390;
    pub const DIVIDE: usize = 0x3e0;
    pub const SELF_IPI: usize = 0x3f0;
}

pub const BASE_ENABLE: u64 = 1 << 11;
pub const BASE_X2APIC: u64 = 1 << 10;
pub const BASE_BSP: u64 = 1 << 8;
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

const MASKED: u32 = 1 << 16;
/// Bits of the x2APIC's ICR whose being set raises #GP.
const ICR_RESERVED: u32 = 0xfff3_2000;
const SVR_ENABLE: u32 = 1 << 8;

/// Delivery modes of ICR, LVT and MSI.
pub mod delivery {
    pub const FIXED: u8 = 0;
    pub const LOWEST: u8 = 1;
    pub const SMI: u8 = 2;
    pub const NMI: u8 = 4;
    pub const INIT: u8 = 5;
    pub const SIPI: u8 = 6;
    pub const EXTINT: u8 = 7;
}

/// An interrupt message on its way to some local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub destination: u32,
    pub logical: bool,
    pub mode: u8,
    pub vector: u8,
    pub level: bool,
    /// The destination has 32 bits (x2APIC format).
    pub wide: bool,
}

pub struct State {
    pub regs: [u32; 64],
    /// IA32_APIC_BASE, kept here for those who deliver from other threads.
    pub base: u64,
    pub x2apic_id: u32,
    pub sipi_vector: u8,
    /// The PIC's INTR line, for ExtINT through LINT0.
    pub extint: bool,
    /// CLOCK_MONOTONIC_RAW nanoseconds at which the timer will next expire; 0: it is stopped.
    expires_ns: u64,
    deadline_tsc: u64,
}

pub struct Lapic {
    pub state: Mutex<State>,
}

impl State {
    fn get(&self, offset: usize) -> u32 {
        self.regs[offset >> 4]
    }
    fn set(&mut self, offset: usize, value: u32) {
        self.regs[offset >> 4] = value;
    }
    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }
    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    fn software_enabled(&self) -> bool {
        self.get(reg::SVR) & SVR_ENABLE != 0
    }
    fn bit(base: usize, vector: u8) -> (usize, u32) {
        (base + (vector as usize >> 5 << 4), 1 << (vector & 31))
    }
    fn set_bit(&mut self, base: usize, vector: u8, on: bool) {
        let (r, bit) = Self::bit(base, vector);
        let value = self.get(r);
        self.set(r, if on { value | bit } else { value & !bit });
    }
    fn has_bit(&self, base: usize, vector: u8) -> bool {
        let (r, bit) = Self::bit(base, vector);
        self.get(r) & bit != 0
    }
    /// TPR, and the highest vectors in service and requested (0: none).
    pub fn priorities(&self) -> (u8, u8, u8) {
        let highest = |base| self.highest(base).unwrap_or(0);
        (self.get(reg::TPR) as u8, highest(reg::ISR), highest(reg::IRR))
    }
    /// Set TPR; was it another?
    pub fn set_tpr(&mut self, value: u8) -> bool {
        let changed = self.get(reg::TPR) != value as u32;
        self.set(reg::TPR, value as u32);
        changed
    }
    fn highest(&self, base: usize) -> Option<u8> {
        (0..8).rev().find_map(|n| {
            let word = self.get(base + n * 16);
            (word != 0).then(|| (n * 32) as u8 + 31 - word.leading_zeros() as u8)
        })
    }
    fn ppr(&self) -> u8 {
        let tpr = self.get(reg::TPR) as u8;
        let isr = self.highest(reg::ISR).unwrap_or(0);
        if tpr >> 4 >= isr >> 4 { tpr } else { isr & 0xf0 }
    }
    /// The vector to deliver next, if its priority allows.
    pub fn pending(&self) -> Option<u8> {
        if !self.enabled() || !self.software_enabled() {
            return None;
        }
        self.highest(reg::IRR).filter(|v| v >> 4 > self.ppr() >> 4)
    }
    /// Is the PIC's INTR accepted through LINT0 (or because the APIC is off)?
    pub fn accepts_extint(&self) -> bool {
        if !self.enabled() {
            return true;
        }
        let lvt = self.get(reg::LVT_LINT0);
        lvt & MASKED == 0 && (lvt >> 8 & 7) as u8 == delivery::EXTINT
    }
    /// Take `vector` from IRR to ISR.
    pub fn acknowledge(&mut self, vector: u8) {
        self.set_bit(reg::IRR, vector, false);
        self.set_bit(reg::ISR, vector, true);
    }
    fn request(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            let esr = self.get(reg::ESR);
            self.set(reg::ESR, esr | 1 << 6);
            return;
        }
        self.set_bit(reg::IRR, vector, true);
        self.set_bit(reg::TMR, vector, level);
    }
    /// The vector that ended, and whether its level-triggered source must be told.
    fn eoi(&mut self) -> Option<(u8, bool)> {
        let vector = self.highest(reg::ISR)?;
        self.set_bit(reg::ISR, vector, false);
        Some((vector, self.has_bit(reg::TMR, vector) && self.get(reg::SVR) & 1 << 12 == 0))
    }
    fn divider(&self) -> u64 {
        let d = self.get(reg::DIVIDE);
        let code = d & 3 | d >> 1 & 4;
        1 << ((code + 1) & 7)
    }
    /// 0 one-shot, 1 periodic, 2 TSC deadline.
    fn timer_mode(&self) -> u32 {
        self.get(reg::LVT_TIMER) >> 17 & 3
    }
    fn period_ns(&self) -> u64 {
        let period = self.get(reg::INITIAL_COUNT) as u64 * self.divider();
        if period != 0 && self.timer_mode() == 1 { period.max(timer::MIN_PERIOD_NS) } else { period }
    }
    fn current_count(&self, now: u64) -> u32 {
        if self.expires_ns == 0 || self.timer_mode() == 2 {
            return 0;
        }
        let mut left = self.expires_ns.saturating_sub(now);
        if left == 0 && self.timer_mode() == 1 {
            // The timer thread will start the next period, which has begun.
            let period = self.period_ns().max(1);
            left = period - (now - self.expires_ns) % period;
        }
        (left / self.divider()) as u32
    }
    fn matches(&self, m: &Message, apic_id: u32) -> bool {
        if !m.logical {
            return if m.wide { m.destination == u32::MAX } else { m.destination == 0xff } || m.destination == apic_id;
        }
        if self.x2apic() {
            let ldr = Self::x2apic_ldr(self.x2apic_id);
            if m.destination == u32::MAX || (!m.wide && m.destination == 0xff) {
                return true;
            }
            // An 8-bit logical destination addresses cluster 0.
            return m.destination >> 16 == ldr >> 16 && m.destination & ldr & 0xffff != 0;
        }
        let ldr = self.get(reg::LDR) >> 24;
        if m.destination == 0xff {
            return true;
        }
        if self.get(reg::DFR) >> 28 == 0xf {
            m.destination & ldr != 0
        } else {
            m.destination >> 4 == ldr >> 4 && m.destination & ldr & 0xf != 0
        }
    }
    fn x2apic_ldr(id: u32) -> u32 {
        id >> 4 << 16 | 1 << (id & 15)
    }
    pub fn id(&self) -> u32 {
        if self.x2apic() { self.x2apic_id } else { self.get(reg::ID) >> 24 }
    }
    /// Power-up and INIT state; the ID stays.
    pub fn reset(&mut self) {
        self.regs = [0; 64];
        self.set(reg::ID, self.x2apic_id << 24);
        self.set(reg::VERSION, 5 << 16 | 0x14);
        self.set(reg::DFR, u32::MAX);
        self.set(reg::SVR, 0xff);
        for lvt in (reg::LVT_TIMER..=reg::LVT_ERROR).step_by(16).chain([reg::CMCI]) {
            self.set(lvt, MASKED);
        }
        if self.base & BASE_BSP != 0 {
            // As KVM does: without firmware nobody else lets the PIC through.
            self.set(reg::LVT_LINT0, (delivery::EXTINT as u32) << 8);
        }
        (self.expires_ns, self.deadline_tsc) = (0, 0);
    }
}

impl Lapic {
    pub fn new(id: u32, boot: bool) -> Self {
        let mut state = State {
            regs: [0; 64],
            base: DEFAULT_BASE | BASE_ENABLE | if boot { BASE_BSP } else { 0 },
            x2apic_id: id,
            sipi_vector: 0,
            extint: false,
            expires_ns: 0,
            deadline_tsc: 0,
        };
        state.reset();
        Self { state: Mutex::new(state) }
    }

    /// The vCPU's timer expired: returns the next expiry of a periodic one.
    pub fn timer_fired(&self, shared: &VcpuShared, now: u64) -> Option<u64> {
        let mut s = self.state.lock().unwrap();
        if s.expires_ns == 0 || now < s.expires_ns {
            return (s.expires_ns != 0).then_some(s.expires_ns);
        }
        let lvt = s.get(reg::LVT_TIMER);
        if lvt & MASKED == 0 && s.software_enabled() {
            s.request(lvt as u8, false);
            shared.request(request::INTERRUPT);
        }
        let period = s.period_ns();
        if s.timer_mode() == 1 && period != 0 {
            // Ticks that a busy host missed are dropped.
            let missed = (now - s.expires_ns) / period;
            s.expires_ns += (missed + 1) * period;
            return Some(s.expires_ns);
        }
        (s.expires_ns, s.deadline_tsc) = (0, 0);
        None
    }
}

/// Deliver `m` to every local APIC that it addresses; how many took it.
pub fn deliver(vm: &Vm, m: Message, except: Option<u32>) -> u32 {
    let vcpus = vm.vcpus.read().unwrap();
    let mut taken = 0;
    let mut lowest: Option<(u8, &VcpuShared)> = None;
    for v in vcpus.iter() {
        let Some(lapic) = &v.lapic else { continue };
        if except == Some(v.id) {
            continue;
        }
        let mut s = lapic.state.lock().unwrap();
        if !s.enabled() || !s.matches(&m, s.id()) {
            continue;
        }
        if m.mode == delivery::LOWEST {
            let priority = s.ppr();
            if s.software_enabled() && lowest.is_none_or(|(p, _)| priority < p) {
                lowest = Some((priority, v));
            }
            continue;
        }
        taken += accept(&mut s, v, &m);
    }
    if let Some((_, v)) = lowest {
        let mut s = v.lapic.as_ref().unwrap().state.lock().unwrap();
        taken += accept(&mut s, v, &Message { mode: delivery::FIXED, ..m });
    }
    taken
}

fn accept(s: &mut State, v: &VcpuShared, m: &Message) -> u32 {
    let bits = match m.mode {
        delivery::FIXED => {
            if !s.software_enabled() {
                return 0;
            }
            s.request(m.vector, m.level);
            request::INTERRUPT
        }
        delivery::NMI => request::NMI,
        delivery::SMI => request::SMI,
        delivery::INIT => request::INIT,
        delivery::SIPI => {
            s.sipi_vector = m.vector;
            request::SIPI
        }
        _ => return 0,
    };
    v.request(bits);
    1
}

/// Whether a local APIC has `vector` requested or in service.
pub fn waits(vm: &Vm, vector: u8) -> bool {
    vm.vcpus.read().unwrap().iter().filter_map(|v| v.lapic.as_ref()).any(|lapic| {
        let s = lapic.state.lock().unwrap();
        s.has_bit(reg::IRR, vector) || s.has_bit(reg::ISR, vector)
    })
}

/// A message-signalled interrupt: a write of `data` to `address`. With the redirection hint it is for one of those
/// that it addresses. The destination has 8 bits: KVM looks at the address's upper half under KVM_CAP_X2APIC_API alone.
pub fn message(address: u64, data: u32) -> Message {
    let (mode, hint) = ((data >> 8 & 7) as u8, address & 8 != 0);
    Message {
        destination: (address >> 12 & 0xff) as u32,
        logical: address & 4 != 0,
        mode: if hint && mode == delivery::FIXED { delivery::LOWEST } else { mode },
        vector: data as u8,
        level: data & 1 << 15 != 0,
        wide: false,
    }
}

impl Vcpu {
    pub fn is_lapic(&self, gpa: u64) -> bool {
        let base = self.cpu.msr.apic_base;
        base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE
            && gpa & !0xfff == base & !0xfff
            && self.shared.lapic.is_some()
    }

    /// Read from the xAPIC page.
    pub fn lapic_read(&mut self, gpa: u64, to: &mut [u8]) -> Res<()> {
        let offset = gpa as usize & 0xfff;
        let word = self.lapic_register(offset & !0xf).unwrap_or(0);
        let shift = offset & 0xf;
        // Only the first four of each 16 bytes are implemented.
        for (n, b) in to.iter_mut().enumerate() {
            *b = word.to_le_bytes().get(shift + n).copied().unwrap_or(0);
        }
        Ok(())
    }

    /// Write to the xAPIC page: 32-bit, aligned; anything else is ignored.
    pub fn lapic_write(&mut self, gpa: u64, from: &[u8]) -> Res<()> {
        let offset = gpa as usize & 0xfff;
        if from.len() == 4 && offset & 0xf == 0 {
            let value = u32::from_le_bytes(from.try_into().unwrap());
            self.set_lapic_register(offset, value, None);
        }
        Ok(())
    }

    /// KVM_TPR_ACCESS_REPORTING.
    fn report_tpr(&mut self, write: bool) {
        if self.reports_tpr {
            self.tpr_access = Some(TprAccess { rip: self.cpu.rip, write });
            self.reconsider();
        }
    }

    fn lapic_register(&mut self, offset: usize) -> Option<u32> {
        if offset == reg::TPR {
            self.report_tpr(false);
        }
        let s = self.shared.lapic.as_ref()?.state.lock().unwrap();
        Some(match offset {
            reg::PPR => s.ppr() as u32,
            reg::CURRENT_COUNT => s.current_count(monotonic_ns()),
            reg::ID if s.x2apic() => s.x2apic_id,
            reg::LDR if s.x2apic() => State::x2apic_ldr(s.x2apic_id),
            reg::APR | reg::EOI | 0xc0 => 0,
            o if o < 0x400 => s.get(o),
            _ => return None,
        })
    }

    /// `high`: the destination of a 64-bit ICR write in x2APIC mode.
    fn set_lapic_register(&mut self, offset: usize, value: u32, high: Option<u32>) -> bool {
        let shared = self.shared.clone();
        let Some(lapic) = &shared.lapic else { return false };
        let mut s = lapic.state.lock().unwrap();
        match offset {
            reg::ID if !s.x2apic() => s.set(offset, value & 0xff00_0000),
            reg::TPR => {
                s.set(offset, value & 0xff);
                drop(s);
                self.report_tpr(true);
                vapic::show(self);
                self.reconsider();
            }
            reg::EOI => {
                let ended = s.eoi();
                drop(s);
                if let Some((vector, told)) = ended {
                    if told {
                        self.eois.push(vector);
                    }
                    self.vm.pit_ended(vector);
                }
                self.reconsider();
            }
            reg::LDR if !s.x2apic() => s.set(offset, value & 0xff00_0000),
            reg::DFR if !s.x2apic() => s.set(offset, value | 0x0fff_ffff),
            reg::SVR => {
                s.set(offset, value & 0x1ff);
                if value & SVR_ENABLE == 0 {
                    for lvt in (reg::LVT_TIMER..=reg::LVT_ERROR).step_by(16) {
                        let old = s.get(lvt);
                        s.set(lvt, old | MASKED);
                    }
                }
                drop(s);
                self.reconsider();
            }
            reg::ESR => s.set(offset, 0),
            reg::ICR2 => s.set(offset, value & 0xff00_0000),
            reg::ICR => {
                s.set(offset, value & !(1 << 12));
                let x2 = s.x2apic();
                if let Some(high) = high {
                    s.set(reg::ICR2, high);
                }
                let destination = if x2 { s.get(reg::ICR2) } else { s.get(reg::ICR2) >> 24 };
                drop(s);
                self.send_ipi(value, destination, x2);
            }
            reg::LVT_TIMER => {
                let old = s.timer_mode();
                let off = if s.software_enabled() { 0 } else { MASKED };
                s.set(offset, value & (0xff | MASKED | 3 << 17) | off);
                if old != s.timer_mode() && (old == 2 || s.timer_mode() == 2) {
                    (s.expires_ns, s.deadline_tsc) = (0, 0);
                    s.set(reg::INITIAL_COUNT, 0);
                    self.vm.timers.cancel(timer_key(shared.id));
                }
            }
            reg::CMCI | 0x330..=0x370 => {
                let off = if s.software_enabled() { 0 } else { MASKED };
                s.set(offset, value & 0x1_f7ff | off);
                drop(s);
                self.reconsider();
            }
            reg::INITIAL_COUNT => {
                if s.timer_mode() == 2 {
                    return true;
                }
                s.set(offset, value);
                self.start_timer(&mut s, None);
            }
            reg::DIVIDE => {
                s.set(offset, value & 0xb);
                if s.expires_ns != 0 && s.timer_mode() != 2 {
                    self.start_timer(&mut s, None);
                }
            }
            reg::SELF_IPI if s.x2apic() => {
                s.request(value as u8, false);
                drop(s);
                self.shared.request(request::INTERRUPT);
            }
            _ => return false,
        }
        true
    }

    /// `left_ns`: until it expires for the first time, if not a whole period.
    fn start_timer(&self, s: &mut State, left_ns: Option<u64>) {
        let period = s.period_ns();
        let key = timer_key(self.shared.id);
        if period == 0 {
            s.expires_ns = 0;
            self.vm.timers.cancel(key);
            return;
        }
        s.expires_ns = monotonic_ns() + left_ns.unwrap_or(period).min(period);
        self.vm.timers.arm(&self.vm, key, s.expires_ns);
    }

    fn send_ipi(&mut self, icr: u32, destination: u32, wide: bool) {
        let mode = (icr >> 8 & 7) as u8;
        let mut m = Message { destination, logical: icr & 1 << 11 != 0, mode, vector: icr as u8, level: false, wide };
        // INIT level de-assert does nothing on current processors.
        if mode == delivery::INIT && icr & (1 << 15) != 0 && icr & (1 << 14) == 0 {
            return;
        }
        let everyone = if wide { u32::MAX } else { 0xff };
        match icr >> 18 & 3 {
            1 => {
                let id = self.shared.lapic.as_ref().map_or(0, |l| l.state.lock().unwrap().id());
                (m.destination, m.logical) = (id, false);
                deliver(&self.vm, m, None);
            }
            2 => {
                (m.destination, m.logical) = (everyone, false);
                deliver(&self.vm, m, None);
            }
            3 => {
                (m.destination, m.logical) = (everyone, false);
                deliver(&self.vm, m, Some(self.shared.id));
            }
            _ => {
                deliver(&self.vm, m, None);
            }
        }
    }

    /// A vector may have become deliverable by this vCPU's own doing.
    fn reconsider(&mut self) {
        self.cpu.look_again();
    }

    pub fn lapic_msr_read(&mut self, index: u32) -> Option<u64> {
        if index == 0x6e0 {
            let mut s = self.shared.lapic.as_ref()?.state.lock().unwrap();
            if s.expires_ns != 0 && monotonic_ns() >= s.expires_ns {
                s.deadline_tsc = 0;
            }
            return Some(if s.timer_mode() == 2 { s.deadline_tsc } else { 0 });
        }
        if self.cpu.msr.apic_base & BASE_X2APIC == 0 {
            return None;
        }
        let offset = (index as usize & 0xff) << 4;
        match offset {
            reg::ICR => {
                let s = self.shared.lapic.as_ref()?.state.lock().unwrap();
                Some(s.get(reg::ICR) as u64 | (s.get(reg::ICR2) as u64) << 32)
            }
            reg::DFR | reg::ICR2 | reg::EOI | reg::SELF_IPI | reg::APR => None,
            0x20 | 0x30 | 0x80 | 0xa0 | 0xd0 | 0xf0 | 0x100..=0x280 | 0x2f0 | 0x320..=0x390 | 0x3e0 => {
                self.lapic_register(offset).map(u64::from)
            }
            _ => None,
        }
    }

    pub fn lapic_msr_write(&mut self, index: u32, value: u64) -> Option<()> {
        if index == 0x6e0 {
            self.set_tsc_deadline(value);
            return Some(());
        }
        if self.cpu.msr.apic_base & BASE_X2APIC == 0 {
            return None;
        }
        let offset = (index as usize & 0xff) << 4;
        if offset == reg::ICR {
            (value as u32 & ICR_RESERVED == 0).then_some(())?;
            self.set_lapic_register(offset, value as u32, Some((value >> 32) as u32));
            return Some(());
        }
        let reserved = match offset {
            reg::EOI | reg::ESR => u64::MAX,
            reg::SELF_IPI => !0xff,
            _ => !0xffff_ffff,
        };
        (value & reserved == 0).then_some(())?;
        self.set_lapic_register(offset, value as u32, None).then_some(())
    }

    fn set_tsc_deadline(&mut self, deadline: u64) {
        let Some(lapic) = &self.shared.lapic else { return };
        let mut s = lapic.state.lock().unwrap();
        if s.timer_mode() != 2 {
            return;
        }
        s.deadline_tsc = deadline;
        self.arm_deadline(&mut s);
    }

    fn arm_deadline(&self, s: &mut State) {
        let key = timer_key(self.shared.id);
        if s.deadline_tsc == 0 {
            s.expires_ns = 0;
            self.vm.timers.cancel(key);
            return;
        }
        let ticks = s.deadline_tsc.saturating_sub(sys::tsc(&self.cpu));
        let ns = ticks as u128 * 1_000_000 / sys::guest_tsc_khz(self).max(1) as u128;
        s.expires_ns = monotonic_ns().saturating_add(ns.min(1 << 62) as u64).max(1);
        self.vm.timers.arm(&self.vm, key, s.expires_ns);
    }

    /// The guest's TSC was set: a TSC deadline moves with it.
    pub fn lapic_tsc_changed(&mut self) {
        if let Some(lapic) = &self.shared.lapic {
            let mut s = lapic.state.lock().unwrap();
            if s.timer_mode() == 2 && s.deadline_tsc != 0 {
                self.arm_deadline(&mut s);
            }
        }
    }

    /// IA32_APIC_BASE; `None` for a transition that raises #GP.
    pub fn write_apic_base(&mut self, value: u64, host: bool) -> Option<()> {
        let old = self.cpu.msr.apic_base;
        let known = BASE_ENABLE | BASE_X2APIC | BASE_BSP | ((1 << crate::mmu::PHYSICAL_BITS) - 1) & !0xfff;
        (value & !known == 0).then_some(())?;
        let state = |v: u64| v & (BASE_ENABLE | BASE_X2APIC);
        if !host {
            let allowed = match (state(old), state(value)) {
                (a, b) if a == b => true,
                (0, BASE_ENABLE) | (BASE_ENABLE, 0) => true,
                (BASE_ENABLE, b) => b == BASE_ENABLE | BASE_X2APIC,
                (a, 0) => a == BASE_ENABLE | BASE_X2APIC,
                _ => false,
            };
            allowed.then_some(())?;
        }
        (state(value) != BASE_X2APIC).then_some(())?;
        self.cpu.msr.apic_base = value;
        if let Some(lapic) = &self.shared.lapic {
            let mut s = lapic.state.lock().unwrap();
            s.base = value;
            if state(old) & BASE_ENABLE != 0 && state(value) == 0 {
                let id = s.x2apic_id;
                s.reset();
                s.set(reg::ID, id << 24);
            }
        }
        Some(())
    }

    pub fn cr8(&self) -> u64 {
        self.shared.lapic.as_ref().map_or(self.cr8_value, |l| l.state.lock().unwrap().get(reg::TPR) as u64 >> 4)
    }

    pub fn set_cr8(&mut self, value: u64) {
        self.cr8_value = value;
        if let Some(lapic) = &self.shared.lapic {
            lapic.state.lock().unwrap().set(reg::TPR, (value as u32) << 4);
            vapic::show(self);
            self.reconsider();
        }
    }

    /// `kvm_lapic_state`.
    pub fn get_lapic(&self) -> Option<[u8; 1024]> {
        let lapic = self.shared.lapic.as_ref()?;
        let mut b = [0; 1024];
        let s = lapic.state.lock().unwrap();
        for n in 0..64 {
            b[n * 16..n * 16 + 4].copy_from_slice(&s.regs[n].to_le_bytes());
        }
        let mut set = |r: usize, value: u32| b[r..r + 4].copy_from_slice(&value.to_le_bytes());
        if s.x2apic() {
            // The ID stands in the top byte in either mode (api.rst 4.57, without KVM_CAP_X2APIC_API).
            set(reg::ID, s.x2apic_id << 24);
            set(reg::LDR, State::x2apic_ldr(s.x2apic_id));
        }
        set(reg::PPR, s.ppr() as u32);
        set(reg::CURRENT_COUNT, s.current_count(monotonic_ns()));
        Some(b)
    }

    pub fn set_lapic(&mut self, b: &[u8; 1024]) -> bool {
        let shared = self.shared.clone();
        let Some(lapic) = &shared.lapic else { return false };
        let mut s = lapic.state.lock().unwrap();
        for n in 0..64 {
            s.regs[n] = u32::from_le_bytes(b[n * 16..n * 16 + 4].try_into().unwrap());
        }
        s.set(reg::VERSION, 5 << 16 | 0x14);
        if s.timer_mode() != 2 {
            // As KVM does, what is left of the current count is waited for first. One-shot with nothing left: the timer
            // expired, and whether its interrupt was delivered is not known, so it comes again.
            let left = s.get(reg::CURRENT_COUNT) as u64 * s.divider();
            let left = (left != 0 || s.timer_mode() == 0).then_some(left);
            self.start_timer(&mut s, left);
        }
        drop(s);
        vapic::show(self);
        self.reconsider();
        true
    }
}

/// Key of a vCPU's timer in `Timers`.
pub fn timer_key(vcpu: u32) -> u64 {
    vcpu as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(lvt: u32, count: u32, divide: u32) -> u64 {
        let lapic = Lapic::new(0, true);
        let mut s = lapic.state.lock().unwrap();
        s.set(reg::LVT_TIMER, lvt);
        s.set(reg::INITIAL_COUNT, count);
        s.set(reg::DIVIDE, divide);
        s.period_ns()
    }

    #[test]
    fn a_guest_cannot_make_the_timer_thread_spin() {
        const PERIODIC: u32 = 1 << 17;
        assert_eq!(timer(PERIODIC | 0x40, 1, 0xb), timer::MIN_PERIOD_NS);
        assert_eq!(timer(PERIODIC | 0x40, 1_000_000, 0xb), 1_000_000);
        assert_eq!(timer(PERIODIC | 0x40, 0, 0xb), 0);
        assert_eq!(timer(0x40, 1, 0), 2, "one-shot: each needs an instruction of the guest's");
    }

    #[test]
    fn dividers() {
        let dividers: Vec<u64> = [0, 1, 2, 3, 8, 9, 0xa, 0xb].map(|d| timer(0, 1, d)).into();
        assert_eq!(dividers, [2, 4, 8, 16, 32, 64, 128, 1]);
    }
}
