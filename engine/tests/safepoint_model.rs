//! The safepoint protocol through its interleavings: `src/safepoint.rs` itself on `loom`'s atomics and locks.
//!
//! What a running vCPU relies on without a lock is an `UnsafeCell` of loom's here, which fails the model if it is read while
//! somebody writes it. Models without a bound are complete; the others stop after as many preemptions as they name.

#![cfg(not(sanitized))] // Its threads are stacks that loom switches, of which AddressSanitizer knows nothing.

mod sync {
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    pub use loom::sync::{Condvar, Mutex};
    pub use loom::thread::yield_now;
}
#[allow(dead_code)]
#[path = "../src/safepoint.rs"]
mod safepoint;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32 as Word, Ordering::Relaxed};
use loom::thread;
use safepoint::{Doorbell, Safepoint, Stoppable};
use sync::*;

const SAFEPOINT: u32 = 1;
const OTHER: u32 = 2;

struct Vcpu {
    running: AtomicBool,
    bell: Doorbell,
    /// What its translated code polls.
    poll: AtomicU32,
    /// A translation that it relies on while it runs.
    tlb: UnsafeCell<u32>,
}

impl Stoppable for Vcpu {
    fn running(&self) -> &AtomicBool {
        &self.running
    }
    fn ask_to_stop(&self) {
        self.ring(SAFEPOINT);
    }
}

impl Vcpu {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            running: AtomicBool::new(false),
            bell: Doorbell::default(),
            poll: AtomicU32::new(0),
            tlb: UnsafeCell::new(0),
        })
    }
    /// `VcpuShared::request`.
    fn ring(&self, bits: u32) {
        self.bell.ring(bits, || self.poll.store(1, Ordering::SeqCst));
    }
    /// `run::attend` while the guest is not halted; returns the other requests.
    fn attend(&self, vm: &Vm) -> u32 {
        if self.poll.load(Ordering::SeqCst) == 0 {
            return 0;
        }
        self.poll.store(0, Ordering::SeqCst);
        let requests = self.bell.take();
        if requests & SAFEPOINT != 0 {
            vm.safepoint.stop(self);
            vm.safepoint.start(self);
        }
        requests & !SAFEPOINT
    }
}

struct Vm {
    safepoint: Safepoint,
    vcpus: Vec<Arc<Vcpu>>,
    /// Whatever changes in `exclusive` alone: memory slots, say.
    slots: UnsafeCell<u32>,
    /// A word of guest memory that holds code, whether its page is known to, and what was translated from it.
    code: Word,
    is_code: Word,
    cache: Mutex<Option<u32>>,
    /// One page's bit of the dirty log.
    dirty: Word,
}

impl Vm {
    fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self {
            safepoint: Safepoint::default(),
            vcpus: (0..vcpus).map(|_| Vcpu::new()).collect(),
            slots: UnsafeCell::new(0),
            code: Word::new(0),
            is_code: Word::new(0),
            cache: Mutex::new(None),
            dirty: Word::new(0),
        })
    }
    fn exclusive<R>(&self, me: Option<&Vcpu>, f: impl FnOnce() -> R) -> R {
        self.safepoint.exclusive(me, || self.vcpus.iter().cloned(), f)
    }
    /// `set_slots`: other slots from now on, and no translation by the old ones is left.
    fn set_slots(&self, value: u32) {
        self.exclusive(None, || {
            // SAFETY: loom checks it.
            self.slots.with_mut(|p| unsafe { *p = value });
            for v in &self.vcpus {
                // SAFETY: loom checks it.
                v.tlb.with_mut(|p| unsafe { *p = value });
            }
        });
    }
    /// What a running vCPU does all the time: use its TLB, and the slots where that misses.
    fn access(&self, v: &Vcpu) {
        // SAFETY: loom checks both.
        let (a, b) = (v.tlb.with(|p| unsafe { *p }), self.slots.with(|p| unsafe { *p }));
        assert_eq!(a, b, "a translation outlived its slot");
    }
    /// `access::written`, or `note_write` for a device: the write itself is done.
    fn written(&self, me: Option<&Vcpu>) {
        if me.is_none() {
            // A device's thread does not stop for `exclusive`, which otherwise orders write and look.
            fence(Ordering::SeqCst);
        }
        if self.is_code.load(Relaxed) == 0 || self.cache.lock().unwrap().is_none() {
            return;
        }
        self.exclusive(me, || *self.cache.lock().unwrap() = None);
    }
    /// `helpers::find_block`: what was translated, or is now.
    fn find_block(&self, v: &Vcpu) -> u32 {
        loop {
            let mut cache = self.cache.lock().unwrap();
            if let Some(code) = *cache {
                return code;
            }
            if self.is_code.load(Relaxed) == 0 {
                drop(cache);
                self.exclusive(Some(v), || self.is_code.store(1, Relaxed));
                continue;
            }
            let code = self.code.load(Relaxed);
            *cache = Some(code);
            return code;
        }
    }
}

fn model(preemptions: Option<usize>, f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    builder.check(f);
}

/// `vcpus` vCPUs that each run `blocks` blocks while each of `hosts` changes the slots.
fn slots_change(vcpus: usize, blocks: usize, hosts: u32) {
    let vm = Vm::new(vcpus);
    let mut threads = Vec::new();
    for n in 0..vcpus {
        let vm = vm.clone();
        threads.push(thread::spawn(move || {
            let v = &*vm.vcpus[n];
            vm.safepoint.start(v);
            for _ in 0..blocks {
                v.attend(&vm);
                vm.access(v);
            }
            vm.safepoint.stop(v);
        }));
    }
    for host in 1..hosts {
        let vm = vm.clone();
        threads.push(thread::spawn(move || vm.set_slots(host)));
    }
    vm.set_slots(100);
    for t in threads {
        t.join().unwrap();
    }
}

#[test]
fn slots_change_under_a_vcpu() {
    model(None, || slots_change(1, 2, 1));
}

#[test]
fn slots_change_under_two_vcpus() {
    model(Some(3), || slots_change(2, 1, 1));
}

#[test]
fn slots_change_under_three_vcpus() {
    model(Some(2), || slots_change(3, 1, 1));
}

#[test]
fn two_host_threads_change_the_slots() {
    model(Some(3), || slots_change(1, 1, 2));
}

/// Both vCPUs stop each other, as where both translate a page's first block, and the host stops both.
#[test]
fn vcpus_stop_each_other() {
    for host in [false, true] {
        model(Some(if host { 2 } else { 3 }), move || {
            let vm = Vm::new(2);
            let threads: Vec<_> = (0..2)
                .map(|n| {
                    let vm = vm.clone();
                    thread::spawn(move || {
                        let v = &*vm.vcpus[n];
                        vm.safepoint.start(v);
                        vm.access(v);
                        // SAFETY: loom checks it.
                        vm.exclusive(Some(v), || vm.vcpus[1 - n].tlb.with_mut(|p| unsafe { p.read() }));
                        vm.access(v);
                        vm.safepoint.stop(v);
                    })
                })
                .collect();
            if host {
                vm.set_slots(1);
            }
            for t in threads {
                t.join().unwrap();
            }
        });
    }
}

/// A halted vCPU does not count as running, and sleeps through no ring.
#[test]
fn a_halted_vcpu_wakes() {
    model(Some(4), || {
        let vm = Vm::new(1);
        let other = vm.clone();
        let t = thread::spawn(move || {
            let v = &*other.vcpus[0];
            other.safepoint.start(v);
            while v.attend(&other) & OTHER == 0 {
                other.safepoint.stop(v);
                v.bell.wait();
                other.safepoint.start(v);
                other.access(v);
            }
            other.safepoint.stop(v);
        });
        vm.set_slots(1);
        vm.vcpus[0].ring(OTHER);
        t.join().unwrap();
    });
}

/// Rings of two threads: none is lost, whatever the vCPU takes and puts back in between.
#[test]
fn no_request_is_lost() {
    model(Some(3), || {
        let vm = Vm::new(1);
        let ringers = [OTHER, OTHER << 1].map(|bit| {
            let vm = vm.clone();
            thread::spawn(move || vm.vcpus[0].ring(bit))
        });
        let v = &*vm.vcpus[0];
        let mut seen = 0;
        let first = v.attend(&vm);
        v.bell.put_back(first);
        v.poll.store(1, Ordering::SeqCst);
        seen |= v.attend(&vm);
        for t in ringers {
            t.join().unwrap();
        }
        seen |= v.attend(&vm);
        assert_eq!(seen, OTHER | OTHER << 1);
        assert_eq!(v.poll.load(Ordering::SeqCst), 0);
    });
}

/// One vCPU writes code that another translates meanwhile: once the write is noted, nothing old is left to be found.
#[test]
fn cross_modified_code_is_not_run_stale() {
    model(Some(3), || {
        let vm = Vm::new(2);
        let other = vm.clone();
        let runner = thread::spawn(move || {
            let v = &*other.vcpus[1];
            other.safepoint.start(v);
            other.find_block(v);
            v.attend(&other);
            other.find_block(v);
            other.safepoint.stop(v);
        });
        let v = &*vm.vcpus[0];
        vm.safepoint.start(v);
        vm.code.store(1, Relaxed);
        vm.written(Some(v));
        assert_eq!(vm.find_block(v), 1);
        vm.safepoint.stop(v);
        runner.join().unwrap();
        assert_ne!(*vm.cache.lock().unwrap(), Some(0));
    });
}

/// The same of a device's thread, which no safepoint stops.
#[test]
fn code_that_a_device_writes_is_not_run_stale() {
    model(Some(3), || {
        let vm = Vm::new(1);
        let other = vm.clone();
        let runner = thread::spawn(move || {
            let v = &*other.vcpus[0];
            other.safepoint.start(v);
            other.find_block(v);
            v.attend(&other);
            other.safepoint.stop(v);
        });
        vm.code.store(1, Relaxed);
        vm.written(None);
        runner.join().unwrap();
        assert_ne!(*vm.cache.lock().unwrap(), Some(0));
    });
}

/// Whoever takes a page's dirty bit and then reads the page has what was written, or finds the bit set again: the writer's
/// TLB lets it write without a look only until the bit is taken (`dirty::take`).
#[test]
fn the_dirty_log_loses_no_write() {
    model(Some(3), || {
        let vm = Vm::new(1);
        let other = vm.clone();
        let writer = thread::spawn(move || {
            let v = &*other.vcpus[0];
            other.safepoint.start(v);
            for value in 1..=2 {
                other.code.store(value, Relaxed);
                // SAFETY: loom checks it.
                if v.tlb.with(|p| unsafe { *p }) == 0 {
                    other.dirty.fetch_or(1, Relaxed);
                    // SAFETY: as above.
                    v.tlb.with_mut(|p| unsafe { *p = 1 });
                }
                v.attend(&other);
            }
            other.safepoint.stop(v);
        });
        let take = || {
            vm.dirty.load(Relaxed) != 0
                && vm.exclusive(None, || {
                    // SAFETY: loom checks it.
                    vm.vcpus[0].tlb.with_mut(|p| unsafe { *p = 0 });
                    vm.dirty.swap(0, Relaxed) != 0
                })
        };
        let mut copy = 0;
        if take() {
            copy = vm.code.load(Relaxed);
        }
        writer.join().unwrap();
        if take() {
            copy = vm.code.load(Relaxed);
        }
        assert_eq!(copy, 2);
    });
}
