"""Packages from the machine's own apt, in a private directory: nothing is installed, and apt's own state stays as it is."""

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmkit.machine.guest import GuestError

HINT = "give a kernel with --kernel, and an initramfs with --initrd"


class Apt:
    """apt with a state of its own, below `directory`, which exists and is removed at the end."""

    def __init__(self, directory: Path, progress: Callable[[str], None], architecture: str = "amd64") -> None:
        """`progress` gets a line for each step that takes time. `architecture` of the packages is as Debian names it."""
        self._architecture = architecture
        self._directory = directory
        self._progress = progress
        self._environment: dict[str, str] | None = None
        self._failed_fetch = ""

    def download(self, package: str) -> tuple[Path, str, str]:
        """Download a package, or the kernel image that a metapackage depends on: file, name and version."""
        self._update()
        fields = self._show(package)
        image = re.search(r"\blinux-image-\d[^\s,(]*", fields.get("Depends", ""))
        if image:
            package = image[0]
            fields = self._show(package)
        version = fields["Version"]
        self._progress(f"downloading {package} {version} ({int(fields.get('Size', 0)) / 1e6:.1f} MB)")
        self._run(["apt-get", "download", "-q", f"{package}={version}"], f"apt-get download {package}")
        debs = list(self._directory.glob(f"{package}_*.deb"))
        if len(debs) != 1:
            raise GuestError(f"apt-get download {package} left {len(debs)} packages behind; {HINT}")
        return debs[0], package, version

    def download_all(self, packages: Sequence[str]) -> list[Path]:
        """Download packages and all that they depend on: the files."""
        self._update()
        self._progress(f"downloading {' '.join(packages)} and what they depend on")
        options = ["-q", "-y", "--no-install-recommends", "--download-only", "-o", "Debug::NoLocking=1"]
        self._run(["apt-get", "install", *options, *packages], f"apt-get install {' '.join(packages)}")
        return sorted((self._directory / "cache" / "archives").glob("*.deb"))

    def close(self) -> None:
        """Remove the directory, with what was downloaded."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _update(self) -> None:
        if self._environment is not None:
            return
        self._environment = self._set_up()
        self._progress("asking apt's sources for their package lists")
        # A source that can't be reached is no failure to apt, one whose lists aren't whole (a mirror in the middle of its
        # update) is: to us, both are failures if what we want was there.
        try:
            said = self._run(["apt-get", "update", "-q"], "apt-get update")
        except GuestError as error:
            self._failed_fetch = " ".join(str(error).removesuffix(HINT).split())
            return
        failed = re.search(r"^Err:\d+ (.*(?:\n .*)?)", said, re.MULTILINE)
        self._failed_fetch = " ".join(failed[1].split()).rstrip(":") if failed else ""

    def _set_up(self) -> dict[str, str]:
        for tool in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise GuestError(f"the default guest is fetched by apt, and there is no {tool} here: {HINT}")
        # How this machine reaches its sources (proxies, certificates), without its hooks and additional indexes.
        dump = output_of(["apt-config", "dump"], "apt-config")
        acquire = [
            line
            for line in dump.splitlines()
            if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
        ]
        for name in ("lists/partial", "cache/archives/partial", "log"):
            (self._directory / name).mkdir(parents=True)
        (self._directory / "status").touch()
        here = self._directory
        config = here / "apt.conf"
        settings = {
            "Dir::State": here,
            "Dir::State::lists": here / "lists",
            "Dir::State::status": here / "status",
            "Dir::Cache": here / "cache",
            "Dir::Log": here / "log",
            "Dir::Etc::Parts": here / "none",
            "Dir::Etc::Main": here / "none",
            "APT::Architecture": self._architecture,
            "APT::Sandbox::User": "",  # the user _apt can't come in here, and all are ours
            "Acquire::Languages": "none",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        config.write_text("\n".join(["#clear APT::Architectures;", *acquire, *lines]) + "\n")
        return {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}

    def _show(self, package: str) -> dict[str, str]:
        """Return the fields of the candidate."""
        try:
            text = self._run(["apt-cache", "show", "--no-all-versions", package], f"apt-cache show {package}")
        except GuestError as error:
            if self._failed_fetch:
                raise GuestError(
                    f"apt can't reach all of its sources, and the others offer no {package} ({self._failed_fetch}): "
                    f"see to the network, or {HINT}"
                ) from error
            raise GuestError(f"apt's sources offer no {package}: {HINT}") from error
        fields = {}
        for line in text.split("\n\n")[0].splitlines():
            if line[:1].strip() and ": " in line:
                name, value = line.split(": ", 1)
                fields[name] = value
        return fields

    def _run(self, command: list[str], what: str) -> str:
        return output_of(command, what, self._directory, self._environment)


def output_of(
    command: list[str], what: str, directory: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run a command and return its stdout. `GuestError` with what it said if it fails; `what` names it there."""
    if setpriv := shutil.which(
        "setpriv"
    ):  # of util-linux: the command shall not outlive us, killed as we may be
        command = [setpriv, "--pdeathsig", "KILL", *command]
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise GuestError(f"{what} failed with status {done.returncode}: {said or 'no message'}\n{HINT}")
    return done.stdout


def member(deb: Path, name: re.Pattern[str]) -> bytes:
    """Return the first regular file in `deb` whose name matches; `GuestError` if there is none."""
    for _, data in members(deb, name):
        return data
    raise GuestError(f"{deb.name} holds no {name.pattern}; {HINT}")


def members(deb: Path, name: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each regular file in `deb` whose name matches."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    file = (
                        archive.extractfile(member)
                        if member.isreg() and name.fullmatch(member.name)
                        else None
                    )
                    if file is not None:
                        yield member.name, file.read()
        except tarfile.TarError as error:
            raise GuestError(f"{deb.name} is damaged ({error}): try again, or {HINT}") from error
        finally:
            process.kill()  # nobody may be interested in the rest
