"""A whole model saved in the background: the state of its step, a kill meanwhile, and hosts without the memory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import host_copy, saving
from mixtral_run.train.checkpoints.host_copy import fits_on_hosts
from mixtral_run.train.checkpoints.newest_good import newest_good
from mixtral_run.train.checkpoints.saving import SaveRequest
from mixtral_run.train.full.chunk_writer import ChunkWriter
from mixtral_run.train.full.full_copy import FullCopy
from mixtral_run.train.full.saving import FullSaver
from mixtral_run.train.full.sharded_adamw import ShardedAdamW
from mixtral_run.train.run_checkpoints import RunCheckpoints
from mixtral_run.weights.manifest.describe import describe_trained
from tests.multiprocess.conftest import SMALL
from tests.support.full_disk import full_disk_for

LATEST = "latest_checkpointed_iteration.txt"
DESCRIPTION = {"base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None}
PATIENCE_SECONDS = 60


class Training:
    """A model whose every step changes all weights and states."""

    def __init__(self, mesh: Mesh, *, offload: bool = False) -> None:
        self.model: MixtralModel = build_model(SMALL, ModelSettings(torch.float32, True), mesh).train()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for each in self.model.parameters():
                each.normal_(0.0, 0.1, generator=generator)
        self.optimizer = ShardedAdamW(self.model, 0.1, offload=offload)
        self.step(0.5)

    def step(self, gradient: float) -> None:
        self.optimizer.begin()
        for each in self.model.parameters():
            each.grad = torch.full_like(each, gradient)
        self.optimizer.reduce_gradients()
        self.optimizer.step(1e-2, None)

    def saver(self, folder: Path) -> FullSaver:
        saver = FullSaver(self.model, self.optimizer, folder)
        # Each weight, its master and two moments, in fp32.
        assert saver.prepare_background() == 16 * sum(each.numel() for each in self.model.parameters())
        assert saver.can_save_in_background
        return saver


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Holds the thread where it has written its file, and nothing has its name yet."""
    found = SimpleNamespace(reached=threading.Event(), opened=threading.Event())
    write = ChunkWriter.write

    def held(writer: ChunkWriter, folder: Path) -> list[Any]:
        written = write(writer, folder)
        if threading.current_thread() is not threading.main_thread():
            found.reached.set()
            assert found.opened.wait(PATIENCE_SECONDS)
        return written

    monkeypatch.setattr(ChunkWriter, "write", held)
    return found


def request(iteration: int) -> SaveRequest:
    return SaveRequest(iteration, DESCRIPTION)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.parametrize("offload", [False, True])
def test_the_files_are_those_of_a_blocking_save_and_a_kill_leaves_the_earlier_one(
    mesh: Mesh, tmp_path: Path, gate: SimpleNamespace, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch writes the folder's path and a random number into .metadata.
    monkeypatch.setattr(filesystem, "_generate_uuid", lambda: "number")
    folder = tmp_path / "tuned"
    training = Training(mesh, offload=offload)
    saver = FullSaver(training.model, training.optimizer, folder)
    saver.save(request(3))
    training.step(0.1)
    saver.save(request(4))
    expected = contents(folder)
    assert expected["iter_0000003/__0_0.distcp"] != expected["iter_0000004/__0_0.distcp"]
    shutil.move(folder, tmp_path / "blocking")

    training = Training(mesh, offload=offload)
    saver = training.saver(folder)
    saver.save(request(3))
    training.step(0.1)
    saver.save_in_background(request(4))
    training.step(0.2)
    assert gate.reached.wait(PATIENCE_SECONDS) and saver.poll() is None
    # What the death of the process leaves at this moment.
    shutil.copytree(folder, tmp_path / "killed")
    gate.opened.set()
    assert saver.finish() is not None
    assert contents(folder) == expected

    found = newest_good(tmp_path / "killed", describe_trained)
    assert found.adapter is not None and (found.adapter.iteration, found.damaged) == (3, ())
    assert (tmp_path / "killed/.iter_0000004.partial/__0_0.distcp").is_file()


def test_what_is_spoiled_or_meets_a_full_disk_is_reported_and_leaves_the_earlier_one(
    mesh: Mesh, tmp_path: Path
) -> None:
    training = Training(mesh)
    saver = training.saver(tmp_path)
    saver.save(request(3))
    before = contents(tmp_path)
    with full_disk_for("__0_0.distcp"):
        saver.save_in_background(request(4))
        with pytest.raises(TrainingError, match="The model of iteration 4 cannot be saved"):
            saver.finish()
    training.optimizer.slices[2].states["exp_avg"][0, 0] = torch.nan
    saver.save_in_background(request(4))
    with pytest.raises(TrainingError, match="The model of iteration 4 is spoiled and is not saved") as spoiled:
        saver.finish()
    assert spoiled.value.problems[0].startswith(training.optimizer.slices[2].name)
    assert contents(tmp_path) == before


def test_the_thread_uses_no_group_of_the_training(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Training(mesh).saver(tmp_path)
    groups: list[object] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*words: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                groups.append(named.get("group"))
            return real(*words, **named)

        return seen

    for name in ("all_gather_object", "gather_object", "barrier", "all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, watched(getattr(dist, name)))
    saver.save_in_background(request(4))
    saver.finish()
    assert groups and all(group not in (None, dist.group.WORLD) for group in groups)


def test_a_step_asks_before_it_changes_anything(mesh: Mesh) -> None:
    """On a GPU the copy of the state before the step may not be complete yet."""
    training = Training(mesh)
    parameters = list(training.model.parameters())
    before, seen = [each.detach().clone() for each in parameters], []
    training.optimizer.register_step_pre_hook(
        lambda: seen.append([torch.equal(*each) for each in zip(parameters, before, strict=True)])
    )
    training.step(0.3)
    assert seen == [[True] * len(parameters)]
    assert not any(torch.equal(*each) for each in zip(parameters, before, strict=True))


@pytest.mark.parametrize(("free", "waits"), [(0, False), (10**15, False), (10**3, True)])
def test_without_the_memory_the_training_waits_and_says_so(
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    waits: bool,
) -> None:
    """0: the host does not say what is free."""
    monkeypatch.setattr(host_copy, "available_bytes", lambda: free)
    training = Training(mesh)
    saver = FullSaver(training.model, training.optimizer, tmp_path)
    config = PretrainConfig(load=Path("base"), mock_data=True, save=tmp_path, train_iters=9, save_interval=2)
    run: Any = SimpleNamespace(start=0, report=Report(), mesh=mesh)
    RunCheckpoints(run, saver, config, None, {}).prepare()  # type: ignore[arg-type]
    assert saver.can_save_in_background != waits
    printed = " ".join("".join(capsys.readouterr()).split())
    assert ("The training waits for each save: a copy for saves in the background would take" in printed) == waits
    assert ("Checkpoints are saved in the background" in printed) != waits


def test_memory_that_cannot_be_pinned_is_reported_once_and_leaves_no_error_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second and the third of four registrations fail; the runtime keeps the error until it is read."""
    codes, kept, asked = [0, 2, 2, 0], [0], []

    def register(address: int, num_bytes: int, flags: int) -> int:
        assert kept == [0] and flags == 0
        asked.append((address, num_bytes))
        kept[0] = codes.pop(0)
        return kept[0]

    def launch(*_: object, device: str) -> None:
        """Raise and clear the runtime's error, as torch's check after the launch of a kernel does."""
        assert device == "cuda" and kept[0]
        kept[0] = 0
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", launch)
    host_copy._warn_unpinned.cache_clear()
    memory = torch.zeros(10)
    for _ in range(4):
        host_copy.pin(memory)
    host_copy.pin(torch.zeros(0))
    assert asked == [(memory.data_ptr(), 40)] * 4 and kept == [0]
    assert "".join(capsys.readouterr()).count("cannot pin host memory (CUDA error 2)") == 1


def test_the_copies_of_all_ranks_of_a_host_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[Any], own: tuple[str, int, int]) -> None:
        # Rank 1 is on the same host, and measured a little less; rank 2 has a host of its own.
        found[:] = [own, (own[0], 40, 99), ("gpu-02", 70, 100)]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(host_copy, "available_bytes", lambda: 100)
    assert fits_on_hosts(39) and not fits_on_hosts(40)


def test_two_hosts_of_one_name_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[Any] = []

    def gather(found: list[Any], value: Any) -> None:
        own.append(value)
        found[:] = own if len(own) == 2 else [value, value]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(host_copy, "available_bytes", lambda: 100)
    monkeypatch.setattr(host_copy, "boot_id", iter("ab").__next__)
    assert not fits_on_hosts(60), "two ranks of one host"
    assert fits_on_hosts(60), "two hosts"


def test_a_rank_that_cannot_allocate_its_copy_lets_all_ranks_wait(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first time the other rank has no memory, and the second time this one."""
    own: list[str | None] = []

    def gather(found: list[Any], problem: Any) -> None:
        own.append(problem)
        found[:] = [problem, "DefaultCPUAllocator: can't allocate memory" if problem is None else None]

    def fails(copy: FullCopy) -> None:
        raise MemoryError

    training = Training(mesh)
    saver = FullSaver(training.model, training.optimizer, tmp_path)
    monkeypatch.setattr(saving, "fits_on_hosts", lambda _: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    config = PretrainConfig(load=Path("base"), mock_data=True, save=tmp_path, train_iters=9, save_interval=2)
    run: Any = SimpleNamespace(start=0, report=Report(), mesh=mesh)
    for rank, why in ((1, "DefaultCPUAllocator: can't allocate memory"), (0, "MemoryError")):
        RunCheckpoints(run, saver, config, None, {}).prepare()  # type: ignore[arg-type]
        assert not saver.can_save_in_background
        printed = " ".join("".join(capsys.readouterr()).split())
        assert "The training waits for each save" in printed and f"not be allocated (rank {rank}: {why})" in printed
        monkeypatch.setattr(FullCopy, "allocate", fails)
    assert own == [None, "MemoryError"]
