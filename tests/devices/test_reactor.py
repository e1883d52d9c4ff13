import os
import select
import threading

import pytest

from kvmkit.devices.reactor import Reactor


def test_calls_run_in_order_on_its_thread() -> None:
    reactor = Reactor("r")
    seen: list[object] = []
    for i in range(5):
        reactor.call(lambda i=i: seen.append(i))  # type: ignore[misc]
    assert reactor.call_and_wait(lambda: threading.current_thread().name) == "r"
    assert seen == [0, 1, 2, 3, 4]
    reactor.close()


def test_call_and_wait_raises_what_the_function_raises() -> None:
    reactor = Reactor("r")
    with pytest.raises(ZeroDivisionError):
        reactor.call_and_wait(lambda: 1 // 0)
    reactor.close()
    with pytest.raises(RuntimeError, match="closed"):
        reactor.call_and_wait(lambda: None)


def test_a_descriptor_calls_back_until_it_is_removed() -> None:
    reactor = Reactor("r")
    reading, writing = os.pipe()
    got = threading.Event()
    seen: list[bytes] = []

    def readable(events: int) -> None:
        assert events & select.EPOLLIN
        seen.append(os.read(reading, 100))
        reactor.remove(reading)
        got.set()

    reactor.add(reading, select.EPOLLIN, readable)
    os.write(writing, b"x")
    assert got.wait(5)
    os.write(writing, b"y")
    reactor.call_and_wait(lambda: None)
    assert seen == [b"x"]
    reactor.close()
    os.close(reading)
    os.close(writing)


def test_a_failing_callback_is_reported_and_the_thread_goes_on() -> None:
    errors: list[Exception] = []
    reactor = Reactor("r", errors.append)
    reactor.call(lambda: 1 // 0)
    reactor.call_and_wait(lambda: None)
    assert [type(error) for error in errors] == [ZeroDivisionError]
    reactor.close()


def test_timers_run_in_order_of_time_and_can_be_cancelled() -> None:
    reactor = Reactor("r")
    seen: list[str] = []
    done = threading.Event()
    reactor.call_later(0.02, done.set)
    reactor.call_later(0.01, lambda: seen.append("b"))
    reactor.call_later(0, lambda: seen.append("a"))
    timer = reactor.call_later(0.005, lambda: seen.append("never"))
    reactor.call_and_wait(timer.cancel)
    assert done.wait(5)
    assert seen == ["a", "b"]
    reactor.close()


def test_closing_twice_and_from_its_own_thread() -> None:
    reactor = Reactor("r")
    reactor.call(reactor.close)
    reactor.close()
    reactor.close()


def test_a_descriptor_whose_number_is_used_again_does_not_get_the_old_ones_events() -> None:
    reactor = Reactor("r")
    pipes = [os.pipe(), os.pipe()]
    quiet = os.pipe()
    called: list[int] = []
    done = threading.Event()

    def first(fd: int, other: int) -> None:
        """Whichever comes first replaces the other, which is ready too and would come next."""
        called.append(fd)
        reactor.remove(fd)
        reactor.remove(other)
        os.dup2(quiet[0], other)
        reactor.add(other, select.EPOLLIN, lambda events: called.append(-1))
        reactor.call_later(0, lambda: reactor.call_later(0, done.set))

    def both_ready() -> None:
        for (fd, writing), (other, _) in (pipes, pipes[::-1]):
            os.write(writing, b"x")
            reactor.add(fd, select.EPOLLIN, lambda events, fd=fd, other=other: first(fd, other))  # type: ignore[misc]

    reactor.call_and_wait(both_ready)
    assert done.wait(10)
    assert len(called) == 1
    assert called[0] > 0
    reactor.close()
    for fd in (*pipes[0], *pipes[1], *quiet):
        os.close(fd)
