"""For mkdocs: what ``kvmkit VERB --help`` prints, where a page says ``<!-- verbs -->``; and docstrings' examples without reST's colons."""

from typing import Any

import click

from kvmkit.cli import commands

_PLACE = "<!-- verbs -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the verbs."""
    return (
        markdown.replace(_PLACE, "\n".join(_sections(commands, "kvmkit"))) if _PLACE in markdown else markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    """Drop the paragraphs that are a lone ``::``."""
    return html.replace("<p>::</p>\n", "")


def _sections(command: click.Command, name: str, parent: click.Context | None = None) -> list[str]:
    """A section for a command, then those of the commands in it."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=100, **commands.context_settings
    )
    sections = [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for verb in command.list_commands(context):
            inner = command.get_command(context, verb)
            assert inner is not None
            sections += _sections(inner, verb, context)
    return sections
