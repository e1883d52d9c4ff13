"""The pytest plugin, as a user's project sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_a_fresh_guest(vm):
    assert vm.run(["cat", "/proc/sys/kernel/hostname"], text=True).stdout == "from-toml\\n"
    vm.files.write_text("/trace", "")

@pytest.mark.vm(hostname="marked", cpus=2)
def test_options(vm):
    assert vm.run(["hostname"], text=True).stdout == "marked\\n"
    assert vm.run(["nproc"], text=True).stdout == "2\\n"
    assert not vm.files.exists("/trace")

def test_shared_one(shared_vm):
    shared_vm.files.write_text("/trace", "")

def test_shared_two(shared_vm):
    assert shared_vm.files.exists("/trace")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("default_guest")
def test_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "vm.toml").write_text('memory = "192M"\nhostname = "from-toml"\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\nvm_config = vm.toml\naddopts = --strict-markers\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kvmkit.pytest_plugin", "--vm-engine", "soft"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "4 passed" in done.stdout, done.stdout + done.stderr
