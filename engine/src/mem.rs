//! Guest memory: the slots of a VM and access to them by guest physical address.

use std::sync::atomic::{AtomicU64, Ordering};

/// Page writes are logged (KVM_MEM_LOG_DIRTY_PAGES).
pub const LOG_DIRTY: u32 = 1;
/// Writes exit as MMIO (KVM_MEM_READONLY).
pub const READONLY: u32 = 2;

/// One memory slot, or a part of it: `[gpa, gpa + size)` is the host range at `hva`.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Slot {
    pub id: u32,
    pub flags: u32,
    pub gpa: u64,
    pub size: u64,
    pub hva: u64,
    /// Which page of the slot is the first here.
    pub first_page: u64,
}

impl Slot {
    /// Which page of the slot holds `gpa`.
    pub fn page(&self, gpa: u64) -> u64 {
        self.first_page + ((gpa - self.gpa) >> 12)
    }
}

/// All slots of a VM, sorted by gpa. Replaced as a whole at a safepoint.
#[derive(Default, Clone, Debug)]
pub struct Slots {
    slots: Vec<Slot>,
    /// First and last address of what is private memory: where no slot has it, an access is a fault (KVM_EXIT_MEMORY_FAULT), not
    /// a device's. In order.
    private: Vec<(u64, u64)>,
}

impl Slots {
    pub fn new(mut slots: Vec<Slot>) -> Self {
        slots.sort_by_key(|s| s.gpa);
        Self { slots, private: Vec::new() }
    }
    /// Slots in parts, each of which is shared or private memory, and what is private.
    pub fn with_private(parts: Vec<Slot>, mut private: Vec<(u64, u64)>) -> Self {
        private.sort();
        Self { private, ..Self::new(parts) }
    }
    pub fn is_private(&self, gpa: u64) -> bool {
        let i = self.private.partition_point(|(first, _)| *first <= gpa);
        i.checked_sub(1).is_some_and(|i| gpa <= self.private[i].1)
    }
    pub fn as_slice(&self) -> &[Slot] {
        &self.slots
    }
    pub fn find(&self, gpa: u64) -> Option<&Slot> {
        let i = self.slots.partition_point(|s| s.gpa <= gpa);
        let slot = &self.slots[i.checked_sub(1)?];
        (gpa - slot.gpa < slot.size).then_some(slot)
    }
    /// The page that is at host address `hva`, in the first slot that has it.
    pub fn page_at(&self, hva: u64) -> Option<u64> {
        let slot = self.slots.iter().find(|s| hva.wrapping_sub(s.hva) < s.size)?;
        Some((slot.gpa + (hva - slot.hva)) & !0xfff)
    }
    /// Host address of `len` bytes at `gpa` if one slot holds them all.
    pub fn hva(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let slot = self.find(gpa)?;
        let offset = gpa - slot.gpa;
        (slot.size - offset >= len).then_some((slot.hva + offset) as *mut u8)
    }
}

/// Which guest pages hold translated code: a bitmap that any thread reads without a lock.
pub struct CodePages {
    bits: *mut AtomicU64,
}

// SAFETY: the mapping is shared and only accessed through atomics.
unsafe impl Send for CodePages {}
// SAFETY: as above.
unsafe impl Sync for CodePages {}

impl CodePages {
    /// Guest physical addresses from here up hold no translated code; they are interpreted.
    pub const LIMIT: u64 = 1 << 40;
    const BYTES: usize = (Self::LIMIT >> 12 >> 3) as usize;

    pub fn new() -> std::io::Result<Self> {
        // SAFETY: a fresh anonymous mapping; untouched pages cost nothing.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { bits: p.cast() })
    }
    fn word(&self, gpa: u64) -> (&AtomicU64, u64) {
        // SAFETY: callers check gpa < LIMIT.
        (unsafe { &*self.bits.add((gpa >> 18) as usize) }, 1 << (gpa >> 12 & 63))
    }
    pub fn has(&self, gpa: u64) -> bool {
        gpa < Self::LIMIT && {
            let (word, bit) = self.word(gpa);
            word.load(Ordering::Acquire) & bit != 0
        }
    }
    /// `gpa` must be below `LIMIT`.
    pub fn set(&self, gpa: u64, on: bool) {
        assert!(gpa < Self::LIMIT);
        let (word, bit) = self.word(gpa);
        if on {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }
    pub fn clear(&self) {
        // SAFETY: our own mapping; dropping its pages makes them read as zero.
        unsafe { libc::madvise(self.bits.cast(), Self::BYTES, libc::MADV_DONTNEED) };
    }
}

impl Drop for CodePages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, not used after this.
        unsafe { libc::munmap(self.bits.cast(), Self::BYTES) };
    }
}
