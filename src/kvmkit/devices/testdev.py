"""What bare-metal test kernels expect beside a PC's own devices (the convention of kvm-unit-tests; QEMU's pc-testdev).

Ports that keep what is written, interrupt lines at the guest's command, a page's mapping taken away behind the guest's back,
memory every access to which is an exit, and a port that ends the machine when it is sent a word.
"""

from collections.abc import Callable

LATCH, FLUSH, BYTE_LATCH = 0x0, 0x4, 0x8
PORTS = 12
"""Ports of `TestPorts`."""
IRQ_LINES = 24
MEMORY_BYTES = 1 << 16

_SHUTDOWN = b"Shutdown"


class TestPorts:
    """Twelve ports: a latch of four bytes at 0 and, the same one, at 8; between them the address of a page to flush."""

    __test__ = False  # no class of tests, in spite of its name

    def __init__(self, flush: Callable[[int], None]) -> None:
        """`flush` is called with the physical address whose mapping the guest wants gone, any of 32 bits."""
        self._flush = flush
        self._latch = bytearray(4)

    def read(self, offset: int, size: int) -> int:
        """What was written last; nothing can be read of the port that flushes."""
        if FLUSH <= offset < BYTE_LATCH:
            return (1 << 8 * size) - 1
        at = offset & 3
        return int.from_bytes(self._latch[at : at + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it, or flush a page."""
        if FLUSH <= offset < BYTE_LATCH:
            if offset == FLUSH and size == 4:
                self._flush(value)
            return
        at = offset & 3
        size = min(size, 4 - at)
        self._latch[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class IrqLines:
    """A port for each interrupt line: a byte that isn't zero raises it, zero lowers it."""

    def __init__(self, irq_line: Callable[[int, int], None]) -> None:
        """`irq_line` is called with the line, 0 to 23, and 1 or 0."""
        self._irq_line = irq_line

    def read(self, offset: int, size: int) -> int:
        """All ones: lines can't be read back."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Set a line; the ports are a byte wide."""
        self._irq_line(offset, int(value & 0xFF != 0))


class ExitMemory:
    """Memory of which each access comes here, for tests of what the engine makes of memory-mapped I/O."""

    def __init__(self) -> None:
        """All zeros."""
        self._data = bytearray(MEMORY_BYTES)

    def read(self, offset: int, size: int) -> int:
        """Read."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")


class ShutdownPort:
    """A port that powers the machine off when it has been sent "Shutdown", letter by letter (a convention of Bochs')."""

    def __init__(self, on_power_off: Callable[[], None]) -> None:
        """`on_power_off` is called after the last letter."""
        self._on_power_off = on_power_off
        self._seen = b""

    def read(self, offset: int, size: int) -> int:
        """All ones."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a letter; a wrong one begins anew."""
        self._seen = (self._seen + bytes((value & 0xFF,)))[-len(_SHUTDOWN) :]
        if self._seen == _SHUTDOWN:
            self._on_power_off()
