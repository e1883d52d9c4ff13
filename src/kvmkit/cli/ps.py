"""``kvmkit ps``: this user's VMs."""

import json
import time
from typing import Any

import click

from kvmkit import runtime


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as a JSON array of objects.")
def ps(as_json: bool) -> None:
    """List your VMs: those that run, and detached ones that have ended and whose logs are still there."""
    rows = [_row(directory) for directory in runtime.every()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    lines = [("NAME", "STATE", "UP", "CPUS", "MEMORY", "ENGINE", "PID", "ROOT")]
    lines += [
        (
            row["name"],
            row["state"],
            _duration(row["up_s"]),
            str(row["cpus"] or ""),
            f"{row['memory_bytes'] >> 20}M" if row["memory_bytes"] else "",
            row["engine"] or "",
            str(row["pid"] or ""),
            row["root"] or "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _row(directory: runtime.VmDirectory) -> dict[str, Any]:
    about, end = directory.read("vm.json"), directory.read("end.json")
    alive = directory.alive()
    if alive:
        state = "running" if about else "starting"
    else:
        status = end.get("status")
        state = f"ended ({end.get('reason')})" if status is None else f"ended ({status})"
    return {
        "name": directory.name,
        "state": state,
        "up_s": time.time() - about["started_s"] if alive and about else None,
        **{key: about.get(key) for key in ("cpus", "memory_bytes", "engine", "root", "command", "detached")},
        "pid": about.get("pid") if alive else None,
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
