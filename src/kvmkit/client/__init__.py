"""Machines, as their users see them.

The guest runs in a process of its own (`kvmkit.vmm`); this package talks to it over sockets and imports nothing of it. `machine` and
`aio` are what a program uses, `config` says what a machine is to be, `agent` talks to the guest, `vm_process` to the VM process.
"""

from kvmkit.client.agent import DEVNULL, PIPE, CompletedProcess, Files, Process, Pty
from kvmkit.client.aio import AsyncMachine
from kvmkit.client.config import Disk, MachineConfig, Share
from kvmkit.client.forward import Forward
from kvmkit.client.machine import Machine
from kvmkit.client.machine_info import host_report
from kvmkit.client.vm_process import End, Event

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
