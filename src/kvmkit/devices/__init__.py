"""Devices, and the bus that finds them.

A device is anything with ``read(offset, size) -> int`` and ``write(offset, size, value)``: offset into its range in bytes, size 1, 2,
4 or 8, values unsigned. It knows neither its address nor its interrupt number, only a callable that sets its line. Every value
that comes in is a hostile guest's.
"""
