"""Network: user-mode networking of kvmkit's software engine against QEMU TCG's, one initramfs, alternating.

In each VM the guest runs iperf3 (one TCP connection) to a server on the host and back, and echoes single bytes that the host
sends on another connection. All is measured on the host, in its time. QEMU is `-M microvm -accel tcg -cpu max -netdev user -device
virtio-net-device`; its MTU is 1500 and can't be changed with that, kvmkit's is 65520.

Needs iperf3, busybox (fetched with the default guest) and a host with an address besides loopback, which neither guest reaches
the same way.
"""

import argparse
import io
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from kvmkit import _engine
from kvmkit.devices.net.slirp import GATEWAY, GUEST, PREFIX
from kvmkit.machine.guest import DefaultGuest, fetch_default_guest
from kvmkit.machine.initramfs import CpioWriter
from kvmkit.machine.modules import choose

MEMORY_MIB = 512
LIMIT_S = 120.0
ROWS = {"up": "guest to host, Gbit/s", "down": "host to guest, Gbit/s", "echo": "echo of a byte, µs"}
UP_PORT, DOWN_PORT, ECHO_PORT = 15201, 15202, 15203
ECHOES = 1000

_INIT = f"""#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do insmod /modules/$m; done
ip link set lo up; ip address add {GUEST}/{PREFIX} dev eth0; ip link set eth0 up; ip route add default via {GATEWAY}
for n in $(cat /proc/cmdline); do case $n in host=*) host=${{n#host=}};; seconds=*) seconds=${{n#seconds=}};; esac; done
nc $host {ECHO_PORT} -e cat
iperf3 -c $host -p {UP_PORT} -t $seconds >/dev/null
iperf3 -c $host -p {DOWN_PORT} -t $seconds -R >/dev/null
echo bench: done
reboot -f
"""


def initramfs(guest: DefaultGuest) -> bytes:
    """busybox, iperf3 with its libraries from the host, the modules, and a script as init."""
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        sys.exit("bench/net: no iperf3: apt-get install iperf3")
    listing = subprocess.run(["ldd", iperf3], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", listing)
    output = io.BytesIO()
    archive = CpioWriter(output)
    directories = {parent.as_posix()[1:] for path in libraries for parent in Path(path).parents}
    for name in sorted(directories | {"bin", "dev", "modules", "proc", "sys", "tmp"} - {""}):
        if name:
            archive.directory(name)
    archive.character_device("dev/console", (5, 1))
    for path in libraries:
        archive.file(path[1:], Path(path).read_bytes(), 0o755)
    archive.file("bin/iperf3", Path(iperf3).read_bytes(), 0o755)
    archive.file("bin/busybox", guest.busybox.read_bytes(), 0o755)
    for applet in sorted({"sh", *guest.applets} - {"busybox"}):
        archive.symlink(f"bin/{applet}", "busybox")
    modules = choose(guest.kernel.modules, ("virtio_mmio", "virtio_net"))
    for module in modules:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{module.name}\n" for module in modules).encode())
    archive.file("init", _INIT.encode(), 0o755)
    archive.close()
    return output.getvalue()


def echo_us(listener: socket.socket) -> float:
    """Microseconds until a byte comes back from the guest, the median of many."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(LIMIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ECHOES):
            start = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.perf_counter() - start)
        return statistics.median(trips) * 1e6


def measure(command: list[str], host: str) -> dict[str, float]:
    """Run a VM; Gbit/s to the host and from it, and the time of an echo."""
    with ExitStack() as stack:
        servers = {}
        for name, port in (("up", UP_PORT), ("down", DOWN_PORT)):
            servers[name] = subprocess.Popen(
                ["iperf3", "-s", "-1", "-J", "-B", host, "-p", str(port)], stdout=subprocess.PIPE, text=True
            )
            stack.callback(servers[name].wait)
            stack.callback(servers[name].kill)
        listener = stack.enter_context(socket.create_server((host, ECHO_PORT)))
        listener.settimeout(LIMIT_S)
        vm = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        stack.callback(vm.wait)
        stack.callback(vm.kill)
        figures = {"echo": echo_us(listener)}
        output, _ = vm.communicate(timeout=LIMIT_S)
        if "bench: done" not in output:
            raise RuntimeError(f"{command[0]}:\n{output[-2000:]}")
        for name, way in (("up", "sum_received"), ("down", "sum_sent")):
            result = json.loads(servers[name].communicate(timeout=10)[0])
            figures[name] = result["end"][way]["bits_per_second"] / 1e9
        return figures


def own_address() -> str:
    """The host's address on the way to anywhere else; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError as error:
            sys.exit(f"bench/net: this host has no address but loopback: {error.strerror}")
        address: str = probe.getsockname()[0]
        return address


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, spread and ratios."""
    print(f"{'':24}{'kvmkit':>24}{'QEMU TCG':>24}{'ratio of pairs':>24}")
    for what, title in ROWS.items():
        ours, theirs = ([figures[what] for figures in rows[name]] for name in ("kvmkit", "qemu"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = [f"{statistics.median(v):.3g} ({min(v):.3g}–{max(v):.3g})" for v in (ours, theirs, ratios)]
        print(f"{title:24}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    """Run the pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of VMs (default 5)")
    parser.add_argument("--seconds", type=int, default=4, help="of each direction (default 4)")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures")
    args = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("bench/net: no qemu-system-x86_64: apt-get install qemu-system-x86")
    guest = fetch_default_guest(lambda text: print(text, file=sys.stderr))
    host = own_address()
    khz = _engine.host_tsc_khz()
    append = f"quiet tsc_early_khz={khz} lpj={khz * 4} host={host} seconds={args.seconds}"
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        initrd.write_bytes(initramfs(guest))
        vmlinux = str(guest.kernel.vmlinux)
        commands = {
            "kvmkit": [
                str(Path(sys.executable).with_name("kvmkit")),
                *("run", "--engine", "soft", "--kernel", vmlinux, "--initrd", str(initrd)),
                *("--append", append, "--memory", f"{MEMORY_MIB}M", "--net", "user"),
            ],
            "qemu": [
                *(qemu, "-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB), "-smp", "1"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
                *("-netdev", "user,id=net", "-device", "virtio-net-device,netdev=net"),
                *("-kernel", vmlinux, "-initrd", str(initrd), "-append", f"console=ttyS0 panic=-1 {append}"),
            ],
        }
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for pair in range(args.pairs):
            for name, command in commands.items():
                print(f"pair {pair + 1} of {args.pairs}: {name}", end="\r", file=sys.stderr)
                rows[name].append(measure(command, host))
    version = subprocess.run(
        [qemu, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    print(f"kernel {guest.kernel.version}, {MEMORY_MIB} MiB, 1 CPU, {args.pairs} pairs; {version}")
    table(rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "qemu": version}, indent=1))


if __name__ == "__main__":
    main()
