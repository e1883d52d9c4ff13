"""The run loop, with a vCPU that plays a script of exits."""

import threading

import pytest

from kvmkit.kvm import Vcpu
from kvmkit.kvm.exits import (
    Exit,
    FailEntry,
    Hlt,
    InternalError,
    Intr,
    Io,
    Mmio,
    Rdmsr,
    Shutdown,
    SystemEvent,
)
from kvmkit.uapi import x86
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import Errands, run_vcpu

TIMEOUT_S = 20


class ScriptedVcpu(Vcpu):
    """Returns the exits given; raises those that are exceptions."""

    def __init__(self, *script: Exit | BaseException) -> None:
        self.id = 0
        self.script = list(script)
        self.run_struct = x86.kvm_run()

    @property
    def kvm_run(self) -> x86.kvm_run:
        return self.run_struct

    def run(self) -> Exit:
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    def kick(self) -> None:
        self.immediate_exit = True

    def close(self) -> None:
        pass

    @property
    def closed(self) -> bool:
        return False


class RecordingBus:
    def __init__(self) -> None:
        self.seen: list[Exit] = []

    def pio(self, exit_: Io) -> None:
        self.seen.append(exit_)

    def mmio(self, exit_: Mmio) -> None:
        self.seen.append(exit_)


def play(*script: Exit | BaseException) -> tuple[Ending, RecordingBus, ScriptedVcpu]:
    vcpu, bus, ending = ScriptedVcpu(*script), RecordingBus(), Ending()
    run_vcpu(vcpu, bus, ending, Errands(vcpu))
    ending.close()
    return ending, bus, vcpu


def test_accesses_go_to_the_bus_in_order() -> None:
    io = Io(1, 1, 0x3F8, 1, memoryview(bytearray(b"a")))
    mmio = Mmio(0xFED00000, 4, False, memoryview(bytearray(4)))
    ending, bus, _ = play(io, mmio, io, Shutdown())
    assert bus.seen == [io, mmio, io]
    assert ending.reason is Reason.TRIPLE_FAULT


@pytest.mark.parametrize(
    ("step", "reason", "detail"),
    [
        (Hlt(), Reason.HALTED, "HLT"),
        (Shutdown(), Reason.TRIPLE_FAULT, "vCPU 0"),
        (SystemEvent(1, ()), Reason.POWER_OFF, ""),
        (SystemEvent(2, ()), Reason.RESET, ""),
        (SystemEvent(3, ()), Reason.PANIC, ""),
        (
            InternalError(1, (1, 0x00CCC70F02, 0)),
            Reason.ENGINE,
            "suberror 1 (0x1 0xccc70f02 0x0), instruction 0f c7",
        ),
        (FailEntry(0x80000021, 3), Reason.ENGINE, "0x80000021"),
        (Rdmsr(0x10, 0), Reason.ENGINE, "Rdmsr"),
        (OSError(14, "KVM_RUN: Bad address"), Reason.ENGINE, "KVM_RUN: Bad address"),
    ],
)
def test_what_ends_a_vm(step: Exit | OSError, reason: Reason, detail: str) -> None:
    ending, _, _ = play(step)
    assert ending.reason is reason
    assert detail in ending.detail


def test_a_broken_device_ends_the_vm_and_shows() -> None:
    vcpu, ending = ScriptedVcpu(ValueError("ours")), Ending()
    with pytest.raises(ValueError):
        run_vcpu(vcpu, RecordingBus(), ending, Errands(vcpu))
    assert (ending.reason, ending.detail) == (Reason.ENGINE, "vCPU 0: ValueError: ours")
    ending.close()


def test_a_stray_kick_is_run_over() -> None:
    vcpu, ending = ScriptedVcpu(Intr(), Hlt()), Ending()
    vcpu.kick()
    run_vcpu(vcpu, RecordingBus(), ending, Errands(vcpu))
    assert ending.reason is Reason.HALTED
    assert not vcpu.immediate_exit
    ending.close()


class IdleVcpu(ScriptedVcpu):
    """A guest that waits: its runs end when it is kicked."""

    def __init__(self) -> None:
        super().__init__()
        self.kicked = threading.Event()

    def run(self) -> Exit:
        assert self.kicked.wait(TIMEOUT_S)
        self.kicked.clear()
        return Intr()

    def kick(self) -> None:
        super().kick()
        self.kicked.set()


def test_an_errand_is_done_between_two_runs() -> None:
    """By the vCPU's thread; its failure is that of whoever asked, and one that was given up isn't done later."""
    vcpu, ending, done = IdleVcpu(), Ending(), list[str]()
    errands = Errands(vcpu)
    with pytest.raises(TimeoutError):  # nobody runs it yet
        errands.call(lambda: done.append("late"), 0)
    thread = threading.Thread(target=run_vcpu, args=(vcpu, RecordingBus(), ending, errands))
    thread.start()
    assert errands.call(threading.get_ident, TIMEOUT_S) == thread.ident
    with pytest.raises(ZeroDivisionError):
        errands.call(lambda: 1 // 0, TIMEOUT_S)
    assert errands.call(threading.get_ident, TIMEOUT_S) == thread.ident and not vcpu.immediate_exit
    ending.set(Reason.STOPPED)
    vcpu.kick()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive() and not done
    ending.close()


def test_nothing_runs_once_it_ended() -> None:
    vcpu, ending = ScriptedVcpu(), Ending()
    ending.set(Reason.STOPPED)
    run_vcpu(vcpu, RecordingBus(), ending, Errands(vcpu))
    ending.close()


def test_the_first_reason_counts() -> None:
    ending = Ending()
    threads = [threading.Thread(target=ending.set, args=(reason,)) for reason in Reason]
    ending.set(Reason.RESET, "first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ending.reason, ending.detail) == (Reason.RESET, "first")
    ending.close()
