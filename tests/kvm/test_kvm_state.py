"""What is set is what is read back, for every part of a vCPU's and a VM's state."""

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmkit.kvm import Kvm, Vcpu
from kvmkit.kvm.exits import Debug, Hlt, InternalError, Io, Shutdown
from kvmkit.testing import CODE, DATA, Guest
from kvmkit.uapi import x86
from kvmkit.uapi.common import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
)

REGISTERS = [name for name, *_ in x86.kvm_regs._fields_]


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Guest]:
    """A long mode guest with all chips."""
    with Guest(kvm, "hlt", irqchip=True, pit=True) as guest:
        yield guest


@pytest.fixture
def vcpu(guest: Guest) -> Vcpu:
    """Its vCPU."""
    return guest.vcpu


@pytest.mark.backs("KVM_GET_REGS", "KVM_SET_REGS")
def test_regs(vcpu: Vcpu) -> None:
    values = {name: 0x1111111111111111 * (i % 15 + 1) ^ i for i, name in enumerate(REGISTERS)}
    values["rflags"] = 0xAD7
    vcpu.set_regs(x86.kvm_regs(**values))
    regs = vcpu.get_regs()
    assert {name: getattr(regs, name) for name in REGISTERS} == values


def test_regs_are_what_the_guest_sees(kvm: Kvm) -> None:
    code = "\n".join(f"add {name}, {i}" for i, name in enumerate(REGISTERS[:16]) if name != "rsp") + "\nhlt"
    with Guest(kvm, code) as guest:
        regs = guest.vcpu.get_regs()
        for i, name in enumerate(REGISTERS[:16]):
            setattr(regs, name, 1000 * i)
        guest.vcpu.set_regs(regs)
        assert guest.run() == Hlt()
        regs = guest.vcpu.get_regs()
        rsp = REGISTERS.index("rsp")
        assert [getattr(regs, name) for name in REGISTERS[:16]] == [
            1001 * i if i != rsp else 1000 * i for i in range(16)
        ]
        assert regs.rip == CODE + len(guest.memory.read(CODE, 4096).rstrip(b"\0"))


@pytest.mark.backs("KVM_GET_SREGS", "KVM_SET_SREGS")
def test_sregs(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    sregs.fs.base, sregs.gs.base = 0x7F0000001000, 0xFFFF888000000000
    sregs.idt.base, sregs.idt.limit = 0x9000, 4095
    sregs.cr2, sregs.cr8 = 0xDEAD000, 5
    sregs.tr.base, sregs.tr.selector = 0x5000, 0x40
    vcpu.set_sregs(sregs)
    again = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt"):
        assert bytes(getattr(again, name)) == bytes(getattr(sregs, name)), name
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
        assert getattr(again, name) == getattr(sregs, name), name


@pytest.mark.backs("KVM_CREATE_VM", "KVM_CREATE_VCPU")
def test_real_mode_reset_state(kvm: Kvm) -> None:
    """A new vCPU is as after RESET: F000:FFF0 (SDM vol. 3, table 10-1)."""
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        assert (regs.rip, regs.rflags) == (0xFFF0, 2)
        assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF0000, 0xFFFF)
        assert (sregs.ds.selector, sregs.ds.base, sregs.ds.limit) == (0, 0, 0xFFFF)
        assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x60000010, 0, 0, 0)


@pytest.mark.backs("KVM_GET_FPU", "KVM_SET_FPU")
def test_fpu(vcpu: Vcpu) -> None:
    fpu = vcpu.get_fpu()
    fpu.fcw = 0x27F
    for i in range(16):
        fpu.xmm[i][:] = list(range(i, i + 16))
    vcpu.set_fpu(fpu)
    again = vcpu.get_fpu()
    assert again.fcw == 0x27F
    assert [bytes(again.xmm[i]) for i in range(16)] == [bytes(range(i, i + 16)) for i in range(16)]


@pytest.mark.backs("KVM_GET_XSAVE", "KVM_SET_XSAVE")
def test_xsave(vcpu: Vcpu, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_XSAVE")
    area = vcpu.get_xsave()
    area.region[24 // 4] = 0x1FA0  # MXCSR
    area.region[160 // 4] = 0x12345678  # xmm0
    area.region[512 // 4] |= 2  # XSTATE_BV: SSE
    vcpu.set_xsave(area)
    assert vcpu.get_xsave().region[24 // 4] == 0x1FA0
    assert bytes(vcpu.get_xsave())[160:164] == (0x12345678).to_bytes(4, "little")
    assert bytes(vcpu.get_fpu().xmm[0])[:4] == (0x12345678).to_bytes(4, "little")


@pytest.mark.backs("KVM_GET_XSAVE2")
def test_xsave2(guest: Guest, needs: Callable[[str], int]) -> None:
    size_bytes = needs("KVM_CAP_XSAVE2")
    area = guest.vcpu.get_xsave2()
    assert len(area) == size_bytes >= 4096
    guest.vcpu.set_xsave(area)
    assert guest.vcpu.get_xsave2() == area


@pytest.mark.backs("KVM_GET_XCRS", "KVM_SET_XCRS")
def test_xcrs(vcpu: Vcpu, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_XCRS")
    xcrs = vcpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr) == (1, 0)
    xcrs.xcrs[0].value = 3
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3


MSRS = {
    0x174: 0x10,  # SYSENTER_CS
    0x175: 0x81001000,  # SYSENTER_ESP: AMD keeps 32 bits
    0x176: 0x81002000,  # SYSENTER_EIP
    0x277: 0x0007040600070406,  # PAT
    0xC0000081: 0x0023001000000000,  # STAR
    0xC0000082: 0xFFFFFFFF81000000,  # LSTAR
    0xC0000084: 0x47700,  # SFMASK
    0xC0000100: 0x7F0000000000,  # FS_BASE
    0xC0000101: 0xFFFF880000000000,  # GS_BASE
    0xC0000102: 0x7F1000000000,  # KERNEL_GS_BASE
}


@pytest.mark.backs("KVM_GET_MSRS", "KVM_SET_MSRS")
def test_msrs(vcpu: Vcpu) -> None:
    assert vcpu.set_msrs(MSRS) == len(MSRS)
    assert vcpu.get_msrs(MSRS) == MSRS


def test_msrs_are_what_the_guest_sees(kvm: Kvm) -> None:
    code = "mov ecx, 0xc0000082\nrdmsr\nout 0x10, eax\nmov eax, 0x81234567\nmov edx, -1\nwrmsr\nhlt"
    with Guest(kvm, code) as guest:
        guest.vcpu.set_msrs({0xC0000082: 0xFFFFFFFF81000000})
        exit_ = guest.run()
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"\0\0\0\x81"
        assert guest.run() == Hlt()
        assert guest.vcpu.get_msrs([0xC0000082]) == {0xC0000082: 0xFFFFFFFF81234567}


def test_msrs_end_at_the_first_that_fails(vcpu: Vcpu) -> None:
    """As KVM does: the count says how many came through."""
    unknown = 0x12345678
    assert vcpu.get_msrs([0xC0000082, unknown, 0xC0000081]).keys() == {0xC0000082}
    assert vcpu.set_msrs({0xC0000081: 1 << 32, unknown: 0, 0xC0000084: 0}) == 1


@pytest.mark.backs("KVM_GET_MSR_INDEX_LIST")
def test_msr_index_list(kvm: Kvm) -> None:
    indices = kvm.get_msr_index_list()
    assert {0xC0000080, 0xC0000081, 0xC0000082, 0x10} <= set(indices) | {0xC0000080}
    assert len(indices) == len(set(indices))


@pytest.mark.backs("KVM_GET_SUPPORTED_CPUID", "KVM_SET_CPUID2", "KVM_GET_CPUID2")
def test_cpuid2(kvm: Kvm) -> None:
    supported = kvm.get_supported_cpuid()
    by_leaf = {(entry.function, entry.index): entry for entry in supported}
    assert by_leaf[0x80000001, 0].edx >> 29 & 1  # long mode
    code = "mov eax, 0x40000010\nxor ecx, ecx\ncpuid\nout 0x10, eax\nmov eax, ebx\nout 0x10, eax\nhlt"
    with Guest(kvm, code) as guest:
        mine = x86.kvm_cpuid_entry2(function=0x40000010, eax=0x11223344, ebx=0x55667788)
        entries = [entry for entry in guest.vcpu.get_cpuid2() if entry.function >> 28 != 4]
        guest.vcpu.set_cpuid2([*entries, mine])
        assert guest.vcpu.get_cpuid2()[-1].eax == 0x11223344
        values = []
        while isinstance(exit_ := guest.run(), Io):
            values.append(int.from_bytes(exit_.data, "little"))
        if values == [] and guest.engine == "linux":
            pytest.skip(f"linux: this KVM can't emulate CPUID: {exit_}")
        assert values == [0x11223344, 0x55667788]


@pytest.mark.backs("KVM_GET_LAPIC", "KVM_SET_LAPIC")
def test_lapic(vcpu: Vcpu) -> None:
    lapic = vcpu.get_lapic()
    assert lapic.regs[0x30] & 0xF0 == 0x10  # version
    lapic.regs[0x80] = 0x20  # TPR
    lapic.regs[0xF0:0xF4] = [0xFF, 0x01, 0, 0]
    lapic.regs[0x320:0x324] = [0xEC, 0, 1, 0]
    vcpu.set_lapic(lapic)
    again = vcpu.get_lapic()
    assert again.regs[0x80] == 0x20
    assert bytes(again.regs[0xF0:0xF4]) == (0x1FF).to_bytes(4, "little")
    assert bytes(again.regs[0x320:0x324]) == (0x100EC).to_bytes(4, "little")
    assert vcpu.get_sregs().cr8 == 2


@pytest.mark.backs("KVM_GET_MP_STATE", "KVM_SET_MP_STATE")
@pytest.mark.parametrize("state", [KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE])
def test_mp_state(vcpu: Vcpu, state: int) -> None:
    vcpu.set_mp_state(state)
    assert vcpu.get_mp_state() == state


@pytest.mark.backs("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS")
def test_vcpu_events(vcpu: Vcpu) -> None:
    events = vcpu.get_vcpu_events()
    assert events.nmi.masked == 0
    events.nmi.masked = 1
    events.interrupt.shadow = x86.KVM_X86_SHADOW_INT_STI
    events.flags = x86.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_vcpu_events(events)
    again = vcpu.get_vcpu_events()
    assert again.nmi.masked == 1
    assert (
        again.interrupt.shadow & x86.KVM_X86_SHADOW_INT_STI
    )  # SVM knows one kind of shadow and reports both


@pytest.mark.backs("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS")
def test_debugregs(vcpu: Vcpu) -> None:
    debugregs = x86.kvm_debugregs(dr6=0xFFFF0FF0, dr7=0x400)
    debugregs.db[:] = [0x1000, 0x2000, 0x3000, 0x4000]
    vcpu.set_debugregs(debugregs)
    again = vcpu.get_debugregs()
    assert (list(again.db), again.dr6, again.dr7) == ([0x1000, 0x2000, 0x3000, 0x4000], 0xFFFF0FF0, 0x400)


@pytest.mark.backs("KVM_GET_PIT2", "KVM_SET_PIT2")
def test_pit2(guest: Guest) -> None:
    state = guest.vm.get_pit2()
    state.channels[2].count, state.channels[2].mode, state.channels[2].rw_mode = 0x4000, 3, 3
    guest.vm.set_pit2(state)
    channel = guest.vm.get_pit2().channels[2]
    assert (channel.count, channel.mode, channel.rw_mode) == (0x4000, 3, 3)


@pytest.mark.backs("KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP")
@pytest.mark.parametrize("chip_id", [x86.KVM_IRQCHIP_PIC_MASTER, x86.KVM_IRQCHIP_PIC_SLAVE])
def test_pic(guest: Guest, chip_id: int) -> None:
    chip = guest.vm.get_irqchip(chip_id)
    chip.chip.pic.imr, chip.chip.pic.irq_base = 0xA5, 0x38
    guest.vm.set_irqchip(chip)
    pic = guest.vm.get_irqchip(chip_id).chip.pic
    assert (pic.imr, pic.irq_base) == (0xA5, 0x38)


@pytest.mark.backs("KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP")
def test_ioapic(guest: Guest) -> None:
    chip = guest.vm.get_irqchip(x86.KVM_IRQCHIP_IOAPIC)
    assert chip.chip.ioapic.base_address == 0xFEC00000
    assert chip.chip.ioapic.redirtbl[3].fields.mask == 1
    chip.chip.ioapic.redirtbl[3].bits = 0x0100000000018031
    guest.vm.set_irqchip(chip)
    again = guest.vm.get_irqchip(x86.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[3]
    assert again.bits == 0x0100000000018031
    assert (again.fields.vector, again.fields.trig_mode, again.fields.mask, again.fields.dest_id) == (
        0x31,
        1,
        1,
        1,
    )


@pytest.mark.backs("KVM_GET_CLOCK", "KVM_SET_CLOCK")
def test_clock(guest: Guest) -> None:
    first = guest.vm.get_clock().clock
    assert guest.vm.get_clock().clock >= first
    data = type(guest.vm.get_clock())(clock=10**15)
    guest.vm.set_clock(data)
    assert 10**15 <= guest.vm.get_clock().clock < 10**15 + 60 * 10**9


@pytest.mark.backs("KVM_GET_TSC_KHZ")
def test_tsc_khz(vcpu: Vcpu, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_GET_TSC_KHZ")
    assert 100_000 < vcpu.get_tsc_khz() < 10_000_000


@pytest.mark.backs("KVM_TRANSLATE")
def test_translate(vcpu: Vcpu) -> None:
    """The guest maps the first 4 GiB to themselves and nothing else."""
    translation = vcpu.translate(0x12345678)
    assert (translation.valid, translation.physical_address) == (1, 0x12345678)
    assert vcpu.translate(0x7F0000000000).valid == 0


def dirty_pages(guest: Guest) -> set[int]:
    """Page numbers that slot 0's log reports."""
    log = int.from_bytes(guest.vm.get_dirty_log(0), "little")
    return {page for page in range(guest.memory.size_bytes >> 12) if log >> page & 1}


@pytest.mark.backs("KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION")
def test_dirty_log(kvm: Kvm) -> None:
    """A logged slot reports the pages that the guest wrote since the last call; it may report some that were read."""
    code = f"mov byte ptr [{DATA}], 1\nmov byte ptr [{DATA + 0x47000}], 1\nmov al, [{DATA + 0x50000}]\nout 0x10, al\nhlt"
    with Guest(kvm, code) as guest:
        guest.vm.set_user_memory_region(
            0, 0, guest.memory.size_bytes, guest.memory.address, KVM_MEM_LOG_DIRTY_PAGES
        )
        guest.vm.get_dirty_log(0)
        assert isinstance(guest.run(), Io)
        written = dirty_pages(guest)
        assert {DATA >> 12, (DATA + 0x47000) >> 12} <= written
        assert not written & {0x70, 0x90}
        assert guest.run() == Hlt()
        assert not dirty_pages(guest) & {DATA >> 12, (DATA + 0x47000) >> 12}


def test_read_only_slot_exits_on_write(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_READONLY_MEM")
    with Guest(kvm, f"mov eax, [{0x200000}]\nmov [{0x200000}], eax\nhlt") as guest:
        address = guest.memory.address + 0x50000
        guest.map.write(0x50000, b"ROM!")
        guest.vm.set_user_memory_region(1, 0x200000, 0x1000, address, KVM_MEM_READONLY)
        exit_ = guest.run()
        assert (exit_.phys_addr, exit_.is_write, bytes(exit_.data)) == (0x200000, True, b"ROM!")  # type: ignore[union-attr]
        assert guest.run() == Hlt()


@pytest.mark.backs("KVM_SET_USER_MEMORY_REGION")
def test_deleted_slot_exits(kvm: Kvm) -> None:
    with Guest(kvm, f"mov al, [{0x200000}]\nout 0x10, al\nmov al, [{0x200000}]\nhlt") as guest:
        guest.vm.set_user_memory_region(1, 0x200000, 0x1000, guest.memory.address + 0x50000)
        assert isinstance(guest.run(), Io)
        guest.vm.set_user_memory_region(1, 0, 0, 0)
        exit_: Any = guest.run()
        assert exit_.phys_addr == 0x200000


@pytest.mark.backs("KVM_SET_GUEST_DEBUG")
def test_single_step(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SET_GUEST_DEBUG")
    with Guest(kvm, "nop\nmov eax, 5\nhlt") as guest:
        debug = x86.kvm_guest_debug(control=KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        guest.vcpu.set_guest_debug(debug)
        seen = []
        for _ in range(2):
            exit_ = guest.run()
            assert isinstance(exit_, Debug)
            seen.append(exit_.arch.pc)
        assert seen == [CODE + 1, CODE + 6]


@pytest.mark.backs("KVM_SET_GUEST_DEBUG")
def test_breakpoints(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SET_GUEST_DEBUG")
    with Guest(kvm, f"nop\nmov [{DATA}], eax\nnop\nint3\nhlt") as guest:
        debug = x86.kvm_guest_debug(
            control=KVM_GUESTDBG_ENABLE | x86.KVM_GUESTDBG_USE_HW_BP | x86.KVM_GUESTDBG_USE_SW_BP
        )
        debug.arch.debugreg[0] = CODE + 1
        debug.arch.debugreg[1] = DATA
        debug.arch.debugreg[7] = 0x400 | 1 | 1 << 2 | 0b1101 << 20  # 0: an instruction; 1: writes of 4 bytes
        guest.vcpu.set_guest_debug(debug)
        at_instruction = guest.run()
        if guest.engine == "linux" and at_instruction == Shutdown():
            pytest.skip(
                "linux: below this KVM is QEMU's TCG, which gives the guest the #DB that SVM intercepts"
            )
        assert isinstance(at_instruction, Debug)
        arch = at_instruction.arch
        assert (arch.exception, arch.pc, arch.dr6 & 0xF) == (1, CODE + 1, 1)
        debug.arch.debugreg[7] &= ~1
        guest.vcpu.set_guest_debug(debug)
        after_write = guest.run()
        if guest.engine == "linux" and isinstance(after_write, InternalError) and after_write.insn_bytes:
            # A KVM without hardware executes supervisor code with the kernel's emulator.
            pytest.skip(f"linux: this KVM can't emulate {after_write.insn_bytes.hex()}")
        assert isinstance(after_write, Debug)
        assert (after_write.arch.exception, after_write.arch.dr6 & 0xF) == (1, 2)
        nop = after_write.arch.pc
        at_int3 = guest.run()
        assert isinstance(at_int3, Debug)
        assert (at_int3.arch.exception, at_int3.arch.pc) == (3, nop + 1)
        assert guest.vcpu.get_regs().rip == nop + 1


def test_stats_fd(guest: Guest, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_BINARY_STATS_FD")
    from kvmkit.uapi.common import kvm_stats_header

    fd = guest.vcpu.get_stats_fd()
    try:
        header = kvm_stats_header.from_buffer_copy(os.pread(fd, ctypes.sizeof(kvm_stats_header), 0))
    finally:
        os.close(fd)
    assert header.num_desc > 0 and header.name_size > 0
