"""The virtio devices of a VM, as its configuration wants them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmkit.machine.guest import ARM64
from kvmkit.runtime import VmDirectory
from kvmkit.vmm.config import DiskConfig, VmConfig

if TYPE_CHECKING:
    from kvmkit.devices.virtio.console import Port
    from kvmkit.devices.virtio.device import VirtioDevice

GUEST_CID = 3
ROOT_TAG = "root"
_MAX_DISK_QUEUES = 4
"""Each is a thread; Linux shares them among its processors."""

# Devices are imported as they are needed: a VM without network and disks starts without reading their code.


@dataclass
class Devices:
    """Devices in the board's order, and what the guest needs to be told to use them."""

    virtio: "list[VirtioDevice]" = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: ["virtio_mmio"])
    """The kernel modules that drive them."""
    console: "Port | None" = None
    """The virtio console's port, if the console is one."""
    network: dict[str, Any] | None = None
    """How the guest is to configure its interface."""

    def close(self) -> None:
        """Close those that nobody has taken."""
        for device in self.virtio:
            device.close()


@contextmanager
def make_devices(
    config: VmConfig, directory: VmDirectory | None, console_write: Callable[[bytes], None]
) -> Iterator[Devices]:
    """Open what the devices stand on and make them; who puts them on a board says so by ``devices.virtio.clear()``.

    Those left are closed at the end. `OSError` or `ValueError` says what can't be used.
    """
    devices = Devices()
    if ARM64:
        _check_arm64(config)
    with ExitStack() as stack:
        stack.callback(devices.close)
        if not config.testdev:
            _add(devices, config, directory)
        if config.console == "virtio":
            from kvmkit.devices.virtio.console import Console, Port

            devices.console = Port(console=True, output=console_write)
            devices.virtio.append(Console([devices.console]))
            devices.modules.append("virtio_console")
        yield devices


def _check_arm64(config: VmConfig) -> None:
    """`ValueError` for what isn't on arm64."""
    if config.testdev:
        raise ValueError("testdev: it is for x86-64 test kernels")
    if config.cpu != "host":
        raise ValueError(f"cpu {config.cpu!r}: an arm64 guest has the host's processor: leave it at host")


def _add(devices: Devices, config: VmConfig, directory: VmDirectory | None) -> None:
    from kvmkit.devices.virtio.rng import Rng

    devices.virtio.append(Rng("virtio-rng"))
    devices.modules.append("virtio_rng")
    if directory is not None:
        from kvmkit.devices.virtio.vsock import Vsock

        devices.virtio.append(Vsock(GUEST_CID, directory.vsock))
        devices.modules.append("vmw_vsock_virtio_transport")
    disks = list(config.disks)
    if config.root is not None and config.root.fstype != "virtiofs":
        disks.insert(0, DiskConfig(config.root.path, temporary=True))
        # ext4 asks for crc32c by name, which its list of modules doesn't say.
        devices.modules += ["crc32c_generic", config.root.fstype]
    for i, disk in enumerate(disks):
        devices.virtio.append(_disk(disk, i, config.cpus))
        devices.modules.append("virtio_blk")
    shares = [(f"share{i}", share.directory, share.read_only) for i, share in enumerate(config.shares)]
    if config.root is not None and config.root.fstype == "virtiofs":
        shares.insert(0, (ROOT_TAG, config.root.path, True))
        devices.modules.append("overlay")
    for tag, path, read_only in shares:
        from kvmkit.devices.fuse.passthrough import PassthroughFs
        from kvmkit.devices.virtio.fs import Fs

        # An overlay's lower layer isn't to change in any case.
        server = PassthroughFs(path, read_only=read_only, unchanging=tag == ROOT_TAG)
        devices.virtio.append(Fs(tag, server, name=f"virtio-fs {tag}"))
        devices.modules.append("virtiofs")
    if config.network != "none":
        _add_network(devices, config.network)


def _disk(disk: DiskConfig, i: int, cpus: int) -> "VirtioDevice":
    from kvmkit.devices.block import Overlay, RawFile
    from kvmkit.devices.virtio.blk import Blk

    backend: RawFile | Overlay
    if disk.overlay is not None:
        backend = Overlay.at(disk.overlay, disk.path)
    elif disk.temporary:
        backend = Overlay.temporary(RawFile(disk.path, read_only=True))
    else:
        backend = RawFile(disk.path, read_only=disk.read_only)
    name = f"virtio-blk vd{chr(ord('a') + i)}"
    return Blk(backend, name=name, serial=f"kvmkit{i}", queues=min(cpus, _MAX_DISK_QUEUES))


def _add_network(devices: Devices, network: str) -> None:
    from kvmkit.devices.net import Backend
    from kvmkit.devices.net.slirp import Slirp
    from kvmkit.devices.net.tap import Tap
    from kvmkit.devices.virtio.net import Net, random_mac

    kind, _, name = network.partition(":")
    backend: Backend
    if network == "user":
        backend = Slirp()
    elif kind == "tap" and name:
        backend = Tap(name)
    else:
        raise ValueError(f"network {network!r}: none, user or tap:NAME")
    devices.virtio.append(Net(backend, mac=random_mac(), name="virtio-net"))
    devices.modules.append("virtio_net")
    if backend.guest_network is not None:
        devices.network = {"interface": "eth0", **backend.guest_network}
