"""kvmkit as a real process."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmkit.machine.guest import DefaultGuest

TIMEOUT_S = 30


class Kvmkit:
    """``kvmkit run`` as a process in a session of its own."""

    def __init__(self, *arguments: str, **options: object) -> None:
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, "-m", "kvmkit", "run", *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "start_new_session": True,
                **options,
            },
        )
        self.pid: int = self.process.pid

    def finish(self) -> tuple[int, bytes, str]:
        """Status, stdout and stderr; whatever it had started is gone."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        assert not self.session(), "processes are left"
        return self.process.returncode, out or b"", (err or b"").decode()

    def session(self) -> list[int]:
        """Processes of its session that are alive."""
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.pid and state not in "ZX":
                alive.append(int(stat.parent.name))
        return alive

    def kill(self) -> None:
        for pid in self.session():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def run_kvmkit() -> Iterator[Callable[..., Kvmkit]]:
    """Start ``kvmkit run …``; anything left is killed afterwards."""
    started: list[Kvmkit] = []

    def start(*arguments: str, **options: object) -> Kvmkit:
        started.append(Kvmkit(*arguments, **options))
        return started[-1]

    yield start
    for kvmkit_ in started:
        kvmkit_.kill()


@pytest.fixture
def run_linux(
    run_kvmkit: Callable[..., Kvmkit], linux_engine: str, default_guest: DefaultGuest
) -> Callable[..., Kvmkit]:
    """``kvmkit run`` on each engine that boots Debian's kernel here."""
    return functools.partial(run_kvmkit, "--engine", linux_engine)
