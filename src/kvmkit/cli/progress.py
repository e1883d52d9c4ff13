"""What a machine does, shown on stderr while it does it."""

import os
import time
from collections import Counter
from typing import Any, ClassVar

import click

from kvmkit.client import Event


def print_stats(stats: dict[str, Any]) -> None:
    """Print KVM's statistics that aren't zero, those of all vCPUs together; histograms as their sums."""

    def number(value: int | list[int]) -> int:
        return sum(value) if isinstance(value, list) else value

    total = Counter({name: number(value) for name, value in stats["vm"].items()})
    for vcpu in stats["vcpus"]:
        total.update({name: number(value) for name, value in vcpu.items()})
    if not total:
        click.echo("statistics: this engine has none (KVM_CAP_BINARY_STATS_FD)", err=True)
        return
    click.echo("statistics:", err=True)
    for name, value in sorted(total.items()):
        if value:
            click.echo(f"{value:16,}  {name}", err=True)


class Follower:
    """Shows progress on stderr as events come in, and the time line at the end."""

    _NAMES: ClassVar = {
        "spawned": "VM process started",
        "started": "VM built",
        "entered": "kernel entered",
        "console": "first console byte",
        "init": "init runs",
        "agent": "agent ready",
        "exit": "console command done",
        "ended": "VM ended",
    }

    def __init__(self, verbose: bool) -> None:
        """With `verbose`, or on a terminal, progress is shown."""
        self._progress = verbose or os.isatty(2)

    def __call__(self, event: Event) -> None:
        """Take an event of the machine."""
        if event.name == "progress" and self._progress:
            click.echo(event.details["text"], err=True)

    def print_timeline(self, timeline: list[Event]) -> None:
        """Print milliseconds since this process started."""
        start_ns = _process_start_ns()
        click.echo("time line, ms since kvmkit's start:", err=True)
        for event in timeline:
            if event.name in self._NAMES:
                ms = (event.t_ns - start_ns) / 1e6
                click.echo(f"{ms:10.1f}  {self._NAMES[event.name]}", err=True)


def _process_start_ns() -> int:
    """When this process started, on CLOCK_MONOTONIC, to the kernel's 10 ms (proc(5), /proc/PID/stat, starttime)."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    started_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns)
