"""irqfd and ioeventfd (``virt/kvm/eventfd.c``): interrupts and doorbells that don't leave `Vcpu.run`.

An **irqfd** turns signals of an eventfd into edges on a GSI. A thread of the engine's waits for all of a VM's; it reads the
eventfd and sends what the routing table says, without Python unless the PIC or a level-triggered pin is concerned.

An **ioeventfd** turns a guest's write into a signal of an eventfd: by address and length, in memory or I/O ports, and with
a *datamatch* only for one value. The vCPU that writes finds it in a table and goes on.

A **resampling irqfd** is for a level-triggered line that several devices share: a signal raises the line, and when the guest has
ended that interrupt the line falls and the *resamplefd* is signalled, so that a device which still wants attention asks again.
These go through Python, as level-triggered pins do.

The engine keeps duplicates, so a caller may close its descriptors. An eventfd is known by itself and not by its number: any
descriptor of it takes an assignment back. Here are the checks that the kernel makes; `engine/src/eventfd.rs` does the rest.
"""

import errno
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvmkit import _engine
from kvmkit.uapi import common as c
from kvmkit.uapi.errors import ioctl_error

_IOEVENTFD_FLAGS = c.KVM_IOEVENTFD_FLAG_DATAMATCH | c.KVM_IOEVENTFD_FLAG_PIO | c.KVM_IOEVENTFD_FLAG_DEASSIGN


def irqfd(
    vm: _engine.Vm, resamplers: "Resamplers | None", fd: int, gsi: int, flags: int, resamplefd: int
) -> None:
    """KVM_IRQFD. EINVAL: unknown flags, no eventfd, or resampling without `resamplers`; EBADF: not open; EBUSY: assigned already."""
    name = "KVM_IRQFD"
    if flags & ~(c.KVM_IRQFD_FLAG_DEASSIGN | c.KVM_IRQFD_FLAG_RESAMPLE):
        raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x}")
    try:
        if flags & c.KVM_IRQFD_FLAG_DEASSIGN:
            if resamplers is None or not resamplers.remove(fd, gsi):
                vm.remove_irqfd(fd, gsi)
        elif flags & c.KVM_IRQFD_FLAG_RESAMPLE:
            if resamplers is None:
                raise ioctl_error(name, errno.EINVAL, "resampling needs KVM_CREATE_IRQCHIP")
            resamplers.add(fd, gsi, resamplefd)
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


@dataclass(frozen=True)
class _Resampler:
    gsi: int
    id: int
    """Which eventfd it is, whatever its descriptor."""
    fd: int
    resamplefd: int


class Resamplers:
    """The resampling irqfds of a VM, and the thread that waits for them."""

    def __init__(self, drive: Callable[[int, int], None]) -> None:
        """`drive(gsi, level)` drives a line, on the thread and where `ended` is called."""
        self._drive = drive
        self._lock = threading.Lock()
        self._all: list[_Resampler] = []
        self._raised: set[int] = set()
        self._epoll = select.epoll()
        self._closing = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def add(self, fd: int, gsi: int, resamplefd: int) -> None:
        """KVM_IRQFD with KVM_IRQFD_FLAG_RESAMPLE. EBADF, EINVAL: no eventfds; EBUSY: `fd` is assigned already."""
        number = eventfd_id(fd)
        eventfd_id(resamplefd)
        with self._lock:
            if any(r.id == number for r in self._all):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            resampler = _Resampler(gsi, number, os.dup(fd), os.dup(resamplefd))
            self._all.append(resampler)
            self._epoll.register(resampler.fd, select.EPOLLIN)
            if self._thread is None:
                self._epoll.register(self._closing, select.EPOLLIN)
                self._thread = threading.Thread(target=self._serve, name="kvm-resample", daemon=True)
                self._thread.start()

    def remove(self, fd: int, gsi: int) -> bool:
        """Undo `add`, by any descriptor of the eventfd. The last of a line lowers it. False if there was none."""
        number = eventfd_id(fd)
        with self._lock:
            found = next((r for r in self._all if (r.id, r.gsi) == (number, gsi)), None)
            if found is None:
                return False
            self._all.remove(found)
            self._epoll.unregister(found.fd)
            os.close(found.fd)
            os.close(found.resamplefd)
            last = gsi in self._raised and not any(r.gsi == gsi for r in self._all)
            self._raised -= {gsi} if last else set()
        if last:
            self._drive(gsi, 0)
        return True

    def raised(self) -> tuple[int, ...]:
        """The GSIs that are up: seldom any, and what ends is looked for among them at each end of an interrupt."""
        with self._lock:
            return tuple(self._raised)

    def ended(self, gsi: int) -> None:
        """The guest ended an interrupt of `gsi`: lower the line and ask its devices."""
        with self._lock:
            if gsi not in self._raised:
                return
            self._raised.remove(gsi)
            fds = [os.dup(r.resamplefd) for r in self._all if r.gsi == gsi]
        self._drive(gsi, 0)
        for fd in fds:
            os.eventfd_write(fd, 1)
            os.close(fd)

    def _serve(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._closing:
                    return
                with self._lock:
                    resampler = next((r for r in self._all if r.fd == fd), None)
                    if resampler is None or not _drained(fd):
                        continue
                    self._raised.add(resampler.gsi)
                self._drive(resampler.gsi, 1)

    def close(self) -> None:
        """Stop the thread and let go of all eventfds."""
        os.eventfd_write(self._closing, 1)
        if self._thread is not None:
            self._thread.join()
        for resampler in self._all:
            os.close(resampler.fd)
            os.close(resampler.resamplefd)
        self._all.clear()
        self._epoll.close()
        os.close(self._closing)


def eventfd_id(fd: int) -> int:
    """Which eventfd a descriptor is of. EBADF: not open; EINVAL: no eventfd."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            for line in file:
                if line.startswith("eventfd-id:"):
                    return int(line.split(":")[1])
    except FileNotFoundError as error:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from error
    raise OSError(errno.EINVAL, f"descriptor {fd} is no eventfd")


def _drained(fd: int) -> bool:
    """Take an eventfd's signals without waiting: whether there were any. (Its own flags may let read(2) wait.)"""
    try:
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False
