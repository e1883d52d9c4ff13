"""What tests of booting need: the default guest, fetched once into the user's cache."""

import gzip
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.machine.guest import DefaultGuest


@pytest.fixture(scope="session")
def guest(default_guest: DefaultGuest) -> DefaultGuest:
    """The default guest."""
    return default_guest


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
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(120, process.kill)
            timer.start()
            console = b""
            # Each line at its prompt: QEMU's UART loses what comes before Linux opened it, or while its FIFO is full.
            for line in typed.splitlines(keepends=True):
                while (byte := process.stdout.read(1)) and not (console := console + byte).endswith(b" # "):
                    pass
                process.stdin.write(line)
                process.stdin.flush()
            process.stdin.close()
            console += process.stdout.read()
            timer.cancel()
        assert process.returncode == 0, console
        return console

    return boot


@pytest.fixture
def vmlinux() -> bytes:
    """What passes for a kernel where none is booted."""
    return b"\x7fELF" + bytes(range(256))


@pytest.fixture
def bzimage(vmlinux: bytes) -> bytes:
    """`vmlinux`, packed."""
    payload = gzip.compress(vmlinux)
    payload += bytes(-len(payload) % 16)
    image = bytearray(1024)
    struct.pack_into("<BHIHHHH", image, 0x1F1, 1, 0, len(payload) // 16, 0, 0, 0, 0xAA55)
    struct.pack_into("<H4sH", image, 0x200, 0x66EB, b"HdrS", 0x20F)
    image[0x211] = 1
    struct.pack_into("<IIBBHI", image, 0x22C, 0x7FFFFFFF, 1 << 21, 1, 21, 1, 255)
    struct.pack_into("<IIxxxxxxxxQI", image, 0x248, 0, len(payload), 1 << 24, 1 << 20)
    return bytes(image) + payload
