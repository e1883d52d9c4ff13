"""ACPI's fixed hardware: the PM1 event and control registers, and the PM timer (ACPI 6.5, section 4.8.3).

The machine is always in ACPI mode (the FADT has no SMI_CMD), and nothing raises a fixed event: there are no buttons, and the
timer's turning over sets no status. What is left is the way to S5, and a timer to read.
"""

import time
from collections.abc import Callable

PM1_EVT_BYTES = 4
"""Status, then enable."""
PM1_CNT_BYTES = 2
PM_TMR_BYTES = 4
PM_TMR_HZ = 3_579_545

SLP_TYP_S5 = 5
"""What the DSDT's \\_S5 says."""

_SCI_EN = 1 << 0
_SLP_TYP_SHIFT, _SLP_TYP_BITS = 10, 7
_SLP_EN = 1 << 13
_ENABLE_BITS = 0x0721  # TMR GBL PWRBTN SLPBTN RTC
_CONTROL_BITS = 0x1C02  # BM_RLD SLP_TYP
_TMR_VAL = (1 << 24) - 1  # the FADT has no TMR_VAL_EXT


class AcpiPm:
    """Six ports: PM1a_EVT_BLK at 0, PM1a_CNT_BLK at 4."""

    def __init__(self, on_power_off: Callable[[], None]) -> None:
        """`on_power_off` is called when the guest enters S5."""
        self._on_power_off = on_power_off
        self._enable = 0
        self._control = 0

    def read(self, offset: int, size: int) -> int:
        """Read registers; any part of the block at any width."""
        block = self._enable << 16 | (self._control | _SCI_EN) << 32
        return block >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Write registers. Status bits can only be cleared, and none is ever set."""
        keep = (1 << 8 * size) - 1 << 8 * offset
        block = (self._enable << 16 | self._control << 32) & ~keep | value << 8 * offset & keep
        self._enable = block >> 16 & _ENABLE_BITS
        control = block >> 32
        self._control = control & _CONTROL_BITS
        if control & _SLP_EN and control >> _SLP_TYP_SHIFT & _SLP_TYP_BITS == SLP_TYP_S5:
            self._on_power_off()


class PmTimer:
    """One register of four bytes: PM_TMR_BLK, 24 bits that count at 3.579545 MHz."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Count by `clock_ns`."""
        self._clock_ns = clock_ns

    def read(self, offset: int, size: int) -> int:
        """Read it, or some of its bytes."""
        return (self._clock_ns() * PM_TMR_HZ // 1_000_000_000 & _TMR_VAL) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """It can only be read."""
