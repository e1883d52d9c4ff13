"""Hostile drivers of a socket device: packets that are nearly right, while programs of the host use its sockets."""

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from kvmkit.devices.virtio.vsock import Vsock
from kvmkit.testing.virtqueue import Driver
from kvmkit.testing.vsock import (
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    GUEST_PORT,
    PORT,
    REQUEST,
    RST,
    RW,
    RX,
    SHUTDOWN,
    TX,
    Packet,
    client,
)


def random_packet(rng: random.Random, host_ports: list[int]) -> Packet:
    """A packet that is often almost right."""
    return Packet(
        rng.choice(
            [REQUEST, RW, RW, RW, RW, SHUTDOWN, RST, CREDIT_UPDATE, CREDIT_REQUEST, rng.randrange(1 << 16)]
        ),
        rng.randbytes(rng.choice([0, 1, 100, 5000, 65536])),
        rng.choice([0, 1, 2, 3, rng.getrandbits(32)]),
        rng.choice([PORT, PORT, PORT, *host_ports, rng.getrandbits(32)]),
        rng.choice([1, 2, 3, GUEST_PORT]),
        rng.choice([0, 100, 1 << 20, rng.getrandbits(32)]),
        rng.choice([0, 0, rng.getrandbits(32)]),
        rng.choice([*20 * [CID], rng.getrandbits(64)]),
        rng.choice([*20 * [2], rng.getrandbits(64)]),
        rng.choice([*20 * [1], 2]),
        rng.choice([None, None, None, None, None, rng.getrandbits(32)]),
    )


def mutate_and_feed(rng: random.Random, driver: Driver) -> None:
    """One step of a hostile guest. The device is a `Vsock`, its socket may be used meanwhile."""
    device = driver.device
    assert isinstance(device, Vsock)
    for queue in RX, TX, EVENT:
        driver.used(queue)
    if driver.broken:
        driver.reset()
        driver.activate()
    for _ in range(rng.randrange(4)):
        if driver.rings[RX].free:
            size = rng.choice(
                [4096, 4096, 65536, 100, 45, rng.randrange(1, 50)] if rng.random() < 0.1 else [4096]
            )
            driver.add(RX, in_=[size])
    ports = [c.host_port for c in list(device._all)]
    for _ in range(rng.randrange(1, 5)):
        raw = bytearray(random_packet(rng, ports).pack())
        for _ in range(rng.choice([0, 0, 0, 1, 8])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        if rng.random() < 0.05:
            del raw[rng.randrange(1, len(raw)) :]
        cuts = sorted(
            {rng.randrange(1, len(raw)) for _ in range(rng.choice([0, 0, 1, 3]))} if len(raw) > 1 else set()
        )
        pieces = [bytes(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        if len(driver.rings[TX].free) > len(pieces):
            driver.add(TX, out=pieces, indirect=rng.random() < 0.3)
    if rng.random() < 0.05:
        device.transport_reset()
    if rng.random() < 0.05 and driver.rings[EVENT].free:
        driver.add(EVENT, in_=[rng.choice([4, 8, 8, 1])])
        driver.kick(EVENT)
    driver.kick(rng.choice([RX, TX]))
    driver.kick(TX)


class Host:
    """Programs of the host that do this and that, without waiting."""

    def __init__(self, stack: ExitStack, server: socket.socket, path: Path, rng: random.Random) -> None:
        """`server` listens at the device's `path` and port `PORT`, without blocking; what is opened belongs to `stack`."""
        self.stack, self.server, self.path, self.rng = stack, server, path, rng
        self.sockets: list[socket.socket] = []

    def act(self, what: int) -> None:
        """Do the thing of this number, from 0 to 5."""
        with suppress(OSError):
            if what == 0:
                line = self.rng.choice([b"CONNECT 1\n", b"CONNECT 4000\nhi", b"C"])
                self.sockets.append(self.stack.enter_context(client(self.path, line)))
            elif what == 1:
                self.sockets.append(self.stack.enter_context(self.server.accept()[0]))
            elif self.sockets:
                self.use(self.rng.choice(self.sockets), what)

    def use(self, sock: socket.socket, what: int) -> None:
        """Send, receive, shut down or close."""
        sock.setblocking(False)
        if what == 2:
            sock.send(bytes(self.rng.choice([1, 5000, 100_000])))
        elif what == 3:
            sock.recv(self.rng.choice([1, 100_000]))
        elif what == 4:
            sock.shutdown(self.rng.choice([socket.SHUT_RD, socket.SHUT_WR]))
        else:
            sock.close()
