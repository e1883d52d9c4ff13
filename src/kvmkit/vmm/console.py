"""The guest's serial line: where its bytes go, and what can be told from them.

The default guest's init prints marker lines, ``kvmkit: init`` when it starts and ``kvmkit: exit N`` (after a newline of its
own, for the command's last line may lack one) when the command has ended with status N. They come in the same stream as all
else, so whoever trusts neither the guest nor its command must not trust N.
"""

import os
import re
import select
from collections.abc import Callable

from kvmkit.vmm.ending import Ending, Reason

_INIT = b"kvmkit: init"
_EXIT = re.compile(rb"kvmkit: exit (\d{1,3})")
_EXIT_PREFIX = b"kvmkit: exit "
_PANIC = re.compile(rb"^(\[[ \d.]+\] )?Kernel panic - not syncing")
_TAIL_BYTES = 4096
_LINE_BYTES = 1024
"""Longer lines hold no marker; a guest can't make us keep them."""


class Console:
    r"""Takes what the guest writes; calls back for markers.

    With `command_only`, `write` gets what stands between the two markers, and the terminal's ``\r\n`` as the ``\n``
    that the command wrote; else every byte as it comes. `tail` keeps the last 4 KiB of everything.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        on_event: Callable[[str, int], None],
        *,
        command_only: bool = False,
    ) -> None:
        """`on_event` gets ("console", 0), ("init", 0), ("exit", status) and ("panic", 0), each at most once."""
        self._write = write
        self._on_event = on_event
        self._told: set[str] = set()
        self._line = b""
        self._output = _CommandOutput() if command_only else None
        self.tail = b""

    def feed(self, data: bytes) -> None:
        """The guest wrote `data`."""
        self._tell("console")
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
            start = re.search(rb"(?:^|\n)" + _INIT + rb"\r*\n", self._held)
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
