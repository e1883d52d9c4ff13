"""Hearing from the agent in the guest: it connects to port 1024 of the host when it is ready, and says so in one line of JSON."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 1024
"""Both the host's, where the agent announces itself, and the guest's, where it listens."""
_MAX_HELLO_BYTES = 65536
_HELLO_S = 30.0
_MAX_WARNINGS = 32


def listen(vsock: Path, on_ready: Callable[[list[str]], None]) -> None:
    """Call `on_ready(warnings)` once, on a thread of its own, when the agent in the guest behind `vsock` is ready."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{os.fspath(vsock)}_{PORT}")
    listener.listen(4)
    threading.Thread(target=_wait, args=(listener, on_ready), name="agent", daemon=True).start()


def _wait(listener: socket.socket, on_ready: Callable[[list[str]], None]) -> None:
    with listener:
        while True:
            connection, _ = listener.accept()
            connection.settimeout(_HELLO_S)
            with connection:
                hello = _hello(connection)
            if hello is not None:
                on_ready(_warnings(hello))
                return


def _hello(connection: socket.socket) -> dict[str, Any] | None:
    """Read the line. Anybody in the guest may connect here: what isn't a hello is passed over."""
    data = b""
    try:
        while b"\n" not in data and len(data) < _MAX_HELLO_BYTES:
            more = connection.recv(4096)
            if not more:
                break
            data += more
        message = json.loads(data.partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and message.get("kvmkit-agent") == 1 else None


def _warnings(hello: dict[str, Any]) -> list[str]:
    given = hello.get("warnings")
    return [str(line)[:1000] for line in given[:_MAX_WARNINGS]] if isinstance(given, list) else []
