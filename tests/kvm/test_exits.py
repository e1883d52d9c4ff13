"""Every exit reason is decoded from a kvm_run, no engine needed."""

import ctypes
from ctypes import c_uint8

import pytest

from kvmkit.kvm import exits
from kvmkit.uapi import arm64, common, x86
from kvmkit.uapi import common as c

AREA_BYTES = 3 * 4096


class Area:
    """A vCPU's mapping."""

    def __init__(self, run_class: type[x86.kvm_run] | type[arm64.kvm_run] = x86.kvm_run) -> None:
        """Allocate it."""
        self.buffer = bytearray(AREA_BYTES)
        self.run = run_class.from_buffer(self.buffer)
        self.decoder = exits.Decoder(self.run, memoryview(self.buffer))

    def decode(self, reason: int) -> exits.Exit:
        """Decode it as exit `reason`."""
        self.run.exit_reason = reason
        return self.decoder.decode()


def test_io_data_is_a_window() -> None:
    area = Area()
    area.run.exit.io = common.kvm_run_io(c.KVM_EXIT_IO_IN, 2, 0x1F0, 3, 4096)
    exit_ = area.decode(c.KVM_EXIT_IO)
    assert isinstance(exit_, exits.Io)
    assert (exit_.size, exit_.port, exit_.count, exit_.is_out, len(exit_.data)) == (2, 0x1F0, 3, False, 6)
    exit_.data[:] = b"abcdef"
    assert area.buffer[4096:4102] == b"abcdef"


def test_accesses_that_differ_have_exits_of_their_own() -> None:
    """The objects are kept for equal accesses, but not without end: there are as many as there are addresses."""
    area = Area()
    seen: list[tuple[exits.Exit, tuple[int, ...]]] = []
    for n in range(1000):
        is_in, size, port, count = n & 1, 1 << n % 3, n % 500, 1 + n % 2
        area.run.exit.io = common.kvm_run_io(is_in, size, port, count, 4096)
        seen.append((area.decode(c.KVM_EXIT_IO), (is_in, size, port, count, size * count)))
        gpa, length, is_write = n % 300 << 30, 1 << n % 4, n >> 1 & 1
        area.run.exit.mmio = common.kvm_run_mmio(gpa, (c_uint8 * 8)(), length, is_write)
        seen.append((area.decode(c.KVM_EXIT_MMIO), (gpa, length, is_write, length)))
    for exit_, expected in seen:
        match exit_:
            case exits.Io(direction, size, port, count, data):
                assert (direction, size, port, count, len(data)) == expected
            case exits.Mmio(phys_addr, length, is_write, data):
                assert (phys_addr, length, is_write, len(data)) == expected
            case _:
                pytest.fail(f"{exit_}")
    assert len(area.decoder._accesses) <= 256


@pytest.mark.parametrize("run_class", [x86.kvm_run, arm64.kvm_run])
def test_mmio_data_is_a_window(run_class: type[x86.kvm_run] | type[arm64.kvm_run]) -> None:
    area = Area(run_class)
    area.run.exit.mmio.phys_addr, area.run.exit.mmio.len = 0xFEB00010, 4
    exit_ = area.decode(c.KVM_EXIT_MMIO)
    assert isinstance(exit_, exits.Mmio)
    assert (exit_.phys_addr, exit_.len, exit_.is_write) == (0xFEB00010, 4, False)
    exit_.data[:] = b"wxyz"
    assert bytes(area.run.exit.mmio.data[:4]) == b"wxyz"


@pytest.mark.parametrize(
    ("reason", "exit_"),
    [
        (c.KVM_EXIT_HLT, exits.Hlt()),
        (c.KVM_EXIT_SHUTDOWN, exits.Shutdown()),
        (c.KVM_EXIT_INTR, exits.Intr()),
        (c.KVM_EXIT_IRQ_WINDOW_OPEN, exits.IrqWindowOpen()),
        (c.KVM_EXIT_SET_TPR, exits.SetTpr()),
        (c.KVM_EXIT_NMI, exits.Nmi()),
        (c.KVM_EXIT_DIRTY_RING_FULL, exits.DirtyRingFull()),
        (c.KVM_EXIT_AP_RESET_HOLD, exits.ApResetHold()),
        (c.KVM_EXIT_X86_BUS_LOCK, exits.BusLock()),
        (c.KVM_EXIT_WATCHDOG, exits.Watchdog()),
        (c.KVM_EXIT_EPR, exits.Epr()),
        (c.KVM_EXIT_UNKNOWN, exits.Unknown(c.KVM_EXIT_UNKNOWN, 0)),
        (999, exits.Unknown(999, 0)),
    ],
)
def test_bare(reason: int, exit_: exits.Exit) -> None:
    assert Area().decode(reason) == exit_


def test_unknown_has_a_name() -> None:
    assert exits.Unknown(c.KVM_EXIT_UNKNOWN, 0).name == "KVM_EXIT_UNKNOWN"
    assert exits.Unknown(999, 0).name == "999"


def test_with_fields() -> None:
    area = Area()
    area.run.exit.fail_entry = common.kvm_run_fail_entry(0x80000021, 3)
    assert area.decode(c.KVM_EXIT_FAIL_ENTRY) == exits.FailEntry(0x80000021, 3)
    area.run.exit.system_event = common.kvm_run_system_event(
        c.KVM_SYSTEM_EVENT_RESET, 1, (ctypes.c_uint64 * 16)(7)
    )
    assert area.decode(c.KVM_EXIT_SYSTEM_EVENT) == exits.SystemEvent(c.KVM_SYSTEM_EVENT_RESET, (7,))
    area.run.exit.eoi.vector = 0x31
    assert area.decode(c.KVM_EXIT_IOAPIC_EOI) == exits.IoapicEoi(0x31)
    area.run.exit.msr = common.kvm_run_msr(reason=2, index=0x10, data=5)
    assert area.decode(c.KVM_EXIT_X86_RDMSR) == exits.Rdmsr(0x10, 2)
    assert area.decode(c.KVM_EXIT_X86_WRMSR) == exits.Wrmsr(0x10, 2, 5)
    area.run.exit.tpr_access = common.kvm_run_tpr_access(0x1000, 1)
    assert area.decode(c.KVM_EXIT_TPR_ACCESS) == exits.TprAccess(0x1000, True)
    area.run.exit.memory_fault = common.kvm_run_memory_fault(8, 0x2000, 0x1000)
    assert area.decode(c.KVM_EXIT_MEMORY_FAULT) == exits.MemoryFault(8, 0x2000, 0x1000)
    area.run.exit.notify.flags = 1
    assert area.decode(c.KVM_EXIT_NOTIFY) == exits.Notify(1)
    area.run.exit.ex = common.kvm_run_ex(14, 2)
    assert area.decode(c.KVM_EXIT_EXCEPTION) == exits.Exception_(14, 2)
    area.run.exit.hypercall = common.kvm_run_hypercall(12, (ctypes.c_uint64 * 6)(1, 2, 3), 0, 1)
    assert area.decode(c.KVM_EXIT_HYPERCALL) == exits.Hypercall(12, (1, 2, 3, 0, 0, 0), 1)


def test_every_reason_has_a_type() -> None:
    """The 41 of Linux 6.18, without a hole."""
    assert sorted(c.EXIT_REASONS) == list(range(41))
    area = Area()
    area.run.exit.hyperv.type = area.run.exit.xen.type = 1
    assert [r for r in c.EXIT_REASONS if isinstance(area.decode(r), exits.Unknown)] == [c.KVM_EXIT_UNKNOWN]


def test_hyperv_and_xen() -> None:
    area = Area()
    hyperv = area.run.exit.hyperv
    hyperv.type = c.KVM_EXIT_HYPERV_SYNIC
    hyperv.u.synic.msr, hyperv.u.synic.control = 0x40000080, 1
    hyperv.u.synic.evt_page, hyperv.u.synic.msg_page = 0x1000, 0x2000
    assert area.decode(c.KVM_EXIT_HYPERV) == exits.HypervSynic(0x40000080, 1, 0x1000, 0x2000)
    area = Area()
    hyperv = area.run.exit.hyperv
    hyperv.type = c.KVM_EXIT_HYPERV_HCALL
    hyperv.u.hcall.input = 0x5C
    hyperv.u.hcall.params[:] = [7, 8]
    assert area.decode(c.KVM_EXIT_HYPERV) == exits.HypervHcall(0x5C, (7, 8))
    hyperv.type = c.KVM_EXIT_HYPERV_SYNDBG
    assert isinstance(area.decode(c.KVM_EXIT_HYPERV), exits.HypervSyndbg)
    hyperv.type = 77
    assert area.decode(c.KVM_EXIT_HYPERV) == exits.Unknown(c.KVM_EXIT_HYPERV, 77)
    area = Area()
    xen = area.run.exit.xen
    xen.type = c.KVM_EXIT_XEN_HCALL
    xen.u.hcall.longmode, xen.u.hcall.cpl, xen.u.hcall.input = 1, 3, 18
    xen.u.hcall.params[:] = list(range(6))
    assert area.decode(c.KVM_EXIT_XEN) == exits.XenHcall(True, 3, 18, (0, 1, 2, 3, 4, 5))


def test_tdx() -> None:
    area = Area()
    tdx = area.run.exit.tdx
    tdx.nr = 0x10002
    tdx.get_quote.gpa, tdx.get_quote.size = 0x5000, 0x1000
    assert area.decode(c.KVM_EXIT_TDX) == exits.Tdx(0, 0x10002)
    assert list(tdx.unknown.data[:2]) == [0x5000, 0x1000]


def test_other_architectures() -> None:
    area = Area()
    foreign = area.run.exit
    foreign.s390_sieic = common.kvm_run_s390_sieic(4, 0xB2B2, 7)
    assert area.decode(c.KVM_EXIT_S390_SIEIC) == exits.S390Sieic(4, 0xB2B2, 7)
    foreign.s390_reset_flags = 5
    assert area.decode(c.KVM_EXIT_S390_RESET) == exits.S390Reset(5)
    foreign.s390_ucontrol = common.kvm_run_s390_ucontrol(0x1000, 0x10)
    assert area.decode(c.KVM_EXIT_S390_UCONTROL) == exits.S390Ucontrol(0x1000, 0x10)
    foreign.s390_tsch = common.kvm_run_s390_tsch(1, 2, 3, 4, 5, 1)
    assert area.decode(c.KVM_EXIT_S390_TSCH) == exits.S390Tsch(1, 2, 3, 4, 5, True)
    foreign.s390_stsi = common.kvm_run_s390_stsi(0x2000, 1, 0, 3, 2, 2)
    assert area.decode(c.KVM_EXIT_S390_STSI) == exits.S390Stsi(0x2000, 1, 3, 2, 2)
    foreign.dcr = common.kvm_run_dcr(1, 2, 1)
    assert area.decode(c.KVM_EXIT_DCR) == exits.Dcr(1, 2, True)
    foreign.osi.gprs[3] = 9
    exit_ = area.decode(c.KVM_EXIT_OSI)
    assert isinstance(exit_, exits.Osi) and exit_.gprs[3] == 9 and len(exit_.gprs) == 32
    foreign.papr_hcall.nr, foreign.papr_hcall.args[8] = 4, 6
    exit_ = area.decode(c.KVM_EXIT_PAPR_HCALL)
    assert isinstance(exit_, exits.PaprHcall) and (exit_.nr, exit_.args[8]) == (4, 6)
    foreign.riscv_sbi = common.kvm_run_riscv_sbi(1, 2, (ctypes.c_uint64 * 6)(3, 4, 5, 6, 7, 8))
    assert area.decode(c.KVM_EXIT_RISCV_SBI) == exits.RiscvSbi(1, 2, (3, 4, 5, 6, 7, 8))
    foreign.riscv_csr = common.kvm_run_riscv_csr(0x180, 1, 2, 3)
    assert area.decode(c.KVM_EXIT_RISCV_CSR) == exits.RiscvCsr(0x180, 1, 2)
    foreign.iocsr_io.phys_addr, foreign.iocsr_io.len = 0x1234, 4
    exit_ = area.decode(c.KVM_EXIT_LOONGARCH_IOCSR)
    assert isinstance(exit_, exits.LoongarchIocsr)
    exit_.data[:] = b"wxyz"
    assert bytes(foreign.iocsr_io.data[:4]) == b"wxyz"


def test_internal_error_names_the_instruction() -> None:
    area = Area()
    words = b"\x03\x0f\x01\xd5" + bytes(12)
    data = [1, int.from_bytes(words[:8], "little"), int.from_bytes(words[8:], "little")]
    area.run.exit.internal = common.kvm_run_internal(
        c.KVM_INTERNAL_ERROR_EMULATION, 3, (ctypes.c_uint64 * 16)(*data)
    )
    exit_ = area.decode(c.KVM_EXIT_INTERNAL_ERROR)
    assert isinstance(exit_, exits.InternalError)
    assert exit_.insn_bytes == b"\x0f\x01\xd5"
    assert exits.InternalError(c.KVM_INTERNAL_ERROR_DELIVERY_EV, (1, 2, 3)).insn_bytes == b""


def test_debug_is_a_copy() -> None:
    area = Area()
    area.run.exit.debug.arch.pc = 0x1234
    exit_ = area.decode(c.KVM_EXIT_DEBUG)
    area.run.exit.debug.arch.pc = 0
    assert isinstance(exit_, exits.Debug) and exit_.arch.pc == 0x1234


def test_arm64_exits() -> None:
    area = Area(arm64.kvm_run)
    area.run.exit.arm_nisv = common.kvm_run_arm_nisv(0x46, 0x9000000)
    assert area.decode(c.KVM_EXIT_ARM_NISV) == exits.ArmNisv(0x46, 0x9000000)
    area.run.exit.debug.arch.hsr = 0xF2000000
    exit_ = area.decode(c.KVM_EXIT_DEBUG)
    assert isinstance(exit_, exits.Debug) and exit_.arch.hsr == 0xF2000000
