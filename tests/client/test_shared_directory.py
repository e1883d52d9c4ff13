"""Shared directories under load, in a guest that runs on this machine's own root."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from kvmkit.client import Machine, Share

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_guest")]

FSX = Path(__file__).with_name("fsx.py")


def test_fsx(tmp_path: Path) -> None:
    """What the guest's reads, writes and mappings made of its files is what the host finds."""
    with Machine(root="/", memory="512M", shares=(Share(tmp_path, "/mnt"),)) as vm:
        for seed in (1, 2):
            (tmp_path / str(seed)).mkdir()
            command = [os.path.realpath(sys.executable), str(FSX), f"/mnt/{seed}", str(seed), "1500"]
            result = vm.run(command, text=True)
            assert result.returncode == 0, result.stderr
            digests = dict(line.split() for line in result.stdout.splitlines())
            for path in (tmp_path / str(seed)).iterdir():
                assert digests.pop(path.name) == hashlib.sha256(path.read_bytes()).hexdigest()
            assert not digests


def test_each_side_sees_at_once_what_the_other_did(tmp_path: Path) -> None:
    with Machine(memory="192M", shares=(Share(tmp_path, "/mnt"),)) as vm:
        file = tmp_path / "file"
        for i in range(10):
            file.write_text(f"host {i}")
            assert vm.run(["cat", "/mnt/file"], check=True).stdout == b"host %d" % i
            vm.run(["sh", "-c", f"echo guest {i} > /mnt/file; mkdir /mnt/dir{i}"], check=True)
            assert file.read_text() == f"guest {i}\n" and (tmp_path / f"dir{i}").is_dir()
            (tmp_path / f"dir{i}").rename(tmp_path / f"renamed{i}")
            assert vm.run(["test", "-d", f"/mnt/dir{i}"]).returncode == 1
            assert vm.run(["test", "-d", f"/mnt/renamed{i}"]).returncode == 0


def test_programs_run_from_a_shared_directory(tmp_path: Path) -> None:
    """A program, which is mapped, and a script, with an interpreter of this machine's root."""
    shutil.copy("/bin/true", tmp_path / "true")
    (tmp_path / "script").write_text("#!/bin/sh\nexec /mnt/true\n")
    (tmp_path / "script").chmod(0o755)
    with Machine(root="/", memory="256M", shares=(Share(tmp_path, "/mnt", read_only=True),)) as vm:
        for name in ("true", "script"):
            assert vm.run([f"/mnt/{name}"]).returncode == 0
        assert vm.run(["sh", "-c", ": > /mnt/new"]).returncode != 0
