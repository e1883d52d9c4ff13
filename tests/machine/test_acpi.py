import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvmkit.machine.x86 import acpi, aml, layout

BASE = layout.ACPI


def tables(image: bytes) -> dict[str, bytes]:
    """Follow the pointers as a guest does, check every length and checksum, and return the tables by name."""
    assert image[:8] == b"RSD PTR " and image[15] == 2
    assert sum(image[:20]) % 256 == sum(image[:36]) % 256 == 0

    def at(address: int) -> bytes:
        offset = address - BASE
        (length,) = struct.unpack_from("<I", image, offset + 4)
        table = image[offset : offset + length]
        assert len(table) == length
        return table

    (xsdt_address,) = struct.unpack_from("<Q", image, 24)
    xsdt = at(xsdt_address)
    found = {"XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[at(address)[:4].decode()] = at(address)
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    assert facs % 64 == 0
    assert struct.unpack_from("<Q", found["FACP"], 140) == (dsdt,)
    found["DSDT"] = at(dsdt)
    for name, table in found.items():
        assert table[:4] == name.encode()
        assert sum(table) % 256 == 0, name
    found["FACS"] = at(facs)
    return found


def test_tables_hang_together() -> None:
    found = tables(acpi.build(BASE, 1))
    assert sorted(found) == ["APIC", "DSDT", "FACP", "FACS", "XSDT"]
    fadt = found["FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # no SMI command: always in ACPI mode
    assert struct.unpack_from("<I", fadt, 76) == (0x608,) and fadt[91] == 4  # PM_TMR_BLK, PM_TMR_LEN
    assert fadt[208:220] == struct.pack("<BBBBQ", 1, 32, 0, 3, 0x608)  # X_PM_TMR_BLK
    assert struct.unpack_from("<I", fadt, 112)[0] & 1 << 8 == 0  # TMR_VAL_EXT: of 24 bits
    assert fadt[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, 0xCF9, 0x06)


@pytest.mark.parametrize("cpus", [1, 2, acpi.MAX_CPUS])
def test_madt(cpus: int) -> None:
    image = acpi.build(BASE, cpus)
    assert len(image) <= layout.ACPI_MAX_BYTES
    madt = tables(image)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (layout.LAPIC, 1)
    entries = []
    at = 44
    while at < len(madt):
        entries.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
        at += madt[at + 1]
    assert at == len(madt)
    lapics = [struct.unpack("<BBI", data) for kind, data in entries if kind == 0]
    assert lapics == [(id, id, 1) for id in range(cpus)]
    assert (1, struct.pack("<BBII", 0, 0, layout.IOAPIC, 0)) in entries
    assert (2, struct.pack("<BBIH", 0, 0, 2, 0)) in entries  # IRQ 0 is GSI 2


@pytest.mark.parametrize("cpus", [0, acpi.MAX_CPUS + 1])
def test_too_many_cpus(cpus: int) -> None:
    with pytest.raises(ValueError, match=f"{cpus} CPUs"):
        acpi.build(BASE, cpus)


def test_iasl_understands_them(tmp_path: Path) -> None:
    """iasl takes every table apart, and puts the DSDT together again to the same bytes."""
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("no iasl (Debian: acpica-tools)")
    found = tables(acpi.build(BASE, 3))
    for name in ("FACP", "APIC", "DSDT"):
        (tmp_path / f"{name}.dat").write_bytes(found[name])
        done = subprocess.run(
            [iasl, "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert "rror" not in done.stderr, done.stderr
    for name in ("FACP", "APIC"):
        text = (tmp_path / f"{name}.dsl").read_text()
        assert "Incorrect checksum" not in text and "Unknown" not in text
    command = [iasl, "-oa", "-p", "again", "DSDT.dsl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 Errors, 0 Warnings" in done.stdout + done.stderr
    assert (tmp_path / "again.aml").read_bytes()[36:] == found["DSDT"][36:]


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_aml_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_aml_names_and_ids() -> None:
    assert aml.path("\\_SB.PCI0.COM1") == b"\\\x2f\x03_SB_PCI0COM1"
    assert aml.path("_SB.A") == b"\x2e_SB_A___"
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")  # ACPI 6.5, 19.3.4
    for bad in ("", "TOOLONG", "1AB", "low", "A-B", "A..B"):
        with pytest.raises(ValueError, match="ACPI name"):
            aml.path(bad)
    with pytest.raises(ValueError, match="EISA"):
        aml.eisa_id("PN0501")
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(-1)


@pytest.mark.parametrize("size", [0, 50, 58, 59, 60, 61, 4080, 4090, 70000])
def test_aml_lengths(size: int) -> None:
    """PkgLength counts itself, in one to four bytes."""
    encoded = aml.scope("X", bytes(size))[1:]
    more = encoded[0] >> 6
    length = encoded[0] & 0x3F
    if more:
        length = encoded[0] & 0x0F | int.from_bytes(encoded[1 : 1 + more], "little") << 4
    assert length == len(encoded)
