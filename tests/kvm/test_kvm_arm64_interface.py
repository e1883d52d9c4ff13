"""The kernel's KVM on arm64: what it shares with x86, the vGIC by device attributes, and the ioctls of its own."""

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable

import pytest

from kvmkit.kvm import Device, Kvm, irqchip_route
from kvmkit.kvm.exits import Debug, Intr, Mmio, SystemEvent
from kvmkit.kvm.stats import read_stats
from kvmkit.uapi import arm64
from kvmkit.uapi import common as c
from kvmkit.uapi.capabilities import (
    CAPABILITIES,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
)

from .arm64_guest import (
    CODE,
    DATA,
    DIST,
    ITS,
    MEMORY,
    MEMORY_BYTES,
    NOP,
    POWER_OFF,
    UART,
    Arm64Guest,
    load,
    mrs,
    stop,
    store,
    vgic,
)

PAGES = MEMORY_BYTES >> 12
DATA_PAGE = DATA - MEMORY >> 12


@pytest.fixture
def needs(system: Kvm) -> Callable[[str], int]:
    """Skip the test where a capability is absent; returns its value."""

    def check(name: str) -> int:
        value = system.check_extension(CAPABILITIES[name])
        if not value:
            pytest.skip(f"linux: no {name}")
        return value

    return check


def refused(call: Callable[[], object], *numbers: int) -> None:
    """Assert that a call fails with one of these errnos."""
    with pytest.raises(OSError, match="KVM_") as error:
        call()
    assert error.value.errno in numbers


def run(guest: Arm64Guest) -> int:
    """Run to the next `stop`; its number."""
    exit_ = guest.vcpu.run()
    assert isinstance(exit_, Mmio) and exit_.phys_addr == UART, exit_
    return int.from_bytes(exit_.data, "little")


def log(guest: Arm64Guest) -> None:
    """Log slot 0."""
    guest.vm.set_user_memory_region(0, MEMORY, MEMORY_BYTES, guest.memory.address, c.KVM_MEM_LOG_DIRTY_PAGES)


def dirty(guest: Arm64Guest) -> set[int]:
    """Page numbers that slot 0's log reports."""
    bits = int.from_bytes(guest.vm.get_dirty_log(0), "little")
    return {page for page in range(PAGES) if bits >> page & 1}


WRITES = [*store(DATA, 1), *store(DATA + 0x1000, 1), *store(DATA + 0x40000, 1)]
WRITTEN = {DATA_PAGE, DATA_PAGE + 1, DATA_PAGE + 0x40}


@pytest.mark.backs("KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION")
def test_dirty_log(system: Kvm) -> None:
    with Arm64Guest(system, WRITES + stop()) as guest:
        log(guest)
        run(guest)
        assert dirty(guest) == WRITTEN
        assert dirty(guest) == set()


@pytest.mark.backs("KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP")
def test_manual_dirty_log(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    enable = ((KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),)
    with Arm64Guest(system, WRITES + stop() + WRITES + stop(), capabilities=enable) as guest:
        log(guest)
        run(guest)
        assert dirty(guest) == dirty(guest) == WRITTEN
        guest.vm.clear_dirty_log(0, DATA_PAGE, 64, (1).to_bytes(8, "little"))
        assert dirty(guest) == WRITTEN - {DATA_PAGE}
        run(guest)
        assert dirty(guest) == WRITTEN


@pytest.mark.backs("KVM_RESET_DIRTY_RINGS")
def test_dirty_ring(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    with Arm64Guest(
        system, WRITES + stop() + WRITES + stop(), capabilities=((KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 16384),)
    ) as guest:
        log(guest)
        for _ in range(2):
            run(guest)
            gfns = guest.vcpu.take_dirty_gfns()  # the page of the code may be among them
            assert [gfn for gfn in gfns if gfn[1]] == [(0, page) for page in sorted(WRITTEN)]
            assert guest.vm.reset_dirty_rings() == len(gfns)


@pytest.mark.backs("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
def test_coalesced_mmio(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_COALESCED_MMIO")
    with Arm64Guest(
        system, store(UART + 0x1000, 7) + store(UART + 0x1004, 8) + stop() + store(UART + 0x1000, 9)
    ) as guest:
        guest.vm.register_coalesced_mmio(UART + 0x1000, 0x1000)
        run(guest)
        assert [(w.phys_addr, bytes(w.data[: w.len])) for w in guest.vcpu.take_coalesced_mmio()] == [
            (UART + 0x1000, b"\7\0\0\0"),
            (UART + 0x1004, b"\x08\0\0\0"),
        ]
        guest.vm.unregister_coalesced_mmio(UART + 0x1000, 0x1000)
        assert isinstance(guest.vcpu.run(), Mmio)


@pytest.mark.backs("KVM_IOEVENTFD")
def test_ioeventfd(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_IOEVENTFD")
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Arm64Guest(system, store(UART + 0x1000, 7) + stop()) as guest:
            guest.vm.ioeventfd(UART + 0x1000, 4, fd)
            run(guest)
            assert os.eventfd_read(fd) == 1
    finally:
        os.close(fd)


@pytest.mark.backs("KVM_SET_USER_MEMORY_REGION2")
def test_region2(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_USER_MEMORY2")
    extra = MEMORY + 0x200000
    with Arm64Guest(system, load(extra) + stop()) as guest:
        guest.memory.write(0x90000, b"EXTR")
        guest.vm.set_user_memory_region2(
            c.kvm_userspace_memory_region2(1, 0, extra, 0x1000, guest.memory.address + 0x90000)
        )
        run(guest)
        assert guest.vcpu.get_one_reg(arm64.x_reg(2)) == int.from_bytes(b"EXTR", "little")


@pytest.mark.backs("KVM_SET_GUEST_DEBUG")
def test_single_step(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SET_GUEST_DEBUG")
    with Arm64Guest(system, [NOP, NOP, *stop()]) as guest:
        guest.vcpu.set_guest_debug(
            arm64.kvm_guest_debug(control=c.KVM_GUESTDBG_ENABLE | c.KVM_GUESTDBG_SINGLESTEP)
        )
        for n in (1, 2):
            exit_ = guest.vcpu.run()
            assert isinstance(exit_, Debug) and exit_.arch.hsr >> 26 == 0x32  # software step
            assert guest.vcpu.get_one_reg(arm64.REG_PC) == CODE + 4 * n


@pytest.mark.backs("KVM_SET_SIGNAL_MASK")
def test_signal_mask(system: Kvm) -> None:
    with Arm64Guest(system, stop()) as guest:
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            guest.vcpu.set_signal_mask([])
            assert guest.vcpu.run() == Intr()
            guest.vcpu.set_signal_mask([signal.SIGUSR1])
            run(guest)
            assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


@pytest.mark.backs("KVM_GET_STATS_FD")
def test_statistics(system: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_BINARY_STATS_FD")
    with Arm64Guest(system, stop()) as guest:
        fd = guest.vcpu.get_stats_fd()
        try:
            before = read_stats(fd)["mmio_exit_user"].value
            run(guest)
            assert read_stats(fd)["mmio_exit_user"].value == before + 1
        finally:
            os.close(fd)


CNTVCT = mrs(3, 3, 14, 0, 2, 3)


@pytest.mark.backs("KVM_ARM_SET_COUNTER_OFFSET")
def test_counter_offset(system: Kvm, needs: Callable[[str], int]) -> None:
    """The guest's counter is the host's less the offset."""
    needs("KVM_CAP_COUNTER_OFFSET")
    with Arm64Guest(system, [CNTVCT, *stop(), CNTVCT, *stop()]) as guest:
        guest.vm.arm_set_counter_offset(0)
        run(guest)
        before = guest.vcpu.get_one_reg(arm64.x_reg(3))
        guest.vm.arm_set_counter_offset(1 << 40)
        run(guest)
        after = guest.vcpu.get_one_reg(arm64.x_reg(3))
        assert (after - before) % (1 << 64) >> 40 == (1 << 24) - 1


@pytest.mark.backs("KVM_ARM_GET_REG_WRITABLE_MASKS")
def test_writable_masks(system: Kvm, needs: Callable[[str], int]) -> None:
    """Which bits of the feature id registers may be changed: of ID_AA64MMFR2_EL1, for one."""
    needs("KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES")
    with Arm64Guest(system, stop()) as guest:
        masks = guest.vm.arm_get_reg_writable_masks()
        assert len(masks) == arm64.KVM_ARM_FEATURE_ID_RANGE_SIZE and any(masks)
        refused(lambda: guest.vm.arm_get_reg_writable_masks(7), errno.EINVAL)


@pytest.mark.refuses("KVM_ARM_MTE_COPY_TAGS", "KVM_ARM_VCPU_FINALIZE")
def test_mte_and_sve_are_refused_without_hardware(system: Kvm) -> None:
    with Arm64Guest(system, stop()) as guest:
        tags = ctypes.create_string_buffer(256)
        address = ctypes.addressof(tags)
        refused(
            lambda: guest.vm.arm_mte_copy_tags(MEMORY, 0x1000, address, arm64.KVM_ARM_TAGS_FROM_GUEST),
            errno.EINVAL,
        )
        refused(lambda: guest.vcpu.arm_vcpu_finalize(arm64.KVM_ARM_VCPU_SVE), errno.EINVAL)
        refused(lambda: guest.vcpu.arm_vcpu_finalize(99), errno.EINVAL)


@pytest.mark.refuses("KVM_CREATE_IRQCHIP", "KVM_ARM_SET_DEVICE_ADDR")
def test_a_gicv2_is_refused_where_there_is_none(system: Kvm) -> None:
    """The calls of before KVM_CREATE_DEVICE know a GICv2 alone."""
    with system.create_vm() as vm:
        refused(vm.create_irqchip, errno.ENODEV)
        refused(lambda: vm.arm_set_device_addr(0, DIST), errno.ENODEV, errno.ENXIO, errno.EINVAL)


@pytest.mark.backs("KVM_SET_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_HAS_DEVICE_ATTR")
def test_vcpu_attributes(system: Kvm) -> None:
    """The virtual timer's interrupt number."""
    with Arm64Guest(system, stop()) as guest:
        group, attr = arm64.KVM_ARM_VCPU_TIMER_CTRL, arm64.KVM_ARM_VCPU_TIMER_IRQ_VTIMER
        assert guest.vcpu.has_device_attr(group, attr) and not guest.vcpu.has_device_attr(group, 99)
        value = ctypes.c_int(23)
        with vgic(guest):
            guest.vcpu.set_device_attr(group, attr, ctypes.addressof(value))
            again = ctypes.c_int()
            guest.vcpu.get_device_attr(group, attr, ctypes.addressof(again))
            assert again.value == 23


def distributor(device: Device, offset: int) -> int:
    """Read a register of the distributor's."""
    value = ctypes.c_uint32()
    device.get_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset, ctypes.addressof(value))
    return value.value


def levels(device: Device) -> int:
    """Levels of the lines of interrupts 32 to 63."""
    value = ctypes.c_uint32()
    device.get_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, 32, ctypes.addressof(value))
    return value.value


@pytest.mark.backs("KVM_CREATE_DEVICE", "KVM_GET_DEVICE_ATTR", "KVM_IRQ_LINE", "KVM_IRQ_LINE_STATUS")
def test_irq_line_pends_in_the_distributor(system: Kvm) -> None:
    with Arm64Guest(system, stop()) as guest, vgic(guest, init=True) as device:
        spi = arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | 40
        guest.vm.irq_line(spi, 1)
        assert distributor(device, 0x200 + 4) == 1 << 8  # GICD_ISPENDR1: an edge stays
        guest.vm.irq_line(spi, 0)
        assert distributor(device, 0x200 + 4) == 1 << 8
        config = ctypes.c_uint32(0)
        device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0xC08, ctypes.addressof(config))
        assert guest.vm.irq_line_status(spi, 1) >= 0
        assert levels(device) == 1 << 8
        guest.vm.irq_line_status(spi, 0)
        assert levels(device) == 0
        refused(lambda: guest.vm.irq_line(spi | 0xFFF, 1), errno.EINVAL)


@pytest.mark.backs("KVM_IRQFD", "KVM_SET_GSI_ROUTING")
def test_irqfd(system: Kvm, needs: Callable[[str], int]) -> None:
    """A GSI leads to an SPI of the GIC; 8 + 32 of the distributor's."""
    needs("KVM_CAP_IRQFD")
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with Arm64Guest(system, stop()) as guest, vgic(guest, init=True) as device:
            guest.vm.set_gsi_routing([irqchip_route(5, 0, 8)])
            guest.vm.irqfd(fd, 5)
            config = ctypes.c_uint32(0xAAAAAAAA)  # edges: a level would fall again at once
            device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0xC08, ctypes.addressof(config))
            os.eventfd_write(fd, 1)
            while not distributor(device, 0x200 + 4):
                pass  # the kernel's work queue raises it
            assert distributor(device, 0x200 + 4) == 1 << 8
    finally:
        os.close(fd)


@pytest.mark.refuses("KVM_SIGNAL_MSI")
def test_message_without_its(system: Kvm) -> None:
    """A message reaches nobody where no ITS is."""
    with Arm64Guest(system, stop()) as guest, vgic(guest, init=True):
        refused(
            lambda: guest.vm.signal_msi(ITS + 0x10040, 1, c.KVM_MSI_VALID_DEVID, 1),
            errno.ENODEV,
            errno.EINVAL,
        )


@pytest.mark.refuses("KVM_CREATE_GUEST_MEMFD")
def test_guest_memfd(system: Kvm) -> None:
    if system.check_extension(CAPABILITIES["KVM_CAP_GUEST_MEMFD"]):
        pytest.skip("this KVM has guest_memfd")
    with system.create_vm() as vm:
        refused(lambda: vm.create_guest_memfd(0x1000), errno.ENOTTY, errno.EINVAL)


def test_reset_and_power_off(system: Kvm) -> None:
    """After KVM_ARM_VCPU_INIT a vCPU starts again."""
    with Arm64Guest(system, POWER_OFF) as guest:
        for _ in range(2):
            exit_ = guest.vcpu.run()
            assert isinstance(exit_, SystemEvent) and exit_.type == c.KVM_SYSTEM_EVENT_SHUTDOWN
            init = guest.vm.arm_preferred_target()
            init.features[0] |= 1 << arm64.KVM_ARM_VCPU_PSCI_0_2
            guest.vcpu.arm_vcpu_init(init)
            guest.vcpu.set_one_reg(arm64.REG_PC, CODE)
