"""The guest's serial line: where its bytes go, and what can be told from them.

The default guest's init prints marker lines, ``kvmkit: init`` when it starts and ``kvmkit: exit N`` (after a newline of its
own, for the command's last line may lack one) when the command has ended with status N. They come in the same stream as all
else, so whoever trusts neither the guest nor its command must not trust N.
"""

import os
import re
import select
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvmkit.vmm.ending import Ending, Reason

_INIT = b"kvmkit: init"
_COMMAND = b"kvmkit: command"
_EXIT = re.compile(rb"kvmkit: exit (\d{1,3})")
_EXIT_PREFIX = b"kvmkit: exit "
_PANIC = re.compile(rb"^(\[[ \d.]+\] )?Kernel panic - not syncing")
_TAIL_BYTES = 4096
_LINE_BYTES = 1024
"""Longer lines hold no marker; a guest can't make us keep them."""


class Console:
    r"""Takes what the guest writes; calls back for markers.

    Each of `sinks` gets every byte as it comes. With `command_only`, they get what stands between the two markers, and the terminal's ``\r\n`` as the ``\n``
    that the command wrote, but not `raw_sinks`. `tail` keeps the last 4 KiB of everything.
    """

    def __init__(
        self,
        sinks: Sequence[Callable[[bytes], None]],
        on_event: Callable[[str, int], None],
        *,
        command_only: bool = False,
        raw_sinks: Sequence[Callable[[bytes], None]] = (),
    ) -> None:
        """`on_event` gets ("console", 0), ("init", 0), ("exit", status) and ("panic", 0), each at most once."""
        self._sinks = sinks
        self._raw_sinks = raw_sinks
        self._on_event = on_event
        self._told: set[str] = set()
        self._line = b""
        self._output = _CommandOutput() if command_only else None
        self.tail = b""

    def feed(self, data: bytes) -> None:
        """The guest wrote `data`."""
        self._tell("console")
        for sink in self._raw_sinks:
            sink(data)
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        shown = data if self._output is None else self._output.feed(data)
        if shown:
            self._write(shown)
        self._line += data
        if b"\n" in data:
            *lines, self._line = self._line.split(b"\n")
            for line in lines:
                self._whole_line(line.strip(b"\r"))
        self._line = self._line[:_LINE_BYTES]

    def close(self) -> None:
        """The guest writes no more: pass on what was held back because it might have been a marker's begin."""
        if self._output is not None and (rest := self._output.rest()):
            self._write(rest)

    def _write(self, data: bytes) -> None:
        for sink in self._sinks:
            sink(data)

    def _whole_line(self, line: bytes) -> None:
        if line == _INIT:
            self._tell("init")
        elif match := _EXIT.fullmatch(line):
            self._tell("exit", int(match[1]))
        elif _PANIC.match(line):
            self._tell("panic")

    def _tell(self, event: str, value: int = 0) -> None:
        if event not in self._told:
            self._told.add(event)
            self._on_event(event, value)


class _CommandOutput:
    """Cuts the command's own output out of the stream, however the stream is split."""

    def __init__(self) -> None:
        self._state = "before"
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what can be passed on now."""
        self._held += data
        if self._state == "before":
            start = re.search(rb"(?:^|\n)" + _COMMAND + rb"\r*\n", self._held)
            if start is None:
                self._held = self._held[-_LINE_BYTES:]
                return b""
            self._state, self._held = "during", self._held[start.end() :]
        if self._state == "after":
            self._held = b""
            return b""
        if end := re.search(rb"\r?\n" + _EXIT.pattern + rb"\r*\n", self._held):
            self._state, shown, self._held = "after", self._held[: end.start()], b""
        else:
            cut = self._held_back()
            shown, self._held = self._held[:cut], self._held[cut:]
        return shown.replace(b"\r\n", b"\n")

    def rest(self) -> bytes:
        """Return what is still held back."""
        return self._held.replace(b"\r\n", b"\n") if self._state == "during" else b""

    def _held_back(self) -> int:
        """Where something begins that may yet turn out to be the end marker, with the newline before it."""
        held = self._held
        start = held.rfind(b"\n") + 1
        rest = held[start:]
        if rest.endswith(b"\r") and not _EXIT.fullmatch(rest.rstrip(b"\r")):
            return len(held) - 1
        if start and (_EXIT_PREFIX.startswith(rest) or _EXIT.fullmatch(rest.rstrip(b"\r"))):
            return start - (2 if held[:start].endswith(b"\r\n") else 1)
        return len(held)


class ConsoleLog:
    """Keeps the last of what the console wrote in a file, between one and two times `_LOG_BYTES`."""

    _LOG_BYTES = 4 << 20

    def __init__(self, path: Path) -> None:
        """Start it anew."""
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - it is open as long as this is
        self._size_bytes = 0

    def write(self, data: bytes) -> None:
        """Append; a full disk loses what comes."""
        with suppress(OSError):
            if self._size_bytes > 2 * self._LOG_BYTES:
                kept = self._path.read_bytes()[-self._LOG_BYTES :]
                self._file.seek(0)
                self._file.truncate()
                self._file.write(kept)
                self._size_bytes = len(kept)
            self._file.write(data)
            self._size_bytes += len(data)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, which stays."""
        self._file.close()


class ConsoleSocket:
    """Lets a client at a unix socket see what comes on the console, and type. One at a time, the latest."""

    def __init__(self, path: Path) -> None:
        """Listen there, on a thread."""
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(1)
        self.typed: Callable[[bytes], None] = lambda _: None
        """Set by whoever has the serial port."""
        threading.Thread(target=self._accept, name="console", daemon=True).start()

    def write(self, data: bytes) -> None:
        """The guest wrote `data`. A client that doesn't keep up loses some: the guest doesn't wait for it."""
        client = self._client
        if client is not None:
            with suppress(OSError):
                client.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            before, self._client = self._client, client
            if before is not None:
                with suppress(OSError):
                    before.shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._read, args=(client,), name="console", daemon=True).start()

    def _read(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while data := client.recv(4096):
                self.typed(data)
        if self._client is client:
            self._client = None


def writer(fd: int, ending: Ending) -> Callable[[bytes], None]:
    """Return a function that writes everything to `fd`, if that isn't -1; when nobody reads there any more, the VM ends."""

    def write(data: bytes) -> None:
        while data and fd >= 0:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                _wait_until_writable(fd)
            except OSError as error:  # EPIPE; EIO from a terminal that hung up
                ending.set(Reason.OUTPUT_CLOSED, f"the console's output: {error.strerror}")
                return

    return write


def _wait_until_writable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
