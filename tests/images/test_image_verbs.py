"""``kvmkit image``."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmkit.cli import commands
from kvmkit.errors import ImageError
from kvmkit.images import Store, oci

from .conftest import Entry, layer, write_docker


def run(*arguments: str) -> str:
    done = CliRunner().invoke(commands, ["image", *arguments], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_from_import_to_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(oci, "ARCHITECTURE", "amd64")
    write_docker(
        tmp_path / "app.tar", [layer(Entry("bin/sh"))], {"Cmd": ["sh"]}, tag="registry.example/me/app:2"
    )
    assert run("list").split() == ["NAME", "DISK", "CREATED", "SOURCE"]
    file = tmp_path / "cache/kvmkit/images/app:2/root.ext4"
    assert run("import", str(tmp_path / "app.tar"), "--size", "8M") == f"app:2  0 MB  {file}\n"
    assert file.stat().st_size == 8 << 20
    assert run("import", str(tmp_path / "app.tar"), "--name", "mine").startswith("mine ")
    assert [line.split()[0] for line in run("list").splitlines()] == ["NAME", "app:2", "mine"]
    about = json.loads(run("show", "app:2"))
    assert about["config"]["Cmd"] == ["sh"]
    assert (about["name"], about["path"], about["size_bytes"]) == ("app:2", str(file), 8 << 20)
    run("remove", "app:2", "mine")
    assert Store().images() == []
    for verb in ("show", "remove"):
        with pytest.raises(ImageError, match="kvmkit image list"):
            run(verb, "app:2")


def test_build_wants_a_debian(cache: Path) -> None:
    with pytest.raises(ImageError, match="debian:SUITE"):
        run("build", "gentoo:now")
    with pytest.raises(ImageError, match="no name of a Debian package"):
        run("build", "debian:bookworm", "--include", "gcc,--hook=x")
