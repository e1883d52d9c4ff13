"""A Linux machine, as its user sees it: commands, files, shares, ports."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

from kvmkit import runtime
from kvmkit.client.agent import Agent, CompletedProcess, Files, Process
from kvmkit.client.agent.sync import PopenOptions, RunOptions
from kvmkit.client.config import Disk, MachineConfig, Share
from kvmkit.client.forward import Forward
from kvmkit.client.vm_process import End, Event, VmProcess
from kvmkit.errors import AgentError, KvmkitError, VmError, VmTimeout

if TYPE_CHECKING:
    from kvmkit.images import ImageConfig

AGENT_PORT = 1024
READY_S = 120.0
"""How long a machine may take until its agent runs: emulated on a busy host, a large root may take some tens of seconds."""
_CONNECT_S = 30.0
_STOP_S = 10.0
_AGENT_SOON_S = 1.0
"""`stop` waits so long for the agent of a machine that is still booting, or was attached to just now."""


class Options(TypedDict, total=False):
    """The fields of `MachineConfig`, as keyword arguments."""

    root: str | os.PathLike[str] | None
    memory: int | str
    cpus: int
    cpu: str
    arch: str
    console: str
    disks: tuple[Disk, ...]
    shares: tuple[Share, ...]
    network: str
    hostname: str
    environment: Mapping[str, str]
    name: str | None
    engine: str
    kernel: str | os.PathLike[str] | None
    modules: str | os.PathLike[str] | None
    initrd: str | os.PathLike[str] | None
    append: str
    testdev: bool
    agent: bool
    console_command: tuple[str, ...]
    console_fallback: bool
    detached: bool
    verbose: bool
    output_fd: int | None
    input_fd: int | None


class Machine(VmProcess):
    r"""A Linux machine in a process of its own.

    ::

        with Machine(root="debian:bookworm", memory="512M") as vm:
            result = vm.run(["python3", "-c", "print(6 * 7)"], text=True)
            assert result.stdout == "42\n"

    At the end of the ``with`` nothing is left of it. Methods may be called from any thread.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Describe it by `config`, by `options` (the same by name), or by both; `on_event` hears of what happens, as it is read."""
        super().__init__(on_event)
        self.config = replace(config or MachineConfig(), **options)
        self.image: ImageConfig | None = None
        """What the root's image says of the command, environment, directory and user to use, once started."""
        self._agent: Agent | None = None
        self._forwards: list[Forward] = []
        self._agent_lock = threading.Lock()

    @classmethod
    def attach(cls, name: str, on_event: Callable[[Event], None] | None = None) -> "Machine":
        """Return the machine of that name which runs already, detached or another program's. Closing it doesn't end it.

        `KvmkitError` if none does.
        """
        directory = runtime.find(name)
        machine = cls(MachineConfig(name=name, detached=True), on_event)
        try:
            machine.connect(directory)
        except BaseException:
            machine.close()
            raise
        return machine

    def start(self, timeout_s: float | None = None) -> None:
        """Start the VM process and wait until the VM is built, the download of a kernel or the making of its root included.

        It boots while this returns; what needs its agent waits for that. `VmError` with the reason if it can't be, `VmTimeout` if
        it takes longer.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        config = self.config
        if config.initrd is not None and (config.root is not None or config.console_command):
            raise ValueError("an initrd is a system of its own: it goes with no root and no command")
        message: dict[str, Any] = {
            "engine": config.engine,
            "kernel": _path(config.kernel),
            "modules": _path(config.modules),
            "initrd": _path(config.initrd),
            "append": config.append,
            "testdev": config.testdev,
            "memory_bytes": config.memory_bytes,
            "cpus": config.cpus,
            "arch": config.arch,
            "cpu": config.cpu,
            "console": config.console,
            "agent": self._has_agent,
            "hostname": config.hostname,
            "disks": [
                {
                    "path": _path(disk.path),
                    "read_only": disk.read_only,
                    "temporary": disk.temporary,
                    "overlay": _path(disk.overlay),
                }
                for disk in config.disks
            ],
            "shares": [
                {"directory": _path(share.directory), "path": share.path, "read_only": share.read_only}
                for share in config.shares
            ],
            "network": config.network,
            "console_command": config.console_command,
            "console_fallback": config.console_fallback,
            "environment": list(config.environment.items()),
            "verbose": config.verbose,
            "detached": config.detached,
        }
        if config.root is not None:
            message |= self._resolve_root(config.root, config.environment)
        descriptors = {"output_fd": config.output_fd, "input_fd": config.input_fd}
        directory = runtime.create(config.name)
        self.spawn(message, descriptors, directory, deadline)

    @property
    def name(self) -> str:
        """Its name, given or made up."""
        if self.directory is None:
            raise KvmkitError("this machine wasn't started")
        return self.directory.name

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Wait until its agent runs. `VmError` if it ended instead, `VmTimeout`."""
        if not self._has_agent:
            raise KvmkitError("this machine has no agent: it runs a system of its own; use its console")
        try:
            self.wait_for("agent", time.monotonic() + timeout_s)
        except VmTimeout:
            raise VmTimeout(f"the guest's agent didn't come up within {timeout_s:g} s") from None
        if self.end is not None:
            raise VmError(_died(self.end))

    @property
    def agent(self) -> Agent:
        """Its agent, waited for."""
        self.wait_ready()
        with self._agent_lock:
            if self._agent is None:
                self._agent = Agent(lambda: self.vsock(AGENT_PORT))
            return self._agent

    @property
    def warnings(self) -> list[str]:
        """What its init found wrong and went on without. Waits for its agent."""
        self.wait_ready()
        return [str(line) for line in self._details("agent")["warnings"]]

    @overload
    def run(
        self, argv: Sequence[str], *, text: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> CompletedProcess[bytes]: ...

    @overload
    def run(
        self, argv: Sequence[str], *, text: Literal[True], **options: Unpack[RunOptions]
    ) -> CompletedProcess[str]: ...

    def run(self, argv: Sequence[str], **options: Any) -> CompletedProcess[Any]:
        """Run a command and return its `returncode`, `stdout` and `stderr`; `Agent.run` says with which options."""
        try:
            done: CompletedProcess[Any] = self.agent.run(argv, **options)
        except AgentError as error:
            raise self._explained(error) from error
        return done

    def popen(self, argv: Sequence[str], **options: Unpack[PopenOptions]) -> Process:
        """Start a command; `Agent.popen` says with which options."""
        try:
            return self.agent.popen(argv, **options)
        except AgentError as error:
            raise self._explained(error) from error

    @property
    def files(self) -> Files:
        """Its files."""
        return self.agent.files

    def add_share(self, directory: str | os.PathLike[str], path: str, *, read_only: bool = False) -> None:
        """Share one more directory of the host, at `path` in the guest. Before the start: the board has no hot-plug yet."""
        if self.directory is not None:
            raise KvmkitError("shares are given before a machine starts: its board has no hot-plug yet")
        share = Share(directory, path, read_only)
        self.config = replace(self.config, shares=(*self.config.shares, share))

    def forward(self, guest_port: int, host_port: int = 0, *, host_address: str = "127.0.0.1") -> Forward:
        """Have TCP connections to `host_port` (0: any free one, see `Forward.port`) reach `guest_port` in the guest.

        They arrive there from its own loopback, so that no network is needed. Ends with the machine, or by `Forward.close`.
        """
        forward = Forward(self.agent, guest_port, host_address, host_port)
        self._forwards.append(forward)
        return forward

    def vsock(self, port: int, timeout_s: float = _CONNECT_S) -> socket.socket:
        """Connect to a vsock port that a program in the guest listens at. `AgentError` if none does."""
        if self.directory is None:
            raise KvmkitError("this machine wasn't started")
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout_s)
            connection.connect(os.fspath(self.directory.vsock))
            connection.sendall(b"CONNECT %d\n" % port)
            answer = b""
            while not answer.endswith(b"\n"):  # what follows the line belongs to the connection
                byte = connection.recv(1)
                if not byte or len(answer) > 32:
                    raise AgentError(f"nobody in the guest listens at vsock port {port}")
                answer += byte
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise AgentError(f"the guest's vsock port {port} can't be reached: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def stop(self, timeout_s: float = _STOP_S) -> End:
        """Shut the guest down: its agent writes back what is to be written and powers off. Return its end.

        A guest that doesn't within `timeout_s` seconds, or has no agent, is stopped where it stands.
        """
        if self.end is None and self._has_agent:
            with suppress(KvmkitError, OSError):
                self.wait_ready(_AGENT_SOON_S)
                self.agent.shutdown()
            with suppress(VmTimeout):
                return self.wait(timeout_s)
        self.halt()
        return self.wait()

    def close(self) -> None:
        """End it if it runs, unless it is detached or only attached to, and release everything. Closing twice does nothing."""
        for forward in self._forwards:
            forward.close()
        self._forwards.clear()
        super().close()

    def __enter__(self) -> Self:
        """Start."""
        try:
            if self.directory is None:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; disks that outlive the machine are written back before, if nothing failed."""
        lasting = any(not disk.read_only and not disk.temporary for disk in self.config.disks)
        try:
            if kind is None and lasting and not self.config.detached and not self.killed:
                self.stop()
        finally:
            self.close()

    @property
    def _has_agent(self) -> bool:
        return self.config.agent and self.config.initrd is None and not self.config.testdev

    def _resolve_root(self, root: str | os.PathLike[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """What the VM process needs to know of the root."""

        def progress(text: str) -> None:
            self._add(Event("progress", time.monotonic_ns(), {"text": text}))

        from kvmkit.images import DirectoryRoot, ImageRoot, resolve  # many machines have no root to look for

        match resolve(os.fspath(root), progress):
            case DirectoryRoot(path):
                return {"root": {"path": os.fspath(path), "fstype": "virtiofs"}}
            case ImageRoot(path, fstype, image):
                self.image = image
                merged = {**dict(image.env), **environment}
                return {
                    "root": {"path": os.fspath(path), "fstype": fstype},
                    "environment": list(merged.items()),
                }

    def _explained(self, error: AgentError) -> KvmkitError:
        """The machine's end, if that is why."""
        with suppress(VmTimeout, VmError):
            return VmError(_died(self.wait(1.0)))
        return error


def _died(end: End) -> str:
    said = f"; its last output:\n{end.console_tail}" if end.console_tail else ""
    return f"the guest is gone: {end.reason}{f', {end.detail}' if end.detail else ''}{said}"


def _path(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.abspath(path)
