"""The order in which an adapter's save reaches the disk: content, names, marker.

A power cut at any point leaves a checkpoint that LATEST names and that is whole.
"""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.checkpoints import saving
from mixtral_run.train.checkpoints.adapter_writer import AdapterWriter
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_optimizer
from mixtral_run.train.checkpoints.saving import AdapterSaver, SaveRequest
from mixtral_run.train.steps.step import trainable
from mixtral_run.weights.manifest.describe import describe_adapter
from mixtral_run.weights.manifest.run_state import RunState
from tests.support.adapters import save_adapter
from tests.unit.model.recompute.test_recompute import model_of

LATEST = "latest_checkpointed_iteration.txt"
NEXT = f".{LATEST}.next"
PARTIAL, FINAL = ".iter_0000004.partial", "iter_0000004"
DESCRIPTION = {
    "dtype": "float32", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
    "lora": {"lora_rank": 4, "lora_alpha": 6.0, "lora_dropout": 0.0, "lora_target_modules": ["linear_qkv"]},
}  # fmt: skip

Call = tuple[str, ...]


def trained(mesh: Mesh) -> tuple[MixtralModel, torch.optim.Optimizer]:
    model = model_of(mesh, "none")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for each in trainable(model):
        each.grad = torch.full_like(each, 0.5)
    optimizer.step()
    return model, optimizer


class Disk:
    """Records the calls of the system by which a save becomes lasting, with names relative to the adapter's folder.

    It also checks at each of them what a process would find that starts now, and what a power cut would leave.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[Call] = []
        self.synced: set[tuple[str, int]] = set()
        real = {"fsync": os.fsync, "rename": os.rename, "rmtree": shutil.rmtree}

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            size = os.fstat(descriptor).st_size
            if path == folder or path.is_relative_to(folder):
                self.synced.add((self.name(path), size))
                self.note("fsync", path)

        def rename(source: Path, target: Path, **more: int) -> None:
            real["rename"](source, target, **more)
            if Path(source).is_relative_to(folder):
                self.note("rename", Path(source), Path(target))

        def rmtree(path: Path, **more: bool) -> None:
            existed = Path(path).exists()
            real["rmtree"](path, **more)
            if existed and Path(path).is_relative_to(folder):
                self.note("remove", Path(path))

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(shutil, "rmtree", rmtree)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def note(self, *call: object) -> None:
        self.calls.append((str(call[0]), *(self.name(each) for each in call[1:] if isinstance(each, Path))))
        if (self.folder / LATEST).exists():
            named = self.folder / f"iter_{int((self.folder / LATEST).read_text()):07d}"
            assert (named / "mixtral_run.json").is_file() or (self.folder / NEXT).is_file(), self.calls
        if (self.folder / FINAL).exists() and call[0] == "rename":
            # It has its name only with everything in it.
            assert {each.name for each in (self.folder / FINAL).iterdir()} >= {
                ".metadata", "__0_0.distcp", "mixtral_run.json", "random_state.json", "common.pt",
            }  # fmt: skip

    def at(self, *call: str) -> int:
        """Return the position of the last such call."""
        assert call in self.calls, (call, self.calls)
        return len(self.calls) - 1 - self.calls[::-1].index(call)


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "the same iteration again"])
def test_content_then_names_then_the_marker(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, background: bool
) -> None:
    model, optimizer = trained(mesh)
    saver = AdapterSaver(model, optimizer, tmp_path)
    saver.prepare_background()
    saver.save(SaveRequest(4 if again else 3, DESCRIPTION))
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        (saver.save_in_background if background else saver.save)(SaveRequest(4, DESCRIPTION))
        saver.finish()

    named, pointed = disk.at("rename", PARTIAL, FINAL), disk.at("rename", NEXT, LATEST)
    note = disk.at("rename", f".{NEXT}.partial", NEXT)
    # Every file is on the disk in its final size, and so is the folder with their names, before any name is final.
    for file in (tmp_path / FINAL).iterdir():
        assert (f"{PARTIAL}/{file.name}", file.stat().st_size) in disk.synced, file.name
        assert disk.at("fsync", f"{PARTIAL}/{file.name}") < note
    assert disk.at("fsync", PARTIAL) < note
    # The manifest, by which a folder counts as whole, is written after torch flushed what it describes.
    written = [number for number, call in enumerate(disk.calls) if call == ("fsync", f"{PARTIAL}/__0_0.distcp")]
    assert written[0] < disk.at("rename", f"{PARTIAL}/.mixtral_run.json.partial", f"{PARTIAL}/mixtral_run.json")
    # The note of the replacement, the old folder, the new name, the folder, the marker, the folder: in this order.
    assert disk.at("fsync", f".{NEXT}.partial") < note < named < pointed
    between = disk.calls[named + 1 : pointed]
    assert ("fsync", ".") in between
    assert ("fsync", ".") in disk.calls[pointed + 1 :]
    if again:
        assert note < disk.at("remove", FINAL) < named
    else:
        assert not [call for call in disk.calls if call[0] == "remove"]
    assert (tmp_path / LATEST).read_text() == "4\n" and not (tmp_path / NEXT).exists()


def test_a_save_that_fails_before_the_names_leaves_the_earlier_one(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(mesh)
    save_adapter(model, optimizer, tmp_path, 3, DESCRIPTION)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == PARTIAL:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="iteration 4 cannot be saved"):
        save_adapter(model, optimizer, tmp_path, 4, DESCRIPTION)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_resumed_run_has_the_parameters_and_moments_of_the_saved_one(mesh: Mesh, tmp_path: Path) -> None:
    """After one step with gradients of 0.5 the moments are 0.1 of it, and 0.001 of its square."""
    model, optimizer = trained(mesh)
    for steps, expected in ((None, 4.0), (3, 3.0)):
        request = SaveRequest(4, DESCRIPTION, RunState(optimizer_steps=steps))
        AdapterSaver(model, optimizer, tmp_path).save(request)
        resumed = model_of(mesh, "none")
        with torch.no_grad():
            for each in trainable(resumed):
                each.fill_(7.0)
        again, adapter = torch.optim.AdamW(trainable(resumed), lr=1e-2), describe_adapter(tmp_path)
        load_adapter(resumed, adapter)
        load_optimizer(resumed, again, adapter)
        for saved, each in zip(trainable(model), trainable(resumed), strict=True):
            assert torch.equal(saved, each)
            state = again.state[each]
            assert state["step"].item() == expected
            torch.testing.assert_close(state["exp_avg"], torch.full_like(each, 0.05))
            torch.testing.assert_close(state["exp_avg_sq"], torch.full_like(each, 0.00025))


@pytest.mark.parametrize("outdated", ["", "no moments yet", "other moments"])
def test_saves_of_a_plan_made_ahead_are_those_without_one(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outdated: str
) -> None:
    """A plan of other tensors than those that are trained is not used. A good one serves all saves."""
    made: list[dist.ProcessGroup | None] = []

    def writer(shards: object, group: dist.ProcessGroup | None = None) -> AdapterWriter:
        made.append(group)
        return AdapterWriter(shards, group)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "AdapterWriter", writer)
    model = model_of(mesh, "none")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    ahead = AdapterSaver(model, optimizer, tmp_path / "ahead")

    def step() -> None:
        for each in trainable(model):
            each.grad = torch.full_like(each, 0.5)
        optimizer.step()

    if outdated == "no moments yet":
        ahead.plan_ahead()
        step()
    else:
        step()
        ahead.plan_ahead()
    assert ahead._planned is not None
    ahead._planned[1].wait(30)
    if outdated == "other moments":
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].clone()
    for iteration in (4, 5):
        ahead.save(SaveRequest(iteration, DESCRIPTION))
        # The plan has a group of its own, as the training may be in a collective at the same time.
        assert len(made) == (iteration - 2 if outdated else 1) and made[0] is not None
        planned = len(made)
        AdapterSaver(model, optimizer, tmp_path / "at once").save(SaveRequest(iteration, DESCRIPTION))
        assert made.pop() is None and len(made) == planned
        folders = [tmp_path / name / f"iter_{iteration:07d}" for name in ("ahead", "at once")]
        files = [(each / "__0_0.distcp").read_bytes() for each in folders]
        assert files[0] == files[1]
        described = [pickle.loads((each / ".metadata").read_bytes()) for each in folders]
        assert described[0].storage_data == described[1].storage_data
        assert described[0].state_dict_metadata == described[1].state_dict_metadata
        step()


@pytest.mark.parametrize("failure", [MemoryError(), SystemExit(3), RuntimeError("Connection reset"), "stuck", "slow"])
def test_a_plan_that_fails_beside_the_training_costs_no_checkpoint(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException | str
) -> None:
    """A slow one is waited for."""
    monkeypatch.setattr(saving, "PLAN_SECONDS", 0.01 if failure == "stuck" else 30.0)
    begun, gate = threading.Event(), threading.Event()
    made: list[bool] = []

    def writer(shards: object, group: dist.ProcessGroup | None = None) -> AdapterWriter:
        made.append(group is not None)
        begun.set()
        if group is not None and isinstance(failure, BaseException):
            raise failure
        if group is not None and gate.wait(0.1 if failure == "slow" else 30):
            raise RuntimeError("too late")
        return AdapterWriter(shards, group)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "AdapterWriter", writer)
    model, optimizer = trained(mesh)
    saver = AdapterSaver(model, optimizer, tmp_path)
    saver.plan_ahead()
    assert saver._planned is not None
    plan = saver._planned[1]
    assert begun.wait(30)
    for iteration in (4, 5):
        saver.save(SaveRequest(iteration, DESCRIPTION))
        assert (tmp_path / LATEST).read_text() == f"{iteration}\n"
    gate.set()
    plan.wait(30)
    assert made == ([True] if failure == "slow" else [True, False, False])


@pytest.mark.parametrize("lacks", ["group", "thread"])
def test_a_plan_that_cannot_begin_costs_no_checkpoint(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacks: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't start more\nat all")

    model, optimizer = trained(mesh)
    saver = AdapterSaver(model, optimizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*((dist, "new_group", fail) if lacks == "group" else (threading.Thread, "start", fail)))
        saver.plan_ahead()
    assert [each.getMessage().rpartition(": ")[2] for each in caplog.records] == ["can't start more"]
    # Other ranks may have a plan, and ask: this one has to answer.
    assert saver._planned is not None and saver._planned[1] is None
    saver.save(SaveRequest(4, DESCRIPTION))
    assert (tmp_path / LATEST).read_text() == "4\n" and saver._planned is None
