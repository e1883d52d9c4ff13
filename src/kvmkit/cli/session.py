"""A command in a guest at this terminal, or at these pipes."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import click

from kvmkit.cli.terminal import following_size, raw_terminal, type_into
from kvmkit.client import Machine, Pty
from kvmkit.errors import CommandTimeout, GuestError, VmTimeout

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


def run_in(
    machine: Machine,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None,
    user: str | None,
    timeout_s: float | None = None,
    on_escape: Callable[[], object] | None = None,
) -> int:
    """Run `command` with this process's streams; on a terminal of its own if they all are one. Returns a shell's exit status.

    `on_escape` is called when Ctrl-A x is typed. `VmTimeout` after `timeout_s`.
    """
    options: dict[str, Any] = {"env": env, "cwd": cwd, "user": user}
    terminal = all(os.isatty(fd) for fd in (0, 1, 2))
    with ExitStack() as stack:
        try:
            if terminal:
                size = shutil.get_terminal_size()
                pty = Pty(size.lines, size.columns, os.environ.get("TERM", "linux"))
                reading, writing = os.pipe()
                process = machine.popen(command, stdin=reading, stdout=1, pty=pty, **options)
                os.close(reading)
                stack.enter_context(following_size(process.resize))
                stack.enter_context(raw_terminal(0))
                threading.Thread(
                    target=type_into, args=(writing, on_escape or process.kill), daemon=True
                ).start()
            else:
                process = machine.popen(command, stdin=0, stdout=1, stderr=2, **options)
            returncode = process.wait(timeout_s)
        except GuestError as error:
            stack.close()
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC):
                raise
            click.echo(f"kvmkit: {error}", err=True)
            return EXIT_NOT_FOUND if error.errno in (errno.ENOENT, errno.ENOTDIR) else EXIT_NOT_EXECUTABLE
        except CommandTimeout as error:
            raise VmTimeout(str(error)) from None
    return returncode if returncode >= 0 else 128 - returncode
