import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmkit.devices import pl031 as p
from kvmkit.devices.pl031 import Pl031


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.75

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_ids() -> None:
    """What drivers/amba/bus.c puts together and rtc-pl031.c matches: ARM's part 0x031."""
    rtc = Pl031()
    assert sum(rtc.read(p.ID + 4 * i, 4) << 8 * i for i in range(4)) & 0x000FFFFF == 0x00041031
    assert sum(rtc.read(p.ID + 16 + 4 * i, 4) << 8 * i for i in range(4)) == 0xB105F00D


def test_time_is_the_host_s(clock: Clock) -> None:
    rtc = Pl031(clock)
    assert rtc.read(p.DR, 4) == 1_700_000_000
    clock.now_s += 61
    assert rtc.read(p.DR, 4) == 1_700_000_061
    assert rtc.read(p.CR, 4) == 1


def test_the_guest_sets_it(clock: Clock) -> None:
    rtc = Pl031(clock)
    rtc.write(p.LR, 4, 100)
    assert (rtc.read(p.DR, 4), rtc.read(p.LR, 4)) == (100, 100)
    clock.now_s += 5
    assert rtc.read(p.DR, 4) == 105


def test_it_wraps_after_32_bits(clock: Clock) -> None:
    rtc = Pl031(clock)
    rtc.write(p.LR, 4, 0xFFFFFFFF)
    clock.now_s += 2
    assert rtc.read(p.DR, 4) == 1


def test_the_match_register_never_matches(clock: Clock) -> None:
    rtc = Pl031(clock)
    rtc.write(p.MR, 4, rtc.read(p.DR, 4))
    rtc.write(p.IMSC, 4, 1)
    assert (rtc.read(p.MR, 4), rtc.read(p.IMSC, 4)) == (1_700_000_000, 1)
    assert (rtc.read(p.RIS, 4), rtc.read(p.MIS, 4)) == (0, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0xFFF), st.integers(0, (1 << 64) - 1)), max_size=40))
def test_any_accesses(accesses: list[tuple[bool, int, int]]) -> None:
    rtc = Pl031()
    for is_write, offset, value in accesses:
        if is_write:
            rtc.write(offset, 4, value)
        else:
            assert 0 <= rtc.read(offset, 4) <= 0xFFFFFFFF
