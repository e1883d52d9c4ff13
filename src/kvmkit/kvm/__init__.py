"""The KVM interface, over the kernel's ``/dev/kvm`` or over the software engine.

::

    with kvm.open() as system, system.create_vm() as vm: ...

`contract` has the classes and their methods, `exits` what `Vcpu.run` returns, `memory` the guest's memory. Modules here and
above know an engine only through them; the engines, `linux` and `soft`, are loaded when they are asked for.
"""

import platform

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
    "open",
]


def open(engine: str = "auto") -> Kvm:
    """Open an engine: "linux" (or "kvm") is the kernel's ``/dev/kvm``, "soft" the software one, "auto" the faster one here.

    `OSError` where ``/dev/kvm`` can't be opened, `ImportError` where the software engine isn't built, or can't be.
    """
    if engine == "auto":
        from kvmkit.kvm.probe import choose_engine

        engine, _ = choose_engine()
    if engine in ("linux", "kvm"):
        from kvmkit.kvm.linux import open_kvm

        return open_kvm()
    if engine == "soft":
        if platform.machine() != "x86_64":
            raise ImportError(
                f"the software engine executes x86-64 on x86-64 alone, not on {platform.machine()}"
            )
        from kvmkit.kvm.soft.main import Kvm as SoftKvm

        return SoftKvm()
    raise ValueError(f"engine {engine!r}: there are {', '.join(ENGINES)} and auto")
