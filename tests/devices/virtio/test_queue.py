import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmkit.devices.virtio.queue import MAX_CHAIN_BYTES, MAX_INDIRECT, Queue, QueueError
from kvmkit.devices.virtio.rng import Rng
from kvmkit.kvm import GuestMemory, MemoryMap
from kvmkit.testing.virtqueue import Driver

MEMORY = 1 << 20
DESC, AVAIL, USED, DATA = 0x1000, 0x2000, 0x3000, 0x10000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Rings:
    """A queue of 8 whose rings the test writes by hand."""

    def __init__(self, size: int = 8, *, event_idx: bool = True) -> None:
        self.memory = MemoryMap()
        self.memory.add(0, GuestMemory(MEMORY))
        self.size = size
        self.queue = Queue(self.memory, 0, size, DESC, AVAIL, USED, event_idx=event_idx)
        self.told: list[tuple[int, int]] = []
        self.added = 0
        self.memory.on_write(lambda gpa, size: self.told.append((gpa, size)))

    def descriptor(self, i: int, gpa: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(DESC + 16 * i, struct.pack("<QIHH", gpa, length, flags, following))

    def make_available(self, head: int) -> None:
        self.memory.write(AVAIL + 4 + 2 * (self.added % self.size), struct.pack("<H", head))
        self.added += 1
        self.memory.write(AVAIL + 2, struct.pack("<H", self.added & 0xFFFF))


def test_a_chain_comes_in_order_and_is_given_back() -> None:
    rings = Rings()
    rings.memory.write(DATA, b"abcdef")
    rings.descriptor(3, DATA, 2, NEXT, 5)
    rings.descriptor(5, DATA + 2, 4, NEXT, 0)
    rings.descriptor(0, DATA + 0x100, 3, NEXT | WRITE, 1)
    rings.descriptor(1, DATA + 0x200, 5, WRITE)
    rings.make_available(3)
    chain = rings.queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (3, 6, 8)
    assert chain.read() == b"abcdef"
    assert chain.read(1, 3) == b"bcd"
    assert chain.read(5, 9) == b"f"
    assert chain.write(b"0123456789") == 8
    assert rings.memory.read(DATA + 0x100, 3) + rings.memory.read(DATA + 0x200, 5) == b"01234567"
    assert rings.queue.pop() is None
    rings.told.clear()
    rings.queue.push(chain, 8)
    assert rings.memory.read(USED, 12) == struct.pack("<HHII", 0, 1, 3, 8)
    assert (DATA + 0x100, 3) in rings.told and (DATA + 0x200, 5) in rings.told
    assert (USED + 4, 8) in rings.told and (USED, 4) in rings.told


def test_an_empty_queue_asks_for_a_kick() -> None:
    rings = Rings()
    rings.descriptor(0, DATA, 1)
    for n in range(3):
        rings.make_available(0)
        assert rings.queue.pop() is not None
        assert rings.queue.pop() is None
        assert rings.memory.read(USED + 4 + 8 * 8, 2) == struct.pack("<H", n + 1)


def test_the_ring_wraps() -> None:
    rings = Rings(2)
    rings.descriptor(0, DATA, 1, WRITE)
    rings.descriptor(1, DATA + 8, 1, WRITE)
    for n in range(70_000):  # past 2^16, where the indices do
        rings.make_available(n % 2)
        chain = rings.queue.pop()
        assert chain is not None and chain.head == n % 2
        rings.queue.push(chain, 0)
    assert rings.queue.pop() is None


@pytest.mark.parametrize("indirect_after", [0, 1])
def test_an_indirect_table(indirect_after: int) -> None:
    rings = Rings()
    table = DATA + 0x1000
    for i in range(20):
        flags = (NEXT if i < 19 else 0) | (WRITE if i >= 10 else 0)
        rings.memory.write(table + 16 * i, struct.pack("<QIHH", DATA + i, 1, flags, i + 1))
    rings.descriptor(7, table, 320, INDIRECT)
    if indirect_after:
        rings.descriptor(6, DATA + 100, 4, NEXT, 7)
    rings.make_available(6 if indirect_after else 7)
    chain = rings.queue.pop()
    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (10 + 4 * indirect_after, 10)


@pytest.mark.parametrize("more", [0, 1])
def test_a_chain_has_an_end_even_if_its_buffers_overlap(more: int) -> None:
    """Guest memory is no limit to what a chain holds; 2^32 bytes are (section 2.7.5)."""
    rings = Rings()
    large, size = 1 << 32, 8 << 20
    rings.memory.add(large, GuestMemory(size))
    count = MAX_CHAIN_BYTES // size + more
    table = b"".join(struct.pack("<QIHH", large, size, NEXT, i + 1) for i in range(count - 1))
    rings.memory.write(DATA, table + struct.pack("<QIHH", large, size, 0, 0))
    rings.descriptor(0, DATA, 16 * count, INDIRECT)
    rings.make_available(0)
    if more:
        with pytest.raises(QueueError, match="more than 4294967296 bytes"):
            rings.queue.pop()
    else:
        chain = rings.queue.pop()
        assert chain is not None and chain.readable_bytes == MAX_CHAIN_BYTES


def _set(rings: Rings, *descriptors: tuple[int, int, int, int]) -> None:
    for i, descriptor in enumerate(descriptors):
        rings.descriptor(i, *descriptor)
    rings.make_available(0)


@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        ([(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], "doesn't end"),
        ([(DATA, 1, NEXT, 8)], "descriptor 8 of 8"),
        ([(MEMORY - 1, 2, 0, 0)], "outside guest memory"),
        ([((1 << 64) - 1, 2, 0, 0)], "outside guest memory"),
        ([(DATA, 0xFFFFFFFF, 0, 0)], "outside guest memory"),
        ([(DATA, 0, 0, 0)], "empty"),
        ([(DATA, 1, NEXT | WRITE, 1), (DATA, 1, 0, 0)], "after one to write"),
        ([(DATA, 24, INDIRECT, 0)], "table of 24"),
        ([(DATA, 0, INDIRECT, 0)], "table of 0"),
        ([(DATA, 16 * MAX_INDIRECT + 16, INDIRECT, 0)], "table of"),
        ([(DATA, 16, INDIRECT | NEXT, 1)], "indirect table within"),
        ([(MEMORY - 8, 16, INDIRECT, 0)], "outside guest memory"),
        ([(DESC, 16, INDIRECT, 0)], "indirect table within"),
    ],
)
def test_a_hostile_chain_is_refused(descriptors: list[tuple[int, int, int, int]], why: str) -> None:
    rings = Rings()
    _set(rings, *descriptors)
    with pytest.raises(QueueError, match=why):
        rings.queue.pop()


def test_a_hostile_ring_is_refused() -> None:
    rings = Rings()
    rings.memory.write(AVAIL + 4, struct.pack("<H", 9))
    rings.memory.write(AVAIL + 2, struct.pack("<H", 1))
    with pytest.raises(QueueError, match="descriptor 9"):
        rings.queue.pop()
    rings.memory.write(AVAIL + 2, struct.pack("<H", 12))
    with pytest.raises(QueueError, match="12 requests in a ring of 8"):
        rings.queue.pop()


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, DESC, AVAIL, USED),
        (3, DESC, AVAIL, USED),
        (65536, DESC, AVAIL, USED),
        (8, DESC + 8, AVAIL, USED),
        (8, DESC, AVAIL + 1, USED),
        (8, DESC, AVAIL, USED + 2),
        (8, MEMORY - 16, AVAIL, USED),
        (8, DESC, MEMORY - 8, USED),
        (8, DESC, AVAIL, (1 << 64) - 4),
    ],
)
def test_what_can_be_no_queue(size: int, desc: int, avail: int, used: int) -> None:
    memory = MemoryMap()
    memory.add(0, GuestMemory(MEMORY))
    with pytest.raises(QueueError):
        Queue(memory, 0, size, desc, avail, used, event_idx=True)


def test_interrupts_by_event_index() -> None:
    rings = Rings()
    rings.descriptor(0, DATA, 1, WRITE)

    def give_back(count: int) -> bool:
        for _ in range(count):
            rings.make_available(0)
            chain = rings.queue.pop()
            assert chain is not None
            rings.queue.push(chain, 0)
        return rings.queue.needs_interrupt()

    def want_after(used_event: int) -> None:
        rings.memory.write(AVAIL + 4 + 2 * 8, struct.pack("<H", used_event))

    want_after(0)
    assert give_back(1)
    assert not rings.queue.needs_interrupt()  # nothing new
    assert not give_back(1)  # the driver still waits for the first
    want_after(4)
    assert not give_back(2)
    assert give_back(1)
    want_after(6)
    assert give_back(5)


def test_interrupts_by_flag() -> None:
    rings = Rings(event_idx=False)
    rings.descriptor(0, DATA, 1, WRITE)
    for flags, wanted in ((0, True), (1, False)):
        rings.memory.write(AVAIL, struct.pack("<H", flags))
        rings.make_available(0)
        chain = rings.queue.pop()
        assert chain is not None
        rings.queue.push(chain, 0)
        assert rings.queue.needs_interrupt() is wanted


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_rings_end_in_a_chain_or_an_error(data: st.DataObject) -> None:
    rings = Rings()
    addresses = st.sampled_from([0, DESC, AVAIL, USED, DATA, MEMORY - 16, MEMORY, (1 << 64) - 16])
    for i in range(8):
        rings.descriptor(
            i,
            data.draw(addresses),
            data.draw(st.sampled_from([0, 1, 16, 32, 4096, 1 << 31, (1 << 32) - 1])),
            data.draw(st.integers(0, 7)),
            data.draw(st.integers(0, 9)),
        )
    for _ in range(data.draw(st.integers(0, 8))):
        rings.make_available(data.draw(st.integers(0, 8)))
    try:
        for chain in rings.queue:
            assert sum(map(len, chain.readable_views())) == chain.readable_bytes
            assert chain.write(b"x" * min(chain.writable_bytes, 100)) == min(chain.writable_bytes, 100)
            rings.queue.push(chain, 0)
    except QueueError:
        pass


@pytest.mark.parametrize("indirect", [False, True])
def test_the_rng_fills_buffers(indirect: bool) -> None:
    with Driver(Rng("rng")) as driver:
        driver.add(0, in_=[8, 8], indirect=indirect)
        driver.kick(0)
        (used,) = driver.used(0)
        assert used.written_bytes == 16 and len(set(used.data)) > 4
        assert driver.interrupts == 1
        driver.add(0, in_=[8192])
        driver.kick(0)
        assert driver.used(0)[0].written_bytes == 4096


def test_a_broken_queue_needs_a_reset_and_works_after_it(caplog: pytest.LogCaptureFixture) -> None:
    with Driver(Rng("rng")) as driver:
        driver.add_raw(0, [(1 << 40, 4, WRITE)])
        driver.kick(0)
        assert driver.broken and not driver.device.active
        assert "rng: queue 0: 4 bytes at guest physical 0x10000000000" in caplog.text
        driver.reset()
        driver.activate()
        driver.add(0, in_=[4])
        driver.kick(0)
        assert len(driver.used(0)) == 1
