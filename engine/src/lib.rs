//! The native module: the software KVM's processor for x86-64 (decode, interpret, translate, TLB, page walk, interrupt hot
//! set), and loads and stores in order for every architecture.

#[cfg(feature = "python")]
mod ordered;

#[cfg(target_arch = "x86_64")]
pub use x86::*;

// The files are here, for all of them are.
#[cfg(target_arch = "x86_64")]
#[path = "."]
mod x86 {
    // Safety of the functions that translated code enters by: their own docs; they are public for the thunks alone.
    #![allow(clippy::missing_safety_doc)]

    pub mod access;
    pub mod cache;
    pub mod careful;
    pub mod classify;
    pub mod cpu;
    pub mod debug;
    pub mod dirty;
    pub mod emit;
    pub mod eventfd;
    pub mod exception;
    pub mod far;
    pub mod guest;
    pub mod helpers;
    pub mod interp;
    pub mod irq;
    pub mod jumps;
    pub mod lapic;
    pub mod mce;
    pub mod mem;
    pub mod mmu;
    pub mod msr;
    pub mod pvclock;
    pub mod run;
    pub mod safepoint;
    pub mod segment;
    pub mod signal;
    pub mod smm;
    pub mod spin;
    pub mod state;
    pub mod stats;
    pub mod sync;
    pub mod sys;
    pub mod task;
    pub mod thunks;
    pub mod timer;
    pub mod translate;
    pub mod vapic;
    pub mod vm;
    pub mod xstate;

    #[cfg(feature = "python")]
    mod py;
}
