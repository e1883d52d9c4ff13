"""What an exit costs: a guest in an endless loop of port or memory-mapped accesses, each served in Python.

On each engine that works here, and for /dev/kvm beside a loop in C (`exits.c`) that serves the same guest. A repetition measures
all of them one after another, each in what it does to serve one exit:

    C          the loop in C: KVM_RUN, a switch, the data copied
    call       the bare call in Python that runs the guest: ioctl(2), or the software engine's
    run        `Vcpu.run`: the same, and what it returns as an object
    serve      the whole: `run`, ``match`` over the exit, the data read or written

so that the differences are what each layer costs. Of these the processor time is taken: it is the time that passes on a host
with nothing else to do, and all that can be compared on another. And the latency of `Vcpu.kick` to a vCPU that computes: from the call on one
thread to the time at which `Vcpu.run` has returned on the other.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from fcntl import ioctl
from functools import partial
from pathlib import Path

import kvmkit.kvm
from kvmkit.kvm import ENGINES, Vcpu
from kvmkit.kvm.exits import Intr, Io, Mmio
from kvmkit.kvm.linux import main as linux
from kvmkit.testing import Guest
from kvmkit.uapi.common import KVM_RUN

KINDS = {
    "port write": "mov al, 0x41\nagain: out 0x10, al\njmp again",
    "port read": "again: in al, 0x10\njmp again",
    "memory write": "mov ebx, 0x10000000\nagain: mov [rbx], ecx\njmp again",
    "memory read": "mov ebx, 0x10000000\nagain: mov ecx, [rbx]\njmp again",
}
"""The guests."""
LAYERS = ("call", "run", "serve")
BATCH_S = 0.05
"""About how long one measurement takes."""
ANSWERS = {size: (0x5A).to_bytes(size, "little") for size in (1, 2, 4, 8)}
"""What is read, by its size."""


def bare_call(vcpu: Vcpu) -> Callable[[], object]:
    """The least that Python does to run a vCPU."""
    if isinstance(vcpu, linux.Vcpu):
        return partial(ioctl, vcpu.fileno(), KVM_RUN)
    run = vcpu._vcpu.run  # type: ignore[attr-defined]
    return partial(run, True)


def serve(vcpu: Vcpu, count: int) -> bytes:
    """Run the guest for `count` exits as a monitor does; the last data written."""
    written = b""
    for _ in range(count):
        match vcpu.run():
            case Io() as exit_:
                if exit_.is_out:
                    written = bytes(exit_.data)
                else:
                    exit_.data[:] = ANSWERS[exit_.size]
            case Mmio() as exit_:
                if exit_.is_write:
                    written = bytes(exit_.data)
                else:
                    exit_.data[:] = ANSWERS[exit_.len]
            case exit_:
                raise RuntimeError(f"the guest should do nothing but its accesses: {exit_}")
    return written


def repeat(call: Callable[[], object], count: int) -> None:
    """Call `call` `count` times."""
    for _ in range(count):
        call()


class Subject:
    """A guest on an engine, and the loops that serve it."""

    def __init__(self, engine: str, code: str, reference: Path | None, directory: Path) -> None:
        """Start it; `reference` is the loop in C, where there is one for this engine."""
        self.system = kvmkit.kvm.open(engine)
        self.guest = Guest(self.system, code)
        vcpu = self.guest.vcpu
        self.image = directory / "image"
        memory = self.guest.memory.read(0, self.guest.memory.size_bytes)
        self.image.write_bytes(bytes(vcpu.get_regs()) + bytes(vcpu.get_sregs()) + memory)
        self.reference = reference
        call = bare_call(vcpu)
        self.loops: dict[str, Callable[[int], object]] = {
            "call": lambda count: repeat(call, count),
            "run": lambda count: repeat(vcpu.run, count),
            "serve": lambda count: serve(vcpu, count),
        }
        start = time.perf_counter()
        serve(vcpu, 100)
        self.count = max(100, int(100 * BATCH_S / (time.perf_counter() - start)))

    def measure(self, layer: str) -> float:
        """Microseconds that one exit takes."""
        if layer == "C":
            command = [str(self.reference), str(self.image), str(self.count // 4), str(self.count)]
            return int(subprocess.check_output(command)) / self.count / 1e3
        self.loops[layer](self.count // 4)
        start = time.thread_time_ns()
        self.loops[layer](self.count)
        return (time.thread_time_ns() - start) / self.count / 1e3

    def decode_alone(self) -> float:
        """Microseconds that it takes to make an object of an exit, measured on one that stands."""
        vcpu = self.guest.vcpu
        vcpu.run()
        decode = vcpu._decode  # type: ignore[attr-defined]
        start = time.thread_time_ns()
        for _ in range(self.count):
            decode()
        return (time.thread_time_ns() - start) / self.count / 1e3

    def close(self) -> None:
        """End it."""
        self.guest.close()
        self.system.close()


def round_trips(engine: str, kind: str, reference: Path | None, repetitions: int) -> dict[str, list[float]]:
    """Microseconds per exit for each layer, one figure a repetition."""
    with tempfile.TemporaryDirectory(prefix="kvmkit-exits-") as directory:
        subject = Subject(engine, KINDS[kind], reference, Path(directory))
        layers = (*(["C"] if reference else []), *LAYERS)
        try:
            found: dict[str, list[float]] = {layer: [] for layer in layers}
            for _ in range(repetitions):
                for layer in layers:
                    found[layer].append(subject.measure(layer))
            found["decode alone"] = [subject.decode_alone() for _ in range(repetitions)]
            return found
        finally:
            subject.close()


def kick_latencies(engine: str, count: int) -> list[float]:
    """Microseconds from each `kick` until `run` has returned."""
    returned = threading.Semaphore(0)
    computing = threading.Semaphore(0)
    times: list[int] = []
    with kvmkit.kvm.open(engine) as system, Guest(system, "again: inc rax\njmp again") as guest:
        vcpu = guest.vcpu

        def run() -> None:
            for _ in range(count):
                computing.release()
                while not vcpu.immediate_exit:  # else a signal that came too late for the run before
                    assert vcpu.run() == Intr()
                times.append(time.perf_counter_ns())
                vcpu.immediate_exit = False
                returned.release()

        thread = threading.Thread(target=run)
        thread.start()
        kicked = []
        for n in range(count):
            computing.acquire()
            time.sleep(0.0005 + n % 10 / 1e4)  # let it enter the guest
            kicked.append(time.perf_counter_ns())
            vcpu.kick()
            returned.acquire()
        thread.join()
    return [(end - start) / 1e3 for start, end in zip(kicked, times, strict=True)]


def spread(values: list[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def report(engine: str, kind: str, found: dict[str, list[float]]) -> None:
    """Print one guest's round trips: the whole, its ratio to C, and what each layer adds."""
    median = {layer: statistics.median(values) for layer, values in found.items()}
    line = f"{engine:6}{kind:14}{spread(found['serve']):>20} µs"
    budget = f"object {median['run'] - median['call']:.1f} (decode alone {median['decode alone']:.1f})"
    budget += f", dispatch {median['serve'] - median['run']:.1f}"
    if "C" in found:
        ratios = [ours / c for ours, c in zip(found["serve"], found["C"], strict=True)]
        line += f"  C {spread(found['C'])} µs, ratio {spread(ratios, 2)}"
        budget = f"C {median['C']:.1f}, call from Python {median['call'] - median['C']:.1f}, " + budget
    else:
        budget = f"engine {median['call']:.1f}, " + budget
    print(f"{line}\n{'':20}budget: {budget}", flush=True)


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of 100 of the values don't exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--kicks", type=int, default=1000)
    parser.add_argument("--reference", type=Path, help="exits.c compiled elsewhere, where gcc isn't there")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    options = parser.parse_args()
    results: dict[str, object] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="kvmkit-exits-") as directory:
        reference: Path | None = options.reference
        if reference is None and shutil.which("gcc"):
            reference = Path(directory) / "exits"
            source = Path(__file__).with_suffix(".c")
            subprocess.run(["gcc", "-O2", "-Wall", "-o", str(reference), str(source)], check=True)
        for engine in options.engines:
            try:
                kvmkit.kvm.open(engine).close()
            except OSError as error:
                print(f"{engine}: {error}", file=sys.stderr)
                continue
            for kind in KINDS:
                found = round_trips(
                    engine, kind, reference if engine == "linux" else None, options.repetitions
                )
                results[f"{engine}: {kind}"] = found
                if not options.json:
                    report(engine, kind, found)
            kicks = kick_latencies(engine, options.kicks)
            results[f"{engine}: kick"] = kicks
            if not options.json:
                p50, p99 = percentile(kicks, 50), percentile(kicks, 99)
                print(f"{engine:6}kick: p50 {p50:.0f}, p99 {p99:.0f}, max {max(kicks):.0f} µs")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
