"""Commands by a real agent."""

import errno
import hashlib
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from kvmkit.client.agent import PIPE, Agent, Pty, protocol
from kvmkit.client.agent.protocol import FrameDecoder, encode
from kvmkit.errors import AgentError, CommandError, CommandTimeout, GuestError

from .conftest import Connect

DATA = random.Random(1).randbytes(10_000_000)


def sh(script: str, *arguments: str) -> list[str]:
    return ["sh", "-c", script, "sh", *arguments]


def test_streams_and_status_come_apart(agent: Agent) -> None:
    result = agent.run(sh("echo out; echo err >&2; exit 7"))
    assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", 7)
    assert agent.run(["echo", "é"], text=True).stdout == "é\n"


@pytest.mark.parametrize("number", [1, 9, 15, 31, 64])
def test_death_by_signal(agent: Agent, number: int) -> None:
    assert agent.run(sh("ulimit -c 0; kill -$1 $$; sleep 60", str(number))).returncode == -number


def test_check(agent: Agent) -> None:
    with pytest.raises(CommandError, match="exit status 3") as caught:
        agent.run(sh("echo no; exit 3"), check=True, text=True)
    assert (caught.value.returncode, caught.value.stdout) == (3, "no\n")


def test_environment(agent: Agent) -> None:
    script = sh('echo "$GIVEN|$ADDED|$HOME"')
    assert agent.run(script, env={"ADDED": "a b"}, text=True).stdout == "by the agent|a b|/\n"
    output = agent.run(["/usr/bin/env"], env={"ONLY": "é\udcff"}, clear_env=True).stdout
    assert output == "ONLY=é\udcff\n".encode(errors="surrogateescape")
    with pytest.raises(GuestError, match="not a name"):
        agent.run(["true"], env={"A=B": "c"})


def test_any_bytes_are_arguments(agent: Agent) -> None:
    arguments = ["", "a b", "\n", "é", "\udcff\udc80", "$HOME", "x" * 100_000]
    output = agent.run(["printf", "%s\\0", *arguments]).stdout
    assert output == b"".join(os.fsencode(argument) + b"\0" for argument in arguments)


def test_working_directory(agent: Agent, tmp_path: Path) -> None:
    assert agent.run(["pwd"], text=True).stdout == "/\n"
    assert agent.run(["pwd"], cwd=tmp_path, text=True).stdout == f"{tmp_path}\n"
    for cwd, number in ((tmp_path / "absent", errno.ENOENT), ("/etc/passwd", errno.ENOTDIR)):
        with pytest.raises(GuestError, match="working directory") as caught:
            agent.run(["pwd"], cwd=cwd)
        assert caught.value.errno == number


def test_what_cannot_start(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for command, number in (("absent-command", errno.ENOENT), (str(tmp_path / "plain"), errno.EACCES)):
        with pytest.raises(GuestError, match=Path(command).name) as caught:
            agent.run([command])
        assert caught.value.errno == number
        with pytest.raises(GuestError):
            agent.popen([command], stdin=PIPE, stdout=PIPE)
    (tmp_path / "script").write_text("echo no interpreter line")
    (tmp_path / "script").chmod(0o755)
    assert agent.run([str(tmp_path / "script")]).stdout == b"no interpreter line\n"


def test_users(agent: Agent) -> None:
    with pytest.raises(GuestError, match="nobody-here") as caught:
        agent.run(["id"], user="nobody-here")
    assert caught.value.errno == errno.EINVAL
    if os.geteuid() != 0:
        with pytest.raises(GuestError) as caught:
            agent.run(["id"], user=0, cwd="/")
        assert caught.value.errno == errno.EPERM
        pytest.skip("only root becomes others")
    assert agent.run(["id", "-u"], user="nobody", text=True).stdout == "65534\n"
    assert agent.run(sh("id -u; id -g; id -G"), user="1234:567", text=True).stdout == "1234\n567\n567\n"
    home = agent.run(sh("echo $HOME $USER"), user="daemon", text=True).stdout
    assert home == "/usr/sbin daemon\n"


def test_a_command_leads_its_session(agent: Agent) -> None:
    pid, session = agent.run(sh("echo $$; ps -o sid= -p $$"), text=True).stdout.split()
    assert pid == session
    there = agent.run(["cat", "/proc/self/status"], text=True).stdout
    here = Path(
        "/proc/self/status"
    ).read_text()  # whoever started the tests may ignore some, which are inherited
    assert _signals(there, "SigBlk") == 0
    assert _signals(there, "SigIgn") & ~_signals(here, "SigIgn") == 0


def _signals(status: str, name: str) -> int:
    """A set of signals in a process's status, proc(5)."""
    return int(re.search(rf"^{name}:\s*(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]


def test_without_input_stdin_is_empty(agent: Agent) -> None:
    assert agent.run(["cat"]).stdout == b""
    assert agent.run(["cat"], input=b"").stdout == b""
    assert agent.run(["cat"], input="é").stdout == "é".encode()


def test_ten_megabytes_both_ways(agent: Agent) -> None:
    assert hashlib.sha256(agent.run(["cat"], input=DATA).stdout).digest() == hashlib.sha256(DATA).digest()
    result = agent.run(sh("tee /dev/stderr"), input=DATA)
    assert result.stdout == DATA
    assert result.stderr == DATA


def test_input_that_nobody_reads(agent: Agent) -> None:
    assert agent.run(sh("exec <&-; echo closed; exit 3"), input=DATA).returncode == 3
    assert agent.run(["head", "-c", "5"], input=DATA).stdout == DATA[:5]


def test_output_has_a_limit(agent: Agent) -> None:
    assert len(agent.run(["head", "-c", "1000", "/dev/zero"], output_limit_bytes=1000).stdout) == 1000
    with pytest.raises(AgentError, match="output_limit_bytes"):
        agent.run(["yes"], output_limit_bytes=1000)


def test_timeout(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(CommandTimeout) as caught:
        agent.run(
            sh("echo begun; echo $$ > pid; trap '' HUP TERM; sleep 100"),
            cwd=tmp_path,
            timeout_s=1.0,
            text=True,
        )
    assert caught.value.stdout == "begun\n"
    wait_for_end(int((tmp_path / "pid").read_text()))


def wait_for_end(pid: int) -> None:
    """Returns when a process that isn't our child has ended, or fails."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([process], [], [], 20)
    os.close(process)
    assert ended


def test_a_background_process_does_not_hold_the_command(agent: Agent, tmp_path: Path) -> None:
    # It lives on, and what it writes later doesn't kill it.
    os.mkfifo(tmp_path / "go")
    script = "(read line < go; echo later; echo $? > after) & echo $!"
    pid = int(agent.run(sh(script), cwd=tmp_path, timeout_s=20).stdout)
    (tmp_path / "go").write_text("now\n")
    wait_for_end(pid)
    assert (tmp_path / "after").read_text() == "0\n"


def test_all_of_the_command_comes_though_another_holds_its_output(agent: Agent) -> None:
    result = agent.run(sh("sleep 30 & head -c 200000 /dev/zero; echo $! >&2"), timeout_s=20)
    assert len(result.stdout) == 200_000
    os.kill(int(result.stderr), signal.SIGKILL)


def test_popen_with_pipes(agent: Agent) -> None:
    with agent.popen(
        sh("read line; echo got $line; cat >&2"), stdin=PIPE, stdout=PIPE, stderr=PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got one\n"
        assert process.poll() is None
        process.stdin.write(b"two\n")
        process.stdin.close()
        assert process.stderr.read() == b"two\n"
        assert process.wait(20) == 0
    assert process.returncode == 0


def test_wait_needs_no_reader(agent: Agent) -> None:
    with agent.popen(["head", "-c", "300000", "/dev/zero"], stdout=PIPE) as process:
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert len(process.stdout.read()) == 300_000


def test_one_stream_stops_alone(agent: Agent) -> None:
    # stdout is full and nobody reads it; stderr, stdin and signals go on.
    script = sh("cat /dev/zero & while read line; do echo $line >&2; done")
    with agent.popen(script, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdin and process.stderr
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stderr.readline() == line
        process.kill()
        assert process.wait(20) == -9


def test_signals_pass_a_full_stdin(agent: Agent) -> None:
    read, write = os.pipe()
    with agent.popen(["sleep", "100"], stdin=read) as process:
        os.close(read)
        os.set_blocking(write, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write, bytes(65536))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    os.close(write)


def test_closed_output_is_sigpipe(agent: Agent) -> None:
    with agent.popen(["yes"], stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        assert process.wait(20) == -signal.SIGPIPE


def test_descriptors_of_the_caller(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(DATA)
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as sink:
        process = agent.popen(["cat"], stdin=source.fileno(), stdout=sink.fileno())
    with process:
        assert process.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == DATA
    with open("/dev/full", "wb") as full:
        process = agent.popen(["echo", "x"], stdout=full.fileno())
    with process, pytest.raises(OSError, match="space"):
        process.wait(20)


def test_a_socket_as_output(agent: Agent) -> None:
    ours, theirs = socket.socketpair()
    with ours, agent.popen(["head", "-c", "1000000", "/dev/zero"], stdout=theirs.fileno()) as process:
        theirs.close()
        size = 0
        while chunk := ours.recv(65536):
            size += len(chunk)
        assert size == 1_000_000
        assert process.wait(20) == 0


def test_a_shell_pipeline_through_two_commands(agent: Agent) -> None:
    with agent.popen(["seq", "100000"], stdout=PIPE) as first:
        assert first.stdout is not None
        with agent.popen(["tail", "-n", "1"], stdin=first.stdout.fileno(), stdout=PIPE) as second:
            first.stdout.close()
            assert second.stdout is not None
            assert second.stdout.read() == b"100000\n"


def test_nothing_is_left_open(agent: Agent) -> None:
    agent.run(["true"])
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        agent.run(["cat"], input=b"x")
        with agent.popen(["cat"], stdin=PIPE, stdout=PIPE, stderr=PIPE):
            pass
        with pytest.raises(GuestError):
            agent.popen(["absent-command"], stdin=PIPE, stdout=PIPE)
        with pytest.raises(ConnectionRefusedError):
            Agent(refuse).popen(["true"], stdin=PIPE, stdout=PIPE)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_with_block_leaves_nothing_running(agent: Agent) -> None:
    # The command has ended before its output is read: its end isn't yet that of what carries the output.
    for _ in range(20):
        with agent.popen(["head", "-c", "300000", "/dev/zero"], stdout=PIPE) as process:
            process.wait(20)
        assert not [
            thread for thread in threading.enumerate() if thread.name == f"guest-command-{process.pid}"
        ]


def refuse() -> socket.socket:
    raise ConnectionRefusedError


def test_hanging_up_ends_the_process_group(agent: Agent, connect: Connect) -> None:
    with connect() as sock:
        sock.sendall(protocol.exec_request(sh("trap '' HUP; sleep 100 & echo $$ $!; wait"), stdin=True))
        decoder, output = FrameDecoder(), b""
        while not output.endswith(b"\n"):
            output += b"".join(
                payload[1:] for kind, payload in decoder.receive(sock.recv(4096)) if kind == protocol.STREAM
            )
    for pid in output.split():
        wait_for_end(int(pid))


def answer(connect: Connect, sent: bytes) -> list[tuple[int, bytes]]:
    """All that the agent says to what is sent."""
    with connect() as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        frames: list[tuple[int, bytes]] = []
        decoder = FrameDecoder()
        while data := sock.recv(65536):
            frames += decoder.receive(data)
    return frames


@pytest.mark.parametrize(
    "sent",
    [
        encode(protocol.REQUEST, b""),
        encode(protocol.REQUEST, b"[]"),
        encode(protocol.REQUEST, b'{"op": "none"}'),
        encode(protocol.REQUEST, b'{"op": "exec"}'),
        encode(protocol.REQUEST, b'{"op": "exec", "argv": [], "window_bytes": 5}'),
        encode(protocol.REQUEST, b'{"op": "exec", "argv": ["true"], "window_bytes": -1}'),
        encode(protocol.REQUEST, b'{"op": "stat", "path": "a\\u0000b"}'),
        encode(protocol.REQUEST, b"[" * 60000),
        encode(protocol.DATA, b"x"),
        struct.pack("<BI", protocol.REQUEST, 0xFFFFFFFF),
    ],
)
def test_requests_that_are_none(connect: Connect, sent: bytes) -> None:
    [(kind, payload)] = answer(connect, sent)
    assert kind == protocol.ERROR
    assert json.loads(payload)["message"]


@pytest.mark.parametrize(
    "frame",
    [
        encode(protocol.STREAM, b"\0" + bytes(60000)) * 6,
        encode(protocol.STREAM_END, b"\0") + encode(protocol.STREAM, b"\0x"),
        encode(protocol.STREAM, b""),
        encode(protocol.STREAM, b"\1x"),
        encode(protocol.STREAM_CLOSE, b"\0"),
        encode(protocol.STREAM_CLOSE, b"\3"),
        encode(protocol.WINDOW, b"\1\1"),
        encode(protocol.WINDOW, b"\1\xff\xff\xff\xff") * 2,
        encode(protocol.SIGNAL, b"\0"),
        encode(protocol.SIGNAL, b"\xff"),
        encode(protocol.SIGNAL, b"\1\0"),
        encode(protocol.WINSIZE, b"\1"),
        encode(protocol.REQUEST, b"{}"),
        encode(200, b""),
        struct.pack("<BI", protocol.STREAM, 65537),
    ],
)
def test_frames_that_break_a_command(connect: Connect, frame: bytes) -> None:
    with connect() as sock:
        sock.sendall(protocol.exec_request(["sleep", "100"], stdin=True) + frame)
        frames: list[tuple[int, bytes]] = []
        decoder = FrameDecoder()
        while not (frames and frames[-1][0] == protocol.ERROR):
            data = sock.recv(65536)
            assert data, "the agent closed without an error"
            frames += decoder.receive(data)
    assert frames[0][0] == protocol.STARTED
    wait_for_end(json.loads(frames[0][1])["pid"])
    assert Agent(connect).run(["true"]).returncode == 0


def test_a_terminal(agent: Agent) -> None:
    script = "tty; stty size; echo $TERM; read line; stty size; echo got $line; read more || echo end"
    with agent.popen(sh(script), stdin=PIPE, stdout=PIPE, pty=Pty(30, 90, "vt100")) as process:
        assert process.stdin and process.stdout
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith(b"/dev/pts/")
        assert lines[1:] == [b"30 90\r\n", b"vt100\r\n"]
        process.resize(40, 100)
        process.stdin.write(b"word\n")
        process.stdin.close()
        assert process.stdout.read() == b"word\r\n40 100\r\ngot word\r\nend\r\n"
        assert process.wait(20) == 0


def test_interrupt_typed_on_a_terminal(agent: Agent) -> None:
    with agent.popen(["cat"], stdin=PIPE, stdout=PIPE, pty=Pty()) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"x\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == [
            b"x\r\n"
        ] * 2  # the terminal's echo, then cat
        process.stdin.write(b"\x03")
        process.stdin.flush()
        assert process.wait(20) == -signal.SIGINT


def test_a_terminal_keeps_the_last_words(agent: Agent) -> None:
    for _ in range(50):
        with agent.popen(["printf", "%1000s|", "x"], stdout=PIPE, pty=Pty()) as process:
            assert process.stdout is not None
            assert process.stdout.read() == b" " * 999 + b"x|"


def test_many_at_once(agent: Agent) -> None:
    processes = [agent.popen(["cat"], stdin=PIPE, stdout=PIPE) for _ in range(20)]
    for number, process in enumerate(processes):
        assert process.stdin
        process.stdin.write(b"%d" % number)
        process.stdin.close()
    for number, process in enumerate(processes):
        with process:
            assert process.stdout
            assert process.stdout.read() == b"%d" % number


def test_the_agent_refuses_what_a_host_is_not_for(connect: Connect) -> None:
    for op in ({"op": "shutdown"}, {"op": "set_time", "ns": 0}, {"op": "umount", "path": "/nowhere"},
               {"op": "mount", "tag": "t", "path": "/nowhere"}):  # fmt: skip
        [(kind, payload)] = answer(connect, encode(protocol.REQUEST, json.dumps(op).encode()))
        assert (kind, json.loads(payload)["errno"]) == (protocol.ERROR, errno.EPERM)


def test_a_program_of_another_kind_at_the_other_end() -> None:
    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return ours

    with pytest.raises(AgentError):
        Agent(connect).run(["true"])
    with pytest.raises(AgentError):
        Agent(connect).popen(["true"])


def test_static_and_small() -> None:
    from .conftest import PROGRAM

    if not PROGRAM.exists():
        pytest.skip("the agent isn't built: make build")
    assert PROGRAM.stat().st_size < 3 << 20
    headers = subprocess.run(["readelf", "--program-headers", PROGRAM], stdout=PIPE, check=True).stdout
    assert b"INTERP" not in headers
