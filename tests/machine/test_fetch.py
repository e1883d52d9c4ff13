"""Fetching, with an apt of shell scripts that serves packages built here."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmkit.machine import guest
from kvmkit.machine.guest import GuestError

APT_GET = """#!/bin/sh
echo "apt-get $*" >> "$FAKE/log"
test -e "$APT_CONFIG" || exit 99
case $1 in
update)
    test ! -e "$FAKE/offline" || printf 'Err:1 http://deb.invalid stable\\n  Could not connect:\\nReading package lists...\\n'
    test ! -e "$FAKE/broken" || { echo "E: the sources are broken" >&2; exit 100; } ;;
download)
    test ! -e "$FAKE/hang" || { echo hanging > "$FAKE/reached"; exec sleep 100; }
    for last; do :; done
    cp "$FAKE/repo/${last%%=*}_1.deb" . ;;
esac
"""
APT_CACHE = """#!/bin/sh
for last; do :; done
case $last in
linux-image-cloud-amd64) printf 'Package: %s\\nVersion: 6.1\\nDepends: linux-image-6.1-cloud-amd64 (= 6.1)\\n' $last ;;
linux-image-6.1-cloud-amd64) printf 'Package: %s\\nVersion: 6.1\\nDepends: kmod, linux-base\\nSize: 1000000\\n' $last ;;
busybox-static) printf 'Package: %s\\nVersion: 1:1\\nDescription: a\\n b: c\\n' $last ;;
*) echo "E: No packages found" >&2; exit 100 ;;
esac
"""
APT_CONFIG = """#!/bin/sh
echo 'Acquire::http::Proxy "http://proxy.invalid";'
echo 'APT::Update::Post-Invoke:: "touch $FAKE/hooked";'
"""
BUSYBOX = b"#!/bin/sh\necho sh\necho ls\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bzimage: bytes) -> Path:
    """A directory with a log of what apt was asked for; `broken` and `hang` in it make it fail or hang."""
    dpkg_deb = shutil.which("dpkg-deb")
    if dpkg_deb is None:
        pytest.skip("no dpkg-deb")
    directory = tmp_path / "fake"
    (directory / "repo").mkdir(parents=True)
    for package, files in {
        "linux-image-6.1-cloud-amd64": {"boot/vmlinuz-6.1": bzimage, "boot/System.map-6.1": b"no"},
        "busybox-static": {"bin/busybox": BUSYBOX},
    }.items():
        root = tmp_path / package
        (root / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {package}\nVersion: 1\nArchitecture: amd64\nMaintainer: n <n@n>\nDescription: d\n"
        )
        (root / "DEBIAN" / "control").write_text(control)
        for name, data in files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
        deb = directory / "repo" / f"{package}_1.deb"
        subprocess.run([dpkg_deb, "-b", "-Znone", root, deb], check=True, capture_output=True)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, script in {"apt-get": APT_GET, "apt-cache": APT_CACHE, "apt-config": APT_CONFIG}.items():
        (bin_ / name).write_text(script)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory


def asked(fake: Path) -> list[str]:
    return (fake / "log").read_text().splitlines()


def in_cache() -> list[str]:
    return sorted(path.name for path in guest.cache_directory().iterdir() if path.name != ".lock")


def test_fetched_once(fake: Path, bzimage: bytes, vmlinux: bytes) -> None:
    lines: list[str] = []
    first = guest.fetch_default_guest(lines.append)
    assert first.kernel.vmlinuz.read_bytes() == bzimage
    assert first.kernel.vmlinux.read_bytes() == vmlinux
    assert (first.kernel.package, first.kernel.version) == ("linux-image-6.1-cloud-amd64", "6.1")
    assert first.busybox.read_bytes() == BUSYBOX
    assert first.applets == ("sh", "ls")
    assert any("downloading linux-image-6.1-cloud-amd64 6.1 (1.0 MB)" in line for line in lines)
    assert in_cache() == ["busybox-static", "linux-image-cloud-amd64"]
    calls = asked(fake)
    assert [call.split()[1] for call in calls] == ["update", "download", "download"]
    again = guest.fetch_default_guest(lambda line: pytest.fail(line))
    assert again == first
    assert guest.fetch_kernel() == first.kernel
    assert asked(fake) == calls
    assert not (fake / "hooked").exists()


def test_many_at_once(fake: Path) -> None:
    found: list[guest.DefaultGuest] = []
    threads = [threading.Thread(target=lambda: found.append(guest.fetch_default_guest())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len({made.kernel.vmlinux for made in found}) == 1
    assert [call.split()[1] for call in asked(fake)] == ["update", "download", "download"]


def test_killed_on_the_way(fake: Path) -> None:
    """Whoever is killed leaves nothing that counts as fetched, and the next one clears up."""
    (fake / "hang").touch()
    code = "from kvmkit.machine.guest import fetch_kernel; fetch_kernel()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (fake / "reached").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert all(name.startswith(".fetch-") for name in in_cache())
    (fake / "hang").unlink()
    assert guest.fetch_kernel().vmlinux.exists()
    assert in_cache() == ["linux-image-cloud-amd64"]


def no_apt(fake: Path) -> None:
    os.environ["PATH"] = str(fake)


def damaged_package(fake: Path) -> None:
    (fake / "repo" / "linux-image-6.1-cloud-amd64_1.deb").write_bytes(b"!<arch>\nno")


def wrong_package(fake: Path) -> None:
    repo = fake / "repo"
    shutil.copy(repo / "busybox-static_1.deb", repo / "linux-image-6.1-cloud-amd64_1.deb")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_apt, "no apt-get here"),
        (damaged_package, "linux-image-6.1-cloud-amd64_1.deb"),
        (wrong_package, "linux-image-6.1-cloud-amd64_1.deb holds no"),
    ],
)
def test_errors_say_what_to_do(
    fake: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored at the end
    spoil(fake)
    with pytest.raises(GuestError, match=message) as raised:
        guest.fetch_default_guest()
    assert "--kernel" in str(raised.value)
    assert in_cache() == []


def test_an_unknown_kernel(fake: Path) -> None:
    with pytest.raises(
        GuestError, match="apt's sources offer no linux-image-odd: give a kernel with --kernel"
    ):
        guest.fetch_kernel("linux-image-odd")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("offline", "http://deb.invalid stable Could not connect"),  # apt-get update succeeds all the same
        ("broken", "apt-get update failed with status 100: E: the sources are broken"),
    ],
)
def test_a_source_that_fails(fake: Path, failure: str, message: str) -> None:
    """The cause is told where no other source offers what is wanted."""
    (fake / failure).touch()
    with pytest.raises(GuestError, match=rf"\({message}\).*network.*--kernel"):
        guest.fetch_kernel("linux-image-odd")
    assert guest.fetch_kernel().vmlinux.exists()


def test_a_cache_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GuestError, match="Not a directory.*XDG_CACHE_HOME"):
        guest.fetch_default_guest()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert guest.cache_directory() == Path("/home/somebody/.cache/kvmkit/guest-2")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert guest.cache_directory() == Path("/elsewhere/kvmkit/guest-2")
