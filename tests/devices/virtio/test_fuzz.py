"""Every device under a hostile driver, for a short while; `bench/fuzz_devices.py` does a million chains each."""

from pathlib import Path

import pytest

from kvmkit.testing.fuzz.targets import TARGETS, run


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_driver(name: str, seed: int, tmp_path: Path) -> None:
    outcome = run(name, seed, 500, tmp_path)
    assert outcome.chains >= 500
    assert outcome.resets == sum(outcome.errors.values()) > 0
