"""The control sockets, on the side of the VM process: the one it was started with, and any that connect to ``control.sock``.

Who connects later first gets all events that there were, progress apart.

Events, in order where they come at all, each once but the first two:

- ``progress``: `text`, what takes its time just now (fetching a kernel);
- ``refused``: an answer: `message`, why a request wasn't understood; nothing else came of it;
- ``started``: the VM is built; `engine`, `reason` for that choice, `cmdline` of the kernel;
- ``entered``: the first vCPU starts to run;
- ``console``: the guest's first byte on the serial line;
- ``init``: the default guest's init runs;
- ``agent``: the agent in the guest can be reached, on vsock port 1024; `warnings` of what went wrong before;
- ``exit``: the command on the console ended; `status`;
- ``stats``: an answer: KVM's statistics of the `vm` and of each of the `vcpus`, by name;
- ``walk``: an answer: the way of address `gva` on `vcpu`, as `walk` (`kvmkit.kvm.walk.Walk.as_dict`, and ``text`` for people),
  or `error`, why there is none;
- ``ended``: the VM is gone; `reason` (a value of `kvmkit.vmm.ending.Reason`), `detail`, `console_tail`;
- ``error``: instead of ``ended``: `message` for people.

An answer goes to whoever asked, everything else to all.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvmkit.messages import MessageSocket

OnRequest = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Carries out a client's request and returns the event that answers it, if one does."""

_MAX_CLIENTS = 32
_CLIENT_SEND_S = 1.0
"""A client that connected later and doesn't read for so long is dropped."""


def refusal(message: str) -> dict[str, Any]:
    """The answer to what isn't a request."""
    return {"event": "refused", "message": message}


def _stamped(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "t_ns": time.monotonic_ns()}


class Control:
    """Reads requests and sends events. Sending is safe from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._messages = MessageSocket(sock)
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._clients: list[MessageSocket] = []

    def send(self, event: str, **details: Any) -> None:
        """Send an event with the time now. A client that is gone is no error: reading notices it."""
        message = _stamped({"event": event, **details})
        with self._lock:
            if event != "progress":
                self._events.append(message)
            with suppress(BrokenPipeError, ConnectionResetError):
                self._messages.send(message)
            for client in list(self._clients):
                self._send_to(client, message)

    def answer(self, answer: dict[str, Any]) -> None:
        """Send an event to the first client alone."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._messages.send(_stamped(answer))

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message of the first client; None when it has closed its end, `ValueError` if it isn't one."""
        return self._messages.receive()

    def listen(self, path: Path, on_request: OnRequest) -> None:
        """Take clients on a socket at `path` from now on, each of which has a thread that `on_request` is called on."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen()
        threading.Thread(
            target=self._accept, args=(listener, on_request), name="clients", daemon=True
        ).start()

    def _accept(self, listener: socket.socket, on_request: OnRequest) -> None:
        while True:
            sock, _ = listener.accept()
            sock.settimeout(_CLIENT_SEND_S)
            client = MessageSocket(sock)
            with self._lock:
                if len(self._clients) >= _MAX_CLIENTS:
                    client.close()
                    continue
                self._clients.append(client)
                for message in self._events:
                    self._send_to(client, message)
            threading.Thread(
                target=self._serve, args=(client, on_request), name="client", daemon=True
            ).start()

    def _serve(self, client: MessageSocket, on_request: OnRequest) -> None:
        try:
            while True:
                try:
                    message = client.receive(timeout_s=3600.0)
                    if message is None:
                        break
                except TimeoutError:
                    continue
                except ValueError as error:
                    answer: dict[str, Any] | None = refusal(str(error))
                else:
                    answer = on_request(message)
                if answer is not None:
                    client.send(_stamped(answer))
        except OSError:
            pass
        finally:
            with self._lock:
                self._drop(client)

    def _send_to(self, client: MessageSocket, message: dict[str, Any]) -> None:
        try:
            client.send(message)
        except OSError:
            self._drop(client)

    def _drop(self, client: MessageSocket) -> None:
        if client in self._clients:
            self._clients.remove(client)
            with suppress(OSError):
                client.shutdown()  # its thread then closes it
