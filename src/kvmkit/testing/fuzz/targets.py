"""What there is to fuzz: each device with a driver, what of the host must not change, and a check that it still works.

`TARGETS` names them. `run` makes one of a seed and feeds it; the same seed makes the same steps, but where threads of device and
driver race for a ring.
"""

import os
import stat
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from kvmkit import kvm
from kvmkit.devices.block import Overlay, RawFile
from kvmkit.devices.block.backend import Backend
from kvmkit.devices.fuse.passthrough import PassthroughFs
from kvmkit.devices.virtio.blk import Blk
from kvmkit.devices.virtio.console import CONTROL, DEVICE_READY, INPUT_BYTES, Console, Port
from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.fs import Fs
from kvmkit.devices.virtio.mmio import VirtioMmio
from kvmkit.devices.virtio.net import RECEIVE, Net
from kvmkit.devices.virtio.queue import Queue, QueueError
from kvmkit.devices.virtio.rng import Rng
from kvmkit.devices.virtio.vsock import BUF_ALLOC_BYTES, MAX_CONNECTIONS, Vsock
from kvmkit.kvm import GuestMemory, MemoryMap
from kvmkit.testing import frames
from kvmkit.testing.fuse import Fuse
from kvmkit.testing.fuzz import blk, console, fs, mmio, net, rings, vsock
from kvmkit.testing.net import MemoryBackend
from kvmkit.testing.virtqueue import Driver
from kvmkit.testing.vsock import CID, PORT, REQUEST, RESPONSE, RX, TX, Packet, listening

_RING_STEPS = 0.1
"""The part of steps that is about rings; each takes many chains."""


class Watched(VirtioDevice):
    """Keeps apart the failures that are the guest's and those that are bugs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As the device that it is."""
        self.broken: Counter[str] = Counter()
        """How often a queue was broken in which way."""
        self.bugs: list[Exception] = []
        super().__init__(*args, **options)

    def fail(self, error: Exception) -> None:
        """Count."""
        if isinstance(error, QueueError):
            self.broken[_kind(error)] += 1
        else:
            self.bugs.append(error)
        super().fail(error)


def _kind(error: Exception) -> str:
    """A message without its numbers."""
    words = str(error).partition(": ")[2].split()
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in words)


class _Rng(Watched, Rng):
    pass


class _Blk(Watched, Blk):
    pass


class _Console(Watched, Console):
    pass


class _Net(Watched, Net):
    pass


class _Fs(Watched, Fs):
    pass


class _Vsock(Watched, Vsock):
    pass


class Target(ABC):
    """A device to fuzz, its files in an empty `directory`. Leaving its `stack` ends it."""

    driver: Driver

    def __init__(self, rng: Random, directory: Path) -> None:
        """Make the device; `rng` chooses of what kind."""
        self.rng = rng
        self.directory = directory
        self.stack = ExitStack()
        outside = directory / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"untouched")
        (outside / "link").symlink_to("file")
        (outside / "directory").mkdir()
        self.device = self.make()
        self.driver = self.stack.enter_context(Driver(self.device, event_idx=rng.random() < 0.8))
        self.stack.callback(
            self.driver.reset
        )  # as the transport does, so that no device keeps the guest's memory
        self._before = self.unchanging()

    @abstractmethod
    def make(self) -> Watched:
        """Return the device."""

    @abstractmethod
    def feed(self) -> None:
        """One step of a hostile driver of this device."""

    @abstractmethod
    def works(self) -> None:
        """After a reset, the device does what it is for. `AssertionError`, `TimeoutError`."""

    @property
    def chains(self) -> int:
        """Chains that the device took."""
        return self.driver.chains

    def step(self) -> None:
        """Feed the device, its rings now and then, its configuration seldom."""
        chance = self.rng.random()
        if chance < _RING_STEPS:
            rings.mutate_and_feed(self.rng, self.driver)
        elif chance < _RING_STEPS + 0.01:
            offset, data = (
                self.rng.choice((0, 32, self.rng.getrandbits(12))),
                self.rng.randbytes(self.rng.choice((1, 2, 4, 8))),
            )
            self.device.reactor.call_and_wait(lambda: self.device.write_config(offset, data))
            self.device.config()
        else:
            self.feed()
        self.raise_bugs()

    def raise_bugs(self) -> None:
        """Raise what made the device fail and wasn't the guest's."""
        if self.device.bugs:
            raise self.device.bugs[0]

    def reset(self) -> None:
        """Begin anew."""
        self.driver.reset()
        self.driver.activate()

    def unchanging(self) -> object:
        """What of the host the guest has no business with, as it is now."""
        return listing(self.directory / "outside")

    def check(self) -> None:
        """The host is untouched: `AssertionError`."""
        after = self.unchanging()
        assert after == self._before, f"the host has changed: {self._before} → {after}"


def listing(directory: Path) -> dict[str, tuple[object, ...]]:
    """All below a directory, with content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        found[os.fspath(path.relative_to(directory))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            status.st_mtime_ns,
            status.st_ino,
            content,
        )
    return found


class RngTarget(Target):
    """Entropy."""

    def make(self) -> Watched:
        """The only kind."""
        return _Rng("rng")

    def feed(self) -> None:
        """Requests of any shape."""
        for _ in range(self.rng.randint(1, 8)):
            if len(self.driver.rings[0].free) > 4:
                out = [bytes(self.rng.randint(1, 100))] * self.rng.choice((0, 0, 0, 1))
                in_ = [
                    self.rng.choice((1, 64, 4096, 4097, 1 << 20))
                    for _ in range(self.rng.randint(1 - len(out), 3))
                ]
                self.driver.add(0, out, in_, indirect=self.rng.random() < 0.5)
        self.driver.kick(0)
        for used in self.driver.used(0):
            assert used.written_bytes <= min(4096, len(used.data))

    def works(self) -> None:
        """Entropy comes."""
        self.driver.add(0, in_=[64])
        self.driver.kick(0)
        (used,) = self.driver.used(0)
        assert used.written_bytes == 64 and any(used.data)


class BlkTarget(Target):
    """A disk of 100 sectors: a file, read-only or not, or an overlay of one."""

    _BYTES = 512 * 100

    def make(self) -> Watched:
        """One of those kinds, with up to three queues."""
        self._kind = self.rng.choice(("raw", "read-only", "overlay", "temporary"))
        self._path = self.directory / "image"
        self._path.write_bytes(self.rng.randbytes(self._BYTES))
        backend: Backend
        match self._kind:
            case "raw":
                backend = RawFile(self._path, False)
            case "read-only":
                backend = RawFile(self._path, True)
            case "overlay":
                backend = Overlay.create(self.directory / "overlay", self._path)
            case _:
                backend = Overlay.temporary(RawFile(self._path, True))
        return _Blk(backend, name="disk", serial="fuzzed", queues=self.rng.randint(1, 3))

    def feed(self) -> None:
        """Requests."""
        blk.mutate_and_feed(self.rng, self.driver)

    def unchanging(self) -> object:
        """The image's size too, and its bytes unless they are the guest's to write."""
        files = sorted(path.name for path in self.directory.iterdir())
        return (
            super().unchanging(),
            files,
            self._path.stat().st_size,
            self._kind == "raw" or self._path.read_bytes(),
        )

    def works(self) -> None:
        """What is written is read."""
        writes = self._kind != "read-only"
        data = self.rng.randbytes(512)
        if writes:
            assert self._request(1, [data]) == b"\0"
        assert self._request(0, [], [512])[:512] == (
            data if writes else self._path.read_bytes()[3 * 512 : 4 * 512]
        )

    def _request(self, type_: int, out: list[bytes], in_: list[int] | None = None) -> bytes:
        self.driver.add(0, [struct.pack("<IIQ", type_, 0, 3), *out], [*(in_ or []), 1])
        self.driver.kick(0)
        return self.driver.used(0)[0].data


class ConsoleTarget(Target):
    """A terminal and two ports."""

    def make(self) -> Watched:
        """Ports that drop what comes."""
        self._largest = 0

        def output(data: bytes) -> None:
            self._largest = max(self._largest, len(data))

        return _Console(
            [Port(console=True, output=output), Port("a", output=output), Port("b", output=output)]
        )

    def feed(self) -> None:
        """Control messages and buffers."""
        console.mutate_and_feed(self.rng, self.driver)

    def check(self) -> None:
        """Nothing piles up, too."""
        super().check()
        assert isinstance(self.device, Console)
        assert self._largest <= 1 << 20, f"{self._largest} bytes of output at once"
        for port in self.device.ports:
            assert 0 <= port._input_bytes <= INPUT_BYTES
            assert sum(map(len, port._input)) <= INPUT_BYTES
        assert len(self.device._control) <= 4096, "control messages pile up"

    def works(self) -> None:
        """Ports are announced."""
        for _ in range(3):
            self.driver.add(2, in_=[64])
        self.driver.add(3, [CONTROL.pack(0xFFFFFFFF, DEVICE_READY, 1)])
        self.driver.kick(3)
        self.driver.kick(2)
        assert [CONTROL.unpack(used.data[:8]) for used in self.driver.used(2)] == [
            (i, 1, 1) for i in range(3)
        ]


class NetTarget(Target):
    """A card on a network that takes everything."""

    def make(self) -> Watched:
        """With offloads or not, of any MTU."""
        self._backend = MemoryBackend(self.rng.choice((0, net.OFFLOADS)), self.rng.choice((68, 1500, 65520)))
        return _Net(self._backend, mac=frames.GUEST_MAC)

    def feed(self) -> None:
        """Packets; those that come out are as the network allows."""
        net.mutate_and_feed(self.rng, self.driver)
        for header, frame in self._backend.sent:
            longest = 65535 if header[1] else self._backend.mtu_bytes
            assert len(header) == 12 and 14 <= len(frame) <= longest + 18
        self._backend.sent.clear()
        while len(self._backend.waiting) > 100:
            self._backend.waiting.popleft()

    def works(self) -> None:
        """A frame arrives."""
        for _ in range(8):
            self.driver.add(RECEIVE, in_=[1526])
        self._backend.waiting.clear()  # one may wait in the device
        self.driver.kick(RECEIVE)
        self._backend.give(b"frame" * 12)
        assert b"frame" * 12 in [used.data[12 : used.written_bytes] for used in self.driver.used(RECEIVE)]


class FsTarget(Target):
    """A shared directory beside what isn't shared."""

    def __init__(self, rng: Random, directory: Path) -> None:
        """Deep below `directory`: if the device lets the guest out, it is found out before it has climbed to what matters."""
        directory = directory.joinpath(*["deep"] * 64)
        directory.mkdir(parents=True)
        super().__init__(rng, directory)

    def make(self) -> Watched:
        """Read-only or not."""
        self._read_only = self.rng.random() < 0.3
        self._shared = self.directory / "shared"
        (self._shared / "dir").mkdir(parents=True)
        (self._shared / "a").write_bytes(b"content")
        (self._shared / "link").symlink_to("../outside/file")
        (self._shared / "out").symlink_to("../outside")
        return _Fs("tag", PassthroughFs(self._shared, read_only=self._read_only), name="fs")

    def feed(self) -> None:
        """FUSE requests."""
        fs.mutate_and_feed(self.rng, self.driver)

    def unchanging(self) -> object:
        """The read-only share too."""
        top = sorted(path.name for path in self.directory.iterdir())
        return super().unchanging(), top, listing(self._shared) if self._read_only else None

    def works(self) -> None:
        """The root is there, and a file can be made."""
        guest = Fuse(self.driver)
        assert stat.S_ISDIR(guest.getattr(1).mode)
        if not self._read_only:
            os.chmod(self._shared, 0o755)  # the guest may have taken its own rights away
            entry, handle = guest.create(1, b"made after all")
            assert guest.write(entry.nodeid, handle, b"alive") == 5
            assert (self._shared / "made after all").read_bytes() == b"alive"


class VsockTarget(Target):
    """The socket device, programs that use it, and a socket that isn't its."""

    def make(self) -> Watched:
        """With one port that a program listens at."""
        path = self.directory / "v"
        server = self.stack.enter_context(listening(path, PORT))
        server.setblocking(False)
        self._other = self.stack.enter_context(listening(self.directory / "other", PORT))
        self._other.setblocking(False)
        self._host_stack = self.stack.enter_context(ExitStack())
        self._host = vsock.Host(self._host_stack, server, path, self.rng)
        return _Vsock(CID, path)

    def feed(self) -> None:
        """Packets, and what the host's programs do."""
        vsock.mutate_and_feed(self.rng, self.driver)
        self._host.act(self.rng.randrange(6))
        if len(self._host.sockets) > 200:
            self._end_programs()

    def _end_programs(self) -> None:
        self._host_stack.close()
        self._host.sockets.clear()

    def check(self) -> None:
        """What always holds of the device's books, too, and that nobody came to the other socket."""
        super().check()
        device = self.device
        assert isinstance(device, Vsock)

        def run() -> None:
            assert len(device._all) <= MAX_CONNECTIONS
            for connection in device._all:
                assert len(connection.kept) <= BUF_ALLOC_BYTES
                assert connection.told_shutdown & ~connection.host_shutdown == 0

        device.reactor.call_and_wait(run)
        try:
            self._other.accept()
        except BlockingIOError:
            return
        raise AssertionError("the device connected to a socket that isn't its")

    def unchanging(self) -> object:
        """The sockets' names too."""
        return super().unchanging(), sorted(path.name for path in self.directory.iterdir())

    def works(self) -> None:
        """The guest can connect."""
        self._end_programs()
        for _ in range(64):
            self.driver.add(RX, in_=[4096])
        self.driver.kick(RX)
        path = self.directory / "v"
        with listening(path, 7) as server:
            self.driver.add(TX, [Packet(REQUEST, host_port=7).pack()])
            self.driver.kick(TX)
            answers = [Packet.from_device(u.data[: u.written_bytes]) for u in self.driver.wait_used(RX)]
            while not any(p.op == RESPONSE and p.host_port == 7 for p in answers):
                answers += [Packet.from_device(u.data[: u.written_bytes]) for u in self.driver.wait_used(RX)]
            server.accept()[0].close()
        os.unlink(f"{path}_7")


class MmioTarget(Target):
    """The transport's registers, with an entropy device behind them, on the software engine."""

    def __init__(self, rng: Random, directory: Path) -> None:
        """A VM with nothing but that."""
        self.rng, self.directory, self.stack = rng, directory, ExitStack()
        (directory / "outside").mkdir()
        system = self.stack.enter_context(kvm.open("soft"))
        vm = self.stack.enter_context(system.create_vm())
        vm.create_irqchip()
        self._memory = MemoryMap()
        self._memory.add(0, GuestMemory(1 << 20))
        self.stack.callback(self._close_memory)
        self.device = self._entropy = _CountingRng("rng")
        self._transport = VirtioMmio(self.device, vm, self._memory, base=0xD0000000, gsi=16)
        self.stack.callback(self._transport.close)
        self._before = self.unchanging()

    def make(self) -> Watched:
        """Not so."""
        raise NotImplementedError

    def _close_memory(self) -> None:
        with suppress(BufferError):  # a log holds an error, which holds a queue
            self._memory.close()

    @property
    def chains(self) -> int:
        """Chains that the device took."""
        return self._entropy.chains

    def step(self) -> None:
        """Feed it."""
        self.feed()
        self.raise_bugs()

    def feed(self) -> None:
        """Register writes, and rings behind them."""
        mmio.mutate_and_feed(self.rng, self._transport, self._memory)

    def reset(self) -> None:
        """By the status register."""
        self._transport.write(0x70, 4, 0)

    def works(self) -> None:
        """A driver that does all right gets entropy."""
        assert mmio.request(self._transport, self._memory) == 64


class _CountingRng(_Rng):
    """Counts the chains, as its queues aren't a `Driver`'s."""

    chains = 0

    def queue_notified(self, queue: Queue) -> None:
        """Count those that were taken."""
        before = queue.next_avail
        try:
            super().queue_notified(queue)
        except QueueError:
            self.chains += 1
            raise
        finally:
            self.chains += queue.next_avail - before & 0xFFFF


TARGETS: dict[str, Callable[[Random, Path], Target]] = {
    "mmio": MmioTarget,
    "rng": RngTarget,
    "console": ConsoleTarget,
    "blk": BlkTarget,
    "net": NetTarget,
    "vsock": VsockTarget,
    "fs": FsTarget,
}


@dataclass
class Outcome:
    """What came of one seed."""

    chains: int = 0
    resets: int = 0
    """After a broken queue."""
    errors: dict[str, int] = field(default_factory=dict)
    """How often a queue was broken in which way."""


def run(name: str, seed: int, chains: int, directory: Path) -> Outcome:
    """Feed the target of that name at least `chains` chains; whatever is raised is a bug, of the device or of this."""
    rng = Random(f"{name} {seed}")
    target = TARGETS[name](rng, directory)
    with target.stack:
        while target.chains < chains:
            target.step()
        target.check()
        target.reset()
        target.works()
        target.raise_bugs()
        target.check()
        broken = target.device.broken
        return Outcome(target.chains, sum(broken.values()), dict(broken))
