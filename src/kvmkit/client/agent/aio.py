"""The agent for asyncio: `sync`'s shape with ``await``, over the same protocol."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from kvmkit.client.agent import operations, protocol
from kvmkit.client.agent.operations import FileStat, GuestPath
from kvmkit.client.agent.protocol import CHUNK_BYTES, Command, FrameDecoder, Pty
from kvmkit.client.agent.pump import RECEIVE_BYTES
from kvmkit.client.agent.sync import DEVNULL, OUTPUT_LIMIT_BYTES, PIPE, CompletedProcess, RunOptions
from kvmkit.errors import AgentError, CommandError, CommandTimeout

T = TypeVar("T")


class AsyncInput:
    """A command's stdin."""

    def __init__(self, process: "AsyncProcess") -> None:
        """Made by `AsyncProcess`."""
        self._process = process

    async def write(self, data: bytes) -> None:
        """Send all of it, waiting while the command doesn't read. `BrokenPipeError` once nobody does."""
        await self._process._write(data)

    async def close(self) -> None:
        """End it."""
        self._process._send(self._process._command.end_stdin())


class AsyncOutput:
    """A command's stdout or stderr. What isn't read stops that stream alone."""

    def __init__(self, process: "AsyncProcess", stream: int) -> None:
        """Made by `AsyncProcess`."""
        self._process = process
        self._stream = stream
        self._reader = asyncio.StreamReader(limit=protocol.WINDOW_BYTES // 2)

    async def read(self, size_bytes: int = -1) -> bytes:
        """Up to `size_bytes` as soon as there are any, or all to the end; b"" is the end."""
        if size_bytes >= 0:
            return self._taken(await self._reader.read(size_bytes))
        chunks: list[bytes] = []
        while data := await self.read(RECEIVE_BYTES):
            chunks.append(data)
        return b"".join(chunks)

    async def readline(self) -> bytes:
        """A line with its end. `ValueError` if it is longer than 128 KiB."""
        return self._taken(await self._reader.readline())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line

    def close(self) -> None:
        """Take no more: the command gets SIGPIPE."""
        self._process._send(self._process._command.close_output(self._stream))
        self._reader.feed_eof()

    def _taken(self, data: bytes) -> bytes:
        self._process._send(self._process._command.consumed(self._stream, len(data)))
        return data


class AsyncProcess:
    """A command that runs in a guest. As a context manager it closes its stdin and waits; on an error it is killed."""

    def __init__(
        self,
        argv: list[str],
        command: Command,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        stdin: bool,
        outputs: Sequence[int],
    ) -> None:
        """Made by `AsyncAgent.popen`."""
        self.args = argv
        self._command = command
        self._connection = (reader, writer)
        self._outputs = {stream: AsyncOutput(self, stream) for stream in outputs}
        self.stdin = AsyncInput(self) if stdin else None
        self.stdout = self._outputs.get(protocol.STDOUT)
        self.stderr = self._outputs.get(protocol.STDERR)
        self._writable = asyncio.Event()
        self._writing = asyncio.Lock()
        self._input_closed = False
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[int] = loop.create_future()
        self._exited: asyncio.Future[int] = loop.create_future()
        for future in (self._started, self._exited):  # nobody need ask
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._task = loop.create_task(self._follow())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.kill()
            elif self.stdin is not None:
                await self.stdin.close()
            for output in self._outputs.values():
                output.close()
            await asyncio.wait([self._exited])
        finally:
            self.close()

    @property
    def pid(self) -> int:
        """Its number in the guest."""
        return self._started.result()

    @property
    def returncode(self) -> int | None:
        """Exit status, negated signal number, or None while it runs."""
        return self._command.returncode

    async def wait(self) -> int:
        """Wait for the command's end. `AgentError` if the connection ends first."""
        return await asyncio.shield(self._exited)

    def send_signal(self, number: int) -> None:
        """Send a signal to the command and what it started in its process group. Nothing if it has ended."""
        self._send(self._command.signal(number))

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(9)

    def resize(self, rows: int, cols: int) -> None:
        """Set the size of the command's terminal."""
        self._send(self._command.resize(rows, cols))

    def close(self) -> None:
        """Close the connection. A command that still runs is ended by it."""
        self._task.cancel()
        self._connection[1].close()

    def _send(self, frame: bytes) -> None:
        if frame and not self._connection[1].is_closing():
            self._connection[1].write(frame)

    async def _write(self, data: bytes) -> None:
        writer = self._connection[1]
        async with self._writing:
            view = memoryview(data)
            while view:
                while not self._command.stdin_credit_bytes and not self._input_closed:
                    self._writable.clear()
                    await self._writable.wait()
                if self._input_closed:
                    raise BrokenPipeError("nobody reads the command's stdin")
                size = min(len(view), CHUNK_BYTES, self._command.stdin_credit_bytes)
                self._send(self._command.stdin(view[:size]))
                view = view[size:]
                with suppress(ConnectionError):  # `_follow` says how it ended
                    await writer.drain()

    def _close_input(self) -> None:
        self._input_closed = True
        self._writable.set()

    async def _follow(self) -> None:
        reader, writer = self._connection
        error: BaseException | None = None
        try:
            while not self._command.done:
                try:
                    data = await reader.read(RECEIVE_BYTES)
                except ConnectionError as broken:
                    raise AgentError(f"the connection to the agent broke: {broken}") from broken
                for event in self._command.receive(data):
                    self._handle(event)
        except BaseException as raised:
            error = raised
            if isinstance(raised, asyncio.CancelledError):
                error = AgentError("the connection was closed before the command ended")
                raise
            if not isinstance(raised, Exception):
                raise
        finally:
            for future in (self._started, self._exited):
                if not future.done():
                    future.set_exception(error or AgentError("the agent closed the connection"))
            self._close_input()
            for output in self._outputs.values():
                if isinstance(error, Exception):
                    output._reader.set_exception(error)
                output._reader.feed_eof()
            writer.close()

    def _handle(self, event: protocol.Event) -> None:
        match event:
            case protocol.Started(pid):
                self._started.set_result(pid)
            case protocol.Output(stream, data):
                if stream in self._outputs:
                    self._outputs[stream]._reader.feed_data(data)
                else:
                    self._send(self._command.consumed(stream, len(data)))
            case protocol.OutputEnd(stream):
                if stream in self._outputs:
                    self._outputs[stream]._reader.feed_eof()
            case protocol.StdinReady():
                self._writable.set()
            case protocol.StdinClosed():
                self._close_input()
            case protocol.Exited(returncode):
                self._close_input()
                self._exited.set_result(returncode)


class AsyncFiles:
    """The guest's files, as `AsyncAgent.files`; `Files` says what each does. Local files are read and written in the event loop."""

    def __init__(self, agent: "AsyncAgent") -> None:
        """Made by `AsyncAgent`."""
        self._agent = agent

    async def read_bytes(self, path: GuestPath, *, limit_bytes: int = operations.READ_LIMIT_BYTES) -> bytes:
        """A file's content."""
        return await self._agent._do(operations.read_bytes(path, limit_bytes))

    async def read_text(self, path: GuestPath, encoding: str = "utf-8") -> str:
        """A file's content as a string."""
        return (await self.read_bytes(path)).decode(encoding)

    async def write_bytes(
        self, path: GuestPath, data: bytes | memoryview, *, mode: int | None = None
    ) -> None:
        """Write a file."""
        await self._agent._do(operations.write_bytes(path, data, mode))

    async def write_text(
        self, path: GuestPath, text: str, encoding: str = "utf-8", *, mode: int | None = None
    ) -> None:
        """Write a string."""
        await self.write_bytes(path, text.encode(encoding), mode=mode)

    async def put(self, local: str | os.PathLike[str], remote: GuestPath) -> None:
        """Copy from the host to the guest."""
        await self._agent._carry_out(operations.put(local, remote))

    async def get(self, remote: GuestPath, local: str | os.PathLike[str]) -> None:
        """Copy from the guest to the host."""
        await self._agent._carry_out(operations.get(remote, local))

    async def stat(self, path: GuestPath, *, follow_symlinks: bool = True) -> FileStat:
        """The status of a file, or with `follow_symlinks` false of a link itself."""
        return await self._agent._do(operations.stat(path, follow_symlinks))

    async def exists(self, path: GuestPath) -> bool:
        """Whether there is such a file."""
        return await self._agent._do(operations.exists(path))

    async def listdir(self, path: GuestPath) -> list[str]:
        """Names in a directory, sorted."""
        return await self._agent._do(operations.listdir(path))

    async def mkdir(self, path: GuestPath, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory."""
        await self._agent._do(operations.mkdir(path, parents, exist_ok))

    async def remove(self, path: GuestPath, *, recursive: bool = False) -> None:
        """Remove a file or directory."""
        await self._agent._do(operations.simple("remove", path=protocol.text(path), recursive=recursive))

    async def rename(self, path: GuestPath, to: GuestPath) -> None:
        """Rename within a file system."""
        await self._agent._do(operations.simple("rename", path=protocol.text(path), to=protocol.text(to)))


class AsyncAgent:
    """The agent in a guest. `connect`, which may block, makes a connection to it in a thread; each request takes one of its own."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self.files = AsyncFiles(self)

    async def info(self) -> operations.GuestInfo:
        """What the agent says of its guest."""
        return await self._do(operations.info())

    async def set_time(self, ns: int | None = None) -> None:
        """Set the guest's wall clock to `ns` since 1970; None is the host's time."""
        await self._do(operations.set_time(ns))

    async def mount(self, tag: str, path: GuestPath, *, read_only: bool = False) -> None:
        """Mount the shared directory `tag` (virtiofs) at `path`, which is made if need be."""
        await self._do(operations.simple("mount", tag=tag, path=protocol.text(path), read_only=read_only))

    async def umount(self, path: GuestPath) -> None:
        """Undo a mount."""
        await self._do(operations.simple("umount", path=protocol.text(path)))

    async def shutdown(self, *, reboot: bool = False) -> None:
        """End all processes of the guest, write its disks, and power off or reboot."""
        await self._do(operations.simple("shutdown", reboot=reboot))

    @overload
    async def run(
        self, argv: Sequence[str], *, text: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> CompletedProcess[bytes]: ...

    @overload
    async def run(
        self, argv: Sequence[str], *, text: Literal[True], **options: Unpack[RunOptions]
    ) -> CompletedProcess[str]: ...

    async def run(
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
        """Run a command to its end and return its status and output; `Agent.run` describes it. Cancelled, it ends the command."""
        outputs: list[list[bytes]] = [[], []]

        def result(output: list[bytes]) -> bytes | str:
            data = b"".join(output)
            return data.decode(errors="replace") if text else data

        async def collect(stream: AsyncOutput | None, output: list[bytes]) -> None:
            assert stream is not None
            size_bytes = 0
            while data := await stream.read(RECEIVE_BYTES):
                size_bytes += len(data)
                if size_bytes > output_limit_bytes:
                    raise AgentError(
                        f"the command's output is longer than {output_limit_bytes} bytes: "
                        "raise output_limit_bytes, or use popen"
                    )
                output.append(data)

        async def give(stream: AsyncInput | None, data: bytes) -> None:
            if stream is not None:
                with suppress(BrokenPipeError):
                    await stream.write(data)
                await stream.close()

        process: AsyncProcess | None = None
        try:
            async with asyncio.timeout(timeout_s):
                process = await self.popen(
                    argv,
                    stdin=None if input is None else PIPE,
                    stdout=PIPE,
                    stderr=PIPE,
                    env=env,
                    clear_env=clear_env,
                    cwd=cwd,
                    user=user,
                )
                data = input.encode() if isinstance(input, str) else input or b""
                await asyncio.gather(
                    give(process.stdin, data),
                    collect(process.stdout, outputs[0]),
                    collect(process.stderr, outputs[1]),
                )
                returncode = await process.wait()
        except TimeoutError:
            if timeout_s is None:  # somebody else's
                raise
            raise CommandTimeout(list(argv), timeout_s, result(outputs[0]), result(outputs[1])) from None
        finally:
            if process is not None:
                if process.returncode is None:
                    process.kill()
                process.close()
        stdout, stderr = result(outputs[0]), result(outputs[1])
        if check and returncode:
            raise CommandError(list(argv), returncode, stdout, stderr)
        if isinstance(stdout, str) and isinstance(stderr, str):
            return CompletedProcess(list(argv), returncode, stdout, stderr)
        assert isinstance(stdout, bytes) and isinstance(stderr, bytes)
        return CompletedProcess(list(argv), returncode, stdout, stderr)

    async def popen(
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
    ) -> AsyncProcess:
        """Start a command. Each of `stdin`, `stdout` and `stderr` is PIPE, or None or DEVNULL, which is nothing.

        `Agent.run` describes the other arguments. With `pty` the command has a terminal, whose output is stdout.
        """
        for wanted in (stdin, stdout, stderr):
            if wanted not in (None, PIPE, DEVNULL):
                raise ValueError(f"{wanted}: PIPE, DEVNULL or None")
        has_stdin = stdin == PIPE
        request = protocol.exec_request(
            argv, env=env, clear_env=clear_env, cwd=cwd, user=user, pty=pty, stdin=has_stdin
        )
        sock = await asyncio.to_thread(self._connect)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(request)
        process = AsyncProcess(
            list(argv),
            Command(stdin=has_stdin, pty=pty is not None),
            reader,
            writer,
            stdin=has_stdin,
            outputs=[
                stream
                for stream, wanted in ((protocol.STDOUT, stdout), (protocol.STDERR, stderr))
                if wanted == PIPE and not (pty is not None and stream == protocol.STDERR)
            ],
        )
        try:
            await asyncio.shield(process._started)
        except BaseException:
            process.close()
            raise
        return process

    async def _do(self, operation: operations.Operation[T]) -> T:
        """Carry out an operation on a connection of its own."""
        sock = await asyncio.to_thread(self._connect)
        loop = asyncio.get_running_loop()
        with sock:
            sock.setblocking(False)
            decoder = FrameDecoder()
            frames: Iterator[tuple[int, bytes]] = iter(())
            received: tuple[int, bytes] | None = None
            try:
                while True:
                    wanted = next(operation) if received is None else operation.send(received)
                    received = None
                    if wanted is not None:
                        await loop.sock_sendall(sock, wanted)
                        continue
                    while (received := next(frames, None)) is None:
                        data = await loop.sock_recv(sock, RECEIVE_BYTES)
                        if not data:
                            raise AgentError("the agent closed the connection before it answered")
                        frames = decoder.receive(data)
            except StopIteration as stop:
                value: T = stop.value
                return value
            except ConnectionError as error:
                raise AgentError(f"the connection to the agent broke: {error}") from error
            finally:
                operation.close()

    async def _carry_out(self, plan: operations.Plan[None]) -> None:
        """Carry out operations one after the other."""
        try:
            operation: operations.Operation[Any] = next(plan)
            while True:
                operation = plan.send(await self._do(operation))
        except StopIteration:
            pass
        finally:
            plan.close()
