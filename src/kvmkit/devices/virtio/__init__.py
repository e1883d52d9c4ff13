"""Virtio devices (Virtual I/O Device Version 1.2, OASIS).

`queue` is the split virtqueue, `device` what all devices have in common, `mmio` the transport that puts a device on a board.
Each other module is a device. Devices know nothing of their transport, and transports nothing of what a device does.
"""
