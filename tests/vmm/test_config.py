"""What a VM process refuses to be."""

import os

import pytest

from kvmkit.vmm.config import VmConfig

HOST, OTHER = ("arm64", "x86-64") if os.uname().machine == "aarch64" else ("x86-64", "arm64")


@pytest.mark.parametrize(
    ("arch", "why"),
    [(OTHER, f"takes an {OTHER} host.*this host is {HOST}"), ("riscv", "host, x86-64 or arm64")],
)
def test_another_architecture_is_refused(arch: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"arch '{arch}': .*{why}"):
        VmConfig(arch=arch).check()


@pytest.mark.parametrize("arch", ["host", HOST])
def test_the_hosts_architecture(arch: str) -> None:
    VmConfig(arch=arch).check()
