"""``kvmkit stop``: end VMs."""

import os
import signal
from contextlib import suppress

import click

from kvmkit import runtime
from kvmkit.client import Machine
from kvmkit.errors import KvmkitError


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds the guest has to shut down.",
)
@click.option("--kill", is_flag=True, help="Don't ask the guest, end it where it stands.")
def stop(names: tuple[str, ...], timeout: float, kill: bool) -> None:
    """Shut guests down, and forget those that have ended.

    What doesn't shut down in time is ended where it stands.
    """
    for name in names:
        directory = runtime.find_any(name)
        if directory.alive():
            _end(directory, timeout, kill)
        directory.remove()


def _end(directory: runtime.VmDirectory, timeout_s: float, kill: bool) -> None:
    if not kill:
        with suppress(KvmkitError), Machine.attach(directory.name) as vm:
            vm.stop(timeout_s)
    pid = directory.read("vm.json").get("pid")
    if directory.alive() and isinstance(pid, int):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
