"""Running a case on Unicorn, the CPU emulator that was QEMU's TCG once (pip's `unicorn`).

Unicorn delivers nothing through the IDT: it calls a hook with the vector. So the outcome is the state in front of the delivery, to
be compared with what `compare.before_delivery` reads from the frame; the error code it doesn't tell. The case is entered with an
IRET, which sets what can't be set by registers.

Unicorn aborts the whole process at a TSS that it doesn't like (LTR of a null selector and an I/O permission), so it runs in another.
"""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import unicorn
from unicorn import x86_const as u

from kvmkit.testing.differential import code as c
from kvmkit.testing.differential.cases import GPRS, Case
from kvmkit.testing.differential.run import Outcome
from kvmkit.testing.differential.watchdog import WATCHDOG

REAL_STUB = 0xE800
NOWHERE = 0xEFF0  # Unicorn itself looks it up in the page tables
_GPR = {name: getattr(u, f"UC_X86_REG_{name.upper()}") for name in GPRS}
_NARROW = {name: getattr(u, f"UC_X86_REG_E{name[1:].upper()}") for name in GPRS[:8]}
_SELECTORS = {name: getattr(u, f"UC_X86_REG_{name.upper()}") for name in ("ds", "es", "fs", "gs", "ss", "cs")}


class Unicorn:
    """A process of Unicorn's, for one case after the other."""

    def __init__(self) -> None:
        """Start it. It ends with this process at the latest."""
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, case: Case) -> Outcome:
        """Run it to its end."""
        try:
            self._pipe.send(case)
            outcome: Outcome = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.close()
            self._start()
            return Outcome("unsupported: Unicorn ended itself")
        return outcome

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(run(case))


def run(case: Case) -> Outcome:
    """Run it to its end, in this process."""
    mode = case.mode
    uc = unicorn.Uc(
        unicorn.UC_ARCH_X86,
        {True: unicorn.UC_MODE_64, False: unicorn.UC_MODE_32}[mode.long]
        if mode.protected
        else unicorn.UC_MODE_16,
    )
    registers = _GPR if mode.long else _NARROW
    ip, flags = (
        (u.UC_X86_REG_RIP, u.UC_X86_REG_RFLAGS) if mode.long else (u.UC_X86_REG_EIP, u.UC_X86_REG_EFLAGS)
    )
    uc.mem_map(0, c.MEMORY_BYTES)
    uc.mem_write(0, case.image())
    uc.mem_map(c.STUB, 0x1000)
    events: list[int] = []

    def interrupted(uc: Any, vector: int, _: object) -> None:
        events.append(vector)
        uc.emu_stop()

    fast: list[int] = []

    def fast_call(uc: Any, _: object) -> None:
        fast.append(uc.reg_read(ip))
        uc.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INTR, interrupted)
    for instruction in (u.UC_X86_INS_SYSCALL, u.UC_X86_INS_SYSENTER):
        uc.hook_add(unicorn.UC_HOOK_INSN, fast_call, None, 1, 0, instruction)
    uc.hook_add(
        unicorn.UC_HOOK_INSN,
        lambda uc, port, size, _: 0x5A5A5A5A & (1 << 8 * size) - 1,
        None,
        1,
        0,
        u.UC_X86_INS_IN,
    )
    for fpu, value in (
        (u.UC_X86_REG_FPCW, 0x37F),
        (u.UC_X86_REG_FPTAG, 0xFFFF),
        (u.UC_X86_REG_MXCSR, 0x1F80),
    ):
        uc.reg_write(fpu, value)
    start = _prepare(uc, case)
    for name, register in registers.items():
        uc.reg_write(register, case.registers[name])
    if not mode.protected:
        uc.reg_write(flags, case.registers["rflags"])
    else:
        _frame(uc, case)
    end = "halt"
    try:
        with WATCHDOG.watching(uc.emu_stop):
            uc.emu_start(start, NOWHERE)
    except unicorn.UcError as error:
        if error.errno == unicorn.UC_ERR_INSN_INVALID:
            events.append(6)
        elif error.errno in (
            unicorn.UC_ERR_READ_UNMAPPED,
            unicorn.UC_ERR_WRITE_UNMAPPED,
            unicorn.UC_ERR_FETCH_UNMAPPED,
        ):
            end = "outside"
        else:
            end = f"unsupported: {error}"
    if events:
        end = f"vector {events[0]}"
    if fast:
        end = "unsupported: SYSCALL and SYSENTER, which Unicorn leaves to its user"
    values = {name: uc.reg_read(register) for name, register in registers.items()}
    values |= {"rip": uc.reg_read(ip), "rflags": uc.reg_read(flags)}
    values |= {name: uc.reg_read(register) for name, register in _SELECTORS.items()}
    if end == "halt" and uc.mem_read(_linear(values, mode.protected) - 1 & c.MEMORY_BYTES - 1, 1) != b"\xf4":
        end = "endless"
    if not mode.protected:
        return Outcome(
            end, values, bytes(uc.mem_read(0, c.MEMORY_BYTES))
        )  # Unicorn has no more registers here
    for n in (0, 3, 4) if end != "vector 14" else (0, 2, 3, 4):  # CR2 changes at its entry
        values[f"cr{n}"] = uc.reg_read(getattr(u, f"UC_X86_REG_CR{n}"))
    for name in ("gdt", "idt"):
        _, values[name], values[f"{name}.limit"], _ = uc.reg_read(getattr(u, f"UC_X86_REG_{name.upper()}R"))
    for name in ("tr", "ldt"):
        register = u.UC_X86_REG_TR if name == "tr" else u.UC_X86_REG_LDTR
        values[name] = uc.reg_read(register)[0]
    if mode.long:
        values |= {
            name.lower() if name == "EFER" else name: uc.msr_read(index) for name, index in c.MSRS.items()
        }
    return Outcome(end, values, bytes(uc.mem_read(0, c.MEMORY_BYTES)))


def _linear(values: dict[str, int], protected: bool) -> int:
    return values["rip"] + (0 if protected else 16 * values["cs"])


def _prepare(uc: Any, case: Case) -> int:
    """Set what registers can set; the address to start at."""
    mode, control = case.mode, case.control
    if not mode.protected:
        stub = b""
        for opcode, value in ((b"\xc0", control["cr0"]), (b"\xe0", control["cr4"])):
            stub += b"\x66\xb8" + value.to_bytes(4, "little") + b"\x0f\x22" + opcode
        for n, name, opcode in ((0, "gdt", b"\x16"), (8, "idt", b"\x1e")):
            table = control[f"{name}_limit"].to_bytes(2, "little") + control[name].to_bytes(4, "little")
            uc.mem_write(REAL_STUB + 0x100 + n, table)
            stub += b"\x66\x0f\x01" + opcode + (REAL_STUB + 0x100 + n).to_bytes(2, "little")
        uc.mem_write(REAL_STUB, stub)
        uc.emu_start(REAL_STUB, REAL_STUB + len(stub))
        uc.mem_write(REAL_STUB, case.memory[REAL_STUB : REAL_STUB + 0x200])
        for name, register in _SELECTORS.items():
            uc.reg_write(register, case.segments[name].selector)
        return case.rip
    uc.msr_write(c.MSRS["EFER"], control["efer"])
    uc.reg_write(u.UC_X86_REG_GDTR, (0, control["gdt"], control["gdt_limit"], 0))
    uc.reg_write(u.UC_X86_REG_IDTR, (0, control["idt"], control["idt_limit"], 0))
    uc.reg_write(u.UC_X86_REG_CR3, control["cr3"])
    uc.reg_write(u.UC_X86_REG_CR4, control["cr4"])
    uc.reg_write(u.UC_X86_REG_CR0, control["cr0"])
    for name, register in (("tr", u.UC_X86_REG_TR), ("ldt", u.UC_X86_REG_LDTR)):
        s = case.segments[name]
        uc.reg_write(register, (s.selector, s.base, s.limit, (s.flags & 0xFF) << 8 | (s.flags >> 12) << 20))
    stub = b""
    for name, modrm in (("ds", 0xD8), ("es", 0xC0), ("fs", 0xE0), ("gs", 0xE8), ("ss", 0xD0)):
        selector = case.segments[name].selector
        if mode.vm86 or (name == "ss" and case.user):
            selector = 0x10  # the IRET loads the case's
        stub += b"\xb8" + selector.to_bytes(4, "little") + bytes([0x8E, modrm])
    stub += b"\x90"
    uc.mem_write(c.STUB, stub + (b"\x48\xcf" if mode.long else b"\xcf"))
    uc.emu_start(c.STUB, c.STUB + len(stub))
    return c.STUB + len(stub)


def _frame(uc: Any, case: Case) -> None:
    """What the IRET pops: onto a stack of its own, which is the case's own stack where the IRET doesn't switch."""
    size = 8 if case.mode.long else 4
    r, s = case.registers, case.segments
    if case.mode.long or case.user:
        words = [r["rip"], s["cs"].selector, r["rflags"], r["rsp"], s["ss"].selector]
        if case.mode.vm86:
            words += [s[name].selector for name in ("es", "ds", "fs", "gs")]
        top = c.STUB_STACK
        uc.mem_write(top, b"".join(word.to_bytes(size, "little") for word in words))
    else:
        top = r["rsp"] - 3 * size  # `cases.make` put it there
    uc.reg_write(u.UC_X86_REG_RSP if case.mode.long else u.UC_X86_REG_ESP, top)
