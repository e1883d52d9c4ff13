"""Differential soak: generated cases on the software engine and on a reference, by the hundred thousand.

cpu      User-mode code by the engine's core against this machine's processor: straight code of any copied instruction, code
         whose operands partly fault, code that changes itself or is single-stepped (engine/tests/differential.rs). Needs cargo.
unicorn  Whole machine states in every mode, integer and system instructions, paging, segments, faults
         (kvmkit.testing.differential), against the emulator Unicorn (pip's `unicorn`).
qemu     The same against QEMU's TCG in a machine of its own (on_qemu), with delivery through the IDT and hidden registers.
kvm      The same against /dev/kvm, with delivery through the IDT and error codes: for kvm-amd in the test bed,
         testbed/bed.py amd --shell 'python3.11 bench/soak.py --reference kvm --cases 5000'

A difference is printed with its seed, the listing of what is left when all that doesn't matter is taken out, and the registers;
`--seed N --cases 1` shows it again. Differences that are the reference's are counted by rule (kvmkit.testing.differential.known).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ENGINE = Path(__file__).resolve().parent.parent / "engine"


def on_the_cpu(seed: int, cases: int) -> int:
    """Run the Rust test's soak."""
    command = ["cargo", "test", "--release", "--no-default-features", "--test", "differential"]
    environment = os.environ | {"KVMKIT_CASES": str(cases), "KVMKIT_SEED": str(seed)}
    done = subprocess.run([*command, "--", "--ignored", "--nocapture", "soak"], cwd=ENGINE, env=environment)
    return done.returncode


def on_another(reference: str, seed: int, cases: int, seconds: float) -> int:
    """Compare with Unicorn, QEMU or the kernel's KVM; the exit status."""
    import kvmkit.kvm
    from kvmkit.testing.differential.cases import MODES
    from kvmkit.testing.differential.compare import Comparison
    from kvmkit.testing.differential.known import KVM, QEMU, UNICORN, kernel_kvm
    from kvmkit.testing.differential.run import Machine

    soft = Machine(kvmkit.kvm.open("soft"))
    modes: tuple[str, ...] = tuple(MODES)
    if reference == "unicorn":
        from kvmkit.testing.differential.on_unicorn import Unicorn

        comparison = Comparison(soft.run, Unicorn().run, UNICORN)
    elif reference == "qemu":
        from kvmkit.testing.differential.on_qemu import Qemu

        comparison = Comparison(soft.run, Qemu().run, QEMU)
    else:
        name = kernel_kvm()
        kernel, modes = KVM[name], KVM[name].modes
        print(f"the kernel's KVM: {name}; modes {' '.join(modes)}", flush=True)
        linux = Machine(kvmkit.kvm.open("linux"), kernel.fresh)
        comparison = Comparison(soft.run, linux.run, kernel.rules)
    found, start, told = 0, time.monotonic(), time.monotonic()
    for number in range(seed, seed + cases):
        try:
            report = comparison.run(number, modes)
        except OSError as error:
            report = f"seed {number}: {error}"
        if report is not None:
            found += 1
            print(report, flush=True)
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{comparison.cases} cases, {found} differences", flush=True)
        if time.monotonic() > start + seconds:
            break
    elapsed = time.monotonic() - start
    compared = sum(comparison.ends.values()) - comparison.ends["not compared"]
    print(
        f"seeds {seed} to {seed + comparison.cases - 1}: {comparison.cases} cases, {comparison.cases / elapsed:.0f}/s"
    )
    print(
        f"compared {compared}: "
        + ", ".join(f"{count} {end}" for end, count in comparison.ends.most_common(8))
    )
    for name, count in comparison.explained.most_common():
        print(f"  {count:6} explained by {name!r}")
    print(f"differences: {found}")
    return int(found != 0)


def main() -> int:
    """Run it; the exit status is 0 if there was no difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference", choices=("cpu", "unicorn", "qemu", "kvm"), default="cpu", help="what to compare with"
    )
    parser.add_argument("--cases", type=int, default=1_000_000, help="how many (default 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="the first case's seed (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end after this long (not with cpu)"
    )
    options = parser.parse_args()
    if options.reference == "cpu":
        return on_the_cpu(options.seed, options.cases)
    return on_another(options.reference, options.seed, options.cases, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
