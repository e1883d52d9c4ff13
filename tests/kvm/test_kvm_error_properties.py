"""Wrong calls in any order: the same errno from both engines, and from closed descriptors EBADF.

Where both engines can be used, hypothesis makes calls and what they say is compared; the kernel is the oracle. Where one can't,
the other has to answer each call with a result or an `OSError` still.
"""

import ctypes
import errno
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvmkit.kvm
from kvmkit.kvm import ENGINES, GuestMemory, Kvm, Vcpu, Vm, contract, irqchip_route, msi_route
from kvmkit.uapi import common as c
from kvmkit.uapi import x86
from kvmkit.uapi.capabilities import (
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_SPLIT_IRQCHIP,
)
from kvmkit.uapi.ioctls import IOCTLS

MEMORY_BYTES = 1 << 20


def usable() -> dict[str, Kvm]:
    """Engines that open here."""
    found = {}
    for engine in ENGINES if os.uname().machine == "x86_64" else ():
        try:
            found[engine] = kvmkit.kvm.open(engine)
        except (OSError, ImportError):
            continue
    return found


@pytest.fixture(scope="module")
def systems() -> Iterator[list[Kvm]]:
    """All usable engines, the kernel's first."""
    found = usable()
    if not found:
        pytest.skip("no engine")
    yield list(found.values())
    for system in found.values():
        system.close()


@dataclass
class World:
    """A VM with one slot of 64 KiB at 0, and what a sequence of calls made in it."""

    system: Kvm
    memory: GuestMemory = field(default_factory=lambda: GuestMemory(MEMORY_BYTES))
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    eventfds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vm: Vm = self.system.create_vm()
        self.vm.set_user_memory_region(0, 0, 0x10000, self.memory.address)
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]

    def vcpu(self, n: int) -> Vcpu:
        """vCPU `n`, created if need be."""
        if n not in self.vcpus:
            self.vcpus[n] = self.vm.create_vcpu(n)
        return self.vcpus[n]

    def create_vcpu(self, n: int) -> None:
        """KVM_CREATE_VCPU; the last ids that there are, and the first that aren't, differ by engine."""
        if n >= 100:
            n = n - 100 + self.system.check_extension(KVM_CAP_MAX_VCPU_ID)
        self.vcpus.setdefault(n, vcpu := self.vm.create_vcpu(n))
        assert self.vcpus[n] is vcpu

    def fd(self, n: int) -> int:
        """An eventfd, or something that isn't one."""
        return self.eventfds[n] if n < 2 else (999_999 if n == 2 else self.memory.fd)

    def close(self) -> None:
        """Release everything."""
        for vcpu in self.vcpus.values():
            vcpu.close()
        self.vm.close()
        self.memory.close()
        for fd in self.eventfds:
            os.close(fd)


Call = Callable[[World, list[int]], object]


def slot_flags(n: int) -> int:
    """Flags that both engines know, and one that neither does."""
    return (0, c.KVM_MEM_LOG_DIRTY_PAGES, c.KVM_MEM_READONLY, 1 << 15)[n]


PAGE_NUMBERS = [0, 1, 4, 8, 16, 20, 64, 1 << 30]
SIZES = [0, 0x1000, 0x4000, 0x10000, 0x800]
ADDRESSES = [0, 0x4000, 0x10000, 0x20000, 0x10800, (1 << 64) - 0x1000]
GSIS = [0, 4, 23, 24, 30, 4095, 4096]

# A call, and for each argument the numbers that it may be.
VM_CALLS: dict[str, tuple[Call, list[list[int]]]] = {
    "create_vcpu": (lambda w, a: w.create_vcpu(a[0]), [[0, 1, 2, 100, 101]]),
    "set_user_memory_region": (
        lambda w, a: w.vm.set_user_memory_region(
            a[0], a[1], a[2], (w.memory.address + a[3]) * (a[2] > 0), slot_flags(a[4])
        ),
        [[0, 1, 2, 1 << 15], ADDRESSES, SIZES, [0, 0x10000, 0x20, 0x20000], [0, 1, 2, 3]],
    ),
    "get_dirty_log": (lambda w, a: w.vm.get_dirty_log(a[0]), [[0, 1, 2, 1 << 15]]),
    "clear_dirty_log": (
        lambda w, a: w.vm.clear_dirty_log(a[0], a[1], a[2], bytes(1 << 13)),
        [[0, 1, 2, 1 << 15], [0, 64, 1], [0, 1, 4, 16, 17, 64]],
    ),
    "register_coalesced_mmio": (
        lambda w, a: w.vm.register_coalesced_mmio(a[0], a[1], a[2]),
        [ADDRESSES, [1, 0x1000], [0, 1, 2]],
    ),
    "unregister_coalesced_mmio": (
        lambda w, a: w.vm.unregister_coalesced_mmio(a[0], a[1], a[2]),
        [ADDRESSES, [1, 0x1000], [0, 1, 2]],
    ),
    "set_tss_addr": (lambda w, a: w.vm.set_tss_addr(a[0]), [[0xFFFBD000, 0xFFFFF000]]),
    "set_identity_map_addr": (lambda w, a: w.vm.set_identity_map_addr(a[0]), [[0xFFFBC000]]),
    "create_irqchip": (lambda w, a: w.vm.create_irqchip(), []),
    "split_irqchip": (lambda w, a: w.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, a[0]), [[0, 24, 4096, 4097]]),
    "manual_protect": (
        lambda w, a: w.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, a[0]),
        [[0, 1, 2, 3, 4]],
    ),
    "enable_unknown": (lambda w, a: w.vm.enable_cap(a[0]), [[9999, KVM_CAP_MAX_VCPU_ID + 10_000]]),
    "enable_flags": (lambda w, a: w.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, flags=1), []),
    "get_irqchip": (lambda w, a: w.vm.get_irqchip(a[0]), [[0, 1, 2, 3, 77]]),
    "set_irqchip": (lambda w, a: w.vm.set_irqchip(x86.kvm_irqchip(chip_id=a[0])), [[0, 1, 3, 77]]),
    "irq_line": (lambda w, a: w.vm.irq_line(a[0], a[1]), [GSIS, [0, 1]]),
    "irq_line_status": (lambda w, a: w.vm.irq_line_status(a[0], a[1]), [GSIS, [0, 1]]),
    "route_pin": (
        lambda w, a: w.vm.set_gsi_routing([irqchip_route(a[0], a[1], a[2])]),
        [GSIS, [0, 1, 2, 3], [0, 7, 8, 23, 24]],
    ),
    "route_msi": (lambda w, a: w.vm.set_gsi_routing([msi_route(a[0], 0xFEE00000, 0x31)]), [GSIS]),
    "route_twice": (
        lambda w, a: w.vm.set_gsi_routing([msi_route(30, 0xFEE00000, 0x31), irqchip_route(a[0], 2, 4)]),
        [[30, 31]],
    ),
    "irqfd": (
        lambda w, a: w.vm.irqfd(w.fd(a[0]), a[1], a[2], w.fd(a[3])),
        [[0, 1, 2, 3], GSIS[:-1], [0, 1, 2, 3, 1 << 20], [0, 1, 2, 3]],
    ),
    "ioeventfd": (
        lambda w, a: w.vm.ioeventfd(a[1], a[2], w.fd(a[0]), a[3], a[4]),
        [
            [0, 1, 2, 3],
            [0x10, 0x20, (1 << 64) - 1],
            [0, 1, 2, 3, 4, 8, 16],
            [0, 1],
            [0, 1, 2, 3, 4, 5, 6, 1 << 20],
        ],
    ),
    "signal_msi": (lambda w, a: w.vm.signal_msi(0xFEE00000, 0x31, a[0]) and 0, [[0, 1, 1 << 20]]),
    "create_pit": (lambda w, a: w.vm.create_pit(), []),
    "create_pit2": (lambda w, a: w.vm.create_pit2(a[0]), [[0, 1]]),
    "get_pit": (lambda w, a: w.vm.get_pit(), []),
    "get_pit2": (lambda w, a: w.vm.get_pit2(), []),
    "set_pit": (lambda w, a: w.vm.set_pit(x86.kvm_pit_state()), []),
    "set_pit2": (lambda w, a: w.vm.set_pit2(x86.kvm_pit_state2()), []),
    "set_boot_cpu_id": (lambda w, a: w.vm.set_boot_cpu_id(a[0]), [[0, 1]]),
    "set_clock": (lambda w, a: w.vm.set_clock(c.kvm_clock_data(clock=5, flags=a[0])), [[0, 2, 1 << 20]]),
    "reset_dirty_rings": (lambda w, a: w.vm.reset_dirty_rings(), []),
    "create_device": (lambda w, a: w.vm.create_device(a[0]), [[99, 1 << 31]]),
}
DIRTY_RING_CALLS = {"reset_dirty_rings"}
"""Only where both engines have KVM_CAP_DIRTY_LOG_RING_ACQ_REL."""

VCPU_CALLS: dict[str, tuple[Callable[[Vcpu, list[int]], object], list[list[int]]]] = {
    "get_regs": (lambda v, a: v.get_regs(), []),
    "interrupt": (lambda v, a: v.interrupt(a[0]), [[0x20, 255, 256, 1 << 31]]),
    "get_lapic": (lambda v, a: v.get_lapic(), []),
    "set_lapic": (lambda v, a: v.set_lapic(v.get_lapic()), []),
    "set_mp_state": (lambda v, a: v.set_mp_state(a[0]), [[0, 1, 2, 3, 4, 5, 77]]),
    "set_debugregs": (
        lambda v, a: v.set_debugregs(x86.kvm_debugregs(dr6=a[0], dr7=a[1], flags=a[2])),
        [[0, 1 << 33], [0x400, 1 << 33], [0, 1]],
    ),
    "set_vcpu_events": (
        lambda v, a: v.set_vcpu_events(x86.kvm_vcpu_events(flags=a[0])),
        [[0, 1, 4, 1 << 30]],
    ),
    "set_xcrs": (lambda v, a: v.set_xcrs(x86.kvm_xcrs(nr_xcrs=a[0], flags=a[1])), [[0, 17], [0, 1]]),
    "set_xcr0": (lambda v, a: set_xcr0(v, a[0]), [[0, 1, 2, 3, 4, 7, 1 << 60]]),
    "get_msrs": (lambda v, a: v.get_msrs([a[0]]), [[0x10, 0x12345678]]),
    "set_msrs": (lambda v, a: v.set_msrs({a[0]: a[1]}), [[0xC0000082, 0x12345678], [0, 1 << 63]]),
    "set_cpuid2": (lambda v, a: v.set_cpuid2([x86.kvm_cpuid_entry2()] * a[0]), [[0, 1, 256, 257]]),
    "set_cpuid": (lambda v, a: v.set_cpuid([x86.kvm_cpuid_entry()] * a[0]), [[0, 256, 257]]),
    "translate": (lambda v, a: v.translate(a[0]).valid, [[0, 0x1234, 1 << 63]]),
    "set_sregs2": (lambda v, a: set_sregs2_flags(v, a[0]), [[0, 1, 2]]),
    "set_guest_debug": (
        lambda v, a: v.set_guest_debug(x86.kvm_guest_debug(control=a[0])),
        [[0, 1, 3, 1 | x86.KVM_GUESTDBG_USE_SW_BP, 1 | x86.KVM_GUESTDBG_INJECT_DB]],
    ),
    "nmi": (lambda v, a: v.nmi(), []),
}


def set_xcr0(vcpu: Vcpu, value: int) -> None:
    """Set XCR0 alone."""
    xcrs = x86.kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = value
    vcpu.set_xcrs(xcrs)


def set_sregs2_flags(vcpu: Vcpu, flags: int) -> None:
    """Set what is there, with other flags."""
    sregs = vcpu.get_sregs2()
    sregs.flags = flags
    vcpu.set_sregs2(sregs)


def outcome(call: Callable[[], object]) -> object:
    """The errno's name, or "ok"; a number if the call returned one that both engines must return."""
    try:
        result = call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, error.errno)
    return result if isinstance(result, int) else "ok"


def arguments(choices: list[list[int]]) -> st.SearchStrategy[list[int]]:
    """One of each argument's numbers."""
    return st.tuples(*(st.sampled_from(values) for values in choices)).map(list)


def calls_of(table: dict[str, Any]) -> st.SearchStrategy[tuple[str, list[int]]]:
    """A call of a table, and its arguments."""
    return st.sampled_from(sorted(table)).flatmap(
        lambda name: arguments(table[name][1]).map(lambda a: (name, a))
    )


PROPERTY = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def both_have(systems: list[Kvm], capability: int) -> bool:
    """Whether all engines have a capability."""
    return all(system.check_extension(capability) for system in systems)


@PROPERTY
@given(calls=st.lists(calls_of(VM_CALLS), min_size=1, max_size=12))
def test_vm(systems: list[Kvm], calls: list[tuple[str, list[int]]]) -> None:
    worlds = [World(system) for system in systems]
    try:
        said = []
        for name, values in calls:
            if name in DIRTY_RING_CALLS and not both_have(systems, KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
                continue
            call = VM_CALLS[name][0]
            outcomes = [outcome(partial(call, world, values)) for world in worlds]
            said.append((name, values, outcomes))
            assert len(set(outcomes)) == 1, said
    finally:
        for world in worlds:
            world.close()


@PROPERTY
@given(
    irqchip=st.sampled_from(["none", "all", "split"]),
    calls=st.lists(calls_of(VCPU_CALLS), min_size=1, max_size=8),
)
def test_vcpu(systems: list[Kvm], irqchip: str, calls: list[tuple[str, list[int]]]) -> None:
    worlds = [World(system) for system in systems]
    try:
        for world in worlds:
            if irqchip == "all":
                world.vm.create_irqchip()
            elif irqchip == "split":
                world.vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        said = []
        for name, values in calls:
            call = VCPU_CALLS[name][0]
            outcomes = [outcome(partial(call, world.vcpu(0), values)) for world in worlds]
            said.append((name, values, outcomes))
            assert len(set(outcomes)) == 1, said
    finally:
        for world in worlds:
            world.close()


def leaves(cls: Any, base: int = 0, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of each number in a struct; of arrays, the first and the last."""
    for name, ctype, *_ in cls._fields_:
        at = base + getattr(cls, name).offset
        if hasattr(ctype, "_fields_"):
            yield from leaves(ctype, at, f"{prefix}{name}.")
        elif hasattr(ctype, "_length_"):
            size = ctypes.sizeof(ctype._type_)
            for i in {0, ctype._length_ - 1}:
                if hasattr(ctype._type_, "_fields_"):
                    yield from leaves(ctype._type_, at + i * size, f"{prefix}{name}[{i}].")
                elif not hasattr(ctype._type_, "_length_"):
                    yield f"{prefix}{name}[{i}]", at + i * size, size
        else:
            yield prefix + name, at, ctypes.sizeof(ctype)


STATES = {
    "regs": x86.kvm_regs,
    "sregs": x86.kvm_sregs,
    "sregs2": x86.kvm_sregs2,
    "fpu": x86.kvm_fpu,
    "vcpu_events": x86.kvm_vcpu_events,
    "debugregs": x86.kvm_debugregs,
    "xcrs": x86.kvm_xcrs,
    "lapic": x86.kvm_lapic_state,
}
DIFFERS = {"efer", "apic_base", "smi.smm", "smi.pending", "smi.smm_inside_nmi", "smi.latched_init"}
"""The kernel doesn't look at EFER's reserved bits here; physical addresses differ in size; not all have SMM."""
PKE = 1 << 22  # of CR4: as CPUID offers it

CHANGES = st.sampled_from(
    [(name, *leaf) for name, cls in STATES.items() for leaf in leaves(cls) if leaf[0] not in DIFFERS]
).flatmap(
    lambda leaf: st.tuples(
        st.just(leaf),
        st.one_of(
            st.integers(0, leaf[3] * 8 - 1).map(lambda bit: 1 << bit),
            st.sampled_from([0, 3, (1 << 8 * leaf[3]) - 1]),
        ),
    )
)


def set_changed(vcpu: Vcpu, name: str, offset: int, size: int, value: int) -> None:
    """Set what is there but for one number."""
    raw = bytearray(getattr(vcpu, f"get_{name}")())
    raw[offset : offset + size] = value.to_bytes(size, "little")
    getattr(vcpu, f"set_{name}")(STATES[name].from_buffer_copy(raw))


@PROPERTY
@given(irqchip=st.booleans(), change=CHANGES)
def test_state(systems: list[Kvm], irqchip: bool, change: tuple[tuple[str, str, int, int], int]) -> None:
    """A vCPU after reset is given its own state back with one number changed."""
    (name, leaf, offset, size), value = change
    if leaf == "cr4":
        value &= ~PKE
    outcomes = []
    for system in systems:
        world = World(system)
        try:
            if irqchip:
                world.vm.create_irqchip()
            vcpu = world.vcpu(0)
            vcpu.set_cpuid2(system.get_supported_cpuid())
            outcomes.append(outcome(partial(set_changed, vcpu, name, offset, size, value)))
        finally:
            world.close()
    assert len(set(outcomes)) == 1, outcomes


def sample(annotation: Any) -> Any:
    """An argument of a type, as plain as can be."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if options and origin is not None and not isinstance(origin, type):
        return sample(options[0])  # a union
    if type(None) in options:
        return None
    plain = getattr(origin, "__name__", "") if origin else getattr(annotation, "__name__", "")
    if plain in ("Iterable", "Sequence"):
        return []
    if plain == "Mapping":
        return {}
    if plain == "UnionType":
        return sample(options[0])
    if annotation in (int, bool, bytes):
        return annotation()
    assert issubclass(annotation, ctypes.Structure), annotation
    return annotation()


CLASSES = {"system": contract.Kvm, "vm": contract.Vm, "vcpu": contract.Vcpu}
METHODS = [(ioctl, d) for ioctl in IOCTLS for d in ioctl.descriptors if d in CLASSES]


@pytest.mark.parametrize(("ioctl", "descriptor"), METHODS, ids=lambda x: getattr(x, "method", x))
def test_closed_descriptor(systems: list[Kvm], ioctl: Any, descriptor: str) -> None:
    """Every ioctl of a closed descriptor is EBADF, whether or not it is offered."""
    stated = getattr(CLASSES[descriptor], ioctl.method)
    hints = typing.get_type_hints(stated)
    values = [
        sample(hints[name])
        for name, parameter in inspect.signature(stated).parameters.items()
        if name != "self"
        and parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    for system in systems:
        closed: Any = kvmkit.kvm.open(system.engine)
        if descriptor != "system":
            vm = closed.create_vm()
            closed.close()
            closed = vm
        if descriptor == "vcpu":
            vcpu = closed.create_vcpu(0)
            closed.close() if system.engine == "linux" else None
            closed = vcpu
        closed.close()
        with pytest.raises(OSError) as error:
            getattr(closed, ioctl.method)(*values)
        assert error.value.errno == errno.EBADF, f"{system.engine}: {error.value}"
