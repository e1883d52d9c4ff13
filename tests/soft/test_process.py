"""The software KVM and its process: fork, threads, what is left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.kvm import GuestMemory, Kvm, Vcpu, Vm
from kvmkit.testing.guest import Guest
from kvmkit.uapi import common as c

if find_spec("kvmkit._engine") is None:
    pytest.skip("the native module kvmkit._engine isn't built", allow_module_level=True)


def in_child(check: Callable[[], bool]) -> bool:
    """What `check` says in a child of os.fork."""
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = check()
        finally:
            os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError as error:
        return "os.fork" in str(error)
    return False


def vm_calls(vm: Vm) -> list[Callable[[], object]]:
    return [
        lambda: vm.set_user_memory_region(3, 1 << 20, 4096, 1 << 30),
        lambda: vm.memory_written(0, 1),
        lambda: vm.signal_msi(0xFEE00000, 0x41),
        lambda: vm.set_gsi_routing([]),
        lambda: vm.irqfd(0, 1),
        lambda: vm.get_clock(),
        lambda: vm.set_clock(c.kvm_clock_data()),
        lambda: vm.create_vcpu(1),
    ]


def vcpu_calls(vcpu: Vcpu) -> list[Callable[[], object]]:
    return [vcpu.get_regs, vcpu.run, vcpu.nmi, vcpu.get_lapic, vcpu.kick]


def test_child_of_fork_is_refused_and_parent_goes_on() -> None:
    with kvmkit.kvm.open("soft") as system, Guest(system, "out 0x10, al", irqchip=True) as guest:
        calls = [*vm_calls(guest.vm), *vcpu_calls(guest.vcpu)]
        assert in_child(lambda: all(refused(call) for call in calls))
        guest.run()


def test_child_of_fork_may_close_and_forget() -> None:
    with kvmkit.kvm.open("soft") as system:
        guest = Guest(system, "hlt", irqchip=True)
        fd = os.eventfd(0)
        guest.vm.irqfd(fd, 5)  # with a thread that the child doesn't have

        def check() -> bool:
            nonlocal guest
            guest.vcpu.close()
            guest.vm.close()
            del guest
            gc.collect()
            return True

        assert in_child(check)
        guest.close()
        os.close(fd)


def test_slots_from_many_threads() -> None:
    """Each call sees the others' slots: none is lost, no overlap gets in."""
    with kvmkit.kvm.open("soft") as system, system.create_vm() as vm, GuestMemory(4096) as memory:
        failures: list[OSError] = []

        def add(first: int) -> None:
            for n in range(first, first + 50):
                try:
                    # All threads want the same places with slots of their own.
                    vm.set_user_memory_region(n, (n - first) << 12, 4096, memory.address)
                except OSError as error:
                    failures.append(error)

        threads = [threading.Thread(target=add, args=(first,)) for first in (0, 100, 200, 300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(failures) == 150
        for n in range(50):
            holders = 0
            for first in (0, 100, 200, 300):
                try:
                    vm.set_user_memory_region(first + n, n << 12, 0, 0)
                    holders += 1
                except OSError:
                    pass
            assert holders == 1


def test_translate_after_its_memory_is_gone(kvm: Kvm) -> None:
    """State calls go by the slots of now, not by those of the last run."""
    with Guest(kvm, "hlt") as guest:
        guest.run()
        assert guest.vcpu.translate(0x1000).valid
        guest.vm.set_user_memory_region(0, 0, 0, 0)
        assert not guest.vcpu.translate(0x1000).valid


@pytest.fixture(name="kvm")
def _kvm() -> Kvm:
    return kvmkit.kvm.open("soft")


def test_a_crash_is_reported_once() -> None:
    # The handler in front of the engine's passes on what is nobody's, to it.
    crash = """
import ctypes, faulthandler
import kvmkit.kvm
from kvmkit.testing.guest import Guest

with kvmkit.kvm.open("soft") as system, Guest(system, "hlt") as guest:
    guest.vcpu.run()
    faulthandler.enable()
    guest.vcpu.run()
    ctypes.string_at(0)
"""
    done = subprocess.run([sys.executable, "-c", crash], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error") == 1, done.stderr
