"""The console as a virtio device, under Debian's kernel."""

import os

import pytest

from kvmkit.client import Machine

pytestmark = pytest.mark.slow


def test_a_command_on_hvc0(linux_engine: str) -> None:
    """It has the terminal, every byte of its output comes, and its status."""
    reading, writing = os.pipe()
    command = ("sh", "-c", "tty; seq 20000; exit 5")
    with Machine(
        engine=linux_engine, console="virtio", agent=False, console_command=command, output_fd=writing
    ) as vm:
        os.close(writing)
        with os.fdopen(reading, "rb") as output:
            said = output.read()
        end = vm.wait(60)
    assert said.decode().splitlines() == ["/dev/hvc0", *map(str, range(1, 20001))]
    assert (end.status, end.reason) == (5, "power-off")


def test_its_size_and_what_is_typed(linux_engine: str) -> None:
    typed, keyboard = os.pipe()
    reading, writing = os.pipe()
    command = ("sh", "-c", "read line; stty size; echo got $line")
    with Machine(
        engine=linux_engine,
        console="virtio",
        agent=False,
        console_command=command,
        output_fd=writing,
        input_fd=typed,
    ) as vm:
        os.close(writing)
        os.close(typed)
        vm.resize_console(33, 99)
        os.write(keyboard, b"this\n")
        with os.fdopen(reading, "rb") as output:
            said = output.read()
        vm.wait(60)
    os.close(keyboard)
    assert b"got this\n" in said
    assert b"33 99\n" in said
