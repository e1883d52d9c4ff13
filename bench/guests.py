"""Real software in a guest of the software engine, beside the same software run natively.

    python bench/guests.py [SUITE …] [--cpus N] [--count N] [--seconds S] [--only NAME …] [--json FILE]

Both sides run the same files: Debian's packages in an image that is built when it is needed first. Natively, that is the image
unpacked, in namespaces of its own and as an ordinary user, as in the guest.

  python   modules of CPython's own test suite: each test must end in the guest as it does natively
  jit      our programs for LuaJIT and node.js (programs/jit.*), with several options: the same checksums as natively
  openssl  digests, ciphers, MACs, KDFs and curves on fixed input: the same output as natively
  compat   a static i386 busybox at work, in 32-bit compatibility mode: the same output as natively
  crypto   the kernel's self-tests of all its algorithms, on CPUs of several feature levels
  modules  kernel modules loaded and unloaded, and kernel code patched, while other vCPUs run: 2 and 4 vCPUs, --count rounds
  stress   stress-ng --verify and hackbench, --seconds each, with 2 and with 8 vCPUs
  boots    --count boots in a row with 2, 4 and 8 vCPUs
  latency  of timers and inter-processor interrupts, and an idle guest's share of a core; busy host: run it beside a load

The exit status is 1 if something failed.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

from kvmkit.client import Machine, MachineConfig, Share
from kvmkit.errors import CommandTimeout
from kvmkit.images import build
from kvmkit.images.store import Store
from kvmkit.machine.debian import Apt, member
from kvmkit.machine.guest import CLOUD_KERNEL

IMAGE = "bench-guests"
PACKAGES = [
    "python3",
    "libpython3.11-testsuite",
    "luajit",
    "nodejs",
    "openssl",
    "stress-ng",
    "rt-tests",
    "kmod",
]
NOBODY = 65534
ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/usr/sbin"}
LIMIT_S = 1200.0
"""How long a program may take in the guest, on a busy host."""


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


# --- where programs run


@dataclass
class Done:
    """How a program ended; `status` is None if it took too long."""

    status: int | None
    output: str
    seconds: float


class Place(Protocol):
    """Somewhere to run the image's programs, as nobody."""

    def run(self, argv: Sequence[str], limit_s: float = LIMIT_S) -> Done: ...
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...


class Native:
    """The image unpacked, entered without root: a user namespace, a mount namespace, and the tree as its root."""

    # A user namespace can't be made in a chroot, but it can after pivot_root; the second one takes the mapped root's rights away.
    ENTER = f"""mount --rbind "$0" "$0" && cd "$0" && for d in dev proc sys; do mount --rbind /$d $d; done &&
        pivot_root . . && umount -l . && cd /tmp && exec unshare --map-user={NOBODY} --map-group={NOBODY} "$@" """

    def __init__(self, image: Path, directory: Path) -> None:
        self.tree = directory / "tree"
        self.tree.mkdir()
        say("unpacking the image")
        subprocess.run(
            ["debugfs", "-R", f"rdump / {self.tree}", image],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (self.tree / "tmp").chmod(0o1777)

    def run(self, argv: Sequence[str], limit_s: float = LIMIT_S) -> Done:
        start = time.monotonic()
        enter = ["unshare", "--map-root-user", "--mount", "sh", "-c", self.ENTER]
        process = subprocess.Popen(
            [*enter, str(self.tree), *argv],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None
        try:
            output, _ = process.communicate(timeout=limit_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = None
        return Done(status, output.decode(errors="replace"), time.monotonic() - start)

    def read(self, path: str) -> bytes:
        return (self.tree / path.lstrip("/")).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        (self.tree / path.lstrip("/")).write_bytes(data)


class Guest:
    """A guest with the image as its root; started again if it died."""

    def __init__(self, image: Path, cpus: int, *, shares: tuple[Share, ...] = (), cpu: str = "host") -> None:
        self.config = MachineConfig(root=image, engine="soft", cpus=cpus, memory="2G", shares=shares, cpu=cpu)
        self.machine = Machine(self.config)

    def __enter__(self) -> "Guest":
        self.machine.start()
        self.machine.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    def run(self, argv: Sequence[str], limit_s: float = LIMIT_S) -> Done:
        start = time.monotonic()
        words = ["sh", "-c", 'exec "$@" 2>&1', "sh", *argv]
        try:
            done = self.machine.run(
                words, env=ENVIRONMENT, clear_env=True, cwd="/tmp", user=NOBODY, timeout_s=limit_s
            )
        except CommandTimeout as error:
            return Done(None, str(error), time.monotonic() - start)
        return Done(done.returncode, done.stdout.decode(errors="replace"), time.monotonic() - start)

    def read(self, path: str) -> bytes:
        return self.machine.files.read_bytes(path)

    def write(self, path: str, data: bytes) -> None:
        self.machine.files.write_bytes(path, data)


@dataclass
class Suite:
    """What all sub-suites get, and what they found."""

    native: Native
    image: Path
    cpus: int
    only: Sequence[str]
    count: int
    seconds: float
    failures: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self.only or name in self.only]

    def fail(self, text: str) -> None:
        print(f"FAILED  {text}", flush=True)
        self.failures.append(text)


# --- CPython's own tests

MODULES = """
    array ast asyncio bigmem binascii builtin bytes bz2 cmath codecs collections complex ctypes datetime
    decimal descr dict eintr epoll fcntl file float fork1 fractions functools gc generators hashlib int
    io itertools json list long lzma marshal math memoryview mmap multiprocessing_fork os
    pathlib pickle poll posix pty queue random re resource select selectors set shutil signal socket ssl
    statistics strtod struct subprocess tempfile thread threadedtempfile threading threadsignals time
    timeout tuple unicode unicodedata wait3 wait4 weakref zipfile zlib
"""
PARTS = {
    "test_multiprocessing_fork": [
        f"WithProcessesTest{name}"
        for name in ("Queue", "Lock", "Semaphore", "Condition", "Value", "Connection", "SharedMemory")
    ]
}
"""Which classes to run of modules that take too long."""
ATTEMPTS = 3
"""A test that fails may do so for want of time: it fails if it does so this many times in a row."""
REPORT = "/tmp/report.xml"
FAILED = ("failure", "error")


def python_module(place: Place, module: str, matches: Sequence[str] = ()) -> tuple[Done, dict[str, str]]:
    """Run a module; each test's result: passed, skipped, failure or error."""
    place.write(REPORT, b"")
    options = [
        "-i",
        "*VSOCK*",
    ]  # which waits for ever, if the machine is a guest itself and its host has no answer
    options += [word for match in matches for word in ("-m", match)]
    done = place.run(
        ["python3", "-m", "test", "--timeout", str(LIMIT_S), "--junit-xml", REPORT, *options, module]
    )
    report = place.read(REPORT)
    results: dict[str, str] = {}
    for case in ElementTree.fromstring(report).iter("testcase") if report else ():
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        results[case.get("name", "")] = kinds.pop() if kinds else "passed"
    return done, results


def python(suite: Suite) -> None:
    """Run the modules on both sides and compare test by test."""
    modules = suite.wanted([f"test_{name}" for name in MODULES.split()])
    totals = {"passed": 0, "skipped": 0, "differ": 0}
    seconds = {"native": 0.0, "guest": 0.0}
    with Guest(suite.image, suite.cpus) as guest:
        guest.machine.run(["install", "-m", "666", "/dev/null", REPORT], check=True)
        for number, module in enumerate(modules, 1):
            say(f"{module}: {number} of {len(modules)}   ", "\r")
            native, expected = python_module(suite.native, module, PARTS.get(module, ()))
            done, found = python_module(guest, module, PARTS.get(module, ()))
            seconds["native"] += native.seconds
            seconds["guest"] += done.seconds
            again = 0
            while expected and found and different(expected, found) and again < ATTEMPTS - 1:
                again += 1
                names = different(expected, found)
                expected |= python_module(suite.native, module, names)[1]
                found |= python_module(guest, module, names)[1]
            differ: dict[str, tuple[Any, Any]] = {}
            if expected and found:  # else one of them has no report: it was ended, and its status tells
                differ |= {name: (expected.get(name), found.get(name)) for name in different(expected, found)}
            natively_only = [
                name for name, (ours, theirs) in differ.items() if ours in FAILED and theirs not in FAILED
            ]
            for name in natively_only:  # of the namespaces there, or the load
                say(f"{name}: {differ.pop(name)[0]} natively only")
            if done.status not in (0, native.status) and not (again and not differ):
                differ[f"{module}: status"] = (native.status, done.status)
            passed = sum(1 for result in found.values() if result == "passed")
            skipped = sum(1 for result in found.values() if result == "skipped")
            totals["passed"] += passed
            totals["skipped"] += skipped
            totals["differ"] += len(differ)
            print(
                f"{module:28} {passed:6} passed, {skipped:4} skipped, {len(found) - passed - skipped:3} failed natively too"
                f" {native.seconds:7.1f} s native {done.seconds:7.1f} s guest"
                + (f", {again} more attempts" if again else ""),
                flush=True,
            )
            for name, (ours, theirs) in differ.items():
                suite.fail(f"{name}: {ours} natively, {theirs} in the guest")
            if differ:
                print(done.output[-6000:], flush=True)
            suite.results[module] = {
                "passed": passed,
                "skipped": skipped,
                "differ": differ,
                "failed_natively_only": natively_only,
                "attempts": again + 1,
                "native_s": native.seconds,
                "guest_s": done.seconds,
            }
    print(
        f"{len(modules)} modules: {totals['passed']} tests passed, {totals['skipped']} were skipped, {totals['differ']} differ;"
        f" {seconds['native']:.0f} s natively, {seconds['guest']:.0f} s in the guest"
    )


def different(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Tests that end otherwise, but for those that only fail in another way."""

    def plain(result: str | None) -> str | None:
        return "failed" if result in FAILED else result

    names = sorted(expected.keys() | found.keys())
    return [name for name in names if plain(expected.get(name)) != plain(found.get(name))]


# --- JIT compilers

PROGRAMS = Path(__file__).with_name("programs")
LUAJIT_OPTIONS = (["-jon"], ["-joff"], ["-O1"], ["-Ohotloop=2,hotexit=2"])
NODE_OPTIONS: Sequence[list[str]] = (
    [],
    ["--no-opt"],
    ["--always-sparkplug"],
    ["--jitless"],
    ["--gc-interval=500"],
)


def jit(suite: Suite) -> None:
    """Run the programs with each set of options: every part's checksum must be the same, everywhere."""
    commands = [["luajit", *options, "/tmp/jit.lua"] for options in LUAJIT_OPTIONS]
    commands += [["node", *options, "/tmp/jit.js"] for options in NODE_OPTIONS]
    with Guest(suite.image, suite.cpus) as guest:
        for program in ("jit.lua", "jit.js"):
            for place in (suite.native, guest):
                place.write(f"/tmp/{program}", (PROGRAMS / program).read_bytes())
        references: dict[str, dict[str, str]] = {}
        for argv in commands:
            title = " ".join(argv[:-1])
            if not suite.wanted([argv[0]]):
                continue
            say(f"{title}   ", "\r")
            native, done = suite.native.run(argv), guest.run(argv)
            expected, found = checksums(native), checksums(done)
            reference = references.setdefault(argv[0], expected)
            for part in reference.keys() & expected.keys():
                if reference[part] != expected[part]:
                    suite.fail(
                        f"{title}: {part}: {expected[part]} natively, {reference[part]} without the option"
                    )
            for part in sorted(expected.keys() | found.keys()):
                if expected.get(part) != found.get(part):
                    suite.fail(
                        f"{title}: {part}: {expected.get(part)} natively, {found.get(part)} in the guest"
                    )
            if native.status != 0 or done.status != 0:
                suite.fail(
                    f"{title}: status {native.status} natively, {done.status} in the guest\n{done.output[-3000:]}"
                )
            print(
                f"{title:36} {len(found):3} parts {native.seconds:7.1f} s native {done.seconds:7.1f} s guest",
                flush=True,
            )
            suite.results[title] = {"parts": found, "native_s": native.seconds, "guest_s": done.seconds}


def checksums(done: Done) -> dict[str, str]:
    """The lines that the programs print: a part's name and its checksum."""
    return dict(re.findall(r"^(\w+)\s+(\S.*)$", done.output, re.MULTILINE))


# --- the kernel's modules, its own patching and its crypto's self-tests

MODULES_LOADED = "crc32c_intel libcrc32c xor dm_mod loop nf_conntrack nf_tables"
BAD = re.compile(
    r"BUG:|kernel BUG|WARNING:|Oops|Call Trace|protection fault|unable to handle|rcu.*stall|soft lockup"
)
"""What the kernel's log may not have."""


def kernel_modules(directory: Path) -> Share:
    """All modules of the default kernel, as a share."""
    with Apt(Path(tempfile.mkdtemp(dir=directory)), say) as apt:
        deb, _, _ = apt.download(CLOUD_KERNEL)
        tree = directory / "kernel"
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    return Share(tree / "lib" / "modules", "/lib/modules")


def check_log(suite: Suite, guest: Guest, title: str) -> str:
    """The kernel's log; what must not be in it is a failure."""
    log = guest.machine.run(["dmesg"], text=True, check=True).stdout
    for line in log.splitlines():
        if BAD.search(line):
            suite.fail(f"{title}: the kernel says: {line}")
    return log


def modules(suite: Suite) -> None:
    """Load and unload modules while other CPUs run and code is patched, with 2 and 4 vCPUs."""
    with tempfile.TemporaryDirectory() as directory:
        share = kernel_modules(Path(directory))
        for cpus in (2, 4):
            with Guest(suite.image, cpus, shares=(share,)) as guest:
                guest.machine.run(["depmod"], check=True)
                guest.write("/tmp/modules.sh", (PROGRAMS / "modules.sh").read_bytes())
                say(f"{suite.count} rounds, {cpus} vCPUs   ", "\r")
                start = time.monotonic()
                argv = ["sh", "/tmp/modules.sh", str(suite.count), *MODULES_LOADED.split()]
                done = guest.machine.run(argv, text=True)
                seconds = time.monotonic() - start
                if done.returncode:
                    suite.fail(f"modules, {cpus} vCPUs: status {done.returncode}: {done.stderr[-2000:]}")
                check_log(suite, guest, f"modules, {cpus} vCPUs")
                print(
                    f"{cpus} vCPUs, {suite.count} rounds: {done.stdout.strip()}; {seconds:.0f} s", flush=True
                )
                suite.results[f"{cpus} vCPUs"] = {"rounds": suite.count, "seconds": seconds}


def kernel_crypto(suite: Suite) -> None:
    """The kernel tests every algorithm that registers: load all there are, on CPUs of several feature levels."""
    with tempfile.TemporaryDirectory() as directory:
        share = kernel_modules(Path(directory))
        load = """depmod && cd /lib/modules/*/kernel && for file in crypto/*.ko arch/x86/crypto/*.ko; do
            name=${file##*/} && [ $name = tcrypt.ko ] || modprobe ${name%.ko} 2>/dev/null || true; done
            modprobe tcrypt 2>&1; cat /proc/crypto"""
        for cpu in suite.wanted(["x86-64-v2", "x86-64-v3", "x86-64-v4", "host"]):
            with Guest(suite.image, suite.cpus, shares=(share,), cpu=cpu) as guest:
                say(f"{cpu}   ", "\r")
                start = time.monotonic()
                text = guest.machine.run(["sh", "-c", load], text=True, check=True).stdout
                seconds = time.monotonic() - start
                log = check_log(suite, guest, f"crypto, {cpu}")
                drivers = dict(
                    re.findall(r"^driver +: (.*)\n(?:.+\n)*?selftest +: (.*)$", text, re.MULTILINE)
                )
                for (
                    line
                ) in log.splitlines():  # tcrypt also asks for algorithms that the kernel doesn't have: ENOENT
                    if re.search(r"alg: .*(fail|mismatch|unexpected|wrong)", line) and not re.search(
                        r"-2\)?$", line
                    ):
                        suite.fail(f"crypto, {cpu}: {line}")
                for driver, result in drivers.items():
                    if result != "passed":
                        suite.fail(f"crypto, {cpu}: {driver}: {result}")
                print(
                    f"{cpu:12} {len(drivers)} implementations passed their self-tests, {seconds:.0f} s",
                    flush=True,
                )
                suite.results[cpu] = drivers


# --- openssl


def openssl(suite: Suite) -> None:
    """Every digest, cipher, MAC, KDF and curve of openssl on fixed input: the same output as natively."""
    data = random.Random(0).randbytes(100_003)
    with Guest(suite.image, suite.cpus) as guest:
        for place in (suite.native, guest):
            place.write("/tmp/openssl.sh", (PROGRAMS / "openssl.sh").read_bytes())
            place.write("/tmp/data", data)
        native, done = (place.run(["sh", "/tmp/openssl.sh"]) for place in (suite.native, guest))
    expected, found = native.output.splitlines(), done.output.splitlines()
    differ = [(a, b) for a, b in zip_longest(expected, found) if a != b]
    for ours, theirs in differ:
        suite.fail(f"openssl: {ours!r} natively, {theirs!r} in the guest")
    if native.status != 0 or done.status != 0:
        suite.fail(
            f"openssl: status {native.status} natively, {done.status} in the guest: {done.output[-2000:]}"
        )
    print(
        f"{len(found)} results, {len(differ)} differ; {native.seconds:.1f} s native, {done.seconds:.1f} s guest"
    )
    suite.results = {"results": len(found), "native_s": native.seconds, "guest_s": done.seconds}


def compat(suite: Suite) -> None:
    """Debian's i386 busybox: pipes, hashes, compression, a shell that counts, forks and takes signals."""
    with tempfile.TemporaryDirectory() as directory, Apt(Path(directory, "apt"), say, "i386") as apt:
        Path(directory, "apt").mkdir()
        deb, _, version = apt.download("busybox-static")
        busybox = member(deb, re.compile(r"(\./)?bin/busybox"))
    with Guest(suite.image, suite.cpus) as guest:
        for place in (suite.native, guest):
            place.write("/tmp/compat.sh", (PROGRAMS / "compat.sh").read_bytes())
            place.write("/tmp/busybox", busybox)
        native, done = (
            place.run(["sh", "/tmp/compat.sh", "/tmp/busybox"]) for place in (suite.native, guest)
        )
    if native.status != 0 or (done.status, done.output) != (0, native.output):
        suite.fail(
            f"compat: {native.status}, {native.output!r} natively, {done.status}, {done.output!r} in the guest"
        )
    count = len(done.output.splitlines())
    print(
        f"busybox {version}, i386: {count} lines; {native.seconds:.1f} s native, {done.seconds:.1f} s guest"
    )
    suite.results = {"lines": count, "native_s": native.seconds, "guest_s": done.seconds}


# --- many vCPUs


def stress(suite: Suite) -> None:
    """stress-ng and hackbench, with 2 and with 8 vCPUs."""
    stressors = ["cpu", "vm", "futex", "mmap", "mutex", "tlb-shootdown", "sigsegv"]
    ng = [
        "stress-ng",
        "--verify",
        "--timeout",
        f"{suite.seconds:.0f}",
        "--vm-bytes",
        "256M",
        "--metrics-brief",
    ]
    for name in stressors:
        ng += [f"--{name}", "1"]
    hackbench = """end=$(($(date +%s) + $0)); runs=0
        while [ $(date +%s) -lt $end ]; do hackbench $1 -g 4 -l 100 >/dev/null || exit; runs=$((runs + 1)); done; echo $runs runs"""
    for cpus in (2, 8):
        commands = {
            "stress-ng": ng,
            "hackbench": ["sh", "-c", hackbench, f"{suite.seconds / 2:.0f}", "-P"],
            "hackbench -T": ["sh", "-c", hackbench, f"{suite.seconds / 2:.0f}", "-T"],
        }
        with Guest(suite.image, cpus) as guest:
            for name in suite.wanted(list(commands)):
                say(f"{name}, {cpus} vCPUs   ", "\r")
                done = guest.run(commands[name], suite.seconds * 10 + LIMIT_S)
                if done.status != 0:
                    suite.fail(f"{name}, {cpus} vCPUs: status {done.status}: {done.output[-3000:]}")
                print(
                    f"{cpus} vCPUs  {name}: {done.seconds:.0f} s, {done.output.strip().splitlines()[-1]}",
                    flush=True,
                )
                suite.results[f"{name}, {cpus} vCPUs"] = {"seconds": done.seconds, "output": done.output}
            check_log(suite, guest, f"stress, {cpus} vCPUs")


def boots(suite: Suite) -> None:
    """Boots in a row with 2, 4 and 8 vCPUs."""
    times: dict[int, list[float]] = {2: [], 4: [], 8: []}
    for number in range(suite.count):
        cpus = (2, 4, 8)[number % 3]
        say(f"boot {number + 1} of {suite.count}   ", "\r")
        start = time.monotonic()
        try:
            with Machine(MachineConfig(engine="soft", cpus=cpus)) as machine:
                output = machine.run(["nproc"], text=True, check=True, timeout_s=LIMIT_S).stdout
                if output != f"{cpus}\n":
                    raise RuntimeError(f"nproc says {output!r}")
                machine.stop()
        except Exception as error:
            suite.fail(f"boot {number}, {cpus} vCPUs: {error}")
        times[cpus].append(time.monotonic() - start)
    for cpus, seconds in times.items():
        print(
            f"{cpus} vCPUs: {len(seconds)} boots, median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"
        )
    suite.results = {str(cpus): seconds for cpus, seconds in times.items()}


# --- latency


def latency(suite: Suite) -> None:
    """Distributions of timers' and IPIs' latency in the guest, and what an idle guest takes of a core. No failure but idleness."""
    count = 10_000
    timers = ["cyclictest", "-m", "-t1", "-p80", "-i1000", f"-l{count}", "-v"]
    rows: dict[str, list[float]] = {}
    with Guest(suite.image, 2) as guest:
        guest.write("/tmp/ipi.lua", (PROGRAMS / "ipi.lua").read_bytes())
        say("timer   ", "\r")
        text = guest.machine.run(timers, text=True, check=True).stdout
        rows["timer"] = [float(us) for us in re.findall(r"^ *0: *\d+: *(\d+)", text, re.MULTILINE)]
        for mode, title in (("busy", "IPI and answer, running vCPU"), ("halted", "wake-up of a halted vCPU")):
            say(f"{title}   ", "\r")
            before = function_calls(guest)
            text = guest.machine.run(
                ["luajit", "/tmp/ipi.lua", mode, str(count)], text=True, check=True
            ).stdout
            rows[title] = [float(ns) / 1e3 for ns in text.split()]
            # Fewer than `count`, if the other CPU was elsewhere when the host preempted it.
            suite.results[f"{title}: interrupts"] = function_calls(guest) - before
        say("idle   ", "\r")
        time.sleep(5)
        start_s = cpu_s(guest.machine.pid)
        time.sleep(30)
        idle = (cpu_s(guest.machine.pid) - start_s) / 30
    print(f"load of the host {os.getloadavg()[0]:.1f}")
    for title, us in rows.items():
        ordered = sorted(us)
        p50, p99 = (ordered[int(len(ordered) * part)] for part in (0.5, 0.99))
        print(f"{title:30} p50 {p50:8.1f}  p99 {p99:8.1f}  max {ordered[-1]:8.1f} µs   ({len(us)} of them)")
        if title != "timer":
            print(f"    with {suite.results[title + ': interrupts']} function call interrupts")
        suite.results[title] = {"p50_us": p50, "p99_us": p99, "max_us": ordered[-1]}
    print(f"an idle guest takes {idle:.2%} of a core")
    suite.results["idle_share"] = idle
    if idle >= 0.02:
        suite.fail(f"an idle guest takes {idle:.2%} of a core")


def function_calls(guest: Guest) -> int:
    """How many function call interrupts the guest's CPUs had."""
    words = guest.machine.run(["grep", "CAL:", "/proc/interrupts"], text=True, check=True).stdout.split()
    return sum(int(word) for word in words if word.isdigit())


def cpu_s(pid: int | None) -> float:
    """A process's CPU time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


SUITES: dict[str, Callable[[Suite], None]] = {
    "python": python,
    "jit": jit,
    "openssl": openssl,
    "compat": compat,
    "crypto": kernel_crypto,
    "modules": modules,
    "stress": stress,
    "boots": boots,
    "latency": latency,
}


def main() -> None:
    """Run the sub-suites."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)} (default all)")
    parser.add_argument("--cpus", type=int, default=2, help="the guest's vCPUs (default 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these of a suite's parts")
    parser.add_argument("--count", type=int, default=200, help="rounds or boots (default 200)")
    parser.add_argument(
        "--seconds", type=float, default=120, help="how long each kind of stress lasts (default 120)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    if unknown := set(args.suite) - set(SUITES):
        parser.error(f"no suite {', '.join(unknown)}: there are {', '.join(SUITES)}")
    image = Store().find(IMAGE) or build("debian:bookworm", PACKAGES, IMAGE, progress=say)
    results: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        native = Native(image.path, Path(directory))
        for name in args.suite or SUITES:
            print(f"== {name}", flush=True)
            suite = Suite(native, image.path, args.cpus, args.only, args.count, args.seconds)
            SUITES[name](suite)
            results[name] = {"failures": suite.failures, **suite.results}
            failures += suite.failures
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    print(f"{len(failures)} failed" if failures else "all as natively")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
