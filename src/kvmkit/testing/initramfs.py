"""An initramfs for tests and measurements: busybox, programs of the host with their libraries, a shell script to run."""

import io
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kvmkit.machine.guest import DefaultGuest
from kvmkit.machine.initramfs import CpioWriter
from kvmkit.machine.modules import choose

_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in $(cat /modules/order); do insmod /modules/$module; done
sh /script
exec <>/dev/null >&0 2>&0
poweroff -f
"""


def libraries(program: str) -> list[str]:
    """Return the paths of what a program loads; none of a static one."""
    found = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return re.findall(r"(?:=> |\t)(/\S+) \(", found)


def initramfs(guest: DefaultGuest, modules: Sequence[str], programs: Sequence[str], script: str) -> bytes:
    """Build it: `modules` and what they need are loaded, then `script` runs, then the machine is powered off.

    `programs` are paths, or looked up in PATH; the guest has them in ``/bin``. `FileNotFoundError`.
    """
    output = io.BytesIO()
    archive = CpioWriter(output)
    directories: set[str] = set()

    def directory(name: str) -> None:
        if name and name not in directories:
            directory(os.path.dirname(name))
            directories.add(name)
            archive.directory(name)

    for name in ("bin", "dev", "mnt", "modules", "proc", "sys", "tmp"):
        directory(name)
    archive.character_device("dev/console", (5, 1))
    archive.character_device("dev/null", (1, 3), 0o666)
    archive.file("bin/busybox", guest.busybox.read_bytes(), 0o755)
    for applet in guest.applets:
        if applet != "busybox":
            archive.symlink(f"bin/{applet}", "busybox")
    chosen = choose(guest.kernel.modules, modules)
    for module in chosen:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{module.name}\n" for module in chosen).encode())
    needed: set[str] = set()
    for program in programs:
        path = shutil.which(program)
        if path is None:
            raise FileNotFoundError(f"no {program} here: install it")
        archive.file(f"bin/{os.path.basename(path)}", Path(path).read_bytes(), 0o755)
        needed.update(libraries(path))
    for path in sorted(needed):
        directory(os.path.dirname(path).lstrip("/"))
        archive.file(path.lstrip("/"), Path(path).read_bytes(), 0o755)
    archive.file("script", script.encode())
    archive.file("init", _INIT.encode(), 0o755)
    archive.close()
    return output.getvalue()
