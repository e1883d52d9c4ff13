"""The VM process: one VM, one process.

`kvmkit.client` executes ``python -m kvmkit.vmm FD`` with a socket as FD and speaks JSON lines over it:

- client → VM process: first the configuration (`kvmkit.vmm.config`), later ``{"request": "stop"}``;
- VM process → client: events, ``{"event": NAME, "t_ns": CLOCK_MONOTONIC, …}`` (`kvmkit.vmm.control`).

The process ends when its VM ends, and at once when the socket is closed at the other end.
"""
