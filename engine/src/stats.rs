//! Counters, in the form of KVM's binary statistics (the kernel's Documentation/virt/kvm/api.rst, 4.132).
//!
//! A set of counters is a memory file with a header, descriptors and the values; the engine counts in a mapping of it,
//! so that a descriptor of the file shows the values as they are. Values of a vCPU are written by its thread alone.
//! Names that the kernel has mean what they mean there.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// KVM_STATS_TYPE_*, KVM_STATS_UNIT_*.
const CUMULATIVE: u32 = 0;
const INSTANT: u32 = 1;
const LOG_HIST: u32 = 4;
const BYTES: u32 = 0x10;
const SECONDS: u32 = 0x20;

/// Room for a name, its end included.
const NAME_BYTES: usize = 48;
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16 + NAME_BYTES;
/// Buckets of a logarithmic histogram: the last one takes all that is larger.
const BUCKETS: usize = 32;

#[derive(Clone, Copy)]
pub struct Descriptor {
    pub name: &'static str,
    flags: u32,
    /// The unit is that times ten to this power.
    exponent: i16,
    pub values: u16,
}

const COUNT: Descriptor = Descriptor { name: "", flags: CUMULATIVE, exponent: 0, values: 1 };
const NANOSECONDS: Descriptor = Descriptor { flags: CUMULATIVE | SECONDS, exponent: -9, ..COUNT };
const SIZE: Descriptor = Descriptor { flags: INSTANT | BYTES, ..COUNT };
const HISTOGRAM: Descriptor = Descriptor { flags: LOG_HIST | SECONDS, exponent: -9, values: BUCKETS as u16, ..COUNT };

/// A counter: where its value stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counter(usize);

macro_rules! counters {
    ($($(#[$doc:meta])* $id:ident = $name:literal, $kind:expr;)*) => {
        use super::*;
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Index { $($id),* }
        $($(#[$doc])* pub const $id: Counter = Counter(Index::$id as usize);)*
        pub const ALL: &[Descriptor] = &[$(Descriptor { name: $name, ..$kind }),*];
    };
}

/// Counters of a VM.
pub mod vm {
    counters! {
        TRANSLATED = "blocks_translated", COUNT;
        CHAINED = "blocks_chained", COUNT;
        INVALIDATED = "blocks_invalidated", COUNT;
        CACHE_FLUSHES = "code_cache_flushes", COUNT;
        CACHE_BYTES = "code_cache_bytes", SIZE;
        TRANSLATION_TIME = "translation_ns", NANOSECONDS;
        /// Times that all vCPUs were stopped for a change.
        EXCLUSIVE = "safepoints", COUNT;
    }
}

/// Counters of a vCPU. Histograms come last: they have more than one value.
pub mod vcpu {
    counters! {
        EXITS = "exits", COUNT;
        IO_EXITS = "io_exits", COUNT;
        MMIO_EXITS = "mmio_exits", COUNT;
        HALT_EXITS = "halt_exits", COUNT;
        IRQ_WINDOW_EXITS = "irq_window_exits", COUNT;
        SIGNAL_EXITS = "signal_exits", COUNT;
        DEBUG_EXITS = "debug_exits", COUNT;
        EOI_EXITS = "eoi_exits", COUNT;
        RING_FULL_EXITS = "dirty_ring_full_exits", COUNT;
        SHUTDOWN_EXITS = "shutdown_exits", COUNT;
        ERROR_EXITS = "internal_error_exits", COUNT;
        IRQ_INJECTIONS = "irq_injections", COUNT;
        NMI_INJECTIONS = "nmi_injections", COUNT;
        EXCEPTIONS = "exceptions", COUNT;
        PAGE_FAULTS = "page_faults", COUNT;
        /// Instructions that the interpreter ran, those of which the processor computed, and those refused.
        INTERPRETED = "insn_emulation", COUNT;
        CAREFUL = "insn_native", COUNT;
        UNSUPPORTED = "insn_emulation_fail", COUNT;
        ENTRIES = "translated_entries", COUNT;
        MEMORY = "helper_memory", COUNT;
        INTERPRET = "helper_interpret", COUNT;
        STEP = "helper_step", COUNT;
        INDIRECT = "helper_indirect", COUNT;
        LINK = "helper_link", COUNT;
        POLL = "helper_poll", COUNT;
        /// Misses of the TLB that filled it, by what was wanted; hits cost nothing and are not counted.
        READ_MISSES = "tlb_read_misses", COUNT;
        WRITE_MISSES = "tlb_write_misses", COUNT;
        FETCH_MISSES = "tlb_fetch_misses", COUNT;
        /// Accesses that no TLB entry serves: faults, devices, page crossings, pages with code.
        SLOW = "slow_accesses", COUNT;
        WALKS = "page_walks", COUNT;
        TLB_FLUSH = "tlb_flush", COUNT;
        TLB_FLUSH_LOCAL = "tlb_flush_non_global", COUNT;
        INVLPG = "invlpg", COUNT;
        /// Times that a vCPU in a loop of PAUSE gave its processor away.
        SPIN_YIELDS = "spin_yields", COUNT;
        HALT_WAKEUP = "halt_wakeup", COUNT;
        HALT_WAIT = "halt_wait_ns", NANOSECONDS;
        HALT_WAIT_HIST = "halt_wait_hist", HISTOGRAM;
        /// A halted vCPU sleeps at once: nothing polls.
        HALT_POLL_HIST = "halt_poll_success_hist", HISTOGRAM;
    }
}

/// A set of counters.
pub struct Set {
    /// None once closed.
    file: Mutex<Option<OwnedFd>>,
    map: *mut u8,
    bytes: usize,
    /// Within the mapping.
    data: *const [AtomicU64],
    descriptors: &'static [Descriptor],
}

// SAFETY: the values are atomics, all else is read-only after `new`.
unsafe impl Send for Set {}
// SAFETY: see above.
unsafe impl Sync for Set {}

impl Set {
    /// `id` is what KVM calls whom they are of: `kvm-PID`, `kvm-PID/vcpu-ID`.
    pub fn new(descriptors: &'static [Descriptor], id: &str) -> std::io::Result<Self> {
        let mut image = Vec::new();
        let name = |text: &str| {
            let mut b = [0u8; NAME_BYTES];
            b[..text.len().min(NAME_BYTES - 1)].copy_from_slice(&text.as_bytes()[..text.len().min(NAME_BYTES - 1)]);
            b
        };
        let descriptors_at = HEADER_BYTES + NAME_BYTES;
        let data_at = descriptors_at + descriptors.len() * DESCRIPTOR_BYTES;
        let header = [0, NAME_BYTES, descriptors.len(), HEADER_BYTES, descriptors_at, data_at];
        header.iter().for_each(|&word| image.extend((word as u32).to_le_bytes()));
        image.extend(name(id));
        let mut offset = 0u32;
        for d in descriptors {
            image.extend(d.flags.to_le_bytes());
            image.extend(d.exponent.to_le_bytes());
            image.extend(d.values.to_le_bytes());
            image.extend(offset.to_le_bytes());
            image.extend(0u32.to_le_bytes());
            image.extend(name(d.name));
            offset += d.values as u32 * 8;
        }
        assert_eq!(data_at % 8, 0);
        let bytes = data_at + offset as usize;
        // SAFETY: plain system calls; the mapping is of our own memfd.
        unsafe {
            let fd = libc::memfd_create(c"kvmkit-stats".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let file = OwnedFd::from_raw_fd(fd);
            if libc::ftruncate(fd, bytes as i64) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let map = libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0);
            if map == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            libc::madvise(map, bytes, libc::MADV_DONTFORK);
            let map = map.cast::<u8>();
            std::ptr::copy_nonoverlapping(image.as_ptr(), map, image.len());
            let data = std::ptr::slice_from_raw_parts(map.add(data_at).cast(), offset as usize / 8);
            Ok(Self { file: Mutex::new(Some(file)), map, bytes, data, descriptors })
        }
    }

    fn value(&self, place: usize) -> &AtomicU64 {
        // SAFETY: aligned, and mapped as long as `self` lives.
        let values = unsafe { &*self.data };
        &values[place]
    }

    /// Count one. By the owner's thread, or under a lock.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }
    pub fn add(&self, counter: Counter, n: u64) {
        // One thread writes; a plain addition does.
        let value = self.value(counter.0);
        value.store(value.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    pub fn set(&self, counter: Counter, n: u64) {
        self.value(counter.0).store(n, Ordering::Relaxed);
    }
    pub fn get(&self, counter: Counter) -> u64 {
        self.value(counter.0).load(Ordering::Relaxed)
    }
    /// Count `ns` in a logarithmic histogram.
    pub fn observe(&self, histogram: Counter, ns: u64) {
        // Places before the histogram's are one each, but for earlier histograms.
        let before: usize = self.descriptors[..histogram.0].iter().map(|d| d.values as usize).sum();
        let bucket = (u64::BITS - ns.leading_zeros()) as usize;
        let value = self.value(before + bucket.min(BUCKETS - 1));
        value.store(value.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// All that have one value, by name.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let single = self.descriptors.iter().enumerate().filter(|(_, d)| d.values == 1);
        single.map(|(n, d)| (d.name, self.get(Counter(n))))
    }

    /// A new descriptor of the file, for reading alone.
    pub fn open(&self) -> std::io::Result<OwnedFd> {
        let file = self.file.lock().unwrap();
        let fd = file.as_ref().ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))?.as_raw_fd();
        Ok(std::fs::File::open(format!("/proc/self/fd/{fd}"))?.into())
    }

    /// Let go of the descriptor; counting goes on.
    pub fn close(&self) {
        *self.file.lock().unwrap() = None;
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.map.cast(), self.bytes) };
    }
}
