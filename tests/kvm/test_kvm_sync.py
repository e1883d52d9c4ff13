"""The rest of kvm_run: sync regs, the signal mask, and MSR exits."""

import ctypes
import errno
import signal
import threading
from collections.abc import Callable

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Exit, Hlt, Intr, Io, Rdmsr, Shutdown, Wrmsr
from kvmkit.testing import CODE, Guest
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import KVM_CAP_X86_USER_SPACE_MSR
from kvmkit.uapi.common import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
)

SYNCED = x86.KVM_SYNC_X86_REGS | x86.KVM_SYNC_X86_SREGS | x86.KVM_SYNC_X86_EVENTS


def x86_run(guest: Guest) -> x86.kvm_run:
    """The first vCPU's kvm_run."""
    run = guest.vcpu.kvm_run
    assert isinstance(run, x86.kvm_run)
    return run


@pytest.mark.backs("KVM_RUN", "KVM_GET_REGS", "KVM_GET_SREGS", "KVM_GET_VCPU_EVENTS")
def test_valid_regs_are_stored_at_each_exit(kvm: Kvm, needs: Callable[[str], int]) -> None:
    assert needs("KVM_CAP_SYNC_REGS") & SYNCED == SYNCED
    with Guest(kvm, "mov eax, 7\nout 0x10, al\nmov eax, 8\nout 0x10, al\nhlt") as guest:
        run = x86_run(guest)
        run.kvm_valid_regs = SYNCED
        for expected in (7, 8):
            assert isinstance(guest.run(), Io)
            assert run.s.regs.regs.rax == expected
            assert bytes(run.s.regs.regs) == bytes(guest.vcpu.get_regs())
            assert bytes(run.s.regs.sregs) == bytes(guest.vcpu.get_sregs())
            assert bytes(run.s.regs.events) == bytes(guest.vcpu.get_vcpu_events())
        run.kvm_valid_regs = 0
        ctypes.memset(ctypes.addressof(run.s.regs.regs), 0, ctypes.sizeof(x86.kvm_regs))
        assert guest.run() == Hlt()
        assert run.s.regs.regs.rax == 0


@pytest.mark.backs("KVM_RUN")
def test_dirty_regs_are_taken_at_the_next_run(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SYNC_REGS")
    with Guest(kvm, "out 0x10, al\nnop\nout 0x11, al\nhlt") as guest:
        run = x86_run(guest)
        run.kvm_valid_regs = SYNCED
        assert isinstance(guest.run(), Io)
        run.s.regs.regs.rax = 0x55
        run.s.regs.sregs.fs.base = 0x123000
        run.kvm_dirty_regs = x86.KVM_SYNC_X86_REGS | x86.KVM_SYNC_X86_SREGS
        exit_ = guest.run()
        assert isinstance(exit_, Io) and (exit_.port, bytes(exit_.data)) == (0x11, b"\x55")
        assert run.kvm_dirty_regs == 0
        assert guest.vcpu.get_sregs().fs.base == 0x123000


def test_unknown_sync_bits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SYNC_REGS")
    with Guest(kvm, "hlt") as guest:
        run = x86_run(guest)
        for name in ("kvm_valid_regs", "kvm_dirty_regs"):
            setattr(run, name, 1 << 20)
            with pytest.raises(OSError, match="KVM_RUN: Invalid argument"):
                guest.vcpu.run()
            setattr(run, name, 0)
        assert guest.run() == Hlt()


@pytest.mark.backs("KVM_SET_SIGNAL_MASK")
def test_signal_mask(kvm: Kvm) -> None:
    """A signal that the thread blocks but the mask doesn't ends KVM_RUN, and stays pending."""
    with Guest(kvm, "hlt") as guest:
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            guest.vcpu.set_signal_mask([])
            assert guest.vcpu.run() == Intr()
            assert signal.SIGUSR1 in signal.sigpending()
            guest.vcpu.set_signal_mask([signal.SIGUSR1])
            assert guest.vcpu.run() == Hlt()
            guest.vcpu.set_signal_mask(None)
            assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


def test_signal_mask_while_the_guest_runs(kvm: Kvm) -> None:
    """A signal that comes later ends KVM_RUN too; the handler of one that the thread takes runs when that has returned."""
    came: list[object] = []

    def handler(number: int, frame: object) -> None:
        came.append(number)

    with Guest(kvm, "here: jmp here") as guest:
        previous = signal.signal(signal.SIGUSR1, handler)
        try:
            guest.vcpu.set_signal_mask([signal.SIGUSR2])
            thread = threading.get_ident()
            sender = threading.Thread(target=lambda: signal.pthread_kill(thread, signal.SIGUSR1))
            sender.start()
            while not came:
                assert guest.vcpu.run() == Intr()
            sender.join()
            assert came == [signal.SIGUSR1]
        finally:
            signal.signal(signal.SIGUSR1, previous)


def deny(index: int, flags: int) -> tuple[x86.kvm_msr_filter, object]:
    """A filter that denies accesses to one MSR, and the bitmap that it points to."""
    bitmap = ctypes.create_string_buffer(1)
    filter_ = x86.kvm_msr_filter(flags=x86.KVM_MSR_FILTER_DEFAULT_ALLOW)
    filter_.ranges[0] = x86.kvm_msr_filter_range(flags, 1, index, ctypes.addressof(bitmap))
    return filter_, bitmap


LSTAR, APIC_BASE = 0xC0000082, 0x1B
READ_WRITE = x86.KVM_MSR_FILTER_READ | x86.KVM_MSR_FILTER_WRITE


@pytest.mark.backs("KVM_X86_SET_MSR_FILTER", "KVM_ENABLE_CAP")
def test_filtered_msr_exits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_X86_MSR_FILTER")
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    code = f"mov ecx, {LSTAR}\nmov eax, 5\nmov edx, 6\nwrmsr\nrdmsr\nout 0x10, al\nhlt"
    enable = (KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
    with Guest(kvm, code, capabilities=[enable]) as guest:
        filter_, bitmap = deny(LSTAR, READ_WRITE)
        guest.vm.x86_set_msr_filter(filter_)
        del bitmap
        assert guest.run() == Wrmsr(LSTAR, KVM_MSR_EXIT_REASON_FILTER, 6 << 32 | 5)
        x86_run(guest).exit.msr.error = 0
        assert guest.run() == Rdmsr(LSTAR, KVM_MSR_EXIT_REASON_FILTER)
        x86_run(guest).exit.msr.data = 0x77
        x86_run(guest).exit.msr.error = 0
        exit_ = guest.run()
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"\x77"
        assert guest.vcpu.get_msrs([LSTAR]) == {
            LSTAR: 0
        }  # user space isn't filtered, and nothing was written


@pytest.mark.backs("KVM_X86_SET_MSR_FILTER")
def test_denied_msr_faults(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Without exits, or where user space says so: #GP, which triple faults here."""
    needs("KVM_CAP_X86_MSR_FILTER")
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    code = f"mov ecx, {LSTAR}\nrdmsr\nhlt"
    with Guest(kvm, code) as guest:
        filter_, _bitmap = deny(LSTAR, x86.KVM_MSR_FILTER_READ)
        guest.vm.x86_set_msr_filter(filter_)
        assert guest.run() == Shutdown()
    with Guest(kvm, code, capabilities=[(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)]) as guest:
        guest.vm.x86_set_msr_filter(filter_)
        assert isinstance(guest.run(), Rdmsr)
        x86_run(guest).exit.msr.error = 1
        assert guest.run() == Shutdown()


@pytest.mark.backs("KVM_ENABLE_CAP")
def test_unknown_and_invalid_msr_exits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    reasons = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL
    code = f"mov ecx, 0x12345678\nrdmsr\nmov ecx, {APIC_BASE}\nmov edx, 0x12345678\nwrmsr\nhlt"
    with Guest(kvm, code, capabilities=[(KVM_CAP_X86_USER_SPACE_MSR, reasons)]) as guest:
        exit_ = guest.run()
        assert isinstance(exit_, Rdmsr) and exit_.index == 0x12345678
        assert exit_.reason in (KVM_MSR_EXIT_REASON_UNKNOWN, KVM_MSR_EXIT_REASON_INVAL)
        x86_run(guest).exit.msr.error = 0
        exit_ = guest.run()
        assert isinstance(exit_, Wrmsr) and exit_.index == APIC_BASE  # beyond physical addresses
        assert exit_.reason == KVM_MSR_EXIT_REASON_INVAL
        x86_run(guest).exit.msr.error = 0
        assert guest.run() == Hlt()
        assert guest.vcpu.get_regs().rip > CODE


def msr_filter(flags: int = 0, *ranges: tuple[int, int, int, int]) -> x86.kvm_msr_filter:
    """Ranges are access flags, number and first of the MSRs, address of the bitmap."""
    filter_ = x86.kvm_msr_filter(flags=flags)
    for n, range_ in enumerate(ranges):
        filter_.ranges[n] = x86.kvm_msr_filter_range(*range_)
    return filter_


ALL = ctypes.create_string_buffer(b"\xff" * x86.KVM_MSR_FILTER_MAX_BITMAP_SIZE)
NONE = ctypes.create_string_buffer(8)
DENY = x86.KVM_MSR_FILTER_DEFAULT_DENY


@pytest.mark.parametrize(
    ("filter_", "number"),
    [
        (msr_filter(2), errno.EINVAL),  # an unknown flag
        (msr_filter(DENY), errno.EINVAL),  # denies all
        (msr_filter(DENY, (READ_WRITE, 0, LSTAR, ctypes.addressof(ALL))), errno.EINVAL),  # that, too
        (msr_filter(0, (0, 1, LSTAR, ctypes.addressof(ALL))), errno.EINVAL),  # for no kind of access
        (msr_filter(0, (4, 1, LSTAR, ctypes.addressof(ALL))), errno.EINVAL),
        (msr_filter(0, (1, 0x600 * 8 + 1, LSTAR, ctypes.addressof(ALL))), errno.EINVAL),  # too many MSRs
        (msr_filter(0, (1, 1, LSTAR, 8)), errno.EFAULT),
        (msr_filter(0, (1, 0x600 * 8, LSTAR, ctypes.addressof(ALL))), 0),
        (msr_filter(DENY, (2, 1, LSTAR, ctypes.addressof(ALL))), 0),
        (msr_filter(), 0),
    ],
)
def test_msr_filters_that_are_refused(
    kvm: Kvm, needs: Callable[[str], int], filter_: x86.kvm_msr_filter, number: int
) -> None:
    needs("KVM_CAP_X86_MSR_FILTER")
    with kvm.create_vm() as vm:
        if not number:
            vm.x86_set_msr_filter(filter_)
            return
        with pytest.raises(OSError, match="KVM_X86_SET_MSR_FILTER") as error:
            vm.x86_set_msr_filter(filter_)
        assert error.value.errno == number


@pytest.mark.parametrize("reasons", [8, 1 << 63])
def test_unknown_reasons_for_msr_exits(kvm: Kvm, needs: Callable[[str], int], reasons: int) -> None:
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    with kvm.create_vm() as vm, pytest.raises(OSError, match="KVM_ENABLE_CAP: Invalid argument"):
        vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, reasons)


FS_BASE, GS_BASE, X2APIC_VERSION = 0xC0000100, 0xC0000101, 0x803


@pytest.mark.parametrize(
    ("filter_", "index", "read", "write"),
    [
        (msr_filter(DENY, (READ_WRITE, 2, FS_BASE, ctypes.addressof(ALL))), FS_BASE, True, True),
        (msr_filter(DENY, (READ_WRITE, 2, FS_BASE, ctypes.addressof(ALL))), GS_BASE, True, True),
        (msr_filter(DENY, (READ_WRITE, 2, FS_BASE, ctypes.addressof(ALL))), GS_BASE + 1, False, False),
        (msr_filter(DENY, (1, 2, FS_BASE, ctypes.addressof(ALL))), FS_BASE, True, False),
        (msr_filter(DENY, (2, 2, FS_BASE, ctypes.addressof(ALL))), FS_BASE, False, True),
        (
            msr_filter(0, (1, 1, FS_BASE, ctypes.addressof(ALL)), (READ_WRITE, 8, FS_BASE, ctypes.addressof(NONE))),
            FS_BASE,
            True,
            False,
        ),
    ],
)  # fmt: skip
def test_which_range_of_a_filter_decides(
    kvm: Kvm,
    needs: Callable[[str], int],
    filter_: x86.kvm_msr_filter,
    index: int,
    read: bool,
    write: bool,
) -> None:
    """The first range that holds the MSR and is for the kind of access; else the default."""
    needs("KVM_CAP_X86_MSR_FILTER")
    code = f"mov ecx, {index}\nrdmsr\nmov ecx, {index}\nwrmsr\nhlt"
    with Guest(kvm, code, capabilities=[(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)]) as guest:
        guest.vm.x86_set_msr_filter(filter_)
        exits: list[Exit] = [] if read else [Rdmsr(index, KVM_MSR_EXIT_REASON_FILTER)]
        exits += [] if write else [Wrmsr(index, KVM_MSR_EXIT_REASON_FILTER, 0)]
        for expected in [*exits, Hlt()]:
            assert guest.run() == expected


def test_an_answer_is_used_before_an_interrupt_comes_between(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """An instruction that user space answered has happened: it isn't asked for again after the handler."""
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    code = """
        set_gate 0x40, handler
        load_idt
        sti
        in al, 0x20
        out 0x21, al
        mov ecx, 0x12345678
        rdmsr
        out 0x22, al
        hlt
    handler:
        iretq
    """
    with Guest(kvm, code, capabilities=[(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)]) as guest:
        exit_ = guest.run()
        assert isinstance(exit_, Io) and not exit_.is_out
        exit_.data[0] = 0x5A
        guest.vcpu.interrupt(0x40)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and (exit_.port, bytes(exit_.data)) == (0x21, b"\x5a")
        assert isinstance(guest.run(), Rdmsr)
        x86_run(guest).exit.msr.data = 0x66
        guest.vcpu.interrupt(0x40)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and (exit_.port, bytes(exit_.data)) == (0x22, b"\x66")
        assert guest.run() == Hlt()


def test_a_refusal_survives_immediate_exit(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """`immediate_exit` completes the instruction, and its #GP is part of the state."""
    needs("KVM_CAP_X86_USER_SPACE_MSR")
    code = "set_gate 13, handler\nload_idt\nmov ecx, 0x12345678\nrdmsr\nhlt\nhandler: out 0x13, al\nhlt"
    with Guest(kvm, code, capabilities=[(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)]) as guest:
        assert isinstance(guest.run(), Rdmsr)
        x86_run(guest).exit.msr.error = 1
        guest.vcpu.immediate_exit = True
        assert guest.vcpu.run() == Intr()
        guest.vcpu.immediate_exit = False
        events = guest.vcpu.get_vcpu_events()
        assert (events.exception.nr, events.exception.has_error_code, events.exception.error_code) == (
            13,
            1,
            0,
        )
        exit_ = guest.run()
        assert isinstance(exit_, Io) and exit_.port == 0x13
