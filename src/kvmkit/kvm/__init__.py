"""The KVM interface, over the kernel's ``/dev/kvm`` or over the software engine.

`contract` has the classes and their methods, `exits` what `Vcpu.run` returns, `memory` the guest's memory. Modules here and
above know an engine only through them; the engines, `linux` and `soft`, are loaded when they are asked for.
"""

from kvmkit.kvm import exits
from kvmkit.kvm.contract import Device, Kvm, Vcpu, Vm, irqchip_route, msi_route
from kvmkit.kvm.memory import GuestAddressError, GuestMemory, MemoryMap

ENGINES = ("linux", "soft")

__all__ = [
    "ENGINES",
    "Device",
    "GuestAddressError",
    "GuestMemory",
    "Kvm",
    "MemoryMap",
    "Vcpu",
    "Vm",
    "exits",
    "irqchip_route",
    "msi_route",
]
