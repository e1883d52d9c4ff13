import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmkit import runtime
from kvmkit.errors import KvmkitError


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "kvmkit"


def test_a_directory_of_one_s_own(base: Path) -> None:
    assert runtime.base_directory() == base
    assert base.stat().st_mode & 0o777 == 0o700
    base.chmod(0o770)
    with pytest.raises(KvmkitError, match="only you may write"):
        runtime.base_directory()


def test_without_xdg_runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime.base_directory() == tmp_path / f"kvmkit-{os.getuid()}"


def test_a_symbolic_link_isn_t_taken(base: Path, tmp_path: Path) -> None:
    base.symlink_to(tmp_path)
    with pytest.raises(KvmkitError):
        runtime.base_directory()


def test_a_name_is_one_vm_s_as_long_as_its_lock_is_held() -> None:
    directory, lock = runtime.create("web")
    assert directory.alive()
    assert runtime.find("web") == directory
    with pytest.raises(KvmkitError, match="runs already"):
        runtime.create("web")
    (directory.path / "old.sock").touch()
    os.close(lock)
    assert not directory.alive()
    with pytest.raises(KvmkitError, match=r"no VM named 'web' runs \(running: none\)"):
        runtime.find("web")
    again, lock = runtime.create("web")
    assert again == directory and os.listdir(again.path) == ["lock"]
    os.close(lock)


def test_the_lock_is_a_child_s_who_inherits_it() -> None:
    directory, lock = runtime.create(None)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    os.close(lock)
    assert directory.alive()
    child.communicate(b"\n")
    assert not directory.alive()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a" * 64, "ä", "a b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(KvmkitError):
        runtime.create(name)
    with pytest.raises(KvmkitError):
        runtime.find(name)


def test_a_path_that_is_too_long_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(KvmkitError, match="too long"):
        runtime.create(None)
    assert os.listdir(long / "kvmkit") == []


def test_every_vm_and_what_is_left_of_killed_ones() -> None:
    running, lock = runtime.create("running")
    running.write("vm.json", {"pid": 1})
    ended, lock2 = runtime.create("ended")
    ended.write("vm.json", {})
    ended.write("end.json", {"reason": "power-off"})
    os.close(lock2)
    killed, lock3 = runtime.create("killed")
    killed.write("vm.json", {})
    os.close(lock3)
    assert runtime.every() == [ended, running]
    assert not killed.path.exists()
    assert running.read("vm.json") == {"pid": 1}
    assert running.read("end.json") == {}
    os.close(lock)
