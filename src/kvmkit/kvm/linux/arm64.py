"""The arm64 part of the kernel's KVM (``arch/arm64/kvm``)."""

import ctypes
import errno

from kvmkit.kvm.linux import main
from kvmkit.kvm.linux.main import Flexible
from kvmkit.uapi import arm64 as a
from kvmkit.uapi import common as c
from kvmkit.uapi import x86


class Kvm(main.Kvm):
    """``/dev/kvm`` on arm64."""

    def __init__(self, path: str) -> None:
        """Open `path`."""
        self.vm_class = Vm
        super().__init__(path)


class Vm(main.Vm):
    """A virtual machine on arm64."""

    def __init__(self, fd: int, mmap_size_bytes: int) -> None:
        """Take over `fd`."""
        self.vcpu_class = Vcpu
        super().__init__(fd, mmap_size_bytes)

    def arm_preferred_target(self) -> a.kvm_vcpu_init:
        """KVM_ARM_PREFERRED_TARGET."""
        return self._get(a.KVM_ARM_PREFERRED_TARGET, a.kvm_vcpu_init)

    def arm_set_device_addr(self, id: int, addr: int) -> None:
        """KVM_ARM_SET_DEVICE_ADDR."""
        self._ioctl(a.KVM_ARM_SET_DEVICE_ADDR, a.kvm_arm_device_addr(id, addr), "KVM_ARM_SET_DEVICE_ADDR")

    def arm_set_counter_offset(self, counter_offset: int) -> None:
        """KVM_ARM_SET_COUNTER_OFFSET."""
        self._ioctl(a.KVM_ARM_SET_COUNTER_OFFSET, a.kvm_arm_counter_offset(counter_offset))


class Vcpu(main.Vcpu):
    """A virtual processor on arm64."""

    run_class = a.kvm_run

    def get_one_reg(self, id: int) -> int:
        """KVM_GET_ONE_REG."""
        value = ctypes.create_string_buffer(c.reg_size_bytes(id))
        self._ioctl(c.KVM_GET_ONE_REG, c.kvm_one_reg(id, ctypes.addressof(value)))
        return int.from_bytes(value.raw, "little")

    def set_one_reg(self, id: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        size_bytes = c.reg_size_bytes(id)
        buffer = ctypes.create_string_buffer(value.to_bytes(size_bytes, "little"), size_bytes)
        self._ioctl(c.KVM_SET_ONE_REG, c.kvm_one_reg(id, ctypes.addressof(buffer)))

    def get_reg_list(self) -> list[int]:
        """KVM_GET_REG_LIST."""
        count = 0
        while True:
            table = Flexible(c.kvm_reg_list, ctypes.c_uint64, count)
            table.head.n = count
            try:
                self._ioctl(c.KVM_GET_REG_LIST, table.buffer)
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                count = table.head.n  # the kernel says how many there are
            else:
                return list(table.entries[: table.head.n])

    def get_vcpu_events(self) -> a.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        return self._get(a.KVM_GET_VCPU_EVENTS, a.kvm_vcpu_events)

    def set_vcpu_events(self, events: x86.kvm_vcpu_events | a.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._ioctl(a.KVM_SET_VCPU_EVENTS, events)

    def set_guest_debug(self, debug: x86.kvm_guest_debug | a.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        self._ioctl(a.KVM_SET_GUEST_DEBUG, debug)

    def arm_vcpu_init(self, init: a.kvm_vcpu_init) -> None:
        """KVM_ARM_VCPU_INIT."""
        self._ioctl(a.KVM_ARM_VCPU_INIT, init)

    def arm_vcpu_finalize(self, feature: int) -> None:
        """KVM_ARM_VCPU_FINALIZE."""
        self._ioctl(c.KVM_ARM_VCPU_FINALIZE, ctypes.c_int(feature))
