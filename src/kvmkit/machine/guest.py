"""The default guest: Debian's cloud kernel and busybox, as the machine's own apt offers them.

apt works in a private directory with its own lists and cache, so neither root nor ``apt-get update`` is needed, nothing is
installed, and the machine's own apt state stays as it is. It verifies what it downloads (signed lists, checksums). What is
taken out of the packages is kept in ``${XDG_CACHE_HOME:-~/.cache}/kvmkit/guest-2``, a directory for each package, and used
until that is removed. A directory is complete or not there: it is filled under another name and renamed.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvmkit.machine.initramfs import build_initramfs

Progress = Callable[[str], None]

ARM64 = platform.machine() == "aarch64"
"""Whether guests are arm64's, as the host is; else they are x86-64's."""
ARCHITECTURE = "arm64" if ARM64 else "amd64"
"""The guest's, as Debian names it."""

CLOUD_KERNEL = f"linux-image-cloud-{ARCHITECTURE}"
GENERIC_KERNEL = f"linux-image-{ARCHITECTURE}"
_BUSYBOX = "busybox-static"


class GuestError(OSError):
    """A guest can't be had. The message says why, and what to do instead."""


@dataclass(frozen=True)
class Kernel:
    """A fetched kernel: two forms of the same, and where it came from."""

    vmlinuz: Path
    """The bzImage, or arm64's Image."""
    vmlinux: Path
    """What the bzImage unpacks: an ELF file, which boots without the guest unpacking it. On arm64 the same as `vmlinuz`."""
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

    def initramfs(self, boot: Mapping[str, Any], modules: Sequence[Path] = ()) -> bytes:
        """Build the initramfs whose init does what `boot` says; see `build_initramfs`. busybox is in it if it is to be the root."""
        if boot.get("root"):
            return build_initramfs(agent(), boot, modules)
        return build_initramfs(
            agent(), boot, modules, busybox=self.busybox.read_bytes(), applets=self.applets
        )


def console_command(argv: Sequence[str], *, always: bool = True) -> dict[str, Any]:
    """What to put into ``boot`` of `DefaultGuest.initramfs` to have a command run on the console, `always` or without vsock only."""
    return {"fallback_command": {"argv": [list(os.fsencode(word)) for word in argv], "always": always}}


def agent() -> bytes:
    """The program that runs in the guest as its init."""
    path = resources.files("kvmkit") / "guest" / f"agent-{platform.machine()}"
    try:
        return path.read_bytes()
    except OSError as error:
        raise GuestError(
            f"{path}: {error.strerror}: kvmkit's agent for the guest isn't built: run make build"
        ) from error


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
        directory / ("vmlinuz" if ARM64 else "vmlinux"),
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
