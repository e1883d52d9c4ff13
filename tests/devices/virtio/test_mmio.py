"""The registers as a driver sees them, on an engine, so that ioeventfds and irqfds are real."""

import struct
from collections.abc import Iterator, Sequence

import pytest

from kvmkit import kvm
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.mmio import VirtioMmio
from kvmkit.devices.virtio.queue import Queue
from kvmkit.kvm import GuestMemory, MemoryMap

BASE, GSI = 0xD0000000, 16
DESC, AVAIL, USED, DATA = 0x1000, 0x2000, 0x3000, 0x4000
VERSION_1 = 1 << 32


class Echo(VirtioDevice):
    """Keeps what the driver does to it; gives requests back at once."""

    device_id = 42
    queue_sizes = (16, 8)
    features = 1 << 3

    def __init__(self) -> None:
        super().__init__("echo")
        self.log: list[object] = []

    def config(self) -> bytes:
        return b"configuration"

    def write_config(self, offset: int, data: bytes) -> None:
        self.log.append((offset, data))

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        self.log.append(("activate", features, [queue.size if queue else None for queue in queues]))

    def queue_notified(self, queue: Queue) -> None:
        for chain in queue:
            self.log.append(chain.read())
            queue.push(chain, 0)
        self.signal(queue)

    def reset(self) -> None:
        self.log.append("reset")


class Registers:
    """A driver that works on the registers by hand."""

    def __init__(self, transport: VirtioMmio) -> None:
        self.transport = transport

    def __getitem__(self, offset: int) -> int:
        return self.transport.read(offset, 4)

    def __setitem__(self, offset: int, value: int) -> None:
        self.transport.write(offset, 4, value)

    def negotiate(self, features: int = VERSION_1) -> int:
        self[0x70] = 0
        self[0x70] = 1
        self[0x70] = 3
        for half in (0, 1):
            self[0x24] = half
            self[0x20] = features >> 32 * half & 0xFFFFFFFF
        self[0x70] = 11
        return self[0x70]

    def set_queue(self, index: int = 0, size: int = 4) -> None:
        self[0x30] = index
        self[0x38] = size
        for register, gpa in ((0x80, DESC), (0x90, AVAIL), (0xA0, USED)):
            self[register] = gpa
            self[register + 4] = 0
        self[0x44] = 1


@pytest.fixture
def memory() -> Iterator[MemoryMap]:
    memory = MemoryMap()
    memory.add(0, GuestMemory(1 << 20))
    yield memory
    memory.close()


@pytest.fixture
def registers(memory: MemoryMap) -> Iterator[Registers]:
    with kvm.open("soft") as system, system.create_vm() as vm:
        vm.create_irqchip()
        transport = VirtioMmio(Echo(), vm, memory, base=BASE, gsi=GSI)
        yield Registers(transport)
        transport.close()
        transport.close()


def echo(registers: Registers) -> Echo:
    device = registers.transport.device
    assert isinstance(device, Echo)
    return device


def test_identification(registers: Registers) -> None:
    assert struct.pack("<I", registers[0]) == b"virt"
    assert (registers[4], registers[8], struct.pack("<I", registers[12])) == (2, 42, b"KVKM"[:4])
    assert registers[0xB0] == registers[0xB4] == registers[0xB8] == 0xFFFFFFFF


def test_features_are_negotiated(registers: Registers) -> None:
    registers[0x14] = 0
    assert registers[0x10] == 1 << 3 | 1 << 28 | 1 << 29
    registers[0x14] = 1
    assert registers[0x10] == 1
    registers[0x14] = 2
    assert registers[0x10] == 0
    assert registers.negotiate(VERSION_1 | 1 << 3) == 11
    assert registers.negotiate(1 << 3) == 3  # a legacy driver
    assert registers.negotiate(VERSION_1 | 1 << 4) == 3  # not offered


def test_queues_have_a_largest_size(registers: Registers) -> None:
    sizes = []
    for index in range(3):
        registers[0x30] = index
        sizes.append(registers[0x34])
    assert sizes == [16, 8, 0]


def test_a_request_and_its_interrupt(registers: Registers, memory: MemoryMap) -> None:
    assert registers.negotiate() == 11
    registers.set_queue()
    assert registers[0x44] == 1
    memory.write(DATA, b"hello")
    memory.write(DESC, struct.pack("<QIHH", DATA, 5, 0, 0))
    memory.write(AVAIL, struct.pack("<HHH", 0, 1, 0))
    registers[0x70] = 15
    device = echo(registers)
    device.reactor.call_and_wait(lambda: None)  # the kick that activation makes up for
    device.reactor.call_and_wait(lambda: None)
    assert device.log == ["reset", ("activate", VERSION_1, [4, None]), b"hello"]
    assert memory.read(USED, 12) == struct.pack("<HHII", 0, 1, 0, 0)
    assert registers[0x60] == 1
    registers[0x64] = 1
    assert registers[0x60] == 0
    memory.write(AVAIL + 2, struct.pack("<HHH", 2, 0, 0))
    registers[0x50] = 0
    for _ in range(2):
        device.reactor.call_and_wait(lambda: None)
    assert device.log[3:] == [b"hello"]
    registers[0x70] = 0
    assert device.log[4:] == ["reset"]
    assert (registers[0x70], registers[0x60], registers[0x44]) == (0, 0, 0)


def test_a_queue_that_cant_be(registers: Registers) -> None:
    registers.negotiate()
    registers.set_queue(size=32)
    registers[0x70] = 15
    assert registers[0x70] & 64
    assert registers[0x60] & 2
    assert registers.negotiate() == 11  # a reset repairs it


def test_nothing_changes_while_the_driver_runs(registers: Registers) -> None:
    registers.negotiate()
    registers.set_queue()
    registers[0x70] = 15
    registers[0x44] = 0
    assert registers[0x44] == 1


def test_configuration_space(registers: Registers) -> None:
    read = registers.transport.read
    assert bytes(read(0x100 + i, 1) for i in range(13)) == b"configuration"
    assert read(0x100, 4) == int.from_bytes(b"conf", "little")
    assert read(0x10C, 4) == ord("n")
    assert read(0xFFF, 1) == 0
    registers.transport.write(0x102, 2, 0x1234)
    assert echo(registers).log == [(2, b"\x34\x12")]
    generation = registers[0xFC]
    device = echo(registers)
    device.active = True
    device.config_changed()
    assert registers[0xFC] == generation + 1
    assert registers[0x60] == 2


@pytest.mark.parametrize("offset", range(0, 0x110, 2))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_access_is_survived(registers: Registers, offset: int, size: int) -> None:
    for value in (0, 1, (1 << 8 * size) - 1):
        registers.transport.write(offset, size, value)
        assert 0 <= registers.transport.read(offset, size) < 1 << 8 * size
    assert registers.transport.read(0, 4) == 0x74726976
