"""The memory map: where RAM is, where the board's registers are, and what lies in low memory when the kernel starts.

RAM runs from 0 to 3 GiB at most and goes on at 4 GiB; devices have the gigabyte between. What a PC's firmware would leave
in low memory lies below 640 KiB, which Linux keeps away from until it has read it, and the ACPI tables where a PC's BIOS is.
"""

from dataclasses import dataclass

PAGE_BYTES = 4096
MIB = 1 << 20

GDT = 0x500
PVH_START_INFO = 0x6000
ZERO_PAGE = 0x7000
BOOT_STACK_TOP = 0x9000
PAGE_TABLES = 0x9000
"""A PML4, a PDPT and four page directories."""
SETUP_DATA = 0x10000
CMDLINE = 0x20000
CMDLINE_MAX_BYTES = 0x10000
MULTIBOOT = 0x80000
"""Information, command line and module of a multiboot kernel, where such kernels leave memory alone while they start."""
MULTIBOOT_CMDLINE = 0x81000
MULTIBOOT_MODULE = 0x84000
MULTIBOOT_END = 0x98000
EBDA = 0x9FC00
"""The end of low memory; Linux puts its real-mode trampoline below it."""
VGA = 0xA0000
ACPI = 0xE0000
ACPI_MAX_BYTES = 0x20000
KERNEL_MIN = 0x100000

RAM_LOW_END = 3 << 30
RAM_HIGH_START = 4 << 30

VIRTIO_MMIO = 0xD0000000
"""A page of registers for each virtio device, in order, with an interrupt of its own each."""
VIRTIO_GSIS = (16, 17, 18, 19, 20, 21, 22, 23, 5, 10, 11, 12, 14, 15, 7, 6)

IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
IDENTITY_MAP = 0xFFFBC000
"""One page that kvm-intel takes for real mode on old processors, and three for the TSS beside it; neither is RAM."""
TSS = 0xFFFBD000

COM1, COM1_IRQ = 0x3F8, 4
RTC = 0x70
I8042_COMMAND = 0x64
DEBUG_EXIT = 0xF4
ACPI_PM = 0x600
ACPI_PM_TIMER = 0x608
PCI_CONFIG = 0xCF8
RESET_CONTROL, RESET_CONTROL_VALUE = 0xCF9, 0x06
SCI_IRQ = 9

TEST_PORTS = 0xE0
TEST_IRQ_LINES = 0x2000
TEST_MEMORY = 0xFF000000
SHUTDOWN = 0x8900
FW_CFG = 0x510

E820_RAM, E820_RESERVED = 1, 2


@dataclass(frozen=True)
class E820Entry:
    """A range of physical addresses, in bytes, and what it is (E820_*)."""

    addr: int
    size: int
    type: int


def ram(memory_bytes: int) -> list[tuple[int, int]]:
    """Return address and size of each block of RAM that `memory_bytes` take. `ValueError` if they aren't whole pages or too few."""
    if memory_bytes % PAGE_BYTES or memory_bytes < 2 * MIB:
        raise ValueError(f"memory of {memory_bytes} bytes: it takes whole pages, and 2 MiB at the least")
    low = min(memory_bytes, RAM_LOW_END)
    blocks = [(0, low)]
    if memory_bytes > low:
        blocks.append((RAM_HIGH_START, memory_bytes - low))
    return blocks


def e820(memory_bytes: int) -> list[E820Entry]:
    """Return the memory map as firmware would give it."""
    (_, low), *high = ram(memory_bytes)
    return [
        E820Entry(0, EBDA, E820_RAM),
        E820Entry(EBDA, VGA - EBDA, E820_RESERVED),
        E820Entry(ACPI, ACPI_MAX_BYTES, E820_RESERVED),
        E820Entry(KERNEL_MIN, low - KERNEL_MIN, E820_RAM),
        *(E820Entry(addr, size, E820_RAM) for addr, size in high),
    ]
