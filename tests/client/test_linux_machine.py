"""`Machine` with Debian's kernel: commands, files, ports, shares, disks, networks, names."""

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmkit import runtime
from kvmkit.client import PIPE, AsyncMachine, Disk, Machine, Share
from kvmkit.errors import CommandError, CommandTimeout, GuestError, KvmkitError, VmError
from kvmkit.kvm.probe import SLOW_MIPS, supervisor_mips

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_guest")]

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def vm() -> Iterator[Machine]:
    """One guest for all that leaves no traces."""
    with Machine(memory="192M") as machine:
        yield machine


def test_a_command_and_its_streams(vm: Machine) -> None:
    done = vm.run(["sh", "-c", "echo out; echo err >&2; cat; exit 7"], input=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\nin", b"err\n")
    assert vm.run(["sh", "-c", "kill -9 $$"]).returncode == -9
    assert vm.run(
        ["sh", "-c", 'echo "$A $(pwd) $(id -u)"'], env={"A": "b"}, cwd="/tmp", user="nobody", text=True
    ).stdout == ("b /tmp 65534\n")


def test_errors_of_commands(vm: Machine) -> None:
    with pytest.raises(GuestError) as missing:
        vm.run(["no-such-command"])
    assert missing.value.errno == 2
    with pytest.raises(CommandError, match="exit status 3"):
        vm.run(["sh", "-c", "exit 3"], check=True)
    with pytest.raises(CommandTimeout):
        vm.run(["sleep", "1000"], timeout_s=0.2)


def test_ten_megabytes_each_way(vm: Machine) -> None:
    data = os.urandom(10_000_000)
    assert vm.run(["cat"], input=data).stdout == data


def test_commands_at_the_same_time(vm: Machine) -> None:
    results: dict[int, bytes] = {}

    def run(n: int) -> None:
        results[n] = vm.run(["sh", "-c", f"sleep 0.1; echo {n}"]).stdout

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: b"%d\n" % n for n in range(8)}


def test_popen(vm: Machine) -> None:
    with vm.popen(["sort"], stdin=PIPE, stdout=PIPE) as sort:
        assert sort.stdin is not None and sort.stdout is not None
        sort.stdin.write(b"b\na\n")
        sort.stdin.close()
        assert sort.stdout.read() == b"a\nb\n"
        assert sort.wait(TIMEOUT_S) == 0


def test_files(vm: Machine, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(os.urandom(100_000))
    (tree / "link").symlink_to("sub/data")
    vm.files.put(tree, "/tmp/tree")
    assert sorted(vm.files.listdir("/tmp/tree")) == ["link", "sub"]
    vm.files.get("/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "data").read_bytes() == (tree / "sub" / "data").read_bytes()
    assert os.readlink(tmp_path / "back" / "link") == "sub/data"
    vm.files.write_text("/tmp/x", "ünïcode")
    assert vm.files.read_text("/tmp/x") == "ünïcode"
    with pytest.raises(GuestError):
        vm.files.read_bytes("/no/such/file")


def test_a_forwarded_port(vm: Machine) -> None:
    vm.files.write_text("/tmp/answer", "forty-two")
    with vm.popen(["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/tmp"]) as server:
        with vm.forward(8080) as forward:
            answer = b""
            while not answer:  # until it listens
                with socket.create_connection(("127.0.0.1", forward.port)) as client:
                    client.sendall(b"GET /answer HTTP/1.0\r\n\r\n")
                    while data := client.recv(4096):
                        answer += data
        assert b" 200 OK" in answer and answer.endswith(b"forty-two")
        server.kill()


def test_no_zombies_and_no_descriptors_are_left(vm: Machine) -> None:
    def count() -> tuple[int, int]:
        vm.run(["true"])
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    for _ in range(20):
        vm.run(["sh", "-c", "sleep 0 & sleep 0"])
    assert count() == before
    assert b" Z " not in vm.run(["ps", "-o", "pid,stat,comm"]).stdout


def test_shares(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "file").write_text("from the host")
    (tmp_path / "secret").write_text("no")
    (tmp_path / "in" / "escape").symlink_to("../secret")
    shares = (Share(tmp_path / "in", "/in", read_only=True), Share(tmp_path / "out", "/out"))
    with Machine(memory="192M", shares=shares) as vm:
        assert vm.warnings == []
        assert vm.files.read_text("/in/file") == "from the host"
        assert vm.run(["sh", "-c", "cat /in/escape || touch /in/x"]).returncode == 1
        vm.run(
            [
                "sh",
                "-c",
                "seq 100000 | tee /out/numbers | sha256sum > /out/sum; mkdir /out/d; mv /out/sum /out/d",
            ],
            check=True,
        )
    numbers = (tmp_path / "out" / "numbers").read_bytes()
    assert (tmp_path / "out" / "d" / "sum").read_text().split()[0] == hashlib.sha256(numbers).hexdigest()
    assert sorted(os.listdir(tmp_path / "in")) == ["escape", "file"]


def test_disks(tmp_path: Path) -> None:
    lasting, scratch = tmp_path / "lasting.img", tmp_path / "scratch.img"
    for path in (lasting, scratch):
        with open(path, "wb") as file:
            file.truncate(16 << 20)
    disks = (Disk(lasting), Disk(scratch, temporary=True), Disk(scratch, read_only=True))
    with Machine(memory="192M", disks=disks) as vm:
        for disk in ("vda", "vdb"):
            vm.run(
                [
                    "sh",
                    "-c",
                    f"mke2fs -q /dev/{disk} && mount /dev/{disk} /tmp && echo kept > /tmp/f && umount /tmp",
                ],
                check=True,
            )
        assert vm.run(["sh", "-c", "echo > /dev/vdc"]).returncode != 0
    assert b"kept" in lasting.read_bytes()
    assert scratch.read_bytes() == bytes(16 << 20)
    if shutil.which("e2fsck"):
        subprocess.run(["e2fsck", "-fn", lasting], check=True, capture_output=True)


def test_a_disk_that_another_machine_writes(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    with (
        Machine(memory="192M", disks=(Disk(path),)),
        pytest.raises(VmError, match=r"disk\.img"),
        Machine(disks=(Disk(path),)),
    ):
        pass


def test_the_hosts_root() -> None:
    with Machine(root="/", memory="512M") as vm:
        here = Path(__file__)
        assert vm.files.read_bytes(here) == here.read_bytes()
        vm.run(["sh", "-c", "echo changed > /etc/hostname; rm -rf /usr/share/doc"], check=True)
    assert Path("/usr/share").exists()


def test_a_detached_machine_is_found_by_its_name(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}"
    with Machine(memory="192M", name=name, detached=True) as vm:
        pid = vm.pid
    try:
        with Machine.attach(name) as again:
            assert again.pid == pid
            assert again.run(["hostname"]).stdout == b"kvmkit\n"
        with pytest.raises(KvmkitError, match="runs already"):
            Machine(name=name).start()
    finally:
        with Machine.attach(name) as last:
            end = last.stop()
    assert end.reason == "power-off"
    directory = runtime.VmDirectory(runtime.base_directory() / name)
    assert directory.read("end.json")["reason"] == "power-off"
    directory.remove()


def test_the_guest_s_end_is_told(tmp_path: Path) -> None:
    with Machine(memory="192M") as vm:
        with pytest.raises(VmError, match="sysrq triggered crash"):
            vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])
        assert vm.wait(TIMEOUT_S).reason == "panic"


def test_a_guest_that_can_t_take_its_root(tmp_path: Path) -> None:
    """Its init says why, and so do we."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "bin").mkdir()
    with Machine(memory="192M", root=empty) as vm, pytest.raises(GuestError, match="sh"):
        vm.run(["sh"])


def test_asyncio() -> None:
    async def use() -> tuple[list[bytes], int]:
        async with AsyncMachine(memory="192M") as vm:
            done = await asyncio.gather(*(vm.run(["echo", str(n)]) for n in range(4)))
            await vm.files.write_text("/tmp/x", "y")
            assert await vm.files.read_text("/tmp/x") == "y"
            process = await vm.popen(["sleep", "1000"])
            process.send_signal(15)
            return [one.stdout for one in done], await process.wait()

    out, status = asyncio.run(use())
    assert out == [b"0\n", b"1\n", b"2\n", b"3\n"]
    assert status == -15


def test_the_engine_is_one_that_runs_linux(vm: Machine) -> None:
    import kvmkit.kvm

    with kvmkit.kvm.open(vm.engine) as system:
        assert vm.engine == "soft" or supervisor_mips(system) >= SLOW_MIPS


def test_a_walk_of_the_kernels_text(vm: Machine) -> None:
    """Where the kernel says that its code is, by /proc/kallsyms and /proc/iomem, is where its own page tables lead."""
    symbols = vm.run(["grep", "-wE", "_text|_stext|_etext|jiffies", "/proc/kallsyms"], text=True).stdout
    address = {line.split()[2]: int(line.split()[0], 16) for line in symbols.splitlines()}
    memory = vm.run(["grep", "Kernel code", "/proc/iomem"], text=True).stdout
    code_gpa = int(memory.split("-")[0], 16)
    walk = vm.walk(address["_text"])
    assert walk["gpa"] == code_gpa
    assert vm.walk(address["_etext"] - 1)["gpa"] == code_gpa + address["_etext"] - 1 - address["_text"]
    paging, slot, host = walk["stages"]
    assert paging["mode"] in ("4-level", "5-level") and paging["page_bytes"] in (1 << 12, 1 << 21)
    assert slot["result"] == slot["slot"]["hva"] + code_gpa - slot["slot"]["gpa"]
    assert host["source"] == "hva" and walk["hpa"] == host["result"]
    permitted = {(a["user"], a["kind"]): a["fault"] is None for a in paging["accesses"]}
    assert permitted[False, "read"] and permitted[False, "execute"]
    assert not any(permitted[True, kind] for kind in ("read", "write", "execute"))
    data = vm.walk(address["jiffies"])["stages"][0]
    permitted = {(a["user"], a["kind"]): a["fault"] is None for a in data["accesses"]}
    assert permitted[False, "write"] and not permitted[False, "execute"]
    assert vm.run(["true"]).returncode == 0  # it goes on
    nowhere = vm.walk(1 << 47)
    assert (nowhere["gpa"], nowhere["stages"][0]["accesses"][0]["fault"]["exception"]) == (None, "#GP")
    with pytest.raises(VmError, match="no vCPU 1: there are 0 to 0"):
        vm.walk(0, vcpu=1)


def test_walks_while_the_guest_works(vm: Machine) -> None:
    """Hundreds, by two threads at once: each gets its own, and the guest's work comes out right."""
    work = vm.popen(["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $i"], stdout=PIPE)
    assert work.stdout is not None
    right: list[int] = []

    def ask(start: int) -> None:
        right.extend(gva for gva in range(start, start + 100) if vm.walk(gva)["gva"] == gva)

    threads = [threading.Thread(target=ask, args=(start,)) for start in (1 << 20, 1 << 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 200
    assert work.stdout.read() == b"20000\n" and work.wait(TIMEOUT_S) == 0


def test_a_walk_awaited() -> None:
    async def use() -> dict[str, Any]:
        async with AsyncMachine(memory="192M") as vm:
            return await vm.walk(0x1000)

    assert asyncio.run(use())["gva"] == 0x1000


def test_statistics(vm: Machine) -> None:
    before = vm.stats()
    vm.run(["true"])
    after = vm.stats()
    assert len(after["vcpus"]) == 1
    if before["vcpus"][0]:  # an engine that counts
        assert sum(v for v in after["vcpus"][0].values() if isinstance(v, int)) > sum(
            v for v in before["vcpus"][0].values() if isinstance(v, int)
        )
