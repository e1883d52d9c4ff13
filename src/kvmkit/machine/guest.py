"""The default guest: Debian's cloud kernel and busybox, as the machine's own apt offers them.

apt works in a private directory with its own lists and cache, so neither root nor ``apt-get update`` is needed, nothing is
installed, and the machine's own apt state stays as it is. It verifies what it downloads (signed lists, checksums). What is
taken out of the packages is kept in ``${XDG_CACHE_HOME:-~/.cache}/kvmkit/guest-2``, a directory for each package, and used
until that is removed. A directory is complete or not there: it is filled under another name and renamed.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmkit.machine.initramfs import build_default_initramfs

Progress = Callable[[str], None]

CLOUD_KERNEL = "linux-image-cloud-amd64"
GENERIC_KERNEL = "linux-image-amd64"
_BUSYBOX = "busybox-static"


class GuestError(OSError):
    """A guest can't be had. The message says why, and what to do instead."""


@dataclass(frozen=True)
class Kernel:
    """A fetched kernel: two forms of the same, and where it came from."""

    vmlinuz: Path
    """The bzImage."""
    vmlinux: Path
    """What the bzImage unpacks: an ELF file, which boots without the guest unpacking it."""
    modules: Path
    """A directory of its modules for virtio; see `kvmkit.machine.modules`."""
    package: str
    version: str


@dataclass(frozen=True)
class DefaultGuest:
    """What it takes to boot the default guest."""

    kernel: Kernel
    busybox: Path
    applets: tuple[str, ...]

    def initramfs(self, command: Sequence[str] = (), environment: dict[str, str] | None = None) -> bytes:
        """Build the initramfs that runs `command`, or a shell; see `build_default_initramfs`."""
        return build_default_initramfs(command, self.busybox.read_bytes(), self.applets, environment)


def cache_directory() -> Path:
    """Where fetched guests are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative one.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "kvmkit" / "guest-2"


def fetch_default_guest(progress: Progress = lambda _: None) -> DefaultGuest:
    """Return the default guest, from the cache or fetched; `progress` gets a line for each step that takes time.

    `GuestError` says why that can't be and what to do instead.
    """
    _fetch([CLOUD_KERNEL, _BUSYBOX], progress)
    busybox = cache_directory() / _BUSYBOX
    return DefaultGuest(
        _kernel(CLOUD_KERNEL), busybox / "busybox", tuple((busybox / "applets").read_text().split())
    )


def fetch_kernel(package: str = CLOUD_KERNEL, progress: Progress = lambda _: None) -> Kernel:
    """Return the kernel that metapackage `package` (`CLOUD_KERNEL`, `GENERIC_KERNEL`) depends on, likewise."""
    _fetch([package], progress)
    return _kernel(package)


def _kernel(package: str) -> Kernel:
    directory = cache_directory() / package
    about = json.loads((directory / "package").read_text())
    return Kernel(
        directory / "vmlinuz",
        directory / "vmlinux",
        directory / "modules",
        about["package"],
        about["version"],
    )


def _fetch(packages: Sequence[str], progress: Progress) -> None:
    """See to it that the cache has the packages."""
    directory = cache_directory()
    if not all((directory / package).is_dir() for package in packages):
        from kvmkit.machine import fetch  # seldom needed, and slow to import

        fetch.fill(directory, packages, progress)
