"""Hostile drivers of a file system device: FUSE requests that are plausible, wrong or garbage."""

import random
import struct
from weakref import WeakKeyDictionary

from kvmkit.devices.fuse import protocol as fuse
from kvmkit.testing.fuse import Fuse
from kvmkit.testing.virtqueue import Driver

_NAMES = (
    b"a",
    b"dir",
    b"link",
    b"new",
    b".",
    b"..",
    b"../x",
    b"../outside",
    b"../outside/file",
    b"out/file",
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

_SHAPES = {
    fuse.LOOKUP: (0, 1),
    fuse.GETATTR: (2, 0),
    fuse.SETATTR: (11, 0),
    fuse.READLINK: (0, 0),
    fuse.SYMLINK: (0, 2),
    fuse.MKNOD: (2, 1),
    fuse.MKDIR: (1, 1),
    fuse.UNLINK: (0, 1),
    fuse.RMDIR: (0, 1),
    fuse.RENAME: (1, 2),
    fuse.LINK: (1, 1),
    fuse.OPEN: (1, 0),
    fuse.READ: (5, 0),
    fuse.WRITE: (5, 1),
    fuse.RELEASE: (3, 0),
    fuse.SETXATTR: (1, 2),
    fuse.GETXATTR: (1, 1),
    fuse.OPENDIR: (1, 0),
    fuse.READDIR: (5, 0),
    fuse.CREATE: (2, 1),
    fuse.READDIRPLUS: (5, 0),
    fuse.RENAME2: (2, 2),
    fuse.LSEEK: (3, 0),
    fuse.COPY_FILE_RANGE: (7, 0),
}
"""Numbers of 64 bits in a request, and names after them."""
_MAKES_ENTRY = (fuse.LOOKUP, fuse.SYMLINK, fuse.MKNOD, fuse.MKDIR, fuse.LINK, fuse.CREATE)


class _Session:
    """What the server told since its last reset."""

    def __init__(self, driver: Driver) -> None:
        self.activation = driver.activations
        self.nodes = [fuse.ROOT_ID]


_sessions: WeakKeyDictionary[Driver, _Session] = WeakKeyDictionary()


def mutate_and_feed(rng: random.Random, driver: Driver) -> None:
    """Send one request that is plausible, wrong or garbage to a `kvmkit.devices.virtio.fs.Fs`, on any of its queues.

    Half of them have the shape of what their opcode wants. The bodies of the others are numbers that tend to be node ids,
    handles, sizes and offsets, then names; lengths lie now and then.
    """
    if driver.broken or min(len(ring.free) for ring in driver.rings) < 8:
        driver.reset()
        driver.activate()
    session = _sessions.get(driver)
    if session is None or session.activation != driver.activations:
        session = _sessions[driver] = _Session(driver)
        Fuse(driver)
    queue = rng.randrange(2)
    shaped = rng.random() < 0.5
    opcode, out, in_ = (_shaped if shaped else _garbage)(rng, session.nodes)
    driver.add(queue, out, in_, indirect=rng.random() < 0.3)
    driver.kick(queue)
    for used in driver.used(queue):
        if used.written_bytes >= 144 and opcode in _MAKES_ENTRY:
            session.nodes.append(int.from_bytes(used.data[16:24], "little"))


def _header(rng: random.Random, size: int, opcode: int, node: int) -> bytes:
    return fuse.in_header.pack(size, opcode, rng.getrandbits(64), node, 0, 0, 1, 0, 0)


def _shaped(rng: random.Random, nodes: list[int]) -> tuple[int, list[bytes], list[int]]:
    opcode = rng.choice(list(_SHAPES))
    numbers, names = _SHAPES[opcode]
    body = b"".join(
        rng.choice(
            [
                rng.choice(nodes),
                rng.randrange(16),
                rng.choice(_NUMBERS),
                rng.choice((0o644, 0o40755, 0o100600)),
            ]
        ).to_bytes(8, "little")
        for _ in range(numbers)
    )
    body += b"".join(rng.choice(_NAMES) + b"\0" for _ in range(names))
    return opcode, [_header(rng, 40 + len(body), opcode, rng.choice(nodes)), body or b"\0"], [16, 4096]


def _garbage(rng: random.Random, nodes: list[int]) -> tuple[int, list[bytes], list[int]]:
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
    node = rng.choice([1, 1, 1, rng.choice(_NUMBERS), rng.choice(nodes)])
    size = 40 + len(body) if rng.random() < 0.9 else rng.getrandbits(rng.randrange(1, 33))
    message = (_header(rng, size, opcode, node) + bytes(body))[
        : rng.choice([None, None, None, rng.randrange(1, 60)])
    ]
    cut = rng.randrange(1, len(message)) if len(message) > 1 else 0
    out = [message[:cut], message[cut:]] if cut else [message]
    in_ = [rng.choice([1, 8, 16, 128, 144, 4096, 1 << 16]) for _ in range(rng.randrange(4))]
    return opcode, out, in_
