"""`Machine` for asyncio: the same machines, whose methods are awaited.

Starting, waiting and stopping are `Machine`'s own, on a thread; what goes to the agent is `AsyncAgent`'s, on the event loop.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from kvmkit.client.agent import AsyncAgent, AsyncFiles, AsyncProcess, CompletedProcess
from kvmkit.client.agent.sync import PopenOptions, RunOptions
from kvmkit.client.config import MachineConfig
from kvmkit.client.forward import Forward
from kvmkit.client.machine import AGENT_PORT, READY_S, Machine, Options
from kvmkit.client.vm_process import End, Event


class AsyncMachine:
    """A Linux machine in a process of its own.

    ::

        async with AsyncMachine(root="debian:bookworm") as vm:
            result = await vm.run(["uname", "-r"], text=True)
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[Options],
    ) -> None:
        """As `Machine`. `on_event` is called on a thread."""
        self.machine = Machine(config, on_event, **options)
        """The same machine for programs that wait."""
        self._agent = AsyncAgent(self._connect)

    async def start(self, timeout_s: float | None = None) -> None:
        """See `Machine.start`."""
        await asyncio.to_thread(self.machine.start, timeout_s)

    async def wait_ready(self, timeout_s: float = READY_S) -> None:
        """See `Machine.wait_ready`."""
        await asyncio.to_thread(self.machine.wait_ready, timeout_s)

    @property
    def agent(self) -> AsyncAgent:
        """Its agent. What is asked of it waits until it runs."""
        return self._agent

    @overload
    async def run(
        self, argv: Sequence[str], *, text: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> CompletedProcess[bytes]: ...

    @overload
    async def run(
        self, argv: Sequence[str], *, text: Literal[True], **options: Unpack[RunOptions]
    ) -> CompletedProcess[str]: ...

    async def run(self, argv: Sequence[str], **options: Any) -> CompletedProcess[Any]:
        """See `Machine.run`. Cancelled, it kills the command."""
        done: CompletedProcess[Any] = await self.agent.run(argv, **options)
        return done

    async def popen(self, argv: Sequence[str], **options: Unpack[PopenOptions]) -> AsyncProcess:
        """See `Machine.popen`."""
        return await self.agent.popen(argv, **options)

    @property
    def files(self) -> AsyncFiles:
        """See `Machine.files`."""
        return self.agent.files

    async def forward(self, guest_port: int, host_port: int = 0) -> Forward:
        """See `Machine.forward`."""
        return await asyncio.to_thread(self.machine.forward, guest_port, host_port)

    async def walk(self, gva: int, vcpu: int = 0) -> dict[str, Any]:
        """See `Machine.walk`."""
        return await asyncio.to_thread(self.machine.walk, gva, vcpu)

    async def wait(self, timeout_s: float | None = None) -> End:
        """See `Machine.wait`."""
        return await asyncio.to_thread(self.machine.wait, timeout_s)

    async def stop(self, timeout_s: float = 10.0) -> End:
        """See `Machine.stop`."""
        return await asyncio.to_thread(self.machine.stop, timeout_s)

    async def close(self) -> None:
        """See `Machine.close`."""
        await asyncio.to_thread(self.machine.close)

    async def __aenter__(self) -> Self:
        """Start."""
        try:
            await self.start()
        except BaseException:
            self.machine.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, as `Machine` does at the end of its ``with``."""
        await asyncio.to_thread(self.machine.__exit__, kind, value, traceback)

    def _connect(self) -> socket.socket:
        self.machine.wait_ready()
        return self.machine.vsock(AGENT_PORT)
