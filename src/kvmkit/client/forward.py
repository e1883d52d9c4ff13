"""TCP ports of the host that lead into a guest, through its agent."""

import select
import socket
import threading
from contextlib import suppress

from kvmkit.client.agent import Agent
from kvmkit.errors import AgentError

_CHUNK_BYTES = 65536


class Forward:
    """Listens on the host; each connection becomes one in the guest. A context manager."""

    def __init__(self, agent: Agent, guest_port: int, host_address: str, host_port: int) -> None:
        """`OSError` if the host's port can't be had."""
        self._agent = agent
        self.guest_port = guest_port
        self._listener = socket.create_server((host_address, host_port))
        self.port: int = self._listener.getsockname()[1]
        """The host's port."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name=f"forward-{self.port}", daemon=True).start()

    def close(self) -> None:
        """Stop listening, and end the connections that there are."""
        with self._lock:
            self._closed = True
            sockets = [self._listener, *self._open]
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> "Forward":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(ours,), name=f"forward-{self.port}", daemon=True
            ).start()

    def _serve(self, ours: socket.socket) -> None:
        with ours:
            try:
                theirs = self._agent.connect_tcp(self.guest_port)
            except AgentError:  # nobody listens there
                return
            with theirs:
                with self._lock:
                    if self._closed:
                        return
                    self._open |= {ours, theirs}
                try:
                    _splice(ours, theirs)
                finally:
                    with self._lock:
                        self._open -= {ours, theirs}


def _splice(a: socket.socket, b: socket.socket) -> None:
    """Copy both ways until both ends are closed; the end of one direction is passed on alone."""
    poll = select.poll()
    pairs = {a.fileno(): (a, b), b.fileno(): (b, a)}
    for fd in pairs:
        poll.register(fd, select.POLLIN)
    with suppress(OSError):
        while pairs:
            for fd, _ in poll.poll():
                source, target = pairs[fd]
                data = source.recv(_CHUNK_BYTES)
                if data:
                    target.sendall(data)
                else:
                    del pairs[fd]
                    poll.unregister(fd)
                    with suppress(OSError):
                        target.shutdown(socket.SHUT_WR)
