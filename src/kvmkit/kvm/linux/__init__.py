"""The kernel's KVM, ``/dev/kvm``, in pure Python.

`main` has what all architectures share, `x86` and `arm64` the rest, as ``virt/kvm/kvm_main.c`` and ``arch/*/kvm`` do.
"""

import platform

from kvmkit.kvm.contract import Kvm

DEVICE = "/dev/kvm"


def open_kvm(path: str = DEVICE) -> Kvm:
    """Open `path`. `OSError` if it can't be opened or isn't KVM; `NotImplementedError` on other machines."""
    machine = platform.machine()
    if machine == "x86_64":
        from kvmkit.kvm.linux import x86

        return x86.Kvm(path)
    if machine == "aarch64":
        from kvmkit.kvm.linux import arm64

        return arm64.Kvm(path)
    raise NotImplementedError(f"kvmkit knows KVM on x86_64 and aarch64, not on {machine}")
