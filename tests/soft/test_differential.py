"""Generated machine states and code on the software engine and on another emulator: the same outcome.

`bench/soak.py` runs them by the hundred thousand.
"""

from collections.abc import Iterator

import pytest

import kvmkit.kvm
from kvmkit.testing.assembler import assemble
from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import MODES, make
from kvmkit.testing.differential.code import Item
from kvmkit.testing.differential.compare import Comparison, before_delivery
from kvmkit.testing.differential.known import UNICORN
from kvmkit.testing.differential.run import Machine

pytest.importorskip("kvmkit._engine")
CASES = 300


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with kvmkit.kvm.open("soft") as kvm:
        machine = Machine(kvm)
        yield machine
        machine.close()


@pytest.fixture(scope="module")
def unicorn(machine: Machine) -> Iterator[Comparison]:
    pytest.importorskip("unicorn")
    from kvmkit.testing.differential.on_unicorn import Unicorn

    unicorn = Unicorn()
    yield Comparison(machine.run, unicorn.run, UNICORN)
    unicorn.close()


@pytest.mark.parametrize("mode", MODES)
def test_cases_end_as_on_unicorn(unicorn: Comparison, mode: str) -> None:
    for seed in range(CASES):
        difference = unicorn.run(seed, (mode,))
        assert difference is None, difference
    assert unicorn.cases >= CASES
    assert sum(unicorn.ends.values()) - unicorn.ends["not compared"] > CASES * 0.7


def test_a_difference_is_found_and_made_small(machine: Machine) -> None:
    """A reference that computes INC wrong is caught, and only that instruction is left of the case."""

    def wrong(case: object) -> object:
        outcome = machine.run(case)  # type: ignore[arg-type]
        if any(item.source.startswith("inc") for item in case.items):  # type: ignore[attr-defined]
            outcome.values["rax"] ^= 1
        return outcome

    comparison = Comparison(machine.run, wrong, ())  # type: ignore[arg-type]
    reports = [report for seed in range(150) if (report := comparison.run(seed, ("long",)))]
    assert reports
    for report in reports:
        code = [line for line in report.splitlines() if line.startswith("  0x")]
        assert len(code) == 1 and " inc " in code[0]


def test_cases_of_a_seed_are_always_the_same() -> None:
    a, b = make(7), make(7)
    assert a.image() == b.image() and a.registers == b.registers and a.segments == b.segments


def test_frames_are_read_back(machine: Machine) -> None:
    """UD2 in any mode: the frame tells of the state that the case started with."""
    for mode in MODES:
        case = make(3, (mode,)).only((Item("ud2", "other", b"\x0f\x0b"),))
        case.registers["rflags"] &= ~(0x100 | 0x10000)
        outcome = before_delivery(machine.run(case))
        assert outcome.vector == 6
        for name in ("rax", "rsp", "rip", "rflags"):
            ignored = 1 << 16 if name == "rflags" else 0
            assert outcome.values[name] & ~ignored == case.registers[name], (mode, name)
        assert outcome.values["cs"] == case.segments["cs"].selector


@pytest.mark.parametrize("source", ("jmp rax", "call rax", "push rax; ret", "push rax; ret 8"))
def test_a_jump_to_nowhere_faults_itself(machine: Machine, source: str) -> None:
    """What leads to an address that isn't canonical is #GP there, with the stack as it was (SDM 2, JMP, CALL, RET)."""
    text = f"mov rax, 0x1234567812345678; {source}"
    case = make(3, ("long",)).only((Item(text, "call", assemble(text.replace(";", "\n"))),))
    rip = c.CODE + 0x10
    case.registers.update(rip=rip, rflags=2, rsp=c.USER_STACK + 0x800)
    outcome = before_delivery(machine.run(case))
    pushed = 8 * source.count("push")
    assert (outcome.vector, outcome.values["error code"]) == (13, 0)
    assert outcome.values["rip"] == rip + 10 + pushed // 8
    assert outcome.values["rsp"] == c.USER_STACK + 0x800 - pushed
