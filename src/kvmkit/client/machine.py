"""A VM process from outside: start it, follow it, end it."""

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kvmkit.errors import KvmkitError, VmError, VmTimeout

_CLOSE_S = 5.0


@dataclass(frozen=True)
class MachineConfig:
    """What to run."""

    engine: str = "auto"
    """"kvm" (the kernel's), "soft" (kvmkit's own) or "auto", the faster one here."""
    kernel: str | None = None
    """Path of a bzImage or ELF vmlinux; None is Debian's, in the default guest."""
    initrd: str | None = None
    append: str = ""
    """Added to the kernel's command line."""
    memory_bytes: int = 256 << 20
    command: tuple[str, ...] = ()
    """A command to run in the default guest, on `kernel` if given; the console then carries its output alone."""
    output_fd: int | None = None
    """Where the serial console's output goes; duplicated, so that it may be closed. None drops it."""
    input_fd: int | None = None
    """What is typed on the serial console, until its end. None is nothing."""


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


class Machine:
    """A VM in a process of its own, as a context manager: at its end no process is left, however the ``with`` ends.

    One thread waits at a time; `stop` and `kill` may come from any.
    """

    def __init__(self, config: MachineConfig, on_event: Callable[[Event], None] | None = None) -> None:
        """`on_event` is called, on the thread that waits, for each event as it is read."""
        self.config = config
        self.timeline: list[Event] = []
        """All events so far but "progress", oldest first; the first is "spawned"."""
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._received = b""
        self._end: End | None = None

    def start(self, timeout_s: float | None = None) -> None:
        """Start the VM process and wait until the VM is built, a kernel's download included.

        `VmError` with the reason if it can't be, `VmTimeout` if it takes longer.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._process is not None:
            raise KvmkitError("this machine was started already")
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno()]
        message: dict[str, Any] = {
            "engine": self.config.engine,
            "kernel": self.config.kernel,
            "initrd": self.config.initrd,
            "append": self.config.append,
            "memory_bytes": self.config.memory_bytes,
            "command": self.config.command,
            # The kernel ties a child's life to the thread that started it, which mustn't be a short one.
            "die_with_parent": threading.current_thread() is threading.main_thread(),
        }
        try:
            for key, fd in (("output_fd", self.config.output_fd), ("input_fd", self.config.input_fd)):
                # Above 2, for there the child gets streams of its own.
                passed.append(-1 if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
                message[key] = passed[-1]
            self._add("spawned", time.monotonic_ns(), {})
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvmkit.vmm", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[fd for fd in passed if fd >= 0],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in passed[1:]:
                if fd >= 0:
                    os.close(fd)
        self._socket = ours
        self._send(message)
        while not self._has("started"):
            self._next(deadline)

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
        if self._process is None:
            raise KvmkitError("this machine wasn't started")
        return self._process.pid

    def wait(self, timeout_s: float | None = None) -> End:
        """Wait for the machine's end. `VmTimeout` if that takes longer; the machine runs on then."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._end is None:
            self._next(deadline)
        if self._process is not None:
            self._process.wait()
        return self._end

    def stop(self) -> None:
        """Ask the VM process to stop the guest where it stands; `wait` then returns. The guest isn't told."""
        self._send({"request": "stop"})

    def kill(self) -> None:
        """End the VM process at once, and wait until it is gone. Does nothing if it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it if it runs, and release everything. Closing twice does nothing."""
        if self._socket is not None:
            self._socket.close()  # which it takes as its end, and ends what it has started first
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.kill()

    def __enter__(self) -> Self:
        """Start."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is not None:
            with suppress(OSError):  # the process is gone: reading will say how
                self._socket.sendall((json.dumps(message) + "\n").encode())

    def _next(self, deadline: float | None) -> None:
        """Read one event and take it in."""
        if self._socket is None:
            raise KvmkitError("this machine isn't running")
        while b"\n" not in self._received:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                raise VmTimeout("the machine still runs")
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise VmError(self._how_it_died())
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        details = json.loads(line)
        name, t_ns = details.pop("event"), details.pop("t_ns")
        self._add(name, t_ns, details)
        if name == "error":
            raise VmError(details["message"])
        if name == "ended":
            status = self._details("exit")["status"] if self._has("exit") else None
            self._end = End(details["reason"], details["detail"], status, details["console_tail"])

    def _how_it_died(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the VM process {how} without a word"

    def _add(self, name: str, t_ns: int, details: dict[str, Any]) -> None:
        event = Event(name, t_ns, details)
        if name != "progress":
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
