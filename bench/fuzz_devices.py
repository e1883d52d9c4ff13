"""Feed every virtio device mutated chains, and see that the host is untouched.

    python bench/fuzz_devices.py [--chains 1000000] [--device blk …] [--seed 0] [--json FILE]
    python bench/fuzz_devices.py --device blk --only SEED      one seed, in this process (under a debugger, say)

Each seed makes a device of some kind (`kvmkit.testing.fuzz.targets`) in an empty directory, has it take some thousand chains and
looks what became of the files, directories and sockets beside it. Requests are nearly right; now and then the rings are
nonsense that changes while the device reads it. Devices run in one worker process each, with limits of address space and file
size, as nobody if root starts it. What counts as a failure: any exception of a device but that the guest broke its queue, a worker that dies or hangs, a host
that has changed, a device that doesn't work after a reset, more descriptors or threads than at first, memory that grows.

A failing seed is printed; the exit status is 1 if there was one. The worker's successor goes on with the next seed.
"""

import argparse
import collections
import faulthandler
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvmkit.testing.fuzz import targets

HANG_S = 120.0
"""A worker that says nothing for so long hangs; a seed takes a few seconds."""
CHAINS_PER_SEED = 4000
ADDRESS_SPACE_BYTES = 4 << 30
FILE_BYTES = 64 << 20
GROWTH_KIB = 32 << 10
"""By how much a worker's resident memory may grow after its first seeds."""
_WARM_UP = 4
NOBODY = 65534


def footprint() -> dict[str, int]:
    """What this process holds."""
    rss = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert rss is not None
    return {
        "rss_kib": int(rss[1]),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def run(device: str, seed: int) -> targets.Outcome:
    """Run one seed in an empty directory."""
    with tempfile.TemporaryDirectory(prefix="kvmkit-fuzz-") as directory:
        try:
            return targets.run(device, seed, CHAINS_PER_SEED, Path(directory))
        finally:
            for path in Path(directory).rglob(
                "*"
            ):  # the guest may have made directories that can't be entered
                if not path.is_symlink() and path.is_dir():
                    path.chmod(0o700)


def prepare() -> None:
    """Limit this process, and have threads switch often. Root gives up its rights: a device may be as broken as it gets."""
    if not os.geteuid():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    faulthandler.enable()  # SIGABRT too
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setswitchinterval(1e-4)


def work(device: str, first: int) -> None:
    """Be a worker: a line of JSON before and after each seed, until killed."""
    prepare()
    seed = first
    while True:
        print(json.dumps({"start": seed}), flush=True)
        try:
            report: dict[str, Any] = asdict(run(device, seed))
        except BaseException:
            report = {"failure": traceback.format_exc()}
        print(json.dumps(report | {"seed": seed, "footprint": footprint()}), flush=True)
        seed += 1


class Device:
    """What came of one device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.chains = self.seeds = self.resets = 0
        self.seconds = 0.0
        self.errors: collections.Counter[str] = collections.Counter()
        self.failures: list[dict[str, Any]] = []
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}

    def fuzz(self, chains: int, seed: int) -> None:
        """Have workers feed it `chains` chains."""
        start = time.monotonic()
        while self.chains < chains and len(self.failures) < 5:
            seed = self._worker(chains, seed)
        self.seconds = time.monotonic() - start

    def _worker(self, chains: int, seed: int) -> int:
        """Run a worker from `seed` on until all is done or it dies; returns the seed to go on with."""
        command = [sys.executable, __file__, "--worker", self.name, "--seed", str(seed)]
        self.first = {}
        with (
            tempfile.TemporaryFile("w+") as errors,
            tempfile.TemporaryDirectory(prefix="kvmkit-fuzz-", ignore_cleanup_errors=True) as directory,
        ):
            os.chmod(directory, 0o777 if not os.geteuid() else 0o700)  # root's workers are nobody
            worker = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"TMPDIR": directory},
            )
            assert worker.stdout is not None
            done = False
            while not done:
                timer = threading.Timer(HANG_S, worker.send_signal, (signal.SIGABRT,))
                timer.start()
                line = worker.stdout.readline()
                timer.cancel()
                if not line:
                    break
                report = json.loads(line)
                if "start" in report:
                    seed = report["start"]
                    continue
                self._take(report)
                done = self.chains >= chains or "failure" in report
            worker.kill()
            worker.wait()
            worker.stdout.close()
            if not done:
                errors.seek(0)
                text = f"the worker died or said nothing for {HANG_S:g} s\n{errors.read()[-4000:]}"
                self._fail({"seed": seed, "failure": text})
        return seed + 1

    def _take(self, report: dict[str, Any]) -> None:
        if "failure" in report:
            self._fail(report)
            return
        self.seeds += 1
        self.chains += report["chains"]
        self.resets += report["resets"]
        self.errors.update(report["errors"])
        self.last = report["footprint"]
        if self.seeds == 1 or not self.first:
            self.first = self.last
            self._taken = 0
        self._taken += 1
        if self._taken == _WARM_UP:
            self.first["rss_kib"] = self.last["rss_kib"]
        grown = [key for key in ("fds", "threads") if self.last[key] > self.first[key]]
        if self._taken > _WARM_UP and self.last["rss_kib"] > self.first["rss_kib"] + GROWTH_KIB:
            grown.append("rss_kib")
        if grown:
            self._fail({"seed": report["seed"], "failure": f"{grown} grew: {self.first} → {self.last}"})
        if sys.stderr.isatty():
            print(f"\r{self.name}: {self.chains} chains", end="", file=sys.stderr, flush=True)

    def _fail(self, report: dict[str, Any]) -> None:
        self.failures.append(report)
        print(f"\n{self.name}, seed {report['seed']} FAILED: {report['failure'].strip()}", file=sys.stderr)
        print(f"again: python {__file__} --device {self.name} --only {report['seed']}", file=sys.stderr)


def main() -> int:
    """Fuzz; the exit status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=1_000_000, help="for each device (default 1000000)")
    parser.add_argument(
        "--device", action="append", choices=list(targets.TARGETS), help="this one; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one; the others follow")
    parser.add_argument("--json", metavar="FILE", help="write the counts there")
    parser.add_argument("--only", type=int, metavar="SEED", help="run this one here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.seed)
        return 0
    names = args.device or list(targets.TARGETS)
    if args.only is not None:
        prepare()
        for name in names:
            print(name, run(name, args.only))
        return 0
    devices = [Device(name) for name in names]
    print(
        f"{'device':9}{'chains':>10}{'seeds':>7}{'chains/s':>10}{'resets':>9}{'failures':>10}   RSS, descriptors, threads of the worker"
    )
    for device in devices:
        device.fuzz(args.chains, args.seed)
        print(
            f"{device.name:9}{device.chains:>10}{device.seeds:>7}{device.chains / device.seconds:>10.0f}"
            f"{device.resets:>9}{len(device.failures):>10}   "
            + ", ".join(f"{device.first.get(key)} → {last}" for key, last in device.last.items()),
            flush=True,
        )
    for device in devices:
        print(f"\nhow {device.name} was broken:")
        for kind, count in device.errors.most_common():
            print(f"{count:>9}  {kind}")
    if args.json:
        fields = ("chains", "seeds", "seconds", "resets", "errors", "failures", "first", "last")
        result = {device.name: {key: getattr(device, key) for key in fields} for device in devices}
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 1 if any(device.failures for device in devices) else 0


if __name__ == "__main__":
    sys.exit(main())
