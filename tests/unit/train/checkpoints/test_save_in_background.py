"""A save in the background: the state of its step, the same files as a blocking one, errors where the training is."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from mixtral_run.errors import TrainingError
from mixtral_run.launch.heartbeat import Heartbeat, _noted, read_beat, unnoted
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.checkpoints import background
from mixtral_run.train.checkpoints.adapter_writer import AdapterWriter
from mixtral_run.train.checkpoints.background import BackgroundTask
from mixtral_run.train.checkpoints.saving import AdapterSaver, SaveRequest
from mixtral_run.train.steps.step import trainable
from tests.support.full_disk import full_disk_for
from tests.unit.model.recompute.test_recompute import model_of

LATEST = "latest_checkpointed_iteration.txt"
DESCRIPTION = {
    "dtype": "float32", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
    "lora": {"lora_rank": 4, "lora_alpha": 6.0, "lora_dropout": 0.0, "lora_target_modules": ["linear_qkv"]},
}  # fmt: skip
PATIENCE_SECONDS = 60


class Training:
    """A model whose every step changes all parameters and moments."""

    def __init__(self, mesh: Mesh) -> None:
        self.model: MixtralModel = model_of(mesh, "none")
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-2)
        self.step(0.5)

    def step(self, gradient: float) -> None:
        for each in trainable(self.model):
            each.grad = torch.full_like(each, gradient)
        self.optimizer.step()

    def saver(self, folder: Path) -> AdapterSaver:
        saver = AdapterSaver(self.model, self.optimizer, folder)
        assert not saver.can_save_in_background
        assert saver.prepare_background() == 12 * sum(each.numel() for each in trainable(self.model))
        assert saver.can_save_in_background
        return saver


@pytest.fixture
def training(mesh: Mesh) -> Training:
    return Training(mesh)


class Gate:
    """Holds the thread where it begins to write its file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write = AdapterWriter.write

        def held(writer: AdapterWriter, folder: Path) -> list[Any]:
            self.reached.set()
            assert self.opened.wait(PATIENCE_SECONDS)
            return write(writer, folder)

        monkeypatch.setattr(AdapterWriter, "write", held)


def request(iteration: int) -> SaveRequest:
    return SaveRequest(iteration, DESCRIPTION)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_the_files_are_those_of_a_blocking_save_bit_by_bit(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch writes the folder's path and a random number into .metadata.
    monkeypatch.setattr(filesystem, "_generate_uuid", lambda: "number")
    folder = tmp_path / "adapter"
    for iteration in (3, 4):
        AdapterSaver(training.model, training.optimizer, folder).save(request(iteration))
        training.step(0.1)
    blocking = contents(folder)
    shutil.move(folder, tmp_path / "blocking")

    again = Training(training.model.mesh)
    saver = again.saver(folder)
    for iteration in (3, 4):
        gate = Gate(monkeypatch)
        saver.save_in_background(request(iteration))
        assert gate.reached.wait(PATIENCE_SECONDS)
        # What the training changes meanwhile does not matter.
        again.step(0.1)
        assert saver.poll() is None
        gate.opened.set()
        assert saver.finish() is not None
    assert contents(folder) == blocking
    assert blocking["iter_0000003/__0_0.distcp"] != blocking["iter_0000004/__0_0.distcp"]
    # A blocking save after one in the background, as at the end of a run.
    saver.save(request(5))
    assert (folder / LATEST).read_text() == "5\n"


def test_until_it_is_complete_the_marker_names_the_earlier_one(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = training.saver(tmp_path)
    saver.save(request(3))
    gate = Gate(monkeypatch)
    saver.save_in_background(request(4))
    assert gate.reached.wait(PATIENCE_SECONDS)
    assert (tmp_path / LATEST).read_text() == "3\n"
    assert sorted(each.name for each in tmp_path.glob("iter_*")) == ["iter_0000003"]
    # The next save waits for it: both are there, in their order.
    threading.Timer(0.3, gate.opened.set).start()
    began = time.monotonic()
    saver.save_in_background(request(5))
    assert time.monotonic() - began > 0.2 and (tmp_path / LATEST).read_text() in ("4\n", "5\n")
    assert saver.finish() is not None and saver.finish() is None and saver.poll() is None
    assert (tmp_path / LATEST).read_text() == "5\n"
    assert sorted(each.name for each in tmp_path.glob("*iter_*")) == [f"iter_000000{n}" for n in (3, 4, 5)]


def test_a_spoiled_copy_gets_no_name(training: Training, tmp_path: Path) -> None:
    saver = training.saver(tmp_path)
    saver.save(request(3))
    with torch.no_grad():
        trainable(training.model)[1].view(-1)[-1] = torch.nan
    saver.save_in_background(request(4))
    with torch.no_grad():
        trainable(training.model)[1].zero_()
    with pytest.raises(TrainingError, match="iteration 4 is spoiled and is not saved") as refused:
        saver.finish()
    names = {id(each): name for name, each in training.model.named_parameters()}
    assert [line.split(":")[0] for line in refused.value.problems] == [names[id(trainable(training.model)[1])]]
    assert (tmp_path / LATEST).read_text() == "3\n" and not list(tmp_path.glob("*iter_0000004*"))


def test_what_is_spoiled_after_the_step_is_not_in_it(training: Training, tmp_path: Path) -> None:
    saver = training.saver(tmp_path)
    saver.save_in_background(request(4))
    with torch.no_grad():
        trainable(training.model)[1].fill_(torch.nan)
    assert saver.finish() is not None
    assert (tmp_path / LATEST).read_text() == "4\n"


def test_a_full_disk_is_reported_to_the_training(training: Training, tmp_path: Path) -> None:
    saver = training.saver(tmp_path)
    saver.save(request(3))
    before = contents(tmp_path)
    with full_disk_for("__0_0.distcp"):
        saver.save_in_background(request(4))
        with pytest.raises(TrainingError, match="The adapter of iteration 4 cannot be saved") as refused:
            until = time.monotonic() + PATIENCE_SECONDS
            while saver.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
    assert refused.value.found is not None and "No space left on device" in refused.value.found
    assert refused.value.next_command == f"df -h {tmp_path}, then the same command with --resume"
    assert contents(tmp_path) == before
    saver.save_in_background(request(4))
    assert saver.finish() is not None and (tmp_path / LATEST).read_text() == "4\n"


def test_an_error_of_the_training_costs_no_checkpoint(training: Training, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), training.saver(tmp_path) as saver:
        saver.save_in_background(request(4))
        raise ZeroDivisionError
    assert (tmp_path / LATEST).read_text() == "4\n"


@pytest.mark.parametrize(
    ("error", "is_saved"),
    [
        (TrainingError("The loss is not finite."), True),
        (dist.DistError("timeout"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_long_save_is_waited_for_if_its_other_ranks_are_there(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_saved: bool
) -> None:
    monkeypatch.setattr(background, "SECONDS_AFTER_ERROR", 0.05)
    gate = Gate(monkeypatch)
    timer = threading.Timer(0.3, gate.opened.set)
    with pytest.raises(type(error)), training.saver(tmp_path) as saver:
        saver.save_in_background(request(4))
        assert gate.reached.wait(PATIENCE_SECONDS)
        timer.start()
        raise error
    assert (tmp_path / LATEST).exists() == is_saved
    timer.join()
    saver.finish()


def test_after_the_loss_of_another_rank_nothing_is_waited_for(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    began = time.monotonic()
    with pytest.raises(RuntimeError), training.saver(tmp_path) as saver:
        saver.save_in_background(request(4))
        assert gate.reached.wait(PATIENCE_SECONDS)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:33333")
    assert time.monotonic() - began < 10
    gate.opened.set()
    saver.finish()


def test_a_disk_that_does_not_answer_is_an_error(mesh: Mesh, tmp_path: Path) -> None:
    answered = threading.Event()
    task = BackgroundTask(lambda: bool(answered.wait()) and None, mesh, tmp_path / "iter_0000004", 0.3 / 60 / 0.9)
    assert not task.is_over()
    with pytest.raises(TrainingError, match="The checkpoint iter_0000004 is not on the disk after") as late:
        task.wait()
    assert late.value.found == "still writing: rank 0"
    answered.set()
    task.join_after_error(all_ranks_live=True)
    task.wait()
    assert task.result() > 0.2


def test_collectives_of_a_save_do_not_count_as_those_of_the_training(tmp_path: Path) -> None:
    """Else a rank whose thread waits for a slow disk of another one would count as hung."""
    file = tmp_path / "rank-0.heartbeat"
    heartbeat = Heartbeat(file, 54.0)
    states: list[Any] = []

    def call() -> None:
        beat = read_beat(file)
        assert beat is not None
        states.append((beat.state.name, beat.num_collectives))

    noted = _noted("all_reduce", call, heartbeat)

    def beside() -> None:
        with unnoted():
            noted()
        noted()

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    noted()
    assert states == [("WORKING", 0), ("IN_COLLECTIVE", 1), ("IN_COLLECTIVE", 2)]


def test_the_save_uses_no_group_of_the_training(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective of the thread on a group of the training would pair with one of another rank's step."""
    groups: list[tuple[str, object]] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def seen(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                groups.append((name, named.get("group")))
            return real(*arguments, **named)

        return seen

    for name in ("all_gather_object", "gather_object", "barrier", "all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, watched(name))
    saver = training.saver(tmp_path)
    saver.save_in_background(request(4))
    saver.finish()
    assert {name for name, _ in groups} == {"all_gather_object", "gather_object"}
    assert all(group not in (None, dist.group.WORLD) for _, group in groups), groups
