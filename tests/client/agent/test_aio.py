"""The asyncio twin by a real agent."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvmkit.client.agent import PIPE, AsyncAgent, Pty
from kvmkit.errors import AgentError, CommandError, CommandTimeout, GuestError

from .conftest import Connect
from .test_exec import refuse, sh, wait_for_end

DATA = random.Random(3).randbytes(10_000_000)


def in_loop(test: Callable[[AsyncAgent], Awaitable[None]], connect: Connect) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await test(AsyncAgent(connect))

    asyncio.run(main())


def test_run(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        result = await agent.run(sh("echo out; echo err >&2; exit 7"), text=True)
        assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 7)
        assert (await agent.run(["cat"], input=DATA)).stdout == DATA
        assert (await agent.run(["head", "-c", "5"], input=DATA)).stdout == DATA[:5]
        assert (await agent.run(sh("kill -9 $$"))).returncode == -9
        with pytest.raises(CommandError):
            await agent.run(["false"], check=True)
        with pytest.raises(GuestError, match="absent-command"):
            await agent.run(["absent-command"])
        with pytest.raises(AgentError, match="output_limit_bytes"):
            await agent.run(["yes"], output_limit_bytes=1000)

    in_loop(test, connect)


def test_many_at_once(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        results = await asyncio.gather(*(agent.run(["cat"], input=str(n), text=True) for n in range(50)))
        assert [result.stdout for result in results] == list(map(str, range(50)))

    in_loop(test, connect)


def test_timeout_and_cancellation_end_the_command(connect: Connect, tmp_path: Path) -> None:
    script = sh("echo begun; echo $$ > pid; trap '' HUP TERM; sleep 100")

    async def test(agent: AsyncAgent) -> None:
        with pytest.raises(CommandTimeout) as caught:
            await agent.run(script, cwd=tmp_path, timeout_s=1.0)
        assert caught.value.stdout == b"begun\n"
        wait_for_end(int((tmp_path / "pid").read_text()))
        (tmp_path / "pid").unlink()
        task = asyncio.create_task(agent.run(script, cwd=tmp_path))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for_end, int((tmp_path / "pid").read_text()))

    in_loop(test, connect)


def test_popen(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        script = sh("read line; echo got $line; cat >&2; exit 3")
        async with await agent.popen(script, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
            assert process.stdin and process.stdout and process.stderr
            await process.stdin.write(b"one\n")
            assert await process.stdout.readline() == b"got one\n"
            assert process.returncode is None
            await process.stdin.write(DATA[:100])
            await process.stdin.close()
            assert await process.stderr.read() == DATA[:100]
            assert await process.wait() == 3
        assert process.returncode == 3
        async with await agent.popen(["seq", "3"], stdout=PIPE) as process:
            assert process.stdout
            assert [line async for line in process.stdout] == [b"1\n", b"2\n", b"3\n"]

    in_loop(test, connect)


def test_streams_stop_alone(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        script = sh("cat /dev/zero & while read line; do echo $line >&2; done")
        async with await agent.popen(script, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
            assert process.stdin and process.stderr
            for line in (b"one\n", b"two\n"):
                await process.stdin.write(line)
                assert await process.stderr.readline() == line
            process.kill()
            assert await process.wait() == -9

    in_loop(test, connect)


def test_stdin_waits_for_the_command(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        async with await agent.popen(["sleep", "100"], stdin=PIPE) as process:
            assert process.stdin
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await process.stdin.write(DATA)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == -signal.SIGTERM
            with pytest.raises(BrokenPipeError):
                await process.stdin.write(b"x")

    in_loop(test, connect)


def test_closed_output_is_sigpipe(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        async with await agent.popen(["yes"], stdout=PIPE) as process:
            assert process.stdout
            assert (await process.stdout.read(2)).startswith(b"y")
            process.stdout.close()
            assert await process.wait() == -signal.SIGPIPE

    in_loop(test, connect)


def test_terminal(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        async with await agent.popen(
            sh("stty size; read x; stty size"), stdin=PIPE, stdout=PIPE, pty=Pty(30, 90)
        ) as process:
            assert process.stdin and process.stdout
            assert await process.stdout.readline() == b"30 90\r\n"
            process.resize(31, 91)
            await process.stdin.write(b"\n")
            assert await process.stdout.read() == b"\r\n31 91\r\n"

    in_loop(test, connect)


def test_files(connect: Connect, tmp_path: Path) -> None:
    async def test(agent: AsyncAgent) -> None:
        files = agent.files
        await files.mkdir(tmp_path / "a")
        await files.write_bytes(tmp_path / "a" / "file", DATA)
        assert await files.read_bytes(tmp_path / "a" / "file") == DATA
        await files.write_text(tmp_path / "a" / "text", "é")
        assert await files.read_text(tmp_path / "a" / "text") == "é"
        await files.get(tmp_path / "a", tmp_path / "got")
        await files.put(tmp_path / "got", tmp_path / "put")
        assert await files.listdir(tmp_path / "put") == ["file", "text"]
        assert (tmp_path / "put" / "file").read_bytes() == DATA
        assert (await files.stat(tmp_path / "put")).kind == "directory"
        await files.rename(tmp_path / "put", tmp_path / "moved")
        await files.remove(tmp_path / "moved", recursive=True)
        assert not await files.exists(tmp_path / "moved")
        assert (await agent.info()).kernel == os.uname().release

    in_loop(test, connect)


def test_no_agent() -> None:
    async def test() -> None:
        with pytest.raises(ConnectionRefusedError):
            await AsyncAgent(refuse).run(["true"])
        with pytest.raises(ConnectionRefusedError):
            await AsyncAgent(refuse).files.exists("/")

    asyncio.run(test())


def test_nothing_is_left_open(connect: Connect) -> None:
    async def test(agent: AsyncAgent) -> None:
        await agent.run(["true"])
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await agent.run(["cat"], input=b"x")
            await agent.files.exists("/")
            async with await agent.popen(["cat"], stdin=PIPE, stdout=PIPE):
                pass
            with pytest.raises(GuestError):
                await agent.popen(["absent-command"])
        await asyncio.sleep(0)  # transports close in the loop
        assert sorted(os.listdir("/proc/self/fd")) == before

    in_loop(test, connect)
