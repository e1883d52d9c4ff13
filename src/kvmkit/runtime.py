"""Where running VMs are found: a directory for each, with its sockets, below one of the user's own.

The base is ``$XDG_RUNTIME_DIR/kvmkit``, or ``/tmp/kvmkit-UID`` where there is none. In a VM's directory:

- ``lock``: locked (flock) as long as its VM process lives, which is how a dead one is told from a live one;
- ``vm.json``: what it is, for ``kvmkit ps``; ``end.json``: how it ended, if it was detached;
- ``control.sock``: requests and events (`kvmkit.vmm.control`);
- ``vsock.sock``: the guest's vsock ports, in Firecracker's convention (`kvmkit.devices.virtio.vsock`);
- ``console.sock``: the serial console, for one client at a time;
- ``console.log``: the serial console's output, or that of the command on it, the last few MiB;
- ``process.log``: warnings and errors of the VM process, if it was detached.
"""

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmkit.errors import KvmkitError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_MAX_SOCKET_PATH_BYTES = 107
_ABANDONED_S = 60.0
_LONGEST = "/vsock.sock_4294967295"


def base_directory() -> Path:
    """Return the user's own directory for VMs, made if it isn't there. `KvmkitError` if it is somebody else's."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(tempfile.gettempdir()) / f"kvmkit-{os.getuid()}"
    if given.startswith("/") and os.access(given, os.W_OK):
        base = Path(given) / "kvmkit"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        status = base.lstat()
    except OSError as error:
        raise KvmkitError(
            f"{base}: {error.strerror}: VMs have their sockets there; set XDG_RUNTIME_DIR to a directory of yours"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise KvmkitError(
            f"{base} isn't a directory that only you may write: remove it, or set XDG_RUNTIME_DIR"
        )
    return base


@dataclass(frozen=True)
class VmDirectory:
    """The directory of one VM."""

    path: Path

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.path.name

    @property
    def control(self) -> Path:
        """Its control socket."""
        return self.path / "control.sock"

    @property
    def vsock(self) -> Path:
        """Its vsock's socket."""
        return self.path / "vsock.sock"

    @property
    def console(self) -> Path:
        """The socket of its serial console."""
        return self.path / "console.sock"

    @property
    def console_log(self) -> Path:
        """What its console wrote."""
        return self.path / "console.log"

    @property
    def process_log(self) -> Path:
        """What a detached VM process itself had to say."""
        return self.path / "process.log"

    def alive(self) -> bool:
        """Whether its VM process runs."""
        try:
            with open(self.path / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def read(self, name: str) -> dict[str, Any]:
        """Return ``vm.json`` or ``end.json``; empty if it isn't there or is no JSON object."""
        try:
            value = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write ``vm.json`` or ``end.json``, whole or not at all."""
        new = self.path / f".{name}"
        new.write_text(json.dumps(value) + "\n")
        new.replace(self.path / name)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def create(name: str | None) -> tuple[VmDirectory, int]:
    """Make the directory for a new VM. Returns it and the descriptor that holds its lock, for the VM process to inherit.

    `KvmkitError` if `name` can't be one or a VM of that name runs; one that doesn't run any more makes room. None is any name.
    """
    base = base_directory()
    if name is None:
        path = Path(tempfile.mkdtemp(prefix="vm-", dir=base))
    else:
        if not NAME.fullmatch(name):
            raise KvmkitError(
                f"name {name!r}: letters, digits, '_', '.' and '-', a letter or digit first, 63 at most"
            )
        path = base / name
    if len(os.fsencode(path)) + len(_LONGEST) > _MAX_SOCKET_PATH_BYTES:
        if name is None:
            path.rmdir()
        raise KvmkitError(f"{path} is too long for the sockets in it: set XDG_RUNTIME_DIR to a shorter one")
    directory = VmDirectory(path)
    fd = _lock(path)
    if fd is None:
        raise KvmkitError(
            f"a VM named {name!r} runs already: stop it (kvmkit stop {name}) or take another name"
        )
    for left_over in path.iterdir():  # of one that has ended
        if left_over.name != "lock":
            with suppress(OSError):
                left_over.unlink()
    return directory, fd


def _lock(path: Path) -> int | None:
    """Make the directory and lock it; None if somebody else has."""
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # somebody just removed it
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path / "lock")):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        os.close(fd)  # of a directory that somebody just removed


def find(name: str) -> VmDirectory:
    """Return the directory of a VM that runs. `KvmkitError` if none of that name does."""
    directory = VmDirectory(base_directory() / name)
    if not NAME.fullmatch(name) or not directory.alive():
        running = ", ".join(d.name for d in every() if d.alive()) or "none"
        raise KvmkitError(f"no VM named {name!r} runs (running: {running})")
    return directory


def find_any(name: str) -> VmDirectory:
    """Return the directory of a VM, running or ended. `KvmkitError` if there is none of that name."""
    for directory in every():
        if directory.name == name:
            return directory
    raise KvmkitError(f"no VM named {name!r}")


def every() -> list[VmDirectory]:
    """Return the directories of all VMs of this user, running or ended, by name. What a killed one left behind is removed."""
    found = []
    for path in sorted(base_directory().iterdir()):
        directory = VmDirectory(path)
        if not directory.alive() and not (path / "end.json").exists():
            # One without vm.json may be about to be locked by somebody who has just made it.
            if (path / "vm.json").exists() or time.time() - path.stat().st_mtime > _ABANDONED_S:
                directory.remove()
            continue
        found.append(directory)
    return found
