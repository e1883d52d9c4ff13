"""What this machine offers: KVM's modules and capabilities, how fast each engine really is, and which one to take.

A ``/dev/kvm`` that opens is not always a fast one. Without hardware behind it, supervisor code is *emulated*, a million or two
instructions a second, and with instructions missing. So an engine is timed: a loop of 64-bit supervisor code, for a few
milliseconds.
"""

import errno
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from kvmkit import kvm
from kvmkit.kvm.exits import Hlt, Mmio
from kvmkit.kvm.modes import set_long_mode
from kvmkit.uapi import arm64
from kvmkit.uapi.capabilities import CAPABILITIES
from kvmkit.uapi.x86 import kvm_regs

SLOW_MIPS = 30.0
"""Million supervisor instructions a second below which a KVM has no hardware behind it: that does thousands, and some
hundred where the hardware is itself emulated; an instruction emulator does one or two."""

_SOFT_MACHINE = platform.machine() == "x86_64"
"""Whether there is a software engine for this machine."""
_ENOUGH_NS = 3_000_000

# loop: add [rbx], rcx; mov rax, [rbx]; xor rax, rcx; dec rcx; jnz loop; hlt
_X86_LOOP = bytes.fromhex("48010b 488b03 4831c8 48ffc9 75f2 f4")
# nop; loop: add x2, x2, x0; eor x3, x2, x0; mov x4, x3; subs x0, x0, #1; b.ne loop; str xzr, [x1]
_ARM64_LOOP = bytes.fromhex("1f2003d5 4200008b 430000ca e40303aa 000400f1 81ffff54 3f0000f9")
_LOOP_INSTRUCTIONS = 5
_CODE = 0x1000
_MMIO = 0x1000000


@dataclass(frozen=True)
class EngineReport:
    """One engine as it shows itself here. `error` says why it can't be used; the rest is then empty."""

    name: str
    error: str = ""
    capabilities: Mapping[str, int] = field(default_factory=dict)
    """KVM_CAP_* that are not 0."""
    supervisor_mips: float = 0.0
    """Million 64-bit supervisor instructions a second; 0 if the measuring loop didn't run."""


@dataclass(frozen=True)
class Report:
    """What the machine offers."""

    modules: Mapping[str, Mapping[str, str]]
    """Each loaded KVM module's parameters (those that this user may read)."""
    nested: bool | None
    """Whether the kernel's KVM offers its guests virtualization of their own; None if its modules don't say."""
    engines: tuple[EngineReport, ...]
    choice: str
    """The engine that "auto" takes, empty if there is none."""
    reason: str


def modules(sysfs: Path = Path("/sys/module")) -> dict[str, dict[str, str]]:
    """Read name → parameters of the modules kvm, kvm_intel, kvm_amd, kvm_pvm, … that are loaded or built in."""
    found: dict[str, dict[str, str]] = {}
    for module in sorted(sysfs.glob("kvm*")):
        parameters = found[module.name] = {}
        for file in sorted(module.glob("parameters/*")):
            try:
                parameters[file.name] = file.read_text().strip()
            except OSError:  # write-only, or root's alone
                continue
    return found


def nested_support(parameters: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Return what the vendor module's parameter `nested` says, None if there is no such parameter."""
    for name in ("kvm_intel", "kvm_amd"):
        value = parameters.get(name, {}).get("nested")
        if value is not None:
            return value in ("Y", "1")
    return None


def capabilities(system: kvm.Kvm) -> dict[str, int]:
    """Ask for every capability by name; those that are absent are left out."""
    found = {}
    for name, cap in CAPABILITIES.items():
        try:
            value = system.check_extension(cap)
        except OSError as error:
            if error.errno != errno.EINVAL:  # arm64's answer for some that only a VM has
                raise
        else:
            if value:
                found[name] = value
    return found


def supervisor_mips(system: kvm.Kvm) -> float:
    """Time a loop of 64-bit supervisor code: five simple instructions, the last a branch.

    Returns million instructions a second of this thread's time. Raises `OSError` where the engine can't run it. Takes some
    5 ms; on an engine that emulates, some 20 ms.
    """
    with kvm.GuestMemory(0x10000) as memory, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vm.set_user_memory_region(0, 0, memory.size_bytes, memory.address)
        prepare = _prepare_arm64 if os.uname().machine == "aarch64" else _prepare_x86
        restart = prepare(system, vm, vcpu, memory)

        def run_ns(iterations: int) -> int:
            restart(iterations)
            start_ns = time.thread_time_ns()  # a busy machine that lets us wait doesn't make an engine slow
            exit_ = vcpu.run()
            elapsed_ns = time.thread_time_ns() - start_ns
            if not isinstance(exit_, (Hlt, Mmio)):
                raise OSError(f"the measuring loop ended with {exit_}")
            return elapsed_ns

        run_ns(1)  # touches memory, translates
        return _rate(run_ns) * _LOOP_INSTRUCTIONS * 1e3


def _rate(run_ns: Callable[[int], int]) -> float:
    """Iterations a nanosecond, without what a run costs in itself: on a slow host's good KVM that is a lot."""
    base_ns = run_ns(1)
    iterations = 1000
    while (net_ns := run_ns(iterations) - base_ns) < _ENOUGH_NS:
        iterations *= 4
    return iterations / net_ns


def _prepare_x86(
    system: kvm.Kvm, _vm: kvm.Vm, vcpu: kvm.Vcpu, memory: kvm.GuestMemory
) -> Callable[[int], None]:
    memory.write(_CODE, _X86_LOOP)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    set_long_mode(vcpu, memory, rip=_CODE, tables=0x4000)
    return lambda iterations: vcpu.set_regs(kvm_regs(rip=_CODE, rbx=0x2000, rcx=iterations, rflags=2))


def _prepare_arm64(
    _system: kvm.Kvm, vm: kvm.Vm, vcpu: kvm.Vcpu, memory: kvm.GuestMemory
) -> Callable[[int], None]:
    memory.write(_CODE, _ARM64_LOOP)
    vcpu.arm_vcpu_init(vm.arm_preferred_target())
    vcpu.set_one_reg(arm64.x_reg(1), _MMIO)

    def restart(iterations: int) -> None:
        # The store's exit leaves the PC to be moved on when the vCPU runs again: the loop starts with a nop for that.
        vcpu.set_one_reg(arm64.REG_PC, _CODE)
        vcpu.set_one_reg(arm64.x_reg(0), iterations)

    return restart


def examine(engine: str) -> EngineReport:
    """Open `engine` and report on it."""
    if engine == "soft" and _SOFT_MACHINE and not _soft_is_built():
        return EngineReport(engine, error="the native module kvmkit._engine isn't built")
    try:
        with kvm.open(engine) as system:
            found = capabilities(system)
            try:
                return EngineReport(engine, capabilities=found, supervisor_mips=supervisor_mips(system))
            except OSError as error:
                return EngineReport(engine, error=str(error), capabilities=found)
    except (OSError, ImportError, NotImplementedError) as error:
        return EngineReport(engine, error=_text(error))


def report() -> Report:
    """Examine everything."""
    parameters = modules()
    linux, soft = (examine(engine) for engine in kvm.ENGINES)
    try:
        choice, reason = _choose(linux)
    except OSError as error:
        choice, reason = "", _text(error)
    return Report(parameters, nested_support(parameters), (linux, soft), choice, reason)


def choose_engine() -> tuple[str, str]:
    """Return the engine to take here and why, in words.

    `OSError` if there is none: ``/dev/kvm`` doesn't open and the software engine isn't built.
    """
    return _choose(examine("linux"))


def _choose(linux: EngineReport) -> tuple[str, str]:
    if linux.error:
        verdict = linux.error
    elif linux.supervisor_mips >= SLOW_MIPS:
        return "linux", f"/dev/kvm runs {linux.supervisor_mips:.0f} million supervisor instructions a second"
    else:
        verdict = (
            f"/dev/kvm emulates supervisor code, {linux.supervisor_mips:.1f} million instructions a second: "
            "no hardware is behind it"
        )
    if _soft_is_built():
        return "soft", verdict
    lacking = "isn't built (run `make build`)" if _SOFT_MACHINE else f"isn't for {platform.machine()}"
    if linux.error:
        raise OSError(f"no engine: {verdict}; and the software engine {lacking}")
    return "linux", f"{verdict}; but the software engine {lacking}"


def _soft_is_built() -> bool:
    return _SOFT_MACHINE and find_spec("kvmkit._engine") is not None


def _text(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
