"""Whatever a guest writes to the board's devices, and however wide, nothing comes out but bytes."""

from collections.abc import Iterator
from importlib.util import find_spec
from random import Random

import pytest

import kvmkit.kvm
from kvmkit.kvm.exits import Io, Mmio
from kvmkit.machine.x86 import layout
from kvmkit.machine.x86.board import X86Board
from kvmkit.uapi import common as c

if find_spec("kvmkit._engine") is None:
    pytest.skip("the native module kvmkit._engine isn't built", allow_module_level=True)

BASES = (layout.COM1, layout.RTC, layout.I8042_COMMAND, layout.DEBUG_EXIT, layout.ACPI_PM, layout.PCI_CONFIG)


@pytest.fixture
def board() -> Iterator[X86Board]:
    with kvmkit.kvm.open("soft") as system, system.create_vm() as vm:
        board = X86Board(
            system,
            vm,
            memory_bytes=2 << 20,
            serial_write=lambda _: None,
            on_reset=lambda: None,
            on_power_off=lambda: None,
            on_exit_code=lambda _: None,
        )
        try:
            yield board
        finally:
            board.close()


def random_io(r: Random) -> Io:
    base = r.choice(BASES)
    port = (base + r.randrange(-4, 12) if r.random() < 0.98 else r.getrandbits(16)) & 0xFFFF
    size, count = r.choice((1, 1, 2, 4)), r.choice((1, 1, 1, 3, 1024))
    data = bytearray(r.randbytes(size * count))
    return Io(r.choice((c.KVM_EXIT_IO_IN, c.KVM_EXIT_IO_OUT)), size, port, count, memoryview(data))


@pytest.mark.parametrize("seed", range(4))
def test_random_port_accesses(board: X86Board, seed: int) -> None:
    r = Random(seed)
    for n in range(600):
        exit_ = random_io(r)
        before = bytes(exit_.data)
        board.pio(exit_)
        assert not exit_.is_out or bytes(exit_.data) == before, (n, exit_)


def test_random_memory_accesses(board: X86Board) -> None:
    r = Random(1)
    for _ in range(1000):
        length, is_write = r.randrange(1, 9), r.random() < 0.5
        address = r.choice((r.getrandbits(46), 0xFEC00000 + r.randrange(4096), (1 << 46) - length))
        data = bytearray(r.randbytes(length))
        board.mmio(Mmio(address, length, is_write, memoryview(data)))
        assert is_write or data == b"\xff" * length  # nobody is there but the engine's own chips
