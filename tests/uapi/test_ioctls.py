"""The table of all ioctls: against the kernel's headers, and against the classes that have them as methods."""

import ctypes
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from kvmkit.kvm import contract
from kvmkit.kvm.linux import arm64, x86
from kvmkit.uapi.capabilities import CAPABILITIES
from kvmkit.uapi.ioctls import ARCHITECTURES, DESCRIPTORS, IOCTLS, Ioctl

CLASSES = {"system": "Kvm", "vm": "Vm", "vcpu": "Vcpu", "device": "Device"}
OTHERS = "S390", "PPC", "SPAPR", "ALLOCATE_RMA", "DIRTY_TLB"


def test_whole() -> None:
    """Linux 6.18 has as many, without those of s390 and ppc."""
    assert Counter(ioctl.section for ioctl in IOCTLS) == {"system": 8, "vm": 49, "vcpu": 54, "device": 3}
    assert len({ioctl.name for ioctl in IOCTLS}) == 114
    assert sum(ioctl.architectures == ("arm64",) for ioctl in IOCTLS) == 7


def test_every_ioctl_of_the_headers_is_in_it() -> None:
    trees = sorted(Path(os.environ.get("KVMKIT_KERNEL_HEADERS", "/usr/src")).glob("linux-headers-*-common"))
    if not trees:
        pytest.skip("no linux-headers-*-common in /usr/src")
    text = (trees[-1] / "include/uapi/linux/kvm.h").read_text()
    names = re.findall(r"^#define (KVM_\w+)\s+(?:\\\n\s*)?_IO[WR]*\(KVMIO", text, re.MULTILINE)
    ours = {name for name in names if not any(other in name for other in OTHERS)}
    assert len(ours) > 100
    assert ours == {ioctl.name for ioctl in IOCTLS}


@pytest.mark.parametrize("ioctl", IOCTLS, ids=lambda ioctl: ioctl.name)
def test_row(ioctl: Ioctl) -> None:
    assert ioctl.capability is None or ioctl.capability in CAPABILITIES
    assert set(ioctl.descriptors) <= set(DESCRIPTORS) and set(ioctl.architectures) <= set(ARCHITECTURES)
    for architecture in ioctl.architectures:
        struct = ioctl.struct(architecture)
        size_bytes = ioctl.number(architecture) >> 16 & 0x3FFF
        if ioctl.name == "KVM_REINJECT_CONTROL":  # encoded as if it had none
            assert size_bytes == 0 and struct is not None
        else:
            assert size_bytes == (ctypes.sizeof(struct) if struct else 0)
        assert (ioctl.direction != "") == bool(size_bytes)


@pytest.mark.parametrize("ioctl", IOCTLS, ids=lambda ioctl: ioctl.name)
def test_method(ioctl: Ioctl) -> None:
    """Each descriptor that knows the ioctl has it as a method, which the kernel's engine implements."""
    for descriptor in ioctl.descriptors:
        name = CLASSES[descriptor]
        stated = getattr(getattr(contract, name), ioctl.method)
        assert ioctl.name in (stated.__doc__ or "")
        for architecture in ioctl.architectures:
            module = {"x86": x86, "arm64": arm64}[architecture]
            cls = getattr(module, name, None) or getattr(module.main, name)
            made = getattr(cls, ioctl.method)
            assert made is not stated, f"{architecture}: {name}.{ioctl.method} isn't implemented"


def test_other_architectures_methods_are_refused() -> None:
    """What an architecture doesn't have, its classes leave to the contract: ENOTTY."""
    for ioctl in IOCTLS:
        for architecture in set(ARCHITECTURES) - set(ioctl.architectures):
            module = {"x86": x86, "arm64": arm64}[architecture]
            for descriptor in ioctl.descriptors:
                cls = getattr(module, CLASSES[descriptor], None) or getattr(module.main, CLASSES[descriptor])
                made = getattr(cls, ioctl.method)
                generic = made.__module__ in ("kvmkit.kvm.contract", "kvmkit.kvm.linux.main")
                assert generic, f"{architecture}: {ioctl.name}"
