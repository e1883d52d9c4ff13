"""``kvmkit console``: the serial console of a guest that runs."""

import os
import select
import socket
from contextlib import ExitStack

import click

from kvmkit import runtime
from kvmkit.cli.terminal import EscapeFilter, raw_terminal
from kvmkit.errors import KvmkitError


@click.command()
@click.argument("name")
def console(name: str) -> None:
    """Connect to the serial console of the guest NAME: its kernel, and what it runs there. For a shell: kvmkit exec NAME.

    Ctrl-A x leaves it, and the guest goes on. Ctrl-A Ctrl-A types Ctrl-A.
    """
    directory = runtime.find(name)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            sock.connect(os.fspath(directory.console))
        except OSError as error:
            raise KvmkitError(f"{directory.console}: {error.strerror}") from error
        if os.isatty(0):
            click.echo(f"The console of {name}. Ctrl-A x leaves it.", err=True)
            stack.enter_context(raw_terminal(0))
        _copy(sock, EscapeFilter() if os.isatty(0) else None)


def _copy(sock: socket.socket, escapes: EscapeFilter | None) -> None:
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(sock, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            data = os.read(fd, 4096)
            if fd == 0:
                leave = False
                if not data:
                    poll.unregister(0)
                elif escapes is not None:
                    data, leave = escapes.feed(data)
                sock.sendall(data)
                if leave:
                    return
            elif not data:
                return
            else:
                while data:
                    data = data[os.write(1, data) :]
