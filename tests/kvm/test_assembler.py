"""The guest assembler."""

import os

import pytest

from kvmkit.testing import AssemblyError, assemble

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the assembler here isn't for x86")


@pytest.mark.parametrize(
    ("source", "bits", "code"),
    [
        ("mov ax, 5\nhlt", 16, "b80500f4"),
        ("mov eax, 5", 16, "66b805000000"),
        ("mov eax, 5\nhlt", 32, "b805000000f4"),
        ("mov rax, [rbx + 8]", 64, "488b4308"),
        (".code32\nmov eax, 5\n.code16\nmov ax, 5", 64, "b805000000b80500"),
    ],
)
def test_assemble(source: str, bits: int, code: str) -> None:
    assert assemble(source, bits).hex() == code


def test_org() -> None:
    assert assemble("x: mov eax, offset x", 32, 0x7C00).hex() == "b8007c0000"


def test_error_names_the_line() -> None:
    with pytest.raises(AssemblyError, match="guest:2: Error: .*frobnicate"):
        assemble("nop\nfrobnicate eax")


def test_bits() -> None:
    with pytest.raises(ValueError, match="16, 32 or 64"):
        assemble("nop", 8)
