"""The command line without a guest: options, help, info."""

import errno
import json
import os

import pytest
from click.testing import CliRunner

from kvmkit.cli import commands
from kvmkit.cli.arguments import Memory
from kvmkit.cli.run import _status
from kvmkit.client import End
from kvmkit.errors import VmTimeout


def test_help_names_the_exit_codes() -> None:
    text = CliRunner().invoke(commands, ["run", "--help"]).output
    assert "kvmkit run -- uname -a   " in text
    for line in ("  124  the timeout", "  125  kvmkit failed", "  123  the guest died"):
        assert line in text


@pytest.mark.parametrize("option", [["--timeout", "5"], ["--stats"]])
def test_a_detached_guest_is_not_waited_for(option: list[str]) -> None:
    result = CliRunner().invoke(commands, ["run", "-d", *option])
    assert result.exit_code != 0 and "--timeout and --stats" in result.output


def test_an_agent_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no --timeout that was over where none was given."""

    def detach(*_: object) -> int:
        raise VmTimeout("the guest's agent didn't come up")

    monkeypatch.setattr("kvmkit.cli.run._detach", detach)
    result = CliRunner().invoke(commands, ["run", "-d"])
    assert isinstance(result.exception, VmTimeout)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("256M", 256 << 20), ("1g", 1 << 30), ("64MiB", 64 << 20), ("4096", 4096)]
)
def test_memory(text: str, size_bytes: int) -> None:
    assert Memory().convert(text, None, None) == size_bytes


@pytest.mark.parametrize("text", ["", "3X", "-1M", "1.5G"])
def test_wrong_memory(text: str) -> None:
    result = CliRunner().invoke(commands, ["run", "--memory", text])
    assert result.exit_code != 0
    assert "256M or 1G" in result.output


@pytest.mark.parametrize(
    ("reason", "status", "unfinished", "code"),
    [
        ("power-off", 3, True, 3),
        ("power-off", 0, True, 0),
        ("power-off", None, True, 123),
        ("power-off", None, False, 0),
        ("reset", None, False, 0),
        ("stopped", None, False, 0),
        ("exit", 7, False, 7),
        ("panic", None, False, 123),
        ("triple-fault", None, False, 123),
        ("engine", 0, True, 125),
    ],
)
def test_exit_status(reason: str, status: int | None, unfinished: bool, code: int) -> None:
    assert _status(End(reason, "", status, ""), unfinished=unfinished) == code


@pytest.mark.parametrize(("error", "code"), [(errno.EPIPE, 141), (errno.ENOSPC, 125)])
def test_output_that_cant_be_written(error: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader that went away is as usual, a full disk is not."""
    detail = f"the console's output: {os.strerror(error)}"
    assert _status(End("output-closed", detail, None, ""), unfinished=True) == code
    assert (detail in capsys.readouterr().err) is (code == 125)


def test_info() -> None:
    """Both forms say the same."""
    report = json.loads(CliRunner().invoke(commands, ["info", "--json"]).output)
    assert [engine["name"] for engine in report["engines"]] == ["linux", "soft"]
    text = CliRunner().invoke(commands, ["info"]).output
    assert "auto takes: " in text
    for engine in report["engines"]:
        assert all(name in text for name in engine["capabilities"])
