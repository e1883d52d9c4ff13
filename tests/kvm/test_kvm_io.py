"""Port and memory-mapped I/O exits."""

import os
from collections.abc import Callable

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Exit, Hlt, Io, Mmio
from kvmkit.testing import DATA, MEMORY_BYTES, Guest
from kvmkit.uapi.common import (
    KVM_EXIT_IO_IN,
    KVM_EXIT_IO_OUT,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
)

MMIO = 0x10000000


@pytest.mark.backs("KVM_RUN")
@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("code", "port", "data"),
    [
        ("mov al, 0x41\nout 0x10, al", 0x10, b"\x41"),
        ("mov ax, 0x4142\nout 0x10, ax", 0x10, b"\x42\x41"),
        ("mov eax, 0x41424344\nout 0x10, eax", 0x10, b"\x44\x43\x42\x41"),
        ("mov dx, 0x3f8\nmov al, 0x55\nout dx, al", 0x3F8, b"\x55"),
        ("mov dx, 0xcf8\nmov eax, 0x80000000\nout dx, eax", 0xCF8, b"\0\0\0\x80"),
    ],
)
def test_out(kvm: Kvm, bits: int, code: str, port: int, data: bytes) -> None:
    with Guest(kvm, code + "\nhlt", bits=bits) as guest:
        exit_ = guest.run()
        assert isinstance(exit_, Io)
        assert (exit_.direction, exit_.size, exit_.port, exit_.count) == (KVM_EXIT_IO_OUT, len(data), port, 1)
        assert bytes(exit_.data) == data
        assert guest.run() == Hlt()


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("register", "answer", "result"),
    [("al", b"\x99", 0xFFFFFF99), ("ax", b"\x99\x88", 0xFFFF8899), ("eax", b"\x99\x88\x77\x66", 0x66778899)],
)
def test_in(kvm: Kvm, bits: int, register: str, answer: bytes, result: int) -> None:
    """IN writes its register alone: 8 and 16 bits leave the rest, 32 bits clear the upper half in 64-bit mode."""
    with Guest(kvm, f"mov eax, -1\nmov dx, 0x60\nin {register}, dx\nhlt", bits=bits) as guest:
        exit_ = guest.run()
        assert isinstance(exit_, Io)
        assert (exit_.direction, exit_.size, exit_.port, exit_.count) == (
            KVM_EXIT_IO_IN,
            len(answer),
            0x60,
            1,
        )
        exit_.data[:] = answer
        assert guest.run() == Hlt()
        assert guest.vcpu.get_regs().rax == result


@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4)])
@pytest.mark.parametrize("count", [1, 5, 700])
def test_rep_outs(kvm: Kvm, suffix: str, size: int, count: int) -> None:
    """A string OUT arrives complete and in order, in as many exits as the engine likes."""
    payload = bytes(i * 7 & 0xFF for i in range(size * count))
    with Guest(kvm, f"mov esi, {DATA}\nmov ecx, {count}\nmov dx, 0x70\ncld\nrep outs{suffix}\nhlt") as guest:
        guest.map.write(DATA, payload)
        seen = b""
        while isinstance(exit_ := guest.run(), Io):
            assert (exit_.direction, exit_.size, exit_.port) == (KVM_EXIT_IO_OUT, size, 0x70)
            assert len(exit_.data) == exit_.size * exit_.count
            seen += bytes(exit_.data)
        assert exit_ == Hlt()
        assert seen == payload
        regs = guest.vcpu.get_regs()
        assert (regs.rcx, regs.rsi) == (0, DATA + size * count)


@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4)])
@pytest.mark.parametrize("count", [1, 5, 700])
def test_rep_ins(kvm: Kvm, suffix: str, size: int, count: int) -> None:
    payload = bytes(i * 11 & 0xFF for i in range(size * count))
    with Guest(kvm, f"mov edi, {DATA}\nmov ecx, {count}\nmov dx, 0x70\ncld\nrep ins{suffix}\nhlt") as guest:
        given = 0
        while isinstance(exit_ := guest.run(), Io):
            assert (exit_.direction, exit_.size, exit_.port) == (KVM_EXIT_IO_IN, size, 0x70)
            exit_.data[:] = payload[given : given + len(exit_.data)]
            given += len(exit_.data)
        assert exit_ == Hlt()
        assert guest.memory.read(DATA, len(payload)) == payload
        regs = guest.vcpu.get_regs()
        assert (given, regs.rcx, regs.rdi) == (len(payload), 0, DATA + size * count)


def test_rep_outs_of_nothing(kvm: Kvm) -> None:
    with Guest(kvm, f"mov esi, {DATA}\nxor ecx, ecx\nmov dx, 0x70\nrep outsb\nhlt") as guest:
        assert guest.run() == Hlt()


def mmio(exit_: Exit) -> tuple[int, int, bool]:
    """Address, length and direction of an MMIO exit."""
    assert isinstance(exit_, Mmio)
    assert len(exit_.data) == exit_.len
    return exit_.phys_addr, exit_.len, exit_.is_write


@pytest.mark.parametrize(
    ("instruction", "data"),
    [
        ("mov [rbx], al", b"\x88"),
        ("mov [rbx], ax", b"\x88\x77"),
        ("mov [rbx], eax", b"\x88\x77\x66\x55"),
        ("mov [rbx], rax", b"\x88\x77\x66\x55\x44\x33\x22\x11"),
        ("mov byte ptr [rbx], 5", b"\x05"),
        ("mov dword ptr [rbx], 0x01020304", b"\x04\x03\x02\x01"),
        ("mov rdi, rbx\nstosd", b"\x88\x77\x66\x55"),
    ],
)
def test_mmio_write(kvm: Kvm, instruction: str, data: bytes) -> None:
    with Guest(kvm, f"mov rbx, {MMIO}\nmov rax, 0x1122334455667788\n{instruction}\nhlt") as guest:
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO, len(data), True)
        assert isinstance(exit_, Mmio) and bytes(exit_.data) == data
        assert guest.run() == Hlt()


@pytest.mark.parametrize(
    ("instruction", "size", "result"),
    [
        ("mov al, [rbx]", 1, 0xFFFFFFFFFFFFFF88),
        ("mov ax, [rbx]", 2, 0xFFFFFFFFFFFF7788),
        ("mov eax, [rbx]", 4, 0x55667788),
        ("mov rax, [rbx]", 8, 0x1122334455667788),
        ("movzx eax, byte ptr [rbx]", 1, 0x88),
        ("movsx rax, byte ptr [rbx]", 1, 0xFFFFFFFFFFFFFF88),
        ("mov rsi, rbx\nlodsd", 4, 0x55667788),
        ("and rax, [rbx]", 8, 0x1122334455667788),
    ],
)
def test_mmio_read(kvm: Kvm, instruction: str, size: int, result: int) -> None:
    with Guest(kvm, f"mov rbx, {MMIO}\nmov rax, -1\n{instruction}\nhlt") as guest:
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO, size, False)
        assert isinstance(exit_, Mmio)
        exit_.data[:] = (0x1122334455667788).to_bytes(8, "little")[:size]
        assert guest.run() == Hlt()
        assert guest.vcpu.get_regs().rax == result


@pytest.mark.parametrize(
    ("instruction", "written", "eax"),
    [
        ("add dword ptr [rbx], 1", 0x101, 5),
        ("or dword ptr [rbx], eax", 0x105, 5),
        ("lock xadd [rbx], eax", 0x105, 0x100),
        ("xchg [rbx], eax", 0x5, 0x100),
        ("not dword ptr [rbx]", 0xFFFFFEFF, 5),
    ],
)
def test_mmio_read_modify_write(kvm: Kvm, instruction: str, written: int, eax: int) -> None:
    """One read exit, then one write exit, and the register result is right."""
    with Guest(kvm, f"mov rbx, {MMIO}\nmov eax, 5\n{instruction}\nhlt") as guest:
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO, 4, False)
        assert isinstance(exit_, Mmio)
        exit_.data[:] = (0x100).to_bytes(4, "little")
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO, 4, True)
        assert isinstance(exit_, Mmio) and int.from_bytes(exit_.data, "little") == written
        assert guest.run() == Hlt()
        assert guest.vcpu.get_regs().rax == eax


def test_mmio_to_memory_copy(kvm: Kvm) -> None:
    code = f"mov esi, {MMIO}\nmov edi, {DATA}\nmov ecx, 3\nrep movsd\nhlt"
    with Guest(kvm, code) as guest:
        offset = 0
        while isinstance(exit_ := guest.run(), Mmio):
            assert (exit_.phys_addr, exit_.is_write) == (MMIO + offset, False)
            exit_.data[:] = bytes(range(offset, offset + exit_.len))
            offset += exit_.len
        assert exit_ == Hlt()
        assert guest.memory.read(DATA, 12) == bytes(range(12))


def test_mmio_write_across_pages(kvm: Kvm) -> None:
    """An access over a page's end is two exits, in order of address."""
    with Guest(kvm, f"mov rbx, {MMIO + 0xFFC}\nmov rax, 0x1122334455667788\nmov [rbx], rax\nhlt") as guest:
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO + 0xFFC, 4, True)
        assert isinstance(exit_, Mmio) and bytes(exit_.data) == b"\x88\x77\x66\x55"
        exit_ = guest.run()
        assert mmio(exit_) == (MMIO + 0x1000, 4, True)
        assert isinstance(exit_, Mmio) and bytes(exit_.data) == b"\x44\x33\x22\x11"
        assert guest.run() == Hlt()


def test_write_from_memory_into_mmio(kvm: Kvm) -> None:
    """Where memory ends inside an access, its part goes to memory and the rest exits."""
    end = MEMORY_BYTES - 4
    with Guest(kvm, f"mov rbx, {end}\nmov rax, 0x1122334455667788\nmov [rbx], rax\nhlt") as guest:
        exit_ = guest.run()
        assert mmio(exit_) == (MEMORY_BYTES, 4, True)
        assert isinstance(exit_, Mmio) and bytes(exit_.data) == b"\x44\x33\x22\x11"
        assert guest.run() == Hlt()
        assert guest.memory.read(end, 4) == b"\x88\x77\x66\x55"


@pytest.mark.backs("KVM_IOEVENTFD")
@pytest.mark.parametrize(
    ("code", "address", "length", "flags", "datamatch", "signalled"),
    [
        ("mov al, 1\nout 0x10, al", 0x10, 1, KVM_IOEVENTFD_FLAG_PIO, 0, True),
        ("mov al, 1\nout 0x10, al", 0x10, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH, 1, True),
        ("mov al, 1\nout 0x10, al", 0x10, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH, 2, False),
        ("mov ax, 1\nout 0x10, ax", 0x10, 1, KVM_IOEVENTFD_FLAG_PIO, 0, False),
        (f"mov ebx, {MMIO}\nmov [rbx], eax", MMIO, 4, 0, 0, True),
        (f"mov ebx, {MMIO}\nmov [rbx], eax", MMIO + 4, 4, 0, 0, False),
        (f"mov ebx, {MMIO}\nmov [rbx], ax", MMIO, 0, 0, 0, True),
    ],
)
def test_ioeventfd(
    kvm: Kvm,
    needs: Callable[[str], int],
    code: str,
    address: int,
    length: int,
    flags: int,
    datamatch: int,
    signalled: bool,
) -> None:
    """A matching write signals the eventfd and doesn't exit; after DEASSIGN it exits again."""
    needs("KVM_CAP_IOEVENTFD")
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(kvm, code + "\nhlt") as guest:
            guest.vm.ioeventfd(address, length, fd, datamatch, flags)
            if signalled:
                assert guest.run() == Hlt()
                assert os.eventfd_read(fd) == 1
            else:
                assert isinstance(guest.run(), (Io, Mmio))
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(fd)
            guest.vm.ioeventfd(address, length, fd, datamatch, flags | KVM_IOEVENTFD_FLAG_DEASSIGN)
            with pytest.raises(FileNotFoundError):
                guest.vm.ioeventfd(address, length, fd, datamatch, flags | KVM_IOEVENTFD_FLAG_DEASSIGN)
    finally:
        os.close(fd)
