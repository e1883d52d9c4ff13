"""The initramfs of the default guest, and the cpio archive that it is.

The archive has the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst): per entry a header of numbers in
ASCII hex, the name, the data, each padded to four bytes. Ours are the same bytes for the same content: no times, numbered inodes.

`/init` is a shell script for busybox. It prints ``kvmkit: init`` first and ``kvmkit: exit N`` after the command, each on
a line of its own, which is all that the VM process needs to know of it, then powers off.
"""

import io
import stat
from collections.abc import Mapping, Sequence
from typing import BinaryIO

INIT_MARKER = "kvmkit: init"
EXIT_MARKER = "kvmkit: exit"

_MAX_U32 = 0xFFFFFFFF
_CONSOLE, _NULL = (5, 1), (1, 3)


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


def quote(argument: str) -> bytes:
    """Quote for a POSIX shell: any bytes but NUL come through as they are. Bytes that are no UTF-8 are surrogates, as in `sys.argv`."""
    raw = argument.encode(errors="surrogateescape")
    if b"\0" in raw:
        raise ValueError(f"argument {argument!r}: a command's arguments can't hold NUL")
    return b"'" + raw.replace(b"'", b"'\\''") + b"'"


_INIT = f"""\
#!/bin/sh
echo '{INIT_MARKER}'
mount -a
. /etc/environment
if [ -e /etc/command ]; then
    # When the terminal's session leader ends, Linux drops what the terminal has not sent yet: the leader waits for
    # that first. stty does, before it changes anything.
    setsid cttyhack sh -c 'sh /etc/command; status=$?; stty echo; exit $status'
    status=$?
    echo
    echo "{EXIT_MARKER} $status"
else
    setsid cttyhack sh -l
fi
# The last close of the console waits until everything is out.
exec <>/dev/null >&0 2>&0
poweroff -f
"""

_FSTAB = """\
proc /proc proc defaults 0 0
sysfs /sys sysfs defaults 0 0
devtmpfs /dev devtmpfs defaults 0 0
tmpfs /tmp tmpfs mode=1777 0 0
"""

_PROFILE = "export PS1='\\w # '\n"

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "USER": "root", "TERM": "linux"}


def build_default_initramfs(
    command: Sequence[str] | None,
    busybox: bytes,
    applets: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Return the archive: busybox, a link for each of its `applets`, and an /init that runs `command`.

    The command is looked up in PATH, runs as root on the serial console in /root, and may end the machine itself.
    None, or an empty one, is an interactive shell. `environment` adds to PATH, HOME, USER and TERM, and may replace them.
    """
    variables = {**_ENVIRONMENT, **(environment or {})}
    output = io.BytesIO()
    archive = CpioWriter(output)
    for name in ("bin", "dev", "etc", "proc", "sys"):
        archive.directory(name)
    archive.directory("root", 0o700)
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", _CONSOLE)
    archive.character_device("dev/null", _NULL, 0o666)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in sorted({"sh", *applets} - {"busybox"}):
        archive.symlink(f"bin/{applet}", "busybox")
    archive.file("etc/fstab", _FSTAB.encode())
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("etc/profile", _PROFILE.encode())
    exports = [b"export " + name.encode() + b"=" + quote(value) + b"\n" for name, value in variables.items()]
    archive.file("etc/environment", b"".join(exports))
    if command:
        line = b" ".join(quote(argument) for argument in command)
        archive.file("etc/command", b"cd\nexec " + line + b"\n")
    archive.file("init", _INIT.encode(), 0o755)
    archive.close()
    return output.getvalue()
