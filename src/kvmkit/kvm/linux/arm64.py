"""The arm64 part of the kernel's KVM (``arch/arm64/kvm``)."""

import ctypes

from kvmkit.kvm.linux import main
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

    def arm_get_reg_writable_masks(self, range: int = a.KVM_ARM_FEATURE_ID_RANGE) -> list[int]:
        """KVM_ARM_GET_REG_WRITABLE_MASKS."""
        masks = (ctypes.c_uint64 * a.KVM_ARM_FEATURE_ID_RANGE_SIZE)()
        self._ioctl(a.KVM_ARM_GET_REG_WRITABLE_MASKS, a.reg_mask_range(ctypes.addressof(masks), range))
        return list(masks)

    def arm_mte_copy_tags(self, guest_ipa: int, length: int, addr: int, flags: int) -> int:
        """KVM_ARM_MTE_COPY_TAGS."""
        return self._ioctl(a.KVM_ARM_MTE_COPY_TAGS, a.kvm_arm_copy_mte_tags(guest_ipa, length, addr, flags))


class Vcpu(main.Vcpu):
    """A virtual processor on arm64."""

    run_class = a.kvm_run
    coalesced_mmio_page = a.KVM_COALESCED_MMIO_PAGE_OFFSET

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
