"""The examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

import kvmkit

_SOURCE = Path(kvmkit.__file__).parent
_MODULES = [
    "kvmkit." + ".".join(path.relative_to(_SOURCE).with_suffix("").parts)
    for path in sorted(_SOURCE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", _MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert result.attempted and not result.failed
