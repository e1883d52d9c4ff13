"""What the client asks for: the first message on the control socket."""

import os
from dataclasses import dataclass
from typing import Any, get_type_hints

MIN_MEMORY_BYTES = 16 << 20
MAX_MEMORY_BYTES = 64 << 30
MAX_CPUS = 64


@dataclass(frozen=True)
class VmConfig:
    """One VM. Descriptors are numbers in this process, which the client passed on; -1 is none."""

    engine: str = "auto"
    kernel: str | None = None
    """A path; None is the default guest's."""
    initrd: str | None = None
    append: str = ""
    """Added to the kernel's command line."""
    memory_bytes: int = 256 << 20
    cpus: int = 1
    command: tuple[str, ...] = ()
    """Run in the default guest; empty is an interactive shell there."""
    output_fd: int = -1
    input_fd: int = -1
    die_with_parent: bool = False
    """Have the kernel kill this process when the thread that started it ends."""

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "VmConfig":
        """Check a message; `ValueError` names what is wrong."""
        types = get_type_hints(cls)
        if unknown := message.keys() - types.keys():
            raise ValueError(f"configuration: unknown {', '.join(sorted(unknown))}")
        values = dict(message)
        if "command" in values:
            values["command"] = _words(values["command"])
        for name, value in values.items():
            if name != "command" and not _is(value, types[name]):
                raise ValueError(f"configuration: {name} can't be {value!r:.80}")
        config = cls(**values)
        if config.engine not in ("auto", "kvm", "linux", "soft"):
            raise ValueError(f"engine {config.engine!r}: auto, kvm or soft")
        if not 1 <= config.cpus <= MAX_CPUS:
            raise ValueError(f"{config.cpus} vCPUs: from 1 to {MAX_CPUS}")
        if not MIN_MEMORY_BYTES <= config.memory_bytes <= MAX_MEMORY_BYTES or config.memory_bytes % 4096:
            raise ValueError(
                f"memory of {config.memory_bytes} bytes: whole pages from {MIN_MEMORY_BYTES >> 20} MiB "
                f"to {MAX_MEMORY_BYTES >> 30} GiB"
            )
        if config.command and config.initrd:
            raise ValueError(
                "a command runs in the default guest's initrd: give either a command or an initrd"
            )
        for name in ("output_fd", "input_fd"):
            if (fd := getattr(config, name)) >= 0:
                try:
                    os.fstat(fd)
                except (OSError, OverflowError):
                    raise ValueError(f"configuration: {name} {fd} isn't an open descriptor") from None
        return config


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"configuration: command can't be {value!r:.80}: a list of strings")
    return tuple(value)


def _is(value: object, type_: Any) -> bool:
    """Whether a JSON value has a type; true and false are no numbers."""
    return isinstance(value, type_) and (not isinstance(value, bool) or type_ is bool)
