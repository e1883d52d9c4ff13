"""Hostile drivers of a file system device: FUSE requests that are plausible, wrong or garbage."""

import random
import struct
from weakref import WeakKeyDictionary

from kvmkit.devices.fuse import protocol as fuse
from kvmkit.testing.virtqueue import Driver

_NAMES = (
    b"a",
    b"dir",
    b"link",
    b"new",
    b".",
    b"..",
    b"../x",
    b"a/b",
    b"",
    b"x" * 255,
    b"x" * 256,
    b"\xff\xfe",
)
_NUMBERS = (
    0,
    1,
    2,
    3,
    4096,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 48,
    (1 << 63) - 1,
    (1 << 64) - 1,
)

_nodes: WeakKeyDictionary[Driver, list[int]] = WeakKeyDictionary()
"""What servers told while fuzzed."""


def mutate_and_feed(rng: random.Random, driver: Driver) -> None:
    """Send one request that is plausible, wrong or garbage to a `kvmkit.devices.virtio.fs.Fs`, on any of its queues.

    Bodies are numbers that tend to be node ids, handles, sizes and offsets, then names; lengths lie now and then.
    """
    opcode = rng.choice([rng.randrange(1, 53), rng.randrange(1, 53), rng.getrandbits(32)])
    if opcode == fuse.SYNCFS and rng.random() < 0.99:
        opcode = fuse.LOOKUP  # it flushes the host's disk
    body = bytearray()
    for _ in range(rng.randrange(12)):
        number = rng.choice([rng.choice(_NUMBERS), rng.randrange(16), rng.getrandbits(64)])
        body += (
            number.to_bytes(8, "little")
            if rng.random() < 0.6
            else (number & 0xFFFFFFFF).to_bytes(4, "little")
        )
    if opcode == fuse.FALLOCATE:  # it could take all of the host's disk, or memory
        body = bytearray(
            struct.pack(
                "<QQQQ", *(rng.randrange(16) << rng.choice([0, 12]) for _ in range(3)), rng.randrange(64)
            )
        )
    for _ in range(rng.randrange(3)):
        body += rng.choice(_NAMES) + b"\0" * (rng.random() < 0.9)
    if rng.random() < 0.05:
        body += rng.randbytes(rng.randrange(1 << 14))
    node = rng.choice([1, 1, 1, rng.choice(_NUMBERS), rng.choice(_nodes.get(driver, [1]))])
    size = 40 + len(body) if rng.random() < 0.9 else rng.getrandbits(rng.randrange(1, 33))
    header = struct.pack("<IIQQIIIHH", size, opcode, rng.getrandbits(64), node, 0, 0, 1, 0, 0)
    message = (header + bytes(body))[: rng.choice([None, None, None, rng.randrange(1, 60)])]
    cut = rng.randrange(1, len(message)) if len(message) > 1 else 0
    out = [message[:cut], message[cut:]] if cut else [message]
    in_ = [rng.choice([1, 8, 16, 128, 144, 4096, 1 << 16]) for _ in range(rng.randrange(4))]
    queue = rng.randrange(2)
    if driver.broken or len(driver.rings[queue].free) < len(out) + len(in_):
        driver.reset()
        driver.activate()
    driver.add(queue, out, in_, indirect=rng.random() < 0.3)
    driver.kick(queue)
    for used in driver.used(queue):
        if used.written_bytes >= 144 and opcode == fuse.LOOKUP:
            _nodes.setdefault(driver, []).append(int.from_bytes(used.data[16:24], "little"))
