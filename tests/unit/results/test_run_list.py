"""The list of runs: what each is, odd folders, the best run, what differs, and the same list on a host."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from mixtral_run.cli.commands.runs import runs
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.status.read_runs import rows_of, runs_program
from mixtral_run.results import read_run, run_list
from mixtral_run.results.run_list import find_runs, row_of
from mixtral_run.results.run_table import best_run, differences, words_for_best
from tests.support.html_page import Page


def write_run(folder: Path, losses: list[float], validation: dict[int, float] | None = None, **changes: Any) -> Path:
    """Write the files of a run with the kit's formats, by hand. changes: of summary.json; summary=False: none."""
    folder.mkdir(parents=True)
    settings = changes.pop("settings", {})
    config = FinetuneConfig(load=Path("base"), save=folder, train_iters=len(losses), **settings)
    run = {
        "name": folder.name,
        "started": changes.pop("started", "2026-01-01T00:00:00Z"),
        "settings": config.to_mapping(),
    }
    (folder / "run.json").write_text(json.dumps(run))
    for name, found in (("metrics", dict(enumerate(losses, 1))), ("validation", validation or {})):
        lines = [json.dumps({"iteration": at, "loss": loss, "tokens_per_second": 9.0}) for at, loss in found.items()]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    if changes.pop("summary", True):
        summary = {
            "last_iteration": len(losses),
            "train_iters": len(losses),
            "tokens_per_second": 1234.5,
            "stopped_early": False,
        }
        (folder / "summary.json").write_text(json.dumps(run | summary | changes))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "a", [4.0, 2.0, 3.0], {0: 5.0, 2: 2.5, 3: 2.75}, started="2026-01-03T00:00:00Z")
    write_run(tmp_path / "deep" / "b", [4.0, 1.0], {2: 1.5}, train_iters=9, settings={"lr": 3e-4, "mock_data": True})
    write_run(tmp_path / "c", [4.0, 1.0], summary=False, started="2026-01-02T00:00:00Z")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("release\n")
    return tmp_path


def states(folder: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in find_runs([str(folder)])["runs"]}


def test_each_run_has_a_row_and_the_newest_is_first(folder: Path) -> None:
    found = find_runs([str(folder)])["runs"]
    assert [(row["name"], row["state"], row["iteration"], row["train_iters"]) for row in found] == [
        ("a", "complete", 3, 3),
        ("c", "ended", 2, 2),
        ("b", "stopped", 2, 9),
    ]
    a = found[0]
    assert (a["first_loss"], a["last_loss"], a["best_iteration"], a["best_validation_loss"]) == (4.0, 3.0, 2, 2.5)
    assert a["tokens_per_second"] == 1234.5 and a["folder"] == str(folder / "a")
    assert find_runs([str(folder / "a"), str(folder)])["runs"] == found


def test_a_run_that_holds_its_lock_is_running(folder: Path) -> None:
    with (folder / "c" / ".mixtral-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert states(folder)["c"] == "running"
    assert states(folder)["c"] == "ended"


def test_odd_folders_cost_one_row_and_never_the_list(folder: Path) -> None:
    whole = states(folder)
    odd = folder / "odd"
    for number, (name, content) in enumerate(
        (
            ("summary.json", b"\xff"),
            ("metrics.jsonl", b"{" * 99),
            ("run.json", b"[" * 99999),
            ("summary.json", b'{"name": 7}'),
        )
    ):
        (odd / str(number)).mkdir(parents=True)
        (odd / str(number) / name).write_bytes(content)
    hostile = {"name": "\x1b[2J", "settings": [1], "started": 5, "last_iteration": "x", "train_iters": 1e999, "kit": 3}
    (odd / "hostile\x1b[31m").mkdir()
    (odd / "hostile\x1b[31m" / "summary.json").write_text(json.dumps(hostile))
    (odd / "pipe").mkdir()
    os.mkfifo(odd / "pipe" / "metrics.jsonl")
    (odd / "loop").symlink_to(odd)
    found = find_runs([str(folder), str(folder / "nowhere")])
    names = {row["name"]: row["state"] for row in found["runs"]}
    assert whole.items() <= names.items() and len(found["runs"]) == len(whole) + 6
    assert found["problems"] == [f"{folder / 'nowhere'}: no folder"]
    assert all(row["problems"] for row in found["runs"] if row["state"] == "damaged")
    shown = CliRunner().invoke(runs, [str(folder)])
    assert shown.exit_code == 0 and "\x1b" not in shown.output and "no JSON object" in shown.output
    assert json.loads(CliRunner().invoke(runs, [str(folder), "--json"]).output)["runs"]


def test_the_best_run_has_the_lowest_validation_loss(folder: Path) -> None:
    (folder / "deep" / "b" / "iter_0000002").mkdir()
    shown = CliRunner().invoke(runs, [str(folder), "--best"])
    assert "1 of 3 runs have no validation loss" in shown.output
    assert f"mixtral-run export --adapter {folder / 'deep' / 'b' / 'iter_0000002'} " in shown.output.replace("\n", "")
    assert "has no checkpoint" not in shown.output
    # The best iteration of this run was not saved: the command takes the newest checkpoint, and a line says so.
    shown = CliRunner().invoke(runs, [str(folder / "a"), "--best"])
    assert "Iteration 2 has no checkpoint (--save-interval)" in shown.output
    assert f"mixtral-run export --adapter {folder / 'a'} " in shown.output.replace("\n", "")
    with pytest.raises(ConfigError, match="No run has a loss"):
        CliRunner().invoke(runs, [str(folder / "base"), "--best"], catch_exceptions=False)


def test_losses_of_several_kinds_are_not_compared_in_silence() -> None:
    rows = [{"folder": "a", "last_loss": 1.5, "settings": {}}, {"folder": "b", "last_loss": 0.6}]
    dpo = {"method": "dpo", "beta": None, "reference": None}
    assert len(best_run(rows)[1]) == 1
    rows[1]["settings"] = dpo
    best, (_, remark) = best_run(rows)
    assert best["folder"] == "b" and remark == (
        "The runs do not minimize the same loss: their losses cannot be compared."
    )
    rows[0]["settings"] = dpo | {"beta": 0.1, "reference": "start"}  # the defaults
    assert len(best_run(rows)[1]) == 1
    rows[0]["settings"] = dpo | {"beta": 0.5}
    assert len(best_run(rows)[1]) == 2


def test_two_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    pair = [str(folder / "a"), str(folder / "deep" / "b")]
    found = json.loads(CliRunner().invoke(runs, ["--compare", *pair, "--json"]).output)
    settings = {name: (one, two) for name, one, two in found["differences"] if name.startswith("--")}
    assert settings == {"--lr": ("0.0001", "0.0003"), "--mock-data": ("False", "True"), "--train-iters": ("3", "2")}
    shown = CliRunner().invoke(runs, ["--compare", *pair, "--plot", str(tmp_path / "plot.html")])
    assert "--lr" in shown.output and "0.0003" in shown.output
    page = Page((tmp_path / "plot.html").read_text())
    page.check_offline_and_inert()
    curves = page.curves()
    assert [y for _, y in curves["Loss: a"]] == pytest.approx([4.0, 2.0, 3.0], rel=1e-3)
    assert [y for _, y in curves["Loss: b"]] == pytest.approx([4.0, 1.0], rel=1e-3)
    assert [y for _, y in curves["Validation loss: a"]] == pytest.approx([5.0, 2.5, 2.75], rel=1e-3)
    CliRunner().invoke(runs, ["--compare", *pair, "--plot", str(tmp_path / "plot.png")], catch_exceptions=False)
    assert imread(tmp_path / "plot.png").std() > 0.01


@pytest.mark.parametrize(
    "words",
    [["--plot", "a.html"], ["--compare", "a", "b", "--plot", "a.pdf"], ["--compare", "a", "b", "--best"]],
    ids=str,
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(runs, words, catch_exceptions=False)
    assert len(caught.value.problems) == 1


def test_a_host_lists_the_same_runs(folder: Path) -> None:
    """The program that is sent there, in an interpreter without the kit."""
    argv = [sys.executable, "-I", "-S", "-", json.dumps([str(folder)])]
    done = subprocess.run(argv, input=runs_program(), capture_output=True, check=True)
    assert rows_of(json.loads(done.stdout)) == (find_runs([str(folder)])["runs"], [])
    for module in (read_run, run_list):
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("answer", [None, [], {"runs": 1}])
def test_an_answer_of_another_form_is_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="no list"):
        rows_of(answer)


def test_a_row_of_another_form_is_left_out_and_counted(folder: Path) -> None:
    rows = find_runs([str(folder)])["runs"]
    bad = [{**rows[0], "name": 5}, {**rows[0], "iteration": True}, 7]
    assert rows_of({"runs": [*rows, *bad]}) == (rows, ["3 of its runs are not in the expected form"])


def test_the_best_run_is_exported_by_the_verb_that_takes_it() -> None:
    assert words_for_best({"settings": {"lora_rank": 8}}) == "export --adapter"
    assert words_for_best({"settings": {"offload_optimizer": False}}) == "convert --from-megatron"


def test_settings_that_a_resumed_run_had_before_are_compared(tmp_path: Path) -> None:
    former = {"a": [{"iteration": 40, "settings": {"lr": 0.001}}], "b": [], "c": "no list"}
    for name, before in former.items():
        (tmp_path / name).mkdir()
        record = {"name": "run", "settings": {"lr": 0.0002, "seed": 1}, "former_settings": before}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    rows = {name: row_of(tmp_path / name) or {} for name in former}
    assert differences(rows["a"], rows["b"]) == [("--lr", "0.0002 (0.001 until iteration 40)", "0.0002")]
    assert differences(rows["b"], rows["c"]) == []
