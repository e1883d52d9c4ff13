"""What serial ports have in common: the line behind their registers.

Sending takes no time: the transmitter is always empty. What is sent is passed on in batches, because a call for every byte
would cost more than the byte: at a newline, when enough is there, when the guest says that it is done, and after a moment anyway.

Nothing that is fed in gets lost: it waits until the guest listens, since a driver that opens the port throws away what is in the
FIFO. What is to be taken for listening is each port's to say; polling a status register with nothing to send is.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from itertools import islice

FIFO_BYTES = 16
POLLS = 8
"""So many reads of the status register with nothing else in between are a guest that waits for input."""


class Uart(ABC):
    """A port's line. A port holds `_lock` in whatever touches its state, and calls `_update` when an interrupt's cause may have changed."""

    def __init__(
        self, irq: Callable[[int], None], write: Callable[[bytes], None], *, delay_s: float | None = 0.02
    ) -> None:
        """`irq` sets the interrupt line to 1 or 0; `write` gets what the guest sends and may block.

        Output waits at most about `delay_s` seconds for more to come; None is as long as the guest lets it (see above).
        """
        self._irq = irq
        self._lock = threading.RLock()
        self._output = Batches(write, delay_s, self._lock)
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._line = 0
        self._received: deque[int] = deque()
        """What the guest can read now."""
        self._fed: deque[int] = deque()
        """What comes after that."""
        self._polls = 0
        self._overrun = False

    def feed(self, data: bytes) -> None:
        """Let `data` come in on the line. Returns when the guest has taken all but the last few bytes of it, or at `close`."""
        with self._room:
            self._fed.extend(data)
            self._take_in()
            self._room.wait_for(lambda: self._closed or not self._fed)

    def flush(self) -> None:
        """Pass on what was sent."""
        with self._lock:
            self._output.flush()

    def connect(self, irq: Callable[[int], None]) -> None:
        """Set the interrupt line by `irq` from now on, at once to the level that it has."""
        with self._lock:
            self._irq = irq
            irq(self._line)

    def close(self) -> None:
        """Pass on what was sent and release whoever waits in `feed`."""
        with self._room:
            self._closed = True
            self._room.notify_all()
            self._output.close()

    @abstractmethod
    def _listens(self) -> bool:
        """Whether the guest is ready for what comes in. A port that is looped back isn't."""

    @abstractmethod
    def _capacity(self) -> int:
        """Bytes that can wait to be read: those of the FIFO, or one."""

    @abstractmethod
    def _interrupts(self) -> bool:
        """Whether there is a cause for an interrupt."""

    def _polled(self) -> None:
        """The guest read the status register."""
        self._polls += 1
        if self._polls >= POLLS:
            self._take_in()
            self._output.flush()

    def _read_data(self) -> int:
        value = self._received.popleft() if self._received else 0
        self._take_in()
        self._update()
        return value

    def _loop_back(self, value: int) -> bool:
        """Receive what was sent; False if there is no room for it."""
        if len(self._received) >= self._capacity():
            self._overrun = True
            return False
        self._received.append(value)
        return True

    def _take_in(self) -> None:
        """Move what was fed into the FIFO as far as it goes."""
        if not self._fed or not self._listens():
            return
        room = self._capacity() - len(self._received)
        if room > 0:
            self._received.extend(islice(self._fed, room))
            for _ in range(min(room, len(self._fed))):
                self._fed.popleft()
            if not self._fed:
                self._room.notify_all()
            self._update()

    def _put_back(self) -> None:
        """Empty the FIFO; what the guest didn't read comes in again."""
        self._fed.extendleft(reversed(self._received))
        self._received.clear()

    def _update(self) -> None:
        line = int(self._interrupts())
        if line != self._line:
            self._line = line
            self._irq(line)


class Batches:
    """Collects bytes and passes them on together. Used with `lock` held: what comes later stays behind."""

    def __init__(self, write: Callable[[bytes], None], delay_s: float | None, lock: threading.RLock) -> None:
        self._write = write
        self._delay_s = delay_s
        self._bytes = bytearray()
        self._lock = lock
        self._wake = threading.Event()
        self._idle = True
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, value: int) -> None:
        """Add one byte."""
        self._bytes.append(value)
        if value == 10 or len(self._bytes) >= 256:
            self.flush()
        elif self._idle and self._delay_s is not None:
            self._idle = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="serial output", daemon=True)
                self._thread.start()
            self._wake.set()

    def flush(self) -> None:
        """Pass on what is there."""
        if self._bytes:
            data = bytes(self._bytes)
            self._bytes.clear()
            self._write(data)

    def close(self) -> None:
        """Pass on what is there and stop."""
        self.flush()
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        """While bytes come, pass them on every `delay_s`; sleep else."""
        pause = threading.Event()
        while not self._closed:
            self._wake.wait()
            pause.wait(self._delay_s)
            with self._lock:
                if self._bytes:
                    self.flush()
                else:
                    self._idle = True
                    self._wake.clear()
            if self._closed:
                return
