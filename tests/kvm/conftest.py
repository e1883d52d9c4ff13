"""Every test here that takes `kvm` runs on each engine; an engine that can't be used here skips, and says why."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.kvm import ENGINES, Kvm
from kvmkit.uapi.capabilities import CAPABILITIES

from . import evidence


def pytest_configure(config: pytest.Config) -> None:
    """Collect evidence for docs/kvm-api.md."""
    config.pluginmanager.register(evidence.Plugin())
    watched = [import_module("kvmkit.kvm.linux.main")]
    watched.append(import_module(f"kvmkit.kvm.linux.{'arm64' if os.uname().machine == 'aarch64' else 'x86'}"))
    if os.uname().machine == "x86_64" and find_spec("kvmkit._engine") is not None:
        watched.append(import_module("kvmkit.kvm.soft.main"))
    for module in watched:
        evidence.watch(module)


@pytest.fixture
def system() -> Iterator[Kvm]:
    """``/dev/kvm`` of an arm64 machine."""
    if os.uname().machine != "aarch64":
        pytest.skip("not an arm64 machine")
    try:
        opened = kvmkit.kvm.open("linux")
    except OSError as error:
        pytest.skip(f"linux: {error.strerror}")
    with opened:
        yield opened


# A test bed has the kernel's KVM alone to test.
@pytest.fixture(params=os.environ.get("KVMKIT_TEST_ENGINES", " ".join(ENGINES)).split())
def kvm(request: pytest.FixtureRequest) -> Iterator[Kvm]:
    """An open engine."""
    engine: str = request.param
    if os.uname().machine != "x86_64":
        pytest.skip("x86 guests need an x86 machine")
    if engine == "soft" and find_spec("kvmkit._engine") is None:
        pytest.skip("soft: the native module kvmkit._engine isn't built")
    try:
        system = kvmkit.kvm.open(engine)
    except OSError as error:
        if engine == "soft":
            raise
        pytest.skip(f"{engine}: {error.strerror}")
    with system:
        yield system


@pytest.fixture
def needs(kvm: Kvm) -> Callable[[str], int]:
    """Skip the test where a capability is absent; returns its value."""

    def check(name: str) -> int:
        value = kvm.check_extension(CAPABILITIES[name])
        if not value:
            pytest.skip(f"{kvm.engine}: no {name}")
        return value

    return check
