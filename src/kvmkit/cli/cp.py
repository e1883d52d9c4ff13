"""``kvmkit cp``: files into a guest that runs, and out of it."""

import click

from kvmkit.client import Machine


@click.command()
@click.argument("source")
@click.argument("target")
def cp(source: str, target: str) -> None:
    """Copy a file or directory, as it is: to a guest (NAME:PATH as TARGET), or from one (as SOURCE).

    TARGET is the copy's own name, or a directory that it goes into.

    \b
    Examples:
      kvmkit cp build web:/srv
      kvmkit cp web:/var/log/messages .
    """  # noqa: D301 - click wants the character itself
    to_guest, from_guest = _place(target), _place(source)
    if (to_guest is None) == (from_guest is None):
        raise click.UsageError("one of the two is in a guest, and is written NAME:PATH")
    if to_guest is not None:
        with Machine.attach(to_guest[0]) as vm:
            vm.files.put(source, to_guest[1])
    elif from_guest is not None:
        with Machine.attach(from_guest[0]) as vm:
            vm.files.get(from_guest[1], target)


def _place(text: str) -> tuple[str, str] | None:
    """Name and path of what is in a guest; a host's file with a colon in its name can be given with a slash before that."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and name and path and "/" not in name else None
