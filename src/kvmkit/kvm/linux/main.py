"""What KVM's file descriptors have in common on all architectures (``virt/kvm/kvm_main.c``)."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import get_native_id
from typing import Any, TypeVar

from kvmkit.kvm import contract
from kvmkit.kvm.exits import Decoder, Exit, Intr
from kvmkit.kvm.memory import MemorySlot
from kvmkit.kvm.rings import CoalescedRing, DirtyRing
from kvmkit.uapi import arm64, common, x86
from kvmkit.uapi import common as c
from kvmkit.uapi.capabilities import KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL
from kvmkit.uapi.errors import ioctl_error
from kvmkit.uapi.ioctls import IOCTLS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long

_T = TypeVar("_T", bound=ctypes.Structure)

_ARCHITECTURE = "arm64" if os.uname().machine == "aarch64" else "x86"
_NAMES = {
    ioctl.number(arch): ioctl.name
    for ioctl in IOCTLS
    for arch in ioctl.architectures
    if arch == _ARCHITECTURE
}
"""ioctl number → name. KVM_GET_ONE_REG and KVM_ARM_SET_DEVICE_ADDR share a number; the former wins."""

_EINTR_EXIT = Intr()

_KICK_SIGNAL = signal.SIGRTMIN
_EHWPOISON = 133  # Python does not name it


class Flexible:
    """A struct that ends in a C flexible array: `head` and `entries` in one buffer."""

    def __init__(self, head: type[ctypes.Structure], entry: type[Any], count: int) -> None:
        """Allocate zeros for `count` entries."""
        offset = ctypes.sizeof(head)
        self.buffer = ctypes.create_string_buffer(offset + count * ctypes.sizeof(entry))
        self.head: Any = head.from_buffer(self.buffer)
        self.entries: Any = (entry * count).from_buffer(self.buffer, offset)


class Fd(contract.Descriptor):
    """A KVM file descriptor."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close it. What was created from it lives on, as the kernel has it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        """Close one that was forgotten."""
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _ioctl(self, request: int, arg: Any = 0, name: str = "") -> int:
        """Call ioctl(2); an integer, a ctypes object or an address as `arg`."""
        if isinstance(arg, (ctypes.Structure, ctypes._SimpleCData)):
            arg = ctypes.byref(arg)
        result: int = _libc.ioctl(self._fd, request, arg)
        if result < 0:
            raise ioctl_error(name or _NAMES.get(request, f"ioctl {request:#x}"), ctypes.get_errno())
        return result

    def _get(self, request: int, ctype: type[_T]) -> _T:
        value = ctype()
        self._ioctl(request, value)
        return value

    # Ioctls that several descriptors share.

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return self._ioctl(c.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP."""
        request = c.kvm_enable_cap(cap=cap, flags=flags)
        request.args[: len(args)] = list(args)
        return self._ioctl(c.KVM_ENABLE_CAP, request)

    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR."""
        self._ioctl(c.KVM_SET_DEVICE_ATTR, c.kvm_device_attr(group=group, attr=attr, addr=addr))

    def get_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR."""
        self._ioctl(c.KVM_GET_DEVICE_ATTR, c.kvm_device_attr(group=group, attr=attr, addr=addr))

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR."""
        try:
            self._ioctl(c.KVM_HAS_DEVICE_ATTR, c.kvm_device_attr(group=group, attr=attr))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def get_stats_fd(self) -> int:
        """KVM_GET_STATS_FD."""
        return self._ioctl(c.KVM_GET_STATS_FD)


class Kvm(Fd, contract.Kvm):
    """``/dev/kvm``."""

    engine = "linux"
    vm_class: type["Vm"]

    def __init__(self, path: str) -> None:
        """Open `path` and check that it speaks API version 12."""
        self._fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            remedy = {
                errno.ENOENT: "no KVM module is loaded, or the machine has no hardware virtualization",
                errno.EACCES: "this user may not open it: join its group, often kvm",
                errno.ENODEV: "no KVM module supports this processor",
            }.get(error.errno or 0, "KVM can't be used")
            message = f"{path}: {error.strerror} ({remedy}; engine soft needs none)"
            raise OSError(error.errno, message) from error
        super().__init__(fd)
        try:
            version = self.get_api_version()
        except OSError:
            version = 0
        if version != c.KVM_API_VERSION:
            self.close()
            raise OSError(errno.ENODEV, f"{path}: not KVM of API version {c.KVM_API_VERSION}")
        self._mmap_size_bytes = self.get_vcpu_mmap_size()
        _install_kick_handler()

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return self._ioctl(c.KVM_GET_API_VERSION)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE."""
        return self._ioctl(c.KVM_GET_VCPU_MMAP_SIZE)

    def create_vm(self, type: int = 0) -> "Vm":
        """KVM_CREATE_VM."""
        while True:
            try:
                return self.vm_class(self._ioctl(c.KVM_CREATE_VM, type), self._mmap_size_bytes)
            except InterruptedError:  # the kernel registers an mmu_notifier, which gives way to signals
                continue


class Vm(Fd, contract.Vm):
    """A virtual machine."""

    vcpu_class: type["Vcpu"]

    def __init__(self, fd: int, mmap_size_bytes: int) -> None:
        """Take over `fd`."""
        super().__init__(fd)
        self._mmap_size_bytes = mmap_size_bytes
        self._dirty_ring_size_bytes = 0
        self._slots: dict[int, MemorySlot] = {}  # the kernel doesn't tell of them

    def create_vcpu(self, id: int) -> "Vcpu":
        """KVM_CREATE_VCPU."""
        fd = self._ioctl(c.KVM_CREATE_VCPU, id)
        return self.vcpu_class(self, fd, id)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP."""
        result = super().enable_cap(cap, *args, flags=flags)
        if cap in (KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
            self._dirty_ring_size_bytes = args[0]
        return result

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        region = c.kvm_userspace_memory_region(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        self._ioctl(c.KVM_SET_USER_MEMORY_REGION, region)
        self._note(MemorySlot(slot, guest_phys_addr, memory_size, userspace_addr, flags))

    def set_user_memory_region2(self, region: common.kvm_userspace_memory_region2) -> None:
        """KVM_SET_USER_MEMORY_REGION2."""
        self._ioctl(c.KVM_SET_USER_MEMORY_REGION2, region)
        r = region
        self._note(MemorySlot(r.slot, r.guest_phys_addr, r.memory_size, r.userspace_addr, r.flags))

    def _note(self, slot: MemorySlot) -> None:
        if slot.size_bytes:
            self._slots[slot.slot] = slot
        else:
            self._slots.pop(slot.slot, None)

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """The slots."""
        return list(self._slots.values())

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG."""
        pages = self._slots[slot].size_bytes // 4096 if slot in self._slots else 0
        bitmap = ctypes.create_string_buffer(max(8, (pages + 63) // 64 * 8))
        log = c.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        self._ioctl(c.KVM_GET_DIRTY_LOG, log)
        return bitmap.raw

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        if len(dirty_bitmap) * 8 < num_pages:
            raise ioctl_error(
                "KVM_CLEAR_DIRTY_LOG", errno.EINVAL, f"{len(dirty_bitmap)} bytes hold no {num_pages} pages"
            )
        bitmap = ctypes.create_string_buffer(dirty_bitmap, (num_pages + 63) // 64 * 8 + len(dirty_bitmap))
        self._ioctl(
            c.KVM_CLEAR_DIRTY_LOG,
            c.kvm_clear_dirty_log(slot, num_pages, first_page, ctypes.addressof(bitmap)),
        )

    def set_memory_attributes(self, address: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        self._ioctl(c.KVM_SET_MEMORY_ATTRIBUTES, c.kvm_memory_attributes(address, size, attributes, flags))

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD."""
        return self._ioctl(c.KVM_CREATE_GUEST_MEMFD, c.kvm_create_guest_memfd(size, flags))

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS."""
        return self._ioctl(c.KVM_RESET_DIRTY_RINGS)

    def register_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        self._ioctl(c.KVM_REGISTER_COALESCED_MMIO, c.kvm_coalesced_mmio_zone(addr, size, pio))

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO."""
        self._ioctl(c.KVM_UNREGISTER_COALESCED_MMIO, c.kvm_coalesced_mmio_zone(addr, size, pio))

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP."""
        self._ioctl(c.KVM_CREATE_IRQCHIP)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self._ioctl(c.KVM_IRQ_LINE, c.kvm_irq_level(irq=irq, level=level))

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS."""
        request = c.kvm_irq_level(irq=irq, level=level)
        self._ioctl(c.KVM_IRQ_LINE_STATUS, request)
        return int(request.status)

    def set_gsi_routing(self, entries: Sequence[common.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING."""
        table = Flexible(c.kvm_irq_routing, c.kvm_irq_routing_entry, len(entries))
        table.head.nr = len(entries)
        table.entries[:] = entries
        self._ioctl(c.KVM_SET_GSI_ROUTING, table.buffer)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD."""
        self._ioctl(c.KVM_IRQFD, c.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd))

    def ioeventfd(self, addr: int, len: int, fd: int, datamatch: int = 0, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""
        self._ioctl(
            c.KVM_IOEVENTFD, c.kvm_ioeventfd(datamatch=datamatch, addr=addr, len=len, fd=fd, flags=flags)
        )

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI."""
        return self._ioctl(
            c.KVM_SIGNAL_MSI, c.kvm_msi(address & 0xFFFFFFFF, address >> 32, data, flags, devid)
        )

    def create_device(self, type: int, flags: int = 0) -> "Device":
        """KVM_CREATE_DEVICE."""
        request = c.kvm_create_device(type=type, flags=flags)
        self._ioctl(c.KVM_CREATE_DEVICE, request)
        return Device(request.fd)


def _closed() -> None:
    raise OSError(errno.EBADF, "")


class Vcpu(Fd, contract.Vcpu):
    """A virtual processor."""

    run_class: type[x86.kvm_run] | type[arm64.kvm_run]
    coalesced_mmio_page: int
    """Page of the vCPU's mapping that is the coalesced MMIO ring (KVM_COALESCED_MMIO_PAGE_OFFSET)."""

    def __init__(self, vm: Vm, fd: int, id: int) -> None:
        """Take over `fd` and map its kvm_run, and its dirty ring if it has one. Its VM may be closed before it."""
        super().__init__(fd)
        self.id = id
        self._slots: Mapping[int, MemorySlot] = vm._slots
        self._running_tid = 0
        self._coalesced: CoalescedRing | None = None
        self._dirty_ring: DirtyRing | None = None
        try:
            self._mmap = mmap.mmap(fd, vm._mmap_size_bytes, mmap.MAP_SHARED)
            if vm._dirty_ring_size_bytes:
                offset = x86.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE  # arm64's is the same
                self._dirty_mmap = mmap.mmap(fd, vm._dirty_ring_size_bytes, mmap.MAP_SHARED, offset=offset)
                self._dirty_ring = DirtyRing(memoryview(self._dirty_mmap))
        except BaseException:
            self.close()
            raise
        self._area = memoryview(self._mmap)
        self._enter: Callable[[], object] = partial(
            fcntl.ioctl, fd, c.KVM_RUN
        )  # a third of what the call costs by ctypes
        self._run: x86.kvm_run | arm64.kvm_run | None = self.run_class.from_buffer(self._mmap)
        self._decode = Decoder(self._run, self._area).decode

    @property
    def kvm_run(self) -> x86.kvm_run | arm64.kvm_run:
        """The shared kvm_run, live."""
        if self._run is None:
            raise ioctl_error("kvm_run", errno.EBADF, "the vCPU is closed")
        return self._run

    @property
    def memory_slots(self) -> list[MemorySlot]:
        """The VM's slots."""
        return list(self._slots.values())

    @property
    def area(self) -> memoryview:
        """The whole mapping: kvm_run, the PIO page, the coalesced MMIO ring."""
        return self._area

    def run(self) -> Exit:
        """KVM_RUN."""
        while True:
            self._running_tid = get_native_id()
            try:
                self._enter()
            except OSError as caught:
                error = caught.errno
            else:
                return self._decode()
            finally:
                self._running_tid = 0
            if error == errno.EINTR:
                return _EINTR_EXIT
            if error == errno.EAGAIN:  # a vCPU that waited for INIT and SIPI has woken up
                continue
            run = self._run
            if run is None:
                raise ioctl_error("KVM_RUN", errno.EBADF, "the vCPU is closed")
            if run.exit_reason == c.KVM_EXIT_MEMORY_FAULT and error in (errno.EFAULT, _EHWPOISON):
                return self._decode()
            raise ioctl_error("KVM_RUN", error or errno.EIO)

    def take_coalesced_mmio(self) -> list[common.kvm_coalesced_mmio]:
        """Take the guest's writes from the coalesced MMIO ring."""
        self.kvm_run  # noqa: B018 - EBADF once closed
        if self._coalesced is None:
            start = self.coalesced_mmio_page * mmap.PAGESIZE
            self._coalesced = CoalescedRing(self._area[start : start + mmap.PAGESIZE])
        return self._coalesced.take()

    def take_dirty_gfns(self) -> list[tuple[int, int]]:
        """Take what this vCPU wrote from its dirty ring."""
        self.kvm_run  # noqa: B018 - EBADF once closed
        if self._dirty_ring is None:
            raise ioctl_error("the dirty ring", errno.EINVAL, "enable KVM_CAP_DIRTY_LOG_RING_ACQ_REL first")
        return self._dirty_ring.take()

    def kick(self) -> None:
        """Set `immediate_exit` and interrupt a running KVM_RUN with a signal. Does nothing on a closed vCPU."""
        run = self._run
        if run is None:
            return
        run.immediate_exit = 1
        tid = self._running_tid
        if tid:
            # The thread may have left KVM_RUN, or ended, meanwhile: the handler does nothing, and ESRCH is no matter.
            _libc.syscall(_SYS_TGKILL, os.getpid(), tid, int(_KICK_SIGNAL))

    def close(self) -> None:
        """Close it and unmap kvm_run, or leave that to whoever still holds an exit's `data`."""
        if self._fd >= 0 and hasattr(self, "_area"):
            self._run = self._coalesced = self._dirty_ring = None
            self._enter = _closed  # the descriptor's number may soon be another file's
            del self._decode
            self._area.release()
            try:
                self._mmap.close()
            except BufferError:
                del self._mmap
        super().close()

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE."""
        return self._get(c.KVM_GET_MP_STATE, c.kvm_mp_state).mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        self._ioctl(c.KVM_SET_MP_STATE, c.kvm_mp_state(mp_state))

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK."""
        if signals is None:
            self._ioctl(c.KVM_SET_SIGNAL_MASK)
            return
        mask = Flexible(c.kvm_signal_mask, ctypes.c_uint8, 8)  # the kernel's sigset, not the C library's
        mask.head.len = 8
        mask.entries[:] = sum({1 << (number - 1) for number in signals}).to_bytes(8, "little")
        self._ioctl(c.KVM_SET_SIGNAL_MASK, mask.buffer)

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


class Device(Fd, contract.Device):
    """A device of the kernel's."""


_SYS_TGKILL = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
_kick_handler_installed = threading.Lock()


def _install_kick_handler() -> None:
    """Give the kick signal a handler once, unless the program has one.

    It must exist, or the signal ends the process; it needs to do nothing, for KVM_RUN returns EINTR by itself. A C function does
    it: Python's handlers run on the main thread, which a kick need not wake, and only that thread could set one. getpid
    fits: it ignores its argument and is safe in a signal handler.
    """
    if not _kick_handler_installed.acquire(blocking=False):
        return
    if signal.getsignal(_KICK_SIGNAL) is signal.SIG_DFL:
        _libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        _libc.signal(_KICK_SIGNAL, ctypes.cast(_libc.getpid, ctypes.c_void_p))
