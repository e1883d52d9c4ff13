"""What is behind a block device: an image or a disk of the host (`RawFile`), or what a guest changed on one (`Overlay`)."""

from kvmkit.devices.block.backend import Backend, ImageError
from kvmkit.devices.block.overlay import Overlay
from kvmkit.devices.block.raw import RawFile

__all__ = ["Backend", "ImageError", "Overlay", "RawFile"]
