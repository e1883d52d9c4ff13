"""The probe: what it reads, what it times, what it chooses."""

from pathlib import Path

import pytest

from kvmkit.kvm import Kvm, probe
from kvmkit.kvm.probe import EngineReport


def test_modules(tmp_path: Path) -> None:
    parameters = tmp_path / "kvm_amd" / "parameters"
    parameters.mkdir(parents=True)
    (parameters / "nested").write_text("1\n")
    (parameters / "npt").write_text("Y\n")
    (tmp_path / "kvm").mkdir()
    (tmp_path / "virtio").mkdir()
    found = probe.modules(tmp_path)
    assert found == {"kvm": {}, "kvm_amd": {"nested": "1", "npt": "Y"}}
    assert probe.nested_support(found) is True


@pytest.mark.parametrize(
    ("parameters", "nested"),
    [
        ({}, None),
        ({"kvm_pvm": {}}, None),
        ({"kvm_intel": {"nested": "N"}}, False),
        ({"kvm_intel": {"nested": "Y"}}, True),
    ],
)
def test_nested_support(parameters: dict[str, dict[str, str]], nested: bool | None) -> None:
    assert probe.nested_support(parameters) is nested


@pytest.fixture
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that the software engine is for."""
    monkeypatch.setattr(probe, "_SOFT_MACHINE", True)


@pytest.mark.usefixtures("on_x86")
@pytest.mark.parametrize(
    ("linux", "soft_is_built", "choice", "words"),
    [
        (EngineReport("linux", supervisor_mips=5000), True, "linux", "5000 million"),
        (EngineReport("linux", supervisor_mips=1.7), True, "soft", "emulates supervisor code, 1.7 million"),
        (EngineReport("linux", supervisor_mips=1.7), False, "linux", "isn't built"),
        (EngineReport("linux", error="/dev/kvm: Permission denied"), True, "soft", "Permission denied"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, linux: EngineReport, soft_is_built: bool, choice: str, words: str
) -> None:
    monkeypatch.setattr(probe, "examine", lambda engine: linux)
    monkeypatch.setattr(probe, "_soft_is_built", lambda: soft_is_built)
    engine, reason = probe.choose_engine()
    assert engine == choice
    assert words in reason


@pytest.mark.usefixtures("on_x86")
def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "examine", lambda engine: EngineReport("linux", error="no /dev/kvm"))
    monkeypatch.setattr(probe, "_soft_is_built", lambda: False)
    with pytest.raises(OSError, match="no engine: no /dev/kvm; and the software engine isn't built"):
        probe.choose_engine()


@pytest.mark.parametrize(
    ("iteration_ns", "run_cost_ns"),
    [(0.002, 500), (0.02, 4_000_000), (3000, 100_000)],  # hardware; under an emulator; emulated by KVM
)
def test_rate(iteration_ns: float, run_cost_ns: int) -> None:
    """What a run costs in itself doesn't count, however much that is."""
    rate = probe._rate(lambda iterations: int(run_cost_ns + iterations * iteration_ns))
    assert rate == pytest.approx(1 / iteration_ns, rel=0.01)


def test_supervisor_mips(kvm: Kvm) -> None:
    assert probe.supervisor_mips(kvm) > 0.01


def test_capabilities(kvm: Kvm) -> None:
    found = probe.capabilities(kvm)
    assert found["KVM_CAP_USER_MEMORY"] == 1
    assert 0 not in found.values()


def test_report() -> None:
    report = probe.report()
    assert [engine.name for engine in report.engines] == ["linux", "soft"]
    for engine in report.engines:
        assert bool(engine.error) != bool(engine.supervisor_mips)
    assert report.choice in ("linux", "soft", "")
    assert report.reason
