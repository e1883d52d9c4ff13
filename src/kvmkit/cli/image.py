"""``kvmkit image``: the images that machines run on."""

import json
from pathlib import Path

import click

from kvmkit.cli.arguments import Memory
from kvmkit.errors import ImageError
from kvmkit.images import DEFAULT_PACKAGES, Image, Store, build, import_image


@click.group()
def image() -> None:
    """Make, list and remove images, the roots of guests.

    kvmkit run makes what it needs on first use: an image is only to be made by hand to choose what is in it. Images are
    kept in ~/.cache/kvmkit/images. A guest only reads its image; what it writes goes with it.
    """


def _progress(text: str) -> None:
    click.echo(text, err=True)


_NAME = click.option("--name", metavar="NAME", help="What to call it; an image of that name is replaced.")
_SIZE = click.option(
    "--size",
    type=Memory(),
    help="The file system's size.  [default: what is in it, and 4 GiB that cost nothing here]",
)


@image.command("build")
@click.argument("source")
@click.option(
    "--include",
    multiple=True,
    metavar="PKG,…",
    help=f"Packages to install, beside {', '.join(DEFAULT_PACKAGES)} and what they depend on.",
)
@_SIZE
@_NAME
def build_(source: str, include: tuple[str, ...], size: int | None, name: str | None) -> None:
    """Make an image of Debian, from its packages.

    SOURCE is debian: and the name of a release. The image has a minimal Debian (what is essential, and apt), python3, and
    the packages that --include names, without manual pages and translations. They come from where this machine's apt takes
    that release from, or else from deb.debian.org. mmdebstrap makes it, which needs no root with uidmap, or with
    fakechroot and fakeroot.

    \b
    Examples:
      kvmkit image build debian:bookworm                              what kvmkit run debian:bookworm makes
      kvmkit image build debian:trixie --include gcc,make --name cc   then: kvmkit run cc -- gcc --version
    """  # noqa: D301 - click wants the character itself
    packages = [package for packages in include for package in packages.split(",") if package]
    _made(build(source, packages, name, size, progress=_progress))


@image.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@_SIZE
@_NAME
def import_(path: Path, size: int | None, name: str | None) -> None:
    """Make an image of an OCI layout or a docker save archive.

    PATH is a directory or a tar archive, compressed or not. kvmkit run takes such a PATH as well. The name is the one
    that the image itself gives, without its registry.

    \b
    Examples:
      docker save app:1 -o app.tar; kvmkit image import app.tar       then: kvmkit run app:1
      kvmkit image import layout --name app                           then: kvmkit run app -- sh
    """  # noqa: D301
    _made(import_image(path, name, size, progress=_progress))


@image.command("list")
def list_() -> None:
    """List images: what each takes on the disk, when it was made, and what from."""
    images = Store().images()
    lines = [("NAME", "DISK", "CREATED", "SOURCE")]
    lines += [
        (image.name, f"{image.disk_bytes / 1e6:.0f} MB", image.created[:16], image.source) for image in images
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        click.echo("  ".join([*cells, line[3]]))


@image.command()
@click.argument("name")
def show(name: str) -> None:
    """Show an image as JSON: its file, what it is made from, and the process it is made for (as OCI spells it)."""
    found = Store().find(name)
    if found is None:
        raise ImageError(f"there is no image {name}: kvmkit image list shows those that are there")
    about = {"name": found.name, "path": str(found.path), "disk_bytes": found.disk_bytes, **found.to_dict()}
    click.echo(json.dumps(about, indent=2))


@image.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove images. Machines that run on one keep it until they end."""
    store = Store()
    for name in names:
        store.remove(name)


def _made(image: Image) -> None:
    """Say what the user wants to know of it."""
    click.echo(f"{image.name}  {image.disk_bytes / 1e6:.0f} MB  {image.path}")
