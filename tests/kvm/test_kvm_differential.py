"""Generated machine states and code on both engines: the same outcome, with error codes and what delivery pushes.

`bench/soak.py --reference kvm` runs more of them; `kvmkit.testing.differential.known` says what which KVM is no reference for.
"""

from importlib.util import find_spec

import pytest

import kvmkit.kvm
from kvmkit.testing.differential.compare import Comparison
from kvmkit.testing.differential.known import KVM, kernel_kvm
from kvmkit.testing.differential.run import Machine

CASES = 100


def test_cases_end_as_on_the_kernels_kvm() -> None:
    if find_spec("kvmkit._engine") is None:
        pytest.skip("soft: the native module kvmkit._engine isn't built")
    try:
        linux = kvmkit.kvm.open("linux")
        kernel = KVM[kernel_kvm()]
    except (OSError, LookupError) as error:
        pytest.skip(f"linux: {error}")
    with linux, kvmkit.kvm.open("soft") as soft:
        engine, reference = Machine(soft), Machine(linux, kernel.fresh)
        try:
            comparison = Comparison(engine.run, reference.run, kernel.rules)
            for seed in range(CASES):
                difference = comparison.run(seed, kernel.modes)
                assert difference is None, difference
            assert comparison.ends["not compared"] < CASES / 3
        finally:
            engine.close()
            reference.close()
