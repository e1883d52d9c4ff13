"""Debian's own packages installed into an image, by mmdebstrap: without root, where the machine lets it.

mmdebstrap chooses how: as root; in a user namespace with the user's own range of ids (uidmap); or in one that libraries
pretend (fakechroot and fakeroot), which works in containers that have no namespaces to give.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from kvmkit.errors import ImageError
from kvmkit.images.config import ARCHITECTURE, ImageConfig
from kvmkit.images.store import Content
from kvmkit.images.tree import Tree

__all__ = ["DEFAULT_PACKAGES", "SOURCE", "debian"]

SOURCE = re.compile(r"debian:([a-z]+)")
DEFAULT_PACKAGES = ("python3",)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?")
_HOOKS = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")
_CONFIG = ImageConfig(
    env=(("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),), cmd=("/bin/bash",)
)
_OF_THE_HOST = (b"etc/hostname", b"etc/resolv.conf", b"etc/apt/apt.conf.d/99mmdebstrap")
"""What mmdebstrap takes from this machine; the last is how apt reaches its sources here."""
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*")
_CUSTOMIZE = """
printf '127.0.0.1 localhost\\n::1 localhost\\n' >"$1"/etc/hosts
echo 'Acquire::Languages "none";' >"$1"/etc/apt/apt.conf.d/no-languages
"""
_STOP_S = 30.0


@contextmanager
def debian(
    suite: str, packages: Sequence[str], directory: Path, progress: Callable[[str], None]
) -> Iterator[Content]:
    """Install a minimal Debian `suite`, apt, `DEFAULT_PACKAGES` and `packages`.

    Manual pages, documentation but for copyrights, and translations are left out, as in Debian's "slim" images.
    Packages come from where this machine's apt takes that suite from, or else from Debian's own servers. `directory` is
    where to put temporary files, without a name. `ImageError` with the packages to install if a tool is missing.
    """
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise ImageError(f"{package!r} is no name of a Debian package")
    _check_tools()
    with tempfile.TemporaryFile(dir=directory) as file:
        archive = cast(IO[bytes], file)
        command = [
            "mmdebstrap",
            "--variant=minbase",
            "--format=tar",
            f"--include={','.join([*DEFAULT_PACKAGES, *packages])}",
            *(f"--aptopt={setting}" for setting in _apt_settings()),
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            *(
                [f"--hook-dir={_HOOKS}"] if _HOOKS.is_dir() else []
            ),  # else usrmerge does it, and brings all of Perl
            f"--customize-hook={_CUSTOMIZE}",
            suite,
            "-",
            *_sources(suite),
        ]
        progress(f"installing Debian {suite} with {', '.join([*DEFAULT_PACKAGES, *packages])}")
        _run(command, archive, progress)
        tree = Tree()
        tree.apply_layer(archive, "mmdebstrap's archive")
        for path in _OF_THE_HOST:
            inode = tree.root
            *parents, name = path.split(b"/")
            for parent in parents:
                inode = inode.entries[parent]
            inode.entries.pop(name, None)
        archive.seek(0)
        build_id = "sha256:" + hashlib.file_digest(archive, "sha256").hexdigest()  # type: ignore[arg-type]
        yield Content(tree, _CONFIG, build_id, ARCHITECTURE)


def _check_tools() -> None:
    missing = [] if shutil.which("mmdebstrap") else ["mmdebstrap"]
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        missing += [tool for tool in ("fakechroot", "fakeroot") if not shutil.which(tool)]
    if missing:
        raise ImageError(
            f"Debian images are made by {' and '.join(missing)}, missing here: apt install {' '.join(missing)}; "
            "or give an OCI layout, a docker save archive, an ext4 image or a directory as the root"
        )


def _apt_settings() -> list[str]:
    """How this machine's apt reaches its sources (proxies, certificates)."""
    if shutil.which("apt-config") is None:
        return []
    done = subprocess.run(
        ["apt-config", "dump"], capture_output=True, text=True, errors="replace", check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("Acquire::")]
    return [line for line in lines if not line.startswith("Acquire::IndexTargets")]


def _sources(suite: str, etc: Path = Path("/etc/apt")) -> list[str]:
    """Lines for the image's sources.list: this machine's sources of `suite`; none for mmdebstrap's own choice."""
    suites = {suite, f"{suite}-updates", f"{suite}-security"}
    found: list[tuple[str, str]] = []
    try:
        for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]:
            if path.is_file():
                found += _one_line_sources(path.read_text(errors="replace"))
        for path in sorted((etc / "sources.list.d").glob("*.sources")):
            found += _deb822_sources(path.read_text(errors="replace"))
    except OSError:
        return []
    chosen = dict.fromkeys(
        (uri, name) for uri, name in found if name in suites and uri.startswith(("http:", "https:"))
    )
    if not any(name == suite for _, name in chosen):
        return []
    return [f"deb {uri} {name} main" for uri, name in chosen]


def _one_line_sources(text: str) -> Iterator[tuple[str, str]]:
    """(URI, suite) of each line of a sources.list (sources.list(5), one-line style) that has Debian's main component."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
        if words[:1] == ["deb"] and "main" in words[3:]:
            yield words[1], words[2]


def _deb822_sources(text: str) -> Iterator[tuple[str, str]]:
    """The same of a file in deb822 style."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            name.lower(): value.split()
            for name, value in re.findall(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza)
        }
        if (
            "deb" in fields.get("types", [])
            and "main" in fields.get("components", [])
            and fields.get("enabled") != ["no"]
        ):
            for uri in fields.get("uris", []):
                for suite in fields.get("suites", []):
                    yield uri, suite


def _run(command: list[str], archive: IO[bytes], progress: Callable[[str], None]) -> None:
    """Run mmdebstrap, which writes `archive`; `ImageError` with its last words if it fails."""
    if setpriv := shutil.which("setpriv"):  # of util-linux: it shall not outlive us, killed as we may be
        command = [setpriv, "--pdeathsig", "TERM", *command]
    said: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        command,
        cwd="/",  # it goes on as a user who may not be able to come in here
        stdin=subprocess.DEVNULL,
        stdout=archive,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        start_new_session=True,  # Ctrl-C is ours to pass on, once
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                said.append(line.rstrip())
                if line.startswith("I: ") and line.endswith("...\n"):  # what takes time
                    progress(line.removeprefix("I: ").removesuffix("...\n"))
            status = process.wait()
        finally:
            if process.poll() is None:
                _stop(process)
    if status:
        words = "\n".join(line for line in said if line)
        raise ImageError(f"mmdebstrap failed with status {status}; its last words:\n{words}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Have it clean up: it leaves files of other users otherwise."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
