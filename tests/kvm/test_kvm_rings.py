"""What KVM tells user space without an exit: coalesced writes, the dirty log in its variants, the dirty ring."""

from collections.abc import Callable

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import DirtyRingFull, Hlt, Io, Mmio
from kvmkit.kvm.rings import COALESCED_ENTRIES, PAGE_SIZE, CoalescedRing
from kvmkit.testing import DATA, Guest
from kvmkit.uapi.capabilities import KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from kvmkit.uapi.common import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
)

MMIO = 0xD0000000
PAGES = 256
"""Of a `Guest`."""


@pytest.mark.backs("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
def test_coalesced_mmio(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Writes to a registered range wait in the ring in order; reads and other writes exit."""
    needs("KVM_CAP_COALESCED_MMIO")
    code = f"""
        mov ebx, {MMIO}
        mov eax, 0x11223344
        mov [rbx], eax
        mov [rbx + 8], al
        mov [rbx + 0x10], rax
        mov ecx, [rbx]
        mov [rbx + 0x1000], eax
        mov [rbx], ax
        hlt
    """
    with Guest(kvm, code) as guest:
        guest.vm.register_coalesced_mmio(MMIO, 0x1000)
        read = guest.run()
        assert isinstance(read, Mmio) and not read.is_write
        writes = [(w.phys_addr, bytes(w.data[: w.len]), w.pio) for w in guest.vcpu.take_coalesced_mmio()]
        assert writes == [
            (MMIO, b"\x44\x33\x22\x11", 0),
            (MMIO + 8, b"\x44", 0),
            (MMIO + 16, b"\x44\x33\x22\x11\0\0\0\0", 0),
        ]
        assert guest.vcpu.take_coalesced_mmio() == []
        outside = guest.run()
        assert isinstance(outside, Mmio) and outside.phys_addr == MMIO + 0x1000
        guest.vm.unregister_coalesced_mmio(MMIO, 0x1000)
        exit_ = guest.run()
        assert isinstance(exit_, Mmio) and bytes(exit_.data) == b"\x44\x33"


@pytest.mark.backs("KVM_REGISTER_COALESCED_MMIO")
def test_coalesced_pio(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_COALESCED_PIO")
    with Guest(kvm, "mov eax, 0x11223344\nout 0x70, al\nmov dx, 0x72\nout dx, ax\nin al, 0x70\nhlt") as guest:
        guest.vm.register_coalesced_mmio(0x70, 8, pio=1)
        exit_ = guest.run()
        assert isinstance(exit_, Io) and not exit_.is_out
        writes = [(w.phys_addr, bytes(w.data[: w.len]), w.pio) for w in guest.vcpu.take_coalesced_mmio()]
        assert writes == [(0x70, b"\x44", 1), (0x72, b"\x44\x33", 1)]


def test_full_coalesced_ring_exits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_COALESCED_MMIO")
    code = f"mov ebx, {MMIO}\nmov ecx, 200\nagain: mov [rbx], ecx\ndec ecx\njnz again\nhlt"
    with Guest(kvm, code) as guest:
        guest.vm.register_coalesced_mmio(MMIO, 0x1000)
        exit_ = guest.run()
        assert isinstance(exit_, Mmio)
        values = [int.from_bytes(w.data[:4], "little") for w in guest.vcpu.take_coalesced_mmio()]
        assert len(values) == COALESCED_ENTRIES - 1
        values.append(int.from_bytes(exit_.data, "little"))
        assert guest.run() == Hlt()
        values += [int.from_bytes(w.data[:4], "little") for w in guest.vcpu.take_coalesced_mmio()]
        assert values == list(range(200, 0, -1))


def test_two_ranges(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Unregistering a range leaves the others, and takes away those that lie in it."""
    needs("KVM_CAP_COALESCED_MMIO")
    code = f"mov ebx, {MMIO}\nmov [rbx], eax\nmov [rbx + 0x1000], eax\nmov [rbx], eax\nmov [rbx + 0x1000], eax\nhlt"
    with Guest(kvm, code) as guest:
        guest.vm.register_coalesced_mmio(MMIO, 0x100)
        guest.vm.register_coalesced_mmio(MMIO + 0x1000, 0x100)
        guest.vm.unregister_coalesced_mmio(MMIO, 0x100)
        exit_ = guest.run()
        assert isinstance(exit_, Mmio) and exit_.phys_addr == MMIO
        exit_ = guest.run()
        assert isinstance(exit_, Mmio) and exit_.phys_addr == MMIO
        assert [w.phys_addr for w in guest.vcpu.take_coalesced_mmio()] == [MMIO + 0x1000]


def test_ring_page_is_laid_out_as_the_kernel_does() -> None:
    """Both sides, over the wrap of the indices."""
    ring = CoalescedRing(memoryview(bytearray(PAGE_SIZE)))
    for round_ in range(3):
        sent = [round_ * 1000 + i for i in range(COALESCED_ENTRIES - 1)]
        assert all(ring.add(n, b"ab", False) for n in sent)
        assert not ring.add(0, b"", False)
        assert [entry.phys_addr for entry in ring.take()] == sent


def log_pages(guest: Guest, first_slot: int = 0) -> set[int]:
    """Page numbers that slot 0's log reports."""
    log = int.from_bytes(guest.vm.get_dirty_log(0), "little")
    return {page for page in range(PAGES) if log >> page & 1}


def log(guest: Guest) -> None:
    """Log slot 0."""
    guest.vm.set_user_memory_region(
        0, 0, guest.memory.size_bytes, guest.memory.address, KVM_MEM_LOG_DIRTY_PAGES
    )


WRITES = "\n".join(f"mov byte ptr [{page << 12}], 1" for page in (0x80, 0x81, 0xC0))


@pytest.mark.backs("KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP")
def test_manual_dirty_log(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """KVM_GET_DIRTY_LOG clears nothing; KVM_CLEAR_DIRTY_LOG clears the pages of a part that its bitmap names."""
    assert needs("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2") & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    enable = (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    with Guest(kvm, f"{WRITES}\nout 0x10, al\n{WRITES}\nhlt", capabilities=[enable]) as guest:
        log(guest)
        assert isinstance(guest.run(), Io)
        assert {0x80, 0x81, 0xC0} <= log_pages(guest)
        assert {0x80, 0x81, 0xC0} <= log_pages(guest)
        guest.vm.clear_dirty_log(0, 128, 64, (1 << 0).to_bytes(8, "little"))  # page 0x80 alone
        assert log_pages(guest) & {0x80, 0x81, 0xC0} == {0x81, 0xC0}
        guest.vm.clear_dirty_log(0, 128, PAGES - 128, b"\xff" * 16)
        assert not log_pages(guest) & {0x80, 0x81, 0xC0}
        assert guest.run() == Hlt()
        assert {0x80, 0x81, 0xC0} <= log_pages(guest)


@pytest.mark.backs("KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP")
def test_initially_all_set(kvm: Kvm, needs: Callable[[str], int]) -> None:
    both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
    if needs("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2") & both != both:
        pytest.skip(f"{kvm.engine}: no KVM_DIRTY_LOG_INITIALLY_SET")
    with Guest(kvm, f"{WRITES}\nhlt", capabilities=[(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, both)]) as guest:
        log(guest)
        assert log_pages(guest) == set(range(PAGES))
        guest.vm.clear_dirty_log(0, 64, PAGES - 64, b"\xff" * 24)
        assert log_pages(guest) == set(range(64))
        assert guest.run() == Hlt()
        assert log_pages(guest) - set(range(64)) == {0x80, 0x81, 0xC0}


def ring_guest(kvm: Kvm, code: str, size_bytes: int) -> Guest:
    """A guest with dirty rings."""
    return Guest(kvm, code, capabilities=[(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, size_bytes)])


@pytest.mark.backs("KVM_RESET_DIRTY_RINGS", "KVM_ENABLE_CAP")
def test_dirty_ring(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Pages come in the order in which they were written first; after a reset they come again."""
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    with ring_guest(kvm, f"{WRITES}\nout 0x10, al\n{WRITES}\nhlt", 16384) as guest:
        log(guest)
        assert isinstance(guest.run(), Io)
        gfns = guest.vcpu.take_dirty_gfns()
        assert [gfn for gfn in gfns if gfn[1] >= 0x80] == [(0, 0x80), (0, 0x81), (0, 0xC0)]
        assert guest.vcpu.take_dirty_gfns() == []
        assert guest.vm.reset_dirty_rings() == len(gfns)
        assert guest.vm.reset_dirty_rings() == 0
        assert guest.run() == Hlt()
        gfns = guest.vcpu.take_dirty_gfns()
        assert [gfn for gfn in gfns if gfn[1] >= 0x80] == [(0, 0x80), (0, 0x81), (0, 0xC0)]


def test_full_dirty_ring_exits(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """The exit comes while there is room left; once it is made, the guest goes on."""
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    code = f"mov ebx, {0x20 << 12}\nagain: mov [rbx], ebx\nadd ebx, 0x1000\ncmp ebx, {PAGES << 12}\njb again\nhlt"
    with ring_guest(kvm, code, 4096) as guest:
        log(guest)
        gfns: list[tuple[int, int]] = []
        full = 0
        while (exit_ := guest.run()) != Hlt():
            assert exit_ == DirtyRingFull()
            full += 1
            gfns += guest.vcpu.take_dirty_gfns()
            guest.vm.reset_dirty_rings()
        gfns += guest.vcpu.take_dirty_gfns()
        if kvm.engine == "linux" and full == 0:
            pytest.skip("linux: this KVM emulates the whole loop before it looks at the ring (kvm_pvm)")
        assert full >= 1
        assert {page for _, page in gfns} >= set(range(0x20, PAGES))


def test_no_dirty_ring_without_asking(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    with Guest(kvm, f"mov byte ptr [{DATA}], 1\nhlt") as guest:
        for call in (guest.vm.reset_dirty_rings, guest.vcpu.take_dirty_gfns):
            with pytest.raises(OSError, match="Invalid argument"):
                call()
