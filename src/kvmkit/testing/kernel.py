"""Tiny kernels: ELF files that a machine boots as it boots Linux, and which end within a millisecond."""

import functools
import subprocess
import tempfile
from pathlib import Path

from kvmkit.testing.assembler import AssemblyError

LOAD_ADDRESS = 0x1000000
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


@functools.lru_cache(maxsize=256)
def assemble_kernel(code: str) -> bytes:
    """Return an ELF kernel of 64-bit `code` in Intel syntax, loaded at and entered at 16 MiB by the 64-bit protocol.

    The macros of `PRELUDE` are known. `AssemblyError` if it doesn't assemble. Needs GNU binutils.
    """
    text = f'.intel_syntax noprefix\n{PRELUDE}\n.global _start\n_start:\nmov rsp, {_STACK}\n# 1 "kernel"\n{code}\n'
    with tempfile.TemporaryDirectory(prefix="kvmkit-kernel-") as name:
        for command in (
            ["as", "--64", "-o", "kernel.o", "-"],
            ["ld", "-n", f"-Ttext={LOAD_ADDRESS:#x}", "-o", "kernel", "kernel.o"],
        ):
            done = subprocess.run(command, input=text, text=True, capture_output=True, cwd=name, check=False)
            if done.returncode:
                raise AssemblyError(done.stderr.strip())
        return (Path(name) / "kernel").read_bytes()
