"""The agent for programs that wait: commands and files in a guest."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, AnyStr, Generic, Literal, Self, TypedDict, TypeVar, Unpack, overload

from kvmkit.client.agent import operations, protocol
from kvmkit.client.agent.operations import FileStat, GuestPath
from kvmkit.client.agent.protocol import Command, FrameDecoder, Pty
from kvmkit.client.agent.pump import (
    RECEIVE_BYTES,
    BytesSink,
    BytesSource,
    FdSink,
    FdSource,
    NullSink,
    Pump,
    Sink,
    Source,
)
from kvmkit.errors import AgentError, CommandError, CommandTimeout, ProtocolError

T = TypeVar("T")

PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL

OUTPUT_LIMIT_BYTES = 1 << 30
"""What `run` keeps of each output before it gives up: a hostile guest would fill the host's memory."""


@dataclass(frozen=True)
class CompletedProcess(Generic[AnyStr]):
    """How a command ended, and what it said."""

    args: list[str]
    returncode: int
    """Its exit status, or the number of the signal that ended it, negated."""
    stdout: AnyStr
    stderr: AnyStr


class RunOptions(TypedDict, total=False):
    """What `Agent.run` takes by name, beside `text`; it describes them."""

    input: bytes | str | None
    env: Mapping[str, str] | None
    clear_env: bool
    cwd: str | os.PathLike[str] | None
    user: str | int | None
    timeout_s: float | None
    check: bool
    output_limit_bytes: int


class PopenOptions(TypedDict, total=False):
    """What `Agent.popen` takes by name; it describes them."""

    stdin: int | None
    stdout: int | None
    stderr: int | None
    env: Mapping[str, str] | None
    clear_env: bool
    cwd: str | os.PathLike[str] | None
    user: str | int | None
    pty: Pty | None


class Process:
    """A command that runs in a guest; `subprocess.Popen`'s shape. As a context manager it closes its pipes and waits."""

    def __init__(
        self,
        pump: Pump,
        argv: list[str],
        stdin: IO[bytes] | None,
        stdout: IO[bytes] | None,
        stderr: IO[bytes] | None,
    ) -> None:
        """Made by `Agent.popen`."""
        assert pump.command.pid is not None
        self.args = argv
        self.pid = pump.command.pid
        """Its number in the guest."""
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._pump = pump
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"guest-command-{self.pid}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        if kind is not None:
            self.kill()
        self._thread.join()  # not for the command's end alone: then its descriptors are closed too

    @property
    def returncode(self) -> int | None:
        """Exit status, negated signal number, or None while it runs."""
        return self._pump.command.returncode if self._ended.is_set() else None

    def poll(self) -> int | None:
        """`returncode`, or the error that the connection ended with."""
        if self._ended.is_set() and self._error is not None:
            raise self._error
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the command's end, and until all its output is written to descriptors that `popen` was given.

        `CommandTimeout` if it still runs after `timeout_s` seconds; it goes on then.
        """
        if not self._ended.wait(timeout_s):
            raise CommandTimeout(self.args, timeout_s or 0.0)
        returncode = self.poll()
        assert returncode is not None
        return returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the command and what it started in its process group. Nothing if it has ended."""
        self._send(lambda: self._pump.command.signal(number))

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(9)

    def resize(self, rows: int, cols: int) -> None:
        """Set the size of the command's terminal."""
        self._send(lambda: self._pump.command.resize(rows, cols))

    def _send(self, frame: Callable[[], bytes]) -> None:
        with self._lock:
            if not self._closed:
                self._pump.send(frame)

    def _run(self) -> None:
        try:
            while not self._pump.finished:
                if self._pump.ended:
                    self._ended.set()
                self._pump.step()
        except Exception as error:
            if not self._ended.is_set():
                self._error = error
        finally:
            with self._lock:
                self._closed = True
                self._pump.close()
            self._ended.set()


class Files:
    """The guest's files, as `Agent.files`. Relative paths start at the guest's root. `GuestError` has the guest's errno."""

    def __init__(
        self,
        do: Callable[[operations.Operation[Any]], Any],
        carry_out: Callable[[operations.Plan[None]], None],
    ) -> None:
        """Made by `Agent`."""
        self._do = do
        self._carry_out = carry_out

    def read_bytes(self, path: GuestPath, *, limit_bytes: int = operations.READ_LIMIT_BYTES) -> bytes:
        """A file's content; `AgentError` if it is longer than `limit_bytes`."""
        data: bytes = self._do(operations.read_bytes(path, limit_bytes))
        return data

    def read_text(self, path: GuestPath, encoding: str = "utf-8") -> str:
        """A file's content as a string."""
        return self.read_bytes(path).decode(encoding)

    def write_bytes(self, path: GuestPath, data: bytes | memoryview, *, mode: int | None = None) -> None:
        """Write a file, made or emptied first; `mode` is its permissions then, else a new file's are 0644."""
        self._do(operations.write_bytes(path, data, mode))

    def write_text(
        self, path: GuestPath, text: str, encoding: str = "utf-8", *, mode: int | None = None
    ) -> None:
        """Write a string."""
        self.write_bytes(path, text.encode(encoding), mode=mode)

    def put(self, local: str | os.PathLike[str], remote: GuestPath) -> None:
        """Copy a file, or a directory with what is in it, from the host to the guest; below `remote` if that is a directory.

        Modes and times come along, owners don't. Of a directory only files, directories and links are copied.
        """
        self._carry_out(operations.put(local, remote))

    def get(self, remote: GuestPath, local: str | os.PathLike[str]) -> None:
        """Copy from the guest to the host, likewise. Links are copied as they are and nothing is written outside of `local`.

        A hostile guest can send more than the host's disk holds: there is no limit.
        """
        self._carry_out(operations.get(remote, local))

    def stat(self, path: GuestPath, *, follow_symlinks: bool = True) -> FileStat:
        """The status of a file, or with `follow_symlinks` false of a link itself."""
        value: FileStat = self._do(operations.stat(path, follow_symlinks))
        return value

    def exists(self, path: GuestPath) -> bool:
        """Whether there is such a file; a link that leads nowhere is none."""
        value: bool = self._do(operations.exists(path))
        return value

    def listdir(self, path: GuestPath) -> list[str]:
        """Names in a directory, sorted."""
        names: list[str] = self._do(operations.listdir(path))
        return names

    def mkdir(self, path: GuestPath, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory; with `parents` all that leads there, and it may exist."""
        self._do(operations.mkdir(path, parents, exist_ok))

    def remove(self, path: GuestPath, *, recursive: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` a directory with what is in it."""
        self._do(operations.simple("remove", path=protocol.text(path), recursive=recursive))

    def rename(self, path: GuestPath, to: GuestPath) -> None:
        """Rename within a file system."""
        self._do(operations.simple("rename", path=protocol.text(path), to=protocol.text(to)))


class Agent:
    """The agent in a guest. `connect` makes a connection to it; each request takes one of its own."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self.files = Files(self._do, self._carry_out)

    def info(self) -> operations.GuestInfo:
        """What the agent says of its guest."""
        return self._do(operations.info())

    def set_time(self, ns: int | None = None) -> None:
        """Set the guest's wall clock to `ns` since 1970; None is the host's time."""
        self._do(operations.set_time(ns))

    def mount(self, tag: str, path: operations.GuestPath, *, read_only: bool = False) -> None:
        """Mount the shared directory `tag` (virtiofs) at `path`, which is made if need be."""
        self._do(operations.simple("mount", tag=tag, path=protocol.text(path), read_only=read_only))

    def umount(self, path: operations.GuestPath) -> None:
        """Undo a mount."""
        self._do(operations.simple("umount", path=protocol.text(path)))

    def shutdown(self, *, reboot: bool = False) -> None:
        """End all processes of the guest, write its disks, and power off or reboot. Returns when that has begun."""
        self._do(operations.simple("shutdown", reboot=reboot))

    def _do(self, operation: operations.Operation[T]) -> T:
        """Carry out an operation on a connection of its own."""
        with self._connect() as sock:
            sock.setblocking(True)
            decoder = FrameDecoder()
            frames: Iterator[tuple[int, bytes]] = iter(())
            received: tuple[int, bytes] | None = None
            buffer = memoryview(bytearray(RECEIVE_BYTES))
            try:
                while True:
                    wanted = next(operation) if received is None else operation.send(received)
                    received = None
                    if wanted is not None:
                        sock.sendall(wanted)
                        continue
                    while (received := next(frames, None)) is None:
                        count = sock.recv_into(buffer)
                        if not count:
                            raise AgentError("the agent closed the connection before it answered")
                        frames = decoder.receive(buffer[:count])
            except StopIteration as stop:
                value: T = stop.value
                return value
            except ConnectionError as error:
                raise AgentError(f"the connection to the agent broke: {error}") from error
            finally:
                operation.close()

    def _carry_out(self, plan: operations.Plan[None]) -> None:
        """Carry out operations one after the other."""
        try:
            operation = next(plan)
            while True:
                operation = plan.send(self._do(operation))
        except StopIteration:
            pass
        finally:
            plan.close()

    @overload
    def run(
        self, argv: Sequence[str], *, text: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> CompletedProcess[bytes]: ...

    @overload
    def run(
        self, argv: Sequence[str], *, text: Literal[True], **options: Unpack[RunOptions]
    ) -> CompletedProcess[str]: ...

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        clear_env: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        timeout_s: float | None = None,
        check: bool = False,
        text: bool = False,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> CompletedProcess[bytes] | CompletedProcess[str]:
        """Run a command to its end and return its status and output.

        Args:
            argv: The command, looked up in its PATH, and its arguments.
            input: Its stdin; None is /dev/null.
            env: Added to the guest's environment, or, with `clear_env`, all there is.
            clear_env: Whether `env` is the whole environment.
            cwd: Working directory in the guest; None is the user's home.
            user: Name or number in the guest, ``user:group`` too; None is root.
            timeout_s: After that it is killed and `CommandTimeout` raised.
            check: Raise `CommandError` for a status other than 0.
            text: Return output as strings; what isn't UTF-8 is replaced.
            output_limit_bytes: Give up (`AgentError`) when an output is longer.

        Raises:
            GuestError: It can't be started: no such file (ENOENT), not executable (EACCES), no such user (EINVAL), …
            AgentError: The agent went away.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        source = None if input is None else BytesSource(input.encode() if isinstance(input, str) else input)
        stdout, stderr = BytesSink(output_limit_bytes), BytesSink(output_limit_bytes)
        request = protocol.exec_request(
            argv, env=env, clear_env=clear_env, cwd=cwd, user=user, stdin=source is not None
        )
        command = Command(stdin=source is not None)
        pump = Pump(
            self._connect(), request, command, source, {protocol.STDOUT: stdout, protocol.STDERR: stderr}
        )
        try:
            while not pump.finished:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    if command.pid is not None:
                        pump.send(lambda: command.signal(9))
                        pump.flush()
                    assert timeout_s is not None
                    raise CommandTimeout(list(argv), timeout_s, _output(stdout, text), _output(stderr, text))
                pump.step(left_s)
        finally:
            pump.close()
        returncode = command.returncode
        assert returncode is not None
        if check and returncode:
            raise CommandError(list(argv), returncode, _output(stdout, text), _output(stderr, text))
        if text:
            return CompletedProcess(list(argv), returncode, _text(stdout), _text(stderr))
        return CompletedProcess(list(argv), returncode, stdout.value(), stderr.value())

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        clear_env: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        pty: Pty | None = None,
    ) -> Process:
        """Start a command. `run` describes the arguments that both have.

        Each of `stdin`, `stdout` and `stderr` is PIPE (then `Process` has the other end as a file), a descriptor of the
        caller's (which may be closed afterwards), or None or DEVNULL, which is nothing.

        With `pty` the command has a terminal, whose output is stdout.
        """
        opened: list[int] = []
        source: Source | None = None
        sinks: dict[int, Sink] = {}
        pump: Pump | None = None
        files: dict[int, IO[bytes]] = {}
        try:
            for stream, wanted in ((protocol.STDOUT, stdout), (protocol.STDERR, stderr)):
                if pty is not None and stream == protocol.STDERR:
                    continue
                if wanted == PIPE:
                    mine, theirs = os.pipe()
                    opened += (mine, theirs)
                    sinks[stream] = FdSink(theirs, waited_for=False)
                    files[stream] = os.fdopen(mine, "rb")
                    opened.remove(mine)
                else:
                    sinks[stream] = (
                        NullSink() if wanted in (None, DEVNULL) else FdSink(wanted, waited_for=True)
                    )
            if stdin == PIPE:
                theirs, mine = os.pipe()
                opened += (mine, theirs)
                source = FdSource(theirs)
                files[protocol.STDIN] = os.fdopen(mine, "wb")
                opened.remove(mine)
            elif stdin not in (None, DEVNULL):
                source = FdSource(stdin)
            has_stdin = source is not None
            request = protocol.exec_request(
                argv, env=env, clear_env=clear_env, cwd=cwd, user=user, pty=pty, stdin=has_stdin
            )
            command = Command(stdin=has_stdin, pty=pty is not None)
            pump = Pump(self._connect(), request, command, source, sinks)
            while command.pid is None:
                pump.step()
            return Process(pump, list(argv), files.get(0), files.get(1), files.get(2))
        except BaseException:
            for file in files.values():
                file.close()
            if pump is not None:
                pump.close()
            else:
                for end in (source, *sinks.values()):
                    if end is not None:
                        end.close()
            raise
        finally:
            for fd in opened:
                os.close(fd)

    def connect_tcp(self, port: int) -> socket.socket:
        """Connect to a TCP port in the guest, by its loopback. `GuestError` (ECONNREFUSED) if nobody listens there."""
        connection = self._connect()
        try:
            connection.sendall(protocol.request("connect", port=port))
            # Not a byte more than the reply: what follows is the service's.
            header = connection.recv(protocol.HEADER.size, socket.MSG_WAITALL)
            if len(header) < protocol.HEADER.size:
                raise AgentError("the agent ended the connection")
            kind, size = protocol.HEADER.unpack(header)
            if kind not in (protocol.REPLY, protocol.ERROR) or size > protocol.MAX_PAYLOAD_BYTES:
                raise ProtocolError(f"a frame of type {kind} and {size} bytes where a reply was to come")
            payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
            if kind == protocol.ERROR:
                raise protocol.parse_error(payload)
            return connection
        except BaseException:
            connection.close()
            raise


def _text(sink: BytesSink) -> str:
    return sink.value().decode(errors="replace")


def _output(sink: BytesSink, text: bool) -> bytes | str:
    return _text(sink) if text else sink.value()
