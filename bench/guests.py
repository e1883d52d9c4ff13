"""Real software in a guest of the software engine, beside the same software run natively.

    python bench/guests.py [SUITE …] [--cpus N] [--only NAME …] [--json FILE]

Both sides run the same files: Debian's packages in an image that is built when it is needed first. Natively, that is the image
unpacked, in namespaces of its own and as an ordinary user, as in the guest.

  python   modules of CPython's own test suite: each test must end in the guest as it does natively
  jit      our programs for LuaJIT and node.js (programs/jit.*), with several options: the same checksums as natively

The exit status is 1 if something failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

from kvmkit.client import Machine, MachineConfig
from kvmkit.errors import CommandTimeout
from kvmkit.images import build
from kvmkit.images.store import Store

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

    def __init__(self, image: Path, cpus: int) -> None:
        self.config = MachineConfig(root=image, engine="soft", cpus=cpus, memory="2G")
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
    io itertools json largefile list long lzma marshal math memoryview mmap multiprocessing_fork os
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


def python_module(place: Place, module: str, matches: Sequence[str] = ()) -> tuple[Done, dict[str, str]]:
    """Run a module; each test's result: passed, skipped, failure or error."""
    place.write(REPORT, b"")
    options = [word for match in matches for word in ("-m", match)]
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
            if done.status != native.status and not (again and not differ):
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
        return "failed" if result in ("failure", "error") else result

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


SUITES: dict[str, Callable[[Suite], None]] = {"python": python, "jit": jit}


def main() -> None:
    """Run the sub-suites."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)} (default all)")
    parser.add_argument("--cpus", type=int, default=2, help="the guest's vCPUs (default 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these of a suite's parts")
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
            suite = Suite(native, image.path, args.cpus, args.only)
            SUITES[name](suite)
            results[name] = {"failures": suite.failures, **suite.results}
            failures += suite.failures
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    print(f"{len(failures)} failed" if failures else "all as natively")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
