"""Firmware configuration: what a monitor tells its guest of the machine, in the convention that QEMU began
(its docs/specs/fw_cfg.rst), as far as bare-metal test kernels ask: by ports, numbers alone, no files and no DMA.
"""

import struct

SELECTOR, DATA = 0, 1
"""Offsets of the two ports: a 16-bit key is written to the first, its value read from the second, byte by byte."""

RAM_SIZE, NB_CPUS, MAX_RAM = 0x03, 0x05, 0x11


class FwCfg:
    """Two ports. A key that isn't there, the signature among them, reads as zeros, as does what lies beyond a value's end."""

    def __init__(self, *, memory_bytes: int, cpus: int) -> None:
        """Tell of `memory_bytes` of RAM and `cpus` processors."""
        self._values = {
            RAM_SIZE: struct.pack("<Q", memory_bytes),
            NB_CPUS: struct.pack("<H", cpus),
            MAX_RAM: struct.pack("<Q", 0),  # no limit
        }
        self._selected = b""
        self._at = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the value; the selector reads as zero."""
        if offset != DATA or self._at >= len(self._selected):
            return 0
        self._at += 1
        return self._selected[self._at - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a key, from its value's first byte on. Values can't be written."""
        if offset == SELECTOR:
            self._selected = self._values.get(value & 0xFFFF, b"")
            self._at = 0
