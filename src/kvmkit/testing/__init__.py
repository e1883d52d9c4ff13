"""What tests of kvmkit, and of programs on top of it, need: a guest assembler and tiny guests. pytest isn't required."""

from kvmkit.testing.assembler import AssemblyError, assemble
from kvmkit.testing.guest import CODE, DATA, IDT, MEMORY_BYTES, STACK, TABLES, Guest

__all__ = ["CODE", "DATA", "IDT", "MEMORY_BYTES", "STACK", "TABLES", "AssemblyError", "Guest", "assemble"]
