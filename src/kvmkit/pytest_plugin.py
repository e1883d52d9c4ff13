r"""A pytest plugin: guests as fixtures. It is there as soon as kvmkit is installed.

::

    def test_it(vm):
        assert vm.run(["uname"], text=True).stdout == "Linux\n"

    @pytest.mark.vm(root="debian:bookworm", memory="512M")
    def test_in_debian(vm):
        assert vm.run(["python3", "-c", "1"]).returncode == 0

`vm` is a fresh `kvmkit.Machine` for each test, `shared_vm` one for all tests of a session with the same options, for those that
leave no traces. Options are `kvmkit.MachineConfig`'s, from the marker ``vm`` and from the ini value ``vm_config``, a TOML file.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvmkit.client import Machine, MachineConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini value and the option."""
    parser.addini("vm_config", "TOML file with the guests' configuration (kvmkit.MachineConfig)", default="")
    parser.getgroup("kvmkit").addoption(
        "--vm-engine", choices=["auto", "kvm", "soft"], help="the engine that guests run on"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker."""
    config.addinivalue_line("markers", "vm(**options): options of kvmkit.MachineConfig for the fixture `vm`")


def _machine(request: pytest.FixtureRequest, node: pytest.Item) -> Machine:
    path = request.config.getini("vm_config")
    config = MachineConfig.from_toml(request.config.rootpath / path) if path else MachineConfig()
    options: dict[str, object] = {}
    for marker in reversed(list(node.iter_markers("vm"))):  # the closest one goes last
        options |= marker.kwargs
    if engine := request.config.getoption("--vm-engine"):
        options["engine"] = engine
    return Machine(config, **options)  # type: ignore[arg-type]


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest for this test alone, running."""
    with _machine(request, request.node) as machine:
        machine.wait_ready()
        yield machine


@pytest.fixture(scope="session")
def _shared_vms() -> Iterator[tuple[ExitStack, dict[str, Machine]]]:
    with ExitStack() as stack:
        yield stack, {}


@pytest.fixture
def shared_vm(request: pytest.FixtureRequest, _shared_vms: tuple[ExitStack, dict[str, Machine]]) -> Machine:
    """A guest that all tests with the same options share."""
    stack, machines = _shared_vms
    machine = _machine(request, request.node)
    key = repr(machine.config)
    if key not in machines:
        machines[key] = stack.enter_context(machine)
        machine.wait_ready()
    return machines[key]
