"""The board with tiny kernels on it, on each engine."""

import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvmkit.kvm
from kvmkit.kvm.exits import Intr, Io, Mmio
from kvmkit.machine.guest import DefaultGuest, console_command
from kvmkit.machine.x86 import layout
from kvmkit.machine.x86.board import X86Board
from kvmkit.machine.x86.cpuid import cpuid_of
from kvmkit.testing.assembler import assemble
from kvmkit.uapi.x86 import kvm_cpuid_entry2

MIB = 1 << 20
KERNEL_AT = 2 * MIB
TIMEOUT_S = 60.0


def make_kernel(code64: str, code32: str = "hlt") -> bytes:
    """An ELF kernel with a 64-bit and a PVH entry, both in one segment of a page each."""
    code = assemble(code64, 64, KERNEL_AT).ljust(4096, b"\x90") + assemble(code32, 32, KERNEL_AT + 4096)
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", KERNEL_AT + 4096)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, KERNEL_AT, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 4096, 0, KERNEL_AT, len(code), len(code), 4096)
    header += struct.pack("<IIQQQQQQ", 4, 4, 256, 0, 0, len(note), len(note), 4)
    return header.ljust(256, b"\0") + note + bytes(4096 - 256 - len(note)) + code


class Machine:
    """A board that runs until its guest does something final."""

    def __init__(self, engine: str, tmp_path: Path, **options: int) -> None:
        self.output = b""
        self.ends: list[str] = []
        self.ended = threading.Event()
        self._kernel = tmp_path / "kernel"
        self._stack = ExitStack()
        system = self._stack.enter_context(kvmkit.kvm.open(engine))
        vm = self._stack.enter_context(system.create_vm())
        self.board = X86Board(
            system,
            vm,
            memory_bytes=options.get("memory_bytes", 16 * MIB),
            cpus=options.get("cpus", 1),
            serial_write=self._write,
            on_reset=lambda: self._end("reset"),
            on_power_off=lambda: self._end("power-off"),
            on_exit_code=lambda code: self._end(f"exit {code}"),
        )
        self._stack.callback(self.board.close)

    def _write(self, data: bytes) -> None:
        self.output += data

    def _end(self, how: str) -> None:
        self.ends.append(how)
        self.ended.set()

    def run(
        self, kernel: bytes | Path, cmdline: str = "", initrd: bytes | None = None, pvh: bool = False
    ) -> str:
        """Boot it, and return how it ended."""
        if isinstance(kernel, bytes):
            self._kernel.write_bytes(kernel)
            kernel = self._kernel
        self.board.load_linux(kernel, initrd, cmdline, protocol="pvh" if pvh else "linux64")
        vcpu = self.board.vcpus[0]

        def expire() -> None:
            self._end("timeout")
            vcpu.kick()

        timer = threading.Timer(TIMEOUT_S, expire)
        timer.start()
        try:
            while not self.ended.is_set():
                match vcpu.run():
                    case Io() as exit_:
                        self.board.pio(exit_)
                    case Mmio() as exit_:
                        self.board.mmio(exit_)
                    case Intr():
                        vcpu.immediate_exit = False
                    case exit_:
                        self._end(f"{exit_} at {vcpu.get_regs().rip:#x}")
        finally:
            timer.cancel()
        self.board.serial.flush()
        return self.ends[0]

    def close(self) -> None:
        self._stack.close()


MakeMachine = Callable[..., Machine]


@pytest.fixture
def machine(engine: str, tmp_path: Path) -> Iterator[MakeMachine]:
    with ExitStack() as stack:

        def make(**options: int) -> Machine:
            made = Machine(engine, tmp_path, **options)
            stack.callback(made.close)
            return made

        yield make


EXIT = "mov dx, 0xf4\nout dx, al\n"
PRINT_64 = """
    mov dx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:
"""


def test_64_bit_entry(machine: MakeMachine) -> None:
    """rsi is the zero page, the selectors are the protocol's, the stack works, and interrupts are off."""
    kernel = make_kernel(f"""
        mov rbx, rsi
        mov esi, [rbx + 0x228]      # cmd_line_ptr
        {PRINT_64}
        mov esi, [rbx + 0x218]      # ramdisk_image
        mov ecx, [rbx + 0x21c]
        mov dx, 0x3f8
        rep outsb
        mov ax, cs
        cmp ax, 0x10
        jne bad
        mov ax, ss
        cmp ax, 0x18
        jne bad
        mov rax, cr4
        test al, 0x20
        jz bad
        pushfq
        pop rax
        test ah, 2
        jnz bad
        mov al, 0
        {EXIT}
    bad: {EXIT}
    """)
    vm = machine()
    assert vm.run(kernel, "the command line", b"+initrd") == "exit 0"
    assert vm.output == b"the command line+initrd"


def test_pvh_entry(machine: MakeMachine) -> None:
    kernel = make_kernel(
        "hlt",
        f"""
        cmp dword ptr [ebx], 0x336ec578
        jne bad
        mov esi, [ebx + 24]         # cmdline_paddr
        mov dx, 0x3f8
    1:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 1b
    2:  mov eax, cr0
        test eax, 0x80000000        # no paging
        jnz bad
        mov ax, ss
        mov ss, ax                  # the GDT holds what is loaded
        str ax
        test ax, ax
        jz bad
        mov al, 0
        {EXIT}
    bad: mov al, 1
        {EXIT}
        """,
    )
    vm = machine()
    assert vm.run(kernel, "pvh", pvh=True) == "exit 0"
    assert vm.output == b"pvh"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("mov al, 0xfe\nout 0x64, al", "reset"),
        ("mov dx, 0xcf9\nmov al, 6\nout dx, al", "reset"),
        ("mov dx, 0x604\nmov ax, 0x3400\nout dx, ax", "power-off"),
        ("mov dx, 0xf4\nmov eax, 0x1234\nout dx, ax", "exit 4660"),
    ],
)
def test_ways_to_end(machine: MakeMachine, code: str, end: str) -> None:
    assert machine().run(make_kernel(code + "\n1: jmp 1b")) == end


def test_interrupt_lines(machine: MakeMachine) -> None:
    """The UART's line is IRQ 4 and the PIT's is IRQ 0, as the master i8259's request register shows."""
    kernel = make_kernel(f"""
        mov al, 0x11
        out 0x20, al
        mov al, 0x20
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov dx, 0x3f9               # IER: the transmitter is empty
        mov al, 2
        out dx, al
        mov al, 0x30                # PIT channel 0, mode 0: rises at the end of 100 ticks
        out 0x43, al
        mov al, 100
        out 0x40, al
        mov al, 0
        out 0x40, al
    1:  in al, 0x20
        cmp al, 0x11
        jne 1b
        {EXIT}
    """)
    assert machine().run(kernel) == "exit 17"


def test_unclaimed_addresses_read_as_ones(machine: MakeMachine) -> None:
    kernel = make_kernel(f"""
        mov dx, 0x2f8
        in eax, dx
        mov ebx, 0xd0000000
        and eax, [rbx]
        inc eax
        {EXIT}
    """)
    assert machine().run(kernel) == "exit 0"


def test_memory_above_4_gib(machine: MakeMachine, engine: str) -> None:
    vm = machine(memory_bytes=(3 << 30) + 4 * MIB)
    assert [(gpa, block.size_bytes) for gpa, block in vm.board.memory.blocks] == [
        (0, 3 << 30),
        (4 << 30, 4 * MIB),
    ]


def test_tables_are_in_place(machine: MakeMachine) -> None:
    vm = machine(cpus=2)
    assert vm.board.memory.read(layout.ACPI, 8) == b"RSD PTR "
    assert len(vm.board.vcpus) == 2


def test_virtual_wire(machine: MakeMachine) -> None:
    """As the MADT says, LINT1 is NMI; LINT0 lets the i8259s through. Both are unmasked on the boot processor."""
    lapic = machine(cpus=2).board.vcpus[0].get_lapic()
    assert struct.unpack_from("<I", lapic, 0x350) == (0x700,)
    assert struct.unpack_from("<I", lapic, 0x360) == (0x400,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "pvh", "command", "end"),
    [
        ("vmlinux", False, "exit 5", "power-off"),
        ("vmlinux", True, "exit 5", "power-off"),
        ("vmlinuz", False, "reboot -f", "reset"),
    ],
)
def test_linux(
    linux_engine: str, machine: MakeMachine, guest: DefaultGuest, form: str, pvh: bool, command: str, end: str
) -> None:
    """Debian's kernel by each protocol, with more memory than lies below 4 GiB, to either end."""
    vm = machine(memory_bytes=(3 << 30) + 256 * MIB)
    script = f"head -n 1 /proc/meminfo; dmesg -r | grep '^<[0-2]>'; {command}"
    kernel: Path = getattr(guest.kernel, form)
    initramfs = guest.initramfs(console_command(("sh", "-c", script)))
    assert vm.run(kernel, "console=ttyS0 panic=-1 quiet", initramfs, pvh) == end, vm.output
    assert re.search(rb"MemTotal: +3[23]\d{5} kB", vm.output), vm.output
    assert (b"kvmkit: exit 5" in vm.output) == (end == "power-off")
    assert b"\r\n<" not in vm.output


def leaf(function: int, index: int = 0, **registers: int) -> kvm_cpuid_entry2:
    return kvm_cpuid_entry2(function=function, index=index, **registers)


def test_cpuid_topology() -> None:
    supported = [
        leaf(1, ebx=0x01234567, ecx=0, edx=1 << 28),
        leaf(4, 0, eax=0xFFFFC000 | 1 << 5 | 1),
        leaf(4, 3, eax=0xFFFFC000 | 3 << 5 | 3),
        leaf(0xB, 0),
        leaf(0xB, 1),
        leaf(0xB, 2),
        leaf(0x80000008, eax=0x3030, ecx=0x7007),
        leaf(0x40000001, eax=0x1000),
    ]
    table = {(e.function, e.index): e for e in cpuid_of(supported, 2, 3, tsc_deadline=True)}
    one = table[1, 0]
    assert (one.ebx, one.ecx, one.edx) == (0x02044567, 1 << 31 | 1 << 24, 1 << 28)
    assert [table[4, i].eax >> 14 & 0xFFF for i in (0, 3)] == [0, 3]
    assert table[4, 0].eax >> 26 == 3
    x2 = [(table[0xB, i].eax, table[0xB, i].ebx, table[0xB, i].ecx, table[0xB, i].edx) for i in range(3)]
    assert x2 == [(0, 1, 0x100, 2), (2, 3, 0x201, 2), (0, 0, 2, 2)]
    assert table[0x80000008, 0].ecx == 2 << 12 | 2
    assert table[0x40000001, 0].eax == 0x1000
    assert supported[0].ebx == 0x01234567
    alone = cpuid_of(supported, 0, 1, tsc_deadline=False)[0]
    assert (alone.ebx, alone.ecx, alone.edx) == (0x00014567, 1 << 31, 0)
