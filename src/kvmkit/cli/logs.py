"""``kvmkit logs``: what a guest wrote on its console."""

import sys
import time

import click

from kvmkit import runtime

_LOOK_S = 0.2


@click.command()
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Go on until the guest ends.")
def logs(name: str, follow: bool) -> None:
    """Print what a detached command wrote, or, without one, the serial console of the guest NAME, running or ended.

    The last 4 MiB of it are kept.
    """
    directory = runtime.find_any(name)
    with open(directory.console_log, "rb") as file:
        while True:
            alive = directory.alive()  # before reading: what it wrote at last is read then
            while data := file.read(65536):
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            if not follow or not alive:
                return
            time.sleep(_LOOK_S)
