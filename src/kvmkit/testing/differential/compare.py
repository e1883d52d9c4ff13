"""Comparing the outcomes of a case on the software engine and on a reference."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import MODES, VM, Case, make
from kvmkit.testing.differential.known import RF, Differences, Rule
from kvmkit.testing.differential.run import ERROR_CODES, Outcome


def before_delivery(outcome: Outcome) -> Outcome:
    """The state in front of the exception or interrupt that ended it, read back from its frame."""
    if outcome.vector is None:
        return outcome
    v = dict(outcome.values)
    at, length = outcome.frame
    long, protected = bool(v["efer"] & 1 << 10), bool(v["cr0"] & 1)
    size = 8 if long else 4 if protected else 2
    error = protected and outcome.vector in ERROR_CODES
    words = [int.from_bytes(outcome.memory[at + n * size :][:size], "little") for n in range(10)]
    v["error code"] = words.pop(0) & 0xFFFFFFFF if error else 0
    v["rip"], v["cs"], v["rflags"] = words[0], words[1] & 0xFFFF, words[2]
    if long or (protected and (v["cs"] & 3 or v["rflags"] & VM)):
        v["rsp"], v["ss"] = words[3], words[4] & 0xFFFF
        length = size * (5 + error)
    else:
        v["rsp"] += length
    hidden = ["cs.", "ss."]
    if protected and not long and v["rflags"] & VM:
        length = size * (9 + error)
        v["es"], v["ds"], v["fs"], v["gs"] = (word & 0xFFFF for word in words[5:9])
        hidden += ["ds.", "es.", "fs.", "gs."]
    for name in list(v):
        if name.startswith(tuple(hidden)):
            del v[name]
    return replace(outcome, values=v, frame=(at, length))


def differences(ours: Outcome, theirs: Outcome) -> Differences:
    """Values that both have and that are not equal, and bytes of memory but for the frame of an exception."""
    found = {}
    if ours.end != theirs.end:
        found[f"end: {ours.end}, reference: {theirs.end}"] = (0, 0)
    # A fault is told of with RF; flags that a block overwrites unread are not kept for a frame (docs/engine.md), nor by Unicorn
    # at an invalid instruction: there it even shows bits 3 and 5.
    ignored = {"rflags": RF | (c.ARITHMETIC | 0x28 if ours.vector is not None else 0)}
    for name, value in ours.values.items():
        other = theirs.values.get(name, value)
        if (value ^ other) & ~ignored.get(name, 0):
            found[name] = (value, other)
    if ours.memory and theirs.memory and ours.memory != theirs.memory:
        at, length = ours.frame
        for block in range(0, c.MEMORY_BYTES, 256):
            if ours.memory[block : block + 256] == theirs.memory[block : block + 256]:
                continue
            for n in range(block, block + 256):
                a, b = ours.memory[n], theirs.memory[n]
                if a != b and not at <= n < at + length:
                    found[f"memory {n:#x}"] = (a, b)
    return found


class Comparison:
    """Runs cases on both, and counts what came of them."""

    def __init__(
        self,
        engine: Callable[[Case], Outcome],
        reference: Callable[[Case], Outcome],
        rules: tuple[Rule, ...],
    ) -> None:
        self.engine, self.reference, self.rules = engine, reference, rules
        self.cases = 0
        self.explained: Counter[str] = Counter()
        """By the name of the rule."""
        self.ends: Counter[str] = Counter()
        """How the cases ended that were compared, and those that were not."""

    def differences(self, case: Case) -> Differences:
        """What differs and no rule explains."""
        ours = self.engine(case)
        theirs = self.reference(case) if ours.useful else Outcome("")
        if not (ours.useful and theirs.useful):
            self.ends["not compared"] += 1
            return {}
        self.ends[ours.end] += 1
        ours = before_delivery(ours)
        theirs = before_delivery(theirs) if theirs.frame != (0, 0) else theirs
        found = differences(ours, theirs)
        for rule in self.rules:
            if not found:
                break
            if explained := rule.explains(case, ours, theirs, found):
                self.explained[rule.name] += 1
                found = {name: values for name, values in found.items() if name not in explained}
        return found

    def run(self, seed: int, modes: tuple[str, ...] = tuple(MODES)) -> str | None:
        """Compare case `seed`; its shortest form and what differs, if something does."""
        self.cases += 1
        case = make(seed, modes)
        if not self.differences(case):
            return None
        case = self._shortest(case)
        found = [
            f"  {name}: {a:#x}, reference {b:#x}" if a != b else f"  {name}"
            for name, (a, b) in self.differences(case).items()
        ]
        return "\n".join([case.listing(), *found[:12]])

    def _shortest(self, case: Case) -> Case:
        n = 0
        while n < len(case.items):
            shorter = case.only(case.items[:n] + case.items[n + 1 :])
            if self.differences(shorter):
                case = shorter
            else:
                n += 1
        return case
