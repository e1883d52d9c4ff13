"""From a configuration to a VM that is ready to run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvmkit.kvm import Kvm, Vcpu
from kvmkit.vmm.config import VmConfig
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import Bus


@dataclass(frozen=True)
class Booted:
    """A VM whose first vCPU stands at the kernel's entry."""

    vcpus: Sequence[Vcpu]
    bus: Bus
    serial_input: Callable[[bytes], None]
    cmdline: str


@contextmanager
def build(
    system: Kvm,
    config: VmConfig,
    serial_write: Callable[[bytes], None],
    ending: Ending,
    progress: Callable[[str], None],
) -> Iterator[Booted]:
    """Build the board and load the kernel; `ValueError` or `OSError` says what is wrong with the files."""
    board_module: Any = import_module("kvmkit.machine.x86.board")
    boot_module: Any = import_module("kvmkit.machine.x86.boot")
    with system.create_vm() as vm:
        board = board_module.X86Board(
            system,
            vm,
            memory_bytes=config.memory_bytes,
            cpus=1,
            serial_write=serial_write,
            on_reset=lambda: ending.set(Reason.RESET),
            on_power_off=lambda: ending.set(Reason.POWER_OFF),
            on_exit_code=lambda code: ending.set(Reason.EXIT, str(code)),
        )
        cmdline = boot_module.load_linux(board, config.kernel, config.initrd, config.append, progress)
        yield Booted(board.vcpus, board, board.serial_input, cmdline)
