"""What the documents' code blocks say, and how to check it.

- ``console``: lines that begin with ``$`` are commands for bash (a backslash at the end goes on), and what follows is exactly
  what they print; ``...`` stands for anything, on a line of its own for any lines. A command fails the test by its exit status,
  unless ``echo $?`` comes next.
- ``python``: is run, all of a page with the same variables. A ``text`` block right after it is what it prints; without one it
  prints nothing.
- Any block with ``title="NAME"`` is a file of that name.
- ``text``, ``mermaid``: are only read.

In HTML comments, which readers don't see: ``<!-- test: skip REASON -->`` before a block that can't be run everywhere, and
``<!-- test: console`` or ``<!-- test: python``, with lines of such a block, what a page needs beforehand.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READ_ONLY = ("text", "mermaid")
LANGUAGES = ("console", "python", "toml", "json", "ini", "sh", *READ_ONLY)

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)(?: (?P<options>[^\n]*))?\n(?P<text>.*?)^(?P=indent)```$"
    r"|^<!-- test: (?P<hidden>console|python)\n(?P<hidden_text>.*?)^-->$"
    r"|^ *<!-- test: skip (?P<reason>[^\n]+?) -->$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A block of code in a document."""

    page: str
    line: int
    """Where its first line of code is; the first of a page is 1."""
    language: str
    text: str
    file: str | None = None
    """What file it is."""
    skip: str | None = None
    """Why it isn't run."""
    output: str = ""
    """What Python code prints."""


@dataclass(frozen=True)
class Command:
    """A command of a ``console`` block."""

    line: int
    text: str
    output: str


def blocks(path: Path, page: str) -> list[Block]:
    """All blocks of a document that are to be run or written."""
    document = path.read_text()
    found: list[Block] = []
    skip: str | None = None
    end = 0
    for match in _BLOCK.finditer(document):
        line = document.count("\n", 0, match.start()) + 2
        if match["reason"]:
            skip = match["reason"]
            continue
        if match["hidden"]:
            found.append(Block(page, line, match["hidden"], match["hidden_text"], skip=skip))
        else:
            indent = len(match["indent"])
            text = "".join(code[indent:] or "\n" for code in match["text"].splitlines(keepends=True))
            title = _TITLE.search(match["options"] or "")
            between = document[end : match.start()]
            if (
                match["language"] == "text"
                and found
                and found[-1].language == "python"
                and not between.strip()
            ):
                last = found.pop()
                found.append(Block(page, last.line, "python", last.text, last.file, last.skip, text))
            else:
                found.append(Block(page, line, match["language"], text, title[1] if title else None, skip))
        skip = None
        end = match.end()
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a ``console`` block."""
    lines = list(enumerate(block.text.splitlines(), block.line))
    while lines:
        number, line = lines.pop(0)
        if not line.startswith("$ "):
            raise ValueError(f"{block.page}:{number}: a console block begins with '$ ' and a command")
        text = line[2:]
        while text.endswith("\\") and lines:
            text += "\n" + lines.pop(0)[1]
        output = []
        while lines and not lines[0][1].startswith("$ "):
            output.append(lines.pop(0)[1])
        yield Command(number, text, "".join(f"{line}\n" for line in output))


def matches(wanted: str, got: str) -> bool:
    """Whether `got` is what a document says, in which ``...`` is anything: whole lines on a line of its own, else a part of one."""
    pattern = ""
    for line in wanted.splitlines():
        if line == "...":
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += "[^\n]*".join(map(re.escape, line.split("..."))) + "\n"
    return re.fullmatch(pattern, got) is not None
