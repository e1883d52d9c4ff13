"""Interrupt lines: from GSIs by the routing table to the PIC, the IOAPIC and messages (``virt/kvm/irqchip.c``)."""

import errno
import os
import threading
from collections.abc import Sequence

from kvmkit import _engine
from kvmkit.kvm.soft import eventfd
from kvmkit.kvm.soft.x86 import i8254, i8259, ioapic
from kvmkit.uapi import common as c
from kvmkit.uapi import x86 as x
from kvmkit.uapi.errors import ioctl_error

_PIC_PORTS = frozenset(i8259.PORTS)
_PIT_PORTS = frozenset(i8254.PORTS)

MAX_GSIS = 4096

_Pin = tuple[int, int]
"""KVM_IRQCHIP_* and pin."""


_PIT_GSI = 0
_PIT_PIN: _Pin = (x.KVM_IRQCHIP_PIC_MASTER, 0)


class IrqChip:
    """PIC, IOAPIC, and the PIT once it is created. Any thread may call; one lock guards all chips."""

    def __init__(self, vm: _engine.Vm) -> None:
        """Create the chips of KVM_CREATE_IRQCHIP with the kernel's default routing."""
        self._vm = vm
        self.lock = threading.RLock()
        self.pins: dict[int, list[_Pin]] = {}
        self.msis: dict[int, list[tuple[int, int]]] = {}
        self.pic = i8259.Pic(
            vm.set_extint, self._publish, lambda line: self._ended(_PIC_CHIPS[line >> 3], line & 7)
        )
        self.ioapic = ioapic.Ioapic(
            vm.send_message, self._publish, lambda pin: self._ended(x.KVM_IRQCHIP_IOAPIC, pin)
        )
        self.resamplers = eventfd.Resamplers(self._resampled)
        self._levels: dict[int, list[int]] = {}
        """Of lines that are up or were: what user space drives, and what resampling irqfds do."""
        self.pit: i8254.I8254 | None = None
        for gsi in range(ioapic.PINS):
            self.pins[gsi] = [(x.KVM_IRQCHIP_IOAPIC, gsi)]
            if gsi < 16:
                self.pins[gsi].append(
                    (x.KVM_IRQCHIP_PIC_SLAVE if gsi >= 8 else x.KVM_IRQCHIP_PIC_MASTER, gsi & 7)
                )
        self._publish()
        # Edges that arrive without Python (irqfd, PIT) but concern the PIC or a level-triggered pin wait here.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._closing = False
        vm.set_wake_fd(self._wake)
        self._thread = threading.Thread(target=self._serve, name="kvm-irqchip", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        if not self._closing:
            self._closing = True
            self._vm.set_wake_fd(-1)
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            os.close(self._wake)
            self.resamplers.close()

    def _serve(self) -> None:
        while True:
            os.eventfd_read(self._wake)
            if self._closing:
                return
            for gsi in self._vm.take_lines():
                with self.lock:
                    if not (gsi == _PIT_GSI and self._tick_waits() and self._vm.pit_missed()):
                        self.pulse(gsi)

    def _tick_waits(self) -> bool:
        """Whether the PIC holds a tick of the PIT's that the guest hasn't finished with."""
        pic = self.pic.chips[0]
        return bool((pic.irr & ~pic.imr | pic.isr) & 1) and _PIT_PIN in self.pins.get(_PIT_GSI, ())

    def create_pit(self) -> None:
        """KVM_CREATE_PIT2."""
        self.pit = i8254.I8254(_engine.monotonic_raw_ns, self._vm.arm_pit, self._vm.cancel_pit)

    def set_routing(self, entries: Sequence[c.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING; EINVAL for what can't be routed to."""
        pins, msis = _parse(entries, _CHIP_PINS)
        with self.lock:
            self.pins, self.msis = pins, msis
            self._publish()

    def _publish(self) -> None:
        """Compile what an edge on each GSI does into the engine's table."""
        routes = []
        for gsi in self.pins.keys() | self.msis.keys():
            messages, python = [], False
            for chip, pin in self.pins.get(gsi, ()):
                if chip == x.KVM_IRQCHIP_IOAPIC:
                    python |= self.ioapic.is_level(pin)
                    message = self.ioapic.edge_message(pin)
                    messages += [message] if message else []
                else:
                    # A masked input still latches its edge, for when it is unmasked; not so once the whole PIC is
                    # retired in favour of the IOAPIC, which is the case that must be fast.
                    python |= not self.pic.retired
            routes.append((gsi, messages, self.msis.get(gsi, []), python))
        self._vm.set_routes(routes)

    def line(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: drive GSI `gsi`; the sum of what its routes say that don't say -1, or -1."""
        return self._line(gsi, level, 0)

    def _resampled(self, gsi: int, level: int) -> None:
        self._line(gsi, level, 1)

    def _ended(self, chip: int, pin: int) -> None:
        if self.pit and (chip, pin) == _PIT_PIN:
            self._vm.pit_again()
        for gsi in self.resamplers.raised():
            if (chip, pin) in self.pins.get(gsi, ()):
                self.resamplers.ended(gsi)

    def _line(self, gsi: int, level: int, source: int) -> int:
        with self.lock:
            if gsi in self.pins:
                levels = self._levels.setdefault(gsi, [0, 0])
                levels[source] = level
                level = int(any(levels))
            said = []
            for chip, pin in self.pins.get(gsi, ()):
                if chip == x.KVM_IRQCHIP_IOAPIC:
                    said.append(self.ioapic.set_irq(pin, level))
                else:
                    said.append(self.pic.set_irq(pin + 8 * (chip == x.KVM_IRQCHIP_PIC_SLAVE), level))
            return _status([*said, *_send_msis(self._vm, self.msis, gsi, level)])

    def pulse(self, gsi: int) -> None:
        """Raise and lower GSI `gsi`."""
        with self.lock:
            self.line(gsi, 1)
            self.line(gsi, 0)

    def owns_port(self, port: int) -> bool:
        """Whether `port` belongs to a chip."""
        return port in _PIC_PORTS or (self.pit is not None and port in _PIT_PORTS)

    def port_in(self, port: int) -> int:
        """Read a byte from a port that is owned."""
        with self.lock:
            if port in _PIC_PORTS:
                return self.pic.read(port)
            assert self.pit is not None
            return self.pit.read(port)

    def port_out(self, port: int, value: int) -> None:
        """Write a byte to a port that is owned."""
        with self.lock:
            if port in _PIC_PORTS:
                self.pic.write(port, value)
            else:
                assert self.pit is not None
                self.pit.write(port, value)

    def get(self, chip_id: int) -> x.kvm_irqchip:
        """KVM_GET_IRQCHIP."""
        chip = x.kvm_irqchip(chip_id=chip_id)
        with self.lock:
            match chip_id:
                case x.KVM_IRQCHIP_PIC_MASTER | x.KVM_IRQCHIP_PIC_SLAVE:
                    chip.chip.pic = self.pic.chips[chip_id].get_state()
                case x.KVM_IRQCHIP_IOAPIC:
                    chip.chip.ioapic = self.ioapic.get_state()
                case _:
                    raise ioctl_error("KVM_GET_IRQCHIP", errno.EINVAL, f"no chip {chip_id}")
        return chip

    def set(self, chip: x.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        with self.lock:
            match chip.chip_id:
                case x.KVM_IRQCHIP_PIC_MASTER | x.KVM_IRQCHIP_PIC_SLAVE:
                    self.pic.chips[chip.chip_id].set_state(chip.chip.pic)
                    self.pic.update()
                    self._publish()
                case x.KVM_IRQCHIP_IOAPIC:
                    self.ioapic.set_state(chip.chip.ioapic)
                case _:
                    raise ioctl_error("KVM_SET_IRQCHIP", errno.EINVAL, f"no chip {chip.chip_id}")


class SplitIrqChip:
    """Local APICs alone (KVM_CAP_SPLIT_IRQCHIP): GSIs send messages; the other chips are user space's."""

    def __init__(self, vm: _engine.Vm, ioapic_pins: int) -> None:
        """The first `ioapic_pins` GSIs are pins of an IOAPIC of user space's, which wants to hear of ends of interrupt."""
        self._vm = vm
        self._ioapic_pins = ioapic_pins
        self._msis: _Msis = {}

    def close(self) -> None:
        """Nothing runs here."""

    def set_routing(self, entries: Sequence[c.kvm_irq_routing_entry]) -> None:
        """KVM_SET_GSI_ROUTING: messages alone."""
        _, self._msis = _parse(entries, {})
        self._vm.set_routes([(gsi, [], messages, False) for gsi, messages in self._msis.items()])

    def line(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS."""
        return _status(_send_msis(self._vm, self._msis, gsi, level))

    def handles(self, vector: int) -> bool:
        """Whether a level-triggered message of an IOAPIC's pin has `vector`: its end exits (KVM_EXIT_IOAPIC_EOI)."""
        return any(
            data & 0xFF == vector and data & _MSI_LEVEL
            for gsi, messages in self._msis.items()
            if gsi < self._ioapic_pins
            for _, data in messages
        )


_Msis = dict[int, list[tuple[int, int]]]
"""GSI → address and data of each message."""
_MSI_LEVEL = 1 << 15
_PIC_CHIPS = (x.KVM_IRQCHIP_PIC_MASTER, x.KVM_IRQCHIP_PIC_SLAVE)
_CHIP_PINS = {x.KVM_IRQCHIP_PIC_MASTER: 8, x.KVM_IRQCHIP_PIC_SLAVE: 8, x.KVM_IRQCHIP_IOAPIC: ioapic.PINS}


def _parse(
    entries: Sequence[c.kvm_irq_routing_entry], chip_pins: dict[int, int]
) -> tuple[dict[int, list[_Pin]], _Msis]:
    """Routes to pins and messages, given the chips and their pins. EINVAL."""
    name = "KVM_SET_GSI_ROUTING"
    pins: dict[int, list[_Pin]] = {}
    msis: _Msis = {}
    for e in entries:
        if e.gsi >= MAX_GSIS:
            raise ioctl_error(name, errno.EINVAL, f"GSI {e.gsi} is {MAX_GSIS} or more")
        if e.flags & ~(c.KVM_MSI_VALID_DEVID if e.type == c.KVM_IRQ_ROUTING_MSI else 0):
            raise ioctl_error(name, errno.EINVAL, f"flags {e.flags:#x} of GSI {e.gsi}")
        if e.gsi in msis or (e.type == c.KVM_IRQ_ROUTING_MSI and e.gsi in pins):
            raise ioctl_error(name, errno.EINVAL, f"GSI {e.gsi}: nothing beside a message")
        if e.type == c.KVM_IRQ_ROUTING_MSI:
            address = e.u.msi.address_hi << 32 | e.u.msi.address_lo
            msis.setdefault(e.gsi, []).append((address, e.u.msi.data))
        elif e.type == c.KVM_IRQ_ROUTING_IRQCHIP:
            chip, pin = e.u.irqchip.irqchip, e.u.irqchip.pin
            if pin >= chip_pins.get(chip, 0):
                raise ioctl_error(name, errno.EINVAL, f"chip {chip} has no pin {pin}")
            if any(chip == other for other, _ in pins.get(e.gsi, ())):
                raise ioctl_error(name, errno.EINVAL, f"GSI {e.gsi}: chip {chip} twice")
            pins.setdefault(e.gsi, []).append((chip, pin))
        else:
            raise ioctl_error(name, errno.EINVAL, f"routing type {e.type}")
    return pins, msis


def _send_msis(vm: _engine.Vm, msis: _Msis, gsi: int, level: int) -> list[int]:
    """Send a GSI's messages as its line rises: how many local APICs took each, -1 without a vCPU."""
    return [vm.signal_msi(address, data) for address, data in msis.get(gsi, ())] if level else []


def _status(said: list[int]) -> int:
    """KVM_IRQ_LINE_STATUS's answer of its routes'."""
    return sum(n for n in said if n >= 0) if any(n >= 0 for n in said) else -1
