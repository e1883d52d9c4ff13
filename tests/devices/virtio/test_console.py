import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmkit.devices.virtio.console import (
    CONSOLE_PORT,
    CONTROL,
    DEVICE_READY,
    INPUT_BYTES,
    MAX_PORTS,
    OUTPUT_BYTES,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    VIRTIO_CONSOLE_F_MULTIPORT,
    Console,
    Port,
)
from kvmkit.testing.fuzz.console import mutate_and_feed
from kvmkit.testing.virtqueue import Driver


class Machine:
    """A console device with a terminal and a named port, and its driver."""

    def __init__(self, features: int | None = None) -> None:
        self.written: list[list[bytes]] = [[], []]
        self.terminal = Port(console=True, output=self.written[0].append)
        self.named = Port("org.example.log", output=self.written[1].append)
        self.driver = Driver(Console([self.terminal, self.named]), features)

    def tell(self, id: int, event: int, value: int = 1) -> None:
        self.driver.add(3, out=[CONTROL.pack(id, event, value)])
        self.driver.kick(3)
        self.driver.used(3)

    def settle(self) -> None:
        """Let the device do what it was asked to from other threads."""
        self.driver.device.reactor.call_and_wait(lambda: None)

    def control(self, count: int) -> list[tuple[int, int, int, bytes]]:
        for _ in range(count):
            self.driver.add(2, in_=[64])
        self.driver.kick(2)
        used = self.driver.used(2)
        return [(*CONTROL.unpack(u.data[:8]), u.data[8 : u.written_bytes]) for u in used]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.driver.close()


def test_ports_are_announced_and_described(machine: Machine) -> None:
    machine.terminal.resize(24, 80)
    machine.tell(0xFFFFFFFF, DEVICE_READY)
    assert machine.control(4) == [(0, PORT_ADD, 1, b""), (1, PORT_ADD, 1, b"")]
    machine.tell(0, PORT_READY)
    machine.tell(1, PORT_READY)
    assert machine.control(8) == [
        (0, CONSOLE_PORT, 1, b""),
        (0, RESIZE, 1, struct.pack("<HH", 80, 24)),
        (0, PORT_OPEN, 1, b""),
        (1, PORT_NAME, 1, b"org.example.log\0"),
        (1, PORT_OPEN, 1, b""),
    ]
    machine.terminal.resize(50, 132)
    machine.settle()
    assert machine.control(0) == [(0, RESIZE, 1, struct.pack("<HH", 132, 50))]
    assert struct.unpack("<HHII", machine.driver.device.config()) == (132, 50, 2, 0)


@pytest.mark.parametrize(("id", "output_queue", "input_queue"), [(0, 1, 0), (1, 5, 4)])
def test_bytes_go_both_ways(machine: Machine, id: int, output_queue: int, input_queue: int) -> None:
    port = (machine.terminal, machine.named)[id]
    machine.driver.add(output_queue, out=[b"from ", b"the guest"])
    machine.driver.kick(output_queue)
    assert machine.written[id] == [b"from the guest"]
    assert port.send(b"hello") == 5
    machine.driver.add(input_queue, in_=[3])
    machine.driver.kick(input_queue)
    assert machine.driver.used(input_queue) == []  # nobody has opened it
    machine.tell(id, PORT_OPEN)
    machine.driver.add(input_queue, in_=[16])
    machine.driver.kick(input_queue)
    used = machine.driver.used(input_queue)
    assert [u.data[: u.written_bytes] for u in used] == [b"hel", b"lo"]


def test_what_the_guest_doesn_t_read_is_bounded(machine: Machine) -> None:
    assert machine.terminal.send(bytes(INPUT_BYTES - 10)) == INPUT_BYTES - 10
    assert machine.terminal.send(bytes(100)) == 10
    assert machine.terminal.send(b"x") == 0
    machine.tell(0, PORT_OPEN)
    machine.driver.add(0, in_=[4096])
    machine.driver.kick(0)
    assert machine.terminal.send(bytes(10_000)) == 4096


def test_a_driver_without_multiport() -> None:
    machine = Machine(Console.features & ~VIRTIO_CONSOLE_F_MULTIPORT)
    assert machine.terminal.send(b"typed") == 5
    machine.driver.add(0, in_=[16])
    machine.driver.kick(0)
    assert machine.driver.used(0)[0].data[:5] == b"typed"
    machine.terminal.resize(2, 3)
    machine.settle()
    assert machine.driver.config_interrupts == 1
    machine.driver.close()


def test_a_reset_closes_the_guest_s_ends(machine: Machine) -> None:
    machine.tell(0, DEVICE_READY)
    machine.tell(0, PORT_OPEN)
    assert machine.terminal.guest_open
    machine.driver.reset()
    assert not machine.terminal.guest_open
    machine.driver.activate()
    machine.tell(0, DEVICE_READY)
    assert len(machine.control(9)) == 2


def test_a_driver_that_only_asks_gets_a_bounded_answer(machine: Machine) -> None:
    machine.tell(0, DEVICE_READY)
    for _ in range(1000):
        machine.tell(1, PORT_READY)
    assert len(machine.control(100)) <= 16


def test_output_comes_in_pieces_however_much_a_chain_has(machine: Machine) -> None:
    driver = machine.driver
    all_of_it = (0x300000, 5 * OUTPUT_BYTES + 1, 0)
    driver.memory.write(all_of_it[0], bytes(range(256)) * 1281)
    driver.add_raw(1, [all_of_it] * 4)
    driver.kick(1)
    assert len(driver.used(1)) == 1
    assert max(map(len, machine.written[0])) == OUTPUT_BYTES
    assert b"".join(machine.written[0]) == driver.memory.read(*all_of_it[:2]) * 4


@pytest.mark.parametrize("count", [0, MAX_PORTS + 1])
def test_too_many_ports(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} ports"):
        Console([Port(output=bytes)] * count)


@settings(max_examples=50)
@given(seed=st.integers(0, 1 << 32))
def test_a_hostile_driver(seed: int) -> None:
    machine = Machine()
    rng = random.Random(seed)
    for _ in range(60):
        mutate_and_feed(rng, machine.driver)
    machine.driver.reset()
    machine.driver.activate()
    machine.tell(0, DEVICE_READY)
    assert len(machine.control(4)) == 2
    machine.driver.close()
