import pytest

from kvmkit.devices.acpi_pm import AcpiPm, PmTimer
from kvmkit.devices.bus import Bus
from kvmkit.devices.debug_exit import DebugExit
from kvmkit.devices.fw_cfg import FwCfg
from kvmkit.devices.i8042 import I8042
from kvmkit.devices.pci import PciConfig
from kvmkit.devices.testdev import IrqLines, ShutdownPort, TestPorts


def test_i8042_resets_and_nothing_else() -> None:
    resets: list[str] = []
    device = I8042(lambda: resets.append("reset"))
    assert device.read(0, 1) & 0x03 == 0  # nothing to read, and ready for a command: kb_wait() ends at once
    for command in (0x20, 0x60, 0xAA, 0xF0, 0xFD, 0xFF):
        device.write(0, 1, command)
    assert resets == []
    device.write(0, 1, 0xFE)
    assert resets == ["reset"]


def test_debug_exit() -> None:
    codes: list[int] = []
    device = DebugExit(codes.append)
    assert device.read(0, 4) == 0
    device.write(0, 1, 3)
    device.write(0, 4, 0x12345)
    assert codes == [3, 0x12345]


def test_pci_is_empty() -> None:
    device = PciConfig(pytest.fail)
    device.write(3, 1, 1)  # Linux's probe of mechanism #1
    device.write(0, 4, 0x80000000)
    assert device.read(0, 4) == 0x80000000
    assert device.read(4, 4) == 0xFFFFFFFF
    assert device.read(6, 2) == 0xFFFF
    device.write(4, 4, 0x12345678)
    device.write(0, 4, 0xFFFFFFFF)
    assert device.read(0, 4) == 0x80FFFFFC


def test_reset_control_register() -> None:
    resets: list[str] = []
    device = PciConfig(lambda: resets.append("reset"))
    device.write(1, 1, device.read(1, 1) | 0x02)
    assert resets == []
    device.write(1, 1, 0x06)
    assert resets == ["reset"]


def test_acpi_s5() -> None:
    offs: list[str] = []
    device = Bus()
    device.register(0, 6, AcpiPm(lambda: offs.append("off")))
    assert device.read(4, 2) == 1  # SCI_EN: always in ACPI mode
    assert device.read(0, 4) == 0
    device.write(2, 2, 0xFFFF)
    device.write(0, 2, 0xFFFF)
    assert device.read(0, 4) == 0x0721 << 16
    device.write(4, 2, 5 << 10)
    assert device.read(4, 2) == 5 << 10 | 1
    device.write(4, 2, 3 << 10 | 1 << 13)  # S3 is not there
    assert offs == []
    device.write(4, 2, 5 << 10 | 1 << 13)
    assert offs == ["off"]


def test_pm_timer() -> None:
    now_ns = 0
    device = Bus()
    device.register(0, 4, PmTimer(lambda: now_ns))
    assert device.read(0, 4) == 0
    now_ns = 1_000_000_000
    assert device.read(0, 4) == 3_579_545
    assert device.read(1, 1) == 3_579_545 >> 8 & 0xFF
    now_ns = 5_000_000_000  # it has turned over once
    device.write(0, 4, 0)
    assert device.read(0, 4) == 5 * 3_579_545 - (1 << 24)


def test_fw_cfg() -> None:
    device = FwCfg(memory_bytes=0x123456789, cpus=3)
    device.write(0, 2, 0x03)
    assert bytes(device.read(1, 1) for _ in range(10)) == (0x123456789).to_bytes(10, "little")
    device.write(0, 2, 0x05)
    device.write(1, 1, 0xFF)  # nothing there can be written
    assert [device.read(1, 1) for _ in range(3)] == [3, 0, 0]
    device.write(0, 2, 0)  # no signature: whoever looks for QEMU's files finds none
    assert [device.read(1, 1) for _ in range(4)] == [0] * 4


def test_test_ports_flush() -> None:
    flushed: list[int] = []
    device = Bus()
    device.register(0xE0, 12, TestPorts(flushed.append))
    device.write(0xE4, 4, 0xFFFFF123)
    device.write(0xE4, 2, 0x1000)
    device.write(0xE6, 4, 0x1000)
    assert flushed == [0xFFFFF123]
    device.write(0xE0, 4, 0x44332211)
    device.write(0xE3, 2, 0xAAAA)  # reaches into the port that flushes
    assert device.read(0xE0, 4) == 0xAA332211
    assert flushed == [0xFFFFF123]


def test_irq_lines() -> None:
    lines: list[tuple[int, int]] = []
    device = Bus()
    device.register(0x2000, 24, IrqLines(lambda line, level: lines.append((line, level))))
    device.write(0x2000, 1, 0x80)
    device.write(0x2017, 1, 0)
    device.write(0x2018, 1, 1)
    assert lines == [(0, 1), (23, 0)]


def test_shutdown_port() -> None:
    offs: list[str] = []
    device = ShutdownPort(lambda: offs.append("off"))
    for letter in b"ShutdowShutdown":
        assert offs == []
        device.write(0, 1, letter)
    assert offs == ["off"]
