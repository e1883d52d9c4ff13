"""Who answers at an address: port I/O and memory-mapped I/O each are one `Bus`."""

from bisect import bisect_right
from typing import Protocol

from kvmkit.kvm.exits import Io, Mmio


class Device(Protocol):
    """What can stand on a bus."""

    def read(self, offset: int, size: int, /) -> int:
        """Return what the guest reads: `size` bytes at `offset` into the device's range. Too high bits are dropped."""

    def write(self, offset: int, size: int, value: int, /) -> None:
        """Take what the guest writes."""


class Bus:
    """Ranges of addresses and the devices behind them. An address that nobody claims reads as all ones, as on a PC."""

    def __init__(self) -> None:
        """Nobody is there yet."""
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Device]] = []

    def register(self, base: int, length: int, device: Device) -> None:
        """Let `device` answer at `length` addresses from `base`. `ValueError` if another one claims one of them."""
        if base < 0 or length <= 0:
            raise ValueError(f"range {base:#x}+{length:#x}: addresses start at 0 and a range isn't empty")
        i = bisect_right(self._starts, base)
        before = self._ranges[i - 1][1] if i else 0
        if before > base or (i < len(self._starts) and base + length > self._starts[i]):
            raise ValueError(f"range {base:#x}+{length:#x} overlaps another device's")
        self._starts.insert(i, base)
        self._ranges.insert(i, (base, base + length, device))

    def read(self, addr: int, size: int) -> int:
        """Carry out a guest's read of `size` bytes. An access that reaches out of a device's range goes byte by byte."""
        i = bisect_right(self._starts, addr) - 1
        if i >= 0:
            base, end, device = self._ranges[i]
            if addr + size <= end:
                return device.read(addr - base, size) & ((1 << 8 * size) - 1)
        if size == 1:
            return 0xFF
        return sum(self.read(addr + k, 1) << 8 * k for k in range(size))

    def write(self, addr: int, size: int, value: int) -> None:
        """Carry out a guest's write of `size` bytes."""
        i = bisect_right(self._starts, addr) - 1
        if i >= 0:
            base, end, device = self._ranges[i]
            if addr + size <= end:
                device.write(addr - base, size, value)
                return
        if size > 1:
            for k in range(size):
                self.write(addr + k, 1, value >> 8 * k & 0xFF)


class Buses:
    """A machine's two address spaces, in the terms of KVM's exits."""

    def __init__(self) -> None:
        """Make both, empty."""
        self.ports = Bus()
        self.memory = Bus()

    def pio(self, exit_: Io) -> None:
        """Carry out a port access, of all its items if it comes from a string instruction."""
        port, size, data = exit_.port, exit_.size, exit_.data
        if size == len(data) == 1:  # nearly all of them: a console costs two for each character
            if exit_.is_out:
                self.ports.write(port, 1, data[0])
            else:
                data[0] = self.ports.read(port, 1)
        elif exit_.is_out:
            for i in range(0, len(data), size):
                self.ports.write(port, size, int.from_bytes(data[i : i + size], "little"))
        else:
            for i in range(0, len(data), size):
                data[i : i + size] = self.ports.read(port, size).to_bytes(size, "little")

    def mmio(self, exit_: Mmio) -> None:
        """Carry out a memory-mapped access."""
        if exit_.is_write:
            self.memory.write(exit_.phys_addr, exit_.len, int.from_bytes(exit_.data, "little"))
        else:
            exit_.data[:] = self.memory.read(exit_.phys_addr, exit_.len).to_bytes(exit_.len, "little")
