"""Machines, as their users see them.

The guest runs in a process of its own (`kvmkit.vmm`); this package talks to it over sockets and imports nothing of it. `machine` and
`aio` are what a program uses, `config` says what a machine is to be, `agent` talks to the guest, `vm_process` to the VM process.
"""

from typing import TYPE_CHECKING, Any

from kvmkit.client.agent import DEVNULL, PIPE, CompletedProcess, Files, Process, Pty
from kvmkit.client.config import Disk, MachineConfig, Share
from kvmkit.client.forward import Forward
from kvmkit.client.machine import Machine
from kvmkit.client.machine_info import host_report
from kvmkit.client.vm_process import End, Event

if TYPE_CHECKING:
    from kvmkit.client.aio import AsyncMachine

__all__ = [
    "DEVNULL",
    "PIPE",
    "AsyncMachine",
    "CompletedProcess",
    "Disk",
    "End",
    "Event",
    "Files",
    "Forward",
    "Machine",
    "MachineConfig",
    "Process",
    "Pty",
    "Share",
    "host_report",
]


def __getattr__(name: str) -> Any:
    """Import asyncio's part when it is asked for: that takes as long as all the rest."""
    if name != "AsyncMachine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvmkit.client.aio import AsyncMachine

    return AsyncMachine
