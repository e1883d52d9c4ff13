"""Hostile drivers of a block device: requests that are nearly right."""

import struct
from itertools import pairwise
from random import Random

from kvmkit.devices.virtio.blk import Blk
from kvmkit.testing.virtqueue import Driver

_TYPES = (0, 0, 1, 1, 4, 8, 11, 13)
_LENGTHS = (0, 1, 15, 16, 20, 511, 512, 513, 4096, 4097, 8192)
_ODD = (0, 1, 2, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 55) - 1, 1 << 55, (1 << 64) - 1)


def mutate_and_feed(rng: Random, driver: Driver) -> None:
    """Put one to eight requests, mutated, into a queue of a `Blk`, and kick; take back what is done, reset what is broken.

    `AssertionError` if a request that came back has another status than there are.
    """
    assert isinstance(driver.device, Blk)
    queue = rng.randrange(len(driver.queues))
    for _ in range(rng.randint(1, 8)):
        _add(rng, driver, queue)
    if rng.random() < 0.05:  # a lying index
        ring = driver.rings[queue]
        driver.memory.write(ring.avail + 2, struct.pack("<H", rng.randrange(1 << 16)))
    driver.kick(queue)
    if driver.broken:
        driver.reset()
        driver.activate()
        return
    for used in driver.used(queue):
        if used.data:
            assert used.data[-1] in (0, 1, 2), f"status {used.data[-1]}"


def _add(rng: Random, driver: Driver, queue: int) -> None:
    type_ = rng.choice(_TYPES)
    sector = rng.randrange(64)
    data = _ranges(rng) if type_ in (11, 13) else rng.randbytes(rng.choice(_LENGTHS)) if type_ == 1 else b""
    header = bytearray(struct.pack("<IIQ", type_, 0, sector))
    if rng.random() < 0.2:
        header[rng.randrange(16)] = rng.randrange(256)
    if rng.random() < 0.1:
        header[8:] = struct.pack("<Q", rng.choice(_ODD))
    if rng.random() < 0.05:
        header = header[: rng.randrange(1, 16)]
    readable = _pieces(rng, bytes(header) + data)
    writable = [rng.choice(_LENGTHS) or 1] if type_ == 0 else [20] if type_ == 8 else []
    if rng.random() < 0.97:
        writable.append(1)
    buffers = []
    for piece in readable:
        gpa = driver.buffer(len(piece))
        driver.memory.write(gpa, piece)
        buffers.append((gpa, len(piece), 0))
    back = [(driver.buffer(size), size) for size in writable]
    for gpa, _size in back:
        driver.memory.write(gpa, b"\0")
    buffers += [(gpa, size, 2) for gpa, size in back]
    if rng.random() < 0.05:
        _break(rng, buffers)
        back = []  # the status may be anywhere
    if buffers:
        driver.add_raw(queue, buffers, back, indirect=rng.random() < 0.5)


def _ranges(rng: Random) -> bytes:
    count = rng.choice((1, 1, 2, 16, 17))
    data = b"".join(
        struct.pack("<QII", rng.randrange(64), rng.randrange(64), rng.random() < 0.3) for _ in range(count)
    )
    if rng.random() < 0.3:
        at = rng.randrange(count) * 16
        data = (
            data[:at] + struct.pack("<QI", rng.choice(_ODD), rng.choice(_ODD) & 0xFFFFFFFF) + data[at + 12 :]
        )
    return data[: -rng.randrange(1, 16)] if rng.random() < 0.1 else data


def _pieces(rng: Random, data: bytes) -> list[bytes]:
    """Cut data anywhere: framing is the driver's choice."""
    cuts = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 1, 3))))})
    return [data[a:b] for a, b in pairwise(cuts)]


def _break(rng: Random, buffers: list[tuple[int, int, int]]) -> None:
    """Damage one descriptor."""
    i = rng.randrange(len(buffers))
    gpa, size, flags = buffers[i]
    match rng.randrange(4):
        case 0:
            gpa = rng.choice(_ODD)
        case 1:
            size = rng.choice(_ODD) & 0xFFFFFFFF
        case 2:
            flags ^= 1 << rng.randrange(16)
        case _:
            buffers += [buffers[i]] * rng.randrange(64)
            return
    buffers[i] = gpa, size, flags
