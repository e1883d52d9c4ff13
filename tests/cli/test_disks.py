"""``kvmkit run --disk``."""

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from kvmkit.cli.arguments import DiskArgument
from kvmkit.client import Disk

from .conftest import Kvmkit

Run = Callable[..., Kvmkit]

SIZE = 1 << 20
WRITE = ("sh", "-c", "printf 'by the guest' | dd of=/dev/vda conv=fsync 2>/dev/null")
READ = ("head", "-c", "12", "/dev/vda")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"by the host." * (SIZE // 12) + bytes(SIZE % 12))
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        (",ro", {"read_only": True}),
        (",temp", {"temporary": True}),
        (",overlay=changes", {"overlay": "changes"}),
    ],
)
def test_argument(image: Path, flags: str, expected: dict[str, object]) -> None:
    assert DiskArgument().convert(f"{image}{flags}", None, None) == Disk(str(image), **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [",rw", ",ro,temp", ",overlay=", ",overlay", ",,"])
def test_argument_that_is_wrong(image: Path, flags: str) -> None:
    with pytest.raises(click.UsageError, match="one of ro, temp and overlay=FILE"):
        DiskArgument().convert(f"{image}{flags}", None, None)


def test_disk_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="isn't there"):
        DiskArgument().convert(str(tmp_path / "none"), None, None)


@pytest.mark.slow
def test_written_to_the_image(run_linux: Run, image: Path) -> None:
    assert run_linux("--disk", str(image), "--", *WRITE).finish() == (0, b"", "")
    assert image.read_bytes()[:24] == b"by the guestby the host."
    assert image.stat().st_size == SIZE


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["ro", "temp"])
def test_not_written_to_the_image(run_linux: Run, image: Path, flag: str) -> None:
    before = image.read_bytes()
    status, out, _ = run_linux(
        "--disk", f"{image},{flag}", "--", *WRITE[:-1], f"{WRITE[-1]}; {' '.join(READ)}"
    ).finish()
    assert (status, out) == (0, b"by the guest" if flag == "temp" else b"by the host.")
    assert image.read_bytes() == before


@pytest.mark.slow
def test_changes_in_a_file_of_their_own(run_linux: Run, image: Path, tmp_path: Path) -> None:
    before, overlay = image.read_bytes(), tmp_path / "changes"
    disk = f"{image},overlay={overlay}"
    assert run_linux("--disk", disk, "--", *WRITE).finish() == (0, b"", "")
    assert image.read_bytes() == before
    assert run_linux("--disk", disk, "--", *READ).finish() == (0, b"by the guest", "")
    image.write_bytes(before[::-1])
    status, _, err = run_linux("--disk", disk, "--", *READ).finish()
    assert status == 125
    assert "has changed since the overlay was made" in err
