"""What several verbs take on their command lines."""

import os
from typing import Any

import click

from kvmkit.client import Disk, Share
from kvmkit.client.config import size_bytes


class Memory(click.ParamType[int]):
    """A size like 256M, 1G, 262144K or in bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            return size_bytes(value if isinstance(value, int) else str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DiskArgument(click.ParamType[Disk]):
    """PATH, PATH,ro, PATH,temp or PATH,overlay=FILE."""

    name = "path[,ro|,temp|,overlay=file]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Disk:
        """Return the disk."""
        if isinstance(value, Disk):
            return value
        path, *flags = str(value).split(",")
        flag = flags[0] if flags else ""
        overlay = flag.removeprefix("overlay=") if flag.startswith("overlay=") else None
        if len(flags) > 1 or overlay == "" or (overlay is None and flag not in ("", "ro", "temp")):
            self.fail(f"{value!r}: after the path one of ro, temp and overlay=FILE", param, ctx)
        if not os.path.exists(path):
            self.fail(f"{path!r} isn't there", param, ctx)
        return Disk(path, read_only=flag == "ro", temporary=flag == "temp", overlay=overlay)


class ShareArgument(click.ParamType[Share]):
    """DIR:PATH[:ro]."""

    name = "dir:path[:ro]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Share:
        """Return the share."""
        if isinstance(value, Share):
            return value
        parts = str(value).split(":")
        if len(parts) not in (2, 3) or parts[2:] not in ([], ["ro"], ["rw"]):
            self.fail(f"{value!r}: DIR:PATH, or DIR:PATH:ro", param, ctx)
        if not os.path.isdir(parts[0]):
            self.fail(f"{parts[0]!r} is no directory", param, ctx)
        if not parts[1].startswith("/"):
            self.fail(f"{parts[1]!r}: the guest's path begins with a slash", param, ctx)
        return Share(parts[0], parts[1], read_only=parts[2:] == ["ro"])


class VariableArgument(click.ParamType[tuple[str, str]]):
    """NAME=VALUE, or NAME to pass on one's own."""

    name = "name[=value]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        name, given, text = str(value).partition("=")
        if not name:
            self.fail(f"{value!r}: NAME=VALUE, or NAME", param, ctx)
        return name, text if given else os.environ.get(name, "")


class CommandAfterDashes(click.Command):
    """A command whose last argument, `command`, is all that follows ``--``; the other ones come before that."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the command off before click reads the rest."""
        if "--" in args:
            i = args.index("--")
            args, ctx.meta["command"] = args[:i], tuple(args[i + 1 :])
        rest = super().parse_args(ctx, args)
        ctx.params["command"] = ctx.meta.get("command", ())
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show it in the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


def environment_options(function: Any) -> Any:
    """Add --env, --cwd and --user."""
    for option in (
        click.option(
            "--user", "-u", help="The guest's user, by name or number; USER:GROUP too. Default: root."
        ),
        click.option("--cwd", "-w", metavar="DIR", help="Working directory in the guest."),
        click.option(
            "--env",
            "-e",
            "env",
            multiple=True,
            type=VariableArgument(),
            help="Environment variable; more than one by repeating.",
        ),
    ):
        function = option(function)
    return function
