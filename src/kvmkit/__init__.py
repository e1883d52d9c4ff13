"""KVM for Python: the KVM interface, a software KVM, and a microVM monitor on either one.

::

    import kvmkit

    with kvmkit.Machine(root="debian:bookworm", memory="512M") as vm:
        print(vm.run(["uname", "-r"], text=True).stdout)

`Machine` and what belongs to it is `kvmkit.client`; `kvmkit.kvm` is the KVM interface itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmkit.client import AsyncMachine, Disk, Machine, MachineConfig, Share
    from kvmkit.errors import (
        AgentError,
        CommandError,
        CommandTimeout,
        GuestError,
        KvmkitError,
        VmError,
        VmTimeout,
    )

__version__ = "0.1.0"

__all__ = [
    "AgentError",
    "AsyncMachine",
    "CommandError",
    "CommandTimeout",
    "Disk",
    "GuestError",
    "KvmkitError",
    "Machine",
    "MachineConfig",
    "Share",
    "VmError",
    "VmTimeout",
]


def __getattr__(name: str) -> Any:
    """Import it when it is asked for: the VM process, which needs none of it, starts sooner."""
    if name not in __all__:
        raise AttributeError(f"module 'kvmkit' has no attribute {name!r}")
    from kvmkit import client, errors

    return getattr(errors, name, None) or getattr(client, name)
