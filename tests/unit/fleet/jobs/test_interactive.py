"""`chat --on HOST` and `shell --on HOST`: ssh with a terminal, docker run with one, and the flags of every job."""

import io
import os
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.verbs.generate import ChatConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs import interactive, queue
from mixtral_run.fleet.jobs.job_spec import JobOptions, container_argv, make_spec
from mixtral_run.fleet.jobs.taking import START_SCRIPT, BusyError, busy_error
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from tests.unit.fleet.jobs.test_job_spec import FACTS

HOST = Host("gpu-01", "10.0.0.1", user="ops")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Process:
    """STAND-IN for ssh: the last word of the command is how it ends."""

    def __init__(self, argv: list[str], called: list[list[str]]) -> None:
        self.word = argv[-1].split()[-1]
        called.append(argv)

    def wait(self) -> int:
        if self.word == "interrupt":
            raise KeyboardInterrupt
        if self.word in ("SIGTERM", "SIGHUP"):
            os.kill(os.getpid(), signal.Signals[self.word])
        return {"false": 255, "killed": -9, "SIGTERM": -15, "SIGHUP": -15, "busy": 75}.get(self.word, 0)

    def terminate(self) -> None:
        pass


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that are run. STAND-IN for a host: it answers with FACTS and takes all files."""
    found: list[list[str]] = []

    monkeypatch.setattr(interactive.subprocess, "Popen", lambda argv: _Process(argv, found))
    monkeypatch.setattr(interactive, "_terminal_as_found", nullcontext)
    monkeypatch.setattr(interactive, "engine", lambda *words: found.append(["engine", *words[2:]]))
    monkeypatch.setattr(interactive, "facts_of", lambda *_, **__: [FACTS])
    monkeypatch.setattr(queue, "list_jobs", lambda *_: ([], []))
    monkeypatch.setattr(interactive, "send_files", lambda *words: found.append([words[-1].config_json()]))
    monkeypatch.setattr(interactive, "refuse_taken", lambda *_: None)
    monkeypatch.setattr(interactive, "hosts_of", lambda words, *_: (HOST,) * len(words))
    monkeypatch.setattr(interactive, "remember", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", _Terminal())
    return found


def on_host(argv: list[str]) -> list[str]:
    """The words that start the container, in the command that ssh passes to the host."""
    assert argv[0] == "ssh" and argv[-2] == HOST.address
    words = shlex.split(argv[-1])
    return words[words.index("docker", words.index(START_SCRIPT) + 3) :] if START_SCRIPT in words else words


def test_chat_has_the_terminal_and_all_that_a_job_has(called: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    options = JobOptions(on=("gpu-01",), nccl_debug="INFO")
    config = ChatConfig(load=Path("mixtral"), adapter=Path("/data/adapter"), system="it's")
    assert interactive.run_here("chat", config, options, Ssh(Path("/known"))) == 0
    files, argv = called
    assert '"system": "it\'s"' in files[0]
    assert "-t" in argv and "BatchMode=yes" in argv
    words = on_host(argv)
    job = container_argv(make_spec("x", "chat", config, options, 1), FACTS)
    assert words[:5] == ["docker", "run", "--interactive", "--tty", "--rm"]
    # Apart from the name, everything else is as for a job that runs detached.
    name = words[words.index("--name") + 1]
    assert name.startswith("chat-")
    assert [word.replace(name, "x") for word in words[5:]] == job[3:]
    assert words[-4:] == ["mixtral-run", "chat", "--config", "/job/config.json"]


def test_without_a_terminal_lines_go_through_a_pipe(called: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert interactive.run_here("chat", ChatConfig(load=Path("m")), JobOptions(on=("gpu-01",)), Ssh(Path("/k"))) == 0
    assert "-T" in called[1] and "-t" not in called[1]
    assert on_host(called[1])[2:5] == ["--interactive", "--rm", "--init"]


def test_shell_and_its_dry_run(called: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    options = JobOptions(on=("gpu-01",), shm_size="64g")
    assert interactive.run_shell(options, (), dry_run=True, ssh=Ssh(Path("/k"))) == 0
    assert not called, "a dry run runs nothing"
    printed = shlex.split(capsys.readouterr().out)
    words = on_host(printed)
    assert words[-2:] == ["mixtral-run:local", "bash"]
    assert words[words.index("--shm-size") + 1] == "64g"
    mount = "type=bind,source=/var/lib/mixtral-run/checkpoints,target=/checkpoints"
    assert {"memlock=-1", "stack=67108864", "nvidia.com/gpu=all", mount, "1001:1002"} <= set(words)
    interactive.run_shell(options, (), dry_run=False, ssh=Ssh(Path("/k")))
    assert capsys.readouterr().err.startswith("Jobs may start on gpu-01 while this shell is open, except while")
    called.clear()
    interactive.run_shell(options, ("nvidia-smi", "topo", "-m"), dry_run=False, ssh=Ssh(Path("/k")))
    assert on_host(called[1])[-3:] == ["nvidia-smi", "topo", "-m"]


def test_what_cannot_be(called: list[list[str]]) -> None:
    ssh = Ssh(Path("/k"))
    with pytest.raises(ConfigError, match="one host"):
        interactive.run_shell(JobOptions(on=("a", "b")), (), dry_run=True, ssh=ssh)
    with pytest.raises(ConfigError, match="reads this terminal"):
        interactive.run_here("chat", ChatConfig(load=Path("m")), JobOptions(on=("a",), detach=True), ssh)
    # What a container that ends with the connection cannot use is refused, and never ignored.
    unused = JobOptions(on=("a",), max_restarts=0, min_hosts=1)
    for run in (
        lambda: interactive.run_here("chat", ChatConfig(load=Path("m")), unused, ssh),
        lambda: interactive.run_shell(unused, (), dry_run=True, ssh=ssh),
    ):
        with pytest.raises(ConfigError, match=r"(?s)ends with the connection.*--max-restarts, --min-hosts"):
            run()
    with pytest.raises(HostError, match="connection to gpu-01 failed"):
        interactive.run_shell(JobOptions(on=("a",)), ("false",), dry_run=False, ssh=ssh)


@pytest.mark.parametrize("found", [0, 1, 255])
def test_a_program_with_the_code_of_a_busy_host_is_not_run_again(
    called: list[list[str]], monkeypatch: pytest.MonkeyPatch, found: int
) -> None:
    """found: the host's answer to the question for the mark: it is there, it is not, no connection."""
    ssh, asked = Ssh(Path("/k")), []
    monkeypatch.setattr(ssh, "run", lambda _, argv: asked.append(argv) or Answer(found, "", ""))

    def refuse(*_: object) -> None:
        if called and len(called) > 1:
            raise busy_error([("gpu-01", "finetune-7")])

    monkeypatch.setattr(interactive, "refuse_taken", refuse)
    if found == 1:
        with pytest.raises(BusyError):
            interactive.run_shell(JobOptions(on=("a",)), ("busy",), dry_run=False, ssh=ssh)
    else:
        assert interactive.run_shell(JobOptions(on=("a",)), ("busy",), dry_run=False, ssh=ssh) == 75
    monkeypatch.setattr(interactive, "refuse_taken", lambda *_: None)
    row = SimpleNamespace(host=HOST, job="shell-7", verb="shell", running=True)
    monkeypatch.setattr(interactive, "list_jobs", lambda *_: ([row], []))
    if found == 1:
        # A shell that held a GPU at that moment.
        with pytest.raises(BusyError) as caught:
            interactive.run_shell(JobOptions(on=("a",)), ("busy",), dry_run=False, ssh=ssh)
        assert caught.value.jobs == ((HOST.name, "shell-7"),)
        asked.pop()
    ((test, exists, mark),) = asked
    assert (test, exists) == ("test", "-e") and mark.startswith("/home/ops/jobs/shell-")
    assert mark in shlex.split(called[1][-1])


@pytest.mark.parametrize(("word", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("interrupt", None), ("killed", None)])
def test_the_container_ends_with_a_connection_that_is_cut_here(
    called: list[list[str]], word: str, code: int | None
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    words = (JobOptions(on=("a",)), (word,))
    if code is not None:
        assert interactive.run_shell(*words, dry_run=False, ssh=Ssh(Path("/k"))) == code
    else:
        with pytest.raises((KeyboardInterrupt, HostError)):
            interactive.run_shell(*words, dry_run=False, ssh=Ssh(Path("/k")))
    _, argv, stopped = called
    argv = on_host(argv)
    assert stopped == ["engine", "stop", "--time", "10", argv[argv.index("--name") + 1]]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_line(called: list[list[str]]) -> None:
    done = CliRunner().invoke(root, ["shell", "--on", "gpu-01", "--dry-run", "nvidia-smi", "-L"])
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("nvidia-smi -L'")
    assert isinstance(CliRunner().invoke(root, ["shell"]).exception, ConfigError)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stdin = SimpleNamespace(isatty=lambda: is_terminal)
    done: list[object] = []
    monkeypatch.setattr(interactive.sys, "stdin", stdin)
    monkeypatch.setattr(interactive.termios, "tcgetattr", lambda given: done.append(given is stdin) or "found")
    monkeypatch.setattr(interactive.termios, "tcsetattr", lambda *given: done.append(given[1:]))
    with pytest.raises(KeyError), interactive._terminal_as_found():
        done.append("inside")
        raise KeyError
    assert done == ([True, "inside", (interactive.termios.TCSADRAIN, "found")] if is_terminal else ["inside"])
