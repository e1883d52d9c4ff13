"""Loads and stores of host memory that the guest sees in order, which Python's own are not known to be.

Addresses are those of `MemoryMap.host_address`, aligned to the size. Loads acquire, stores release, `fence` is a full barrier.
"""

from kvmkit._engine import fence, load_u16, load_u32, load_u64, store_u16, store_u32, store_u64

__all__ = ["fence", "load_u16", "load_u32", "load_u64", "store_u16", "store_u32", "store_u64"]
