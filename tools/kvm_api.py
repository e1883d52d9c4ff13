"""Write ``docs/kvm-api.md``: every ioctl, its method, and the test that shows it in each place where KVM was run.

    tools/kvm_api.py            write it          tools/kvm_api.py --check     fail if it isn't what would be written

It is made of the table in `kvmkit.uapi.ioctls` and of the evidence in ``docs/kvm-api/``, which the tests write themselves:
``KVMKIT_RECORD_KVM_API=write pytest tests/kvm`` here, ``testbed/bed.py BED --record`` in a test bed.
"""

import argparse
import sys
from pathlib import Path

from kvmkit.kvm import exits
from kvmkit.uapi import common
from kvmkit.uapi.ioctls import IOCTLS, Ioctl

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kvm-api.md"
CLASSES = {"system": "Kvm", "vm": "Vm", "vcpu": "Vcpu", "device": "Device"}

PLACES = {
    # file in docs/kvm-api → heading, architecture
    "kvm-pvm": ("`/dev/kvm`, kvm-pvm", "x86"),
    "kvm-amd": ("kvm-amd", "x86"),
    "kvm-arm64": ("kvm-arm64", "arm64"),
    "soft": ("software engine", "x86"),
}

HEAD = """\
# The KVM interface

Written by `tools/kvm_api.py`; a test holds it to the table `kvmkit.uapi.ioctls` and to the evidence in `docs/kvm-api/`.

All ioctls of Linux 6.18 that x86-64 and arm64 have are methods of the classes in `kvmkit.kvm`. A cell names the test (in
`tests/kvm/`, without its parameters) that called the ioctl with success there and checked what it did. *refused* names one
that saw the kernel refuse it, for want of hardware. *no …* says what is missing there, and so for whom the test was skipped.
A dash: another architecture's.

- **`/dev/kvm`, kvm-pvm**: the machine that kvmkit is developed on, Linux 6.18, where KVM runs without hardware support.
- **kvm-amd**, **kvm-arm64**: Linux 6.12's, in machines that QEMU emulates (`make testbed-amd`, `make testbed-arm64`).
- **software engine**: kvmkit's own.
"""


def evidence(place: str) -> dict[str, tuple[str, str]]:
    """Return kind and text for each ioctl, as tests/kvm/evidence.py wrote them."""
    text = (ROOT / "docs" / "kvm-api" / f"{place}.txt").read_text()
    return {name: (kind, rest) for name, kind, rest in (line.split("\t") for line in text.splitlines())}


def cell(ioctl: Ioctl, place: str, found: dict[str, tuple[str, str]]) -> str:
    """What the table says of an ioctl in a place."""
    if PLACES[place][1] not in ioctl.architectures:
        return "–"
    kind, text = found.get(ioctl.name, ("absent", "no test"))
    if kind == "absent":
        reason = text.partition(": ")[2] or text
        return reason if reason.startswith("no ") else "no test"
    test = f"`{text.removeprefix('tests/kvm/test_').replace('.py::', ' ')}`"
    return test if kind == "test" else f"*refused*: {test}"


def page() -> str:
    """Return the whole text."""
    found = {place: evidence(place) for place in PLACES}
    headings = [heading for heading, _ in PLACES.values()]
    lines = [HEAD, "| | " + " | ".join(headings) + " |", "|---|" + "---|" * len(PLACES)]
    for title, wanted in (("shown by a test", "test"), ("seen refused", "refused")):
        counts = [sum(kind == wanted for kind, _ in found[place].values()) for place in PLACES]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    of = [sum(arch in ioctl.architectures for ioctl in IOCTLS) for _, arch in PLACES.values()]
    lines.append("| of the architecture's | " + " | ".join(map(str, of)) + " |")
    for section, title in (("system", "System"), ("vm", "VM"), ("vcpu", "vCPU"), ("device", "Device")):
        rows = [ioctl for ioctl in IOCTLS if ioctl.section == section]
        lines += ["", f"## {title}: {len(rows)} ioctls", ""]
        lines.append("| ioctl | number | argument | capability | method | " + " | ".join(headings) + " |")
        lines.append("|---|" + "---|" * (4 + len(PLACES)))
        lines += [row(ioctl, found) for ioctl in rows]
    lines += ["", *exit_lines()]
    return "\n".join(lines) + "\n"


def row(ioctl: Ioctl, found: dict[str, dict[str, tuple[str, str]]]) -> str:
    """One ioctl's row."""
    numbers = dict.fromkeys(f"{ioctl.number(arch):#x}" for arch in ioctl.architectures)
    argument = {"-": "", "int": "number"}.get(ioctl.argument, f"`{ioctl.argument}`")
    if ioctl.direction:
        argument += f" {ioctl.direction}"
    methods = [f"`{CLASSES[descriptor]}.{ioctl.method}`" for descriptor in ioctl.descriptors]
    capability = f"`{ioctl.capability.removeprefix('KVM_CAP_')}`" if ioctl.capability else ""
    name = ioctl.name if len(ioctl.architectures) > 1 else f"{ioctl.name} ({ioctl.architectures[0]})"
    cells = [cell(ioctl, place, found[place]) for place in PLACES]
    return (
        "| "
        + " | ".join([name, "<br>".join(numbers), argument, capability, "<br>".join(methods), *cells])
        + " |"
    )


def exit_lines() -> list[str]:
    """Every exit reason and the class that `Vcpu.run` returns for it."""
    lines = [
        f"## Exits: {len(common.EXIT_REASONS)} reasons",
        "",
        "| | reason | class in `kvmkit.kvm.exits` |",
        "|---|---|---|",
    ]
    documented = {
        cls: _words((cls.__doc__ or "").split(":")[0])
        for cls in vars(exits).values()
        if isinstance(cls, type)
    }
    for number, name in sorted(common.EXIT_REASONS.items()):
        classes = [cls for cls, words in documented.items() if name in words]
        lines.append(f"| {number} | {name} | {', '.join(f'`{cls.__name__}`' for cls in classes)} |")
    return lines


def _words(text: str) -> set[str]:
    return set(text.replace(",", " ").replace(":", " ").replace(".", " ").replace("(", " ").split())


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is out of date"
    )
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text)
        return 0
    if PAGE.read_text() == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date: run tools/kvm_api.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
