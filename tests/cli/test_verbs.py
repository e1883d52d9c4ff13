"""The verbs for machines that run: exec, cp, ps, stop, logs, console; as real processes."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import TIMEOUT_S
from .test_run import read_until, wait_for_raw

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_guest")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A runtime directory of the tests' own."""
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("run"))}


Kvmkit = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def kvmkit(environment: dict[str, str]) -> Kvmkit:
    def run(*arguments: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "kvmkit", *arguments]
        return subprocess.run(
            command, input=input, capture_output=True, timeout=2 * TIMEOUT_S, env=environment
        )

    return run


@pytest.fixture(scope="module")
def web(kvmkit: Kvmkit) -> Iterator[str]:
    """A detached machine whose main command says something and goes on."""
    done = kvmkit(
        "run", "-d", "--name", "web", "--memory", "192M", "--", "sh", "-c", "echo started; exec sleep 100000"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"web\n", b"")
    yield "web"
    kvmkit("stop", "web")


def test_exec(kvmkit: Kvmkit, web: str) -> None:
    done = kvmkit("exec", web, "--", "sh", "-c", "cat; echo err >&2; exit 9", input=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (9, b"in", b"err\n")
    assert kvmkit(
        "exec", "-u", "nobody", "-w", "/tmp", "-e", "A=b", web, "--", "sh", "-c", "id -u; pwd; echo $A"
    ).stdout == (b"65534\n/tmp\nb\n")
    assert kvmkit("exec", web, input=b"echo a shell; exit 4").stdout == b"a shell\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--", "no-such-command"], 127, "no-such-command: No such file or directory"),
        (["--", "/etc/passwd"], 126, "/etc/passwd: Permission denied"),
        (["-w", "/nowhere", "--", "true"], 127, 'working directory "/nowhere": No such file or directory'),
        (["-u", "nosuch", "--", "true"], 125, 'user "nosuch": not in the guest\'s /etc/passwd'),
    ],
)
def test_what_cant_be_executed(
    kvmkit: Kvmkit, web: str, arguments: list[str], status: int, message: str
) -> None:
    options = arguments[: arguments.index("--")]
    done = kvmkit("exec", *options, web, *arguments[len(options) :])
    assert (done.returncode, done.stderr.decode()) == (status, f"kvmkit: {message}\n")


def test_cp(kvmkit: Kvmkit, web: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(3_000_000))
    assert kvmkit("cp", str(tmp_path / "a"), f"{web}:/tmp").returncode == 0
    assert kvmkit("cp", f"{web}:/tmp/a", str(tmp_path / "b")).returncode == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    wrong = kvmkit("cp", "x", "y")
    assert wrong.returncode == 125 and b"NAME:PATH" in wrong.stderr
    missing = kvmkit("cp", f"{web}:/nowhere", str(tmp_path))
    assert missing.returncode == 125 and b"/nowhere" in missing.stderr and b"Traceback" not in missing.stderr


def test_mmu(kvmkit: Kvmkit, web: str) -> None:
    symbol = kvmkit("exec", web, "--", "grep", "-w", "_text", "/proc/kallsyms").stdout.split()[0].decode()
    done = kvmkit("mmu", web, f"0x{symbol}", "4096")
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"gva 0x{symbol}\n├─ gva → gpa: 4-level paging\n" in text and "\ngva 0x1000\n" in text
    assert "supervisor: read ok" in text and "slot 0: gpa 0x0" in text
    one, two = json.loads(kvmkit("mmu", "--json", web, f"0x{symbol}", "0x1000").stdout)
    assert (one["gva"], two["gva"]) == (int(symbol, 16), 0x1000)
    assert [stage["target"] for stage in one["stages"]] == ["gpa", "hva", "hpa"] and "text" not in one
    for arguments, word in (
        ([web, "ffff"], b"0x and hexadecimal"),
        ([web, "0x10000000000000000"], b"64 bits"),
        (["--vcpu", "7", web, "0"], b"no vCPU 7: there are 0 to 0"),
        (["nobody", "0"], b"no VM named 'nobody' runs"),
        ([web], b"GVA"),
    ):
        wrong = kvmkit("mmu", *arguments)
        assert wrong.returncode == 125 and word in wrong.stderr and b"Traceback" not in wrong.stderr


def test_ps(kvmkit: Kvmkit, web: str) -> None:
    (row,) = json.loads(kvmkit("ps", "--json").stdout)
    assert (row["name"], row["state"], row["cpus"], row["memory_bytes"]) == (web, "running", 1, 192 << 20)
    os.kill(row["pid"], 0)
    lines = kvmkit("ps").stdout.decode().splitlines()
    assert lines[0].split()[:2] == ["NAME", "STATE"] and lines[1].split()[:2] == [web, "running"]


def test_logs(kvmkit: Kvmkit, web: str) -> None:
    assert kvmkit("logs", web).stdout.rstrip() == b"started"
    assert kvmkit("logs", "nobody").returncode == 125


def test_the_console(kvmkit: Kvmkit, web: str, environment: dict[str, str]) -> None:
    """What the kernel writes comes, what is typed gets there, Ctrl-A x leaves, and the machine goes on."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvmkit", "console", web]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    read_until(ours, b"leaves it.\r\n")
    wait_for_raw(theirs)
    kvmkit("exec", web, "--", "sh", "-c", "echo to the console > /dev/console")
    read_until(ours, b"to the console\r\n")
    os.write(ours, b"typed")
    read_until(ours, b"typed")  # the guest's terminal echoes
    os.write(ours, b"\x01x")
    assert process.wait(TIMEOUT_S) == 0
    assert kvmkit("exec", web, "--", "true").returncode == 0
    os.close(ours)
    os.close(theirs)


def test_stop_and_what_is_left(kvmkit: Kvmkit, environment: dict[str, str]) -> None:
    assert (
        kvmkit(
            "run", "-d", "--name", "short", "--memory", "192M", "--", "sh", "-c", "echo bye; exit 3"
        ).stdout
        == b"short\n"
    )
    followed = kvmkit("logs", "-f", "short").stdout
    assert followed == b"bye\n"
    states = {row["name"]: row["state"] for row in json.loads(kvmkit("ps", "--json").stdout)}
    assert states["short"] == "ended (3)"
    assert kvmkit("exec", "short").returncode == 125
    assert kvmkit("stop", "short").returncode == 0
    assert b"short" not in kvmkit("ps").stdout
    assert not (Path(environment["XDG_RUNTIME_DIR"]) / "kvmkit" / "short").exists()
    assert kvmkit("stop", "short").returncode == 125


def test_a_killed_machine_leaves_nothing(kvmkit: Kvmkit, environment: dict[str, str]) -> None:
    assert kvmkit("run", "-d", "--name", "victim", "--memory", "192M").stdout == b"victim\n"
    pid = next(row["pid"] for row in json.loads(kvmkit("ps", "--json").stdout) if row["name"] == "victim")
    os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}/fd/0"):
        os.sched_yield()
    assert b"victim" not in kvmkit("ps").stdout
    assert not (Path(environment["XDG_RUNTIME_DIR"]) / "kvmkit" / "victim").exists()


def test_a_name_that_is_taken(kvmkit: Kvmkit, web: str) -> None:
    done = kvmkit("run", "--name", web, "--", "true")
    assert done.returncode == 125 and b"runs already: stop it (kvmkit stop web)" in done.stderr
