//! System instructions: control registers, MSRs, CPUID, time, flags, ports.

use crate::access;
use crate::cpu::{
    CS, Cpu, Exception, Exit, GS, IoState, RAX, RBX, RCX, RDX, Res, Source, Vcpu, cr0, cr4, efer, mmu_mode, rflags,
    shadow,
};
use crate::debug::{self, Kind};
use crate::mmu::{self, PHYSICAL_BITS, is_canonical};
use crate::msr::{self, Refused};
use crate::xstate;
use std::sync::atomic::Ordering;

/// Features that the interpreter itself must know of, by CPUID leaf: (function, index, register, bit).
const OSXSAVE_BIT: u32 = 1 << 27;
const APIC_BIT: u32 = 1 << 9;

pub fn privileged(v: &Vcpu) -> Res<()> {
    if v.cpu.cpl == 0 { Ok(()) } else { Err(Exception::gp(0).into()) }
}

fn cpuid_has(v: &Vcpu, function: u32, index: u32, register: fn(&crate::cpu::CpuidEntry) -> u32, bit: u32) -> bool {
    v.cpuid
        .iter()
        .find(|e| e.function == function && (e.flags & 1 == 0 || e.index == index))
        .is_some_and(|e| register(e) >> bit & 1 != 0)
}

/// CR4 bits that the guest's CPUID offers.
fn cr4_allowed(v: &Vcpu) -> u64 {
    let mut allowed =
        cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    let leaf7 = |bit| cpuid_has(v, 7, 0, |e| e.ebx, bit);
    for (present, bit) in [
        (cpuid_has(v, 1, 0, |e| e.ecx, 26), cr4::OSXSAVE),
        (cpuid_has(v, 1, 0, |e| e.ecx, 17), cr4::PCIDE),
        (leaf7(0), cr4::FSGSBASE),
        (leaf7(7), cr4::SMEP),
        (leaf7(20), cr4::SMAP),
        (cpuid_has(v, 7, 0, |e| e.ecx, 2), cr4::UMIP),
    ] {
        if present {
            allowed |= bit;
        }
    }
    allowed
}

pub fn read_cr(v: &mut Vcpu, n: usize) -> Res<u64> {
    if !matches!(n, 0 | 2..=4 | 8) {
        return Err(Exception::ud().into());
    }
    privileged(v)?;
    Ok(match n {
        0 => v.cpu.cr0,
        2 => v.cpu.cr2,
        3 => v.cpu.cr3,
        4 => v.cpu.cr4,
        _ => v.cr8(),
    })
}

pub fn write_cr(v: &mut Vcpu, n: usize, value: u64) -> Res<()> {
    if !matches!(n, 0 | 2..=4 | 8) {
        return Err(Exception::ud().into());
    }
    privileged(v)?;
    match n {
        0 => write_cr0(v, value),
        2 => {
            v.cpu.cr2 = value;
            Ok(())
        }
        3 => write_cr3(v, value),
        4 => write_cr4(v, value),
        _ => {
            if value >> 4 != 0 {
                return Err(Exception::gp(0).into());
            }
            v.set_cr8(value);
            Ok(())
        }
    }
}

fn write_cr0(v: &mut Vcpu, value: u64) -> Res<()> {
    let gp = Err(Exception::gp(0).into());
    let value = value | cr0::ET;
    let known =
        cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
    if value >> 32 != 0
        || (value & cr0::PG != 0 && value & cr0::PE == 0)
        || (value & cr0::NW != 0 && value & cr0::CD == 0)
    {
        return gp;
    }
    let value = value & known;
    let changed = value ^ v.cpu.cr0;
    if changed & (cr0::PG | cr0::CD | cr0::NW) != 0
        && value & cr0::PG != 0
        && v.cpu.efer & efer::LME == 0
        && v.cpu.cr4 & cr4::PAE != 0
        && !mmu::load_pdptrs(v, v.cpu.cr3)
    {
        return gp;
    }
    if changed & cr0::PG != 0 {
        if value & cr0::PG != 0 {
            if v.cpu.efer & efer::LME != 0 {
                if v.cpu.cr4 & cr4::PAE == 0 || v.cpu.segs[CS].long() {
                    return gp;
                }
                v.cpu.efer |= efer::LMA;
            }
        } else {
            if v.cpu.long64() || v.cpu.cr4 & cr4::PCIDE != 0 {
                return gp;
            }
            v.cpu.efer &= !efer::LMA;
        }
    }
    v.cpu.cr0 = value;
    if value & cr0::PE == 0 {
        v.cpu.cpl = 0;
    }
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        mmu::flush_all(v);
    }
    Ok(())
}

/// Paging, and not in long mode; CR4.PAE decides whether page-directory pointers are loaded.
fn legacy_paging(cpu: &Cpu) -> bool {
    cpu.paging() && cpu.efer & efer::LMA == 0
}

/// CR3.63 under CR4.PCIDE: translations of the new address space need not be flushed.
const CR3_NO_FLUSH: u64 = 1 << 63;

fn write_cr3(v: &mut Vcpu, mut value: u64) -> Res<()> {
    // There is one address space in the TLBs at a time, whatever its PCID: they are emptied unless it stays.
    let mut stays = false;
    if v.cpu.cr4 & cr4::PCIDE != 0 {
        stays = value & CR3_NO_FLUSH != 0 && value & !CR3_NO_FLUSH == v.cpu.cr3;
        value &= !CR3_NO_FLUSH;
    }
    if v.cpu.efer & efer::LMA != 0 && value >> PHYSICAL_BITS != 0 {
        return Err(Exception::gp(0).into());
    }
    if legacy_paging(&v.cpu) && v.cpu.cr4 & cr4::PAE != 0 && !mmu::load_pdptrs(v, value) {
        return Err(Exception::gp(0).into());
    }
    v.cpu.cr3 = value;
    if !stays {
        mmu::flush_non_global(v);
    }
    Ok(())
}

/// INVPCID of `kind` with the descriptor (PCID and reserved bits, linear address).
pub fn invpcid(v: &mut Vcpu, kind: u64, [pcid, la]: [u64; 2]) -> Res<()> {
    let enabled = v.cpu.cr4 & cr4::PCIDE != 0;
    if kind > 3 || pcid >> 12 != 0 || kind < 2 && pcid != 0 && !enabled || kind == 0 && !is_canonical(la) {
        return Err(Exception::gp(0).into());
    }
    match kind {
        0 => mmu::flush_page(v, la),
        2 => mmu::flush_all(v),
        _ => mmu::flush_non_global(v),
    }
    Ok(())
}

pub fn offers_long_mode(v: &Vcpu) -> bool {
    cpuid_has(v, 0x8000_0001, 0, |e| e.edx, 29)
}

pub fn offers_invpcid(v: &Vcpu) -> bool {
    cpuid_has(v, 7, 0, |e| e.ebx, 10)
}

fn write_cr4(v: &mut Vcpu, value: u64) -> Res<()> {
    if value & !cr4_allowed(v) != 0 || (v.cpu.efer & efer::LMA != 0 && value & cr4::PAE == 0) {
        return Err(Exception::gp(0).into());
    }
    let changed = v.cpu.cr4 ^ value;
    if changed & value & cr4::PCIDE != 0 && (v.cpu.efer & efer::LMA == 0 || v.cpu.cr3 & 0xfff != 0) {
        return Err(Exception::gp(0).into());
    }
    if legacy_paging(&v.cpu)
        && value & cr4::PAE != 0
        && changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0
        && !mmu::load_pdptrs(v, v.cpu.cr3)
    {
        return Err(Exception::gp(0).into());
    }
    v.cpu.cr4 = value;
    if changed & (cr4::PGE | cr4::PAE | cr4::PSE | cr4::SMEP | cr4::SMAP | cr4::PCIDE) != 0 {
        mmu::flush_all(v);
    }
    Ok(())
}

pub fn clts(v: &mut Vcpu) -> Res<()> {
    privileged(v)?;
    v.cpu.cr0 &= !cr0::TS;
    Ok(())
}

pub fn lmsw(v: &mut Vcpu, value: u16) -> Res<()> {
    privileged(v)?;
    // PE can be set but not cleared.
    let value = v.cpu.cr0 & !0xe | value as u64 & 0xf;
    write_cr0(v, value)
}

/// SGDT, SIDT, SLDT, SMSW, STR under CR4.UMIP.
pub fn umip(v: &Vcpu) -> Res<()> {
    if v.cpu.cr4 & cr4::UMIP != 0 && v.cpu.cpl > 0 { Err(Exception::gp(0).into()) } else { Ok(()) }
}

pub fn read_dr(v: &mut Vcpu, n: usize) -> Res<u64> {
    check_dr(v, n)?;
    Ok(v.cpu.dr[debug_index(v, n)])
}

pub fn write_dr(v: &mut Vcpu, n: usize, value: u64) -> Res<()> {
    check_dr(v, n)?;
    let n = debug_index(v, n);
    load_dr(&mut v.cpu, n, value).ok_or(Exception::gp(0).into())
}

/// Load DR0 to DR3, DR6 or DR7; `None` if reserved bits are set.
pub fn load_dr(cpu: &mut Cpu, n: usize, value: u64) -> Option<()> {
    (n < 6 || value >> 32 == 0).then_some(())?;
    cpu.dr[n] = match n {
        6 => value & 0x1_e00f | 0xffff_0ff0,
        7 => value & 0xffff_2bff | 0x400,
        _ => value,
    };
    Some(())
}

fn debug_index(_: &Vcpu, n: usize) -> usize {
    match n {
        4 | 5 => n + 2,
        n => n,
    }
}

fn check_dr(v: &mut Vcpu, n: usize) -> Res<()> {
    privileged(v)?;
    if matches!(n, 4 | 5) && v.cpu.cr4 & cr4::DE != 0 {
        return Err(Exception::ud().into());
    }
    if debug::detects(v) {
        return Err(Exception { payload: debug::BD, ..Exception::new(1) }.into());
    }
    Ok(())
}

/// CPUID, as KVM answers it from the table of KVM_SET_CPUID2.
pub fn cpuid(v: &mut Vcpu) {
    let (mut leaf, index) = (v.cpu.gpr[RAX] as u32, v.cpu.gpr[RCX] as u32);
    let find = |leaf: u32| v.cpuid.iter().find(|e| e.function == leaf && (e.flags & 1 == 0 || e.index == index));
    let mut entry = find(leaf);
    if entry.is_none()
        && let Some(basic) = v.cpuid.iter().find(|e| e.function == 0)
        && !matches!(&basic.ecx.to_le_bytes(), b"cAMD" | b"uine")
    {
        // Leaves beyond their range read as the highest basic one, but not on AMD and Hygon.
        let class = match leaf {
            0x4000_0000..=0x4fff_ffff => leaf & 0xffff_ff00,
            0xc000_0000.. => 0xc000_0000,
            _ => leaf & 0x8000_0000,
        };
        if v.cpuid.iter().find(|e| e.function == class).is_none_or(|e| leaf > e.eax) {
            leaf = basic.eax;
            entry = find(leaf);
        }
    }
    let [a, mut b, mut c, mut d] = entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
    match (leaf, index) {
        (1, _) if entry.is_some() => {
            c &= !OSXSAVE_BIT;
            if v.cpu.cr4 & cr4::OSXSAVE != 0 {
                c |= OSXSAVE_BIT;
            }
            if v.cpu.msr.apic_base & 1 << 11 == 0 {
                d &= !APIC_BIT;
            }
        }
        (0xd, 0) if entry.is_some() => b = xstate::standard_bytes(v.cpu.xcr0) as u32,
        (0xd, 1) if a & 10 != 0 => b = xstate::compacted(v.cpu.xcr0).1 as u32,
        _ => {}
    }
    let g = &mut v.cpu.gpr;
    (g[RAX], g[RBX], g[RCX], g[RDX]) = (a as u64, b as u64, c as u64, d as u64);
}

pub fn xsetbv(v: &mut Vcpu) -> Res<()> {
    if v.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud().into());
    }
    privileged(v)?;
    let value = edx_eax(&v.cpu);
    let offered = v.cpuid.iter().find(|e| e.function == 0xd && e.index == 0).map_or(3, |e| e.eax as u64);
    if v.cpu.gpr[RCX] as u32 != 0 || !xstate::valid_xcr0(value, offered) {
        return Err(Exception::gp(0).into());
    }
    v.cpu.xcr0 = value;
    Ok(())
}

/// Does CPUID offer XGETBV with ECX = 1?
pub fn offers_xgetbv1(v: &Vcpu) -> bool {
    cpuid_has(v, 0xd, 1, |e| e.eax, 2)
}

pub fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.gpr[RAX] & 0xffff_ffff | cpu.gpr[RDX] << 32
}
pub fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}

/// Binary digits behind the point of `Cpu::tsc_ratio`.
pub const TSC_RATIO_BITS: u8 = 48;
pub const TSC_RATIO_ONE: u64 = 1 << TSC_RATIO_BITS;

/// The guest's time-stamp counter.
pub fn tsc(cpu: &Cpu) -> u64 {
    let scaled = (host_tsc() as u128 * cpu.tsc_ratio as u128) >> TSC_RATIO_BITS;
    (scaled as u64).wrapping_add(cpu.tsc_offset)
}

/// KVM_SET_TSC_KHZ, not 0. As KVM does, a frequency within 250 millionths of the host's is left to be the host's, so that
/// a guest that moves between hosts keeps its word for it. False if it can't be had.
pub fn set_tsc_khz(v: &mut Vcpu, khz: u32) -> bool {
    const TOLERANCE_PPM: u64 = 250;
    let host = v.vm.tsc_khz as u64;
    let near = (khz as u64).abs_diff(host) * 1_000_000 <= host * TOLERANCE_PPM;
    let ratio = if near { TSC_RATIO_ONE as u128 } else { ((khz as u128) << TSC_RATIO_BITS) / host as u128 };
    let Ok(ratio @ 1..) = u64::try_from(ratio) else { return false };
    v.cpu.tsc_ratio = ratio;
    v.tsc_khz = khz;
    tsc_changed(v);
    true
}

/// The frequency that the guest's TSC really has.
pub fn guest_tsc_khz(v: &Vcpu) -> u32 {
    if v.cpu.tsc_ratio == TSC_RATIO_ONE { v.vm.tsc_khz } else { v.tsc_khz }
}

/// The guest's TSC was set, or its frequency: what is computed from it follows.
pub fn tsc_changed(v: &mut Vcpu) {
    v.lapic_tsc_changed();
    crate::pvclock::update(v);
}

pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no memory effects.
    unsafe { std::arch::x86_64::_rdtsc() }
}

pub fn rdtsc(v: &mut Vcpu) -> Res<()> {
    if v.cpu.cr4 & cr4::TSD != 0 && v.cpu.cpl != 0 {
        return Err(Exception::gp(0).into());
    }
    let now = tsc(&v.cpu);
    set_edx_eax(&mut v.cpu, now);
    Ok(())
}

/// RDMSR or WRMSR of the MSR in ECX: the value read. The exit asks user space, whose answer is found when the
/// instruction runs again.
fn access_msr(v: &mut Vcpu, write: Option<u64>) -> Res<u64> {
    privileged(v)?;
    let index = v.cpu.gpr[RCX] as u32;
    if let Some((address, answer)) = v.io.done.first()
        && *address == IoState::msr(index)
    {
        let (error, data) = (answer[0], u64::from_le_bytes(answer[16..24].try_into().unwrap()));
        return if error == 0 { Ok(data) } else { Err(Exception::gp(0).into()) };
    }
    let result = match write {
        _ if !v.vm.msr_policy.allows(index, write.is_some()) => Err(Refused::Filtered),
        Some(value) => msr::write(v, index, value, false).map(|()| 0),
        None => msr::read(v, index, false),
    };
    result.map_err(|why| {
        let reason = why as u32;
        if v.vm.msr_policy.exits.load(Ordering::Relaxed) & reason == 0 {
            return Exception::gp(0).into();
        }
        v.io.waiting = Some((IoState::msr(index), 24, Source::Msr));
        Exit::Msr { write: write.is_some(), reason, index, data: write.unwrap_or(0) }.into()
    })
}

pub fn rdmsr(v: &mut Vcpu) -> Res<()> {
    let value = access_msr(v, None)?;
    set_edx_eax(&mut v.cpu, value);
    Ok(())
}

pub fn wrmsr(v: &mut Vcpu) -> Res<()> {
    let value = edx_eax(&v.cpu);
    access_msr(v, Some(value)).map(|_| ())
}

pub fn swapgs(v: &mut Vcpu) -> Res<()> {
    if !v.cpu.long64() {
        return Err(Exception::ud().into());
    }
    privileged(v)?;
    let c = &mut *v.cpu;
    std::mem::swap(&mut c.segs[GS].base, &mut c.msr.kernel_gs_base);
    Ok(())
}

/// RDFSBASE and its kin: allowed, and in 64-bit mode.
pub fn fsgsbase(v: &Vcpu) -> Res<()> {
    if v.cpu.long64() && v.cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Exception::ud().into()) }
}

pub fn set_segment_base(v: &mut Vcpu, index: usize, value: u64) -> Res<()> {
    if !is_canonical(value) {
        return Err(Exception::gp(0).into());
    }
    v.cpu.segs[index].base = value;
    Ok(())
}

fn iopl(cpu: &Cpu) -> u8 {
    (cpu.sysflags >> 12 & 3) as u8
}

pub fn cli(v: &mut Vcpu) -> Res<()> {
    interrupt_flag_allowed(v)?;
    v.cpu.iflag = 0;
    Ok(())
}

pub fn sti(v: &mut Vcpu) -> Res<()> {
    interrupt_flag_allowed(v)?;
    if v.cpu.iflag == 0 {
        v.cpu.iflag = 1;
        v.cpu.shadow = shadow::STI;
    }
    reconsider_interrupts(&mut v.cpu);
    Ok(())
}

/// IF may have been set: an interrupt that waited is looked at at the next block boundary.
pub fn reconsider_interrupts(cpu: &mut Cpu) {
    if cpu.iflag != 0 && cpu.irq_waiting != 0 {
        cpu.look_again();
    }
}

fn interrupt_flag_allowed(v: &Vcpu) -> Res<()> {
    let protected = v.cpu.cr0 & cr0::PE != 0;
    if protected && v.cpu.cpl > iopl(&v.cpu) { Err(Exception::gp(0).into()) } else { Ok(()) }
}

/// The value that PUSHF pushes.
pub fn pushf_value(v: &Vcpu) -> Res<u64> {
    if v.cpu.sysflags & rflags::VM != 0 && iopl(&v.cpu) < 3 {
        return Err(Exception::gp(0).into());
    }
    Ok(v.cpu.rflags() & !(rflags::VM | rflags::RF))
}

/// POPF of `value` with an operand size of `size` bytes.
pub fn popf(v: &mut Vcpu, value: u64, size: usize) -> Res<()> {
    if v.cpu.sysflags & rflags::VM != 0 && iopl(&v.cpu) < 3 {
        return Err(Exception::gp(0).into());
    }
    let mut allowed = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    if v.cpu.cpl == 0 {
        allowed |= rflags::IOPL;
    }
    if v.cpu.cpl <= iopl(&v.cpu) {
        allowed |= rflags::IF;
    }
    if size == 2 {
        allowed &= 0xffff;
    }
    let old = v.cpu.rflags();
    v.cpu.set_rflags(old & !allowed & !rflags::RF | value & allowed);
    reconsider_interrupts(&mut v.cpu);
    Ok(())
}

/// #GP(0) unless `port` may be accessed with `size` bytes.
pub fn check_port(v: &mut Vcpu, port: u16, size: usize) -> Res<()> {
    if v.cpu.cr0 & cr0::PE == 0 || (v.cpu.cpl <= iopl(&v.cpu) && v.cpu.sysflags & rflags::VM == 0) {
        return Ok(());
    }
    let gp = Exception::gp(0);
    let tr = v.cpu.tr;
    if tr.unusable || tr.attr & 8 == 0 || tr.limit < 103 {
        return Err(gp.into());
    }
    let map = access::read_u16(v, tr.base.wrapping_add(102), mmu_mode::KERNEL)? as u64;
    let at = map + port as u64 / 8;
    if at + 1 > tr.limit as u64 {
        return Err(gp.into());
    }
    let bits = access::read_u16(v, tr.base.wrapping_add(at), mmu_mode::KERNEL)?;
    if bits >> (port & 7) & ((1 << size) - 1) != 0 {
        return Err(gp.into());
    }
    Ok(())
}

/// IN: the data that user space answered, or the exit that asks for `count` items of `size` bytes.
pub fn port_in(v: &mut Vcpu, port: u16, size: usize, count: u32) -> Res<Vec<u8>> {
    let len = size * count as usize;
    debug::access(v, Kind::Port, port as u64, size);
    let io = &mut v.io;
    if let Some((address, data)) = io.done.get(io.used)
        && *address == port as u64
        && data.len() == len
    {
        io.used += 1;
        return Ok(data.clone());
    }
    io.waiting = Some((port as u64, len, Source::Port));
    io.used = 0;
    Err(Exit::Io { input: true, size: size as u8, port, count, data: Vec::new() }.into())
}

/// OUT: the exit that carries `data`, if nobody in the engine takes it. The instruction is complete.
pub fn port_out(v: &mut Vcpu, port: u16, size: usize, data: &[u8]) -> Option<Exit> {
    debug::access(v, Kind::Port, port as u64, size);
    if data.len() == size && v.vm.ioeventfd_pio(port, data) {
        return None;
    }
    let count = (data.len() / size) as u32;
    Some(Exit::Io { input: false, size: size as u8, port, count, data: data.to_vec() })
}

/// Frequency of the host's TSC: by CPUID 0x15, by a hypervisor's leaf 0x40000010, or measured for 20 ms.
pub fn host_tsc_khz() -> u32 {
    use std::arch::x86_64::__cpuid;
    use std::sync::OnceLock;
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let highest = __cpuid(0).eax;
        if highest >= 0x15 {
            let r = __cpuid(0x15);
            if r.eax != 0 && r.ebx != 0 && r.ecx != 0 {
                return (r.ecx as u64 * r.ebx as u64 / r.eax as u64 / 1000) as u32;
            }
        }
        if __cpuid(1).ecx >> 31 != 0 && (0x4000_0010..0x4000_1000).contains(&__cpuid(0x4000_0000).eax) {
            let khz = __cpuid(0x4000_0010).eax;
            if khz != 0 {
                return khz;
            }
        }
        let read = || (crate::pvclock::monotonic_ns(), host_tsc());
        let (t0, c0) = read();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (t1, c1) = read();
        ((c1 - c0) as u128 * 1_000_000 / (t1 - t0) as u128) as u32
    })
}
