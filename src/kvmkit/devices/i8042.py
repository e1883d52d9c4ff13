"""What is left of the 8042 keyboard controller: the reset line that it drives, and a status that lets a guest get there.

No keyboard is there, and the FADT says so, hence Linux doesn't look for one. (IBM PC AT Technical Reference, "Keyboard controller".)
"""

from collections.abc import Callable

STATUS_SYSTEM = 0x04
"""The self-test passed. Neither buffer is full: nothing is there to read, and any command is taken at once."""

CMD_PULSE_RESET = 0xFE


class I8042:
    """Port 0x64, one byte. Nobody stands at port 0x60, which then reads as all ones."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """`on_reset` is called when the guest pulses the processor's reset line."""
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """Status."""
        return STATUS_SYSTEM

    def write(self, offset: int, size: int, value: int) -> None:
        """A command. 0xFE resets; 0xF0 to 0xFD pulse other lines, and nothing else has anybody to answer it."""
        if value & 0xFF == CMD_PULSE_RESET:
            self._on_reset()
