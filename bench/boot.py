"""Boot time: kvmkit's software engine against QEMU's TCG, the same vmlinux, initrd and command line, alternating.

Times run from the start of the process to init's first line on its output and to the end of the process. Nothing is kept
from one run to the next: no snapshot, no translation cache. QEMU is `-M microvm -accel tcg -cpu max`, whichever version is
installed (`apt-get install qemu-system-x86`).
"""

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvmkit import _engine
from kvmkit.client import Event, Machine, MachineConfig
from kvmkit.machine.guest import console_command, fetch_default_guest

MEMORY_MIB = 512
INIT = b"kvmkit: init"
LIMIT_S = 60.0


def measure(command: list[str]) -> tuple[float, float]:
    """Run `command`; seconds from its start to init's first line and to its end."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    seen, init = b"", 0.0
    try:
        while True:
            left = start + LIMIT_S - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise TimeoutError(
                    f"{command[0]} didn't end within {LIMIT_S:.0f} s:\n{seen[-2000:].decode()}"
                )
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            seen += data
            if not init and INIT in seen:
                init = time.monotonic() - start
        process.wait(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() - start
    if not init:
        raise RuntimeError(f"{command[0]}: init never ran:\n{seen[-2000:].decode()}")
    return init, end


def phases(config: MachineConfig) -> dict[str, float]:
    """Where kvmkit's time goes: milliseconds since the start at each event of one boot."""
    start = time.monotonic_ns()
    marks: dict[str, float] = {}

    def on_event(event: Event) -> None:
        if event.name != "progress":
            marks[event.name] = (event.t_ns - start) / 1e6

    with Machine(config, on_event) as machine:
        machine.wait(LIMIT_S)
    return marks


def table(rows: dict[str, dict[str, list[float]]]) -> None:
    """Print medians, spread and ratios."""
    print(f"{'':24}{'kvmkit':>24}{'QEMU TCG':>24}{'ratio of pairs':>24}")
    for what in ("init", "end"):
        ours, theirs = rows["kvmkit"][what], rows["qemu"][what]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = [
            f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f}){unit}"
            for v, unit in ((ours, " s"), (theirs, " s"), (ratios, ""))
        ]
        print(f"{'to ' + what:24}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    """Run the pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs of boots (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("bench/boot: no qemu-system-x86_64: apt-get install qemu-system-x86")
    guest = fetch_default_guest(lambda text: print(text, file=sys.stderr))
    khz = _engine.host_tsc_khz()
    append = f"quiet tsc_early_khz={khz} lpj={khz * 4}"
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        initrd.write_bytes(guest.initramfs(console_command(("uname", "-a"))))
        vmlinux = str(guest.kernel.vmlinux)
        ours = [
            str(Path(sys.executable).with_name("kvmkit")),
            *("run", "--engine", "soft", "--kernel", vmlinux, "--initrd", str(initrd)),
            *("--append", append, "--memory", f"{MEMORY_MIB}M"),
        ]
        theirs = [
            *(qemu, "-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB), "-smp", "1"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", vmlinux, "-initrd", str(initrd), "-append", f"console=ttyS0 panic=-1 {append}"),
        ]
        rows: dict[str, dict[str, list[float]]] = {n: {"init": [], "end": []} for n in ("kvmkit", "qemu")}
        for pair in range(args.pairs):
            for name, command in (("kvmkit", ours), ("qemu", theirs)):
                print(f"pair {pair + 1} of {args.pairs}: {name}", end="\r", file=sys.stderr)
                init, end = measure(command)
                rows[name]["init"].append(init)
                rows[name]["end"].append(end)
        config = MachineConfig(
            engine="soft", kernel=vmlinux, initrd=initrd, append=append, memory=MEMORY_MIB << 20, agent=False
        )
        marks = phases(config)
    version = subprocess.run(
        [qemu, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    print(f"kernel {guest.kernel.version}, {MEMORY_MIB} MiB, 1 CPU, {args.pairs} pairs; {version}")
    table(rows)
    print("kvmkit's phases, ms since its start: " + ", ".join(f"{k} {v:.0f}" for k, v in marks.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "phases_ms": marks, "qemu": version}, indent=1))


if __name__ == "__main__":
    main()
