"""A small encoder for ACPI Machine Language: objects and resource descriptors (ACPI 6.5, sections 20.2 and 6.4)."""

import struct


def path(name: str) -> bytes:
    """NameString: segments of up to four characters, separated by dots, from the root if a backslash comes first."""
    root = b"\\" if name.startswith("\\") else b""
    segments = [
        (segment or "?").ljust(4, "_").encode("ascii") for segment in name.removeprefix("\\").split(".")
    ]
    for segment in segments:
        head, rest = segment[:1], segment[1:].replace(b"_", b"A")
        if (
            len(segment) != 4
            or not (head.isupper() or head == b"_")
            or not rest.isalnum()
            or rest != rest.upper()
        ):
            raise ValueError(
                f"{name!r} is no ACPI name: up to four of A-Z, 0-9 and _, no digit first, for each segment"
            )
    if len(segments) == 1:
        return root + segments[0]
    prefix = b"\x2e" if len(segments) == 2 else bytes((0x2F, len(segments)))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """ZeroOp, OneOp or the shortest constant."""
    if value in (0, 1):
        return bytes((value,))
    for code, format_ in ((0x0A, "<BB"), (0x0B, "<BH"), (0x0C, "<BI"), (0x0E, "<BQ")):
        if 0 <= value < 1 << 8 * (struct.calcsize(format_) - 1):
            return struct.pack(format_, code, value)
    raise ValueError(f"{value} isn't a 64-bit number")


def string(text: str) -> bytes:
    """A string of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """EISAID ("PNP0501") as the compressed number that _HID takes."""
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    if len(text) != 7 or not all(0 < letter <= 26 for letter in (a, b, c)):
        raise ValueError(f"{text!r} is no EISA id: three capital letters and four hexadecimal digits")
    number = a << 26 | b << 21 | c << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def package(*elements: bytes) -> bytes:
    """Package."""
    return b"\x12" + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Buffer."""
    return b"\x11" + _with_length(integer(len(data)) + data)


def name(where: str, value: bytes) -> bytes:
    """Name(where, value)."""
    return b"\x08" + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """Scope(where) {terms}."""
    return b"\x10" + _with_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device(where) {terms}."""
    return b"\x5b\x82" + _with_length(path(where) + b"".join(terms))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate() {descriptors}."""
    return buffer(b"".join(descriptors) + b"\x79\0")  # a checksum of 0 counts as right


def io_ports(base: int, length: int) -> bytes:
    """IO(Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """IRQNoFlags() {number}: edge-triggered, active high."""
    return struct.pack("<BH", 0x22, 1 << number)


def interrupt(gsi: int) -> bytes:
    """Interrupt(ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}: for those above 15 too."""
    return struct.pack("<BHBBI", 0x89, 6, 0b0011, 1, gsi)


def memory32(base: int, length: int) -> bytes:
    """Memory32Fixed(ReadWrite, base, length)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


def _with_length(data: bytes) -> bytes:
    """PkgLength, which counts itself, before `data`."""
    if len(data) + 1 < 1 << 6:
        return bytes((len(data) + 1,)) + data
    for more in (1, 2, 3):
        length = len(data) + 1 + more
        if length < 1 << 4 + 8 * more:
            return bytes((more << 6 | length & 15,)) + (length >> 4).to_bytes(more, "little") + data
    raise ValueError(f"{len(data)} bytes are too many for one AML package")
