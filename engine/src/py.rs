//! The native module `kvmkit._engine`; `src/kvmkit/_engine.pyi` documents it.

use crate::cpu::{CpuidEntry, Exit, Source, Vcpu as CpuState, mp_state};
use crate::eventfd::{EventFd, IoEvent};
use crate::irq::Route;
use crate::lapic::{self, Message};
use crate::mce;
use crate::mem::{LOG_DIRTY, Slot, Slots};
use crate::mmu::{self, Intent};
use crate::signal::Held;
use crate::vm::{VcpuShared, Vm as Machine, request};
use crate::{debug, dirty, msr, run, signal, state, stats, sys, timer, vapic, xstate};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::mem::ManuallyDrop;
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

fn os_error(errno: i32) -> PyErr {
    PyOSError::new_err((errno, std::io::Error::from_raw_os_error(errno).to_string()))
}
/// EINVAL unless `accepted`.
fn valid(accepted: bool) -> PyResult<()> {
    if accepted { Ok(()) } else { Err(os_error(libc::EINVAL)) }
}

fn io_error(e: std::io::Error) -> PyErr {
    os_error(e.raw_os_error().unwrap_or(libc::EIO))
}

fn array<const N: usize>(b: &[u8]) -> PyResult<&[u8; N]> {
    b.try_into().map_err(|_| PyValueError::new_err(format!("expected {N} bytes, not {}", b.len())))
}

/// function, index, flags, eax, ebx, ecx, edx.
type CpuidTuple = (u32, u32, u32, u32, u32, u32, u32);

/// Offsets in `struct kvm_run`.
mod kvm_run {
    pub const REQUEST_INTERRUPT_WINDOW: usize = 0;
    pub const IMMEDIATE_EXIT: usize = 1;
    pub const EXIT_REASON: usize = 8;
    pub const READY_FOR_INJECTION: usize = 12;
    pub const IF_FLAG: usize = 13;
    pub const FLAGS: usize = 14;
    pub const CR8: usize = 16;
    pub const APIC_BASE: usize = 24;
    pub const UNION: usize = 32;
    /// Where PIO data stands.
    pub const DATA: usize = 4096;
    pub const BYTES: usize = 3 * 4096;
}

/// Exit reasons.
mod reason {
    pub const IO: u32 = 2;
    pub const DEBUG: u32 = 4;
    pub const HLT: u32 = 5;
    pub const MMIO: u32 = 6;
    pub const IRQ_WINDOW_OPEN: u32 = 7;
    pub const SHUTDOWN: u32 = 8;
    pub const TPR_ACCESS: u32 = 12;
    pub const INTR: u32 = 10;
    pub const INTERNAL_ERROR: u32 = 17;
    pub const IOAPIC_EOI: u32 = 26;
    pub const RDMSR: u32 = 29;
    pub const WRMSR: u32 = 30;
    pub const DIRTY_RING_FULL: u32 = 31;
    pub const MEMORY_FAULT: u32 = 39;
    /// Not the kernel's: the PIC must be asked for a vector.
    pub const EXTINT: u32 = 1 << 16;
}

#[pyclass(frozen)]
struct Vm {
    /// Reached by `machine`, which refuses in a child of os.fork.
    vm: ManuallyDrop<Arc<Machine>>,
    pid: u32,
}

fn forked(pid: u32) -> bool {
    std::process::id() != pid
}

fn check_pid(pid: u32) -> PyResult<()> {
    if forked(pid) {
        return Err(PyRuntimeError::new_err("this VM belongs to the process before os.fork()"));
    }
    Ok(())
}

impl Vm {
    fn machine(&self) -> PyResult<&Arc<Machine>> {
        check_pid(self.pid)?;
        Ok(&self.vm)
    }

    /// How many local APICs took the message; -1 if there is no vCPU.
    fn deliver(&self, message: Message) -> PyResult<i64> {
        let vm = self.machine()?;
        if vm.vcpus.read().unwrap().is_empty() {
            return Ok(-1);
        }
        Ok(lapic::deliver(vm, message, None).into())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A child of os.fork has neither the threads to wait for nor, perhaps, the locks.
        if !forked(self.pid) {
            // SAFETY: dropped here alone.
            let vm = unsafe { ManuallyDrop::take(&mut self.vm) };
            drop(vm);
        }
    }
}

/// Slot, flags, gpa, size, hva, first page.
type PyPart = (u32, u32, u64, u64, u64, u64);

fn whole_pages(gpa: u64, size: u64, hva: u64) -> bool {
    (gpa | size | hva) & 0xfff == 0 && gpa.checked_add(size).is_some() && hva.checked_add(size).is_some()
}

/// Destination, whether logical, delivery mode, vector, whether level-triggered.
type PyMessage = (u32, bool, u8, u8, bool);
/// KVM_MSR_FILTER_*, first MSR, their number, a bit for each.
type PyFilterRange = (u32, u32, u32, Vec<u8>);
/// GSI, messages, MSIs (address, data), whether Python must see it.
type PyRoute = (u32, Vec<PyMessage>, Vec<(u64, u32)>, bool);

fn decode_message((destination, logical, mode, vector, level): PyMessage) -> Message {
    Message { destination, logical, mode, vector, level, wide: false }
}

#[pymethods]
impl Vm {
    #[new]
    fn new(tsc_khz: u32) -> PyResult<Self> {
        let vm = Arc::new(Machine::new(tsc_khz).map_err(io_error)?);
        Ok(Self { vm: ManuallyDrop::new(vm), pid: std::process::id() })
    }

    fn set_memory_region(&self, py: Python<'_>, id: u32, flags: u32, gpa: u64, size: u64, hva: u64) -> PyResult<()> {
        let vm = self.machine()?;
        // The TLBs hold whole pages.
        valid(whole_pages(gpa, size, hva))?;
        py.detach(|| {
            // KVM_CAP_MULTI_ADDRESS_SPACE: the upper half says which.
            let smm = id >> 16 != 0;
            let mut slots: Vec<Slot> = vm.space(smm).read().unwrap().as_slice().to_vec();
            slots.retain(|s| s.id != id);
            // A move takes the TLBs along, after which every write is the first again; rings are told of it as such.
            let anew = vm.dirty_ring_bytes.load(Ordering::Relaxed) != 0;
            vm.dirty.set_slot(id, size != 0 && flags & LOG_DIRTY != 0, size, anew);
            if size != 0 {
                slots.push(Slot { id, flags, gpa, size, hva, first_page: 0 });
            }
            vm.set_space(smm, Slots::new(slots));
        });
        Ok(())
    }

    /// All slots outside system management mode, in parts, of a VM with private memory. `changed`: the slot that has, and how
    /// many of its bytes are logged.
    fn set_private_memory(
        &self,
        py: Python<'_>,
        changed: Option<(u32, u64)>,
        parts: Vec<PyPart>,
        private: Vec<(u64, u64)>,
    ) -> PyResult<()> {
        let vm = self.machine()?;
        let parts: Vec<Slot> = parts
            .into_iter()
            .map(|(id, flags, gpa, size, hva, first_page)| {
                valid(whole_pages(gpa, size, hva))?;
                Ok(Slot { id, flags, gpa, size, hva, first_page })
            })
            .collect::<PyResult<_>>()?;
        py.detach(|| {
            if let Some((id, logged_bytes)) = changed {
                let anew = vm.dirty_ring_bytes.load(Ordering::Relaxed) != 0;
                vm.dirty.set_slot(id, logged_bytes != 0, logged_bytes, anew);
            }
            vm.set_slots(Slots::with_private(parts, private));
        });
        Ok(())
    }

    fn get_dirty_log<'py>(&self, py: Python<'py>, id: u32) -> PyResult<Bound<'py, PyBytes>> {
        let vm = self.machine()?;
        let words = py.detach(|| dirty::take(vm, id)).ok_or_else(|| os_error(libc::ENOENT))?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(PyBytes::new(py, &bytes))
    }

    /// vCPUs created from now on have dirty rings.
    fn set_dirty_ring(&self, size_bytes: u32) -> PyResult<()> {
        if !dirty::is_ring_size(size_bytes) {
            return Err(os_error(libc::EINVAL));
        }
        self.machine()?.dirty_ring_bytes.store(size_bytes, Ordering::SeqCst);
        Ok(())
    }

    fn reset_dirty_rings(&self, py: Python<'_>) -> PyResult<u32> {
        let vm = self.machine()?;
        Ok(py.detach(|| dirty::reset_rings(vm)))
    }

    fn notify_write(&self, py: Python<'_>, gpa: u64, len: u64) -> PyResult<()> {
        let vm = self.machine()?;
        // A device calls this for each buffer, and giving up the GIL costs more than looking.
        if vm.has_code(gpa, len) {
            py.detach(|| vm.note_write(None, gpa, len));
        }
        Ok(())
    }

    fn create_vcpu(&self, id: u32, kvm_run_address: u64, length: usize) -> PyResult<Vcpu> {
        let vm = self.machine()?.clone();
        if length < kvm_run::BYTES {
            return Err(os_error(libc::EINVAL));
        }
        let cpu = CpuState::new(vm, id).map_err(io_error)?;
        let shared = cpu.shared.clone();
        let cpu = ManuallyDrop::new(Mutex::new(Box::new(cpu)));
        Ok(Vcpu { cpu, shared, run: kvm_run_address, pid: self.pid, signal_mask: Mutex::default() })
    }

    /// vCPUs created from now on have local APICs.
    fn create_lapics(&self) -> PyResult<()> {
        self.machine()?.has_lapics.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// The vCPU that starts without INIT and SIPI.
    fn set_boot_cpu(&self, id: u32) -> PyResult<()> {
        self.machine()?.boot_cpu.store(id, Ordering::SeqCst);
        Ok(())
    }

    /// KVM_X86_SET_MSR_FILTER.
    fn set_msr_filter(&self, deny: bool, ranges: Vec<PyFilterRange>) -> PyResult<()> {
        let range = |(kinds, base, count, bitmap): PyFilterRange| {
            let enough = bitmap.len() * 8 >= count as usize;
            enough.then_some(msr::FilterRange { kinds, base, count, bitmap }).ok_or_else(|| os_error(libc::EINVAL))
        };
        let ranges = ranges.into_iter().map(range).collect::<PyResult<_>>()?;
        self.machine()?.msr_policy.set_filter(msr::Filter { deny, ranges });
        Ok(())
    }

    /// KVM_CAP_X86_USER_SPACE_MSR.
    fn set_msr_exits(&self, reasons: u32) -> PyResult<()> {
        self.machine()?.msr_policy.exits.store(reasons, Ordering::SeqCst);
        Ok(())
    }

    fn signal_msi(&self, address: u64, data: u32) -> PyResult<i64> {
        self.deliver(lapic::message(address, data))
    }

    fn send_message(&self, message: PyMessage) -> PyResult<i64> {
        self.deliver(decode_message(message))
    }

    fn set_extint(&self, level: bool) -> PyResult<()> {
        for v in self.machine()?.vcpus.read().unwrap().iter() {
            if let Some(l) = &v.lapic {
                l.state.lock().unwrap().extint = level;
                if level {
                    v.request(request::INTERRUPT);
                }
            }
        }
        Ok(())
    }

    fn set_routes(&self, routes: Vec<PyRoute>) -> PyResult<()> {
        let table = routes.into_iter().map(|(gsi, messages, msis, python)| {
            let messages = messages.into_iter().map(decode_message);
            let messages = messages.chain(msis.into_iter().map(|(a, d)| lapic::message(a, d))).collect();
            (gsi, Route { messages, python })
        });
        self.machine()?.irq.set_routes(table.collect());
        Ok(())
    }

    fn take_lines(&self) -> PyResult<Vec<u32>> {
        Ok(self.machine()?.irq.take_lines())
    }

    fn set_wake_fd(&self, fd: i32) -> PyResult<()> {
        let vm = self.machine()?;
        let fd = if fd < 0 { None } else { Some(EventFd::duplicate(fd).map_err(io_error)?) };
        vm.irq.set_wake(fd);
        Ok(())
    }

    fn add_irqfd(&self, fd: i32, gsi: u32) -> PyResult<()> {
        let vm = self.machine()?;
        EventFd::duplicate(fd).and_then(|fd| vm.irq.add_irqfd(vm, fd, gsi)).map_err(io_error)
    }

    fn remove_irqfd(&self, py: Python<'_>, fd: i32, gsi: u32) -> PyResult<bool> {
        let vm = self.machine()?;
        let fd = EventFd::duplicate(fd).map_err(io_error)?;
        Ok(py.detach(|| vm.irq.remove_irqfd(&fd, gsi)))
    }

    fn add_ioeventfd(&self, address: u64, len: u32, fd: i32, datamatch: Option<u64>, pio: bool) -> PyResult<()> {
        let vm = self.machine()?;
        let event = EventFd::duplicate(fd).map(|fd| IoEvent { address, len, datamatch, fd, pio });
        event.and_then(|e| vm.irq.add_ioeventfd(e)).map_err(io_error)
    }

    fn remove_ioeventfd(&self, address: u64, len: u32, fd: i32, datamatch: Option<u64>, pio: bool) -> PyResult<()> {
        let vm = self.machine()?;
        let event = EventFd::duplicate(fd).map(|fd| IoEvent { address, len, datamatch, fd, pio });
        event.and_then(|e| vm.irq.remove_ioeventfd(&e)).map_err(io_error)
    }

    /// Let go of all descriptors.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let vm = self.machine()?;
        py.detach(|| {
            vm.stats.close();
            vm.timers.cancel(timer::PIT);
            vm.irq.close();
        });
        Ok(())
    }

    /// KVM_REINJECT_CONTROL.
    fn set_pit_reinject(&self, on: bool) -> PyResult<()> {
        self.machine()?.set_pit_reinject(on);
        Ok(())
    }
    fn pit_missed(&self) -> PyResult<bool> {
        Ok(self.machine()?.pit_missed())
    }
    fn pit_again(&self) -> PyResult<()> {
        self.machine()?.pit_again();
        Ok(())
    }

    fn arm_pit(&self, at_ns: u64, period_ns: u64) -> PyResult<()> {
        let vm = self.machine()?;
        vm.forget_pit_ticks();
        if period_ns == 0 {
            vm.timers.arm(vm, timer::PIT, at_ns);
        } else {
            vm.timers.arm_periodic(vm, timer::PIT, at_ns, period_ns);
        }
        Ok(())
    }

    fn cancel_pit(&self) -> PyResult<()> {
        self.machine()?.timers.cancel(timer::PIT);
        Ok(())
    }

    /// The VM's clock, the time of day and the host's TSC, all at one time.
    fn clock(&self) -> PyResult<(u64, u64, u64)> {
        let offset = self.machine()?.clock_offset_ns.load(Ordering::Relaxed);
        let now = crate::pvclock::monotonic_ns() as i64;
        let realtime = crate::pvclock::clock_ns(libc::CLOCK_REALTIME);
        Ok((now.wrapping_add(offset) as u64, realtime, crate::sys::host_tsc()))
    }

    fn set_clock_ns(&self, ns: u64) -> PyResult<()> {
        let vm = self.machine()?;
        let now = crate::pvclock::monotonic_ns() as i64;
        vm.clock_offset_ns.store((ns as i64).wrapping_sub(now), Ordering::Relaxed);
        for v in vm.vcpus.read().unwrap().iter() {
            v.request(request::CLOCK);
        }
        Ok(())
    }

    fn blocks(&self) -> PyResult<Vec<(u64, u32, u64, u16)>> {
        Ok(self.machine()?.cache.lock().unwrap().blocks())
    }

    /// Counters by name: the VM's, the sums of its vCPUs', and #UD for want of support by mnemonic.
    fn stats(&self) -> PyResult<Vec<(String, u64)>> {
        let vm = self.machine()?;
        let mut list: Vec<(String, u64)> = vm.stats.list().map(|(name, n)| (name.into(), n)).collect();
        let mut sums = vec![0; stats::vcpu::ALL.len()];
        for v in vm.vcpus.read().unwrap().iter() {
            v.stats.list().zip(&mut sums).for_each(|((_, n), sum)| *sum += n);
        }
        let names = stats::vcpu::ALL.iter().filter(|d| d.values == 1);
        list.extend(names.zip(sums).map(|(d, sum)| (d.name.into(), sum)));
        let unsupported = vm.unsupported.lock().unwrap();
        list.extend(unsupported.iter().map(|(mnemonic, n)| (format!("ud_{mnemonic:?}").to_lowercase(), *n)));
        Ok(list)
    }

    fn stats_fd(&self) -> PyResult<i32> {
        Ok(self.machine()?.stats.open().map_err(io_error)?.into_raw_fd())
    }
}

#[pyclass(frozen)]
struct Vcpu {
    cpu: ManuallyDrop<Mutex<Box<CpuState>>>,
    shared: Arc<VcpuShared>,
    run: u64,
    pid: u32,
    /// Of KVM_SET_SIGNAL_MASK: bit 0 is signal 1.
    signal_mask: Mutex<Option<u64>>,
}

impl Vcpu {
    /// None: Python must look for signals.
    fn run_detached(&self, main: bool, held: Option<&Held>) -> PyResult<Option<(u32, Option<String>)>> {
        let interrupted = || held.is_some_and(Held::interrupted);
        let mut guard = self.cpu.lock().unwrap();
        let v: &mut CpuState = &mut guard;
        if v.vm.is_dead() {
            return Err(os_error(libc::EIO));
        }
        self.complete(v);
        if self.byte(kvm_run::IMMEDIATE_EXIT).load(Ordering::SeqCst) != 0 || interrupted() {
            run::complete(v);
            self.write_flags(v);
            self.write(kvm_run::EXIT_REASON, &reason::INTR.to_le_bytes());
            return Ok(Some((reason::INTR, None)));
        }
        if v.shared.lapic.is_none() && v.mp_state == mp_state::UNINITIALIZED {
            return Err(os_error(libc::EAGAIN));
        }
        v.window_requested = self.byte(kvm_run::REQUEST_INTERRUPT_WINDOW).load(Ordering::SeqCst) != 0;
        if v.window_requested {
            v.cpu.look_again();
        }
        if (main || held.is_some()) && !v.signals_armed {
            v.signals_armed = true;
            let (key, period) = (timer::SIGNALS | self.shared.id as u64, timer::SIGNALS_PERIOD_NS);
            v.vm.timers.arm_periodic(&v.vm, key, crate::pvclock::monotonic_ns() + period, period);
        }
        let exit = loop {
            match run::run(v) {
                Exit::Signals if main => return Ok(None),
                Exit::Signals if interrupted() => break Exit::Intr,
                Exit::Signals => {}
                exit => break exit,
            }
        };
        if exit == Exit::VmDead {
            return Err(os_error(libc::EIO));
        }
        let reason = self.publish(v, &exit);
        let message = if let Exit::InternalError(m) = exit { Some(m) } else { None };
        Ok(Some((reason, message)))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if !forked(self.pid) {
            // SAFETY: dropped here alone.
            unsafe { ManuallyDrop::drop(&mut self.cpu) };
        }
    }
}

impl Vcpu {
    /// The state, once no other thread runs the vCPU. It counts as running meanwhile, since some of it is read from
    /// and written to guest memory.
    fn with<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut CpuState) -> R + Send) -> PyResult<R> {
        check_pid(self.pid)?;
        Ok(py.detach(|| {
            let mut v = self.cpu.lock().unwrap();
            signal::install();
            let vm = v.vm.clone();
            vm.start_running(&self.shared);
            v.refresh();
            let result = f(&mut v);
            vm.stop_running(&self.shared);
            result
        }))
    }
    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < kvm_run::BYTES);
        // SAFETY: the caller of `create_vcpu` keeps the kvm_run pages mapped while the vCPU lives; this byte
        // is shared with Python and only accessed as a byte.
        unsafe { &*((self.run as usize + offset) as *const AtomicU8) }
    }
    fn write(&self, offset: usize, b: &[u8]) {
        assert!(offset + b.len() <= kvm_run::BYTES);
        // SAFETY: inside the kvm_run pages (see `byte`).
        unsafe { std::ptr::copy_nonoverlapping(b.as_ptr(), (self.run as usize + offset) as *mut u8, b.len()) };
    }
    fn read(&self, offset: usize, b: &mut [u8]) {
        assert!(offset + b.len() <= kvm_run::BYTES);
        // SAFETY: inside the kvm_run pages (see `byte`).
        unsafe { std::ptr::copy_nonoverlapping((self.run as usize + offset) as *const u8, b.as_mut_ptr(), b.len()) };
    }

    /// KVM_RUN_X86_SMM.
    fn write_flags(&self, v: &CpuState) {
        self.write(kvm_run::FLAGS, &(v.smm as u16).to_le_bytes());
    }

    /// Take up what user space answered to the last exit.
    fn complete(&self, v: &mut CpuState) {
        if let Some((address, len, source)) = v.io.waiting.take() {
            let mut data = vec![0; len];
            let place = match source {
                Source::Port => kvm_run::DATA,
                Source::Memory => kvm_run::UNION + 8,
                Source::Msr => kvm_run::UNION,
            };
            self.read(place, &mut data);
            v.io.done.push((address, data));
        }
    }

    fn publish(&self, v: &CpuState, exit: &Exit) -> u32 {
        const U: usize = kvm_run::UNION;
        let reason = match exit {
            Exit::Io { input, size, port, count, data } => {
                self.write(kvm_run::DATA, data);
                self.write(U, &[!input as u8, *size]);
                self.write(U + 2, &port.to_le_bytes());
                self.write(U + 4, &count.to_le_bytes());
                self.write(U + 8, &(kvm_run::DATA as u64).to_le_bytes());
                reason::IO
            }
            Exit::Mmio { gpa, len, write, data } => {
                self.write(U, &gpa.to_le_bytes());
                self.write(U + 8, data);
                self.write(U + 16, &(*len as u32).to_le_bytes());
                self.write(U + 20, &[*write as u8]);
                reason::MMIO
            }
            Exit::Hlt => reason::HLT,
            Exit::Shutdown => reason::SHUTDOWN,
            Exit::IrqWindowOpen => reason::IRQ_WINDOW_OPEN,
            Exit::Intr | Exit::Signals => reason::INTR,
            Exit::IoapicEoi(vector) => {
                self.write(U, &[*vector]);
                reason::IOAPIC_EOI
            }
            Exit::TprAccess(access) => {
                self.write(U, &access.rip.to_le_bytes());
                self.write(U + 8, &(access.write as u32).to_le_bytes());
                reason::TPR_ACCESS
            }
            Exit::VmDead => unreachable!("KVM_RUN fails"),
            Exit::DirtyRingFull => reason::DIRTY_RING_FULL,
            Exit::MemoryFault { gpa, private } => {
                // KVM_MEMORY_EXIT_FLAG_PRIVATE
                let flags = (*private as u64) << 3;
                for (n, x) in [flags, *gpa, 4096].into_iter().enumerate() {
                    self.write(U + n * 8, &x.to_le_bytes());
                }
                reason::MEMORY_FAULT
            }
            Exit::Extint => reason::EXTINT,
            Exit::Msr { write, reason, index, data } => {
                self.write(U, &[0; 8]); // error, padding
                self.write(U + 8, &reason.to_le_bytes());
                self.write(U + 12, &index.to_le_bytes());
                self.write(U + 16, &data.to_le_bytes());
                if *write { reason::WRMSR } else { reason::RDMSR }
            }
            Exit::Debug { exception, pc, dr6, dr7 } => {
                self.write(U, &exception.to_le_bytes());
                for (n, x) in [pc, dr6, dr7].into_iter().enumerate() {
                    self.write(U + 8 + n * 8, &x.to_le_bytes());
                }
                reason::DEBUG
            }
            Exit::InternalError(_) => {
                // KVM_INTERNAL_ERROR_EMULATION, no data.
                self.write(U, &1u32.to_le_bytes());
                self.write(U + 4, &0u32.to_le_bytes());
                reason::INTERNAL_ERROR
            }
        };
        self.write(kvm_run::EXIT_REASON, &reason.to_le_bytes());
        let lint0 = v.shared.lapic.as_ref().is_none_or(|l| l.state.lock().unwrap().accepts_extint());
        let ready = v.cpu.iflag != 0 && v.cpu.shadow == 0 && v.user_irq.is_none() && lint0;
        self.write(kvm_run::READY_FOR_INJECTION, &[ready as u8]);
        self.write(kvm_run::IF_FLAG, &[v.cpu.iflag]);
        self.write_flags(v);
        self.write(kvm_run::CR8, &v.cr8().to_le_bytes());
        self.write(kvm_run::APIC_BASE, &v.cpu.msr.apic_base.to_le_bytes());
        reason
    }
}

#[pymethods]
impl Vcpu {
    /// KVM_RUN: returns (exit reason, message of an internal error). `main`: this is Python's main thread.
    fn run(&self, py: Python<'_>, main: bool) -> PyResult<(u32, Option<String>)> {
        check_pid(self.pid)?;
        let mask = *self.signal_mask.lock().unwrap();
        // With a mask, handlers wait until KVM_RUN has returned.
        let main = main && mask.is_none();
        loop {
            self.shared.looks_for_signals.store(main || mask.is_some(), Ordering::Relaxed);
            let result = py.detach(|| {
                let held = mask.map(Held::new);
                self.run_detached(main, held.as_ref())
            });
            self.shared.looks_for_signals.store(false, Ordering::Relaxed);
            match result? {
                Some(exit) => return Ok(exit),
                None => py.check_signals()?,
            }
        }
    }

    /// KVM_SET_SIGNAL_MASK: what is blocked from the next `run` on; bit 0 is signal 1.
    fn set_signal_mask(&self, blocked: Option<u64>) -> PyResult<()> {
        check_pid(self.pid)?;
        *self.signal_mask.lock().unwrap() = blocked;
        Ok(())
    }

    /// KVM_X86_SETUP_MCE; EINVAL for what isn't offered.
    fn setup_mce(&self, py: Python<'_>, cap: u64) -> PyResult<()> {
        valid(self.with(py, |v| v.mce.setup(cap))?)
    }

    /// KVM_X86_SET_MCE; EINVAL for a bank or an error that there isn't.
    fn set_mce(&self, py: Python<'_>, status: u64, addr: u64, misc: u64, mcg_status: u64, bank: u8) -> PyResult<()> {
        let error = mce::Error { status, addr, misc, mcg_status, bank };
        valid(self.with(py, |v| mce::set(v, &error))?)
    }

    /// Make `run` return with KVM_EXIT_INTR, now or at its next call.
    fn kick(&self) -> PyResult<()> {
        check_pid(self.pid)?;
        self.shared.request(request::EXIT);
        Ok(())
    }

    /// `kick`, and let go of the counters' descriptor.
    fn close(&self) -> PyResult<()> {
        self.kick()?;
        self.shared.stats.close();
        Ok(())
    }

    fn get_regs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| state::get_regs(v))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_regs(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        self.with(py, |v| state::set_regs(v, b))
    }
    fn get_sregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| state::get_sregs(v))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_sregs(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        valid(self.with(py, |v| state::set_sregs(v, b))?)
    }
    fn get_fpu<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| state::get_fpu(v))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_fpu(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        self.with(py, |v| state::set_fpu(v, b))
    }
    fn get_xsave<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| state::get_xsave(v))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_xsave(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        valid(self.with(py, |v| state::set_xsave(v, b))?)
    }
    fn get_xcr0(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |v| v.cpu.xcr0)
    }
    fn set_xcr0(&self, py: Python<'_>, value: u64) -> PyResult<()> {
        if !xstate::valid_xcr0(value, u64::MAX) {
            return Err(os_error(libc::EINVAL));
        }
        self.with(py, |v| v.cpu.xcr0 = value)
    }
    fn get_msr(&self, py: Python<'_>, index: u32) -> PyResult<Option<u64>> {
        self.with(py, |v| msr::read(v, index, true).ok())
    }
    fn set_msr(&self, py: Python<'_>, index: u32, value: u64) -> PyResult<bool> {
        self.with(py, |v| msr::write(v, index, value, true).is_ok())
    }
    fn set_cpuid(&self, py: Python<'_>, entries: Vec<CpuidTuple>) -> PyResult<()> {
        let list = entries
            .into_iter()
            .map(|(function, index, flags, eax, ebx, ecx, edx)| CpuidEntry {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                padding: [0; 3],
            })
            .collect();
        self.with(py, |v| v.cpuid = list)
    }
    fn get_cpuid(&self, py: Python<'_>) -> PyResult<Vec<CpuidTuple>> {
        self.with(py, |v| v.cpuid.iter().map(|e| (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)).collect())
    }
    fn get_lapic<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| v.get_lapic())?.ok_or_else(|| os_error(libc::EINVAL))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_lapic(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        valid(self.with(py, |v| v.set_lapic(b))?)
    }
    fn get_mp_state(&self, py: Python<'_>) -> PyResult<u32> {
        self.with(py, |v| {
            run::accept_events(v);
            if v.halted && v.mp_state == mp_state::RUNNABLE { mp_state::HALTED } else { v.mp_state }
        })
    }
    fn set_mp_state(&self, py: Python<'_>, value: u32) -> PyResult<()> {
        valid(self.with(py, |v| {
            if (v.smm || v.smi_pending) && matches!(value, mp_state::INIT_RECEIVED | mp_state::SIPI_RECEIVED) {
                return false;
            }
            v.halted = value == mp_state::HALTED;
            v.mp_state = match value {
                mp_state::HALTED => mp_state::RUNNABLE,
                mp_state::SIPI_RECEIVED => {
                    v.shared.request(request::SIPI);
                    mp_state::INIT_RECEIVED
                }
                other => other,
            };
            v.cpu.look_again();
            true
        })?)
    }
    fn get_vcpu_events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| {
            run::accept_events(v);
            state::get_events(v)
        })?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_vcpu_events(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        valid(self.with(py, |v| state::set_events(v, b))?)
    }
    fn get_debugregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let b = self.with(py, |v| state::get_debugregs(v))?;
        Ok(PyBytes::new(py, &b))
    }
    fn set_debugregs(&self, py: Python<'_>, b: &[u8]) -> PyResult<()> {
        let b = array(b)?;
        valid(self.with(py, |v| state::set_debugregs(v, b))?)
    }
    fn get_pdptrs(&self, py: Python<'_>) -> PyResult<[u64; 4]> {
        self.with(py, |v| v.cpu.pdptrs)
    }
    fn set_pdptrs(&self, py: Python<'_>, pdptrs: [u64; 4]) -> PyResult<()> {
        self.with(py, |v| {
            v.cpu.pdptrs = pdptrs;
            mmu::flush_all(v);
        })
    }
    /// KVM_SET_TSC_KHZ; EINVAL for what can't be had.
    fn set_tsc_khz(&self, py: Python<'_>, khz: u32) -> PyResult<()> {
        valid(self.with(py, |v| sys::set_tsc_khz(v, khz))?)
    }
    fn get_tsc_khz(&self, py: Python<'_>) -> PyResult<u32> {
        self.with(py, |v| v.tsc_khz)
    }
    fn get_tsc_offset(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |v| v.cpu.tsc_offset)
    }
    fn set_tsc_offset(&self, py: Python<'_>, offset: u64) -> PyResult<()> {
        self.with(py, |v| {
            v.cpu.tsc_offset = offset;
            sys::tsc_changed(v);
        })
    }
    /// KVM_KVMCLOCK_CTRL; EINVAL without a clock page.
    fn kvmclock_ctrl(&self, py: Python<'_>) -> PyResult<()> {
        valid(self.with(py, |v| {
            v.tell_stopped = v.cpu.msr.kvm_system_time & 1 != 0;
            crate::pvclock::update(v);
            v.cpu.msr.kvm_system_time & 1 != 0
        })?)
    }
    /// KVM_SET_GUEST_DEBUG; EBUSY if it injects while an exception waits.
    fn set_guest_debug(&self, py: Python<'_>, control: u32, registers: [u64; 8]) -> PyResult<()> {
        let done = self.with(py, |v| debug::set_guest_debug(v, control, &registers))?;
        if done { Ok(()) } else { Err(os_error(libc::EBUSY)) }
    }
    /// KVM_INTERRUPT; EEXIST while one waits.
    fn interrupt(&self, py: Python<'_>, vector: u8) -> PyResult<()> {
        let taken = self.with(py, |v| {
            let free = v.user_irq.is_none();
            if free {
                v.user_irq = Some(vector);
                v.cpu.look_again();
            }
            free
        })?;
        if taken { Ok(()) } else { Err(os_error(libc::EEXIST)) }
    }
    /// KVM_TPR_ACCESS_REPORTING.
    fn set_tpr_reporting(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.with(py, |v| v.reports_tpr = on)
    }
    /// KVM_SET_VAPIC_ADDR; EINVAL without a local APIC or memory there.
    fn set_vapic(&self, py: Python<'_>, gpa: u64) -> PyResult<()> {
        valid(self.with(py, |v| vapic::set(v, gpa))?)
    }
    fn nmi(&self) -> PyResult<()> {
        check_pid(self.pid)?;
        self.shared.request(request::NMI);
        Ok(())
    }
    fn smi(&self) -> PyResult<()> {
        check_pid(self.pid)?;
        self.shared.request(request::SMI);
        Ok(())
    }
    /// KVM_TRANSLATE of a read by the supervisor: the gpa, or None.
    fn translate(&self, py: Python<'_>, address: u64) -> PyResult<Option<u64>> {
        self.with(py, |v| {
            let mode = crate::cpu::mmu_mode::KERNEL_AC;
            mmu::walk(v, address, Intent::Read, mode).ok().map(|p| p.gpa | address & 0xfff)
        })
    }
    /// Address and size in bytes of the dirty ring's entries.
    fn dirty_ring(&self) -> PyResult<Option<(u64, u32)>> {
        check_pid(self.pid)?;
        Ok(self.shared.ring.as_ref().map(|ring| ring.lock().unwrap().area()))
    }
    fn stats_fd(&self) -> PyResult<i32> {
        check_pid(self.pid)?;
        Ok(self.shared.stats.open().map_err(io_error)?.into_raw_fd())
    }
    fn set_interpret_only(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.with(py, |v| v.interpret_only = on)
    }
}

/// CPUID of the host: (eax, ebx, ecx, edx).
#[pyfunction]
fn host_cpuid(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    (r.eax, r.ebx, r.ecx, r.edx)
}

/// XCR0 bits that guests can be offered.
#[pyfunction]
fn supported_xcr0() -> u64 {
    xstate::supported()
}

/// Frequency of the host's TSC, measured against CLOCK_MONOTONIC_RAW where CPUID does not tell it.
#[pyfunction]
fn host_tsc_khz(py: Python<'_>) -> u32 {
    py.detach(crate::sys::host_tsc_khz)
}

#[pyfunction]
fn monotonic_raw_ns() -> u64 {
    crate::pvclock::monotonic_ns()
}

/// KVM_X86_GET_MCE_CAP_SUPPORTED.
#[pyfunction]
fn supported_mce_cap() -> u64 {
    mce::SUPPORTED
}

#[pyfunction]
fn msr_list() -> Vec<u32> {
    msr::LIST.to_vec()
}

#[pymodule]
mod _engine {
    #[pymodule_export]
    use super::{Vcpu, Vm, host_cpuid, host_tsc_khz, monotonic_raw_ns, msr_list, supported_mce_cap, supported_xcr0};
    #[pymodule_export]
    use crate::ordered::{full_fence, load_u16, load_u32, load_u64, store_u16, store_u32, store_u64};
}
