"""A vCPU that stands still, for tests of what only looks at one."""

from kvmkit.kvm import GuestMemory
from kvmkit.kvm.contract import Vcpu
from kvmkit.kvm.exits import Exit
from kvmkit.kvm.memory import MemorySlot


class StillVcpu(Vcpu):
    """One with `memory` at 0."""

    closed = False

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.slots = [MemorySlot(0, 0, memory.size_bytes, memory.address, 0)]

    def run(self) -> Exit:
        raise AssertionError

    def kick(self) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError

    @property
    def memory_slots(self) -> list[MemorySlot]:
        return self.slots

    def put(self, gpa: int, value: int, size_bytes: int = 8) -> None:
        self.memory.write(gpa, value.to_bytes(size_bytes, "little"))
