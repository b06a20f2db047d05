"""--launcher: what is refused before a scheduler is asked, and the records of jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import click
import pytest

from mixtral_run.cli import launcher_options
from mixtral_run.cli.commands import fleet_jobs
from mixtral_run.cli.config_template import CONFIGS
from mixtral_run.cli.host_options import _NAMES, SCHEDULED, VERBS
from mixtral_run.cli.main import root
from mixtral_run.config.launchers.registry import LAUNCHERS
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.launchers import launcher as launcher_module
from mixtral_run.fleet.launchers import scheduled_jobs
from mixtral_run.fleet.launchers.launcher import JobState
from mixtral_run.fleet.launchers.records import KEPT_RECORDS, JobRecord, find_record, read_records, write_record

FINETUNE = ("finetune", "--load", "base", "--save", "out", "--mock-data")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/mixtral-run/scheduled-jobs"


def run(*words: str) -> None:
    root.main(list(words), standalone_mode=False, prog_name="mixtral-run")


def record(name: str, **more: object) -> JobRecord:
    return JobRecord(**{"name": name, "launcher": "slurm", "verb": "finetune", "scheduler_id": "7", **more})


def test_what_talks_or_serves_is_not_for_a_scheduler() -> None:
    assert set(VERBS) - set(SCHEDULED) == {"chat", "serve"}


@pytest.mark.parametrize("verb", SCHEDULED)
def test_every_verb_that_a_scheduler_can_run_has_the_options_of_all_launchers(verb: str) -> None:
    command = root.get_command(click.Context(root), verb)
    assert command is not None
    names = [name for each in command.params for name in each.opts]
    fields = {item.name for kind, _ in LAUNCHERS.values() for item in dataclasses.fields(kind)}
    assert {"--launcher", "--launcher-settings", "--dry-run", "--nodes"} <= set(names)
    assert {"--" + name.replace("_", "-") for name in fields} <= set(names)
    # A name of both would be taken from the verb's own settings.
    settings = {item.name for item in dataclasses.fields(CONFIGS[verb])}
    assert not (fields | set(launcher_options._OWN_NAMES)) & (settings | set(_NAMES))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "2"), "These settings need --launcher"),
        (("--dry-run",), "These settings need --launcher"),
        (("--launcher", "pbs"), "There is no such launcher"),
        (("--launcher", "slurm", "--on", "gpu-01"), "expected --on or --launcher; found both"),
        (("--launcher", "slurm", "--nodes", "0"), "--nodes: expected at least 1; found 0"),
        (("--launcher", "slurm", "--slurm-option", "nodes=3"), "the script sets nodes itself"),
        (("--shm-size", "1g"), "need --on HOST or --launcher NAME"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*FINETUNE, *words)
    assert message in str(caught.value)


def test_settings_come_from_a_file_and_flags_take_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("mixtral_run.fleet.launchers.launch_job.launch_job", lambda *words: seen.extend(words))
    file = tmp_path / "site.yaml"
    file.write_text("nodes: 4\npartition: gpu\naccount: lab\n")
    run(*FINETUNE, "--launcher", "slurm", "--launcher-settings", str(file), "--nodes", "2", "--image", "x:1")
    settings = seen[4]
    assert (settings.nodes, settings.partition, settings.account) == (2, "gpu", "lab")  # type: ignore[attr-defined]
    assert seen[:2] == ["slurm", "finetune"] and seen[5] == ("image",)
    file.write_text("noodles: 4\n")
    with pytest.raises(ConfigError, match="unknown setting 'noodles'"):
        run(*FINETUNE, "--launcher", "slurm", "--launcher-settings", str(file))


def test_records_are_found_by_the_start_of_a_name_and_odd_files_are_skipped(state: Path) -> None:
    write_record(record("finetune-1", submitted="2026-01-01T00:00:00", extra={"login": "me@login"}))
    write_record(record("finetune-2", submitted="2026-01-02T00:00:00"))
    assert [each.name for each in read_records()] == ["finetune-2", "finetune-1"]
    assert find_record("finetune-1") == record(
        "finetune-1", submitted="2026-01-01T00:00:00", extra={"login": "me@login"}
    )
    assert find_record("export") is None
    with pytest.raises(ConfigError, match="Several jobs"):
        find_record("finetune")
    values = json.loads((state / "finetune-1.json").read_text())
    for text in ("[]", "{", json.dumps(values | {"name": "../x"}), json.dumps(values | {"more": 1})):
        (state / "odd.json").write_text(text)
        assert len(read_records()) == 2
    assert state.stat().st_mode & 0o777 == 0o700


def test_old_records_are_removed(state: Path) -> None:
    for number in range(KEPT_RECORDS + 3):
        write_record(record(f"finetune-{number}"))
    assert len(list(state.iterdir())) == KEPT_RECORDS


class StandIn:
    """STAND-IN for a scheduler, which knows one running and one ended job."""

    not_used = frozenset({"ulimits"})
    called: ClassVar[list[str]] = []

    def states(self, records: list[JobRecord]) -> list[JobState]:
        return [
            JobState(record=each, state="running", running=True, place="n[1-2]")
            if each.name.endswith("1")
            else JobState(record=each, state="failed", running=False, exit_code=5)
            for each in records
        ]

    def stop(self, record: JobRecord, say: object) -> None:
        self.called.append(f"stop {record.name}")

    def fetch(self, record: JobRecord, target: Path, overwrite: bool, say: object) -> Path:
        self.called.append(f"fetch {record.output} {target}")
        return target


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(StandIn, "called", [])
    for module in (launcher_module, scheduled_jobs):
        monkeypatch.setattr(module, "launcher_of", lambda _: StandIn())
    write_record(record("finetune-1", submitted="2026-01-01T00:00:00", output="/shared/adapter"))
    write_record(record("finetune-2", submitted="2026-01-02T00:00:00", output="/shared/adapter"))
    return StandIn()


def test_jobs_of_a_scheduler_are_listed_stopped_and_fetched(
    scheduler: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run("jobs")
    shown = capsys.readouterr().out
    assert "failed (5)" in shown and "n[1-2]" in shown and "No jobs" not in shown
    run("jobs", "--running")
    assert "failed (5)" not in capsys.readouterr().out
    run("stop", "finetune-1")
    run("fetch", "finetune-2", str(tmp_path))
    assert scheduler.called == ["stop finetune-1", f"fetch /shared/adapter {tmp_path}/adapter"]
    with pytest.raises(ConfigError, match="still running"):
        run("fetch", "finetune-1", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        run("fetch", "finetune-2", str(tmp_path))
    # With --on the name is that of a job on hosts.
    with pytest.raises(Exception, match="nowhere"):
        run("stop", "finetune-1", "--on", "nowhere.invalid")
    assert fleet_jobs.stop.name == "stop"


def test_all_that_is_wrong_with_a_job_for_a_scheduler_is_reported_together() -> None:
    words = ("finetune", "--load", "b", "--save", "s", "--mock-data", "--launcher", "kubernetes", "--dry-run")
    wrong = ("--queue", "A_B", "--ulimit", "none", "--partition", "x", "--wait", "--shm-size", "1z", "--on", "gpu-01")
    with pytest.raises(ConfigError) as refused:
        root.main([*words, *wrong], standalone_mode=False, prog_name="mixtral-run")
    flags = [line.split(":")[0] for line in refused.value.problems]
    assert sorted(flags) == ["--on", "--partition", "--queue", "--shm-size", "--ulimit", "--volume", "--wait"]


def test_a_scheduler_is_not_given_what_it_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_run.config.verbs.training import FinetuneConfig
    from mixtral_run.config.verbs.weights import ConvertConfig
    from mixtral_run.fleet.jobs.job_spec import JobOptions
    from mixtral_run.fleet.launchers import launch_job

    config = FinetuneConfig(load=Path("b"), save=Path("s"), mock_data=True)
    settings = LAUNCHERS["slurm"][0]()
    monkeypatch.setattr(launch_job, "launcher_of", lambda _: StandIn())
    with pytest.raises(ConfigError, match="--ulimit: --launcher slurm does not use it"):
        launch_job.launch_job("slurm", "finetune", config, JobOptions(), settings, ("ulimits",), True)
    convert = ConvertConfig(hf_model_path="m", output_path=Path("x"))
    two = dataclasses.replace(settings, nodes=2)
    with pytest.raises(ConfigError, match="convert runs on one node"):
        launch_job.launch_job("slurm", "convert", convert, JobOptions(), two, (), True)
