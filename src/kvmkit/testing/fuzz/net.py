"""Hostile drivers of a network device: packets and receive buffers that are nearly right."""

from random import Random

from kvmkit.devices.net import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    Backend,
)
from kvmkit.devices.virtio import net
from kvmkit.testing import frames
from kvmkit.testing.net import MemoryBackend
from kvmkit.testing.virtqueue import Driver

_HOSTILE = (0, 1, 11, 12, 13, 14, 54, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFF4, 0xFFFF)
OFFLOADS = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_HOST_ECN


def fuzz_driver(rng: Random, backend: Backend | None = None) -> Driver:
    """Return a driver of a network device for `mutate_and_feed`, by default one without a network."""
    features = rng.choice((0, OFFLOADS))
    return Driver(
        net.Net(backend or MemoryBackend(features, rng.choice((68, 1500, 65520))), mac=frames.GUEST_MAC)
    )


def mutate_and_feed(rng: Random, driver: Driver) -> None:
    """Give the device some packets and receive buffers that a hostile guest might make, kick it, and take back what it used."""
    for _ in range(rng.randrange(1, 8)):
        frame = bytearray(rng.choice(_SEEDS))
        for _ in range(rng.randrange(4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        if rng.random() < 0.2:
            del frame[rng.randrange(len(frame)) :]
        elif rng.random() < 0.1:
            frame += bytes(rng.choice((1, 1500, 60000, 70000)))
        fields = [rng.choice(_HOSTILE) if rng.random() < 0.3 else 0 for _ in range(5)]
        header = bytes((rng.choice((0, 0, 1, 3, 0xFF)), rng.choice((0, 0, 1, 3, 4, 0x81, 0x84, 0xFF))))
        data = header + b"".join(field.to_bytes(2, "little") for field in fields) + frame
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
        parts = [
            data[a:b]
            for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)
            if a != b or rng.random() < 0.01
        ]
        _add(rng, driver, net.TRANSMIT, parts, [rng.randrange(100)] if rng.random() < 0.05 else [])
    for _ in range(rng.randrange(4)):
        out = [bytes(rng.randrange(1, 20))] if rng.random() < 0.05 else []
        sizes = [rng.choice((1, 12, 13, 1526, 4096)) for _ in range(rng.randrange(1, 4))]
        _add(rng, driver, net.RECEIVE, out, sizes)
    backend = driver.device.backend if isinstance(driver.device, net.Net) else None
    if isinstance(backend, MemoryBackend):
        backend.give(*(rng.choice(_SEEDS) for _ in range(rng.randrange(4))))
    for queue in rng.sample((net.RECEIVE, net.TRANSMIT), 2):
        driver.kick(queue)
        driver.used(queue)
    if driver.broken:
        driver.reset()
        driver.activate()


def _add(rng: Random, driver: Driver, queue: int, out: list[bytes], in_: list[int]) -> None:
    if len(driver.rings[queue].free) > len(out) + len(in_) and out + in_:
        driver.add(queue, out, in_, indirect=rng.random() < 0.3)


_GUEST, _HOST = ("10.0.2.15", 40000), ("10.0.2.2", 7)
_SEEDS = (
    frames.arp_request("10.0.2.15", "10.0.2.2"),
    frames.dhcp_discover(),
    frames.udp(_GUEST, ("10.0.2.3", 53), frames.dns_query("localhost")),
    frames.udp(_GUEST, ("127.0.0.1", 9), b"discard"),
    frames.tcp(_GUEST, _HOST, frames.SYN),
    frames.tcp(_GUEST, ("127.0.0.1", 1), frames.SYN),
    frames.echo_request("10.0.2.15", "10.0.2.2", b"ping" * 14, to=frames.BROADCAST),
    frames.ipv4("10.0.2.15", "10.0.2.2", 17, bytes(1400), to=frames.BROADCAST, fragment=0x2000),
    frames.ethernet(frames.BROADCAST, 0x86DD, b"\x60" + bytes(60)),
)
