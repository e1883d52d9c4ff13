"""Layers and images for the tests, made here, and what e2fsprogs says about file systems."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Entry:
    """An entry of a layer, as `tarfile` spells it."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 1_600_000_000
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, **rest: Any) -> Entry:
    return Entry(name, type=tarfile.DIRTYPE, mode=mode, **rest)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, type=tarfile.SYMTYPE, mode=0o777, link=target)


def hard_link(name: str, target: str) -> Entry:
    return Entry(name, type=tarfile.LNKTYPE, link=target)


def layer(*entries: Entry) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.size = len(entry.data)
            info.type, info.mode, info.uid, info.gid = entry.type, entry.mode, entry.uid, entry.gid
            info.mtime, info.linkname = entry.mtime, entry.link
            info.devmajor, info.devminor = entry.device
            info.pax_headers = {
                f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
                for name, value in entry.xattrs.items()
            }
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def config_of(
    layers: Sequence[bytes], config: dict[str, Any] | None = None, architecture: str = "amd64"
) -> bytes:
    """An image configuration."""
    return json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in layers]},
        }
    ).encode()


def e2fsck(image: Path) -> None:
    """Assert that e2fsck finds nothing to do or to say."""
    done = subprocess.run([_tool("e2fsck"), "-fn", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def debugfs(image: Path, *commands: str) -> list[str]:
    """What debugfs answers to each command."""
    done = subprocess.run(
        [_tool("debugfs"), "-f", "-", str(image)],
        input="\n".join(commands) + "\n",
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=True,
    )
    answers = done.stdout.split("debugfs: ")[1:]
    assert len(answers) == len(commands), done.stdout
    return [answer.partition("\n")[2] for answer in answers]


def _tool(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        pytest.skip(f"no {name} here: package e2fsprogs")
    return path


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def write_layout(
    path: Path,
    layers: Sequence[bytes],
    config: dict[str, Any] | None = None,
    *,
    pack: Callable[[bytes], bytes] = gzipped,
    architecture: str = "amd64",
    name: str = "",
) -> str:
    """An OCI layout with one image; returns its manifest's digest."""

    def blob(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        file = path / "blobs" / sha256(data).replace(":", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data), **more}

    prefix = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{prefix}.manifest.v1+json",
        "config": blob(config_of(layers, config, architecture), f"{prefix}.config.v1+json"),
        "layers": [blob(pack(data), f"{prefix}.layer.v1.tar+gzip") for data in layers],
    }
    descriptor = blob(json.dumps(manifest).encode(), f"{prefix}.manifest.v1+json")
    if name:
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": name}
    # A builder's index of platforms, and what it attests of the image
    index = {
        "schemaVersion": 2,
        "manifests": [
            {**descriptor, "platform": {"os": "linux", "architecture": architecture}},
            {
                **descriptor,
                "digest": sha256(b"none"),
                "platform": {"os": "unknown", "architecture": "unknown"},
            },
        ],
    }
    nested = blob(
        json.dumps(index).encode(), f"{prefix}.index.v1+json", annotations=descriptor.get("annotations")
    )
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [nested]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return sha256(json.dumps(manifest).encode())


def write_docker(
    path: Path,
    layers: Sequence[bytes],
    config: dict[str, Any] | None = None,
    *,
    tag: str = "registry.example/x/app:1",
) -> None:
    """A ``docker save`` archive with one image, as Docker wrote it before it wrote OCI layouts too."""
    about = config_of(layers, config)
    config_name = sha256(about)[7:] + ".json"
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": config_name, "RepoTags": [tag], "Layers": names}]
    files = {
        config_name: about,
        **dict(zip(names, layers, strict=True)),
        "manifest.json": json.dumps(manifest).encode(),
    }
    write_tar(path, files)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.write_bytes(layer(*(Entry(name, data) for name, data in files.items())))


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"), reverse=True)
        if path.is_file()
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; its directory of images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kvmkit/images"
