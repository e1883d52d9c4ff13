"""Which processor a guest sees: ``host``, or a level that many hosts have, with features added and taken away.

``host``, ``x86-64-v2``, ``x86-64-v3`` and ``x86-64-v4`` (the levels of the x86-64 psABI), then features with a sign, all
separated by commas: ``x86-64-v3,+aes,-rdrand``. Features have the names that Linux shows in /proc/cpuinfo. A level has
its own instructions and those below it and no others, so that a guest finds the same on every host that has the level; what
only kernels use (paging, timers, interrupts) stays as the engine has it. What depends on a feature goes with it.
"""

from collections.abc import Iterable, Sequence

from kvmkit.uapi.x86 import kvm_cpuid_entry2

EAX, EBX, ECX, EDX = range(4)
_REGISTERS = ("eax", "ebx", "ecx", "edx")

FEATURES: dict[str, tuple[int, int, int, int]] = {
    name: (leaf, subleaf, register, bit)
    for (leaf, subleaf, register), names in {
        (1, 0, ECX): {
            "pni": 0,
            "pclmulqdq": 1,
            "ssse3": 9,
            "fma": 12,
            "cx16": 13,
            "pcid": 17,
            "sse4_1": 19,
            "sse4_2": 20,
            "x2apic": 21,
            "movbe": 22,
            "popcnt": 23,
            "aes": 25,
            "xsave": 26,
            "avx": 28,
            "f16c": 29,
            "rdrand": 30,
        },
        (7, 0, EBX): {
            "fsgsbase": 0,
            "bmi1": 3,
            "avx2": 5,
            "smep": 7,
            "bmi2": 8,
            "erms": 9,
            "invpcid": 10,
            "avx512f": 16,
            "avx512dq": 17,
            "rdseed": 18,
            "adx": 19,
            "smap": 20,
            "avx512ifma": 21,
            "clflushopt": 23,
            "clwb": 24,
            "avx512cd": 28,
            "sha_ni": 29,
            "avx512bw": 30,
            "avx512vl": 31,
        },
        (7, 0, ECX): {
            "avx512vbmi": 1,
            "umip": 2,
            "avx512_vbmi2": 6,
            "gfni": 8,
            "vaes": 9,
            "vpclmulqdq": 10,
            "avx512_vnni": 11,
            "avx512_bitalg": 12,
            "avx512_vpopcntdq": 14,
            "rdpid": 22,
            "cldemote": 25,
            "movdiri": 27,
            "movdir64b": 28,
        },
        (7, 0, EDX): {"fsrm": 4, "serialize": 14, "avx512_fp16": 23},
        (7, 1, EAX): {"avx_vnni": 4, "avx512_bf16": 5},
        (0xD, 1, EAX): {"xsaveopt": 0, "xsavec": 1, "xgetbv1": 2, "xsaves": 3},
        (0x80000001, 0, ECX): {"lahf_lm": 0, "abm": 5, "3dnowprefetch": 8},
        (0x80000001, 0, EDX): {"pdpe1gb": 26, "rdtscp": 27},
    }.items()
    for name, bit in names.items()
}
"""Leaf, subleaf, register and bit of each feature by name."""

_KERNEL = {"fsgsbase", "invpcid", "pcid", "pdpe1gb", "rdtscp", "smap", "smep", "umip", "x2apic"} | {
    "xgetbv1",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xsaves",
}
"""What a level leaves as it is: programs either can't use it or find it by XCR0 alone."""

_V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}

_AVX512 = {name for name in FEATURES if name.startswith("avx512")} - {"avx512f"}
_NEEDS = {name: "avx512f" for name in _AVX512} | {
    "avx": "xsave",
    "avx2": "avx",
    "f16c": "avx",
    "fma": "avx",
    "vaes": "avx",
    "vpclmulqdq": "avx",
    "avx_vnni": "avx2",
    "avx512f": "avx2",
    "avx512vbmi": "avx512bw",
    "avx512_bitalg": "avx512bw",
    "avx512_fp16": "avx512bw",
    "avx512_vbmi2": "avx512bw",
    "xsaveopt": "xsave",
    "xsavec": "xsave",
    "xgetbv1": "xsave",
    "xsaves": "xsavec",
    "invpcid": "pcid",
}
"""What a feature needs beside it."""


def _with_dependants(names: Iterable[str]) -> set[str]:
    gone = set(names)
    while more := {name for name, needs in _NEEDS.items() if needs in gone} - gone:
        gone |= more
    return gone


def _has(table: Sequence[kvm_cpuid_entry2], name: str) -> bool:
    leaf, subleaf, register, bit = FEATURES[name]
    entry = next((e for e in table if (e.function, e.index) == (leaf, subleaf)), None)
    return entry is not None and bool(getattr(entry, _REGISTERS[register]) >> bit & 1)


def features(table: Sequence[kvm_cpuid_entry2]) -> set[str]:
    """Names of the features that a CPUID table has, as far as `FEATURES` names them."""
    return {name for name in FEATURES if _has(table, name)}


def parse(cpu: str) -> tuple[str, set[str], set[str]]:
    """Take `cpu` apart: model, features added, features taken away. ValueError says what is wrong with it."""
    model, *changes = cpu.split(",")
    if model != "host" and model not in LEVELS:
        raise ValueError(f"no processor model {model!r}: it is one of host, {', '.join(LEVELS)}")
    added: set[str] = set()
    removed: set[str] = set()
    for change in changes:
        sign, name = change[:1], change[1:]
        if sign not in ("+", "-") or name not in FEATURES:
            raise ValueError(
                f"{change!r} in processor {cpu!r} is no feature with + or - before it; "
                f"features are named as in /proc/cpuinfo: {', '.join(sorted(FEATURES))}"
            )
        (added if sign == "+" else removed).add(name)
    if both := added & removed:
        raise ValueError(f"processor {cpu!r} both adds and takes away {', '.join(sorted(both))}")
    return model, added, removed


def cpu_model(supported: Sequence[kvm_cpuid_entry2], cpu: str) -> list[kvm_cpuid_entry2]:
    """Return what of KVM_GET_SUPPORTED_CPUID, `supported`, a guest sees with `cpu`; `supported` isn't changed.

    ValueError if `cpu` isn't understood, or asks for features that the engine on this machine lacks.
    """
    model, added, removed = parse(cpu)
    here = features(supported)
    wanted = LEVELS.get(model, set()) | added
    if lacking := wanted - here:
        raise ValueError(
            f"processor {cpu!r}: this machine's engine has no {', '.join(sorted(lacking))}; take another model, or "
            f"leave it out"
        )
    keep = here if model == "host" else here & (LEVELS[model] | _KERNEL) | added
    gone = _with_dependants((set(FEATURES) - keep) | removed)
    if unmet := added & gone:
        raise ValueError(f"processor {cpu!r}: {', '.join(sorted(unmet))} needs what it takes away or hasn't")
    table = [kvm_cpuid_entry2.from_buffer_copy(entry) for entry in supported]
    for name in gone:
        leaf, subleaf, register, bit = FEATURES[name]
        for entry in table:
            if (entry.function, entry.index) == (leaf, subleaf):
                value = getattr(entry, _REGISTERS[register]) & ~(1 << bit)
                setattr(entry, _REGISTERS[register], value)
    return _with_xstate(table, gone)


_XSTATE = 0xD
_AVX_STATE, _AVX512_STATE = 1 << 2, 0xE0
_LEGACY_AND_HEADER_BYTES = 576


def _with_xstate(table: list[kvm_cpuid_entry2], gone: set[str]) -> list[kvm_cpuid_entry2]:
    """Take the state of features in `gone` out of leaf 0xd, and their room out of its sizes."""
    without = (_AVX_STATE if "avx" in gone else 0) | (_AVX512_STATE if "avx512f" in gone else 0)
    if "xsave" in gone:
        return [entry for entry in table if entry.function != _XSTATE]
    kept, area_bytes = [], _LEGACY_AND_HEADER_BYTES
    for entry in table:
        if entry.function == _XSTATE and entry.index >= 2:
            if without >> entry.index & 1:
                continue
            area_bytes = max(area_bytes, entry.eax + entry.ebx)
        kept.append(entry)
    for entry in kept:
        if (entry.function, entry.index) == (_XSTATE, 0):
            entry.eax &= ~without
            entry.ebx = entry.ecx = area_bytes
    return kept
