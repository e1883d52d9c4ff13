//! Model-specific registers (Intel SDM volume 4; AMD APM volume 2, appendix A; the kernel's
//! Documentation/virt/kvm/x86/msr.rst for KVM's own).

use crate::cpu::{Cpu, FS, GS, Vcpu, cr0, efer};
use crate::mmu::{self, is_canonical};
use crate::{pvclock, sys};
use std::sync::RwLock;
use std::sync::atomic::AtomicU32;

/// MSRs that a vCPU's state consists of: KVM_GET_MSR_INDEX_LIST.
pub const LIST: &[u32] = &[
    0x10,
    0x1b,
    0x34,
    0x3a,
    0x3b,
    0x48,
    0x8b,
    0x9e,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x17a,
    0x17b,
    0x1a0,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    0x277,
    0x2ff,
    0x6e0,
    0x4b56_4d00,
    0x4b56_4d01,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

/// Index into the fixed-range MTRRs.
fn fixed_mtrr(index: u32) -> Option<usize> {
    Some(match index {
        0x250 => 0,
        0x258 | 0x259 => 1 + (index - 0x258) as usize,
        0x268..=0x26f => 3 + (index - 0x268) as usize,
        _ => return None,
    })
}

/// Why an access to an MSR raises #GP. The numbers are KVM_MSR_EXIT_REASON_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Invalid = 1,
    Unknown = 2,
    Filtered = 4,
}
use Refused::{Invalid, Unknown};

/// Read an MSR; an error where the processor raises #GP. `host`: by KVM_GET_MSRS.
pub fn read(v: &mut Vcpu, index: u32, host: bool) -> Result<u64, Refused> {
    let c: &Cpu = &v.cpu;
    let m = &c.msr;
    Ok(match index {
        0x10 => sys::tsc(c),
        0x17 => 0, // IA32_PLATFORM_ID
        0x1b => m.apic_base,
        0x3a => 1, // IA32_FEATURE_CONTROL: locked, nothing enabled
        0x3b => m.tsc_adjust,
        0x34 => v.smi_count,
        0x48 => m.spec_ctrl,
        0x8b => m.microcode,
        0x9e if host => v.smbase,
        0x9e => return Err(Invalid),
        0xce => 0,     // MSR_PLATFORM_INFO
        0xfe => 0x508, // 8 variable ranges, fixed ranges, write combining
        0x10a => arch_capabilities(),
        0x174 => m.sysenter_cs,
        0x175 => m.sysenter_esp,
        0x176 => m.sysenter_eip,
        0 | 1 => 0, // the Pentium's machine check
        0x179..=0x17b | 0x400..=0x47f => return v.mce.read(index, host),
        0x1a0 => m.misc_enable,
        0x200..=0x20f => m.mtrr_var[(index - 0x200) as usize],
        0x277 => m.pat,
        0x2ff => m.mtrr_def_type,
        0xda0 => 0, // IA32_XSS: no supervisor components
        0x6e0 | 0x800..=0x8ff => return v.lapic_msr_read(index).ok_or(Invalid),
        0xc000_0080 => c.efer,
        0xc000_0081 => m.star,
        0xc000_0082 => m.lstar,
        0xc000_0083 => m.cstar,
        0xc000_0084 => m.sfmask,
        0xc000_0100 => c.segs[FS].base,
        0xc000_0101 => c.segs[GS].base,
        0xc000_0102 => m.kernel_gs_base,
        0xc000_0103 => m.tsc_aux,
        // AMD configuration that kernels read on AMD processors: nothing to report.
        0xc000_0104
        | 0xc001_0000..=0xc001_0007
        | 0xc001_0010
        | 0xc001_0015
        | 0xc001_0055
        | 0xc001_0112
        | 0xc001_1029 => 0,
        0x11 | 0x4b56_4d00 => m.kvm_wall_clock,
        0x12 | 0x4b56_4d01 => m.kvm_system_time,
        _ => m.mtrr_fixed[fixed_mtrr(index).ok_or(Unknown)?],
    })
}

/// Write an MSR; an error where the processor raises #GP. `host`: by KVM_SET_MSRS, which may set more.
pub fn write(v: &mut Vcpu, index: u32, value: u64, host: bool) -> Result<(), Refused> {
    let valid = |ok: bool| if ok { Ok(()) } else { Err(Invalid) };
    let canonical = valid(is_canonical(value));
    match index {
        0x10 => {
            let delta = value.wrapping_sub(sys::tsc(&v.cpu));
            v.cpu.tsc_offset = v.cpu.tsc_offset.wrapping_add(delta);
            if !host {
                v.cpu.msr.tsc_adjust = v.cpu.msr.tsc_adjust.wrapping_add(delta);
            }
            sys::tsc_changed(v);
        }
        0x1b => return v.write_apic_base(value, host).ok_or(Invalid),
        0x3b => {
            let delta = value.wrapping_sub(v.cpu.msr.tsc_adjust);
            if !host {
                v.cpu.tsc_offset = v.cpu.tsc_offset.wrapping_add(delta);
            }
            v.cpu.msr.tsc_adjust = value;
            sys::tsc_changed(v);
        }
        0x34 => {
            valid(host)?;
            v.smi_count = value;
        }
        0x48 => {
            valid(value & !7 == 0)?;
            v.cpu.msr.spec_ctrl = value;
        }
        0x49 => valid(value & !1 == 0)?, // IA32_PRED_CMD
        0x8b if host => v.cpu.msr.microcode = value,
        0x8b | 0x79 => {}
        0x9e => {
            valid(host)?;
            v.smbase = value;
        }
        0xda0 => valid(value == 0)?,
        // Read-only; user space may give back what it read.
        0x17 | 0x3a | 0xce | 0xfe | 0x10a => valid(host)?,
        0x174 => v.cpu.msr.sysenter_cs = value & 0xffff_ffff,
        0x175 => {
            canonical?;
            v.cpu.msr.sysenter_esp = value;
        }
        0x176 => {
            canonical?;
            v.cpu.msr.sysenter_eip = value;
        }
        0x179..=0x17b | 0x400..=0x47f => return v.mce.write(index, value, host),
        0x1a0 => v.cpu.msr.misc_enable = value,
        0x200..=0x20f => v.cpu.msr.mtrr_var[(index - 0x200) as usize] = value,
        0x277 => {
            let ok = value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7));
            valid(ok)?;
            v.cpu.msr.pat = value;
        }
        0x2ff => v.cpu.msr.mtrr_def_type = value,
        0x6e0 | 0x800..=0x8ff => return v.lapic_msr_write(index, value).ok_or(Invalid),
        0xc000_0080 => return write_efer(v, value, host).ok_or(Invalid),
        0xc000_0081 => v.cpu.msr.star = value,
        0xc000_0082 => {
            canonical?;
            v.cpu.msr.lstar = value;
        }
        0xc000_0083 => {
            canonical?;
            v.cpu.msr.cstar = value;
        }
        0xc000_0084 => v.cpu.msr.sfmask = value & 0xffff_ffff,
        0xc000_0100 => {
            canonical?;
            v.cpu.segs[FS].base = value;
        }
        0xc000_0101 => {
            canonical?;
            v.cpu.segs[GS].base = value;
        }
        0xc000_0102 => {
            canonical?;
            v.cpu.msr.kernel_gs_base = value;
        }
        0xc000_0103 => {
            valid(value >> 32 == 0)?;
            v.cpu.msr.tsc_aux = value;
        }
        0xc001_0000..=0xc001_0007 | 0xc001_0010 | 0xc001_0015 | 0xc001_1029 => {}
        0x11 | 0x4b56_4d00 => {
            v.cpu.msr.kvm_wall_clock = value;
            pvclock::write_wall_clock(v, value);
        }
        0x12 | 0x4b56_4d01 => {
            v.cpu.msr.kvm_system_time = value;
            pvclock::update(v);
        }
        _ => v.cpu.msr.mtrr_fixed[fixed_mtrr(index).ok_or(Unknown)?] = value,
    }
    Ok(())
}

fn write_efer(v: &mut Vcpu, value: u64, host: bool) -> Option<()> {
    let known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    (value & !known == 0).then_some(())?;
    let c = &mut *v.cpu;
    let changed = c.efer ^ value;
    if !host && changed & efer::LME != 0 && c.cr0 & cr0::PG != 0 {
        return None;
    }
    // LMA follows CR0.PG; only KVM_SET_MSRS and KVM_SET_SREGS set it directly.
    c.efer = if host { value } else { value & !efer::LMA | c.efer & efer::LMA };
    if changed & (efer::NXE | efer::LMA) != 0 {
        mmu::flush_all(v);
    }
    Some(())
}

/// What KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR say of the guest's RDMSR and WRMSR.
#[derive(Default)]
pub struct Policy {
    filter: RwLock<Filter>,
    /// For which reasons (`Refused`) user space is asked instead of raising #GP.
    pub exits: AtomicU32,
}

#[derive(Default)]
pub struct Filter {
    /// MSRs in no range are denied.
    pub deny: bool,
    /// The first that holds an MSR, and is for this kind of access, decides.
    pub ranges: Vec<FilterRange>,
}

pub struct FilterRange {
    /// KVM_MSR_FILTER_READ (1) and _WRITE (2).
    pub kinds: u32,
    pub base: u32,
    pub count: u32,
    /// A bit for each MSR: 1 allows.
    pub bitmap: Vec<u8>,
}

impl Policy {
    pub fn set_filter(&self, filter: Filter) {
        *self.filter.write().unwrap() = filter;
    }

    pub fn allows(&self, index: u32, write: bool) -> bool {
        // The x2APIC's are never filtered (api.rst, KVM_X86_SET_MSR_FILTER).
        if (0x800..0x900).contains(&index) {
            return true;
        }
        let filter = self.filter.read().unwrap();
        let kind = if write { 2 } else { 1 };
        for range in &filter.ranges {
            if range.kinds & kind != 0
                && let Some(n) = index.checked_sub(range.base)
                && n < range.count
            {
                return range.bitmap[n as usize / 8] >> (n & 7) & 1 != 0;
            }
        }
        !filter.deny
    }
}

/// IA32_ARCH_CAPABILITIES: the weaknesses that the host's kernel says this processor does not have. Guest code
/// runs on it, so what holds for the host holds for the guest.
pub fn arch_capabilities() -> u64 {
    use std::sync::OnceLock;
    static VALUE: OnceLock<u64> = OnceLock::new();
    *VALUE.get_or_init(|| {
        [
            ("meltdown", 0x1),                   // RDCL_NO
            ("l1tf", 0x8),                       // SKIP_L1DFL_VMENTRY
            ("spec_store_bypass", 0x10),         // SSB_NO
            ("mds", 0x20),                       // MDS_NO
            ("itlb_multihit", 0x40),             // PSCHANGE_MC_NO
            ("tsx_async_abort", 0x100),          // TAA_NO
            ("mmio_stale_data", 0xe000),         // SBDR_SSDP_NO, FBSDP_NO, PSDP_NO
            ("gather_data_sampling", 1 << 26),   // GDS_NO
            ("reg_file_data_sampling", 1 << 27), // RFDS_NO
        ]
        .into_iter()
        .filter(|(name, _)| {
            let path = format!("/sys/devices/system/cpu/vulnerabilities/{name}");
            std::fs::read_to_string(path).is_ok_and(|s| s.trim() == "Not affected")
        })
        .map(|(_, bits)| bits)
        .sum()
    })
}
