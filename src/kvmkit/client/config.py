"""What a machine is to be: frozen dataclasses, from Python, TOML or JSON."""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size_bytes(text: int | str) -> int:
    """Return a size in bytes: a number, or text like "256M", "1G", "262144K".

    >>> size_bytes("256M") == size_bytes(256 << 20) == 268435456
    True
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size: give e.g. 256M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True)
class Disk:
    """A file or block device of the host as a disk in the guest, raw."""

    path: str | os.PathLike[str]
    read_only: bool = False
    temporary: bool = False
    """What the guest writes goes when the machine does; the file stays as it is."""
    overlay: str | os.PathLike[str] | None = None
    """A file that keeps what the guest writes, instead of `path`; made if it isn't there. `path` must not change any more."""


@dataclass(frozen=True)
class Share:
    """A directory of the host in the guest, by virtiofs."""

    directory: str | os.PathLike[str]
    path: str
    """Where the guest has it; made if it isn't there."""
    read_only: bool = False


@dataclass(frozen=True)
class MachineConfig:
    """What to run. All of it has a default: Debian's kernel with busybox, 256 MiB, one vCPU, no network.

    >>> MachineConfig(memory="1G").memory_bytes
    1073741824
    >>> MachineConfig.from_json('{"root": "debian:bookworm", "shares": [{"directory": ".", "path": "/src"}]}').shares
    (Share(directory='.', path='/src', read_only=False),)
    """

    root: str | os.PathLike[str] | None = None
    """What the guest's root is made from: "debian:bookworm", an image (an ext4 file, an OCI layout, a ``docker save`` archive), or
    a directory of the host, "/" for its own root. What the guest writes there goes with the machine. None is busybox alone."""
    memory: int | str = 256 << 20
    """Bytes, or a size like "1G"."""
    arch: str = "host"
    """"host", "x86-64" or "arm64". No engine executes another than the host's yet."""
    cpus: int = 1
    """vCPUs, each a thread of the VM process."""
    cpu: str = "host"
    """What they can do: "host", "x86-64-v2", "-v3" or "-v4", and features: "host,-avx512f"."""
    console: str = "serial"
    """"serial", or "virtio" (hvc0), which is faster and knows the terminal's size."""
    disks: tuple[Disk, ...] = ()
    """Further disks."""
    shares: tuple[Share, ...] = ()
    network: str = "none"
    """"none", "user" (out to where the host gets, without root) or "tap:NAME"."""
    hostname: str = "kvmkit"
    environment: Mapping[str, str] = field(default_factory=dict)
    """For all commands."""
    name: str | None = None
    """For ``kvmkit exec`` and the like; None is one made up."""
    engine: str = "auto"
    """"auto", "kvm" or "soft": the kernel's KVM, kvmkit's own, or the faster one here."""
    kernel: str | os.PathLike[str] | None = None
    """A bzImage, ELF vmlinux or arm64 Image; None is Debian's cloud kernel."""
    modules: str | os.PathLike[str] | None = None
    """The directory of that kernel's modules, ``lib/modules/VERSION``, if it has virtio and vsock as modules."""
    initrd: str | os.PathLike[str] | None = None
    """A system of your own instead of `root`: there is no agent in it, only the console."""
    append: str = ""
    """Added to the kernel's command line."""
    testdev: bool = False
    """The kernel is a bare-metal test in the convention of kvm-unit-tests: a multiboot kernel with `append` as its arguments and
    `initrd` as its environment. What it wrote to the exit port is the detail of an end for reason "exit"."""
    agent: bool = True
    """Boot kvmkit's init with its agent, which `Machine.run` and the like talk to."""
    console_command: tuple[str, ...] = ()
    """A command that init runs on the serial console, and whose end is the machine's."""
    console_fallback: bool = False
    """Run `console_command` only if the kernel has no vsock, so that the agent can't be reached."""
    detached: bool = False
    """Go on when the program that started it ends; `Machine.attach` and ``kvmkit exec`` find it by its name."""
    verbose: bool = False
    """Have the kernel write its log on the console."""
    output_fd: int | None = None
    """Where the serial console's output goes; duplicated, so that it may be closed. None drops it, but for its end."""
    input_fd: int | None = None
    """What is typed on the serial console, until its end. None is nothing."""

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes; `ValueError` if it is no size."""
        return size_bytes(self.memory)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MachineConfig":
        """Make one of plain data, as TOML and JSON have it; `ValueError` names what is wrong."""
        try:
            return dacite.from_dict(cls, _with_tuples(dict(values)), dacite.Config(strict=True))
        except dacite.DaciteError as error:
            raise ValueError(f"machine: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> "MachineConfig":
        """Make one of a JSON object."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("machine: a JSON object is wanted")
        return cls.from_dict(values)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "MachineConfig":
        """Read a TOML file."""
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text()))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` makes the same of, without what is as by default and without descriptors."""
        values = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if callable(item.default_factory) else item.default
            if value != default and item.name not in ("output_fd", "input_fd"):
                values[item.name] = _plain(value)
        return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _with_tuples(value: Any) -> Any:
    """The same with each list a tuple."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
