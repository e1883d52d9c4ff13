"""The command line: one file a verb."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from kvmkit.cli.console import console
from kvmkit.cli.cp import cp
from kvmkit.cli.exec import exec
from kvmkit.cli.image import image
from kvmkit.cli.info import info
from kvmkit.cli.logs import logs
from kvmkit.cli.ps import ps
from kvmkit.cli.run import EXIT_KVMKIT, run
from kvmkit.cli.stop import stop
from kvmkit.errors import KvmkitError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kvmkit")
def commands() -> None:
    """KVM for Python: run Linux in a microVM, with or without /dev/kvm."""


for command in (run, exec, cp, ps, stop, logs, console, image, info):
    commands.add_command(command)


def main() -> NoReturn:
    """Run the command line and exit."""
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        commands.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_KVMKIT)
    except click.Abort:  # KeyboardInterrupt, as click passes it on
        sys.exit(128 + signal.SIGINT)
    except KvmkitError as error:
        click.echo(f"kvmkit: {error}", err=True)
        sys.exit(EXIT_KVMKIT)
    sys.exit(0)


def _open_standard_streams() -> None:
    """Have 0, 1 and 2 stand for something: if one is closed, what we open next would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that every ``with`` on the way cleans up."""
    sys.exit(128 + number)
