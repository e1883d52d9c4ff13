"""The init of an arm64 guest: a shell script that runs one command on the console and powers off.

It stands in for the agent, which isn't built for arm64, and prints the same marker lines (`kvmkit.vmm.console`).
"""

import re
import shlex
from collections.abc import Mapping, Sequence

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def script(argv: Sequence[str], hostname: str, environment: Mapping[str, str]) -> bytes:
    """Return the script. `ValueError` for a variable that a shell can't have.

    Before it powers off it changes the terminal, which waits until all output is sent.
    """
    exports = []
    for name, value in environment.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"environment variable {name!r}: the guest's shell takes letters, digits and _")
        exports.append(f"export {name}={shlex.quote(value)}")
    lines = [
        "#!/bin/sh",
        "mount -t proc proc /proc",
        "mount -t sysfs sysfs /sys",
        "mount -t devtmpfs devtmpfs /dev",
        f"hostname {shlex.quote(hostname)}",
        "echo 'kvmkit: init'",
        *exports,
        "cd",
        "echo 'kvmkit: command'",
        f"({shlex.join(argv)})",
        "status=$?",
        "echo",
        'echo "kvmkit: exit $status"',
        "stty -echo",
        "poweroff -f",
    ]
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")
