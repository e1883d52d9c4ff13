"""A tiny arm64 guest: a few instructions by their encodings (Arm ARM, section C6.2), and a VM that runs them."""

import ctypes
from types import TracebackType
from typing import Self

import pytest

from kvmkit.kvm import Device, GuestMemory, Kvm, Vcpu, Vm
from kvmkit.uapi import arm64
from kvmkit.uapi import common as c

MEMORY = 0x40000000
MEMORY_BYTES = 0x100000
CODE = MEMORY
DATA = MEMORY + 0x80000
UART = 0x09000000
"""No memory: accesses exit."""

DIST, REDIST, ITS = 0x08000000, 0x080A0000, 0x08080000
"""The interrupt controller's: see `vgic`."""

NOP, WFI, HVC, ERET, ISB = 0xD503201F, 0xD503207F, 0xD4000002, 0xD69F03E0, 0xD5033FDF
RET, LOOP = 0xD65F03C0, 0x14000000  # LOOP: b .


def mov(register: int, value: int) -> list[int]:
    """``mov xN, #value`` as movz and movk."""
    parts = [(value >> 16 * i & 0xFFFF, i) for i in range(4)]
    words = [0xD2800000 | i << 21 | part << 5 | register for part, i in parts if part] or [
        0xD2800000 | register
    ]
    return [words[0], *(word | 1 << 29 for word in words[1:])]


def store(address: int, value: int) -> list[int]:
    """Store 32 bits; changes x0 and x1."""
    return [*mov(0, address), *mov(1, value), 0xB9000001]


def store64(address: int, value: int) -> list[int]:
    """Store 64 bits; changes x0 and x1."""
    return [*mov(0, address), *mov(1, value), 0xF9000001]


def load(address: int, register: int = 2) -> list[int]:
    """Load 32 bits into wN; changes x0."""
    return [*mov(0, address), 0xB9400000 | register]


def msr(op0: int, op1: int, crn: int, crm: int, op2: int, register: int) -> int:
    """``msr <system register>, xN``."""
    return 0xD5000000 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | register


def mrs(op0: int, op1: int, crn: int, crm: int, op2: int, register: int) -> int:
    """``mrs xN, <system register>``."""
    return msr(op0, op1, crn, crm, op2, register) | 1 << 21


def stop(number: int = 0) -> list[int]:
    """Exit with a store of `number` to the UART."""
    return store(UART, number)


POWER_OFF = [*mov(0, 0x84000008), HVC]
"""PSCI SYSTEM_OFF."""


class Arm64Guest:
    """A VM with 1 MiB of memory at 1 GiB and vCPUs about to execute `code`, the first one alone being powered on."""

    def __init__(
        self, system: Kvm, code: list[int], *, vcpus: int = 1, capabilities: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """Create it; `capabilities` (KVM_CAP_*, argument) come first."""
        self.memory = GuestMemory(MEMORY_BYTES)
        self.vm: Vm = system.create_vm()
        self.vcpus: list[Vcpu] = []
        try:
            for capability, argument in capabilities:
                self.vm.enable_cap(capability, argument)
            self.vm.set_user_memory_region(0, MEMORY, MEMORY_BYTES, self.memory.address)
            self.load(CODE, code)
            init = self.vm.arm_preferred_target()
            init.features[0] |= 1 << arm64.KVM_ARM_VCPU_PSCI_0_2
            for id in range(vcpus):
                vcpu = self.vm.create_vcpu(id)
                self.vcpus.append(vcpu)
                vcpu.arm_vcpu_init(init)
                init.features[0] |= 1 << arm64.KVM_ARM_VCPU_POWER_OFF
            self.vcpu.set_one_reg(arm64.REG_PC, CODE)
        except BaseException:
            self.close()
            raise

    def load(self, address: int, code: list[int]) -> None:
        """Put code into memory."""
        self.memory.write(address - MEMORY, b"".join(word.to_bytes(4, "little") for word in code))

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU."""
        return self.vcpus[0]

    def close(self) -> None:
        """Release everything."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def set_u64(device: Device, group: int, attr: int, value: int) -> None:
    """Set an attribute that is an address or a register."""
    number = ctypes.c_uint64(value)
    device.set_device_attr(group, attr, ctypes.addressof(number))


def vgic(guest: Arm64Guest, init: bool = False) -> Device:
    """A GICv3, or skip."""
    try:
        device = guest.vm.create_device(c.KVM_DEV_TYPE_ARM_VGIC_V3)
    except OSError as error:
        pytest.skip(f"linux: no VGICv3: {error.strerror}")
    set_u64(device, arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, DIST)
    set_u64(device, arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST, REDIST)
    if init:
        device.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
    return device
