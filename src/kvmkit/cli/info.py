"""``kvmkit info``: what this machine offers."""

import json
from typing import Any

import click

from kvmkit.client import host_report

_ENGINES = {"linux": "/dev/kvm", "soft": "software engine"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def info(as_json: bool) -> None:
    """Show what this machine offers: KVM's modules, both engines with their speed, and what auto takes."""
    report = host_report()
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, parameters in report["modules"].items():
        values = " ".join(f"{key}={value}" for key, value in parameters.items())
        lines.append(f"module {name}: {values or 'no parameters'}")
    if not report["modules"]:
        lines.append("module kvm: not loaded")
    nested = {True: "offered to guests", False: "not offered", None: "the modules don't say"}
    lines.append(f"nested virtualization: {nested[report['nested']]}")
    for engine in report["engines"]:
        lines.append(f"{_ENGINES[engine['name']]}: {_speed(engine)}")
        for capability, value in sorted(engine["capabilities"].items()):
            lines.append(f"  {capability}{'' if value == 1 else f' = {value}'}")
    choice = _ENGINES.get(report["choice"], "nothing")
    lines.append(f"auto takes: {choice} ({report['reason']})")
    return lines


def _speed(engine: dict[str, Any]) -> str:
    if engine["error"]:
        return f"can't be used: {engine['error']}"
    return f"{engine['supervisor_mips']:,.1f} million supervisor instructions a second"
