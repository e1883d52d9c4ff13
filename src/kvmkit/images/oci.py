"""Images as others make them: OCI layouts, and what ``docker save`` writes.

Sources: the OCI image specification (``image-layout.md``, ``image-index.md``, ``manifest.md``, ``config.md``,
``layer.md``); Docker's image specification v1.2 (``manifest.json``). Each may be a tar archive, itself compressed or
not; an OCI layout may be a directory.

Nothing of it is trusted: digests are checked before what they vouch for is looked at, all sizes are bounded, and what
layers hold goes nowhere but into a `kvmkit.images.tree.Tree`.
"""

import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, cast

import zstandard

from kvmkit.errors import ImageError
from kvmkit.images.config import ARCHITECTURE, ImageConfig
from kvmkit.images.store import Content
from kvmkit.images.tree import HeaderReader, Tree

__all__ = ["Source"]

MAX_IMAGE_BYTES = 32 << 30
"""Of all layers of an image, unpacked: what is longer is a bomb, or nothing to run in a microVM."""
_MAX_JSON_BYTES = 8 << 20
_MAX_LAYERS = 500
_MAX_MEMBERS = 100_000
_MAX_NESTED = 4
_CHUNK_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DOCKER_CONFIG = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")
_INDEXES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_REF_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class _Files(Protocol):
    """A directory or an archive."""

    def open(self, name: str) -> IO[bytes] | None:
        """Open a regular file; None if there is none."""


@dataclass(frozen=True)
class _Layer:
    name: str
    """In the archive or layout."""
    digest: str | None
    """Of the file there."""
    diff_id: str
    """Of the tar archive that it is, unpacked."""


class Source:
    """An image of others, which is open until `close`."""

    build_id: str
    """The manifest's digest, or the configuration's (which is Docker's image ID)."""
    name: str
    """What its maker calls it, like ``registry.example/app:1``; may be empty."""

    def __init__(self, path: Path, directory: Path) -> None:
        """Read what `path` says of itself. `directory` is where to put temporary files, without a name."""
        self._what = path.name
        self._directory = directory
        self._left_bytes = MAX_IMAGE_BYTES
        self._stack = ExitStack()
        try:
            self._files = self._open(path)
            if path.is_dir() or self._files.open("manifest.json") is None:
                self._read_layout()
            else:
                self._read_docker()
        except BaseException:
            self._stack.close()
            raise

    def content(self, progress: Callable[[str], None]) -> Content:
        """Merge the layers. What it returns is to be used before `close`."""
        tree = Tree()
        unpacked: dict[str, IO[bytes]] = {}
        for number, layer in enumerate(self._layers, 1):
            what = f"{self._what}: layer {number} of {len(self._layers)}"
            if layer.diff_id not in unpacked:
                progress(f"unpacking {what}")
                unpacked[layer.diff_id] = self._unpack(layer, what)
            tree.apply_layer(unpacked[layer.diff_id], what)
        return Content(tree, self._config, self.build_id, ARCHITECTURE)

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _open(self, path: Path) -> _Files:
        if path.is_dir():
            return _Directory(path)
        file = self._stack.enter_context(open(path, "rb"))  # noqa: SIM115 - the stack closes it
        if file.peek(4).startswith((_GZIP, _ZSTD)):
            return _Archive(self._spool(file, self._what)[0], self._what)
        return _Archive(file, self._what)

    def _spool(self, file: io.BufferedReader, what: str) -> tuple[IO[bytes], str]:
        """A temporary file with what `file` has, decompressed, and its sha256."""
        spool = self._stack.enter_context(tempfile.TemporaryFile(dir=self._directory))  # noqa: SIM115 - as above
        digest = hashlib.sha256()
        for chunk in _decompressed(file, what):
            self._left_bytes -= len(chunk)
            if self._left_bytes < 0:
                raise ImageError(f"{self._what} has more than {MAX_IMAGE_BYTES >> 30} GiB unpacked: refused")
            digest.update(chunk)
            spool.write(chunk)
        spool.flush()
        return cast(IO[bytes], spool), "sha256:" + digest.hexdigest()

    def _unpack(self, layer: _Layer, what: str) -> IO[bytes]:
        file = self._files.open(layer.name)
        if file is None:
            raise ImageError(f"{what} is missing ({layer.name})")
        with file:
            packed = _Hashed(file)
            spool, diff_id = self._spool(io.BufferedReader(packed, _CHUNK_BYTES), what)
            if layer.digest is not None:
                _check_digest(layer.digest, packed.digest(), what)
        _check_digest(layer.diff_id, diff_id, what)
        return spool

    def _read_layout(self) -> None:
        index = self._files.open("index.json")
        if index is None:
            raise ImageError(
                f"{self._what} is no image: neither a docker save archive (no manifest.json) "
                "nor an OCI layout (no index.json)"
            )
        with index:
            found = self._manifests(_json(index, f"{self._what}: index.json"), "index.json", 0)
        manifests = {descriptor["digest"]: descriptor for descriptor in reversed(found)}
        if len(manifests) != 1:
            names = ", ".join(_ref_name(descriptor) or digest for digest, descriptor in manifests.items())
            raise ImageError(
                f"{self._what} holds {len(manifests)} images ({names:.300}): kvmkit takes those with one"
            )
        self.build_id, descriptor = manifests.popitem()
        self.name = _ref_name(descriptor)
        manifest = self._blob(descriptor)
        config = self._blob(_dict(manifest.get("config"), f"{self._what}: config"))
        layers: list[tuple[str, str | None]] = []
        for layer in _list(manifest.get("layers"), f"{self._what}: layers"):
            digest = _digest(_dict(layer, f"{self._what}: a layer").get("digest"), self._what)
            layers.append((_blob_name(digest), digest))
        self._set(config, layers)

    def _manifests(self, index: Any, what: str, depth: int) -> list[dict[str, Any]]:
        """Descriptors of the manifests that an index has for this machine: below the first level, the first that fits."""
        if depth > _MAX_NESTED:
            raise ImageError(f"{self._what}: indexes within indexes within indexes: refused")
        found, others = [], set()
        for item in _list(_dict(index, f"{self._what}: {what}").get("manifests"), f"{self._what}: {what}"):
            descriptor = _dict(item, f"{self._what}: {what}")
            given = descriptor.get("platform")
            if given is not None:
                fits = _dict(given, f"{self._what}: a platform")
                if (fits.get("os"), fits.get("architecture")) != ("linux", ARCHITECTURE):
                    others.add(f"{fits.get('os')}/{fits.get('architecture')}")
                    continue
            if descriptor.get("mediaType") in _INDEXES:
                nested = self._manifests(self._blob(descriptor), str(descriptor.get("digest")), depth + 1)[:1]
                # The name is the outer index's.
                found += [{**inner, "annotations": descriptor.get("annotations")} for inner in nested]
            else:
                _digest(descriptor.get("digest"), self._what)
                found.append(descriptor)
        if not found:
            raise ImageError(
                f"{self._what} has no image for linux/{ARCHITECTURE}, only for: {', '.join(sorted(others)) or 'none'}"
            )
        return found

    def _blob(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        """A JSON file by its descriptor."""
        digest = _digest(descriptor.get("digest"), self._what)
        file = self._files.open(_blob_name(digest))
        if file is None:
            raise ImageError(f"{self._what}: the blob {digest} is missing")
        with file:
            return _dict(_json(file, f"{self._what}: {digest}", digest), f"{self._what}: {digest}")

    def _read_docker(self) -> None:
        file = self._files.open("manifest.json")
        assert file is not None
        with file:
            images = _list(_json(file, f"{self._what}: manifest.json"), f"{self._what}: manifest.json")
        if len(images) != 1:
            raise ImageError(f"{self._what} holds {len(images)} images: save the one to use by itself")
        image = _dict(images[0], f"{self._what}: manifest.json")
        config_name, tags = image.get("Config"), image.get("RepoTags") or []
        name = _DOCKER_CONFIG.fullmatch(config_name) if isinstance(config_name, str) else None
        config_file = self._files.open(name[0]) if name else None
        if name is None or config_file is None:
            raise ImageError(
                f"{self._what}: manifest.json names the configuration {config_name!r:.80}: there is none"
            )
        self.build_id = f"sha256:{name[1]}"
        self.name = tags[0] if isinstance(tags, list) and tags and isinstance(tags[0], str) else ""
        with config_file:
            config = _dict(
                _json(config_file, f"{self._what}: {name[0]}", self.build_id), f"{self._what}: {name[0]}"
            )
        names = _list(image.get("Layers"), f"{self._what}: Layers")
        if not all(isinstance(item, str) for item in names):
            raise ImageError(f"{self._what}: manifest.json names layers that aren't names")
        self._set(config, [(item, None) for item in names])

    def _set(self, config: dict[str, Any], layers: list[tuple[str, str | None]]) -> None:
        what = f"{self._what}: its configuration"
        made_for = config.get("os"), config.get("architecture")
        if made_for != ("linux", ARCHITECTURE):
            raise ImageError(
                f"{self._what} is for {made_for[0]}/{made_for[1]}, and machines here are linux/{ARCHITECTURE}"
            )
        diff_ids = _list(_dict(config.get("rootfs"), what).get("diff_ids"), what)
        if len(diff_ids) != len(layers) or len(layers) > _MAX_LAYERS:
            raise ImageError(
                f"{what} has {len(diff_ids)} layers, and there are {len(layers)}: as many, and at most {_MAX_LAYERS}"
            )
        self._layers = [
            _Layer(name, digest, _digest(diff_id, what))
            for (name, digest), diff_id in zip(layers, diff_ids, strict=True)
        ]
        self._config = ImageConfig.from_oci(_dict(config.get("config") or {}, what), self._what)


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes] | None:
        try:
            fd = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK)  # it may be a FIFO
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return open(fd, "rb")


class _Archive:
    """A tar archive, uncompressed."""

    def __init__(self, file: IO[bytes], what: str) -> None:
        self._file = file
        self._what = what
        file.seek(0)
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(fileobj=HeaderReader(file, what).as_file(), mode="r:") as archive:
                for number, member in enumerate(archive):
                    if number == _MAX_MEMBERS:
                        raise ImageError(f"{what} is no image: it has more than {_MAX_MEMBERS} files")
                    self._members[posixpath.normpath(member.name)] = member
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
            raise ImageError(f"{what} is no sound tar archive: {error}") from error

    def open(self, name: str) -> IO[bytes] | None:
        for _ in range(10):  # Docker once linked layers that were the same
            member = self._members.get(posixpath.normpath(name))
            if member is None:
                return None
            if member.issym():
                name = posixpath.join(posixpath.dirname(member.name), member.linkname)
            elif member.islnk():
                name = member.linkname
            elif member.isreg() and not member.issparse() and member.size >= 0:
                return io.BufferedReader(_Part(self._file.fileno(), member.offset_data, member.size))
            else:
                break
        return None


class _Part(io.RawIOBase):
    """A part of a file, read without moving that file's position."""

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        self._fd = fd
        self._offset = offset
        self._end = offset + size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._fd, min(len(buffer), self._end - self._offset), self._offset)
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


class _Hashed(io.RawIOBase):
    """A file that is read once, from its beginning to its end, and its digest."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._hash.update(data)
        buffer[: len(data)] = data
        return len(data)

    def digest(self) -> str:
        """The digest of all of it."""
        while self.read(_CHUNK_BYTES):
            pass
        return "sha256:" + self._hash.hexdigest()


def _decompressed(file: io.BufferedReader, what: str) -> Iterator[bytes]:
    """What a file has, compressed by gzip, zstd, or not: what it begins with says, whatever the image calls it."""
    head = file.peek(4)
    reader = cast(IO[bytes], file)
    if head.startswith(_GZIP):
        reader = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    elif head.startswith(_ZSTD):
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        reader = cast(IO[bytes], decompressor.stream_reader(file, read_across_frames=True))
    try:
        while chunk := reader.read(_CHUNK_BYTES):
            yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ImageError(f"{what} is damaged: {error}") from error


def _json(file: IO[bytes], what: str, digest: str | None = None) -> Any:
    data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise ImageError(f"{what} has more than {_MAX_JSON_BYTES >> 20} MiB: refused")
    if digest is not None:
        _check_digest(digest, "sha256:" + hashlib.sha256(data).hexdigest(), what)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is no JSON: {error}") from error


def _check_digest(said: str, is_: str, what: str) -> None:
    if said != is_:
        raise ImageError(f"{what} is damaged: its digest is {is_}, and the image says {said}")


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImageError(f"{what} can't be {value!r:.80}: an object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"{what} can't be {value!r:.80}: a list")
    return value


def _digest(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ImageError(f"{what} has a digest {value!r:.80}: it should be a sha256")
    return value


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _ref_name(descriptor: dict[str, Any]) -> str:
    annotations = descriptor.get("annotations")
    if isinstance(annotations, dict):
        for key in _REF_NAMES:
            if isinstance(name := annotations.get(key), str):
                return name
    return ""
