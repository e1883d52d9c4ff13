"""The two 8259A interrupt controllers of a PC.

Each has eight inputs and three registers of eight bits: **IRR**, requests seen and not yet taken; **IMR**, masked inputs; **ISR**,
inputs in service. An input raises INT if it is requested, not masked, and of a higher priority (a lower number) than all in
service. The processor answers with an acknowledge cycle, which moves the request from IRR to ISR and yields the vector:
the base that ICW2 set, plus the input. The end of interrupt (OCW2) clears the ISR bit. The slave's INT is input 2 of the
master.

Programming: ICW1 (a write with bit 4) starts initialisation, ICW2–4 follow at the odd port; afterwards the odd port is the
mask, and the even port takes OCW2 (end of interrupt, rotation) and OCW3 (which register to read, polling, special mask).
ELCR, at 0x4d0 and 0x4d1, makes inputs level-triggered. (Intel 8259A data sheet, order number 231468.)
"""

from collections.abc import Callable

from kvmkit.uapi import x86

PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
_ELCR_MASK = (0xF8, 0xDE)
"""Inputs that may be level-triggered: not the timer, keyboard, cascade, RTC and coprocessor."""


class I8259:
    """One controller."""

    def __init__(self, elcr_mask: int) -> None:
        """Power up."""
        self._elcr_mask = elcr_mask
        self.elcr = 0
        self.lines = 0
        self._reset()

    def _reset(self) -> None:
        self.irr = self.imr = self.isr = 0
        self.priority_add = 0
        self.irq_base = 0
        self.read_isr = self.poll = self.special_mask = False
        self.init_state = 0
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_fully_nested = self.init4 = False

    def set_irq(self, line: int, level: int) -> int:
        """Drive input `line`: -1 if it is masked, 0 if a request waited already, else 1."""
        bit = 1 << line
        new = 1
        if level and (self.elcr & bit or not self.lines & bit):
            new = int(not self.irr & bit)
            self.irr |= bit
        elif self.elcr & bit and not level:
            self.irr &= ~bit
        self.lines = self.lines | bit if level else self.lines & ~bit
        return -1 if self.imr & bit else new

    def _priority(self, mask: int) -> int:
        """Return the rank of the most urgent input in `mask`: 0 the highest, 8 if there is none."""
        for rank in range(8):
            if mask & 1 << (rank + self.priority_add & 7):
                return rank
        return 8

    def pending(self, is_master: bool) -> int:
        """Return the input that raises INT, -1 if none."""
        rank = self._priority(self.irr & ~self.imr)
        if rank == 8:
            return -1
        in_service = self.isr & ~self.imr if self.special_mask else self.isr
        if self.special_fully_nested and is_master:
            in_service &= ~(1 << 2)
        return rank + self.priority_add & 7 if rank < self._priority(in_service) else -1

    def acknowledge(self, line: int) -> int:
        """Take `line` into service; returns its vector."""
        bit = 1 << line
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = line + 1 & 7
        else:
            self.isr |= bit
        if not self.elcr & bit:
            self.irr &= ~bit
        return self.irq_base + line

    def read(self, port: int) -> int:
        """Read the even (0) or odd (1) port."""
        if self.poll:
            self.poll = False
            line = self.pending(is_master=False)
            if line < 0:
                return 0
            self.acknowledge(line)
            return 0x80 | line
        if port:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, port: int, value: int) -> None:
        """Write the even (0) or odd (1) port."""
        if port:
            self._write_odd(value)
        elif value & 0x10:
            elcr, lines = self.elcr, self.lines
            self._reset()
            self.elcr, self.lines = elcr, lines
            self.init4 = bool(value & 1)
            self.init_state = 1
        elif value & 0x08:
            if value & 2:
                self.read_isr = bool(value & 1)
            self.poll = bool(value & 4)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._ocw2(value)

    def _write_odd(self, value: int) -> None:
        match self.init_state:
            case 0:
                self.imr = value
            case 1:
                self.irq_base = value & 0xF8
                self.init_state = 2
            case 2:
                self.init_state = 3 if self.init4 else 0
            case _:
                self.special_fully_nested = bool(value & 0x10)
                self.auto_eoi = bool(value & 2)
                self.init_state = 0

    def _ocw2(self, value: int) -> None:
        command, line = value >> 5, value & 7
        match command:
            case 0 | 4:
                self.rotate_on_auto_eoi = command == 4
            case 1 | 5:
                rank = self._priority(self.isr)
                if rank < 8:
                    highest = rank + self.priority_add & 7
                    self.isr &= ~(1 << highest)
                    if command == 5:
                        self.priority_add = highest + 1 & 7
            case 3 | 7:
                self.isr &= ~(1 << line)
                if command == 7:
                    self.priority_add = line + 1 & 7
            case 6:
                self.priority_add = line + 1 & 7

    def write_elcr(self, value: int) -> None:
        """Choose the level-triggered inputs."""
        self.elcr = value & self._elcr_mask

    def get_state(self) -> x86.kvm_pic_state:
        """State for KVM_GET_IRQCHIP."""
        return x86.kvm_pic_state(
            last_irr=self.lines,
            irr=self.irr,
            imr=self.imr,
            isr=self.isr,
            priority_add=self.priority_add,
            irq_base=self.irq_base,
            read_reg_select=self.read_isr,
            poll=self.poll,
            special_mask=self.special_mask,
            init_state=self.init_state,
            auto_eoi=self.auto_eoi,
            rotate_on_auto_eoi=self.rotate_on_auto_eoi,
            special_fully_nested_mode=self.special_fully_nested,
            init4=self.init4,
            elcr=self.elcr,
            elcr_mask=self._elcr_mask,
        )

    def set_state(self, s: x86.kvm_pic_state) -> None:
        """Take over KVM_SET_IRQCHIP's state; out-of-range fields are cut to what the chip has."""
        self.lines, self.irr, self.imr, self.isr = s.last_irr, s.irr, s.imr, s.isr
        self.priority_add, self.irq_base, self.init_state = (
            s.priority_add & 7,
            s.irq_base & 0xF8,
            s.init_state & 3,
        )
        self.read_isr, self.poll, self.special_mask = (
            bool(s.read_reg_select),
            bool(s.poll),
            bool(s.special_mask),
        )
        self.auto_eoi, self.rotate_on_auto_eoi = bool(s.auto_eoi), bool(s.rotate_on_auto_eoi)
        self.special_fully_nested, self.init4 = bool(s.special_fully_nested_mode), bool(s.init4)
        self.write_elcr(s.elcr)


class Pic:
    """Master and slave as a PC wires them."""

    def __init__(
        self,
        output: Callable[[bool], None],
        changed: Callable[[], None],
        ended: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`output` is told the level of INTR, `changed` that masks or requests may have, `ended` of each input's end of interrupt."""
        self.chips = (I8259(_ELCR_MASK[0]), I8259(_ELCR_MASK[1]))
        self._output = output
        self._changed = changed
        self._ended = ended
        self._level = False

    def update(self) -> None:
        """Pass the slave's INT to the master, and INTR on if it changed."""
        master, slave = self.chips
        master.set_irq(2, int(slave.pending(is_master=False) >= 0))
        level = master.pending(is_master=True) >= 0
        if level != self._level:
            self._level = level
            self._output(level)

    def set_irq(self, line: int, level: int) -> int:
        """Drive input `line`, 0 to 15; returns as `I8259.set_irq`."""
        status = self.chips[line >> 3].set_irq(line & 7, level)
        self.update()
        return status

    @property
    def intr(self) -> bool:
        """Level of INTR."""
        return self._level

    @property
    def retired(self) -> bool:
        """Whether every input of the master, and with it the slave, is masked."""
        return self.chips[0].imr == 0xFF

    def acknowledge(self) -> int:
        """Acknowledge cycle: the vector. Input 7 answers if the request went away (spurious)."""
        master, slave = self.chips
        line = master.pending(is_master=True)
        if line < 0:
            vector = master.irq_base + 7
        elif line == 2:
            master.acknowledge(2)
            inner = slave.pending(is_master=False)
            vector = slave.acknowledge(inner) if inner >= 0 else slave.irq_base + 7
            line = 8 + inner if inner >= 0 else -1
        else:
            vector = master.acknowledge(line)
        self._level = False
        self._output(False)
        if line >= 0 and self.chips[line >> 3].auto_eoi:
            self._ended(line)
        self.update()
        return vector

    def read(self, port: int) -> int:
        """Read one of `PORTS`."""
        if port >= 0x4D0:
            return self.chips[port & 1].elcr
        value = self.chips[port >> 7].read(port & 1)
        self.update()
        return value

    def write(self, port: int, value: int) -> None:
        """Write one of `PORTS`."""
        if port >= 0x4D0:
            self.chips[port & 1].write_elcr(value)
        else:
            n = port >> 7
            before = self.chips[n].isr
            self.chips[n].write(port & 1, value)
            ended = before & ~self.chips[n].isr
            for line in range(8) if ended else ():
                if ended >> line & 1:
                    self._ended(8 * n + line)
        self.update()
        self._changed()
