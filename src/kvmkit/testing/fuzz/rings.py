"""Hostile drivers of any device: bytes in its rings that no driver writes, and that change while the device reads them.

Tables are filled with descriptors that tend to make chains (readable buffers first, then writable ones, each linked to a later
one) and then damaged: loops, links and addresses out of range, buffers that overlap each other and the rings, lengths up to
4 GiB, indirect tables of any size. The device works on its own thread while this one goes on writing.
"""

import struct
from random import Random

from kvmkit.testing.virtqueue import Driver

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_DATA, _DATA_BYTES = 0x200000, 0x80000
_TABLES, _TABLES_BYTES = 0x300000, 0x8000
_LENGTHS = (1, 2, 8, 12, 16, 20, 44, 60, 80, 512, 513, 1526, 4096, 4096, 8192)
_HOSTILE_LENGTHS = (0, 0x10000, 0x100000, 0xF00000, 0x1000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_HOSTILE_ADDRESSES = (
    0xFFFFFF,
    0x1000000,
    0xFFFFFFFF,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 4096,
    (1 << 64) - 1,
)


def mutate_and_feed(rng: Random, driver: Driver) -> None:
    """Write nonsense into the rings of one queue and kick, several times, while the device works; then reset and activate it."""
    queue = rng.randrange(len(driver.rings))
    damage = rng.choice((0.0, 0.003, 0.03, 0.3))
    ring = driver.rings[queue]
    memory = driver.memory
    memory.write(ring.desc, _table(rng, driver, queue, ring.size, damage))
    for at in range(0, _TABLES_BYTES, _TABLES_BYTES // 8):
        memory.write(_TABLES + at, _table(rng, driver, queue, rng.choice((1, 4, 16, 64)), damage))
    for _ in range(4):
        memory.write(_DATA + rng.randrange(_DATA_BYTES), rng.randbytes(rng.choice((4, 44, 1000))))
    index = 0
    for _ in range(rng.randint(1, 8)):
        count = rng.choice((1, 2, 4, 8)) if rng.random() >= damage else rng.getrandbits(16)
        heads = [_head(rng, ring.size, damage) for _ in range(min(count, ring.size))]
        for k, head in enumerate(heads):
            memory.write(ring.avail + 4 + 2 * ((index + k) % ring.size), struct.pack("<H", head))
        index = index + count & 0xFFFF
        memory.write(ring.avail, struct.pack("<HH", rng.getrandbits(1), index))
        driver.notify(queue)
        for _ in range(rng.choice((0, 0, 1, 4, 16))):
            _rewrite(rng, driver, queue, damage)
        if driver.broken:
            break
    for reactor in driver.device.reactors():
        reactor.call_and_wait(lambda: None)
    driver.reset()
    driver.activate()


def _table(rng: Random, driver: Driver, queue: int, size: int, damage: float) -> bytes:
    return b"".join(_descriptor(rng, driver, queue, i, size, damage) for i in range(size))


def _descriptor(rng: Random, driver: Driver, queue: int, i: int, size: int, damage: float) -> bytes:
    """Number `i` of a table of `size`: readable in its first half, writable in the second."""
    gpa = _DATA + rng.randrange(_DATA_BYTES // 64) * 64
    length = rng.choice(_LENGTHS)
    following = i + rng.randint(1, max(1, size // 3))
    flags = (_WRITE if 2 * i >= size else 0) | (_NEXT if following < size and rng.random() < 0.8 else 0)
    if rng.random() < 0.1:
        gpa = _TABLES + rng.randrange(8) * (_TABLES_BYTES // 8)
        length, flags = 16 * rng.choice((1, 4, 16, 64)), _INDIRECT
    if rng.random() < damage:
        ring = driver.rings[queue]
        match rng.randrange(8):
            case 0:
                gpa = rng.choice(_HOSTILE_ADDRESSES)
            case 1:
                gpa = rng.choice((ring.desc, ring.avail, ring.used)) + rng.randrange(0x1000)
            case 2 | 3:
                length = rng.choice(_HOSTILE_LENGTHS)
            case 4:
                flags ^= 1 << rng.randrange(16)
            case 5:
                following = rng.randrange(size + 1)
                flags |= _NEXT
            case 6:
                gpa, length = 0, 0xF00000  # all of it, rings and tables included
            case _:
                return rng.randbytes(16)
    return struct.pack("<QIHH", gpa, length, flags, following & 0xFFFF)


def _head(rng: Random, size: int, damage: float) -> int:
    return rng.randrange(size) if rng.random() >= damage else rng.getrandbits(16)


def _rewrite(rng: Random, driver: Driver, queue: int, damage: float) -> None:
    """Change something that the device may be reading."""
    ring, memory = driver.rings[queue], driver.memory
    match rng.randrange(6):
        case 0 | 1:
            i = rng.randrange(ring.size)
            memory.write(ring.desc + 16 * i, _descriptor(rng, driver, queue, i, ring.size, damage))
        case 2:
            at = _TABLES + rng.randrange(8) * (_TABLES_BYTES // 8)
            memory.write(at, _table(rng, driver, queue, rng.choice((1, 4, 16)), damage))
        case 3:
            at = ring.avail + 4 + 2 * rng.randrange(ring.size)
            memory.write(at, struct.pack("<H", _head(rng, ring.size, damage)))
        case 4:
            memory.write(_DATA + rng.randrange(_DATA_BYTES), rng.randbytes(64))
        case _ if rng.random() < damage:
            at = rng.choice((ring.avail, ring.used)) + rng.randrange(8)
            memory.write(at, rng.randbytes(8))
