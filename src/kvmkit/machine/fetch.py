"""Filling the cache of guests: each package is fetched and unpacked once, whoever asks for it how often at the same time."""

import fcntl
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvmkit.machine import modules
from kvmkit.machine.debian import HINT, Apt, member, members, output_of
from kvmkit.machine.guest import ARCHITECTURE, ARM64, GuestError
from kvmkit.machine.x86.bzimage import extract_vmlinux

_UNFINISHED = ".fetch-"


def fill(directory: Path, packages: Sequence[str], progress: Callable[[str], None]) -> None:
    """Fetch those of `packages` that have no directory in `directory`. `GuestError` if that can't be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            for left_over in directory.glob(
                _UNFINISHED + "*"
            ):  # of somebody who was killed: we hold the lock
                shutil.rmtree(left_over, ignore_errors=True)
            with Apt(_new(directory), progress, ARCHITECTURE) as apt:
                for package in packages:
                    if not (directory / package).is_dir():  # somebody else may have been faster
                        _fetch(apt, package, directory, progress)
    except GuestError:
        raise
    except OSError as error:
        raise GuestError(
            f"{error.filename or directory}: {error.strerror}: free space there or set XDG_CACHE_HOME to another place, or {HINT}"
        ) from error


def _fetch(apt: Apt, package: str, directory: Path, progress: Callable[[str], None]) -> None:
    deb, name, version = apt.download(package)
    progress(f"unpacking {name} {version}")
    new = _new(directory)
    try:
        (_unpack_kernel if name.startswith("linux-image-") else _unpack_busybox)(deb, new)
        (new / "package").write_text(json.dumps({"package": name, "version": version}) + "\n")
        new.chmod(0o755)
        new.rename(directory / package)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unpack_kernel(deb: Path, directory: Path) -> None:
    vmlinuz = member(deb, re.compile(r"(\./)?(usr/lib/modules/[^/]+|boot)/vmlinuz[^/]*"))
    (directory / "vmlinuz").write_bytes(vmlinuz)
    if not ARM64:
        (directory / "vmlinux").write_bytes(extract_vmlinux(vmlinuz, deb.name))
    found = (modules.parse(name, data) for name, data in members(deb, modules.PATTERN))
    modules.save(directory / "modules", found)


def _unpack_busybox(deb: Path, directory: Path) -> None:
    busybox = directory / "busybox"
    busybox.write_bytes(member(deb, re.compile(r"(\./)?(usr/)?bin/busybox")))
    busybox.chmod(0o755)
    (directory / "applets").write_text(output_of([str(busybox), "--list"], "listing busybox's applets"))


def _new(directory: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the cache's lock; it ends with the process, however that ends."""
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
