"""irqfd and ioeventfd (``virt/kvm/eventfd.c``): interrupts and doorbells that don't leave `Vcpu.run`.

An **irqfd** turns signals of an eventfd into edges on a GSI. A thread of the engine's waits for all of a VM's; it reads the
eventfd and sends what the routing table says, without Python unless the PIC or a level-triggered pin is concerned.

An **ioeventfd** turns a guest's write into a signal of an eventfd: by address and length, in memory or I/O ports, and with
a *datamatch* only for one value. The vCPU that writes finds it in a table and goes on.

The engine keeps duplicates, so a caller may close its descriptors. An eventfd is known by itself and not by its number: any
descriptor of it takes an assignment back. Here are the checks that the kernel makes; `engine/src/eventfd.rs` does the rest.
"""

import errno

from kvmkit import _engine
from kvmkit.uapi import common as c
from kvmkit.uapi.errors import ioctl_error

_IOEVENTFD_FLAGS = c.KVM_IOEVENTFD_FLAG_DATAMATCH | c.KVM_IOEVENTFD_FLAG_PIO | c.KVM_IOEVENTFD_FLAG_DEASSIGN


def irqfd(vm: _engine.Vm, fd: int, gsi: int, flags: int) -> None:
    """KVM_IRQFD. EINVAL: unknown flags (resampling isn't offered) or no eventfd; EBADF: not open; EBUSY: assigned already."""
    name = "KVM_IRQFD"
    if flags & ~c.KVM_IRQFD_FLAG_DEASSIGN:
        raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x}")
    try:
        if flags & c.KVM_IRQFD_FLAG_DEASSIGN:
            vm.remove_irqfd(fd, gsi)
        else:
            vm.add_irqfd(fd, gsi)
    except OSError as error:
        raise ioctl_error(name, error.errno or errno.EINVAL) from error


def ioeventfd(vm: _engine.Vm, addr: int, len: int, fd: int, datamatch: int, flags: int) -> None:
    """KVM_IOEVENTFD. EINVAL: unknown flags, lengths, no eventfd; EBADF: not open; EEXIST: taken; ENOENT: not assigned."""
    name = "KVM_IOEVENTFD"
    match = datamatch if flags & c.KVM_IOEVENTFD_FLAG_DATAMATCH else None
    change = vm.remove_ioeventfd
    if not flags & c.KVM_IOEVENTFD_FLAG_DEASSIGN:  # what never was there is looked for in vain
        change = vm.add_ioeventfd
        if len not in (0, 1, 2, 4, 8) or flags & ~_IOEVENTFD_FLAGS or addr + len >= 1 << 64:
            raise ioctl_error(name, errno.EINVAL)
        if len == 0 and match is not None:
            raise ioctl_error(name, errno.EINVAL, "datamatch needs a length")
    try:
        change(addr, len, fd, match, bool(flags & c.KVM_IOEVENTFD_FLAG_PIO))
    except OSError as error:
        raise ioctl_error(name, error.errno or errno.EINVAL) from error
