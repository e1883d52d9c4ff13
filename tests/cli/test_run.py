"""``kvmkit run`` as real processes: what it prints, how it ends, and that it leaves nothing behind."""

import os
import pty
import select
import signal
import socket
import termios
import time
from collections.abc import Callable

import pytest

from kvmkit.testing.kernel import puts

from .conftest import TIMEOUT_S, Kvmkit

Run = Callable[..., Kvmkit]
Kernel = Callable[[str], str]

SPIN = puts("up\n") + "\n1: jmp 1b"


def arguments(engine: str, path: str, *more: str) -> list[str]:
    return ["--engine", engine, "--kernel", path, "--memory", "64M", *more]


def read_until(fd: int, text: bytes) -> bytes:
    """Read from `fd` until `text` came."""
    seen, deadline = b"", time.monotonic() + TIMEOUT_S
    while text not in seen:
        assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], f"only {seen!r} came"
        data = os.read(fd, 4096)
        assert data, f"it ended after {seen!r}"
        seen += data
    return seen


def test_console_byte_by_byte(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """Every byte as it is, and 0 when the guest resets."""
    path = kernel("xor ebx, ebx\n1: putc bl\ninc bl\njnz 1b\nreset\n2: jmp 2b")
    assert run_kvmkit(*arguments(engine, path)).finish() == (0, bytes(range(256)), "")


def test_a_byte_shows_at_once(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    running = run_kvmkit(*arguments(engine, kernel("putc '?'\n1: jmp 1b")))
    assert read_until(running.process.stdout.fileno(), b"?") == b"?"


def test_input_from_a_pipe(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """What comes in on stdin is typed on the console; its end doesn't end the guest."""
    path = kernel("1: getc\nmov bl, al\nputc bl\ncmp bl, 'q'\njne 1b\n" + puts("bye") + "\nreset\n2: jmp 2b")
    reading, writing = os.pipe()
    os.write(writing, b"echo" * 100 + b"q")
    os.close(writing)
    running = run_kvmkit(*arguments(engine, path), stdin=reading)
    os.close(reading)
    assert running.finish() == (0, b"echo" * 100 + b"qbye", "")


def test_triple_fault(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    status, out, err = run_kvmkit(*arguments(engine, kernel(puts("last words") + "\ntriple_fault"))).finish()
    assert (status, out) == (123, b"last words")
    assert "triple fault" in err


def test_panic(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """A reset after a panic isn't a good end."""
    path = kernel(puts("[    0.1] Kernel panic - not syncing: why\r\n") + "\nreset\n1: jmp 1b")
    status, out, err = run_kvmkit(*arguments(engine, path)).finish()
    assert status == 123
    assert b"not syncing" in out and "panicked" in err


COMMAND = """Linux version 6
kvmkit: init
kvmkit: command
the command's own output

kvmkit: exit 3
reboot: Restarting system
""".replace("\n", "\r\n")


def test_a_command(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """Its output alone, and its status, from a kernel that plays the default guest."""
    path = kernel(puts(COMMAND) + "\nreset\n1: jmp 1b")
    result = run_kvmkit(*arguments(engine, path, "--", "any", "--command")).finish()
    assert result == (3, b"the command's own output\n", "")


def test_a_command_that_doesnt_end(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """The guest ends before the command: what it printed is on stdout already."""
    path = kernel(puts(COMMAND.split("\r\n\r\n")[0]) + "\nreset\n1: jmp 1b")
    status, out, err = run_kvmkit(*arguments(engine, path, "--", "any")).finish()
    assert (status, out) == (123, b"the command's own output")
    assert "reset before the command's end" in err and "own output" not in err


def test_a_command_that_never_started(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """Its console wasn't shown, so its end is."""
    path = kernel(puts("[    0.1] no init in here\r\n") + "\nreset\n1: jmp 1b")
    status, out, err = run_kvmkit(*arguments(engine, path, "--", "any")).finish()
    assert (status, out) == (123, b"")
    assert "no init in here" in err


def test_timeout(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    status, _, err = run_kvmkit(*arguments(engine, kernel(SPIN), "--timeout", "1.5")).finish()
    assert status == 124
    assert "1.5 s" in err


def test_verbose(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    path = kernel(puts("hi") + "\nreset\n1: jmp 1b")
    status, out, err = run_kvmkit(*arguments(engine, path, "--verbose", "--append", "one=1 two")).finish()
    assert (status, out) == (0, b"hi")
    assert "command line: " in err and "one=1 two" in err
    steps = ["VM process started", "VM built", "kernel entered", "first console byte", "VM ended"]
    lines = [line for line in err.splitlines() if any(step in line for step in steps)]
    assert [line.split(maxsplit=1)[1] for line in lines] == steps
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_a_signal_leaves_nothing(
    engine: str, run_kvmkit: Run, kernel: Kernel, number: signal.Signals, status: int
) -> None:
    """The client alone gets the signal; the VM process goes as well."""
    running = run_kvmkit(*arguments(engine, kernel(SPIN)))
    read_until(running.process.stdout.fileno(), b"up")
    assert len(running.session()) == 2
    os.kill(running.pid, number)
    assert running.process.wait(TIMEOUT_S) == status
    wait_for_no_session(running)


def test_ctrl_c(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """The terminal sends SIGINT to both processes. A shell calls the end by that signal 130."""
    running = run_kvmkit(*arguments(engine, kernel(SPIN)))
    read_until(running.process.stdout.fileno(), b"up")
    os.killpg(running.pid, signal.SIGINT)
    assert running.finish()[0] == -signal.SIGINT


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGKILL, 125, "signal 9"), (signal.SIGTERM, 0, "")]
)
def test_the_vm_process_is_killed(
    engine: str, run_kvmkit: Run, kernel: Kernel, number: signal.Signals, status: int, word: str
) -> None:
    running = run_kvmkit(*arguments(engine, kernel(SPIN)))
    read_until(running.process.stdout.fileno(), b"up")
    (vm,) = [pid for pid in running.session() if pid != running.pid]
    os.kill(vm, number)
    got, _, err = running.finish()
    assert got == status
    assert word in err


def test_nobody_reads(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """As ``kvmkit run | head -1``."""
    running = run_kvmkit(*arguments(engine, kernel("1: " + puts("again\n") + "\njmp 1b")))
    read_until(running.process.stdout.fileno(), b"again")
    running.process.stdout.close()
    assert running.process.wait(TIMEOUT_S) == 141
    wait_for_no_session(running)


def test_a_reader_that_stopped_reading(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """The guest's output fills the pipe; the timeout still ends it."""
    running = run_kvmkit(*arguments(engine, kernel("1: " + puts("again\n") + "\njmp 1b"), "--timeout", "2"))
    assert running.process.wait(TIMEOUT_S) == 124
    wait_for_no_session(running)


def test_an_interactive_console(engine: str, run_kvmkit: Run, kernel: Kernel) -> None:
    """Raw mode: Ctrl-C is the guest's, Ctrl-A x ends, and the terminal is as before."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    path = kernel("1: getc\nmov bl, al\nputc bl\njmp 1b")
    running = run_kvmkit(*arguments(engine, path), stdin=theirs, stdout=theirs, stderr=theirs)
    wait_for_raw(theirs)
    read_until(ours, b"ends it.\r\n")
    os.write(ours, b"\x03\x01\x01z")
    assert read_until(ours, b"z") == b"\x03\x01z"
    os.write(ours, b"\x01x")
    assert running.finish()[0] == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("victim", ["client", "vm"])
def test_an_interactive_console_is_killed(engine: str, run_kvmkit: Run, kernel: Kernel, victim: str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    running = run_kvmkit(*arguments(engine, kernel(SPIN)), stdin=theirs, stdout=theirs, stderr=theirs)
    read_until(ours, b"up")
    wait_for_raw(theirs)
    vm = next(pid for pid in running.session() if b"kvmkit.vmm" in cmdline(pid))
    os.kill(running.pid if victim == "client" else vm, signal.SIGKILL)
    assert running.process.wait(TIMEOUT_S) == (-9 if victim == "client" else 125)
    wait_for_no_session(running)
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def wait_for_raw(terminal: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ISIG | termios.ECHO):
        assert time.monotonic() < deadline, "the terminal never was in raw mode"


def cmdline(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def wait_for_no_session(running: Kvmkit) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while left := running.session():
        assert time.monotonic() < deadline, f"processes are left: {left}"


@pytest.mark.parametrize("content", [b"", b"not a kernel", b"\x7fELF" + bytes(60)])
def test_not_a_kernel(engine: str, run_kvmkit: Run, tmp_path: os.PathLike[str], content: bytes) -> None:
    """One line that names the file; no traceback."""
    path = os.path.join(tmp_path, "vmlinuz-odd")
    with open(path, "wb") as file:
        file.write(content)
    status, out, err = run_kvmkit(*arguments(engine, path)).finish()
    assert (status, out) == (125, b"")
    assert "vmlinuz-odd" in err and "Traceback" not in err


def test_wrong_options(run_kvmkit: Run) -> None:
    assert run_kvmkit("--engine", "none").finish()[0] == 125
    assert run_kvmkit("--kernel", "/nowhere").finish()[0] == 125
    assert run_kvmkit("--memory", "1M", "--engine", "soft").finish()[0] == 125


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="arm64 is this machine's own")
def test_an_arm64_guest_on_x86(run_kvmkit: Run) -> None:
    """It says which hosts can."""
    status, out, err = run_kvmkit("--arch", "arm64", "--", "uname", "-m").finish()
    assert (status, out) == (125, b"")
    assert "an arm64 guest takes an arm64 host with /dev/kvm" in err and "Traceback" not in err


def test_stdout_is_a_socket(run_kvmkit: Run, kernel: Kernel, engine: str) -> None:
    ours, theirs = socket.socketpair()
    running = run_kvmkit(
        *arguments(engine, kernel(puts("hello") + "\nreset\n1: jmp 1b")), stdout=theirs.fileno()
    )
    theirs.close()
    assert read_until(ours.fileno(), b"hello") == b"hello"
    assert running.finish()[0] == 0
    ours.close()


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream(engine: str, run_kvmkit: Run, kernel: Kernel, closed: int) -> None:
    """It is as /dev/null; nothing of ours takes its place."""
    path = kernel(puts("hello") + "\nreset\n1: jmp 1b")
    status, out, err = run_kvmkit(*arguments(engine, path), preexec_fn=lambda: os.close(closed)).finish()
    assert (status, out, err) == (0, b"" if closed == 1 else b"hello", "")
