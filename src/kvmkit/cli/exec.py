"""``kvmkit exec``: a command in a guest that runs."""

import sys

import click

from kvmkit.cli.arguments import CommandAfterDashes, environment_options
from kvmkit.cli.session import run_in
from kvmkit.client import Machine


@click.command(cls=CommandAfterDashes)
@click.argument("name")
@environment_options
def exec(
    name: str,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    user: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND (after --) in the guest NAME, or a shell.

    It has your stdin, stdout and stderr, or a terminal if all three are one; its exit status becomes kvmkit's (128 + N if
    signal N ended it).

    \b
    Examples:
      kvmkit exec web -- ps
      kvmkit exec -u nobody web
    """  # noqa: D301 - click wants the character itself
    with Machine.attach(name) as vm:
        sys.exit(run_in(vm, command or ("sh", "-l"), env=dict(env), cwd=cwd, user=user))
