//! Guest memory: the slots of a VM and access to them by guest physical address.

/// Page writes are logged (KVM_MEM_LOG_DIRTY_PAGES).
pub const LOG_DIRTY: u32 = 1;
/// Writes exit as MMIO (KVM_MEM_READONLY).
pub const READONLY: u32 = 2;

/// One memory slot: `[gpa, gpa + size)` is the host range at `hva`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub id: u32,
    pub flags: u32,
    pub gpa: u64,
    pub size: u64,
    pub hva: u64,
}

/// All slots of a VM, sorted by gpa. Replaced as a whole at a safepoint.
#[derive(Default, Clone, Debug)]
pub struct Slots {
    slots: Vec<Slot>,
}

impl Slots {
    pub fn new(mut slots: Vec<Slot>) -> Self {
        slots.sort_by_key(|s| s.gpa);
        Self { slots }
    }
    pub fn as_slice(&self) -> &[Slot] {
        &self.slots
    }
    pub fn find(&self, gpa: u64) -> Option<&Slot> {
        let i = self.slots.partition_point(|s| s.gpa <= gpa);
        let slot = &self.slots[i.checked_sub(1)?];
        (gpa - slot.gpa < slot.size).then_some(slot)
    }
    /// Host address of `len` bytes at `gpa` if one slot holds them all.
    pub fn hva(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let slot = self.find(gpa)?;
        let offset = gpa - slot.gpa;
        (slot.size - offset >= len).then_some((slot.hva + offset) as *mut u8)
    }
}
