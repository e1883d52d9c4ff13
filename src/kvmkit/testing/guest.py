"""Tiny guests: a VM of one or two vCPUs with some code in it, on any engine."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvmkit.kvm import GuestMemory, Kvm, MemoryMap, Vcpu
from kvmkit.kvm.exits import Exit, Intr
from kvmkit.kvm.modes import set_long_mode, set_protected_mode, set_real_mode
from kvmkit.testing.assembler import assemble
from kvmkit.uapi.capabilities import KVM_CAP_TSC_DEADLINE_TIMER
from kvmkit.uapi.x86 import KVM_PIT_SPEAKER_DUMMY

CODE = 0x1000
"""Where a guest's code lies and starts."""
DATA = 0x6000
"""A page that guests may use for data."""
STACK = 0x8000
"""Where the stack starts (downwards)."""
IDT = 0x9000
"""Where `load_idt` and `set_gate` put the IDT, 4096 bytes."""
TABLES = 0x10000
"""Where page tables and the GDT lie."""
MEMORY_BYTES = 0x100000

PRELUDE_64 = f"""
.macro set_gate vector, handler
    lea rax, [rip + \\handler]
    mov word ptr [{IDT} + 16 * \\vector], ax
    mov dword ptr [{IDT} + 16 * \\vector + 2], 8
    mov word ptr [{IDT} + 16 * \\vector + 4], 0x8e00
    shr rax, 16
    mov dword ptr [{IDT} + 16 * \\vector + 6], eax
    mov dword ptr [{IDT} + 16 * \\vector + 10], 0
.endm
.macro load_idt
    lidt [rip + 7f]
    jmp 8f
7:  .word 4095
    .quad {IDT}
8:
.endm
"""
"""Macros for 64-bit guests: `set_gate vector, handler` (below 4 GiB; changes rax) and `load_idt`."""


class Guest:
    """A VM with 1 MiB of memory at 0, `code` at 0x1000, and its first vCPU about to execute it.

    `bits` is 16 (real mode), 32 (protected, no paging) or 64 (long mode, the first 4 GiB mapped to themselves). A run that
    lasts longer than `timeout_s` raises `TimeoutError`: a broken guest can't hang a test.
    """

    def __init__(
        self,
        system: Kvm,
        code: str,
        *,
        bits: int = 64,
        irqchip: bool = False,
        pit: bool = False,
        vcpus: int = 1,
        timeout_s: float = 20.0,
        capabilities: Sequence[tuple[int, int]] = (),
        vm_type: int = 0,
    ) -> None:
        """Create it on `system`, with interrupt chips and a PIT if asked for.

        `capabilities`, KVM_CAP_* and argument, are enabled for the VM before all else. `vm_type`: KVM_CREATE_VM's.
        """
        self.engine = system.engine
        self.timeout_s = timeout_s
        self._threads: list[threading.Thread] = []
        self._closing = False
        self.vcpus: list[Vcpu] = []
        self.memory = GuestMemory(MEMORY_BYTES)
        self.map = MemoryMap()
        self.map.add(0, self.memory)
        self.vm = system.create_vm(vm_type)
        try:
            for capability, argument in capabilities:
                self.vm.enable_cap(capability, argument)
            if irqchip:
                self.vm.create_irqchip()
            if pit:
                self.vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)  # with port 0x61
            self.map.attach(self.vm)
            self.load(code, bits)
            cpuid = system.get_supported_cpuid()
            for entry in cpuid:
                # KVM offers the TSC-deadline timer as a capability, not here, since it needs the kernel's local APIC.
                if entry.function == 1 and irqchip and system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER):
                    entry.ecx |= 1 << 24
            for id in range(vcpus):
                vcpu = self.vm.create_vcpu(id)
                self.vcpus.append(vcpu)
                for entry in cpuid:
                    if entry.function == 1:
                        entry.ebx = entry.ebx & 0xFFFFFF | id << 24
                vcpu.set_cpuid2(cpuid)
            self._enter(bits)
        except BaseException:
            self.close()
            raise

    def load(self, code: str, bits: int = 64, address: int = CODE) -> None:
        """Assemble `code` and put it at `address`; macros of `PRELUDE_64` are known in 64-bit code."""
        source = (PRELUDE_64 if bits == 64 else "") + code
        self.map.write(address, assemble(source, bits, address))

    def _enter(self, bits: int) -> None:
        if bits == 16:
            set_real_mode(self.vcpu, CODE)
        elif bits == 32:
            set_protected_mode(self.vcpu, self.memory, CODE, TABLES)
        else:
            set_long_mode(self.vcpu, self.memory, CODE, TABLES)
        regs = self.vcpu.get_regs()
        regs.rsp = STACK
        self.vcpu.set_regs(regs)

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU."""
        return self.vcpus[0]

    def run(self, index: int = 0) -> Exit:
        """Run vCPU `index` until its next exit; exits for a mere signal are run over."""
        vcpu = self.vcpus[index]
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            vcpu.kick()

        timer = threading.Timer(self.timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            while True:
                exit_ = vcpu.run()
                if not isinstance(exit_, Intr):
                    return exit_
                if expired.is_set():
                    raise TimeoutError(
                        f"vCPU {index} didn't exit within {self.timeout_s} s; rip={self._rip(vcpu)}"
                    )
                if vcpu.immediate_exit:
                    return exit_
        finally:
            timer.cancel()
            if expired.is_set():
                vcpu.immediate_exit = False

    def start(self, index: int = 0) -> None:
        """Run vCPU `index` on a thread of its own until the guest is closed; its exits are ignored."""

        def loop() -> None:
            while not self._closing:
                self.vcpus[index].run()

        thread = threading.Thread(target=loop, daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _rip(vcpu: Vcpu) -> str:
        try:
            return hex(vcpu.get_regs().rip)
        except OSError:
            return "?"

    def close(self) -> None:
        """Stop the threads and release everything."""
        self._closing = True
        for vcpu in self.vcpus:
            vcpu.kick()
        for thread in self._threads:
            thread.join()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.map.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
