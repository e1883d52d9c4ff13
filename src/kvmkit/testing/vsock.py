"""A guest's packets, and programs of the host, for tests of the socket device."""

import socket
from dataclasses import dataclass
from pathlib import Path

from kvmkit.devices.virtio.vsock import HEADER

CID = 3
RX, TX, EVENT = 0, 1, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND, BOTH = 1, 2, 3
GUEST_PORT, PORT = 4000, 52
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Packet:
    """A packet; as the guest sends it unless told otherwise."""

    op: int
    data: bytes = b""
    flags: int = 0
    host_port: int = PORT
    guest_port: int = GUEST_PORT
    buf_alloc: int = 1 << 20
    fwd_cnt: int = 0
    src_cid: int = CID
    dst_cid: int = 2
    kind: int = 1
    size: int | None = None

    def pack(self) -> bytes:
        """As it goes into a buffer, with `size` as its length whether it is or not."""
        size = len(self.data) if self.size is None else self.size
        return (
            HEADER.pack(
                self.src_cid,
                self.dst_cid,
                self.guest_port,
                self.host_port,
                size,
                self.kind,
                self.op,
                self.flags,
                self.buf_alloc,
                self.fwd_cnt,
            )
            + self.data
        )

    @staticmethod
    def from_device(raw: bytes) -> "Packet":
        """One that the device sent."""
        src, dst, host_port, guest_port, size, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack_from(raw)
        data = raw[HEADER.size :]
        assert len(data) == size
        return Packet(op, data, flags, host_port, guest_port, buf_alloc, fwd_cnt, src, dst, kind)


def listening(path: Path, port: int) -> socket.socket:
    """A program of the host that listens at port `port` for the guest."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{path}_{port}")
    sock.listen()
    sock.settimeout(TIMEOUT_S)
    return sock


def client(path: Path, line: bytes = b"") -> socket.socket:
    """A program of the host that connects to the device."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect(str(path))
    if line:
        sock.sendall(line)
    return sock
