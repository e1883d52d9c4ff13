"""One VM from its configuration to its end: what the VM process does."""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time

from kvmkit import kvm
from kvmkit.kvm.probe import choose_engine
from kvmkit.vmm.build import Booted, build
from kvmkit.vmm.config import VmConfig
from kvmkit.vmm.console import Console, writer
from kvmkit.vmm.control import Control
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import run_vcpu

_PR_SET_PDEATHSIG = 1
_JOIN_S = 5.0
_UNWIND_S = 3.0


class _Cancelled(BaseException):
    """Raised in the main thread while the VM is being built: give up what has been begun, and clean up."""


class _Stop:
    """What SIGTERM does: while the VM is being built, it interrupts that; afterwards, it ends the VM."""

    def __init__(self, ending: Ending) -> None:
        self.building = True
        self._ending = ending

    def __call__(self, *_: object) -> None:
        self._ending.set(Reason.STOPPED, "SIGTERM")
        if self.building:
            self.building = False  # a second one mustn't interrupt the cleaning up
            raise _Cancelled


def main(control_fd: int) -> int:
    """Be the VM process on the other end of `control_fd`; return its exit status, 0 unless the VM failed."""
    # Ctrl-C is the client's to handle. A handler, for what we start shall not inherit it as SIG_IGN would be.
    signal.signal(signal.SIGINT, lambda *_: None)
    ending = Ending()
    stop = _Stop(ending)
    control = Control(socket.socket(fileno=control_fd))
    try:
        try:
            signal.signal(signal.SIGTERM, stop)
            message = control.receive()
            if message is None:
                return 0
            run(VmConfig.from_message(message), control, ending, stop)
        finally:
            stop.building = False  # reporting an error is not to be interrupted
    except _Cancelled:
        control.send("error", message=f"stopped while the VM was being built ({ending.detail})")
        return 1
    except Exception as error:
        control.send("error", message=_describe(error))
        if not isinstance(error, (OSError, ValueError, ImportError, MemoryError)):
            raise  # ours: the traceback is for us
        return 1
    return 0


def run(config: VmConfig, control: Control, ending: Ending, stop: _Stop) -> None:
    """Build the VM, run it to its end and report on the way."""
    watcher = threading.Thread(target=_watch, args=(control, ending, stop), name="control", daemon=True)
    watcher.start()  # from now on the client may go away, while a kernel is being fetched too
    engine, why = (config.engine, "asked for") if config.engine != "auto" else choose_engine()
    panicked = False

    def told(event: str, value: int) -> None:
        nonlocal panicked
        if event == "panic":
            panicked = True
        elif event == "exit":
            control.send("exit", status=value)
        else:
            control.send(event)

    console = Console(writer(config.output_fd, ending), told, command_only=bool(config.command))
    with kvm.open(engine) as system:
        with build(
            system, config, console.feed, ending, lambda text: control.send("progress", text=text)
        ) as vm:
            stop.building = False
            control.send("started", engine=system.engine, reason=why, cmdline=vm.cmdline)
            # From here on there is nothing of ours that has to be ended first: see `_watch`.
            if config.die_with_parent:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            run_vcpus(vm, config, control, ending)
        console.close()
    reason = Reason.PANIC if panicked and ending.reason is Reason.RESET else ending.reason
    tail = console.tail.decode(errors="replace")
    control.send("ended", reason=reason, detail=ending.detail, console_tail=tail)


def run_vcpus(vm: Booted, config: VmConfig, control: Control, ending: Ending) -> None:
    """Run each vCPU on a thread of its own until `ending` is set; all have stopped afterwards."""
    threads = [
        threading.Thread(target=run_vcpu, args=(vcpu, vm.bus, ending), name=f"vcpu{vcpu.id}", daemon=True)
        for vcpu in vm.vcpus
    ]
    if config.input_fd >= 0:
        threading.Thread(target=_pump, args=(config.input_fd, vm), name="input", daemon=True).start()
    control.send("entered")
    for thread in threads:
        thread.start()
    select.select([ending], [], [])
    deadline = time.monotonic() + _JOIN_S
    for vcpu, thread in zip(vm.vcpus, threads, strict=True):
        vcpu.kick()
        thread.join(max(0.0, deadline - time.monotonic()))
        if (
            thread.is_alive()
        ):  # writes to a console that nobody reads, perhaps: nothing can be torn down under it
            control.send("ended", reason=ending.reason, detail=ending.detail, console_tail="")
            sys.stderr.flush()
            os._exit(0)


def _pump(fd: int, vm: Booted) -> None:
    """Give the serial line what comes in on `fd`; the end of it is no end of the VM, nor is a terminal that hung up."""
    readable = select.poll()
    readable.register(fd, select.POLLIN)
    while True:
        readable.poll()  # whoever shares it may have made it non-blocking
        try:
            data = os.read(fd, 4096)
        except BlockingIOError:
            continue
        except OSError:
            return
        if not data:
            return
        vm.serial_input(data)


def _watch(control: Control, ending: Ending, stop: _Stop) -> None:
    """Carry out requests; end the process when the client is gone."""
    while True:
        try:
            message = control.receive()
        except ValueError as error:
            control.send("refused", message=str(error))
            continue
        except OSError:
            break
        if message is None:
            break
        if message == {"request": "stop"}:
            _end(ending, stop, "asked for")
        else:
            control.send("refused", message=f"no such request: {json.dumps(message):.80}")
    if _end(ending, stop, "the client is gone"):
        time.sleep(_UNWIND_S)  # the main thread ends the process before that, its downloads cleaned up
    os._exit(1)  # nobody is left to report to, and a VM that runs owns nothing that outlives its process


def _end(ending: Ending, stop: _Stop, why: str) -> bool:
    """End the VM, or the building of it; whether it was that."""
    ending.set(Reason.STOPPED, why)
    building = stop.building
    if building:
        os.kill(os.getpid(), signal.SIGTERM)
    return building


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}"
    return str(error) or type(error).__name__
