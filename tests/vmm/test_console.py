"""Markers in the serial stream, however it is split."""

import itertools
import os
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvmkit.vmm.console import Console, writer
from kvmkit.vmm.ending import Ending, Reason


def collect(chunks: list[bytes], command_only: bool) -> tuple[bytes, list[tuple[str, int]], Console]:
    out: list[bytes] = []
    events: list[tuple[str, int]] = []
    console = Console([out.append], lambda *event: events.append(event), command_only=command_only)
    for chunk in chunks:
        console.feed(chunk)
    console.close()
    return b"".join(out), events, console


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


OUTPUT = st.lists(
    st.sampled_from(
        [b"a", b"\n", b"\r", b"k", b"kvmkit: ", b"kvmkit: exit ", b"kvmkit: exit 7x", b"\xff", b"7"]
    )
).map(b"".join)


@given(output=OUTPUT, cuts=st.lists(st.integers(min_value=0)), status=st.integers(0, 255))
def test_command_output_is_exact(output: bytes, cuts: list[int], status: int) -> None:
    """What the command wrote comes out unchanged, whatever it is short of the marker itself."""
    assume(not re.search(rb"^kvmkit: exit \d+\r*$", output, re.MULTILINE))
    stream = f"boot noise\r\nkvmkit: init\r\nnoise\r\nkvmkit: command\r\n{{}}\r\nkvmkit: exit {status}\r\nreboot: Power down\r\n".encode()
    stream = stream.replace(b"{}", output.replace(b"\n", b"\r\n"))
    shown, events, _ = collect(split(stream, cuts), command_only=True)
    assert shown == output
    assert events == [("console", 0), ("init", 0), ("exit", status)]


def test_a_byte_at_a_time() -> None:
    stream = b"kvmkit: init\r\nkvmkit: command\r\nhello\r\nkvmkit: exit 0 or not\r\n\r\nkvmkit: exit 3\r\nlater\r\n"
    shown, events, _ = collect([bytes([byte]) for byte in stream], command_only=True)
    assert shown == b"hello\nkvmkit: exit 0 or not\n"
    assert events[-1] == ("exit", 3)


def test_output_is_not_kept_back() -> None:
    """A prompt without a newline shows at once."""
    out: list[bytes] = []
    console = Console([out.append], lambda *_: None, command_only=True)
    console.feed(b"kvmkit: command\r\nlogin: ")
    assert b"".join(out) == b"login: "
    console.feed(b"k")
    assert b"".join(out) == b"login: k"


def test_the_guest_dies_in_the_middle() -> None:
    shown, events, console = collect([b"kvmkit: command\r\nhalf\r\n"], command_only=True)
    assert shown == b"half\n"
    assert ("exit", 0) not in events
    assert console.tail == b"kvmkit: command\r\nhalf\r\n"


def test_raw_output_is_every_byte() -> None:
    stream = b"kvmkit: init\r\nkvmkit: exit 3\r\n\xff\0"
    shown, events, _ = collect([stream], command_only=False)
    assert shown == stream
    assert events == [("console", 0), ("init", 0), ("exit", 3)]


@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        (b"[    1.234567] Kernel panic - not syncing: VFS\r\n", True),
        (b"Kernel panic - not syncing: x\n", True),
        (b"echo Kernel panic - not syncing\n", False),
    ],
)
def test_panic(stream: bytes, seen: bool) -> None:
    _, events, _ = collect([stream], command_only=False)
    assert (("panic", 0) in events) is seen


def test_a_long_line_is_not_kept() -> None:
    _, _, console = collect([b"x" * 100_000] * 3, command_only=True)
    assert len(console.tail) <= 4096
    assert len(console._line) <= 1024
    assert console._output is not None and len(console._output._held) <= 1024


def test_a_closed_reader_ends_the_vm() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    ending = Ending()
    try:
        writer(fd, ending)(b"x")
        assert ending.reason is Reason.OUTPUT_CLOSED
    finally:
        os.close(fd)
        ending.close()
