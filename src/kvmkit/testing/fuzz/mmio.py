"""Hostile drivers of the transport: registers written in any order with any value, and rings that aren't."""

import struct
from random import Random

from kvmkit.devices.virtio.mmio import VirtioMmio
from kvmkit.kvm import MemoryMap

_DESC, _AVAIL, _USED, _DATA = 0x1000, 0x2000, 0x3000, 0x4000
_VALUES = (0, 1, 2, 3, 4, 8, 11, 15, 16, 64, 128, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_REGISTERS = (
    *(0x14, 0x20, 0x24, 0x30, 0x38, 0x38, 0x44, 0x44, 0x50, 0x64, 0x70, 0x70),
    *(0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0x100, 0x104),
)


def mutate_and_feed(rng: Random, transport: VirtioMmio, memory: MemoryMap) -> None:
    """Set the device up, mostly right; fill its rings, kick; write registers at random all the while."""
    wrong = rng.choice((0.0, 0.02, 0.2))
    size = rng.choice((1, 2, 4, 16, 64))
    for offset, value in _setup(size):
        if rng.random() < wrong:
            _any_access(rng, transport)
        if rng.random() < wrong:
            value = rng.choice(_VALUES)
        if rng.random() >= wrong / 4:
            transport.write(offset, 4, value)
    index = 0
    for _ in range(rng.randint(1, 6)):
        memory.write(_DESC, b"".join(_descriptor(rng, i, size, wrong) for i in range(size)))
        count = rng.randint(1, size) if rng.random() >= wrong else rng.getrandbits(16)
        heads = [rng.randrange(size) if rng.random() >= wrong else rng.getrandbits(16) for _ in range(size)]
        index = index + count & 0xFFFF
        memory.write(_AVAIL, struct.pack(f"<HH{size}H", rng.getrandbits(1), index, *heads))
        transport.write(0x50, 4, 0)
        if rng.random() < wrong:
            _any_access(rng, transport)
    if rng.random() < 0.5:  # else it is set up again as it is
        transport.device.reactor.call_and_wait(lambda: None)
        transport.write(0x70, 4, 0)


def request(transport: VirtioMmio, memory: MemoryMap) -> int:
    """Set the device up and have it write into one buffer of 64 bytes. Returns how many it says it wrote."""
    transport.write(0x70, 4, 0)
    memory.write(_DESC, struct.pack("<QIHH", _DATA, 64, 2, 0))
    memory.write(_USED, bytes(16))
    memory.write(_AVAIL, bytes(16))
    for offset, value in _setup(4):
        transport.write(offset, 4, value)
    assert transport.read(0x70, 4) == 15
    memory.write(_AVAIL, struct.pack("<HHH", 0, 1, 0))
    transport.write(0x50, 4, 0)
    for _ in range(3):  # the kick that activation makes up for, then this one
        transport.device.reactor.call_and_wait(lambda: None)
    index, _, written_bytes = struct.unpack("<HII", memory.read(_USED + 2, 10))
    return int(written_bytes) if index == 1 else 0


def _setup(size: int) -> list[tuple[int, int]]:
    """The writes of a driver that brings the device up with one queue (virtio 1.2, sections 3.1.1 and 4.2.3.2)."""
    return [
        *[
            (0x70, 0),
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x24, 0),
            (0x20, 1 << 28 | 1 << 29),
            (0x70, 11),
        ],
        *[
            (0x30, 0),
            (0x38, size),
            (0x80, _DESC),
            (0x84, 0),
            (0x90, _AVAIL),
            (0x94, 0),
            (0xA0, _USED),
            (0xA4, 0),
        ],
        *[(0x44, 1), (0x70, 15)],
    ]


def _any_access(rng: Random, transport: VirtioMmio) -> None:
    offset = rng.choice(_REGISTERS) if rng.random() < 0.8 else rng.randrange(0x1000)
    size = 4 if rng.random() < 0.8 else rng.choice((1, 2, 8))
    if rng.random() < 0.3:
        assert 0 <= transport.read(offset, size) < 1 << 8 * size
    else:
        value = rng.choice(_VALUES) if rng.random() < 0.7 else rng.getrandbits(32)
        transport.write(offset, size, value & (1 << 8 * size) - 1)


def _descriptor(rng: Random, i: int, size: int, wrong: float) -> bytes:
    if rng.random() < wrong:
        return rng.randbytes(16)
    gpa, length = _DATA + 64 * rng.randrange(64), rng.choice((1, 64, 4096))
    return struct.pack("<QIHH", gpa, length, 2 | (i + 1 < size and rng.random() < 0.5), i + 1)
