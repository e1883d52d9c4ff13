"""Moves a command's streams between its connection and what they are here, in one poll loop.

What a stream leads to may be the caller's descriptor (a terminal, a pipe, a file), whose O_NONBLOCK isn't ours to change: others
share it. A pipe or terminal is opened once more, which has flags of its own. Where that isn't possible (a socket, another user's
terminal), no more is written than poll(2) promises room for.
"""

import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable

from kvmkit.client.agent import protocol
from kvmkit.client.agent.protocol import Command
from kvmkit.errors import AgentError

RECEIVE_BYTES = 256 << 10
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class BytesSink:
    """Keeps an output, up to `limit_bytes`."""

    waited_for = True
    fd = None
    pending = False

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    def put(self, data: bytes) -> int:
        """Take the data; how much of what was put has gone its way."""
        self._size_bytes += len(data)
        if self._size_bytes > self._limit_bytes:
            raise AgentError(
                f"the command's output is longer than {self._limit_bytes} bytes: raise output_limit_bytes, or use popen"
            )
        self._chunks.append(data)
        return len(data)

    def flush(self) -> int:
        """Nothing ever waits."""
        return 0

    def finish(self) -> None:
        """No more comes."""

    close = finish

    def value(self) -> bytes:
        """All of it."""
        return b"".join(self._chunks)


class NullSink:
    """Drops an output."""

    waited_for = True
    fd = None
    pending = False

    def put(self, data: bytes) -> int:
        """Drop the data."""
        return len(data)

    def flush(self) -> int:
        """Nothing ever waits."""
        return 0

    def finish(self) -> None:
        """No more comes."""

    close = finish


class FdSink:
    """Writes an output to a descriptor, of which it has a copy."""

    def __init__(self, fd: int, *, waited_for: bool) -> None:
        """`waited_for` says whether the command has ended only when all is written, as for what isn't our own pipe."""
        self.waited_for = waited_for
        self.fd: int | None
        self.fd, self._piece_bytes = _own_description(fd)
        self._waiting: deque[memoryview] = deque()
        self._finished = False

    @property
    def pending(self) -> bool:
        """Whether something waits for room."""
        return bool(self._waiting)

    def put(self, data: bytes) -> int:
        """Take the data and write what there is room for; how much was written. `BrokenPipeError` where nobody reads."""
        self._waiting.append(memoryview(data))
        return self.flush() if self._piece_bytes is None else 0

    def flush(self) -> int:
        """Write what there is room for."""
        written = 0
        assert self.fd is not None
        while self._waiting:
            chunk = self._waiting[0]
            try:
                count = os.write(self.fd, chunk[: self._piece_bytes])
            except BlockingIOError:
                break
            written += count
            if count == len(chunk):
                self._waiting.popleft()
            else:
                self._waiting[0] = chunk[count:]
            if self._piece_bytes is not None:
                break
        if self._finished and not self._waiting:
            self.close()
        return written

    def finish(self) -> None:
        """No more comes: close when all is written."""
        self._finished = True
        if not self._waiting:
            self.close()

    def close(self) -> None:
        """Drop what waits."""
        self._waiting.clear()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _own_description(fd: int) -> tuple[int, int | None]:
    """A copy of `fd` for writing, and the most to write at once after poll(2) said that it won't block; None is anything."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            return os.open(
                f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            ), None
        except OSError:
            pass
    return os.dup(fd), None if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else select.PIPE_BUF


class BytesSource:
    """Gives stdin from memory."""

    fd = None

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def take(self, size_bytes: int) -> bytes | memoryview:
        """Up to `size_bytes`; empty is the end."""
        data, self._rest = self._rest[:size_bytes], self._rest[size_bytes:]
        return data

    def close(self) -> None:
        """Nothing to do."""


class FdSource:
    """Gives stdin from a descriptor, of which it has a copy."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def take(self, size_bytes: int) -> bytes | memoryview:
        """Up to `size_bytes`, once poll(2) says that there is something; empty is the end."""
        try:
            return os.read(self.fd, size_bytes)
        except OSError:  # EIO: a terminal that hung up
            return b""

    def close(self) -> None:
        """Close the copy."""
        os.close(self.fd)


Sink = BytesSink | NullSink | FdSink
Source = BytesSource | FdSource


class Pump:
    """A command's connection, from its request to its end. One thread calls `step`; `send` is safe from any."""

    def __init__(
        self,
        sock: socket.socket,
        request: bytes,
        command: Command,
        source: Source | None,
        sinks: dict[int, Sink],
    ) -> None:
        self.command = command
        self._socket = sock
        self._source = source
        self._sinks = sinks
        self._lock = threading.Lock()
        self._outgoing = bytearray(request)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._lost = False
        self._failure: OSError | None = None
        sock.setblocking(False)

    @property
    def ended(self) -> bool:
        """Whether the command has ended, with all its output where it belongs but what waits in our own pipes."""
        if self.command.returncode is None or self._failure is not None:
            return False
        return not any(
            sink.pending or self.command.is_open(stream)
            for stream, sink in self._sinks.items()
            if sink.waited_for
        )

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (
            self.command.done
            and self._failure is None
            and not any(sink.pending for sink in self._sinks.values())
        )

    def send(self, frame: Callable[[], bytes]) -> None:
        """Queue what `frame` makes, and see that it goes out."""
        with self._lock:
            self._outgoing += frame()
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the connection and our copies of descriptors. A command that still runs is ended by it."""
        self._socket.close()
        os.close(self._wake)
        self._drop_source()
        for sink in self._sinks.values():
            sink.close()

    def step(self, timeout_s: float | None = None) -> None:
        """Wait until something can be done, and do it. `OSError` if a descriptor of the caller's can't be written."""
        if self._failure is not None:
            raise self._failure
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if not self.command.done:
            poll.register(
                self._socket, select.POLLIN | (select.POLLOUT if self._outgoing and not self._lost else 0)
            )
        source = self._source if not self._outgoing and self.command.stdin_credit_bytes else None
        if source is not None and source.fd is not None:
            poll.register(source.fd, select.POLLIN)
        for sink in self._sinks.values():
            if sink.fd is not None:  # without events it still tells that its reader is gone
                poll.register(sink.fd, select.POLLOUT if sink.pending else 0)
        memory = source is not None and source.fd is None
        ready = dict(poll.poll(0 if memory else None if timeout_s is None else max(0, timeout_s * 1000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        events = ready.get(self._socket.fileno(), 0)
        if events & ~select.POLLOUT:
            self._receive()
        for stream, sink in self._sinks.items():
            if sink.fd is not None and sink.fd in ready:
                self._write(stream, sink, None, gone=bool(ready[sink.fd] & _GONE))
        if source is not None and source is self._source and (memory or source.fd in ready):
            self._take(source)
        self.flush()

    def _receive(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise AgentError(f"the connection to the agent broke: {error}") from error
        for event in self.command.receive(self._buffer[:count]):
            match event:
                case protocol.Output(stream, data):
                    self._write(stream, self._sinks[stream], data)
                case protocol.OutputEnd(stream):
                    self._sinks[stream].finish()
                case protocol.StdinClosed() | protocol.Exited():
                    self._drop_source()
                case _:
                    pass

    def _write(self, stream: int, sink: Sink, data: bytes | None, gone: bool = False) -> None:
        try:
            if gone:
                raise BrokenPipeError
            count = sink.flush() if data is None else sink.put(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self._failure = (
                    error  # of the stream's other end, which has nothing to do with what is under way here
                )
            sink.close()
            frame = self.command.close_output(stream)
        else:
            frame = self.command.consumed(stream, count)
        with self._lock:
            self._outgoing += frame

    def _take(self, source: Source) -> None:
        data = source.take(self.command.stdin_credit_bytes)
        frame = self.command.stdin(data) if data else self.command.end_stdin()
        if not data:
            self._drop_source()
        with self._lock:
            self._outgoing += frame

    def _drop_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def flush(self) -> None:
        """Send what the connection takes of what is queued."""
        with self._lock:
            while self._outgoing and not self._lost:
                try:
                    del self._outgoing[: self._socket.send(self._outgoing)]
                except (BlockingIOError, InterruptedError):
                    return
                except OSError:
                    self._lost = True  # what the agent said before is still to be read, and its end
            if self._lost:
                self._outgoing.clear()
