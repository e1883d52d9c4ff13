"""Images against a bytearray, and an overlay against a host that crashes."""

import random
import tempfile
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmkit.devices.block.backend import SECTOR_BYTES, Backend, Buffers
from kvmkit.devices.block.overlay import CLUSTER_BYTES, Overlay
from kvmkit.devices.block.raw import RawFile

SECTORS = 8 * 9 + 3  # the last cluster is cut short
SIZE = SECTORS * SECTOR_BYTES


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and bytes, of whole sectors; now and then of whole clusters."""
    unit = draw(st.sampled_from((1, 8)))
    first = draw(st.integers(0, SECTORS - 1)) // unit * unit
    count = draw(st.integers(1, min(24, SECTORS - first)))
    return first * SECTOR_BYTES, count * SECTOR_BYTES


def pattern(number: int, size_bytes: int) -> bytes:
    return random.Random(number).randbytes(size_bytes)


BASE = pattern(-1, SIZE)


class Images(RuleBasedStateMachine):
    """What a disk does, done to an image and to bytes in memory."""

    disk: Backend

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="kvmkit-test-")
        self.base = Path(self.directory.name, "base")
        self.base.write_bytes(BASE)
        self.model = bytearray(BASE)
        self.undefined: set[int] = set()
        """Sectors that were discarded."""
        self.number = 0

    def open(self) -> None:
        """Open the image, also one that was in use before."""
        raise NotImplementedError

    @initialize()
    def first(self) -> None:
        self.open()

    @rule(range_=ranges(), pieces=st.integers(1, 3))
    def write(self, range_: tuple[int, int], pieces: int) -> None:
        offset, size = range_
        self.number += 1
        data = pattern(self.number, size)
        cuts = [0, *sorted(self.number * 977 * k % (size + 1) for k in range(1, pieces)), size]
        self.disk.writev([data[a:b] for a, b in pairwise(cuts)], offset)
        self.expect(offset, data)

    @rule(range_=ranges(), unmap=st.booleans())
    def write_zeroes(self, range_: tuple[int, int], unmap: bool) -> None:
        self.disk.write_zeroes(*range_, unmap)
        self.expect(range_[0], bytes(range_[1]))

    @rule(range_=ranges())
    def discard(self, range_: tuple[int, int]) -> None:
        offset, size = range_
        self.disk.discard(offset, size)
        self.undefined |= set(range(offset // SECTOR_BYTES, (offset + size) // SECTOR_BYTES))

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule(range_=ranges())
    def read(self, range_: tuple[int, int]) -> None:
        offset, size = range_
        buffers = [bytearray(size // 3), bytearray(size - size // 3)]
        self.disk.readv(buffers, offset)
        self.compare(offset, b"".join(buffers))

    @rule()
    def reopen(self) -> None:
        self.disk.flush()
        self.disk.close()
        self.open()

    @invariant()
    def base_is_as_it_was(self) -> None:
        if self.base.stat().st_size != SIZE:
            raise AssertionError("the size changed")

    def expect(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        self.undefined -= set(range(offset // SECTOR_BYTES, (offset + len(data)) // SECTOR_BYTES))

    def compare(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR_BYTES):
            if (offset + at) // SECTOR_BYTES not in self.undefined:
                found = data[at : at + SECTOR_BYTES]
                assert found == self.model[offset + at : offset + at + SECTOR_BYTES], f"at {offset + at}"

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            data = bytearray(SIZE)
            self.disk.readv([data], 0)
            self.compare(0, bytes(data))
            self.disk.close()
        self.directory.cleanup()


class RawImages(Images):
    def open(self) -> None:
        self.disk = RawFile(self.base, read_only=False)


class OverlayImages(Images):
    def open(self) -> None:
        path = Path(self.directory.name, "overlay")
        self.disk = Overlay(path) if path.exists() else Overlay.create(path, self.base)

    @rule(range_=ranges())
    def discarded_reads_as_zeros(self, range_: tuple[int, int]) -> None:
        self.disk.discard(*range_)
        self.expect(range_[0], bytes(range_[1]))

    @invariant()
    def base_is_as_it_was(self) -> None:
        assert self.base.read_bytes() == BASE


_SETTINGS = settings(max_examples=25, stateful_step_count=25, deadline=None)
RawImages.TestCase.settings = OverlayImages.TestCase.settings = _SETTINGS
TestRawImages = RawImages.TestCase
TestOverlayImages = OverlayImages.TestCase


class Crash(Exception):
    """The host lost its power."""


class Memory:
    """A file that forgets: each sector is on the disk as of the last flush or as of any write since then."""

    read_only = False

    def __init__(self, data: bytes, operations: int | None = None) -> None:
        """Crashes instead of carrying out more than `operations` changes."""
        self.size_bytes = len(data)
        self.on_disk = data
        self.now = bytearray(data)
        self.since: dict[int, list[bytes]] = {}
        self.left = operations

    def operation(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> None:
        for buffer in buffers:
            buffer[:] = self.now[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, buffers: Buffers, offset: int) -> None:
        data = b"".join(buffers)
        assert offset % SECTOR_BYTES == len(data) % SECTOR_BYTES == 0
        self.operation()
        self.now[offset : offset + len(data)] = data
        for at in range(0, len(data), SECTOR_BYTES):
            self.since.setdefault(offset + at, []).append(data[at : at + SECTOR_BYTES])

    def write_zeroes(self, offset: int, size_bytes: int, unmap: bool) -> None:
        self.writev([bytes(size_bytes)], offset)

    def discard(self, offset: int, size_bytes: int) -> None:
        self.write_zeroes(offset, size_bytes, True)

    def flush(self) -> None:
        self.operation()
        self.on_disk = bytes(self.now)
        self.since.clear()

    def after_crash(self, rng: random.Random) -> bytes:
        """What the disk may hold after one."""
        data = bytearray(self.on_disk)
        share = rng.choice((0.0, 0.2, 0.5, 0.9, 1.0))
        for offset, versions in self.since.items():
            if rng.random() < share:
                data[offset : offset + SECTOR_BYTES] = rng.choice(versions)
        return bytes(data)

    def close(self) -> None:
        pass


def new_overlay_file() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        base, overlay = Path(directory, "base"), Path(directory, "overlay")
        base.write_bytes(BASE)
        Overlay.create(overlay, base).close()
        return overlay.read_bytes()


NEW_OVERLAY = new_overlay_file()

Operation = tuple[str, tuple[int, int]]


def run_until_crash(operations: Sequence[Operation], crash_at: int, seed: int) -> None:
    """Crash at the `crash_at`-th change of the overlay's file; then all that a flush acknowledged must be there."""
    rng = random.Random(seed)
    file = Memory(NEW_OVERLAY, crash_at)
    overlay = Overlay.over(file, Memory(BASE))
    # What each sector may hold after a crash: what the last flush acknowledged, and all that came later.
    may = {at: [BASE[at : at + SECTOR_BYTES]] for at in range(0, SIZE, SECTOR_BYTES)}
    try:
        for number, (what, (offset, size)) in enumerate(operations):
            if what == "flush":
                overlay.flush()
                may = {at: versions[-1:] for at, versions in may.items()}
                continue
            data = pattern(number, size) if what == "write" else bytes(size)
            for at in range(0, size, SECTOR_BYTES):
                may[offset + at].append(data[at : at + SECTOR_BYTES])
            if what == "write":
                overlay.writev([data], offset)
            else:
                overlay.write_zeroes(offset, size, unmap=True)
    except Crash:
        pass
    again = Overlay.over(Memory(file.after_crash(rng)), Memory(BASE))
    found = bytearray(SIZE)
    again.readv([found], 0)
    for at, versions in may.items():
        assert bytes(found[at : at + SECTOR_BYTES]) in versions, (
            f"sector at {at} is none of {len(versions)} that it may be"
        )


OPERATIONS = st.lists(st.tuples(st.sampled_from(("write", "write", "zero", "flush")), ranges()), max_size=14)


@settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, crash_at=st.integers(0, 30), seed=st.integers(0, 1 << 32))
def test_overlay_keeps_what_was_flushed(operations: list[Operation], crash_at: int, seed: int) -> None:
    run_until_crash(operations, crash_at, seed)


@pytest.mark.parametrize("broken", ["no data sync", "no map sync", "map first"])
def test_the_crashes_find_a_wrong_order(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the test above is made finds each way to flush wrongly."""

    def flush(self: Overlay) -> None:
        def write_map() -> None:
            self._file.writev([self._map[:]], 4096)

        if broken == "no map sync":
            self._file.flush()
            write_map()
        elif broken == "map first":  # as it would be if the map were written through
            write_map()
            self._file.flush()
        else:
            write_map()

    monkeypatch.setattr(Overlay, "flush", flush)
    operations: list[Operation] = [("write", (0, CLUSTER_BYTES)), ("flush", (0, 0)), ("write", (0, 512))]
    with pytest.raises(AssertionError, match="none of"):
        for seed in range(50):
            for crash_at in range(6):
                run_until_crash(operations, crash_at, seed)


def test_flushes_of_two_queues_come_one_after_the_other() -> None:
    """Else the earlier one's copy of the map could overwrite the later one's."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Memory):
        def flush(self) -> None:
            super().flush()
            if not entered.is_set():
                entered.set()
                assert go_on.wait(10)

    file = Slow(NEW_OVERLAY)
    overlay = Overlay.over(file, Memory(BASE))
    overlay.writev([bytes(CLUSTER_BYTES)], 0)
    first = threading.Thread(target=overlay.flush)
    first.start()
    assert entered.wait(10)
    overlay.writev([bytes(CLUSTER_BYTES)], CLUSTER_BYTES)  # isn't held up by the flush
    second = threading.Thread(target=overlay.flush)
    second.start()
    assert file.on_disk[4096:4098] == b"\0\0"  # the map comes after the data
    go_on.set()
    first.join()
    second.join()
    assert file.on_disk[4096:4098] == b"\1\1"
