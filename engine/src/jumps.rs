//! Where a vCPU's indirect and cross-page jumps lead, for the translations that its TLB holds now.
//!
//! A block may jump straight into another only within one page: the target of any other jump depends on
//! how the target's page is mapped, which differs between vCPUs and changes without a store to the code.
//! Such jumps go through per-vCPU memory instead: an indirect jump through a hash by target address, a
//! direct one through a link slot of its own. Both are emptied with the TLB, non-global entries at a
//! CR3 write and all of them at a full flush.

use crate::cpu::mmu_mode;

pub const JUMP_ENTRIES: usize = 4096;
/// Link slots; the code cache is flushed when they run out.
pub const LINKS: usize = 1 << 17;
/// Longer logs fall back to clearing everything.
const LOG: usize = 4096;

#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct JumpEntry {
    /// Target rip; when empty, one that another entry is for (a guest may jump anywhere).
    pub rip: u64,
    /// Host address of the block's entry with flags saved.
    pub host: u64,
}

#[repr(C, align(64))]
pub struct Jumps {
    pub table: [[JumpEntry; JUMP_ENTRIES]; mmu_mode::COUNT],
    pub links: [u64; LINKS],
    /// What an empty link slot holds, the thunk that resolves it: for the lower half of the slots, entered
    /// with flags in the host, and for the upper half, with flags saved.
    miss: [u64; 2],
    log_len: usize,
    /// Filled non-global places: table entries as mode << 24 | index | 1 << 31, link slots as their index.
    log: [u32; LOG],
}

const fn empty(index: usize) -> JumpEntry {
    JumpEntry { rip: (index ^ 1) as u64, host: 0 }
}

impl Jumps {
    pub fn init(&mut self) {
        self.clear();
    }
    pub fn set_miss(&mut self, miss: [u64; 2]) {
        self.miss = miss;
        self.clear();
    }
    fn record(&mut self, global: bool, place: u32) {
        if !global {
            if self.log_len < LOG {
                self.log[self.log_len] = place;
            }
            self.log_len += 1;
        }
    }
    pub fn index(rip: u64) -> usize {
        rip as usize & (JUMP_ENTRIES - 1)
    }
    pub fn lookup(&self, mode: usize, rip: u64) -> Option<u64> {
        let e = &self.table[mode][Self::index(rip)];
        (e.rip == rip).then_some(e.host)
    }
    pub fn insert(&mut self, mode: usize, rip: u64, host: u64, global: bool) {
        let i = Self::index(rip);
        self.table[mode][i] = JumpEntry { rip, host };
        self.record(global, 1 << 31 | (mode as u32) << 24 | i as u32);
    }
    /// Forget that `rip` leads to `host`, if that is what it leads to.
    pub fn forget(&mut self, mode: usize, rip: u64, host: u64) {
        let i = Self::index(rip);
        if self.table[mode][i].host == host {
            self.table[mode][i] = empty(i);
        }
    }
    pub fn set_link(&mut self, link: u32, host: u64, global: bool) {
        self.links[link as usize] = host;
        self.record(global, link);
    }
    /// Forget every target. Any change of what code an address means, other than by CR3.
    pub fn clear(&mut self) {
        for table in self.table.iter_mut() {
            for (i, e) in table.iter_mut().enumerate() {
                *e = empty(i);
            }
        }
        let (low, high) = self.links.split_at_mut(LINKS / 2);
        low.fill(self.miss[0]);
        high.fill(self.miss[1]);
        self.log_len = 0;
    }
    /// Forget targets in non-global pages: a CR3 write.
    pub fn clear_non_global(&mut self) {
        if self.log_len > LOG {
            return self.clear();
        }
        for i in 0..self.log_len {
            let place = self.log[i];
            if place >> 31 != 0 {
                let i = place as usize & (JUMP_ENTRIES - 1);
                self.table[(place >> 24 & 3) as usize][i] = empty(i);
            } else {
                self.links[place as usize] = self.miss[(place as usize >= LINKS / 2) as usize];
            }
        }
        self.log_len = 0;
    }
    /// INVLPG: forget targets in the page of `la`. Link slots do not tell their targets; they go as a whole
    /// if the page may hold code.
    pub fn clear_page(&mut self, la: u64, code: bool) {
        if code || self.table.iter().flatten().any(|e| e.host != 0 && e.rip >> 12 == la >> 12) {
            self.clear();
        }
    }
}
