//! What `safepoint` is made of; its model test takes the same names from `loom`.

pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
pub use std::sync::{Condvar, Mutex};
pub use std::thread::yield_now;
