"""The flattened device tree: what the kernel is told of the board (Devicetree Specification 0.4, Linux's bindings)."""

import os
from collections.abc import Sequence

import fdt

from kvmkit.machine.arm64 import layout
from kvmkit.machine.errors import KernelError

_GIC, _CLOCK = 1, 2
"""Phandles."""
_SPI, _PPI = 0, 1
_EDGE_RISING, _LEVEL_HIGH = 1, 4
_CLOCK_HZ = 24_000_000
_KASLR_SEED_BYTES, _RNG_SEED_BYTES = 8, 32

_Value = str | bytes | bool | int | Sequence[str] | Sequence[int]
_Properties = dict[str, _Value]


def build(
    memory_bytes: int, cpus: int, cmdline: bytes, initrd: tuple[int, int] | None = None, virtio: int = 0
) -> bytes:
    """Return the tree of a board of `memory_bytes`, `cpus` and as many `virtio` devices; `initrd` is address and size in bytes.

    It holds fresh seeds for the guest's random numbers. `KernelError` if it gets too long, which is the command line's fault.
    """
    root = _node(
        "/",
        {
            "compatible": "linux,dummy-virt",
            "model": "kvmkit",
            "#address-cells": 2,
            "#size-cells": 2,
            "interrupt-parent": _GIC,
        },
    )
    ram: _Properties = {"device_type": "memory", "reg": _cells64(layout.RAM, memory_bytes)}
    # Calls are made by HVC: KVM takes them (Documentation/devicetree/bindings/arm/psci.yaml).
    psci: _Properties = {"compatible": ["arm,psci-1.0", "arm,psci-0.2"], "method": "hvc"}
    clock: _Properties = {
        "compatible": "fixed-clock",
        "phandle": _CLOCK,
        "#clock-cells": 0,
        "clock-frequency": _CLOCK_HZ,
    }
    serial: _Properties = {
        "compatible": ["arm,pl011", "arm,primecell"],
        "reg": _cells64(layout.PL011, layout.PAGE_BYTES),
        "interrupts": [_SPI, layout.PL011_SPI, _LEVEL_HIGH],
        "clocks": [_CLOCK, _CLOCK],
        "clock-names": ["uartclk", "apb_pclk"],
    }
    rtc: _Properties = {
        "compatible": ["arm,pl031", "arm,primecell"],
        "reg": _cells64(layout.PL031, layout.PAGE_BYTES),
        "clocks": [_CLOCK],
        "clock-names": "apb_pclk",
    }
    root.append(_chosen(cmdline, initrd))
    root.append(_node(f"memory@{layout.RAM:x}", ram))
    root.append(_cpus(cpus))
    root.append(_node("psci", psci))
    root.append(_timer())
    root.append(_gic(cpus))
    root.append(_node("apb-pclk", clock))
    root.append(_node(f"pl011@{layout.PL011:x}", serial))
    root.append(_node(f"pl031@{layout.PL031:x}", rtc))
    for i in range(virtio):
        root.append(_virtio(i))
    tree = fdt.FDT()
    tree.header.version = fdt.Header.MAX_VERSION
    tree.header.last_comp_version = 16
    tree.header.boot_cpuid_phys = 0
    tree.root = root
    blob = bytes(tree.to_dtb())
    if len(blob) > layout.FDT_MAX_BYTES:
        raise KernelError(
            f"kernel command line: of {len(cmdline)} bytes, it makes a device tree of {len(blob)}, "
            f"and a kernel takes {layout.FDT_MAX_BYTES}: shorten it"
        )
    return blob


def _chosen(cmdline: bytes, initrd: tuple[int, int] | None) -> fdt.Node:
    properties: _Properties = {
        "bootargs": cmdline + b"\0",
        "stdout-path": f"/pl011@{layout.PL011:x}",
        "kaslr-seed": os.urandom(_KASLR_SEED_BYTES),
        "rng-seed": os.urandom(_RNG_SEED_BYTES),
    }
    if initrd is not None:
        start, size_bytes = initrd
        properties["linux,initrd-start"] = _cells64(start)
        properties["linux,initrd-end"] = _cells64(start + size_bytes)
    return _node("chosen", properties)


def _cpus(count: int) -> fdt.Node:
    cpus = _node("cpus", {"#address-cells": 1, "#size-cells": 0})
    for id in range(count):
        mpidr = layout.mpidr(id)
        cpu: _Properties = {
            "device_type": "cpu",
            "compatible": "arm,armv8",
            "reg": mpidr,
            "enable-method": "psci",
        }
        cpus.append(_node(f"cpu@{mpidr:x}", cpu))
    return cpus


def _timer() -> fdt.Node:
    ppis = (
        layout.TIMER_SECURE_PPI,
        layout.TIMER_PHYSICAL_PPI,
        layout.TIMER_VIRTUAL_PPI,
        layout.TIMER_HYPERVISOR_PPI,
    )
    interrupts = [cell for ppi in ppis for cell in (_PPI, ppi, _LEVEL_HIGH)]
    return _node("timer", {"compatible": "arm,armv8-timer", "interrupts": interrupts, "always-on": True})


def _gic(cpus: int) -> fdt.Node:
    gic: _Properties = {
        "compatible": "arm,gic-v3",
        "reg": _cells64(layout.GICD, layout.GICD_BYTES, layout.GICR, cpus * layout.GICR_BYTES),
        "#interrupt-cells": 3,
        "interrupt-controller": True,
        "phandle": _GIC,
    }
    return _node(f"intc@{layout.GICD:x}", gic)


def _virtio(i: int) -> fdt.Node:
    """A device (Documentation/devicetree/bindings/virtio/mmio.yaml), which reads and writes through the host's caches, as the guest does."""
    base = layout.VIRTIO_MMIO + i * layout.VIRTIO_BYTES
    device: _Properties = {
        "compatible": "virtio,mmio",
        "reg": _cells64(base, layout.VIRTIO_BYTES),
        "interrupts": [_SPI, layout.FIRST_VIRTIO_SPI + i, _EDGE_RISING],
        "dma-coherent": True,
    }
    return _node(f"virtio_mmio@{base:x}", device)


def _node(name: str, properties: _Properties) -> fdt.Node:
    """A node: each property is text, bytes as they are, cells of 32 bits, or True for one that is just there."""
    node = fdt.Node(name)
    for key, value in properties.items():
        if value is True:
            node.append(fdt.Property(key))
        elif isinstance(value, bytes):
            node.append(fdt.PropBytes(key, data=value))
        else:
            node.set_property(key, value)
    return node


def _cells64(*values: int) -> list[int]:
    """Each value as two cells, the high one first."""
    return [cell for value in values for cell in (value >> 32, value & 0xFFFFFFFF)]
