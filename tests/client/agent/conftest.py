"""The agent as an ordinary process of the host, over a unix socket: all but what only a guest's init does."""

import platform
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmkit
from kvmkit.client.agent import Agent

PROGRAM = Path(kvmkit.__file__).parent / "guest" / f"agent-{platform.machine()}"

Connect = Callable[[], socket.socket]


@pytest.fixture(scope="session")
def connect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connect]:
    """Makes a connection to a running agent."""
    if not PROGRAM.exists():
        pytest.skip("the agent isn't built: make build")
    path = tmp_path_factory.mktemp("agent") / "socket"
    process = subprocess.Popen(
        [PROGRAM, "--listen", f"unix:{path}"],
        stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "GIVEN": "by the agent"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"kvmkit-agent: listening\n"

    def connection() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return sock

    yield connection
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def agent(connect: Connect) -> Agent:
    return Agent(connect)
