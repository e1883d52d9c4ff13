"""Processor models on a CPUID table that has everything, and on what the software engine has here."""

import os
from importlib.util import find_spec

import pytest

from kvmkit.machine.x86.cpu_model import FEATURES, LEVELS, cpu_model, features, parse
from kvmkit.uapi.x86 import kvm_cpuid_entry2

REGISTERS = ("eax", "ebx", "ecx", "edx")


def everything() -> list[kvm_cpuid_entry2]:
    """A table with all features, and AVX and AVX-512 state where Intel's processors have it."""
    table: dict[tuple[int, int], kvm_cpuid_entry2] = {}
    for leaf, subleaf, register, bit in FEATURES.values():
        entry = table.setdefault((leaf, subleaf), kvm_cpuid_entry2(function=leaf, index=subleaf))
        setattr(entry, REGISTERS[register], getattr(entry, REGISTERS[register]) | 1 << bit)
    table[0xD, 0] = kvm_cpuid_entry2(function=0xD, eax=0xE7, ebx=2688, ecx=2688)
    for index, size, offset in ((2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664)):
        table[0xD, index] = kvm_cpuid_entry2(function=0xD, index=index, eax=size, ebx=offset)
    return list(table.values())


def xstate(table: list[kvm_cpuid_entry2]) -> dict[int, tuple[int, int, int]]:
    return {e.index: (e.eax, e.ebx, e.ecx) for e in table if e.function == 0xD and e.index != 1}


def test_host_is_everything() -> None:
    supported = everything()
    before = [bytes(entry) for entry in supported]
    assert [bytes(entry) for entry in cpu_model(supported, "host")] == before
    cpu_model(supported, "x86-64-v2")
    assert [bytes(entry) for entry in supported] == before


@pytest.mark.parametrize("level", LEVELS)
def test_levels_have_what_they_say_and_no_more_for_programs(level: str) -> None:
    seen = features(cpu_model(everything(), level))
    assert LEVELS[level] <= seen
    for other, names in LEVELS.items():
        if other > level:
            assert not (names - LEVELS[level] - {"xsave"}) & seen
    assert not {"aes", "sha_ni", "rdrand", "gfni", "movdir64b"} & seen
    assert {"smep", "pcid", "xsaves", "fsgsbase"} <= seen


def test_state_goes_with_its_features() -> None:
    whole = xstate(everything())
    assert xstate(cpu_model(everything(), "x86-64-v4")) == whole
    assert xstate(cpu_model(everything(), "x86-64-v3")) == {0: (7, 832, 832), 2: whole[2]}
    assert xstate(cpu_model(everything(), "x86-64-v2")) == {0: (3, 576, 576)}
    assert not [e for e in cpu_model(everything(), "host,-xsave") if e.function == 0xD]


@pytest.mark.parametrize(
    ("cpu", "gone", "there"),
    [
        ("host,-avx2", {"avx2", "avx512f", "avx512bw", "avx_vnni"}, {"avx", "fma", "aes"}),
        ("host,-avx512f", {"avx512f", "avx512vl", "avx512_fp16"}, {"avx2", "vaes"}),
        ("host,-avx", {"avx", "avx2", "fma", "vaes", "avx512f"}, {"xsave", "sse4_2"}),
        ("host,-pcid", {"pcid", "invpcid"}, {"smep"}),
        ("x86-64-v3,+aes,+rdrand,-movbe", {"movbe", "avx512f", "sha_ni"}, {"aes", "rdrand", "avx2"}),
    ],
)
def test_features(cpu: str, gone: set[str], there: set[str]) -> None:
    seen = features(cpu_model(everything(), cpu))
    assert not gone & seen
    assert there <= seen


@pytest.mark.parametrize(
    ("cpu", "message"),
    [
        ("pentium", "no processor model 'pentium'"),
        ("", "no processor model ''"),
        ("host,avx2", "'avx2' in processor"),
        ("host,+avx9", r"'\+avx9' in processor"),
        ("host,+aes,-aes", "both adds and takes away aes"),
        ("host,+avx2,-avx", "avx2 needs what it takes away"),
        ("x86-64-v2,+avx2", "avx2 needs what it takes away or hasn't"),
    ],
)
def test_mistakes(cpu: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu_model(everything(), cpu)


def test_what_the_machine_lacks() -> None:
    supported = cpu_model(everything(), "x86-64-v2")
    with pytest.raises(ValueError, match="no abm, avx, avx2"):
        cpu_model(supported, "x86-64-v3")
    with pytest.raises(ValueError, match="no sha_ni"):
        cpu_model(supported, "host,+sha_ni")


def test_parse() -> None:
    assert parse("x86-64-v3,+aes,-rdrand") == ("x86-64-v3", {"aes"}, {"rdrand"})


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or find_spec("kvmkit._engine") is None, reason="no software engine here"
)
def test_the_software_engine_names_no_feature_that_is_missing_here() -> None:
    from kvmkit.kvm.soft.x86 import cpuid

    supported = cpuid.get_supported_cpuid()
    assert LEVELS["x86-64-v2"] <= features(supported)
    assert features(cpu_model(supported, "host")) == features(supported)
