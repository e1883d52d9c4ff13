//! The protocol by which vCPUs run at once and stop for each other, apart from what they run.
//!
//! A vCPU is *running* from before its first guest access to after its last. Everything that a running vCPU relies on
//! without a lock changes only inside [`Safepoint::exclusive`], which has every running vCPU stop at its next look at its
//! [`Doorbell`] and waits until none runs.
//!
//! `tests/safepoint_model.rs` compiles this file against `loom`'s atomics and locks and runs it through its interleavings.

use crate::sync::{AtomicBool, AtomicU32, Condvar, Mutex, Ordering, fence, yield_now};

/// A vCPU, to those who stop it.
pub trait Stoppable {
    fn running(&self) -> &AtomicBool;
    /// Make it look soon whether it must stop.
    fn ask_to_stop(&self);
}

pub struct Safepoint {
    stop: AtomicBool,
    exclusive: Mutex<()>,
    parked: Mutex<()>,
    resume: Condvar,
}

impl Default for Safepoint {
    fn default() -> Self {
        Self { stop: AtomicBool::new(false), exclusive: Mutex::new(()), parked: Mutex::new(()), resume: Condvar::new() }
    }
}

impl Safepoint {
    /// From here on the vCPU counts as running. Waits for a safepoint in progress.
    pub fn start(&self, vcpu: &impl Stoppable) {
        loop {
            vcpu.running().store(true, Ordering::Relaxed);
            // Either `exclusive` sees that the vCPU runs, or this sees that it must not.
            fence(Ordering::SeqCst);
            if !self.stop.load(Ordering::Acquire) {
                return;
            }
            vcpu.running().store(false, Ordering::Release);
            let mut guard = self.parked.lock().unwrap();
            while self.stop.load(Ordering::Acquire) {
                guard = self.resume.wait(guard).unwrap();
            }
        }
    }

    /// The vCPU no longer runs.
    pub fn stop(&self, vcpu: &impl Stoppable) {
        vcpu.running().store(false, Ordering::Release);
    }

    /// Run `f` while none of `vcpus` runs, nor any that is made meanwhile. `me` is the calling vCPU, if one calls; it counts
    /// as stopped meanwhile, so others' `exclusive` may come first.
    pub fn exclusive<V: Stoppable, L: IntoIterator<Item: AsRef<V>>, R>(
        &self,
        me: Option<&V>,
        vcpus: impl FnOnce() -> L,
        f: impl FnOnce() -> R,
    ) -> R {
        let was_running = me.is_some_and(|m| m.running().swap(false, Ordering::Release));
        let owner = self.exclusive.lock().unwrap();
        self.stop.store(true, Ordering::Relaxed);
        // As in `start`.
        fence(Ordering::SeqCst);
        for vcpu in vcpus() {
            let vcpu = vcpu.as_ref();
            if vcpu.running().load(Ordering::Acquire) {
                vcpu.ask_to_stop();
                while vcpu.running().load(Ordering::Acquire) {
                    yield_now();
                }
            }
        }
        let result = f();
        {
            let _guard = self.parked.lock().unwrap();
            self.stop.store(false, Ordering::Release);
            self.resume.notify_all();
        }
        drop(owner);
        if was_running {
            self.start(me.unwrap());
        }
        result
    }
}

/// How other threads get the attention of a vCPU, running or asleep.
pub struct Doorbell {
    requests: AtomicU32,
    woken: Mutex<bool>,
    wake: Condvar,
}

impl Default for Doorbell {
    fn default() -> Self {
        Self { requests: AtomicU32::new(0), woken: Mutex::new(false), wake: Condvar::new() }
    }
}

impl Doorbell {
    /// Add `bits` to the requests; then `show`, which sets what the running vCPU polls, and wake the vCPU. Any thread.
    pub fn ring(&self, bits: u32, show: impl FnOnce()) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.locked(|woken| {
            show();
            *woken = true;
        });
        self.wake.notify_all();
    }

    /// Run `f` while nobody is in the locked part of `ring` or `wait`.
    pub fn locked<R>(&self, f: impl FnOnce(&mut bool) -> R) -> R {
        f(&mut self.woken.lock().unwrap())
    }

    /// Take all requests. The vCPU clears what it polls before: what comes after this sets it again.
    pub fn take(&self) -> u32 {
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// Take those of `bits`.
    pub fn take_some(&self, bits: u32) -> u32 {
        self.requests.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// Put `bits` back, for the next `take`.
    pub fn put_back(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
    }

    /// Sleep until the bell rings; return at once if it rang since the last call.
    pub fn wait(&self) {
        let mut woken = self.woken.lock().unwrap();
        while !*woken {
            woken = self.wake.wait(woken).unwrap();
        }
        *woken = false;
    }
}
