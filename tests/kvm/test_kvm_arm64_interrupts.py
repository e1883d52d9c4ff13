"""Interrupts that an arm64 guest takes: an SPI, the timer's, LPIs by the ITS; and a second processor that it starts.

The guest programs the GICv3 itself (Arm IHI 0069: the distributor in 12.9, redistributors in 12.11, the ITS in 12.19 and its
commands in 5.3). Its vector acknowledges the interrupt and exits with the number.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from kvmkit.kvm import Device, Kvm, Vcpu, irqchip_route, msi_route
from kvmkit.kvm.exits import Mmio
from kvmkit.uapi import arm64
from kvmkit.uapi import common as c

from .arm64_guest import (
    DIST,
    ERET,
    HVC,
    ISB,
    ITS,
    LOOP,
    MEMORY,
    REDIST,
    UART,
    WFI,
    Arm64Guest,
    mov,
    msr,
    set_u64,
    stop,
    store,
    store64,
    vgic,
)

VECTORS = MEMORY + 0x10000
COMMANDS = MEMORY + 0x20000
DEVICES, COLLECTIONS, EVENTS = MEMORY + 0x30000, MEMORY + 0x40000, MEMORY + 0x50000
"""The ITS's tables: of devices and of collections, each of one page of 64 KiB, and of device DEVID's events."""
PROPERTIES, PENDING = MEMORY + 0x60000, MEMORY + 0x70000
"""Of LPIs."""
DEVID, EVENT, COLLECTION = 5, 3, 1
LPI = 8192 + 7
SPI = 8
TIMER = 27
SETUP_DONE, NUMBER = 1, 3
TIMEOUT_S = 60.0

SGI_FRAME = REDIST + 0x10000
TRANSLATER = ITS + 0x10040
DAIFCLR_IRQ = 0xD50342FF
XZR = 31
IAR1, EOIR1, PMR, SRE, IGRPEN1 = (
    (3, 0, 12, 12, 0),
    (3, 0, 12, 12, 1),
    (3, 0, 4, 6, 0),
    (3, 0, 12, 12, 5),
    (3, 0, 12, 12, 7),
)
VBAR, CNTV_CTL, CNTV_CVAL = (3, 0, 12, 0, 0), (3, 3, 14, 3, 1), (3, 3, 14, 3, 2)


def set_register(register: tuple[int, int, int, int, int], value: int) -> list[int]:
    """Set a system register; changes x2."""
    return [*mov(2, value), msr(*register, 2)]


# Acknowledge (mrs is msr with bit 21), end the interrupt and the timer's reason for it, exit with the number in w3.
HANDLER = [
    msr(*IAR1, NUMBER) | 1 << 21,
    msr(*EOIR1, NUMBER),
    msr(*CNTV_CTL, XZR),
    *mov(0, UART),
    0xB9000000 | NUMBER,
    ERET,
]

CPU_INTERFACE = [
    *set_register(VBAR, VECTORS),
    *set_register(SRE, 1),
    *set_register(PMR, 0xFF),
    *set_register(IGRPEN1, 1),
    ISB,
    *store(DIST, 2),  # GICD_CTLR: group 1
    *store(DIST + 0x84, 0xFFFFFFFF),  # GICD_IGROUPR1
    *store(DIST + 0x104, 1 << SPI),  # GICD_ISENABLER1
    *store(DIST + 0xC08, 0xAAAAAAAA),  # GICD_ICFGR2: edges
    *store(SGI_FRAME + 0x80, 0xFFFFFFFF),  # GICR_IGROUPR0
    *store(SGI_FRAME + 0x100, 1 << TIMER),  # GICR_ISENABLER0
]
LPIS = [
    *store64(REDIST + 0x70, PROPERTIES | 0xF),  # GICR_PROPBASER: identifiers of 16 bits
    *store64(REDIST + 0x78, PENDING | 1 << 62),  # GICR_PENDBASER: the table is zero
    *store(REDIST, 1),  # GICR_CTLR: EnableLPIs
]
WAIT = [*stop(SETUP_DONE), DAIFCLR_IRQ, WFI, LOOP - 1 & 0x03FFFFFF | LOOP]


def its_commands() -> list[int]:
    """What puts the commands into the queue: event EVENT of DEVID is LPI at processor 0."""
    queue = [
        (0x08 | DEVID << 32, 4, 1 << 63 | EVENTS, 0),  # MAPD: events of 5 bits
        (0x09, 0, 1 << 63 | COLLECTION, 0),  # MAPC to processor 0
        (0x0A | DEVID << 32, EVENT | LPI << 32, COLLECTION, 0),  # MAPTI
        (0x0C | DEVID << 32, EVENT, 0, 0),  # INV
        (0x05, 0, 0, 0),  # SYNC of processor 0
    ]
    words = [word for command in queue for word in command]
    stores = [code for i, word in enumerate(words) for code in store64(COMMANDS + 8 * i, word)]
    return [
        *stores,
        *store64(ITS + 0x100, 1 << 63 | DEVICES),  # GITS_BASER0, KVM's for devices
        *store64(ITS + 0x108, 1 << 63 | COLLECTIONS),  # GITS_BASER1
        *store64(ITS + 0x80, 1 << 63 | COMMANDS),  # GITS_CBASER: a page of 4 KiB
        *store(ITS, 1),  # GITS_CTLR
        *store64(ITS + 0x88, 8 * len(words)),  # GITS_CWRITER
    ]


@contextmanager
def interrupted(
    system: Kvm, code: list[int], *, its: bool = False
) -> Iterator[tuple[Arm64Guest, Device | None]]:
    """A guest that stands after `code`, about to let interrupts through and to wait; with its ITS, if it has one."""
    with ExitStack() as stack:
        guest = stack.enter_context(Arm64Guest(system, [*CPU_INTERFACE, *code, *WAIT]))
        guest.load(VECTORS + 0x280, HANDLER)  # IRQ, from the same level
        guest.memory.write(PROPERTIES - MEMORY + LPI - 8192, b"\xa1")  # enabled, of priority 0xa0
        stack.enter_context(vgic(guest, init=True))
        device = stack.enter_context(new_its(guest)) if its else None
        assert taken(guest.vcpu) == SETUP_DONE
        yield guest, device


def new_its(guest: Arm64Guest) -> Device:
    """An ITS for it."""
    device = guest.vm.create_device(c.KVM_DEV_TYPE_ARM_VGIC_ITS)
    set_u64(device, arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_ITS_ADDR_TYPE, ITS)
    device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
    return device


def taken(vcpu: Vcpu) -> int:
    """Run to the next exit and return the number that the guest stored. A guest that waits for ever is stopped, which fails."""
    timer = threading.Timer(TIMEOUT_S, vcpu.kick)
    timer.start()
    try:
        exit_ = vcpu.run()
    finally:
        timer.cancel()
    assert isinstance(exit_, Mmio) and exit_.is_write and exit_.phys_addr == UART, exit_
    return int.from_bytes(exit_.data, "little")


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.mark.backs("KVM_IRQFD", "KVM_SET_GSI_ROUTING")
def test_an_spi_by_irqfd(system: Kvm, eventfd: int) -> None:
    with interrupted(system, []) as (guest, _):
        guest.vm.set_gsi_routing([irqchip_route(5, 0, SPI)])
        guest.vm.irqfd(eventfd, 5)
        for _ in range(2):
            os.eventfd_write(eventfd, 1)
            assert taken(guest.vcpu) == 32 + SPI


@pytest.mark.backs("KVM_IRQ_LINE")
def test_an_spi_by_irq_line(system: Kvm) -> None:
    with interrupted(system, []) as (guest, _):
        for _ in range(2):
            for level in (1, 0):
                line = arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | 32 + SPI
                guest.vm.irq_line(line, level)
            assert taken(guest.vcpu) == 32 + SPI


def test_the_timers_interrupt(system: Kvm) -> None:
    """The virtual timer, long over: its comparison value is 0."""
    with interrupted(system, [*set_register(CNTV_CVAL, 0), *set_register(CNTV_CTL, 1)]) as (guest, _):
        assert taken(guest.vcpu) == TIMER


@pytest.mark.backs("KVM_SIGNAL_MSI")
def test_an_lpi_by_message(system: Kvm) -> None:
    with interrupted(system, [*LPIS, *its_commands()], its=True) as (guest, its):
        assert its is not None and its_register(its, 0x90) == 5 * 32  # GITS_CREADR: it has read all commands
        for _ in range(2):
            assert guest.vm.signal_msi(TRANSLATER, EVENT, c.KVM_MSI_VALID_DEVID, DEVID) > 0
            assert taken(guest.vcpu) == LPI
        assert guest.vm.signal_msi(TRANSLATER, EVENT + 1, c.KVM_MSI_VALID_DEVID, DEVID) == 0, "no such event"
        assert guest.vm.signal_msi(TRANSLATER, EVENT, c.KVM_MSI_VALID_DEVID, DEVID + 1) == 0, "no such device"


@pytest.mark.backs("KVM_IRQFD", "KVM_SET_GSI_ROUTING")
def test_an_lpi_by_irqfd(system: Kvm, eventfd: int) -> None:
    with interrupted(system, [*LPIS, *its_commands()], its=True) as (guest, _):
        guest.vm.set_gsi_routing([msi_route(5, TRANSLATER, EVENT, DEVID)])
        guest.vm.irqfd(eventfd, 5)
        for _ in range(2):
            os.eventfd_write(eventfd, 1)
            assert taken(guest.vcpu) == LPI


ITS_STATE = (0x4, 0x80, 0x90, 0x88, 0x100, 0x108)
"""GITS_IIDR, CBASER, CREADR, CWRITER, BASER0 and BASER1, in the order to restore them (arm-vgic-its.rst)."""


@pytest.mark.backs("KVM_SET_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR")
def test_an_its_moves_to_another_vm(system: Kvm) -> None:
    """Its tables go into the guest's memory and come out of it; the other guest has given its own ITS no command."""
    control = arm64.KVM_DEV_ARM_VGIC_GRP_CTRL
    with interrupted(system, [*LPIS, *its_commands()], its=True) as (guest, its):
        assert its is not None
        entry = DEVICES - MEMORY + 8 * DEVID
        assert guest.memory.read(entry, 8) == bytes(8)
        its.set_device_attr(control, arm64.KVM_DEV_ARM_ITS_SAVE_TABLES)
        saved = int.from_bytes(guest.memory.read(entry, 8), "little")
        assert saved >> 63 == 1 and saved & 0x1F == 4, "a device of 5 bits of events"
        registers = {offset: its_register(its, offset) for offset in ITS_STATE}
        tables = guest.memory.read(DEVICES - MEMORY, 3 << 16)
    with interrupted(system, LPIS, its=True) as (guest, its):
        assert its is not None
        check_off(guest)
        guest.memory.write(DEVICES - MEMORY, tables)
        for offset, value in registers.items():
            set_u64(its, arm64.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, value)
        its.set_device_attr(control, arm64.KVM_DEV_ARM_ITS_RESTORE_TABLES)
        set_u64(its, arm64.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0, 1)
        assert guest.vm.signal_msi(TRANSLATER, EVENT, c.KVM_MSI_VALID_DEVID, DEVID) > 0
        assert taken(guest.vcpu) == LPI


@pytest.mark.backs("KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR")
def test_an_its_is_reset(system: Kvm) -> None:
    """It forgets what it was told."""
    with interrupted(system, [*LPIS, *its_commands()], its=True) as (guest, its):
        assert its is not None
        its.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_ITS_CTRL_RESET)
        assert its_register(its, 0x100) >> 63 == its_register(its, 0) & 1 == 0
        check_off(guest)


def check_off(guest: Arm64Guest) -> None:
    """A message to an ITS that isn't on is refused."""
    with pytest.raises(OSError, match="KVM_SIGNAL_MSI") as error:
        guest.vm.signal_msi(TRANSLATER, EVENT, c.KVM_MSI_VALID_DEVID, DEVID)
    assert error.value.errno == errno.EBUSY


def its_register(its: Device, offset: int) -> int:
    """Read a register of an ITS's."""
    value = ctypes.c_uint64()
    its.get_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, ctypes.addressof(value))
    return value.value


@pytest.mark.backs("KVM_ARM_VCPU_INIT", "KVM_GET_MP_STATE")
def test_a_second_processor(system: Kvm) -> None:
    """PSCI's CPU_ON starts it where the first one says, with the context in x0."""
    entry, context = MEMORY + 0x8000, 0x1234
    cpu_on = [*mov(0, 0xC4000003), *mov(1, 1), *mov(2, entry), *mov(3, context), HVC]
    report = [0xAA0003E4, *mov(0, UART), 0xB9000004]  # mov x4, x0; store it
    with Arm64Guest(system, [*cpu_on, *report], vcpus=2) as guest:
        guest.load(entry, report)
        first, second = guest.vcpus
        assert second.get_mp_state() == c.KVM_MP_STATE_STOPPED
        assert taken(first) == 0  # PSCI's SUCCESS
        assert taken(second) == context
        assert second.get_mp_state() == c.KVM_MP_STATE_RUNNABLE
