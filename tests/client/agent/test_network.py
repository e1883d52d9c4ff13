"""The guest's network, used by Linux."""

import fcntl
import hashlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from kvmkit.client import Machine
from kvmkit.devices.net import BackendError
from kvmkit.devices.net.slirp import Slirp
from kvmkit.devices.net.tap import Tap
from kvmkit.machine.guest import DefaultGuest

from .conftest import PROGRAM

pytestmark = pytest.mark.slow

DATA = random.Random(7).randbytes(10_000_000)
SUM = hashlib.sha256(DATA).hexdigest()
HOST, GUEST = "198.18.78.1", "198.18.78.2"
SIOCSIFADDR, SIOCSIFFLAGS = 0x8916, 0x8914


@pytest.fixture(scope="module", autouse=True)
def _can_boot(default_guest: DefaultGuest) -> None:
    if not PROGRAM.exists():
        pytest.skip("the agent isn't built: make build")


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """On the user's network."""
    try:
        Slirp().close()
    except BackendError as error:
        pytest.skip(str(error))
    with Machine(network="user") as vm:
        yield vm


@pytest.fixture
def on_tap() -> Iterator[Machine]:
    """On an interface that is made for it; the host's side has HOST, the guest GUEST."""
    name = f"kvmkit{os.getpid() % 1000000}"
    try:
        Tap(name).close()
    except BackendError as error:
        pytest.skip(str(error))
    with Machine(network=f"tap:{name}") as vm:
        vm.wait_ready()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for request, value in (
                (SIOCSIFADDR, struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(HOST))),
                (SIOCSIFFLAGS, struct.pack("=H", 0x1 | 0x40)),  # IFF_UP | IFF_RUNNING
            ):
                fcntl.ioctl(control, request, struct.pack("16s24s", name.encode(), value))
        vm.run(["ip", "address", "add", f"{GUEST}/24", "dev", "eth0"], check=True)
        vm.run(["ip", "link", "set", "eth0", "up"], check=True)
        yield vm


def own_address() -> str:
    """An address of the host that isn't loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            pytest.skip(f"this host has no network: {error.strerror}")
        address: str = probe.getsockname()[0]
        return address


def serve(address: str, talk: Callable[[socket.socket], None]) -> int:
    """Have a thread `talk` to who connects first; the port."""
    listener = socket.create_server((address, 0))
    listener.settimeout(60)

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            connection.settimeout(60)
            talk(connection)

    threading.Thread(target=run, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def transfers(vm: Machine, address: str) -> None:
    """Ten megabytes from the host to the guest, and back."""
    port = serve(address, lambda connection: connection.sendall(DATA))
    down = vm.run(
        ["sh", "-c", f"nc {address} {port} </dev/null | tee /tmp/data | sha256sum"], text=True, timeout_s=60
    )
    assert down.stdout.split()[0] == SUM
    got = hashlib.sha256()
    done = threading.Event()

    def take(connection: socket.socket) -> None:
        while data := connection.recv(1 << 20):
            got.update(data)
        done.set()

    port = serve(address, take)
    vm.run(["sh", "-c", f"nc {address} {port} < /tmp/data"], check=True, timeout_s=60)
    assert done.wait(60)
    assert got.hexdigest() == SUM


def test_transfers_by_the_users_network(guest: Machine) -> None:
    transfers(guest, own_address())


def test_transfers_by_tap(on_tap: Machine) -> None:
    transfers(on_tap, HOST)


def test_the_guest_reaches_its_gateway_and_not_the_hosts_loopback(guest: Machine) -> None:
    assert guest.run(["ping", "-c", "1", "10.0.2.2"]).returncode == 0
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        # The last two leave the guest if it is told that they aren't its own.
        guest.run(
            ["sh", "-c", "ip route add 0.1.2.3 via 10.0.2.2; ip route del table local 127.0.0.0/8; true"]
        )
        for address in ("10.0.2.2", "10.0.2.3", "0.1.2.3", "127.9.9.9"):
            back = guest.run(["sh", "-c", f"timeout 1 nc {address} {port} </dev/null"])
            assert back.returncode != 0, address
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_guest_has_the_mtu_of_its_network(guest: Machine) -> None:
    assert guest.files.read_text("/sys/class/net/eth0/mtu").strip() == str(Slirp.mtu_bytes)
