//! The paravirtual clock, kvmclock (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
//!
//! The guest computes time from its TSC with a scale that the hypervisor publishes in guest memory. Here the TSC ticks
//! evenly, so one scale serves for ever: the page is written when the guest asks for it, and again only if the clock
//! or the TSC is set.

use crate::access;
use crate::cpu::Vcpu;
use crate::smm;
use crate::sys;

const TSC_STABLE: u8 = 1;
/// The guest was stopped by its host: it clears this itself, and doesn't take the gap for a hang of its own.
const GUEST_STOPPED: u8 = 2;

/// TSC ticks to nanoseconds: (multiplier of 2^-32, shift applied before).
pub fn scale(tsc_khz: u32) -> (u32, i8) {
    let mut shift = 0i8;
    let mut hz = tsc_khz as u64 * 1000;
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    (((1_000_000_000u128 << 32) / hz as u128) as u32, shift)
}

/// Nanoseconds since the VM's clock was zero.
pub fn vm_clock_ns(v: &Vcpu) -> u64 {
    let now = monotonic_ns() as i64;
    now.wrapping_add(v.vm.clock_offset_ns.load(std::sync::atomic::Ordering::Relaxed)) as u64
}

pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC_RAW)
}

pub fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid structure.
    unsafe { libc::clock_gettime(clock, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Write the vCPU's `pvclock_vcpu_time_info` if it has registered one.
pub fn update(v: &mut Vcpu) {
    smm::outside(v, write_time_info);
}

fn write_time_info(v: &mut Vcpu) {
    let msr = v.cpu.msr.kvm_system_time;
    if msr & 1 == 0 {
        return;
    }
    let gpa = msr & !1;
    let (multiplier, shift) = scale(sys::guest_tsc_khz(v));
    let (ns, tsc) = (vm_clock_ns(v), sys::tsc(&v.cpu));
    let mut old = [0; 32];
    if (gpa & 0xfff) + 32 > 4096 || v.slots.find(gpa).is_none() || access::read_physical(v, gpa, &mut old).is_err() {
        return;
    }
    let version = (u32::from_le_bytes(old[..4].try_into().unwrap()) | 1).wrapping_add(1);
    let stopped = if std::mem::take(&mut v.tell_stopped) { GUEST_STOPPED } else { old[29] & GUEST_STOPPED };
    let mut info = [0u8; 32];
    info[0..4].copy_from_slice(&version.wrapping_sub(1).to_le_bytes());
    info[8..16].copy_from_slice(&tsc.to_le_bytes());
    info[16..24].copy_from_slice(&ns.to_le_bytes());
    info[24..28].copy_from_slice(&multiplier.to_le_bytes());
    info[28] = shift as u8;
    info[29] = TSC_STABLE | stopped;
    // An odd version tells readers to wait.
    for part in [&info[..], &version.to_le_bytes()[..]] {
        if access::write_physical(v, gpa, part).is_err() {
            return;
        }
    }
}

/// Write `pvclock_wall_clock` at `gpa`, if that isn't 0: the time of day when the VM's clock was zero.
pub fn write_wall_clock(v: &mut Vcpu, gpa: u64) {
    smm::outside(v, |v| write_time_of_day(v, gpa));
}

fn write_time_of_day(v: &mut Vcpu, gpa: u64) {
    if gpa == 0 {
        return;
    }
    let ns = clock_ns(libc::CLOCK_REALTIME).wrapping_sub(vm_clock_ns(v));
    let mut old = [0; 4];
    if (gpa & 0xfff) + 12 > 4096 || v.slots.find(gpa).is_none() || access::read_physical(v, gpa, &mut old).is_err() {
        return;
    }
    let version = (u32::from_le_bytes(old) | 1).wrapping_add(1);
    let mut b = [0u8; 12];
    b[0..4].copy_from_slice(&version.to_le_bytes());
    b[4..8].copy_from_slice(&((ns / 1_000_000_000) as u32).to_le_bytes());
    b[8..12].copy_from_slice(&((ns % 1_000_000_000) as u32).to_le_bytes());
    let _ = access::write_physical(v, gpa, &b);
}
