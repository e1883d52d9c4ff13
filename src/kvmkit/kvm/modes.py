"""Put an x86 vCPU into 16-bit, 32-bit or 64-bit mode without running the code that would take it there.

For tiny guests: probes, tests, examples. (Intel SDM vol. 3, 3.4.5 segment descriptors, 4.5 four-level paging.)
"""

from kvmkit.kvm.contract import Vcpu
from kvmkit.kvm.memory import GuestMemory
from kvmkit.uapi.x86 import kvm_regs, kvm_segment, kvm_sregs

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
CR4_OSFXSR = 1 << 9
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
PTE_PRESENT = 1 << 0
PTE_WRITABLE = 1 << 1
PTE_LARGE = 1 << 7

CODE_SELECTOR = 0x08
DATA_SELECTOR = 0x10
GDT_BYTES = 24

IDENTITY_MAP_BYTES = 4 << 30
PAGE_TABLE_BYTES = 6 * 4096


def set_real_mode(vcpu: Vcpu, ip: int, segment: int = 0) -> None:
    """Start at `segment`:`ip` in real mode, all data segments equal to the code segment."""
    sregs = vcpu.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        register: kvm_segment = getattr(sregs, name)
        register.selector, register.base = segment, segment << 4
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=ip, rflags=2))


def set_protected_mode(vcpu: Vcpu, memory: GuestMemory, eip: int, gdt: int) -> None:
    """Start at `eip` in 32-bit protected mode with flat segments and no paging; the GDT is written to address `gdt`."""
    sregs = vcpu.get_sregs()
    _flat_segments(sregs, memory, gdt, long_mode=False)
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=eip, rflags=2))


def set_long_mode(vcpu: Vcpu, memory: GuestMemory, rip: int, tables: int) -> None:
    """Start at `rip` in 64-bit mode, CPL 0, the first 4 GiB mapped to themselves with 2 MiB pages, SSE enabled.

    Page tables and then the GDT are written to `memory`, which starts at guest physical 0, at address `tables`, a multiple of
    4096; they take seven pages. CPUID must have been set where the engine needs it to allow long mode.
    """
    pdpt, directories = tables + 4096, tables + 8192
    flags = PTE_PRESENT | PTE_WRITABLE
    _write_u64(memory, tables, pdpt | flags)
    for i in range(4):
        _write_u64(memory, pdpt + 8 * i, directories + 4096 * i | flags)
    entries = (address | flags | PTE_LARGE for address in range(0, IDENTITY_MAP_BYTES, 1 << 21))
    memory.write(directories, b"".join(entry.to_bytes(8, "little") for entry in entries))
    sregs = vcpu.get_sregs()
    _flat_segments(sregs, memory, tables + PAGE_TABLE_BYTES, long_mode=True)
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG
    sregs.cr3 = tables
    sregs.cr4 = CR4_PAE | CR4_OSFXSR
    sregs.efer = EFER_LME | EFER_LMA
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_regs(rip=rip, rflags=2))


def _write_u64(memory: GuestMemory, offset: int, value: int) -> None:
    memory.write(offset, value.to_bytes(8, "little"))


def _flat_segments(sregs: kvm_sregs, memory: GuestMemory, gdt: int, long_mode: bool) -> None:
    """Load segments of base 0 and the limit 4 GiB, with a GDT at `gdt` that says the same."""
    code = kvm_segment(0, 0xFFFFFFFF, CODE_SELECTOR, 11, 1, 0, not long_mode, 1, long_mode, 1)
    data = kvm_segment(0, 0xFFFFFFFF, DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1)
    _write_u64(memory, gdt, 0)
    _write_u64(memory, gdt + CODE_SELECTOR, descriptor(code))
    _write_u64(memory, gdt + DATA_SELECTOR, descriptor(data))
    sregs.cs = code
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.gdt.base, sregs.gdt.limit = gdt, GDT_BYTES - 1


def descriptor(segment: kvm_segment) -> int:
    """Return the 8-byte GDT descriptor of a code or data segment."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        limit & 0xFFFF
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )
