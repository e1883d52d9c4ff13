"""kvmclock: the pages that a guest tells the time by. (Documentation/virt/kvm/x86/msr.rst)"""

import time

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Hlt
from kvmkit.kvm.soft.x86.pvclock import (
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK_NEW,
    PVCLOCK_TSC_STABLE_BIT,
    TimeInfo,
    WallClock,
)
from kvmkit.testing.guest import DATA, Guest
from kvmkit.uapi import common as c
from kvmkit.uapi.capabilities import KVM_CAP_ADJUST_CLOCK, KVM_CAP_TSC_CONTROL

IA32_TSC = 0x10

CODE = f"""
    mov ecx, {MSR_KVM_WALL_CLOCK_NEW}
    mov eax, {DATA + 64}
    xor edx, edx
    wrmsr
    mov ecx, {MSR_KVM_SYSTEM_TIME_NEW}
    mov eax, {DATA + 1}
    wrmsr
idle:
    hlt
    jmp idle
"""


def time_info(guest: Guest) -> TimeInfo:
    return TimeInfo.unpack(guest.memory.read(DATA, 32))


def tsc(guest: Guest) -> int:
    return guest.vcpu.get_msrs([IA32_TSC])[IA32_TSC]


def test_guest_computes_the_vms_clock_from_its_tsc(kvm: Kvm) -> None:
    with Guest(kvm, CODE) as guest:
        assert guest.run() == Hlt()
        info = time_info(guest)
        assert info.version and not info.version & 1
        before = guest.vm.get_clock().clock
        now = info.at(tsc(guest))
        after = guest.vm.get_clock().clock
        # The clocks of the kernel's and of ours differ by how the TSC was measured, some parts in a million.
        assert before - 10**6 < now < after + 10**6


def test_wall_clock_is_when_the_vms_clock_was_zero(kvm: Kvm) -> None:
    with Guest(kvm, CODE) as guest:
        assert guest.run() == Hlt()
        wall = WallClock.unpack(guest.memory.read(DATA + 64, 12))
        assert wall.version and not wall.version & 1 and wall.nsec < 10**9
        now = wall.ns + guest.vm.get_clock().clock
        assert abs(now - time.time_ns()) < 10**9


def test_set_clock_reaches_the_guest(kvm: Kvm) -> None:
    with Guest(kvm, CODE) as guest:
        assert guest.run() == Hlt()
        first = time_info(guest)
        guest.vm.set_clock(c.kvm_clock_data(clock=10**15))
        assert guest.run() == Hlt()
        second = time_info(guest)
        assert second.version != first.version and not second.version & 1
        assert 10**15 <= second.at(tsc(guest)) < 10**15 + 60 * 10**9


@pytest.mark.parametrize("divisor", [3, 0.4])
def test_clock_of_a_scaled_tsc(kvm: Kvm, divisor: float) -> None:
    if not kvm.check_extension(KVM_CAP_TSC_CONTROL):
        pytest.skip(f"{kvm.engine}: no KVM_CAP_TSC_CONTROL")
    with Guest(kvm, CODE) as guest:
        guest.vcpu.set_tsc_khz(int(guest.vcpu.get_tsc_khz() / divisor))
        for _ in range(2):
            assert guest.run() == Hlt()
            # The page follows the TSC when that is set.
            guest.vcpu.set_msrs({IA32_TSC: 1 << 40})
            assert guest.run() == Hlt()
            before = guest.vm.get_clock().clock
            now = time_info(guest).at(tsc(guest))
            after = guest.vm.get_clock().clock
            assert before - 10**6 < now < after + 10**6
            guest.vcpu.set_tsc_khz(0)


def test_clock_comes_with_the_time_of_day(kvm: Kvm) -> None:
    flags = kvm.check_extension(KVM_CAP_ADJUST_CLOCK)
    if not flags & c.KVM_CLOCK_REALTIME:
        pytest.skip(f"{kvm.engine}: no KVM_CLOCK_REALTIME")
    with kvm.create_vm() as vm:
        data = vm.get_clock()
        assert data.flags & ~(c.KVM_CLOCK_TSC_STABLE | c.KVM_CLOCK_REALTIME | c.KVM_CLOCK_HOST_TSC) == 0
        if not data.flags & c.KVM_CLOCK_REALTIME:
            pytest.skip(f"{kvm.engine}: this host's clock doesn't follow the TSC")
        assert abs(data.realtime - time.time_ns()) < 10**9
        # A VM that was stopped an hour ago.
        data.flags, data.realtime = c.KVM_CLOCK_REALTIME, data.realtime - 3600 * 10**9
        vm.set_clock(data)
        assert 3600 * 10**9 <= vm.get_clock().clock - data.clock < 3660 * 10**9


def test_clock_of_tsc_that_runs_slow_or_fast() -> None:
    half = TimeInfo(2, 1000, 5, 1 << 31, 0, PVCLOCK_TSC_STABLE_BIT)
    assert half.at(1000) == 5 and half.at(1200) == 105
    assert TimeInfo(2, 0, 0, 1 << 31, 2, 0).at(100) == 200
    assert TimeInfo(2, 0, 0, 1 << 31, -2, 0).at(100) == 12


def test_soft_clock_is_stable_across_vcpus(kvm: Kvm) -> None:
    if kvm.engine != "soft":
        pytest.skip("depends on the host's TSC")
    with Guest(kvm, CODE) as guest:
        assert guest.run() == Hlt()
        assert time_info(guest).flags == PVCLOCK_TSC_STABLE_BIT


def test_wall_clock_at_0_is_not_written(kvm: Kvm) -> None:
    with Guest(kvm, "hlt") as guest:
        guest.memory.write(0, b"untouched---")
        guest.vcpu.set_msrs({MSR_KVM_WALL_CLOCK_NEW: 0})
        assert guest.run() == Hlt()
        assert guest.memory.read(0, 12) == b"untouched---"
