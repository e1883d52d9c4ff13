"""System management mode: SMIs, the state-save area in both layouts, RSM, the address space of its own, what waits meanwhile."""

import errno
from collections.abc import Callable
from contextlib import suppress

import pytest

from kvmkit.kvm import Kvm, Vcpu
from kvmkit.kvm.exits import Exit, Io, Shutdown
from kvmkit.kvm.state import load_vcpu, save_vcpu
from kvmkit.testing import DATA, MEMORY_BYTES, TABLES, Guest
from kvmkit.uapi import common, x86

LAPIC = 0xFEE00000
SMM_SPACE = 1 << 16
"""Slots from here are those of system management mode (KVM_CAP_MULTI_ADDRESS_SPACE)."""
SMBASE = 0x30000
ENTRY = SMBASE + 0x8000
MSR_SMI_COUNT, MSR_SMBASE = 0x34, 0x9E
INSIDE, RESUMED = 0x70, 0x11
"""Ports that the handler and the guest write to."""
MESSAGE_SMI, MESSAGE_INIT, MESSAGE_SIPI = 2 << 8, 5 << 8, 6 << 8
HANDLER = f"mov al, 0x77\nout {INSIDE}, al\nrsm"
# Offsets from SMBASE of the layout of processors with long mode, and of the others.
CS_64, GDTR_64, SHADOW_64, EFER_64, SMBASE_64 = 0xFE10, 0xFE60, 0xFECB, 0xFED0, 0xFF00
REVISION, CR4_64, CR3_64, CR0_64 = 0xFEFC, 0xFF48, 0xFF50, 0xFF58
RFLAGS_64, RIP_64, RAX_64 = 0xFF70, 0xFF78, 0xFFF8
SMBASE_32, CR4_32, DS_32, CS_32 = 0xFEF8, 0xFF14, 0xFF2C, 0xFF90
CS_SELECTOR_32, EAX_32, EIP_32, EFLAGS_32, CR3_32, CR0_32 = 0xFFAC, 0xFFD0, 0xFFF0, 0xFFF4, 0xFFF8, 0xFFFC


def prepare(guest: Guest, handler: str = HANDLER) -> None:
    """Give system management mode the guest's memory, with `handler`, 16-bit code, where it begins."""
    guest.vm.set_user_memory_region(SMM_SPACE, 0, guest.memory.size_bytes, guest.memory.address)
    guest.load(handler, bits=16, address=ENTRY)


def find_lapic(vcpu: Vcpu) -> None:
    """Have the kernel look where local APICs are: it has missed the last one that was created."""
    vcpu.set_lapic(vcpu.get_lapic())


def expect(exit_: Exit, port: int) -> None:
    """Assert that the guest wrote to `port`."""
    assert isinstance(exit_, Io) and exit_.port == port, exit_


def complete(vcpu: Vcpu) -> None:
    """Have the access that has left completed, and run nothing."""
    vcpu.immediate_exit = True
    vcpu.run()
    vcpu.immediate_exit = False


def area(guest: Guest, offset: int, size_bytes: int) -> int:
    """A number in the state-save area."""
    return int.from_bytes(guest.memory.read(SMBASE + offset, size_bytes), "little")


def in_smm(guest: Guest) -> bool:
    """What kvm_run and the events say of the first vCPU, which must be the same."""
    by_run = bool(guest.vcpu.kvm_run.flags & x86.KVM_RUN_X86_SMM)
    assert guest.vcpu.get_vcpu_events().smi.smm == by_run
    return by_run


@pytest.fixture
def smm(needs: Callable[[str], int]) -> None:
    """Skip the test where KVM has no system management mode."""
    needs("KVM_CAP_X86_SMM")


pytestmark = pytest.mark.usefixtures("smm")


@pytest.mark.parametrize("irqchip", [False, True])
def test_smi_and_rsm(kvm: Kvm, irqchip: bool) -> None:
    """An SMI saves the state, starts in real mode at SMBASE + 0x8000, and RSM brings all back."""
    code = f"mov ecx, 0x1234\nmovabs r12, 0x123456789abcdef0\nstc\nout 0x10, al\nnop\nout {RESUMED}, al\nhlt"
    handler = f"mov ecx, 1\nmov ebx, 2\nmov dword ptr [{DATA}], 0x55\n{HANDLER}"
    with Guest(kvm, code, irqchip=irqchip) as guest:
        prepare(guest, handler)
        assert guest.vcpu.get_msrs([MSR_SMBASE]) == {MSR_SMBASE: SMBASE}
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        assert not in_smm(guest)
        regs, sregs, debugregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs(), guest.vcpu.get_debugregs()
        guest.vcpu.smi()
        assert guest.vcpu.get_vcpu_events().smi.pending
        expect(guest.run(), INSIDE)
        assert in_smm(guest)
        assert not guest.vcpu.get_vcpu_events().smi.pending
        assert int.from_bytes(guest.memory.read(DATA, 4), "little") == 0x55
        inside = guest.vcpu.get_sregs()
        assert (inside.cr0 & 0x8000000D, inside.cr4, inside.efer) == (0, 0, 0)
        assert (inside.cs.selector, inside.cs.base, inside.cs.limit) == (SMBASE >> 4, SMBASE, 0xFFFFFFFF)
        assert (inside.ds.selector, inside.ds.base, inside.ds.limit) == (0, 0, 0xFFFFFFFF)
        assert (inside.idt.base, inside.idt.limit, inside.cr3) == (0, 0, sregs.cr3)
        assert guest.vcpu.get_debugregs().dr7 == 0x400
        assert guest.vcpu.get_regs().rflags & 0x8D7 == 2
        saved = {RIP_64: regs.rip, RFLAGS_64: regs.rflags, RAX_64: regs.rax, RAX_64 - 8 * 12: regs.r12}
        saved |= {CR0_64: sregs.cr0, CR3_64: sregs.cr3, CR4_64: sregs.cr4, EFER_64: sregs.efer}
        saved |= {GDTR_64 + 8: sregs.gdt.base, 0xFF60: debugregs.dr7, 0xFF68: debugregs.dr6}
        assert {offset: area(guest, offset, 8) for offset in saved} == saved
        assert (area(guest, REVISION, 4), area(guest, SMBASE_64, 4)) == (0x20064, SMBASE)
        assert (area(guest, CS_64, 2), area(guest, CS_64 + 4, 4)) == (sregs.cs.selector, sregs.cs.limit)
        assert (
            area(guest, CS_64 + 2, 2) & 0xF0FE == 0xA09A
        )  # granular, 64-bit, present code (accessed or not)
        assert area(guest, GDTR_64 + 4, 4) == sregs.gdt.limit
        expect(guest.run(), RESUMED)
        assert not in_smm(guest)
        after, after_sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
        for name in ("rax", "rbx", "rcx", "rsp", "r12", "rflags"):
            assert getattr(after, name) == getattr(regs, name), name
        after_sregs.apic_base = sregs.apic_base
        assert bytes(after_sregs) == bytes(sregs)
        assert guest.vcpu.get_msrs([MSR_SMI_COUNT]) == {MSR_SMI_COUNT: 1}


def test_layout_without_long_mode(kvm: Kvm) -> None:
    """Where CPUID offers no long mode, the state-save area is another, and what it holds is loaded again."""
    code = f"mov ecx, 0x12345678\nout 0x10, al\nnop\nout {RESUMED}, al\nhlt"
    with Guest(kvm, code, bits=32) as guest:
        cpuid = guest.vcpu.get_cpuid2()
        for entry in cpuid:
            if entry.function == 0x80000001:
                entry.edx &= ~(1 << 29)
        guest.vcpu.set_cpuid2(cpuid)
        prepare(guest, f"mov ecx, 1\n{HANDLER}")
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        regs, sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        saved = {EIP_32: regs.rip, EFLAGS_32: regs.rflags, EAX_32: regs.rax, EAX_32 + 4: regs.rcx}
        saved |= {CR0_32: sregs.cr0, CR3_32: sregs.cr3, CR4_32: sregs.cr4, SMBASE_32: SMBASE}
        saved |= {CS_SELECTOR_32: sregs.cs.selector, CS_32 + 4: sregs.cs.limit, CS_32 + 8: sregs.cs.base}
        saved |= {0xFF70: sregs.gdt.limit, 0xFF74: sregs.gdt.base, DS_32 + 4: sregs.ds.limit}
        assert {offset: area(guest, offset, 4) for offset in saved} == saved
        assert area(guest, REVISION, 4) == 0x20000
        assert area(guest, CS_32, 4) & 0xF0FE00 == 0xC09A00
        guest.memory.write(SMBASE + EAX_32, (0x99).to_bytes(4, "little"))
        expect(guest.run(), RESUMED)
        after, after_sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
        assert (after.rax, after.rcx, after.rflags) == (0x99, 0x12345678, regs.rflags)
        assert bytes(after_sregs)[:-40] == bytes(sregs)[:-40]


def test_handler_changes_the_saved_state(kvm: Kvm) -> None:
    """RSM loads what the area holds then: registers, where to go on, and where the next SMI starts."""
    code = f"out 0x10, al\nnop\nout 0x66, al\nelsewhere:\nout {RESUMED}, al\nout 0x12, al\nhlt"
    moved = 0x50000
    with Guest(kvm, code) as guest:
        prepare(guest)
        guest.load(f"out {INSIDE + 1}, al\nrsm", bits=16, address=moved + 0x8000)
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        rip = guest.vcpu.get_regs().rip
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        for offset, value, size_bytes in (
            (RAX_64, 0xABCD, 8),
            (RIP_64, rip + 3, 8),
            (SMBASE_64, moved, 4),
        ):
            guest.memory.write(SMBASE + offset, value.to_bytes(size_bytes, "little"))
        exit_ = guest.run()
        expect(exit_, RESUMED)
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"\xcd"
        assert guest.vcpu.get_regs().rax == 0xABCD
        assert guest.vcpu.get_msrs([MSR_SMBASE]) == {MSR_SMBASE: moved}
        guest.vcpu.smi()
        expect(guest.run(), INSIDE + 1)
        assert guest.memory.read(moved + RAX_64, 2) == b"\xcd\xab"
        expect(guest.run(), 0x12)


def test_handler_in_long_mode(kvm: Kvm) -> None:
    """A handler may go where it likes, as firmware does: RSM comes back from 64-bit mode, too."""
    handler = f"""
        .att_syntax
        movl $0x20, %eax
        movl %eax, %cr4
        movl $0xc0000080, %ecx
        rdmsr
        orl $0x100, %eax
        wrmsr
        movl %cr0, %eax
        orl $0x80000001, %eax
        movl %eax, %cr0
        ljmpl $8, $long
        .code64
    long:
        movabsq $0x1122334455667788, %rax
        movq %rax, ({DATA})
        outb %al, ${INSIDE}
        rsm
    """
    with Guest(kvm, f"out 0x10, al\nnop\nmov eax, [{DATA}]\nout {RESUMED}, al\nhlt") as guest:
        prepare(guest, handler)
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        sregs = guest.vcpu.get_sregs()
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        inside = guest.vcpu.get_sregs()
        assert in_smm(guest) and inside.cs.l and inside.efer & 0x400 and inside.cr3 == TABLES
        assert int.from_bytes(guest.memory.read(DATA, 8), "little") == 0x1122334455667788
        expect(guest.run(), RESUMED)
        assert not in_smm(guest)
        assert bytes(guest.vcpu.get_sregs()) == bytes(sregs)


def test_address_space(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Slots of system management mode are seen there alone, may lie where others do, and are logged by themselves."""
    assert needs("KVM_CAP_MULTI_ADDRESS_SPACE") == 2
    hidden = 0x60000  # of host memory; the mode has it at 0x200000 and in place of DATA
    handler = f"""
        mov eax, [{DATA}]
        mov ebx, 0x200000
        mov [ebx + 4], eax
        out {INSIDE}, al
        rsm
    """
    with Guest(kvm, f"out 0x10, al\nnop\nmov al, [{DATA}]\nout {RESUMED}, al\nhlt") as guest:
        vm, address = guest.vm, guest.memory.address
        vm.set_user_memory_region(SMM_SPACE, 0, DATA, address)
        vm.set_user_memory_region(SMM_SPACE + 1, DATA, 0x1000, address + hidden)
        rest = DATA + 0x1000
        vm.set_user_memory_region(
            SMM_SPACE + 2, rest, MEMORY_BYTES - rest, address + rest, common.KVM_MEM_LOG_DIRTY_PAGES
        )
        vm.set_user_memory_region(SMM_SPACE + 3, 0x200000, 0x1000, address + hidden)
        for slot, gpa in ((SMM_SPACE + 4, DATA), (2 << 16, 0x300000)):
            with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as error:
                vm.set_user_memory_region(slot, gpa, 0x1000, address)
            assert error.value.errno == (errno.EEXIST if slot >> 16 == 1 else errno.EINVAL)
        guest.load(handler, bits=16, address=ENTRY)
        guest.memory.write(DATA, b"open")
        guest.memory.write(hidden, b"hide")
        vm.get_dirty_log(SMM_SPACE + 2)
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        assert guest.memory.read(hidden, 8) == b"hidehide"
        dirty = int.from_bytes(vm.get_dirty_log(SMM_SPACE + 2), "little")
        assert dirty >> (SMBASE + 0xF000 - rest) // 0x1000 & 1  # the state-save area
        exit_ = guest.run()
        expect(exit_, RESUMED)
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"o"


def test_handler_changes_code(kvm: Kvm) -> None:
    """Code that the handler changes, by whatever address it has there, is what the guest then runs."""
    alias = 0x400000
    code = f"""
        mov ebx, 3
    again:
        call patched
        out {RESUMED}, al
        dec ebx
        jnz again
        hlt
    .p2align 12
    patched:
        mov al, 1
        ret
    """
    handler = f"mov ebx, {alias + 0x1001}\nmov byte ptr [ebx], 2\nout {INSIDE}, al\nrsm"
    with Guest(kvm, code) as guest:
        prepare(guest, handler)
        guest.vm.set_user_memory_region(SMM_SPACE + 1, alias, 0x10000, guest.memory.address + 0x1000)
        values = []
        for n in range(3):
            exit_ = guest.run()
            expect(exit_, RESUMED)
            assert isinstance(exit_, Io)
            values.append(bytes(exit_.data)[0])
            if n == 1:
                guest.vcpu.smi()
                expect(guest.run(), INSIDE)
        assert values == [1, 1, 2]


def test_rsm_outside(kvm: Kvm) -> None:
    """RSM is an invalid opcode outside system management mode."""
    code = f"load_idt\nset_gate 6, ud\nrsm\nout 0x66, al\nud:\nout {RESUMED}, al\nhlt"
    with Guest(kvm, code) as guest:
        expect(guest.run(), RESUMED)


@pytest.mark.parametrize("by", ["self IPI", "IPI", "MSI"])
def test_smi_by_message(kvm: Kvm, by: str) -> None:
    """The local APIC takes messages of delivery mode SMI."""
    icr = {"self IPI": 0x44000 | MESSAGE_SMI, "IPI": 0x4000 | MESSAGE_SMI, "MSI": 0}[by]
    send = f"mov dword ptr [rbx + 0x310], 0\nmov dword ptr [rbx + 0x300], {icr}" if icr else "nop"
    code = f"mov ebx, {LAPIC}\nmov dword ptr [rbx + 0xf0], 0x1ff\nout 0x10, al\n{send}\nnop\nout {RESUMED}, al\nhlt"
    with Guest(kvm, code, irqchip=True) as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        if by == "MSI":
            assert guest.vm.signal_msi(LAPIC, MESSAGE_SMI) == 1
        expect(guest.run(), INSIDE)
        expect(guest.run(), RESUMED)


def test_smi_wakes_a_halted_vcpu(kvm: Kvm) -> None:
    """HLT ends with an SMI, and RSM goes on behind it."""
    with Guest(kvm, f"out 0x10, al\nnop\nout {RESUMED}, al\nhlt", irqchip=True) as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        guest.vcpu.set_mp_state(common.KVM_MP_STATE_HALTED)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        expect(guest.run(), RESUMED)


def test_nmi_waits_for_rsm(kvm: Kvm) -> None:
    """NMIs are masked in system management mode; one that came is taken after RSM."""
    code = f"load_idt\nset_gate 2, nmi\nout 0x10, al\nnop\nhlt\nnmi:\nout {RESUMED}, al\niretq"
    handler = f"out {INSIDE}, al\nnop\nout {INSIDE + 1}, al\nrsm"
    with Guest(kvm, code, irqchip=True) as guest:
        prepare(guest, handler)
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        events = guest.vcpu.get_vcpu_events()
        assert events.nmi.masked and not events.smi.smm_inside_nmi
        guest.vcpu.nmi()
        expect(guest.run(), INSIDE + 1)
        expect(guest.run(), RESUMED)
        assert not in_smm(guest)


def test_smi_within_an_nmi(kvm: Kvm) -> None:
    """RSM leaves NMIs masked where the SMI found them so."""
    code = f"load_idt\nset_gate 2, nmi\nout 0x10, al\nnop\nhlt\nnmi:\nout {RESUMED}, al\nnop\nout 0x12, al\niretq"
    with Guest(kvm, code, irqchip=True) as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        guest.vcpu.nmi()
        expect(guest.run(), RESUMED)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        assert guest.vcpu.get_vcpu_events().smi.smm_inside_nmi
        expect(guest.run(), 0x12)
        events = guest.vcpu.get_vcpu_events()
        assert events.nmi.masked and not events.smi.smm_inside_nmi


def test_smi_waits_for_rsm(kvm: Kvm) -> None:
    """A second SMI comes when the first is done, before the guest goes on."""
    with Guest(kvm, f"out 0x10, al\nnop\nout {RESUMED}, al\nhlt") as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        guest.vcpu.smi()
        assert guest.vcpu.get_vcpu_events().smi.pending
        expect(guest.run(), INSIDE)
        expect(guest.run(), RESUMED)
        assert guest.vcpu.get_msrs([MSR_SMI_COUNT]) == {MSR_SMI_COUNT: 2}


def test_interrupt_shadow_is_saved(kvm: Kvm) -> None:
    """An SMI comes even between STI and the next instruction, and RSM goes on with the shadow that there was."""
    with Guest(kvm, f"out 0x10, al\nnop\nout {RESUMED}, al\nhlt") as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        complete(guest.vcpu)
        events = guest.vcpu.get_vcpu_events()
        events.interrupt.shadow = x86.KVM_X86_SHADOW_INT_STI
        events.smi.pending = 1
        events.flags = x86.KVM_VCPUEVENT_VALID_SHADOW | x86.KVM_VCPUEVENT_VALID_SMM
        guest.vcpu.set_vcpu_events(events)
        expect(guest.run(), INSIDE)
        assert not guest.vcpu.get_vcpu_events().interrupt.shadow
        assert area(guest, SHADOW_64, 1) & x86.KVM_X86_SHADOW_INT_STI
        expect(guest.run(), RESUMED)


def test_init_waits_for_rsm(kvm: Kvm) -> None:
    """An INIT that comes in system management mode is latched; KVM_SET_VCPU_EVENTS sets and clears that."""
    handler = f"out {INSIDE}, al\nnop\nout {INSIDE + 1}, al\nrsm"
    with Guest(kvm, f"out 0x10, al\nnop\nout {RESUMED}, al\nhlt", irqchip=True) as guest:
        prepare(guest, handler)
        find_lapic(guest.vcpu)
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        for state in (common.KVM_MP_STATE_INIT_RECEIVED, common.KVM_MP_STATE_SIPI_RECEIVED):
            with pytest.raises(OSError, match="KVM_SET_MP_STATE") as error:
                guest.vcpu.set_mp_state(state)
            assert error.value.errno == errno.EINVAL
        assert guest.vm.signal_msi(LAPIC, MESSAGE_INIT | 1 << 14) == 1
        expect(guest.run(), INSIDE + 1)
        events = guest.vcpu.get_vcpu_events()
        assert events.smi.smm and events.smi.latched_init
        events.smi.latched_init = 0
        events.flags = x86.KVM_VCPUEVENT_VALID_SMM
        guest.vcpu.set_vcpu_events(events)
        assert not guest.vcpu.get_vcpu_events().smi.latched_init
        expect(guest.run(), RESUMED)


def test_latched_init_comes_after_rsm(kvm: Kvm) -> None:
    """RSM lets the latched INIT take effect: another processor then waits for SIPI."""
    with Guest(kvm, "hlt", irqchip=True, vcpus=2) as guest:
        prepare(guest, f"out {INSIDE}, al\nnop\nrsm")
        guest.load(f"out {RESUMED}, al", bits=16, address=0x7000)
        other = guest.vcpus[1]
        find_lapic(other)
        other.set_mp_state(common.KVM_MP_STATE_RUNNABLE)
        other.smi()
        expect(guest.run(1), INSIDE)
        assert guest.vm.signal_msi(LAPIC | 1 << 12, MESSAGE_INIT | 1 << 14) == 1
        events = other.get_vcpu_events()
        assert events.smi.smm and events.smi.latched_init
        timeout_s, guest.timeout_s = guest.timeout_s, 0.05
        while other.get_vcpu_events().smi.smm:
            with suppress(TimeoutError):  # it waits
                guest.run(1)
        guest.timeout_s = timeout_s
        assert other.get_mp_state() == common.KVM_MP_STATE_INIT_RECEIVED
        assert other.get_msrs([MSR_SMBASE, MSR_SMI_COUNT]) == {MSR_SMBASE: SMBASE, MSR_SMI_COUNT: 0}
        assert guest.vm.signal_msi(LAPIC | 1 << 12, MESSAGE_SIPI | 7) == 1
        expect(guest.run(1), RESUMED)


def test_smi_state_moves(kvm: Kvm) -> None:
    """A vCPU in system management mode goes on in another VM, and comes out of it there."""
    code = f"mov ecx, 0x1234\nout 0x10, al\nnop\nout {RESUMED}, al\nhlt"
    moved = 0x50000
    handler = f"out {INSIDE}, al\nnop\nout {INSIDE + 1}, al\nrsm"
    with Guest(kvm, code, irqchip=True) as guest, Guest(kvm, "hlt", irqchip=True) as new:
        for machine in (guest, new):
            prepare(machine)
            machine.load(handler, bits=16, address=moved + 0x8000)
        assert guest.vcpu.set_msrs({MSR_SMBASE: moved}) == 1
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        complete(guest.vcpu)
        guest.vcpu.smi()  # this one is pending when it moves
        new.memory.write(0, guest.memory.read(0, MEMORY_BYTES))
        new.vm.memory_written(0, MEMORY_BYTES)
        state = save_vcpu(guest.vm, guest.vcpu, kvm.get_msr_index_list())
        assert state.msrs[MSR_SMBASE] == moved and state.events.smi.smm and state.events.smi.pending
        load_vcpu(new.vcpu, state)
        assert bytes(new.vcpu.get_vcpu_events()) == bytes(state.events)
        for port in (INSIDE + 1, INSIDE, INSIDE + 1, RESUMED):
            expect(new.run(), port)
        assert new.vcpu.get_regs().rcx == 0x1234


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (CR0_64, 1 << 31),  # paging without protection
        (CR4_64, 1 << 63),
        (CR3_64, 1 << 62),
        (EFER_64, 1 << 40),
        (0xFF60, 1 << 32),  # DR7
    ],
)
def test_rsm_to_an_impossible_state(kvm: Kvm, offset: int, value: int) -> None:
    """The processor shuts down."""
    with Guest(kvm, f"out 0x10, al\nnop\nout {RESUMED}, al\nhlt") as guest:
        prepare(guest)
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        expect(guest.run(), INSIDE)
        guest.memory.write(SMBASE + offset, value.to_bytes(8, "little"))
        assert guest.run() == Shutdown()


def test_no_memory_for_the_state(kvm: Kvm) -> None:
    """Where there is no memory for the state-save area, the VM is dead: nothing works any more."""
    with Guest(kvm, "out 0x10, al\nnop\nhlt") as guest:
        expect(guest.run(), 0x10)
        guest.vcpu.smi()
        for call in (guest.run, guest.run, guest.vcpu.get_regs, guest.vm.get_stats_fd):
            with pytest.raises(OSError) as error:
                call()
            assert error.value.errno == errno.EIO


@pytest.mark.parametrize("pending", [False, True])
def test_events_need_a_vcpu_beyond_init(kvm: Kvm, pending: bool) -> None:
    """A vCPU that waits for SIPI is not in system management mode, nor about to be."""
    with Guest(kvm, "hlt", irqchip=True, vcpus=2) as guest:
        other = guest.vcpus[1]
        other.set_mp_state(common.KVM_MP_STATE_INIT_RECEIVED)
        events = other.get_vcpu_events()
        events.flags, events.smi.smm, events.smi.pending = x86.KVM_VCPUEVENT_VALID_SMM, not pending, pending
        with pytest.raises(OSError, match="KVM_SET_VCPU_EVENTS") as error:
            other.set_vcpu_events(events)
        assert error.value.errno == errno.EINVAL


def test_smbase_is_not_the_guests(kvm: Kvm) -> None:
    """The guest can read how many SMIs there were, and that alone."""
    code = f"""
        load_idt
        set_gate 13, gp
        mov ecx, {MSR_SMI_COUNT}
        rdmsr
        out 0x10, al
        mov ecx, {MSR_SMBASE}
        rdmsr
        out 0x66, al
    gp: out {RESUMED}, al
        hlt
    """
    with Guest(kvm, code) as guest:
        assert guest.vcpu.set_msrs({MSR_SMI_COUNT: 5}) == 1
        exit_ = guest.run()
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"\x05"
        expect(guest.run(), RESUMED)
