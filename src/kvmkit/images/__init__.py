"""Roots of guests: what ``kvmkit run ROOT`` may name, and the cache of images made from it.

`resolve` is all that starting a machine takes. Layers are merged in memory (`tree`) and written as ext4 (`ext4`), which
needs neither root nor tools; they come from OCI layouts and ``docker save`` archives (`oci`) or from mmdebstrap
(`debian`), and images stay in the user's cache (`store`).
"""

# `oci` is imported where it is used: no other command waits for its decompressors.

import hashlib
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvmkit.errors import ImageError
from kvmkit.images.config import ImageConfig
from kvmkit.images.debian import DEFAULT_PACKAGES, SOURCE, debian
from kvmkit.images.store import Image, Store

__all__ = [
    "DEFAULT_PACKAGES",
    "DirectoryRoot",
    "Image",
    "ImageConfig",
    "ImageRoot",
    "Root",
    "Store",
    "build",
    "import_image",
    "resolve",
]

_EXT4_MAGIC = b"\x53\xef"  # s_magic
_EXT4_MAGIC_OFFSET = 0x438


@dataclass(frozen=True)
class DirectoryRoot:
    """A directory of the host, to be shared read-only, with what the guest writes kept apart."""

    path: Path


@dataclass(frozen=True)
class ImageRoot:
    """A file system image, to be used read-only, with what the guest writes kept apart."""

    path: Path
    fstype: str
    config: ImageConfig


Root = DirectoryRoot | ImageRoot


def resolve(root: str, progress: Callable[[str], None]) -> Root:
    """Find, or make on first use, what `root` names.

    A name like "debian:bookworm", or of an image that is there, before a path: of a directory that has a system in it,
    an OCI layout, a ``docker save`` archive (also compressed), or an ext4 image. `progress` gets a line for each step
    that takes time. `ImageError` if it is none of these, or can't be made.
    """
    if "/" not in root and root not in ("", ".", ".."):
        store = Store()
        image = store.find(root)
        if image is None and SOURCE.fullmatch(root):
            image = build(root, progress=progress, replace=False, store=store)
        if image is not None:
            return ImageRoot(image.path, image.fstype, image.config)
    path = Path(os.path.abspath(os.path.expanduser(root)))
    if path.is_dir() and not _is_layout(path):
        if not any((path / name).is_dir() for name in ("usr/bin", "bin", "sbin")):
            raise ImageError(f"{root} is no root of a system: the directory has neither bin nor usr/bin")
        return DirectoryRoot(path)
    if _is_ext4(path, root):
        return ImageRoot(path, "ext4", ImageConfig())
    image = _first_use(path, root, progress)
    return ImageRoot(image.path, image.fstype, image.config)


def build(
    source: str,
    include: Sequence[str] = (),
    name: str | None = None,
    size_bytes: int | None = None,
    *,
    progress: Callable[[str], None],
    replace: bool = True,
    store: Store | None = None,
) -> Image:
    """Make an image of Debian, `source` being like "debian:bookworm", with the packages `include`.

    It gets `name`, or else the source's, and replaces one that has it unless `replace` is false. `size_bytes` is the
    file system's; None is with the usual free space.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise ImageError(f"{source!r} can't be built: debian:SUITE can, like debian:bookworm")
    store = store or Store()
    with ExitStack() as stack:
        return store.add(
            name or source,
            lambda: stack.enter_context(debian(match[1], include, store.directory, progress)),
            progress,
            source=source,
            size_bytes=size_bytes,
            replace=replace,
        )


def import_image(
    path: Path, name: str | None = None, size_bytes: int | None = None, *, progress: Callable[[str], None]
) -> Image:
    """Make an image of an OCI layout or a ``docker save`` archive.

    It gets `name`, or else what its maker calls it, without the registry, and replaces one that has it. `size_bytes` is
    the file system's; None is with the usual free space.
    """
    path = path.absolute()
    _check_source(path, str(path))
    store = Store()
    from kvmkit.images.oci import Source

    with store.explained(), Source(path, store.directory) as source:
        return store.add(
            name or _safe(source.name.rpartition("/")[2] or path.name),
            lambda: source.content(progress),
            progress,
            source=str(path),
            size_bytes=size_bytes,
        )


def _first_use(path: Path, root: str, progress: Callable[[str], None]) -> Image:
    """The image of a layout or archive: made unless it is there and `path` is still what it was made from."""
    _check_source(path, root)
    store = Store()
    status = (path / "index.json" if path.is_dir() else path).stat()
    stamp = f"{path}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}"
    prefix = _safe(path.name)[:64] + "@"
    name = prefix + hashlib.sha256(os.fsencode(stamp)).hexdigest()[:16]
    if (image := store.find(name)) is not None:
        return image
    from kvmkit.images.oci import Source

    with store.explained(), Source(path, store.directory) as source:
        image = store.add(name, lambda: source.content(progress), progress, source=str(path), replace=False)
    for other in store.images():  # of what `path` once was
        if other.source == str(path) and other.name.startswith(prefix) and other.name != name:
            store.remove(other.name)
    return image


def _is_layout(path: Path) -> bool:
    return (path / "oci-layout").is_file() and (path / "index.json").is_file()


def _is_archive(file: IO[bytes]) -> bool:
    """Whether a file looks like a tar archive, or like something that gzip or zstd made."""
    head = os.pread(file.fileno(), 512, 0)
    return head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")) or head[257:262] == b"ustar"


def _safe(name: str) -> str:
    """As a name for an image."""
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._+:@-]", "-", name))[:128] or "image"


def _check_source(path: Path, given: str) -> None:
    """`ImageError` unless `path` looks like a layout or an archive."""
    if path.is_dir():
        if not _is_layout(path):
            raise ImageError(f"{given} is no OCI layout: the directory has no oci-layout and index.json")
        return
    with _opened(path, given) as file:
        if not _is_archive(file):
            raise ImageError(f"{given} is no OCI layout and no docker save archive, nor an ext4 image")


def _is_ext4(path: Path, given: str) -> bool:
    if path.is_dir():
        return False
    with _opened(path, given) as file:
        return os.pread(file.fileno(), len(_EXT4_MAGIC), _EXT4_MAGIC_OFFSET) == _EXT4_MAGIC


def _opened(path: Path, given: str) -> IO[bytes]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a FIFO
    except FileNotFoundError:
        raise ImageError(
            f"{given}: there is no such image or file: kvmkit image list shows images; debian:SUITE is made on first use"
        ) from None
    except OSError as error:
        raise ImageError(f"{given}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise ImageError(f"{given} is neither a file nor a directory")
    return open(fd, "rb")
