"""``docs/kvm-api.md`` is what the table and the evidence make it, and the evidence names tests that are marked as such."""

import ast
import importlib.util
from pathlib import Path

import pytest

from kvmkit.uapi.ioctls import IOCTLS

ROOT = Path(__file__).parents[2]
EVIDENCE = sorted((ROOT / "docs" / "kvm-api").glob("*.txt"))
MARKS = {"test": "backs", "refused": "refuses"}


def marks(path: Path) -> dict[str, set[tuple[str, str]]]:
    """Test → (mark, ioctl) of its decorators."""
    found: dict[str, set[tuple[str, str]]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            found[node.name] = {
                (ast.unparse(call.func).rpartition(".")[2], argument.value)
                for call in calls
                for argument in call.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            }
    return found


def test_page_is_up_to_date() -> None:
    tool = ROOT / "tools" / "kvm_api.py"
    spec = importlib.util.spec_from_file_location("kvm_api", tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run tools/kvm_api.py"
    rows = [line for line in module.PAGE.read_text().splitlines() if line.startswith("| KVM_")]
    assert len(rows) == len(IOCTLS) == 114
    assert all(row.split("|")[5].strip().startswith("`") for row in rows)  # no empty method


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.stem)
def test_evidence_names_tests_that_are_marked(path: Path) -> None:
    names = {ioctl.name for ioctl in IOCTLS}
    for line in path.read_text().splitlines():
        name, kind, text = line.split("\t")
        assert name in names
        if kind in MARKS:
            file, test = text.split("::")
            assert (MARKS[kind], name) in marks(ROOT / file)[test], line


def test_every_place_has_evidence() -> None:
    assert {path.stem for path in EVIDENCE} == {"kvm-amd", "kvm-arm64", "kvm-pvm", "soft"}
