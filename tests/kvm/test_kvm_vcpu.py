"""What a vCPU has beside the state of `test_kvm_state`: machine checks, nested state, task priority, SMM, statistics, attributes."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Hlt, Io, Shutdown, TprAccess
from kvmkit.kvm.stats import read_stats
from kvmkit.testing import DATA, MEMORY_BYTES, Guest
from kvmkit.uapi import common, x86
from kvmkit.uapi.capabilities import KVM_CAP_TSC_CONTROL
from kvmkit.uapi.common import KVM_REG_SIZE_U32, KVM_REG_SIZE_U64, KVM_REG_X86

from .evidence import module_of_kvm

LAPIC = 0xFEE00000
TPR = 0x80


def refused(call: Callable[[], object], *numbers: int) -> None:
    """Assert that a call fails with one of these errnos."""
    with pytest.raises(OSError, match="KVM_") as error:
        call()
    assert error.value.errno in numbers


@pytest.mark.backs("KVM_GET_SREGS2", "KVM_SET_SREGS2")
def test_sregs2(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_SREGS2")
    with Guest(kvm, "hlt") as guest:
        sregs2, sregs = guest.vcpu.get_sregs2(), guest.vcpu.get_sregs()
        assert bytes(sregs2)[: x86.kvm_sregs2.flags.offset] == bytes(sregs)[: x86.kvm_sregs2.flags.offset]  # type: ignore[attr-defined]
        assert sregs2.flags == 0  # no PDPTRs in long mode
        sregs2.fs.base, sregs2.cr2 = 0x7000, 0x9000
        guest.vcpu.set_sregs2(sregs2)
        again = guest.vcpu.get_sregs()
        assert (again.fs.base, again.cr2) == (0x7000, 0x9000)
        sregs2.flags = 1 << 40
        refused(lambda: guest.vcpu.set_sregs2(sregs2), errno.EINVAL)


def test_cached_page_directory_pointers(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """PAE's four PDPTEs are loaded with CR3 and kept, whatever becomes of memory; KVM_SET_SREGS2 sets them."""
    needs("KVM_CAP_SREGS2")
    pointers, directories = 0x20000, (0x21000, 0x22000)
    with Guest(kvm, "hlt", bits=32) as guest:
        for n, directory in enumerate(directories):
            guest.memory.write(directory, ((n + 1) << 21 | 0x83).to_bytes(8, "little"))
        guest.memory.write(pointers, (directories[0] | 1).to_bytes(8, "little").ljust(32, b"\0"))
        sregs = guest.vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4 = sregs.cr0 | 1 << 31, pointers, 1 << 5
        guest.vcpu.set_sregs(sregs)
        if not guest.vcpu.get_sregs().cr0 >> 31:
            pytest.skip(f"{kvm.engine}: this KVM knows no paging outside long mode")
        guest.memory.write(pointers, bytes(32))
        sregs2 = guest.vcpu.get_sregs2()
        assert sregs2.flags == x86.KVM_SREGS2_FLAGS_PDPTRS_VALID
        assert list(sregs2.pdptrs) == [directories[0] | 1, 0, 0, 0]
        assert guest.vcpu.translate(0x1234).physical_address == (1 << 21) + 0x1234
        sregs2.pdptrs[0] = directories[1] | 1
        guest.vcpu.set_sregs2(sregs2)
        assert list(guest.vcpu.get_sregs2().pdptrs) == [directories[1] | 1, 0, 0, 0]
        assert guest.vcpu.translate(0x1234).physical_address == (2 << 21) + 0x1234


def test_microcode_revision(kvm: Kvm) -> None:
    """User space sets what the guest reads, and the guest's own writes do nothing."""
    code = "mov ecx, 0x8b\nmov eax, 1\nmov edx, 2\nwrmsr\nhlt"
    with Guest(kvm, code) as guest:
        assert guest.vcpu.set_msrs({0x8B: 7 << 32}) == 1
        assert isinstance(guest.run(), Hlt)
        assert guest.vcpu.get_msrs([0x8B]) == {0x8B: 7 << 32}


@pytest.mark.backs("KVM_SET_CPUID")
def test_old_cpuid(kvm: Kvm) -> None:
    """Leaves without sub-leaves; KVM_GET_CPUID2 returns them."""
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid([x86.kvm_cpuid_entry(0, 1, 2, 3, 4), x86.kvm_cpuid_entry(1, 0x600F20, 0, 0, 1)])
        leaves = {e.function: (e.index, e.eax) for e in vcpu.get_cpuid2()}
        assert leaves[0] == (0, 1) and leaves[1] == (0, 0x600F20)
        refused(lambda: vcpu.set_cpuid([x86.kvm_cpuid_entry()] * 300), errno.E2BIG)


MCG_STATUS, MC0_STATUS = 0x17A, 0x401


@pytest.mark.backs("KVM_X86_SETUP_MCE", "KVM_X86_GET_MCE_CAP_SUPPORTED", "KVM_X86_SET_MCE")
def test_machine_check(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """A corrected error is logged in its bank; an uncorrected one is an exception."""
    assert needs("KVM_CAP_MCE") >= 1
    supported = kvm.x86_get_mce_cap_supported()
    assert supported & 1 << 8  # MCG_CTL
    code = "set_gate 18, handler\nload_idt\nout 0x10, al\nnop\nnop\nhlt\nhandler:\nout 0x12, al\nhlt"
    with Guest(kvm, code, irqchip=True) as guest:
        vcpu = guest.vcpu
        refused(lambda: vcpu.x86_setup_mce(33), errno.EINVAL)
        refused(lambda: vcpu.x86_setup_mce(1 << 60 | 4), errno.EINVAL)
        vcpu.x86_setup_mce(supported & ~0xFF | 4)
        refused(lambda: vcpu.x86_set_mce(x86.kvm_x86_mce(status=1 << 63, bank=4)), errno.EINVAL)
        refused(lambda: vcpu.x86_set_mce(x86.kvm_x86_mce(status=0, bank=0)), errno.EINVAL)
        vcpu.x86_set_mce(x86.kvm_x86_mce(status=1 << 63 | 0x11, bank=0))
        assert vcpu.get_msrs([MC0_STATUS])[MC0_STATUS] == 1 << 63 | 0x11
        assert isinstance(guest.run(), Io)
        sregs = vcpu.get_sregs()
        sregs.cr4 |= 1 << 6  # MCE
        vcpu.set_sregs(sregs)
        vcpu.x86_set_mce(x86.kvm_x86_mce(status=1 << 63 | 1 << 61 | 0x22, mcg_status=5, bank=0))
        exit_ = guest.run()
        assert isinstance(exit_, Io) and exit_.port == 0x12
        assert vcpu.get_msrs([MCG_STATUS])[MCG_STATUS] & 4


MCG_CAP, MCG_CTL, MC0_CTL, MC0_ADDR, MC0_MISC = 0x179, 0x17B, 0x400, 0x402, 0x403
VALID, OVERFLOW, UNCORRECTED, ENABLED = 1 << 63, 1 << 62, 1 << 61, 1 << 60
IN_PROGRESS = 1 << 2


def test_machine_check_without_setup(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """All banks, and no more."""
    needs("KVM_CAP_MCE")
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert vcpu.get_msrs([MCG_CAP]) == {MCG_CAP: 32}
        assert len(vcpu.get_msrs(range(MC0_CTL, MC0_CTL + 129))) == 128


@pytest.mark.parametrize(
    ("mcg_cap", "msr", "value", "taken"),
    [
        (1 << 8 | 2, MCG_CTL, 0, True),
        (1 << 8 | 2, MCG_CTL, (1 << 64) - 1, True),
        (1 << 8 | 2, MCG_CTL, 1, False),
        (2, MCG_CTL, 0, True),
        (2, MCG_CTL, (1 << 64) - 1, False),
        (2, MC0_CTL, 5, False),
        (2, MC0_CTL, (1 << 64) - 1 & ~(1 << 10 | 1), True),
        (2, MC0_STATUS, VALID | 5, True),
        (2, MC0_STATUS + 4, 5, True),
        (2, MC0_STATUS + 8, 0, False),  # of the third bank
        (2, MCG_STATUS, 7, True),
    ],
)
def test_machine_check_registers(
    kvm: Kvm, needs: Callable[[str], int], mcg_cap: int, msr: int, value: int, taken: bool
) -> None:
    needs("KVM_CAP_MCE")
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.x86_setup_mce(mcg_cap)
        assert vcpu.set_msrs({msr: value}) == taken
        if taken:
            assert vcpu.get_msrs([msr]) == {msr: value}


@pytest.mark.parametrize(
    ("present", "status", "mcg_status", "expected"),
    [
        (0, VALID | 5, 0, VALID | 5),
        (VALID | 3, VALID | 5, 0, VALID | OVERFLOW | 5),
        (VALID | UNCORRECTED | 3, VALID | 5, 0, VALID | OVERFLOW | UNCORRECTED | 3),  # the worse one stays
        (VALID | 3, VALID | UNCORRECTED | 5, 0, VALID | UNCORRECTED | 5),  # no action required
    ],
)
def test_machine_check_is_logged(
    kvm: Kvm, needs: Callable[[str], int], present: int, status: int, mcg_status: int, expected: int
) -> None:
    needs("KVM_CAP_MCE")
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.x86_setup_mce(2)
        assert vcpu.set_msrs({MC0_STATUS: present, MC0_ADDR: 1, MC0_MISC: 2}) == 3
        vcpu.x86_set_mce(
            x86.kvm_x86_mce(status=status, addr=0x1000, misc=0x86, mcg_status=mcg_status, bank=0)
        )
        logged = vcpu.get_msrs([MC0_STATUS, MC0_ADDR, MC0_MISC])
        kept = expected & 0xFF == 3
        assert logged == {
            MC0_STATUS: expected,
            MC0_ADDR: 1 if kept else 0x1000,
            MC0_MISC: 2 if kept else 0x86,
        }


@pytest.mark.parametrize(
    ("mce", "in_progress", "enabled", "port"),
    [
        (True, False, True, 0x12),
        (True, False, False, 0x11),  # the bank doesn't report
        (False, False, True, None),
        (True, True, True, None),  # a second one while the first is handled
    ],
)
def test_uncorrected_machine_check(
    kvm: Kvm, needs: Callable[[str], int], mce: bool, in_progress: bool, enabled: bool, port: int | None
) -> None:
    """#MC, nothing, or the processor shuts down."""
    needs("KVM_CAP_MCE")
    code = "set_gate 18, handler\nload_idt\nout 0x10, al\nout 0x11, al\nhlt\nhandler:\nout 0x12, al\nhlt"
    with Guest(kvm, code) as guest:
        vcpu = guest.vcpu
        assert isinstance(guest.run(), Io)
        sregs = vcpu.get_sregs()
        sregs.cr4 = sregs.cr4 & ~(1 << 6) | mce << 6
        vcpu.set_sregs(sregs)
        vcpu.x86_setup_mce(1 << 8 | 1)
        vcpu.set_msrs({MCG_STATUS: IN_PROGRESS * in_progress, MC0_CTL: (1 << 64) - 1 if enabled else 0})
        status = VALID | UNCORRECTED | ENABLED | 0x22
        vcpu.x86_set_mce(x86.kvm_x86_mce(status=status, mcg_status=IN_PROGRESS | 1, bank=0))
        exit_ = guest.run()
        if port is None:
            assert exit_ == Shutdown()
        else:
            assert isinstance(exit_, Io) and exit_.port == port
            assert vcpu.get_msrs([MC0_STATUS])[MC0_STATUS] == (status if port == 0x12 else 0)


@pytest.mark.backs("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")
def test_nested_state(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Outside a nested guest it is the head alone; what contradicts itself is refused."""
    assert needs("KVM_CAP_NESTED_STATE") >= ctypes.sizeof(x86.kvm_nested_state)
    with Guest(kvm, "hlt") as guest:
        state = guest.vcpu.get_nested_state()
        head = x86.kvm_nested_state.from_buffer_copy(state)
        assert head.size == len(state) and head.format in (0, 1)
        assert not head.flags & x86.KVM_STATE_NESTED_GUEST_MODE
        guest.vcpu.set_nested_state(state)
        assert guest.vcpu.get_nested_state() == state
        head.format = 7
        refused(lambda: guest.vcpu.set_nested_state(bytes(head)), errno.EINVAL)
        head.format, head.size = 1, 1 << 20
        refused(lambda: guest.vcpu.set_nested_state(bytes(head)), errno.EINVAL)


def needs_software_apic(kvm: Kvm) -> None:
    """Skip the test where the host's processor itself answers accesses to the local APIC, which then don't exit."""
    for parameter in ("kvm_amd/parameters/avic", "kvm_intel/parameters/enable_apicv"):
        path = Path("/sys/module") / parameter
        if kvm.engine == "linux" and path.exists() and path.read_text().strip() in ("Y", "1"):
            pytest.skip(f"linux: {parameter} is on")


def emulates(kvm: Kvm) -> bool:
    """Whether KVM emulates the guest's code on and on, and looks at what there is for user space but now and then."""
    return kvm.engine == "linux" and module_of_kvm() == "kvm-pvm"


def needs_exits_of_instructions(kvm: Kvm) -> None:
    """Skip the test where what an instruction causes doesn't leave before the next one."""
    if emulates(kvm):
        pytest.skip("linux: kvm_pvm emulates this code, many instructions at a time")


def task_priority(guest: Guest) -> int:
    """The first vCPU's TPR."""
    return bytes(guest.vcpu.get_lapic())[TPR]


@pytest.mark.backs("KVM_TPR_ACCESS_REPORTING")
def test_tpr_access_reporting(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """With reporting, the guest's access to its task priority exits, too."""
    needs("KVM_CAP_VAPIC")
    needs_software_apic(kvm)
    code = f"mov ebx, {LAPIC}\nout 0x10, al\nmov dword ptr [rbx + {TPR}], 0x20\nout 0x11, al\nout 0x12, al"
    with Guest(kvm, code, irqchip=True) as guest:
        guest.vcpu.tpr_access_reporting(True)
        assert isinstance(guest.run(), Io)
        access = guest.vcpu.get_regs().rip
        exits = [guest.run() for _ in range(3)]
        assert [exit_.port for exit_ in exits if isinstance(exit_, Io)] == [0x11, 0x12]
        assert [type(exit_) for exit_ in exits].count(TprAccess) == 1
        if not emulates(
            kvm
        ):  # else the port's exit comes first, and in kvm_run takes the place of what is reported
            assert isinstance(exits[0], TprAccess) and exits[0].is_write
            assert (
                access <= exits[0].rip <= access + 2
            )  # where the OUT before it is completed by the next run
        assert task_priority(guest) == 0x20


def test_tpr_access(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The exit comes once the instruction is complete, and names it."""
    needs("KVM_CAP_VAPIC")
    needs_software_apic(kvm)
    needs_exits_of_instructions(kvm)
    code = f"""
        mov ebx, {LAPIC}
        mov dword ptr [rbx + {TPR}], 0x10
        out 0x10, al
    write:
        mov dword ptr [rbx + {TPR}], 0x20
        inc ecx
    read:
        mov edx, [rbx + {TPR}]
        inc ecx
        mov eax, [rbx + 0x30]           # the version
        mov dword ptr [rbx + 0xb0], 0   # end of interrupt
        mov eax, 3
        mov cr8, rax                    # not by the APIC's page
        out 0x11, al
        mov dword ptr [rbx + {TPR}], 0x40
        out 0x12, al
    """
    with Guest(kvm, code, irqchip=True) as guest:
        assert isinstance(guest.run(), Io)
        guest.vcpu.tpr_access_reporting(True)
        before = guest.vcpu.get_regs()
        exit_ = guest.run()
        assert isinstance(exit_, TprAccess) and exit_.is_write
        regs = guest.vcpu.get_regs()
        assert regs.rip > exit_.rip >= before.rip and (regs.rcx, task_priority(guest)) == (before.rcx, 0x20)
        exit_ = guest.run()
        assert isinstance(exit_, TprAccess) and not exit_.is_write
        regs = guest.vcpu.get_regs()
        assert regs.rip > exit_.rip and (regs.rcx, regs.rdx) == (before.rcx + 1, 0x20)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and exit_.port == 0x11
        guest.vcpu.tpr_access_reporting(False)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and exit_.port == 0x12
        assert task_priority(guest) == 0x40


def test_tpr_access_by_an_msr(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """In x2APIC mode, too."""
    needs("KVM_CAP_VAPIC")
    needs_software_apic(kvm)
    needs_exits_of_instructions(kvm)
    code = """
        mov ecx, 0x1b
        rdmsr
        or eax, 0x400
        wrmsr
        mov ecx, 0x808
        mov eax, 0x50
        xor edx, edx
        out 0x10, al
        wrmsr
        inc ebx
        rdmsr
        inc ebx
        out 0x11, al
    """
    with Guest(kvm, code, irqchip=True) as guest:
        assert isinstance(guest.run(), Io)
        guest.vcpu.tpr_access_reporting(True)
        rbx = guest.vcpu.get_regs().rbx
        for n, is_write in enumerate((True, False)):
            exit_ = guest.run()
            assert isinstance(exit_, TprAccess) and exit_.is_write == is_write
            assert guest.vcpu.get_regs().rbx == rbx + n
        exit_ = guest.run()
        assert isinstance(exit_, Io) and bytes(exit_.data) == b"\x50"


@pytest.mark.backs("KVM_SET_VAPIC_ADDR")
def test_vapic_page(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """A word in memory is the task priority: the guest writes byte 0; KVM shows what is requested and in service."""
    needs("KVM_CAP_VAPIC")
    needs_software_apic(kvm)
    vector = 0x35
    code = f"""
        load_idt
        set_gate {vector}, handler
        mov ebx, {LAPIC}
        mov dword ptr [rbx + 0xf0], 0x1ff
        out 0x10, al
        mov byte ptr [{DATA}], 0x30
        out 0x11, al
        mov byte ptr [{DATA}], 0x40
        out 0x12, al
        mov byte ptr [{DATA}], 0x20
        out 0x13, al
        sti
        hlt
    handler:
        out 0x14, al
        out 0x15, al
    """
    with Guest(kvm, code, irqchip=True) as guest:
        refused(lambda: guest.vcpu.set_vapic_addr(MEMORY_BYTES), errno.EINVAL)
        refused(lambda: guest.vcpu.set_vapic_addr(MEMORY_BYTES - 2), errno.EINVAL)
        guest.vcpu.set_vapic_addr(DATA)

        def run_to(port: int) -> bytes:
            exit_ = guest.run()
            assert isinstance(exit_, Io) and exit_.port == port
            return guest.memory.read(DATA, 4)

        run_to(0x10)
        run_to(0x11)
        assert emulates(kvm) or task_priority(guest) == 0x30
        assert guest.vm.signal_msi(LAPIC, vector) == 1
        assert run_to(0x12) == bytes((0x40, 0, 0, vector))
        run_to(0x13)
        assert run_to(0x14) == bytes((0x20, vector & 0xF0, 0, 0))
        assert task_priority(guest) == 0x20
        guest.vcpu.set_vapic_addr(0)
        guest.memory.write(DATA, b"\x90")
        refused(lambda: guest.vcpu.set_vapic_addr(1 << 45), errno.EINVAL)
        assert isinstance(guest.run(), Io)
        assert task_priority(guest) == 0x20
    with Guest(kvm, "hlt") as guest:
        refused(lambda: guest.vcpu.set_vapic_addr(DATA), errno.EINVAL)


@pytest.mark.backs("KVM_SMI")
def test_smi(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """An SMI enters system management mode at SMBASE + 0x8000; RSM leaves it."""
    needs("KVM_CAP_X86_SMM")
    with Guest(kvm, "out 0x10, al\nnop\nhlt", irqchip=True) as guest:
        smbase = 0x40000
        assert guest.vcpu.set_msrs({0x9E: smbase}) == 1
        memory = guest.memory  # system management mode has slots of its own (KVM_CAP_MULTI_ADDRESS_SPACE)
        guest.vm.set_user_memory_region(1 << 16, 0, memory.size_bytes, memory.address)
        guest.load("mov al, 0x77\nout 0x70, al\nrsm", bits=16, address=smbase + 0x8000)
        assert isinstance(guest.run(), Io)
        guest.vcpu.smi()
        exit_ = guest.run()
        assert isinstance(exit_, Io) and (exit_.port, bytes(exit_.data)) == (0x70, b"\x77")
        assert guest.vcpu.kvm_run.flags & x86.KVM_RUN_X86_SMM


@pytest.mark.backs("KVM_KVMCLOCK_CTRL")
def test_kvmclock_ctrl(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Sets PVCLOCK_GUEST_STOPPED in the guest's clock page, if it has one."""
    needs("KVM_CAP_KVMCLOCK_CTRL")
    code = f"mov ecx, {x86.MSR_KVM_SYSTEM_TIME_NEW}\nmov eax, {DATA} | 1\nxor edx, edx\nwrmsr\nout 0x10, al\nnop\nout 0x11, al\nout 0x12, al\nhlt"
    with Guest(kvm, code, irqchip=True) as guest:
        refused(guest.vcpu.kvmclock_ctrl, errno.EINVAL)
        assert isinstance(guest.run(), Io)
        flags = DATA + 29  # of pvclock_vcpu_time_info
        assert not guest.memory.read(flags, 1)[0] & 2
        guest.vcpu.kvmclock_ctrl()
        assert isinstance(guest.run(), Io)
        assert guest.memory.read(flags, 1)[0] & 2
        guest.vm.set_clock(common.kvm_clock_data(clock=1))
        assert isinstance(guest.run(), Io)
        assert guest.memory.read(flags, 1)[0] & 2  # until the guest clears it


@pytest.mark.backs("KVM_GET_STATS_FD")
def test_statistics(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_BINARY_STATS_FD")
    with Guest(kvm, "out 0x10, al\nout 0x10, al\nhlt", irqchip=True) as guest:
        vm_fd, vcpu_fd = guest.vm.get_stats_fd(), guest.vcpu.get_stats_fd()
        try:
            before = read_stats(vcpu_fd)
            assert isinstance(guest.run(), Io)
            after = read_stats(vcpu_fd)
            assert before.id.endswith("vcpu-0") and read_stats(vm_fd).id
            assert after["exits"].value > before["exits"].value
            assert after["exits"].type == "cumulative" and after["exits"].unit == ""
            histogram = after["halt_poll_success_hist"]
            assert histogram.type == "logarithmic histogram" and len(histogram.values) > 10
            assert (histogram.unit, histogram.base, histogram.exponent) == ("seconds", 10, -9)
        finally:
            os.close(vm_fd)
            os.close(vcpu_fd)


@pytest.mark.backs("KVM_SET_TSC_KHZ", "KVM_GET_TSC_KHZ")
def test_tsc_frequency(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """A frequency can be set where the processor scales; elsewhere only what is within KVM's tolerance, or faster."""
    needs("KVM_CAP_GET_TSC_KHZ")
    with Guest(kvm, "hlt", irqchip=True) as guest:
        khz = guest.vcpu.get_tsc_khz()
        assert khz > 0
        if kvm.check_extension(KVM_CAP_TSC_CONTROL):
            guest.vcpu.set_tsc_khz(khz // 2)
            assert guest.vcpu.get_tsc_khz() == khz // 2
            guest.vcpu.set_tsc_khz(0)
            assert guest.vcpu.get_tsc_khz() == khz
            refused(lambda: guest.vcpu.set_tsc_khz(0x7FFFFFFF), errno.EINVAL)
        else:
            guest.vcpu.set_tsc_khz(khz)
            assert guest.vcpu.get_tsc_khz() == khz
            refused(lambda: guest.vcpu.set_tsc_khz(khz // 2), errno.EINVAL)  # a faster one it would feign


def test_tsc_frequency_of_the_vm(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The one of vCPUs to come."""
    needs("KVM_CAP_VM_TSC_CONTROL")
    needs("KVM_CAP_TSC_CONTROL")
    with kvm.create_vm() as vm:
        khz = vm.get_tsc_khz()
        vm.set_tsc_khz(khz * 2)
        with vm.create_vcpu(0) as vcpu:
            assert (vm.get_tsc_khz(), vcpu.get_tsc_khz()) == (khz * 2, khz * 2)
            vcpu.set_tsc_khz(khz)
            assert (vm.get_tsc_khz(), vcpu.get_tsc_khz()) == (khz * 2, khz)


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 1), (10_001, 10_000), (1, 3), (7, 2), (1, 2000)])
def test_tsc_scaling(kvm: Kvm, needs: Callable[[str], int], numerator: int, denominator: int) -> None:
    """RDTSC, RDMSR and KVM_GET_MSRS tell one time, which is the host's, scaled, plus the offset."""
    needs("KVM_CAP_TSC_CONTROL")
    needs("KVM_CAP_VCPU_ATTRIBUTES")
    code = "rdtsc\nout 0x10, al\nmov ecx, 0x10\nrdmsr\nout 0x11, al\nrdtscp\nout 0x12, al\nhlt"
    with Guest(kvm, code, irqchip=True) as guest:
        vcpu, host_khz = guest.vcpu, guest.vcpu.get_tsc_khz()
        khz = host_khz * numerator // denominator
        vcpu.set_tsc_khz(khz)
        if abs(khz - host_khz) * 1_000_000 <= host_khz * 250:
            khz = host_khz  # near enough: not scaled
        offset = ctypes.c_uint64()
        vcpu.get_device_attr(x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET, ctypes.addressof(offset))

        def host() -> int:
            data = guest.vm.get_clock()
            if not data.flags & common.KVM_CLOCK_HOST_TSC:
                pytest.skip(f"{kvm.engine}: this host's clock doesn't follow the TSC")
            return data.host_tsc

        times = [host()]
        for _ in range(3):
            assert isinstance(guest.run(), Io)
            regs = vcpu.get_regs()
            times.append((regs.rdx << 32 | regs.rax & 0xFFFFFFFF) - offset.value & (1 << 64) - 1)
            times.append(vcpu.get_msrs([0x10])[0x10] - offset.value & (1 << 64) - 1)
        times.append(host())
        scaled = [times[0] * khz // host_khz - 1000, *times[1:-1], times[-1] * khz // host_khz + 1000]
        assert scaled == sorted(scaled)


@pytest.mark.backs("KVM_SET_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_HAS_DEVICE_ATTR")
def test_tsc_offset_attribute(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The guest's TSC is the host's plus an offset that can be read and set."""
    needs("KVM_CAP_VCPU_ATTRIBUTES")
    with Guest(kvm, "rdtsc\nout 0x10, al\nrdtsc\nout 0x11, al\nhlt", irqchip=True) as guest:
        vcpu = guest.vcpu
        group, attr = x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET
        assert vcpu.has_device_attr(group, attr) and not vcpu.has_device_attr(group, 77)
        offset = ctypes.c_uint64()
        vcpu.get_device_attr(group, attr, ctypes.addressof(offset))
        assert isinstance(guest.run(), Io)
        regs = vcpu.get_regs()
        before = regs.rdx << 32 | regs.rax & 0xFFFFFFFF
        offset.value += 1 << 50
        vcpu.set_device_attr(group, attr, ctypes.addressof(offset))
        again = ctypes.c_uint64()
        vcpu.get_device_attr(group, attr, ctypes.addressof(again))
        if kvm.engine == "linux" and again.value == 0:
            pytest.skip("linux: this KVM's guests have the host's TSC (kvm_pvm)")
        assert again.value == offset.value
        assert isinstance(guest.run(), Io)
        regs = vcpu.get_regs()
        assert 1 << 50 <= (regs.rdx << 32 | regs.rax & 0xFFFFFFFF) - before < 1 << 51


@pytest.mark.backs("KVM_GET_ONE_REG", "KVM_SET_ONE_REG", "KVM_GET_REG_LIST")
def test_one_reg(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """On x86 since Linux 6.18: MSRs one by one."""
    needs("KVM_CAP_ONE_REG")
    lstar = KVM_REG_X86 | KVM_REG_SIZE_U64 | 2 << 32 | 0xC0000082
    with Guest(kvm, "hlt") as guest:
        guest.vcpu.set_one_reg(lstar, 0x123456)
        assert guest.vcpu.get_one_reg(lstar) == 0x123456
        assert guest.vcpu.get_msrs([0xC0000082]) == {0xC0000082: 0x123456}
        assert isinstance(guest.vcpu.get_reg_list(), list)
        for wrong in (
            KVM_REG_X86 | KVM_REG_SIZE_U64 | 99 << 32,
            KVM_REG_X86 | KVM_REG_SIZE_U64 | 2 << 32 | 1 << 40 | 0xC0000082,
            KVM_REG_X86 | KVM_REG_SIZE_U32 | 2 << 32 | 0xC0000082,
            KVM_REG_X86 | KVM_REG_SIZE_U64 | 2 << 32 | 0x12345678,
        ):
            refused(lambda wrong=wrong: guest.vcpu.get_one_reg(wrong), errno.EINVAL)  # type: ignore[misc]
            refused(lambda wrong=wrong: guest.vcpu.set_one_reg(wrong, 0), errno.EINVAL)  # type: ignore[misc]
        refused(lambda: guest.vcpu.set_one_reg(lstar, 1 << 63), errno.EINVAL)  # not canonical
