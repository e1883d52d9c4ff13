"""What is refused, and with which errno."""

import errno
import os
from collections.abc import Callable

import pytest

from kvmkit import kvm as kvmkit_kvm
from kvmkit.kvm import GuestMemory, Kvm, Vcpu, Vm, irqchip_route, msi_route
from kvmkit.testing import Guest
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import KVM_CAP_IRQCHIP, KVM_CAP_NR_MEMSLOTS, KVM_CAP_USER_MEMORY
from kvmkit.uapi.common import KVM_MEM_READONLY, kvm_irq_routing_entry
from kvmkit.uapi.x86 import KVM_IRQCHIP_IOAPIC

VmCall = Callable[[Vm, int], object]


def ioapic_route(gsi: int, pin: int) -> kvm_irq_routing_entry:
    return irqchip_route(gsi, KVM_IRQCHIP_IOAPIC, pin)


@pytest.mark.backs("KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE")
def test_system(kvm: Kvm) -> None:
    assert kvm.get_api_version() == 12
    assert kvm.get_vcpu_mmap_size() >= 4096
    assert kvm.check_extension(KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(KVM_CAP_IRQCHIP) == 1
    assert kvm.check_extension(KVM_CAP_NR_MEMSLOTS) >= 32
    assert kvm.check_extension(100_000) == 0


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda vm, hva: vm.set_user_memory_region(1, 0x1000, 0x1000, hva), errno.EEXIST),
        (lambda vm, hva: vm.set_user_memory_region(1, 0x100800, 0x1000, hva), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(1, 0x100000, 0x800, hva), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(1, 0x100000, 0x1000, hva + 1), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(1, 0x100000, 0x1000, hva, 1 << 15), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(0, 0, 0x1000, hva), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(0, 0, 0x2000, hva, KVM_MEM_READONLY), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(5, 0, 0, 0), errno.EINVAL),
        (lambda vm, hva: vm.set_user_memory_region(1, (1 << 64) - 0x1000, 0x2000, hva), errno.EINVAL),
        (lambda vm, hva: vm.get_dirty_log(0), errno.ENOENT),
        (lambda vm, hva: vm.get_dirty_log(7), errno.ENOENT),
        (lambda vm, hva: vm.irq_line(4, 1), errno.ENXIO),
        (lambda vm, hva: vm.get_irqchip(0), errno.ENXIO),
        (lambda vm, hva: vm.get_pit2(), errno.ENXIO),
        (lambda vm, hva: vm.create_vcpu(1 << 20), errno.EINVAL),
        (lambda vm, hva: vm.ioeventfd(0x10, 3, 0), errno.EINVAL),
        (lambda vm, hva: vm.ioeventfd(0x10, 1, 0, 0, 1 << 30), errno.EINVAL),
        (lambda vm, hva: vm.irqfd(1_000_000, 4), errno.EINVAL),
    ],
)
def test_vm_without_chips(kvm: Kvm, call: VmCall, number: int) -> None:
    """A VM with one slot of 8 KiB at 0."""
    with GuestMemory(0x4000) as memory, kvm.create_vm() as vm:
        vm.set_user_memory_region(0, 0, 0x2000, memory.address)
        with pytest.raises(OSError, match="KVM_") as error:
            call(vm, memory.address)
        assert error.value.errno == number


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda vm, fd: vm.create_irqchip(), errno.EEXIST),
        (lambda vm, fd: vm.create_pit2(), errno.EEXIST),
        (lambda vm, fd: vm.get_irqchip(3), errno.EINVAL),
        (lambda vm, fd: vm.create_vcpu(0), errno.EEXIST),
        (lambda vm, fd: vm.irqfd(1_000_000, 4), errno.EBADF),
        (lambda vm, fd: vm.irqfd(fd, 4, 1 << 30), errno.EINVAL),
        (lambda vm, fd: (vm.irqfd(fd, 4), vm.irqfd(fd, 4)), errno.EBUSY),
        (lambda vm, fd: (vm.ioeventfd(0x100, 4, fd), vm.ioeventfd(0x100, 4, fd)), errno.EEXIST),
        (lambda vm, fd: vm.set_gsi_routing([msi_route(1 << 20, 0, 0)]), errno.EINVAL),
        (lambda vm, fd: vm.set_gsi_routing([msi_route(30, 0, 0), msi_route(30, 0, 1)]), errno.EINVAL),
        (lambda vm, fd: vm.set_gsi_routing([ioapic_route(5, 4), ioapic_route(5, 5)]), errno.EINVAL),
        (lambda vm, fd: vm.set_gsi_routing([ioapic_route(5, 24)]), errno.EINVAL),
        (lambda vm, fd: vm.set_boot_cpu_id(1), errno.EBUSY),
    ],
)
def test_vm_with_chips(kvm: Kvm, call: VmCall, number: int) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with Guest(kvm, "hlt", irqchip=True, pit=True) as guest:
            with pytest.raises(OSError, match="KVM_") as error:
                call(guest.vm, fd)
            assert error.value.errno == number
    finally:
        os.close(fd)


def test_pit_without_irqchip(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        try:
            vm.create_pit2()
        except FileNotFoundError as error:
            assert "KVM_CREATE_IRQCHIP first" in str(error)
        else:
            assert kvm.engine == "linux"
            pytest.skip("linux: this kernel creates a PIT without interrupt chips")


def test_irqchip_after_a_vcpu(kvm: Kvm) -> None:
    with (
        kvm.create_vm() as vm,
        vm.create_vcpu(0),
        pytest.raises(OSError, match="KVM_CREATE_IRQCHIP") as error,
    ):
        vm.create_irqchip()
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("irqchip", "call", "number"),
    [
        (True, lambda vcpu: vcpu.interrupt(0x20), errno.ENXIO),
        (False, lambda vcpu: vcpu.interrupt(256), errno.EINVAL),
        (False, lambda vcpu: vcpu.get_lapic(), errno.EINVAL),
        (True, lambda vcpu: vcpu.set_mp_state(77), errno.EINVAL),
        (True, lambda vcpu: vcpu.set_debugregs(x86.kvm_debugregs(dr7=1 << 40)), errno.EINVAL),
        (True, lambda vcpu: vcpu.set_vcpu_events(x86.kvm_vcpu_events(flags=1 << 31)), errno.EINVAL),
        (True, lambda vcpu: vcpu.arm_vcpu_finalize(4), errno.ENOTTY),
    ],
)
def test_vcpu(kvm: Kvm, irqchip: bool, call: Callable[[Vcpu], object], number: int) -> None:
    with Guest(kvm, "hlt", irqchip=irqchip) as guest:
        with pytest.raises(OSError, match="KVM_") as error:
            call(guest.vcpu)
        assert error.value.errno == number


@pytest.mark.parametrize("change", [{"cr4": 0}, {"cr0": 1 << 31}, {"cr3": 1 << 60}, {"efer": 0}])
def test_contradictory_sregs(kvm: Kvm, change: dict[str, int]) -> None:
    """Paging without protection, long mode without PAE, …: EINVAL and nothing changed."""
    with Guest(kvm, "hlt") as guest:
        sregs = guest.vcpu.get_sregs()
        before = bytes(sregs)
        for name, value in change.items():
            setattr(sregs, name, value)
        with pytest.raises(OSError, match="KVM_SET_SREGS") as error:
            guest.vcpu.set_sregs(sregs)
        assert error.value.errno == errno.EINVAL
        assert bytes(guest.vcpu.get_sregs()) == before


def test_closed_objects_answer_ebadf(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for descriptor in (vcpu, vm):
        assert not descriptor.closed
        descriptor.close()
        descriptor.close()
        assert descriptor.closed
    for call in (vcpu.get_regs, vcpu.run, lambda: vm.create_vcpu(1)):
        with pytest.raises(OSError) as error:
            call()
        assert error.value.errno == errno.EBADF
    vcpu.kick()  # a thread that is late may still do this


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine 'xen'"):
        kvmkit_kvm.open("xen")


def test_missing_device_says_what_to_do(tmp_path: os.PathLike[str]) -> None:
    from kvmkit.kvm.linux import open_kvm

    with pytest.raises(FileNotFoundError, match="no KVM module is loaded"):
        open_kvm(os.path.join(tmp_path, "kvm"))
    with pytest.raises(OSError, match="not KVM"):
        open_kvm("/dev/null")
