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
