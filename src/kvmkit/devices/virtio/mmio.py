"""Virtio over MMIO (virtio 1.2, section 4.2): a device behind a page of registers and one interrupt.

The driver's kicks reach the device by ioeventfd and its interrupts go out by irqfd, so neither passes through a vCPU's exit;
all else is rare. The interrupt is an edge: the status register has been set before, and its handler reads that again.
"""

import os
import select
import threading
from contextlib import suppress
from functools import partial

from kvmkit.devices.virtio.device import VirtioDevice
from kvmkit.devices.virtio.queue import Queue, QueueError
from kvmkit.kvm import MemoryMap, Vm
from kvmkit.uapi import common

PAGE_BYTES = 4096
_MAGIC, _VERSION, _VENDOR = 0x74726976, 2, 0x4D4B564B


class _Reg:
    """Register offsets (section 4.2.2)."""

    MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
    DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x010, 0x014, 0x020, 0x024
    QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
    INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
    QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x080, 0x090, 0x0A0
    SHM_LEN, SHM_BASE_END = 0x0B0, 0x0C0
    CONFIG_GENERATION, CONFIG = 0x0FC, 0x100


# Device status (section 2.1).
_S_DRIVER_OK, _S_FEATURES_OK, _S_NEEDS_RESET = 4, 8, 64

_INT_VRING, _INT_CONFIG = 1, 2

VIRTIO_RING_F_INDIRECT_DESC = 1 << 28
VIRTIO_RING_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
_TRANSPORT_FEATURES = VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_VERSION_1


class _QueueRegisters:
    """What the driver wrote about one queue."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        self.addresses = {_Reg.QUEUE_DESC: 0, _Reg.QUEUE_DRIVER: 0, _Reg.QUEUE_DEVICE: 0}


class VirtioMmio:
    """The registers of `device`, at `base` in the guest's memory, with interrupt `gsi`. A `kvmkit.devices.bus.Device`.

    Registers are used by one vCPU at a time: `read` and `write` lock.
    """

    def __init__(self, device: VirtioDevice, vm: Vm, memory: MemoryMap, *, base: int, gsi: int) -> None:
        """Raises `OSError` if the engine has no irqfd."""
        self.device = device
        self.base = base
        self.gsi = gsi
        self._vm = vm
        self._memory = memory
        self._lock = threading.Lock()
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        self._generation = 0
        self._irq = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            vm.irqfd(self._irq, gsi)
        except BaseException:
            os.close(self._irq)
            raise
        self._kicks: list[tuple[int, int]] = []
        """Queue and eventfd of each kick that reaches the device without an exit."""
        self._clear()
        device.interrupt = self._interrupt_used
        device.interrupt_config = self._interrupt_config
        device.needs_reset = self._needs_reset

    def _clear(self) -> None:
        self._status = 0
        self._features = 0
        self._features_sel = self._driver_features_sel = self._queue_sel = 0
        self._registers = [_QueueRegisters() for _ in self.device.queue_sizes]
        with self._interrupt_lock:
            self._interrupt_status = 0

    def read(self, offset: int, size: int) -> int:
        """Read a register or the configuration space."""
        if offset >= _Reg.CONFIG:
            data = self.device.config()[offset - _Reg.CONFIG : offset - _Reg.CONFIG + size]
            return int.from_bytes(data, "little")
        if size != 4 or offset % 4:
            return 0
        with self._lock:
            return self._read_register(offset) & 0xFFFFFFFF

    def _read_register(self, offset: int) -> int:
        queue = self._registers[self._queue_sel] if self._queue_sel < len(self._registers) else None
        match offset:
            case _Reg.MAGIC_VALUE:
                return _MAGIC
            case _Reg.VERSION:
                return _VERSION
            case _Reg.DEVICE_ID:
                return self.device.device_id
            case _Reg.VENDOR_ID:
                return _VENDOR
            case _Reg.DEVICE_FEATURES:
                offered = self.device.features | _TRANSPORT_FEATURES
                return offered >> 32 * self._features_sel if self._features_sel < 2 else 0
            case _Reg.QUEUE_NUM_MAX:
                return self.device.queue_sizes[self._queue_sel] if queue else 0
            case _Reg.QUEUE_READY:
                return int(queue.ready) if queue else 0
            case _Reg.INTERRUPT_STATUS:
                return self._interrupt_status
            case _Reg.STATUS:
                return self._status
            case _Reg.CONFIG_GENERATION:
                return self._generation
        if _Reg.SHM_LEN <= offset < _Reg.SHM_BASE_END:
            return -1  # no such region
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register or the configuration space."""
        if offset >= _Reg.CONFIG:
            data = value.to_bytes(size, "little")
            with suppress(RuntimeError):  # the device is being closed
                self.device.reactor.call_and_wait(
                    lambda: self.device.write_config(offset - _Reg.CONFIG, data)
                )
            return
        if size != 4 or offset % 4:
            return
        with self._lock:
            self._write_register(offset, value)

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case _Reg.DEVICE_FEATURES_SEL:
                self._features_sel = value
            case _Reg.DRIVER_FEATURES:
                if self._driver_features_sel < 2 and not self._status & _S_FEATURES_OK:
                    shift = 32 * self._driver_features_sel
                    self._features = self._features & ~(0xFFFFFFFF << shift) | value << shift
            case _Reg.DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case _Reg.QUEUE_SEL:
                self._queue_sel = value
            case _Reg.QUEUE_NOTIFY:  # only where the engine has no ioeventfd for it, or the queue isn't ready
                self._kick(value)
            case _Reg.INTERRUPT_ACK:
                with self._interrupt_lock:
                    self._interrupt_status &= ~value
            case _Reg.STATUS:
                self._write_status(value)
            case _ if self._queue_sel < len(self._registers) and not self._status & _S_DRIVER_OK:
                self._write_queue(self._registers[self._queue_sel], offset, value)

    def _write_queue(self, queue: _QueueRegisters, offset: int, value: int) -> None:
        if offset == _Reg.QUEUE_NUM:
            queue.size = value
        elif offset == _Reg.QUEUE_READY:
            queue.ready = bool(value & 1)
        elif (low := offset & ~4) in queue.addresses:
            shift = 8 * (offset & 4)
            queue.addresses[low] = queue.addresses[low] & ~(0xFFFFFFFF << shift) | value << shift

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        if value & _S_FEATURES_OK and not self._status & _S_FEATURES_OK:
            offered = self.device.features | _TRANSPORT_FEATURES
            if self._features & ~offered or not self._features & VIRTIO_F_VERSION_1:
                value &= ~_S_FEATURES_OK  # the driver reads it back and gives up
        was = self._status
        self._status = value & ~_S_NEEDS_RESET | was
        if value & _S_DRIVER_OK and not was & _S_DRIVER_OK and self._status & _S_FEATURES_OK:
            self._activate()

    def _activate(self) -> None:
        device, event_idx = self.device, bool(self._features & VIRTIO_RING_F_EVENT_IDX)
        try:
            queues = [
                self._queue(index, registers, event_idx) if registers.ready else None
                for index, registers in enumerate(self._registers)
            ]
        except QueueError as error:
            device.fail(error)
            return
        features = self._features

        def activate() -> None:
            device.active = True
            device.activate(features, queues)

        for queue in filter(None, queues):
            self._watch(queue)
        try:
            device.reactor.call_and_wait(activate)
        except RuntimeError:
            return  # the device is being closed
        except Exception as error:
            device.fail(error)
            return
        # What the driver put into the queues before all this comes without another kick.
        for queue in filter(None, queues):
            self._kick(queue.index)

    def _queue(self, index: int, registers: _QueueRegisters, event_idx: bool) -> Queue:
        if registers.size > self.device.queue_sizes[index]:
            raise QueueError(
                f"queue {index}: a size of {registers.size}, at most {self.device.queue_sizes[index]}"
            )
        desc, avail, used = registers.addresses.values()
        return Queue(self._memory, index, registers.size, desc, avail, used, event_idx=event_idx)

    def _watch(self, queue: Queue) -> None:
        """Have the engine signal an eventfd for the driver's kicks of `queue`, and the device's thread wait for it."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        device = self.device

        def kicked(_: int) -> None:
            with suppress(BlockingIOError):
                os.eventfd_read(fd)
            if device.active:
                device.queue_notified(queue)

        self._vm.ioeventfd(
            self.base + _Reg.QUEUE_NOTIFY, 4, fd, queue.index, common.KVM_IOEVENTFD_FLAG_DATAMATCH
        )
        self._kicks.append((queue.index, fd))
        device.reactor_for(queue.index).add(fd, select.EPOLLIN, kicked)

    def _kick(self, index: int) -> None:
        for queue, fd in self._kicks:
            if queue == index:
                os.eventfd_write(fd, 1)

    def _reset(self) -> None:
        device = self.device
        device.active = False
        with suppress(RuntimeError):  # the device is being closed
            for (
                index,
                fd,
            ) in self._kicks:  # each thread finishes what it does, and hears of no kick after this
                reactor = device.reactor_for(index)
                reactor.call_and_wait(partial(reactor.remove, fd))
            device.reactor.call_and_wait(device.reset)
        self._unwatch()
        self._clear()

    def _unwatch(self) -> None:
        for index, fd in self._kicks:
            with suppress(OSError):  # the VM may be gone
                self._vm.ioeventfd(
                    self.base + _Reg.QUEUE_NOTIFY,
                    4,
                    fd,
                    index,
                    common.KVM_IOEVENTFD_FLAG_DATAMATCH | common.KVM_IOEVENTFD_FLAG_DEASSIGN,
                )
            os.close(fd)
        self._kicks.clear()

    def _interrupt_used(self) -> None:
        self._raise(_INT_VRING)

    def _interrupt_config(self) -> None:
        self._generation = self._generation + 1 & 0xFFFFFFFF
        self._raise(_INT_CONFIG)

    def _needs_reset(self) -> None:
        self._status |= _S_NEEDS_RESET
        if self._status & _S_DRIVER_OK:
            self._raise(_INT_CONFIG)

    def _raise(self, bits: int) -> None:
        with self._interrupt_lock:
            self._interrupt_status |= bits
            if self._irq >= 0:
                os.eventfd_write(self._irq, 1)

    def close(self) -> None:
        """Reset and close the device, release the descriptors. No vCPU runs any more. Closing twice does nothing."""
        with self._lock:
            self._reset()
        self.device.close()
        with self._interrupt_lock:
            fd, self._irq = self._irq, -1
        if fd >= 0:
            with suppress(OSError):  # the VM may be gone
                self._vm.irqfd(fd, self.gsi, common.KVM_IRQFD_FLAG_DEASSIGN)
            os.close(fd)
