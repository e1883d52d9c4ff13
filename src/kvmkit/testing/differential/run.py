"""Running a case on a KVM, and what came of it."""

from dataclasses import dataclass, field
from pathlib import Path

from kvmkit.kvm import GuestMemory, Kvm, MemoryMap, Vcpu, Vm
from kvmkit.kvm.exits import Exit, Hlt, Intr, Io, Mmio, Shutdown
from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import GPRS, Case, Segment
from kvmkit.testing.differential.watchdog import WATCHDOG
from kvmkit.uapi import x86

ERROR_CODES = frozenset((8, 10, 11, 12, 13, 14, 17))
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
FSW_SF = 1 << 6
DR6, DR7 = 0xFFFF0FF0, 0x400
MOV_TO_DR, CMPXCHG8B = b"\x0f\x23", b"\x0f\xc7"
BUSY = 2
"""Of a TSS descriptor's type."""
OTHER_MSRS = {name: index for name, index in c.MSRS.items() if name not in ("EFER", "FS_BASE", "GS_BASE")}
"""Without those that KVM_GET_SREGS has."""

CPUID = (
    # Only what every x86-64 processor has: two engines must agree on which bits of a control register are reserved.
    (0, (1, 0x756E6547, 0x6C65746E, 0x49656E69)),
    (1, (0x000006F1, 0, 0, 0x0780_8B79 & ~(1 << 9))),
    (0x80000000, (0x80000008, 0, 0, 0)),
    (0x80000001, (0, 0, 1, 1 << 11 | 1 << 20 | 1 << 29)),
    (0x80000008, (0x3028, 0, 0, 0)),
)


@dataclass
class Outcome:
    """How a case ended. All that is compared is in `values` and `memory`."""

    end: str
    """"halt", "vector N", "shutdown", or why the case says nothing ("outside", "unsupported: …", "endless")."""
    values: dict[str, int] = field(default_factory=dict)
    memory: bytes = b""
    frame: tuple[int, int] = (0, 0)
    """Where in memory the frame of the exception lies that ended it, and its bytes."""
    ports: bool = False
    """Whether ports were read, if that is known."""
    stack_fault: bool = False
    """Whether x87 code took a register that was empty, or loaded one that wasn't, if that is known."""

    @property
    def vector(self) -> int | None:
        """The vector of the exception or interrupt that ended it."""
        return int(self.end.split()[1]) if self.end.startswith("vector") else None

    @property
    def useful(self) -> bool:
        """Whether there is something to compare."""
        return self.end in ("halt", "shutdown") or self.end.startswith("vector")


def unfit_for_qemu(case: Case) -> bool:
    """Whether QEMU 7.2 is no machine for it, neither as the reference nor to run the engine on, as the test bed does.

    Breakpoints that a guest of SVM sets reset the machine; LTR takes a null selector, and QEMU aborts where a TSS is needed then.
    CMPXCHG8B loses flags that an ADD left, which is how the engine sets them.
    """
    return (
        MOV_TO_DR in case.code or CMPXCHG8B in case.code or any("ltr " in item.source for item in case.items)
    )


def segment_of(segment: Segment) -> x86.kvm_segment:
    """As KVM wants it."""
    f = segment.flags
    present = f >> 7 & 1
    return x86.kvm_segment(
        segment.base, segment.limit, segment.selector, f & 15, present, f >> 5 & 3, f >> 14 & 1, f >> 4 & 1, f >> 13 & 1, f >> 15 & 1, f >> 12 & 1, 1 - present
    )  # fmt: skip


class Machine:
    """A VM that runs one case after the other; or, if `fresh`, a new one for each.

    The kernel's KVM wants new ones where it shadows page tables: it doesn't see that the host writes to them.
    """

    def __init__(self, kvm: Kvm, fresh: bool = False) -> None:
        self.kvm, self.fresh = kvm, fresh
        self.ports = False
        # QEMU 7.2 aborts where 32-bit code comes to ring 0 by a TSS that is busy, as KVM gives it. KVM says that it is busy nonetheless.
        self._on_qemu = kvm.engine == "linux" and "QEMU" in Path("/proc/cpuinfo").read_text()
        self.memory: GuestMemory
        self.map: MemoryMap
        self.vm: Vm | None = None
        self.vcpu: Vcpu | None = None

    def _fresh(self) -> Vcpu:
        if self.vcpu is not None and not self.fresh:
            return self.vcpu
        self._drop()
        self.memory, self.map = GuestMemory(c.MEMORY_BYTES), MemoryMap()
        self.map.add(0, self.memory)
        self.vm = self.kvm.create_vm()
        self.map.attach(self.vm)
        self.vcpu = self.vm.create_vcpu(0)
        entries = [x86.kvm_cpuid_entry2(function, 0, 0, *registers) for function, registers in CPUID]
        self.vcpu.set_cpuid2(entries)
        return self.vcpu

    def _drop(self) -> None:
        if self.vcpu is not None:
            self.vcpu.close()
        if self.vm is not None:
            self.vm.close()
            self.map.close()
        self.vm = self.vcpu = None

    def run(self, case: Case) -> Outcome:
        """Run it to its end."""
        if self._on_qemu and unfit_for_qemu(case):
            return Outcome("unsupported: it would end QEMU")
        vcpu = self._fresh()
        self.map.write(0, case.image())
        self._load(vcpu, case)
        end = self._to_the_end(vcpu)
        if end != "halt":
            self._drop()
            return Outcome(end, ports=self.ports)
        return self._outcome(vcpu)

    def _load(self, vcpu: Vcpu, case: Case) -> None:
        vcpu.set_vcpu_events(x86.kvm_vcpu_events(flags=x86.KVM_VCPUEVENT_VALID_SHADOW))
        vcpu.set_fpu(x86.kvm_fpu(fcw=0x37F, mxcsr=0x1F80))
        vcpu.set_debugregs(x86.kvm_debugregs(dr6=DR6, dr7=DR7))
        sregs = vcpu.get_sregs()
        for name in SEGMENTS:
            setattr(sregs, name, segment_of(case.segments[name]))
        if self._on_qemu:
            sregs.tr.type &= ~BUSY
        for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
            setattr(sregs, name, case.control[name])
        sregs.cr8 = 0
        sregs.gdt.base, sregs.gdt.limit = case.control["gdt"], case.control["gdt_limit"]
        sregs.idt.base, sregs.idt.limit = case.control["idt"], case.control["idt_limit"]
        vcpu.set_sregs(sregs)
        vcpu.set_msrs(dict.fromkeys(OTHER_MSRS.values(), 0))
        vcpu.set_regs(x86.kvm_regs(**case.registers))

    def _to_the_end(self, vcpu: Vcpu) -> str:
        self.ports = False
        for _ in range(64):
            with WATCHDOG.watching(vcpu.kick):
                exit_: Exit = vcpu.run()
            if isinstance(exit_, Hlt):
                return "halt"
            if isinstance(exit_, Shutdown):
                return "shutdown"
            if isinstance(exit_, Io):
                if not exit_.is_out:
                    self.ports = True
                    exit_.data[:] = bytes([0x5A]) * len(exit_.data)
            elif isinstance(exit_, Mmio):
                return "outside"
            elif not isinstance(exit_, Intr):
                return f"unsupported: {exit_}"
            elif WATCHDOG.expired:
                return "endless"
        return "endless"

    def _outcome(self, vcpu: Vcpu) -> Outcome:
        regs, sregs, debug = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_debugregs()
        values: dict[str, int] = {name: getattr(regs, name) for name in (*GPRS, "rip", "rflags")}
        for name in SEGMENTS:
            segment: x86.kvm_segment = getattr(sregs, name)
            values[name] = segment.selector
            if not segment.unusable:
                values[f"{name}.base"], values[f"{name}.limit"] = segment.base, segment.limit
                values[f"{name}.flags"] = (
                    segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
                    | segment.avl << 12 | segment.l << 13 | segment.db << 14 | segment.g << 15
                )  # fmt: skip
        for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
            values[name] = getattr(sregs, name)
        for name in ("gdt", "idt"):
            table: x86.kvm_dtable = getattr(sregs, name)
            values[name], values[f"{name}.limit"] = table.base, table.limit
        values |= {f"dr{n}": value for n, value in enumerate(debug.db)} | {"dr6": debug.dr6, "dr7": debug.dr7}
        found = vcpu.get_msrs(OTHER_MSRS.values())
        values |= {name: found[index] for name, index in OTHER_MSRS.items() if index in found}
        outcome = Outcome("halt", values, self.memory.read(0, c.MEMORY_BYTES), ports=self.ports)
        outcome.stack_fault = bool(vcpu.get_fpu().fsw & FSW_SF)
        interpret(outcome)
        return outcome

    def close(self) -> None:
        """Release everything."""
        self._drop()


def interpret(outcome: Outcome) -> None:
    """See by the address of the HLT whether it was a handler's; then where its frame is."""
    v = outcome.values
    at = v["rip"] - 1 + v.get("cs.base", 0)
    if not c.HANDLERS <= at < c.HANDLERS + 512 or (at - c.HANDLERS) % 2:
        return
    vector = (at - c.HANDLERS) // 2
    outcome.end = f"vector {vector}"
    long = bool(v["efer"] & 1 << 10)
    size = 8 if long else 4 if v["cr0"] & 1 and v["cs"] & 3 == 0 else 2
    sp = (v.get("rsp", 0) if v.get("ss.flags", 0x4000) & 0x4000 or long else v["rsp"] & 0xFFFF) + (
        0 if long else v.get("ss.base", 0)
    )
    error = size if v["cr0"] & 1 and vector in ERROR_CODES else 0
    outcome.frame = (sp, size * (5 if long else 3) + error)
