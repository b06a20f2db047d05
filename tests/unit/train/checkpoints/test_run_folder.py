"""Checkpoints that stay, and metrics that have each iteration once."""

from __future__ import annotations

import json
import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.run_lock import lock_problems
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import run_folder
from mixtral_run.train.checkpoints.run_folder import (
    additional_bytes,
    check_shared,
    drop_later_lines,
    growing_files,
    num_checkpoints,
    remove_old_checkpoints,
    remove_partial_checkpoints,
    saves_before_the_end,
)
from mixtral_run.weights.manifest.manifest import write_manifest
from mixtral_run.weights.manifest.run_state import RunState
from mixtral_run.weights.store.outputs import folder_of

ARCHITECTURE = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 16, "num_experts": 8, "moe_router_topk": 2, "vocab_size": 160, "max_position_embeddings": 128,
    "rotary_base": 1e6, "layernorm_epsilon": 1e-5,
}  # fmt: skip
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": ["linear_qkv"]}
LOSSES = {10: 2.0, 20: 1.0, 30: None, 40: 1.5, 50: 1.0}


@pytest.fixture
def save(tmp_path: Path) -> Path:
    for iteration, loss in LOSSES.items():
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        write_manifest(
            folder, "adapter", architecture=ARCHITECTURE, iteration=iteration, lora=LORA, dtype="float32",
            base={"fingerprint": "0-0"}, state=RunState(validation_loss=loss).to_mapping(),
        )  # fmt: skip
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("50\n")
    return tmp_path


def kept(save: Path) -> list[int]:
    return sorted(int(each.name[5:]) for each in save.glob("iter_*"))


@pytest.mark.parametrize(
    ("last", "best", "expected"),
    [
        (None, False, [10, 20, 30, 40, 50]),
        (1, False, [50]),
        (2, False, [40, 50]),
        (2, True, [20, 40, 50]),
        (9, True, [*LOSSES]),
    ],
)
def test_the_newest_and_the_best_stay(save: Path, last: int | None, best: bool, expected: list[int]) -> None:
    remove_old_checkpoints(save, last, best)
    assert kept(save) == expected
    assert not list(save.glob(".iter_*"))


def test_folders_that_are_no_checkpoints_and_newer_ones_are_left_alone(save: Path) -> None:
    (save / "latest_checkpointed_iteration.txt").write_text("40\n")
    (save / "iter_0000005").mkdir()
    (save / "iter_0000005" / "mine").write_text("")
    remove_old_checkpoints(save, 1, False)
    assert kept(save) == [5, 40, 50]


def test_what_a_killed_save_left_goes_and_checkpoints_stay(save: Path) -> None:
    for name in (".iter_0000045.partial", ".iter_0000010.partial"):
        (save / name).mkdir()
        (save / name / "__0_0.distcp").write_bytes(b"half")
    (save / ".mine").mkdir()
    remove_partial_checkpoints(save)
    assert kept(save) == [*LOSSES]
    assert [each.name for each in save.glob(".*")] == [".mine"]


@pytest.mark.parametrize(
    ("settings", "start", "expected"),
    [
        ({"train_iters": 1000, "save_interval": 100}, 0, 11),
        ({"train_iters": 1000, "save_interval": 100}, 300, 8),
        ({"train_iters": 1000, "save_interval": 100, "keep_last": 2}, 0, 3),
        ({"train_iters": 1000, "save_interval": 100, "keep_last": 2, "keep_best": True}, 0, 4),
        ({"train_iters": 10, "save_interval": 100, "keep_last": 5}, 0, 1),
    ],
)
def test_checkpoints_on_the_disk_at_once(settings: dict[str, object], start: int, expected: int) -> None:
    config = FinetuneConfig(**{"load": Path("b"), "save": Path("s"), "mock_data": True, **settings})
    assert num_checkpoints(config, start) == expected


@pytest.mark.parametrize(
    ("settings", "start", "expected"),
    [
        # The newest one is there, and gives way when the next one is complete.
        ({"keep_last": 1}, 50, 1),
        ({"keep_last": 8}, 50, 4),
        ({"keep_last": 8, "train_iters": 60}, 50, 2),
        ({"keep_last": 1, "train_iters": 51}, 50, 1),
        # Iteration 50 is written again: 20 to 40 are not among those to come.
        ({"keep_last": 6}, 40, 3),
        ({}, 50, 16),
    ],
)
def test_checkpoints_that_are_there_need_no_more_space(
    save: Path, settings: dict[str, object], start: int, expected: int
) -> None:
    given = {"load": Path("b"), "save": save, "mock_data": True, "train_iters": 200, "save_interval": 10, **settings}
    config = FinetuneConfig(**given)
    assert additional_bytes(config, start, 10**6) == expected * 10**6
    # Folders of the user are not removed and do not count; what a killed save left is removed first.
    (save / "iter_0000005").mkdir()
    (save / ".iter_0000060.partial").mkdir()
    (save / ".iter_0000060.partial/__0_0.distcp").write_bytes(b"x" * 8192)
    assert additional_bytes(config, start, 10**6) == expected * 10**6 - 8192
    assert additional_bytes(config, start, 100) == 0


def test_a_checkpoint_that_is_being_copied_to_a_store_stays_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTRAL_RUN_STORE_CACHE", str(tmp_path))
    settings = {"load": Path("b"), "mock_data": True, "train_iters": 90, "save_interval": 10}
    for folder, more in ((tmp_path / "run-1/run", 0), (folder_of("s3://bucket/run"), 1)):
        last, every = FinetuneConfig(save=folder, keep_last=2, **settings), FinetuneConfig(save=folder, **settings)
        assert num_checkpoints(last, 0) == 3 + more and num_checkpoints(every, 0) == 10
        assert additional_bytes(last, 0, 100) == 300 + 100 * more
        run_folder.report_disk_use(last, 2**30, Report())
        said = " ".join(capsys.readouterr().out.split())
        assert ("(kept: the newest 2; one more while it is copied to the store)" in said) == bool(more)


def line(iteration: int, **more: object) -> str:
    return json.dumps({"iteration": iteration, **more}) + "\n"


def test_metrics_of_iterations_that_are_repeated_go(tmp_path: Path) -> None:
    first = "".join(map(line, (1, 2, 3)))
    (tmp_path / "metrics.jsonl").write_text(first)
    (tmp_path / "validation.jsonl").write_text(line(0) + line(3))
    written = growing_files(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(first + line(4) + line(5)[:9])
    printed = StringIO()
    drop_later_lines(tmp_path, 3, written, Report(printed))
    assert (tmp_path / "metrics.jsonl").read_text() == first
    assert (tmp_path / "validation.jsonl").read_text() == line(0)
    assert printed.getvalue() == ""


def test_metrics_that_changed_since_are_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=1.5) + line(2, loss=1.25))
    written = growing_files(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=1.4) + line(2, loss=1.25))
    printed = StringIO()
    drop_later_lines(tmp_path, 2, written, Report(printed))
    assert "metrics.jsonl is not what was written up to iteration 2" in " ".join(printed.getvalue().split())


@pytest.mark.parametrize(
    ("settings", "start", "expected"),
    [
        ({"train_iters": 10, "save_interval": 10}, 0, False),
        ({"train_iters": 11, "save_interval": 10}, 0, True),
        ({"train_iters": 11, "save_interval": 10}, 10, False),
        ({"train_iters": 21, "save_interval": 10}, 13, True),
        ({"train_iters": 10, "save_interval": 500}, 0, False),
        ({"train_iters": 10, "save_interval": 500, "early_stopping_patience": 1}, 0, True),
    ],
)
def test_a_run_that_only_saves_at_its_end_needs_no_copy(
    settings: dict[str, int], start: int, expected: bool, tmp_path: Path
) -> None:
    config = FinetuneConfig(load=tmp_path, save=tmp_path, mock_data=True, **settings)  # type: ignore[arg-type]
    assert saves_before_the_end(config, start) is expected


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(run_folder.processes, "rank", lambda: rank)
    lock = tmp_path / "adapter" / ".mixtral-run.lock"
    with run_folder.own_output(lock, "finetune"):
        # Another run of the same folder is refused, which is what the lock is for.
        assert bool(lock_problems(lock, "--save adapter")) is (rank == 0)
    assert lock_problems(lock, "--save adapter") == []
    with run_folder.own_output(None, "finetune"):
        assert lock_problems(lock, "--save adapter") == []


class TwoHosts:
    """STAND-IN for torch.distributed between two threads, each of which is a host with one process."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=10)
        self.local = threading.local()
        self.values: list[Any] = [None, None]

    def all_gather_object(self, found: list[Any], own: Any) -> None:
        self.values[self.local.rank] = own
        self.barrier.wait()
        found[:] = self.values
        self.barrier.wait()

    def broadcast_object_list(self, values: list[Any]) -> None:
        found: list[Any] = [None, None]
        self.all_gather_object(found, values[0])
        values[0] = found[0]

    def check(self, folders: list[Path]) -> list[str]:
        """Return what each host raises, as text."""
        raised = ["", ""]

        def host(rank: int) -> None:
            self.local.rank = rank
            try:
                check_shared(folders[rank], SimpleNamespace(rank=rank, world_size=2, is_first=rank == 0))  # type: ignore[arg-type]
            except ConfigError as error:
                raised[rank] = str(error)

        threads = [threading.Thread(target=host, args=(rank,)) for rank in (0, 1)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        return raised


def test_hosts_that_do_not_share_the_folder_are_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = TwoHosts()
    monkeypatch.setattr(run_folder, "dist", two)
    monkeypatch.setattr(run_folder.socket, "gethostname", lambda: f"gpu-0{two.local.rank + 1}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    here, there, taken = tmp_path / "a/run", tmp_path / "b/run", tmp_path / "taken"
    assert two.check([here, here]) == ["", ""]
    assert here.is_dir() and not list(here.iterdir())
    first, second = two.check([here, there])
    assert all("gpu-02: writes to another folder" in each and "gpu-01" not in each for each in (first, second))
    assert not there.exists() and not list(here.iterdir())
    taken.write_text("a file")
    assert "gpu-02: cannot write there" in two.check([here, taken / "run"])[0]
    # All processes of one host have the same disks.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_shared(tmp_path / "never", SimpleNamespace(rank=1, world_size=2, is_first=False))  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()
