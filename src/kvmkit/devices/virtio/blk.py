"""Block device (virtio 1.2, section 5.2) over a `kvmkit.devices.block.backend.Backend`.

Each queue has a thread, which does its requests one after the other: bytes go between the image and the guest's memory by
preadv(2) and pwritev(2), without a copy of ours. A flush or a slow disk so holds up the requests of its own queue only.

Writes are volatile until a flush, as the driver is told by VIRTIO_BLK_F_FLUSH, unless it doesn't take that feature or switches to
write-through by the configuration (VIRTIO_BLK_F_CONFIG_WCE): then each is flushed before it is done.

What is wrong with a request, or fails on the host, ends in its status byte. A request without room for one breaks the queue.
"""

import logging
import struct
from collections.abc import Sequence

from kvmkit.devices.block.backend import SECTOR_BYTES, Backend
from kvmkit.devices.reactor import Reactor
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue, QueueError

_log = logging.getLogger(__name__)

VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE = 1 << 11
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14

VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID = 0, 1, 4, 8
VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES = 11, 13
_WRITES = (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES)
VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP = 0, 1, 2
VIRTIO_BLK_ID_BYTES = 20

MAX_QUEUES = 64
_QUEUE_SIZE = 256
_SEG_MAX = _QUEUE_SIZE - 2
"""Buffers of data in a request, which has a header and a status besides."""
_RANGES_MAX = 16
"""Ranges in one discard or write-zeroes request, and how large each may be: a thread does nothing else meanwhile."""
_DISCARD_MAX_SECTORS = (1 << 30) // SECTOR_BYTES
_WRITE_ZEROES_MAX_SECTORS = (32 << 20) // SECTOR_BYTES
_PHYSICAL_BLOCK_EXP = 3
"""4 KiB: the blocks of file systems and the clusters of an overlay."""

_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
_RANGE_F_UNMAP = 1
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_CONFIG_WRITEBACK = 32

_BATCH = 16
"""Small requests that are done before the guest hears of the first. One by one it would be interrupted for each."""
_SMALL_BYTES = 64 << 10
_MAX_LOGGED = 16
"""Failures of the host that are logged: a guest may bring about as many as it likes."""


class Blk(VirtioDevice):
    """A disk. It closes `backend` when it is closed."""

    device_id = 2

    def __init__(self, backend: Backend, *, name: str, serial: str = "", queues: int = 1) -> None:
        """`serial` is what the guest reads as the disk's serial number: up to 20 ASCII characters. `queues` from 1 to 64."""
        if not serial.isascii() or len(serial) > VIRTIO_BLK_ID_BYTES:
            raise ValueError(f"{name}: serial {serial!r}: up to {VIRTIO_BLK_ID_BYTES} ASCII characters")
        if not 1 <= queues <= MAX_QUEUES:
            raise ValueError(f"{name}: {queues} queues: from 1 to {MAX_QUEUES}")
        super().__init__(name)
        self.queue_sizes = (_QUEUE_SIZE,) * queues
        self.features = (
            VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_FLUSH
            | VIRTIO_BLK_F_TOPOLOGY
            | VIRTIO_BLK_F_CONFIG_WCE
            | (VIRTIO_BLK_F_MQ if queues > 1 else 0)
            | (VIRTIO_BLK_F_RO if backend.read_only else VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES)
        )
        self._backend = backend
        self._serial = serial.encode().ljust(VIRTIO_BLK_ID_BYTES, b"\0")
        self._reactors = [
            self.reactor,
            *(Reactor(f"{name}-{index}", self.fail) for index in range(1, queues)),
        ]
        self._failed = 0
        self.reset()

    def reactor_for(self, index: int) -> Reactor:
        """One thread a queue."""
        return self._reactors[index]

    def config(self) -> bytes:
        """``struct virtio_blk_config`` as far as ``unused1``."""
        blocks = 1 << _PHYSICAL_BLOCK_EXP
        return _CONFIG.pack(
            self._backend.size_bytes // SECTOR_BYTES,
            0,  # size_max: no limit
            _SEG_MAX,
            *(0, 0, 0),  # geometry
            SECTOR_BYTES,
            *(
                _PHYSICAL_BLOCK_EXP,
                0,
                blocks,
                0,
            ),  # physical blocks, their offset, least and best size of a request
            self._writeback,
            0,
            len(self.queue_sizes),
            *(_DISCARD_MAX_SECTORS, _RANGES_MAX, blocks),
            *(_WRITE_ZEROES_MAX_SECTORS, _RANGES_MAX, True),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Switch between write-back and write-through."""
        if offset == _CONFIG_WRITEBACK and len(data) == 1 and self._features & VIRTIO_BLK_F_CONFIG_WCE:
            self._writeback = bool(data[0])

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Requests may come."""
        self._features = features
        if not features & VIRTIO_BLK_F_FLUSH:
            self._writeback = False
        elif not features & VIRTIO_BLK_F_CONFIG_WCE:
            self._writeback = True

    def reset(self) -> None:
        """Forget what the driver chose."""
        self._features = VIRTIO_BLK_F_CONFIG_WCE  # the driver may switch before it is ready
        self._writeback = True

    def close(self) -> None:
        """Flush what the guest left unflushed, and close the image."""
        super().close()
        try:
            if not self._backend.read_only:
                self._backend.flush()
        except OSError as error:
            _log.error("%s: the last flush: %s", self.name, error)
        finally:
            self._backend.close()

    def queue_notified(self, queue: Queue) -> None:
        """Do all requests that wait."""
        for done, chain in enumerate(queue, 1):
            if not chain.writable_bytes:
                raise QueueError(f"queue {queue.index}: a request without room for its status")
            try:
                status = self._do(chain, queue)
            except OSError as error:
                status = VIRTIO_BLK_S_IOERR
                self._log_failure(error)
            if status == VIRTIO_BLK_S_OK:
                chain.writable_buffers[-1][-1] = VIRTIO_BLK_S_OK
                queue.push(chain, chain.writable_bytes)
            else:
                chain.write(bytes((status,)), chain.writable_bytes - 1)
                queue.push(chain, 0)
            if done % _BATCH == 0:
                self.signal(queue)
        self.signal(queue)

    def _do(self, chain: Chain, queue: Queue) -> int:
        """Carry out a request and return its status; `OSError` is another way to say VIRTIO_BLK_S_IOERR."""
        in_bytes, out_bytes = chain.writable_bytes - 1, chain.readable_bytes - _HEADER.size
        if out_bytes < 0 or len(chain.readable) + len(chain.writable) > _SEG_MAX + 2:
            return VIRTIO_BLK_S_IOERR
        type_, _, sector = _HEADER.unpack(chain.read(0, _HEADER.size))
        if in_bytes + out_bytes > _SMALL_BYTES or type_ not in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT):
            self.signal(queue)  # this takes its time: the guest hears of what is done
        backend = self._backend
        if type_ == VIRTIO_BLK_T_IN:
            if out_bytes or not self._holds(sector, in_bytes):
                return VIRTIO_BLK_S_IOERR
            if in_bytes:
                backend.readv(chain.writable_views(0, in_bytes), sector * SECTOR_BYTES)
            return VIRTIO_BLK_S_OK
        if type_ == VIRTIO_BLK_T_GET_ID:
            if in_bytes != VIRTIO_BLK_ID_BYTES:
                return VIRTIO_BLK_S_IOERR
            chain.write(self._serial)
            return VIRTIO_BLK_S_OK
        if in_bytes:  # nothing else has an answer
            return (
                VIRTIO_BLK_S_IOERR if type_ in _WRITES or type_ == VIRTIO_BLK_T_FLUSH else VIRTIO_BLK_S_UNSUPP
            )
        if type_ in _WRITES:
            if backend.read_only:
                return VIRTIO_BLK_S_IOERR
            if type_ == VIRTIO_BLK_T_OUT:
                if not self._holds(sector, out_bytes):
                    return VIRTIO_BLK_S_IOERR
                if out_bytes:
                    backend.writev(chain.readable_views(_HEADER.size), sector * SECTOR_BYTES)
            elif status := self._do_ranges(type_, chain, out_bytes):
                return status
            if not self._writeback:
                backend.flush()
            return VIRTIO_BLK_S_OK
        if type_ == VIRTIO_BLK_T_FLUSH:
            if not backend.read_only:
                backend.flush()
            return VIRTIO_BLK_S_OK
        return VIRTIO_BLK_S_UNSUPP

    def _do_ranges(self, type_: int, chain: Chain, out_bytes: int) -> int:
        """Discard or write zeroes. Nothing is done unless all ranges are right."""
        if out_bytes % _RANGE.size or out_bytes > _RANGES_MAX * _RANGE.size:
            return VIRTIO_BLK_S_IOERR
        ranges = list(_RANGE.iter_unpack(chain.read(_HEADER.size)))
        discard = type_ == VIRTIO_BLK_T_DISCARD
        allowed, most = (0, _DISCARD_MAX_SECTORS) if discard else (_RANGE_F_UNMAP, _WRITE_ZEROES_MAX_SECTORS)
        if any(flags & ~allowed for _, _, flags in ranges):
            return VIRTIO_BLK_S_UNSUPP
        if not all(n <= most and self._holds(sector, n * SECTOR_BYTES) for sector, n, _ in ranges):
            return VIRTIO_BLK_S_IOERR
        for sector, n, flags in ranges:
            if n and discard:
                self._backend.discard(sector * SECTOR_BYTES, n * SECTOR_BYTES)
            elif n:
                self._backend.write_zeroes(sector * SECTOR_BYTES, n * SECTOR_BYTES, bool(flags))
        return VIRTIO_BLK_S_OK

    def _holds(self, sector: int, size_bytes: int) -> bool:
        """Whether a range consists of whole sectors of the disk."""
        return (
            size_bytes % SECTOR_BYTES == 0 and sector * SECTOR_BYTES + size_bytes <= self._backend.size_bytes
        )

    def _log_failure(self, error: OSError) -> None:
        self._failed += 1
        if self._failed <= _MAX_LOGGED:
            last = "; further ones aren't told" if self._failed == _MAX_LOGGED else ""
            _log.error("%s: a request failed: %s%s", self.name, error, last)
