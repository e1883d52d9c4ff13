"""The run loop: what each exit of a vCPU leads to."""

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from kvmkit.kvm import Vcpu
from kvmkit.kvm.exits import (
    FailEntry,
    Hlt,
    InternalError,
    Intr,
    Io,
    IrqWindowOpen,
    MemoryFault,
    Mmio,
    Shutdown,
    SystemEvent,
)
from kvmkit.uapi import common
from kvmkit.vmm.ending import Ending, Reason

_T = TypeVar("_T")


class Errands:
    """What others want of a vCPU, whose registers are its own thread's while it runs."""

    def __init__(self, vcpu: Vcpu) -> None:
        """For the thread that runs `vcpu`."""
        self._vcpu = vcpu
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def call(self, function: Callable[[], _T], timeout_s: float) -> _T:
        """Have the vCPU stop for `function`, and return what that does. `TimeoutError` if it doesn't come round."""
        future: Future[_T] = Future()
        self._queue.put((future, function))
        self._vcpu.kick()
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()

    def run(self) -> None:
        """Do what has been asked for; on the vCPU's thread, between two runs."""
        while True:
            try:
                future, function = self._queue.get_nowait()
            except Empty:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # of whoever asked
                    future.set_exception(error)


class Bus(Protocol):
    """What the loop needs of a board: it carries out accesses, filling `data` of the exit for reads."""

    def pio(self, exit_: Io, /) -> None:
        """Carry out a port access."""

    def mmio(self, exit_: Mmio, /) -> None:
        """Carry out a memory-mapped access."""


def run_vcpu(vcpu: Vcpu, bus: Bus, ending: Ending, errands: Errands) -> None:
    """Run `vcpu` on this thread until the VM ends, for whatever reason; `ending` has it then.

    Whoever sets `ending` from another thread kicks the vCPU afterwards: it is looked at after every exit. So are `errands`
    after the kick that comes with one.
    """
    try:
        while not ending:
            match vcpu.run():
                case Io() as exit_:
                    bus.pio(exit_)
                case Mmio() as exit_:
                    bus.mmio(exit_)
                case Intr() | IrqWindowOpen():
                    if not ending:  # kicked for something else, or a stray signal
                        vcpu.immediate_exit = False
                        if ending:  # set and kicked in between: nobody will kick again
                            return
                        errands.run()
                case Hlt():
                    ending.set(Reason.HALTED, f"vCPU {vcpu.id} executed HLT and nothing can wake it")
                case Shutdown():
                    ending.set(Reason.TRIPLE_FAULT, _where(vcpu))
                case SystemEvent(type=common.KVM_SYSTEM_EVENT_SHUTDOWN):
                    ending.set(Reason.POWER_OFF)
                case SystemEvent(type=common.KVM_SYSTEM_EVENT_RESET):
                    ending.set(Reason.RESET)
                case SystemEvent(type=common.KVM_SYSTEM_EVENT_CRASH):
                    ending.set(Reason.PANIC)
                case InternalError(suberror, data) as exit_:
                    code = f", instruction {exit_.insn_bytes.hex(' ')}" if exit_.insn_bytes else ""
                    words = " ".join(f"{word:#x}" for word in data)
                    ending.set(
                        Reason.ENGINE,
                        f"KVM_EXIT_INTERNAL_ERROR, suberror {suberror} ({words}){code}, {_where(vcpu)}",
                    )
                case FailEntry(reason, cpu):
                    ending.set(
                        Reason.ENGINE,
                        f"KVM_EXIT_FAIL_ENTRY on host CPU {cpu}: hardware reason {reason:#x}, {_where(vcpu)}",
                    )
                case MemoryFault(_, gpa, size):
                    ending.set(
                        Reason.ENGINE, f"KVM_EXIT_MEMORY_FAULT: {size} bytes at guest physical {gpa:#x}"
                    )
                case exit_:
                    ending.set(Reason.ENGINE, f"an exit that this board has no use for: {exit_}")
    except OSError as error:
        ending.set(Reason.ENGINE, f"vCPU {vcpu.id}: {error.strerror or error}")
    except BaseException as error:
        ending.set(Reason.ENGINE, f"vCPU {vcpu.id}: {type(error).__name__}: {error}")
        raise


def _where(vcpu: Vcpu) -> str:
    """Where a vCPU stands, for a message."""
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except OSError:
        return f"vCPU {vcpu.id}"
    return f"vCPU {vcpu.id} at rip {regs.rip:#x}, cr0 {sregs.cr0:#x}, cr2 {sregs.cr2:#x}, cr3 {sregs.cr3:#x}"
