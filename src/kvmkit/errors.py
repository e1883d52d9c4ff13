"""What kvmkit raises beside `OSError` (the kernel's errors) and `ValueError` (wrong arguments)."""


class KvmkitError(Exception):
    """Anything that kvmkit itself reports. The message says what was wrong, where, and what to do."""


class VmError(KvmkitError):
    """A VM could not be started or its process failed: a kernel that isn't one, no engine, out of memory, …"""


class ImageError(KvmkitError):
    """An image can't be made or used: it isn't one, it is damaged or malicious, a tool is missing."""


class VmTimeout(KvmkitError, TimeoutError):
    """The VM still ran when the time given was over."""
