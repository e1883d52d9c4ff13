"""``kvmkit run`` with Debian's kernel, on each engine that boots it here."""

import hashlib
import os
import pty
import re
import signal
import termios
from collections.abc import Callable

import pytest

from .conftest import TIMEOUT_S, Kvmkit
from .test_run import read_until, wait_for_no_session, wait_for_raw

Run = Callable[..., Kvmkit]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_guest")]


@pytest.mark.parametrize(
    ("command", "status", "out"),
    [
        (["echo", "two  words", "it's"], 0, b"two  words it's\n"),
        (["printf", r"a\r\n\0\377b"], 0, b"a\r\n\0\xffb"),
        (["sh", "-c", "exit 7"], 7, b""),
        (["sh", "-c", "kill -9 $$"], 137, b""),
        (["sh", "-c", "seq 20000 | sha256sum"], 0, None),
    ],
)
def test_a_command(run_linux: Run, command: list[str], status: int, out: bytes | None) -> None:
    if out is None:
        out = (
            hashlib.sha256("".join(f"{i}\n" for i in range(1, 20001)).encode()).hexdigest().encode()
            + b"  -\n"
        )
    assert run_linux("--", *command).finish() == (status, out, "")


def test_processors(run_linux: Run) -> None:
    script = "nproc; for n in 1 2 3; do (true | cat) & done; wait; grep -c 'RES:\\|CAL:' /proc/interrupts"
    assert run_linux("--cpus", "2", "--", "sh", "-c", script).finish() == (0, b"2\n2\n", "")


def test_the_time_line(run_linux: Run) -> None:
    status, out, err = run_linux("--verbose", "--append", "quirk=1", "--", "cat", "/proc/cmdline").finish()
    assert status == 0
    shown = re.search("command line: (.*)\n", err)
    assert shown is not None and out.decode().strip() == shown[1] and "quirk=1" in shown[1]
    for step in ("VM process started", "kernel entered", "init runs", "agent ready"):
        assert re.search(rf"^ +[\d.]+  {step}$", err, re.MULTILINE)


def test_a_panic(run_linux: Run) -> None:
    status, out, err = run_linux("--", "sh", "-c", "echo c > /proc/sysrq-trigger").finish()
    assert status == 123
    assert out == b"" and "sysrq triggered crash" in err and "its kernel panicked" in err


def test_the_guest_ends_before_the_command(run_linux: Run) -> None:
    status, _, err = run_linux("--", "poweroff", "-f").finish()
    assert (status, "power-off before" in err) == (123, True)


def test_timeout(run_linux: Run) -> None:
    assert run_linux("--timeout", "4", "--", "sleep", "1000").finish()[0] == 124


def test_a_shell_on_pipes(run_linux: Run) -> None:
    """A script on stdin, which ends the guest."""
    reading, writing = os.pipe()
    os.write(writing, b"echo $((6 * 7)) is right\npoweroff -f\n")
    os.close(writing)
    status, out, err = run_linux(stdin=reading).finish()
    os.close(reading)
    assert (status, out, err) == (0, b"42 is right\n", "")


def test_a_shell_on_a_terminal(run_linux: Run) -> None:
    """Ctrl-C interrupts what runs in the guest; Ctrl-A x ends all."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    running = run_linux(stdin=theirs, stdout=theirs, stderr=theirs)
    wait_for_raw(theirs)
    read_until(ours, b"~ # ")
    os.write(ours, b"echo s$((1+1))p; sleep 1000\r")
    read_until(ours, b"s2p")
    os.write(ours, b"\x03echo d$((1+1))n\r")
    read_until(ours, b"d2n")
    os.write(ours, b"\x01x")
    assert running.finish()[0] == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_killed_while_linux_runs(run_linux: Run) -> None:
    running = run_linux("--", "sh", "-c", "echo up; while :; do :; done")
    read_until(running.process.stdout.fileno(), b"up")
    os.kill(running.pid, signal.SIGKILL)
    assert running.process.wait(TIMEOUT_S) == -signal.SIGKILL
    wait_for_no_session(running)
