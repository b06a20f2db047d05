"""Parts of saving and loading by themselves: who waits, who allocates, which names are there, which steps follow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import (
    adapter_writer,
    background,
    checkpoint,
    init_adapter,
    newest_good,
    run_folder,
    save_target,
    saving,
)
from mixtral_run.train.checkpoints.save_target import SaveTarget
from mixtral_run.train.checkpoints.saving import AdapterSaver
from mixtral_run.weights.adapter.given_adapter import PeftDescription
from mixtral_run.weights.manifest.run_state import FilePrefix
from tests.unit.train.checkpoints.test_small_parts import mesh_of, others_say

LATEST = "latest_checkpointed_iteration.txt"


def saver(folder: Path, **values: Any) -> AdapterSaver:
    model: Any = SimpleNamespace(mesh=mesh_of(0, 1), **values)
    return AdapterSaver(model, MagicMock(), folder, timeout_minutes=10)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (None, None),
        (MemoryError("no memory\nmore"), "rank 0: no memory"),
        (RuntimeError("cannot allocate"), "rank 0: cannot allocate"),
        (MemoryError(), "rank 0: MemoryError"),
    ],
)
def test_ranks_without_memory_are_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, problem: str | None
) -> None:
    copy = MagicMock()
    copy.allocate.side_effect = error
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    others_say(monkeypatch, None, None)
    assert saving._allocate_everywhere(copy) == problem
    others_say(monkeypatch, None, "full")
    assert saving._allocate_everywhere(copy) == "; ".join([*filter(None, [problem]), "rank 2: full"])


@pytest.mark.parametrize(("fits", "problem"), [(True, None), (False, None), (True, "rank 1: full")])
def test_a_copy_is_used_only_if_all_ranks_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, problem: str | None
) -> None:
    """6 GB of this rank and 18 GB of others: at 100 MB a second they take four minutes more than the ten."""
    copy, groups = MagicMock(num_bytes=6 * 10**9), []
    given = saver(tmp_path)
    monkeypatch.setattr(given, "_new_copy", lambda: copy)
    monkeypatch.setattr(given, "_writer_of", lambda states, found: (states, found))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(18e9))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **each: groups.append(each))
    monkeypatch.setattr(saving, "fits_on_hosts", lambda num_bytes: fits and num_bytes == 6 * 10**9)
    monkeypatch.setattr(saving, "_allocate_everywhere", lambda _: problem)
    assert given.prepare_background() == 24 * 10**9
    assert given.copy_problem == problem
    is_used = fits and problem is None
    assert given.can_save_in_background is is_used and copy.attach.called is is_used
    assert given._timeout == (14 if is_used else 10)
    assert [(each["backend"], each["timeout"].total_seconds()) for each in groups] == [("gloo", 840.0)] * is_used
    assert given._writer == ((copy.states, copy) if is_used else None)


@pytest.mark.parametrize(
    ("own", "fits", "others", "used"),
    [
        ("ready", True, [2.0], True),
        ("ready", True, [1.0, 1.0, 2.0], True),
        ("ready", True, [1.0, 0.0], False),
        ("failed", True, [2.0], False),
        ("ready", False, [2.0], False),
        ("late", True, [2.0], False),
        ("not begun", True, [2.0], False),
    ],
)
def test_a_plan_made_ahead_is_used_only_if_all_ranks_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, fits: bool, others: list[float], used: bool
) -> None:
    """others: the least that other ranks say each time they are asked: 0 cannot use it, 1 still plans, 2 has it."""
    said: list[float] = []

    def reduce(state: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MIN and not state.is_cuda
        said.append(float(state))
        state.clamp_(max=others.pop(0))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(saving, "PLAN_SECONDS", -1.0)
    monkeypatch.setattr(saving, "AdapterWriter", lambda _: "made now")
    monkeypatch.setattr(saving, "adapter_shards", lambda *_: {})
    monkeypatch.setattr(saving, "_are_same", lambda *_: fits)
    given = saver(tmp_path)
    given._model.mesh.world_size = 2
    plan = MagicMock(is_running=own == "late", has_failed=own == "failed", **{"result.return_value": "made ahead"})
    given._planned = [], None if own == "not begun" else plan
    assert given._writer_of([], None) == ("made ahead" if used else "made now")
    assert not others and set(said) == {2.0 if own == "ready" and fits else 0.0}
    # What one rank cannot use is not asked about again.
    assert (given._planned is not None) is used


def test_what_the_end_of_a_run_waits_for(tmp_path: Path) -> None:
    """A peer that is lost is not waited for; its own error lets the other ranks write on, unless one is gone."""
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    cases: tuple[tuple[BaseException | None, bool | None], ...] = (
        (None, True), (ValueError("own"), True), (KeyboardInterrupt(), False),
        (torch.distributed.DistBackendError("x"), False), (lost, None),
    )  # fmt: skip
    for error, live in cases:
        given = saver(tmp_path)
        assert not given.waits_after(error)
        with given as found:
            assert found is given
            given._pending = MagicMock(is_running=True)
            given.__exit__(type(error), error, None)
            assert given.waits_after(error) is (live is not None)
            asked = given._pending.join_after_error.call_args_list
            assert [each.kwargs for each in asked] == ([] if live is None else [{"all_ranks_live": live}])
            given._pending.is_running = False
            assert not given.waits_after(None)
            given._pending.join_after_error.reset_mock()
        assert not given._pending.join_after_error.called


def test_a_task_tells_its_seconds_and_how_long_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is nine tenths of ten minutes, from the task's begin."""
    task = background.BackgroundTask(lambda: None, mesh_of(0, 1), tmp_path / "iter_0000003", 10)
    task.wait()
    task._began, task._ended = 2.0, 5.5
    assert task.result() == 3.5 and not task.is_running
    task._thread = MagicMock()
    now = [100.0]
    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for at, live, expected in ((100.0, True, 442.0), (100.0, False, 30.0), (520.0, True, 30.0), (0.0, False, 30.0)):
        now[0] = at
        task.join_after_error(all_ranks_live=live)
        task._thread.join.assert_called_once_with(expected)
        task._thread.join.reset_mock()
    assert background.WAIT_SECONDS == 0.05


@pytest.mark.parametrize("there", [False, True])
def test_the_tokenizer_is_copied_once_and_an_unfinished_folder_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    copied: list[tuple[Path, Path]] = []

    def copy(source: Path, target: Path) -> None:
        copied.append((source, target))
        target.mkdir()
        (target / "tokenizer.json").write_text("new")

    monkeypatch.setattr(saving, "check_held", lambda: None)
    monkeypatch.setattr(saving, "copy_tokenizer", copy)
    target = SaveTarget(mesh_of(0, 1), tmp_path / "run", 7)
    target.partial.mkdir(parents=True)
    (target.partial / "old").write_text("")
    if there:
        (tmp_path / "run/tokenizer").mkdir()
    saving.begin(target, tmp_path / "base")
    saving.begin(target, None)
    assert list(target.partial.iterdir()) == []
    assert copied == ([] if there else [(tmp_path / "base", tmp_path / "run/.tokenizer.partial")])
    assert [each.name for each in (tmp_path / "run/tokenizer").iterdir()] == ([] if there else ["tokenizer.json"])


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_writes_and_the_first_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Checksums are those that each rank's writer returns."""
    others_say(monkeypatch, None)
    completed: list[Any] = []
    other = (["other"], {"__9_0.distcp": "99"}, "state 9")
    monkeypatch.setattr(saving, "begin", lambda *given: completed.append(("begin", *given)))
    for name in ("complete", "write_random_state"):
        monkeypatch.setattr(saving, name, lambda *given: completed.append(given))
    monkeypatch.setattr(SaveTarget, "gather", lambda self, value: [value, other] if self.mesh.is_first else [])
    target = SaveTarget(mesh_of(rank, 2), tmp_path, 7)
    target.partial.mkdir()

    writer, request = MagicMock(), MagicMock(tokenizer="tokenizer")
    writer.write.return_value = (["own"], {"__0_0.distcp": "00"})
    saver(tmp_path, architecture=MagicMock())._write(target, writer, request, "state 0")  # type: ignore[arg-type]
    assert request.then.call_count == (rank == 0)
    writer.write.assert_called_once_with(target.partial)
    if rank:
        assert completed == [] and not writer.finish.called
        return
    writer.finish.assert_called_once_with(target.partial, [["own"], ["other"]])
    begin, state, done = completed
    assert begin == ("begin", target, "tokenizer") and state[2] == ["state 0", "state 9"]
    sums = {"__0_0.distcp": "00", "__9_0.distcp": "99"}
    assert done[:2] == (target, request) and done[3:] == (sums, "adapter")


@pytest.mark.parametrize(
    ("marker", "written"), [("9\n", True), ("99\n", True), ("10", True), (None, True), ("10\n", False)]
)
def test_the_marker_is_written_unless_it_names_the_iteration(tmp_path: Path, marker: str | None, written: bool) -> None:
    if marker is not None:
        (tmp_path / LATEST).write_text(marker)
    (tmp_path / f".{LATEST}.next").write_text("11\n")
    found: Any = newest_good.NewestGood(SimpleNamespace(iteration=10))
    assert newest_good._mark(tmp_path, found, Report.silent()) is True
    assert (tmp_path / LATEST).read_text() == "10\n"
    assert (tmp_path / f".{LATEST}.next").exists() is not written


def test_damaged_iterations_get_names_that_are_free(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000007"
    for expected in ("damaged-iter_0000007", "damaged-iter_0000007-2", "damaged-iter_0000007-3"):
        name = newest_good._free_name(folder)
        assert name == tmp_path / expected
        name.mkdir()


def test_lines_of_later_iterations_go_from_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluations of the iteration itself are repeated. What is no line of an iteration goes, wherever it stands."""

    def lines(*iterations: int) -> str:
        return "".join(json.dumps({"iteration": each}) + "\n" for each in iterations)

    names = ("metrics.jsonl", "router.jsonl", "validation.jsonl", "generations.jsonl")
    for name in names:
        (tmp_path / name).write_text("[1]\n" + lines(5, 2, 3, 4))
    run_folder.drop_later_lines(tmp_path, 3, {}, Report())
    assert [(tmp_path / name).read_text() for name in names] == [lines(2, 3)] * 2 + [lines(2)] * 2
    before = {name: (tmp_path / name).stat().st_ino for name in names}
    run_folder.drop_later_lines(tmp_path, 3, {}, Report())
    assert {name: (tmp_path / name).stat().st_ino for name in names} == before
    assert "".join(capsys.readouterr()) == ""
    run_folder.drop_later_lines(tmp_path, 3, {"router.jsonl": FilePrefix(10**6, "00000000")}, Report())
    assert "router.jsonl is not what was written" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "router.jsonl").unlink()
    run_folder.drop_later_lines(tmp_path, 3, {"router.jsonl": FilePrefix(0, "00000000")}, Report())
    assert "".join(capsys.readouterr()) == "" and not (tmp_path / "router.jsonl").exists()


@pytest.mark.parametrize("local", ["0", "1"])
def test_one_process_of_each_host_looks_for_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    found: list[Any] = []
    dist = MagicMock()
    dist.all_gather_object.side_effect = lambda into, own: found.append((len(into), own))
    monkeypatch.setattr(run_folder, "dist", dist)
    monkeypatch.setattr(run_folder.socket, "gethostname", lambda: "gpu-02")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local)
    run_folder.check_shared(tmp_path / "run", mesh_of(3, 4))
    ((size, own),) = found
    assert size == 4 and (own is None) == (local == "1")
    assert own is None or (own[0] == "gpu-02" and own[1].endswith("-3") and own[2] is None)
    for same in ("4", "5"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", same)
        run_folder.check_shared(tmp_path / "run", mesh_of(3, 4))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    run_folder.check_shared(tmp_path / "run", mesh_of(3, 4))
    assert len(found) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("cached", [None, "damaged", "good"])
def test_experts_in_few_bits_are_read_from_the_cache_or_quantized(
    monkeypatch: pytest.MonkeyPatch, precision: str, cached: str | None
) -> None:
    experts, reader, read = MagicMock(), MagicMock(), []
    reader.__enter__.return_value.read.side_effect = lambda shards: read.append(list(shards))
    shards = {"x.mlp.experts.y": 1, "x.mlp.router": 2}
    monkeypatch.setattr(checkpoint, "ExpertCache", lambda *_: experts)
    monkeypatch.setattr(checkpoint, "BaseReader", lambda _: reader)
    monkeypatch.setattr(checkpoint, "newest_iteration", lambda folder: folder)
    monkeypatch.setattr(checkpoint, "shards_of", lambda _, adapters: {} if adapters else shards)
    monkeypatch.setattr(checkpoint, "_expert_shards", lambda _: dict(list(shards.items())[:1]))
    model, base = MagicMock(), MagicMock(weights=None, fingerprint="print")
    model.settings.base_precision = precision
    model.quantize_experts.side_effect = lambda reread, add: (reread(), add())
    experts.find.return_value = cached
    experts.load.side_effect = lambda found: found == "good"
    beside: list[bool] = []

    def meanwhile() -> None:
        time.sleep(0.05)
        beside.append(reader.__enter__.return_value.agree.called)

    checkpoint.load_base(model, base, None, meanwhile)
    assert model.base_fingerprint == "print" and read[0] == [1, 2]
    assert beside == [False]  # it is over before the ranks agree
    assert experts.find.called is (precision != "bf16")
    quantizes = precision != "bf16" and cached != "good"
    assert read[1:] == ([[1]] if quantizes else [])
    build = experts.building.return_value.__enter__.return_value
    assert [each.args for each in build.commit.call_args_list] == ([("print",)] if quantizes else [])
    assert reader.__enter__.return_value.agree.call_count == 1 + quantizes


def test_an_adapter_is_checked_and_then_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the base that the adapter does not have stay; an adapter of PEFT has no files of the kit."""
    shards = {"a.adapter.linear_in": "A", "b.router.weight": "R", "c.layernorm.weight": "N"}
    events: list[Any] = []
    monkeypatch.setattr(checkpoint, "shards_of", lambda _, adapters: shards if adapters else {})
    monkeypatch.setattr(checkpoint, "check_saved_files", lambda *given: events.append(("check", *given)))
    monkeypatch.setattr(checkpoint, "_load_into", lambda *given: events.append(given[:2]))
    monkeypatch.setattr(checkpoint, "_fill_from_peft", lambda *given: events.append(given))
    monkeypatch.setattr(checkpoint, "target_of", lambda shard: f"target {shard}")
    weight = torch.ones(1)
    model: Any = SimpleNamespace(mesh="mesh", parameters=lambda: [weight])
    lora = LoraSettings(2, 2.0, 0.0, ("linear_qkv",), train_also=("router",))
    adapter: Any = SimpleNamespace(lora=lora, folder="folder")
    checkpoint.load_adapter(model, adapter)
    assert events == [("check", adapter, "mesh"), ({name: shards[name] for name in list(shards)[:2]}, "folder")]
    peft = MagicMock(spec=PeftDescription, lora=lora, factors="factors")
    checkpoint.load_adapter(model, peft)
    assert events[2:] == [("target A", "factors"), ("target R", "factors")]
    assert weight._version == 2, "each load notes that torch does not see what it writes"


def test_rows_of_padding_are_zeros_and_others_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 5: tensors of 4 and of 5 rows have no padding, one of 6 has a row."""
    monkeypatch.setattr(checkpoint, "read_into", lambda *_: [])
    monkeypatch.setattr(checkpoint, "target_of", lambda shard: shard)
    reading = checkpoint._HfReading(SimpleNamespace(architecture=SimpleNamespace(vocab_size=5)))  # type: ignore[arg-type]
    for rows, left in ((4, 7.0), (5, 7.0), (6, 0.0)):
        shard: Any = SimpleNamespace(key="output_layer.weight", global_shape=(rows, 2), data=torch.tensor([7.0]))
        reading.read({"a": shard})
        assert shard.data.item() == left


@pytest.mark.parametrize(("asked", "checked"), [((), True), (("router",), False)])
def test_settings_that_an_adapter_brings_are_checked_with_the_others(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], checked: bool
) -> None:
    lora = LoraSettings(5, 7.0, 0.5, ("linear_fc1",), train_also=("router",))
    monkeypatch.setattr(init_adapter, "describe_base", lambda _: None)
    monkeypatch.setattr(init_adapter, "describe_init_adapter", lambda *_: SimpleNamespace(lora=lora))
    calls: list[int] = []
    given = FinetuneConfig(load=Path("b"), save=Path("s"), mock_data=True, init_adapter=Path("a"), train_also=asked)
    monkeypatch.setattr(FinetuneConfig, "check", lambda _: calls.append(1))
    assert init_adapter.with_adapter_settings(given).train_also == ("router",)
    assert bool(calls) is checked


@pytest.mark.parametrize(("adapter", "resume", "loads"), [(None, None, 0), (Path("a"), "yes", 0), (Path("a"), None, 1)])
def test_an_adapter_to_start_from_is_loaded_at_the_start_alone(
    monkeypatch: pytest.MonkeyPatch, adapter: Path | None, resume: str | None, loads: int
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(init_adapter, "describe_init_adapter", lambda *_: "described")
    monkeypatch.setattr(checkpoint, "load_adapter", lambda *given: loaded.append(given))
    config: Any = SimpleNamespace(init_adapter=adapter, resume=resume)
    init_adapter.load_init_adapter(config, None, "model", Report.silent())  # type: ignore[arg-type]
    assert loaded == [("model", "described")] * loads


def test_a_failure_of_reading_is_raised_and_a_lost_lock_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A HostError says that another run has the folder now: what is in it is that run's."""
    target = SaveTarget(mesh_of(0, 1), tmp_path, 7)
    for error, removed in ((save_target.HostError("taken"), False), (WeightsError("bad"), True)):
        target.partial.mkdir(exist_ok=True)
        others_say(monkeypatch)
        with pytest.raises(type(error)):
            target.on_all_ranks(lambda error=error: (_ for _ in ()).throw(error))
        assert target.partial.exists() is not removed


def test_items_are_written_in_the_order_of_their_bytes() -> None:
    def item(dtype: torch.dtype, *sizes: int) -> Any:
        data = SimpleNamespace(chunk=SimpleNamespace(sizes=sizes), properties=SimpleNamespace(dtype=dtype))
        return SimpleNamespace(tensor_data=data)

    found = [
        adapter_writer._num_bytes(item(*given))
        for given in ((torch.float32, 2, 3), (torch.bfloat16, 5), (torch.uint8,))
    ]
    assert found == [24, 10, 1]
