"""The VM process at the hands of a client that isn't ours."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmkit.messages import MessageSocket
from kvmkit.testing.kernel import puts
from kvmkit.vmm.config import DiskConfig, VmConfig

TIMEOUT_S = 30


class Peer:
    """A VM process and the client's end of its socket."""

    def __init__(self) -> None:
        self.raw, theirs = socket.socketpair()
        self.messages = MessageSocket(self.raw)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvmkit.vmm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()

    def event(self) -> dict[str, Any]:
        """The next event that isn't progress."""
        while True:
            message = self.messages.receive(TIMEOUT_S)
            assert message is not None
            if message["event"] != "progress":
                return message

    def close(self) -> None:
        self.raw.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_garbage_instead_of_a_configuration(peer: Peer) -> None:
    peer.raw.sendall(b"\xff\xfe[[[\n")
    event = peer.event()
    assert event["event"] == "error" and "isn't JSON" in event["message"]
    _, err = peer.process.communicate(timeout=TIMEOUT_S)
    assert (peer.process.returncode, err) == (1, b"")


def test_no_configuration(peer: Peer) -> None:
    peer.raw.close()
    _, err = peer.process.communicate(timeout=TIMEOUT_S)
    assert (peer.process.returncode, err) == (0, b"")


def test_a_closed_descriptor(peer: Peer) -> None:
    peer.messages.send({"engine": "soft", "output_fd": 1000})
    assert "output_fd 1000" in peer.event()["message"]


def test_garbage_while_it_runs(peer: Peer, engine: str, kernel: Callable[[str], str]) -> None:
    """Each is refused, the VM goes on, and still takes the request that it knows."""
    path = kernel(puts("up\n") + "\n1: jmp 1b")
    peer.messages.send({"engine": engine, "kernel": path, "memory_bytes": 64 << 20})
    assert [peer.event()["event"] for _ in range(3)] == ["started", "entered", "console"]
    bad = [
        b"",
        b"{",
        b'{"request": "dance"}',
        b'{"request": ["stop"]}',
        b'{"stop": 1}',
        b"[1]",
        os.urandom(8).hex().encode(),
    ]
    for line in bad:
        peer.raw.sendall(line + b"\n")
        assert peer.event()["event"] == "refused"
    peer.raw.sendall(json.dumps({"request": "stop"}).encode() + b"\n")
    ended = peer.event()
    assert (ended["event"], ended["reason"], ended["detail"]) == ("ended", "stopped", "asked for")
    _, err = peer.process.communicate(timeout=TIMEOUT_S)
    assert (peer.process.returncode, err) == (0, b"")


def test_a_walk_is_asked_for(peer: Peer, engine: str, kernel: Callable[[str], str]) -> None:
    """The vCPU, which is busy, pauses for it and goes on; numbers that aren't any are refused."""
    peer.messages.send(
        {"engine": engine, "kernel": kernel(puts("up\n") + "\n1: jmp 1b"), "memory_bytes": 64 << 20}
    )
    assert [peer.event()["event"] for _ in range(3)] == ["started", "entered", "console"]
    for gva, vcpu in ((0x100000, 0), (0, 0), ((1 << 64) - 1, 0)):
        peer.messages.send({"request": "walk", "gva": gva, "vcpu": vcpu})
        answer = peer.event()
        assert (answer["event"], answer["gva"], answer["vcpu"], answer["error"]) == ("walk", gva, 0, "")
        assert answer["walk"]["gva"] == gva and answer["walk"]["text"].startswith(f"gva {gva:#x}\n")
    for index in (1, -1):
        peer.messages.send({"request": "walk", "gva": 0, "vcpu": index})
        assert peer.event()["error"] == f"no vCPU {index}: there are 0 to 0"
    for wrong in (
        {"gva": -1, "vcpu": 0},
        {"gva": 1 << 64, "vcpu": 0},
        {"gva": "0", "vcpu": 0},
        {"gva": 0, "vcpu": True},
        {"gva": 0},
        {"gva": 0, "vcpu": 0, "write": 1},
    ):
        peer.messages.send({"request": "walk", **wrong})
        assert peer.event()["event"] == "refused"
    peer.messages.send({"request": "stop"})
    assert peer.event()["reason"] == "stopped"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"engine": 1}, "engine"),
        ({"engine": "fast"}, "'fast'"),
        ({"kernel": ["x"]}, "kernel"),
        ({"append": None}, "append"),
        ({"memory_bytes": "256M"}, "memory_bytes"),
        ({"memory_bytes": True}, "memory_bytes"),
        ({"memory_bytes": 1 << 62}, "memory of"),
        ({"memory_bytes": -4096}, "memory of"),
        ({"memory_bytes": (32 << 20) + 1}, "whole pages"),
        ({"console_command": "ls -l"}, "console_command"),
        ({"console_command": ["ls", 1]}, "console_command"),
        ({"console_command": {"ls": 1}}, "console_command"),
        ({"output_fd": 1.5}, "output_fd"),
        ({"input_fd": None}, "input_fd"),
        ({"die_with_parent": 1}, "die_with_parent"),
        ({"console_command": ["ls"], "initrd": "x"}, "either"),
        ({"agent": True}, "directory"),
        ({"disks": [{"path": 1}]}, "disks.path"),
        ({"disks": [{"path": "x"}] * 9}, "9 disks"),
        ({"shares": ["x"]}, "shares"),
        ({"root": {"path": "x"}}, "fstype"),
        ({"from_message": "x"}, "from_message"),
    ],
)
def test_a_wrong_configuration(message: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        VmConfig.from_message(message)


def test_a_configuration() -> None:
    config = VmConfig.from_message(
        {
            "engine": "kvm",
            "console_command": ["ls", "-l"],
            "disks": [{"path": "x", "read_only": True}],
            "kernel": None,
            "die_with_parent": True,
        }
    )
    assert config == VmConfig(
        engine="kvm",
        console_command=("ls", "-l"),
        disks=(DiskConfig("x", read_only=True),),
        die_with_parent=True,
    )
    assert VmConfig.from_message({}) == VmConfig()


# A stand-in for apt that takes its time, and says so.
SLOW_APT = """#!/bin/sh
echo "$$" > "{directory}/pid"
exec sleep 1000
"""


@pytest.fixture
def slow_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH and cache of VM processes that fetch the default guest and don't come to an end."""
    for tool, text in (
        ("apt-get", SLOW_APT),
        ("apt-config", "#!/bin/sh\n"),
        ("apt-cache", "#!/bin/sh\n"),
        ("dpkg-deb", "#!/bin/sh\n"),
    ):
        file = tmp_path / tool
        file.write_text(text.format(directory=tmp_path))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("how", ["SIGTERM", "request", "closed", "SIGKILL"])
def test_the_end_while_a_kernel_is_fetched(slow_apt: Path, how: str) -> None:
    """No process of apt's is left, nor what it had fetched."""
    peer = Peer()
    peer.messages.send({"engine": "soft"})
    progress = peer.messages.receive(TIMEOUT_S)
    assert progress is not None and progress["event"] == "progress"
    apt = read_when_there(slow_apt / "pid")
    match how:
        case "SIGTERM":
            peer.process.terminate()
        case "request":
            peer.messages.send({"request": "stop"})
        case "SIGKILL":
            peer.process.kill()
    if how in ("SIGTERM", "request"):
        assert "stopped while the VM was being built" in peer.event()["message"]
    peer.raw.close()
    _, err = peer.process.communicate(timeout=TIMEOUT_S)
    assert err == b""
    wait_until_gone(int(apt))
    if how != "SIGKILL":
        assert [path.name for path in (slow_apt / "cache/kvmkit/guest-2").iterdir()] == [".lock"]


def deadline() -> Iterator[None]:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        os.sched_yield()
        yield


def read_when_there(path: Path) -> str:
    for _ in deadline():
        if path.exists() and (text := path.read_text()):
            return text
    raise AssertionError(f"{path} never came")


def wait_until_gone(pid: int) -> None:
    for _ in deadline():
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] in "ZX":
                    return
        except OSError:
            return
    raise AssertionError(f"process {pid} is left")
