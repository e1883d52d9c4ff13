"""PCI configuration mechanism #1, of a bus that is empty, and the reset control register beside it.

(PCI Local Bus Specification 3.0, section 3.2.2.3.2; the register at 0xcf9 is the one of Intel's south bridges.)
"""

from collections.abc import Callable

_ADDRESS_BITS = 0x80FFFFFC
_RST_CPU = 0x04


class PciConfig:
    """Ports 0xcf8 to 0xcff: the address register at 0, the data window at 4, reset control at 1."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """`on_reset` is called when the guest resets the machine through port 0xcf9."""
        self._on_reset = on_reset
        self._address = 0
        self._reset_control = 0

    def read(self, offset: int, size: int) -> int:
        """The address register is only there for accesses of four bytes; no function of any device answers."""
        if offset == 0 and size == 4:
            return self._address
        if offset == 1 and size == 1:
            return self._reset_control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes to a device that isn't there go nowhere."""
        if offset == 0 and size == 4:
            self._address = value & _ADDRESS_BITS
        elif offset == 1 and size == 1:
            rising = value & ~self._reset_control & _RST_CPU
            self._reset_control = value & 0x0E & ~_RST_CPU
            if rising:
                self._on_reset()
