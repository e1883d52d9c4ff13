"""Assemble guest code with the GNU assembler, so that tests and examples carry source instead of bytes."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path


class AssemblyError(ValueError):
    """The source doesn't assemble; the message is the assembler's, with line numbers of the source given."""


@functools.lru_cache(maxsize=1024)
def assemble(source: str, bits: int = 64, org: int = 0) -> bytes:
    """Assemble x86 `source` in Intel syntax, for the CPU mode of `bits` (16, 32 or 64), to lie at address `org`.

    The source may switch modes with ``.code16``, ``.code32`` and ``.code64`` and use whatever else GNU as knows. Needs GNU
    binutils (`FileNotFoundError` without); results are kept for the life of the process.
    """
    if bits not in (16, 32, 64):
        raise ValueError(f"bits={bits}: 16, 32 or 64")
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} isn't installed: guest code is assembled with GNU binutils")
    with tempfile.TemporaryDirectory(prefix="kvmkit-as-") as directory:
        output = Path(directory)
        text = f'.intel_syntax noprefix\n.code{bits}\n.global _start\n_start:\n# 1 "guest"\n{source}\n'
        _run(["as", "--64", "-o", "guest.o", "-"], output, text)
        _run(["ld", "--oformat", "binary", f"-Ttext={org:#x}", "-o", "guest.bin", "guest.o"], output)
        return (output / "guest.bin").read_bytes()


def _run(command: list[str], directory: Path, text: str = "") -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, cwd=directory, check=False)
    if done.returncode:
        raise AssemblyError(done.stderr.strip())
