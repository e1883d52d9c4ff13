"""Ethernet frames for tests, built and taken apart by hand."""

import socket
import struct
from typing import NamedTuple

GUEST_MAC = bytes.fromhex("025254001234")
BROADCAST = b"\xff" * 6
SYN, RST, PSH, ACK, FIN = 2, 4, 8, 16, 1


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(destination: bytes, kind: int, payload: bytes) -> bytes:
    """From the guest's MAC address."""
    return destination + GUEST_MAC + kind.to_bytes(2, "big") + payload


def arp_request(sender: str, target: str) -> bytes:
    """Who has `target`?"""
    body = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + GUEST_MAC + socket.inet_aton(sender)
    return ethernet(BROADCAST, 0x806, body + bytes(6) + socket.inet_aton(target))


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    to: bytes,
    fragment: int = 0,
    options: bytes = b"",
) -> bytes:
    """A packet, or a fragment of one (`fragment` is the flags and offset field)."""

    def header(check: int) -> bytes:
        size = 20 + len(options) + len(payload)
        words = 0x45 + len(options) // 4
        return struct.pack(">BBHHHBBH", words, 0, size, 7, fragment, 64, protocol, check) + b"".join(
            (socket.inet_aton(source), socket.inet_aton(destination), options)
        )

    return ethernet(to, 0x800, header(checksum(header(0))) + payload)


def _pseudo(source: str, destination: str, protocol: int, size: int) -> bytes:
    return socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack(">BBH", 0, protocol, size)


def udp(
    source: tuple[str, int], destination: tuple[str, int], payload: bytes, *, to: bytes = BROADCAST
) -> bytes:
    """A datagram between (address, port) pairs."""
    header = struct.pack(">HHHH", source[1], destination[1], 8 + len(payload), 0)
    check = checksum(_pseudo(source[0], destination[0], 17, 8 + len(payload)) + header + payload)
    return ipv4(source[0], destination[0], 17, header[:6] + check.to_bytes(2, "big") + payload, to=to)


def tcp(
    source: tuple[str, int],
    destination: tuple[str, int],
    flags: int,
    payload: bytes = b"",
    *,
    seq: int = 0,
    ack: int = 0,
    to: bytes = BROADCAST,
    options: bytes = b"",
) -> bytes:
    """A segment between (address, port) pairs; `options` are IP options."""

    def segment(check: int) -> bytes:
        return (
            struct.pack(">HHIIBBHHH", source[1], destination[1], seq, ack, 0x50, flags, 65000, check, 0)
            + payload
        )

    whole = segment(0)
    check = checksum(_pseudo(source[0], destination[0], 6, len(whole)) + whole)
    return ipv4(source[0], destination[0], 6, segment(check), to=to, options=options)


def echo_request(source: str, destination: str, payload: bytes, *, to: bytes) -> bytes:
    """A ping."""
    body = struct.pack(">BBHHH", 8, 0, 0, 1, 1) + payload
    return ipv4(source, destination, 1, body[:2] + checksum(body).to_bytes(2, "big") + body[4:], to=to)


def dhcp_discover() -> bytes:
    """A DHCPDISCOVER that asks for a broadcast answer."""
    fixed = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + GUEST_MAC + bytes(10 + 192)
    options = b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
    return udp(("0.0.0.0", 68), ("255.255.255.255", 67), fixed + options)


def dns_query(name: str) -> bytes:
    """The payload that asks for the A record of `name`."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", 0x4242, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


class Tcp(NamedTuple):
    """A TCP segment that came out."""

    source: tuple[str, int]
    destination: tuple[str, int]
    seq: int
    ack: int
    flags: int
    payload: bytes


def parse_tcp(frame: bytes) -> Tcp | None:
    """Take a frame apart; None if it holds no TCP segment."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return None
    at = 14 + 4 * (frame[14] & 15)
    end = 14 + int.from_bytes(frame[16:18], "big")
    sport, dport, seq, ack, offset, flags = struct.unpack_from(">HHIIBB", frame, at)
    return Tcp(
        (socket.inet_ntoa(frame[26:30]), sport),
        (socket.inet_ntoa(frame[30:34]), dport),
        seq,
        ack,
        flags,
        frame[at + 4 * (offset >> 4) : end],
    )
