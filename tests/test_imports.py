"""The import rule: who may know of whom.

::

     cli → client → images, uapi's plain types
     vmm → machine, devices, kvm, uapi
     client, vmm → messages, the form of what they say to each other;   cli, client, vmm → runtime;   all → errors
     machine → devices, kvm, uapi;   devices → kvm, uapi
     kvm → uapi, and each of its engines, lazily: linux → uapi;   soft → uapi, the native module
     uapi → nothing

The engines, `kvm/linux` and `kvm/soft`, see of `kvm` the contract alone, not each other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmkit

ROOT = Path(kvmkit.__file__).parent

CONTRACT = {"kvm.contract", "kvm.exits", "kvm.memory", "kvm.rings"}

# Room → what it may import beside itself; a name covers all below it.
ALLOWED: dict[str, set[str]] = {
    "uapi": set(),
    "kvm.linux": {"uapi", *CONTRACT},
    "kvm.soft": {"uapi", "_engine", *CONTRACT},
    "kvm": {"uapi", "kvm.linux", "kvm.soft"},
    "kvm.ordered": {"_engine"},
    "devices": {"uapi", "kvm"},
    "machine": {"uapi", "kvm", "devices", "errors"},
    "vmm": {"uapi", "kvm", "devices", "machine", "messages", "runtime", "errors"},
    "runtime": {"errors"},
    "images": {"errors"},
    "client": {"uapi", "images", "messages", "runtime", "errors"},
    "cli": {"client", "images", "runtime", "uapi", "errors"},
    "pytest_plugin": {"client"},
    "testing": {"uapi", "kvm", "machine", "devices"},
}

PURE = {"ctypes", "typing", "inspect", "errno", "os", "enum", "dataclasses", "collections"}
"""All that uapi may import of the standard library."""


def room_of(module: str) -> str:
    """The room that a module (relative to kvmkit) lives in; "" for the package itself."""
    return max((room for room in ALLOWED if covers(room, module)), key=len, default="")


def covers(name: str, module: str) -> bool:
    """Whether `module` is `name` or lies below it."""
    return module == name or module.startswith(name + ".")


def modules() -> dict[str, Path]:
    """Every module of kvmkit by its name relative to the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that `source` imports, however deep the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["kvmkit", *(module.split(".") if module else [])]
                drop = node.level - is_package
                base = ".".join([*here[: len(here) - drop], *([base] if base else [])])
            for alias in node.names:
                # `from kvmkit.kvm import exits` imports a module, `from kvmkit.kvm import Kvm` the package alone
                name = f"{base}.{alias.name}"
                yield name if is_module(name) else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of kvmkit."""
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or name == "kvmkit._engine"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports and may not."""
    room, found = room_of(module), []
    for name in imports(source, module, is_package):
        if name.split(".")[0] != "kvmkit":
            if room == "uapi" and name.split(".")[0] not in PURE:
                found.append(name)
            continue
        target = name.removeprefix("kvmkit").removeprefix(".")
        if not target or room == "":
            continue
        own = room_of(target) == room  # an engine isn't `kvm`'s own room: it has its own line
        if not own and not any(covers(allowed, target) for allowed in ALLOWED[room]):
            found.append(name)
    return found


@pytest.mark.parametrize("module", modules())
def test_import_rule(module: str) -> None:
    path = modules()[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_every_room_has_a_rule() -> None:
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("uapi.common", "import socket", "socket"),
        ("uapi.common", "from kvmkit.kvm import exits", "kvmkit.kvm.exits"),
        ("kvm.soft.main", "from kvmkit.kvm.linux import main", "kvmkit.kvm.linux.main"),
        ("kvm.linux.main", "from kvmkit.kvm import Kvm", "kvmkit.kvm"),
        ("kvm.linux.main", "def f():\n    import kvmkit._engine", "kvmkit._engine"),
        ("devices.serial", "import kvmkit.machine", "kvmkit.machine"),
        ("client.machine", "import kvmkit.kvm", "kvmkit.kvm"),
        ("cli.run", "import kvmkit.vmm", "kvmkit.vmm"),
        ("cli.run", "from kvmkit.kvm import probe", "kvmkit.kvm.probe"),
        ("machine.board", "from ..vmm import loop", "kvmkit.vmm"),
        ("devices.serial", "import_module('kvmkit.vmm.loop')", "kvmkit.vmm.loop"),
    ],
)
def test_the_rule_is_enforced(module: str, source: str, bad: str) -> None:
    assert [name for name in violations(module, source) if name.startswith(bad)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("uapi.x86", "import ctypes\nfrom kvmkit.uapi import common"),
        ("kvm.soft.main", "from kvmkit import _engine\nfrom kvmkit.kvm.contract import Kvm"),
        ("kvm.probe", "from kvmkit import kvm"),
        ("vmm.loop", "from kvmkit.kvm.exits import Io\nfrom kvmkit.devices import serial"),
        ("client.machine", "from kvmkit.errors import KvmkitError"),
    ],
)
def test_the_rule_allows(module: str, source: str) -> None:
    assert violations(module, source) == []
