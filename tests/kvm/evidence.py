"""Which test shows that an ioctl works where: the evidence behind ``docs/kvm-api.md``.

A test marked ``backs("KVM_X", …)`` must call each of these ioctls with success, one marked ``refuses("KVM_X", …)`` must see each
refused; a test that passes without doing so fails. What passed, was refused or was skipped, and why, is compared at the end of
a run of all tests here with ``docs/kvm-api/ENVIRONMENT.txt``: evidence that got lost fails the run. With KVMKIT_RECORD_KVM_API=write
the file is written instead, with =print its lines are printed (a test bed's own files are its own). An environment is an
engine, and for the kernel's also the module: ``soft``, ``kvm-amd``, ``kvm-arm64``, ``kvm-pvm``.
"""

import functools
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from kvmkit.uapi.ioctls import IOCTLS

DIRECTORY = Path(__file__).parents[2] / "docs" / "kvm-api"
CLASSES = {"system": "Kvm", "vm": "Vm", "vcpu": "Vcpu", "device": "Device"}
PRINTED = "kvm-api:"

# How much a kind of evidence is worth.
ABSENT, REFUSED, TEST = "absent", "refused", "test"
_ORDER = (ABSENT, REFUSED, TEST)

Evidence = dict[str, tuple[str, str]]
"""ioctl → kind and the test's id, or why it was skipped."""

succeeded: set[str] = set()
refused: set[str] = set()
"""Ioctls that the test that runs now has called."""


def module_of_kvm() -> str:
    """The name of the kernel's KVM here."""
    if os.uname().machine == "aarch64":
        return "kvm-arm64"
    vendors = [name for name in ("amd", "intel", "pvm") if os.path.exists(f"/sys/module/kvm_{name}")]
    return f"kvm-{vendors[0]}" if vendors else "kvm"


def watch(module: Any) -> None:
    """Note each call of an ioctl's method in the classes of an engine's `module`."""
    for ioctl in IOCTLS:
        for descriptor in ioctl.descriptors:
            cls = getattr(module, CLASSES[descriptor], None)
            method = getattr(cls, ioctl.method, None)
            if cls is not None and method is not None:
                setattr(cls, ioctl.method, _watched(method, ioctl.name))


def _watched(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    if getattr(method, "watched", False):
        return method

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = method(*args, **kwargs)
        except OSError:
            refused.add(name)
            raise
        succeeded.add(name)
        return result

    call.watched = True  # type: ignore[attr-defined]
    return call


class Plugin:
    """Collects evidence, and judges it at the end."""

    def __init__(self) -> None:
        """Start without any."""
        self.found: dict[str, Evidence] = {}
        self.whole = self.partial = False
        self.lost: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Whether all tests here will run."""
        here = Path(__file__).parent
        collected = {item.path for item in session.items}
        self.whole = set(here.glob("test_kvm_*.py")) <= collected

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """A part was left out."""
        self.partial = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """A test starts, its fixtures first."""
        succeeded.clear()
        refused.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Hold a test to its marks."""
        report = yield
        names = {kind: _marked(item, mark) for kind, mark in ((TEST, "backs"), (REFUSED, "refuses"))}
        if not any(names.values()):
            return report
        test = item.nodeid.partition("[")[0]
        if report.skipped:
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
            for name in names[TEST] + names[REFUSED]:
                self._note(item, name, ABSENT, reason.removeprefix("Skipped: "))
        elif call.when == "call" and report.passed:
            called = {TEST: succeeded, REFUSED: refused}
            missing = [name for kind in names for name in names[kind] if name not in called[kind]]
            if missing:
                report.outcome = "failed"
                report.longrepr = (
                    f"the test is marked as evidence for what it did not do: {', '.join(missing)}"
                )
            for kind in names:
                for name in names[kind]:
                    self._note(item, name, kind, test)
        return report

    def _note(self, item: pytest.Item, name: str, kind: str, text: str) -> None:
        callspec = getattr(item, "callspec", None)
        engine = callspec.params.get("kvm", "linux") if callspec else "linux"
        environment = "soft" if engine == "soft" else module_of_kvm()
        evidence = self.found.setdefault(environment, {})
        if name not in evidence or _ORDER.index(kind) > _ORDER.index(evidence[name][0]):
            evidence[name] = kind, text

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write or compare."""
        if not self.whole or self.partial or os.environ.get("KVMKIT_RECORD_KVM_API") == "print":
            return
        for environment, evidence in sorted(self.found.items()):
            path = DIRECTORY / f"{environment}.txt"
            if os.environ.get("KVMKIT_RECORD_KVM_API") == "write":
                path.write_text(format_evidence(evidence))
            elif path.exists():
                self.lost += lost_evidence(environment, parse_evidence(path.read_text()), evidence)
        if self.lost and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what was lost, or all there is."""
        for line in self.lost:
            terminalreporter.write_line(line, red=True)
        if self.whole and not self.partial and os.environ.get("KVMKIT_RECORD_KVM_API") == "print":
            for environment, evidence in sorted(self.found.items()):
                for line in format_evidence(evidence).splitlines():
                    terminalreporter.write_line(f"{PRINTED} {environment} {line}")


def lost_evidence(environment: str, then: Evidence, now: Evidence) -> list[str]:
    """What `then` shows and `now` doesn't, a line for each."""
    lost = []
    for name, (kind, text) in then.items():
        kind_now, text_now = now.get(name, (ABSENT, "no test is marked"))
        if _ORDER.index(kind_now) < _ORDER.index(kind):
            lost.append(
                f"docs/kvm-api/{environment}.txt: {name}: {kind} {text} is lost: {kind_now}, {text_now}"
            )
    return lost


def _marked(item: pytest.Item, mark: str) -> list[str]:
    return [name for marker in item.iter_markers(mark) for name in marker.args]


def format_evidence(evidence: Evidence) -> str:
    """Lines of ioctl, kind, text, as the table has them in order."""
    return "".join(
        "\t".join((ioctl.name, *evidence[ioctl.name])) + "\n" for ioctl in IOCTLS if ioctl.name in evidence
    )


def parse_evidence(text: str) -> Evidence:
    """Undo `format_evidence`."""
    return {name: (kind, rest) for name, kind, rest in (line.split("\t") for line in text.splitlines())}
