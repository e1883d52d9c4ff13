"""Reading KVM's binary statistics, which `Vm.get_stats_fd` and `Vcpu.get_stats_fd` give (Documentation/virt/kvm/api.rst, 4.132)."""

import ctypes
import os
from dataclasses import dataclass

from kvmkit.uapi import common as c

_TYPES = {
    c.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    c.KVM_STATS_TYPE_INSTANT: "instant",
    c.KVM_STATS_TYPE_PEAK: "peak",
    c.KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    c.KVM_STATS_TYPE_LOG_HIST: "logarithmic histogram",
}
_UNITS = {
    c.KVM_STATS_UNIT_NONE: "",
    c.KVM_STATS_UNIT_BYTES: "bytes",
    c.KVM_STATS_UNIT_SECONDS: "seconds",
    c.KVM_STATS_UNIT_CYCLES: "cycles",
    c.KVM_STATS_UNIT_BOOLEAN: "boolean",
}


@dataclass(frozen=True)
class Stat:
    """One statistic."""

    name: str
    values: tuple[int, ...]
    """One number, or a histogram's buckets. They count `base` ** `exponent` `unit`s."""
    type: str
    unit: str
    base: int
    exponent: int
    bucket_size: int
    """Of a linear histogram; else 0."""

    @property
    def value(self) -> int:
        """The number, where there is one only."""
        (value,) = self.values
        return value


@dataclass(frozen=True)
class Stats:
    """All statistics of a VM or a vCPU."""

    id: str
    """What KVM calls whom they are of, e.g. ``kvm-1234/vcpu-0``."""
    stats: dict[str, Stat]

    def __getitem__(self, name: str) -> Stat:
        """Return a statistic by its name."""
        return self.stats[name]


def read_stats(fd: int) -> Stats:
    """Read the statistics behind `fd` as they are now."""
    header = c.kvm_stats_header.from_buffer_copy(_pread(fd, ctypes.sizeof(c.kvm_stats_header), 0))
    head_bytes = ctypes.sizeof(c.kvm_stats_desc)
    stride = head_bytes + header.name_size
    descriptors = _pread(fd, header.num_desc * stride, header.desc_offset)
    found = {}
    for at in range(0, len(descriptors), stride):
        descriptor = c.kvm_stats_desc.from_buffer_copy(descriptors, at)
        name = _string(descriptors[at + head_bytes : at + stride])
        data = _pread(fd, descriptor.size * 8, header.data_offset + descriptor.offset)
        found[name] = Stat(
            name,
            tuple(memoryview(data).cast("Q")),
            _TYPES.get(descriptor.flags & c.KVM_STATS_TYPE_MASK, "unknown"),
            _UNITS.get(descriptor.flags & c.KVM_STATS_UNIT_MASK, "unknown"),
            2 if descriptor.flags & c.KVM_STATS_BASE_MASK == c.KVM_STATS_BASE_POW2 else 10,
            descriptor.exponent,
            descriptor.bucket_size,
        )
    return Stats(_string(_pread(fd, header.name_size, header.id_offset)), found)


def _string(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


def _pread(fd: int, size_bytes: int, offset: int) -> bytes:
    data = os.pread(fd, size_bytes, offset)
    if len(data) != size_bytes:
        raise ValueError(f"statistics end after {len(data)} of {size_bytes} bytes at {offset}")
    return data
