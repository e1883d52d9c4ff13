"""Disks: kvmkit's software engine against QEMU's TCG, the same kernel, initramfs and raw image, alternating.

fio in the guest, O_DIRECT on the whole of /dev/vda, so that the guest's page cache plays no part; the host's holds the image on
both sides. Each run is a new VM. QEMU is `-M microvm -accel tcg -cpu max`, whichever version is installed; its microvm has no I/O
threads under TCG. Takes the host's fio: `apt-get install fio qemu-system-x86`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmkit import _engine
from kvmkit.machine.guest import fetch_default_guest
from kvmkit.testing.initramfs import initramfs

MEMORY_MIB = 1024
LIMIT_S = 300.0
FIO = "fio --name=x --filename=/dev/vda --direct=1 --ioengine=libaio --time_based --output-format=terse --terse-version=3"

WORKLOADS = {
    "4k random read, QD 1": ("--rw=randread --bs=4k --iodepth=1", "IOPS"),
    "4k random read, QD 32": ("--rw=randread --bs=4k --iodepth=32", "IOPS"),
    "1M read, QD 4": ("--rw=read --bs=1M --iodepth=4", "MB/s"),
    "1M write, QD 4": ("--rw=write --bs=1M --iodepth=4", "MB/s"),
}


def script(runtime_s: int) -> str:
    """What the guest runs: a line ``fio NUMBER ERROR READ-KIB/S READ-IOPS WRITE-KIB/S WRITE-IOPS`` for each workload."""
    return "".join(
        f"{FIO} --runtime={runtime_s} {options} | cut -d';' -f5,7,8,48,49 | sed 's/;/ /g; s/^/fio {i} /'\n"
        for i, (options, _) in enumerate(WORKLOADS.values())
    )


def measure(command: list[str]) -> dict[str, float]:
    """Run a VM; figures by workload."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    found = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words[:1] == ["fio"] and len(words) == 7 and words[2] == "0":
            read_kib_s, read_iops, write_kib_s, write_iops = map(int, words[3:])
            name, (_, unit) = list(WORKLOADS.items())[int(words[1])]
            found[name] = (
                float(read_iops + write_iops) if unit == "IOPS" else (read_kib_s + write_kib_s) * 1024e-6
            )
    if len(found) != len(WORKLOADS):
        raise RuntimeError(f"{command[0]}: fio failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return found


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, spread and ratios."""
    print(f"{'':24}{'kvmkit':>30}{'QEMU TCG':>30}{'ratio of pairs':>24}")
    for name, (_, unit) in WORKLOADS.items():
        ours, theirs = ([run[name] for run in rows[side]] for side in ("kvmkit", "qemu"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = [f"{statistics.median(v):,.0f} ({min(v):,.0f}–{max(v):,.0f}) {unit}" for v in (ours, theirs)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        print(f"{name:24}{cells[0]:>30}{cells[1]:>30}{cells[2]:>24}")


def main() -> None:
    """Run the pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of VMs (default 5)")
    parser.add_argument("--runtime-s", type=int, default=5, help="seconds of each workload (default 5)")
    parser.add_argument("--size-mib", type=int, default=512, help="size of the image (default 512)")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    for tool, package in (("qemu-system-x86_64", "qemu-system-x86"), ("fio", "fio")):
        if shutil.which(tool) is None:
            sys.exit(f"bench/io: no {tool}: apt-get install {package}")
    guest = fetch_default_guest(lambda text: print(text, file=sys.stderr))
    khz = _engine.host_tsc_khz()
    append = f"quiet tsc_early_khz={khz} lpj={khz * 4}"
    rows: dict[str, list[dict[str, float]]] = {"kvmkit": [], "qemu": []}
    with tempfile.TemporaryDirectory() as directory:
        initrd, image = Path(directory, "initrd"), Path(directory, "image")
        initrd.write_bytes(initramfs(guest, ["virtio_mmio", "virtio_blk"], ["fio"], script(args.runtime_s)))
        with open(image, "wb") as file:
            for _ in range(args.size_mib):
                file.write(os.urandom(1 << 20))
        vmlinux = str(guest.kernel.vmlinux)
        ours = [
            str(Path(sys.executable).with_name("kvmkit")),
            *("run", "--engine", "soft", "--kernel", vmlinux, "--initrd", str(initrd)),
            *("--append", append, "--memory", f"{MEMORY_MIB}M", "--disk", str(image)),
        ]
        theirs = [
            *("qemu-system-x86_64", "-M", "microvm", "-accel", "tcg", "-cpu", "max"),
            *("-m", str(MEMORY_MIB), "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-serial", "stdio", "-kernel", vmlinux, "-initrd", str(initrd)),
            *("-append", f"console=ttyS0 panic=-1 {append}"),
            *(
                "-drive",
                f"file={image},format=raw,if=none,id=disk",
                "-device",
                "virtio-blk-device,drive=disk",
            ),
        ]
        for pair in range(args.pairs):
            for name, command in (("kvmkit", ours), ("qemu", theirs)):
                print(f"pair {pair + 1} of {args.pairs}: {name}", end="\r", file=sys.stderr)
                rows[name].append(measure(command))
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    print(f"kernel {guest.kernel.version}, {MEMORY_MIB} MiB, 1 CPU, {args.pairs} pairs; {version}")
    table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "qemu": version}, indent=1))


if __name__ == "__main__":
    main()
