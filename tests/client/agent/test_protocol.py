"""Frames and the host's side of a command, without an agent. The other side is whatever a hostile guest sends."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.client.agent import protocol
from kvmkit.client.agent.protocol import Command, FrameDecoder, encode
from kvmkit.errors import AgentError, GuestError, ProtocolError

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=10)
STARTED = encode(protocol.STARTED, b'{"pid": 7}')


def started(**options: bool) -> Command:
    command = Command(**options)
    assert list(command.receive(STARTED)) == [protocol.Started(7)]
    return command


@given(FRAMES, st.data())
def test_frames_come_out_however_they_are_cut(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(encode(*frame) for frame in frames)
    found: list[tuple[int, bytes]] = []
    decoder, offset = FrameDecoder(), 0
    while offset < len(stream):
        size = data.draw(st.integers(1, len(stream) - offset))
        found += decoder.receive(stream[offset : offset + size])
        offset += size
    assert found == frames


@given(st.integers(protocol.MAX_PAYLOAD_BYTES + 1, 0xFFFFFFFF))
def test_a_long_frame_is_refused_by_its_header(size: int) -> None:
    decoder = FrameDecoder()
    with pytest.raises(ProtocolError, match="at most"):
        list(decoder.receive(struct.pack("<BI", protocol.STREAM, size)))


def test_frames_before_a_bad_one_come_out() -> None:
    frames = FrameDecoder().receive(encode(9, b"x") + struct.pack("<BI", 1, 1 << 30))
    assert next(frames) == (9, b"x")
    with pytest.raises(ProtocolError):
        next(frames)


@given(st.lists(st.binary(max_size=64)), FRAMES)
def test_whatever_a_guest_sends_is_an_event_or_an_agent_error(
    pieces: list[bytes], frames: list[tuple[int, bytes]]
) -> None:
    command = started(stdin=True)
    try:
        for piece in [*(encode(*frame) for frame in frames), *pieces]:
            for event in command.receive(piece):
                assert isinstance(event, protocol.Event)
    except AgentError:
        pass


@given(st.lists(st.sampled_from([1, 2]), max_size=12), st.integers(1, protocol.CHUNK_BYTES))
def test_no_more_output_comes_than_was_granted(streams: list[int], size: int) -> None:
    command = started()
    sent = {1: 0, 2: 0}
    for stream in streams:
        sent[stream] += size
        frame = encode(protocol.STREAM, bytes([stream]) + bytes(size))
        if sent[stream] > protocol.WINDOW_BYTES:
            with pytest.raises(ProtocolError, match="granted"):
                list(command.receive(frame))
            return
        assert list(command.receive(frame)) == [protocol.Output(stream, bytes(size))]


def test_consumed_output_is_granted_again() -> None:
    command = started()
    full = encode(protocol.STREAM, b"\1" + bytes(protocol.CHUNK_BYTES))
    for _ in range(100):
        list(command.receive(full))
        command.consumed(1, protocol.CHUNK_BYTES)


def test_what_is_closed_may_still_come_and_is_dropped() -> None:
    command = started()
    assert command.close_output(1) == encode(protocol.STREAM_CLOSE, b"\1")
    assert command.close_output(1) == b""
    assert (
        list(command.receive(encode(protocol.STREAM, b"\1late") + encode(protocol.STREAM_END, b"\1"))) == []
    )
    with pytest.raises(ProtocolError):
        list(command.receive(encode(protocol.STREAM, b"\1later")))


def test_stdin_keeps_to_its_window() -> None:
    command = started(stdin=True)
    data = bytes(range(256)) * (protocol.WINDOW_BYTES // 256)
    frames = list(FrameDecoder().receive(command.stdin(data)))
    assert b"".join(payload[1:] for _, payload in frames) == data
    assert {(kind, payload[0]) for kind, payload in frames} == {(protocol.STREAM, 0)}
    with pytest.raises(ValueError, match="granted"):
        command.stdin(b"x")
    list(command.receive(encode(protocol.WINDOW, struct.pack("<BI", 0, 10))))
    assert command.stdin_credit_bytes == 10
    with pytest.raises(ProtocolError, match="window"):
        list(command.receive(encode(protocol.WINDOW, struct.pack("<BI", 0, protocol.WINDOW_BYTES))))


def test_done_takes_the_end_and_both_outputs() -> None:
    command = started()
    exited = encode(protocol.EXIT, b'{"signal": 9}')
    assert list(command.receive(exited)) == [protocol.Exited(-9)]
    assert not command.done
    list(command.receive(encode(protocol.STREAM_END, b"\1") + encode(protocol.STREAM_END, b"\2")))
    assert command.done
    assert list(command.receive(b"")) == []
    with pytest.raises(ProtocolError):
        list(command.receive(exited))


@pytest.mark.parametrize(
    "payload",
    [b"", b"null", b"[1]", b"{}", b'{"code": -1}', b'{"code": 256}', b'{"code": true}', b'{"code": 1.0}',
     b'{"signal": 0}', b'{"signal": "9"}', b"\xff", b"[" * 60000],
)  # fmt: skip
def test_an_exit_that_is_none(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(started().receive(encode(protocol.EXIT, payload)))


def test_errors_of_the_guest() -> None:
    command = Command()
    with pytest.raises(GuestError, match="no such") as caught:
        list(command.receive(encode(protocol.ERROR, b'{"errno": 2, "message": "no such"}')))
    assert caught.value.errno == 2
    with pytest.raises(ProtocolError):
        protocol.parse_error(b'{"errno": "2", "message": "x"}')
    assert len(str(protocol.parse_error(json.dumps({"errno": 2, "message": "x" * 60000}).encode()))) < 5000


def test_a_connection_that_ends_early() -> None:
    with pytest.raises(AgentError, match="closed"):
        list(started().receive(b""))


@given(st.binary(max_size=50).map(lambda raw: raw.replace(b"\0", b"")))
def test_names_are_bytes(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    assert protocol.text_from(json.loads(json.dumps(protocol.text(name)))) == name


@pytest.mark.parametrize("value", [None, 5, [256], [-1], ["a"], {}])
def test_names_that_are_none(value: object) -> None:
    with pytest.raises(ProtocolError):
        protocol.text_from(value)


@pytest.mark.parametrize("argv", [[], "ls", ["a\0b"]])
def test_commands_that_are_none(argv: list[str]) -> None:
    with pytest.raises(ValueError):
        protocol.exec_request(argv)
