"""--resume auto: which iteration it takes, what it does with damaged ones, and where it begins at the start."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.cli.command import VerbCommand
from mixtral_run.cli.options import merged_config, setting_options
from mixtral_run.config.verbs.training import FinetuneConfig, UpConfig
from mixtral_run.errors import MixtralRunError, WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints import newest_good as module
from mixtral_run.train.checkpoints.newest_good import newest_good, settle_resume
from mixtral_run.train.checkpoints.resume_checks import (
    RunCompleteError,
    check_not_complete,
    full_checkpoint_bytes,
    weight_size,
)
from mixtral_run.train.preflight import output_problems
from mixtral_run.weights.manifest.describe import describe_adapter
from mixtral_run.weights.manifest.manifest import write_manifest
from tests.support.tiny import TINY_CONFIG

ARCHITECTURE = MixtralArchitecture.from_hf_config(TINY_CONFIG, where="tiny")
LATEST = "latest_checkpointed_iteration.txt"
MESH = SimpleNamespace(is_first=True, world_size=1)


def config(save: Path, resume: str | None) -> FinetuneConfig:
    return FinetuneConfig(load=Path("base"), save=save, mock_data=True, device="cpu", resume=resume)


def add(save: Path, iteration: int) -> Path:
    """An iteration of one shard, with the record that finetune writes."""
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).write_bytes(f"{name} {iteration}".encode())
    sums = {each.name: f"{zlib.crc32(each.read_bytes()):08x}" for each in folder.iterdir()}
    write_manifest(
        folder, "adapter", architecture=ARCHITECTURE.to_mapping(), iteration=iteration, dtype="float32",
        lora=LoraSettings.from_config(config(save, None)).to_mapping(), base={"fingerprint": "f", "path": "/b"},
        training={}, data_sha256=None, files=sums,
    )  # fmt: skip
    (save / LATEST).write_text(f"{iteration}\n")
    return folder


def settled(save: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str | None, str]:
    """What --resume auto becomes, and what is printed."""
    found = settle_resume(config(save, "auto"), MESH, Report())  # type: ignore[arg-type]
    return found.resume, capsys.readouterr().out


def names(save: Path) -> set[str]:
    return {each.name for each in save.iterdir()}


def test_the_newest_good_iteration_is_taken_and_damaged_ones_get_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (10, 20, 30, 40):
        add(tmp_path, iteration)
    (tmp_path / "iter_0000030/__0_0.distcp").write_bytes(b"other")
    (tmp_path / "iter_0000040/mixtral_run.json").write_text("{}")
    found = newest_good(tmp_path, describe_adapter)
    assert found.adapter is not None and found.adapter.iteration == 20
    assert [folder.name for folder, _ in found.damaged] == ["iter_0000040", "iter_0000030"]
    # Looking changes nothing.
    assert (tmp_path / LATEST).read_text() == "40\n"
    resume, printed = settled(tmp_path, capsys)
    assert resume == "yes" and (tmp_path / LATEST).read_text() == "20\n"
    assert "iter_0000030 is damaged" in printed and "__0_0.distcp: expected CRC-32" in printed
    expected = {"iter_0000010", "iter_0000020", "damaged-iter_0000030", "damaged-iter_0000040", LATEST}
    assert names(tmp_path) == expected
    assert settled(tmp_path, capsys) == ("yes", "")
    assert names(tmp_path) == expected


def test_an_iteration_that_was_complete_before_its_marker_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save was killed between its two renames."""
    add(tmp_path, 5)
    add(tmp_path, 9)
    (tmp_path / LATEST).write_text("5\n")
    (tmp_path / f".{LATEST}.next").write_text("9\n")
    assert settled(tmp_path, capsys)[0] == "yes"
    assert names(tmp_path) == {"iter_0000005", "iter_0000009", LATEST}
    assert (tmp_path / LATEST).read_text() == "9\n"


def test_without_a_good_iteration_the_run_begins_at_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settled(tmp_path / "new", capsys) == (None, "")
    (add(tmp_path, 7) / "__0_0.distcp").unlink()
    resume, printed = settled(tmp_path, capsys)
    assert resume is None and "the run begins at its start" in printed
    assert names(tmp_path) == {"damaged-iter_0000007"}
    # The next attempt, should this one end before its first checkpoint.
    assert output_problems(tmp_path, resume="auto") == []
    assert output_problems(tmp_path, resume=None)
    # A second damaged iteration of that number keeps the first one.
    (add(tmp_path, 7) / "__0_0.distcp").unlink()
    settled(tmp_path, capsys)
    assert names(tmp_path) == {"damaged-iter_0000007", "damaged-iter_0000007-2"}


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / LATEST).write_text("1\n")
    (tmp_path / "mixtral_run.json").write_text("{}")
    with pytest.raises(WeightsError, match="This is a base checkpoint"):
        newest_good(tmp_path, describe_adapter)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("")
    assert "expected a new or empty folder" in output_problems(tmp_path / "other", resume="auto")[0]


def test_another_rank_takes_the_answer_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, 5)
    answers = [True, False]

    def broadcast(into: list[Any]) -> None:
        assert into == [None]
        into[0] = answers.pop(0)

    monkeypatch.setattr(module.dist, "broadcast_object_list", broadcast)
    mesh: Any = SimpleNamespace(is_first=False, world_size=2)
    assert settle_resume(config(tmp_path, "auto"), mesh, Report()).resume == "yes"
    assert settle_resume(config(tmp_path, "auto"), mesh, Report()).resume is None
    assert settle_resume(config(tmp_path, "yes"), mesh, Report()).resume == "yes"


def test_an_iteration_in_the_folder_of_another_one_is_damaged(tmp_path: Path) -> None:
    add(tmp_path, 5).rename(tmp_path / "iter_0000008")
    (tmp_path / "iter_0000000").mkdir()
    (tmp_path / "iter_0000009").write_text("a file")
    found = newest_good(tmp_path, describe_adapter)
    assert found.adapter is None
    assert found.damaged == ((tmp_path / "iter_0000008", "its mixtral_run.json is that of iteration 5"),)


def of_run(**values: Any) -> Any:
    given = {"early_stopping_patience": 0, "knows_iterations": True, "iterations": 100, "epochs": None}
    return SimpleNamespace(**{**given, **values})


@pytest.mark.parametrize(
    ("run", "iteration", "without", "what"),
    [
        (of_run(), 99, 0, None),
        (of_run(), 100, 0, "iteration 100 of 100. A larger --train-iters trains on"),
        (of_run(epochs=2.0), 101, 0, "iteration 101 of 100. A larger --epochs trains on"),
        (of_run(knows_iterations=False), 100, 0, None),
        (of_run(early_stopping_patience=3), 50, 2, None),
        (of_run(early_stopping_patience=3), 50, 3, "after 3 evaluations without a loss below that of iteration 20"),
        (of_run(early_stopping_patience=0), 50, 3, None),
    ],
)
def test_a_run_that_has_reached_its_end(run: Any, iteration: int, without: int, what: str | None) -> None:
    validation = {"iteration": 50, "loss": 2.0, "best_iteration": 20, "best_loss": 1.0}
    folder = Path("/save/iter_0000050")
    if what is None:
        check_not_complete(run, folder, iteration, {**validation, "num_without_improvement": without})
        return
    with pytest.raises(RunCompleteError) as caught:
        check_not_complete(run, folder, iteration, {**validation, "num_without_improvement": without})
    assert what in caught.value.what and caught.value.where == str(folder)


def test_bytes_of_the_checkpoints_of_full_fine_tuning() -> None:
    """Of each weight: itself, and 12 bytes of the optimizer. After 6, 12 and 18, and at the end: 4 checkpoints."""
    base: Any = SimpleNamespace(dtype="bfloat16", architecture=SimpleNamespace(num_parameters=1000))
    other: Any = SimpleNamespace(dtype="float16")
    sizes = [weight_size(SimpleNamespace(dtype=dtype), base) for dtype in ("bf16", "fp32", "auto")]  # type: ignore[arg-type]
    assert sizes == [2, 4, 2] and weight_size(SimpleNamespace(dtype="auto"), other) == 4  # type: ignore[arg-type]
    run: Any = SimpleNamespace(dtype="bf16", iterations=20, save_interval=6, keep_last=None)
    assert full_checkpoint_bytes(run, base, 0) == 1000 * 14 * 4
    assert full_checkpoint_bytes(run, base, 12) == 1000 * 14 * 2


def parsed(config_class: type[FinetuneConfig], *words: str) -> object:
    import click

    found: list[object] = []

    @click.command(cls=VerbCommand)
    @click.argument("host", required=False)
    @setting_options(config_class)
    def verb(host: str | None, **flags: object) -> None:
        found.extend((host, merged_config(config_class, flags.pop("config"), flags, on_hosts=True).resume))  # type: ignore[arg-type]

    verb.main(["--load", "b", "--save", "s", "--mock-data", *words], standalone_mode=False)
    return tuple(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (None, None)),
        (("--resume",), (None, "yes")),
        (("--resume", "auto"), (None, "auto")),
        (("--resume=auto",), (None, "auto")),
        # The word after the flag is not its value.
        (("--resume", "gpu-01"), ("gpu-01", "yes")),
        (("--resume", "--lr", "1e-4"), (None, "yes")),
    ],
)
def test_the_flag_has_a_value_only_if_it_is_one_of_its_own(words: tuple[str, ...], expected: object) -> None:
    assert parsed(UpConfig, *words) == expected


def test_files_of_earlier_versions_say_true_or_false() -> None:
    values = {"load": "b", "save": "s", "mock_data": True}
    for written, expected in ((True, "yes"), (False, None), ("auto", "auto"), (None, None)):
        assert FinetuneConfig.from_mapping({**values, "resume": written}).check().resume == expected
    with pytest.raises(MixtralRunError, match="--resume: expected one of yes, auto; found later"):
        FinetuneConfig.from_mapping({**values, "resume": "later"}).check()
    assert json.loads(FinetuneConfig.from_mapping(values).to_json())["resume"] is None
