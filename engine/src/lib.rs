//! The software KVM's processor: decode, interpret, translate, TLB, page walk, interrupt hot set.

pub mod cpu;
pub mod mem;
pub mod vm;

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod _engine {}
