"""Small parts of a save, by themselves: what fails and why, what is spoiled, what stays, what other ranks say."""

from __future__ import annotations

import errno
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import TrainingError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import adapter_check, background, checkpoint, run_folder, save_failure, soundness
from mixtral_run.train.checkpoints.save_target import SaveTarget
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
    (tmp_path / "validation.jsonl").write_text(lines(1, 2, 3))
    found = run_folder.growing_files(tmp_path)
    content = (tmp_path / "router.jsonl").read_bytes()
    assert found["router.jsonl"] == FilePrefix(len(content), f"{zlib.crc32(content):08x}")
    assert set(found) == {"metrics.jsonl", "router.jsonl", "validation.jsonl"}
    written = {"router.jsonl": FilePrefix(len(lines(1, 2)), f"{zlib.crc32(lines(1, 2).encode()):08x}")}
    run_folder.drop_later_lines(tmp_path, 2, written, Report())
    assert "".join(capsys.readouterr()) == ""
    assert (tmp_path / "metrics.jsonl").read_text() == lines(1, 2)
    assert (tmp_path / "router.jsonl").read_text() == lines(1, 2)
    # The evaluation of the iteration itself is repeated.
    assert (tmp_path / "validation.jsonl").read_text() == lines(1)
    for prefix in (FilePrefix(1000, written["router.jsonl"].crc32), FilePrefix(len(lines(1, 2)), "00000000")):
        run_folder.drop_later_lines(tmp_path, 2, {"router.jsonl": prefix}, Report())
        assert "is not what was written up to iteration 2" in " ".join("".join(capsys.readouterr()).split())


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    for name in (".iter_0000003.partial", "iter_0000004", ".other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    run_folder.remove_partial_checkpoints(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"iter_0000004", ".other.partial"}


def others_say(monkeypatch: pytest.MonkeyPatch, *found: Any, group: Any = None) -> None:
    """Let an all-gather return this rank's value, and those of the other ranks after it."""

    def gather(into: list[Any], own: Any, group: Any = group) -> None:
        assert len(into) == 1 + len(found)
        into[:] = [own, *found]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)


def mesh_of(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=rank, world_size=size, is_first=rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_any_rank_ends_the_step_of_a_save_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    target = SaveTarget(mesh_of(rank, 2), tmp_path, 7, what="model")
    assert (target.final, target.partial) == (tmp_path / "iter_0000007", tmp_path / ".iter_0000007.partial")
    others_say(monkeypatch, None)
    assert target.on_all_ranks(lambda: 5) == 5
    ran: list[int] = []
    target.on_first_rank(lambda: ran.append(1))
    assert len(ran) == (rank == 0)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target.partial.mkdir()
    with pytest.raises(TrainingError) as caught:
        target.on_all_ranks(full)
    assert caught.value.what == "The model of iteration 7 cannot be saved."
    assert caught.value.found == "No space left on device"
    # The first rank alone makes room.
    assert target.partial.exists() == (rank == 1)
    with pytest.raises(KeyError):
        target.on_all_ranks(lambda: {}["gone"])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        target.on_all_ranks(lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("out of memory")))
    others_say(monkeypatch, TrainingError("Of the other rank."))
    with pytest.raises(TrainingError, match="Of the other rank"):
        target.on_all_ranks(lambda: 5)


def test_parts_of_all_ranks_are_on_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(value: Any, into: list[Any] | None, dst: int, group: Any) -> None:
        assert (dst, group) == (0, "group")
        if into is not None:
            into[:] = [value, *into[1:]]

    monkeypatch.setattr("torch.distributed.gather_object", gather)
    found = [SaveTarget(mesh_of(rank, 3), tmp_path, 1, "group").gather(4) for rank in (0, 1)]  # type: ignore[arg-type]
    assert found == [[4, None, None], []]


def test_each_rank_compares_its_share_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files a, b, c and d: the second of two ranks compares b and d. The marker is the first rank's."""
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    names = [f"__{number}_0.distcp" for number in range(4)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    files = {name: zlib.crc32(b"other") for name in reversed(names)}
    adapter: Any = SimpleNamespace(folder=folder, files=files)
    others_say(monkeypatch, ["of the other"])
    with pytest.raises(WeightsError) as caught:
        adapter_check.check_saved_files(adapter, mesh_of(1, 2))
    assert [line.split(":")[0] for line in caught.value.problems] == [names[1], names[3], "of the other"]
    monkeypatch.setattr(adapter_check, "open_checkpoint", lambda _: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(adapter_check, "tokenizer_file_problems", lambda _: ["tokenizer"])
    monkeypatch.setattr(adapter_check, "marker_problems", lambda *given: [f"marker {given == (tmp_path, folder)}"])
    with pytest.raises(WeightsError) as caught:
        adapter_check.check_saved_files(adapter, mesh_of(0, 2))
    assert [line.split(":")[0] for line in caught.value.problems] == [
        names[0], names[2], "marker True", "tokenizer", "of the other",
    ]  # fmt: skip
    others_say(monkeypatch, [])
    adapter_check.check_saved_files(SimpleNamespace(folder=folder, files={}), mesh_of(1, 2))  # type: ignore[arg-type]


def test_a_save_is_over_when_it_is_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[float] = []

    def reduce(state: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        state.fill_(min(float(state), states.pop(0)))

    monkeypatch.setattr("torch.distributed.all_reduce", reduce)
    task = background.BackgroundTask(lambda: None, mesh_of(0, 2), tmp_path / "iter_0000003", 10)
    task.join_after_error(all_ranks_live=True)
    states[:] = [1.0, 2.0]  # running on the other rank, then over
    assert [task.is_over(), task.is_over()] == [False, True]
    states[:] = [0.0]  # late there
    others_say(monkeypatch, True)
    with pytest.raises(TrainingError) as late:
        task.is_over()
    assert late.value.what == "The checkpoint iter_0000003 is not on the disk after 540 s."
    assert (late.value.found, late.value.where) == ("still writing: rank 1", str(tmp_path))
    failing = background.BackgroundTask(lambda: 1 / 0 and None, mesh_of(0, 1), tmp_path, 10)
    failing.wait()
    with pytest.raises(ZeroDivisionError):
        failing.result()


def test_reading_hf_weights_ends_on_all_ranks_and_padding_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary has 5 rows, of which the model's tensor has 8."""

    def shard(key: str, rows: int) -> Any:
        return SimpleNamespace(key=key, global_shape=(rows, 2), global_offset=(0, 0), data=torch.full((2, 2), 7.0))

    weights: Any = SimpleNamespace(architecture=SimpleNamespace(vocab_size=5), sources="sources")
    outcomes: list[Any] = [["first"], ["second"]]
    monkeypatch.setattr(checkpoint, "read_into", lambda _, targets: outcomes.pop(0) if list(targets) else [])
    monkeypatch.setattr(checkpoint, "checksums_of", lambda sources, parts: {sources: list(parts)})
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    others_say(monkeypatch, ["of another"], [])
    reading = checkpoint._HfReading(weights)
    embedding, exact = shard("embedding.word_embeddings.weight", 8), shard("output_layer.weight", 5)
    norm = shard("decoder.final_layernorm.weight", 8)
    reading.read({"a": embedding, "b": exact, "c": norm})
    reading.read({"a": exact})
    assert [float(each.data.sum()) for each in (embedding, exact, norm)] == [0.0, 28.0, 28.0]
    assert reading.checksums() == {"sources": ["first", "second", "of another"]}
    assert reading.checksums() == {"sources": ["of another"]}
    others_say(monkeypatch, ["of another"], [WeightsError("Of the third rank.")])
    with pytest.raises(WeightsError, match="third"):
        reading.checksums()

    def broken(*_: object) -> list[Any]:
        raise WeightsError("Broken here.")

    monkeypatch.setattr(checkpoint, "read_into", broken)
    reading.read({"a": exact})
    monkeypatch.setattr(checkpoint, "read_into", lambda *_: pytest.fail("read after a failure"))
    reading.read({"a": exact})
    others_say(monkeypatch, [], [])
    with pytest.raises(WeightsError, match="Broken here"):
        reading.checksums()


def test_the_base_of_an_hf_directory_is_read_without_adapters_and_known_by_all_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cached experts are taken if their sources and the rest are one model; else they are quantized again."""
    read: list[Any] = []

    class Reading:
        def __init__(self, weights: Any) -> None:
            self._sums = [{"rest": 1}, {"experts": 2}]

        def read(self, shards: Any) -> None:
            read.append(shards)

        def checksums(self) -> dict[str, int]:
            return self._sums.pop(0)

    monkeypatch.setattr(checkpoint, "_HfReading", Reading)
    shards = {"a": 1, "b.mlp.experts.c": 2}
    monkeypatch.setattr(checkpoint, "shards_of", lambda _, adapters: "adapters" if adapters else shards)
    monkeypatch.setattr(checkpoint, "_expert_shards", lambda _: {"b.mlp.experts.c": 2})
    monkeypatch.setattr(checkpoint, "fingerprint_of_checksums", lambda *given: f"{given[:2]} {sorted(given[2])}")
    weights: Any = SimpleNamespace(architecture="A", dtype="D")
    model, experts = MagicMock(), MagicMock()
    model.settings.base_precision = "bf16"
    assert checkpoint._read_hf(model, weights, experts) == "('A', 'D') ['rest']"
    assert read == [shards] and not experts.find.called
    model.settings.base_precision = "nf4"
    model.quantize_experts.side_effect = lambda reread, _: reread()
    whole = "('A', 'D') ['experts', 'rest']"
    found = experts.find.return_value
    found.sources, found.fingerprint, experts.load.return_value = {"experts": 2}, whole, True
    assert checkpoint._read_hf(model, weights, experts) == whole
    assert not experts.reject.called and not experts.building.called
    found.fingerprint = "another"
    assert checkpoint._read_hf(model, weights, experts) == whole
    assert experts.reject.call_args.args == (found, f"made of a base with fingerprint another, not {whole}")
    build = experts.building.return_value.__enter__.return_value
    build.commit.assert_called_once_with(whole, {"experts": 2})
    assert read[-1] == {"b.mlp.experts.c": 2}  # the experts alone
    experts.find.return_value = None
    assert checkpoint._read_hf(model, weights, experts) == whole and build.commit.call_count == 2
