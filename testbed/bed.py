"""Test beds: machines that QEMU emulates in software, with Linux's own KVM in them, on a host that has no such processor.

``L1`` is the machine that QEMU emulates: Debian's kernel with kvm-amd or kvm-arm64, and an initramfs with Python, pytest, the
assembler and this working tree, made of Debian's packages. In it run the conformance suite (``tests/kvm``) on ``/dev/kvm``, and
a Linux on top (``L2``). It takes no root and installs nothing; what is fetched is kept in ``~/.cache/kvmkit/testbed``.

    testbed/bed.py amd              the suite, and Linux                testbed/bed.py arm64 --quick
    testbed/bed.py amd --shell 'dmesg | grep -i kvm'                    a command of your own

What each choice of hardware below is for is said where it is made.
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmkit.machine import modules
from kvmkit.machine.debian import Apt, members
from kvmkit.machine.guest import GuestError, cache_directory, fetch_default_guest
from kvmkit.machine.initramfs import CpioWriter

TREE = Path(__file__).resolve().parent.parent
BOOT_TIMEOUT_S = 120
UNAVAILABLE = 77
"""The exit status where a bed can't be made, for want of QEMU or of packages."""
READY, EXIT = "testbed: ready", "testbed: exit"


@dataclass(frozen=True)
class Bed:
    """One kind of L1."""

    architecture: str
    """As Debian names it."""
    qemu: Sequence[str]
    console: str
    kernel: str
    modules: Sequence[str]
    """Of KVM, in the order to load them; none where it is built in."""
    packages: Sequence[str]
    platform: str
    """As Python's wheels name it."""
    quick: Sequence[str]
    """The tests that stand for all of them where there is little time."""


BEDS = {
    "amd": Bed(
        "amd64",
        # SVM with nested paging. One processor: a second one in threads of its own locks up under the suite.
        ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-smp", "1", "-cpu", "max,+svm", "-m", "2048"],
        "ttyS0",
        "linux-image-6.12-cloud-amd64",
        ["irqbypass", "kvm", "kvm-amd"],
        ["python3.11-minimal", "libpython3.11-stdlib", "libpython3.11", "busybox-static", "binutils"],
        "manylinux2014_x86_64",
        [f"tests/kvm/test_kvm_{name}.py" for name in ("io", "interrupts", "eventfd", "vcpu")],
    ),
    "arm64": Bed(
        "arm64",
        # EL2 and a GICv3 with ITS. Not -cpu max: with SVE, QEMU 7.2 runs stale guest code. Linux 6.12, for its dirty ring.
        [
            "qemu-system-aarch64",
            "-M",
            "virt,virtualization=on,gic-version=3",
            "-accel",
            "tcg",
            "-smp",
            "2",
            "-cpu",
            "neoverse-n1",
            "-m",
            "1024",
        ],
        "ttyAMA0",
        "linux-image-6.12-cloud-arm64",
        [],
        ["python3.11-minimal", "libpython3.11-stdlib", "busybox-static"],
        "manylinux2014_aarch64",
        ["tests/kvm/test_kvm_arm64.py"],
    ),
}
WHEELS = (
    "pytest",
    "hypothesis",
    *tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["dependencies"],
)
"""The tests' and kvmkit's own."""
IN_TREE = (
    "src/kvmkit/**/*.py",
    "tests/conftest.py",
    "bench/soak.py",
    "tests/kvm/**/*.py",
    "tests/machine/test_move.py",
    "tests/uapi/**/*.py",
    "docs/kvm-api/*.txt",
    "bench/exits.py",
)
UNUSED = re.compile(
    r"(\./)?(boot|usr/share|usr/include|usr/lib/modules|lib/modules|etc/(?!passwd))/.*|.*/ldscripts/.*|.*\.a"
)

RUSTC = "/usr/bin/rustc"
"""Debian's (rustc-web): a compiler takes a standard library of its own version alone, and Debian has its one for arm64."""
RUST_STD = "libstd-rust-web-dev"
RUST_TARGET = "aarch64-unknown-linux-gnu"

INIT = f"""\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/root PYTHONPATH=/kvmkit/src:/wheels PYTHONDONTWRITEBYTECODE=1
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "testbed: no module $module"; done
ip link set lo up
echo "{READY}"
cd /kvmkit
sh /job
echo "{EXIT} $?"
poweroff -f
"""


class BedError(Exception):
    """The bed can't be made, or its machine doesn't do what it should."""


def say(text: str) -> None:
    """Tell the user what takes time."""
    print(f"testbed: {text}", file=sys.stderr, flush=True)


# What L1 is made of.


def system(bed: Bed) -> Path:
    """Return a directory with L1's `vmlinuz` and `system.cpio`, from the cache, or made now."""
    recipe = json.dumps(
        [bed.architecture, bed.kernel, *bed.modules, *bed.packages, bed.platform, *WHEELS, INIT]
        + ([RUST_STD, rustc_version()] if bed.architecture == "arm64" else [])
    )
    root = cache_directory().parent / "testbed"
    made = root / f"{bed.architecture}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if made.is_dir():
        return made
    root.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=root))  # complete or not there: renamed at the end
    try:
        say(f"downloading {' '.join(WHEELS)} for {bed.platform}")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
        ]
        target = ["--only-binary=:all:", "--platform", bed.platform, "--python-version", "3.11"]
        if subprocess.run([*pip, "--target", str(new / "wheels"), *target, *WHEELS], check=False).returncode:
            raise BedError(f"pip can't get {' '.join(WHEELS)}")
        (new / "apt").mkdir()
        with Apt(new / "apt", say, bed.architecture) as apt, open(new / "system.cpio", "wb") as output:
            archive = CpioWriter(output)
            archive.directory("dev")
            archive.character_device("dev/console", (5, 1))
            archive.file("init", INIT.encode(), 0o755)
            kernel, name, version = apt.download(bed.kernel)
            debs = apt.download_all(bed.packages)
            say(f"unpacking {name} {version} and {len(debs)} packages")
            add_kernel(archive, kernel, bed, new / "vmlinuz")
            if (
                bed.architecture == "arm64"
            ):  # for a Linux on top of it: the same kernel's modules, and what is built here
                files = (modules.parse(*file) for file in members(kernel, modules.PATTERN))
                modules.save(new / "modules", files)
                std, _, _ = apt.download(RUST_STD)
                subprocess.run(["dpkg-deb", "-x", str(std), str(new / "rust")], check=True)
            for deb in debs:
                add_package(archive, deb)
            add_tree(archive, new / "wheels", "wheels", ["**/*.py", "**/*.so", "**/*.dist-info/*"])
            archive.close()
        shutil.rmtree(new / "wheels")
        new.chmod(0o755)
        new.rename(made)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return made


def entries(deb: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """What a package holds."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for entry in archive:
                yield archive, entry


def add_package(archive: CpioWriter, deb: Path) -> None:
    """Add what L1 uses of a package."""
    for tar, entry in entries(deb):
        name = entry.name.removeprefix("./").rstrip("/")
        if not name or name == "." or UNUSED.fullmatch(entry.name):
            continue
        if entry.isdir():
            archive.directory(name, entry.mode)
        elif entry.issym():
            archive.symlink(name, entry.linkname)
        elif entry.islnk():
            archive.symlink(name, "/" + entry.linkname.removeprefix("./"))
        elif (file := tar.extractfile(entry)) is not None:
            archive.file(name, file.read(), entry.mode)


def add_kernel(archive: CpioWriter, deb: Path, bed: Bed, vmlinuz: Path) -> None:
    """Write the kernel to `vmlinuz` and add its KVM modules."""
    archive.directory("modules")
    archive.file("modules/order", "\n".join(bed.modules).encode() + b"\n")
    for tar, entry in entries(deb):
        file = tar.extractfile(entry) if entry.isreg() else None
        stem, dot, kind = Path(entry.name).name.partition(".ko")
        if file is not None and re.fullmatch(r"(\./)?boot/vmlinuz-.*", entry.name):
            vmlinuz.write_bytes(file.read())
        elif file is not None and dot and stem in bed.modules:
            data = file.read()
            if kind == ".xz":
                data = lzma.decompress(data)
            archive.file(f"modules/{stem}.ko", data)
    if not vmlinuz.exists():
        raise BedError(f"{deb.name} holds no kernel")


def add_tree(archive: CpioWriter, source: Path, target: str, patterns: Sequence[str]) -> None:
    """Add the files below `source` that match, as they are now, below `target`."""
    files = sorted(
        {
            path
            for pattern in patterns
            for path in source.glob(pattern)
            if path.is_file() and path.suffix != ".pyc"
        }
    )
    names = [Path(target) / path.relative_to(source) for path in files]
    for directory in sorted({parent for name in names for parent in name.parents} - {Path()}):
        archive.directory(str(directory))
    for path, name in zip(files, names, strict=True):
        archive.file(str(name), path.read_bytes(), path.stat().st_mode & 0o7777)


def job_archive(bed: Bed, directory: Path, job: "Job") -> bytes:
    """The working tree, what L1 shall do, and for a Linux on top of it what that takes: a cpio archive."""
    output = io.BytesIO()
    archive = CpioWriter(output)
    built = ("src/kvmkit/*.so", "src/kvmkit/guest/*") if bed.architecture == "amd64" else ()  # for x86-64
    add_tree(archive, TREE, "kvmkit", (*IN_TREE, *built))
    archive.file("kvmkit/pyproject.toml", (TREE / "pyproject.toml").read_bytes())
    archive.file("job", job.script.encode())
    if job.compiled is not None:
        archive.file("compiled", compiled(job.compiled), 0o755)
    if job.linux and bed.architecture == "arm64":
        add_own_guest(archive, directory)
        add_built(archive, directory / "rust")
    elif job.linux:
        fetch_default_guest(say)
        guests = cache_directory()
        patterns = [
            "linux-image-cloud-amd64/vmlinux",
            "linux-image-cloud-amd64/modules/**/*",
            "busybox-static/*",
            "*/package",
        ]
        add_tree(archive, guests, f"root/.cache/kvmkit/{guests.name}", patterns)
    archive.close()
    return output.getvalue()


def compiled(source: Path) -> bytes:
    """A program in C for an L1 of our own architecture."""
    with tempfile.TemporaryDirectory(prefix="kvmkit-testbed-") as directory:
        program = Path(directory) / "program"
        subprocess.run(["gcc", "-O2", "-static", "-o", str(program), str(source)], check=True)
        return program.read_bytes()


def add_own_guest(archive: CpioWriter, directory: Path) -> None:
    """Add L1's kernel, its modules and busybox where kvmkit keeps its default guest: on arm64 that is Debian's cloud kernel and busybox-static, too."""
    cache = Path("root/.cache/kvmkit") / cache_directory().name
    kernel, busybox = cache / "linux-image-cloud-arm64", cache / "busybox-static"
    for path in (*reversed(cache.parents[:-1]), cache, kernel, busybox):
        archive.directory(str(path))
    archive.file(str(kernel / "vmlinuz"), (directory / "vmlinuz").read_bytes())
    add_tree(archive, directory, str(kernel), ["modules/*"])
    archive.file(str(kernel / "package"), json.dumps({"package": kernel.name, "version": ""}).encode())
    archive.symlink(str(busybox / "busybox"), "/bin/busybox")
    applets = "uname nproc mount hostname stty poweroff"
    archive.file(str(busybox / "applets"), applets.encode())


def add_built(archive: CpioWriter, std: Path) -> None:
    """Add the native module and the guest's agent, built for arm64 with the standard library unpacked in `std`."""
    say(f"building the native module and the agent for {RUST_TARGET}")
    archive.file("kvmkit/src/kvmkit/_engine.abi3.so", build(TREE / "engine", std, "lib_engine.so"))
    archive.directory("kvmkit/src/kvmkit/guest")
    archive.file("kvmkit/src/kvmkit/guest/agent-aarch64", build(TREE / "agent", std, "kvmkit-agent"), 0o755)


def build(crate: Path, std: Path, name: str) -> bytes:
    """Build a crate for arm64 and return its product `name`."""
    cargo = f"CARGO_TARGET_{RUST_TARGET.upper().replace('-', '_')}"
    environment = {
        **os.environ,
        "RUSTC": RUSTC,
        f"{cargo}_LINKER": "aarch64-linux-gnu-gcc",
        f"{cargo}_RUSTFLAGS": f"-L {std}/usr/lib/rustlib/{RUST_TARGET}/lib",  # beside those of the crate's own
        "CARGO_PROFILE_RELEASE_STRIP": "true",
        # As maturin does it.
        "PYO3_NO_PYTHON": "1",
        "PYO3_BUILD_EXTENSION_MODULE": "1",
    }
    environment.pop("RUSTFLAGS", None)  # would take the place of all others
    target = crate / "target" / "testbed"
    command = ["cargo", "build", "--quiet", "--release", "--target", RUST_TARGET, "--target-dir", str(target)]
    try:
        subprocess.run(command, cwd=crate, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BedError(
            f"{crate.name} can't be built for arm64 ({error}): that takes cargo, and Debian's packages rustc-web, "
            "gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"
        ) from error
    return (target / RUST_TARGET / "release" / name).read_bytes()


def rustc_version() -> str:
    """The version of Debian's compiler."""
    try:
        return subprocess.run([RUSTC, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BedError(f"{RUSTC}: {error}: install Debian's package rustc-web") from error


# Running it.


@dataclass(frozen=True)
class Job:
    """Something that an L1 of its own does."""

    name: str
    script: str
    timeout_s: float
    linux: bool = False
    compiled: Path | None = None
    """A program in C, `/compiled` in L1."""
    expect: str = "."
    """A pattern that a line of the output must match."""


@dataclass
class Outcome:
    """How a job ended."""

    lines: list[str]
    seconds: float
    ready: bool = False
    status: int | None = None
    """The script's exit status; None if it was cut off."""


def run(bed: Bed, directory: Path, job: Job) -> Outcome:
    """Run a job in a new machine, its console on our stdout."""
    with tempfile.NamedTemporaryFile(prefix="kvmkit-testbed-", suffix=".cpio") as initrd:
        initrd.write((directory / "system.cpio").read_bytes())
        initrd.write(job_archive(bed, directory, job))
        initrd.flush()
        append = f"console={bed.console} quiet loglevel=1 panic=-1 random.trust_cpu=on"
        command = [
            *bed.qemu,
            "-display",
            "none",
            "-nodefaults",
            "-net",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]
        command += ["-kernel", str(directory / "vmlinuz"), "-initrd", initrd.name, "-append", append]
        if setpriv := shutil.which("setpriv"):  # the machine shall not outlive us, killed as we may be
            command = [setpriv, "--pdeathsig", "KILL", *command]
        start = time.monotonic()
        outcome = Outcome([], 0)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                for line in console(process, start, job.timeout_s, outcome):
                    print(line, flush=True)
            finally:
                process.kill()
        outcome.seconds = time.monotonic() - start
        return outcome


def console(
    process: "subprocess.Popen[bytes]", start: float, timeout_s: float, outcome: Outcome
) -> Iterator[str]:
    """Lines of the console, which `outcome` collects, until the machine ends or the time is over."""
    assert process.stdout is not None
    deadline = start + min(BOOT_TIMEOUT_S, timeout_s)
    rest = b""
    while select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for raw in whole:
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]", "", raw.decode(errors="replace"))
            if line == READY:
                outcome.ready = True
                deadline = start + timeout_s
            elif line.startswith(EXIT):
                outcome.status = int(line.removeprefix(EXIT))
            else:
                outcome.lines.append(line)
                yield line
    yield f"testbed: {'the time is over' if outcome.ready else 'the machine did not come up'}"


def succeeded(job: Job, outcome: Outcome) -> bool:
    """Whether a job did what it should."""
    return outcome.status == 0 and any(re.fullmatch(job.expect, line) for line in outcome.lines)


def run_with_retry(bed: Bed, directory: Path, job: Job) -> Outcome:
    """Run a job, again if the machine, or the Linux on top of it, didn't come up: emulated ones hang now and then."""
    outcome = run(bed, directory, job)
    if not succeeded(job, outcome) and (job.linux or not outcome.ready):
        say(f"{job.name}: failed after {outcome.seconds:.0f} s; a second and last time")
        outcome = run(bed, directory, job)
    return outcome


def record(lines: Sequence[str]) -> None:
    """Write the evidence that tests/kvm/evidence.py printed."""
    found = [match for line in lines if (match := re.fullmatch(r"kvm-api: (\S+) (.*)", line))]
    for environment in {match[1] for match in found}:
        text = "".join(match[2] + "\n" for match in found if match[1] == environment)
        (TREE / "docs" / "kvm-api" / f"{environment}.txt").write_text(text)


# The command.


def jobs(
    name: str, quick: bool, record: bool, tests: Sequence[str], shell: str | None, exits: bool
) -> list[Job]:
    """What was asked for."""
    if exits:
        bench = (
            "python3.11 bench/exits.py --engines linux --reference /compiled --repetitions 21 --kicks 500\n"
        )
        return [Job("exits", bench, 1800, compiled=TREE / "bench" / "exits.c", expect="linux .*ratio.*")]
    if shell is not None:
        return [Job("shell", shell, 3600, linux=True, expect=".*")]
    selection = " ".join(shlex.quote(test) for test in tests)
    if not selection:
        selection = " ".join(BEDS[name].quick) if quick else "tests/kvm"
    environment = f"KVMKIT_TEST_ENGINES=linux KVMKIT_RECORD_KVM_API={'print' if record else ''}"
    pytest = f"{environment} python3.11 -m pytest -v -p no:cacheprovider -p no:hypothesispytest"
    found = [Job("suite", f"uname -rm; {pytest} {selection}\n", 1800, expect=r"=+ .*\b[1-9]\d* passed\b.*=+")]
    if not tests and not quick:
        kvmkit = "python3.11 -m kvmkit"
        if name == "amd":
            one = f"{kvmkit} run --engine kvm --verbose --timeout 200 -- uname -r"
            two = f"{kvmkit} run --engine kvm --cpus 2 --timeout 200 -- sh -c 'uname -r; nproc'"
            found.append(Job("linux boot", f"{one}\n", 300, linux=True, expect=r"\d+\.\d+\.\d+\S*"))
            found.append(Job("linux boot, 2 vCPUs", f"{two}\n", 300, linux=True, expect="2"))
            move = f"{pytest} -rs tests/machine/test_move.py -k kvm\n"
            found.append(Job("linux moves", move, 600, linux=True, expect=r"=+ 2 passed\b.*=+"))
        else:
            # Compiling what both of kvmkit's processes import takes longer than the boot: once is enough.
            cached = "export PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=/tmp/bytecode"
            # Both processors, the streams apart, and the command's status.
            command = "sh -c 'echo $(uname -m) $(nproc); echo err >&2; exit 7'"
            run = f"{kvmkit} run --engine kvm --arch arm64 --cpus 2 --timeout 200 -- {command}"
            boot = f"{cached}; {run} >/tmp/out 2>/tmp/err; status=$?; echo $(cat /tmp/out /tmp/err) $status\n"
            found.append(Job("linux boot", boot, 300, linux=True, expect="aarch64 2 err 7"))
    return found


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bed", choices=BEDS, help="the real KVM to test on")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="tests for pytest, or options after --")
    parser.add_argument("--quick", action="store_true", help="some tests that stand for all, and no Linux")
    parser.add_argument("--record", action="store_true", help="write docs/kvm-api/kvm-BED.txt of what passed")
    parser.add_argument("--exits", action="store_true", help="run bench/exits.py instead (amd)")
    parser.add_argument("--shell", metavar="SCRIPT", help="run a shell script in L1 instead")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bed = BEDS[options.bed]
    results: list[str] = []
    failed = False
    try:
        if shutil.which(bed.qemu[0]) is None:
            raise BedError(f"no {bed.qemu[0]} here: install Debian's package for it")
        directory = system(bed)
        for job in jobs(
            options.bed, options.quick, options.record, options.tests, options.shell, options.exits
        ):
            outcome = run_with_retry(bed, directory, job)
            passed = succeeded(job, outcome)
            failed |= not passed
            matching = [line for line in outcome.lines if re.fullmatch(job.expect, line)]
            last = matching[-1].strip("= ") if matching else "nothing that was expected"
            if options.record and passed:
                record(outcome.lines)
            results.append(f"{job.name}: {'passed' if passed else 'FAILED'}, {outcome.seconds:.0f} s: {last}")
    except (BedError, GuestError) as error:
        say(str(error))
        return UNAVAILABLE
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(f"\ntest bed {options.bed} ({bed.kernel})\n  " + "\n  ".join(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
