"""What an image says of the process that it is made for."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmkit.errors import ImageError

__all__ = ["ARCHITECTURE", "ImageConfig"]

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""This machine's, in OCI's spelling, which is Go's."""


@dataclass(frozen=True)
class ImageConfig:
    """The `config` of an OCI image configuration (``config.md``), as far as it means something to a VM."""

    env: tuple[tuple[str, str], ...] = ()
    """Environment variables, (name, value) each."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    cwd: str | None = None
    """`WorkingDir`; None is ``/``."""
    user: str | None = None
    """`User`: a name or number, or USER:GROUP; None is root."""

    @property
    def command(self) -> tuple[str, ...]:
        """What to run if nobody says what: the entry point, and `cmd` as its arguments."""
        return self.entrypoint + self.cmd

    @classmethod
    def from_oci(cls, config: Mapping[str, Any], what: str) -> "ImageConfig":
        """Take what OCI and Docker call Env, Entrypoint, Cmd, WorkingDir and User. `what` names it in an `ImageError`."""
        env = []
        for variable in _strings(config, "Env", what):
            name, equals, value = variable.partition("=")
            if not name or not equals:
                raise ImageError(f"{what}: {variable!r:.80} in Env isn't NAME=VALUE")
            env.append((name, value))
        return cls(
            tuple(env),
            _strings(config, "Entrypoint", what),
            _strings(config, "Cmd", what),
            _string(config.get("WorkingDir") or "", "WorkingDir", what) or None,
            _string(config.get("User") or "", "User", what) or None,
        )

    def to_oci(self) -> dict[str, Any]:
        """Return what `from_oci` takes."""
        return {
            "Env": [f"{name}={value}" for name, value in self.env],
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "WorkingDir": self.cwd or "",
            "User": self.user or "",
        }


def _strings(config: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list):
        raise ImageError(f"{what}: {key} can't be {value!r:.80}: a list of strings")
    return tuple(_string(item, key, what) for item in value)


def _string(value: Any, key: str, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ImageError(f"{what}: {key} can't be {value!r:.80}: a string without NUL")
    return value
