"""The user's terminal in raw mode, given back whatever happens to us."""

import os
import shutil
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ESCAPE = b"\x01"  # Ctrl-A


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Raw mode on terminal `fd` inside the ``with``.

    The old mode comes back afterwards, and also if this process is killed: a guardian process, which does nothing but wait
    for our end of a pipe to close, restores it then.
    """
    mode = termios.tcgetattr(fd)
    reading, writing = os.pipe()
    guardian = os.fork()
    if guardian == 0:
        _guard(fd, mode, reading, writing)
    os.close(reading)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        os.close(writing)  # the guardian restores now, once and for all
        os.waitpid(guardian, 0)


def _guard(fd: int, mode: list[int | list[bytes | int]], reading: int, writing: int) -> None:
    """Be the guardian; never returns."""
    try:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGTSTP,
            signal.SIGTTOU,
        ):
            signal.signal(number, signal.SIG_IGN)  # SIGTTOU: by then we may be in the background
        os.close(writing)
        os.read(reading, 1)
        termios.tcsetattr(fd, termios.TCSADRAIN, mode)
    finally:
        os._exit(0)


@contextmanager
def following_size(resize: Callable[[int, int], None]) -> Iterator[None]:
    """Call `resize(rows, cols)` with the terminal's size now, and inside the ``with`` whenever it changes."""

    def resized(_number: int = 0, _frame: FrameType | None = None) -> None:
        size = shutil.get_terminal_size()
        resize(size.lines, size.columns)

    before = signal.signal(signal.SIGWINCH, resized)
    try:
        resized()
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


class EscapeFilter:
    """Finds Ctrl-A x in what is typed. Ctrl-A Ctrl-A types one Ctrl-A; Ctrl-A and anything else types both."""

    def __init__(self) -> None:
        """Nothing is pending."""
        self._pending = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what goes to the guest, and whether the user wants to end (what comes after that is dropped)."""
        out = b""
        for byte in data:
            key = bytes([byte])
            if not self._pending:
                self._pending = key == ESCAPE
                out += b"" if self._pending else key
                continue
            self._pending = False
            if key in (b"x", b"X"):
                return out, True
            out += key if key == ESCAPE else ESCAPE + key
        return out, False


def type_into(fd: int, on_escape: Callable[[], object]) -> None:
    """Copy what is typed to `fd` until nobody reads there. Calls `on_escape` on Ctrl-A x, and when the terminal hangs up.

    For a thread that ends with the process: `fd` is not to be closed while it may still type.
    """
    escapes = EscapeFilter()
    while True:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        out, leave = escapes.feed(data)
        with suppress(BrokenPipeError):
            while out:
                out = out[os.write(fd, out) :]
        if out:
            return
        if leave or not data:
            on_escape()
            return
