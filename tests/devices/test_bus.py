from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices.bus import Bus, Buses
from kvmkit.kvm.exits import Io, Mmio


@dataclass
class Recorder:
    answer: int = 0x11223344
    writes: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unclaimed_reads_as_ones_and_swallows_writes(size: int) -> None:
    bus = Bus()
    assert bus.read(0x1234, size) == (1 << 8 * size) - 1
    bus.write(0x1234, size, 0)


def test_offsets_and_widths() -> None:
    bus, a, b = Bus(), Recorder(), Recorder()
    bus.register(0x100, 8, b)
    bus.register(0x60, 1, a)
    assert bus.read(0x104, 2) == 0x3344  # no wider than what was asked for
    bus.write(0x100, 4, 7)
    bus.write(0x60, 1, 9)
    assert (b.reads, b.writes, a.writes) == ([(4, 2)], [(0, 4, 7)], [(0, 1, 9)])


def test_an_access_across_the_end_goes_byte_by_byte() -> None:
    bus, low, high = Bus(), Recorder(0x55), Recorder(0x66)
    bus.register(0x10, 1, low)
    bus.register(0x12, 1, high)
    assert bus.read(0x10, 4) == 0xFF66FF55
    bus.write(0x0F, 4, 0xDDCCBBAA)
    assert (low.writes, high.writes) == ([(0, 1, 0xBB)], [(0, 1, 0xDD)])


@pytest.mark.parametrize(
    ("base", "length"), [(0x0F, 2), (0x10, 1), (0x17, 9), (0, 0x1000), (-1, 4), (0x40, 0)]
)
def test_overlaps_are_refused(base: int, length: int) -> None:
    bus = Bus()
    bus.register(0x10, 8, Recorder())
    with pytest.raises(ValueError, match="range"):
        bus.register(base, length, Recorder())


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 9)), max_size=20), st.integers(0, 220))
def test_finds_what_a_search_through_all_finds(ranges: list[tuple[int, int]], addr: int) -> None:
    bus = Bus()
    claimed: dict[int, int] = {}
    for i, (base, length) in enumerate(ranges):
        if claimed.keys().isdisjoint(range(base, base + length)):
            bus.register(base, length, Recorder(i))
            claimed |= dict.fromkeys(range(base, base + length), i)
    assert bus.read(addr, 1) == claimed.get(addr, 0xFF)


def test_exits() -> None:
    buses, port, memory = Buses(), Recorder(0xABCD), Recorder(0x1122334455667788)
    buses.ports.register(0x60, 2, port)
    buses.memory.register(0xFEE0_0000, 0x1000, memory)
    buses.pio(Io(1, 2, 0x60, 2, memoryview(bytearray(b"\1\2\3\4"))))
    assert port.writes == [(0, 2, 0x0201), (0, 2, 0x0403)]
    data = memoryview(bytearray(6))
    buses.pio(Io(0, 2, 0x60, 3, data))
    assert bytes(data) == b"\xcd\xab" * 3
    buses.mmio(Mmio(0xFEE0_0010, 4, True, memoryview(bytearray(b"\4\3\2\1"))))
    assert memory.writes == [(0x10, 4, 0x01020304)]
    data = memoryview(bytearray(8))
    buses.mmio(Mmio(0xFEE0_0000, 8, False, data))
    assert bytes(data) == bytes.fromhex("8877665544332211")
