"""irqfd and ioeventfd: whose eventfd it is, and what is left when the VM goes. (api.rst 4.59, 4.75)"""

import errno
import os
import select
from collections.abc import Callable, Iterator

import pytest

from kvmkit.kvm import Kvm, Vcpu, Vm
from kvmkit.kvm.soft.x86.lapic import IRR, SVR, Lapic
from kvmkit.uapi import common as c

DEASSIGN_IRQFD = c.KVM_IRQFD_FLAG_DEASSIGN
DEASSIGN, DATAMATCH = c.KVM_IOEVENTFD_FLAG_DEASSIGN, c.KVM_IOEVENTFD_FLAG_DATAMATCH
GSI, VECTOR = 40, 0x41


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        yield vm


@pytest.fixture
def eventfd() -> Iterator[Callable[[], int]]:
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def route_msi(vm: Vm, *gsis: int, vector: int = VECTOR) -> None:
    entries = []
    for gsi in gsis:
        entry = c.kvm_irq_routing_entry(gsi=gsi, type=c.KVM_IRQ_ROUTING_MSI)
        entry.u.msi.address_lo, entry.u.msi.data = 0xFEE00000, vector
        entries.append(entry)
    vm.set_gsi_routing(entries)


def enabled(vm: Vm) -> Vcpu:
    vcpu = vm.create_vcpu(0)
    Lapic(vcpu)[SVR] = 0x1FF
    return vcpu


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_irqfd_knows_an_eventfd_by_itself_not_by_its_number(vm: Vm, eventfd: Callable[[], int]) -> None:
    fd = eventfd()
    vm.irqfd(fd, GSI)
    other_number = os.dup(fd)
    try:
        assert errno_of(lambda: vm.irqfd(other_number, GSI)) == errno.EBUSY
        assert errno_of(lambda: vm.irqfd(fd, GSI + 1)) == errno.EBUSY  # one GSI each
        vm.irqfd(other_number, GSI, DEASSIGN_IRQFD)
        vm.irqfd(fd, GSI + 1)
    finally:
        os.close(other_number)


def test_number_of_a_closed_eventfd_can_be_used_again(vm: Vm) -> None:
    fd = os.eventfd(0)
    vm.irqfd(fd, GSI)
    os.close(fd)
    again = os.eventfd(0)
    try:
        assert again == fd
        vm.irqfd(again, GSI + 1)
    finally:
        os.close(again)


def test_irqfd_of_an_eventfd_that_is_signalled_already(vm: Vm, eventfd: Callable[[], int]) -> None:
    vcpu, fd = enabled(vm), eventfd()
    route_msi(vm, GSI)
    os.eventfd_write(fd, 1)
    vm.irqfd(fd, GSI)
    while not Lapic(vcpu).vectors(IRR):
        select.select([], [], [], 0)  # the engine's thread takes it, however slow the host
    assert Lapic(vcpu).vectors(IRR) == [VECTOR]


def test_irqfd_that_is_taken_back_raises_nothing(vm: Vm, eventfd: Callable[[], int]) -> None:
    vcpu, fd, after = enabled(vm), eventfd(), eventfd()
    route_msi(vm, GSI, GSI + 1)
    vm.irqfd(fd, GSI)
    vm.irqfd(fd, GSI, DEASSIGN_IRQFD)
    os.eventfd_write(fd, 1)
    vm.irqfd(after, GSI + 1)
    assert os.eventfd_read(fd) == 1  # nobody has taken it
    assert Lapic(vcpu).vectors(IRR) == []


def test_ioeventfd_is_taken_back_by_its_own_eventfd_alone(vm: Vm, eventfd: Callable[[], int]) -> None:
    fd, stranger = eventfd(), eventfd()
    vm.ioeventfd(0xFEB00000, 4, fd)
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, stranger, 0, DEASSIGN)) == errno.ENOENT
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, 1 << 20, 0, DEASSIGN)) == errno.EBADF
    vm.ioeventfd(0xFEB00000, 4, fd, 0, DEASSIGN)
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, fd, 0, DEASSIGN)) == errno.ENOENT


def test_ioeventfds_differ_by_datamatch(vm: Vm, eventfd: Callable[[], int]) -> None:
    fd = eventfd()
    vm.ioeventfd(0xFEB00000, 4, fd, 1, DATAMATCH)
    vm.ioeventfd(0xFEB00000, 4, fd, 2, DATAMATCH)
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, fd, 2, DATAMATCH)) == errno.EEXIST
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, fd)) == errno.EEXIST  # any data
    assert errno_of(lambda: vm.ioeventfd(0xFEB00000, 4, fd, 3, DATAMATCH | DEASSIGN)) == errno.ENOENT
    vm.ioeventfd(0xFEB00000, 4, fd, 2, DATAMATCH | DEASSIGN)


def test_closed_vm_leaves_no_descriptor_open(kvm: Kvm, eventfd: Callable[[], int]) -> None:
    fds = [eventfd() for _ in range(3)]
    before = open_fds()
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.irqfd(fds[0], GSI)
        vm.ioeventfd(0xFEB00000, 4, fds[1])
        vm.ioeventfd(0x500, 2, fds[2], 0, c.KVM_IOEVENTFD_FLAG_PIO)
        assert open_fds() > before
    assert open_fds() == before


def test_other_routes_survive_a_change_of_the_table(vm: Vm, eventfd: Callable[[], int]) -> None:
    """An edge that comes while the table changes is not lost: the table is replaced as a whole."""
    vcpu, fd = enabled(vm), eventfd()
    route_msi(vm, GSI)
    vm.irqfd(fd, GSI)
    lost = 0
    for n in range(300):
        os.eventfd_write(fd, 1)
        route_msi(vm, GSI, *range(50, 50 + n % 3))
        while select.select([fd], [], [], 0)[0]:
            pass
        settle(vm)
        lost += Lapic(vcpu).vectors(IRR) != [VECTOR]
        Lapic(vcpu)[IRR + (VECTOR >> 5 << 4)] = 0
    assert not lost


def settle(vm: Vm) -> None:
    """Wait until an edge whose eventfd has been read is delivered."""
    fd = os.eventfd(0)
    try:
        vm.irqfd(fd, 60)
        vm.irqfd(fd, 60, DEASSIGN_IRQFD)
    finally:
        os.close(fd)
