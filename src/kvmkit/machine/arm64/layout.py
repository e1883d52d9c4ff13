"""The memory map: where the board's registers are, and where RAM is and what lies in it when the kernel starts.

Devices have the first gigabyte. RAM starts at 1 GiB: its first 2 MiB hold the device tree, for the kernel maps that as a whole
and wants nothing else of its own there; then comes the kernel, and at the end the initial RAM disk.
"""

PAGE_BYTES = 4096
MIB = 1 << 20

GICD, GICD_BYTES = 0x08000000, 0x10000
GICR, GICR_BYTES = 0x080A0000, 0x20000
"""A redistributor for each processor, in order."""
MAX_CPUS = 64

PL011, PL011_SPI = 0x09000000, 1
PL031 = 0x09010000

VIRTIO_MMIO, VIRTIO_BYTES = 0x0A000000, 0x1000
"""A virtio device's registers, in order."""
FIRST_VIRTIO_SPI, MAX_VIRTIO = 16, 32
"""As many as there are SPIs from there on."""

RAM = 1 << 30
RAM_MAX_BYTES = (1 << 40) - RAM
"""A VM of KVM's default type has guest physical addresses of 40 bits."""
FDT = RAM
FDT_MAX_BYTES = 2 * MIB
KERNEL = RAM + FDT_MAX_BYTES
"""What the kernel's text_offset counts from."""
KERNEL_WINDOW_BYTES = 32 << 30
"""The initial RAM disk must lie in as much memory around the kernel, counted from a multiple of 1 GiB."""

# Interrupts. KVM_IRQ_LINE and irqfd count from the first SPI, the device tree counts SPIs and PPIs apart.
FIRST_SPI = 32
NR_IRQS = 96
"""What the distributor knows, SGIs and PPIs included: a multiple of 32, 64 at the least."""
# PPIs of the architected timer (Arm Base System Architecture, "Clock and Timer Subsystem"; KVM's defaults).
TIMER_SECURE_PPI, TIMER_PHYSICAL_PPI, TIMER_VIRTUAL_PPI, TIMER_HYPERVISOR_PPI = 13, 14, 11, 10


def check_ram(memory_bytes: int) -> None:
    """`ValueError` if a board can't have so much RAM."""
    if memory_bytes % PAGE_BYTES or not 16 * MIB <= memory_bytes <= RAM_MAX_BYTES:
        raise ValueError(
            f"memory of {memory_bytes} bytes: it takes whole pages, 16 MiB at the least and {RAM_MAX_BYTES >> 30} GiB at most"
        )


def mpidr(id: int) -> int:
    """Return the affinity fields of MPIDR_EL1 that KVM gives vCPU `id`: sixteen to a cluster (arch/arm64/kvm/sys_regs.c)."""
    return id & 0xF | (id >> 4 & 0xFF) << 8
