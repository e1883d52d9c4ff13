"""Tiny kernels: ELF files that a machine boots as it boots Linux or a bare-metal test, and which end within a millisecond."""

import functools
import subprocess
import tempfile
from pathlib import Path

from kvmkit.testing.assembler import AssemblyError

LOAD_ADDRESS = 0x1000000
TEST_LOAD_ADDRESS = 0x400000
_STACK = 0x80000

PRELUDE = """
.macro putc char
    mov al, \\char
    mov dx, 0x3f8
    out dx, al
.endm
.macro getc
9:  mov dx, 0x3fd
    in al, dx
    test al, 1
    jz 9b
    mov dx, 0x3f8
    in al, dx
.endm
.macro reset
    mov al, 0xfe
    out 0x64, al
.endm
.macro triple_fault
    push 0
    push 0
    lidt [rsp]
    ud2
.endm
"""
"""Macros: `putc` and `getc` on the first serial port (in al; dx changes), `reset` by the keyboard controller, `triple_fault`."""


def puts(text: str) -> str:
    """Return assembly that writes `text`, not empty, to the first serial port; changes rax, rcx, rdx, rsi."""
    return f"""
    lea rsi, [rip + 7f]
    mov ecx, {len(text.encode())}
    mov dx, 0x3f8
    cld
9:  lodsb
    out dx, al
    dec ecx
    jnz 9b
    jmp 8f
7:  .byte {", ".join(str(byte) for byte in text.encode())}
8:
"""


TEST_PRELUDE = """
.macro exit code
    mov eax, \\code
    out 0xf4, eax
1:  hlt
    jmp 1b
.endm
.macro send address, bytes
    mov esi, \\address
    mov ecx, \\bytes
    mov dx, 0x3f8
    cld
    rep outsb
.endm
"""
"""Macros of test kernels: `exit code`, and `send address, bytes`, which writes memory to the first serial port."""


@functools.lru_cache(maxsize=256)
def assemble_kernel(code: str) -> bytes:
    """Return an ELF kernel of 64-bit `code` in Intel syntax, loaded at and entered at 16 MiB by the 64-bit protocol.

    The macros of `PRELUDE` are known. `AssemblyError` if it doesn't assemble. Needs GNU binutils.
    """
    text = f'.intel_syntax noprefix\n{PRELUDE}\n.global _start\n_start:\nmov rsp, {_STACK}\n# 1 "kernel"\n{code}\n'
    return _link(text, ["as", "--64"], ["ld", "-n", f"-Ttext={LOAD_ADDRESS:#x}"])


@functools.lru_cache(maxsize=256)
def assemble_test_kernel(code: str, address: int = TEST_LOAD_ADDRESS) -> bytes:
    """Return a multiboot kernel of 32-bit `code` in Intel syntax, an ELF file at `address` and entered 0x18 bytes behind that.

    For ``kvmkit run --testdev``. The macros of `TEST_PRELUDE` are known; there is no stack. `AssemblyError`; needs GNU binutils.
    """
    text = (
        f".intel_syntax noprefix\n{TEST_PRELUDE}\n.long 0x1badb002, 0, -0x1badb002\n.org 0x18\n"
        f'.global _start\n_start:\n# 1 "kernel"\n{code}\n'
    )
    return _link(text, ["as", "--32"], ["ld", "-m", "elf_i386", "-n", f"-Ttext={address:#x}"])


def _link(source: str, assembler: list[str], linker: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="kvmkit-kernel-") as name:
        for command in ([*assembler, "-o", "kernel.o", "-"], [*linker, "-o", "kernel", "kernel.o"]):
            done = subprocess.run(
                command, input=source, text=True, capture_output=True, cwd=name, check=False
            )
            if done.returncode:
                raise AssemblyError(done.stderr.strip())
        return (Path(name) / "kernel").read_bytes()
