"""`Vcpu.walk` beside the engine's own walk (KVM_TRANSLATE), and beside what a guest's accesses get and leave in its tables."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmkit.kvm import Kvm, Vcpu
from kvmkit.kvm.exits import Hlt, Io
from kvmkit.kvm.walk import AccessKind
from kvmkit.testing import Guest
from kvmkit.testing.guest import MEMORY_BYTES, STACK
from kvmkit.uapi import x86

P, W, U, A, D, PS, G, NX = (1 << bit for bit in (0, 1, 2, 5, 6, 7, 8, 63))
ROOT = 0x40000
TABLES = tuple(range(ROOT, ROOT + 0x8000, 0x1000))
CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP = (1 << bit for bit in (4, 5, 12, 20, 21))
EFER_LME, EFER_LMA, EFER_NXE = 1 << 8, 1 << 10, 1 << 11

EXAMPLES = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
"""In a test bed, time is no measure of anything."""

KINDS: tuple[AccessKind, ...] = ("read", "write", "execute")


class Mode:
    """A kind of paging: control registers, levels, sizes."""

    def __init__(self, bits: int, cr4: int, levels: int, entry_bytes: int) -> None:
        self.bits, self.cr4, self.levels, self.entry_bytes = bits, cr4, levels, entry_bytes

    def index(self, gva: int, level: int) -> int:
        width = 10 if self.entry_bytes == 4 else 2 if (self.levels, level) == (3, 3) else 9
        return gva >> 12 + (10 if self.entry_bytes == 4 else 9) * (level - 1) & (1 << width) - 1


MODES = {
    "32-bit": Mode(32, 0, 2, 4),
    "32-bit with 4M pages": Mode(32, CR4_PSE, 2, 4),
    "PAE": Mode(32, CR4_PAE, 3, 8),
    "4-level": Mode(64, CR4_PAE, 4, 8),
    "5-level": Mode(64, CR4_PAE | CR4_LA57, 5, 8),
}


def has_la57(kvm: Kvm) -> bool:
    return any((e.function, e.index) == (7, 0) and e.ecx & 1 << 16 for e in kvm.get_supported_cpuid())


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, kvm: Kvm) -> Mode:
    mode = MODES[request.param]
    if mode.cr4 & CR4_LA57 and not has_la57(kvm):
        pytest.skip(f"{kvm.engine}: no 5-level paging")
    return mode


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[Guest]:
    with Guest(kvm, "hlt") as guest:
        yield guest


def enable(vcpu: Vcpu, mode: Mode, nxe: bool) -> None:
    """Switch paging on."""
    sregs = vcpu.get_sregs()
    sregs.cr0 |= CR0_PE | CR0_PG
    sregs.cr3, sregs.cr4 = ROOT, mode.cr4
    sregs.efer = (EFER_LME | EFER_LMA if mode.bits == 64 else 0) | (EFER_NXE if nxe else 0)
    sregs.cs.l, sregs.cs.db = mode.bits == 64, mode.bits != 64
    try:
        vcpu.set_sregs(sregs)
    except OSError as error:
        if not mode.cr4 & CR4_LA57:
            raise
        pytest.skip(f"5-level paging, which CPUID offers, is refused: {error}")
    if not vcpu.get_sregs().cr0 & CR0_PG:
        pytest.skip("this KVM knows no paging outside long mode")


def bits(*positions: int) -> st.SearchStrategy[int]:
    """Any of these bits together."""
    return st.sets(st.sampled_from(positions)).map(lambda chosen: sum(1 << bit for bit in chosen))


LOW_BITS = bits(1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
TABLE_64 = st.builds(lambda a, low: a | low | P, st.sampled_from(TABLES[1:]), LOW_BITS)
WILD_64 = st.one_of(
    st.builds(lambda entry, wild: entry ^ 1 << wild, TABLE_64, st.integers(0, 63)),
    st.integers(0, (1 << 64) - 1),
    st.builds(lambda a, low: a & ~0xFFF | low | P, st.integers(0, 1 << 36), LOW_BITS),
)
LARGE_64 = st.builds(
    lambda a, low, size: a & -size | low | P | PS,
    st.integers(0, 1 << 36),
    LOW_BITS,
    st.sampled_from([1 << 21, 1 << 30]),
)
ENTRIES_64 = st.integers(0, 9).flatmap(lambda n: TABLE_64 if n < 7 else LARGE_64 if n < 9 else WILD_64)
# Bits 17 to 20 of a 4 MiB page are left out: they are address bits 36 to 39 (Intel SDM vol. 3, table 4-4), which the kernel's
# walk has as reserved.
ENTRIES_32 = st.one_of(
    st.builds(lambda a, low: a | low & ~PS | P, st.sampled_from(TABLES[1:]), LOW_BITS),
    st.builds(lambda a, low: a & 0xFFC1E000 | low | PS | P, st.integers(0, (1 << 32) - 1), LOW_BITS),
    st.builds(lambda a, low: a & 0xFFC1F000 | low & ~PS | P, st.integers(0, (1 << 20) - 1), LOW_BITS),
    st.integers(0, (1 << 12) - 1),
)


def test_random_tables(kvm: Kvm, guest: Guest, mode: Mode) -> None:
    """The walk leads where KVM_TRANSLATE leads, or nowhere as it does; it changes no byte."""
    entry = ENTRIES_32 if mode.entry_bytes == 4 else ENTRIES_64
    linear = st.integers(0, (1 << 32) - 1)
    if mode.bits == 64:
        sign_bit = 12 + 9 * mode.levels - 1
        canonical = st.integers(-(1 << sign_bit), (1 << sign_bit) - 1).map(lambda n: n % (1 << 64))
        linear = st.one_of(canonical, canonical, canonical, st.integers(0, (1 << 64) - 1))
    outcomes: set[object] = set()

    @settings(EXAMPLES, max_examples=200)
    @given(linear, st.lists(entry, min_size=mode.levels, max_size=mode.levels), st.booleans())
    def check(gva: int, entries: list[int], nxe: bool) -> None:
        for table in TABLES:
            guest.memory.write(table, bytes(4096))
        table = ROOT
        for level, value in zip(range(mode.levels, 0, -1), entries, strict=True):
            if kvm.engine == "soft" and level > 3:
                value &= ~G  # which AMD's processors have as reserved, and the engine doesn't
            if (mode.levels, level) == (3, 3):
                value &= 0xFFFFFFFF & ~(W | U | A | D | PS | G)  # the processor loads no other one
            if table in TABLES:
                at = table + mode.index(gva, level) * mode.entry_bytes
                guest.memory.write(at, value.to_bytes(8, "little")[: mode.entry_bytes])
            table = value & 0xFFFFFFFFFF000
        enable(guest.vcpu, mode, nxe)
        before = guest.memory.read(0, MEMORY_BYTES)
        walk = guest.vcpu.walk(gva)
        assert guest.memory.read(0, MEMORY_BYTES) == before
        assert walk.paging is not None
        if kvm.engine == "soft" and mode.entry_bytes == 4 and walk.paging.steps[-1].entry is None:
            return  # the engine takes what isn't there for ones, which is a valid entry then
        if kvm.engine == "linux" and "canonical" in (walk.paging.end or ""):
            return  # KVM_TRANSLATE walks the tables without looking whether it is
        translation = guest.vcpu.translate(gva)
        assert (walk.gpa is not None) == bool(translation.valid), str(walk)
        assert walk.gpa is None or walk.gpa == translation.physical_address, str(walk)
        assert walk.paging.address == (gva if mode.bits == 64 else gva & 0xFFFFFFFF)
        outcomes.add(walk.paging.page_bytes or (walk.paging.end or "").split(":")[0][-20:])

    check()
    sizes = {n for n in outcomes if isinstance(n, int)}
    assert sizes and len(outcomes) > len(sizes), f"not enough variety: {outcomes}"


TARGET, TARGET_PAGE = 0x7F1234567000, 0x30000
USER_CODE, TSS, RESULT_PORT = 0x20000, 0x22000, 0x10
ACCESS_CODE: dict[AccessKind, str] = {
    "read": "mov al, [rdi]",
    "write": "mov [rdi], al",
    "execute": "call rdi",
}
NO_FAULT = 0xFFFF


class FaultingGuest:
    """A 64-bit guest that makes one access to TARGET, as supervisor or as user, and tells the error code of its #PF."""

    def __init__(self, kvm: Kvm) -> None:
        handlers = f"""
            set_gate 14, page_fault
            load_idt
            hlt
        page_fault:
            pop rax
            out {RESULT_PORT}, eax
            hlt
        """
        self.guest = Guest(kvm, handlers)
        assert self.guest.run() == Hlt()
        memory = self.guest.memory
        for i, kind in enumerate(KINDS):
            self.guest.load(
                f"{ACCESS_CODE[kind]}\nmov eax, {NO_FAULT}\nout {RESULT_PORT}, eax\nhlt",
                64,
                USER_CODE + 64 * i,
            )
        memory.write(TSS + 4, (STACK - 0x3000).to_bytes(8, "little"))  # RSP0
        self.fresh = self.guest.vcpu.get_sregs()

    def map(self, entries: list[int]) -> None:
        """Four entries, from the PML4E of TARGET on, over a map of the first 2 MiB: each page's user bit as its use needs."""
        memory = self.guest.memory
        memory.write(ROOT, bytes(0x8000))
        memory.write(TARGET_PAGE, b"\xc3")  # ret
        pml4, pdpt, directory, table = range(ROOT, ROOT + 0x4000, 0x1000)
        for at, value in ((pml4, pdpt), (pdpt, directory), (directory, table)):
            memory.write(at, (value | P | W | U | A).to_bytes(8, "little"))
        for page in range(0, MEMORY_BYTES, 0x1000):
            user = U if page in (USER_CODE, 0x7000) and self.user else 0
            memory.write(table + page // 0x1000 * 8, (page | P | W | A | D | user).to_bytes(8, "little"))
        above = pml4
        for level, entry in zip((4, 3, 2, 1), entries, strict=True):
            below = TARGET_PAGE if level == 1 else ROOT + 0x8000 - 0x1000 * level
            memory.write(
                above + MODES["4-level"].index(TARGET, level) * 8, (below | entry).to_bytes(8, "little")
            )
            above = below
        # Where KVM keeps tables of its own (shadow paging), it learns of changes that the guest makes, not of ours.
        size_bytes, address = memory.size_bytes, memory.address
        self.guest.vm.set_user_memory_region(0, 0, 0, 0)
        self.guest.vm.set_user_memory_region(0, 0, size_bytes, address)

    def access(
        self, kind: AccessKind, user: bool, cr0: int, cr4: int, nxe: bool, ac: bool, entries: list[int]
    ) -> int:
        """Make it; the error code, or NO_FAULT."""
        self.user = user
        self.map(entries)
        sregs = x86.kvm_sregs.from_buffer_copy(self.fresh)
        sregs.cr3 = ROOT
        sregs.cr0 |= cr0
        sregs.cr4 |= cr4
        sregs.efer |= EFER_NXE if nxe else 0
        if user:
            for name in ("cs", "ss"):
                segment = getattr(sregs, name)
                segment.dpl, segment.selector = 3, segment.selector | 3
        sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.present, sregs.tr.selector = (
            TSS,
            0x67,
            11,
            1,
            0x20,
        )
        self.guest.vcpu.set_sregs(sregs)
        code = USER_CODE + 64 * KINDS.index(kind)
        rflags = 2 | 3 << 12 | (1 << 18 if ac else 0)  # IOPL 3, for the port
        self.guest.vcpu.set_regs(x86.kvm_regs(rip=code, rflags=rflags, rsp=STACK, rdi=TARGET))
        self.walk = self.guest.vcpu.walk(TARGET)
        exit_ = self.guest.run()
        assert isinstance(exit_, Io), exit_
        return int.from_bytes(exit_.data, "little")


@pytest.fixture
def faulting(kvm: Kvm) -> Iterator[FaultingGuest]:
    faulting = FaultingGuest(kvm)
    with faulting.guest:
        yield faulting


PERMISSIONS = bits(1, 2, 63).map(lambda b: b | P)
BROKEN = st.sampled_from([0, W | U, P | W | U | 1 << 51])


def test_error_codes(kvm: Kvm, faulting: FaultingGuest) -> None:
    """What the walk says that an access would get is what it gets; its tables then show what it left."""
    smep, smap = (
        (e.ebx >> 7 & 1, e.ebx >> 20 & 1)
        for e in kvm.get_supported_cpuid()
        if (e.function, e.index) == (7, 0)
    ).__next__()
    seen: set[int] = set()

    @settings(EXAMPLES, max_examples=150)
    @given(
        st.sampled_from(KINDS),
        st.booleans(),
        st.booleans(),
        bits(*([20] if smep else []), *([21] if smap else [])) if smep or smap else st.just(0),
        st.booleans(),
        st.booleans(),
        st.lists(st.one_of(PERMISSIONS, PERMISSIONS, st.just(P | W | U), BROKEN), min_size=4, max_size=4),
    )
    def check(
        kind: AccessKind, user: bool, wp: bool, cr4: int, nxe: bool, ac: bool, entries: list[int]
    ) -> None:
        code = faulting.access(kind, user, CR0_WP if wp else 0, cr4, nxe, ac, entries)
        paging = faulting.walk.paging
        assert paging is not None
        fault = paging.fault(kind, user=user)
        if kvm.engine == "linux" and code & 0b1001 == 0b1000:
            code |= 1  # below this KVM is QEMU's TCG, which leaves P clear beside RSVD
        assert code == (NO_FAULT if fault is None else fault.error_code), (kind, user, str(faulting.walk))
        seen.add(code)
        after = faulting.guest.vcpu.walk(TARGET).paging
        assert after is not None
        assert all(step.accessed for step in after.steps if fault is None)
        assert [step.dirty for step in after.steps if step.page_bytes] in (
            [fault is None and kind == "write"],
            [],
        )

    check()
    codes = seen - {NO_FAULT}
    assert NO_FAULT in seen and all(any(code & bit for code in codes) for bit in (1, 2, 4, 8, 16)), seen
