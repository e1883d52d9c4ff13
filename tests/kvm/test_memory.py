"""Guest memory: bounds, blocks that adjoin, and who hears of writes."""

import mmap
import os

import pytest

from kvmkit.kvm import GuestAddressError, GuestMemory, MemoryMap


@pytest.fixture
def two_blocks() -> MemoryMap:
    """8 KiB at 0, 4 KiB right behind, a hole, 4 KiB at 64 KiB."""
    memory_map = MemoryMap()
    memory_map.add(0x10000, GuestMemory(0x1000))
    memory_map.add(0, GuestMemory(0x2000))
    memory_map.add(0x2000, GuestMemory(0x1000))
    return memory_map


def test_read_back(two_blocks: MemoryMap) -> None:
    two_blocks.write(0x10FFE, b"ab")
    assert two_blocks.read(0x10FFE, 2) == b"ab"
    assert two_blocks.read(0x10FFD, 1) == b"\0"


def test_range_over_two_blocks(two_blocks: MemoryMap) -> None:
    two_blocks.write(0x1FFE, b"abcd")
    assert two_blocks.read(0x1FFE, 4) == b"abcd"
    blocks = dict(two_blocks.blocks)
    assert (blocks[0].read(0x1FFE, 2), blocks[0x2000].read(0, 2)) == (b"ab", b"cd")


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0x2FFF, 2),
        (0x3000, 1),
        (0xFFFF, 2),
        (0x11000, 1),
        (0x10FFF, 2),
        (-1, 1),
        (0, -1),
        (1 << 64, 1),
        (0, 1 << 64),
    ],
)
def test_outside(two_blocks: MemoryMap, gpa: int, size: int) -> None:
    for access in (
        two_blocks.read,
        two_blocks.view,
        two_blocks.find,
        two_blocks.host_address,
        two_blocks.writable_view,
    ):
        with pytest.raises(GuestAddressError):
            access(gpa, size)


def test_write_outside_changes_nothing(two_blocks: MemoryMap) -> None:
    heard: list[tuple[int, int]] = []
    two_blocks.on_write(lambda gpa, size: heard.append((gpa, size)))
    with pytest.raises(GuestAddressError, match="0x3000"):
        two_blocks.write(0x2FFE, b"abcd")
    assert two_blocks.read(0x2FFE, 2) == b"\0\0"
    assert heard == []


def test_hooks_hear_writes(two_blocks: MemoryMap) -> None:
    heard: list[tuple[int, int]] = []
    two_blocks.on_write(lambda gpa, size: heard.append((gpa, size)))
    two_blocks.write(0x1FFE, b"abcd")
    two_blocks.written(0x10000, 8)
    assert heard == [(0x1FFE, 4), (0x10000, 8)]


def test_views(two_blocks: MemoryMap) -> None:
    view = two_blocks.writable_view(0x100, 4)
    view[:] = b"wxyz"
    assert bytes(two_blocks.view(0x100, 4)) == b"wxyz"
    assert two_blocks.view(0x100, 4).readonly
    del view


@pytest.mark.parametrize("gpa", [0x1000, 0x2000, 0x10000, 0xF000])
def test_overlap(two_blocks: MemoryMap, gpa: int) -> None:
    with GuestMemory(0x2000) as memory, pytest.raises(ValueError, match="overlaps"):
        two_blocks.add(gpa, memory)


@pytest.mark.parametrize("size", [0, -4096, 100, 4097])
def test_odd_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        GuestMemory(size)


def test_memory_is_a_shared_memfd_that_nobody_can_shrink() -> None:
    with GuestMemory(0x2000) as memory:
        memory.write(0x1000, b"hello")
        with mmap.mmap(memory.fd, 0x2000, mmap.MAP_SHARED) as other:
            assert other[0x1000:0x1005] == b"hello"
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0x1000)
        assert not os.get_inheritable(memory.fd)


def test_closing_twice() -> None:
    memory = GuestMemory(0x1000)
    memory.close()
    memory.close()
