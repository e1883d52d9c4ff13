"""What KVM tells user space without an exit: coalesced writes, the dirty log in its variants, the dirty ring."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import DirtyRingFull, Hlt, Io, Mmio
from kvmkit.kvm.modes import set_long_mode
from kvmkit.kvm.rings import COALESCED_ENTRIES, PAGE_SIZE, CoalescedRing
from kvmkit.testing import CODE, DATA, TABLES, Guest
from kvmkit.uapi.capabilities import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
)
from kvmkit.uapi.common import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
)

from .evidence import module_of_kvm

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


@pytest.mark.refuses("KVM_ENABLE_CAP")
@pytest.mark.parametrize("capability", [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL])
def test_dirty_ring_sizes(kvm: Kvm, capability: int) -> None:
    """A power of two in bytes, a page at least and what the capability's value says at most; once, and before vCPUs."""
    most = kvm.check_extension(capability)
    if not most:
        pytest.skip(f"{kvm.engine}: no dirty ring")
    with kvm.create_vm() as vm:
        wrong = [(0, errno.EINVAL), (3 << 13, errno.EINVAL), (2048, errno.EINVAL), (most * 2, errno.E2BIG)]
        for size_bytes, number in wrong:
            with pytest.raises(OSError) as caught:
                vm.enable_cap(capability, size_bytes)
            assert caught.value.errno == number, size_bytes
        vm.enable_cap(capability, most)
        with pytest.raises(OSError, match="Invalid argument"):
            vm.enable_cap(capability, most)
        vm.create_vcpu(0).close()
    with kvm.create_vm() as vm:
        vm.create_vcpu(0).close()
        with pytest.raises(OSError, match="Invalid argument"):
            vm.enable_cap(capability, most)


@pytest.mark.refuses("KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP")
def test_no_bitmap_beside_dirty_rings(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    assert kvm.check_extension(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) == 0  # x86 has no writes without a vCPU
    with ring_guest(kvm, "hlt", 4096) as guest:
        log(guest)
        for call in (lambda: guest.vm.get_dirty_log(0), lambda: guest.vm.clear_dirty_log(0, 0, 64, bytes(8))):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENXIO
        with pytest.raises(OSError, match="Invalid argument"):
            guest.vm.enable_cap(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)


def test_a_page_stays_out_of_the_ring_until_it_is_reset(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Taking an entry is not enough: KVM reports the page's next write once KVM_RESET_DIRTY_RINGS has seen the entry."""
    needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
    write = f"mov byte ptr [{0x80 << 12}], 1"
    with ring_guest(kvm, f"{write}\nout 0x10, al\n{write}\nout 0x10, al\n{write}\nhlt", 4096) as guest:
        log(guest)
        assert isinstance(guest.run(), Io)
        assert (0, 0x80) in guest.vcpu.take_dirty_gfns()
        assert isinstance(guest.run(), Io)
        if (0, 0x80) in guest.vcpu.take_dirty_gfns():
            assert kvm.engine == "linux"  # one that emulates the write has nothing protected
            pytest.skip("linux: this KVM emulates the guest's writes (kvm_pvm)")
        assert guest.vm.reset_dirty_rings() >= 1
        assert guest.run() == Hlt()
        assert (0, 0x80) in guest.vcpu.take_dirty_gfns()


RANDOM_WRITES = f"""
        mov rsi, 6364136223846793005
        mov rbp, 1442695040888963407
    again:
        imul rdi, rsi
        add rdi, rbp
        mov rbx, rdi
        shr rbx, 44
        or ebx, 0x80000
        and ebx, 0xffff7
        mov [rbx], rdi
        lock xadd [rbx + 1], edi
        xor ebx, 0x40000
        mov [rbx], bl
        cmp byte ptr [{DATA}], 0
        je again
        hlt
"""
"""Writes at random to the upper half of a `Guest`'s memory, across pages too, until the byte at DATA is set; rdi is the seed."""


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("way", ["ring", "get", "clear"])
def test_no_write_is_lost(kvm: Kvm, needs: Callable[[str], int], way: str, vcpus: int) -> None:
    """A copy that takes over the pages that the log names, once they are protected again, ends as the guest's memory.

    The vCPUs go on writing meanwhile: this is what moving a running machine relies on.
    """
    if kvm.engine == "linux" and module_of_kvm() == "kvm-pvm":
        pytest.skip("linux: kvm_pvm emulates loops without end, and logs their writes when it leaves them")
    if way == "ring":
        needs("KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
        capabilities = [(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 4096)]
    elif way == "clear":
        needs("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        capabilities = [(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)]
    else:
        capabilities = []
    with Guest(kvm, RANDOM_WRITES, vcpus=vcpus, capabilities=capabilities) as guest:
        for number, vcpu in enumerate(guest.vcpus):
            set_long_mode(vcpu, guest.memory, CODE, TABLES)
            regs = vcpu.get_regs()
            regs.rdi = number + 1
            vcpu.set_regs(regs)
        log(guest)
        size_bytes = guest.memory.size_bytes
        copy = bytearray(guest.map.read(0, size_bytes))
        harvesting = threading.Lock()

        def harvest() -> int:
            """Bring the copy up to date; how many pages that took."""
            with harvesting:
                if way == "ring":
                    pages = {page for vcpu in guest.vcpus for _, page in vcpu.take_dirty_gfns()}
                    guest.vm.reset_dirty_rings()
                else:
                    bitmap = guest.vm.get_dirty_log(0)
                    if way == "clear":
                        guest.vm.clear_dirty_log(0, 0, PAGES, bitmap)
                    pages = {page for page in range(PAGES) if bitmap[page >> 3] >> (page & 7) & 1}
                for page in pages:
                    copy[page << 12 : page + 1 << 12] = guest.map.read(page << 12, PAGE_SIZE)
                return len(pages)

        def run(number: int) -> None:
            while (exit_ := guest.run(number)) != Hlt():
                assert exit_ == DirtyRingFull()
                harvest()

        with ThreadPoolExecutor(vcpus) as pool:
            running = [pool.submit(run, number) for number in range(vcpus)]
            harvested = 0
            while harvested < 2000 and not any(future.done() for future in running):
                harvested += harvest()
            guest.map.write(DATA, b"\1")
            for future in running:
                future.result()
        harvest()
        copy[DATA] = 1  # the host's own write
        assert harvested >= 2000
        memory = guest.map.read(0, size_bytes)
        assert [
            page for page in range(PAGES) if copy[page << 12 :][:4096] != memory[page << 12 :][:4096]
        ] == []
