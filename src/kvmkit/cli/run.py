"""``kvmkit run``: boot a Linux; run a command in it, or use its console."""

import dataclasses
import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from kvmkit.cli import EXIT_KVMKIT
from kvmkit.cli.arguments import (
    CommandAfterDashes,
    DiskArgument,
    Memory,
    ShareArgument,
    environment_options,
)
from kvmkit.cli.progress import Follower, print_stats
from kvmkit.cli.session import run_in
from kvmkit.cli.terminal import following_size, raw_terminal, type_into
from kvmkit.client import Disk, End, Machine, MachineConfig, Share
from kvmkit.errors import AgentError, KvmkitError, VmError, VmTimeout

EXIT_TEST_RESET = 120
EXIT_TEST_TRIPLE_FAULT = 122
"""Both even: what a test kernel says by itself is odd."""
EXIT_GUEST_DIED = 123
EXIT_TIMEOUT = 124
EXIT_OUTPUT_CLOSED = 141
"""128 + SIGPIPE, as a shell reports it."""

_END_S = 2.0
_LONG_S = 20.0

_FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)
_DIRECTORY = click.Path(exists=True, file_okay=False, resolve_path=True)


@click.command(cls=CommandAfterDashes)
@click.argument("root", required=False)
@click.option("--root", "root_option", metavar="ROOT", help="The same as the argument.")
@click.option("--memory", type=Memory(), help="The guest's memory.  [default: 256M]")
@click.option(
    "--arch",
    type=click.Choice(["host", "x86-64", "arm64"]),
    help="The guest's architecture; so far it has to be the host's.  [default: host]",
)
@click.option("--cpus", type=click.IntRange(1, 64), help="The guest's processors.  [default: 1]")
@click.option(
    "--cpu",
    metavar="MODEL[,±FEATURE...]",
    help="host, x86-64-v2, -v3 or -v4; +name and -name.  [default: host]",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    type=DiskArgument(),
    help="A disk image, raw: read-only, or its changes thrown away, or kept in a file of their own.",
)
@click.option(
    "--share", "shares", multiple=True, type=ShareArgument(), help="A directory of the host's for the guest."
)
@click.option(
    "--net",
    "network",
    metavar="none|user|tap:NAME",
    help="Network: out to where you get, without root.  [default: none]",
)
@environment_options
@click.option("--detach", "-d", is_flag=True, help="Leave it running and print its name.")
@click.option("--name", help="Its name, for kvmkit exec and the like.")
@click.option("--config", type=_FILE, help="A TOML file with any of these; the command line goes first.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "kvm", "soft"]),
    help="The kernel's KVM, kvmkit's own, or the faster one here.  [default: auto]",
)
@click.option(
    "--kernel", type=_FILE, help="A bzImage, ELF vmlinux or arm64 Image; default: Debian's cloud kernel."
)
@click.option(
    "--modules", type=_DIRECTORY, help="That kernel's modules (lib/modules/VERSION), if virtio is in them."
)
@click.option("--initrd", type=_FILE, help="An initial RAM disk for --kernel: a system of your own.")
@click.option(
    "--console",
    type=click.Choice(["serial", "virtio"]),
    help="What the console is; virtio has the terminal's size.  [default: serial]",
)
@click.option("--append", help="Added to the kernel's command line.")
@click.option(
    "--testdev",
    is_flag=True,
    default=None,
    help="--kernel is a bare-metal test (kvm-unit-tests); --append: its arguments, --initrd: its environment.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds until it is ended.")
@click.option(
    "--stats",
    is_flag=True,
    help="Show what the engine counted (on stderr): exits, translations, TLB misses, ...",
)
@click.option("--verbose", is_flag=True, help="Show the kernel's log and a time line (on stderr).")
def run(
    root: str | None,
    root_option: str | None,
    disks: tuple[Disk, ...],
    shares: tuple[Share, ...],
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    user: str | None,
    detach: bool,
    config: str | None,
    timeout: float | None,
    stats: bool,
    verbose: bool,
    command: tuple[str, ...],
    **given: Any,
) -> None:
    """Boot a Linux and run COMMAND in it.

    ROOT is what the guest's file system is made from: debian:bookworm (built on first use), an ext4 image, an OCI layout or
    a docker save archive, or a directory of the host, / for its own. What the guest writes there goes with it. Without ROOT
    it is busybox.

    COMMAND (after --) has your stdin, stdout and stderr, or a terminal if all three are one; its exit status becomes
    kvmkit's. Without COMMAND it is what the image says, or a shell. Ctrl-A x ends the guest from a terminal, Ctrl-A
    Ctrl-A types Ctrl-A.

    With --initrd, or --kernel and no ROOT and no COMMAND, the guest is your own: stdin is typed on its serial console, and
    the console goes to stdout byte by byte, until it powers off or resets.

    With --testdev, --kernel is a multiboot kernel with the test device of kvm-unit-tests, and its exit code becomes kvmkit's
    exit status.

    Debian's kernel and busybox are fetched once with this machine's apt into ~/.cache/kvmkit.

    \b
    Examples:
      kvmkit run -- uname -a                            a command in a fresh guest
      kvmkit run                                        a shell in one
      kvmkit run debian:bookworm -- python3 -V          in a Debian, which is built on first use
      kvmkit run / --share .:/src -w /src -- make       on this machine's own root, unharmed
      kvmkit run --net user debian:bookworm             a shell with a network
      kvmkit run -d --name web -- httpd -f              leave it running: kvmkit exec web -- ps
      kvmkit run --verbose --timeout 60 -- true         where the time goes, 60 s at most
      kvmkit run --kernel vmlinuz --initrd initrd.img   a system of your own
      kvmkit run --testdev --kernel msr.flat --cpus 2   a bare-metal test

    \b
    Exit status:
      the command's, or 128 + N if signal N ended it; 127 if it isn't there, 126 if it can't be executed
      0    the guest powered off, reset, or was ended by Ctrl-A x
      123  the guest died: kernel panic, triple fault, or its end before the command's
      124  the timeout was over
      125  kvmkit failed: wrong options, no engine, a kernel that isn't one
      130  Ctrl-C           141  nobody read the output

    \b
    With --testdev:
      (CODE << 1) | 1, its low 8 bits, for CODE written to port 0xf4: always odd, and 1 for a test that passed
      0    powered off ("Shutdown" to port 0x8900, or by ACPI), or ended by Ctrl-A x
      120  reset            122  a triple fault
    """  # noqa: D301 - click wants the character itself
    if root and root_option:
        raise click.UsageError(f"two roots, {root} and {root_option}; a command comes after --")
    machine = _config(config, given, root or root_option, disks, shares)
    verbose = verbose or machine.verbose
    follower = Follower(verbose)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        if machine.testdev:
            if command or detach or stats or machine.root is not None or machine.kernel is None:
                raise click.UsageError(
                    "--testdev takes a --kernel, and no root, no command, no --detach and no --stats"
                )
            status = _console(dataclasses.replace(machine, agent=False), follower, deadline, verbose)
        elif machine.initrd is not None or (machine.kernel is not None and not machine.root and not command):
            if command:
                raise click.UsageError(
                    "an initrd is a system of your own, in which kvmkit can't run a command"
                )
            if stats:
                raise click.UsageError("--stats goes with a command, which ends before the guest does")
            status = _console(dataclasses.replace(machine, agent=False), follower, deadline, verbose)
        elif detach:
            if timeout is not None or stats:
                raise click.UsageError("--timeout and --stats go with a guest that kvmkit run waits for")
            status = _detach(machine, command, dict(env), follower)
        else:
            status = _run(
                machine,
                command,
                env=dict(env),
                cwd=cwd,
                user=user,
                follower=follower,
                deadline=deadline,
                verbose=verbose,
                stats=stats,
            )
    except VmTimeout:
        if timeout is None:  # the agent didn't come up
            raise
        click.echo(f"kvmkit: the guest still ran after {timeout:g} s", err=True)
        status = EXIT_TIMEOUT
    sys.exit(status)


def _config(
    path: str | None,
    given: dict[str, Any],
    root: str | None,
    disks: tuple[Disk, ...],
    shares: tuple[Share, ...],
) -> MachineConfig:
    try:
        config = MachineConfig.from_toml(path) if path else MachineConfig()
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    options = {name: value for name, value in given.items() if value is not None}
    if root is not None:
        options["root"] = root
    return dataclasses.replace(config, disks=config.disks + disks, shares=config.shares + shares, **options)


def _run(
    config: MachineConfig,
    command: tuple[str, ...],
    *,
    env: dict[str, str],
    cwd: str | None,
    user: str | None,
    follower: Follower,
    deadline: float | None,
    verbose: bool,
    stats: bool,
) -> int:
    """Run the command through the agent."""
    output_fd = 2 if verbose else None
    if command and config.kernel is not None:  # a kernel of the user's may have no vsock
        config = dataclasses.replace(
            config, console_command=command, console_fallback=True, environment={**config.environment, **env}
        )
        output_fd = 2 if verbose else 1
    config = dataclasses.replace(config, verbose=verbose, output_fd=output_fd)
    with _started(Machine(config, follower), deadline) as vm:
        if verbose:
            click.echo(f"engine: {vm.engine} ({vm.engine_reason})\ncommand line: {vm.cmdline}", err=True)
        image = vm.image
        try:
            _wait_ready(vm, deadline)
            for warning in vm.warnings:
                click.echo(f"kvmkit: in the guest: {warning}", err=True)
            status = run_in(
                vm,
                command or (image.command if image else ()) or ("sh", "-l"),
                env=env,
                cwd=cwd or (image.cwd if image else "") or None,
                user=user or (image.user if image else "") or None,
                timeout_s=_left(deadline, None),
                on_escape=vm.halt,
            )
        except (VmError, AgentError):
            end = _end(vm)
            if end is None:
                raise
            if end.reason == "stopped":
                return 0
            shown = verbose or (output_fd is not None and any(event.name == "init" for event in vm.timeline))
            return _status(end, unfinished=bool(command), shown=shown)
        if stats:
            print_stats(vm.stats())
        if any(not disk.read_only and not disk.temporary for disk in config.disks):
            vm.stop()  # so that what the guest has written is on them
    if verbose:
        follower.print_timeline(vm.timeline)
    return status


def _wait_ready(vm: Machine, deadline: float | None) -> None:
    """Wait for the agent; say on a terminal that it takes long."""
    try:
        vm.wait_ready(min(_LONG_S, _left(deadline, _LONG_S)))
    except VmTimeout:
        if deadline is not None and time.monotonic() >= deadline:
            raise
        if os.isatty(2):
            click.echo(
                "The guest still boots; kvmkit run --verbose shows what it does. Ctrl-C ends it.", err=True
            )
        vm.wait_ready(_left(deadline, 3600.0))


def _end(vm: Machine) -> End | None:
    """How it ended, if it did: the agent's connection may be gone a little sooner."""
    try:
        return vm.wait(_END_S)
    except KvmkitError:
        return None


def _detach(config: MachineConfig, command: tuple[str, ...], env: dict[str, str], follower: Follower) -> int:
    config = dataclasses.replace(
        config, detached=True, console_command=command, environment={**config.environment, **env}
    )
    with _started(Machine(config, follower), None) as vm:
        vm.wait_ready()
        click.echo(vm.name)
    return 0


def _console(config: MachineConfig, follower: Follower, deadline: float | None, verbose: bool) -> int:
    """Use the serial console of a system of the user's."""
    interactive = os.isatty(0) and os.isatty(1)
    with ExitStack() as stack:
        typed = -1
        input_fd = 0
        if interactive:
            click.echo("The guest's console. Ctrl-A x ends it.", err=True)
            input_fd, typed = os.pipe()
            stack.callback(os.close, input_fd)
        config = dataclasses.replace(config, output_fd=1, input_fd=None if os.isatty(input_fd) else input_fd)
        vm = stack.enter_context(_started(Machine(config, follower), deadline))
        if verbose:
            click.echo(f"engine: {vm.engine} ({vm.engine_reason})\ncommand line: {vm.cmdline}", err=True)
        if interactive:
            stack.enter_context(following_size(vm.resize_console))
            stack.enter_context(raw_terminal(0))
            threading.Thread(target=type_into, args=(typed, vm.halt), daemon=True).start()
        end = vm.wait(_left(deadline, None))
    if interactive:
        click.echo(err=True)  # the guest left the cursor anywhere
    if verbose:
        follower.print_timeline(vm.timeline)
    return _test_status(end) if config.testdev else _status(end)


def _left(deadline: float | None, without: float | None) -> Any:
    return without if deadline is None else max(0.0, deadline - time.monotonic())


@contextmanager
def _started(vm: Machine, deadline: float | None) -> Iterator[Machine]:
    try:
        vm.start(_left(deadline, None))
        yield vm
    finally:
        vm.close()


def _test_status(end: End) -> int:
    """The exit status that a test kernel's end means."""
    match end.reason:
        case "exit":
            return (int(end.detail) << 1 | 1) & 0xFF
        case "triple-fault":
            click.echo(f"kvmkit: a triple fault, {end.detail}", err=True)
            return EXIT_TEST_TRIPLE_FAULT
        case "reset" | "panic":  # the panic is but a word that it printed
            click.echo("kvmkit: the guest reset itself", err=True)
            return EXIT_TEST_RESET
    return _status(end)


def _status(end: End, *, unfinished: bool = False, shown: bool = True) -> int:
    """The exit status that an end means; says on stderr what isn't plain.

    `unfinished`: there was a command, whose end isn't known otherwise. `shown`: the user has seen the console's last output.
    """
    if end.reason == "engine":
        click.echo(f"kvmkit: the engine can't go on: {end.detail}", err=True)
        return EXIT_KVMKIT
    if end.reason == "output-closed":
        if os.strerror(errno.EPIPE) not in end.detail:
            click.echo(f"kvmkit: {end.detail}", err=True)
            return EXIT_KVMKIT
        return EXIT_OUTPUT_CLOSED
    if end.status is not None:
        return end.status
    what = {"panic": "its kernel panicked", "triple-fault": "a triple fault", "halted": "it halted for good"}
    if end.reason in what or unfinished:
        why = what.get(end.reason, f"{end.reason} before the command's end")
        click.echo(f"kvmkit: the guest died: {why}{f', {end.detail}' if end.detail else ''}", err=True)
        if not shown and end.console_tail:
            click.echo("its last output:\n" + end.console_tail.replace("\r\n", "\n"), err=True)
        return EXIT_GUEST_DIED
    return 0
