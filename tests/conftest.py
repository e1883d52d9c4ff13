"""What tests of machines share: the engines that can be used here, and tiny kernels."""

import functools
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

import kvmkit.kvm
from kvmkit.kvm.probe import SLOW_MIPS, supervisor_mips
from kvmkit.machine.guest import DefaultGuest, GuestError, fetch_default_guest
from kvmkit.testing.kernel import assemble_kernel

settings.register_profile("kvmkit", deadline=None)  # the machine may be busy
settings.load_profile("kvmkit")


@pytest.fixture(scope="session", autouse=True)
def _runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """VMs of tests are not among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        yield


@pytest.fixture(scope="session")
def default_guest() -> DefaultGuest:
    """Debian's kernel and busybox, fetched if need be; skips where they can't be had."""
    try:
        return fetch_default_guest(print)
    except GuestError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["kvm", "soft"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that can be used here, as the command line names it."""
    name: str = request.param
    if name == "soft" and find_spec("kvmkit._engine") is None:
        pytest.skip("soft: the native module kvmkit._engine isn't built")
    if name == "kvm":
        try:
            kvmkit.kvm.open(name).close()
        except OSError as error:
            pytest.skip(f"kvm: {error.strerror}")
    return name


@functools.cache
def runs_linux(engine: str) -> bool:
    """Whether an unmodified Linux runs on an engine here: not on a KVM that emulates supervisor code."""
    with kvmkit.kvm.open(engine) as system:
        return engine == "soft" or supervisor_mips(system) >= SLOW_MIPS


@pytest.fixture
def linux_engine(engine: str) -> str:
    """Each engine that runs an unmodified Linux here."""
    if not runs_linux(engine):
        pytest.skip(f"{engine}: a KVM without hardware behind it doesn't run an unmodified Linux")
    return engine


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that makes a kernel of assembly (see `kvmkit.testing.kernel`) and returns its path."""
    if not (shutil.which("as") and shutil.which("ld")):
        pytest.skip("GNU binutils (as, ld) aren't installed")
    directory = tmp_path_factory.mktemp("kernels")
    made: dict[str, str] = {}

    def make(code: str) -> str:
        if code not in made:
            path = directory / f"kernel{len(made)}"
            path.write_bytes(assemble_kernel(code))
            made[code] = str(path)
        return made[code]

    return make


# Whoever started the tests in the background may have had these ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
