"""Running a case on QEMU's TCG, a whole emulated machine (Debian's `qemu-system-x86`): with delivery, unlike Unicorn.

QEMU shares its memory with us as a file. A ROM of ours copies the case to guest physical 0 and goes to a stub in it, which loads all
registers and enters the case. Each case starts with a reset: that way nothing is left of the one before. The end is a HLT, which
QEMU's monitor shows, with all registers but most MSRs.
"""

import json
import mmap
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

from kvmkit.testing.assembler import assemble
from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import EFER_LMA, GPRS, Case
from kvmkit.testing.differential.run import Outcome, interpret

QEMU = "qemu-system-x86_64"
MEMORY_BYTES = 16 << 20
IMAGE, GO = 0x400000, 0x300000
STUB_BYTES = 0x1000
TIMEOUT_S = 5.0
CPU = (
    "qemu64,vendor=GenuineIntel,-svm,-vme,-de,-mce,-mtrr,-pge,-mca,-pat,-apic,-pse36,-clflush,"
    "-pni,-cx16,-popcnt,-x2apic,-hypervisor,-abm,-sse4a,-3dnow"
)
"""With the features of `run.CPUID`, on which the reserved bits of control registers depend."""

ROM = f"""
.code16
    cli
    lgdt cs:[pointer - start]
    mov eax, 0x11
    mov cr0, eax
    .byte 0x66, 0xea; .long protected + 0xf0000; .word 8
.code32
protected:
    mov ax, 16; mov ds, ax; mov es, ax; mov ss, ax; mov fs, ax; mov gs, ax
    xor eax, eax
    xchg eax, [{GO}]    # 0 behind a triple fault, which resets, too
    test eax, eax
    jnz go
    hlt
go:
    cld
    mov esi, {IMAGE}; xor edi, edi; mov ecx, {(c.MEMORY_BYTES + STUB_BYTES) // 4}
    rep movsd
    cmp eax, 16
    mov edx, {c.STUB}
    je real
    jmp edx
real:
    .byte 0xea; .long real16; .word 24
.code16
real16:
    mov ax, 32; mov ds, ax; mov es, ax; mov ss, ax; mov fs, ax; mov gs, ax
    mov eax, 0x10
    mov cr0, eax
    .byte 0xea; .word 0, {c.STUB >> 4}
    .balign 8
table:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00009b0f0000ffff, 0x000093000000ffff
pointer:
    .word 39; .long table + 0xf0000
"""


class Qemu:
    """One QEMU, for one case after the other."""

    def __init__(self) -> None:
        """Start it. `FileNotFoundError` without QEMU."""
        if shutil.which(QEMU) is None:
            raise FileNotFoundError(f"{QEMU} isn't installed (Debian: qemu-system-x86)")
        self._directory = tempfile.TemporaryDirectory(prefix="kvmkit-qemu-")
        here = Path(self._directory.name)
        rom = assemble("start:\n" + ROM.replace(";", "\n"), 16)
        reset = assemble(".byte 0xe9\n.word 0 - 0xfff3", 16)
        (here / "rom").write_bytes(rom.ljust(0xFFF0, b"\xf4") + reset.ljust(16, b"\xf4"))
        ram = here / "ram"
        with ram.open("w+b") as file:
            file.truncate(MEMORY_BYTES)
            self.memory = mmap.mmap(file.fileno(), MEMORY_BYTES)
        self._line = [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", CPU, "-m", "16",
            "-M", "microvm,memory-backend=ram,pic=off,pit=off,rtc=off,isa-serial=off",
            "-object", f"memory-backend-file,id=ram,size=16M,share=on,mem-path={ram}",
            "-bios", str(here / "rom"), "-qmp", f"unix:{here}/qmp,server=on,wait=off",
        ]  # fmt: skip
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._line, stderr=subprocess.DEVNULL)
        self._end = weakref.finalize(self, _end, self._process)
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + TIMEOUT_S
        while self._socket.connect_ex(f"{self._directory.name}/qmp"):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise OSError(f"QEMU doesn't start: {' '.join(self._line)}")
            time.sleep(0.01)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self._command("qmp_capabilities")

    def _command(self, name: str, **arguments: str) -> Any:
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self._lines.readline() or '{"error": "it ended"}')):
            pass
        if "return" not in answer:
            raise OSError(f"QEMU, {name}: {answer}")
        return answer["return"]

    def run(self, case: Case) -> Outcome:
        """Run it to its end."""
        image = bytearray(case.image() + bytes(STUB_BYTES))
        stub = _stub(case, image)
        image[c.STUB : c.STUB + len(stub)] = stub
        self.memory[IMAGE : IMAGE + len(image)] = bytes(image)
        self.memory[GO : GO + 4] = (case.mode.bits if not case.mode.protected else 32).to_bytes(4, "little")
        try:
            return self._outcome()
        except OSError:
            if self._process.poll() is None:
                raise
        self._disconnect()
        self._start()
        return Outcome("unsupported: QEMU ended itself")

    def _outcome(self) -> Outcome:
        self._command("system_reset")
        deadline = time.monotonic() + TIMEOUT_S
        while any(self.memory[GO : GO + 4]):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise OSError("QEMU doesn't come to the ROM")
            os.sched_yield()
        while True:
            text = self._command("human-monitor-command", **{"command-line": "info registers"})
            if "HLT=1" in text:
                break
            if time.monotonic() > deadline:
                return Outcome("endless")
        values = _registers(text)
        if values["rip"] >= 0xF0000 and values["cs.base"] == 0:
            return Outcome("shutdown")
        outcome = Outcome("halt", values, self.memory[: c.MEMORY_BYTES])
        interpret(outcome)
        return outcome

    def _disconnect(self) -> None:
        self._end()
        self._lines.close()
        self._socket.close()

    def close(self) -> None:
        """End it."""
        self._disconnect()
        self.memory.close()
        self._directory.cleanup()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _registers(text: str) -> dict[str, int]:
    """What `info registers` says, by our names."""
    names = {"EFL": "rflags", "RFL": "rflags", "EIP": "rip"} | {
        f"E{name[1:].upper()}": name for name in GPRS[:8]
    }
    values = {}
    for name, text_value in re.findall(r"\b([A-Z][A-Z0-9]{1,3}) ?=([0-9a-f]{8,16})\b", text):
        values[names.get(name, name.lower())] = int(text_value, 16)
    for name, *words in re.findall(
        r"\b([A-Z]{2,3}) ?=([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", text
    ):
        selector, base, limit, flags = (int(word, 16) for word in words)
        name = name.lower()
        values[name] = selector
        if flags & 1 << 15:
            values |= {f"{name}.base": base, f"{name}.limit": limit, f"{name}.flags": flags >> 8 & 0xF0FF}
    if "tr.flags" in values:
        values["tr.flags"] |= 2  # LTR sets it in memory, and QEMU not in the register
    for name, base, limit in re.findall(r"\b([GI]DT)= +([0-9a-f]+) ([0-9a-f]+)", text):
        values |= {name.lower(): int(base, 16), f"{name.lower()}.limit": int(limit, 16)}
    if values["efer"] & EFER_LMA and "RIP=" not in text:  # a 32-bit view of the registers
        values = {name: value for name, value in values.items() if name not in GPRS}
    return values


def _stub(case: Case, image: bytearray) -> bytes:
    """Code at `c.STUB`, 32-bit or for real mode 16-bit, that loads the registers and enters the case."""
    mode, control, s, r = case.mode, case.control, case.segments, case.registers
    for n, name in ((0, "gdt"), (8, "idt")):
        at = c.STUB_STACK + 0x80 + n
        image[at : at + 6] = control[f"{name}_limit"].to_bytes(2, "little") + control[name].to_bytes(
            4, "little"
        )
    prefix = b"" if mode.protected else b"\x66"

    def immediate(n: int, value: int) -> bytes:
        return prefix + bytes([0xB8 + n]) + value.to_bytes(4, "little")

    stub = immediate(0, control["cr4"]) + b"\x0f\x22\xe0" + immediate(0, control["cr3"]) + b"\x0f\x22\xd8"
    for n, modrm in ((0, 0x15), (8, 0x1D)):
        table = c.STUB_STACK + 0x80 + n
        stub += b"\x2e\x0f\x01"  # by CS: in real mode its base is the stub
        if mode.protected:
            stub += bytes([modrm]) + table.to_bytes(4, "little")
        else:
            stub += bytes([modrm + 1]) + (table - c.STUB).to_bytes(2, "little")
    stub += (
        immediate(1, c.MSRS["EFER"])
        + immediate(0, control["efer"] & ~EFER_LMA)
        + immediate(2, 0)
        + b"\x0f\x30"
    )
    stub += immediate(0, control["cr0"]) + b"\x0f\x22\xc0"
    selectors = ("ds", "es", "fs", "gs", "ss")
    moves = dict(zip(selectors, b"\xd8\xc0\xe0\xe8\xd0", strict=True))
    order = {name: n for n, name in enumerate(("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"))}
    if not mode.protected:
        for name in selectors:
            stub += immediate(0, s[name].selector) + bytes([0x8E, moves[name]])
        stub += b"".join(immediate(n, r[name]) for name, n in order.items() if name != "rsp")
        return stub + immediate(4, r["rsp"] - 12) + b"\x66\xcf"  # `cases.make` put the frame there
    if mode.long:
        at = c.STUB + len(stub) + 7
        stub += b"\xea" + at.to_bytes(4, "little") + b"\xe8\x00"
    image[c.GDT + 0x2D] &= ~2  # LTR wants an idle TSS, and makes it busy
    stub += (
        immediate(0, s["tr"].selector) + b"\x0f\x00\xd8" + immediate(0, s["ldt"].selector) + b"\x0f\x00\xd0"
    )
    for name in selectors:
        if not mode.vm86 and (name != "ss" or not (case.user or mode.long)):
            stub += immediate(0, s[name].selector) + bytes([0x8E, moves[name]])
    size = 8 if mode.long else 4
    if mode.long:
        for n, name in enumerate((*order, *GPRS[8:])):
            if name != "rsp":
                stub += bytes([0x48 | n >> 3, 0xB8 + n % 8]) + r[name].to_bytes(8, "little")
    else:
        stub += b"".join(immediate(n, r[name]) for name, n in order.items() if name != "rsp")
    if mode.long or case.user:
        words = [r["rip"], s["cs"].selector, r["rflags"], r["rsp"], s["ss"].selector]
        if mode.vm86:
            words += [s[name].selector for name in ("es", "ds", "fs", "gs")]
        top = c.STUB_STACK
        image[top : top + len(words) * size] = b"".join(word.to_bytes(size, "little") for word in words)
    else:
        top = r["rsp"] - 3 * size  # again
    return stub + immediate(4, top) + (b"\x48\xcf" if mode.long else b"\xcf")
