"""kvmclock: how a guest reads the time without leaving the guest.

The guest names a page by MSR_KVM_SYSTEM_TIME_NEW (0x4b564d01, bit 0 enables). KVM writes there, for each vCPU, what the VM's
clock was at some value of the TSC, and how to get from TSC ticks to nanoseconds: shift them by `tsc_shift` (right, if it is
negative), then multiply by `tsc_to_system_mul` / 2^32. The guest reads the TSC and computes the rest. While KVM writes, `version`
is odd; a reader that sees it odd or changed reads again. The flag *TSC stable* says that all vCPUs' clocks agree, so that a
guest may take them for one.

MSR_KVM_WALL_CLOCK_NEW (0x4b564d00) asks once for the time of day at which the VM's clock was zero. (Documentation/virt/kvm/x86/msr.rst.)

On the software engine guest and host share the TSC's rate, so a page is written when the guest names it and when KVM_SET_CLOCK
changes the clock (`engine/src/pvclock.rs`). Here are the guest's side of it, for tests and debuggers, and the layouts.
"""

import struct
from dataclasses import dataclass
from typing import Self

MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01

PVCLOCK_TSC_STABLE_BIT = 1 << 0

_TIME_INFO = struct.Struct("<IIQQIbBxx")
_WALL_CLOCK = struct.Struct("<III")


@dataclass(frozen=True)
class TimeInfo:
    """``struct pvclock_vcpu_time_info``."""

    version: int
    tsc_timestamp: int
    system_time_ns: int
    tsc_to_system_mul: int
    tsc_shift: int
    flags: int

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read the 32 bytes in guest memory."""
        version, _, tsc, time, mul, shift, flags = _TIME_INFO.unpack_from(raw)
        return cls(version, tsc, time, mul, shift, flags)

    def at(self, tsc: int) -> int:
        """Return the VM's clock in nanoseconds when the guest's TSC is `tsc`."""
        ticks = tsc - self.tsc_timestamp
        ticks = ticks << self.tsc_shift if self.tsc_shift >= 0 else ticks >> -self.tsc_shift
        return self.system_time_ns + (ticks * self.tsc_to_system_mul >> 32)


@dataclass(frozen=True)
class WallClock:
    """``struct pvclock_wall_clock``: the time of day, since 1970, at which the VM's clock was zero."""

    version: int
    sec: int
    nsec: int

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read the 12 bytes in guest memory."""
        return cls(*_WALL_CLOCK.unpack_from(raw))

    @property
    def ns(self) -> int:
        """Nanoseconds since 1970."""
        return self.sec * 10**9 + self.nsec
