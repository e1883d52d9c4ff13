"""Bare-metal test kernels: each promise of the convention, kept on each engine."""

import shutil
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvmkit.kvm
from kvmkit.machine.errors import KernelError
from kvmkit.machine.x86 import layout, multiboot
from kvmkit.machine.x86.board import X86Board
from kvmkit.testing.kernel import TEST_LOAD_ADDRESS, assemble_test_kernel
from kvmkit.vmm.ending import Ending, Reason
from kvmkit.vmm.loop import Errands, run_vcpu

MIB = 1 << 20
TIMEOUT_S = 60.0

Run = Callable[..., tuple[str, bytes]]


@pytest.fixture
def run(engine: str, tmp_path: Path) -> Run:
    """Run a test kernel to its end on as many threads as it has vCPUs; return how it ended and what it wrote."""
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("GNU binutils (as, ld) aren't installed")

    def run_(
        code: str,
        *,
        cpus: int = 1,
        memory_bytes: int = 16 * MIB,
        arguments: str = "",
        module: bytes | None = None,
        address: int = TEST_LOAD_ADDRESS,
    ) -> tuple[str, bytes]:
        kernel, environment = tmp_path / "a test.flat", tmp_path / "environment"
        kernel.write_bytes(assemble_test_kernel(code, address))
        if module is not None:
            environment.write_bytes(module)
        output = bytearray()
        ending = Ending()
        with ExitStack() as stack:
            stack.callback(ending.close)
            system = stack.enter_context(kvmkit.kvm.open(engine))
            vm = stack.enter_context(system.create_vm())
            board = X86Board(
                system,
                vm,
                memory_bytes=memory_bytes,
                cpus=cpus,
                serial_write=output.extend,
                on_reset=lambda: ending.set(Reason.RESET),
                on_power_off=lambda: ending.set(Reason.POWER_OFF),
                on_exit_code=lambda code: ending.set(Reason.EXIT, str(code)),
                testdev=True,
            )
            stack.callback(board.close)
            board.load_multiboot(kernel, None if module is None else environment, arguments)
            ended = threading.Event()

            def loop(index: int) -> None:
                run_vcpu(board.vcpus[index], board, ending, Errands(board.vcpus[index]))
                ended.set()

            threads = [threading.Thread(target=loop, args=(index,)) for index in range(cpus)]
            for thread in threads:
                thread.start()
            if not ended.wait(TIMEOUT_S):
                ending.set(Reason.STOPPED, "the test took too long")
            for vcpu, thread in zip(board.vcpus, threads, strict=True):
                vcpu.kick()
                thread.join()
            board.serial.flush()
        return f"{ending.reason} {ending.detail}".strip(), bytes(output)

    return run_


def test_entry(run: Run) -> None:
    """Magic in eax, flat segments, no paging, interrupts off; page 0 is memory."""
    code = """
        cmp eax, 0x2badb002
        jne bad
        mov eax, cr0
        and eax, 0x80000001
        cmp eax, 1
        jne bad
        mov esp, 0x3000
        pushf
        pop eax
        test eax, 0x20200
        jnz bad
        mov ax, ds
        mov es, ax
        mov dword ptr [0], 0x12345678
        cmp dword ptr [0], 0x12345678
        jne bad
        exit 0
    bad: exit 1
    """
    assert run(code) == ("exit 0", b"")


def test_what_the_kernel_is_told(run: Run) -> None:
    """Its name and arguments, its memory, its environment."""
    code = """
        mov ebp, ebx
        send ebp, 88
        send [ebp + 48], [ebp + 44]     # mmap_addr, mmap_length
        send [ebp + 16], 28             # cmdline
        mov ebx, [ebp + 24]             # mods_addr
        mov eax, [ebx + 4]
        sub eax, [ebx]
        send [ebx], eax
        exit 0
    """
    environment = b"NR_CPUS=1\nMEMSIZE=4096\n"
    memory_bytes = (3 << 30) + 4 * MIB
    end, output = run(code, arguments="one two=2 three", module=environment, memory_bytes=memory_bytes)
    assert end == "exit 0"
    info = struct.unpack_from("<13I", output)
    flags, mem_lower, mem_upper, _, _, mods_count, *_ = info
    mmap_length = info[11]
    assert flags & 0b1001101 == 0b1001101
    assert (mem_lower, mem_upper, mods_count) == (639, (3 << 20) - 1024, 1)
    rest = output[88:]
    ranges = [(addr, size, type_) for _, addr, size, type_ in struct.iter_unpack("<IQQI", rest[:mmap_length])]
    assert all(size == 20 for size, *_ in struct.iter_unpack("<IQQI", rest[:mmap_length]))
    assert ranges == [(e.addr, e.size, e.type) for e in layout.e820(memory_bytes)]
    assert rest[mmap_length:] == b"a_test.flat one two=2 three\0" + environment


def test_no_arguments_and_no_environment(run: Run) -> None:
    end, output = run("mov ebp, ebx\nsend [ebp + 16], 12\nmov eax, [ebp + 20]\nout 0xf4, eax\n1: jmp 1b")
    assert (end, output) == ("exit 0", b"a_test.flat\0")


@pytest.mark.parametrize("cpus", [1, 3])
def test_fw_cfg(run: Run, cpus: int) -> None:
    """NB_CPUS, RAM_SIZE and MAX_RAM; a key that isn't there reads as zeros, and so does what is behind a value."""
    code = """
        mov edi, 0x5000
    .macro get key, bytes
        mov dx, 0x510
        mov eax, \\key
        out dx, ax
        mov dx, 0x511
        mov ecx, \\bytes
        cld
        rep insb
    .endm
        get 5, 2
        get 3, 8
        get 0x11, 8
        get 0, 4
        get 5, 4
        send 0x5000, 26
        exit 0
    """
    end, output = run(code, cpus=cpus, memory_bytes=48 * MIB)
    assert end == "exit 0"
    assert struct.unpack("<HQQII", output) == (cpus, 48 * MIB, 0, 0, cpus)


def test_latch_ports(run: Run) -> None:
    """Accesses of each width, and of strings; the byte latch is the same one."""
    code = """
        mov eax, 0x44332211
        out 0xe0, eax
        in al, 0xe1
        mov [0x5000], al
        in ax, 0xe2
        mov [0x5001], ax
        mov al, 0x99
        out 0xe3, al
        in eax, 0xe8
        mov [0x5003], eax
        mov eax, 0xddccbbaa
        out 0xe8, eax
        mov edi, 0x5007
        mov ecx, 2
        mov dx, 0xe0
        cld
        rep insd
        in eax, 0xe4
        mov [0x500f], eax
        send 0x5000, 19
        exit 0
    """
    end, output = run(code)
    assert end == "exit 0"
    assert output == bytes.fromhex("22 3344 11223399 aabbccdd aabbccdd ffffffff")


def test_flush(run: Run) -> None:
    """A page whose mapping was taken away has what was in it, code and data; addresses without memory do no harm."""
    code = """
        mov dword ptr [0x600ffc], 0xcafe
        mov eax, 0x600123
        out 0xe4, eax
        cmp dword ptr [0x600ffc], 0xcafe
        jne bad
        lea eax, [here]
        out 0xe4, eax
    here:
        mov eax, 0xff000000
        out 0xe4, eax
        mov eax, -1
        out 0xe4, eax
        exit 0
    bad: exit 1
    """
    assert run(code) == ("exit 0", b"")


def test_memory_that_exits(run: Run) -> None:
    """64 KiB that behave as memory, for each width, read-modify-write included, and no more than that."""
    code = """
        mov ebx, 0xff000000
        mov dword ptr [ebx + 0xfffc], 0x11223344
        inc byte ptr [ebx + 0xffff]
        lock add word ptr [ebx + 0xfffc], 1
        mov eax, [ebx + 0xfffc]
        mov [0x5000], eax
        mov eax, [ebx + 0xfffe]          # half of it behind the end
        mov [0x5004], eax
        mov eax, [ebx]
        mov [0x5008], eax
        send 0x5000, 12
        exit 0
    """
    end, output = run(code)
    assert end == "exit 0"
    assert output == bytes.fromhex("45332212 2212ffff 00000000")


INTERRUPTS = """
        mov esp, 0x7000
    .macro outb port, value
        mov al, \\value
        mov dx, \\port
        out dx, al
    .endm
        outb 0x20, 0x11
        outb 0x21, 0x20
        outb 0x21, 4
        outb 0x21, 1
        outb 0x21, 0xdf                 # all but line 5
        outb 0xa1, 0xff
        lea eax, [handler]
        mov word ptr [0x5000 + 8 * 0x25], ax
        shr eax, 16
        mov word ptr [0x5000 + 8 * 0x25 + 6], ax
        mov word ptr [0x5000 + 8 * 0x25 + 2], cs
        mov word ptr [0x5000 + 8 * 0x25 + 4], 0x8e00
        lidt [idt]
        xor ebx, ebx
"""
IDT = "idt: .word 0x7ff\n.long 0x5000"


def test_interrupt_line_edge(run: Run) -> None:
    """Raising a line interrupts once, however long it stays up."""
    code = f"""
        {INTERRUPTS}
        sti
        outb 0x2005, 1
    1:  cmp ebx, 1
        jne 1b
        outb 0x2005, 1
        outb 0x2005, 0
        outb 0x2005, 0x80
    1:  cmp ebx, 2
        jb 1b
        outb 0x2005, 1
        in al, 0xe0
        cli
        mov eax, ebx
        out 0xf4, eax
    1:  jmp 1b
    handler:
        inc ebx
        mov al, 0x20
        out 0x20, al
        sti
        ret 8                           # IRET is too much for a KVM that emulates
    {IDT}
    """
    assert run(code)[0] == "exit 2"


def test_interrupt_line_level(run: Run) -> None:
    """A line that ELCR makes level-triggered interrupts as long as it is up."""
    code = f"""
        {INTERRUPTS}
        outb 0x4d0, 0x20
        outb 0x2005, 1
        sti
    1:  cmp ebx, 3
        jb 1b
        in al, 0xe0
        cli
        mov dx, 0x4d0
        in al, dx
        shl eax, 8
        mov al, bl
        and eax, 0xffff
        out 0xf4, eax
    1:  jmp 1b
    handler:
        inc ebx
        cmp ebx, 3
        jne 2f
        outb 0x2005, 0
    2:  mov al, 0x20
        out 0x20, al
        sti
        ret 8
    {IDT}
    """
    assert run(code)[0] == f"exit {0x2003}"


def test_interrupt_line_by_the_ioapic(run: Run) -> None:
    """Lines beyond the i8259s' are the IOAPIC's: line 20 shows as the interrupt request of its vector."""
    code = """
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff   # SVR: on
        mov ecx, 0xfec00000
        mov dword ptr [ecx], 0x10 + 2 * 20
        mov dword ptr [ecx + 0x10], 0x45    # fixed, edge, not masked
        mov dword ptr [ecx], 0x11 + 2 * 20
        mov dword ptr [ecx + 0x10], 0
        mov al, 1
        mov dx, 0x2014
        out dx, al
    1:  mov eax, [ebx + 0x220]              # IRR, vectors 0x40 to 0x5f
        test eax, eax
        jz 1b
        out 0xf4, eax
    2:  jmp 2b
    """
    assert run(code)[0] == "exit 32"


def test_every_line_can_be_set(run: Run) -> None:
    """Those that lead nowhere, line 2 for one, do no harm."""
    code = """
        mov dx, 0x2000
    1:  mov al, 1
        out dx, al
        mov al, 0
        out dx, al
        inc edx
        cmp dx, 0x2018
        jne 1b
        exit 0
    """
    assert run(code)[0] == "exit 0"


@pytest.mark.parametrize("cpus", [2, 4])
def test_other_processors(run: Run, cpus: int) -> None:
    """They wait for one broadcast INIT and one SIPI to page 0, and are as many as fw_cfg says."""
    code = """
        mov dx, 0x510
        mov ax, 5
        out dx, ax
        mov dx, 0x511
        in al, dx
        movzx ebp, al
        dec ebp
        lea esi, [trampoline]
        xor edi, edi
        mov ecx, offset trampoline_end - trampoline
        cld
        rep movsb
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov dword ptr [ebx + 0x300], 0xc4500    # INIT, all but self
        mov dword ptr [ebx + 0x300], 0xc4600    # SIPI, vector 0
    1:  pause
        cmp [0x5000], ebp
        jne 1b
        exit ebp
    .code16
    trampoline:
        xor ax, ax
        mov ds, ax
        lock inc word ptr [0x5000]
    2:  cli
        hlt
        jmp 2b
    trampoline_end:
    """
    assert run(code, cpus=cpus)[0] == f"exit {cpus - 1}"


def test_real_mode(run: Run) -> None:
    """A kernel at 0x8000 that drops to real mode and ends with a byte."""
    code = """
        lgdt [gdtr]
        .byte 0xea                      # far jump to the 16-bit segment
        .long real
        .word 8
    .code16
    real:
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .word landed, 0
    landed:
        xor ax, ax
        mov ds, ax
        mov si, offset text
        mov cx, 4
        mov dx, 0x3f8
        cld
        rep outsb
        mov al, 7
        out 0xf4, al
    1:  jmp 1b
    text: .ascii "real"
    gdtr: .word 15
        .long gdt
    gdt: .quad 0, 0x00009b000000ffff
    """
    assert run(code, address=0x8000) == ("exit 7", b"real")


def test_pm_timer(run: Run) -> None:
    """The port that the FADT names counts, in 24 bits."""
    code = """
        mov esi, 0xe0000                # RSDP, XSDT, and in that the FADT
        mov esi, [esi + 24]
        mov ebx, 36
    1:  mov edi, [esi + ebx]
        add ebx, 8
        cmp dword ptr [edi], 0x50434146 # FACP
        jne 1b
        cmp byte ptr [edi + 91], 4      # PM_TMR_LEN
        jne bad
        mov edx, [edi + 76]             # PM_TMR_BLK
        in eax, dx
        mov ebp, eax
    2:  in eax, dx
        test eax, 0xff000000
        jnz bad
        sub eax, ebp
        jz 2b
        exit 0
    bad: exit 1
    """
    assert run(code) == ("exit 0", b"")


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("exit 0x12345678", f"exit {0x12345678}"),
        ("mov al, 0xfe\nout 0x64, al\n1: jmp 1b", "reset"),
        ("mov esi, offset 2f\nmov ecx, 11\nmov dx, 0x8900\ncld\nrep outsb\n1: hlt\njmp 1b\n2: .ascii \"ShuShutdown\"",
         "power-off"),
    ],
)  # fmt: skip
def test_ends(run: Run, code: str, end: str) -> None:
    assert run(code)[0] == end


def test_triple_fault(run: Run) -> None:
    assert run("lidt [nothing]\nud2\nnothing: .word 0\n.long 0")[0].startswith("triple-fault vCPU 0")


def test_only_when_asked_for(engine: str) -> None:
    """A board without the test device has nothing at its ports."""
    with kvmkit.kvm.open(engine) as system, system.create_vm() as vm, ExitStack() as stack:
        board = X86Board(
            system,
            vm,
            memory_bytes=16 * MIB,
            serial_write=lambda _: None,
            on_reset=lambda: None,
            on_power_off=lambda: None,
            on_exit_code=lambda _: None,
        )
        stack.callback(board.close)
        for port in (layout.TEST_PORTS, layout.TEST_IRQ_LINES, layout.FW_CFG + 1, layout.SHUTDOWN):
            assert board._buses.ports.read(port, 1) == 0xFF
        assert board._buses.memory.read(layout.TEST_MEMORY, 4) == 0xFFFFFFFF


# What can be wrong with a file.


@pytest.fixture
def image() -> bytes:
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("GNU binutils (as, ld) aren't installed")
    return assemble_test_kernel("hlt")


def load(image: bytes, tmp_path: Path, *, arguments: str = "", module: bytes | None = None) -> None:
    from kvmkit.kvm import GuestMemory, MemoryMap

    kernel, environment = tmp_path / "k.flat", tmp_path / "environment"
    kernel.write_bytes(image)
    if module is not None:
        environment.write_bytes(module)
    memory = MemoryMap()
    memory.add(0, GuestMemory(16 * MIB))
    try:
        multiboot.load(memory, 16 * MIB, kernel, None if module is None else environment, arguments)
    finally:
        memory.close()


def with_u32(image: bytes, at: int, value: int) -> bytes:
    return image[:at] + struct.pack("<I", value) + image[at + 4 :]


ENTRY, PHOFF, PHNUM = 24, 28, 44


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda image, _: image.replace(struct.pack("<I", 0x1BADB002), bytes(4)), "no multiboot header"),
        (lambda image, _: bytes(8192) + image, "no multiboot header"),
        (lambda image, _: image[0x1000:], "no multiboot header|no ELF file"),
        (lambda image, _: b"\0" + image[1:], "no ELF file"),
        (lambda image, _: image[:4] + b"\2" + image[5:], "EI_CLASS 2.*objcopy"),
        (lambda image, _: image[:18] + b"\x28" + image[19:], "e_machine 40"),
        (lambda image, _: with_u32(image, PHNUM, 0), "e_phnum 0"),
        (lambda image, _: with_u32(image, PHNUM, 0xFFFF), "e_phnum 65535"),
        (lambda image, _: with_u32(image, PHOFF, 0xFFFFFFF0), "outside the file"),
        (lambda image, _: with_u32(image, ENTRY, 0x3FFFFF), "e_entry"),
        (lambda image, ph: with_u32(image, ph, 6), "e_entry"),
        (lambda image, ph: with_u32(image, ph + 4, 0xFFFFFFFF), "truncated"),
        (lambda image, ph: with_u32(image, ph + 16, 0xFFFFFFFF), "truncated"),
        (lambda image, ph: with_u32(image, ph + 20, 0xFFFFFFFF), "less memory|below 3 GiB"),
        (lambda image, ph: with_u32(image, ph + 20, 0xD00000), "less memory.*--memory"),
    ],
)
def test_damaged_files(
    image: bytes, tmp_path: Path, damage: Callable[[bytes, int], bytes], message: str
) -> None:
    (ph,) = struct.unpack_from("<I", image, PHOFF)
    load(image, tmp_path)
    with pytest.raises(KernelError, match=message):
        load(damage(image, ph), tmp_path)


@pytest.mark.parametrize(
    ("address", "message"), [(0x7FFF0, "what the kernel is told"), (0xE0000, "ACPI tables")]
)
def test_places_that_are_taken(tmp_path: Path, image: bytes, address: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        load(assemble_test_kernel("hlt", address), tmp_path)


def test_overlapping_segments(image: bytes, tmp_path: Path) -> None:
    ph, phentsize, phnum = (
        struct.unpack_from(format_, image, at)[0]
        for format_, at in (("<I", PHOFF), ("<H", 42), ("<H", PHNUM))
    )
    twice = image[ph : ph + phentsize] * 2
    moved = with_u32(with_u32(image, PHOFF, len(image)), PHNUM, 2) + twice
    assert phnum and phentsize == 32
    with pytest.raises(KernelError, match="overlap"):
        load(moved, tmp_path)


def test_flags_that_nobody_understands(image: bytes, tmp_path: Path) -> None:
    at = image.index(struct.pack("<I", 0x1BADB002))
    for flags, taken in ((0b11, True), (0b100, False), (0x8000, False), (1 << 16, True)):
        changed = with_u32(with_u32(image, at + 4, flags), at + 8, -(0x1BADB002 + flags) & 0xFFFFFFFF)
        if taken:
            load(changed, tmp_path)
        else:
            with pytest.raises(KernelError, match="asks for what isn't here"):
                load(changed, tmp_path)


def test_too_long(image: bytes, tmp_path: Path) -> None:
    for arguments, module, message in (
        ("x" * 20000, None, "shorten it"),
        ("a\0b", None, "NUL"),
        ("", bytes(100_000), "environment"),
    ):
        with pytest.raises(KernelError, match=message):
            load(image, tmp_path, arguments=arguments, module=module)
    load(image, tmp_path, arguments="x" * 4000, module=bytes(0x14000))
    load(image, tmp_path, module=b"")
