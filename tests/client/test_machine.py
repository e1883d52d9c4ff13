"""`Machine`: its events, its end, and what it leaves behind. Kernels are tiny ones that play the default guest's part."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from kvmkit.client import Machine, MachineConfig, Share
from kvmkit.errors import KvmkitError, VmError, VmTimeout
from kvmkit.testing.kernel import assemble_kernel, puts

Kernel = Callable[[str], str]

TIMEOUT_S = 30
RESET = "\nreset\n1: jmp 1b"
SPIN = puts("up\n") + "\n1: jmp 1b"


def config(engine: str, kernel: str, **more: object) -> MachineConfig:
    return MachineConfig(engine=engine, kernel=kernel, memory="64M", agent=False, **more)  # type: ignore[arg-type]


def test_the_end_and_the_timeline(engine: str, kernel: Kernel) -> None:
    seen = []
    machine = Machine(
        config(engine, kernel(puts("kvmkit: init\r\nhi\r\n") + RESET)), lambda e: seen.append(e.name)
    )
    with machine as vm:
        assert vm.engine == {"kvm": "linux", "soft": "soft"}[engine]
        end = vm.wait(TIMEOUT_S)
        assert vm.wait(TIMEOUT_S) is end
    assert (end.reason, end.status, end.console_tail) == ("reset", None, "kvmkit: init\r\nhi\r\n")
    names = [event.name for event in vm.timeline]
    assert names == ["spawned", "started", "entered", "console", "init", "ended"]
    assert [name for name in seen if name != "progress"] == names
    times = [event.t_ns for event in vm.timeline]
    assert times == sorted(times)


def test_wait_may_time_out_and_go_on(engine: str, kernel: Kernel) -> None:
    with Machine(config(engine, kernel(SPIN))) as vm:
        with pytest.raises(VmTimeout):
            vm.wait(0.01)
        vm.halt()
        assert vm.wait(TIMEOUT_S).reason == "stopped"


def test_stop_from_another_thread(engine: str, kernel: Kernel) -> None:
    with Machine(config(engine, kernel(SPIN))) as vm:
        threading.Thread(target=vm.halt).start()
        assert vm.wait(TIMEOUT_S).reason == "stopped"


def test_kill(engine: str, kernel: Kernel) -> None:
    with Machine(config(engine, kernel(SPIN))) as vm:
        vm.kill()
        vm.kill()
        with pytest.raises(VmError, match="signal 9"):
            vm.wait(TIMEOUT_S)


def test_no_descriptor_is_left(engine: str, kernel: Kernel) -> None:
    path = kernel(puts("x") + RESET)
    null = os.open(os.devnull, os.O_RDWR)

    def boot() -> set[str]:
        with Machine(config(engine, path, output_fd=null, input_fd=null)) as vm:
            vm.wait(TIMEOUT_S)
        return set(os.listdir("/proc/self/fd"))

    try:
        assert boot() == boot()
        assert threading.active_count() == 1
    finally:
        os.close(null)


def test_started_from_a_thread_that_ends(engine: str, kernel: Kernel) -> None:
    """The VM's life is the process's, not the starting thread's."""
    machine = Machine(config(engine, kernel(SPIN)))
    thread = threading.Thread(target=machine.start)
    thread.start()
    thread.join()
    with pytest.raises(VmTimeout):
        machine.wait(0.1)
    machine.close()
    machine.close()


def test_the_client_is_killed(engine: str, kernel: Kernel) -> None:
    """The VM process doesn't outlive its client, in the middle of running guest code."""
    program = f"""
import os, signal
from kvmkit.client import Machine, MachineConfig, Share
vm = Machine(MachineConfig(engine={engine!r}, kernel={kernel(SPIN)!r}, memory="64M", agent=False, output_fd=1))
vm.start()
os.write(2, b"%d" % vm.pid)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # The end of its stdout is the end of the last process that holds it.
    _, pid = process.communicate(timeout=TIMEOUT_S)
    assert not os.path.exists(f"/proc/{int(pid)}/fd/1")


def test_a_bad_kernel_is_named(engine: str) -> None:
    with pytest.raises(VmError, match="/nowhere/vmlinuz"), Machine(config(engine, "/nowhere/vmlinuz")):
        pass


def test_a_wrong_configuration() -> None:
    machine = Machine(MachineConfig(engine="soft", memory=5000))
    with pytest.raises(VmError, match="5000 bytes"):
        machine.__enter__()
    with pytest.raises(KvmkitError):
        machine.start()


def test_use_before_start() -> None:
    machine = Machine(MachineConfig())
    for use in (lambda: machine.engine, lambda: machine.pid, lambda: machine.wait()):
        with pytest.raises(KvmkitError):
            use()
    machine.kill()
    machine.close()


def test_assembled_kernels_are_kept(tmp_path: os.PathLike[str]) -> None:
    assert assemble_kernel("hlt") == assemble_kernel("hlt")
    assert assemble_kernel("hlt")[:4] == b"\x7fELF"


def test_a_share_is_added_before_the_start(tmp_path: os.PathLike[str]) -> None:
    machine = Machine(MachineConfig(shares=(Share("/a", "/b"),)))
    machine.add_share(tmp_path, "/c", read_only=True)
    assert machine.config.shares == (Share("/a", "/b"), Share(tmp_path, "/c", read_only=True))
