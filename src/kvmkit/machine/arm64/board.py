"""The board: processors, GICv3 and timers from the engine, devices from here, as the boot protocol wants them."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvmkit.devices import pl011, pl031
from kvmkit.devices.bus import Buses
from kvmkit.devices.pl011 import Pl011
from kvmkit.devices.pl031 import Pl031
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.mmio import VirtioMmio
from kvmkit.kvm import Device, GuestMemory, MemoryMap, Vcpu, Vm
from kvmkit.kvm.exits import Io, Mmio
from kvmkit.machine.arm64 import boot, layout
from kvmkit.uapi import arm64, common

_PSTATE_EL1H, _PSTATE_DAIF = 5, 0xF << 6


class Arm64Board:
    """A board of `memory_bytes` of RAM, `cpus` processors, a serial port, a clock and virtio devices.

    `mmio` carries out a vCPU's exits. Power-off and reset are PSCI calls, which the engine reports as system events.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        memory_bytes: int,
        cpus: int = 1,
        serial_write: Callable[[bytes], None],
        devices: Sequence[VirtioDevice] = (),
    ) -> None:
        """Build it on `vm`, a new VM, which stays the caller's. `ValueError` for a size that can't be.

        `devices` become the board's to close, if it can be built at all.
        """
        layout.check_ram(memory_bytes)
        if len(devices) > layout.MAX_VIRTIO:
            raise ValueError(f"{len(devices)} virtio devices: this board has room for {layout.MAX_VIRTIO}")
        if not 1 <= cpus <= layout.MAX_CPUS:
            raise ValueError(f"{cpus} processors: this board has from 1 to {layout.MAX_CPUS}")
        self.memory_bytes = memory_bytes
        self.memory = MemoryMap()
        self.vcpus: list[Vcpu] = []
        self._gic: Device | None = None
        self._transports = ExitStack()
        self._virtio = len(devices)
        self._buses = Buses()
        self.pio: Callable[[Io], None] = self._buses.pio
        self.mmio: Callable[[Mmio], None] = self._buses.mmio
        pl011_irq = (
            arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | layout.FIRST_SPI + layout.PL011_SPI
        )
        self.serial = Pl011(lambda level: vm.irq_line(pl011_irq, level), serial_write)
        self._buses.memory.register(layout.PL011, pl011.REGISTERS_BYTES, self.serial)
        self._buses.memory.register(layout.PL031, pl031.REGISTERS_BYTES, Pl031())
        try:
            self.memory.add(layout.RAM, GuestMemory(memory_bytes))
            self.memory.attach(vm)
            for id in range(cpus):
                vcpu = vm.create_vcpu(id)
                self.vcpus.append(vcpu)
                init = vm.arm_preferred_target()
                init.features[0] |= 1 << arm64.KVM_ARM_VCPU_PSCI_0_2
                if id:  # until the first one calls CPU_ON for it
                    init.features[0] |= 1 << arm64.KVM_ARM_VCPU_POWER_OFF
                vcpu.arm_vcpu_init(init)
            self._gic = _create_gic(vm)
            for i, device in enumerate(devices):  # their interrupts take a GIC that is there
                self._add_virtio(vm, i, device)
        except BaseException:
            self.close()
            raise

    def load_linux(self, kernel: str | Path, initrd: bytes | str | Path | None, cmdline: str) -> None:
        """Load a kernel (see `boot.load_linux`) and set the first processor to its entry; the others are off."""
        cpus = len(self.vcpus)
        entry = boot.load_linux(self.memory, self.memory_bytes, cpus, kernel, initrd, cmdline, self._virtio)
        vcpu = self.vcpus[0]
        vcpu.set_one_reg(arm64.REG_PSTATE, _PSTATE_DAIF | _PSTATE_EL1H)
        vcpu.set_one_reg(arm64.REG_PC, entry.pc)
        for n, value in enumerate((entry.fdt, 0, 0, 0)):
            vcpu.set_one_reg(arm64.x_reg(n), value)

    def serial_input(self, data: bytes) -> None:
        """Type `data` on the serial port. Returns when the guest has taken nearly all of it, or at `close`."""
        self.serial.feed(data)

    def close(self) -> None:
        """Release processors and memory, none of them running any more. The VM is to be closed as well."""
        self.serial.close()
        self._transports.close()
        if self._gic is not None:
            self._gic.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.memory.close()

    def _add_virtio(self, vm: Vm, i: int, device: VirtioDevice) -> None:
        """On arm64 a GSI is, unless routed otherwise, an SPI counted from the first."""
        base = layout.VIRTIO_MMIO + i * layout.VIRTIO_BYTES
        transport = VirtioMmio(device, vm, self.memory, base=base, gsi=layout.FIRST_VIRTIO_SPI + i)
        self._transports.callback(transport.close)
        self._buses.memory.register(base, layout.VIRTIO_BYTES, transport)


def _create_gic(vm: Vm) -> Device:
    """Make the interrupt controller; all vCPUs are there (Documentation/virt/kvm/devices/arm-vgic-v3.rst)."""
    gic = vm.create_device(common.KVM_DEV_TYPE_ARM_VGIC_V3)
    try:
        for group, attr, value in (
            (arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, ctypes.c_uint64(layout.GICD)),
            (
                arm64.KVM_DEV_ARM_VGIC_GRP_ADDR,
                arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST,
                ctypes.c_uint64(layout.GICR),
            ),
            (arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, ctypes.c_uint32(layout.NR_IRQS)),
        ):
            gic.set_device_attr(group, attr, ctypes.addressof(value))
        gic.set_device_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
    except BaseException:
        gic.close()
        raise
    return gic
