"""Hostile guests: small VMs made of a seed, of random and of mutated code, tables and state, to be run against an engine.

Most have several vCPUs, which run at once in the same memory; beside them a host thread may change memory slots and the dirty log,
raise interrupts and kick vCPUs. A seed makes the same guest each time, but what such threads do to each other differs.

Whatever such a guest does, the engine must come back from it within its time limit, and must have touched no host memory
but the guest's. `Arena` holds the memory so that this shows: inaccessible pages lie on both sides of each block, and
canaries beside those. `run` makes and runs the guest of one seed; the process that calls it may die, so a caller who wants
to know which seed did it runs it in a process of its own (``bench/hostile.py``).
"""

import ctypes
import errno
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random

from kvmkit.kvm import GuestMemory, Kvm, MemoryMap, Vcpu, Vm
from kvmkit.kvm.exits import Exit, InternalError, Intr, Io, Mmio
from kvmkit.kvm.modes import descriptor, set_long_mode, set_protected_mode, set_real_mode
from kvmkit.machine.errors import KernelError
from kvmkit.machine.x86.boot import Protocol, load_linux
from kvmkit.testing.hostile_code import (
    REGISTERS,
    access_code,
    control_code,
    device_code,
    kernel_file,
    patched_code,
    random_code,
    skip_handlers,
    storm_code,
    table_code,
    valid_code,
)
from kvmkit.uapi import common as c
from kvmkit.uapi import x86 as x

PAGE = 4096
LOW_BYTES = 1 << 20
"""Memory at guest physical 0."""
SMALL_BYTES = 2 * PAGE
"""Each of the other blocks: few pages, so that their ends are near."""
KERNEL_BYTES = 4 << 20
"""Memory at guest physical 0 of guests that a kernel's file is loaded into."""
CODE, TABLES, IDT, HANDLERS, STACK, TSS = 0x1000, 0x10000, 0x9000, 0x20000, 0x8000, 0xB000
PAGE_TABLE, WINDOW = 0x30000, 0x400000
"""A page table of 4 KiB pages that guests of the kind "shootdowns" rewrite, and the linear addresses that it maps."""
_SMM_SLOT = 1 << 16
"""Of system management mode's address space."""
_SMBASE, _MSR_SMBASE = 0x30000, 0x9E
_GUARD_BYTES = 16 * PAGE
_CANARY_BYTES = 16 * PAGE
_MAX_EXITS = 200

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_size_t
_libc.mmap.argtypes = (
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_MAP_FIXED = 0x10
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class CanaryError(AssertionError):
    """Host memory beside the guest's was written."""


class StrayAccessError(AssertionError):
    """Translated code did what it never may: it touched host memory that isn't the guest's, or left for no known reason."""


class GuardedBlock(GuestMemory):
    """Memory of a guest in the middle of a mapping of its own: canary, inaccessible pages, the block, the same mirrored."""

    def __init__(self, size_bytes: int) -> None:
        """Map it."""
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("hostile-guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size_bytes)
        edge = _CANARY_BYTES + _GUARD_BYTES
        self._mmap = mmap.mmap(-1, size_bytes + 2 * edge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = memoryview(self._mmap)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        self.address = base + edge
        place = _libc.mmap(
            self.address, size_bytes, 3, mmap.MAP_SHARED | _MAP_FIXED, self.fd, 0
        )  # read, write
        if place != self.address:
            raise OSError(ctypes.get_errno(), "mmap of guest memory")
        self.view = whole[edge : edge + size_bytes]
        self._canaries = (whole[:_CANARY_BYTES], whole[size_bytes + 2 * edge - _CANARY_BYTES :])
        self._expected = Random(size_bytes).randbytes(_CANARY_BYTES)
        for canary in self._canaries:
            canary[:] = self._expected
        for guard in (base + _CANARY_BYTES, self.address + size_bytes):
            if _libc.mprotect(guard, _GUARD_BYTES, 0):  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect of guard pages")

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Read `size_bytes` bytes at `offset`."""
        self._check(offset, size_bytes)
        return bytes(self.view[offset : offset + size_bytes])

    def check(self) -> None:
        """`CanaryError` if a canary has changed."""
        for side, canary in zip(("before", "after"), self._canaries, strict=True):
            if canary != self._expected:
                at = next(i for i in range(_CANARY_BYTES) if canary[i] != self._expected[i])
                raise CanaryError(f"byte {at:#x} of the canary {side} a block of {self.size_bytes:#x} bytes")

    @contextmanager
    def inaccessible(self) -> Iterator[None]:
        """Context in which any access of the block traps, as of the guard pages beside it."""
        self._protect(0)
        try:
            yield
        finally:
            self._protect(3)

    def _protect(self, protection: int) -> None:
        if _libc.mprotect(self.address, self.size_bytes, protection):
            raise OSError(ctypes.get_errno(), "mprotect of guest memory")

    def close(self) -> None:
        """Nothing: it lives as long as its arena, whatever a `MemoryMap` thinks."""

    def __del__(self) -> None:
        """Close the memfd; the mapping goes with the last view of it."""
        os.close(self.fd)

    def clear(self) -> None:
        """Fill it with zeros."""
        self.view[:] = bytes(self.size_bytes)


class Arena:
    """The memory of hostile guests, one after the other: 1 MiB at 0, and small blocks that guests may map elsewhere."""

    def __init__(self) -> None:
        """Map all blocks."""
        self.low = GuardedBlock(LOW_BYTES)
        self.small = [GuardedBlock(SMALL_BYTES) for _ in range(3)]
        self.kernel = GuardedBlock(KERNEL_BYTES)
        self._watchdog = _Watchdog()

    def check(self) -> None:
        """`CanaryError` if anything beside guest memory has changed."""
        for block in (self.low, *self.small, self.kernel):
            block.check()

    def clear(self, kernel: bool) -> None:
        """Fill the blocks with zeros: those of most guests, or that of a kernel."""
        for block in (self.kernel,) if kernel else (self.low, *self.small):
            block.clear()

    def limit(self, vcpu: Vcpu, seconds: float) -> "_Limit":
        """Context in which `vcpu` is kicked after `seconds`."""
        return _Limit(self._watchdog, vcpu, seconds)


class _Watchdog:
    """One thread that kicks a vCPU when its time is up, over and over until it is let go."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._vcpu: Vcpu | None = None
        self._seconds = 0.0
        self.expired = False
        threading.Thread(target=self._serve, daemon=True).start()

    def watch(self, vcpu: Vcpu | None, seconds: float) -> None:
        with self._changed:
            self._vcpu, self._seconds = vcpu, seconds
            if vcpu is not None:
                self.expired = False
            self._changed.notify()

    def _serve(self) -> None:
        with self._changed:
            while True:
                vcpu = self._vcpu
                signalled = self._changed.wait(self._seconds if vcpu else None)
                if vcpu is not None and vcpu is self._vcpu and not signalled:
                    self.expired = True
                    vcpu.kick()


@dataclass
class _Limit:
    watchdog: _Watchdog
    vcpu: Vcpu
    seconds: float

    def __enter__(self) -> _Watchdog:
        self.watchdog.watch(self.vcpu, self.seconds)
        return self.watchdog

    def __exit__(self, *_: object) -> None:
        self.watchdog.watch(None, 0)


@dataclass(frozen=True)
class Outcome:
    """How the guest of `seed` ended: `end` is the name of its last exit, "limit" (time), "exits" (too many of them) or
    "refused" (a kernel that the loader refused). `exits` are those of the first of its `vcpus`; `seconds` is how long it ran.
    """

    seed: int
    kind: str
    end: str
    exits: int
    seconds: float
    vcpus: int
    message: str = ""


class _Hostile:
    """One guest while it runs."""

    def __init__(self, system: Kvm, arena: Arena, seed: int) -> None:
        self.random = Random(seed)
        self.seed = seed
        self.arena = arena
        self.kind = self.random.choice(list(_KINDS))
        self.vm: Vm = system.create_vm()
        self.irqchip = self.kind in ("interrupts", "storms") or self.random.random() < 0.2
        self.blocks: list[tuple[int, GuardedBlock]] = []
        self.slots_lock = threading.Lock()
        self.refused = 0
        self.failures: list[BaseException] = []
        """What came out of other threads than the first vCPU's."""
        self.done = threading.Event()
        self.started = 0.0
        self.exits = 0
        arena.clear(self.kind == "headers")
        if self.irqchip:
            self.vm.create_irqchip()
            if self.random.random() < 0.5:
                self.vm.create_pit2()
        self._map()
        self.vcpus: list[Vcpu] = []
        processors = self.random.choice((2, 3, 4) if self.kind in _TOGETHER else (1, 2, 3, 4))
        for id in range(1 if self.kind == "headers" else processors):
            vcpu = self.vm.create_vcpu(id)
            vcpu.set_cpuid2(system.get_supported_cpuid())
            self.vcpus.append(vcpu)
        self.vcpu = self.vcpus[0]
        self.disturbed = self.kind == "slots" or self.random.random() < (0.6 if len(self.vcpus) > 1 else 0.1)
        self.bits = self.random.choice((64, 64, 64, 32, 16))

    def _map(self) -> None:
        r = self.random
        self.blocks.append((0, self.arena.kernel if self.kind == "headers" else self.arena.low))
        if self.kind == "headers":
            self.vm.set_user_memory_region(0, 0, self.low.size_bytes, self.low.address)
            return
        # Just behind the low block (so accesses run from one slot into the next), below 4 GiB, high, and at the top.
        places = [LOW_BYTES, LOW_BYTES + SMALL_BYTES, 0xFFFFE000, 1 << 32, 1 << 40, (1 << 46) - SMALL_BYTES]
        for block, gpa in zip(self.arena.small, r.sample(places, len(self.arena.small)), strict=True):
            self.blocks.append((gpa, block))
        for slot, (gpa, block) in enumerate(self.blocks):
            flags = 0
            if r.random() < 0.15:
                flags |= c.KVM_MEM_LOG_DIRTY_PAGES
            if slot and r.random() < 0.2:
                flags |= c.KVM_MEM_READONLY
            self.vm.set_user_memory_region(slot, gpa, block.size_bytes, block.address, flags)
        self.vm.set_user_memory_region(_SMM_SLOT, 0, self.low.size_bytes, self.low.address)

    @property
    def low(self) -> GuardedBlock:
        """The block at 0."""
        return self.blocks[0][1]

    def write(self, address: int, data: bytes) -> None:
        """Write what fits into the block that holds `address`."""
        gpa, block = next(b for b in self.blocks if b[0] <= address < b[0] + b[1].size_bytes)
        block.write(address - gpa, data[: gpa + block.size_bytes - address])

    def code(self, data: bytes) -> None:
        """Put code where the guest starts: mostly at `CODE`, else so that it runs out of its block, or in another block."""
        r = self.random
        address = CODE
        if self.bits != 16 and r.random() < 0.15:
            gpa, block = r.choice([(g, b) for g, b in self.blocks if g < 1 << 32])
            address = gpa + block.size_bytes - r.randrange(1, PAGE)
            for vcpu in self.vcpus:
                regs = vcpu.get_regs()
                regs.rip = address
                vcpu.set_regs(regs)
        self.write(address, data)

    def enter(self) -> None:
        """A valid state of the mode, a stack, an IDT whose handlers skip what faulted, and random general registers.

        With an irqchip, some of the further processors wait for INIT and SIPI.
        """
        for vcpu in self.vcpus:
            self._enter(vcpu)
        for vcpu in self.vcpus[1:]:
            if self.irqchip and self.random.random() < 0.8:
                vcpu.set_mp_state(c.KVM_MP_STATE_RUNNABLE)

    def _enter(self, vcpu: Vcpu) -> None:
        r = self.random
        if self.bits == 16:
            set_real_mode(vcpu, CODE, r.choice((0, 0, r.randrange(0x800))))
        elif self.bits == 32:
            set_protected_mode(vcpu, self.low, CODE, TABLES)
        else:
            set_long_mode(vcpu, self.low, CODE, TABLES)
            if r.random() < 0.25:
                self._to_user_mode(vcpu)
        if r.random() < 0.8:
            table, code = skip_handlers(self.bits, HANDLERS, r)
            idt = 0 if self.bits == 16 else IDT
            self.write(idt, table)
            self.write(HANDLERS, code)
            sregs = vcpu.get_sregs()
            sregs.idt.base, sregs.idt.limit = idt, len(table) - 1
            if r.random() < 0.3:
                sregs.cr4 |= r.choice((1 << 18, 3 << 20, 1 << 16, 1 << 7)) & ~(1 << 17)
            self.attempt(lambda: vcpu.set_sregs(sregs))
        regs = vcpu.get_regs()
        for name in REGISTERS:
            setattr(regs, name, self.pointer())
        regs.rsp = STACK - vcpu.id * 0x400 if r.random() < 0.9 else self.pointer()
        regs.rflags = 2 | (r.getrandbits(22) & 0x4CFFD5 & ~(1 << 8) if r.random() < 0.5 else 0)
        if r.random() < 0.05:
            regs.rflags |= 1 << 8  # single steps
        vcpu.set_regs(regs)

    def _to_user_mode(self, vcpu: Vcpu) -> None:
        """Ring 3, pages open to it, and a TSS for the way back."""
        tables = self.low.view[TABLES : TABLES + 6 * PAGE].cast("Q")
        for i, entry in enumerate(tables):
            if entry:
                tables[i] = entry | 4
        sregs = vcpu.get_sregs()
        gdt = sregs.gdt.base
        for offset, segment in ((24, sregs.cs), (32, sregs.ss)):
            segment.dpl, segment.selector = 3, offset | 3
            self.write(gdt + offset, descriptor(segment).to_bytes(8, "little"))
        sregs.gdt.limit = 39
        sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.present, sregs.tr.s = TSS, 103, 11, 1, 0
        self.write(TSS + 4, (STACK + 0x800).to_bytes(8, "little"))
        vcpu.set_sregs(sregs)

    def pointer(self) -> int:
        """A number that often is an address near the edge of something."""
        r = self.random
        gpa, block = r.choice(self.blocks)
        near = r.choice((0, block.size_bytes, PAGE, r.randrange(block.size_bytes)))
        return (
            r.choice(
                (
                    gpa + near + r.randrange(-64, 64),
                    r.randrange(LOW_BYTES),
                    r.getrandbits(64),
                    r.choice(
                        (0, 0xFEE00000, 0xFEC00000, 1 << 63, (1 << 47) - 1, (1 << 64) - (1 << 47), 0xFFFFFFFF)
                    )
                    + r.randrange(-16, 0x400),
                    r.getrandbits(8),
                )
            )
            & (1 << 64) - 1
        )

    def edge(self) -> int:
        """An address just before or behind the end of a block, or before its start."""
        r = self.random
        if r.random() < 0.2:
            return self.pointer()
        gpa, block = r.choice(self.blocks[: 1 + 3 * (r.random() < 0.3)])
        if r.random() < 0.9:
            gpa += block.size_bytes
        return (gpa - r.choice((1, 2, 3, 4, 7, 8, 15, 16, 31, 32, r.randrange(512)))) & (1 << 64) - 1

    def attempt(self, call: Callable[[], object]) -> None:
        """Call what may refuse its arguments, as KVM may."""
        try:
            call()
        except OSError:
            self.refused += 1

    # Kinds.

    def make_management(self) -> None:
        """SMIs, whose handlers change the state that RSM then loads."""
        r = self.random
        r.choice((self.make_code, self.make_control, self.make_random))()
        changes = b""
        for _ in range(r.choice((0, 1, 1, 2, 3, 8))):
            offset = r.choice((r.randrange(0xFE00, 0xFEA0), 0xFED0, 0xFF00, r.randrange(0xFF40, 0xFFFD)))
            value = r.choice((0, r.getrandbits(32), 1 << r.randrange(32), r.choice((CODE, HANDLERS, STACK))))
            # MOV of a doubleword to an absolute address, in 16-bit code.
            changes += b"\x66\x67\xc7\x05" + struct.pack("<II", _SMBASE + offset, value)
        self.write(_SMBASE + 0x8000, changes + r.choice((b"\x0f\xaa", b"\x0f\xaa", r.randbytes(64))))  # RSM
        for vcpu in self.vcpus:
            if r.random() < 0.2:
                smbase = r.choice((r.getrandbits(20), r.getrandbits(64)))
                self.attempt(partial(vcpu.set_msrs, {_MSR_SMBASE: smbase}))
            vcpu.smi()

    def make_random(self) -> None:
        self.enter()
        self.code(self.random.randbytes(self.random.choice((64, 4096, 0x7000))))

    def make_code(self) -> None:
        self.enter()
        self.code(random_code(self.random, self.bits, 3000))

    def make_accesses(self) -> None:
        """Every access near the edges of memory, by all widths."""
        self.enter()
        self.code(access_code(self.random, self.bits, 400, self.edge))

    def make_control(self) -> None:
        self.enter()
        self.code(control_code(self.random, self.bits, 200, self.pointer))

    def make_mutated(self) -> None:
        r = self.random
        self.enter()
        code = bytearray(valid_code(r, self.bits))
        for _ in range(r.randrange(1, 6)):
            at = r.randrange(len(code))
            match r.randrange(4):
                case 0:
                    code[at] ^= 1 << r.randrange(8)
                case 1:
                    code[at] = r.getrandbits(8)
                case 2:
                    code[at:at] = r.randbytes(r.randrange(1, 4))
                case _:
                    del code[at : at + r.randrange(1, 4)]
                    code.append(0x90)
        self.code(bytes(code))

    def make_patching(self) -> None:
        """Code that overwrites itself while it runs."""
        self.enter()
        self.code(patched_code(self.random, self.bits, CODE))

    def make_tables(self) -> None:
        """Paging with tables of random entries, and tables that lie in slots of every kind."""
        r = self.random
        self.bits = r.choice((64, 64, 32))
        self.enter()
        self.write(
            CODE,
            random_code(r, self.bits, 1000)
            if r.random() < 0.5
            else access_code(r, self.bits, 200, self.pointer),
        )
        if self.bits == 32:
            sregs = self.vcpu.get_sregs()
            sregs.cr3 = 0x30000
            sregs.cr0 |= 1 << 31
            pae = r.random() < 0.5
            sregs.cr4 = (1 << 5 if pae else 0) | r.choice((0, 1 << 4, 1 << 7, 1 << 20))
            if pae:
                self.write(0x30000, b"".join((0x31001 + (i << 12)).to_bytes(8, "little") for i in range(4)))
                self.write(0x31000, (0x83).to_bytes(8, "little") + r.randbytes(4088))
            else:
                self.write(0x30000, (0x83).to_bytes(4, "little") + r.randbytes(4092))
                sregs.cr4 |= 1 << 4
            self.attempt(lambda: self.vcpu.set_sregs(sregs))
        base = TABLES if self.bits == 64 else 0x30000
        for _ in range(r.randrange(1, 400)):
            gpa, block = r.choice(self.blocks)
            target = gpa + r.randrange(0, block.size_bytes, PAGE)
            if r.random() < 0.1:
                target = r.getrandbits(52) & ~0xFFF
            flags = 1 | r.getrandbits(12)
            if r.random() < 0.7:
                flags &= ~0x80
            entry = (
                target
                | flags
                | (r.getrandbits(11) << 52 if r.random() < 0.1 else 0)
                | (r.getrandbits(1) << 63)
            )
            # Mostly not the first entries, which map the code.
            where = base + r.randrange(8 if r.random() < 0.97 else 0, 6 * PAGE, 8)
            self.write(where, entry.to_bytes(8, "little"))

    def make_state(self) -> None:
        """Random values in everything that user space may set."""
        r = self.random
        self.enter()
        self.code(random_code(r, self.bits, 500))
        sregs = self.vcpu.get_sregs()
        segments = [getattr(sregs, n) for n in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")]
        for _ in range(r.randrange(1, 12)):
            segment = r.choice(segments)
            match r.randrange(6):
                case 0:
                    segment.base = self.pointer()
                case 1:
                    segment.limit = r.choice((0, 0xFFFF, 0xFFFFFFFF, r.getrandbits(32)))
                case 2:
                    segment.type, segment.s, segment.present = (
                        r.getrandbits(4),
                        r.getrandbits(1),
                        r.getrandbits(1),
                    )
                case 3:
                    segment.dpl, segment.db, segment.l, segment.g = (r.getrandbits(n) for n in (2, 1, 1, 1))
                case 4:
                    segment.selector, segment.unusable = r.getrandbits(16), r.getrandbits(1)
                case _:
                    name = r.choice(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"))
                    value = r.choice((r.getrandbits(64), getattr(sregs, name) ^ 1 << r.randrange(32)))
                    setattr(sregs, name, value)
        sregs.gdt.base = r.choice((sregs.gdt.base, self.pointer()))
        sregs.idt.base = r.choice((sregs.idt.base, self.pointer()))
        sregs.idt.limit = r.choice((sregs.idt.limit, r.getrandbits(16)))
        self.attempt(lambda: self.vcpu.set_sregs(sregs))
        for _ in range(r.randrange(4)):
            self.set_something(self.vcpu, r)
        if r.random() < 0.3:
            self.write(TABLES, r.randbytes(7 * PAGE))

    def set_something(self, vcpu: Vcpu, r: Random) -> None:
        """One random KVM_SET_* of `vcpu`."""
        match r.randrange(11):
            case 0:
                regs = vcpu.get_regs()
                setattr(regs, r.choice((*REGISTERS, "rip", "rflags", "rsp")), self.pointer())
                self.attempt(lambda: vcpu.set_regs(regs))
            case 1:
                fpu = x.kvm_fpu.from_buffer_copy(r.randbytes(ctypes.sizeof(x.kvm_fpu)))
                self.attempt(lambda: vcpu.set_fpu(fpu))
            case 2:
                image = bytearray(r.randbytes(4096))
                image[512:576] = r.choice((0xE7, 7, 3, 0, r.getrandbits(64))).to_bytes(8, "little") + bytes(
                    56
                )
                image[24:28] = r.choice((0x1F80, r.getrandbits(16), r.getrandbits(32))).to_bytes(4, "little")
                self.attempt(lambda: vcpu.set_xsave(bytes(image)))
            case 3:
                xcrs = x.kvm_xcrs(nr_xcrs=1)
                xcrs.xcrs[0].value = r.choice((1, 3, 7, 0xE7, r.getrandbits(64)))
                self.attempt(lambda: vcpu.set_xcrs(xcrs))
            case 4:
                index = r.choice(
                    (0x1B, 0x10, 0x3A, 0x174, 0x175, 0x176, 0x277, 0x6E0, 0xC0000080, 0xC0000081)
                )
                index = r.choice(
                    (
                        index,
                        0x4B564D00 + r.randrange(8),
                        0x800 + r.randrange(64),
                        0xC0000100,
                        r.getrandbits(32),
                    )
                )
                value = self.pointer()
                self.attempt(lambda: vcpu.set_msrs({index: value}))
            case 5:
                events = x.kvm_vcpu_events.from_buffer_copy(r.randbytes(ctypes.sizeof(x.kvm_vcpu_events)))
                events.flags = r.getrandbits(5) & 15
                self.attempt(lambda: vcpu.set_vcpu_events(events))
            case 6:
                debug = x.kvm_debugregs(dr6=r.getrandbits(32), dr7=r.choice((0x400, r.getrandbits(32))))
                debug.db[:] = [self.pointer() for _ in range(4)]
                self.attempt(lambda: vcpu.set_debugregs(debug))
            case 7:
                lapic = x.kvm_lapic_state.from_buffer_copy(r.randbytes(ctypes.sizeof(x.kvm_lapic_state)))
                self.attempt(lambda: vcpu.set_lapic(lapic))
            case 8:
                address = self.pointer()
                self.attempt(lambda: vcpu.translate(address))
            case 9:
                control = r.choice((0, 1 | 2, 1 | 1 << 16, 1 | 1 << 17, 1 << 18, 1 << 19, r.getrandbits(21)))
                guest_debug = x.kvm_guest_debug(control=control)
                guest_debug.arch.debugreg[:] = [self.pointer() for _ in range(8)]
                guest_debug.arch.debugreg[7] = r.getrandbits(32)
                self.attempt(lambda: vcpu.set_guest_debug(guest_debug))
            case _:
                self.attempt(lambda: vcpu.set_mp_state(r.choice((0, 0, 0, r.randrange(6)))))

    def make_interrupts(self) -> None:
        """Interrupts from everywhere into handlers that may be nonsense."""
        r = self.random
        self.enter()
        self.code(device_code(r, self.bits, 200))
        regs = self.vcpu.get_regs()
        regs.rflags |= 1 << 9
        self.vcpu.set_regs(regs)
        for _ in range(r.randrange(6)):
            at = IDT + r.randrange(4096)
            self.write(at, r.randbytes(8))
        for _ in range(r.randrange(1, 6)):
            self.interrupt_something(self.vcpu, r)

    def interrupt_something(self, vcpu: Vcpu | None, r: Random) -> None:
        """An interrupt or a message, or an NMI of `vcpu`, which doesn't run. Any thread."""
        match r.randrange(5):
            case 0 if vcpu is not None:
                self.attempt(r.choice((vcpu.nmi, vcpu.smi)))
            case 1 if vcpu is not None:
                self.attempt(partial(vcpu.interrupt, r.getrandbits(8)))
            case 2:
                address = 0xFEE00000 | r.getrandbits(20) if r.random() < 0.9 else r.getrandbits(64)
                self.attempt(lambda: self.vm.signal_msi(address, r.getrandbits(r.choice((8, 16, 32)))))
            case 3:
                chip = x.kvm_irqchip(chip_id=r.randrange(4))
                ctypes.memmove(ctypes.addressof(chip.chip), r.randbytes(256), 256)
                self.attempt(lambda: self.vm.set_irqchip(chip))
            case _:
                self.attempt(lambda: self.vm.irq_line(r.randrange(26), r.getrandbits(1)))

    def make_processors(self) -> None:
        """Processors that change the code, tables and handlers that the others use, the same code or each its own."""
        r = self.random
        self.enter()
        self.code(patched_code(r, self.bits, r.choice((CODE, CODE, TABLES, IDT))))
        for vcpu in self.vcpus[1:]:
            own = 0x4000 + vcpu.id * 0x1000
            self.start_at(vcpu, r.choice((CODE, CODE, CODE + r.randrange(256), own)))
            match r.randrange(3):
                case 0:
                    code = control_code(r, self.bits, 30, self.pointer)
                case 1:
                    code = random_code(r, self.bits, 1000)
                case _:
                    code = patched_code(r, self.bits, r.choice((CODE, HANDLERS, own)))
            self.write(own, code[:PAGE])

    def start_at(self, vcpu: Vcpu, address: int) -> None:
        """Have `vcpu` start at `address`."""
        regs = vcpu.get_regs()
        regs.rip = address
        vcpu.set_regs(regs)

    def make_shootdowns(self) -> None:
        """Page tables that every processor rewrites under the feet of the others, with and without the flush that it takes."""
        r = self.random
        self.bits = r.choice((64, 64, 32))
        self.enter()
        wide = self.bits == 64
        for n in range(16):
            entry = (self.page() | 7) & (1 << (64 if wide else 32)) - 1
            self.write(PAGE_TABLE + n * (8 if wide else 4), entry.to_bytes(8 if wide else 4, "little"))
        if wide:
            # Of a directory that maps 2 MiB pages: the entry of WINDOW.
            self.write(TABLES + 2 * PAGE + (WINDOW >> 21) * 8, (PAGE_TABLE | 7).to_bytes(8, "little"))
        else:
            directory = PAGE_TABLE + PAGE
            for n in range(1024):
                self.write(directory + n * 4, (n << 22 | 0x87).to_bytes(4, "little"))
            self.write(directory + (WINDOW >> 22) * 4, (PAGE_TABLE | 7).to_bytes(4, "little"))
            for vcpu in self.vcpus:
                sregs = vcpu.get_sregs()
                sregs.cr3, sregs.cr0 = directory, sregs.cr0 | 1 << 31
                sregs.cr4 |= 1 << 4
                self.attempt(partial(vcpu.set_sregs, sregs))
        for vcpu in self.vcpus:
            own = CODE if r.random() < 0.5 else 0x40000 + vcpu.id * 0x8000
            self.start_at(vcpu, own)
            self.write(own, table_code(r, self.bits, 60, PAGE_TABLE, WINDOW, self.page))

    def page(self) -> int:
        """The address of a page of memory, mostly: one of the first block's code and data, or of a small one."""
        r = self.random
        if r.random() < 0.05:
            return self.pointer()
        gpa, block = r.choice([(g, b) for g, b in self.blocks if self.bits == 64 or g < 1 << 32])
        return gpa + r.randrange(0, min(block.size_bytes, 0x90000), PAGE)

    def make_storms(self) -> None:
        """Interrupts, NMIs, INITs and SIPIs from every processor to every other, timers and breakpoints."""
        r = self.random
        self.enter()
        starts = [CODE, 0x4000, 0x5000, HANDLERS]
        for vcpu in self.vcpus:
            own = r.choice(starts[:3])
            self.start_at(vcpu, own)
            self.write(own, storm_code(r, self.bits, 60, starts)[: 3 * PAGE])
            regs = vcpu.get_regs()
            regs.rflags |= 1 << 9
            vcpu.set_regs(regs)

    def make_slots(self) -> None:
        """Accesses everywhere while the host takes memory away and brings it back."""
        r = self.random
        self.bits = r.choice((64, 64, 32))
        self.enter()
        for vcpu in self.vcpus:
            own = CODE if r.random() < 0.5 else 0x40000 + vcpu.id * 0x8000
            self.start_at(vcpu, own)
            self.write(own, access_code(r, self.bits, 300, r.choice((self.page, self.page, self.edge))))
        # Code in the blocks that come and go.
        for gpa, _ in self.blocks[1:]:
            self.write(gpa, random_code(r, self.bits, 500))
            if gpa < 1 << 32 and r.random() < 0.3:
                self.start_at(r.choice(self.vcpus), gpa)

    def make_headers(self) -> None:
        """A kernel's file with wrong fields: the loader refuses it, or what it loaded is run."""
        r = self.random
        fd = os.memfd_create("hostile-kernel", os.MFD_CLOEXEC)
        memory = MemoryMap()
        memory.add(0, self.low)
        try:
            os.write(fd, kernel_file(r))
            protocol: Protocol = r.choice(("linux64", "linux64", "pvh"))
            entry = load_linux(memory, KERNEL_BYTES, f"/proc/self/fd/{fd}", None, "x", protocol=protocol)
        except KernelError:
            self.refused += 1
            self.enter()
            return
        finally:
            os.close(fd)
        self.bits = 64
        self.enter()
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsi = entry.ip, entry.parameters
        self.vcpu.set_regs(regs)

    # Running.

    def answer(self, vcpu: Vcpu, exit_: Exit, r: Random) -> None:
        """Do what a device, or user space at large, may do between two runs of `vcpu`."""
        if (isinstance(exit_, Io) and not exit_.is_out) or (isinstance(exit_, Mmio) and not exit_.is_write):
            exit_.data[:] = r.randbytes(len(exit_.data))
        match r.randrange(24):
            case 0:
                self.set_something(vcpu, r)
            case 1:
                self.interrupt_something(vcpu, r)
            case 2:
                self.write_something(r)
            case 3:
                self.change_slot(r)
            case 4:
                self.read_dirty_log(r)
            case 5:
                sregs = vcpu.get_sregs()
                self.attempt(lambda: vcpu.set_sregs(sregs))
            case 6:
                vcpu.get_xsave()
                vcpu.get_vcpu_events()
            case _:
                pass

    def write_something(self, r: Random) -> None:
        """Write memory as a device does. Any thread."""
        address = r.choice((r.randrange(LOW_BYTES - 64), r.choice((CODE, PAGE_TABLE)) + r.randrange(1024)))
        self.write(address, r.randbytes(64))
        self.vm.memory_written(address, 64)

    def change_slot(self, r: Random) -> None:
        """A slot goes and comes back, there or elsewhere, or is logged from now on. Any thread.

        While it is gone, its memory is inaccessible to the host too: who still believes in it shows.
        """
        with self.slots_lock:
            slot = r.randrange(len(self.blocks) > 1, len(self.blocks))
            gpa, block = self.blocks[slot]
            if r.random() < 0.5:
                self.attempt(lambda: self.vm.set_user_memory_region(slot, 0, 0, 0))
                if slot:
                    with block.inaccessible():
                        self.done.wait(r.choice((0, 1e-4)))
                gpa = r.choice((gpa, 0x200000, 0x40000000 + r.randrange(16) * PAGE))
            flags = r.choice((0, c.KVM_MEM_LOG_DIRTY_PAGES))
            self.attempt(
                lambda: self.vm.set_user_memory_region(slot, gpa, block.size_bytes, block.address, flags)
            )

    def read_dirty_log(self, r: Random) -> None:
        """Read the dirty log of a slot, and clear some of it. Any thread."""
        slot = r.randrange(4)
        self.attempt(lambda: self.vm.get_dirty_log(slot))
        pages = (LOW_BYTES if slot == 0 else SMALL_BYTES) // PAGE
        self.attempt(lambda: self.vm.clear_dirty_log(slot, 0, pages, r.randbytes(pages // 8 + 1)))

    def disturb(self) -> None:
        """Be the host's thread that changes things under the feet of running vCPUs."""
        r = Random(f"{self.seed} host")
        slots = self.kind == "slots"
        while not self.done.is_set():
            match r.randrange(8):
                case 0 | 1:
                    self.change_slot(r)
                case 2 | 3 if slots:
                    self.change_slot(r)
                case 2:
                    self.read_dirty_log(r)
                case 3:
                    self.interrupt_something(None, r)
                case 4:
                    self.write_something(r)
                case 5:
                    r.choice(self.vcpus[1:] or self.vcpus).kick()
                case _:
                    self.done.wait(r.choice((0, 1e-4, 5e-4)))

    def run(self, limit_s: float) -> Outcome:
        self.started = time.monotonic()
        jobs: list[Callable[[], None]] = [partial(self._run_other, vcpu) for vcpu in self.vcpus[1:]]
        if self.disturbed:
            jobs.append(self.disturb)
        others = [threading.Thread(target=self._catch, args=(job,)) for job in jobs]
        for thread in others:
            thread.start()
        try:
            outcome = self._run(limit_s)
        except OSError as error:
            if not is_dead(error):
                raise
            outcome = self.outcome("dead", self.exits + 1)
        finally:
            self.done.set()
            while any(thread.is_alive() for thread in others):
                for vcpu in self.vcpus[1:]:
                    vcpu.kick()
                for thread in others:
                    thread.join(0.001)
        if self.failures:
            raise self.failures[0]
        return outcome

    def _catch(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            if not is_dead(error):
                self.failures.append(error)

    def _run_other(self, vcpu: Vcpu) -> None:
        r = Random(f"{self.seed} vCPU {vcpu.id}")
        exits = 0
        while not self.done.is_set() and exits < _MAX_EXITS:
            exit_ = vcpu.run()
            vcpu.immediate_exit = False
            exits += 1
            self.check_exit(vcpu, exit_)
            self.answer(vcpu, exit_, r)

    def _run(self, limit_s: float) -> Outcome:
        exits = 0
        with self.arena.limit(self.vcpu, limit_s) as watchdog:
            while True:
                exit_ = self.vcpu.run()
                if not watchdog.expired:
                    self.vcpu.immediate_exit = False
                exits += 1
                self.exits = exits
                name = type(exit_).__name__
                if watchdog.expired:
                    return self.outcome("limit", exits)
                if exits >= _MAX_EXITS:
                    return self.outcome("exits", exits)
                if self.kind == "headers" and self.refused:
                    return self.outcome("refused", exits)
                message = self.check_exit(self.vcpu, exit_)
                if not isinstance(exit_, Io | Mmio | Intr) and self.random.random() < 0.8:
                    return self.outcome(name, exits, message)
                self.answer(self.vcpu, exit_, self.random)

    def check_exit(self, vcpu: Vcpu, exit_: Exit) -> str:
        """`StrayAccessError` if `exit_` says that translated code went astray; the message of an `InternalError`."""
        if not isinstance(exit_, InternalError):
            return ""
        message = str(getattr(vcpu, "error_message", ""))
        if "host trap" in message or "translated code" in message:
            # The engine survives a stray access of translated code, but there must be none.
            raise StrayAccessError(message)
        return message

    def outcome(self, end: str, exits: int, message: str = "") -> Outcome:
        return Outcome(
            self.seed, self.kind, end, exits, time.monotonic() - self.started, len(self.vcpus), message
        )

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()


def is_dead(error: BaseException) -> bool:
    """Whether the VM is dead, as an SMI leaves it that finds no memory for the state-save area. No ioctl works then."""
    return isinstance(error, OSError) and error.errno == errno.EIO


_KINDS: dict[str, Callable[[_Hostile], None]] = {
    "random": _Hostile.make_random,
    "code": _Hostile.make_code,
    "accesses": _Hostile.make_accesses,
    "control": _Hostile.make_control,
    "mutated": _Hostile.make_mutated,
    "patching": _Hostile.make_patching,
    "tables": _Hostile.make_tables,
    "state": _Hostile.make_state,
    "interrupts": _Hostile.make_interrupts,
    "processors": _Hostile.make_processors,
    "shootdowns": _Hostile.make_shootdowns,
    "storms": _Hostile.make_storms,
    "slots": _Hostile.make_slots,
    "management": _Hostile.make_management,
    "headers": _Hostile.make_headers,
}
KINDS = tuple(_KINDS)
_TOGETHER = frozenset(("processors", "shootdowns", "storms"))
"""Kinds that take several vCPUs."""


def run(system: Kvm, arena: Arena, seed: int, limit_s: float = 0.02) -> Outcome:
    """Make the guest of `seed` and run it until it ends, for at most `limit_s` seconds; then check the canaries.

    Raises `CanaryError` if memory beside the guest's has changed, `StrayAccessError` if a guard page was hit. Nothing else but
    the process's death, an exception or not returning at all is a failure: a guest may end in any way.
    """
    guest = _Hostile(system, arena, seed)
    try:
        _KINDS[guest.kind](guest)
        return guest.run(limit_s)
    finally:
        guest.close()
        arena.check()
