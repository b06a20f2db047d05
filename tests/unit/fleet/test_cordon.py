"""Cordoned hosts: the scripts run here by sh, in the place of a host."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mixtral_run import __version__
from mixtral_run.cli.main import root
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet import cordon as module
from mixtral_run.fleet.cordon import Cordon, cordon_error, cordon_of, parse_cordon
from mixtral_run.fleet.history import history_of
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.jobs.host_facts import FACTS_SCRIPT
from mixtral_run.fleet.ssh.connection import Answer
from mixtral_run.fleet.status.page import page
from mixtral_run.fleet.status.read_fleet import summary_rows, to_json
from tests.unit.fleet.status.test_read_fleet import read

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ThisMachine:
    """STAND-IN for SSH: every host is this machine."""

    environment: dict[str, str]

    def each(self, hosts: Sequence[Host], work: Callable[[Host], Any]) -> list[Any]:
        return [work(host) for host in hosts]

    def run(self, host: Host, command: Sequence[str], *, stdin: bytes | None = None) -> Answer:
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, env=self.environment)
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of the host; the user of the host is root, or has the sudo of a stand-in."""
    (tmp_path / "bin").mkdir()
    sudo = tmp_path / "bin/sudo"
    sudo.write_text('#!/bin/sh\n# STAND-IN for sudo, which asks for no password.\nshift\nexec "$@"\n')
    sudo.chmod(0o755)
    monkeypatch.setattr(ThisMachine, "environment", {"PATH": f"{tmp_path / 'bin'}:{PATH}"}, raising=False)
    monkeypatch.setattr(module, "Ssh", ThisMachine)
    monkeypatch.setattr(module, "CORDON_FILE", str(tmp_path / "records/cordon.json"))
    monkeypatch.setattr(module, "HISTORY", str(tmp_path / "log/history.jsonl"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "records/cordon.json"


def run(*words: str) -> None:
    root.main(list(words), standalone_mode=False, prog_name="mixtral-run")


def test_a_host_is_set_apart_and_taken_back(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cordon", "gpu-03", "--reason", "Xid 79\non GPU $(5) 'ü'\x1b[2J")
    record = json.loads(file.read_text())
    assert record["reason"] == "Xid 79 on GPU $(5) 'ü'" and "@" in record["by"]
    assert len(record["at"]) == 20 and record["at"].endswith("Z")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert capsys.readouterr().out == "✓ gpu-03 takes no new jobs\n"
    run("cordon", "gpu-03", "--reason", "RMA")
    assert f"it was cordoned by {record['by']} since {record['at']}: Xid 79" in capsys.readouterr().out
    run("uncordon", "gpu-03")
    assert not file.exists() and "it was cordoned by" in capsys.readouterr().out
    run("uncordon", "gpu-03")
    assert capsys.readouterr().out == "✓ gpu-03 takes jobs; it was not cordoned\n"


def test_two_operators_at_the_same_moment_write_whole_records(file: Path) -> None:
    argv = ["sh", "-c", module._CORDON, "cordoned", str(file)]
    both = [subprocess.Popen(argv, stdin=subprocess.PIPE, env=ThisMachine.environment) for _ in range(2)]
    deadline = time.monotonic() + 10
    while len(list(file.parent.glob("*.new"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process, text in zip(both, (b"first, with a longer text", b"second"), strict=True):
        process.communicate(text)
        assert process.returncode == 0 and file.read_bytes() == text
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_without_the_right_to_write_it_fails_in_words(file: Path, tmp_path: Path) -> None:
    for name, script in {"sudo": "exit 1", "id": "echo 1000"}.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    with pytest.raises(HostError, match="gpu-03 was not cordoned") as caught:
        run("cordon", "gpu-03", "--reason", "x")
    assert "sudo asks for a password" in str(caught.value) and not file.exists()


def test_the_history_tells_of_both(file: Path, tmp_path: Path) -> None:
    run("cordon", "gpu-03", "--reason", "Xid 79 on 'GPU' $(5)")
    run("uncordon", "gpu-03")
    history = tmp_path / "log/history.jsonl"
    assert history.stat().st_mode & 0o777 == 0o644
    visits = history_of("gpu-03", history.read_text()).visits
    assert [(visit.verb, visit.what, visit.outcome) for visit in visits] == [
        ("cordon", "takes no jobs: Xid 79 on 'GPU' $(5)", "done"), ("uncordon", "takes jobs", "done"),
    ]  # fmt: skip
    assert visits[0].by.endswith(f"@{socket.gethostname()}") and visits[0].kit.startswith(__version__)
    # A log that cannot be written keeps nobody from cordoning a host.
    history.unlink()
    history.symlink_to(tmp_path / "victim")
    run("cordon", "gpu-03", "--reason", "x")
    assert file.exists() and not (tmp_path / "victim").exists()


def test_a_reason_and_hosts_are_needed(file: Path) -> None:
    for words in (("gpu-03",), ("--reason", "x"), ("gpu-03", "--reason", " ")):
        with pytest.raises(ConfigError):
            run("cordon", *words)
    assert not file.exists()


def test_a_record_in_another_form_cordons_as_well() -> None:
    assert parse_cordon("") is None and parse_cordon("\n") is None
    unknown = Cordon("unknown", "unknown", "unknown")
    for odd in ("{", "[]", '"x"', '{"reason": 3}', "null"):
        assert parse_cordon(odd) == unknown
    assert cordon_of({"reason": "a\x1b[2Jb", "by": "me", "at": "now"}) == Cordon("ab", "me", "now")


@pytest.mark.parametrize("record", ['{"reason": "Xid\\n79", "by": "ops@laptop", "at": "2026-01-01T00:00:00Z"}\n', ""])
def test_facts_say_that_a_host_is_cordoned(file: Path, record: str, tmp_path: Path) -> None:
    docker = tmp_path / "bin/docker"
    docker.write_text("#!/bin/sh\n# STAND-IN for an engine that answers.\n")
    docker.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{PATH}", "HOME": str(tmp_path)}

    def cordon() -> str:
        argv = ["sh", "-c", FACTS_SCRIPT, "facts", str(tmp_path), "image", str(file)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())["cordon"]

    assert cordon() == ""
    file.parent.mkdir()
    file.write_text(record)
    found = cordon()
    assert found == "1 " + record.rstrip()
    text = str(cordon_error(parse_host("gpu-03"), found.removeprefix("1")))
    assert "gpu-03 takes no jobs" in text and "mixtral-run uncordon gpu-03" in text
    assert ("ops@laptop since 2026-01-01T00:00:00Z: Xid 79" if record else "by unknown since unknown") in text


def test_status_shows_it() -> None:
    assert read().cordoned == ""
    record = {"reason": "Xid 79", "by": "ops@laptop", "at": "2026-01-01T00:00:00Z"}
    acceptance = {"stamp": {"identity": {}}, "at": "now"}
    status = read(records={"acceptance": acceptance, "cordon": record})
    assert status.cordoned == "cordoned by ops@laptop since 2026-01-01T00:00:00Z: Xid 79"
    assert status.warnings[0] == status.cordoned
    assert "! cordoned" in page([status]) and "Xid 79" in page([status]) and "! cordoned" not in page([read()])
    assert status.cordoned in summary_rows([status])[1][0][-1]
    assert json.loads(to_json([status]))[0]["cordoned"] == status.cordoned
    # A record that root cannot read as JSON is null.
    assert "cordoned by unknown" in read(records={"acceptance": acceptance, "cordon": None}).cordoned
