"""Loggers next to TensorBoard, each with its own package and without a network."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import TrainingError
from mixtral_run.terminal.report import Report
from mixtral_run.train.outcome import log_to
from mixtral_run.train.outcome.log_to import flat, logger_problems, scalar_loggers
from mixtral_run.train.outcome.record import RunRecord

SHA, COMMIT = "5" * 64, "c" * 40


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    settings = FinetuneConfig(load=Path("base"), save=tmp_path, lr=3e-4).to_mapping()
    kit = {"version": "1.2", "commit": COMMIT, "modified": False}
    return RunRecord("my run", "0a1b2c3d", "2026-01-01T00:00:00Z", kit, {"path": "base"}, {"sha256": SHA}, settings, [])


def log(names: tuple[str, ...], record: RunRecord, save: Path, losses: dict[int, float]) -> None:
    with scalar_loggers(names, record, save, Report.silent(), tensorboard=None) as write:
        for iteration, loss in losses.items():
            write(iteration, {"loss": loss})
            write(iteration, {"router_drift": loss / 10})


def records_of(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB, parts of records)."""
    assert content.startswith(b":W&B")
    at, whole = 7, b""
    while at < len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + 7 : at + 7 + length]
        at += 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def test_wandb_gets_the_run_offline(record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log(("wandb",), record, tmp_path, {1: 4.0, 2: 3.5})
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-0a1b2c3d.wandb")
    from wandb.proto import wandb_internal_pb2

    # Another process writes the file.
    until, records = time.monotonic() + 30, []
    while not records or (records[-1].WhichOneof("record_type") != "exit" and time.monotonic() < until):
        time.sleep(0.05)
        records = [wandb_internal_pb2.Record.FromString(each) for each in records_of(file.read_bytes())]
    [run] = [each.run for each in records if each.WhichOneof("record_type") == "run"][:1]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.display_name, run.project) == ("my run", "mixtral-run")
    assert (config["lr"], config["kit"]["commit"], config["data"]["sha256"]) == (3e-4, COMMIT, SHA)
    lines = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.history.item}
        for each in records
        if each.WhichOneof("record_type") == "history"
    ]
    assert [(line["_step"], line["loss"], line["router_drift"]) for line in lines] == [(1, 4.0, 0.4), (2, 3.5, 0.35)]


def test_mlflow_gets_the_run_and_a_resumed_run_continues_it(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log(("mlflow",), record, tmp_path, {1: 4.0, 2: 3.5})
    log(("mlflow",), record, tmp_path, {3: 3.0})
    # The files of the store, and not its client.
    [run] = (tmp_path / "store").glob("*/*/metrics/loss")
    folder = run.parents[1]
    assert [line.split()[1:] for line in run.read_text().splitlines()] == [["4.0", "1"], ["3.5", "2"], ["3.0", "3"]]
    params = {file.name: file.read_text() for file in (folder / "params").iterdir()}
    assert (params["lr"], params["kit.commit"], params["data.sha256"]) == ("0.0003", COMMIT, SHA)
    assert (folder / "tags" / "mlflow.runName").read_text() == "my run"


def test_a_missing_package_is_a_problem_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logger_problems(("wandb", "mlflow")) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert [problem.split("(")[1] for problem in logger_problems(("wandb", "mlflow"))] == [
        "pip install 'mixtral-run[wandb]')",
        "pip install 'mixtral-run[mlflow]')",
    ]


class Failing(log_to.Logger):
    """A service that fails at its second line."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def write(self, iteration: int, scalars: Any) -> None:
        self.calls.append(iteration)
        if len(self.calls) == 2:
            raise ConnectionError("the server is gone\nmore")

    def close(self, *, failed: bool) -> None:
        self.calls.append(("close", failed))


def test_a_logger_that_fails_later_ends_no_run(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, sound = Failing(), Failing()
    sound.calls = [0, 0]
    monkeypatch.setattr(log_to, "_opened", lambda name, *_: failing if name == "wandb" else sound)
    with (
        pytest.raises(ZeroDivisionError),
        scalar_loggers(("wandb", "mlflow"), record, tmp_path, Report(), tensorboard=None) as write,
    ):
        for iteration in (1, 2, 3):
            write(iteration, {"loss": 1.0})
        raise ZeroDivisionError
    assert failing.calls == [1, 2]
    assert sound.calls == [0, 0, 1, 2, 3, ("close", True)]
    assert capsys.readouterr().out == "! The run is no longer logged to wandb: the server is gone\n"


def test_a_logger_that_cannot_begin_is_an_error(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(log_to, "MlflowLogger", lambda _: 1 / 0)
        with pytest.raises(TrainingError, match="cannot be logged to mlflow") as caught:
            log(("mlflow",), record, tmp_path, {})
    # The remedy for a machine without a network works as it stands.
    monkeypatch.chdir(tmp_path)
    variables = re.findall(r"(MLFLOW_\w+)=([^\s;]+)", caught.value.next_command or "")
    assert len(variables) == 2
    for name, value in variables:
        monkeypatch.setenv(name, value)
    log(("mlflow",), record, tmp_path, {1: 4.0})
    assert len(list((tmp_path / "mlruns").glob("*/*/metrics/loss"))) == 1


def test_other_ranks_log_nothing(tmp_path: Path) -> None:
    with scalar_loggers(("wandb", "mlflow"), None, tmp_path, Report(), tensorboard=None) as write:
        write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_nested_values_have_dots_in_their_names() -> None:
    assert flat({"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}}) == {"a": "1", "b.c": "None", "b.d.e": "[1, 2]"}
