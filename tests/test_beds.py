"""A part of the suite on real kvm-amd and kvm-arm64, in machines that QEMU emulates: see testbed/bed.py."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
TIMEOUT_S = 900.0
UNAVAILABLE = 77


@pytest.mark.slow
@pytest.mark.parametrize("bed", ["amd", "arm64"])
def test_part_of_the_suite_on_real_kvm(bed: str) -> None:
    """It says itself why it can't be set up, where it can't."""
    if bed == "amd" and platform.machine() != "x86_64":
        pytest.skip("the native module in this tree isn't for x86-64")
    environment = {**os.environ, "PYTHONPATH": str(TREE / "src")}
    done = subprocess.run(
        [sys.executable, str(TREE / "testbed" / "bed.py"), bed, "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout.rstrip().splitlines()[-1])
