"""What is asked of ssh, and what becomes of its answers: against a stand-in for its process, which starts nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh import connection, streams
from mixtral_run.fleet.ssh.connection import Answer, Ssh, forget_key_argv, resolve_argv, terminal_argv

HOST = Host("gpu-01", "10.0.0.1", "ops", 2222)
TO = ["-p", "2222", "-l", "ops", "--", "10.0.0.1"]


class Process:
    """Stand-in for Popen. What it would print is there at once."""

    def __init__(self, output: bytes = b"", errors: bytes = b"", code: int = 0) -> None:
        self.stdout, self.stderr, self.code = piped(output), piped(errors), code
        self.stdin: IO[bytes] | None = None
        self.returncode: int | None = None
        self.killed = 0
        self.args = ["ssh"]

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = -9 if self.killed else self.code
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.killed += 1

    def communicate(self) -> tuple[bytes, bytes]:
        self.wait()
        return self.stdout.read(), self.stderr.read()


def piped(data: bytes) -> IO[bytes]:
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return os.fdopen(reader, "rb")


class Started:
    """Stand-in for subprocess.Popen that notes what was started. answers: one a start; the last stays."""

    def __init__(self, *answers: Callable[[], Process]) -> None:
        self.answers = list(answers)
        self.words: list[list[str]] = []
        self.settings: list[dict[str, Any]] = []
        self.processes: list[Process] = []

    def __call__(self, argv: Sequence[str], **settings: Any) -> Process:
        self.words.append(list(argv))
        self.settings.append(settings)
        self.processes.append((self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])())
        return self.processes[-1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    def make(*answers: Callable[[], Process]) -> Started:
        found = Started(*answers)
        monkeypatch.setattr(connection.subprocess, "Popen", found)
        monkeypatch.setattr(connection.time, "sleep", lambda _: None)
        return found

    return make


@pytest.fixture
def ssh(tmp_path: Path) -> Ssh:
    return Ssh(tmp_path / "known_hosts")


def test_a_command_that_fails_is_named_with_its_last_line(started: Any, ssh: Ssh) -> None:
    started(lambda: Process(b"out\n", b"first\nlast\n\n", 3))
    with pytest.raises(HostError) as caught:
        ssh.check(HOST, ["touch", "a b"])
    assert (caught.value.what, caught.value.where) == ("A command failed on gpu-01.", "touch 'a b'")
    assert (caught.value.expected, caught.value.found) == ("exit code 0", "exit code 3: last")
    started(lambda: Process(b"out\n", b"", 1))
    with pytest.raises(HostError) as caught:
        ssh.check(HOST, ["x" * 400])
    assert caught.value.where == "x" * 300 and caught.value.found == "exit code 1: out"
    started(lambda: Process(b"", b"Permission denied (publickey).\n", 255))
    with pytest.raises(HostError, match="refuses the key"):
        ssh.check(HOST, ["true"])
    started(lambda: Process(b"a\x1b[2Jb\n", b"warning\n", 0))
    assert "\x1b" not in ssh.check(HOST, ["true"]) and ssh.check(HOST, ["true"]).startswith("a")


def test_a_dropped_connection_is_tried_four_times(started: Any, ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    dropped = b"Connection reset by 10.0.0.1 port 22\n"
    found = started(lambda: Process(b"", dropped, 255))
    monkeypatch.setattr(connection.time, "sleep", slept.append)
    monkeypatch.setattr(connection.random, "uniform", lambda least, most: {(0.5, 1.5): 1.25}[least, most])
    assert ssh.run(HOST, ["true"]).exit_code == 255
    assert len(found.words) == 4 and slept == [1.25, 2.5, 5.0]
    found = started(lambda: Process(b"", dropped, 255), lambda: Process(b"there", b"", 0))
    assert ssh.run(HOST, ["true"]) == Answer(0, "there", "") and len(found.words) == 2
    for process in (lambda: Process(b"", dropped, 1), lambda: Process(b"", b"Permission denied", 255)):
        found = started(process)
        ssh.run(HOST, ["true"])
        assert len(found.words) == 1


def test_how_a_process_is_started(started: Any, ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "1")
    found = started(Process)
    ssh.run(HOST, ["true"])
    ssh.run(HOST, ["true"], environment={"MORE": "2"}, batch=False)
    ssh.start(HOST, ["true"])
    (tmp_path / "file").write_bytes(b"x")
    ssh.send(HOST, ["cat"], tmp_path / "file")
    assert [words[-7:] for words in found.words] == [[*TO, "true"]] * 3 + [[*TO, "cat"]]
    assert ["BatchMode=yes" in words for words in found.words] == [True, False, True, True]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    assert [each["stdin"] for each in found.settings[:3]] == [none, none, pipe]
    assert found.settings[3]["stdin"].name == str(tmp_path / "file")
    assert {each["stdout"] for each in found.settings} == {each["stderr"] for each in found.settings} == {pipe}
    # A program that asks for a password would find the terminal of this session.
    assert [each["start_new_session"] for each in found.settings] == [False, True, True, False]
    assert [each["env"].get("MORE") for each in found.settings] == [None, "2", None, None]
    assert all(each["env"]["OWN"] == "1" for each in found.settings)


def test_a_file_that_is_not_taken(started: Any, ssh: Ssh, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    started(lambda: Process(b"", b"No space left\n", 1))
    with pytest.raises(HostError) as caught:
        ssh.send(HOST, ["cat"], tmp_path / "file")
    assert (caught.value.what, caught.value.found) == (
        f"{tmp_path / 'file'} could not be sent to gpu-01.", "No space left",
    )  # fmt: skip


def test_what_is_received_is_a_stream_whose_end_is_looked_at(started: Any, ssh: Ssh) -> None:
    found = started(lambda: Process(b"0123456789", b"no such file\n", 0))
    with ssh.receive(HOST, ["cat"]) as stream:
        assert stream.read(4) == b"0123"
    assert found.processes[0].killed == 0
    started(lambda: Process(b"", b"no such file\n", 2))
    with pytest.raises(HostError) as caught, ssh.receive(HOST, ["cat"]) as stream:
        stream.read()
    assert (caught.value.found, caught.value.where) == ("no such file", HOST.target)
    assert (
        caught.value.next_command
        == "ssh -p 2222 -l ops 10.0.0.1, and look whether it is there and this user may read it"
    )
    # The command's own reason takes the place of what the receiver made of it; a lost connection as well.
    with pytest.raises(HostError, match="did not send what was asked for"), ssh.receive(HOST, ["cat"]):
        raise HostError("no tar archive")
    started(lambda: Process(b"", b"Connection refused\n", 255))
    with pytest.raises(HostError, match="refuses the connection"), ssh.receive(HOST, ["cat"]):
        raise HostError("no tar archive")
    started(lambda: Process(b"rest", b"", 0))
    with pytest.raises(HostError, match="no tar archive"), ssh.receive(HOST, ["cat"]):
        raise HostError("no tar archive")
    found = started(lambda: Process(b"rest", b"", 0))
    with pytest.raises(KeyboardInterrupt), ssh.receive(HOST, ["cat"]):
        raise KeyboardInterrupt
    assert found.processes[0].killed == 1


def test_a_host_that_goes_on_sending_is_cut_off(started: Any, ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REST_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    found = started(lambda: Process(b"x" * 1004, b"", 0))
    with (
        pytest.raises(HostError, match="gpu-01 sent more than was asked for") as caught,
        ssh.receive(HOST, ["cat"]) as stream,
    ):
        stream.read(4)
    assert found.processes[0].killed == 1 and caught.value.where == HOST.target
    found = started(lambda: Process(b"x" * 1003, b"", 0))
    with ssh.receive(HOST, ["cat"]) as stream:
        stream.read(4)
    assert found.processes[0].killed == 0
    started(lambda: Process(b"x" * 5000, b"", 0))
    with pytest.raises(HostError, match="no tar archive"), ssh.receive(HOST, ["cat"]):
        raise HostError("no tar archive")


def test_bounds_of_what_is_read() -> None:
    assert streams.CHUNK_BYTES == 65536 and streams.MAX_ANSWER_BYTES == 16777216
    assert streams.MAX_LINE_BYTES == streams.MAX_REST_BYTES == 1048576 and streams.MAX_ERROR_BYTES == 65536


def test_a_line_without_end_is_passed_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 7)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 10)
    found = [line for _, line in streams.lines([piped(b"x" * 25 + b"\nyy\r\n" + b"z" * 3)])]
    assert found == ["x" * 14, "x" * 11, "yy", "zzz"]
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 14)
    assert [line for _, line in streams.lines([piped(b"x" * 20)])] == ["x" * 14, "x" * 6]


def test_the_last_bytes_of_errors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ERROR_BYTES", 512)
    text = streams.LastBytes(piped(b"".join(b"%07d\n" % number for number in range(192)))).text()
    assert text == "".join(f"{number:07d}\n" for number in range(128, 192))
    assert streams.LastBytes(piped(b"short")).text() == "short"


def test_lines_of_two_outputs_go_to_two_receivers(started: Any, ssh: Ssh) -> None:
    found = started(lambda: Process(b"one\r\ntwo\n\nlast", b"err\n", 7))
    out: list[str] = []
    err: list[str] = []
    assert ssh.stream(HOST, ["true"], out.append, on_error_line=err.append) == 7
    assert (out, err) == (["one", "two", "", "last"], ["err"])
    assert found.settings[0]["stderr"] == subprocess.PIPE
    # Ctrl-C must not reach ssh before this process has decided.
    assert found.settings[0]["start_new_session"] is True
    process = found.processes[0]
    assert process.stdout.closed and process.stderr.closed and process.killed == 0
    found = started(Process)
    ssh.stream(HOST, ["true"], out.append)
    assert found.settings[0]["stderr"] == subprocess.STDOUT

    def refuse(_: str) -> None:
        raise RuntimeError

    found = started(lambda: Process(b"line\n"))
    with pytest.raises(RuntimeError):
        ssh.stream(HOST, ["true"], refuse)
    assert found.processes[0].killed == 1 and found.processes[0].stdout.closed


def test_a_stream_ends_soon_after_it_is_told_to() -> None:
    process, stop = Process(), threading.Event()
    stop.set()
    connection._kill_when(process, stop)  # type: ignore[arg-type]
    assert process.killed == 1
    waited: list[float] = []

    class Stop:
        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            process.wait()
            return False

    process = Process()
    connection._kill_when(process, Stop())  # type: ignore[arg-type]
    assert process.killed == 0 and len(waited) == 1 and 0 < waited[0] <= 0.5


def test_hosts_are_asked_side_by_side_and_answer_in_order(ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ssh.each([], lambda host: host.name) == []
    hosts = [Host(f"gpu-{number}", "a") for number in range(3)]
    barrier = threading.Barrier(3, timeout=20)

    def work(host: Host) -> str:
        barrier.wait()
        return host.name

    assert ssh.each(hosts, work) == ["gpu-0", "gpu-1", "gpu-2"]
    assert connection.MAX_PARALLEL == 64 and connection.RETRY_SECONDS == (1.0, 2.0, 4.0)


SETTINGS = b"hostname 10.0.0.9\nport 2222\nidentityfile ~/.ssh/id_x\nidentityfile /keys/the other one\n"


def test_the_name_of_a_recorded_key(started: Any, ssh: Ssh) -> None:
    for settings, entry in (
        (SETTINGS, "[10.0.0.9]:2222"),
        (b"hostname 10.0.0.9\nport 22\n", "10.0.0.9"),
        (b"hostname 10.0.0.9\n", "10.0.0.9"),
        (b"hostname 10.0.0.9\nport 2222\nhostkeyalias rack\n", "rack"),
        (b"", "10.0.0.1"),
    ):
        found = started(lambda settings=settings: Process(settings))
        assert ssh.forget_key(HOST) == entry
        assert found.words == [["ssh", "-G", *TO]]
    assert resolve_argv(HOST) == ["ssh", "-G", *TO]


def test_a_key_is_forgotten_and_a_new_one_taken(started: Any, ssh: Ssh) -> None:
    ssh.known_hosts.write_text("other ssh-ed25519 x\n")
    old = ssh.known_hosts.with_name("known_hosts.old")
    old.write_text("")
    found = started(lambda: Process(SETTINGS))
    assert ssh.forget_key(HOST) == "[10.0.0.9]:2222"
    assert found.words[1] == ["ssh-keygen", "-q", "-f", str(ssh.known_hosts), "-R", "[10.0.0.9]:2222"]
    assert found.words[1] == forget_key_argv(ssh.known_hosts, "[10.0.0.9]:2222") and not old.exists()

    def writes() -> Process:
        ssh.known_hosts.write_text("[10.0.0.9]:2222 ssh-ed25519 new\n")
        return Process()

    found = started(lambda: Process(SETTINGS), Process, writes)
    ssh.accept_new_key(HOST)
    assert found.words[2][0] == "ssh" and found.words[2][-7:] == [*TO, "true"]
    assert f'UserKnownHostsFile="{ssh.known_hosts}"' in found.words[2]
    for content in (None, "other ssh-ed25519 x\n"):
        ssh.known_hosts.unlink(missing_ok=True)
        if content:
            ssh.known_hosts.write_text(content)
        started(lambda: Process(SETTINGS), lambda: Process(b"", b"Connection refused", 255))
        with pytest.raises(HostError, match="refuses the connection"):
            ssh.accept_new_key(HOST)


def test_the_key_that_is_installed(started: Any, ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    started(lambda: Process(SETTINGS), lambda: Process(b"ssh-ed25519 agent\nssh-rsa second\n"))
    assert ssh.public_key(HOST) == "ssh-ed25519 agent"
    for answer in (lambda: Process(b"The agent has no identities.\n"), lambda: Process(b"ssh-ed25519 x\n", b"", 1)):
        started(lambda: Process(SETTINGS), answer)
        with pytest.raises(HostError) as caught:
            ssh.public_key(HOST)
        assert caught.value.expected == "one of ~/.ssh/id_x.pub, /keys/the other one.pub"
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_x.pub").write_text("ssh-ed25519 file\n")
    started(lambda: Process(SETTINGS))
    assert ssh.public_key(HOST) == "ssh-ed25519 file"


def test_a_password_is_in_a_private_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with connection._askpass("geheim \"'") as environment:
        program = Path(environment["SSH_ASKPASS"])
        secret = program.with_name("password")
        assert secret.read_text() == "geheim \"'\n" and stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert stat.S_IMODE(program.stat().st_mode) == 0o700
        assert program.read_text() == f"#!/bin/sh\nexec cat {secret}\n"
        assert (environment["SSH_ASKPASS_REQUIRE"], environment["DISPLAY"]) == ("force", ":0")
        assert "geheim" not in str(environment)
    assert not program.parent.exists()
    monkeypatch.setenv("DISPLAY", ":7")
    with connection._askpass("x") as environment:
        assert environment["DISPLAY"] == ":7"


def test_a_key_is_installed_over_one_connection(
    started: Any, ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ssh, "public_key", lambda *_: "ssh-ed25519 key")
    found = started(Process)
    sent: list[Any] = []
    monkeypatch.setattr(
        connection, "communicate", lambda process, stdin, _: (sent.append(stdin), process.wait(), (b"", b""))[2]
    )
    ssh.install_key(HOST, "geheim")
    assert sent == [b"ssh-ed25519 key"] and "BatchMode=yes" not in found.words[0]
    assert "geheim" not in str(found.words) and "umask 077" in found.words[0][-1]
    assert "SSH_ASKPASS" in found.settings[0]["env"]
    started(lambda: Process(code=5))
    with pytest.raises(HostError):
        ssh.install_key(HOST, "geheim")


def test_the_kits_own_file_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "state_folder", lambda: Path("/state"))
    assert Ssh().known_hosts == connection.known_hosts_file() == Path("/state/known_hosts")


def test_a_terminal_is_asked_for_where_there_is_one() -> None:
    words = terminal_argv(HOST, ["bash"], Path("/known"), terminal=True)
    assert words[:2] == ["ssh", "-t"] and words[-7:] == [*TO, "bash"]
    assert terminal_argv(HOST, ["bash"], Path("/known"), terminal=False)[:2] == ["ssh", "-T"]


def test_a_missing_program_and_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(connection.subprocess, "Popen", missing)
    with pytest.raises(HostError, match="ssh is not installed here"):
        connection._start(["ssh", "x"])
    monkeypatch.setattr(connection.subprocess, "run", missing)
    assert not connection.program_answers("a")
    asked: list[Any] = []
    for code, good in ((0, True), (1, False)):

        def run(*words: Any, code: int = code, **settings: Any) -> Any:
            asked.append((words, settings))
            return subprocess.CompletedProcess([], code)

        monkeypatch.setattr(connection.subprocess, "run", run)
        assert connection.program_answers("a", "b") is good
    # Nothing of it reaches the terminal.
    assert asked == [((("a", "b"),), {"capture_output": True, "check": False, "timeout": 60})] * 2
