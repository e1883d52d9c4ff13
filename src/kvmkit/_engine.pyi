"""The native module: the software KVM's processor and its interrupt hot set (Rust, `engine/`).

On x86-64, that is. Elsewhere the functions of loads and stores in order are all there is.

Structs cross as bytes in the layout of the kernel's UAPI (`kvmkit.uapi`). Nothing here is for users: `kvmkit.kvm.soft` is.
Addresses of host memory are trusted; everything that comes from the guest is checked. Errors are `OSError` with an errno.
Objects raise `RuntimeError` in a child of os.fork.
"""

_Message = tuple[int, bool, int, int, bool]
"""Destination APIC, whether logical, delivery mode, vector, whether level-triggered."""
_Route = tuple[int, list[_Message], list[tuple[int, int]], bool]
"""GSI, messages, MSIs (address, data), and whether Python must see an edge on it (`take_lines`)."""
_Cpuid = tuple[int, int, int, int, int, int, int]
"""function, index, flags, eax, ebx, ecx, edx."""

class Vm:
    """A virtual machine: memory slots, vCPUs, code cache, timers, interrupt routes."""

    def __new__(cls, tsc_khz: int) -> Vm: ...
    def set_memory_region(self, id: int, flags: int, gpa: int, size: int, hva: int) -> None:
        """Create, replace or (size 0) delete slot `id`. The caller has validated it. Waits for all vCPUs to stop briefly.

        Slots from ``1 << 16`` are those of system management mode. EINVAL: not whole pages.
        """

    def set_private_memory(
        self,
        changed: tuple[int, int] | None,
        parts: list[tuple[int, int, int, int, int, int]],
        private: list[tuple[int, int]],
    ) -> None:
        """Replace all slots outside system management mode of a VM that has private memory.

        `changed`: the slot that has changed, and its size if it is logged, else 0. `parts` of slots are shared or private memory: slot, flags, gpa, size,
        hva, which page of the slot is the first. `private`: first and last address of ranges in which an access to what no part
        has is a fault, not a device's. Waits for all vCPUs to stop briefly.
        """

    def get_dirty_log(self, id: int) -> bytes:
        """Take the dirty bitmap of a logged slot: 64-bit words, little-endian. ENOENT without one. May stop all vCPUs briefly."""

    def set_dirty_ring(self, size_bytes: int) -> None:
        """VCPUs created from now on have dirty rings of this size. EINVAL: no power of two from 4096 to 1 MiB."""

    def reset_dirty_rings(self) -> int:
        """Take back the entries that are handed back, and have the next write to their pages noticed; how many."""

    def notify_write(self, gpa: int, len: int) -> None:
        """Host code wrote guest memory: drop what was translated from it."""

    def create_vcpu(self, id: int, kvm_run_address: int, length: int) -> Vcpu:
        """Create a vCPU whose kvm_run lies at `kvm_run_address` (3 pages, which the caller keeps mapped)."""

    def create_lapics(self) -> None:
        """VCPUs created from now on have local APICs."""

    def set_boot_cpu(self, id: int) -> None:
        """The vCPU that starts without INIT and SIPI."""

    def set_msr_filter(self, deny: bool, ranges: list[tuple[int, int, int, bytes]]) -> None:
        """Which MSRs guests reach: KVM_MSR_FILTER_*, first, number and bits (1 allows) of each range; `deny`: no others."""

    def set_msr_exits(self, reasons: int) -> None:
        """For which KVM_MSR_EXIT_REASON_* a refused RDMSR or WRMSR exits."""

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver a message; the number of local APICs that took it, -1 if there is no vCPU."""

    def send_message(self, message: _Message) -> int:
        """Deliver a decoded message; the number of local APICs that took it, -1 if there is no vCPU."""

    def set_extint(self, level: bool) -> None:
        """Level of the PIC's INTR."""

    def set_routes(self, routes: list[_Route]) -> None:
        """What an edge on each GSI sends: replaces the whole table at once, so that no edge gets lost meanwhile."""

    def take_lines(self) -> list[int]:
        """GSIs whose edges wait for Python."""

    def set_wake_fd(self, fd: int) -> None:
        """Eventfd to signal when `take_lines` has something (duplicated); -1: none."""

    def add_irqfd(self, fd: int, gsi: int) -> None:
        """An eventfd (duplicated) raises edges on `gsi`. EBUSY: it raises one already; EBADF, EINVAL: no open eventfd."""

    def remove_irqfd(self, fd: int, gsi: int) -> bool:
        """Undo `add_irqfd`, by any descriptor of that eventfd: no edge comes after this. False if there was none."""

    def add_ioeventfd(self, address: int, len: int, fd: int, datamatch: int | None, pio: bool) -> None:
        """Writes of `len` bytes (0: any) at `address` signal an eventfd (duplicated). EEXIST: taken; EBADF, EINVAL."""

    def remove_ioeventfd(self, address: int, len: int, fd: int, datamatch: int | None, pio: bool) -> None:
        """Undo `add_ioeventfd`, by any descriptor of that eventfd. ENOENT: none; EBADF, EINVAL."""

    def close(self) -> None:
        """Let go of all eventfds and of the counters' descriptor, and stop the PIT."""

    def set_pit_reinject(self, on: bool) -> None:
        """Whether the PIT's ticks that find an earlier one waiting follow later (at first), or are lost."""

    def pit_missed(self) -> bool:
        """Such a tick came. False: it isn't kept, and is to be delivered all the same."""

    def pit_again(self) -> None:
        """The PIC's interrupt of the PIT ended: a tick that was kept is next."""

    def arm_pit(self, at_ns: int, period_ns: int) -> None:
        """An edge on GSI 0 at `at_ns` of `monotonic_raw_ns`, then every `period_ns` if that isn't 0."""

    def cancel_pit(self) -> None:
        """Undo `arm_pit`."""

    def clock(self) -> tuple[int, int, int]:
        """The VM's clock and the time of day in nanoseconds, and the host's TSC then (KVM_GET_CLOCK)."""

    def set_clock_ns(self, ns: int) -> None:
        """Set it; guests' clock pages follow."""

    def blocks(self) -> list[tuple[int, int, int, int]]:
        """Translated blocks for profilers: host address and bytes, guest rip and bytes."""

    def stats(self) -> list[tuple[str, int]]:
        """Counters by name: the VM's, the sums of its vCPUs', and `ud_MNEMONIC` for instructions that nothing here runs.

        Blocks translated, chained, invalidated; code cache; time translating; safepoints. Of vCPUs: exits by reason,
        interrupts, NMIs, exceptions; instructions interpreted (`insn_emulation`), those of them that the processor computed
        (`insn_native`) and those refused; entries to translated code, calls of its helpers by name; TLB misses by kind, accesses
        that no TLB serves, page walks, flushes; sleeps in HLT.
        """

    def stats_fd(self) -> int:
        """A new descriptor, for reading, of the VM's counters as KVM_GET_STATS_FD has them; they are live."""

class Vcpu:
    """A virtual processor. State access waits while another thread is in `run`."""

    def run(self, main: bool) -> tuple[int, str | None]:
        """KVM_RUN without the GIL: exit reason, and what an internal error was. Fills in kvm_run; reads its answers.

        `main`: the caller is Python's main thread, whose signal handlers are to run meanwhile (20 times a second); what they
        raise ends the run.
        """

    def set_signal_mask(self, blocked: int | None) -> None:
        """Signals that wait while `run` runs (bit 0 is signal 1); others end it as pending, within 50 ms. None: no mask."""

    def setup_mce(self, cap: int) -> None:
        """Banks and features of machine check. EINVAL: not offered."""

    def set_mce(self, status: int, addr: int, misc: int, mcg_status: int, bank: int) -> None:
        """Record a machine check, and raise it. EINVAL: no such bank, or no error."""

    def kick(self) -> None:
        """Make `run`, now or next, return KVM_EXIT_INTR. Any thread."""

    def dirty_ring(self) -> tuple[int, int] | None:
        """Address and size in bytes of the dirty ring, mapped while the vCPU lives; None without one."""

    def close(self) -> None:
        """`kick`, and let go of the counters' descriptor."""

    def get_regs(self) -> bytes:
        """kvm_regs."""

    def set_regs(self, b: bytes) -> None:
        """kvm_regs. An access that the last exit waits for is dropped."""

    def get_sregs(self) -> bytes:
        """kvm_sregs."""

    def set_sregs(self, b: bytes) -> None:
        """kvm_sregs. EINVAL: impossible combination."""

    def get_fpu(self) -> bytes:
        """kvm_fpu."""

    def set_fpu(self, b: bytes) -> None:
        """kvm_fpu."""

    def get_xsave(self) -> bytes:
        """kvm_xsave: 4096 bytes."""

    def set_xsave(self, b: bytes) -> None:
        """kvm_xsave. EINVAL: a component or MXCSR bit that doesn't exist."""

    def get_xcr0(self) -> int:
        """XCR0."""

    def set_xcr0(self, value: int) -> None:
        """XCR0. EINVAL: bits that don't exist."""

    def get_msr(self, index: int) -> int | None:
        """An MSR; None if there is none."""

    def set_msr(self, index: int, value: int) -> bool:
        """Set an MSR; False if it or the value is not allowed."""

    def get_pdptrs(self) -> tuple[int, int, int, int]:
        """PAE's page-directory pointers, as loaded with CR3."""

    def set_pdptrs(self, pdptrs: tuple[int, int, int, int]) -> None:
        """Set them."""

    def set_tsc_khz(self, khz: int) -> None:
        """Frequency of the guest's TSC, not 0. EINVAL: no ratio to the host's for it."""

    def get_tsc_khz(self) -> int:
        """What `set_tsc_khz` said, or the host's."""

    def get_tsc_offset(self) -> int:
        """The guest's TSC is the host's, scaled, plus this, modulo 2**64."""

    def set_tsc_offset(self, offset: int) -> None:
        """Set it."""

    def kvmclock_ctrl(self) -> None:
        """Tell the guest by its clock page that it was stopped. EINVAL: it has none."""

    def set_cpuid(self, entries: list[_Cpuid]) -> None:
        """What CPUID answers."""

    def get_cpuid(self) -> list[_Cpuid]:
        """The table of `set_cpuid`."""

    def get_lapic(self) -> bytes:
        """kvm_lapic_state. EINVAL: no local APIC."""

    def set_lapic(self, b: bytes) -> None:
        """kvm_lapic_state. EINVAL: no local APIC."""

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*."""

    def set_mp_state(self, value: int) -> None:
        """KVM_MP_STATE_*. EINVAL: INIT or SIPI, in system management mode or with an SMI pending."""

    def get_vcpu_events(self) -> bytes:
        """kvm_vcpu_events."""

    def set_vcpu_events(self, b: bytes) -> None:
        """kvm_vcpu_events. EINVAL: an exception that doesn't exist, or system management mode of a vCPU that waits for SIPI."""

    def get_debugregs(self) -> bytes:
        """kvm_debugregs."""

    def set_debugregs(self, b: bytes) -> None:
        """kvm_debugregs. EINVAL: upper halves of DR6 or DR7."""

    def set_guest_debug(self, control: int, registers: list[int]) -> None:
        """KVM_GUESTDBG_* and DR0 to DR7 for USE_HW_BP. EBUSY: it injects while an exception waits."""

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt. EEXIST: one waits."""

    def set_tpr_reporting(self, on: bool) -> None:
        """Whether accesses to the task priority exit, after their instruction."""

    def set_vapic(self, gpa: int) -> None:
        """Where in guest memory the task priority stands (`engine/src/vapic.rs`); 0: nowhere. EINVAL: no local APIC, or no memory."""

    def nmi(self) -> None:
        """Queue an NMI. Any thread."""

    def smi(self) -> None:
        """Queue an SMI. Any thread."""

    def translate(self, address: int) -> int | None:
        """The gpa that a supervisor's read of a gva reaches; None if it faults."""

    def stats_fd(self) -> int:
        """`Vm.stats_fd` of this vCPU. Any thread."""

    def set_interpret_only(self, on: bool) -> None:
        """Translate nothing: for tests and to tell the translator's bugs from the interpreter's."""

def host_cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """CPUID of the host: eax, ebx, ecx, edx."""

def supported_xcr0() -> int:
    """XCR0 bits that guests can be offered: x87, SSE, AVX, and AVX-512's if the host has them."""

def host_tsc_khz() -> int:
    """Frequency of the host's TSC."""

def monotonic_raw_ns() -> int:
    """CLOCK_MONOTONIC_RAW: the time base of all timers."""

def supported_mce_cap() -> int:
    """KVM_X86_GET_MCE_CAP_SUPPORTED."""

def msr_list() -> list[int]:
    """KVM_GET_MSR_INDEX_LIST."""

def load_u16(address: int) -> int:
    """Load with acquire order from host memory; ValueError if unaligned."""

def load_u32(address: int) -> int:
    """Load with acquire order from host memory; ValueError if unaligned."""

def load_u64(address: int) -> int:
    """Load with acquire order from host memory; ValueError if unaligned."""

def store_u16(address: int, value: int) -> None:
    """Store with release order to host memory; ValueError if unaligned."""

def store_u32(address: int, value: int) -> None:
    """Store with release order to host memory; ValueError if unaligned."""

def store_u64(address: int, value: int) -> None:
    """Store with release order to host memory; ValueError if unaligned."""

def fence() -> None:
    """A full memory barrier."""
