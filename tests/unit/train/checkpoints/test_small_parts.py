"""Small parts of a save, by themselves: what fails and why, what is spoiled, what stays, what is taken along."""

from __future__ import annotations

import errno
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import TrainingError
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import run_folder, save_failure, soundness
from mixtral_run.weights.manifest.run_state import FilePrefix


def test_the_systems_own_word(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/disk/file")
    bare = OSError(errno.EIO, "Input/output error")
    for error, expected in ((full, "No space left on device: /disk/file"), (bare, "Input/output error")):
        assert save_failure.save_failure(error, tmp_path, 0) == expected
        outer = RuntimeError("write failed")
        outer.__cause__ = ValueError("between")
        outer.__cause__.__context__ = error
        assert save_failure.save_failure(outer, tmp_path, 0) == expected
    # A circle of causes ends.
    circle = RuntimeError("one\ntwo")
    circle.__context__ = ValueError("other")
    circle.__context__.__context__ = circle
    assert save_failure.save_failure(circle, tmp_path, 3) == "rank 3: RuntimeError: one"
    assert save_failure.save_failure(OSError("no number"), tmp_path, 1) == "rank 1: OSError: no number"
    assert list(tmp_path.iterdir()) == []
    found = save_failure.save_failure(RuntimeError("write failed"), tmp_path / "gone", 2)
    assert found == "No such file or directory (rank 2: RuntimeError: write failed)"


def test_the_disk_is_asked_with_a_mebibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(
        save_failure.os, "fsync", lambda descriptor: synced.append(save_failure.os.fstat(descriptor).st_size)
    )
    assert save_failure._probe(tmp_path) is None and synced == [1048576]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_failure.os, "fsync", full)
    assert save_failure._probe(tmp_path) == "No space left on device" and list(tmp_path.iterdir()) == []


def state(value: float, first: float | None = None, second: float = 1.0) -> Any:
    moments = (
        {} if first is None else {"exp_avg": torch.tensor([0.0, first]), "exp_avg_sq": torch.tensor([1.0, second])}
    )
    return SimpleNamespace(name="layer.a", value=torch.tensor([[0.5], [value]]), moments=moments)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        (state(1e4), []),
        (state(-1e4, 100.0), []),
        (state(-10001.0), ["layer.a: values up to 10000 expected; found 10001"]),
        (state(math.nan), ["layer.a: values up to 10000 expected; found nan"]),
        (state(math.inf), ["layer.a: values up to 10000 expected; found inf"]),
        # 0.3 over the root of 0.000004 is 150.
        (state(1.0, -0.3, 4e-6), ["layer.a: last update up to 100 × the learning rate expected; found 149.999"]),
        (state(1.0, 0.3, 1e-2), []),
        (state(1.0, math.nan), ["layer.a: last update up to 100 × the learning rate expected; found nan"]),
        (state(1.0, 0.0, 0.0), []),
        (state(1.0, 1e-6, 0.0), []),
        (state(1.0, 1.1e-6, 0.0), ["layer.a: last update up to 100 × the learning rate expected; found 110"]),
    ],
)
def test_what_is_spoiled(given: Any, problems: list[str]) -> None:
    assert soundness.problems_of([state(1.0), given]) == problems
    assert soundness.problems_of([]) == []


def test_spoiled_on_any_rank_is_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[Any], own: Any, group: Any) -> None:
        assert (own, group) == ([], "group")
        into[:] = [own, ["b", "a"], ["b"]]

    monkeypatch.setattr(soundness.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(soundness.dist, "all_gather_object", gather)
    with pytest.raises(TrainingError) as caught:
        soundness.check_sound([state(1.0)], Path("/save"), 12, "group")  # type: ignore[arg-type]
    assert caught.value.problems == ("b", "a") and caught.value.where == "/save"
    assert caught.value.what == "The adapter of iteration 12 is spoiled and is not saved."


def config(**values: Any) -> FinetuneConfig:
    given = {"load": Path("b"), "save": Path("s"), "mock_data": True, "train_iters": 20, "save_interval": 6, **values}
    return FinetuneConfig(**given)


def test_how_many_checkpoints_there_are_at_once() -> None:
    # After 6, 12 and 18, and at the end.
    assert [run_folder.num_checkpoints(config(), start) for start in (0, 5, 6, 12, 18, 19)] == [4, 4, 3, 2, 1, 1]
    assert run_folder.num_checkpoints(config(keep_last=2), 0) == 3
    assert run_folder.num_checkpoints(config(keep_last=3), 6) == 3
    assert run_folder.num_checkpoints(config(keep_last=1, keep_best=True, eval_interval=1), 0) == 3


def test_a_save_before_the_end() -> None:
    assert [run_folder.saves_before_the_end(config(train_iters=12), start) for start in (0, 5, 6, 7, 11)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert run_folder.saves_before_the_end(config(train_iters=13), 6)
    stops = SimpleNamespace(save_interval=6, iterations=6, early_stopping_patience=1)
    assert run_folder.saves_before_the_end(stops, 0)  # type: ignore[arg-type]


def test_disk_use_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_folder, "free_bytes", lambda _: 5 * 2**29)
    for values, kept in (
        ({}, "none is removed"),
        ({"keep_last": 2}, "kept: the newest 2"),
        ({"keep_last": 2, "keep_best": True}, "kept: the newest 2, and the best"),
    ):
        run_folder.report_disk_use(config(save=tmp_path, **values), 3 * 2**29, Report())
        text = " ".join(capsys.readouterr().out.split())
        assert f"Checkpoints take up to 1.50 GiB in {tmp_path} ({kept}); 2.50 GiB are free" in text


def test_lines_of_iterations_that_come_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*iterations: int) -> str:
        return "".join(json.dumps({"iteration": each, "loss": 1.0}) + "\n" for each in iterations)

    (tmp_path / "metrics.jsonl").write_text(
        lines(1, 2, 3) + '{"iteration": "2"}\n[1]\nno JSON\n{"iteration": 2.0}\n' + lines(1)[:-1]
    )
    (tmp_path / "router.jsonl").write_text(lines(1, 2, 3))
    (tmp_path / "evaluations.jsonl").write_text(lines(1, 2, 3))
    found = run_folder.growing_files(tmp_path)
    content = (tmp_path / "router.jsonl").read_bytes()
    assert found["router.jsonl"] == FilePrefix(len(content), f"{zlib.crc32(content):08x}")
    names = set(found)
    written = {"router.jsonl": FilePrefix(len(lines(1, 2)), f"{zlib.crc32(lines(1, 2).encode()):08x}")}
    run_folder.drop_later_lines(tmp_path, 2, written, Report())
    assert "".join(capsys.readouterr()) == ""
    assert (tmp_path / "metrics.jsonl").read_text() == lines(1, 2)
    assert (tmp_path / "router.jsonl").read_text() == lines(1, 2)
    evaluations = [name for name in names if name not in ("metrics.jsonl", "router.jsonl")]
    for name in evaluations:
        # The evaluation of the iteration itself is repeated.
        assert (tmp_path / name).read_text() == lines(1)
    for prefix in (FilePrefix(1000, written["router.jsonl"].crc32), FilePrefix(len(lines(1, 2)), "00000000")):
        run_folder.drop_later_lines(tmp_path, 2, {"router.jsonl": prefix}, Report())
        assert "is not what was written up to iteration 2" in " ".join("".join(capsys.readouterr()).split())


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    for name in (".iter_0000003.partial", "iter_0000004", ".other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    run_folder.remove_partial_checkpoints(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"iter_0000004", ".other.partial"}
