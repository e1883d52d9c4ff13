"""Why KVM_RUN returned: one small object per exit reason, made for ``match``.

`data` of `Io` and `Mmio` is a window into kvm_run itself: what the caller writes there is what the guest reads when the
vCPU is run again. It is valid until then. (Documentation/virt/kvm/api.rst, section 5, "The kvm_run structure".)

These two are what guests exit with by far the most. So they are read out of kvm_run as words, in a third of the time that as many
ctypes fields take, and the object of an access is that of an equal one before it (`bench/exits.py`).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvmkit.uapi import common as c
from kvmkit.uapi import x86
from kvmkit.uapi.common import KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO
from kvmkit.uapi.layout import offset_of


@dataclass(frozen=True, slots=True)
class Io:
    """KVM_EXIT_IO: the guest executed in, out, ins or outs. `data` holds `count` items of `size` bytes."""

    direction: int
    size: int
    port: int
    count: int
    data: memoryview
    is_out: bool = field(init=False, repr=False, compare=False)
    """Whether the guest writes: `data` is what it wrote. Else `data` is to be filled in."""

    def __post_init__(self) -> None:
        """Look at the direction."""
        object.__setattr__(self, "is_out", self.direction == KVM_EXIT_IO_OUT)


@dataclass(frozen=True, slots=True)
class Mmio:
    """KVM_EXIT_MMIO: an access of `len` bytes (up to 8) where no memory slot is. `data` is `len` bytes, little-endian."""

    phys_addr: int
    len: int
    is_write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Hlt:
    """KVM_EXIT_HLT: the guest halted, and no interrupt chip of the kernel's is there to wait in."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """KVM_EXIT_SHUTDOWN: a triple fault."""


@dataclass(frozen=True, slots=True)
class Intr:
    """KVM_EXIT_INTR, or KVM_RUN failed with EINTR: a signal, a kick or `immediate_exit`."""


@dataclass(frozen=True, slots=True)
class IrqWindowOpen:
    """KVM_EXIT_IRQ_WINDOW_OPEN: `request_interrupt_window` was set, and KVM_INTERRUPT would be taken now."""


@dataclass(frozen=True, slots=True)
class Exception_:
    """KVM_EXIT_EXCEPTION. Never seen on x86 or arm64 of today."""

    exception: int
    error_code: int


@dataclass(frozen=True, slots=True)
class Hypercall:
    """KVM_EXIT_HYPERCALL. The answer goes to ``kvm_run.exit.hypercall.ret``."""

    nr: int
    args: tuple[int, ...]
    flags: int


@dataclass(frozen=True, slots=True)
class Debug:
    """KVM_EXIT_DEBUG: KVM_SET_GUEST_DEBUG asked for it. `arch` is a copy of kvm_debug_exit_arch."""

    arch: Any


@dataclass(frozen=True, slots=True)
class FailEntry:
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state."""

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM_EXIT_INTERNAL_ERROR. `data` is what KVM gave beside `suberror`."""

    suberror: int
    data: tuple[int, ...]

    @property
    def insn_bytes(self) -> bytes:
        """The instruction that KVM could not emulate, where it says so (KVM_INTERNAL_ERROR_EMULATION); else empty."""
        flag = c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if self.suberror != c.KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 3 or not self.data[0] & flag:
            return b""
        packed = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return packed[1 : 1 + min(packed[0], 15)]


@dataclass(frozen=True, slots=True)
class SetTpr:
    """KVM_EXIT_SET_TPR: the guest lowered CR8; the interrupt chip is in user space."""


@dataclass(frozen=True, slots=True)
class TprAccess:
    """KVM_EXIT_TPR_ACCESS (KVM_TPR_ACCESS_REPORTING)."""

    rip: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Nmi:
    """KVM_EXIT_NMI: a host NMI came in."""


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """KVM_EXIT_SYSTEM_EVENT. `type` is one of KVM_SYSTEM_EVENT_*; `data[0]`, where given, holds flags."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IoapicEoi:
    """KVM_EXIT_IOAPIC_EOI: an EOI for `vector` that the split interrupt chip's IOAPIC must see."""

    vector: int


@dataclass(frozen=True, slots=True)
class ArmNisv:
    """KVM_EXIT_ARM_NISV: an MMIO access by an instruction of which the processor gave no syndrome."""

    esr_iss: int
    fault_ipa: int


@dataclass(frozen=True, slots=True)
class Rdmsr:
    """KVM_EXIT_X86_RDMSR. The answer goes to ``kvm_run.exit.msr.data``, or ``.error = 1`` for #GP."""

    index: int
    reason: int


@dataclass(frozen=True, slots=True)
class Wrmsr:
    """KVM_EXIT_X86_WRMSR. ``kvm_run.exit.msr.error = 1`` gives #GP."""

    index: int
    reason: int
    data: int


@dataclass(frozen=True, slots=True)
class DirtyRingFull:
    """KVM_EXIT_DIRTY_RING_FULL: collect the ring and KVM_RESET_DIRTY_RINGS."""


@dataclass(frozen=True, slots=True)
class ApResetHold:
    """KVM_EXIT_AP_RESET_HOLD (SEV-ES)."""


@dataclass(frozen=True, slots=True)
class BusLock:
    """KVM_EXIT_X86_BUS_LOCK."""


@dataclass(frozen=True, slots=True)
class Notify:
    """KVM_EXIT_NOTIFY: the guest kept the processor from opening an event window."""

    flags: int


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT, beside KVM_RUN failing with EFAULT or EHWPOISON."""

    flags: int
    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Watchdog:
    """KVM_EXIT_WATCHDOG. Never seen on x86 or arm64."""


@dataclass(frozen=True, slots=True)
class HypervSynic:
    """KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_SYNIC: the guest wrote a register of its synthetic interrupt controller."""

    msr: int
    control: int
    evt_page: int
    msg_page: int


@dataclass(frozen=True, slots=True)
class HypervHcall:
    """KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL. The answer goes to ``kvm_run.exit.hyperv.u.hcall.result``."""

    input: int
    params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HypervSyndbg:
    """KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_SYNDBG. The answer goes to ``kvm_run.exit.hyperv.u.syndbg.status``."""

    msr: int
    control: int
    send_page: int
    recv_page: int
    pending_page: int


@dataclass(frozen=True, slots=True)
class XenHcall:
    """KVM_EXIT_XEN, KVM_EXIT_XEN_HCALL. The answer goes to ``kvm_run.exit.xen.u.hcall.result``."""

    longmode: bool
    cpl: int
    input: int
    params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tdx:
    """KVM_EXIT_TDX: TDVMCALL `nr`, whose arguments are in ``kvm_run.exit.tdx`` and whose answer goes to a ``ret`` there."""

    flags: int
    nr: int


# What other architectures' KVMs exit with: named and typed, for the interface is one.


@dataclass(frozen=True, slots=True)
class S390Sieic:
    """KVM_EXIT_S390_SIEIC."""

    icptcode: int
    ipa: int
    ipb: int


@dataclass(frozen=True, slots=True)
class S390Reset:
    """KVM_EXIT_S390_RESET."""

    flags: int


@dataclass(frozen=True, slots=True)
class S390Ucontrol:
    """KVM_EXIT_S390_UCONTROL."""

    trans_exc_code: int
    pgm_code: int


@dataclass(frozen=True, slots=True)
class S390Tsch:
    """KVM_EXIT_S390_TSCH."""

    subchannel_id: int
    subchannel_nr: int
    io_int_parm: int
    io_int_word: int
    ipb: int
    dequeued: bool


@dataclass(frozen=True, slots=True)
class S390Stsi:
    """KVM_EXIT_S390_STSI."""

    addr: int
    ar: int
    fc: int
    sel1: int
    sel2: int


@dataclass(frozen=True, slots=True)
class Dcr:
    """KVM_EXIT_DCR (ppc)."""

    dcrn: int
    data: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Osi:
    """KVM_EXIT_OSI (ppc)."""

    gprs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PaprHcall:
    """KVM_EXIT_PAPR_HCALL (ppc). The answer goes to ``kvm_run.exit.papr_hcall.ret``."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Epr:
    """KVM_EXIT_EPR (ppc). The answer goes to ``kvm_run.exit.epr.epr``."""


@dataclass(frozen=True, slots=True)
class RiscvSbi:
    """KVM_EXIT_RISCV_SBI. The answer goes to ``kvm_run.exit.riscv_sbi.ret``."""

    extension_id: int
    function_id: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RiscvCsr:
    """KVM_EXIT_RISCV_CSR. The answer goes to ``kvm_run.exit.riscv_csr.ret_value``."""

    csr_num: int
    new_value: int
    write_mask: int


@dataclass(frozen=True, slots=True)
class LoongarchIocsr:
    """KVM_EXIT_LOONGARCH_IOCSR: `data` is as in `Mmio`."""

    phys_addr: int
    len: int
    is_write: bool
    data: memoryview


@dataclass(frozen=True, slots=True)
class Unknown:
    """KVM_EXIT_UNKNOWN, or a reason newer than kvmkit. `hardware_exit_reason` is meaningful for KVM_EXIT_UNKNOWN alone."""

    reason: int
    hardware_exit_reason: int

    @property
    def name(self) -> str:
        """The kernel's name of the reason, or its number."""
        return c.EXIT_REASONS.get(self.reason, str(self.reason))


Exit = (
    Io
    | Mmio
    | Hlt
    | Shutdown
    | Intr
    | IrqWindowOpen
    | Exception_
    | Hypercall
    | Debug
    | FailEntry
    | InternalError
    | SetTpr
    | TprAccess
    | Nmi
    | SystemEvent
    | IoapicEoi
    | ArmNisv
    | Rdmsr
    | Wrmsr
    | DirtyRingFull
    | ApResetHold
    | BusLock
    | Notify
    | MemoryFault
    | Watchdog
    | HypervSynic
    | HypervHcall
    | HypervSyndbg
    | XenHcall
    | Tdx
    | S390Sieic
    | S390Reset
    | S390Ucontrol
    | S390Tsch
    | S390Stsi
    | Dcr
    | Osi
    | PaprHcall
    | Epr
    | RiscvSbi
    | RiscvCsr
    | LoongarchIocsr
    | Unknown
)

# Both architectures are little-endian and begin kvm_run alike.
_EXIT = offset_of(x86.kvm_run, "exit")
_REASON_WORD, _EXIT_WORD = offset_of(x86.kvm_run, "exit_reason") // 4, _EXIT // 4
_MMIO_DATA = _EXIT + offset_of(c.kvm_run_mmio, "data")
_KEPT_ACCESSES = 256


def _debug(run: Any, _area: memoryview) -> Exit:
    arch = run.exit.debug.arch
    return Debug(type(arch).from_buffer_copy(arch))


def _internal(run: Any, _area: memoryview) -> Exit:
    internal = run.exit.internal
    return InternalError(internal.suberror, tuple(internal.data[: internal.ndata]))


def _system_event(run: Any, _area: memoryview) -> Exit:
    event = run.exit.system_event
    return SystemEvent(event.type, tuple(event.data[: event.ndata]))


def _hypercall(run: Any, _area: memoryview) -> Exit:
    call = run.exit.hypercall
    return Hypercall(call.nr, tuple(call.args), call.flags)


def _hyperv(run: Any, _area: memoryview) -> Exit:
    u = run.exit.hyperv.u
    match run.exit.hyperv.type:
        case c.KVM_EXIT_HYPERV_SYNIC:
            return HypervSynic(u.synic.msr, u.synic.control, u.synic.evt_page, u.synic.msg_page)
        case c.KVM_EXIT_HYPERV_HCALL:
            return HypervHcall(u.hcall.input, tuple(u.hcall.params))
        case c.KVM_EXIT_HYPERV_SYNDBG:
            debug = u.syndbg
            return HypervSyndbg(
                debug.msr, debug.control, debug.send_page, debug.recv_page, debug.pending_page
            )
    return _unknown(run, _area)


def _xen(run: Any, _area: memoryview) -> Exit:
    if run.exit.xen.type != c.KVM_EXIT_XEN_HCALL:
        return _unknown(run, _area)
    call = run.exit.xen.u.hcall
    return XenHcall(bool(call.longmode), call.cpl, call.input, tuple(call.params))


def _s390_tsch(run: Any, _area: memoryview) -> Exit:
    tsch = run.exit.s390_tsch
    return S390Tsch(
        tsch.subchannel_id,
        tsch.subchannel_nr,
        tsch.io_int_parm,
        tsch.io_int_word,
        tsch.ipb,
        bool(tsch.dequeued),
    )


def _s390_stsi(run: Any, _area: memoryview) -> Exit:
    stsi = run.exit.s390_stsi
    return S390Stsi(stsi.addr, stsi.ar, stsi.fc, stsi.sel1, stsi.sel2)


def _sbi(run: Any, _area: memoryview) -> Exit:
    call = run.exit.riscv_sbi
    return RiscvSbi(call.extension_id, call.function_id, tuple(call.args))


def _iocsr(run: Any, area: memoryview) -> Exit:
    access = run.exit.iocsr_io
    length = access.len
    return LoongarchIocsr(
        access.phys_addr, length, bool(access.is_write), area[_MMIO_DATA : _MMIO_DATA + length]
    )


def _unknown(run: Any, _area: memoryview) -> Exit:
    return Unknown(run.exit_reason, run.exit.hw.hardware_exit_reason)


def _always(exit_: Exit) -> Callable[[Any, memoryview], Exit]:
    return lambda _run, _area: exit_


_DECODERS: dict[int, Callable[[Any, memoryview], Exit]] = {
    c.KVM_EXIT_EXCEPTION: lambda run, _: Exception_(run.exit.ex.exception, run.exit.ex.error_code),
    c.KVM_EXIT_HYPERCALL: _hypercall,
    c.KVM_EXIT_DEBUG: _debug,
    c.KVM_EXIT_HLT: _always(Hlt()),
    c.KVM_EXIT_IRQ_WINDOW_OPEN: _always(IrqWindowOpen()),
    c.KVM_EXIT_SHUTDOWN: _always(Shutdown()),
    c.KVM_EXIT_FAIL_ENTRY: lambda run, _: FailEntry(
        run.exit.fail_entry.hardware_entry_failure_reason, run.exit.fail_entry.cpu
    ),
    c.KVM_EXIT_INTR: _always(Intr()),
    c.KVM_EXIT_SET_TPR: _always(SetTpr()),
    c.KVM_EXIT_TPR_ACCESS: lambda run, _: TprAccess(
        run.exit.tpr_access.rip, bool(run.exit.tpr_access.is_write)
    ),
    c.KVM_EXIT_NMI: _always(Nmi()),
    c.KVM_EXIT_INTERNAL_ERROR: _internal,
    c.KVM_EXIT_SYSTEM_EVENT: _system_event,
    c.KVM_EXIT_IOAPIC_EOI: lambda run, _: IoapicEoi(run.exit.eoi.vector),
    c.KVM_EXIT_ARM_NISV: lambda run, _: ArmNisv(run.exit.arm_nisv.esr_iss, run.exit.arm_nisv.fault_ipa),
    c.KVM_EXIT_X86_RDMSR: lambda run, _: Rdmsr(run.exit.msr.index, run.exit.msr.reason),
    c.KVM_EXIT_X86_WRMSR: lambda run, _: Wrmsr(run.exit.msr.index, run.exit.msr.reason, run.exit.msr.data),
    c.KVM_EXIT_DIRTY_RING_FULL: _always(DirtyRingFull()),
    c.KVM_EXIT_AP_RESET_HOLD: _always(ApResetHold()),
    c.KVM_EXIT_X86_BUS_LOCK: _always(BusLock()),
    c.KVM_EXIT_NOTIFY: lambda run, _: Notify(run.exit.notify.flags),
    c.KVM_EXIT_MEMORY_FAULT: lambda run, _: MemoryFault(
        run.exit.memory_fault.flags, run.exit.memory_fault.gpa, run.exit.memory_fault.size
    ),
    c.KVM_EXIT_WATCHDOG: _always(Watchdog()),
    c.KVM_EXIT_HYPERV: _hyperv,
    c.KVM_EXIT_XEN: _xen,
    c.KVM_EXIT_TDX: lambda run, _: Tdx(run.exit.tdx.flags, run.exit.tdx.nr),
    c.KVM_EXIT_S390_SIEIC: lambda run, _: S390Sieic(
        run.exit.s390_sieic.icptcode, run.exit.s390_sieic.ipa, run.exit.s390_sieic.ipb
    ),
    c.KVM_EXIT_S390_RESET: lambda run, _: S390Reset(run.exit.s390_reset_flags),
    c.KVM_EXIT_S390_UCONTROL: lambda run, _: S390Ucontrol(
        run.exit.s390_ucontrol.trans_exc_code, run.exit.s390_ucontrol.pgm_code
    ),
    c.KVM_EXIT_S390_TSCH: _s390_tsch,
    c.KVM_EXIT_S390_STSI: _s390_stsi,
    c.KVM_EXIT_DCR: lambda run, _: Dcr(run.exit.dcr.dcrn, run.exit.dcr.data, bool(run.exit.dcr.is_write)),
    c.KVM_EXIT_OSI: lambda run, _: Osi(tuple(run.exit.osi.gprs)),
    c.KVM_EXIT_PAPR_HCALL: lambda run, _: PaprHcall(run.exit.papr_hcall.nr, tuple(run.exit.papr_hcall.args)),
    c.KVM_EXIT_EPR: _always(Epr()),
    c.KVM_EXIT_RISCV_SBI: _sbi,
    c.KVM_EXIT_RISCV_CSR: lambda run, _: RiscvCsr(
        run.exit.riscv_csr.csr_num, run.exit.riscv_csr.new_value, run.exit.riscv_csr.write_mask
    ),
    c.KVM_EXIT_LOONGARCH_IOCSR: _iocsr,
}


class Decoder:
    """Makes objects of the exits that a kvm_run describes.

    Those of accesses are kept, by where the access is and what it looks like: guests make the same ones over and over.
    """

    def __init__(self, run: ctypes.Structure, area: memoryview) -> None:
        """Take `run`, a kvm_run of either architecture, and `area`, the writable bytes of the vCPU's mapping that it starts.

        The PIO data page, which `data_offset` points into, is part of `area`.
        """
        self._run, self._area = run, area
        words = area.cast("I")
        self._reason, self._access = words[_REASON_WORD:], words[_EXIT_WORD:]
        self._accesses: dict[tuple[int, ...], Io | Mmio] = {}

    def decode(self) -> Exit:
        """Return the exit that kvm_run describes now."""
        reason, words = self._reason[0], self._access
        if reason == KVM_EXIT_IO:  # kvm_run_io: u8 direction, u8 size, u16 port, u32 count, u64 data_offset
            key: tuple[int, ...] = words[0], words[1], words[2]
        elif reason == KVM_EXIT_MMIO:  # kvm_run_mmio: u64 phys_addr, u8 data[8], u32 len, u8 is_write
            key = words[0], words[1], words[4], words[5]
        else:
            return _DECODERS.get(reason, _unknown)(self._run, self._area)
        return self._accesses.get(key) or self._keep(key)

    def _keep(self, key: tuple[int, ...]) -> Exit:
        area = self._area
        access: Io | Mmio
        if len(key) == 3:
            packed, count, start = key
            size = packed >> 8 & 0xFF
            access = Io(packed & 0xFF, size, packed >> 16, count, area[start : start + size * count])
        else:
            low, high, length, is_write = key
            data = area[_MMIO_DATA : _MMIO_DATA + length]
            access = Mmio(low | high << 32, length, is_write & 0xFF != 0, data)
        if len(self._accesses) == _KEPT_ACCESSES:  # the guest may make as many as there are addresses
            self._accesses.clear()
        self._accesses[key] = access
        return access
