"""The control socket, on the side of the VM process.

Events, in order where they come at all, each once but the first two:

- ``progress``: `text`, what takes its time just now (fetching a kernel);
- ``refused``: `message`, why a request wasn't understood; nothing else came of it;
- ``started``: the VM is built; `engine`, `reason` for that choice, `cmdline` of the kernel;
- ``entered``: the first vCPU starts to run;
- ``console``: the guest's first byte on the serial line;
- ``init``: the default guest's init runs;
- ``exit``: the command in the default guest ended; `status`;
- ``ended``: the VM is gone; `reason` (a value of `kvmkit.vmm.ending.Reason`), `detail`, `console_tail`;
- ``error``: instead of ``ended``: `message` for people.
"""

import socket
import time
from contextlib import suppress
from typing import Any

from kvmkit.messages import MessageSocket


class Control:
    """Reads requests and sends events. Sending is safe from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._messages = MessageSocket(sock)

    def send(self, event: str, **details: Any) -> None:
        """Send an event with the time now. A client that is gone is no error: reading notices it."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._messages.send({"event": event, "t_ns": time.monotonic_ns(), **details})

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message; None when the client has closed its end, `ValueError` if it isn't one."""
        return self._messages.receive()
