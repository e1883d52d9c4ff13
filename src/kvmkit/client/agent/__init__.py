"""Commands and files in a guest, by the agent that is its init.

::

    agent = Agent(connect)                      # connect() -> a connected socket
    agent.run(["uname", "-r"], text=True).stdout
    with agent.popen(["sort"], stdin=PIPE, stdout=PIPE) as sort: ...
    agent.files.put("here", "/there")

`AsyncAgent` has the same with ``await``.

`protocol` says what goes over the socket.
"""

from typing import TYPE_CHECKING, Any

from kvmkit.client.agent.operations import FileStat, GuestInfo
from kvmkit.client.agent.protocol import Pty
from kvmkit.client.agent.sync import DEVNULL, PIPE, Agent, CompletedProcess, Files, Process

if TYPE_CHECKING:
    from kvmkit.client.agent.aio import AsyncAgent, AsyncFiles, AsyncProcess

__all__ = [
    "DEVNULL",
    "PIPE",
    "Agent",
    "AsyncAgent",
    "AsyncFiles",
    "AsyncProcess",
    "CompletedProcess",
    "FileStat",
    "Files",
    "GuestInfo",
    "Process",
    "Pty",
]


def __getattr__(name: str) -> Any:
    """Import what takes asyncio when it is asked for: that is half of what importing all the rest costs."""
    if name not in ("AsyncAgent", "AsyncFiles", "AsyncProcess"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvmkit.client.agent import aio

    return getattr(aio, name)
