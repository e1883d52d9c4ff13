"""Boots in a row from one client process: none may fail, hang, or leave anything behind.

Every boot runs a command in the default guest and checks its output and status. The client's resident memory, descriptors
and threads after the first and after the last boot are shown, and what is left of processes.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

from kvmkit.client import Machine, MachineConfig
from kvmkit.machine.guest import CLOUD_KERNEL, GENERIC_KERNEL, fetch_kernel

LIMIT_S = 120.0


def footprint() -> dict[str, int]:
    """What this process holds."""
    status = Path("/proc/self/status").read_text()
    rss = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert rss is not None
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "rss_kib": int(rss[1]),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(children),
    }


def boot(kernel: str, engine: str, number: int) -> float:
    """Boot once; seconds. `RuntimeError` for anything but the expected output."""
    read, write = os.pipe()
    start = time.monotonic()
    try:
        command = ("sh", "-c", f"echo boot {number}; exit {number % 100}")
        config = MachineConfig(
            engine=engine, kernel=kernel, console_command=command, agent=False, output_fd=write
        )
        with Machine(config) as machine:
            os.close(write)
            write = -1
            end = machine.wait(LIMIT_S)
        output = b""
        while data := os.read(read, 65536):
            output += data
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if output != f"boot {number}\n".encode() or end.status != number % 100:
        raise RuntimeError(f"boot {number}: {end}, output {output[-500:]!r}")
    return time.monotonic() - start


def main() -> None:
    """Boot and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="boots of each kernel (default 100)")
    parser.add_argument("--engine", default="soft", choices=("soft", "kvm", "auto"))
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    cloud, generic = fetch_kernel(CLOUD_KERNEL), fetch_kernel(GENERIC_KERNEL)
    kernels = {
        "cloud vmlinux": cloud.vmlinux,
        "cloud bzImage": cloud.vmlinuz,
        "generic bzImage": generic.vmlinuz,
    }
    result: dict[str, object] = {}
    print(f"{'kernel':18}{'boots':>7}{'failed':>8}{'median':>9}{'worst':>9}   client after 1, after all")
    failed = 0
    for name, path in kernels.items():
        times: list[float] = []
        failures: list[str] = []
        first: dict[str, int] = {}
        for number in range(args.count):
            print(f"{name}: boot {number + 1} of {args.count}", end="\r", file=sys.stderr)
            try:
                times.append(boot(str(path), args.engine, number))
            except Exception as error:
                failures.append(f"{number}: {error}")
            first = first or footprint()
        last = footprint()
        failed += len(failures)
        print(
            f"{name:18}{args.count:>7}{len(failures):>8}{statistics.median(times or [0]):>8.2f}s"
            f"{max(times or [0]):>8.2f}s   " + ", ".join(f"{key} {first[key]} → {last[key]}" for key in first)
        )
        for failure in failures:
            print(f"  {failure}")
        result[name] = {"times_s": times, "failures": failures, "first": first, "last": last}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
