//! A small machine for tests: RAM of its own at guest physical 0, and helpers to fill it.

#![allow(dead_code)] // Each test program uses its part.

pub mod native;

use _engine::cpu::{CS, Exit, Seg, Vcpu, cr0, cr4, efer};
use _engine::mem::{Slot, Slots};
use _engine::run;
use _engine::vm::Vm;
use std::sync::Arc;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
pub const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;

/// Where `Machine::long_mode` puts things (gpa).
pub const PML4: u64 = 0x1000;
pub const GDT: u64 = 0x8000;
pub const IDT: u64 = 0x9000;
pub const TSS: u64 = 0xa000;
/// Handlers: HLT at `HANDLERS + 16 * vector`.
pub const HANDLERS: u64 = 0xb000;
/// First page that nothing else uses.
pub const FREE: u64 = 0x1_0000;

pub struct Machine {
    pub v: Vcpu,
    hva: *mut u8,
    len: usize,
}

impl Machine {
    pub fn new(ram_bytes: usize) -> Self {
        Self::with_flags(ram_bytes, 0)
    }

    pub fn with_flags(ram_bytes: usize, flags: u32) -> Self {
        // SAFETY: a fresh anonymous mapping.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ram_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(p, libc::MAP_FAILED);
        let vm = Arc::new(Vm::new(1_000_000).unwrap());
        vm.set_slots(Slots::new(vec![Slot {
            id: 0,
            flags,
            gpa: 0,
            size: ram_bytes as u64,
            hva: p as u64,
            first_page: 0,
        }]));
        let v = Vcpu::new(vm, 0).unwrap();
        Self { v, hva: p.cast(), len: ram_bytes }
    }

    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= self.len);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.hva.add(gpa as usize), bytes.len()) };
    }
    pub fn write64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }
    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        assert!(gpa as usize + N <= self.len);
        // SAFETY: inside the mapping.
        unsafe { self.hva.add(gpa as usize).cast::<[u8; N]>().read_unaligned() }
    }
    pub fn read64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa))
    }

    /// 64-bit supervisor mode: the low 2 MiB identity-mapped by 4 KiB pages, which users may access, too; GDT,
    /// IDT and TSS as `tables` makes them; rip at `FREE`, rsp at `FREE`.
    pub fn long_mode(&mut self) {
        self.write64(PML4, (PML4 + 0x1000) | P | W | U);
        self.write64(PML4 + 0x1000, (PML4 + 0x2000) | P | W | U);
        self.write64(PML4 + 0x2000, (PML4 + 0x3000) | P | W | U);
        for n in 0..512 {
            self.write64(PML4 + 0x3000 + n * 8, n << 12 | P | W | U);
        }
        self.tables();
        let c = &mut self.v.cpu;
        c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
        c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        c.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        c.xcr0 = 7;
        c.cr3 = PML4;
        c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 0x08, attr: 0xa09b, unusable: false };
        for s in [0, 2, 3] {
            c.segs[s] = Seg { base: 0, limit: u32::MAX, sel: 0x10, attr: 0xc093, unusable: false };
        }
        (c.rip, c.gpr[4]) = (FREE, FREE);
    }

    /// GDT: 08 code 64, 10 data, 18 code 32 user, 20 data user, 28 code 64 user, 30 TSS (busy), 40 code 32,
    /// 48 code 16. IDT: interrupt gates to `HANDLERS`, each a HLT.
    pub fn tables(&mut self) {
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_8b00_0000_0067 | TSS << 16,
            0,
            0x00cf_9b00_0000_ffff,
            0x0000_9b00_0000_ffff,
        ];
        for (n, d) in descriptors.iter().enumerate() {
            self.write64(GDT + n as u64 * 8, *d);
        }
        for vector in 0..256 {
            let at = HANDLERS + vector * 16;
            self.write64(IDT + vector * 16, at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16) << 48);
            self.write64(IDT + vector * 16 + 8, 0);
            self.write(at, &[0xf4]);
        }
        self.write64(TSS + 4, FREE - 0x800);
        let c = &mut self.v.cpu;
        (c.gdtr.base, c.gdtr.limit) = (GDT, 0x4f);
        (c.idtr.base, c.idtr.limit) = (IDT, 0xfff);
        c.tr = Seg { base: TSS, limit: 0x67, sel: 0x30, attr: 0x8b, unusable: false };
    }

    /// 32-bit protected mode without paging, flat; the same tables, but 8-byte gates to 32-bit code (40).
    pub fn protected_mode(&mut self) {
        self.tables();
        for vector in 0..256 {
            let at = HANDLERS + vector * 16;
            self.write64(IDT + vector * 8, at & 0xffff | 0x40 << 16 | 0x8e00 << 32 | (at >> 16) << 48);
        }
        let c = &mut self.v.cpu;
        c.cr0 = cr0::PE | cr0::NE | cr0::ET;
        c.idtr.limit = 0x7ff;
        c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 0x40, attr: 0xc09b, unusable: false };
        for s in [0, 2, 3, 4, 5] {
            c.segs[s] = Seg { base: 0, limit: u32::MAX, sel: 0x10, attr: 0xc093, unusable: false };
        }
        (c.rip, c.gpr[4]) = (FREE, FREE);
    }

    /// User mode with the segments of `tables`.
    pub fn user(&mut self) {
        let c = &mut self.v.cpu;
        c.cpl = 3;
        c.segs[CS] = Seg { base: 0, limit: u32::MAX, sel: 0x2b, attr: 0xa0fb, unusable: false };
        for s in [0, 2, 3] {
            c.segs[s] = Seg { base: 0, limit: u32::MAX, sel: 0x23, attr: 0xc0f3, unusable: false };
        }
    }

    /// Another vCPU in the same state, but with a stack of its own.
    pub fn another(&self, id: u32, stack: u64) -> Vcpu {
        let mut v = Vcpu::new(self.v.vm.clone(), id).unwrap();
        let (from, c) = (&self.v.cpu, &mut v.cpu);
        (c.cr0, c.cr3, c.cr4, c.efer, c.xcr0) = (from.cr0, from.cr3, from.cr4, from.efer, from.xcr0);
        (c.segs, c.gdtr, c.idtr, c.tr, c.gpr) = (from.segs, from.gdtr, from.idtr, from.tr, from.gpr);
        c.gpr[4] = stack;
        v
    }

    /// Put code at `FREE` and run until something leaves.
    pub fn run(&mut self, code: &[u8]) -> Exit {
        self.write(FREE, code);
        let vm = self.v.vm.clone();
        vm.note_write(None, FREE, code.len() as u64);
        self.v.cpu.rip = FREE;
        run::run(&mut self.v)
    }

    /// The vector in whose handler (`tables`) the vCPU halted.
    pub fn halted_in(&self) -> Option<u8> {
        let at = self.v.cpu.rip.wrapping_sub(HANDLERS + 1);
        (at % 16 == 0 && at < 256 * 16).then_some((at / 16) as u8)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the vCPU does not run.
        unsafe { libc::munmap(self.hva.cast(), self.len) };
    }
}

/// Every opcode byte under every map and mandatory prefix, with all ModRM bytes.
pub fn all_encodings(mut visit: impl FnMut(&[u8])) {
    let legacy: [&[u8]; 4] = [&[], &[0x66], &[0xf2], &[0xf3]];
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    let tail = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x08];
    for prefix in legacy {
        for rex in [None, Some(0x41), Some(0x48), Some(0x4f)] {
            for map in maps {
                for opcode in 0..=255u8 {
                    for modrm in 0..=255u8 {
                        let mut b = Vec::with_capacity(20);
                        b.extend(prefix);
                        b.extend(rex);
                        b.extend(map);
                        b.extend([opcode, modrm]);
                        b.extend(tail);
                        visit(&b);
                    }
                }
            }
        }
    }
    for map in 1..=3u8 {
        for payload in 0..=255u8 {
            for opcode in 0..=255u8 {
                for modrm in [0x00, 0x05, 0x44, 0x81, 0xc1, 0xd0, 0xd8, 0xe3, 0xfa] {
                    let mut b = vec![0xc4, 0xe0 | map, payload, opcode, modrm];
                    b.extend(tail);
                    visit(&b);
                }
            }
        }
    }
    for map in [1u8, 2, 3, 5, 6] {
        for w_pp in [0, 1, 2, 3, 0x80, 0x81, 0x82, 0x83] {
            for opcode in 0..=255u8 {
                // Vector lengths, a mask.
                for last in [0x08, 0x28, 0x48, 0x49] {
                    for modrm in [0x00, 0xc1] {
                        let mut b = vec![0x62, 0xf0 | map, 0x74 | w_pp, last, opcode, modrm];
                        b.extend(tail);
                        visit(&b);
                    }
                }
            }
        }
    }
}

/// Does the processor have bit `bit` in `register` (EAX to EDX) of a CPUID leaf?
pub fn host_has(leaf: u32, subleaf: u32, register: usize, bit: u32) -> bool {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx][register] >> bit & 1 != 0
}
