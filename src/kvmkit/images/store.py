"""The cache of images: ``${XDG_CACHE_HOME:-~/.cache}/kvmkit/images/NAME/`` with ``root.ext4`` and ``image.json``.

An image is complete or not there: it is made in ``.NAME.new`` by whoever holds the lock ``.NAME.lock``, and renamed.
The lock ends with the process that holds it, and what a killed one left behind is removed by the next who makes any.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import NAMESPACE_URL, uuid5

from kvmkit.errors import ImageError
from kvmkit.images.config import ImageConfig
from kvmkit.images.ext4 import write_ext4
from kvmkit.images.tree import Tree

__all__ = ["NAME", "Content", "Image", "Store"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:@-]{0,127}")
_IMAGE = "root.ext4"
_ABOUT = "image.json"


@dataclass(frozen=True)
class Content:
    """What an image is made of."""

    tree: Tree
    config: ImageConfig
    build_id: str
    """A digest that tells it from others: of an OCI manifest, a Docker configuration, or a tar archive."""
    architecture: str
    """In OCI's spelling, which is Go's: "amd64", "arm64"."""


@dataclass(frozen=True)
class Image:
    """An image in the cache."""

    name: str
    path: Path
    """The file system image; nobody writes to it."""
    fstype: str
    source: str
    """What it was made from: "debian:bookworm", or a path."""
    created: str
    """ISO 8601, UTC."""
    size_bytes: int
    """Of the file system, free space included."""
    build_id: str
    architecture: str
    config: ImageConfig

    @property
    def disk_bytes(self) -> int:
        """What it takes on the host's disk."""
        return self.path.stat().st_blocks * 512

    def to_dict(self) -> dict[str, Any]:
        """Return what ``image.json`` holds."""
        return {
            "source": self.source,
            "created": self.created,
            "size_bytes": self.size_bytes,
            "build_id": self.build_id,
            "architecture": self.architecture,
            "fstype": self.fstype,
            "config": self.config.to_oci(),
        }


class Store:
    """The images of a directory, made if it isn't there."""

    def __init__(self, directory: Path | None = None) -> None:
        """Without `directory`, those of the user's cache. `ImageError` if it can't be made."""
        if directory is None:
            cache = os.environ.get(
                "XDG_CACHE_HOME", ""
            )  # one that isn't absolute is to be ignored, says its spec
            base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
            directory = base / "kvmkit" / "images"
        self.directory = directory
        with self.explained():
            directory.mkdir(parents=True, exist_ok=True)

    def images(self) -> list[Image]:
        """All that are sound, by name."""
        with self.explained():
            names = sorted(path.name for path in self.directory.iterdir() if NAME.fullmatch(path.name))
        found = []
        for name in names:
            try:
                image = self.find(name)
            except ImageError:
                continue  # `find` says why, to those who ask for it
            if image is not None:
                found.append(image)
        return found

    def find(self, name: str) -> Image | None:
        """The image of that name; None if there is none. `ImageError` if it is damaged."""
        if not NAME.fullmatch(name):
            return None
        path = self.directory / name
        try:
            about = json.loads((path / _ABOUT).read_bytes())
            return Image(
                name,
                path / _IMAGE,
                about["fstype"],
                about["source"],
                about["created"],
                about["size_bytes"],
                about["build_id"],
                about["architecture"],
                ImageConfig.from_oci(about["config"], name),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImageError) as error:
            raise ImageError(
                f"the image {name} in {self.directory} is damaged ({error!r:.80}): kvmkit image remove {name}"
            ) from error

    def add(
        self,
        name: str,
        make: Callable[[], Content],
        progress: Callable[[str], None],
        *,
        source: str,
        size_bytes: int | None = None,
        replace: bool = True,
    ) -> Image:
        """Write what `make` returns as the image `name` and return it; without `replace`, an older one is left as it is.

        `make` is called when nobody else makes this image, and not if it is there and stays. `size_bytes` is the file
        system's; None is with the usual free space.
        """
        if not NAME.fullmatch(name):
            raise ImageError(
                f"{name!r} is no name for an image: letters, digits and ._+:@- and at most 128 of them"
            )
        with self.explained(), self._locked(name, progress):
            if not replace and (image := self.find(name)) is not None:
                return image
            self._sweep()
            new = self.directory / f".{name}.new"
            shutil.rmtree(new, ignore_errors=True)  # of somebody who was killed: we hold the lock
            new.mkdir()
            try:
                content = make()
                progress(f"writing {name}")
                path = new / _IMAGE
                size = write_ext4(content.tree, path, uuid5(NAMESPACE_URL, content.build_id), size_bytes)
                path.chmod(0o444)
                image = Image(
                    name,
                    self.directory / name / _IMAGE,
                    "ext4",
                    source,
                    datetime.now(UTC).isoformat(timespec="seconds"),
                    size,
                    content.build_id,
                    content.architecture,
                    content.config,
                )
                with open(new / _ABOUT, "w") as file:
                    json.dump(image.to_dict(), file, indent=2)
                    file.flush()
                    os.fsync(file.fileno())
                self._remove(name)
                new.rename(self.directory / name)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            return image

    def remove(self, name: str) -> None:
        """Remove an image. VMs that run on it keep it until they end. `ImageError` if there is none."""
        if not NAME.fullmatch(name) or not (self.directory / name).is_dir():
            raise ImageError(f"there is no image {name}: kvmkit image list shows those that are there")
        with self.explained(), self._locked(name, lambda _: None):
            self._remove(name)

    def _remove(self, name: str) -> None:
        """In one step for others."""
        old = self.directory / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if (self.directory / name).exists():
            (self.directory / name).rename(old)
            shutil.rmtree(old)

    @contextmanager
    def _locked(self, name: str, progress: Callable[[str], None]) -> Iterator[None]:
        path = self.directory / f".{name}.lock"
        while True:
            with open(path, "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress(f"waiting for another kvmkit, which makes {name} right now")
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_still(path, file):  # who held it before has removed it
                    continue
                try:
                    yield
                finally:
                    path.unlink()
                return

    def _sweep(self) -> None:
        """Remove what was left by those who were killed."""
        for path in self.directory.glob(".*.lock"):
            name = path.name[1:].removesuffix(".lock")
            with suppress(FileNotFoundError, BlockingIOError), open(path, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, file):
                    for end in ("new", "old"):
                        shutil.rmtree(self.directory / f".{name}.{end}", ignore_errors=True)
                    path.unlink()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Make an `ImageError` of what the system says within."""
        try:
            yield
        except OSError as error:
            raise ImageError(
                f"{error.filename or self.directory}: {error.strerror or error}: images are kept in {self.directory}; "
                "free space there, or set XDG_CACHE_HOME to another place"
            ) from error


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether `path` leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
