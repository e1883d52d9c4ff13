"""What kvmkit raises beside `OSError` (the kernel's errors) and `ValueError` (wrong arguments)."""


class KvmkitError(Exception):
    """Anything that kvmkit itself reports. The message says what was wrong, where, and what to do."""


class VmError(KvmkitError):
    """A VM could not be started or its process failed: a kernel that isn't one, no engine, out of memory, …"""


class ImageError(KvmkitError):
    """An image can't be made or used: it isn't one, it is damaged or malicious, a tool is missing."""


class VmTimeout(KvmkitError, TimeoutError):
    """The VM still ran when the time given was over."""


class AgentError(KvmkitError):
    """The agent in a guest can't be reached, went away, or can't do what was asked."""


class ProtocolError(AgentError):
    """An agent sent what no agent sends: it is none, or its guest has taken it over."""


class GuestError(AgentError, OSError):
    """Something failed in the guest, with the `errno` that it failed with there."""

    def __str__(self) -> str:
        return str(self.strerror)  # it names what failed and why; the number says no more


class CommandError(KvmkitError):
    """A command in a guest ended with a status other than 0, and `check` was given."""

    def __init__(self, args: list[str], returncode: int, stdout: bytes | str, stderr: bytes | str) -> None:
        how = f"exit status {returncode}" if returncode >= 0 else f"signal {-returncode}"
        super().__init__(f"{args[0]}: {how} in the guest")
        self.argv = args
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class CommandTimeout(KvmkitError, TimeoutError):
    """A command in a guest still ran when its time was over. `stdout` and `stderr` are what came until then."""

    def __init__(
        self, args: list[str], timeout_s: float, stdout: bytes | str = b"", stderr: bytes | str = b""
    ) -> None:
        super().__init__(f"{args[0]}: still runs in the guest after {timeout_s} s")
        self.argv = args
        self.timeout_s = timeout_s
        self.stdout = stdout
        self.stderr = stderr
