"""JSON objects over a stream socket, one a line: how a VM process and its client talk.

Neither side trusts the other: a VM process may have been taken over by its guest, and anybody may open the socket's other end
one day. So what isn't a message is a `ValueError`, whatever came, and no line is kept that is longer than `MAX_LINE_BYTES`.
"""

import json
import select
import socket
import threading
import time
from typing import Any

MAX_LINE_BYTES = 1 << 20
"""No message of ours comes near: the longest holds a command line or 4 KiB of console."""


class MessageSocket:
    """One end. Sending is safe from any thread; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._socket = sock
        self._lock = threading.Lock()
        self._received = b""
        self._overlong = False

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def shutdown(self) -> None:
        """Let both sides find the stream at its end; `close` is still to be called."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: dict[str, Any]) -> None:
        """Send all of it. `OSError` (EPIPE, ECONNRESET) where the other side is gone."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Wait for the next message; None when the other side has closed its end.

        `ValueError` if what came isn't one: the next call goes on with the next line. `TimeoutError` if there is none
        after `timeout_s` seconds; what came of it is kept.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if len(self._received) > MAX_LINE_BYTES:
                self._received, self._overlong = b"", True
            if deadline is not None and not self._readable(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("no message came")
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:  # it closed its end with something of ours unread
                data = b""
            if not data:
                return None
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        if self._overlong:
            self._overlong = False
            raise ValueError(f"a message longer than {MAX_LINE_BYTES} bytes")
        return _parse(line)

    def _readable(self, timeout_s: float) -> bool:
        poll = select.poll()  # select(2) ends at descriptor 1023
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a message that isn't JSON ({error}): {line[:80]!r}") from None
    if not isinstance(message, dict):
        raise ValueError(f"a message that isn't a JSON object: {line[:80]!r}")
    return message
