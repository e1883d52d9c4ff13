"""The debug-exit port: a guest ends its machine with a status. kvmkit's own, at the address where test guests expect one."""

from collections.abc import Callable


class DebugExit:
    """A port (0xf4 by custom); whatever is written there is the status. It reads as zero, so that a guest can tell it is there."""

    def __init__(self, on_exit_code: Callable[[int], None]) -> None:
        """`on_exit_code` gets what the guest wrote, as an unsigned number."""
        self._on_exit_code = on_exit_code

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine."""
        self._on_exit_code(value)
