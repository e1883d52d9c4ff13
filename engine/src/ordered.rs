//! Loads and stores of host memory in order, for Python; `src/kvmkit/kvm/ordered.py` documents them.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// # Safety of the callers below
/// The address comes from a mapping that the Python caller owns, and is aligned.
macro_rules! ordered {
    ($load:ident, $store:ident, $atomic:ty, $int:ty) => {
        #[pyfunction]
        pub fn $load(address: usize) -> PyResult<$int> {
            if address == 0 || address % size_of::<$int>() != 0 {
                return Err(PyValueError::new_err("unaligned address"));
            }
            // SAFETY: see above.
            Ok(unsafe { &*(address as *const $atomic) }.load(Ordering::Acquire))
        }
        #[pyfunction]
        pub fn $store(address: usize, value: $int) -> PyResult<()> {
            if address == 0 || address % size_of::<$int>() != 0 {
                return Err(PyValueError::new_err("unaligned address"));
            }
            // SAFETY: see above.
            unsafe { &*(address as *const $atomic) }.store(value, Ordering::Release);
            Ok(())
        }
    };
}
ordered!(load_u16, store_u16, AtomicU16, u16);
ordered!(load_u32, store_u32, AtomicU32, u32);
ordered!(load_u64, store_u64, AtomicU64, u64);

#[pyfunction]
#[pyo3(name = "fence")]
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Where there is no software KVM, this is the whole module.
#[cfg(not(target_arch = "x86_64"))]
#[pymodule]
mod _engine {
    #[pymodule_export]
    use super::{full_fence, load_u16, load_u32, load_u64, store_u16, store_u32, store_u64};
}
