"""Every verb that reports has --json, and prints one JSON document with it, also when it cannot read something."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.cli.main import VERBS, root
from mixtral_run.errors import HostError, MixtralRunError, described
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs import jobs as jobs_module
from mixtral_run.fleet.ssh.connection import Answer, Ssh
from tests.unit.cli.test_help import LEAVES, command

HOST = "gpu-01"
FAILING = {
    "teardown": ("teardown", HOST, "--yes"),
    "status": ("status", HOST),
    "plan": ("plan", "--load", "nowhere"),
    "plan --gpus 1": ("plan", "--gpus", "1", "--gpu-memory", "40", "--base-precision", "bf16"),
    "verify": ("verify", "--load", "nowhere"),
    "data check": ("data check", "nowhere.jsonl"),
    "jobs": ("jobs", HOST),
    "runs": ("runs", "--on", HOST),
    "explain": ("explain", "qqqqq"),
    "generate": ("generate", "--load", "nowhere"),
    "evaluate": ("evaluate", "--load", "nowhere"),
}
"""Command lines of the verbs that report on hosts, files or settings, which they cannot reach."""
ANSWERING = ("smoke", "rehearse")
"""Verbs that run a model and print its results as JSON."""
SILENT = (
    "bootstrap", "cordon", "uncordon", "up", "logs", "stop", "fetch", "shell", "convert", "finetune", "align",
    "pretrain", "chat", "serve", "export", "config",
)  # fmt: skip
"""Verbs that change something, or whose output is a log, a file or a conversation."""


def test_each_verb_reports_in_json_or_is_none_that_reports() -> None:
    with_json = {verb for verb in LEAVES if any("--json" in each.opts for each in command(verb).params)}
    assert with_json == {verb.partition(" --")[0] for verb in FAILING} | set(ANSWERING)
    assert with_json | set(SILENT) == set(LEAVES) and len(VERBS) > 20


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """Answers of hosts to any program, in place of ssh. A host without an answer cannot be reached."""
    found: dict[str, Answer] = {}
    lost = Answer(255, "", "ssh: connect to host port 22: Connection refused")
    monkeypatch.setattr(Ssh, "run", lambda _, host, *__, **___: found.get(host.name, lost))
    return found


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, MixtralRunError | None]:
    """Run a command line; return the document that it printed, and its error."""
    error = None
    try:
        root.main([*words[0].split(), *words[1:], "--json"], standalone_mode=False, prog_name="mixtral-run")
    except MixtralRunError as raised:
        error = raised
    return json.loads(capsys.readouterr().out), error


@pytest.mark.parametrize("verb", FAILING)
def test_a_verb_that_fails_prints_one_document(
    verb: str, answers: dict[str, Answer], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert not answers
    monkeypatch.chdir(tmp_path)
    document, error = run(capsys, *FAILING[verb])
    assert document and error is not None and error.exit_code in (2, 3, 5)
    if isinstance(document, dict):  # the states of hosts are a list
        assert document["ok"] is False and document["error"] == described(error)


@pytest.mark.parametrize("verb", [*{verb.partition(" --")[0] for verb in FAILING}, *ANSWERING])
def test_an_unknown_flag_is_an_error_in_the_document(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    stdout = sys.stdout
    document, error = run(capsys, verb, "--no-such-flag")
    assert error is not None and "--no-such-flag" in str(error)
    assert document == {"ok": False, "error": described(error)}
    assert sys.stdout is stdout


@pytest.mark.parametrize("more", ["", "adaptr: x\n"])
def test_json_in_a_config_file_counts_too(capsys: pytest.CaptureFixture[str], tmp_path: Path, more: str) -> None:
    (tmp_path / "c.yaml").write_text(f"load: {tmp_path}/nowhere\njson: true\n{more}")
    with pytest.raises(MixtralRunError) as caught:
        root.main(["verify", "--config", str(tmp_path / "c.yaml")], standalone_mode=False, prog_name="mixtral-run")
    assert json.loads(capsys.readouterr().out)["error"] == described(caught.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_of_a_torchrun_prints_the_error(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(MixtralRunError):
        root.main(["plan", "--json", "--seq-length", "x"], standalone_mode=False, prog_name="mixtral-run")
    assert bool(capsys.readouterr().out) is (rank == "0")


def test_an_error_of_the_system_is_in_the_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    monkeypatch.setattr("mixtral_run.planner.table.show_plan", full)
    with pytest.raises(OSError, match="No space"):
        root.main(["plan", "--json"], standalone_mode=False, prog_name="mixtral-run")
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 5


def test_names_that_are_not_utf8_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    document, _ = run(capsys, "runs", "/nowhere/\udce4")
    assert document["problems"] == ["/nowhere/\udce4: no folder"]


@pytest.mark.parametrize("verb", ["status", "jobs", "runs --on !x"])
def test_hosts_that_are_not_valid_are_an_error_in_the_document(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    document, error = run(capsys, *verb.split(), *([] if "--on" in verb else ["gpu-01:99999"]))
    assert not document["ok"] and error is not None and error.what == document["error"]["what"]


def test_a_host_without_docker_is_a_state_and_a_lost_host_a_failure(
    answers: dict[str, Answer], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "train-1\tfinetune\trunning\t0\tfalse\t2026-01-01T00:00:00Z\t/var/lib/a\t1\n"
    answers |= {"bare": Answer(69, "", ""), "busy": Answer(0, line, "")}
    document, error = run(capsys, "jobs", "bare", "busy")
    assert error is None and document["ok"] and document["hosts_without_docker"] == ["bare"]
    assert [(row["job"], row["host"], row["running"]) for row in document["jobs"]] == [("train-1", "busy", True)]
    document, error = run(capsys, "jobs", "bare", "busy", "lost")
    assert isinstance(error, HostError) and not document["ok"] and len(document["problems"]) == 1
    root.main(["jobs", "bare", "busy"], standalone_mode=False, prog_name="mixtral-run")
    assert "bare: no Docker: not bootstrapped" in capsys.readouterr().out


def test_the_program_for_hosts_finds_out_that_there_is_no_docker(tmp_path: Path) -> None:
    import subprocess

    done = subprocess.run(["/bin/sh", "-c", jobs_module._LIST_SCRIPT], env={"PATH": str(tmp_path)}, check=False)
    assert done.returncode == 69
    (tmp_path / "docker").write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    (tmp_path / "docker").chmod(0o755)
    argv = ["/bin/sh", "-c", jobs_module._LIST_SCRIPT]
    assert subprocess.run(argv, env={"PATH": str(tmp_path)}, check=False, capture_output=True).returncode == 3
    assert jobs_module.host_facts.NoEngineError(parse_host(HOST)).found == "docker: not found"


def test_explain_prints_known_failures(capsys: pytest.CaptureFixture[str]) -> None:
    document, error = run(capsys, "explain", "docker-permission")
    assert error is None and [each["name"] for each in document["failures"]] == ["docker-permission"]
    assert document["failures"][0]["commands"] and document["recorded"] == []


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "| sleep 0"])
def test_an_error_is_reported_although_standard_output_takes_nothing(redirection: str) -> None:
    import subprocess

    line = f'"$0" -m mixtral_run plan --no-such-flag --json {redirection}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr and "Traceback" not in done.stderr
