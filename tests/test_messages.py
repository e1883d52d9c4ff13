"""Messages over a socket, and what isn't one."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.messages import MAX_LINE_BYTES, MessageSocket


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, MessageSocket]]:
    raw, other = socket.socketpair()
    messages = MessageSocket(other)
    yield raw, messages
    raw.close()
    messages.close()


def test_messages_come_whole_and_in_order() -> None:
    one, other = map(MessageSocket, socket.socketpair())
    sent: list[dict[str, object]] = [{"a": 1}, {}, {"text": "zwei\nZeilen \udcff"}]
    for message in sent:
        one.send(message)
    assert [other.receive(0) for _ in sent] == sent
    one.close()
    assert other.receive() is None
    with pytest.raises(BrokenPipeError):
        other.send({})
    other.close()


def test_a_message_in_pieces(ends: tuple[socket.socket, MessageSocket]) -> None:
    raw, messages = ends
    raw.sendall(b'{"a":')
    with pytest.raises(TimeoutError):
        messages.receive(0)
    raw.sendall(b'1}\n{"b"')
    assert messages.receive(0) == {"a": 1}
    raw.sendall(b":2}\n")
    assert messages.receive(0) == {"b": 2}


@pytest.mark.parametrize("line", [b"", b"1", b"null", b"[]", b"{", b"\xff\0", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_message(ends: tuple[socket.socket, MessageSocket], line: bytes) -> None:
    """It is refused, and the next one is read all the same."""
    raw, messages = ends
    raw.sendall(line + b'\n{"good": 1}\n')
    with pytest.raises(ValueError, match="message"):
        messages.receive(0)
    assert messages.receive(0) == {"good": 1}


def test_an_endless_line(ends: tuple[socket.socket, MessageSocket]) -> None:
    raw, messages = ends
    chunk = b"x" * 65536
    for _ in range(3 * MAX_LINE_BYTES // len(chunk)):
        raw.sendall(chunk)
        with pytest.raises(TimeoutError):
            messages.receive(0)
        assert len(messages._received) <= MAX_LINE_BYTES + len(chunk)
    raw.sendall(b'\n{"good": 1}\n')
    with pytest.raises(ValueError, match="longer"):
        messages.receive(0)
    assert messages.receive(0) == {"good": 1}


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    """A dict, None or ValueError comes of them, nothing else."""
    raw, other = socket.socketpair()
    messages = MessageSocket(other)
    raw.sendall(data)
    raw.close()
    while True:
        try:
            if messages.receive() is None:
                break
        except ValueError:
            pass
    messages.close()
