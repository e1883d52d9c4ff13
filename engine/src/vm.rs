//! One virtual machine: memory slots, vCPUs, the code cache, and the safepoint that guards them.
//!
//! **Safepoints** (`safepoint`). Everything that a running vCPU relies on without a lock (memory slots, valid blocks, TLB
//! contents of others) changes only inside [`Vm::exclusive`]. A running vCPU may take the code-cache lock, whose holders
//! never wait for a safepoint.

use crate::cache::CodeCache;
use crate::cpu::{Cpu, poll};
use crate::dirty::{Bitmaps, Ring};
use crate::irq::Irq;
use crate::lapic::Lapic;
use crate::mem::{CodePages, Slots};
use crate::safepoint::{Doorbell, Safepoint, Stoppable};
use crate::stats;
use crate::timer::{self, Timers};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, RwLock};

/// What threads other than the vCPU's own may touch.
pub struct VcpuShared {
    pub id: u32,
    /// The vCPU's state; null once the vCPU is gone. Others write `poll` at any time, the rest only by `Stopped`.
    cpu: AtomicPtr<Cpu>,
    /// Rung for `request::*`; a halted vCPU sleeps there.
    pub bell: Doorbell,
    running: AtomicBool,
    /// Who is in KVM_RUN looks for signals now and then: Python's main thread, and any with a signal mask.
    pub looks_for_signals: AtomicBool,
    /// Local APIC, if the VM has an in-kernel irqchip.
    pub lapic: Option<Lapic>,
    /// If the VM logs by dirty rings.
    pub ring: Option<Mutex<Ring>>,
    pub stats: stats::Set,
}

/// Bits that the bell is rung with.
pub mod request {
    /// Leave KVM_RUN with EINTR.
    pub const EXIT: u32 = 1;
    /// Look at the local APIC: a vector may be deliverable.
    pub const INTERRUPT: u32 = 2;
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 8;
    /// The vector is in `Lapic`.
    pub const SIPI: u32 = 16;
    /// Park for a safepoint.
    pub const SAFEPOINT: u32 = 32;
    /// Rewrite the paravirtual clock page.
    pub const CLOCK: u32 = 64;
    /// Let Python look for signals, since its handlers run on the main thread alone, and only while it holds the GIL;
    /// or see whether one is pending that KVM_SET_SIGNAL_MASK lets through.
    pub const SIGNALS: u32 = 128;
    /// Leave KVM_RUN while the dirty ring has too little room.
    pub const RING_FULL: u32 = 256;
    pub const SMI: u32 = 512;
}

impl VcpuShared {
    pub fn new(id: u32, cpu: *mut Cpu, lapic: Option<Lapic>, ring: Option<Ring>) -> std::io::Result<Self> {
        let stats = stats::Set::new(stats::vcpu::ALL, &format!("kvm-{}/vcpu-{id}", std::process::id()))?;
        Ok(Self {
            id,
            cpu: AtomicPtr::new(cpu),
            bell: Doorbell::default(),
            running: AtomicBool::new(false),
            looks_for_signals: AtomicBool::new(false),
            lapic,
            ring: ring.map(Mutex::new),
            stats,
        })
    }
    /// Ask the vCPU to handle `bits` soon: within the block that it executes, or at once if it is halted.
    /// Any thread; takes no GIL.
    pub fn request(&self, bits: u32) {
        self.bell.ring(bits, || {
            let cpu = self.cpu.load(Ordering::SeqCst);
            if !cpu.is_null() {
                // SAFETY: `detach` nulls the pointer under the bell's lock before the `Cpu` is unmapped; only the one field,
                // which is an atomic, is referred to.
                unsafe { &(*cpu).poll }.fetch_or(poll::REQUEST, Ordering::SeqCst);
            }
        });
    }
    /// Sleep until a request arrives (HLT). Returns at once if one arrived since the last call.
    pub fn wait(&self) {
        let start = std::time::Instant::now();
        self.bell.wait();
        let ns = start.elapsed().as_nanos() as u64;
        self.stats.count(stats::vcpu::HALT_WAKEUP);
        self.stats.add(stats::vcpu::HALT_WAIT, ns);
        self.stats.observe(stats::vcpu::HALT_WAIT_HIST, ns);
    }
    /// The vCPU is going away.
    pub fn detach(&self) {
        self.bell.locked(|_| self.cpu.store(std::ptr::null_mut(), Ordering::SeqCst));
    }
}

impl Stoppable for VcpuShared {
    fn running(&self) -> &AtomicBool {
        &self.running
    }
    fn ask_to_stop(&self) {
        self.request(request::SAFEPOINT);
    }
}

pub struct Vm {
    pub slots: RwLock<Arc<Slots>>,
    /// What there is for a vCPU in system management mode instead.
    smm_slots: RwLock<Arc<Slots>>,
    pub vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    /// The guest's TSC frequency, that of the host.
    pub tsc_khz: u32,
    /// kvmclock: its nanoseconds are CLOCK_MONOTONIC_RAW plus this.
    pub clock_offset_ns: AtomicI64,
    /// vCPUs created from now on have local APICs.
    pub has_lapics: AtomicBool,
    pub msr_policy: crate::msr::Policy,
    /// Id of the vCPU that starts without INIT and SIPI.
    pub boot_cpu: AtomicU32,
    pub timers: Timers,
    pub irq: Irq,
    /// Edges for the PIT's GSI come from here while it counts.
    pub pit_gsi: AtomicU32,
    /// Ticks of the PIT's that come while an earlier one waits follow when that has ended (KVM_REINJECT_CONTROL).
    pit_reinject: AtomicBool,
    pit_missed: AtomicU64,
    pub dirty: Bitmaps,
    /// Size in bytes of the dirty rings of vCPUs created from now on; 0: none.
    pub dirty_ring_bytes: AtomicU32,
    /// Guest pages that hold translated code.
    pub code: CodePages,
    pub cache: Mutex<CodeCache>,
    /// Written under the lock of `cache`, or of `exclusive`.
    pub stats: Arc<stats::Set>,
    /// Instructions that raised #UD because nothing here runs them, by name.
    pub unsupported: Mutex<HashMap<iced_x86::Mnemonic, u64>>,
    safepoint: Safepoint,
    dead: AtomicBool,
}

impl Vm {
    pub fn new(tsc_khz: u32) -> std::io::Result<Self> {
        let stats = Arc::new(stats::Set::new(stats::vm::ALL, &format!("kvm-{}", std::process::id()))?);
        Ok(Self {
            slots: RwLock::default(),
            smm_slots: RwLock::default(),
            vcpus: RwLock::default(),
            tsc_khz,
            clock_offset_ns: AtomicI64::new(-(crate::pvclock::monotonic_ns() as i64)),
            has_lapics: AtomicBool::new(false),
            msr_policy: Default::default(),
            boot_cpu: AtomicU32::new(0),
            timers: Timers::default(),
            irq: Irq::default(),
            pit_gsi: AtomicU32::new(0),
            pit_reinject: AtomicBool::new(true),
            pit_missed: AtomicU64::new(0),
            dirty: Bitmaps::default(),
            dirty_ring_bytes: AtomicU32::new(0),
            code: CodePages::new()?,
            cache: Mutex::new(CodeCache::new(stats.clone())?),
            stats,
            unsupported: Mutex::default(),
            safepoint: Safepoint::default(),
            dead: AtomicBool::new(false),
        })
    }

    /// From here on the vCPU counts as running. Waits for a safepoint in progress.
    pub fn start_running(&self, vcpu: &VcpuShared) {
        self.safepoint.start(vcpu);
    }

    pub fn stop_running(&self, vcpu: &VcpuShared) {
        self.safepoint.stop(vcpu);
    }

    /// Run `f` while no vCPU runs. vCPUs call `Vcpu::exclusive`. `me` is the calling vCPU, if one calls; it counts as stopped
    /// meanwhile, and another may be exclusive before and after `f`: whatever it knew of slots, blocks or host addresses must
    /// be looked up again.
    pub fn exclusive<R>(&self, me: Option<&VcpuShared>, f: impl FnOnce(&Stopped) -> R) -> R {
        let vcpus = || self.vcpus.read().unwrap().clone();
        self.safepoint.exclusive(me, vcpus, || {
            self.stats.count(stats::vm::EXCLUSIVE);
            f(&Stopped { vm: self })
        })
    }

    /// The memory slots, of system management mode or outside it.
    pub fn space(&self, smm: bool) -> &RwLock<Arc<Slots>> {
        if smm { &self.smm_slots } else { &self.slots }
    }

    /// Something failed that leaves no state to go on from (the kernel's `kvm_vm_dead`): no vCPU runs any more.
    pub fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
        for v in self.vcpus.read().unwrap().iter() {
            v.request(request::EXIT);
        }
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Replace the memory slots; every cached translation is dropped.
    pub fn set_slots(&self, slots: Slots) {
        self.set_space(false, slots);
    }

    /// `set_slots` of system management mode, or of what is outside it.
    pub fn set_space(&self, smm: bool, slots: Slots) {
        self.exclusive(None, |stopped| {
            *self.space(smm).write().unwrap() = Arc::new(slots);
            stopped.drop_all_code();
            stopped.each_cpu(crate::mmu::clear);
        });
    }

    /// Whether pages of `[gpa, gpa + len)`, just written, have translated code.
    pub fn has_code(&self, gpa: u64, len: u64) -> bool {
        // A device's thread does not stop for `exclusive`: without this it might look here before its write is seen, and a
        // vCPU read the old code after it declared the page to be code (`helpers::find_block`).
        fence(Ordering::SeqCst);
        let Some(last) = gpa.checked_add(len.max(1) - 1) else { return false };
        (gpa >> 12..=last >> 12).any(|page| self.code.has(page << 12))
    }

    /// Guest memory at `[gpa, gpa + len)` was written by other means than translated code: forget what
    /// was translated from it. `me` as for `exclusive`.
    pub fn note_write(&self, me: Option<&VcpuShared>, gpa: u64, len: u64) {
        if !self.has_code(gpa, len) {
            return;
        }
        let last = gpa + (len.max(1) - 1);
        if !self.cache.lock().unwrap().overlaps(gpa, last) {
            return;
        }
        self.exclusive(me, |stopped| {
            let mut cache = self.cache.lock().unwrap();
            cache.invalidate(gpa, last, &self.code, stopped);
        });
    }

    pub fn ioeventfd_mmio(&self, gpa: u64, data: &[u8]) -> bool {
        self.irq.io_event(false, gpa, data)
    }

    pub fn ioeventfd_pio(&self, port: u16, data: &[u8]) -> bool {
        self.irq.io_event(true, port as u64, data)
    }

    /// KVM_REINJECT_CONTROL.
    pub fn set_pit_reinject(&self, on: bool) {
        self.pit_reinject.store(on, Ordering::Relaxed);
        self.forget_pit_ticks();
    }

    /// The PIT counts afresh.
    pub fn forget_pit_ticks(&self) {
        self.pit_missed.store(0, Ordering::Relaxed);
    }

    /// A tick found an earlier one waiting. False: it is to be delivered all the same, and gets lost if it must.
    pub fn pit_missed(&self) -> bool {
        let reinject = self.pit_reinject.load(Ordering::Relaxed);
        if reinject {
            self.pit_missed.fetch_add(1, Ordering::Relaxed);
        }
        reinject
    }

    /// A local APIC's interrupt ended.
    pub fn pit_ended(&self, vector: u8) {
        if self.pit_missed.load(Ordering::Relaxed) != 0
            && self.irq.vectors(self.pit_gsi.load(Ordering::Relaxed)).contains(&vector)
        {
            self.pit_again();
        }
    }

    /// The PIT's interrupt ended: a tick that waited is next.
    pub fn pit_again(&self) {
        if self.pit_missed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
            self.pit_tick();
        }
    }

    fn pit_tick(&self) {
        let gsi = self.pit_gsi.load(Ordering::Relaxed);
        let waits = self.irq.vectors(gsi).into_iter().any(|vector| crate::lapic::waits(self, vector));
        if !waits || !self.pit_missed() {
            self.irq.edge_or_queue(self, gsi);
        }
    }

    /// Called by the timer thread; the next expiry if it has one. `late`: periods that have passed beyond this one.
    pub fn timer_fired(&self, key: u64, now: u64, late: u64) -> Option<u64> {
        if key == timer::PIT {
            if self.pit_reinject.load(Ordering::Relaxed) {
                self.pit_missed.fetch_add(late, Ordering::Relaxed);
            }
            self.pit_tick();
            return None;
        }
        let vcpus = self.vcpus.read().unwrap();
        let v = vcpus.iter().find(|v| v.id == key as u32)?;
        if key & timer::SIGNALS != 0 {
            if v.looks_for_signals.load(Ordering::Relaxed) {
                v.request(request::SIGNALS);
            }
            return None;
        }
        v.lapic.as_ref()?.timer_fired(v, now)
    }
}

/// No vCPU of `vm` runs while this lives: what `Vm::exclusive` passes on.
pub struct Stopped<'a> {
    vm: &'a Vm,
}

impl Stopped<'_> {
    /// Visit every vCPU's state.
    pub fn each_cpu(&self, mut f: impl FnMut(&mut Cpu)) {
        // The lock keeps vCPUs from going away: `Vcpu::drop` takes it before the state is unmapped.
        for v in self.vm.vcpus.read().unwrap().iter() {
            let cpu = v.cpu.load(Ordering::SeqCst);
            if !cpu.is_null() {
                // SAFETY: mapped, see above. Its owner uses it only while it runs, or is in this call itself and waits for `f`.
                // Other threads change `poll` all the time, which `Cpu` is pinned for.
                f(unsafe { &mut *cpu });
            }
        }
    }

    /// Empty the code cache.
    pub fn drop_all_code(&self) {
        self.vm.cache.lock().unwrap().clear();
        self.vm.code.clear();
        self.each_cpu(|cpu| cpu.jumps.clear());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Vcpu;
    use crate::irq::Route;
    use crate::lapic::{Message, reg};

    /// Ticks that the guest gets of three, the last of which is three periods late, if it handles none before.
    fn ticks(reinject: bool) -> u32 {
        const VECTOR: u8 = 0x30;
        let vm = Arc::new(Vm::new(1_000_000).unwrap());
        vm.set_pit_reinject(reinject);
        vm.has_lapics.store(true, Ordering::Relaxed);
        let mut v = Vcpu::new(vm.clone(), 0).unwrap();
        let register = |r: usize| 0xfee0_0000 + r as u64;
        v.lapic_write(register(reg::SVR), &0x1ffu32.to_le_bytes()).unwrap();
        let message = Message { destination: 0, logical: false, mode: 0, vector: VECTOR, level: false, wide: false };
        vm.irq.set_routes(HashMap::from([(0, Route { messages: vec![message], python: false })]));
        for late in [0, 0, 3] {
            vm.timer_fired(timer::PIT, 0, late);
        }
        let mut handled = 0;
        loop {
            let mut s = v.shared.lapic.as_ref().unwrap().state.lock().unwrap();
            let Some(vector) = s.pending() else { return handled };
            assert_eq!(vector, VECTOR);
            s.acknowledge(vector);
            drop(s);
            v.lapic_write(register(reg::EOI), &[0; 4]).unwrap();
            handled += 1;
        }
    }

    #[test]
    fn ticks_of_the_pit_that_find_one_waiting() {
        assert_eq!(ticks(true), 6);
        assert_eq!(ticks(false), 1);
    }
}
