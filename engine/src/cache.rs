//! The code cache: translated blocks, found by what they were translated from.
//!
//! A block's key is its address, its guest physical page and the mode it was translated in, so it survives
//! CR3 switches. The cache is one memfd seen twice, once writable and once executable; space is handed out
//! in order and taken back all at once.

use crate::cpu::{Cpu, mmu_mode, tlb_invalid};
use crate::jumps::{JUMP_ENTRIES, Jumps, LINKS};
use crate::mem::CodePages;
use crate::stats;
use crate::thunks;
use crate::translate::{Decoded, Entry, Link, LinkIds, Mode, Translator};
use crate::vm::Stopped;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

/// Bytes of translated code; most guests need a few MiB.
const CACHE_BYTES: usize = 64 << 20;
/// No block is longer: 64 instructions of at most some 300 bytes each.
const BLOCK_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub rip: u64,
    /// gpa of the page.
    pub page: u64,
    pub mode: Mode,
}

pub struct Block {
    pub key: Key,
    pub guest_len: u16,
    /// Offsets in the cache.
    pub start: u32,
    pub end: u32,
    entry_a: u32,
    entry_poll: u32,
    pub entry_b: u32,
    /// Links of other blocks that lead here.
    incoming: Vec<u32>,
    map: Vec<(u32, u16, bool)>,
    valid: bool,
}

#[derive(Default)]
struct Page {
    blocks: Vec<u32>,
    /// One bit per 64 bytes that some block covers.
    granules: u64,
}

/// FxHash's mixing step; keys are addresses, not attacker-proof by need: a bad distribution costs time.
#[derive(Default)]
pub struct FastHasher(u64);
impl Hasher for FastHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b as u64);
        }
    }
    fn write_u8(&mut self, v: u8) {
        self.write_u64(v as u64);
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}
type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

/// Hands out link ids: below `LINKS / 2` with flags in the host, above with flags saved.
struct Ids {
    low: u32,
    high: u32,
}
impl LinkIds for Ids {
    fn next(&mut self, saved: bool) -> u32 {
        if saved {
            self.high += 1;
            self.high - 1
        } else {
            self.low += 1;
            self.low - 1
        }
    }
}

/// What became of a look-up for a link.
pub struct Target {
    /// Host address of the entry with flags saved.
    pub host: u64,
    pub block: u32,
}

pub struct CodeCache {
    rw: *mut u8,
    rx: *mut u8,
    used: usize,
    /// End of the fixed thunks, where `clear` resumes.
    first: usize,
    pub miss_host: u64,
    pub miss_saved: u64,
    blocks: Vec<Block>,
    map: FastMap<Key, u32>,
    pages: FastMap<u64, Page>,
    links: FastMap<u32, Link>,
    ids: Ids,
    translator: Translator,
    careful: FastMap<[u8; 16], u32>,
    /// Boxed: translated code holds their addresses.
    #[allow(clippy::vec_box)]
    decoded: Vec<Box<Decoded>>,
    /// Counts `clear`: addresses in the cache are good for one generation.
    pub generation: u64,
    stats: Arc<stats::Set>,
}

// SAFETY: owns its mappings; used under a lock.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub fn new(stats: Arc<stats::Set>) -> std::io::Result<Self> {
        // SAFETY: plain system calls; both mappings are of our own memfd.
        let (rw, rx) = unsafe {
            let fd = libc::memfd_create(c"kvmkit-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let map = |prot| libc::mmap(std::ptr::null_mut(), CACHE_BYTES, prot, libc::MAP_SHARED, fd, 0);
            let ok = libc::ftruncate(fd, CACHE_BYTES as i64) == 0;
            let rw = if ok { map(libc::PROT_READ | libc::PROT_WRITE) } else { libc::MAP_FAILED };
            let rx = if ok { map(libc::PROT_READ | libc::PROT_EXEC) } else { libc::MAP_FAILED };
            let error = std::io::Error::last_os_error();
            libc::close(fd);
            if rw == libc::MAP_FAILED || rx == libc::MAP_FAILED {
                return Err(error);
            }
            libc::madvise(rw, CACHE_BYTES, libc::MADV_DONTFORK);
            libc::madvise(rx, CACHE_BYTES, libc::MADV_DONTFORK);
            (rw.cast::<u8>(), rx.cast::<u8>())
        };
        let mut this = Self {
            rw,
            rx,
            used: 0,
            first: 0,
            miss_host: 0,
            miss_saved: 0,
            blocks: Vec::new(),
            map: FastMap::default(),
            pages: FastMap::default(),
            links: FastMap::default(),
            ids: Ids { low: 0, high: LINKS as u32 / 2 },
            translator: Translator::new(),
            careful: FastMap::default(),
            decoded: Vec::new(),
            generation: 0,
            stats,
        };
        for (n, thunk) in thunks::TABLE.iter().enumerate() {
            this.write(n * 8, &(*thunk as usize as u64).to_le_bytes());
        }
        this.used = thunks::TABLE.len() * 8;
        for save in [true, false] {
            let place = this.used;
            let code = this.translator.link_miss(save, place).to_vec();
            this.write(place, &code);
            this.used = (place + code.len()).next_multiple_of(16);
            *(if save { &mut this.miss_host } else { &mut this.miss_saved }) = this.address(place);
        }
        this.first = this.used;
        Ok(this)
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= CACHE_BYTES);
        // SAFETY: inside the writable view.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rw.add(at), bytes.len()) };
    }
    fn address(&self, offset: usize) -> u64 {
        self.rx as u64 + offset as u64
    }
    /// Every block: host address, bytes of host code, guest rip, bytes of guest code. For profilers.
    pub fn blocks(&self) -> Vec<(u64, u32, u64, u16)> {
        self.blocks.iter().map(|b| (self.address(b.start as usize), b.end - b.start, b.key.rip, b.guest_len)).collect()
    }
    pub fn bounds(&self) -> (u64, u64) {
        (self.rx as u64, self.rx as u64 + CACHE_BYTES as u64)
    }

    pub fn find(&self, key: &Key) -> Option<Target> {
        let block = *self.map.get(key)?;
        Some(Target { host: self.address(self.blocks[block as usize].entry_b as usize), block })
    }

    pub fn is_full(&self) -> bool {
        self.used + 2 * BLOCK_BYTES > CACHE_BYTES
            || self.ids.low as usize + 256 > LINKS / 2
            || self.ids.high as usize + 256 > LINKS
    }

    /// Translate the block of `key`; `code` is the guest's code from there to at most the page's end.
    ///
    /// The caller has marked the page as code and found room (`is_full`).
    pub fn translate(&mut self, key: Key, code: &[u8]) -> Target {
        let start = Instant::now();
        let place = self.used;
        let (bytes, t) = self.translator.translate(code, key.rip, key.mode, place, &mut self.ids);
        assert!(place + bytes.len() <= CACHE_BYTES);
        // SAFETY: inside the writable view; `translator` is borrowed, so no `self.write`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rw.add(place), bytes.len()) };
        let len = bytes.len();
        self.used = (place + len).next_multiple_of(16);
        let id = self.blocks.len() as u32;
        let at = |offset: u32| place as u32 + offset;
        for (n, mut link) in t.links {
            if link.site != 0 {
                link.site = at(link.site);
                link.stub = at(link.stub);
            }
            self.links.insert(n, link);
        }
        self.decoded.extend(t.decoded);
        let page = self.pages.entry(key.page).or_default();
        page.blocks.push(id);
        page.granules |= granules(key.rip & 0xfff, (key.rip & 0xfff) + t.guest_len as u64 - 1);
        self.blocks.push(Block {
            key,
            guest_len: t.guest_len,
            start: place as u32,
            end: (place + len) as u32,
            entry_a: at(t.entry_a),
            entry_poll: at(t.entry_poll),
            entry_b: at(t.entry_b),
            incoming: Vec::new(),
            map: t.map,
            valid: true,
        });
        self.map.insert(key, id);
        self.stats.count(stats::vm::TRANSLATED);
        self.stats.set(stats::vm::CACHE_BYTES, self.used as u64);
        self.stats.add(stats::vm::TRANSLATION_TIME, start.elapsed().as_nanos() as u64);
        Target { host: self.address(self.blocks[id as usize].entry_b as usize), block: id }
    }

    /// Where a link leads.
    pub fn link(&self, id: u32) -> Option<Link> {
        self.links.get(&id).copied()
    }

    /// Let link `id` lead to `block`: by patching it, or by the returned content of the vCPU's link slot.
    pub fn resolve(&mut self, id: u32, block: u32) -> Option<u64> {
        let link = self.links[&id];
        let b = &mut self.blocks[block as usize];
        let entry = match link.entry {
            Entry::A => b.entry_a,
            Entry::Poll => b.entry_poll,
            Entry::B => b.entry_b,
        };
        if !b.incoming.contains(&id) {
            b.incoming.push(id);
        }
        self.stats.count(stats::vm::CHAINED);
        if link.site == 0 {
            return Some(self.address(entry as usize));
        }
        self.patch(link.site, entry);
        None
    }

    fn patch(&mut self, site: u32, target: u32) {
        let rel = target as i32 - (site as i32 + 4);
        // SAFETY: inside the writable view, and aligned by the translator: a vCPU that executes the jump
        // meanwhile sees the old displacement or the new one.
        unsafe { &*self.rw.add(site as usize).cast::<AtomicI32>() }.store(rel, Ordering::Release);
    }

    /// Guest rip of the instruction that host address `pc` belongs to, and whether `flags_saved` holds.
    pub fn guest_rip(&self, pc: u64) -> Option<(u64, bool)> {
        let offset = pc.checked_sub(self.rx as u64).filter(|&o| o < CACHE_BYTES as u64)? as u32;
        let n = self.blocks.partition_point(|b| b.start <= offset).checked_sub(1)?;
        let block = &self.blocks[n];
        if offset > block.end {
            return None;
        }
        let m = block.map.partition_point(|m| m.0 <= offset - block.start).checked_sub(1)?;
        Some((block.key.rip + block.map[m].1 as u64, block.map[m].2))
    }

    /// Is the block at host address `pc` still valid?
    pub fn is_valid_at(&self, pc: u64) -> bool {
        let offset = pc.wrapping_sub(self.rx as u64) as u32;
        let n = self.blocks.partition_point(|b| b.start <= offset);
        n != 0 && self.blocks[n - 1].valid
    }

    /// Does any block cover a byte of `[first, last]`? May say yes for a near miss.
    pub fn overlaps(&self, first: u64, last: u64) -> bool {
        (first >> 12..=last >> 12).any(|n| {
            let page = n << 12;
            self.pages.get(&page).is_some_and(|p| p.granules & page_granules(page, first, last) != 0)
        })
    }

    /// Forget the blocks that cover a byte of `[first, last]`.
    pub fn invalidate(&mut self, first: u64, last: u64, code: &CodePages, stopped: &Stopped) {
        for n in first >> 12..=last >> 12 {
            let page = n << 12;
            let Some(mut p) = self.pages.remove(&page) else { continue };
            let blocks = std::mem::take(&mut p.blocks);
            p.granules = 0;
            for id in blocks {
                let b = &self.blocks[id as usize];
                let start = page + (b.key.rip & 0xfff);
                let end = start + b.guest_len as u64 - 1;
                if start <= last && end >= first {
                    self.remove(id, stopped);
                } else {
                    p.granules |= granules(start & 0xfff, end & 0xfff);
                    p.blocks.push(id);
                }
            }
            if p.blocks.is_empty() {
                code.set(page, false);
            } else {
                self.pages.insert(page, p);
            }
        }
    }

    fn remove(&mut self, id: u32, stopped: &Stopped) {
        let b = &mut self.blocks[id as usize];
        b.valid = false;
        let key = b.key;
        let host = self.rx as u64 + b.entry_b as u64;
        let incoming = std::mem::take(&mut b.incoming);
        self.map.remove(&key);
        let (miss_host, miss_saved) = (self.miss_host, self.miss_saved);
        let mut slots = Vec::new();
        for link_id in incoming {
            match self.links.get(&link_id).copied() {
                Some(link) if link.site != 0 => self.patch(link.site, link.stub),
                Some(_) => slots.push(link_id),
                None => {}
            }
        }
        stopped.each_cpu(|cpu| {
            let jumps: &mut Jumps = &mut cpu.jumps;
            jumps.forget(key.mode.mmu(), key.rip, host);
            for &s in &slots {
                jumps.links[s as usize] = if (s as usize) < LINKS / 2 { miss_host } else { miss_saved };
            }
        });
        // The block may be executing: its links stay usable until it is left, and resolve by themselves.
        self.stats.count(stats::vm::INVALIDATED);
    }

    /// Inside `Vm::exclusive`, with every vCPU's `Jumps` cleared by the caller.
    pub fn clear(&mut self) {
        self.used = self.first;
        self.blocks.clear();
        self.map.clear();
        self.pages.clear();
        self.links.clear();
        self.careful.clear();
        self.decoded.clear();
        self.ids = Ids { low: 0, high: LINKS as u32 / 2 };
        self.generation += 1;
        self.stats.count(stats::vm::CACHE_FLUSHES);
        self.stats.set(stats::vm::CACHE_BYTES, self.used as u64);
    }

    /// Host address of code that runs the one instruction `i` (encoded as `bytes`) on `Cpu::operand`.
    pub fn careful(&mut self, i: &iced_x86::Instruction, bytes: &[u8], integer: bool) -> u64 {
        // The same bytes mean different things in different modes.
        let mut key = [0u8; 16];
        key[..bytes.len()].copy_from_slice(bytes);
        key[15] = bytes.len() as u8 | (i.code_size() as u8) << 4;
        if let Some(&at) = self.careful.get(&key) {
            return self.address(at as usize);
        }
        let place = self.used;
        let code = self.translator.translate_one(i, place, integer).to_vec();
        self.write(place, &code);
        self.used = (place + code.len()).next_multiple_of(16);
        self.careful.insert(key, place as u32);
        self.address(place)
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; no vCPU is left to execute from them.
        unsafe {
            libc::munmap(self.rw.cast(), CACHE_BYTES);
            libc::munmap(self.rx.cast(), CACHE_BYTES);
        }
    }
}

fn granules(first: u64, last: u64) -> u64 {
    let (a, b) = (first >> 6, last >> 6);
    (u64::MAX >> (63 - (b - a))) << a
}

fn page_granules(page: u64, first: u64, last: u64) -> u64 {
    granules(first.max(page) - page, last.min(page + 0xfff) - page)
}

/// Inside `Vm::exclusive`: no vCPU may write by its TLB any more to those pages whose address is `revoked`.
pub fn revoke_writes(cpu: &mut Cpu, revoked: impl Fn(u64) -> bool) {
    for table in &mut cpu.tlb {
        for (i, e) in table.iter_mut().enumerate() {
            if e.write != tlb_invalid(i) && revoked(e.gpa & !0xfff) {
                e.write = tlb_invalid(i);
            }
        }
    }
}

const _: () = assert!(JUMP_ENTRIES.is_power_of_two() && mmu_mode::COUNT <= 4);
