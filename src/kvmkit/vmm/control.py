"""The control socket, on the side of the VM process.

Events, in order where they come at all:

- ``progress``: `text`, what takes its time just now (fetching a kernel);
- ``started``: the VM is built; `engine`, `reason` for that choice, `cmdline` of the kernel;
- ``entered``: the first vCPU starts to run;
- ``console``: the guest's first byte on the serial line;
- ``init``: the default guest's init runs;
- ``exit``: the command in the default guest ended; `status`;
- ``ended``: the VM is gone; `reason` (a value of `kvmkit.vmm.ending.Reason`), `detail`, `console_tail`;
- ``error``: instead of ``ended``: `message` for people.
"""

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any


class Control:
    """Reads requests and sends events. Sending is safe from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self.sock = sock
        self._lock = threading.Lock()
        self._received = b""

    def fileno(self) -> int:
        """The socket, for select."""
        return self.sock.fileno()

    def send(self, event: str, **details: Any) -> None:
        """Send an event with the time now. A client that is gone is no error: reading notices it."""
        line = json.dumps({"event": event, "t_ns": time.monotonic_ns(), **details}) + "\n"
        with self._lock, suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(line.encode())

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message; None when the client has closed its end."""
        while b"\n" not in self._received:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"a message must be a JSON object, not {line[:80]!r}")
        return message
