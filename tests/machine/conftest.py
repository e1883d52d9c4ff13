"""What tests of booting need: the default guest, fetched once into the user's cache."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.machine.guest import DefaultGuest, GuestError, fetch_default_guest


@pytest.fixture(scope="session")
def guest() -> DefaultGuest:
    """The default guest; skips where there is no apt to fetch it."""
    if shutil.which("apt-get") is None:
        pytest.skip("no apt to fetch the default guest with")
    try:
        return fetch_default_guest(print)
    except GuestError as error:
        pytest.skip(str(error))


@pytest.fixture
def boot_in_qemu(guest: DefaultGuest, tmp_path: Path) -> Callable[..., bytes]:
    """Boot an initramfs in QEMU, where another's devices and firmware surround it, and return what the console said."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64")

    def boot(initramfs: bytes, *, typed: bytes = b"") -> bytes:
        initrd = tmp_path / "initrd"
        initrd.write_bytes(initramfs)
        # fmt: off
        command = [
            qemu, "-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none",
            "-no-reboot", "-serial", "stdio", "-kernel", str(guest.kernel.vmlinux), "-initrd", str(initrd),
            "-append", "console=ttyS0 tsc_early_khz=2600000 lpj=10400000 reboot=t panic=-1 quiet",
        ]
        # fmt: on
        return subprocess.run(command, input=typed, capture_output=True, timeout=120, check=True).stdout

    return boot
