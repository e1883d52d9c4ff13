"""The console device (virtio 1.2, section 5.3): ports for bytes, of which some are terminals.

Linux makes ``/dev/hvc0`` of a port that is a console, and ``/dev/vport0pN`` of the others, which udev links to by their names.
Each port has a queue for either direction. A pair of control queues carries what is said about them: which there are, which one
is a console and how large, and who has opened which end (VIRTIO_CONSOLE_F_MULTIPORT).

What the guest writes goes to the port's `output`, on the device's thread; while that takes its time, the guest waits. What the
host sends waits, up to `INPUT_BYTES`, for a guest that opens the port and gives buffers.

The size goes to the guest as columns, then rows, as the specification has it (section 5.3.6.2). Linux read it the other way round
before 6.16; the configuration space, which it reads the right way, holds the size of port 0, so that one starts right everywhere.
"""

import struct
from collections import deque
from collections.abc import Callable, Sequence

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Chain, Queue

VIRTIO_CONSOLE_F_SIZE = 1 << 0
VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
"""VIRTIO_CONSOLE_*, events of control messages."""

CONTROL = struct.Struct("<IHH")
"""virtio_console_control: port, event, value."""

INPUT_BYTES = 64 << 10
OUTPUT_BYTES = 64 << 10
"""Given to `Port.output` at once: a chain may have all of the guest's memory many times over."""
MAX_PORTS = 31
_QUEUE_SIZE = 128
_CONTROL_RX, _CONTROL_TX = 2, 3


class Port:
    """One port. `output` gets what the guest writes. Methods are for any thread."""

    def __init__(self, name: str = "", *, output: Callable[[bytes], object], console: bool = False) -> None:
        """`console`: make a terminal of it. `name` is what udev calls the others, /dev/virtio-ports/NAME."""
        self.name = name
        self.is_console = console
        self.output = output
        self.rows = self.cols = 0
        self.guest_open = False
        """Whether a program in the guest has it open, as far as it has told."""
        self._input: deque[bytes] = deque()
        self._input_bytes = 0
        self._device: Console | None = None
        self._id = 0

    def send(self, data: bytes) -> int:
        """Have the guest read `data`. Returns how many bytes were taken; the others don't fit now."""
        taken = data[: max(0, INPUT_BYTES - self._input_bytes)]
        if taken and self._device is not None:
            self._input_bytes += len(taken)
            self._device.reactor.call(lambda: self._queue(taken))
        return len(taken)

    def resize(self, rows: int, cols: int) -> None:
        """Tell the guest the size of the terminal at our end."""
        self.rows, self.cols = rows, cols
        if self._device is not None:
            device = self._device
            device.reactor.call(lambda: device.resized(self))

    def _queue(self, data: bytes) -> None:
        self._input.append(data)
        assert self._device is not None
        self._device.deliver(self._id)


class Console(VirtioDevice):
    """A device with `ports`, the first of which is to be a console."""

    device_id = 3
    features = VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_MULTIPORT

    def __init__(self, ports: Sequence[Port], *, name: str = "virtio-console") -> None:
        """From 1 to `MAX_PORTS` ports."""
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"{name}: {len(ports)} ports: from 1 to {MAX_PORTS}")
        self.ports = tuple(ports)
        # Port 0's two queues, the control queues, then two for each other port.
        self.queue_sizes = (_QUEUE_SIZE,) * (2 + 2 * len(ports))
        self._queues: Sequence[Queue | None] = ()
        self._multiport = False
        self._announced = False
        self._control: deque[bytes] = deque()
        super().__init__(name)
        for i, port in enumerate(ports):
            port._device, port._id = self, i

    def config(self) -> bytes:
        """Columns and rows of port 0, and how many ports there may be."""
        first = self.ports[0]
        return struct.pack("<HHII", first.cols & 0xFFFF, first.rows & 0xFFFF, len(self.ports), 0)

    def activate(self, features: int, queues: Sequence[Queue | None]) -> None:
        """Ports are announced when the driver asks."""
        self._queues = queues
        self._multiport = bool(features & VIRTIO_CONSOLE_F_MULTIPORT)
        if not self._multiport:
            self.ports[0].guest_open = True

    def reset(self) -> None:
        """No end in the guest is open any more."""
        self._queues = ()
        self._announced = False
        self._control.clear()
        for port in self.ports:
            port.guest_open = False

    def queue_notified(self, queue: Queue) -> None:
        """Take what the guest sent, or use the buffers that it gave."""
        if queue.index == _CONTROL_TX:
            for chain in queue:
                self._take_control(chain)
                queue.push(chain, 0)
            self.signal(queue)
        elif queue.index == _CONTROL_RX:
            self._send_control()
        elif queue.index % 2:
            port = self.ports[_port_of(queue.index)]
            for chain in queue:
                for at in range(0, chain.readable_bytes, OUTPUT_BYTES):
                    port.output(chain.read(at, OUTPUT_BYTES))
                    if not self.active:
                        return
                queue.push(chain, 0)
            self.signal(queue)
        else:
            self.deliver(_port_of(queue.index))

    def deliver(self, id: int) -> None:
        """Give the guest what waits for port `id`. On the device's thread."""
        port, index = self.ports[id], _input_queue(id)
        queue = self._queues[index] if self._queues else None
        if queue is None or not self.active or not port.guest_open:
            return
        pushed = False
        while port._input and (chain := queue.pop()) is not None:
            data = port._input.popleft()
            written = chain.write(data)
            if written < len(data):
                port._input.appendleft(data[written:])
            port._input_bytes -= written
            queue.push(chain, written)
            pushed = True
        if pushed:
            self.signal(queue)

    def resized(self, port: Port) -> None:
        """Tell the driver of a port's size. On the device's thread."""
        if self._multiport and self._announced and port.is_console:
            self._say(port._id, RESIZE, 1, struct.pack("<HH", port.cols & 0xFFFF, port.rows & 0xFFFF))
        elif port._id == 0:
            self.config_changed()

    def _take_control(self, chain: Chain) -> None:
        data = chain.read(0, CONTROL.size)
        if len(data) < CONTROL.size:
            return
        id, event, value = CONTROL.unpack(data)
        if event == DEVICE_READY:
            if value and not self._announced:
                self._announced = True
                for i in range(len(self.ports)):
                    self._say(i, PORT_ADD, 1)
        elif id < len(self.ports):
            port = self.ports[id]
            if event == PORT_READY and value:
                self._describe(port)
            elif event == PORT_OPEN:
                port.guest_open = bool(value)
                self.deliver(id)

    def _describe(self, port: Port) -> None:
        if port.is_console:
            self._say(port._id, CONSOLE_PORT, 1)
            if port.cols:
                self.resized(port)
        if port.name:
            self._say(port._id, PORT_NAME, 1, port.name.encode() + b"\0")
        self._say(port._id, PORT_OPEN, 1)

    def _say(self, id: int, event: int, value: int, more: bytes = b"") -> None:
        # A driver that asks again and again without giving buffers gets no more than it can have asked for once.
        if len(self._control) < 8 * len(self.ports):
            self._control.append(CONTROL.pack(id, event, value) + more)
        self._send_control()

    def _send_control(self) -> None:
        queue = self._queues[_CONTROL_RX] if len(self._queues) > _CONTROL_RX else None
        if queue is None:
            return
        pushed = False
        while self._control and (chain := queue.pop()) is not None:
            queue.push(chain, chain.write(self._control.popleft()))
            pushed = True
        if pushed:
            self.signal(queue)


def _input_queue(id: int) -> int:
    """The queue that port `id` is written by: 0, then from 4 on."""
    return 0 if id == 0 else 2 + 2 * id


def _port_of(index: int) -> int:
    return 0 if index < 2 else index // 2 - 1
