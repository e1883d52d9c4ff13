"""From a configuration to a VM that is ready to run."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvmkit.kvm import Kvm, Vcpu, Vm
from kvmkit.machine import modules
from kvmkit.machine.guest import ARM64, DefaultGuest, console_command, fetch_default_guest
from kvmkit.runtime import VmDirectory
from kvmkit.vmm.config import VmConfig
from kvmkit.vmm.devices import ROOT_TAG, Devices, make_devices
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import Bus

if TYPE_CHECKING:
    from kvmkit.devices.virtio.console import Port
    from kvmkit.machine.arm64.board import Arm64Board
    from kvmkit.machine.x86.board import X86Board

_INPUT_FULL_S = 0.02


@dataclass(frozen=True)
class Booted:
    """A VM whose first vCPU stands at the kernel's entry."""

    vm: Vm
    vcpus: Sequence[Vcpu]
    bus: Bus
    console_input: Callable[[bytes], None]
    """Types on the console; waits while the guest doesn't read."""
    resize_console: Callable[[int, int], None]
    """Sets rows and columns; a serial port has none."""
    cmdline: str


def kernel_cmdline(config: VmConfig) -> str:
    """The kernel's command line: the console, a reset instead of a hang on a panic, and what the user adds."""
    parts = ["console=ttyAMA0" if ARM64 else "console=ttyS0", "panic=-1"]
    if config.console == "virtio":
        parts.append("console=hvc0")
    if config.runs_our_init and not config.verbose:
        parts.append("quiet")
    if config.append:
        parts.append(config.append)
    return " ".join(parts)


def files(
    config: VmConfig, devices: Devices, progress: Callable[[str], None]
) -> tuple[Path, bytes | Path | None]:
    """The kernel's path and the initramfs, those of the default guest where the configuration names none."""
    if config.kernel and not config.runs_our_init:
        return Path(config.kernel), Path(config.initrd) if config.initrd else None
    guest = fetch_default_guest(progress)
    kernel = Path(config.kernel) if config.kernel else guest.kernel.vmlinux
    if config.initrd:
        return kernel, Path(config.initrd)
    return kernel, initramfs(config, guest, devices)


def initramfs(config: VmConfig, guest: DefaultGuest, devices: Devices) -> bytes:
    """Our own: the agent as init, what it is to set up, and the modules for the devices that are there."""
    if config.modules:
        directory: Path | None = Path(config.modules)
    else:
        directory = None if config.kernel else guest.kernel.modules
    root: dict[str, Any] | None = None
    if config.root is not None and config.root.fstype == "virtiofs":
        root = {"tag": ROOT_TAG, "fstype": "virtiofs", "read_only": True, "overlay": True}
    elif config.root is not None:
        root = {"device": "/dev/vda", "fstype": config.root.fstype, "read_only": False, "overlay": False}
    mounts = [
        {"tag": f"share{i}", "path": share.path, "read_only": share.read_only}
        for i, share in enumerate(config.shares)
    ]
    boot: dict[str, Any] = {
        "hostname": config.hostname,
        "root": root,
        "mounts": mounts,
        "network": devices.network,
        "environment": dict(config.environment),
    }
    if config.console_command:
        boot |= console_command(config.console_command, always=not config.console_fallback)
    if directory is None:
        return guest.initramfs(boot)
    with modules.indexed(directory) as files:
        return guest.initramfs(boot, modules.choose(files, devices.modules))


@contextmanager
def build(
    system: Kvm,
    config: VmConfig,
    directory: VmDirectory | None,
    serial_write: Callable[[bytes], None],
    console_write: Callable[[bytes], None],
    ending: Ending,
    progress: Callable[[str], None],
) -> Iterator[Booted]:
    """Build the board and load the kernel; `ValueError` or `OSError` says what is wrong with the files.

    The serial port writes by `serial_write`, a virtio console, if there is one, by `console_write`.
    """
    with make_devices(config, directory, console_write) as devices:
        kernel, initrd = files(config, devices, progress)
        with system.create_vm() as vm:
            board = _board(system, vm, config, devices, serial_write, ending)
            with closing(board):
                if config.testdev:
                    cmdline = cast("X86Board", board).load_multiboot(kernel, config.initrd, config.append)
                else:
                    cmdline = kernel_cmdline(config)
                    board.load_linux(kernel, initrd, cmdline)
                if devices.console is None:
                    yield Booted(vm, board.vcpus, board, board.serial_input, lambda *_: None, cmdline)
                else:
                    console_input = partial(_send_all, devices.console)
                    yield Booted(vm, board.vcpus, board, console_input, devices.console.resize, cmdline)


def _board(
    system: Kvm,
    vm: Vm,
    config: VmConfig,
    devices: Devices,
    serial_write: Callable[[bytes], None],
    ending: Ending,
) -> "X86Board | Arm64Board":
    """The board that goes with the host's processor: a guest's instructions are the host's. It takes the devices over."""
    if ARM64:
        from kvmkit.machine.arm64.board import Arm64Board

        arm64_board = Arm64Board(
            vm,
            memory_bytes=config.memory_bytes,
            cpus=config.cpus,
            serial_write=serial_write,
            devices=tuple(devices.virtio),
        )
        devices.virtio.clear()
        return arm64_board
    from kvmkit.machine.x86.board import X86Board

    board = X86Board(
        system,
        vm,
        memory_bytes=config.memory_bytes,
        cpus=config.cpus,
        serial_write=serial_write,
        on_reset=lambda: ending.set(Reason.RESET),
        on_power_off=lambda: ending.set(Reason.POWER_OFF),
        on_exit_code=lambda code: ending.set(Reason.EXIT, str(code)),
        devices=tuple(devices.virtio),
        cpu=config.cpu,
        testdev=config.testdev,
    )
    devices.virtio.clear()
    return board


def _send_all(port: "Port", data: bytes) -> None:
    while data := data[port.send(data) :]:
        time.sleep(_INPUT_FULL_S)  # the guest has that much to read first
