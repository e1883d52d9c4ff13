"""guest_memfd and memory attributes: memory that user space can share with a guest, and memory that it can't reach."""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmkit.kvm import Kvm, Vm
from kvmkit.kvm.exits import Exit, Io, MemoryFault
from kvmkit.testing import MEMORY_BYTES, TABLES, Guest
from kvmkit.uapi import common as c
from kvmkit.uapi.capabilities import (
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_MULTI_ADDRESS_SPACE,
)
from kvmkit.uapi.x86 import KVM_X86_SW_PROTECTED_VM

PAGE = 0x1000
EXTRA, EXTRA_BYTES = 0x200000, 4 * PAGE
PRIVATE = c.KVM_MEMORY_ATTRIBUTE_PRIVATE
MMAP, INIT_SHARED = c.GUEST_MEMFD_FLAG_MMAP, c.GUEST_MEMFD_FLAG_INIT_SHARED
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


@pytest.fixture
def protected(kvm: Kvm, needs: Callable[[str], int]) -> int:
    """The type of VMs with private memory; the test is skipped where there are none."""
    if not needs("KVM_CAP_VM_TYPES") & 1 << KVM_X86_SW_PROTECTED_VM:
        pytest.skip(f"{kvm.engine}: no KVM_CAP_MEMORY_ATTRIBUTES")
    return KVM_X86_SW_PROTECTED_VM


@pytest.fixture
def memfds(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Skip the test where VMs without private memory have no use for a guest_memfd."""
    needs("KVM_CAP_GUEST_MEMFD")
    with kvm.create_vm() as vm:
        if not vm.check_extension(KVM_CAP_GUEST_MEMFD):
            pytest.skip(f"{kvm.engine}: no KVM_CAP_GUEST_MEMFD for this type of VM")


@pytest.fixture
def shared() -> Iterator[tuple[mmap.mmap, int]]:
    """Memory of user space's for a slot, and its address."""
    with mmap.mmap(-1, EXTRA_BYTES) as memory:
        yield memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def add(vm: Vm, address: int, fd: int = -1, *, flags: int = 0, offset: int = 0, **fields: int) -> None:
    """Make EXTRA slot 1: shared memory at `address`, and private memory if there is a guest_memfd `fd`."""
    region = c.kvm_userspace_memory_region2(
        slot=1, flags=flags, guest_phys_addr=EXTRA, memory_size=EXTRA_BYTES, userspace_addr=address
    )
    if fd >= 0:
        region.flags |= c.KVM_MEM_GUEST_MEMFD
        region.guest_memfd, region.guest_memfd_offset = fd, offset
    for name, value in fields.items():
        setattr(region, name, value)
    vm.set_user_memory_region2(region)


def refused(number: int, call: Callable[[], object]) -> None:
    """Assert that a call fails so."""
    with pytest.raises(OSError, match="KVM_") as error:
        call()
    assert error.value.errno == number


def output(exit_: Exit) -> int:
    """The byte that the guest has written to a port."""
    assert isinstance(exit_, Io), exit_
    return bytes(exit_.data)[0]


def punch(fd: int, offset: int, size_bytes: int) -> None:
    """Give memory of a file back."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size_bytes)):
        raise OSError(ctypes.get_errno(), "fallocate")


@pytest.mark.backs("KVM_CREATE_GUEST_MEMFD")
def test_guest_memfd(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """It is a file of that size, which can be neither read nor mapped."""
    needs("KVM_CAP_GUEST_MEMFD")
    with kvm.create_vm() as vm:
        fd = vm.create_guest_memfd(0x10000)
        try:
            assert os.fstat(fd).st_size == 0x10000
            with pytest.raises(OSError):
                os.read(fd, 1)
            with pytest.raises(OSError):
                mmap.mmap(fd, 0x10000)
        finally:
            os.close(fd)
        for size, flags in ((0, 0), (0x1001, 0), (1 << 63, 0), (0x1000, 1 << 40)):
            refused(errno.EINVAL, lambda size=size, flags=flags: vm.create_guest_memfd(size, flags))  # type: ignore[misc]


@pytest.mark.usefixtures("memfds")
def test_guest_memfd_as_all_memory(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """One that user space can map is the slot's memory, for the guest and for user space."""
    if needs("KVM_CAP_GUEST_MEMFD_FLAGS") & (MMAP | INIT_SHARED) != MMAP | INIT_SHARED:
        pytest.skip(f"{kvm.engine}: no GUEST_MEMFD_FLAG_INIT_SHARED")
    code = f"mov ebx, {EXTRA + PAGE}\nmov eax, [rbx]\nout 0x10, al\nmov byte ptr [rbx + 1], 0x99\nout 0x11, al\nhlt"
    with Guest(kvm, code) as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES, MMAP | INIT_SHARED)
        try:
            with mmap.mmap(fd, EXTRA_BYTES) as memory:
                memory[PAGE] = 0x42
                address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                add(guest.vm, address, fd)
                assert output(guest.run()) == 0x42
                assert isinstance(guest.run(), Io)
                assert memory[PAGE : PAGE + 2] == b"\x42\x99"
                guest.vm.set_user_memory_region(1, EXTRA, 0, 0)
        finally:
            os.close(fd)


@pytest.mark.usefixtures("memfds")
def test_guest_memfd_without_private_memory(kvm: Kvm, shared: tuple[mmap.mmap, int]) -> None:
    """Where no memory is private, what user space has mapped is the slot's memory all the same."""
    memory, address = shared
    with Guest(kvm, f"mov eax, [{EXTRA}]\nout 0x10, al\nhlt") as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES)
        try:
            add(guest.vm, address, fd)
            memory[0] = 0x42
            assert output(guest.run()) == 0x42
        finally:
            os.close(fd)


@pytest.mark.usefixtures("memfds")
def test_bindings_that_are_refused(kvm: Kvm, shared: tuple[mmap.mmap, int]) -> None:
    _, address = shared
    with kvm.create_vm() as vm, kvm.create_vm() as other:
        fds = [
            vm.create_guest_memfd(2 * EXTRA_BYTES),
            other.create_guest_memfd(EXTRA_BYTES),
            os.memfd_create("plain"),
        ]
        try:
            fd, foreign, plain = fds
            refused(errno.EBADF, lambda: add(vm, address, 1 << 20))
            refused(errno.EINVAL, lambda: add(vm, address, foreign))
            refused(errno.EINVAL, lambda: add(vm, address, plain))
            refused(errno.EINVAL, lambda: add(vm, address, fd, offset=1))
            refused(errno.EINVAL, lambda: add(vm, address, fd, offset=EXTRA_BYTES + PAGE))
            refused(errno.EINVAL, lambda: add(vm, address, fd, offset=(1 << 64) - PAGE))
            refused(errno.EINVAL, lambda: add(vm, address, fd, flags=c.KVM_MEM_LOG_DIRTY_PAGES))
            refused(errno.EINVAL, lambda: add(vm, address, fd, flags=c.KVM_MEM_READONLY))
            refused(
                errno.EINVAL,
                lambda: vm.set_user_memory_region(1, EXTRA, EXTRA_BYTES, address, c.KVM_MEM_GUEST_MEMFD),
            )
            add(vm, address, fd, offset=PAGE)
            # It can only be deleted, and nobody else has that part meanwhile.
            refused(errno.EINVAL, lambda: add(vm, address, fd, offset=PAGE))
            refused(errno.EINVAL, lambda: add(vm, address, fd, offset=PAGE, guest_phys_addr=2 * EXTRA))
            refused(errno.EEXIST, lambda: add(vm, address, fd, slot=2))
            refused(errno.EINVAL, lambda: add(vm, address, fd, slot=2, guest_phys_addr=2 * EXTRA))
            add(
                vm,
                address,
                fd,
                slot=2,
                guest_phys_addr=2 * EXTRA,
                offset=PAGE + EXTRA_BYTES,
                memory_size=3 * PAGE,
            )
            add(vm, address, memory_size=0)
            add(vm, address, fd)
        finally:
            for fd in fds:
                os.close(fd)


@pytest.mark.backs("KVM_SET_MEMORY_ATTRIBUTES")
def test_memory_attributes(kvm: Kvm, protected: int) -> None:
    """Memory becomes private where the VM knows private memory."""
    assert kvm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == PRIVATE
    with kvm.create_vm(protected) as vm:
        assert vm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == PRIVATE
        vm.set_memory_attributes(0x1000, 0x1000, PRIVATE)
        vm.set_memory_attributes(0, (1 << 64) - PAGE, 0)
        for address, size, attributes, flags in (
            (0x1001, 0x1000, PRIVATE, 0),
            (0x1000, 0x1001, PRIVATE, 0),
            (0x1000, 0, PRIVATE, 0),
            ((1 << 64) - PAGE, 2 * PAGE, PRIVATE, 0),
            (0x1000, 0x1000, PRIVATE | 1, 0),
            (0x1000, 0x1000, PRIVATE, 1),
        ):
            with pytest.raises(OSError, match="KVM_SET_MEMORY_ATTRIBUTES") as error:
                vm.set_memory_attributes(address, size, attributes, flags)
            assert error.value.errno == errno.EINVAL
    with kvm.create_vm() as vm:
        assert vm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == 0
        vm.set_memory_attributes(0x1000, 0x1000, 0)
        refused(errno.EINVAL, lambda: vm.set_memory_attributes(0x1000, 0x1000, PRIVATE))


def test_vm_types(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """With private memory there is no address space of system management mode."""
    refused(errno.EINVAL, lambda: kvm.create_vm(63))
    with kvm.create_vm(protected) as vm:
        assert vm.check_extension(KVM_CAP_MULTI_ADDRESS_SPACE) in (0, 1)
        refused(errno.EINVAL, lambda: vm.set_user_memory_region(1 << 16, EXTRA, EXTRA_BYTES, shared[1]))


COUNT = f"mov ebx, {EXTRA + PAGE}\nagain:\ninc byte ptr [rbx]\nmov al, [rbx]\nout 0x10, al\njmp again"


def test_private_and_shared(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """An address has two memories, and the attribute says which the guest has. What it doesn't have, keeps."""
    memory, address = shared
    with Guest(kvm, COUNT, vm_type=protected) as guest:
        fd = guest.vm.create_guest_memfd(2 * EXTRA_BYTES)
        try:
            add(guest.vm, address, fd, offset=EXTRA_BYTES)
            memory[PAGE] = 5
            assert output(guest.run()) == 6
            guest.vm.set_memory_attributes(EXTRA + PAGE, PAGE, PRIVATE)
            assert [output(guest.run()) for _ in range(2)] == [1, 2]
            assert memory[PAGE] == 6
            guest.vm.set_memory_attributes(EXTRA, EXTRA_BYTES, 0)
            assert output(guest.run()) == 7 == memory[PAGE]
            guest.vm.set_memory_attributes(0, 1 << 40, PRIVATE)
            guest.vm.set_memory_attributes(0, MEMORY_BYTES, 0)
            assert output(guest.run()) == 3
            guest.vm.set_memory_attributes(EXTRA, 1 << 40, 0)
            punch(fd, EXTRA_BYTES, EXTRA_BYTES)
            guest.vm.set_memory_attributes(EXTRA + PAGE, 2 * PAGE, PRIVATE)
            assert output(guest.run()) == 1
        finally:
            os.close(fd)


def test_conversion_under_a_running_vcpu(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """No write is lost, nor made twice, while the memory changes under it."""
    memory, address = shared
    count = 1_000_000
    code = f"""
        mov ebx, {EXTRA + PAGE}
        mov ecx, {count}
    again:
        inc qword ptr [rbx]
        dec ecx
        jnz again
        out 0x10, al
        mov rdx, [rbx]
        out 0x11, al
    """
    with Guest(kvm, code, vm_type=protected) as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES)
        done = threading.Event()
        conversions = 0

        def convert() -> None:
            nonlocal conversions
            while not done.wait(1e-4):
                conversions += 1
                guest.vm.set_memory_attributes(EXTRA, EXTRA_BYTES, PRIVATE if conversions % 2 else 0)

        thread = threading.Thread(target=convert)
        try:
            add(guest.vm, address, fd)
            thread.start()
            try:
                assert isinstance(guest.run(), Io)
            finally:
                done.set()
                thread.join()
            guest.vm.set_memory_attributes(EXTRA, EXTRA_BYTES, PRIVATE)
            assert isinstance(guest.run(), Io)
            in_shared = int.from_bytes(memory[PAGE : PAGE + 8], "little")
            assert in_shared + guest.vcpu.get_regs().rdx == count
        finally:
            os.close(fd)


ACCESSES = {
    "read": "mov eax, [rbx]",
    "write": "mov [rbx], eax",
    "add": "lock add [rbx], eax",
    "string": "mov rdi, rbx\nmov ecx, 0x10\nrep stosb",
    "across": "mov [rbx - 4], rax",
    "code": "jmp rbx",
    "page table": "mov cr3, rbx",
}


@pytest.mark.parametrize("access", list(ACCESSES))
@pytest.mark.parametrize("slot", [True, False], ids=["slot", "no slot"])
def test_private_memory_that_is_not_there(
    kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int], access: str, slot: bool
) -> None:
    """A private address without a guest_memfd: each access exits with KVM_EXIT_MEMORY_FAULT until it is shared."""
    memory, address = shared
    if not slot and access in ("code", "page table", "across", "add", "string"):
        pytest.skip(f"{kvm.engine}: nothing but memory can hold what this needs afterwards")
    with Guest(
        kvm, f"mov ebx, {EXTRA + PAGE}\nout 0x10, al\n{ACCESSES[access]}\nout 0x11, al", vm_type=protected
    ) as guest:
        if slot:
            add(guest.vm, address)
            memory[PAGE : PAGE + 2] = b"\xe6\x11"  # out 0x11, al
            if access == "page table":
                memory[PAGE : 2 * PAGE] = guest.memory.read(TABLES, PAGE)
        assert isinstance(guest.run(), Io)
        guest.vm.set_memory_attributes(EXTRA + PAGE, PAGE, PRIVATE)
        before = memory[:]
        for _ in range(2):
            assert guest.run() == MemoryFault(c.KVM_MEMORY_EXIT_FLAG_PRIVATE, EXTRA + PAGE, PAGE)
        assert memory[:] == before
        guest.vm.set_memory_attributes(EXTRA + PAGE, PAGE, 0)
        exit_ = guest.run()
        if slot:
            assert isinstance(exit_, Io) and exit_.port == 0x11
        else:
            assert type(exit_).__name__ == "Mmio"


def test_code_in_private_memory(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """Code is fetched from the memory that the address has."""
    memory, address = shared
    code = f"""
        mov ebx, {EXTRA}
        mov dword ptr [rbx], 0x00c302b0     # mov al, 2; ret
    again:
        call rbx
        out 0x10, al
        jmp again
    """
    with Guest(kvm, code, vm_type=protected) as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES)
        try:
            add(guest.vm, address, fd)
            memory[0:3] = b"\xb0\x01\xc3"
            guest.vm.set_memory_attributes(EXTRA, PAGE, PRIVATE)
            values = []
            for attributes in (0, 0, PRIVATE, 0, PRIVATE):
                values.append(output(guest.run()))
                guest.vm.set_memory_attributes(EXTRA, PAGE, attributes)
            assert values == [2, 1, 1, 2, 1]
        finally:
            os.close(fd)


def test_page_tables_in_private_memory(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """The processor walks tables that user space can't see, and marks them as accessed."""
    memory, address = shared
    code = f"""
        mov esi, {TABLES}
        mov edi, {EXTRA}
        mov ecx, {PAGE}
        rep movsb
        mov eax, {EXTRA}
        mov cr3, rax
        mov eax, [{EXTRA}]
        out 0x10, al
    """
    with Guest(kvm, code, vm_type=protected) as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES)
        try:
            add(guest.vm, address, fd)
            guest.vm.set_memory_attributes(EXTRA, EXTRA_BYTES, PRIVATE)
            assert output(guest.run()) & 0x23 == 0x23
            assert not any(memory[:])
            if kvm.engine == "soft":  # the kernel's has no address in this process
                assert guest.vcpu.walk(0x1234).gpa == 0x1234
        finally:
            os.close(fd)


def test_dirty_log_beside_private_memory(kvm: Kvm, protected: int, shared: tuple[mmap.mmap, int]) -> None:
    """Pages of the log are those of the slot, whatever lies between them."""
    _, address = shared
    code = f"mov byte ptr [{EXTRA}], 1\nmov byte ptr [{EXTRA + 3 * PAGE}], 1\nout 0x10, al"
    with Guest(kvm, code, vm_type=protected) as guest:
        add(guest.vm, address, flags=c.KVM_MEM_LOG_DIRTY_PAGES)
        guest.vm.set_memory_attributes(EXTRA + PAGE, PAGE, PRIVATE)
        assert isinstance(guest.run(), Io)
        assert guest.vm.get_dirty_log(1)[0] == 0b1001


def test_pre_fault_private_memory(
    kvm: Kvm, protected: int, needs: Callable[[str], int], shared: tuple[mmap.mmap, int]
) -> None:
    needs("KVM_CAP_PRE_FAULT_MEMORY")
    _, address = shared
    with Guest(kvm, "hlt", vm_type=protected) as guest:
        fd = guest.vm.create_guest_memfd(EXTRA_BYTES)
        try:
            add(guest.vm, address, fd)
            guest.vm.set_memory_attributes(EXTRA, 2 * PAGE, PRIVATE)
            assert guest.vcpu.pre_fault_memory(EXTRA, EXTRA_BYTES) == 0
            guest.vm.set_memory_attributes(0x50000, PAGE, PRIVATE)
            refused(errno.EFAULT, lambda: guest.vcpu.pre_fault_memory(0x50000, PAGE))
            assert guest.vcpu.pre_fault_memory(0x4F000, 2 * PAGE) == PAGE
        finally:
            os.close(fd)
