"""A VM process from outside: start it, follow it, end it."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kvmkit.errors import KvmkitError, VmError, VmTimeout
from kvmkit.messages import MessageSocket
from kvmkit.runtime import VmDirectory

_CLOSE_S = 5.0
_TURN_S = 0.2

_EVENTS: dict[str, dict[str, type]] = {
    "progress": {"text": str},
    "refused": {"message": str},
    "started": {"engine": str, "reason": str, "cmdline": str},
    "entered": {},
    "console": {},
    "init": {},
    "agent": {"warnings": list},
    "exit": {"status": int},
    "stats": {"vm": dict, "vcpus": list},
    "walk": {"gva": int, "vcpu": int, "walk": dict, "error": str},
    "ended": {"reason": str, "detail": str, "console_tail": str},
    "error": {"message": str},
}
"""Events of a VM process (`kvmkit.vmm.control` says what they mean) and what they carry."""

_ANSWERS = {"stats", "walk"}
_REPEATED = {"progress", "refused", *_ANSWERS}


@dataclass(frozen=True)
class Event:
    """Something that happened: `name` as `kvmkit.vmm` sends it, `t_ns` on CLOCK_MONOTONIC."""

    name: str
    t_ns: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class End:
    """How a machine ended."""

    reason: str
    """"power-off", "reset", "exit", "panic", "triple-fault", "halted", "stopped", "output-closed" or "engine"."""
    detail: str
    status: int | None
    """The command's exit status, if there was a command and it ended."""
    console_tail: str
    """The last of what the guest wrote on its console."""


class VmProcess:
    """A VM in a process of its own, as a context manager: at its end no process is left, however the ``with`` ends.

    `wait` may be called by several threads; `stop` and `kill` by any.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        """`on_event` is called, on the thread that waits, for each event as it is read."""
        self.timeline: list[Event] = []
        """What happened so far, "progress" apart, oldest first; the first is "spawned"."""
        self.directory: VmDirectory | None = None
        """Where its sockets are."""
        self.killed = False
        """Whether `kill` was called."""
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: MessageSocket | None = None
        self._end: End | None = None
        self._answers: dict[str, dict[str, Any]] = {}
        self._detached = False
        self._reading = threading.RLock()
        self._asking = threading.Lock()

    def spawn(
        self,
        message: dict[str, Any],
        descriptors: dict[str, int | None],
        directory: tuple[VmDirectory, int] | None,
        deadline: float | None,
    ) -> None:
        """Start the VM process with configuration `message` (`kvmkit.vmm.config`) and wait until the VM is built.

        `descriptors` are given to it under their names, as is the `directory` with its lock, which become this object's.
        `VmError` with the reason if it can't be, `VmTimeout` if that takes until after `deadline` (of time.monotonic).
        """
        if self._process is not None or self._socket is not None:
            raise KvmkitError("this machine was started already")
        passed: list[int] = []

        def give(fd: int) -> int:
            """Duplicate above 2, for there the child gets streams of its own."""
            passed.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            return passed[-1]

        self._detached = bool(message.get("detached"))
        try:
            if directory is not None:
                self.directory, lock = directory
                passed.append(lock)
                message |= {"directory": os.fspath(self.directory.path), "lock_fd": lock}
            ours, theirs = socket.socketpair()
            self._socket = MessageSocket(ours)
            with theirs:
                control_fd = give(theirs.fileno())
            message |= {name: -1 if fd is None else give(fd) for name, fd in descriptors.items()}
            self._add(Event("spawned", time.monotonic_ns()))
            with ExitStack() as stack:
                log = None
                if self._detached and self.directory is not None:  # it outlives our stderr
                    log = stack.enter_context(open(self.directory.process_log, "wb"))
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "kvmkit.vmm", str(control_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=passed,
                    start_new_session=self._detached,
                )
        except OSError as error:
            self.close()
            raise VmError(f"can't start a VM process: {error}") from error
        finally:
            for fd in passed:
                os.close(fd)
        # The kernel ties a child's life to the thread that started it, which mustn't be a short one.
        message["die_with_parent"] = (
            not self._detached and threading.current_thread() is threading.main_thread()
        )
        self._send(message)
        self.wait_for("started", deadline)

    def connect(self, directory: VmDirectory, timeout_s: float = 10.0) -> None:
        """Follow a VM that runs already, instead of `spawn`. It isn't ended by `close`."""
        self._detached = True
        self.directory = directory
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(os.fspath(directory.control))
        except OSError as error:
            sock.close()
            raise VmError(
                f"{directory.control}: {error.strerror}: its VM is being built, or is gone"
            ) from error
        self._socket = MessageSocket(sock)
        self.wait_for("started", time.monotonic() + timeout_s)

    @property
    def engine(self) -> str:
        """The engine that runs it, "linux" or "soft"."""
        return str(self._details("started")["engine"])

    @property
    def engine_reason(self) -> str:
        """Why that engine."""
        return str(self._details("started")["reason"])

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        return str(self._details("started")["cmdline"])

    @property
    def pid(self) -> int:
        """The VM process."""
        if self._process is not None:
            return self._process.pid
        if self.directory is not None and isinstance(pid := self.directory.read("vm.json").get("pid"), int):
            return pid
        raise KvmkitError("this machine wasn't started")

    @property
    def end(self) -> End | None:
        """How it ended, if that is known yet."""
        return self._end

    def wait(self, timeout_s: float | None = None) -> End:
        """Wait for the machine's end. `VmTimeout` if that takes longer; the machine runs on then."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.wait_for("ended", deadline)
        self._reap()
        assert self._end is not None
        return self._end

    def wait_for(self, name: str, deadline: float | None) -> None:
        """Wait until event `name` or the end has come. `VmTimeout` after `deadline`, of time.monotonic; `VmError`."""
        self._read_until(lambda: self._has(name) or self._end is not None, deadline)

    def stats(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Return KVM's statistics now: ``vm``, name → number, and ``vcpus``, a list of such.

        A histogram is a list of numbers. Both are empty on an engine that has none (KVM_CAP_BINARY_STATS_FD). `VmError` if it ended.
        """
        return self._ask("stats", timeout_s)

    def walk(self, gva: int, vcpu: int = 0, timeout_s: float = 10.0) -> dict[str, Any]:
        """Follow a guest virtual address to the host's page, as vCPU `vcpu`, which pauses for it, has it mapped now.

        Returns `kvmkit.kvm.walk.Walk` as dictionaries and lists, and as ``text`` for people. `VmError` if it can't be followed.
        """
        answer = self._ask("walk", timeout_s, gva=gva, vcpu=vcpu)
        if answer["error"]:
            raise VmError(answer["error"])
        walk: dict[str, Any] = answer["walk"]
        return walk

    def _ask(self, name: str, timeout_s: float, **details: int) -> dict[str, Any]:
        """Send a request and wait for the answer, which bears its name and repeats its details."""

        def answered() -> bool:  # by what isn't the late answer to an earlier one
            return self._answers.get(name, {}).items() >= details.items() and name in self._answers

        with self._asking:
            self._answers.pop(name, None)
            self._send({"request": name, **details})
            self._read_until(lambda: answered() or self._end is not None, time.monotonic() + timeout_s)
            if not answered():
                raise VmError("the machine has ended: it can't be asked any more")
            return self._answers.pop(name)

    def _read_until(self, done: Callable[[], bool], deadline: float | None) -> None:
        while not done():
            with self._reading:  # by turns, if several threads wait
                if done():
                    return
                turn = time.monotonic() + _TURN_S
                try:
                    self._next(turn if deadline is None else min(deadline, turn))
                except VmTimeout:
                    if deadline is not None and time.monotonic() >= deadline:
                        raise

    def halt(self) -> None:
        """Ask the VM process to stop the guest where it stands; `wait` then returns. The guest isn't told."""
        self._send({"request": "stop"})

    def resize_console(self, rows: int, cols: int) -> None:
        """Tell a virtio console the size of the terminal that it is on. A serial one has none."""
        self._send({"request": "resize", "rows": rows, "cols": cols})

    def kill(self) -> None:
        """End the VM process at once, and wait until it is gone. Does nothing if it is."""
        self.killed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it if it runs and isn't detached, and release everything. Closing twice does nothing."""
        if self._socket is not None:
            self._socket.close()  # which it takes as its end, and ends what it has started first
            self._socket = None
        if self._detached and self._has("started"):
            return
        self._reap()
        if self.directory is not None:  # it removes that itself, if it can
            self.directory.remove()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        messages = self._socket
        if messages is not None:
            with suppress(OSError):  # the process is gone: reading will say how
                messages.send(message)

    def _next(self, deadline: float | None) -> None:
        """Read one event and take it in."""
        if self._socket is None:
            raise KvmkitError("this machine isn't running")
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            message = self._socket.receive(left)
            if message is None:
                raise VmError(self._how_it_died())
            event = self._event(message)
        except TimeoutError:
            raise VmTimeout("the machine still runs") from None
        except ValueError as error:
            self.kill()
            raise VmError(f"the VM process sent what it mustn't, and was killed: {error}") from None
        self._add(event)
        match event:
            case Event(name, details=details) if name in _ANSWERS:
                self._answers[name] = details
            case Event("error"):
                raise VmError(event.details["message"])
            case Event("ended", details=details):
                status = self._details("exit")["status"] if self._has("exit") else None
                self._end = End(details["reason"], details["detail"], status, details["console_tail"])

    def _event(self, message: dict[str, Any]) -> Event:
        """Check a message; `ValueError` if it isn't an event that may come now."""
        details = dict(message)
        name, t_ns = details.pop("event", None), details.pop("t_ns", None)
        if not isinstance(name, str) or name not in _EVENTS or not isinstance(t_ns, int):
            raise ValueError(f"no such event: {message!r:.80}")
        if details.keys() != _EVENTS[name].keys() or not all(
            isinstance(details[key], type_) for key, type_ in _EVENTS[name].items()
        ):
            raise ValueError(f"event {name!r} can't carry {details!r:.80}")
        if name not in _REPEATED and self._has(name):
            raise ValueError(f"event {name!r} comes only once")
        return Event(name, t_ns, details)

    def _reap(self) -> int:
        """Wait until the process is gone, which is about to end, or has had its time; return its status, -N for signal N."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
        return self._process.wait()

    def _how_it_died(self) -> str:
        status = self._reap()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the VM process {how} without a word"

    def _add(self, event: Event) -> None:
        if event.name not in _REPEATED:
            self.timeline.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def _has(self, name: str) -> bool:
        return any(event.name == name for event in self.timeline)

    def _details(self, name: str) -> dict[str, Any]:
        for event in self.timeline:
            if event.name == name:
                return event.details
        raise KvmkitError(f"no {name!r} event yet: the machine wasn't started")
