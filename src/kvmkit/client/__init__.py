"""Machines, as their users see them.

::

    with Machine(MachineConfig(command=("uname", "-a"), output_fd=1)) as vm:
        end = vm.wait(timeout_s=60)

The guest runs in a process of its own (`kvmkit.vmm`); this package talks to it over a socket and imports nothing of it.
"""

from kvmkit.client.machine import End, Event, Machine, MachineConfig
from kvmkit.client.machine_info import host_report

__all__ = ["End", "Event", "Machine", "MachineConfig", "host_report"]
