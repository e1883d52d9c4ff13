"""What kvmkit raises beside `OSError` (the kernel's errors) and `ValueError` (wrong arguments)."""


class KvmkitError(Exception):
    """Anything that kvmkit itself reports. The message says what was wrong, where, and what to do."""


class VmError(KvmkitError):
    """A VM could not be started or its process failed: a kernel that isn't one, no engine, out of memory, …"""


class GuestDied(KvmkitError):
    """The guest ended by itself and not well: a kernel panic or a triple fault. `console_tail` is its last output."""

    def __init__(self, message: str, console_tail: str = "") -> None:
        """Keep the last output of the guest beside the message."""
        super().__init__(message)
        self.console_tail = console_tail


class VmTimeout(KvmkitError, TimeoutError):
    """The VM still ran when the time given was over."""
