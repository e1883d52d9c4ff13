"""The ACPI tables that tell a guest what is on the board (ACPI 6.5, chapter 5).

This isn't a hardware-reduced platform: there are a PIT and two i8259, which Linux would leave alone then. There are no
keyboard controller and no VGA, and the FADT says so, which saves the guest looking for them.
"""

import struct

from kvmkit.devices import acpi_pm, rtc
from kvmkit.machine.x86 import aml, layout

MAX_CPUS = 254
"""APIC ids of one byte, 255 being the broadcast."""

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_OEM_ID, _OEM_TABLE_ID, _CREATOR_ID = b"KVMKIT", b"KVMKITPC", b"KVMK"

_SYSTEM_IO, _BYTE_ACCESS, _WORD_ACCESS, _DWORD_ACCESS = 1, 1, 2, 3

# FADT flags.
_WBINVD, _PROC_C1, _PWR_BUTTON, _SLP_BUTTON, _FIX_RTC, _RESET_REG_SUP = (1 << n for n in (0, 2, 4, 5, 6, 10))
# FADT IA-PC boot architecture flags.
_LEGACY_DEVICES, _VGA_NOT_PRESENT, _NO_ASPM = 1 << 0, 1 << 2, 1 << 4

_LAPIC, _IOAPIC, _SOURCE_OVERRIDE, _LAPIC_NMI = 0, 1, 2, 4
_EDGE_AS_ON_ISA, _LEVEL_ACTIVE_HIGH = 0, 0b1101
_ALL_CPUS = 0xFF


def build(base: int, cpus: int, virtio_devices: int = 0) -> bytes:
    """Return all tables for a board of `cpus` processors with APIC ids from 0 and `virtio_devices`, to lie at `base`.

    That is where the RSDP is.
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise ValueError(f"{cpus} CPUs: this board has 1 to {MAX_CPUS}")
    image = bytearray(64)  # the RSDP comes last, in front

    def place(data: bytes) -> int:
        image.extend(bytes(-len(image) % 64))  # which the FACS needs
        image.extend(data)
        return base + len(image) - len(data)

    facs = place(_facs())
    dsdt = place(_dsdt(virtio_devices))
    tables = [place(_fadt(facs, dsdt)), place(_madt(cpus))]
    xsdt = place(table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    image[:36] = _rsdp(xsdt)
    return bytes(image)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put a system description table header before `body`, with the checksum that makes all bytes add up to 0."""
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1)
    return _with_checksum(header + body, 9)


def _with_checksum(data: bytes, at: int, length: int | None = None) -> bytes:
    return data[:at] + bytes((-sum(data[:length]) & 0xFF,)) + data[at + 1 :]


def _rsdp(xsdt: int) -> bytes:
    data = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0)
    return _with_checksum(_with_checksum(data, 8, 20), 32)


def _facs() -> bytes:
    return struct.pack("<4sI24xB31x", b"FACS", 64, 2)


def _address(port: int, length: int, access: int) -> bytes:
    """Generic Address Structure of an I/O port."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * length, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    event, control = layout.ACPI_PM, layout.ACPI_PM + acpi_pm.PM1_EVT_BYTES
    timer = layout.ACPI_PM_TIMER
    none = bytes(12)
    body = b"".join(
        (
            # FIRMWARE_CTRL DSDT - Preferred_PM_Profile SCI_INT SMI_CMD ACPI_ENABLE ACPI_DISABLE S4BIOS_REQ PSTATE_CNT
            struct.pack("<IIBBHIBBBB", facs, dsdt, 0, 0, layout.SCI_IRQ, 0, 0, 0, 0, 0),
            # PM1a_EVT PM1b_EVT PM1a_CNT PM1b_CNT PM2_CNT PM_TMR GPE0 GPE1
            struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
            # the lengths of PM1_EVT PM1_CNT PM2_CNT PM_TMR GPE0 GPE1, GPE1_BASE, CST_CNT
            struct.pack(
                "<8B", acpi_pm.PM1_EVT_BYTES, acpi_pm.PM1_CNT_BYTES, 0, acpi_pm.PM_TMR_BYTES, 0, 0, 0, 0
            ),
            # P_LVL2_LAT P_LVL3_LAT (neither there) FLUSH_SIZE FLUSH_STRIDE DUTY_OFFSET DUTY_WIDTH DAY_ALRM MON_ALRM CENTURY
            struct.pack("<4H5B", 0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, rtc.CENTURY),
            struct.pack("<HB", _LEGACY_DEVICES | _VGA_NOT_PRESENT | _NO_ASPM, 0),
            struct.pack("<I", _WBINVD | _PROC_C1 | _PWR_BUTTON | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP),
            _address(layout.RESET_CONTROL, 1, _BYTE_ACCESS),
            # RESET_VALUE ARM_BOOT_ARCH FADT_Minor_Version X_FIRMWARE_CTRL (0: the other one counts) X_DSDT
            struct.pack("<BHBQQ", layout.RESET_CONTROL_VALUE, 0, 5, 0, dsdt),
            _address(event, acpi_pm.PM1_EVT_BYTES, _WORD_ACCESS),
            none,
            _address(control, acpi_pm.PM1_CNT_BYTES, _WORD_ACCESS),
            none * 2,  # X_PM1b_CNT X_PM2_CNT
            _address(timer, acpi_pm.PM_TMR_BYTES, _DWORD_ACCESS),
            none * 4,  # X_GPE0 X_GPE1 SLEEP_CONTROL SLEEP_STATUS
            b"KVMKIT\0\0",  # Hypervisor Vendor Identity
        )
    )
    return table(b"FACP", 6, body)


def _madt(cpus: int) -> bytes:
    pcat_compat = 1  # there are two i8259
    entries = [struct.pack("<BBBBI", _LAPIC, 8, id, id, 1) for id in range(cpus)]
    entries.append(struct.pack("<BBBBII", _IOAPIC, 12, 0, 0, layout.IOAPIC, 0))
    # The PIT is wired to pin 2, as on a PC.
    for source, gsi, flags in ((0, 2, _EDGE_AS_ON_ISA), (layout.SCI_IRQ, layout.SCI_IRQ, _LEVEL_ACTIVE_HIGH)):
        entries.append(struct.pack("<BBBBIH", _SOURCE_OVERRIDE, 10, 0, source, gsi, flags))
    entries.append(struct.pack("<BBBHB", _LAPIC_NMI, 6, _ALL_CPUS, 0, 1))
    return table(b"APIC", 5, struct.pack("<II", layout.LAPIC, pcat_compat) + b"".join(entries))


def _dsdt(virtio_devices: int) -> bytes:
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_ports(layout.COM1, 8), aml.irq(layout.COM1_IRQ))),
    )
    # No IRQ: it never raises one.
    clock = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(layout.RTC, 2))),
    )
    slp_typ = aml.integer(acpi_pm.SLP_TYP_S5)
    s5 = aml.name("\\_S5", aml.package(slp_typ, slp_typ, aml.integer(0), aml.integer(0)))
    return table(b"DSDT", 2, s5 + aml.scope("\\_SB", com1, clock, *map(_virtio_mmio, range(virtio_devices))))


def _virtio_mmio(i: int) -> bytes:
    registers = aml.memory32(layout.VIRTIO_MMIO + i * layout.PAGE_BYTES, layout.PAGE_BYTES)
    return aml.device(
        f"VR{i:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(i)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(registers, aml.interrupt(layout.VIRTIO_GSIS[i]))),
    )
