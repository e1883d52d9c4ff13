"""A thread that waits for descriptors and runs callbacks: what a device's state belongs to.

A device is used from many threads: vCPUs that reach its registers, the queue's eventfd, sockets, timers. Instead of locking, all
that touches the state of a device runs on the one thread of its reactor, and `call` brings it there.
"""

import heapq
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_LOOK_S = 0.5
"""How often `call_and_wait` looks whether the thread still lives: it may end before it comes to the call."""

_log = logging.getLogger(__name__)


class Timer:
    """A call that `Reactor.call_later` will make."""

    __slots__ = ("at_s", "function")

    def __init__(self, at_s: float, function: Callable[[], object]) -> None:
        """`at_s` on `time.monotonic`."""
        self.at_s = at_s
        self.function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Don't call it. On the reactor's thread, or it may be running already."""
        self.function = None

    def __lt__(self, other: "Timer") -> bool:
        return self.at_s < other.at_s


class Reactor:
    """One thread that runs callbacks one after the other, until `close`.

    What a callback raises goes to `on_error`, by default into the log, and the thread goes on.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], object] | None = None) -> None:
        """Start the thread, which bears `name`. `on_error` is called on it."""
        self._on_error = on_error or self._log_error
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks: dict[int, Callable[[int], object]] = {}
        self._added: set[int] = set()  # since the last poll
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[Timer] = []
        self._closing = False
        self._closed = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(events)` whenever `fd` has one of `events` (EPOLLIN, EPOLLOUT, …), EPOLLERR or EPOLLHUP. Any thread.

        Level-triggered. Remove `fd` before it is closed.
        """
        self._callbacks[fd] = callback
        self._added.add(fd)
        try:
            self._epoll.register(fd, events)
        except BaseException:
            del self._callbacks[fd]
            raise

    def modify(self, fd: int, events: int) -> None:
        """Wait for other `events` of `fd`, none if 0. Any thread."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`. On the reactor's thread no callback for it comes after this."""
        self._callbacks.pop(fd, None)
        with suppress(OSError, ValueError):
            self._epoll.unregister(fd)

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` on the thread, soon and in the order of calls. Any thread; does nothing once closed."""
        self._calls.append(function)
        with self._closed:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def call_and_wait(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread and return what it does, or raise. `RuntimeError` if the reactor is closed first."""
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            done.set()

        if threading.current_thread() is self._thread:
            return function()
        self.call(run)
        while self._thread.is_alive() and not done.wait(_LOOK_S):
            pass
        if not done.is_set():
            raise RuntimeError(f"{self._thread.name} was closed")
        if errors:
            raise errors[0]
        return results[0]

    def call_later(self, delay_s: float, function: Callable[[], object]) -> Timer:
        """Run `function` on the thread after `delay_s` seconds. Any thread."""
        timer = Timer(time.monotonic() + delay_s, function)
        self.call(lambda: heapq.heappush(self._timers, timer))
        return timer

    def close(self) -> None:
        """End the thread, after the callback that runs now. Closing twice does nothing."""
        self._closing = True
        self.call(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            with self._closed:
                os.close(self._wake)
                self._wake = -1
            self._epoll.close()

    def _turn(self) -> None:
        timeout_s = None
        if self._timers:
            timeout_s = max(0.0, self._timers[0].at_s - time.monotonic())
        ready = self._epoll.poll(timeout_s)
        self._added.clear()
        for fd, events in ready:
            if fd == self._wake:
                os.eventfd_read(fd)
            elif fd in self._added:
                continue  # what was ready is another file, that an earlier callback of this turn closed
            elif callback := self._callbacks.get(fd):  # or removed
                self._guarded(lambda callback=callback, events=events: callback(events))  # type: ignore[misc]
        while self._calls and not self._closing:
            self._guarded(self._calls.popleft())
        while self._timers and self._timers[0].at_s <= time.monotonic() and not self._closing:
            if function := heapq.heappop(self._timers).function:
                self._guarded(function)

    def _guarded(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            self._on_error(error)

    def _log_error(self, error: Exception) -> None:
        _log.error("%s: a callback failed", self._thread.name, exc_info=error)
