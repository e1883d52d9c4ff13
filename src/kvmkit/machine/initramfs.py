"""The initramfs of the default guest, and the cpio archive that it is.

The archive has the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst): per entry a header of numbers in
ASCII hex, the name, the data, each padded to four bytes. Ours are the same bytes for the same content: no times, numbered inodes.

`/init` is kvmkit's agent (the crate `agent`). It prints ``kvmkit: init`` first, and ``kvmkit: exit N`` after a command that it ran
on the console, each on a line of its own; all else it has to say goes over vsock.
"""

import io
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_MAX_U32 = 0xFFFFFFFF
_CONSOLE, _NULL = (5, 1), (1, 3)

_PROFILE = "export PS1='\\w # '\n"


class CpioWriter:
    """Writes a newc archive to `output`, entry by entry. Parents come before what is in them, `close` at the end."""

    def __init__(self, output: BinaryIO) -> None:
        """Start an archive where `output` stands, which has to be a multiple of four bytes."""
        self._output = output
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory. Names are relative to the root."""
        self._entry(name, stat.S_IFDIR | mode, links=2)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file."""
        self._entry(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, number: tuple[int, int], mode: int = 0o600) -> None:
        """Add a device node, `number` being major and minor. It takes no privilege: this is a file format."""
        self._entry(name, stat.S_IFCHR | mode, device=number)

    def close(self) -> None:
        """Write the trailer. The output stays open."""
        self._inode = -1
        self._entry("TRAILER!!!", 0)

    def _entry(
        self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0), links: int = 1
    ) -> None:
        raw = name.encode(errors="surrogateescape")
        if not raw or raw.startswith(b"/") or b"\0" in raw or b".." in raw.split(b"/"):
            raise ValueError(f"name {name!r} in an initramfs: relative, without .. and NUL")
        if len(data) > _MAX_U32:
            raise ValueError(f"{name}: {len(data)} bytes; a file in a newc archive ends below 4 GiB")
        self._inode += 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        numbers = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(raw) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + raw + b"\0"
        self._output.write(header + bytes(-len(header) % 4))
        self._output.write(data)
        self._output.write(bytes(-len(data) % 4))


ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
}
"""What commands in the guest have, unless they are told otherwise."""


def build_initramfs(
    agent: bytes,
    boot: Mapping[str, Any],
    modules: Sequence[Path] = (),
    *,
    busybox: bytes = b"",
    applets: Sequence[str] = (),
) -> bytes:
    """Return the archive: `agent` as init, which reads `boot` (agent/src/init.rs says what that holds) and loads `modules`.

    With `busybox`, a link for each of its `applets`, and what makes that a system of its own. ``environment`` of `boot` adds to
    PATH, HOME and USER, and may replace them.
    """
    output = io.BytesIO()
    archive = CpioWriter(output)
    for name in ("bin", "dev", "etc", "etc/kvmkit", "lib", "lib/modules", "newroot", "proc", "run", "sys"):
        archive.directory(name)
    archive.directory("root", 0o700)
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", _CONSOLE)
    archive.character_device("dev/null", _NULL, 0o666)
    archive.file("init", agent, 0o755)
    for module in modules:
        archive.file(f"lib/modules/{module.name}", module.read_bytes())
    settings = {
        **boot,
        "modules": [f"/lib/modules/{module.name}" for module in modules],
        "environment": {**ENVIRONMENT, **boot.get("environment", {})},
    }
    archive.file("etc/kvmkit/boot.json", json.dumps(settings).encode())
    if busybox:
        archive.file("bin/busybox", busybox, 0o755)
        for applet in sorted({"sh", *applets} - {"busybox"}):
            archive.symlink(f"bin/{applet}", "busybox")
        archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
        archive.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        archive.file("etc/profile", _PROFILE.encode())
    archive.close()
    return output.getvalue()
