"""What the client asks for: the first message on the control socket."""

from dataclasses import dataclass, fields
from typing import Any

MIN_MEMORY_BYTES = 16 << 20
MAX_MEMORY_BYTES = 64 << 30


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
    command: tuple[str, ...] = ()
    """Run in the default guest; empty is an interactive shell there."""
    output_fd: int = -1
    input_fd: int = -1
    die_with_parent: bool = False
    """Have the kernel kill this process when the thread that started it ends."""

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "VmConfig":
        """Check a message; `ValueError` names what is wrong."""
        known = {field.name for field in fields(cls)}
        if unknown := message.keys() - known:
            raise ValueError(f"configuration: unknown {', '.join(sorted(unknown))}")
        config = cls(**{**message, "command": tuple(message.get("command", ()))})
        if config.engine not in ("auto", "kvm", "linux", "soft"):
            raise ValueError(f"engine {config.engine!r}: auto, kvm or soft")
        if not MIN_MEMORY_BYTES <= config.memory_bytes <= MAX_MEMORY_BYTES or config.memory_bytes % 4096:
            raise ValueError(
                f"memory of {config.memory_bytes} bytes: whole pages from {MIN_MEMORY_BYTES >> 20} MiB "
                f"to {MAX_MEMORY_BYTES >> 30} GiB"
            )
        if config.command and config.initrd:
            raise ValueError(
                "a command runs in the default guest's initrd: give either a command or an initrd"
            )
        return config
