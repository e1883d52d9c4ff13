"""Hostile drivers of a console device: control messages that are nearly right, and buffers of any size."""

import random

from kvmkit.devices.virtio.console import CONTROL, Console
from kvmkit.testing.virtqueue import Driver


def mutate_and_feed(rng: random.Random, driver: Driver) -> None:
    """One step of a hostile driver of this device."""
    index = rng.randrange(len(driver.device.queue_sizes))
    if not driver.rings[index].free:  # buffers that nothing comes into
        driver.reset()
        driver.activate()
    if rng.random() < 0.5:
        data = CONTROL.pack(rng.choice([0, 1, 2, 0xFFFFFFFF]), rng.randrange(10), rng.choice([0, 1, 0xFFFF]))
        driver.add(index, out=[data[: rng.choice([8, 8, 8, 1, 7])]])
    else:
        driver.add(index, in_=[rng.choice([1, 8, 64, 4096])])
    if isinstance(driver.device, Console) and rng.random() < 0.2:
        driver.device.ports[rng.randrange(len(driver.device.ports))].send(b"x" * rng.choice([1, 100, 5000]))
    driver.kick(index)
    driver.used(index)
    if driver.broken:
        driver.reset()
        driver.activate()
