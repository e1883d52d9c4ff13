"""Commands and files in a guest, by the agent that is its init.

::

    agent = Agent(connect)                      # connect() -> a connected socket
    agent.run(["uname", "-r"], text=True).stdout
    with agent.popen(["sort"], stdin=PIPE, stdout=PIPE) as sort: ...

`protocol` says what goes over the socket.
"""

from kvmkit.client.agent.protocol import Pty
from kvmkit.client.agent.sync import DEVNULL, PIPE, Agent, CompletedProcess, Process

__all__ = ["DEVNULL", "PIPE", "Agent", "CompletedProcess", "Process", "Pty"]
