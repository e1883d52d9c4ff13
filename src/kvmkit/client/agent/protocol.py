"""What a host and the agent in its guest say to each other, without the socket that carries it.

A connection carries one request. All is in frames, each ``type u8, length u32 LE, payload``; the first is the host's REQUEST, a
JSON object whose ``op`` says what to do. What follows depends on that:

- most requests: the agent answers with REPLY (a JSON object) or ERROR (``{"errno", "message"}``);
- what reads (``read``, ``list``, ``pack``): the agent sends DATA frames, then END, or at any time ERROR;
- what writes (``write``, ``unpack``): the agent sends REPLY or ERROR first, then the host sends DATA frames and END, then
  the agent sends REPLY or ERROR;
- ``exec``: the agent sends STARTED or ERROR, then both sides send what happens until EXIT has come and both outputs have ended.

A command has three streams, 0 to 2 as its descriptors are. STREAM carries bytes of one, STREAM_END comes after the last of them,
STREAM_CLOSE from the receiver's side says that nobody takes them any more. Each stream has a window: its sender may send as many
bytes as it was granted, and WINDOW frames grant more. So no stream stops another, EXIT never waits for output that nobody reads,
and neither side keeps more than a window.

The guest may be hostile, and its agent with it: what it sends is checked here, and what breaks a rule is a `ProtocolError`. Names,
paths and arguments are strings as `os.fsdecode` makes them; in JSON one that isn't UTF-8 is an array of its bytes.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvmkit.errors import AgentError, GuestError, ProtocolError

REQUEST: Final = 1
DATA: Final = 2
END: Final = 3
REPLY: Final = 4
ERROR: Final = 5
STARTED: Final = 6
STREAM: Final = 7
STREAM_END: Final = 8
STREAM_CLOSE: Final = 9
WINDOW: Final = 10
SIGNAL: Final = 11
WINSIZE: Final = 12
EXIT: Final = 13

STDIN, STDOUT, STDERR = range(3)

HEADER: Final = struct.Struct("<BI")
MAX_PAYLOAD_BYTES: Final = 64 << 10
MAX_REQUEST_BYTES: Final = 4 << 20
"""Of a REQUEST, which holds a command's arguments and environment; Linux takes no more than some 2 MiB of those."""
CHUNK_BYTES: Final = MAX_PAYLOAD_BYTES - 1
"""The most that a STREAM frame carries beside its stream's number."""
WINDOW_BYTES: Final = 256 << 10
_GRANT_BYTES: Final = WINDOW_BYTES // 4

_MAX_MESSAGE_CHARS: Final = 4096


def encode(kind: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return one frame."""
    return b"".join((HEADER.pack(kind, len(payload)), payload))


class FrameDecoder:
    """Cuts received bytes into frames. Holds no more than one frame that isn't complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield type and payload of each frame that `data` completes. `ProtocolError` for one that is too long.

        Take them all before more is received.
        """
        buffer = self._buffer
        buffer += data
        offset = 0
        try:
            while len(buffer) - offset >= HEADER.size:
                kind, size = HEADER.unpack_from(buffer, offset)
                if size > MAX_PAYLOAD_BYTES:
                    raise ProtocolError(
                        f"a frame of type {kind} with {size} bytes; at most {MAX_PAYLOAD_BYTES}"
                    )
                end = offset + HEADER.size + size
                if end > len(buffer):
                    break
                with memoryview(buffer) as view:
                    payload = bytes(view[offset + HEADER.size : end])
                offset = end
                yield kind, payload
        finally:
            del buffer[:offset]


def text(value: str | os.PathLike[str]) -> str | list[int]:
    """A name, path or argument for JSON."""
    value = os.fspath(value)
    if "\0" in value:
        raise ValueError(f"{value!r}: names and arguments can't hold NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        return list(os.fsencode(value))
    return value


def text_from(value: object) -> str:
    """The string that came as JSON. `ProtocolError` if none did."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        try:
            return os.fsdecode(bytes(value))
        except (TypeError, ValueError):
            pass
    raise ProtocolError("a name that is neither a string nor an array of bytes")


def request(op: str, **fields: Any) -> bytes:
    """The REQUEST frame. Fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    payload = json.dumps({"op": op, **given}, ensure_ascii=False).encode()
    if len(payload) > MAX_REQUEST_BYTES:
        raise ValueError(f"a request of {len(payload)} bytes; at most {MAX_REQUEST_BYTES}")
    return encode(REQUEST, payload)


@dataclass(frozen=True)
class Pty:
    """A terminal for a command: its size in characters and its kind, the command's TERM."""

    rows: int = 24
    cols: int = 80
    term: str = "linux"


def exec_request(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    clear_env: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    user: str | int | None = None,
    pty: Pty | None = None,
    stdin: bool = False,
) -> bytes:
    """The REQUEST frame that starts a command. Without `stdin` it reads /dev/null."""
    if isinstance(argv, str | bytes) or not argv:
        raise ValueError(f"argv {argv!r}: a sequence of strings, the first the command")
    return request(
        "exec",
        argv=[text(argument) for argument in argv],
        env={name: text(value) for name, value in (env or {}).items()},
        clear_env=clear_env,
        cwd=None if cwd is None else text(cwd),
        user=None if user is None else str(user),
        pty=None if pty is None else {"rows": pty.rows, "cols": pty.cols, "term": pty.term},
        stdin=stdin,
        window_bytes=WINDOW_BYTES,
    )


def parse_object(payload: bytes) -> dict[str, Any]:
    """The JSON object of a frame. `ProtocolError` if it is none."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that isn't JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a frame that isn't a JSON object")
    return value


def integer(value: dict[str, Any], name: str, low: int, high: int) -> int:
    """An integer of a JSON object, `low` to `high` inclusive."""
    number = value.get(name)
    if type(number) is not int or not low <= number <= high:
        raise ProtocolError(f"{name} is {str(number)[:80]}; an integer from {low} to {high} was due")
    return number


def parse_error(payload: bytes) -> GuestError:
    """The error that an ERROR frame carries."""
    value = parse_object(payload)
    message = value.get("message")
    if not isinstance(message, str):
        raise ProtocolError("an ERROR frame without a message")
    return GuestError(integer(value, "errno", 1, 4095), message[:_MAX_MESSAGE_CHARS])


@dataclass(frozen=True)
class Started:
    """The command runs; `pid` is its number in the guest."""

    pid: int


@dataclass(frozen=True)
class Output:
    """Bytes of STDOUT or STDERR."""

    stream: int
    data: bytes


@dataclass(frozen=True)
class OutputEnd:
    """Nothing more comes from STDOUT or STDERR."""

    stream: int


@dataclass(frozen=True)
class StdinReady:
    """More may be sent to stdin: `Command.stdin_credit_bytes` has grown."""


@dataclass(frozen=True)
class StdinClosed:
    """Nobody reads the command's stdin any more."""


@dataclass(frozen=True)
class Exited:
    """The command ended: its exit status, or a signal's number negated, as in `subprocess`."""

    returncode: int


Event = Started | Output | OutputEnd | StdinReady | StdinClosed | Exited


class Command:
    """One ``exec`` connection after its request. What the methods return is to be sent, in order."""

    def __init__(self, *, stdin: bool = False, pty: bool = False) -> None:
        self.pid: int | None = None
        self.returncode: int | None = None
        self.stdin_credit_bytes = WINDOW_BYTES if stdin else 0
        self._stdin_open = stdin
        self._open = {STDOUT} if pty else {STDOUT, STDERR}
        self._refused: set[int] = set()
        self._credit = {STDOUT: WINDOW_BYTES, STDERR: WINDOW_BYTES}
        self._consumed = {STDOUT: 0, STDERR: 0}
        self._decoder = FrameDecoder()

    @property
    def done(self) -> bool:
        """Whether the command and its outputs have ended: nothing more comes."""
        return self.returncode is not None and not self._open

    def is_open(self, stream: int) -> bool:
        """Whether more may come of STDOUT or STDERR."""
        return stream in self._open

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """What `data` tells. b"" is the connection's end, an `AgentError` unless the command is done.

        `GuestError` if the command can't be started, `ProtocolError` if the agent breaks the rules.
        """
        if not data and not self.done:
            raise AgentError("the agent closed the connection before the command ended")
        for kind, payload in self._decoder.receive(data):
            event = self._event(kind, payload)
            if event is not None:
                yield event

    def _event(self, kind: int, payload: bytes) -> Event | None:
        if kind == ERROR:
            raise parse_error(payload)
        if (kind == STARTED) != (self.pid is None):
            raise ProtocolError(f"a frame of type {kind} {'before' if self.pid is None else 'after'} STARTED")
        if kind == STARTED:
            self.pid = integer(parse_object(payload), "pid", 1, 0x7FFFFFFF)
            return Started(self.pid)
        if kind == EXIT and self.returncode is None:
            status = parse_object(payload)
            if "signal" in status:
                self.returncode = -integer(status, "signal", 1, 127)
            else:
                self.returncode = integer(status, "code", 0, 255)
            self._stdin_open = False
            return Exited(self.returncode)
        stream = payload[0] if payload else STDIN
        if kind == STREAM and (stream in self._open or stream in self._refused):
            size = len(payload) - 1
            if size > self._credit[stream]:
                raise ProtocolError(f"{size} bytes of stream {stream}, {self._credit[stream]} were granted")
            self._credit[stream] -= size
            return Output(stream, payload[1:]) if stream in self._open else None
        if kind == STREAM_END and len(payload) == 1 and stream in self._open:
            self._open.remove(stream)
            return OutputEnd(stream)
        if kind == STREAM_END and len(payload) == 1 and stream in self._refused:
            self._refused.remove(stream)
            return None
        if kind == STREAM_CLOSE and payload == b"\0":
            self._stdin_open = False
            return StdinClosed()
        if kind == WINDOW and len(payload) == 5 and payload[0] == STDIN:
            self.stdin_credit_bytes += int.from_bytes(payload[1:], "little")
            if self.stdin_credit_bytes > WINDOW_BYTES:
                raise ProtocolError("a window for stdin that is larger than it was")
            return StdinReady()
        raise ProtocolError(f"a frame of type {kind}, {len(payload)} bytes, from a command")

    def stdin(self, data: bytes | memoryview) -> bytes:
        """Frames of `data`, no longer than `stdin_credit_bytes`. Nothing once nobody reads it."""
        if not self._stdin_open:
            return b""
        if len(data) > self.stdin_credit_bytes:
            raise ValueError(f"{len(data)} bytes of stdin, {self.stdin_credit_bytes} were granted")
        self.stdin_credit_bytes -= len(data)
        parts: list[bytes | memoryview] = []
        with memoryview(data) as view:
            for offset in range(0, len(view), CHUNK_BYTES):
                chunk = view[offset : offset + CHUNK_BYTES]
                parts += (HEADER.pack(STREAM, len(chunk) + 1), b"\0", chunk)
            return b"".join(parts)

    def end_stdin(self) -> bytes:
        """The frame that ends stdin."""
        if not self._stdin_open:
            return b""
        self._stdin_open = False
        return encode(STREAM_END, b"\0")

    def consumed(self, stream: int, size_bytes: int) -> bytes:
        """Say that `size_bytes` of an output went where they belong and make room; the frame that grants it, or nothing yet."""
        self._consumed[stream] += size_bytes
        if self._consumed[stream] < _GRANT_BYTES or stream not in self._open:
            return b""
        grant, self._consumed[stream] = self._consumed[stream], 0
        self._credit[stream] += grant
        return encode(WINDOW, struct.pack("<BI", stream, grant))

    def close_output(self, stream: int) -> bytes:
        """Say that nobody takes an output any more: the command gets SIGPIPE, as from a closed pipe."""
        if stream not in self._open:
            return b""
        self._open.remove(stream)
        self._refused.add(stream)  # what is on its way still comes
        return encode(STREAM_CLOSE, bytes([stream]))

    def signal(self, number: int) -> bytes:
        """The frame that sends a signal to the command's process group."""
        return encode(SIGNAL, bytes([number]))

    def resize(self, rows: int, cols: int) -> bytes:
        """The frame that sets the size of the command's terminal."""
        return encode(WINSIZE, struct.pack("<HH", rows, cols))
