"""What CPUID says on this board: what the engine supports, plus which processor this is and how many there are.

(Intel SDM volume 2, CPUID: leaves 1, 4, 0xb, 0x1f; AMD APM volume 3, appendix E: 0x80000008, 0x8000001e.) All processors are
cores of one package, one thread each.
"""

from collections.abc import Sequence

from kvmkit.uapi.x86 import kvm_cpuid_entry2

_HTT = 1 << 28
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
_SMT, _CORE = 1, 2


def cpuid_of(
    supported: Sequence[kvm_cpuid_entry2], id: int, cpus: int, *, tsc_deadline: bool
) -> list[kvm_cpuid_entry2]:
    """Return the table for processor `id` of `cpus`; `supported` is KVM_GET_SUPPORTED_CPUID and isn't changed.

    KVM offers the TSC-deadline timer as a capability, not there, since it needs the engine's local APIC: `tsc_deadline`.
    """
    core_bits = (cpus - 1).bit_length()
    ids = 1 << core_bits  # leaves 1 and 4 count ids, not processors
    table = []
    for original in supported:
        entry = kvm_cpuid_entry2.from_buffer_copy(original)
        match entry.function:
            case 1:
                entry.ebx = entry.ebx & 0x0000FFFF | min(ids, 255) << 16 | id << 24
                entry.ecx |= _HYPERVISOR | (_TSC_DEADLINE if tsc_deadline else 0)
                entry.edx = entry.edx & ~_HTT | (_HTT if cpus > 1 else 0)
            case 4 if entry.eax & 0x1F:
                shared = ids - 1 if entry.eax >> 5 & 7 >= 3 else 0  # the last level is common to all
                entry.eax = entry.eax & 0x3FFF | shared << 14 | min(ids - 1, 63) << 26
            case 0xB | 0x1F:
                shift, count, kind = {0: (0, 1, _SMT), 1: (core_bits, cpus, _CORE)}.get(
                    entry.index, (0, 0, 0)
                )
                entry.eax, entry.ebx = shift, count
                entry.ecx, entry.edx = kind << 8 | entry.index, id
            case 0x80000008 if entry.ecx & 0xFFFF:
                entry.ecx = entry.ecx & ~0xFFFF | core_bits << 12 | cpus - 1
            case 0x8000001E:
                entry.eax, entry.ebx, entry.ecx = id, id, 0
        table.append(entry)
    return table
