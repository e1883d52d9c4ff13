//! One thread per VM that waits for its timers: local APICs and the PIT.
//!
//! Expiry sets interrupt state and kicks a vCPU; nothing here takes the GIL.

use crate::pvclock::monotonic_ns;
use crate::vm::Vm;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// Keys below are vCPU ids (`lapic::timer_key`); these are others.
pub const PIT: u64 = 1 << 32;
/// Or-ed to a vCPU id: signals are due for a look.
pub const SIGNALS: u64 = 1 << 33;
pub const SIGNALS_PERIOD_NS: u64 = 50_000_000;
/// A guest must not keep the host busy with a timer: periodic ones have at least this period (KVM's
/// `min_timer_period_us`).
pub const MIN_PERIOD_NS: u64 = 200_000;

#[derive(Default)]
struct Queue {
    by_time: BTreeSet<(u64, u64)>,
    by_key: HashMap<u64, u64>,
    /// Period of keys that re-arm themselves.
    period: HashMap<u64, u64>,
    running: bool,
    stop: bool,
}

#[derive(Default)]
pub struct Timers {
    shared: Arc<(Mutex<Queue>, Condvar)>,
}

impl Queue {
    fn remove(&mut self, key: u64) {
        if let Some(at) = self.by_key.remove(&key) {
            self.by_time.remove(&(at, key));
        }
    }
    fn insert(&mut self, key: u64, at: u64) {
        self.remove(key);
        self.by_key.insert(key, at);
        self.by_time.insert((at, key));
    }
}

impl Timers {
    /// Fire `key` once at `at_ns` (CLOCK_MONOTONIC_RAW).
    pub fn arm(&self, vm: &Arc<Vm>, key: u64, at_ns: u64) {
        self.arm_with(vm, key, at_ns, None);
    }
    pub fn arm_periodic(&self, vm: &Arc<Vm>, key: u64, at_ns: u64, period_ns: u64) {
        self.arm_with(vm, key, at_ns, Some(period_ns.max(MIN_PERIOD_NS)));
    }
    fn arm_with(&self, vm: &Arc<Vm>, key: u64, at_ns: u64, period: Option<u64>) {
        let (queue, condvar) = &*self.shared;
        let mut q = queue.lock().unwrap();
        match period {
            Some(p) => q.period.insert(key, p),
            None => q.period.remove(&key),
        };
        let first = q.by_time.first().map(|f| f.0);
        q.insert(key, at_ns);
        if !q.running {
            q.running = true;
            let (shared, vm) = (self.shared.clone(), Arc::downgrade(vm));
            std::thread::Builder::new()
                .name("kvm-timer".into())
                .spawn(move || wait(&shared, &vm))
                .expect("a thread for the VM's timers");
        } else if first.is_none_or(|f| at_ns < f) {
            condvar.notify_one();
        }
    }
    pub fn cancel(&self, key: u64) {
        let mut q = self.shared.0.lock().unwrap();
        q.remove(key);
        q.period.remove(&key);
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.0.lock().unwrap().stop = true;
        self.shared.1.notify_one();
    }
}

fn wait(shared: &(Mutex<Queue>, Condvar), vm: &Weak<Vm>) {
    // SAFETY: changes this thread's timer slack alone.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
    let (queue, condvar) = shared;
    let mut q = queue.lock().unwrap();
    while !q.stop {
        let now = monotonic_ns();
        match q.by_time.first().copied() {
            None => q = condvar.wait(q).unwrap(),
            Some((at, _)) if at > now => {
                q = condvar.wait_timeout(q, Duration::from_nanos(at - now)).unwrap().0;
            }
            Some((at, key)) => {
                let late = q.period.get(&key).map_or(0, |period| (now - at) / period);
                q.remove(key);
                drop(q);
                let Some(vm) = vm.upgrade() else { return };
                let next = vm.timer_fired(key, now, late);
                drop(vm);
                q = queue.lock().unwrap();
                let next = next.or_else(|| {
                    let period = *q.period.get(&key)?;
                    Some(at + ((now - at) / period + 1) * period)
                });
                if let Some(next) = next
                    && !q.by_key.contains_key(&key)
                {
                    q.insert(key, next);
                }
            }
        }
    }
}
