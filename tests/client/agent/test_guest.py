"""The agent where it belongs: as a guest's init, over vsock."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmkit.client import Machine
from kvmkit.client.agent import PIPE, Pty
from kvmkit.client.config import Disk
from kvmkit.errors import AgentError
from kvmkit.machine.guest import DefaultGuest

from .conftest import PROGRAM

pytestmark = pytest.mark.slow

DATA = random.Random(4).randbytes(10_000_000)
DEBUGFS = shutil.which("debugfs") or "/sbin/debugfs"


@pytest.fixture(scope="module", autouse=True)
def _can_boot(default_guest: DefaultGuest) -> None:
    if not PROGRAM.exists():
        pytest.skip("the agent isn't built: make build")


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """A guest of busybox, for tests that leave no traces."""
    with Machine(hostname="here", network="none") as vm:
        yield vm


def sh(vm: Machine, script: str) -> str:
    """What a script says, stderr as well."""
    output: str = vm.run(["sh", "-c", f"exec 2>&1; {script}"], text=True, timeout_s=60).stdout
    return output


def test_comes_up_without_warnings(guest: Machine) -> None:
    guest.wait_ready()
    assert guest.warnings == []
    info = guest.agent.info()
    assert (info.hostname, info.warnings) == ("here", ())
    assert 0 < info.uptime_ns < 600e9


def test_the_system_is_mounted(guest: Machine) -> None:
    mounts = {fields[1]: fields[2] for fields in map(str.split, sh(guest, "cat /proc/mounts").splitlines())}
    expected = {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/dev/shm": "tmpfs",
        "/run": "tmpfs",
    }
    assert expected.items() <= mounts.items()
    assert sh(guest, "cat /dev/fd/0 </etc/hosts") == "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\there\n"
    assert "UP" in sh(guest, "ip link show lo").split("\n")[0]
    assert sh(guest, "stat -c %a /tmp /dev/shm").split() == ["1777", "1777"]


def test_streams(guest: Machine) -> None:
    result = guest.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", 7)
    assert guest.run(["cat"], input=DATA, timeout_s=120).stdout == DATA


def test_a_command_for_another_user(guest: Machine) -> None:
    assert guest.run(["sh", "-c", "id -u; echo $HOME"], user="nobody", text=True).stdout == "65534\n/\n"


def test_a_terminal_keeps_the_last_words(guest: Machine) -> None:
    for _ in range(20):
        with guest.popen(["printf", "%1000s|", "x"], stdout=PIPE, pty=Pty()) as process:
            assert process.stdout is not None
            assert process.stdout.read() == b" " * 999 + b"x|"


def test_files(guest: Machine, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(DATA)
    guest.files.put(tmp_path / "big", "/tmp/big")
    assert guest.run(["md5sum", "/tmp/big"]).stdout == subprocess.run(
        ["md5sum"], input=DATA, stdout=subprocess.PIPE, check=True
    ).stdout.replace(b"-", b"/tmp/big")
    guest.files.get("/tmp/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == DATA
    guest.files.remove("/tmp/big")
    guest.files.get("/etc", tmp_path / "etc")
    assert (tmp_path / "etc" / "passwd").read_text().startswith("root:")


def test_the_clock(guest: Machine) -> None:
    guest.agent.set_time(1_000_000_000 * 10**9)
    assert sh(guest, "date +%Y-%m-%d").strip() == "2001-09-09"
    guest.agent.set_time()
    assert abs(int(sh(guest, "date +%s")) - time.time()) < 60


def test_orphans_are_reaped(guest: Machine) -> None:
    sh(guest, "for i in 1 2 3 4 5; do (sleep 0.01 &) ; done; sleep 0.2")
    assert "Z" not in sh(guest, "ps -o stat")


def test_an_agent_that_is_killed_is_there_again() -> None:
    with Machine() as vm:
        with vm.popen(["sleep", "1000"]) as sleeping:
            with pytest.raises(AgentError):
                vm.run(["kill", "-9", "-1"])
            with pytest.raises(AgentError):
                sleeping.wait(20)
        assert vm.run(["echo", "again"]).stdout == b"again\n"
        assert vm.end is None


@pytest.fixture
def image(tmp_path: Path, default_guest: DefaultGuest) -> Path:
    """An ext4 file system of busybox, with a resolv.conf that leads to a service which doesn't run."""
    if shutil.which("mke2fs") is None:
        pytest.skip("no mke2fs (e2fsprogs)")
    root = tmp_path / "root"
    for name in ("bin", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(default_guest.busybox, root / "bin" / "busybox")
    (root / "bin" / "busybox").chmod(0o755)
    for applet in ("sh", *default_guest.applets):
        if not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    path = tmp_path / "image"
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 32 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, path], check=True)
    return path


def test_a_root_of_its_own(image: Path) -> None:
    before = image.read_bytes()
    with Machine(root=image, network="user") as vm:
        vm.wait_ready()
        assert vm.warnings == []
        assert sh(vm, "grep -c ' / ' /proc/mounts; ls /init /newroot").count("No such file") == 2
        assert sh(vm, "cat /etc/resolv.conf; ls -l /etc/resolv.conf").split()[:2] == [
            "nameserver",
            "10.0.2.3",
        ]
        assert sh(vm, "ip route").startswith("default via 10.0.2.2 ")
        assert sh(vm, "echo written > /etc/new; cat /etc/new") == "written\n"
        assert sh(vm, "ls /run/kvmkit 2>/dev/null; ls /dev/pts") != ""
        vm.agent.shutdown()
        assert vm.wait(timeout_s=60).reason == "power-off"
    assert image.read_bytes() == before  # what the guest writes goes with it


def test_shutdown_leaves_a_disk_clean(image: Path) -> None:
    with Machine(disks=(Disk(image),)) as vm:
        sh(vm, "mkdir /disk; mount -t ext4 /dev/vda /disk; echo kept > /disk/file")
        vm.popen(["sh", "-c", "trap 'echo ended > /disk/ended; exit' TERM; while :; do sleep 0.1; done"])
        while "trap" not in sh(vm, "ps -o args"):
            pass
        vm.agent.shutdown()
        assert vm.wait(timeout_s=60).reason == "power-off"
    subprocess.run(["e2fsck", "-fp", image], check=False)  # replays the journal
    assert subprocess.run(["e2fsck", "-fn", image], stdout=subprocess.DEVNULL, check=False).returncode == 0
    for name, content in (("file", b"kept\n"), ("ended", b"ended\n")):
        shown = subprocess.run([DEBUGFS, "-R", f"cat /{name}", image], stdout=subprocess.PIPE, check=True)
        assert shown.stdout == content
