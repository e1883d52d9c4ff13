"""One VM from its configuration to its end: what the VM process does."""

import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kvmkit import kvm
from kvmkit.kvm import Vcpu, Vm
from kvmkit.kvm.probe import choose_engine
from kvmkit.kvm.stats import read_stats
from kvmkit.runtime import VmDirectory
from kvmkit.vmm import agent
from kvmkit.vmm.build import Booted, build
from kvmkit.vmm.config import VmConfig
from kvmkit.vmm.console import Console, ConsoleLog, ConsoleSocket, writer
from kvmkit.vmm.control import Control, refusal
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import Errands, run_vcpu

_PR_SET_PDEATHSIG = 1
_JOIN_S = 5.0
_UNWIND_S = 3.0
_SWITCH_INTERVAL_S = 0.0002
_PAUSE_S = 5.0
"""A vCPU that doesn't pause within this time waits for something else, such as a reader of its console."""


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
    logging.basicConfig(format="kvmkit: %(message)s", level=logging.WARNING)
    # A vCPU's exit waits for the interpreter while a device's thread has it: not for 5 ms.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # The guest's files and connections are descriptors here. The lower limit is for users of select(2), which we aren't.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
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
    directory = VmDirectory(Path(config.directory)) if config.directory else None
    requests = _Requests(ending, stop)
    watcher = threading.Thread(
        target=_watch, args=(control, requests, config, directory), name="control", daemon=True
    )
    watcher.start()  # from now on the client may go away, while a kernel is being fetched too
    engine, why = (config.engine, "asked for") if config.engine != "auto" else choose_engine()
    panicked = False
    status: int | None = None
    seen: set[str] = set()

    def told(event: str, value: int) -> None:
        nonlocal panicked, status
        if event in seen:
            return
        seen.add(event)
        if event == "panic":
            panicked = True
        elif event == "exit":
            status = value
            control.send("exit", status=value)
        else:
            control.send(event)

    with ExitStack() as stack:
        raw_sinks: list[Callable[[bytes], None]] = []
        sinks = [writer(config.output_fd, ending)] if config.output_fd >= 0 else []
        if directory is not None:
            if not config.detached:
                stack.callback(directory.remove)
            log = stack.enter_context(ConsoleLog(directory.console_log))
            sinks.append(log.write)
            control.listen(directory.control, requests)
            socket_ = ConsoleSocket(directory.console)
            raw_sinks.append(socket_.write)
        console = Console(
            sinks, told, command_only=bool(config.console_command) and not config.verbose, raw_sinks=raw_sinks
        )
        serial = console
        if config.console == "virtio":  # what is on the serial port too has been seen, or comes again
            serial = Console([], told)
        system = stack.enter_context(kvm.open(engine))
        with build(
            system,
            config,
            directory,
            serial.feed,
            console.feed,
            ending,
            lambda text: control.send("progress", text=text),
        ) as vm:
            requests.resize = vm.resize_console
            requests.vm = vm
            requests.errands = errands = [Errands(vcpu) for vcpu in vm.vcpus]
            if directory is not None:
                socket_.typed = vm.console_input
                agent.listen(directory.vsock, lambda warnings: control.send("agent", warnings=warnings))
                directory.write("vm.json", _about(config, system.engine))
            stop.building = False
            control.send("started", engine=system.engine, reason=why, cmdline=vm.cmdline)
            # From here on there is nothing of ours that has to be ended first: see `_watch`.
            if config.die_with_parent:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            run_vcpus(vm, config, control, ending, errands)
        console.close()
    reason = Reason.PANIC if panicked and ending.reason is Reason.RESET else ending.reason
    tail = (console.tail or serial.tail).decode(errors="replace")
    if directory is not None and config.detached:
        directory.write("end.json", {"reason": reason, "detail": ending.detail, "status": status})
    control.send("ended", reason=reason, detail=ending.detail, console_tail=tail)


def statistics(vm: Booted) -> dict[str, Any]:
    """KVM's binary statistics of the VM and of each vCPU: name → value, or a histogram's values. Empty if the engine has none."""

    def of(descriptor: Vm | Vcpu) -> dict[str, Any]:
        try:
            fd = descriptor.get_stats_fd()
        except OSError:
            return {}
        try:
            stats = read_stats(fd).stats.values()
        finally:
            os.close(fd)
        return {stat.name: stat.values[0] if len(stat.values) == 1 else stat.values for stat in stats}

    return {"vm": of(vm.vm), "vcpus": [of(vcpu) for vcpu in vm.vcpus]}


def _about(config: VmConfig, engine: str) -> dict[str, Any]:
    """What ``kvmkit ps`` tells of a VM."""
    return {
        "pid": os.getpid(),
        "engine": engine,
        "started_s": time.time(),
        "cpus": config.cpus,
        "memory_bytes": config.memory_bytes,
        "root": config.root.path if config.root else None,
        "command": list(config.console_command),
        "detached": config.detached,
    }


def run_vcpus(
    vm: Booted, config: VmConfig, control: Control, ending: Ending, errands: Sequence[Errands]
) -> None:
    """Run each vCPU on a thread of its own until `ending` is set; all have stopped afterwards."""
    threads = [
        threading.Thread(
            target=run_vcpu, args=(vcpu, vm.bus, ending, own), name=f"vcpu{vcpu.id}", daemon=True
        )
        for vcpu, own in zip(vm.vcpus, errands, strict=True)
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
        vm.console_input(data)


class _Requests:
    """Carries out what clients ask for."""

    def __init__(self, ending: Ending, stop: _Stop) -> None:
        self._ending = ending
        self._stop = stop
        self.resize: Callable[[int, int], None] = lambda *_: None
        """Set once there is a console."""
        self.vm: Booted | None = None
        """Set once there is one."""
        self.errands: Sequence[Errands] = ()
        """Of its vCPUs."""

    def __call__(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out a request; return the answer, if there is one to it."""
        if message == {"request": "stop"}:
            self.end("asked for")
            return None
        if message == {"request": "stats"} and self.vm is not None:
            return {"event": "stats", **statistics(self.vm)}
        if message.keys() == {"request", "gva", "vcpu"} and message["request"] == "walk":
            gva, vcpu = message["gva"], message["vcpu"]
            if self.vm is not None and type(gva) is type(vcpu) is int and 0 <= gva < 1 << 64:
                return {"event": "walk", "gva": gva, "vcpu": vcpu, **self._walk(self.vm, gva, vcpu)}
        if message.keys() == {"request", "rows", "cols"} and message["request"] == "resize":
            rows, cols = message["rows"], message["cols"]
            if type(rows) is type(cols) is int and 0 <= rows < 1 << 16 and 0 <= cols < 1 << 16:
                self.resize(rows, cols)
                return None
        return refusal(f"no such request: {json.dumps(message):.80}")

    def _walk(self, vm: Booted, gva: int, index: int) -> dict[str, Any]:
        """Follow an address on a vCPU, which pauses for it."""
        error, walk = "", {}
        if 0 <= index < len(vm.vcpus):
            try:
                found = self.errands[index].call(partial(vm.vcpus[index].walk, gva), _PAUSE_S)
                walk = found.as_dict() | {"text": str(found)}
            except TimeoutError:
                error = f"vCPU {index} doesn't pause: it waits for a device, or the VM is ending"
            except OSError as failure:
                error = str(failure)
        else:
            error = f"no vCPU {index}: there are 0 to {len(vm.vcpus) - 1}"
        return {"walk": walk, "error": error}

    def end(self, why: str) -> bool:
        """End the VM, or the building of it; whether it was that."""
        self._ending.set(Reason.STOPPED, why)
        building = self._stop.building
        if building:
            os.kill(os.getpid(), signal.SIGTERM)
        return building


def _watch(control: Control, requests: _Requests, config: VmConfig, directory: VmDirectory | None) -> None:
    """Carry out the first client's requests; end the process when it is gone, unless the VM is detached."""
    while True:
        try:
            message = control.receive()
        except ValueError as error:
            answer: dict[str, Any] | None = refusal(str(error))
        except OSError:
            break
        else:
            if message is None:
                break
            answer = requests(message)
        if answer is not None:
            control.answer(answer)
    if config.detached:
        return
    if requests.end("the client is gone"):
        time.sleep(_UNWIND_S)  # the main thread ends the process before that, its downloads cleaned up
    if directory is not None:
        directory.remove()
    os._exit(1)  # nobody is left to report to, and a VM that runs owns nothing else that outlives its process


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}"
    return str(error) or type(error).__name__
