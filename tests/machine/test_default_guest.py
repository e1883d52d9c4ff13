from collections.abc import Callable

import pytest

from kvmkit.machine.guest import DefaultGuest, console_command

pytestmark = pytest.mark.slow

Boot = Callable[..., bytes]

DUMP = 'for a; do printf %s "$a" | hexdump -v -e \'1/1 "%02x"\'; echo .; done'
ALL_BYTES = bytes(range(1, 256)).decode(errors="surrogateescape")


def between_the_markers(console: bytes) -> tuple[bytes, int]:
    """What the command wrote, and its status; fails if the markers aren't as kvmkit.vmm reads them."""
    _, _, rest = (b"\n" + console).partition(b"\nkvmkit: command\r\n")
    output, marker, status = rest.partition(b"\r\nkvmkit: exit ")
    assert marker, console
    return output.replace(b"\r\n", b"\n"), int(status.split(b"\r\n")[0])


def test_arguments_survive_and_the_status_comes_back(guest: DefaultGuest, boot_in_qemu: Boot) -> None:
    arguments = [
        "",
        " ",
        "'",
        "'\\''",
        '"$HOME" `id` $(id) \\',
        "a\nb\n",
        "-e",
        "*",
        "ünïcode",
        ALL_BYTES,
        "\udcff\udc80",
    ]
    command = ("sh", "-c", DUMP + "; tty; id -u; pwd; exit 41", "sh", *arguments)
    output, status = between_the_markers(boot_in_qemu(guest.initramfs(console_command(command))))
    expected = [argument.encode(errors="surrogateescape").hex() for argument in arguments]
    assert output.decode().splitlines() == [*(line + "." for line in expected), "/dev/ttyS0", "0", "/root"]
    assert status == 41


@pytest.mark.parametrize(
    ("command", "said", "status"),
    [
        (("no-such-command",), b"No such file", 127),
        (("sh", "-c", "printf end; kill -9 $$"), b"end", 137),
    ],
)
def test_other_ends(
    guest: DefaultGuest, boot_in_qemu: Boot, command: tuple[str, ...], said: bytes, status: int
) -> None:
    output, reported = between_the_markers(boot_in_qemu(guest.initramfs(console_command(command))))
    assert said in output
    assert reported == status


def test_a_shell_with_job_control(guest: DefaultGuest, boot_in_qemu: Boot) -> None:
    """All output comes out before the power goes, too: 64 KiB of it, and then the end."""
    script = b"sleep 100 &\njobs\nkill %1\necho $TERM\nhead -c 65536 /dev/zero | tr '\\0' x\necho\necho last\nexit\n"
    boot = {**console_command(("sh", "-l")), "environment": {"TERM": "some-term"}}
    console = boot_in_qemu(guest.initramfs(boot), typed=script)
    assert b"can't access tty" not in console
    assert b"[1]+  Running" in console
    assert b"\r\nsome-term\r\n" in console
    assert b"x" * 65536 in console
    assert console.rindex(b"\r\nlast\r\n") > console.rindex(b"xxxx")
