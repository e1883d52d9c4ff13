"""Run hostile guests, and count how they end.

    python bench/hostile.py [--count 10000] [--seed 0] [--jobs 2] [--limit-ms 20] [--json FILE]
    python bench/hostile.py --only SEED      one of them, in this process (under a debugger, say)

Each guest is made of its seed (`kvmkit.testing.hostile`) and runs in a worker process. What counts as a failure: the worker
dies, the guest isn't back long after its time limit, memory beside the guest's has changed, or an exception came out.
A failing seed is printed; the exit status is 1 if there was one. Then a new worker goes on with the next seed.
"""

import argparse
import collections
import dataclasses
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import kvmkit.kvm
from kvmkit.testing import hostile

HANG_S = 60.0
"""A worker that says nothing for so long hangs."""


def work(seeds: range, limit_s: float) -> None:
    """Be a worker: a line of JSON before and after each guest."""
    arena = hostile.Arena()
    sys.setswitchinterval(0.0005)  # vCPUs wait for each other's Python
    with kvmkit.kvm.open("soft") as system:
        for seed in seeds:
            print(json.dumps({"start": seed}), flush=True)
            try:
                outcome = dataclasses.asdict(hostile.run(system, arena, seed, limit_s))
            except BaseException:
                outcome = {"seed": seed, "failure": traceback.format_exc()}
                arena = hostile.Arena()
            print(json.dumps(outcome), flush=True)


class Crew:
    """The workers and what they report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self.threads = [
            threading.Thread(target=self._supervise, args=(n,), daemon=True) for n in range(args.jobs)
        ]
        for thread in self.threads:
            thread.start()

    def _supervise(self, n: int) -> None:
        """Have every `jobs`-th seed run, by as many workers as it takes."""
        seeds = range(self.args.seed + n, self.args.seed + self.args.count, self.args.jobs)
        while seeds:
            current = self._worker(seeds)
            seeds = range(current + self.args.jobs, seeds.stop, seeds.step)

    def _worker(self, seeds: range) -> int:
        """Run a worker on `seeds` until it ends; returns the last seed that it took up."""
        command = [sys.executable, __file__, "--worker", f"{seeds.start},{seeds.stop},{seeds.step}"]
        command += ["--limit-ms", str(self.args.limit_ms)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert worker.stdout is not None and worker.stderr is not None
        hung = threading.Event()

        def abort() -> None:
            hung.set()
            worker.send_signal(signal.SIGKILL)

        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(worker.stderr or ()), daemon=True)
        reader.start()
        current, running = seeds.start, True
        timer = threading.Timer(HANG_S, abort)
        timer.start()
        for line in worker.stdout:
            timer.cancel()
            timer = threading.Timer(HANG_S, abort)
            timer.start()
            report = json.loads(line)
            if "start" in report:
                current, running = report["start"], True
            else:
                running = False
                self.reports.put(report)
        timer.cancel()
        status = worker.wait()
        reader.join()
        if running or status:
            what = f"no return within {HANG_S} s" if hung.is_set() else f"the worker died: status {status}"
            self.reports.put({"seed": current, "failure": f"{what}\n{''.join(errors[-20:])}"})
            return current
        return seeds[-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="how many guests")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed; the others follow")
    parser.add_argument("--jobs", type=int, default=2, help="workers at once")
    parser.add_argument("--limit-ms", type=float, default=20.0, help="how long a guest may run")
    parser.add_argument("--json", metavar="FILE", help="write the counts there")
    parser.add_argument("--only", type=int, metavar="SEED", help="run this one here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(range(*map(int, args.worker.split(","))), args.limit_ms / 1000)
        return 0
    if args.only is not None:
        with kvmkit.kvm.open("soft") as system:
            print(hostile.run(system, hostile.Arena(), args.only, args.limit_ms / 1000))
        return 0

    start = time.monotonic()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    messages: collections.Counter[str] = collections.Counter()
    processors: collections.Counter[int] = collections.Counter()
    failures: list[dict[str, Any]] = []
    exits = 0
    slowest = (0.0, 0)
    crew = Crew(args)
    for done in range(1, args.count + 1):
        report = crew.reports.get()
        if "failure" in report:
            failures.append(report)
            print(f"\nseed {report['seed']} FAILED: {report['failure'].strip()}", file=sys.stderr)
            print(f"again: python {__file__} --only {report['seed']}", file=sys.stderr)
        else:
            counts[report["kind"], report["end"]] += 1
            exits += report["exits"]
            processors[report["vcpus"]] += 1
            slowest = max(slowest, (report["seconds"], report["seed"]))
            if report["message"]:
                messages[re.sub(r"0x[0-9a-f]+|(?<![-\d])\d+", "N", report["message"])] += 1
        if done % 100 == 0 and sys.stderr.isatty():
            print(
                f"\r{done}/{args.count} guests, {len(failures)} failures", end="", file=sys.stderr, flush=True
            )
    seconds = time.monotonic() - start
    ends = sorted({end for _, end in counts})
    print(f"\n{'kind':<12}" + "".join(f"{end:>15}" for end in ends))
    for kind in hostile.KINDS:
        print(f"{kind:<12}" + "".join(f"{counts[kind, end]:>15}" for end in ends))
    print(f"{args.count} guests, {exits} exits, {len(failures)} failures, {seconds:.1f} s")
    print(", ".join(f"{number} with {n} vCPU{'s' * (n > 1)}" for n, number in sorted(processors.items())))
    print(f"the longest took {slowest[0] * 1000:.0f} ms (seed {slowest[1]})")
    for message, number in messages.most_common():
        print(f"{number:>6}  {message}")
    if args.json:
        with open(args.json, "w") as file:
            table = {kind: {end: counts[kind, end] for end in ends} for kind in hostile.KINDS}
            result = {
                "guests": args.count,
                "first_seed": args.seed,
                "seconds": seconds,
                "exits": exits,
                "by_vcpus": processors,
                "longest_s": slowest[0],
            }
            json.dump(
                {**result, "ends": table, "internal_errors": dict(messages), "failures": failures},
                file,
                indent=2,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
