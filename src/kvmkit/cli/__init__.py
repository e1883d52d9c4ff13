"""The command line: one file a verb."""

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from kvmkit.errors import KvmkitError

__all__ = ["EXIT_KVMKIT", "commands", "main"]

EXIT_KVMKIT = 125

VERBS = ("run", "exec", "cp", "ps", "stop", "logs", "console", "mmu", "image", "info")
"""Each a function of its name in a module of its name."""


class _Verbs(click.Group):
    """Imports a verb when it is asked for: all of them take longer than the rest of a short command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return them in the order in which people meet them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one; None if there is none of that name."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"kvmkit.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kvmkit")
def commands() -> None:
    """KVM for Python: run Linux in a microVM, with or without /dev/kvm."""


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
    except click.Abort:  # KeyboardInterrupt, as click passes it on; all is cleaned up
        # By the signal itself: a shell script that runs us ends as well, which it doesn't for a mere status.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
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
