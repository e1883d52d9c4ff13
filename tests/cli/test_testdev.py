"""``kvmkit run --testdev``: bare-metal test kernels as real processes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.testing.kernel import assemble_test_kernel

from .conftest import Kvmkit

Run = Callable[..., Kvmkit]
MakeKernel = Callable[[str], str]


@pytest.fixture
def flat(tmp_path: Path) -> MakeKernel:
    """A function that makes a test kernel of assembly and returns its path."""
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("GNU binutils (as, ld) aren't installed")

    def make(code: str) -> str:
        path = tmp_path / "t.flat"
        path.write_bytes(assemble_test_kernel(code))
        return str(path)

    return make


def arguments(engine: str, path: str, *more: str) -> list[str]:
    return ["--testdev", "--engine", engine, "--kernel", path, *more]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("exit 0", 1),
        ("exit 0xffffff81", 3),
        ("mov al, 61\nout 0xf4, al\n1: jmp 1b", 123),
    ],
)
def test_exit_codes(engine: str, run_kvmkit: Run, flat: MakeKernel, code: str, status: int) -> None:
    """The status is (code << 1) | 1, as a shell sees it, and nothing is said about it."""
    assert run_kvmkit(*arguments(engine, flat(code))).finish() == (status, b"", "")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("mov al, 0xfe\nout 0x64, al\n1: jmp 1b", 120, "reset"),
        ("lidt [2f]\nud2\n2: .long 0, 0", 122, "triple fault"),
        ("mov esi, offset 2f\nmov ecx, 8\nmov dx, 0x8900\ncld\nrep outsb\n1: hlt\njmp 1b\n2: .ascii \"Shutdown\"", 0, ""),
    ],
)  # fmt: skip
def test_other_ends(
    engine: str, run_kvmkit: Run, flat: MakeKernel, code: str, status: int, said: str
) -> None:
    got, out, err = run_kvmkit(*arguments(engine, flat(code))).finish()
    assert (got, out) == (status, b"")
    assert said in err and bool(err) == bool(said)


def test_output_arguments_and_environment(
    engine: str, run_kvmkit: Run, flat: MakeKernel, tmp_path: Path
) -> None:
    """Every byte as it is, "panic" too; the arguments behind the file's name, and the environment."""
    path = flat("""
        mov ebp, ebx
        send [ebp + 16], 22
        mov ebx, [ebp + 24]
        send [ebx], 4
        xor ebx, ebx
        mov dx, 0x3f8
    1:  mov al, bl
        out dx, al
        inc bl
        jnz 1b
        exit 0
    """)
    environment = tmp_path / "env"
    environment.write_bytes(b"A=1\n")
    more = ("--append", "Kernel panic -x", "--initrd", str(environment))
    result = run_kvmkit(*arguments(engine, path, *more)).finish()
    assert result == (1, b"t.flat Kernel panic -xA=1\n" + bytes(range(256)), "")


def test_what_is_typed(engine: str, run_kvmkit: Run, flat: MakeKernel, tmp_path: Path) -> None:
    path = flat("1: mov dx, 0x3fd\nin al, dx\ntest al, 1\njz 1b\nmov dx, 0x3f8\nin al, dx\nout 0xf4, al")
    typed = tmp_path / "typed"
    typed.write_bytes(b"\x05")
    with typed.open() as stdin:
        assert run_kvmkit(*arguments(engine, path), stdin=stdin).finish() == (11, b"", "")


def test_timeout(engine: str, run_kvmkit: Run, flat: MakeKernel) -> None:
    status, _, err = run_kvmkit(*arguments(engine, flat("1: jmp 1b"), "--timeout", "1")).finish()
    assert status == 124 and "still ran after 1 s" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--", "true"], "no command"),
        (["--detach"], "no --detach"),
        (["--stats"], "no --stats"),
        (["/"], "no root"),
        (["--net", "user"], "no command, root, disks"),
        (["--console", "virtio"], "virtio console"),
    ],
)
def test_what_doesnt_go_with_it(run_kvmkit: Run, flat: MakeKernel, more: list[str], said: str) -> None:
    status, _, err = run_kvmkit("--testdev", "--kernel", flat("exit 0"), *more).finish()
    assert status == 125 and said in err


def test_a_kernel_is_needed(run_kvmkit: Run) -> None:
    status, _, err = run_kvmkit("--testdev").finish()
    assert status == 125 and "--kernel" in err


def test_what_is_no_test_kernel(run_kvmkit: Run, flat: MakeKernel, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bytes(4096))
    status, _, err = run_kvmkit("--testdev", "--kernel", str(path)).finish()
    assert status == 125 and "no multiboot header" in err
    status, _, err = run_kvmkit("--kernel", flat("exit 0"), "--initrd", str(path)).finish()
    assert status == 125 and "--testdev" in err
