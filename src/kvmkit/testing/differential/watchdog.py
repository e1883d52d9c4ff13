"""One thread that ends what lasts too long: starting one for each case would take longer than most cases."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TIMEOUT_S = 5.0


class Watchdog:
    """Calls a function if what it watches isn't over in time."""

    def __init__(self) -> None:
        self.expired = False
        """Whether it had to, the last time."""
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._deadline = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop` every second, from another thread, once the block has taken longer than `TIMEOUT_S`."""
        with self._lock:
            self._stop, self._deadline, self.expired = stop, time.monotonic() + TIMEOUT_S, False
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._stop = None

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            with self._lock:
                if self._stop is not None and time.monotonic() > self._deadline:
                    self.expired = True
                    self._stop()


WATCHDOG = Watchdog()
