"""What a failing ioctl raises: `OSError` with the kernel's errno and a message that names the ioctl.

Python turns the errno into the matching subclass: EEXIST is a `FileExistsError`, EPERM a `PermissionError`.
"""

import errno
import os

# Where one errno of one ioctl says little, what it most often means (Documentation/virt/kvm/api.rst and the kernel's code).
_HINTS = {
    ("KVM_CREATE_VCPU", errno.EEXIST): "this vCPU id is taken",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has its interrupt chips already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "create the interrupt chips before the first vCPU",
    ("KVM_CREATE_PIT2", errno.EEXIST): "the VM has its PIT already",
    ("KVM_CREATE_PIT2", errno.ENOENT): "the PIT needs KVM_CREATE_IRQCHIP first",
    ("KVM_IRQ_LINE", errno.ENXIO): "the VM has no interrupt chip in the kernel: KVM_CREATE_IRQCHIP first",
    ("KVM_INTERRUPT", errno.ENXIO): "the interrupt chip is in the kernel: use KVM_IRQ_LINE",
    ("KVM_INTERRUPT", errno.EEXIST): "an interrupt is queued already",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the range overlaps another slot",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "not whole pages, or a change of the slot's size",
    ("KVM_GET_DIRTY_LOG", errno.ENOENT): "the slot doesn't exist or isn't logged (KVM_MEM_LOG_DIRTY_PAGES)",
    ("KVM_IRQFD", errno.EBADF): "fd isn't open",
    ("KVM_IRQFD", errno.EINVAL): "fd isn't an eventfd, or the VM has no interrupt chip in the kernel",
    ("KVM_IRQFD", errno.EBUSY): "this eventfd is bound to a GSI already",
    ("KVM_IOEVENTFD", errno.EEXIST): "the address (and datamatch) is taken by another eventfd",
    ("KVM_IOEVENTFD", errno.ENOENT): "no such ioeventfd to deassign",
}


def ioctl_error(name: str, number: int, detail: str = "") -> OSError:
    """Make the `OSError` for ioctl `name` failing with errno `number`; `detail` says more than the errno does."""
    detail = detail or _HINTS.get((name, number), "")
    return OSError(number, f"{name}: {os.strerror(number)}" + (f" ({detail})" if detail else ""))


def not_supported(name: str) -> OSError:
    """Make what the kernel answers for an ioctl that a file descriptor doesn't know: ENOTTY."""
    return ioctl_error(name, errno.ENOTTY, "not offered by this engine or architecture")
