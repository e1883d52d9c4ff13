"""The terminal comes back, whatever ends the process that made it raw."""

import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from kvmkit.cli.terminal import EscapeFilter

_HOLD_RAW = """
import os, sys
from kvmkit.cli.terminal import raw_terminal
with raw_terminal(0):
    os.write(1, b"raw")
    os.read(0, 1)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, "key"])
def test_terminal_is_restored(end: signal.Signals | str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD_RAW], stdin=theirs, stdout=theirs, start_new_session=True
    )
    try:
        assert os.read(ours, 3) == b"raw"
        assert not termios.tcgetattr(theirs)[3] & termios.ECHO
        if isinstance(end, str):
            os.write(ours, b"x")
        else:
            process.send_signal(end)
        process.wait(20)
        wait_for_group_end(process.pid)
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def wait_for_group_end(group: int) -> None:
    """Until no process of the group is left; the test's own time limit is the limit."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        os.sched_yield()


@pytest.mark.parametrize(
    ("typed", "out", "leave"),
    [
        ([b"ls\r"], b"ls\r", False),
        ([b"a\x01x"], b"a", True),
        ([b"a\x01", b"x"], b"a", True),
        ([b"\x01\x01b"], b"\x01b", False),
        ([b"\x01c"], b"\x01c", False),
        ([b"\x01\x01", b"x"], b"\x01x", False),
    ],
)
def test_escape(typed: list[bytes], out: bytes, leave: bool) -> None:
    escapes = EscapeFilter()
    results = [escapes.feed(data) for data in typed]
    assert b"".join(data for data, _ in results) == out
    assert results[-1][1] is leave
