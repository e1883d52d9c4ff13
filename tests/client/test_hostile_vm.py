"""A VM process that its guest has taken over: the client reports it and goes on, whatever it sends."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.client import Event, Machine, MachineConfig
from kvmkit.errors import VmError, VmTimeout

STARTED = '{"event": "started", "t_ns": 1, "engine": "soft", "reason": "", "cmdline": ""}'

Impostor = Callable[[str], Machine]


@pytest.fixture
def impostor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Impostor:
    """A machine whose process is a Python program of the test's, which finds the control socket in `sock`."""

    def make(program: str) -> Machine:
        file = tmp_path / "python"
        file.write_text(
            f"#!{sys.executable}\nimport socket, sys\nsock = socket.socket(fileno=int(sys.argv[-1]))\n{program}\n"
        )
        file.chmod(0o755)
        monkeypatch.setattr("kvmkit.client.vm_process.sys.executable", str(file))
        return Machine(MachineConfig())

    return make


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "\\xff",
        '{"event": "dance", "t_ns": 1}',
        '{"event": ["started"], "t_ns": 1}',
        '{"event": "entered"}',
        '{"event": "entered", "t_ns": "1"}',
        '{"event": "entered", "t_ns": 1, "more": 2}',
        '{"event": "ended", "t_ns": 1}',
        '{"event": "ended", "t_ns": 1, "reason": 1, "detail": "", "console_tail": ""}',
        '{"event": "exit", "t_ns": 1, "status": "0"}',
        STARTED,
    ],
)
def test_what_no_vm_process_sends(impostor: Impostor, line: str) -> None:
    program = f"sock.sendall(b'''{STARTED}\\n{line}\\n''')\nsock.recv(1000000)\nwhile True: sock.recv(1)"
    with impostor(program) as vm:
        with pytest.raises(VmError, match="was killed"):
            vm.wait(30)
        assert not os.path.exists(f"/proc/{vm.pid}/exe")


def test_an_endless_line(impostor: Impostor) -> None:
    with (
        pytest.raises(VmError, match="longer"),
        impostor(
            "for _ in range(40): sock.sendall(b'x' * 65536)\nsock.sendall(b'\\n')\nwhile True: sock.recv(1)"
        ),
    ):
        pass


def test_a_trickle_is_no_life(impostor: Impostor) -> None:
    """The timeout counts, however often a byte comes."""
    with (
        impostor(f"sock.sendall(b'''{STARTED}\\n''')\nwhile True: sock.sendall(b' ')") as vm,
        pytest.raises((VmTimeout, VmError)),
    ):
        vm.wait(0.01)


def test_it_only_ends(impostor: Impostor) -> None:
    with pytest.raises(VmError, match="status 3"), impostor("sys.exit(3)"):
        pass


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("kvmkit.client.vm_process.sys.executable", "/nowhere/python")
    with pytest.raises(VmError, match="can't start.*/nowhere/python"), Machine(MachineConfig(output_fd=1)):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


def test_refusals_are_events(impostor: Impostor) -> None:
    seen: list[Event] = []
    program = f"""
for line in ['{{"event": "refused", "t_ns": 1, "message": "no"}}'] * 2 + ['''{STARTED}''']: sock.sendall(line.encode() + b"\\n")
while sock.recv(1): pass
"""
    machine = impostor(program)
    machine._on_event = seen.append
    with machine:
        assert [event.name for event in seen] == ["spawned", "refused", "refused", "started"]
        assert [event.name for event in machine.timeline] == ["spawned", "started"]
