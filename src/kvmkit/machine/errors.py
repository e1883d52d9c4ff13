"""What can be wrong with the files and sizes that a user gives."""


class KernelError(ValueError):
    """A kernel, initrd, command line or memory size that can't boot: the message names file, field and remedy."""
