"""Start, use and stop machines for a long while: memory, descriptors, threads, processes and files must stay as they are.

    python bench/machine_soak.py [--minutes 40] [--seed 0] [--json FILE] [--only USE …]

One client process. Two idle machines run all the time: one from the first to the last minute, used a little in each step; the
other is stopped and replaced now and then. Beside them, each step uses one more machine in one of many ways, in random order, and
checks the results. After each step the client's descriptors and threads must be as after the first round, and the runtime
directory, the directory for temporary files, the client's children and all processes that bear its mark must be the idle machines'
alone. At the end its memory may not have grown since the second round, nor the descriptors and threads of the machine that ran all the time.

The exit status is 1 if a use failed or something grew.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmkit.client import PIPE, Disk, Machine, MachineConfig, Share
from kvmkit.errors import CommandTimeout, KvmkitError, VmError, VmTimeout

CONFIG = MachineConfig(memory="128M")
BULK_BYTES = 8 << 20
GROWTH_KIB = 4 << 10
"""By how much the client's memory may grow from the second round (its largest) to the last: allocators don't give all back."""
SETTLE_S = 20.0
"""Until what a machine leaves must be gone: a process that was told to end has this long."""
HANG_S = 300.0
M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
LIBC = ctypes.CDLL(None)
MARK = "KVMKIT_SOAK"
CLI = [sys.executable, "-m", "kvmkit"]


def own_footprint() -> dict[str, int]:
    """This process's, after what it has freed went back to the kernel, and how many objects Python has."""
    gc.collect()
    LIBC.malloc_trim(0)
    return {**footprint(), "objects": sys.getallocatedblocks()}


def footprint(pid: int | str = "self") -> dict[str, int]:
    """What a process holds; `anonymous_kib` is its memory without the guest's and without files."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(re.findall(r"(\w+):\s+(\d+) kB", status))
    return {
        "rss_kib": int(values["VmRSS"]),
        "anonymous_kib": int(values["RssAnon"]),
        "fds": len(os.listdir(f"/proc/{pid}/fd")) - (pid == "self"),  # the listing's own
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def marked() -> set[int]:
    """Processes that bear the client's mark: all that it started, and what they started."""
    mark = f"{MARK}={os.getpid()}".encode()
    found = set()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.add(int(name))
        except OSError:
            continue
    return found - {os.getpid()}


class Soak:
    """The directories and machines of a run."""

    def __init__(self, seed: int) -> None:
        """Make the directories and start the two idle machines."""
        self.rng = random.Random(seed)
        self.base = Path(tempfile.mkdtemp(prefix="soak-"))
        self.runtime, self.temporary, self.work = (self.base / name for name in ("run", "tmp", "work"))
        for directory in (self.runtime, self.temporary, self.work):
            directory.mkdir(mode=0o700)
        os.environ |= {
            "XDG_RUNTIME_DIR": str(self.runtime),
            "TMPDIR": str(self.temporary),
            MARK: str(os.getpid()),
        }
        tempfile.tempdir = None
        (self.work / "shared").mkdir()
        self.image = self.work / "image"
        self.image.write_bytes(bytes(16 << 20))
        self.eldest = self._idle()
        self.other = self._idle()
        self.other_age = 0

    @staticmethod
    def _idle() -> Machine:
        vm = Machine(CONFIG)
        vm.start()
        vm.wait_ready()
        vm.run(["true"], check=True)
        return vm

    def close(self) -> None:
        """Stop the idle machines; nothing may be left."""
        self.eldest.stop()
        self.eldest.close()
        self.other.close()
        try:
            if left := self.leftovers([]):
                raise AssertionError(f"left at the end: {left}")
        finally:
            shutil.rmtree(self.base)

    def touch_idle(self) -> None:
        """Use the idle machines a little; replace one now and then."""
        token = f"{self.rng.random()}"
        assert self.eldest.run(["echo", token], text=True, check=True).stdout == f"{token}\n"
        self.other_age += 1
        if self.other_age == 8:
            self.other.stop()
            self.other.close()
            self.other, self.other_age = self._idle(), 0

    def leftovers(self, idle: list[Machine]) -> list[str]:
        """What there is beside the `idle` machines, once it had its time."""
        deadline = time.monotonic() + SETTLE_S
        while left := self._leftovers(idle):
            if time.monotonic() > deadline:
                return left
            time.sleep(0.05)
        return []

    def _leftovers(self, idle: list[Machine]) -> list[str]:
        names = {vm.name for vm in idle}
        left = [
            f"runtime: {path.name}" for path in (self.runtime / "kvmkit").glob("*") if path.name not in names
        ]
        left += [f"temporary: {path.name}" for path in self.temporary.iterdir()]
        pids = {vm.pid for vm in idle}
        for pid in marked() - pids:
            try:
                left.append(f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()[-200:]!r}")
            except OSError:
                continue
        base = os.fsencode(self.base)
        mine = tuple(os.fsencode(vm.directory.path) for vm in idle if vm.directory)
        for entry in Path("/proc/net/unix").read_bytes().splitlines():
            path = entry.split(b" ")[-1]
            if path.startswith(base) and not path.startswith(mine):
                left.append(f"socket: {os.fsdecode(path)}")
        # The directory's lock is the client's until the VM process has it too.
        kept = {(vm.directory.path / "lock").stat().st_ino for vm in idle if vm.directory}
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[4] == str(os.getpid()) and int(fields[5].split(":")[2]) not in kept:
                left.append(f"lock: {line}")
        return left


def busy(soak: Soak) -> None:
    """Two processors that compute."""
    with Machine(CONFIG, cpus=2) as vm:
        loop = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; echo $i"
        first, second = (vm.popen(["sh", "-c", loop], stdout=PIPE) for _ in range(2))
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.read() == b"30000\n" and process.wait(HANG_S) == 0
        vm.stop()


def share(soak: Soak) -> None:
    """A directory both ways, and one that may only be read."""
    directory = soak.work / "shared"
    data = soak.rng.randbytes(1 << 20)
    (directory / "in").write_bytes(data)
    shares = (Share(directory, "/mnt/rw"), Share(directory, "/mnt/ro", read_only=True))
    with Machine(CONFIG, shares=shares) as vm:
        vm.run(["cp", "/mnt/ro/in", "/mnt/rw/out"], check=True)
        assert vm.run(["touch", "/mnt/ro/no"]).returncode
    assert (directory / "out").read_bytes() == data
    (directory / "out").unlink()


def disks(soak: Soak) -> None:
    """A disk that lasts, one that doesn't, one to read."""
    data = soak.rng.randbytes(1 << 20)
    for disk, lasts in ((Disk(soak.image), True), (Disk(soak.image, temporary=True), False)):
        with Machine(CONFIG, disks=(disk,)) as vm:
            vm.run(["dd", "of=/dev/vda", "bs=64k", "conv=fsync"], input=data, check=True)
            read = vm.run(["head", "-c", str(len(data)), "/dev/vda"], check=True)
            assert read.stdout == data
        with soak.image.open("r+b") as image:
            assert (image.read(len(data)) == data) == lasts
            image.seek(0)
            image.write(bytes(len(data)))


def network(soak: Soak) -> None:
    """A guest on the user's network, with a connection to the host if the host has an address, and one the other way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.255", 9))  # sends nothing
            address = probe.getsockname()[0]
        except OSError:
            address = "127.0.0.1"
    with Machine(CONFIG, network="user") as vm:
        assert b"10.0.2.15" in vm.run(["ip", "addr"], check=True).stdout
        if not address.startswith("127."):
            with socket.create_server((address, 0)) as server:
                server.settimeout(HANG_S)
                process = vm.popen(["nc", address, str(server.getsockname()[1])], stdin=PIPE, stdout=PIPE)
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"hello\n")
                assert process.stdout is not None and process.stdin is not None
                assert process.stdout.read() == b"hello\n"
                process.stdin.close()
                process.wait(HANG_S)
        vm.run(
            ["sh", "-c", "mkdir /tmp/w && echo page > /tmp/w/p && httpd -p 127.0.0.1:80 -h /tmp/w"],
            check=True,
        )
        with vm.forward(80) as forward, socket.create_connection(("127.0.0.1", forward.port)) as client:
            client.sendall(b"GET /p HTTP/1.0\r\n\r\n")
            client.settimeout(HANG_S)
            answer = b""
            while data := client.recv(65536):
                answer += data
            assert answer.endswith(b"page\n"), answer


def bulk(soak: Soak) -> None:
    """Bytes through a command, and files in and out."""
    data = soak.rng.randbytes(BULK_BYTES)
    with Machine(CONFIG) as vm:
        assert vm.run(["cat"], input=data, check=True).stdout == data
        vm.files.write_bytes("/tmp/f", data)
        total = vm.run(["sha256sum", "/tmp/f"], text=True, check=True).stdout.split()[0]
        assert total == hashlib.sha256(data).hexdigest()
        assert vm.files.read_bytes("/tmp/f") == data


def detached(soak: Soak) -> None:
    """A machine that outlives its `Machine`, found by its name by Python and by the command line."""
    with Machine(CONFIG, detached=True) as vm:
        vm.wait_ready()
        name = vm.name
    with Machine.attach(name) as vm:
        assert vm.run(["echo", "there"], check=True).stdout == b"there\n"
    done = subprocess.run([*CLI, "exec", name, "--", "sh", "-c", "exit 5"], timeout=HANG_S)
    assert done.returncode == 5
    if soak.rng.random() < 0.5:
        with Machine.attach(name) as vm:
            vm.stop()
    subprocess.run(
        [*CLI, "stop", name], check=False, capture_output=True, timeout=HANG_S
    )  # its directory too


def killed(soak: Soak) -> None:
    """The VM process dies at any moment, while booting or in the middle of a command."""
    with Machine(CONFIG) as vm:
        delay_s = soak.rng.choice((0.0, 0.2, 1.0))
        timer = threading.Timer(delay_s, os.kill, (vm.pid, signal.SIGKILL))
        timer.start()
        try:
            vm.run(["sleep", "100"])
        except KvmkitError:
            pass
        else:
            raise AssertionError("a command outlived its machine")
        finally:
            timer.join()


def interrupted(soak: Soak) -> None:
    """Ctrl-C in ``kvmkit run``, at any moment or with a command running."""
    command = [*CLI, "run", "--memory", "128M", "--", "sh", "-c", "echo up; sleep 100"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if soak.rng.random() < 0.5:
            assert process.stdout.readline() == b"up\n", process.stderr.read()
        else:
            time.sleep(0.7 + soak.rng.random())
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_S)
        assert process.returncode == -signal.SIGINT, (process.returncode, errors)


def timeouts(soak: Soak) -> None:
    """Of a command, of the start, and of ``kvmkit run``."""
    with Machine(CONFIG) as vm:
        try:
            vm.run(["sleep", "100"], timeout_s=0.2)
        except CommandTimeout:
            pass
        else:
            raise AssertionError("no timeout")
        vm.run(["true"], check=True)
    vm = Machine(CONFIG)
    try:
        vm.start(0.01)
    except (VmTimeout, VmError):
        pass
    finally:
        vm.close()
    done = subprocess.run(
        [*CLI, "run", "--timeout", "0.8", "--", "sleep", "100"], capture_output=True, timeout=HANG_S
    )
    assert done.returncode == 124, done


def command_line(soak: Soak) -> None:
    """``kvmkit run`` with both streams and a status."""
    command = [*CLI, "run", "--", "sh", "-c", "cat; echo err >&2; exit 7"]
    done = subprocess.run(command, input=b"in", capture_output=True, timeout=HANG_S)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in", b"err\n"), done


USES: dict[str, Callable[[Soak], None]] = {
    use.__name__: use
    for use in (busy, share, disks, network, bulk, detached, killed, interrupted, timeouts, command_line)
}


def main() -> int:
    """Soak; the exit status is 0 if nothing failed and nothing grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="how long (default 40); at least two rounds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=list(USES), help="use machines in this way; may be repeated"
    )
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there")
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's job in the background ignores it, as its children do
    # glibc keeps up to 32 MiB for later once such a block was freed, unless the threshold is fixed: that isn't growth.
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    uses = args.only or list(USES)
    failures: list[str] = []
    record = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open throughout; a list would grow
    used = 0
    soak = Soak(args.seed)
    start = time.monotonic()
    baseline: dict[str, int] = {}
    rounds = 0
    while time.monotonic() < start + 60 * args.minutes or rounds < 3:
        for name in soak.rng.sample(uses, len(uses)):
            began = time.monotonic()
            try:
                USES[name](soak)
                soak.touch_idle()
            except Exception:
                failures.append(f"{name}: {traceback.format_exc()}")
                print(failures[-1], file=sys.stderr)
            took_s = time.monotonic() - began
            left = soak.leftovers([soak.eldest, soak.other])
            now = own_footprint()
            sample = {"s": time.monotonic() - start, "use": name, "took_s": took_s, "client": now}
            sample |= {"eldest": footprint(soak.eldest.pid), "left": left}
            print(json.dumps(sample), file=record)
            used += 1
            if left:
                failures.append(f"{name} left {left}")
            if baseline and (grown := [key for key in ("fds", "threads") if now[key] > baseline[key]]):
                failures.append(f"{name}: the client's {grown} grew: {baseline} → {now}")
            if left or (baseline and grown):
                print(failures[-1], file=sys.stderr)
            if sys.stderr.isatty():
                print(f"\r{used} machines used, {len(failures)} failures", end="", file=sys.stderr)
        rounds += 1
        baseline = baseline or own_footprint()
    seconds = time.monotonic() - start
    record.seek(0)
    samples: list[dict[str, Any]] = [json.loads(line) for line in record]
    times = {name: [sample["took_s"] for sample in samples if sample["use"] == name] for name in uses}
    second, final = samples[len(uses) : 2 * len(uses)], samples[-len(uses) :]
    settled, last = second[-1], samples[-1]
    before_kib, after_kib = (max(sample["client"]["rss_kib"] for sample in part) for part in (second, final))
    if after_kib > before_kib + GROWTH_KIB:
        failures.append(
            f"the client's memory grew: at most {before_kib} KiB in the second round, then {after_kib}"
        )
    for key in ("fds", "threads"):
        if last["eldest"][key] > settled["eldest"][key]:
            failures.append(f"the oldest machine's {key} grew: {settled['eldest']} → {last['eldest']}")
    try:
        soak.close()
    except Exception:
        failures.append(f"the end: {traceback.format_exc()}")

    print(f"{'use':14}{'times':>7}{'median':>9}{'worst':>9}")
    for name, values in times.items():
        print(f"{name:14}{len(values):>7}{statistics.median(values):>8.1f}s{max(values):>8.1f}s")
    print(f"\n{'':14}{'after 2 rounds':>16}{'halfway':>10}{'at the end':>12}")
    for who in ("client", "eldest"):
        for key in last[who]:
            middle = samples[len(samples) // 2][who][key]
            print(f"{who} {key:<16}{settled[who][key]:>7}{middle:>10}{last[who][key]:>12}")
    print(f"client rss_kib at most: {before_kib} in the second round, {after_kib} in the last")
    print(f"\n{len(samples)} uses in {seconds / 60:.1f} minutes, {len(failures)} failures")
    for failure in failures:
        print(f"FAILED {failure}")
    if args.json:
        result = {"seconds": seconds, "samples": samples, "failures": failures}
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
