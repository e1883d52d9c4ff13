"""A guest that was stopped in the middle goes on in another VM, of the same engine and of the other."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import fields

import pytest

import kvmkit.kvm
from kvmkit.kvm import ENGINES, Kvm
from kvmkit.kvm.exits import Intr, Io
from kvmkit.kvm.state import VcpuState, load_vcpu, load_vm, save_vcpu, save_vm
from kvmkit.testing import DATA, Guest
from kvmkit.uapi.capabilities import KVM_CAP_TSC_CONTROL
from kvmkit.uapi.x86 import kvm_cpuid_entry2

FEATURE_CONTROL, UCODE_REV = 0x3A, 0x8B
TIME = {0x10, 0x40000010, 0x40000020}
"""MSRs that go on by themselves: TSC, Hyper-V's VP_RUNTIME and TIME_REF_COUNT."""
ROUNDS, STEPS = 12, 500
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407

# A generator of numbers in registers, their exclusive or in memory, a count in DR0, a pattern in SSE registers; of instructions
# that the kernel's emulator knows, which executes all of it where KVM has no hardware.
CODE = f"""
    movups xmm5, [{DATA} + 32]
    movups xmm14, [{DATA} + 48]
    mov r8, {MULTIPLIER}
    mov r9, {INCREMENT}
    mov rax, 1
    mov ebp, {ROUNDS}
round:
    mov ecx, {STEPS}
step:
    imul rax, r8
    add rax, r9
    xor [{DATA}], rax
    dec ecx
    jnz step
    mov rbx, dr0
    inc rbx
    mov dr0, rbx
    out 0x10, al
    dec ebp
    jnz round
    mov [{DATA} + 8], rbx
    movups [{DATA} + 64], xmm14
    movups [{DATA} + 80], xmm5
    out 0x11, al
    hlt
"""
PATTERN = bytes(range(0x80, 0xA0))


def expected() -> int:
    """Exclusive or of all numbers."""
    mask = (1 << 64) - 1
    value, xor = 1, 0
    for _ in range(ROUNDS * STEPS):
        value = (value * MULTIPLIER + INCREMENT) & mask
        xor ^= value
    return xor


@pytest.fixture
def systems() -> Iterator[dict[str, Kvm]]:
    """Usable engines by name."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86 guests need an x86 machine")
    found = {}
    for engine in ENGINES:
        try:
            found[engine] = kvmkit.kvm.open(engine)
        except (OSError, ImportError, NotImplementedError):
            continue
    yield found
    for system in found.values():
        system.close()


def without_protection_keys(entry: kvm_cpuid_entry2) -> kvm_cpuid_entry2:
    """A leaf of a processor that both engines have."""
    if entry.function == 7 and entry.index == 0:
        entry.ecx &= ~(3 << 3)
    if entry.function == 0xD and entry.index == 0:
        entry.eax &= ~(1 << 9)
    return entry


def started(system: Kvm) -> Guest:
    """A guest that runs `CODE`, with a processor that both engines have."""
    guest = Guest(system, CODE, irqchip=True, pit=True)
    guest.vcpu.set_cpuid2([without_protection_keys(entry) for entry in guest.vcpu.get_cpuid2()])
    guest.map.write(DATA + 32, PATTERN)
    return guest


def complete(guest: Guest) -> None:
    """Finish the access that the last exit was for, and nothing else."""
    guest.vcpu.immediate_exit = True
    assert guest.vcpu.run() == Intr()
    guest.vcpu.immediate_exit = False


def moved(guest: Guest, system: Kvm, msrs: set[int]) -> Guest:
    """Return the same guest in a new VM; the old one is closed."""
    complete(guest)
    new = Guest(system, "hlt", irqchip=True, pit=True)
    new.memory.write(0, guest.memory.read(0, guest.memory.size_bytes))
    new.vm.memory_written(0, guest.memory.size_bytes)
    refused = load_vcpu(new.vcpu, save_vcpu(guest.vm, guest.vcpu, msrs))
    load_vm(new.vm, save_vm(guest.vm))
    guest.close()
    assert not refused
    return new


def common_msrs(systems: dict[str, Kvm]) -> set[int]:
    """MSRs that all engines have. What IA32_FEATURE_CONTROL may hold depends on the processor."""
    return set.intersection(*(set(system.get_msr_index_list()) for system in systems.values())) - {
        FEATURE_CONTROL
    }


@pytest.mark.parametrize("engines", ["soft linux", "linux soft", "soft", "linux"])
def test_computation_moves_between_engines(systems: dict[str, Kvm], engines: str) -> None:
    """At each of its outputs the guest moves to the next engine; the result is as if it had stayed."""
    names = engines.split()
    if missing := set(names) - set(systems):
        pytest.skip(f"no engine {', '.join(sorted(missing))} here")
    msrs = common_msrs({name: systems[name] for name in names})
    guest = started(systems[names[0]])
    try:
        for n in range(ROUNDS):
            exit_ = guest.run()
            assert isinstance(exit_, Io) and exit_.port == 0x10
            guest = moved(guest, systems[names[(n + 1) % len(names)]], msrs)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and exit_.port == 0x11
        result, rounds = (int.from_bytes(guest.memory.read(DATA + at, 8), "little") for at in (0, 8))
        assert (result, rounds) == (expected(), ROUNDS)
        assert guest.memory.read(DATA + 64, 32) == PATTERN[16:] + PATTERN[:16]
    finally:
        guest.close()


def test_a_tsc_of_another_frequency_moves(systems: dict[str, Kvm]) -> None:
    """To a processor that can scale it; another says so."""
    for here, there in itertools.product(systems.values(), repeat=2):
        if not here.check_extension(KVM_CAP_TSC_CONTROL):
            continue
        with started(here) as guest, Guest(there, "hlt", irqchip=True, pit=True) as new:
            khz = guest.vcpu.get_tsc_khz() // 2
            guest.vcpu.set_tsc_khz(khz)
            state = save_vcpu(guest.vm, guest.vcpu, set())
            if there.check_extension(KVM_CAP_TSC_CONTROL):
                load_vcpu(new.vcpu, state)
                assert new.vcpu.get_tsc_khz() == khz
            else:
                with pytest.raises(OSError, match="KVM_SET_TSC_KHZ"):
                    load_vcpu(new.vcpu, state)


def bytes_of(state: VcpuState, name: str) -> object:
    """A part of a state, to be compared."""
    value = getattr(state, name)
    return value if isinstance(value, (int, bytes, dict)) else bytes(value)


@pytest.mark.parametrize(
    ("here", "there"), [("soft", "linux"), ("linux", "soft"), ("soft", "soft"), ("linux", "linux")]
)
def test_state_is_the_same_bit_for_bit(systems: dict[str, Kvm], here: str, there: str) -> None:
    """What another engine was given is what it says; but for time, and what a local APIC says of itself."""
    if missing := {here, there} - set(systems):
        pytest.skip(f"no engine {', '.join(sorted(missing))} here")
    moving = common_msrs({name: systems[name] for name in (here, there)}) - TIME
    moving -= {UCODE_REV}  # the software engine's has the revision that it has
    with (
        started(systems[here]) as guest,
        Guest(systems[there], "hlt", irqchip=True, pit=True) as new,
    ):
        for _ in range(3):
            assert isinstance(guest.run(), Io)
        complete(guest)
        before = save_vcpu(guest.vm, guest.vcpu, moving)
        assert not load_vcpu(new.vcpu, before)
        after = save_vcpu(new.vm, new.vcpu, moving)
        different = {
            field.name
            for field in fields(VcpuState)
            if field.name not in ("cpuid", "lapic")
            and bytes_of(before, field.name) != bytes_of(after, field.name)
        }
        if here != there:
            different -= {"xsave"} if same_xsave(before, after) else set()
        assert different == set()
        assert before.lapic is not None and after.lapic is not None
        version = slice(0x30, 0x34)
        before.lapic.regs[version] = after.lapic.regs[version] = [0] * 4
        assert bytes(before.lapic) == bytes(after.lapic)


def same_xsave(a: VcpuState, b: VcpuState) -> bool:
    """Whether two areas mean the same for x87 and SSE; a component in its initial state may be marked as in use or not."""
    return a.xsave[:416] == b.xsave[:416]
