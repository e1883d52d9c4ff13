"""Every command and every piece of Python in the documents, run as a reader would; `pages` says how they are written."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmkit
from kvmkit import images, runtime
from kvmkit.errors import ImageError
from kvmkit.machine.guest import DefaultGuest, cache_directory

from .pages import LANGUAGES, READ_ONLY, Block, blocks, commands, matches

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    str(path.relative_to(REPOSITORY))
    for path in sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
]
_BLOCK_S = 120.0
_DEBIAN = "debian:bookworm"
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_kind_that_is_known(page: str) -> None:
    for block in blocks(REPOSITORY / page, page):
        assert block.language in LANGUAGES, (
            f"{page}:{block.line}: a block in {block.language or 'no language'}"
        )
        if block.language == "console":
            assert list(commands(block)), f"{page}:{block.line}: a console block without a command"
        elif block.language not in (*READ_ONLY, "python"):
            assert block.file, f"{page}:{block.line}: nothing can be done with it unless it is a file"


def test_links_of_the_readme() -> None:
    """mkdocs checks those in the documents."""
    for target in _LINK.findall((REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / target).exists(), target


def test_matching() -> None:
    assert matches("a\n...\nb ... c\n", "a\nb 1 c\n")
    assert matches("a\n...\nb\n", "a\n1\n2\nb\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("", "a\n")
    assert not matches("a ... b\n", "a 1\nb\n")


@pytest.fixture(scope="session")
def warm_cache(default_guest: DefaultGuest) -> Path:
    """The user's own cache with the default guest and Debian in it."""
    try:
        images.resolve(_DEBIAN, print)
    except ImageError as error:
        pytest.skip(str(error))
    return cache_directory().parent


@pytest.fixture
def directory(warm_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where a page's commands are run: an empty directory, with a cache and a place for machines of the page's own."""
    cache = tmp_path / "cache/kvmkit"
    (cache / "images").mkdir(parents=True)
    (cache / cache_directory().name).symlink_to(cache_directory())
    (cache / "images" / _DEBIAN).symlink_to(warm_cache / "images" / _DEBIAN)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, code in (
        ("kvmkit", "from kvmkit.cli import main; main()"),
        ("pytest", "import pytest; sys.exit(pytest.main())"),
    ):
        (tools / name).write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
        (tools / name).chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(kvmkit.__file__).parents[1]), prepend=os.pathsep)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run = tempfile.mkdtemp(prefix="kvmkit-docs-")  # short: there will be sockets in it
    monkeypatch.setenv("XDG_RUNTIME_DIR", run)
    yield here
    for vm in runtime.every():  # of a page that failed
        pid = vm.read("vm.json").get("pid")
        if vm.alive() and isinstance(pid, int):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.language not in READ_ONLY for b in blocks(REPOSITORY / page, page))],
)
def test_page(page: str, directory: Path) -> None:
    variables: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(REPOSITORY / page, page):
        if block.skip is not None:
            print(f"{page}:{block.line}: not run: {block.skip}")
            continue
        ran += block.language not in READ_ONLY
        if block.file is not None:
            target = directory / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        elif block.language == "console":
            _run_console(block, directory)
        elif block.language == "python":
            _run_python(block, variables)
    if not ran:
        pytest.skip("nothing in it can be run everywhere")


def _run_console(block: Block, directory: Path) -> None:
    """Run a block's commands, one after the other, in one shell."""
    script, wanted = ["set +m"], list(commands(block))
    mark = "\n<<<kvmkit docs>>>"
    for command in wanted:
        text = command.text
        if text.startswith("make "):  # what make would do: doing it would run these tests
            text = f"MAKEFLAGS= make -C {shlex.quote(str(REPOSITORY))} -n {text[5:]} >/dev/null"
        script.append(f"(exit $status)\n{text}\nstatus=$?; printf '%s%s\\n' {shlex.quote(mark)} $status")
    with tempfile.TemporaryFile() as output:  # no pipe: what is left running in the background holds it open
        subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=directory,
            env={**os.environ, "status": "0"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_BLOCK_S,
            check=False,
        )
        output.seek(0)
        said = output.read().decode(errors="replace")
    parts = said.split(mark)
    assert len(parts) == len(wanted) + 1, f"{block.page}:{block.line}: the shell ended early:\n{said}"
    results = [parts[0], *(part.partition("\n")[2] for part in parts[1:-1])]
    for i, (command, got) in enumerate(zip(wanted, results, strict=True)):
        where = f"{block.page}:{command.line}: $ {command.text}"
        status = int(parts[i + 1].partition("\n")[0])
        asked = i + 1 < len(wanted) and wanted[i + 1].text == "echo $?"
        _compare(where, command.output, got)
        assert status == 0 or asked, f"{where}\nexit status {status}, after\n{got}"


def _run_python(block: Block, variables: dict[str, Any]) -> None:
    # The line numbers of a traceback are the page's.
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, variables)
    _compare(f"{block.page}:{block.line}: the Python here", block.output, said.getvalue())


def _compare(where: str, wanted: str, got: str) -> None:
    got = got.replace("\r\n", "\n")  # of a serial console
    got = got if not got or got.endswith("\n") else got + "\n"
    assert matches(wanted, got), f"{where}\nprints\n{got}\ninstead of\n{wanted}"
