import errno
import logging
import os
import random
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvmkit.devices.block.backend import Buffers, cut
from kvmkit.devices.block.overlay import Overlay
from kvmkit.devices.block.raw import RawFile
from kvmkit.devices.virtio import blk
from kvmkit.devices.virtio.blk import Blk
from kvmkit.testing.fuzz.blk import mutate_and_feed
from kvmkit.testing.virtqueue import Driver, Used

OK, IOERR, UNSUPP = 0, 1, 2
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
SECTORS = 2048


class Disk:
    """Bytes in memory that tell what was done to them."""

    def __init__(self, read_only: bool = False) -> None:
        self.read_only = read_only
        self.data = bytearray(os.urandom(512 * SECTORS))
        self.size_bytes = len(self.data)
        self.done: list[str] = []
        self.error: OSError | None = None

    def _note(self, what: str) -> None:
        if self.error:
            raise self.error
        self.done.append(what)

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> None:
        self._note("read")
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, buffers: Buffers, offset: int) -> None:
        self._note("write")
        data = b"".join(buffers)
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, size_bytes: int) -> None:
        self._note(f"discard {offset} {size_bytes}")

    def write_zeroes(self, offset: int, size_bytes: int, unmap: bool) -> None:
        self._note(f"zero {offset} {size_bytes} {unmap}")
        self.data[offset : offset + size_bytes] = bytes(size_bytes)

    def close(self) -> None:
        self.done.append("close")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def driver(disk: Disk) -> Iterator[Driver]:
    with Driver(Blk(disk, name="disk", serial="kvmkit-0001")) as driver:
        yield driver


def header(type_: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", type_, 0, sector)


def request(driver: Driver, out: Sequence[bytes], in_: Sequence[int] = (1,), queue: int = 0) -> Used:
    driver.add(queue, out, in_)
    driver.kick(queue)
    (used,) = driver.wait_used(queue)
    return used


def status(driver: Driver, out: Sequence[bytes], in_: Sequence[int] = (1,)) -> int:
    return request(driver, out, in_).data[-1]


def test_config(driver: Driver, disk: Disk) -> None:
    config = driver.device.config()
    assert len(config) == 60
    assert int.from_bytes(config[:8], "little") == SECTORS
    assert int.from_bytes(config[12:16], "little") == 254  # seg_max
    assert int.from_bytes(config[20:24], "little") == 512  # blk_size
    assert config[24] == 3  # physical_block_exp
    assert config[32] == 1  # writeback
    assert int.from_bytes(config[34:36], "little") == 1  # num_queues
    assert int.from_bytes(config[40:44], "little") == 16  # max_discard_seg
    assert config[56] == 1  # write_zeroes_may_unmap


def test_read(driver: Driver, disk: Disk) -> None:
    used = request(driver, [header(IN, 3)], [512, 1024, 1])
    assert used.data == disk.data[1536:3072] + b"\0"
    assert used.written_bytes == 1537


def test_write_then_flush(driver: Driver, disk: Disk) -> None:
    data = os.urandom(1024)
    used = request(driver, [header(OUT, SECTORS - 2), data])
    assert (used.data, used.written_bytes) == (b"\0", 1)
    assert disk.data[-1024:] == data
    assert disk.done == ["write"]
    assert status(driver, [header(FLUSH)]) == OK
    assert disk.done == ["write", "flush"]


def test_any_framing(driver: Driver, disk: Disk) -> None:
    data = os.urandom(512)
    whole = header(OUT, 1) + data
    assert status(driver, [whole[:3], whole[3:100], whole[100:]]) == OK
    assert request(driver, [header(IN, 1)[:8], header(IN, 1)[8:]], [100, 413]).data == data + b"\0"


def test_get_id(driver: Driver) -> None:
    used = request(driver, [header(GET_ID)], [20, 1])
    assert used.data == b"kvmkit-0001".ljust(20, b"\0") + b"\0"


def ranges(*parts: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *part) for part in parts)


def test_discard_and_write_zeroes(driver: Driver, disk: Disk) -> None:
    assert status(driver, [header(DISCARD), ranges((8, 16, 0), (0, 0, 0), (100, 1, 0))]) == OK
    assert disk.done == ["discard 4096 8192", "discard 51200 512"]
    disk.done.clear()
    assert status(driver, [header(WRITE_ZEROES), ranges((1, 2, 0), (SECTORS - 1, 1, 1))]) == OK
    assert disk.done == ["zero 512 1024 False", f"zero {512 * (SECTORS - 1)} 512 True"]


@pytest.mark.parametrize(
    ("out", "in_", "expected"),
    [
        ([header(IN, SECTORS)], [512, 1], IOERR),
        ([header(IN, SECTORS - 1)], [1024, 1], IOERR),
        ([header(IN, (1 << 55) - 1)], [512, 1], IOERR),
        ([header(IN, (1 << 64) - 1)], [512, 1], IOERR),
        ([header(IN, 0)], [511, 1], IOERR),
        ([header(IN, 0), b"more"], [512, 1], IOERR),
        ([header(IN, 0)], [1], OK),
        ([header(IN, SECTORS)], [1], OK),
        ([header(IN)[:15]], [512, 1], IOERR),
        ([], [512, 1], IOERR),
        ([header(OUT, SECTORS), bytes(512)], [1], IOERR),
        ([header(OUT), bytes(513)], [1], IOERR),
        ([header(OUT), bytes(512)], [512, 1], IOERR),
        ([header(OUT)], [1], OK),
        ([header(FLUSH)], [2], IOERR),
        ([header(FLUSH), b"data"], [1], OK),
        ([header(GET_ID)], [19, 1], IOERR),
        ([header(GET_ID)], [21, 1], IOERR),
        ([header(DISCARD), ranges((0, 1, 0))[:15]], [1], IOERR),
        ([header(DISCARD), ranges(*[(0, 1, 0)] * 17)], [1], IOERR),
        ([header(DISCARD), ranges((0, SECTORS + 1, 0))], [1], IOERR),
        ([header(DISCARD), ranges(((1 << 64) - 1, 1, 0))], [1], IOERR),
        ([header(DISCARD), ranges((0, 1, 1))], [1], UNSUPP),
        ([header(WRITE_ZEROES), ranges((0, 1, 2))], [1], UNSUPP),
        ([header(WRITE_ZEROES), ranges((0, 1, 0), (SECTORS, 1, 0))], [1], IOERR),
        ([header(2)], [1], UNSUPP),
        ([header(14), ranges((0, 1, 0))], [1], UNSUPP),
        ([header(0x80000000)], [512, 1], UNSUPP),
    ],
)
def test_requests_that_are_wrong(
    driver: Driver, disk: Disk, out: list[bytes], in_: list[int], expected: int
) -> None:
    before = bytes(disk.data)
    used = request(driver, out, in_)
    assert used.data[-1] == expected
    assert used.data[:-1] == bytes(len(used.data) - 1)
    assert used.written_bytes == (sum(in_) if expected == OK else 0)
    assert disk.data == before
    assert not driver.broken
    assert request(driver, [header(IN)], [512, 1]).data == before[:512] + b"\0"  # it goes on


def test_as_many_segments_as_it_says_and_no_more(driver: Driver, disk: Disk) -> None:
    def segments(count: int) -> Used:
        head = driver.buffer(16)
        driver.memory.write(head, header(IN))
        back = [(driver.buffer(512), 512) for _ in range(count)] + [(driver.buffer(1), 1)]
        driver.add_raw(0, [(head, 16, 0), *((gpa, size, 2) for gpa, size in back)], back, indirect=True)
        driver.kick(0)
        (used,) = driver.wait_used(0)
        return used

    assert segments(254).data == disk.data[: 254 * 512] + b"\0"
    assert segments(255).data[-1] == IOERR


def test_no_room_for_a_status_breaks_the_queue(driver: Driver) -> None:
    driver.add(0, [header(OUT), bytes(512)])
    driver.kick(0)
    assert driver.broken
    driver.reset()
    driver.activate()
    assert status(driver, [header(FLUSH)]) == OK


def test_read_only() -> None:
    disk = Disk(read_only=True)
    with Driver(Blk(disk, name="disk")) as driver:
        assert driver.device.features & blk.VIRTIO_BLK_F_RO
        assert not driver.device.features & (blk.VIRTIO_BLK_F_DISCARD | blk.VIRTIO_BLK_F_WRITE_ZEROES)
        before = bytes(disk.data)
        for out in ([header(OUT), bytes(512)], [header(DISCARD), ranges((0, 1, 0))]):
            assert status(driver, out) == IOERR
        assert status(driver, [header(WRITE_ZEROES), ranges((0, 1, 0))]) == IOERR
        assert status(driver, [header(FLUSH)]) == OK
        assert request(driver, [header(IN)], [512, 1]).data == before[:512] + b"\0"
        assert disk.data == before
    assert disk.done == ["read", "close"]


def test_failures_of_the_host(driver: Driver, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    for error in (errno.EIO, errno.ENOSPC):
        disk.error = OSError(error, os.strerror(error))
        for out, in_ in (
            ([header(IN)], [512, 1]),
            ([header(OUT), bytes(512)], [1]),
            ([header(FLUSH)], [1]),
            ([header(WRITE_ZEROES), ranges((0, 1, 0))], [1]),
        ):
            assert status(driver, out, in_) == IOERR
    disk.error = None
    assert "disk: a request failed: [Errno 28] No space left on device" in caplog.text
    assert status(driver, [header(FLUSH)]) == OK


def test_a_guest_cannot_fill_the_log(driver: Driver, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.error = OSError(errno.EIO, "gone")
    with caplog.at_level(logging.ERROR):
        for _ in range(40):
            status(driver, [header(FLUSH)])
    assert len(caplog.records) == 16
    disk.error = None


@pytest.mark.parametrize(
    ("refused", "writeback"),
    [(0, True), (blk.VIRTIO_BLK_F_FLUSH, False), (blk.VIRTIO_BLK_F_CONFIG_WCE, True), (0xFFFF, False)],
)
def test_write_through_for_a_driver_that_does_not_flush(disk: Disk, refused: int, writeback: bool) -> None:
    device = Blk(disk, name="disk")
    with Driver(device, device.features & ~refused) as driver:
        assert device.config()[32] == writeback
        assert status(driver, [header(OUT), bytes(512)]) == OK
        assert disk.done == (["write"] if writeback else ["write", "flush"])


def test_write_through_by_choice(driver: Driver, disk: Disk) -> None:
    device = driver.device
    device.write_config(32, b"\0")
    assert device.config()[32] == 0
    for out in ([header(OUT), bytes(512)], [header(WRITE_ZEROES), ranges((0, 1, 0))]):
        assert status(driver, out) == OK
    assert disk.done == ["write", "flush", "zero 0 512 False", "flush"]
    device.write_config(0, bytes(8))
    assert int.from_bytes(device.config()[:8], "little") == SECTORS
    driver.reset()
    assert device.config()[32] == 1


def test_write_through_is_kept_to_whom_it_was_offered(disk: Disk) -> None:
    device = Blk(disk, name="disk")
    with Driver(device, device.features & ~blk.VIRTIO_BLK_F_CONFIG_WCE):
        device.write_config(32, b"\0")
        assert device.config()[32] == 1


def test_a_flush_in_one_queue_does_not_stop_another() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Disk):
        def flush(self) -> None:
            entered.set()
            assert go_on.wait(10)
            super().flush()

    disk = Slow()
    device = Blk(disk, name="disk", queues=3)
    assert device.features & blk.VIRTIO_BLK_F_MQ
    assert int.from_bytes(device.config()[34:36], "little") == 3
    with Driver(device) as driver:
        driver.add(2, [header(FLUSH)], [1])
        kick = threading.Thread(target=driver.kick, args=(2,))
        kick.start()
        assert entered.wait(10)
        assert request(driver, [header(IN)], [512, 1], queue=1).data == disk.data[:512] + b"\0"
        assert driver.used(2) == []
        go_on.set()
        kick.join()
        assert driver.wait_used(2)[0].data == b"\0"


def test_what_is_done_is_told_before_what_is_slow() -> None:
    told: list[int] = []

    class Slow(Disk):
        def flush(self) -> None:
            told.append(rings.interrupts)

    with Driver(Blk(Slow(), name="disk")) as rings:
        rings.add(0, [header(IN)], [512, 1])
        rings.add(0, [header(FLUSH)], [1])
        rings.kick(0)
        assert told == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"serial": "x" * 21}, "serial"), ({"serial": "ü"}, "serial"), ({"queues": 0}, "queues")],
)
def test_options_that_are_wrong(disk: Disk, options: dict[str, object], message: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        Blk(disk, name="disk", **options)  # type: ignore[arg-type]
    assert threading.active_count() == threads


def test_closing_flushes_and_ends_the_threads(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    threads = threading.active_count()
    Driver(Blk(disk, name="disk", queues=4)).close()
    assert disk.done == ["flush", "close"]
    assert threading.active_count() == threads
    disk = Disk()
    disk.error = OSError(errno.EIO, "gone")
    Driver(Blk(disk, name="disk")).close()
    assert disk.done == ["close"]
    assert "the last flush" in caplog.text


@pytest.mark.parametrize("kind", ["raw", "overlay"])
def test_images(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    before = os.urandom(512 * SECTORS)
    path.write_bytes(before)
    backend = RawFile(path, False) if kind == "raw" else Overlay.create(tmp_path / "overlay", path)
    with Driver(Blk(backend, name="disk")) as driver:
        data = os.urandom(3 * 512)
        assert status(driver, [header(OUT, 7), data[:700], data[700:]]) == OK
        assert status(driver, [header(WRITE_ZEROES), ranges((16, 8, 1))]) == OK
        assert status(driver, [header(DISCARD), ranges((64, 64, 0))]) == OK
        assert status(driver, [header(FLUSH)]) == OK
        expected = cut(
            [before[: 7 * 512], data, before[10 * 512 : 8192], bytes(4096), before[12288:]], 0, 32768
        )
        used = request(driver, [header(IN)], [5000, 27768, 1])
        assert used.data == b"".join(expected) + b"\0"


@pytest.mark.parametrize("kind", ["raw", "overlay"])
def test_mutated_requests(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(512 * 100))
    backend = RawFile(path, False) if kind == "raw" else Overlay.temporary(RawFile(path, True))
    rng = random.Random(7)
    with Driver(Blk(backend, name="disk", queues=2)) as driver:
        for _ in range(300):
            mutate_and_feed(rng, driver)
        if driver.broken:
            driver.reset()
            driver.activate()
        assert status(driver, [header(FLUSH)]) == OK
    assert path.stat().st_size == 512 * 100
