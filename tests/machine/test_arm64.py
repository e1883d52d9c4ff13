"""The arm64 board as far as it goes without arm64: kernels made up here, right and wrong ones, the device tree, the ioctls."""

import ctypes
import gzip
import struct
from pathlib import Path
from typing import Any, cast

import fdt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.rng import Rng
from kvmkit.kvm import Device, GuestMemory, MemoryMap, Vcpu, Vm
from kvmkit.machine.arm64 import board as board_module
from kvmkit.machine.arm64 import boot, layout
from kvmkit.machine.arm64 import fdt as tree
from kvmkit.machine.arm64.board import Arm64Board
from kvmkit.machine.errors import KernelError
from kvmkit.uapi import arm64, common
from kvmkit.vmm import devices as vmm_devices
from kvmkit.vmm.config import VmConfig
from kvmkit.vmm.devices import make_devices

MIB = 1 << 20
MEMORY = 64 * MIB
CODE = b"\x1f\x20\x03\xd5" * 100


def make_image(code: bytes = CODE, **changes: int) -> bytes:
    """An Image of a header and `code`."""
    e = {"text_offset": 0, "image_size": MIB, "flags": 0xA, "magic": boot.MAGIC} | changes
    fields = (0x14000010, 0, e["text_offset"], e["image_size"], e["flags"], 0, 0, 0, e["magic"], 0)
    return boot.HEADER.pack(*fields) + code


def load(
    tmp_path: Path,
    image: bytes,
    *,
    initrd: Any = None,
    cmdline: str = "console=ttyAMA0",
    memory_bytes: int = MEMORY,
) -> tuple[MemoryMap, boot.Entry]:
    """Load it into new memory."""
    kernel = tmp_path / "Image"
    kernel.write_bytes(image)
    memory = MemoryMap()
    memory.add(layout.RAM, GuestMemory(memory_bytes))
    return memory, boot.load_linux(memory, memory_bytes, 2, kernel, initrd, cmdline)


def cells(node: Any, name: str) -> list[int]:
    return list(node.get_property(name).data)


def pairs(node: Any, name: str) -> list[int]:
    """A property's cells as numbers of 64 bits."""
    words = cells(node, name)
    return [high << 32 | low for high, low in zip(words[::2], words[1::2], strict=True)]


# The loader.


@pytest.mark.parametrize("text_offset", [0, 0x80000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_image(tmp_path: Path, text_offset: int, pack: Any) -> None:
    image = make_image(text_offset=text_offset)
    memory, entry = load(tmp_path, pack(image))
    assert entry.pc == layout.KERNEL + text_offset
    assert (entry.pc - text_offset) % (2 * MIB) == 0
    assert memory.read(entry.pc, len(image)) == image
    assert entry.fdt % 8 == 0
    assert memory.read(entry.fdt, 4) == b"\xd0\x0d\xfe\xed"
    # Nothing else lies in the 2 MiB blocks that the kernel maps for the tree and for itself.
    assert entry.fdt // (2 * MIB) != entry.pc // (2 * MIB)


def test_initrd(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(b"on disk" * 1000)
    for initrd in (b"in memory" * 1000, path):
        memory, entry = load(tmp_path, make_image(), initrd=initrd)
        data = initrd if isinstance(initrd, bytes) else path.read_bytes()
        chosen = fdt.parse_dtb(memory.read(entry.fdt, layout.FDT_MAX_BYTES)).get_node("/chosen")
        (start,), (end,) = pairs(chosen, "linux,initrd-start"), pairs(chosen, "linux,initrd-end")
        assert start % layout.PAGE_BYTES == 0
        assert end - start == len(data)
        assert layout.KERNEL + MIB <= start and end <= layout.RAM + MEMORY
        assert memory.read(start, len(data)) == data


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "too few"),
        (make_image()[:63], "too few"),
        (make_image(magic=0x644D5242), "no arm64 Image"),
        (b"\x7fELF" + bytes(100), "no arm64 Image"),
        (b"MZ\0\0zimg" + bytes(100), "CONFIG_EFI_ZBOOT"),
        (make_image(image_size=0), "image_size is 0"),
        (make_image(image_size=100), "image_size"),
        (make_image(image_size=MEMORY), "give more than 66 MiB"),
        (make_image(image_size=(1 << 64) - 1), "less memory"),
        (make_image(flags=0xB), "big-endian"),
        (make_image(text_offset=2 * MIB), "text_offset"),
        (make_image(text_offset=(1 << 64) - 4096), "text_offset"),
        (make_image(text_offset=100), "text_offset"),
        (gzip.compress(make_image())[:-9], "ends early"),
        (b"\x1f\x8b" + bytes(100), "can't be unpacked"),
        (gzip.compress(b"no kernel" * 20), "no arm64 Image"),
    ],
)
def test_wrong_images(tmp_path: Path, image: bytes, message: str) -> None:
    with pytest.raises(KernelError, match=message) as error:
        load(tmp_path, image)
    assert str(tmp_path / "Image") in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "MAX_IMAGE_BYTES", 2 * MIB)
    with pytest.raises(KernelError, match="more than"):
        load(tmp_path, gzip.compress(make_image(bytes(4 * MIB), image_size=16 * MIB)))


def test_wrong_initrds_and_command_lines(tmp_path: Path) -> None:
    for initrd, message in ((b"", "0 bytes"), (bytes(62 * MIB), "don't fit"), (tmp_path, "no regular file")):
        with pytest.raises(KernelError, match=message):
            load(tmp_path, make_image(), initrd=initrd)
    for cmdline, message in (("a\0b", "NUL"), ("x" * 2048, "2048 bytes")):
        with pytest.raises(KernelError, match=message):
            load(tmp_path, make_image(), cmdline=cmdline)
    load(tmp_path, make_image(), cmdline="x" * 2047)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_any_header(tmp_path: Path, mutations: list[tuple[int, int]], packed: bool) -> None:
    """A header with any bytes changed loads into RAM or is refused in words."""
    image = bytearray(make_image())
    for offset, value in mutations:
        image[offset] = value
    try:
        memory, entry = load(tmp_path, gzip.compress(image) if packed else bytes(image))
    except KernelError:
        return
    assert memory.read(entry.pc, len(image)) == image


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(header: bytes) -> None:
    try:
        boot.parse(header, "it", 1 << 20)
    except KernelError:
        return
    assert struct.unpack_from("<I", header, 56)[0] == boot.MAGIC


# The device tree.


@pytest.mark.parametrize("cpus", [1, 2, 18, 64])
def test_device_tree(cpus: int) -> None:
    memory_bytes = 5 << 30
    root = fdt.parse_dtb(tree.build(memory_bytes, cpus, b"quiet \xff", (0x48000000, 4097)))
    assert root.get_property("compatible").data == ["linux,dummy-virt"]
    gic = root.get_node(f"/intc@{layout.GICD:x}")
    assert cells(root.root, "interrupt-parent") == cells(gic, "phandle")
    assert gic.exist_property("interrupt-controller")
    assert pairs(gic, "reg") == [layout.GICD, 0x10000, layout.GICR, cpus * 0x20000]
    assert layout.GICR + cpus * 0x20000 <= layout.PL011
    memory = root.get_node("/memory@40000000")
    assert pairs(memory, "reg") == [layout.RAM, memory_bytes]
    chosen = root.get_node("/chosen")
    bootargs = chosen.get_property("bootargs").to_dtb("")[0]
    assert b"quiet \xff\0" in bootargs
    assert pairs(chosen, "linux,initrd-start") + pairs(chosen, "linux,initrd-end") == [0x48000000, 0x48001001]
    nodes = root.get_node("/cpus").nodes
    assert [cells(node, "reg") for node in nodes] == [[id % 16 | id // 16 << 8] for id in range(cpus)]
    assert {node.get_property("enable-method").value for node in nodes} == {"psci"}
    assert root.get_node("/psci").get_property("method").value == "hvc"
    timer = root.get_node("/timer")
    assert cells(timer, "interrupts") == [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]
    serial = root.get_node(f"/pl011@{layout.PL011:x}")
    assert chosen.get_property("stdout-path").value == f"/{serial.name}"
    assert cells(serial, "interrupts") == [0, layout.PL011_SPI, 4]
    assert cells(serial, "clocks") == 2 * cells(root.get_node("/apb-pclk"), "phandle")
    assert serial.get_property("compatible").data == ["arm,pl011", "arm,primecell"]
    assert pairs(root.get_node(f"/pl031@{layout.PL031:x}"), "reg") == [layout.PL031, 4096]


def test_virtio_devices_in_the_tree() -> None:
    root = fdt.parse_dtb(tree.build(MEMORY, 1, b"", virtio=2))
    nodes = [node for node in root.root.nodes if node.name.startswith("virtio_mmio@")]
    assert [pairs(node, "reg") for node in nodes] == [[0x0A000000, 0x1000], [0x0A001000, 0x1000]]
    assert [cells(node, "interrupts") for node in nodes] == [[0, 16, 1], [0, 17, 1]]
    assert all(node.get_property("compatible").value == "virtio,mmio" for node in nodes)
    assert all(node.exist_property("dma-coherent") for node in nodes)


def test_room_for_virtio() -> None:
    """Registers and interrupts of as many devices as there may be are there."""
    assert layout.FIRST_SPI + layout.FIRST_VIRTIO_SPI + layout.MAX_VIRTIO <= layout.NR_IRQS
    assert layout.VIRTIO_MMIO + layout.MAX_VIRTIO * layout.VIRTIO_BYTES <= layout.RAM


def test_seeds_differ() -> None:
    def seed(name: str) -> bytes:
        root = fdt.parse_dtb(tree.build(MEMORY, 1, b""))
        return bytes(root.get_node("/chosen").get_property(name).to_dtb("")[0])

    for name in ("rng-seed", "kaslr-seed"):
        assert seed(name) != seed(name)


def test_a_tree_that_gets_too_long() -> None:
    with pytest.raises(KernelError, match="shorten"):
        tree.build(MEMORY, 1, bytes(layout.FDT_MAX_BYTES))


# The board, on an engine that writes down what it is asked for.


class FakeDevice:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def set_device_attr(self, group: int, attr: int, addr: int = 0) -> None:
        if group == arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
            value = ctypes.c_uint32.from_address(addr).value
        else:
            value = ctypes.c_uint64.from_address(addr).value if addr else 0
        self.log.append(("gic", group, attr, value))

    def close(self) -> None:
        self.log.append("gic closed")


class FakeVcpu:
    def __init__(self, id: int, log: list[Any]) -> None:
        self.id = id
        self.log = log
        self.registers: dict[int, int] = {}

    def arm_vcpu_init(self, init: arm64.kvm_vcpu_init) -> None:
        self.log.append(("init", self.id, init.target, init.features[0]))

    def set_one_reg(self, id: int, value: int) -> None:
        self.registers[id] = value

    def close(self) -> None:
        self.log.append(("closed", self.id))


class FakeVm:
    """The calls that a board makes."""

    def __init__(self, *, gic: bool = True) -> None:
        self.log: list[Any] = []
        self.gic = gic

    def set_user_memory_region(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        self.log.append(("memory", gpa, size))

    def create_vcpu(self, id: int) -> Vcpu:
        return cast(Vcpu, FakeVcpu(id, self.log))

    def arm_preferred_target(self) -> arm64.kvm_vcpu_init:
        return arm64.kvm_vcpu_init(target=5)

    def create_device(self, type: int, flags: int = 0) -> Device:
        if not self.gic:
            raise OSError("ENODEV")
        self.log.append(("device", type))
        return cast(Device, FakeDevice(self.log))

    def irq_line(self, irq: int, level: int) -> None:
        self.log.append(("irq", irq, level))

    def irqfd(self, fd: int, gsi: int, flags: int = 0) -> None:
        self.log.append(("irqfd", gsi, flags))

    def memory_written(self, gpa: int, size_bytes: int) -> None:
        pass


def test_board(tmp_path: Path) -> None:
    vm = FakeVm()
    sent: list[bytes] = []
    board = Arm64Board(cast(Vm, vm), memory_bytes=MEMORY, cpus=2, serial_write=sent.append)
    psci, off = 1 << arm64.KVM_ARM_VCPU_PSCI_0_2, 1 << arm64.KVM_ARM_VCPU_POWER_OFF
    assert vm.log == [
        ("memory", layout.RAM, MEMORY),
        ("init", 0, 5, psci),
        ("init", 1, 5, psci | off),
        ("device", common.KVM_DEV_TYPE_ARM_VGIC_V3),
        ("gic", arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, layout.GICD),
        ("gic", arm64.KVM_DEV_ARM_VGIC_GRP_ADDR, arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST, layout.GICR),
        ("gic", arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, 96),
        ("gic", arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT, 0),
    ]
    kernel = tmp_path / "Image"
    kernel.write_bytes(make_image(text_offset=0x80000))
    board.load_linux(kernel, b"initrd", "quiet")
    first, second = (cast(FakeVcpu, vcpu).registers for vcpu in board.vcpus)
    assert first == {
        arm64.REG_PSTATE: 0x3C5,
        arm64.REG_PC: layout.KERNEL + 0x80000,
        arm64.x_reg(0): layout.FDT,
        arm64.x_reg(1): 0,
        arm64.x_reg(2): 0,
        arm64.x_reg(3): 0,
    }
    assert second == {}
    vm.log.clear()
    board._buses.memory.write(layout.PL011 + 0x38, 4, 1 << 5)
    for byte in b"hello\n":
        board._buses.memory.write(layout.PL011, 4, byte)
    assert sent == [b"hello\n"]
    assert vm.log == [("irq", 1 << 24 | 33, 1)]
    assert board._buses.memory.read(layout.PL031 + 0xFE0, 4) == 0x31
    assert board._buses.memory.read(layout.PL011 + 0xFE0, 4) == 0x11
    assert board._buses.memory.read(0x0A000000, 4) == 0xFFFFFFFF
    vm.log.clear()
    board.close()
    assert vm.log == ["gic closed", ("closed", 0), ("closed", 1)]


def test_virtio_on_the_board() -> None:
    vm = FakeVm()
    devices = [Rng("one"), Rng("two")]
    board = Arm64Board(cast(Vm, vm), memory_bytes=MEMORY, serial_write=lambda _: None, devices=devices)
    gic_ready = vm.log.index(("gic", arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT, 0))
    assert vm.log[gic_ready + 1 :] == [("irqfd", 16, 0), ("irqfd", 17, 0)]
    read = board._buses.memory.read
    for base in (layout.VIRTIO_MMIO, layout.VIRTIO_MMIO + layout.VIRTIO_BYTES):
        assert [read(base + offset, 4) for offset in (0, 4, 8)] == [0x74726976, 2, Rng.device_id]
    board.close()
    assert vm.log[gic_ready + 3 :] == [
        ("irqfd", 17, common.KVM_IRQFD_FLAG_DEASSIGN),
        ("irqfd", 16, common.KVM_IRQFD_FLAG_DEASSIGN),
        "gic closed",
        ("closed", 0),
    ]


def test_too_many_virtio_devices() -> None:
    devices = cast(list[VirtioDevice], [None] * 33)
    with pytest.raises(ValueError, match="33 virtio devices: this board has room for 32"):
        Arm64Board(cast(Vm, FakeVm()), memory_bytes=MEMORY, serial_write=lambda _: None, devices=devices)


def test_a_host_without_gicv3_leaves_nothing_open() -> None:
    vm = FakeVm(gic=False)
    with pytest.raises(OSError, match="ENODEV"):
        Arm64Board(cast(Vm, vm), memory_bytes=MEMORY, serial_write=lambda _: None)
    assert vm.log[-1] == ("closed", 0)


@pytest.mark.parametrize(
    ("memory_bytes", "cpus"), [(MEMORY + 1, 1), (8 * MIB, 1), (1 << 40, 1), (MEMORY, 0), (MEMORY, 65)]
)
def test_sizes_that_can_t_be(memory_bytes: int, cpus: int) -> None:
    with pytest.raises(ValueError):
        Arm64Board(cast(Vm, FakeVm()), memory_bytes=memory_bytes, cpus=cpus, serial_write=lambda _: None)


def test_pstate_is_what_the_boot_protocol_wants() -> None:
    """EL1 with its own stack pointer, and D, A, I and F masked (ARM DDI 0487, SPSR_EL1)."""
    assert board_module._PSTATE_DAIF | board_module._PSTATE_EL1H == 0b1111 << 6 | 0b0101


# The VM process.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VmConfig(testdev=True), "x86-64 test kernels"),
        (VmConfig(cpu="x86-64-v3"), "the host's processor"),
    ],
)
def test_what_arm64_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: VmConfig, message: str
) -> None:
    monkeypatch.setattr(vmm_devices, "ARM64", True)
    with pytest.raises(ValueError, match=message), make_devices(config, None, lambda _: None):
        pass
