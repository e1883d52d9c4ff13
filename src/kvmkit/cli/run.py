"""``kvmkit run``: boot a Linux; run a command in it, or use its console."""

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import click

from kvmkit.cli.terminal import EscapeFilter, raw_terminal
from kvmkit.client import End, Event, Machine, MachineConfig
from kvmkit.errors import VmTimeout

EXIT_TIMEOUT = 124
EXIT_KVMKIT = 125
EXIT_GUEST_DIED = 126
EXIT_OUTPUT_CLOSED = 141
"""128 + SIGPIPE, as a shell reports it."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Memory(click.ParamType[int]):
    """A size like 256M, 1G, 262144K or in bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size: give e.g. 256M or 1G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


_FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)


@click.command()
@click.option(
    "--engine",
    type=click.Choice(["auto", "kvm", "soft"]),
    default="auto",
    show_default=True,
    help="The kernel's KVM, kvmkit's own, or the faster one here.",
)
@click.option("--kernel", type=_FILE, help="A bzImage or an ELF vmlinux; default: Debian's cloud kernel.")
@click.option("--initrd", type=_FILE, help="An initial RAM disk for --kernel.")
@click.option("--append", default="", help="Added to the kernel's command line.")
@click.option("--memory", type=Memory(), default="256M", show_default=True, help="The guest's memory.")
@click.option(
    "--cpus", type=click.IntRange(1, 64), default=1, show_default=True, help="The guest's processors."
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds until it is ended.")
@click.option("--verbose", is_flag=True, help="Print the kernel command line and a time line (on stderr).")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    engine: str,
    kernel: str | None,
    initrd: str | None,
    append: str,
    memory: int,
    cpus: int,
    timeout: float | None,
    verbose: bool,
    command: tuple[str, ...],
) -> None:
    """Boot a Linux and run COMMAND in it, or use its console.

    With COMMAND (after --), the default guest boots, on your kernel with --kernel, and runs it as root; its output and
    exit status become kvmkit's. Without, on a terminal, you are on the guest's console: Ctrl-A x ends it, Ctrl-A Ctrl-A
    types Ctrl-A. Else what comes in on stdin is typed on the console, and the console goes to stdout byte by byte,
    until the guest powers off or resets.

    The default guest is Debian's cloud kernel and busybox, fetched once with this machine's apt into ~/.cache/kvmkit.

    \b
    Examples:
      kvmkit run -- uname -a                            a command in the default guest
      kvmkit run -- sh -c 'dmesg | tail -n 5; exit 3'   a script; kvmkit exits with 3
      kvmkit run                                        a shell on its console
      kvmkit run --verbose --timeout 60 -- true         where the time goes, 60 s at most
      kvmkit run --kernel vmlinuz --initrd initrd.img   a system of your own
      kvmkit run --kernel vmlinux >console.log          its console into a file

    \b
    Exit status:
      the command's, or 0 when the guest powered off, reset, or was ended by Ctrl-A x
      124  the timeout was over
      125  kvmkit failed: wrong options, no engine, a kernel that isn't one
      126  the guest died: kernel panic, triple fault, or the end before the command's
      130  Ctrl-C           141  nobody read the output
    """  # noqa: D301 - click wants the character itself
    interactive = not command and os.isatty(0) and os.isatty(1)
    follower = Follower(verbose)
    config = MachineConfig(engine, kernel, initrd, append, memory, command, output_fd=1, cpus=cpus)
    with ExitStack() as stack:
        if interactive:
            click.echo("The guest's console. Ctrl-A x ends it.", err=True)
            reading, typed = os.pipe()
            stack.callback(os.close, reading)
            config = MachineConfig(
                engine, kernel, initrd, append, memory, output_fd=1, input_fd=reading, cpus=cpus
            )
        elif not command and not os.isatty(0):
            config = MachineConfig(engine, kernel, initrd, append, memory, output_fd=1, input_fd=0, cpus=cpus)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            vm = stack.enter_context(_started(Machine(config, follower), timeout))
            if verbose:
                click.echo(f"engine: {vm.engine} ({vm.engine_reason})\ncommand line: {vm.cmdline}", err=True)
            if interactive:
                stack.enter_context(raw_terminal(0))
                threading.Thread(target=_type, args=(typed, vm), daemon=True).start()
            end = vm.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except VmTimeout:
            stack.close()
            click.echo(f"kvmkit: the guest still ran after {timeout:g} s", err=True)
            sys.exit(EXIT_TIMEOUT)
    if interactive:
        click.echo(err=True)  # the guest left the cursor anywhere
    if verbose:
        follower.print_timeline(vm.timeline)
    sys.exit(_status(end, command, shown=any(event.name == "init" for event in vm.timeline)))


@contextmanager
def _started(vm: Machine, timeout_s: float | None) -> Iterator[Machine]:
    try:
        vm.start(timeout_s)
        yield vm
    finally:
        vm.close()


def _type(fd: int, vm: Machine) -> None:
    """Give the guest what is typed, until Ctrl-A x or the terminal's end."""
    escapes = EscapeFilter()
    try:
        while data := os.read(0, 4096):
            out, leave = escapes.feed(data)
            while out:
                out = out[os.write(fd, out) :]
            if leave:
                break
    except OSError:  # the terminal hung up, or the VM is gone
        pass
    vm.stop()


def _status(end: End, command: tuple[str, ...], *, shown: bool = False) -> int:
    """The exit status that an end means; says on stderr what isn't plain. `shown`: the console's last output was."""
    if end.reason == "engine":
        click.echo(f"kvmkit: the engine can't go on: {end.detail}", err=True)
        return EXIT_KVMKIT
    if end.reason == "output-closed":
        if os.strerror(errno.EPIPE) not in end.detail:
            click.echo(f"kvmkit: {end.detail}", err=True)
            return EXIT_KVMKIT
        return EXIT_OUTPUT_CLOSED
    if end.status is not None and (command or end.reason == "exit"):
        return end.status
    if end.reason in ("panic", "triple-fault", "halted") or command:
        what = {
            "panic": "its kernel panicked",
            "triple-fault": "a triple fault",
            "halted": "it halted for good",
        }
        why = what.get(end.reason, f"{end.reason} before the command's end")
        click.echo(f"kvmkit: the guest died: {why}{f', {end.detail}' if end.detail else ''}", err=True)
        if command and not shown and end.console_tail:
            click.echo("its last output:\n" + end.console_tail.replace("\r\n", "\n"), err=True)
        return EXIT_GUEST_DIED
    return 0


class Follower:
    """Shows progress on stderr as events come in, and the time line at the end."""

    _NAMES: ClassVar = {
        "spawned": "VM process started",
        "started": "VM built",
        "entered": "kernel entered",
        "console": "first console byte",
        "init": "init runs",
        "exit": "command done",
        "ended": "VM ended",
    }

    def __init__(self, verbose: bool) -> None:
        """With `verbose`, or on a terminal, progress is shown."""
        self._progress = verbose or os.isatty(2)

    def __call__(self, event: Event) -> None:
        """Take an event of the machine."""
        if event.name == "progress" and self._progress:
            click.echo(event.details["text"], err=True)

    def print_timeline(self, timeline: list[Event]) -> None:
        """Print milliseconds since this process started."""
        start_ns = _process_start_ns()
        click.echo("time line, ms since kvmkit's start:", err=True)
        for event in timeline:
            if event.name in self._NAMES:
                ms = (event.t_ns - start_ns) / 1e6
                click.echo(f"{ms:10.1f}  {self._NAMES[event.name]}", err=True)


def _process_start_ns() -> int:
    """When this process started, on CLOCK_MONOTONIC, to the kernel's 10 ms (proc(5), /proc/PID/stat, starttime)."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    started_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns)
