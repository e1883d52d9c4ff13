"""A few of the hostile guests that `bench/hostile.py` runs by the thousand."""

from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.testing import hostile

pytestmark = pytest.mark.skipif(
    find_spec("kvmkit._engine") is None, reason="the native module kvmkit._engine isn't built"
)


@pytest.fixture(scope="module")
def arena() -> hostile.Arena:
    return hostile.Arena()


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_hostile_guests_return_and_touch_nothing_else(arena: hostile.Arena, first: int) -> None:
    with kvmkit.kvm.open("soft") as system:
        for seed in range(first, first + 20):
            outcome = hostile.run(system, arena, seed)
            assert outcome.exits >= 1 and outcome.seed == seed


def test_touched_canary_is_noticed() -> None:
    block = hostile.GuardedBlock(4096)
    block.check()
    block._canaries[1][5] ^= 1
    with pytest.raises(hostile.CanaryError, match="byte 0x5 of the canary after a block of 0x1000 bytes"):
        block.check()


def test_guard_pages_are_inaccessible() -> None:
    block = hostile.GuardedBlock(4096)
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps]
    for address in (block.address - 1, block.address + 4096):
        modes = [mode for span, mode, *_ in ranges if _holds(span, address)]
        assert modes == ["---p"]


def _holds(span: str, address: int) -> bool:
    low, high = (int(bound, 16) for bound in span.split("-"))
    return low <= address < high
