"""The descriptors of the software KVM (``virt/kvm/kvm_main.c``, ``arch/x86/kvm/x86.c``).

Errors are the kernel's: the same errno for the same mistake.
"""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from kvmkit import _engine
from kvmkit.kvm import contract
from kvmkit.kvm.exits import Exit, InternalError, Intr, decode
from kvmkit.kvm.soft import eventfd
from kvmkit.kvm.soft.irqchip import IrqChip
from kvmkit.kvm.soft.x86 import ioapic
from kvmkit.kvm.soft.x86.cpuid import get_supported_cpuid
from kvmkit.uapi import arm64, common
from kvmkit.uapi import capabilities as cap
from kvmkit.uapi import common as c
from kvmkit.uapi import x86 as x
from kvmkit.uapi.errors import ioctl_error

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PAGE = 4096
_MMAP_BYTES = 3 * _PAGE
_MAX_VCPUS = 64
_MAX_SLOTS = 512
_MAX_PHYSICAL = 1 << 46
_EXTINT = 1 << 16
"""The engine's own exit reason: the PIC is asked for a vector."""

_EVENT_FLAGS = (
    x.KVM_VCPUEVENT_VALID_NMI_PENDING | x.KVM_VCPUEVENT_VALID_SIPI_VECTOR | x.KVM_VCPUEVENT_VALID_SHADOW
)

_CLOCK_FLAGS = c.KVM_CLOCK_TSC_STABLE | c.KVM_CLOCK_REALTIME | c.KVM_CLOCK_HOST_TSC

_GUEST_DEBUG = (
    c.KVM_GUESTDBG_ENABLE
    | c.KVM_GUESTDBG_SINGLESTEP
    | x.KVM_GUESTDBG_USE_SW_BP
    | x.KVM_GUESTDBG_USE_HW_BP
    | x.KVM_GUESTDBG_INJECT_DB
    | x.KVM_GUESTDBG_INJECT_BP
    | x.KVM_GUESTDBG_BLOCKIRQ
)

_XSAVE_BYTES = 4096

_CAPABILITIES = {
    cap.KVM_CAP_IRQCHIP: 1,
    cap.KVM_CAP_HLT: 1,
    cap.KVM_CAP_USER_MEMORY: 1,
    cap.KVM_CAP_SET_TSS_ADDR: 1,
    cap.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    cap.KVM_CAP_EXT_CPUID: 1,
    cap.KVM_CAP_CLOCKSOURCE: 1,
    cap.KVM_CAP_NR_VCPUS: 2,
    cap.KVM_CAP_MAX_VCPUS: _MAX_VCPUS,
    cap.KVM_CAP_MAX_VCPU_ID: _MAX_VCPUS,
    cap.KVM_CAP_NR_MEMSLOTS: _MAX_SLOTS,
    cap.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    cap.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    cap.KVM_CAP_READONLY_MEM: 1,
    cap.KVM_CAP_SET_BOOT_CPU_ID: 1,
    cap.KVM_CAP_MP_STATE: 1,
    cap.KVM_CAP_USER_NMI: 1,
    cap.KVM_CAP_PIT2: 1,
    cap.KVM_CAP_PIT_STATE2: 1,
    cap.KVM_CAP_IRQ_ROUTING: 1,
    cap.KVM_CAP_IRQFD: 1,
    cap.KVM_CAP_IOEVENTFD: 1,
    cap.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    cap.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    cap.KVM_CAP_SIGNAL_MSI: 1,
    cap.KVM_CAP_VCPU_EVENTS: 1,
    cap.KVM_CAP_DEBUGREGS: 1,
    cap.KVM_CAP_SET_GUEST_DEBUG: 1,
    cap.KVM_CAP_SET_GUEST_DEBUG2: _GUEST_DEBUG,
    cap.KVM_CAP_XSAVE: 1,
    cap.KVM_CAP_XSAVE2: _XSAVE_BYTES,
    cap.KVM_CAP_XCRS: 1,
    cap.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    cap.KVM_CAP_GET_TSC_KHZ: 1,
    cap.KVM_CAP_ADJUST_CLOCK: _CLOCK_FLAGS,
    cap.KVM_CAP_IMMEDIATE_EXIT: 1,
    cap.KVM_CAP_CHECK_EXTENSION_VM: 1,
    cap.KVM_CAP_INTERNAL_ERROR_DATA: 1,
}


class _Descriptor(contract.Descriptor):
    """Close state that all descriptors share."""

    _closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check(self, name: str) -> None:
        if self._closed:
            raise ioctl_error(name, errno.EBADF)


class Kvm(_Descriptor, contract.Kvm):
    """The software KVM as a whole."""

    engine = "soft"

    def close(self) -> None:
        """Release it; VMs live on."""
        self._closed = True

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        self._check("KVM_GET_API_VERSION")
        return c.KVM_API_VERSION

    def create_vm(self, type: int = 0) -> "Vm":
        """KVM_CREATE_VM."""
        self._check("KVM_CREATE_VM")
        if type:
            raise ioctl_error("KVM_CREATE_VM", errno.EINVAL, f"VM type {type}: there is only 0")
        return Vm()

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        self._check("KVM_CHECK_EXTENSION")
        return _CAPABILITIES.get(cap, 0)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE."""
        self._check("KVM_GET_VCPU_MMAP_SIZE")
        return _MMAP_BYTES

    def get_supported_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        self._check("KVM_GET_SUPPORTED_CPUID")
        return get_supported_cpuid()

    def get_emulated_cpuid(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID: nothing that the host lacks."""
        self._check("KVM_GET_EMULATED_CPUID")
        return []

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST."""
        self._check("KVM_GET_MSR_INDEX_LIST")
        return _engine.msr_list()

    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: none."""
        self._check("KVM_GET_MSR_FEATURE_INDEX_LIST")
        return []

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: there are no feature MSRs."""
        self._check("KVM_GET_MSRS")
        return {}


class Vm(_Descriptor, contract.Vm):
    """A virtual machine."""

    def __init__(self) -> None:
        """Create one without memory or vCPUs."""
        self._vm = _engine.Vm(_engine.host_tsc_khz())
        self._slots: dict[int, tuple[int, int, int, int]] = {}  # gpa, size, hva, flags
        self._slots_lock = threading.Lock()
        self._vcpus: dict[int, Vcpu] = {}
        self._pid = os.getpid()
        self.irqchip: IrqChip | None = None

    def close(self) -> None:
        """Release it with its vCPUs and chips. vCPUs must have left `run`. In a child of os.fork it is the parent's still."""
        if self._closed:
            return
        self._closed = True
        if self.forked:
            return
        for vcpu in list(self._vcpus.values()):
            vcpu.close()
        self._vcpus.clear()
        if self.irqchip:
            self.irqchip.close()
        self._vm.close()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the VM belongs to."""
        return os.getpid() != self._pid

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        self._check("KVM_CHECK_EXTENSION")
        return _CAPABILITIES.get(cap, 0)

    def create_vcpu(self, id: int) -> "Vcpu":
        """KVM_CREATE_VCPU."""
        self._check("KVM_CREATE_VCPU")
        if not 0 <= id < _MAX_VCPUS:
            raise ioctl_error("KVM_CREATE_VCPU", errno.EINVAL, f"vCPU id {id}: 0 to {_MAX_VCPUS - 1}")
        if id in self._vcpus:
            raise ioctl_error("KVM_CREATE_VCPU", errno.EEXIST)
        vcpu = Vcpu(self, self._vm, id)
        self._vcpus[id] = vcpu
        return vcpu

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        name = "KVM_SET_USER_MEMORY_REGION"
        self._check(name)
        known = c.KVM_MEM_LOG_DIRTY_PAGES | c.KVM_MEM_READONLY
        if flags & ~known or not 0 <= slot < _MAX_SLOTS:
            raise ioctl_error(name, errno.EINVAL, f"flags {flags:#x} or slot {slot} unknown")
        if (guest_phys_addr | memory_size | userspace_addr) & _PAGE - 1:
            raise ioctl_error(name, errno.EINVAL, "addresses and size must be multiples of 4096")
        if guest_phys_addr + memory_size > _MAX_PHYSICAL or userspace_addr + memory_size >= 1 << 47:
            raise ioctl_error(name, errno.EINVAL, "beyond the end of the address space")
        with self._slots_lock:
            self._set_slot(slot, guest_phys_addr, memory_size, userspace_addr, flags)

    def _set_slot(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int
    ) -> None:
        name = "KVM_SET_USER_MEMORY_REGION"
        old = self._slots.get(slot)
        if memory_size == 0:
            if old is None:
                raise ioctl_error(name, errno.EINVAL, f"slot {slot} doesn't exist")
            self._vm.set_memory_region(slot, 0, 0, 0, 0)
            del self._slots[slot]
            return
        if old:
            _, size, hva, old_flags = old
            if (size, hva) != (memory_size, userspace_addr) or (flags ^ old_flags) & c.KVM_MEM_READONLY:
                raise ioctl_error(name, errno.EINVAL, "a slot may be moved or re-flagged, not resized")
        for other, (gpa, size, _, _) in self._slots.items():
            if other != slot and guest_phys_addr < gpa + size and gpa < guest_phys_addr + memory_size:
                raise ioctl_error(name, errno.EEXIST)
        self._vm.set_memory_region(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        self._slots[slot] = (guest_phys_addr, memory_size, userspace_addr, flags)

    def memory_written(self, gpa: int, size_bytes: int) -> None:
        """Drop translations of guest memory that host code changed."""
        self._vm.notify_write(gpa, size_bytes)

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG."""
        name = "KVM_GET_DIRTY_LOG"
        self._check(name)
        if slot not in self._slots or not self._slots[slot][3] & c.KVM_MEM_LOG_DIRTY_PAGES:
            raise ioctl_error(name, errno.ENOENT)
        return self._vm.get_dirty_log(slot)

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR: nothing here needs it."""
        self._check("KVM_SET_TSS_ADDR")
        if not 0 <= addr <= 0xFFFFFFFF - 3 * _PAGE:
            raise ioctl_error("KVM_SET_TSS_ADDR", errno.EINVAL)

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: nothing here needs it."""
        self._check("KVM_SET_IDENTITY_MAP_ADDR")
        if self._vcpus:
            raise ioctl_error("KVM_SET_IDENTITY_MAP_ADDR", errno.EINVAL, "a vCPU exists")

    # Interrupts.

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP."""
        self._check("KVM_CREATE_IRQCHIP")
        if self.irqchip:
            raise ioctl_error("KVM_CREATE_IRQCHIP", errno.EEXIST)
        if self._vcpus:
            raise ioctl_error("KVM_CREATE_IRQCHIP", errno.EINVAL)
        self._vm.create_lapics()
        self.irqchip = IrqChip(self._vm)

    def _chip(self, name: str, number: int = errno.ENXIO) -> IrqChip:
        self._check(name)
        if self.irqchip is None:
            raise ioctl_error(name, number)
        return self.irqchip

    def get_irqchip(self, chip_id: int) -> x.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        return self._chip("KVM_GET_IRQCHIP").get(chip_id)

    def set_irqchip(self, chip: x.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self._chip("KVM_SET_IRQCHIP").set(chip)

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self._chip("KVM_IRQ_LINE").line(irq, level)

    def set_gsi_routing(self, entries: Sequence[common.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING."""
        self._chip("KVM_SET_GSI_ROUTING", errno.EINVAL).set_routing(entries)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD; resampling isn't offered."""
        self._chip("KVM_IRQFD", errno.EINVAL)
        eventfd.irqfd(self._vm, fd, gsi, flags)

    def ioeventfd(self, addr: int, len: int, fd: int, datamatch: int = 0, flags: int = 0) -> None:
        """KVM_IOEVENTFD."""
        self._check("KVM_IOEVENTFD")
        eventfd.ioeventfd(self._vm, addr, len, fd, datamatch, flags)

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI."""
        self._chip("KVM_SIGNAL_MSI", errno.EINVAL)
        if flags:
            raise ioctl_error("KVM_SIGNAL_MSI", errno.EINVAL, f"flags {flags:#x}")
        return self._vm.signal_msi(address, data)

    # x86.

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2. Port 0x61 is always answered (KVM_PIT_SPEAKER_DUMMY)."""
        chip = self._chip("KVM_CREATE_PIT2", errno.ENOENT)
        if chip.pit:
            raise ioctl_error("KVM_CREATE_PIT2", errno.EEXIST)
        chip.create_pit()

    def get_pit2(self) -> x.kvm_pit_state2:
        """KVM_GET_PIT2."""
        chip = self._chip("KVM_GET_PIT2")
        if not chip.pit:
            raise ioctl_error("KVM_GET_PIT2", errno.ENXIO)
        with chip.lock:
            return chip.pit.get_state()

    def set_pit2(self, state: x.kvm_pit_state2) -> None:
        """KVM_SET_PIT2."""
        chip = self._chip("KVM_SET_PIT2")
        if not chip.pit:
            raise ioctl_error("KVM_SET_PIT2", errno.ENXIO)
        with chip.lock:
            chip.pit.set_state(state)

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID."""
        self._check("KVM_SET_BOOT_CPU_ID")
        if self._vcpus:
            raise ioctl_error("KVM_SET_BOOT_CPU_ID", errno.EBUSY)
        self._vm.set_boot_cpu(id)

    def get_clock(self) -> common.kvm_clock_data:
        """KVM_GET_CLOCK."""
        self._check("KVM_GET_CLOCK")
        clock, realtime, host_tsc = self._vm.clock()
        return c.kvm_clock_data(clock=clock, flags=_CLOCK_FLAGS, realtime=realtime, host_tsc=host_tsc)

    def set_clock(self, data: common.kvm_clock_data) -> None:
        """KVM_SET_CLOCK. With KVM_CLOCK_REALTIME, the time that has passed since `realtime` is added."""
        self._check("KVM_SET_CLOCK")
        if data.flags & ~_CLOCK_FLAGS:
            raise ioctl_error("KVM_SET_CLOCK", errno.EINVAL, f"flags {data.flags:#x}")
        passed_ns = 0
        if data.flags & c.KVM_CLOCK_REALTIME:
            passed_ns = max(time.clock_gettime_ns(time.CLOCK_REALTIME) - data.realtime, 0)
        self._vm.set_clock_ns(data.clock + passed_ns & (1 << 64) - 1)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        self._check("KVM_GET_TSC_KHZ")
        return _engine.host_tsc_khz()

    def stats(self) -> dict[str, int]:
        """Return counters of the engine (no ioctl)."""
        return dict(self._vm.stats())


class Vcpu(_Descriptor, contract.Vcpu):
    """A virtual processor."""

    def __init__(self, vm: Vm, native: _engine.Vm, id: int) -> None:
        """Create it in the state after power-up; those but number 0 wait for INIT and SIPI."""
        self.id = id
        self._machine = vm
        self._mmap = mmap.mmap(-1, _MMAP_BYTES)
        self._area = memoryview(self._mmap)
        self._run: x.kvm_run | None = x.kvm_run.from_buffer(self._mmap)
        address = ctypes.addressof(self._run)
        self._vcpu = native.create_vcpu(id, address, _MMAP_BYTES)

    def close(self) -> None:
        """Release it. It must have left `run`."""
        if not self._closed:
            self._closed = True
            if not self._machine.forked:
                self._vcpu.kick()

    @property
    def kvm_run(self) -> x.kvm_run:
        """The shared kvm_run, live."""
        if self._run is None or self._closed:
            raise ioctl_error("kvm_run", errno.EBADF, "the vCPU is closed")
        return self._run

    def run(self) -> Exit:
        """KVM_RUN. Accesses to the chips that KVM_CREATE_IRQCHIP made are handled here.

        On the main thread, Python's signal handlers run meanwhile, within 50 ms; one that raises (Ctrl-C does) ends the run, and
        one that wants `run` to return calls `kick`.
        """
        main = threading.current_thread() is threading.main_thread()
        run = self.kvm_run
        chip = self._machine.irqchip
        while True:
            reason, message = self._vcpu.run(main)
            if chip is not None:
                if reason == c.KVM_EXIT_IO:
                    if chip.owns_port(run.exit.io.port):
                        self._chip_port(chip, run)
                        continue
                elif reason == c.KVM_EXIT_MMIO:
                    if 0 <= run.exit.mmio.phys_addr - ioapic.BASE < ioapic.SIZE:
                        self._chip_memory(chip, run)
                        continue
                elif reason == c.KVM_EXIT_IOAPIC_EOI:
                    with chip.lock:
                        chip.ioapic.eoi(run.exit.eoi.vector)
                    continue
                elif reason == _EXTINT:
                    with chip.lock:
                        if chip.pic.intr:  # no other vCPU was faster
                            self._vcpu.interrupt(chip.pic.acknowledge())
                    continue
            if reason == c.KVM_EXIT_INTR:
                return Intr()
            if message is not None:
                exit_ = decode(run, self._area)
                assert isinstance(exit_, InternalError)
                self.error_message = message
                return exit_
            return decode(run, self._area)

    error_message = ""
    """What the engine says of the last `InternalError`."""

    def _chip_port(self, chip: IrqChip, run: x.kvm_run) -> None:
        io = run.exit.io
        port, offset, step = io.port, io.data_offset, io.size
        for i in range(offset, offset + io.count * step, step):
            # The chips are 8 bits wide: a wider access reaches the ports that follow.
            for k in range(step):
                if io.direction == c.KVM_EXIT_IO_OUT:
                    if chip.owns_port(port + k):
                        chip.port_out(port + k, self._area[i + k])
                else:
                    self._area[i + k] = chip.port_in(port + k) if chip.owns_port(port + k) else 0xFF

    def _chip_memory(self, chip: IrqChip, run: x.kvm_run) -> None:
        access = run.exit.mmio
        offset = access.phys_addr - ioapic.BASE
        with chip.lock:
            if access.is_write:
                if access.len >= 4:
                    chip.ioapic.write(offset, int.from_bytes(bytes(access.data)[:4], "little"))
            else:
                value = chip.ioapic.read(offset)
                access.data[:] = list(value.to_bytes(8, "little"))

    def kick(self) -> None:
        """Set `immediate_exit` and interrupt a running guest. Any thread."""
        run = self._run
        if run is not None and not self._closed:
            run.immediate_exit = 1
            self._vcpu.kick()

    # State.

    def get_regs(self) -> x.kvm_regs:
        """KVM_GET_REGS."""
        self._check("KVM_GET_REGS")
        return x.kvm_regs.from_buffer_copy(self._vcpu.get_regs())

    def set_regs(self, regs: x.kvm_regs) -> None:
        """KVM_SET_REGS."""
        self._check("KVM_SET_REGS")
        self._vcpu.set_regs(bytes(regs))

    def get_sregs(self) -> x.kvm_sregs:
        """KVM_GET_SREGS."""
        self._check("KVM_GET_SREGS")
        return x.kvm_sregs.from_buffer_copy(self._vcpu.get_sregs())

    def set_sregs(self, sregs: x.kvm_sregs) -> None:
        """KVM_SET_SREGS."""
        self._check("KVM_SET_SREGS")
        _named("KVM_SET_SREGS", self._vcpu.set_sregs, bytes(sregs))

    def get_fpu(self) -> x.kvm_fpu:
        """KVM_GET_FPU."""
        self._check("KVM_GET_FPU")
        return x.kvm_fpu.from_buffer_copy(self._vcpu.get_fpu())

    def set_fpu(self, fpu: x.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._check("KVM_SET_FPU")
        self._vcpu.set_fpu(bytes(fpu))

    def get_xsave(self) -> x.kvm_xsave:
        """KVM_GET_XSAVE."""
        self._check("KVM_GET_XSAVE")
        return x.kvm_xsave.from_buffer_copy(self._vcpu.get_xsave())

    def get_xsave2(self) -> bytes:
        """KVM_GET_XSAVE2: no component lies beyond what KVM_GET_XSAVE returns."""
        self._check("KVM_GET_XSAVE2")
        return self._vcpu.get_xsave()

    def set_xsave(self, xsave: x.kvm_xsave | bytes) -> None:
        """KVM_SET_XSAVE."""
        self._check("KVM_SET_XSAVE")
        _named("KVM_SET_XSAVE", self._vcpu.set_xsave, bytes(xsave)[:_XSAVE_BYTES].ljust(_XSAVE_BYTES, b"\0"))

    def get_xcrs(self) -> x.kvm_xcrs:
        """KVM_GET_XCRS."""
        self._check("KVM_GET_XCRS")
        xcrs = x.kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = self._vcpu.get_xcr0()
        return xcrs

    def set_xcrs(self, xcrs: x.kvm_xcrs) -> None:
        """KVM_SET_XCRS."""
        self._check("KVM_SET_XCRS")
        if xcrs.nr_xcrs > 16 or xcrs.flags:
            raise ioctl_error("KVM_SET_XCRS", errno.EINVAL)
        for entry in xcrs.xcrs[: xcrs.nr_xcrs]:
            if entry.xcr == 0:
                _named("KVM_SET_XCRS", self._vcpu.set_xcr0, entry.value)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: stops at the first that doesn't exist, as the kernel does."""
        self._check("KVM_GET_MSRS")
        values: dict[int, int] = {}
        for index in indices:
            value = self._vcpu.get_msr(index)
            if value is None:
                break
            values[index] = value
        return values

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """KVM_SET_MSRS: how many were set before the first that couldn't be."""
        self._check("KVM_SET_MSRS")
        for n, (index, value) in enumerate(values.items()):
            if not self._vcpu.set_msr(index, value):
                return n
        return len(values)

    def get_cpuid2(self) -> list[x.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        self._check("KVM_GET_CPUID2")
        return [x.kvm_cpuid_entry2(*entry) for entry in self._vcpu.get_cpuid()]

    def set_cpuid(self, entries: Sequence[x.kvm_cpuid_entry]) -> None:
        """KVM_SET_CPUID."""
        self._check("KVM_SET_CPUID")
        if len(entries) > 256:
            raise ioctl_error("KVM_SET_CPUID", errno.E2BIG)
        self._vcpu.set_cpuid([(e.function, 0, 0, e.eax, e.ebx, e.ecx, e.edx) for e in entries])

    def set_cpuid2(self, entries: Sequence[x.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2."""
        self._check("KVM_SET_CPUID2")
        if len(entries) > 256:
            raise ioctl_error("KVM_SET_CPUID2", errno.E2BIG)
        self._vcpu.set_cpuid([(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries])

    def get_lapic(self) -> x.kvm_lapic_state:
        """KVM_GET_LAPIC."""
        self._check("KVM_GET_LAPIC")
        return x.kvm_lapic_state.from_buffer_copy(_named("KVM_GET_LAPIC", self._vcpu.get_lapic))

    def set_lapic(self, lapic: x.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC."""
        self._check("KVM_SET_LAPIC")
        _named("KVM_SET_LAPIC", self._vcpu.set_lapic, bytes(lapic))

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE."""
        self._check("KVM_GET_MP_STATE")
        return self._vcpu.get_mp_state()

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        self._check("KVM_SET_MP_STATE")
        if not 0 <= mp_state <= 4 or (mp_state and self._machine.irqchip is None):
            raise ioctl_error("KVM_SET_MP_STATE", errno.EINVAL)
        self._vcpu.set_mp_state(mp_state)

    def get_vcpu_events(self) -> x.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS."""
        self._check("KVM_GET_VCPU_EVENTS")
        return x.kvm_vcpu_events.from_buffer_copy(self._vcpu.get_vcpu_events())

    def set_vcpu_events(self, events: x.kvm_vcpu_events | arm64.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._check("KVM_SET_VCPU_EVENTS")
        if events.flags & ~_EVENT_FLAGS:
            raise ioctl_error("KVM_SET_VCPU_EVENTS", errno.EINVAL, f"flags {events.flags:#x}")
        _named("KVM_SET_VCPU_EVENTS", self._vcpu.set_vcpu_events, bytes(events))

    def get_debugregs(self) -> x.kvm_debugregs:
        """KVM_GET_DEBUGREGS."""
        self._check("KVM_GET_DEBUGREGS")
        return x.kvm_debugregs.from_buffer_copy(self._vcpu.get_debugregs())

    def set_debugregs(self, debugregs: x.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._check("KVM_SET_DEBUGREGS")
        if debugregs.flags:
            raise ioctl_error("KVM_SET_DEBUGREGS", errno.EINVAL)
        _named("KVM_SET_DEBUGREGS", self._vcpu.set_debugregs, bytes(debugregs))

    def set_guest_debug(self, debug: x.kvm_guest_debug | arm64.kvm_guest_debug) -> None:
        """KVM_SET_GUEST_DEBUG."""
        self._check("KVM_SET_GUEST_DEBUG")
        if not isinstance(debug, x.kvm_guest_debug) or debug.control & ~_GUEST_DEBUG:
            raise ioctl_error("KVM_SET_GUEST_DEBUG", errno.EINVAL)
        registers = list(debug.arch.debugreg)
        _named("KVM_SET_GUEST_DEBUG", self._vcpu.set_guest_debug, debug.control, registers)

    def translate(self, linear_address: int) -> common.kvm_translation:
        """KVM_TRANSLATE."""
        self._check("KVM_TRANSLATE")
        gpa = self._vcpu.translate(linear_address)
        return c.kvm_translation(
            linear_address=linear_address,
            physical_address=(1 << 64) - 1 if gpa is None else gpa,
            valid=gpa is not None,
            writeable=1,
        )

    def interrupt(self, irq: int) -> None:
        """KVM_INTERRUPT."""
        self._check("KVM_INTERRUPT")
        if not 0 <= irq < 256:
            raise ioctl_error("KVM_INTERRUPT", errno.EINVAL)
        if self._machine.irqchip is not None:
            raise ioctl_error("KVM_INTERRUPT", errno.ENXIO)
        _named("KVM_INTERRUPT", self._vcpu.interrupt, irq)

    def nmi(self) -> None:
        """KVM_NMI."""
        self._check("KVM_NMI")
        self._vcpu.nmi()

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        self._check("KVM_GET_TSC_KHZ")
        return _engine.host_tsc_khz()


def _named(name: str, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call into the engine; an error of its bears the ioctl's name."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise ioctl_error(name, error.errno or errno.EINVAL) from error
