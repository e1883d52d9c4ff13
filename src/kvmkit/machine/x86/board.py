"""The board: memory, interrupt chips and timers from the engine, devices from here, and processors as the boot protocol wants them."""

import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kvmkit.devices.acpi_pm import PM1_CNT_BYTES, PM1_EVT_BYTES, PM_TMR_BYTES, AcpiPm, PmTimer
from kvmkit.devices.bus import Buses
from kvmkit.devices.debug_exit import DebugExit
from kvmkit.devices.i8042 import I8042
from kvmkit.devices.pci import PciConfig
from kvmkit.devices.rtc import Rtc
from kvmkit.devices.serial import Serial
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.mmio import VirtioMmio
from kvmkit.kvm import GuestAddressError, GuestMemory, Kvm, MemoryMap, Vcpu, Vm, irqchip_route
from kvmkit.kvm.exits import Io, Mmio
from kvmkit.kvm.state import load_vcpu, load_vm, save_vcpu, save_vm
from kvmkit.machine.x86 import acpi, boot, layout
from kvmkit.machine.x86.cpu_model import cpu_model
from kvmkit.machine.x86.cpuid import cpuid_of
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import KVM_CAP_TSC_DEADLINE_TIMER

_CR0_PE, _CR0_ET, _CR0_PG = 1 << 0, 1 << 4, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_FIXED = 2

_BOOT_CS, _BOOT_DS, _BOOT_TSS = 0x10, 0x18, 0x20
"""The selectors of the boot protocol; PVH leaves them open and wants a TSS."""

_MSR_MISC_ENABLE, _FAST_STRINGS = 0x1A0, 1 << 0
_MSR_MTRR_DEF_TYPE, _MTRR_ENABLED, _MTRR_WRITE_BACK = 0x2FF, 1 << 11, 6

_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVER_NMI, _DELIVER_EXTINT = 4 << 8, 7 << 8

_PRESENT, _WRITABLE, _LARGE = 1, 2, 1 << 7


class X86Board:
    """A PC without a graphics card, keyboard or bus: `memory_bytes` of RAM, `cpus` processors, a serial port, a clock.

    `pio` and `mmio` carry out a vCPU's exits. The callbacks are called on the thread that does that, and more than
    once if the guest insists: a guest may go on after it asked for its end.
    """

    def __init__(
        self,
        system: Kvm,
        vm: Vm,
        *,
        memory_bytes: int,
        cpus: int = 1,
        serial_write: Callable[[bytes], None],
        on_reset: Callable[[], None],
        on_power_off: Callable[[], None],
        on_exit_code: Callable[[int], None],
        devices: Sequence[VirtioDevice] = (),
        cpu: str = "host",
        testdev: bool = False,
    ) -> None:
        """Build it on `vm`, a new VM of `system`, which stays the caller's. `ValueError` for a size that can't be.

        `devices` become the board's to close, if it can be built at all. `cpu` is what the processors can do (`cpu_model`).
        `testdev` adds what bare-metal test kernels expect (`kvmkit.devices.testdev`, `kvmkit.devices.fw_cfg`).
        """
        if len(devices) > len(layout.VIRTIO_GSIS):
            raise ValueError(
                f"{len(devices)} virtio devices: this board has room for {len(layout.VIRTIO_GSIS)}"
            )
        self.memory_bytes = memory_bytes
        self.memory = MemoryMap()
        self.vcpus: list[Vcpu] = []
        self._vm = vm
        self._transports = ExitStack()
        self._virtio_devices = len(devices)
        blocks = layout.ram(memory_bytes)
        tables = acpi.build(layout.ACPI, cpus, len(devices))
        self._buses = Buses()
        self.pio: Callable[[Io], None] = self._buses.pio
        self.mmio: Callable[[Mmio], None] = self._buses.mmio
        self.serial = Serial(partial(vm.irq_line, layout.COM1_IRQ), serial_write)
        ports = self._buses.ports
        ports.register(layout.COM1, 8, self.serial)
        ports.register(layout.RTC, 2, Rtc())
        ports.register(layout.I8042_COMMAND, 1, I8042(on_reset))
        ports.register(layout.DEBUG_EXIT, 4, DebugExit(on_exit_code))
        ports.register(layout.ACPI_PM, PM1_EVT_BYTES + PM1_CNT_BYTES, AcpiPm(on_power_off))
        ports.register(layout.ACPI_PM_TIMER, PM_TMR_BYTES, PmTimer())
        ports.register(layout.PCI_CONFIG, 8, PciConfig(on_reset))
        if testdev:
            self._add_test_devices(vm, cpus, on_power_off)
        try:
            _interrupts_and_timers(vm)
            for gpa, size_bytes in blocks:
                self.memory.add(gpa, GuestMemory(size_bytes))
            self.memory.attach(vm)
            self.memory.write(layout.ACPI, tables)
            for i, device in enumerate(devices):
                self._add_virtio(vm, i, device)
            deadline = bool(system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
            supported = cpu_model(system.get_supported_cpuid(), cpu)
            for id in range(cpus):
                vcpu = vm.create_vcpu(id)
                self.vcpus.append(vcpu)
                vcpu.set_cpuid2(cpuid_of(supported, id, cpus, tsc_deadline=deadline))
                # As firmware would. An engine without one of them has no use for it either.
                for msr, value in (
                    (_MSR_MISC_ENABLE, _FAST_STRINGS),
                    (_MSR_MTRR_DEF_TYPE, _MTRR_ENABLED | _MTRR_WRITE_BACK),
                ):
                    vcpu.set_msrs({msr: value})
            _virtual_wire(self.vcpus[0])
        except BaseException:
            self.close()
            raise

    def load_linux(
        self,
        kernel: str | Path,
        initrd: bytes | str | Path | None,
        cmdline: str,
        *,
        protocol: boot.Protocol = "linux64",
    ) -> None:
        """Load a kernel (see `boot.load_linux`) and set the first processor to its entry; the others wait for a SIPI."""
        entry = boot.load_linux(self.memory, self.memory_bytes, kernel, initrd, cmdline, protocol=protocol)
        if entry.protocol == "pvh":
            self._enter_protected(entry.ip, ebx=entry.parameters)
        else:
            self._enter_linux64(entry)

    def load_multiboot(self, kernel: str | Path, module: str | Path | None, arguments: str) -> str:
        """Load a test kernel (see `multiboot.load`) and set the first processor to its entry; return its command line."""
        from kvmkit.machine.x86 import multiboot

        entry = multiboot.load(self.memory, self.memory_bytes, kernel, module, arguments)
        self._enter_protected(entry.ip, eax=multiboot.LOADER_MAGIC, ebx=entry.info)
        return entry.cmdline

    def move(self, vm: Vm, msrs: Iterable[int]) -> set[int]:
        """Go on with the same memory and devices on `vm`, a new VM of any engine; the old one has lost its vCPUs and is to be closed.

        No vCPU runs, and each has completed its last exit's access (`kvmkit.kvm.state`). The processors can do nothing that `vm`'s
        engine can't. Of `msrs`, those that both engines have, the ones that the new vCPUs refuse are returned. `ValueError` if there
        are virtio devices: what notifies them belongs to the old VM.
        """
        if self._virtio_devices:
            raise ValueError("a board with virtio devices can't move to another VM")
        msrs = list(msrs)
        chips = save_vm(self._vm)
        processors = [(vcpu.id, save_vcpu(self._vm, vcpu, msrs)) for vcpu in self.vcpus]
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        self.memory.detach(self._vm)
        self._vm = vm
        _interrupts_and_timers(vm)
        self.memory.attach(vm)
        # Before the chips get their state: their inputs' levels are not in it.
        self.serial.connect(partial(vm.irq_line, layout.COM1_IRQ))
        refused: set[int] = set()
        for id, state in processors:
            self.vcpus.append(vm.create_vcpu(id))
            refused |= load_vcpu(self.vcpus[-1], state)
        load_vm(vm, chips)
        return refused

    def serial_input(self, data: bytes) -> None:
        """Type `data` on the serial port. Returns when the guest has taken nearly all of it, or at `close`."""
        self.serial.feed(data)

    def close(self) -> None:
        """Release processors and memory, none of them running any more. The VM is to be closed as well."""
        self.serial.close()
        self._transports.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.memory.close()

    def _add_test_devices(self, vm: Vm, cpus: int, on_power_off: Callable[[], None]) -> None:
        from kvmkit.devices import fw_cfg, testdev

        ports, memory = self._buses.ports, self._buses.memory
        ports.register(layout.TEST_PORTS, testdev.PORTS, testdev.TestPorts(self._flush))
        ports.register(layout.TEST_IRQ_LINES, testdev.IRQ_LINES, testdev.IrqLines(vm.irq_line))
        ports.register(layout.SHUTDOWN, 1, testdev.ShutdownPort(on_power_off))
        ports.register(layout.FW_CFG, 2, fw_cfg.FwCfg(memory_bytes=self.memory_bytes, cpus=cpus))
        memory.register(layout.TEST_MEMORY, testdev.MEMORY_BYTES, testdev.ExitMemory())

    def _flush(self, gpa: int) -> None:
        """Take away the mapping of a page of RAM; of any other there is none."""
        try:
            block, offset = self.memory.find(gpa & -layout.PAGE_BYTES, layout.PAGE_BYTES)
        except GuestAddressError:
            return
        block.unmap_page(offset)

    def _add_virtio(self, vm: Vm, i: int, device: VirtioDevice) -> None:
        base = layout.VIRTIO_MMIO + i * layout.PAGE_BYTES
        transport = VirtioMmio(device, vm, self.memory, base=base, gsi=layout.VIRTIO_GSIS[i])
        self._transports.callback(transport.close)
        self._buses.memory.register(base, layout.PAGE_BYTES, transport)

    def _enter_linux64(self, entry: boot.Entry) -> None:
        """64-bit mode, paging on with the first 4 GiB mapped to themselves, interrupts off, boot_params in rsi."""
        pdpt, directories = (layout.PAGE_TABLES + n * layout.PAGE_BYTES for n in (1, 2))
        tables = bytearray(2 * layout.PAGE_BYTES)
        struct.pack_into("<Q", tables, 0, pdpt | _PRESENT | _WRITABLE)
        for i in range(4):
            directory = directories + i * layout.PAGE_BYTES | _PRESENT | _WRITABLE
            struct.pack_into("<Q", tables, layout.PAGE_BYTES + 8 * i, directory)
        pages = range(_PRESENT | _WRITABLE | _LARGE, 4 << 30, 2 << 20)
        self.memory.write(layout.PAGE_TABLES, tables + struct.pack(f"<{len(pages)}Q", *pages))
        vcpu = self.vcpus[0]
        sregs = self._flat_segments(vcpu, long_mode=True)
        sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_PG
        sregs.cr3 = layout.PAGE_TABLES
        sregs.cr4 = _CR4_PAE
        sregs.efer = _EFER_LME | _EFER_LMA
        vcpu.set_sregs(sregs)
        stack = layout.BOOT_STACK_TOP
        vcpu.set_regs(x86.kvm_regs(rip=entry.ip, rsi=entry.parameters, rsp=stack, rflags=_RFLAGS_FIXED))

    def _enter_protected(self, ip: int, *, ebx: int, eax: int = 0) -> None:
        """32-bit protected mode, flat segments, no paging, interrupts off: as PVH and multiboot have it."""
        vcpu = self.vcpus[0]
        sregs = self._flat_segments(vcpu, long_mode=False)
        sregs.cr0 = _CR0_PE | _CR0_ET
        sregs.cr4 = sregs.efer = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(x86.kvm_regs(rip=ip, rax=eax, rbx=ebx, rflags=_RFLAGS_FIXED))

    def _flat_segments(self, vcpu: Vcpu, *, long_mode: bool) -> x86.kvm_sregs:
        """Put a GDT into memory; return the vCPU's registers with its segments loaded and an empty IDT."""
        code = x86.kvm_segment(
            0, 0xFFFFFFFF, _BOOT_CS, type=11, present=1, s=1, g=1, l=int(long_mode), db=int(not long_mode)
        )
        data = x86.kvm_segment(0, 0xFFFFFFFF, _BOOT_DS, type=3, present=1, s=1, g=1, db=1)
        tss = x86.kvm_segment(0, 0x67, _BOOT_TSS, type=11, present=1)
        descriptors = (0, 0, *map(_descriptor, (code, data, tss)), 0)
        self.memory.write(layout.GDT, struct.pack(f"<{len(descriptors)}Q", *descriptors))
        sregs = vcpu.get_sregs()
        sregs.cs, sregs.tr = code, tss
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.gdt.base, sregs.gdt.limit = layout.GDT, 8 * len(descriptors) - 1
        sregs.idt.base = sregs.idt.limit = 0
        return sregs


def _interrupts_and_timers(vm: Vm) -> None:
    """Create the engine's chips, before any vCPU, and wire the interrupt lines as on a PC."""
    vm.set_tss_addr(layout.TSS)
    vm.set_identity_map_addr(layout.IDENTITY_MAP)
    vm.create_irqchip()
    vm.create_pit2(x86.KVM_PIT_SPEAKER_DUMMY)  # with port 0x61
    routes = []
    for gsi in range(24):
        if gsi != 2:  # the slave's cascade on the i8259s, and taken by the PIT on the IOAPIC
            if gsi < 16:
                routes.append(irqchip_route(gsi, gsi // 8, gsi % 8))
            routes.append(irqchip_route(gsi, x86.KVM_IRQCHIP_IOAPIC, 2 if gsi == 0 else gsi))
    vm.set_gsi_routing(routes)


def _virtual_wire(vcpu: Vcpu) -> None:
    """Let the i8259s and NMI through the boot processor's local APIC, as firmware does (MultiProcessor Specification 1.4,
    section 3.6.2.2, "Virtual Wire Mode").

    The others need none of it: the INIT that wakes them resets their local APICs.
    """
    lapic = vcpu.get_lapic()
    struct.pack_into("<I", lapic, _LVT_LINT0, _DELIVER_EXTINT)
    struct.pack_into("<I", lapic, _LVT_LINT1, _DELIVER_NMI)
    vcpu.set_lapic(lapic)


def _descriptor(segment: x86.kvm_segment) -> int:
    """The GDT descriptor of a segment with base 0."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return limit & 0xFFFF | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52
