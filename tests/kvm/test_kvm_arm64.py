"""The kernel's KVM on arm64: register ids, MMIO exits, PSCI, the interrupt controller. Skips on other machines."""

import ctypes
import errno
from collections.abc import Iterator

import pytest

from kvmkit.kvm import GuestMemory, Kvm, Vcpu, Vm, probe
from kvmkit.kvm.exits import Intr, Mmio, SystemEvent
from kvmkit.uapi import arm64, common

CODE = 0x40000000
UART = 0x09000000

# What the guest does, and the instructions' encodings.
PROGRAM = [
    0xD2A12000,  # movz x0, #0x900, lsl #16
    0x52800841,  # mov w1, #0x42
    0xB9000001,  # str w1, [x0]
    0xB9400402,  # ldr w2, [x0, #4]
    0x39400005,  # ldrb w5, [x0]
    0x52B08000,  # movz w0, #0x8400, lsl #16
    0x72800100,  # movk w0, #8: PSCI SYSTEM_OFF
    0xD4000002,  # hvc #0
]


@pytest.fixture
def vm(system: Kvm) -> Iterator[Vm]:
    """A VM with the program at 1 GiB."""
    with GuestMemory(0x10000) as memory, system.create_vm() as vm:
        memory.write(0, b"".join(word.to_bytes(4, "little") for word in PROGRAM))
        vm.set_user_memory_region(0, CODE, memory.size_bytes, memory.address)
        yield vm


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    """Its vCPU, about to run the program."""
    init = vm.arm_preferred_target()
    init.features[0] |= 1 << arm64.KVM_ARM_VCPU_PSCI_0_2
    with vm.create_vcpu(0) as vcpu:
        vcpu.arm_vcpu_init(init)
        vcpu.set_one_reg(arm64.REG_PC, CODE)
        yield vcpu


@pytest.mark.backs(
    "KVM_RUN",
    "KVM_CREATE_VM",
    "KVM_CREATE_VCPU",
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_ARM_PREFERRED_TARGET",
    "KVM_ARM_VCPU_INIT",
)
def test_mmio_and_power_off(vcpu: Vcpu) -> None:
    exit_ = vcpu.run()
    assert isinstance(exit_, Mmio)
    assert (exit_.phys_addr, exit_.len, exit_.is_write, bytes(exit_.data)) == (UART, 4, True, b"\x42\0\0\0")
    exit_ = vcpu.run()
    assert isinstance(exit_, Mmio) and (exit_.phys_addr, exit_.is_write) == (UART + 4, False)
    exit_.data[:] = b"\x78\x56\x34\x12"
    exit_ = vcpu.run()
    assert isinstance(exit_, Mmio) and exit_.len == 1
    assert vcpu.get_one_reg(arm64.x_reg(2)) == 0x12345678
    exit_.data[:] = b"\xaa"
    exit_ = vcpu.run()
    assert isinstance(exit_, SystemEvent) and exit_.type == common.KVM_SYSTEM_EVENT_SHUTDOWN
    assert vcpu.get_one_reg(arm64.x_reg(5)) == 0xAA


@pytest.mark.backs("KVM_GET_ONE_REG", "KVM_SET_ONE_REG")
def test_registers(vcpu: Vcpu) -> None:
    values = {arm64.x_reg(n): 0x1111111111111111 * (n % 15) + n for n in range(31)}
    values[arm64.REG_SP] = 0x40008000
    values |= {arm64.v_reg(n): (n << 120) + 12345 for n in range(32)}
    values[arm64.REG_FPCR] = 0x1000000
    values[arm64.ARM64_SYS_REG(3, 0, 13, 0, 4)] = 0xFFFF000011112222  # TPIDR_EL1
    for id, value in values.items():
        vcpu.set_one_reg(id, value)
    assert {id: vcpu.get_one_reg(id) for id in values} == values


@pytest.mark.backs("KVM_GET_REG_LIST")
def test_reg_list(vcpu: Vcpu) -> None:
    ids = vcpu.get_reg_list()
    assert len(ids) > 100
    assert {
        arm64.REG_PC,
        arm64.REG_SP,
        arm64.x_reg(30),
        arm64.v_reg(31),
        arm64.KVM_REG_ARM_PSCI_VERSION,
    } <= set(ids)


def test_unknown_register(vcpu: Vcpu) -> None:
    with pytest.raises(OSError, match="KVM_GET_ONE_REG") as error:
        vcpu.get_one_reg(common.KVM_REG_X86 | common.KVM_REG_SIZE_U64)
    assert error.value.errno in (errno.ENOENT, errno.EINVAL)


def test_run_before_init(vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu, pytest.raises(OSError, match="KVM_RUN") as error:
        vcpu.run()
    assert error.value.errno == errno.ENOEXEC


@pytest.mark.backs("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "KVM_GET_MP_STATE", "KVM_SET_MP_STATE")
def test_events_and_mp_state(vcpu: Vcpu) -> None:
    vcpu.set_vcpu_events(vcpu.get_vcpu_events())
    assert vcpu.get_mp_state() == common.KVM_MP_STATE_RUNNABLE
    vcpu.set_mp_state(common.KVM_MP_STATE_STOPPED)
    assert vcpu.get_mp_state() == common.KVM_MP_STATE_STOPPED


def test_immediate_exit(vcpu: Vcpu) -> None:
    vcpu.kick()
    assert vcpu.run() == Intr()
    assert vcpu.get_one_reg(arm64.REG_PC) == CODE
    vcpu.immediate_exit = False
    assert isinstance(vcpu.run(), Mmio)


@pytest.mark.backs("KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE")
def test_probe(system: Kvm) -> None:
    assert probe.capabilities(system)["KVM_CAP_ONE_REG"] == 1
    assert probe.supervisor_mips(system) > 0.01


@pytest.mark.backs("KVM_CREATE_DEVICE", "KVM_HAS_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR", "KVM_IRQ_LINE")
def test_vgic_v3(vm: Vm, vcpu: Vcpu) -> None:
    try:
        device = vm.create_device(common.KVM_DEV_TYPE_ARM_VGIC_V3)
    except OSError as error:
        pytest.skip(f"no VGICv3: {error.strerror}")
    with device:
        assert device.has_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST)
        assert not device.has_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, 77)
        for kind, value in (
            (arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, 0x08000000),
            (arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST, 0x080A0000),
        ):
            address = ctypes.c_uint64(value)
            device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, kind, ctypes.addressof(address))
        device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
        vm.irq_line(arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | 40, 1)
        assert isinstance(vcpu.run(), Mmio)
