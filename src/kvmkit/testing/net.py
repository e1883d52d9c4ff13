"""A network for tests of network devices."""

from collections import deque
from collections.abc import Callable

from kvmkit.devices.net import Backend, Packet
from kvmkit.devices.reactor import Reactor


class MemoryBackend(Backend):
    """Keeps what the guest sends in `sent`; `give` sends to the guest."""

    def __init__(self, features: int = 0, mtu_bytes: int = 1500) -> None:
        """`features` are those it claims to honour."""
        self.features = features
        self.mtu_bytes = mtu_bytes
        self.sent: list[tuple[bytes, bytes]] = []
        self.waiting: deque[tuple[bytes, bytes]] = deque()
        self.paused = True
        self.flushes = 0
        self.closed = False
        self.driver_features = 0

    def open(self, reactor: Reactor, ready: Callable[[], object]) -> None:
        """Remember whom to call."""
        self._reactor, self._ready = reactor, ready

    def negotiated(self, features: int) -> None:
        """Remember them."""
        self.driver_features = features

    def send(self, header: bytes, frame: bytes) -> None:
        """Keep it."""
        self.sent.append((header, frame))

    def flush(self) -> None:
        """Count."""
        self.flushes += 1

    def receive(self) -> Packet | None:
        """Give what `give` was given."""
        return self.waiting.popleft() if self.waiting else None

    def pause(self, paused: bool) -> None:
        """Remember."""
        self.paused = paused

    def close(self) -> None:
        """Remember."""
        self.closed = True

    def give(self, *packets: bytes, header: bytes = bytes(12)) -> None:
        """Let frames arrive for the guest, all at once."""

        def arrive() -> None:
            self.waiting += [(header, packet) for packet in packets]
            if not self.paused:
                self._ready()

        self._reactor.call(arrive)
        self._reactor.call_and_wait(lambda: None)
