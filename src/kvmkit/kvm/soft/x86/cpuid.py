"""KVM_GET_SUPPORTED_CPUID of the software engine: what the host has and the engine carries through.

Most instructions run on the host itself, so a feature can only be offered if the host has it; it is offered only if the
engine's allow-list copies its instructions or its interpreter has them. The tables below name the offered bits, as Intel's
SDM (volume 2, CPUID) and AMD's APM (volume 3, appendix E) number them.
"""

from kvmkit import _engine
from kvmkit.uapi import x86

_SIGNIFICANT_INDEX = x86.KVM_CPUID_FLAG_SIGNIFCANT_INDEX


def _bits(*positions: int) -> int:
    return sum(1 << n for n in positions)


# SSE3 PCLMULQDQ SSSE3 FMA CX16 PCID SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-deadline AES XSAVE AVX F16C RDRAND hypervisor
_1_ECX = _bits(0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 28, 29, 30, 31)
# FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
_1_EDX = _bits(0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26)
# FSGSBASE TSC_ADJUST BMI1 AVX2 FDP_EXCPTN SMEP BMI2 ERMS INVPCID FPU-CS-DS RDSEED ADX SMAP CLFLUSHOPT CLWB SHA
_7_EBX = _bits(0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 18, 19, 20, 23, 24, 29)
_AVX512_EBX = _bits(16, 17, 21, 28, 30, 31)  # F DQ IFMA CD BW VL
# UMIP GFNI VAES VPCLMULQDQ RDPID CLDEMOTE MOVDIRI MOVDIR64B
_7_ECX = _bits(2, 8, 9, 10, 22, 25, 27, 28)
_AVX512_ECX = _bits(1, 6, 11, 12, 14)  # VBMI VBMI2 VNNI BITALG VPOPCNTDQ
_7_EDX = _bits(4, 14)  # FSRM SERIALIZE
_AVX512_EDX = _bits(23)  # FP16
_7_1_EAX = _bits(4)  # AVX-VNNI
_AVX512_7_1_EAX = _bits(5)  # BF16
_XSAVE_EAX = _bits(0, 1, 2, 3)  # XSAVEOPT, XSAVEC, XGETBV of XINUSE, XSAVES
_ALWAYS_7_EDX = _bits(29)  # ARCH_CAPABILITIES: the MSR says which weaknesses the host's kernel rules out
_80000001_ECX = _bits(0, 5, 8)  # LAHF LZCNT PREFETCHW
_80000001_EDX = _bits(11, 20, 26, 27, 29)  # SYSCALL NX 1G-pages RDTSCP LM
# Offered whatever the host has: the engine's own.
_ALWAYS_1_ECX = _bits(21, 24, 31)
_ALWAYS_1_EDX = _bits(9)
_ALWAYS_7_EBX = _bits(0, 1, 7, 20)
_ALWAYS_7_ECX = _bits(2)

_PHYSICAL_BITS, _LINEAR_BITS = 46, 48

_APIC_TIMER_HZ = 1_000_000_000

# CLOCKSOURCE NOP_IO_DELAY CLOCKSOURCE2 CLOCKSOURCE_STABLE
_KVM_FEATURES = _bits(0, 1, 3, 24)


def get_supported_cpuid() -> list[x86.kvm_cpuid_entry2]:
    """Return the table; subleaves that matter carry KVM_CPUID_FLAG_SIGNIFCANT_INDEX."""
    host = _engine.host_cpuid
    table: list[x86.kvm_cpuid_entry2] = []

    def add(function: int, eax: int, ebx: int, ecx: int, edx: int, index: int | None = None) -> None:
        table.append(
            x86.kvm_cpuid_entry2(
                function=function,
                index=index or 0,
                flags=0 if index is None else _SIGNIFICANT_INDEX,
                eax=eax,
                ebx=ebx,
                ecx=ecx,
                edx=edx,
            )
        )

    khz = _engine.host_tsc_khz()
    _, ebx, ecx, edx = host(0, 0)
    add(0, 0x16, ebx, ecx, edx)
    eax, ebx, ecx, edx = host(1, 0)
    add(1, eax, ebx & 0xFF00, ecx & _1_ECX | _ALWAYS_1_ECX, edx & _1_EDX | _ALWAYS_1_EDX)
    add(2, *host(2, 0))
    for index in range(8):
        eax, ebx, ecx, edx = host(4, index)
        # One core, one thread: what the host's caches are shared with doesn't concern the guest.
        add(4, eax & 0x3FFF, ebx, ecx, edx, index)
        if not eax & 0x1F:
            break
    add(6, _bits(2), 0, 0, 0)  # ARAT
    xcr0 = _engine.supported_xcr0()
    avx512 = -1 if xcr0 & 0xE0 else 0
    highest, ebx, ecx, edx = host(7, 0)
    ebx = ebx & (_7_EBX | _AVX512_EBX & avx512) | _ALWAYS_7_EBX
    ecx = ecx & (_7_ECX | _AVX512_ECX & avx512) | _ALWAYS_7_ECX
    add(7, min(highest, 1), ebx, ecx, edx & (_7_EDX | _AVX512_EDX & avx512) | _ALWAYS_7_EDX, 0)
    if highest >= 1:
        add(7, host(7, 1)[0] & (_7_1_EAX | _AVX512_7_1_EAX & avx512), 0, 0, 0, 1)
    for index in range(2):
        add(0xB, 0, 0, index, 0, index)
    components = {n: host(0xD, n) for n in range(2, 8) if xcr0 >> n & 1}
    area_bytes = max((size + offset for size, offset, _, _ in components.values()), default=576)
    add(0xD, xcr0, area_bytes, area_bytes, 0, 0)
    add(0xD, host(0xD, 1)[0] & _XSAVE_EAX, 0, 0, 0, 1)
    for n, (size, offset, ecx, _) in components.items():
        add(0xD, size, offset, ecx & 2, 0, n)  # bit 1: aligned in the compacted format
    # TSC = 1 GHz · kHz / 10^6.
    add(0x15, 1_000_000, khz, _APIC_TIMER_HZ, 0)
    add(0x16, khz // 1000, khz // 1000, 100, 0)
    signature = [int.from_bytes(b"KVMKVMKVM\0\0\0"[i : i + 4], "little") for i in (0, 4, 8)]
    add(0x40000000, 0x40000010, *signature)
    add(0x40000001, _KVM_FEATURES, 0, 0, 0)
    add(0x40000010, khz, _APIC_TIMER_HZ // 1000, 0, 0)
    add(0x80000000, 0x80000008, 0, 0, 0)
    eax, _, ecx, edx = host(0x80000001, 0)
    add(0x80000001, eax, 0, ecx & _80000001_ECX, edx & _80000001_EDX)
    for leaf in (0x80000002, 0x80000003, 0x80000004, 0x80000006):
        add(leaf, *host(leaf, 0))
    add(0x80000007, 0, 0, 0, _bits(8))  # invariant TSC
    add(0x80000008, _PHYSICAL_BITS | _LINEAR_BITS << 8, 0, 0, 0)
    return table
