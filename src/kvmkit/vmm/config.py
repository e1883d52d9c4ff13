"""What the client asks for: the first message on the control socket."""

import os
from dataclasses import dataclass, fields
from typing import Any

import dacite

from kvmkit.machine.guest import ARM64

MIN_MEMORY_BYTES = 16 << 20
MAX_MEMORY_BYTES = 64 << 30
MAX_CPUS = 64
MAX_SHARES = 8
MAX_DISKS = 8


@dataclass(frozen=True)
class DiskConfig:
    """A block device of the guest: /dev/vda, or the next letter if the root is one."""

    path: str
    read_only: bool = False
    temporary: bool = False
    """What the guest writes goes with the VM; the file is only read."""
    overlay: str | None = None
    """A file for what the guest writes; `path` is only read. Made if it isn't there."""


@dataclass(frozen=True)
class ShareConfig:
    """A directory of the host in the guest."""

    directory: str
    path: str
    """Where the guest has it."""
    read_only: bool = False


@dataclass(frozen=True)
class RootConfig:
    """The guest's root: an image (`fstype` on a read-only base) or a directory of the host. Writes go with the VM."""

    path: str
    fstype: str
    """"ext4", …; "virtiofs" for a directory."""


@dataclass(frozen=True)
class VmConfig:
    """One VM. Descriptors are numbers in this process, which the client passed on; -1 is none."""

    engine: str = "auto"
    kernel: str | None = None
    """A path; None is the default guest's."""
    modules: str | None = None
    """A directory with the kernel's modules (``lib/modules/VERSION``); None is the default guest's, or none of another kernel."""
    initrd: str | None = None
    append: str = ""
    """Added to the kernel's command line."""
    memory_bytes: int = 256 << 20
    cpus: int = 1
    arch: str = "host"
    """"host", "x86-64" or "arm64"."""
    cpu: str = "host"
    """What the vCPUs can do: "host" or a level, with features added and taken away (`kvmkit.machine.x86.cpu_model`)."""
    console: str = "serial"
    """"serial", or "virtio": what the kernel writes early is on the serial port even so, and in the console's log alone."""
    testdev: bool = False
    """The kernel is a bare-metal test in the convention of kvm-unit-tests, `initrd` its environment, `append` its arguments."""
    agent: bool = False
    """Boot kvmkit's own init, which the client then talks to by vsock."""
    hostname: str = "kvmkit"
    root: RootConfig | None = None
    """None is the default guest's."""
    disks: tuple[DiskConfig, ...] = ()
    shares: tuple[ShareConfig, ...] = ()
    network: str = "none"
    """"none", "user" or "tap:NAME"."""
    console_command: tuple[str, ...] = ()
    """Run by init on the serial console; the VM ends when it does."""
    console_fallback: bool = False
    """Run `console_command` only in a guest whose kernel has no vsock for the agent."""
    environment: tuple[tuple[str, str], ...] = ()
    """Added to that of whatever runs in the guest."""
    output_fd: int = -1
    input_fd: int = -1
    verbose: bool = False
    """The kernel may write what it likes on the console."""
    directory: str | None = None
    """The VM's (`kvmkit.runtime`)."""
    lock_fd: int = -1
    """Holds that directory's lock; it is just kept open."""
    detached: bool = False
    """Go on when the client is gone."""
    die_with_parent: bool = False
    """Have the kernel kill this process when the thread that started it ends."""

    @property
    def runs_our_init(self) -> bool:
        """Whether the initramfs is ours, not the user's."""
        return self.agent or bool(self.console_command)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "VmConfig":
        """Check a message; `ValueError` names what is wrong."""
        try:
            config = dacite.from_dict(cls, _with_tuples(message), dacite.Config(strict=True))
        except dacite.DaciteError as error:
            raise ValueError(f"configuration: {error}") from None
        config.check()
        return config

    def check(self) -> None:
        """`ValueError` names what can't be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) != (field.type is bool):  # true and false are no numbers
                raise ValueError(f"configuration: {field.name} can't be {value!r}")
        if self.engine not in ("auto", "kvm", "linux", "soft"):
            raise ValueError(f"engine {self.engine!r}: auto, kvm or soft")
        _check_arch(self.arch)
        if self.console not in ("serial", "virtio"):
            raise ValueError(f"console {self.console!r}: serial or virtio")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ValueError(f"{self.cpus} vCPUs: from 1 to {MAX_CPUS}")
        if not MIN_MEMORY_BYTES <= self.memory_bytes <= MAX_MEMORY_BYTES or self.memory_bytes % 4096:
            raise ValueError(
                f"memory of {self.memory_bytes} bytes: whole pages from {MIN_MEMORY_BYTES >> 20} MiB "
                f"to {MAX_MEMORY_BYTES >> 30} GiB"
            )
        if self.runs_our_init and self.initrd:
            raise ValueError("commands run on kvmkit's own initrd: give either a command or an initrd")
        if self.testdev and (
            self.kernel is None
            or self.runs_our_init
            or self.root is not None
            or self.disks
            or self.shares
            or self.network != "none"
            or self.console != "serial"
        ):
            raise ValueError(
                "testdev: a test kernel has its serial port and nothing else: give a kernel, and no command, root, disks, shares, "
                "network or virtio console"
            )
        if self.agent and self.directory is None:
            raise ValueError("configuration: an agent takes a directory for its socket")
        for what, given, most in (("disks", self.disks, MAX_DISKS), ("shares", self.shares, MAX_SHARES)):
            if len(given) > most:
                raise ValueError(f"{len(given)} {what}: at most {most}")
        for disk in self.disks:
            if disk.read_only + disk.temporary + (disk.overlay is not None) > 1:
                raise ValueError(f"disk {disk.path}: one of read-only, temporary and overlay")
        for name in ("output_fd", "input_fd", "lock_fd"):
            if (fd := getattr(self, name)) >= 0:
                try:
                    os.fstat(fd)
                except (OSError, OverflowError):
                    raise ValueError(f"configuration: {name} {fd} isn't an open descriptor") from None


def _check_arch(arch: str) -> None:
    """`ValueError` for a guest of another architecture than the host's."""
    host = "arm64" if ARM64 else "x86-64"
    if arch not in ("host", "x86-64", "arm64"):
        raise ValueError(f"arch {arch!r}: host, x86-64 or arm64")
    if arch not in ("host", host):
        takes = "an arm64 host with /dev/kvm" if arch == "arm64" else "an x86-64 host"
        raise ValueError(
            f"arch {arch!r}: an {arch} guest takes {takes}, and this host is {host}: "
            "the kernel's KVM runs the host's own code, and kvmkit's software engine x86-64's on x86-64 alone so far"
        )


def _with_tuples(value: Any) -> Any:
    """The same with each of JSON's lists a tuple."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
