"""The local APIC: one per vCPU, between interrupt messages and the processor.

**Three bit maps of 256 vectors.** A message sets the vector's bit in **IRR** (requested). When the processor takes it, the bit
moves to **ISR** (in service); the guest's write to EOI clears the highest bit there. **TMR** remembers which vectors came from a
level-triggered line: their EOI is passed on to the IOAPIC, which sends again if the line is still up.

**Priority.** A vector's class is its upper four bits. **TPR** (CR8 shows its upper half) is the class up to which the guest wants to
be left alone; **PPR** is the higher of TPR and the class in service. A request is delivered if its class is above PPR's,
IF is set, and no shadow of STI or MOV SS holds it off.

**Messages** come from the IOAPIC, from devices (MSI: a write to 0xfeexxxxx), and from other local APICs by a write to **ICR**. A
destination is *physical* (an APIC id) or *logical* (LDR under DFR's flat or cluster model; in x2APIC mode a cluster and a bit
mask, derived from the id). Delivery modes: fixed, lowest priority, NMI, INIT, SIPI, and ExtINT, where the PIC supplies the vector.

**LVT** entries turn local events into interrupts: the timer, LINT0 (the PIC's line on the boot processor), LINT1 (NMI), errors.

**Timer.** One-shot and periodic modes count down from INITIAL_COUNT at 1 GHz over the divider; TSC-deadline mode fires when the TSC
reaches an MSR. Nothing ticks: CURRENT_COUNT follows from the time, and one thread per VM waits for the next expiry. KVM_SET_LAPIC
goes on with what is left of CURRENT_COUNT; a one-shot timer with nothing left fires (again), as on the kernel's KVM.

Registers lie 16 bytes apart in a page at IA32_APIC_BASE (xAPIC), or are MSRs from 0x800 (x2APIC). `kvm_lapic_state` is the page's
first KiB. The hot part - all of the above - is `engine/src/lapic.rs`, which takes no GIL; this file names the registers and
reads and writes them from outside, for whoever inspects a vCPU. (Intel SDM volume 3, chapter 11.)
"""

from collections.abc import Mapping

from kvmkit.kvm.contract import Vcpu
from kvmkit.uapi import x86

ID, VERSION, TPR, APR, PPR, EOI = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0
LDR, DFR, SVR = 0xD0, 0xE0, 0xF0
ISR, TMR, IRR = 0x100, 0x180, 0x200
ESR, ICR, ICR2 = 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0

FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = 0, 1, 2, 4, 5, 6, 7
"""Delivery modes."""
TIMER_PERIODIC, TIMER_TSC_DEADLINE = 1 << 17, 2 << 17
MASKED = 1 << 16
"""Of an LVT entry."""


class Lapic:
    """The registers of a vCPU's local APIC, by offset: KVM_GET_LAPIC and KVM_SET_LAPIC. The vCPU must not be running."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Look at `vcpu`, which has a local APIC (KVM_CREATE_IRQCHIP)."""
        self.vcpu = vcpu

    def __getitem__(self, register: int) -> int:
        """Read a 32-bit register."""
        raw = bytes(self.vcpu.get_lapic())
        return int.from_bytes(raw[register : register + 4], "little")

    def __setitem__(self, register: int, value: int) -> None:
        """Write a 32-bit register as state, without what a guest's write sets off."""
        self.update({register: value})

    def update(self, registers: Mapping[int, int]) -> None:
        """Write several registers at once."""
        raw = bytearray(self.vcpu.get_lapic())
        for register, value in registers.items():
            raw[register : register + 4] = value.to_bytes(4, "little")
        self.vcpu.set_lapic(x86.kvm_lapic_state.from_buffer_copy(raw))

    def vectors(self, bit_map: int) -> list[int]:
        """Return the vectors whose bit is set in IRR, ISR or TMR."""
        raw = bytes(self.vcpu.get_lapic())
        return [v for v in range(256) if raw[bit_map + (v >> 5 << 4) + (v >> 3 & 3)] >> (v & 7) & 1]
