"""From a configuration to a VM that is ready to run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmkit.kvm import Kvm, Vcpu
from kvmkit.machine.guest import fetch_default_guest
from kvmkit.machine.x86.board import X86Board
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


def kernel_cmdline(config: VmConfig) -> str:
    """The kernel's command line: the console, a reset instead of a hang on a panic, and what the user adds."""
    parts = ["console=ttyS0", "panic=-1"]
    if config.command:
        parts.append("quiet")  # the command's output shares the console
    if config.append:
        parts.append(config.append)
    return " ".join(parts)


def files(config: VmConfig, progress: Callable[[str], None]) -> tuple[Path, bytes | Path | None]:
    """The kernel's path and the initramfs, those of the default guest where the configuration names none."""
    if config.kernel and not config.command:
        return Path(config.kernel), Path(config.initrd) if config.initrd else None
    guest = fetch_default_guest(progress)
    kernel = Path(config.kernel) if config.kernel else guest.kernel.vmlinux
    return kernel, Path(config.initrd) if config.initrd else guest.initramfs(config.command)


@contextmanager
def build(
    system: Kvm,
    config: VmConfig,
    serial_write: Callable[[bytes], None],
    ending: Ending,
    progress: Callable[[str], None],
) -> Iterator[Booted]:
    """Build the board and load the kernel; `ValueError` or `OSError` says what is wrong with the files."""
    kernel, initrd = files(config, progress)
    cmdline = kernel_cmdline(config)
    with system.create_vm() as vm:
        board = X86Board(
            system,
            vm,
            memory_bytes=config.memory_bytes,
            cpus=config.cpus,
            serial_write=serial_write,
            on_reset=lambda: ending.set(Reason.RESET),
            on_power_off=lambda: ending.set(Reason.POWER_OFF),
            on_exit_code=lambda code: ending.set(Reason.EXIT, str(code)),
        )
        with closing(board):
            board.load_linux(kernel, initrd, cmdline)
            yield Booted(board.vcpus, board, board.serial_input, cmdline)
