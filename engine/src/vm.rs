//! One virtual machine: memory slots, vCPUs, and what they share.

use crate::mem::Slots;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};

/// What threads other than the vCPU's own may touch.
pub struct VcpuShared {
    pub id: u32,
    /// `Cpu::poll[0]`; null once the vCPU is gone.
    poll: AtomicPtr<AtomicU8>,
    /// Pending requests, `request::*`.
    pub requests: AtomicU32,
    /// A halted vCPU sleeps here.
    sleep: Mutex<bool>,
    wake: Condvar,
}

/// Bits of `VcpuShared::requests`.
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
}

impl VcpuShared {
    pub fn new(id: u32, poll: *mut u8) -> Self {
        Self {
            id,
            poll: AtomicPtr::new(poll.cast()),
            requests: AtomicU32::new(0),
            sleep: Mutex::new(false),
            wake: Condvar::new(),
        }
    }
    /// Ask the vCPU to handle `bits` soon: within the block that it executes, or at once if it is halted.
    /// Any thread; takes no GIL.
    pub fn request(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        let poll = self.poll.load(Ordering::SeqCst);
        if !poll.is_null() {
            // SAFETY: `detach` nulls the pointer before the `Cpu` is unmapped, under the sleep lock.
            unsafe { (*poll).store(1, Ordering::SeqCst) };
        }
        *self.sleep.lock().unwrap() = true;
        self.wake.notify_all();
    }
    /// Sleep until a request arrives (HLT). Returns at once if one arrived since the last call.
    pub fn wait(&self) {
        let mut woken = self.sleep.lock().unwrap();
        while !*woken {
            woken = self.wake.wait(woken).unwrap();
        }
        *woken = false;
    }
    /// The vCPU is going away.
    pub fn detach(&self) {
        self.poll.store(std::ptr::null_mut(), Ordering::SeqCst);
    }
}

pub struct Vm {
    pub slots: RwLock<Arc<Slots>>,
    pub vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    /// The guest's TSC frequency, that of the host.
    pub tsc_khz: u32,
}
