"""The default guest: Debian's cloud kernel and busybox, as the machine's own apt offers them.

apt works in a private directory with its own lists and cache, so neither root nor ``apt-get update`` is needed, nothing is
installed, and the machine's own apt state stays as it is. It verifies what it downloads (signed lists, checksums). What is
taken out of the packages is kept in ``${XDG_CACHE_HOME:-~/.cache}/kvmkit/guest``, a directory for each package, and used until that is removed.
A directory is complete or not there: it is filled under another name and renamed.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvmkit.machine.initramfs import build_default_initramfs
from kvmkit.machine.x86.bzimage import extract_vmlinux

Progress = Callable[[str], None]

CLOUD_KERNEL = "linux-image-cloud-amd64"
GENERIC_KERNEL = "linux-image-amd64"
_BUSYBOX = "busybox-static"

_HINT = "give a kernel with --kernel, and an initramfs with --initrd"


class GuestError(OSError):
    """The default guest can't be had. The message says why, and what to do instead."""


@dataclass(frozen=True)
class Kernel:
    """A fetched kernel: two forms of the same, and where it came from."""

    vmlinuz: Path
    """The bzImage."""
    vmlinux: Path
    """What the bzImage unpacks: an ELF file, which boots without the guest unpacking it."""
    package: str
    version: str


@dataclass(frozen=True)
class DefaultGuest:
    """What it takes to boot the default guest."""

    kernel: Kernel
    busybox: Path
    applets: tuple[str, ...]

    def initramfs(self, command: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> bytes:
        """Build the initramfs that runs `command`, or a shell; see `build_default_initramfs`."""
        return build_default_initramfs(command, self.busybox.read_bytes(), self.applets, environment)


def cache_directory() -> Path:
    """Where fetched guests are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative one.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "kvmkit" / "guest"


def fetch_default_guest(progress: Progress = lambda _: None) -> DefaultGuest:
    """Return the default guest, from the cache or fetched. `GuestError`; `progress` gets a line for each step that takes time."""
    with _cache(progress) as cache:
        kernel = cache.kernel(CLOUD_KERNEL)
        busybox = cache.get(_BUSYBOX, _unpack_busybox)
    return DefaultGuest(kernel, busybox / "busybox", tuple((busybox / "applets").read_text().split()))


def fetch_kernel(package: str = CLOUD_KERNEL, progress: Progress = lambda _: None) -> Kernel:
    """Return the kernel that metapackage `package` (`CLOUD_KERNEL`, `GENERIC_KERNEL`) depends on, likewise."""
    with _cache(progress) as cache:
        return cache.kernel(package)


class _Cache:
    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory = directory
        self._progress = progress
        self._apt: _Apt | None = None

    def kernel(self, package: str) -> Kernel:
        """Return a kernel, fetching it if need be."""
        directory = self.get(package, self._unpack_kernel)
        about = json.loads((directory / "package").read_text())
        return Kernel(directory / "vmlinuz", directory / "vmlinux", about["package"], about["version"])

    def get(self, package: str, unpack: Callable[[Path, Path], None]) -> Path:
        """Return the directory of `package`; where there is none, fetch it and let `unpack(deb, directory)` fill one."""
        directory = self._directory / package
        if directory.is_dir():
            return directory
        with _locked(self._directory):
            if directory.is_dir():  # somebody else was faster
                return directory
            if self._apt is None:
                for left_over in self._directory.glob(".fetch-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
                self._apt = _Apt(
                    Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._directory)), self._progress
                )
            new = Path(tempfile.mkdtemp(prefix=".fetch-", dir=self._directory))
            try:
                deb, name, version = self._apt.download(package)
                self._progress(f"unpacking {name} {version}")
                unpack(deb, new)
                (new / "package").write_text(json.dumps({"package": name, "version": version}) + "\n")
                new.chmod(0o755)
                new.rename(directory)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return directory

    def close(self) -> None:
        if self._apt is not None:
            self._apt.close()

    @staticmethod
    def _unpack_kernel(deb: Path, directory: Path) -> None:
        vmlinuz = _member(deb, re.compile(r"(\./)?(usr/lib/modules/[^/]+|boot)/vmlinuz[^/]*"))
        (directory / "vmlinuz").write_bytes(vmlinuz)
        (directory / "vmlinux").write_bytes(extract_vmlinux(vmlinuz, str(deb.name)))


def _unpack_busybox(deb: Path, directory: Path) -> None:
    busybox = directory / "busybox"
    busybox.write_bytes(_member(deb, re.compile(r"(\./)?(usr/)?bin/busybox")))
    busybox.chmod(0o755)
    listing = _output_of([str(busybox), "--list"], "listing busybox's applets")
    (directory / "applets").write_text(listing)


@contextmanager
def _cache(progress: Progress) -> Iterator[_Cache]:
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestError(
            f"{directory}: {error.strerror}; set XDG_CACHE_HOME to where the guest may be kept, or {_HINT}"
        ) from error
    cache = _Cache(directory, progress)
    try:
        yield cache
    finally:
        cache.close()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the cache's lock; it ends with the process, however that ends."""
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Apt:
    """apt with a state of its own, below `directory`."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        self._directory = directory
        self._progress = progress
        self._environment: dict[str, str] | None = None

    def download(self, package: str) -> tuple[Path, str, str]:
        """Download a package, or the kernel image that a metapackage depends on: file, name and version."""
        if self._environment is None:
            self._environment = self._set_up()
            self._progress("asking apt's sources for their package lists")
            self._run(["apt-get", "update", "-q"], "apt-get update")
        fields = self._show(package)
        image = re.search(r"\blinux-image-\d[^\s,(]*", fields.get("Depends", ""))
        if image and not re.match(r"linux-image-\d", package):
            package = image[0]
            fields = self._show(package)
        version = fields["Version"]
        self._progress(f"downloading {package} {version} ({int(fields.get('Size', 0)) / 1e6:.1f} MB)")
        self._run(["apt-get", "download", "-q", f"{package}={version}"], f"apt-get download {package}")
        debs = list(self._directory.glob(f"{package}_*.deb"))
        if len(debs) != 1:
            raise GuestError(f"apt-get download {package} left {len(debs)} packages behind; {_HINT}")
        return debs[0], package, version

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _set_up(self) -> dict[str, str]:
        for tool in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise GuestError(f"the default guest is fetched by apt, and there is no {tool} here: {_HINT}")
        # How this machine reaches its sources (proxies, certificates), without its hooks and additional indexes.
        dump = _output_of(["apt-config", "dump"], "apt-config")
        acquire = [
            line
            for line in dump.splitlines()
            if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
        ]
        for name in ("lists/partial", "cache/archives/partial", "log"):
            (self._directory / name).mkdir(parents=True)
        (self._directory / "status").touch()
        here = self._directory
        config = here / "apt.conf"
        settings = {
            "Dir::State": here,
            "Dir::State::lists": here / "lists",
            "Dir::State::status": here / "status",
            "Dir::Cache": here / "cache",
            "Dir::Log": here / "log",
            "Dir::Etc::Parts": here / "none",
            "Dir::Etc::Main": here / "none",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "",  # the user _apt can't come in here, and all are ours
            "Acquire::Languages": "none",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        config.write_text("\n".join(["#clear APT::Architectures;", *acquire, *lines]) + "\n")
        return {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}

    def _show(self, package: str) -> dict[str, str]:
        """Return the fields of the candidate."""
        try:
            text = self._run(["apt-cache", "show", "--no-all-versions", package], f"apt-cache show {package}")
        except GuestError as error:
            raise GuestError(f"apt's sources offer no {package}: {_HINT}") from error
        fields = {}
        for line in text.split("\n\n")[0].splitlines():
            if line[:1].strip() and ": " in line:
                name, value = line.split(": ", 1)
                fields[name] = value
        return fields

    def _run(self, command: list[str], what: str) -> str:
        return _output_of(command, what, self._directory, self._environment)


def _output_of(
    command: list[str], what: str, directory: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run and return stdout. What it says in failing is the error's."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise GuestError(f"{what} failed with status {done.returncode}: {said or 'no message'}\n{_HINT}")
    return done.stdout


def _member(deb: Path, name: re.Pattern[str]) -> bytes:
    """Return the one regular file in `deb` whose name matches."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        stream: IO[bytes] | None = process.stdout
        assert stream is not None
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    file = (
                        archive.extractfile(member)
                        if member.isreg() and name.fullmatch(member.name)
                        else None
                    )
                    if file is not None:
                        return file.read()
        except tarfile.TarError as error:
            raise GuestError(f"{deb.name}: {error}") from error
        finally:
            process.kill()  # not interested in the rest
    raise GuestError(f"{deb.name} holds no {name.pattern}; {_HINT}")
