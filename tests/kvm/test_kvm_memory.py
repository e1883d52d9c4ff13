"""Guest memory beyond plain slots: KVM_SET_USER_MEMORY_REGION2, pre-faulting, memory that is gone."""

import ctypes
import errno
import mmap
from collections.abc import Callable

import pytest

from kvmkit.kvm import Kvm
from kvmkit.kvm.exits import Hlt, Io, MemoryFault
from kvmkit.testing import MEMORY_BYTES, Guest
from kvmkit.uapi.common import kvm_userspace_memory_region2

from .evidence import module_of_kvm

EXTRA = 0x200000
PROT_NONE = 0


@pytest.mark.backs("KVM_SET_USER_MEMORY_REGION2")
def test_region2(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Without a guest_memfd it is KVM_SET_USER_MEMORY_REGION: create, move, delete."""
    needs("KVM_CAP_USER_MEMORY2")
    with Guest(kvm, f"mov eax, [{EXTRA}]\nout 0x10, al\nmov eax, [{EXTRA + 0x1000}]\nhlt") as guest:
        guest.map.write(0x50000, b"EXTRA")
        region = kvm_userspace_memory_region2(
            slot=1, guest_phys_addr=EXTRA, memory_size=0x1000, userspace_addr=guest.memory.address + 0x50000
        )
        guest.vm.set_user_memory_region2(region)
        assert isinstance(guest.run(), Io)
        assert guest.vcpu.get_regs().rax == int.from_bytes(b"EXTR", "little")
        region.guest_phys_addr += 0x1000
        guest.vm.set_user_memory_region2(region)
        assert guest.run() == Hlt()
        region.memory_size = 0
        guest.vm.set_user_memory_region2(region)
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as error:
            guest.vm.set_user_memory_region2(region)
        assert error.value.errno == errno.EINVAL


@pytest.mark.backs("KVM_PRE_FAULT_MEMORY")
def test_pre_fault(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs("KVM_CAP_PRE_FAULT_MEMORY")
    with Guest(kvm, "hlt") as guest:
        assert guest.vcpu.pre_fault_memory(0x10000, 0x4000) == 0
        for gpa, size, flags, number in (
            (0x10800, 0x1000, 0, errno.EINVAL),
            (0x10000, 0x800, 0, errno.EINVAL),
            (0x10000, 0, 0, errno.EINVAL),
            (0x10000, 0x1000, 1, errno.EINVAL),
            (MEMORY_BYTES, 0x1000, 0, errno.ENOENT),
        ):
            with pytest.raises(OSError, match="KVM_PRE_FAULT_MEMORY") as error:
                guest.vcpu.pre_fault_memory(gpa, size, flags)
            assert error.value.errno == number
        assert guest.run() == Hlt()


def mprotect(address: int, size_bytes: int, protection: int) -> None:
    """Change a mapping's protection."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def needs_memory_faults(kvm: Kvm, needs: Callable[[str], int]) -> None:
    """Skip the test where KVM has no memory-fault exits."""
    needs("KVM_CAP_MEMORY_FAULT_INFO")
    if kvm.engine == "linux" and module_of_kvm() == "kvm-pvm":
        pytest.skip("linux: kvm_pvm emulates this code, and to KVM's emulator memory that is gone is MMIO")


@pytest.mark.parametrize("protection", [PROT_NONE, mmap.PROT_READ], ids=["gone", "read-only"])
@pytest.mark.parametrize(
    "access", ["mov [rbx], eax", "lock add [rbx], eax", "mov rdi, rbx\nmov ecx, 0x100\nrep stosb"]
)
def test_memory_fault(kvm: Kvm, needs: Callable[[str], int], access: str, protection: int) -> None:
    """KVM_RUN fails with EFAULT where the host has no memory behind a slot, names the page, and goes on once it has."""
    needs_memory_faults(kvm, needs)
    with mmap.mmap(-1, 0x4000) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        code = f"mov ebx, {EXTRA + 0x2010}\nmov ecx, [rbx]\nout 0x10, al\n{access}\nhlt"
        with Guest(kvm, code) as guest:
            guest.vm.set_user_memory_region(1, EXTRA, 0x4000, address)
            assert isinstance(guest.run(), Io)
            mprotect(address + 0x2000, 0x1000, protection)
            for _ in range(2):
                try:
                    exit_ = guest.run()
                except OSError as error:
                    # Before Linux 6.13, KVM gives the page for private memory alone, the documentation notwithstanding.
                    assert kvm.engine == "linux" and error.errno == errno.EFAULT
                else:
                    assert exit_ == MemoryFault(0, EXTRA + 0x2000, 0x1000)
            mprotect(address + 0x2000, 0x1000, mmap.PROT_READ | mmap.PROT_WRITE)
            assert guest.run() == Hlt()
            guest.vm.set_user_memory_region(1, EXTRA, 0, address)


def test_memory_fault_of_code(kvm: Kvm, needs: Callable[[str], int]) -> None:
    needs_memory_faults(kvm, needs)
    with mmap.mmap(-1, 0x1000) as memory:
        memory[0] = 0xF4  # hlt
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with Guest(kvm, f"mov eax, {EXTRA}\njmp rax") as guest:
            guest.vm.set_user_memory_region(1, EXTRA, 0x1000, address)
            mprotect(address, 0x1000, PROT_NONE)
            try:
                assert guest.run() == MemoryFault(0, EXTRA, 0x1000)
            except OSError as error:
                assert kvm.engine == "linux" and error.errno == errno.EFAULT
            mprotect(address, 0x1000, mmap.PROT_READ | mmap.PROT_WRITE)
            assert guest.run() == Hlt()
            guest.vm.set_user_memory_region(1, EXTRA, 0, address)
