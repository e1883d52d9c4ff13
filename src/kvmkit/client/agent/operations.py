"""What is asked of an agent beside commands, without the socket: an operation yields frames to send, or None to get the next
frame that came, and returns its result. `sync` and `aio` carry them out.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvmkit.client.agent import protocol, tar
from kvmkit.client.agent.protocol import encode, integer, text, text_from
from kvmkit.errors import AgentError, GuestError, ProtocolError

T = TypeVar("T")
Operation = Generator[bytes | None, tuple[int, bytes], T]
GuestPath = str | os.PathLike[str]

READ_LIMIT_BYTES = 1 << 30
"""What `read_bytes` keeps before it gives up: a hostile guest would fill the host's memory."""
_LIST_LIMIT_BYTES = 256 << 20
_CHUNK_BYTES = protocol.MAX_PAYLOAD_BYTES

_KINDS = ("file", "directory", "symlink", "fifo", "socket", "block", "character")


@dataclass(frozen=True)
class FileStat:
    """What stat(2) says of a file in the guest."""

    kind: str
    """"file", "directory", "symlink", "fifo", "socket", "block" or "character"."""
    mode: int
    """Permissions, without the kind."""
    size_bytes: int
    mtime_ns: int
    uid: int
    gid: int
    target: str | None
    """Where a symbolic link leads."""


@dataclass(frozen=True)
class GuestInfo:
    """What the agent says of its guest."""

    kernel: str
    machine: str
    hostname: str
    uptime_ns: int
    warnings: tuple[str, ...]
    """What went wrong when the guest came up."""


def reply() -> Operation[dict[str, Any]]:
    """The agent's answer."""
    kind, payload = yield None
    if kind == protocol.ERROR:
        raise protocol.parse_error(payload)
    if kind != protocol.REPLY:
        raise ProtocolError(f"a frame of type {kind} where an answer was due")
    return protocol.parse_object(payload)


def call(op: str, **fields: Any) -> Operation[dict[str, Any]]:
    """A request and its answer."""
    yield protocol.request(op, **fields)
    return (yield from reply())


def download(op: str, take: Callable[[bytes], object], **fields: Any) -> Operation[None]:
    """A request whose answer is data."""
    yield protocol.request(op, **fields)
    while True:
        kind, payload = yield None
        if kind == protocol.DATA:
            take(payload)
        elif kind == protocol.END:
            return
        elif kind == protocol.ERROR:
            raise protocol.parse_error(payload)
        else:
            raise ProtocolError(f"a frame of type {kind} where data was due")


def upload(op: str, chunks: Iterable[bytes | memoryview], **fields: Any) -> Operation[None]:
    """A request that sends data. Chunks are no longer than a frame."""
    yield from call(op, **fields)
    for chunk in chunks:
        if chunk:
            yield encode(protocol.DATA, chunk)
    yield encode(protocol.END)
    yield from reply()


def _collect(op: str, path: GuestPath, limit_bytes: int) -> Operation[bytes]:
    chunks: list[bytes] = []
    size_bytes = 0

    def take(data: bytes) -> None:
        nonlocal size_bytes
        size_bytes += len(data)
        if size_bytes > limit_bytes:
            raise AgentError(f"{os.fspath(path)}: longer than {limit_bytes} bytes")
        chunks.append(data)

    yield from download(op, take, path=text(path))
    return b"".join(chunks)


def read_bytes(path: GuestPath, limit_bytes: int) -> Operation[bytes]:
    """A file's content."""
    return (yield from _collect("read", path, limit_bytes))


def write_bytes(path: GuestPath, data: bytes | memoryview, mode: int | None) -> Operation[None]:
    """Make or replace a file's content."""
    view = memoryview(data)
    chunks = (view[offset : offset + _CHUNK_BYTES] for offset in range(0, len(view), _CHUNK_BYTES))
    yield from upload("write", chunks, path=text(path), mode=mode)


def stat(path: GuestPath, follow: bool) -> Operation[FileStat]:
    """The status of a file, or with `follow` false of a link itself."""
    value = yield from call("stat", path=text(path), follow=follow)
    kind, target = value.get("kind"), value.get("target")
    if kind not in _KINDS:
        raise ProtocolError(f"a file of kind {str(kind)[:80]}")
    return FileStat(
        kind,
        integer(value, "mode", 0, 0o7777),
        integer(value, "size_bytes", 0, (1 << 64) - 1),
        integer(value, "mtime_ns", -(1 << 63), (1 << 63) - 1),
        integer(value, "uid", 0, 0xFFFFFFFF),
        integer(value, "gid", 0, 0xFFFFFFFF),
        None if target is None else text_from(target),
    )


def exists(path: GuestPath) -> Operation[bool]:
    """Whether there is anything; a link that leads nowhere is nothing."""
    return (yield from _kind(path)) is not None


def _kind(path: GuestPath) -> Operation[str | None]:
    try:
        return (yield from stat(path, True)).kind
    except GuestError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def listdir(path: GuestPath) -> Operation[list[str]]:
    """Names in a directory, sorted."""
    lines = (yield from _collect("list", path, _LIST_LIMIT_BYTES)).splitlines()
    try:
        return sorted(text_from(json.loads(line)) for line in lines)
    except (ValueError, RecursionError):
        raise ProtocolError("a name that isn't JSON") from None


def simple(op: str, **fields: Any) -> Operation[None]:
    """A request with nothing to tell."""
    yield from call(op, **fields)


def mkdir(path: GuestPath, parents: bool, exist_ok: bool) -> Operation[None]:
    """Make a directory. `parents` implies that it may exist, as for mkdir -p."""
    try:
        yield from call("mkdir", path=text(path), parents=parents)
    except GuestError as error:
        if not (exist_ok and error.errno == errno.EEXIST):
            raise


def info() -> Operation[GuestInfo]:
    """What the agent says of its guest."""
    value = yield from call("info")
    warnings = value.get("warnings")
    if not isinstance(warnings, list):
        raise ProtocolError("an agent's info without warnings")
    return GuestInfo(
        text_from(value.get("kernel")),
        text_from(value.get("machine")),
        text_from(value.get("hostname")),
        integer(value, "uptime_ns", 0, (1 << 63) - 1),
        tuple(map(text_from, warnings)),
    )


def set_time(ns: int | None) -> Operation[None]:
    """Set the guest's wall clock, to the host's without `ns`."""
    yield from call("set_time", ns=time.time_ns() if ns is None else ns)


# Each operation takes a connection of its own. `put` and `get` are made of several: they yield operations.
Plan = Generator[Operation[Any], Any, T]


def put(local: str | os.PathLike[str], remote: GuestPath) -> Plan[None]:
    """Copy a file or directory of the host's to the guest; into `remote` if that is a directory."""
    source, target = Path(local), os.fspath(remote)
    if (yield _kind(target)) == "directory":
        target = f"{target.rstrip('/')}/{_name(source)}"
    if source.is_dir():
        yield upload("unpack", _cut(tar.archive(source)), path=text(target))
        return
    with open(source, "rb", buffering=0) as file:
        meta = os.fstat(file.fileno())
        mtime_ns = max(meta.st_mtime_ns, 0)
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        yield upload("write", chunks, path=text(target), mode=meta.st_mode & 0o777, mtime_ns=mtime_ns)


def _name(path: Path) -> str:
    """A path's last component, of "." and "/tmp/.." too."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _cut(chunks: Iterable[bytes]) -> Iterable[bytes]:
    """Pieces no longer than a frame."""
    for chunk in chunks:
        for offset in range(0, len(chunk), _CHUNK_BYTES):
            yield chunk[offset : offset + _CHUNK_BYTES]


def get(remote: GuestPath, local: str | os.PathLike[str]) -> Plan[None]:
    """Copy a file or directory of the guest's to the host; into `local` if that is a directory."""
    source, target = os.fspath(remote), Path(local)
    meta: FileStat = yield stat(source, True)
    if target.is_dir():
        name = source.rstrip("/").rpartition("/")[2]
        if name in ("", ".", ".."):
            raise ValueError(f"{source!r}: it has no name to go by in {target}; say what it is to be called")
        target /= name
    if meta.kind == "directory":
        target.mkdir(exist_ok=True)
        extractor = tar.Extractor(target)
        try:
            yield download("pack", extractor.feed, path=text(source))
            extractor.finish()
        finally:
            extractor.close()
        return
    with open(target, "wb", buffering=0) as file:
        yield download("read", file.write, path=text(source))
        if meta.kind == "file":
            os.fchmod(file.fileno(), meta.mode & 0o777)
            os.utime(file.fileno(), ns=(meta.mtime_ns, meta.mtime_ns))
