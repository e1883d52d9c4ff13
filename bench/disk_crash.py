"""VM processes killed while their guests write: what fsync acknowledged must be on the disk.

Each round boots a guest on an ext4 image, every other one on an overlay of it. Two writers there append numbered records with
checksums to a file each, fsync after each record and only then tell its number; now and then they replace a file by rename and
sync the directory. At a random moment the VM process gets a SIGKILL. Then, on the host: the journal is replayed
(`e2fsck -E journal_only`), a full check must find nothing to repair (`e2fsck -fn`), each writer's file must hold all records
up to the last one that it told, whole, and the renamed file must be there.

It takes a C compiler and e2fsprogs. The host itself doesn't crash here: `tests/devices/block` has the host's part, with writes
lost that weren't synced.
"""

import argparse
import json
import os
import random
import select
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvmkit.client import Disk, Machine, MachineConfig
from kvmkit.devices.block import Overlay
from kvmkit.machine.guest import DefaultGuest, fetch_default_guest
from kvmkit.testing.initramfs import initramfs

IMAGE_MIB = 64
WRITERS = ("a", "b")
BOOT_LIMIT_S = 60.0
MAX_RUN_S = 1.5
RENAME_EVERY = 8
_RECORD = struct.Struct("<IIII")
_MAGIC = 0x6B766D6B

_WRITER = """
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct record { uint32_t magic, number, bytes, adler; unsigned char data[12000]; };

static void must(int ok, const char *what) { if (!ok) { perror(what); _exit(1); } }

static void save(int fd, struct record *r) {
    size_t size = 16 + r->bytes;
    must(write(fd, r, size) == (ssize_t)size, "write");
    must(fsync(fd) == 0, "fsync");
}

int main(int argc, char **argv) {
    static struct record r;
    char name[64], line[64];
    (void)argc;
    srand(atoi(argv[2]));
    must(chdir("/mnt") == 0, "chdir");
    int directory = open(".", O_RDONLY), fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0644);
    must(fd >= 0 && fsync(directory) == 0, "open");
    for (uint32_t n = 1;; n++) {
        r.magic = MAGIC, r.number = n, r.bytes = rand() % sizeof r.data;
        uint32_t a = 1, b = 0;
        for (uint32_t i = 0; i < r.bytes; i++) {
            r.data[i] = rand() >> 7;
            a = (a + r.data[i]) % 65521, b = (b + a) % 65521;
        }
        r.adler = b << 16 | a;
        save(fd, &r);
        if (n % RENAME_EVERY == 0) {
            char last[64];
            snprintf(name, sizeof name, "%s.%u", argv[1], n);
            snprintf(last, sizeof last, "%s.last", argv[1]);
            int new = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
            must(new >= 0, name);
            save(new, &r);
            must(close(new) == 0 && rename(name, last) == 0 && fsync(directory) == 0, last);
        }
        int size = snprintf(line, sizeof line, "done %s %u\\n", argv[1], n);
        must(write(1, line, size) == size, "tell");
    }
}
"""

_SCRIPT = f"""
mount -t ext4 -o discard /dev/vda /mnt || exit
{" & ".join(f"writer {name} $RANDOM" for name in WRITERS)} & wait
"""


class Lost(Exception):
    """What must not happen."""


@dataclass
class Round:
    """One kill."""

    kind: str
    ran_s: float
    """From the first acknowledged record to the kill."""
    acknowledged: int
    found: int


def build_initramfs(guest: DefaultGuest, directory: Path) -> Path:
    """The guest with the writer in it."""
    writer = directory / "writer"
    defines = [f"-DMAGIC={_MAGIC}", f"-DRENAME_EVERY={RENAME_EVERY}"]
    command = [
        "cc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static",
        *defines,
        "-x",
        "c",
        "-",
        "-o",
        str(writer),
    ]
    subprocess.run(command, input=_WRITER.encode(), check=True)
    initrd = directory / "initrd"
    initrd.write_bytes(initramfs(guest, ["virtio_mmio", "virtio_blk"], [str(writer)], _SCRIPT))
    return initrd


def run_and_kill(config: MachineConfig, rng: random.Random) -> tuple[dict[str, int], float]:
    """Boot, let it write, kill. Return each writer's last acknowledged record, and how long they wrote."""
    output, theirs = os.pipe()
    try:
        return _run_and_kill(replace(config, output_fd=theirs), output, theirs, rng)
    finally:
        os.close(output)


def _run_and_kill(
    config: MachineConfig, output: int, theirs: int, rng: random.Random
) -> tuple[dict[str, int], float]:
    seen, started, until = b"", 0.0, time.monotonic() + BOOT_LIMIT_S
    machine = Machine(config)
    try:
        machine.start()
        os.close(theirs)  # the machine has its own
        while (left := until - time.monotonic()) > 0:
            if not select.select([output], [], [], left)[0]:
                break
            data = os.read(output, 65536)
            seen += data
            if not data or b"reboot:" in data:
                raise Lost(f"the guest ended by itself:\n{seen[-3000:].decode()}")
            if not started and b"done " in seen:
                started = time.monotonic()
                until = started + rng.uniform(0, MAX_RUN_S)
        if not started:
            raise Lost(f"the guest never wrote:\n{seen[-3000:].decode()}")
        machine.kill()
        ran_s = time.monotonic() - started
    finally:
        machine.close()
    while data := os.read(output, 65536):  # what it said before it died is said, too
        seen += data
    last = dict.fromkeys(WRITERS, 0)
    for line in seen.split(b"\n")[:-1]:  # the last one may be cut off
        words = line.split()
        if words[:1] == [b"done"] and len(words) == 3:
            last[words[1].decode()] = int(words[2])
    return last, ran_s


def flatten(overlay: Path, image: Path) -> None:
    """Write what an overlay shows to a raw image."""
    disk = Overlay(overlay)
    try:
        with open(image, "wb") as file:
            os.truncate(file.fileno(), disk.size_bytes)
            for offset in range(0, disk.size_bytes, 1 << 20):
                data = bytearray(1 << 20)
                disk.readv([data], offset)
                if any(data):
                    os.pwrite(file.fileno(), data, offset)
    finally:
        disk.close()


def check(image: Path, last: dict[str, int]) -> int:
    """Look at an image after a crash. Return how many records it holds; `Lost` if one is missing."""
    replay = subprocess.run(
        ["e2fsck", "-y", "-E", "journal_only", str(image)], capture_output=True, text=True, check=False
    )
    full = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    if replay.returncode not in (0, 1) or full.returncode:
        raise Lost(
            f"e2fsck: {replay.returncode}, {full.returncode}\n{replay.stdout}{full.stdout}{full.stderr}"
        )
    found = 0
    for name, number in last.items():
        records = parse(read_file(image, name))
        if records < number:
            raise Lost(f"{name}: record {number} was acknowledged, {records} are there")
        found += records
        if renamed := number // RENAME_EVERY * RENAME_EVERY:
            data = read_file(image, f"{name}.last")
            if len(data) < _RECORD.size or _RECORD.unpack_from(data)[1] < renamed or not whole(data, 0):
                raise Lost(f"{name}.last: not what was written by record {renamed}")
    return found


def read_file(image: Path, name: str) -> bytes:
    """Read a file in an ext4 image."""
    done = subprocess.run(["debugfs", "-R", f"cat /{name}", str(image)], capture_output=True, check=True)
    return done.stdout


def whole(data: bytes, at: int) -> bool:
    """Whether a record at `at` is all there."""
    if at + _RECORD.size > len(data):
        return False
    magic, _, size, adler = _RECORD.unpack_from(data, at)
    body = data[at + _RECORD.size : at + _RECORD.size + size]
    return bool(magic == _MAGIC and len(body) == size and zlib.adler32(body) == adler)


def parse(data: bytes) -> int:
    """How many records follow each other, numbered from 1, each whole."""
    at = count = 0
    while whole(data, at) and _RECORD.unpack_from(data, at)[1] == count + 1:
        count += 1
        at += _RECORD.size + _RECORD.unpack_from(data, at)[2]
    return count


def one_round(
    number: int, engine: str, vmlinux: str, initrd: Path, base: Path, directory: Path, rng: random.Random
) -> Round:
    """Boot, write, kill, check."""
    image, overlay = directory / "image", directory / "overlay"
    for path in (image, overlay):
        path.unlink(missing_ok=True)
    kind = ("raw", "overlay")[number % 2]
    if kind == "raw":
        subprocess.run(["cp", "--sparse=always", str(base), str(image)], check=True)
        disk = Disk(image)
    else:
        disk = Disk(base, overlay=overlay)
    config = MachineConfig(
        engine=engine,
        kernel=vmlinux,
        initrd=initrd,
        agent=False,
        append="quiet",
        cpus=1 + number // 2 % 2,
        disks=(disk,),
    )
    last, ran_s = run_and_kill(config, rng)
    if kind == "overlay":
        flatten(overlay, image)
    return Round(kind, ran_s, sum(last.values()), check(image, last))


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--engine", default="soft", choices=("soft", "kvm", "auto"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    parser.add_argument("--keep", metavar="FILE", help="where the image of the first failure goes")
    args = parser.parse_args()
    for tool, package in (("cc", "gcc"), ("e2fsck", "e2fsprogs"), ("debugfs", "e2fsprogs")):
        if shutil.which(tool) is None:
            sys.exit(f"bench/disk_crash: no {tool}: apt-get install {package}")
    guest = fetch_default_guest(lambda text: print(text, file=sys.stderr))
    rng = random.Random(args.seed)
    rounds: list[Round] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        initrd, base = build_initramfs(guest, directory), directory / "base"
        with open(base, "wb") as file:
            os.truncate(file.fileno(), IMAGE_MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-J", "size=4", str(base)], check=True)
        for number in range(args.count):
            print(f"round {number + 1} of {args.count}, {len(failures)} failed", end="\r", file=sys.stderr)
            try:
                rounds.append(
                    one_round(number, args.engine, str(guest.kernel.vmlinux), initrd, base, directory, rng)
                )
            except Exception as error:
                failures.append(f"round {number}: {error}")
                if args.keep and not Path(args.keep).exists():
                    shutil.copy(directory / "image", args.keep)
    for kind in ("raw", "overlay"):
        of_kind = [r for r in rounds if r.kind == kind]
        times = [r.ran_s for r in of_kind] or [0.0]
        print(
            f"{kind:8} {len(of_kind)} kills after {min(times):.2f}–{max(times):.2f} s "
            f"(median {statistics.median(times):.2f}): {sum(r.acknowledged for r in of_kind)} records acknowledged, "
            f"{sum(r.found for r in of_kind)} found"
        )
    print(f"{len(failures)} of {args.count} failed")
    for failure in failures:
        print(f"  {failure}")
    if args.json:
        text = json.dumps({"rounds": [asdict(r) for r in rounds], "failures": failures}, indent=1)
        Path(args.json).write_text(text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
