"""A run with dropout that was cut off ends with the same bits; a flipped bit in any file of its adapter is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ExportConfig, VerifyConfig
from mixtral_run.errors import CheckFailed, ConfigError, MixtralRunError, WeightsError
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.adapter_check import check_saved_files
from mixtral_run.train.preflight import check_resume
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import mixtral_run
from tests.support.servers.s3_server import MARKER, SECRET, content, stored

LATEST = "latest_checkpointed_iteration.txt"
SETTINGS = (
    "--device", "cpu", "--nproc-per-node", "2", "--tensor-model-parallel-size", "2",
    "--expert-model-parallel-size", "2", "--seq-length", "32", "--global-batch-size", "4",
    "--lora-dropout", "0.3", "--lora-rank", "4", "--lr", "1e-2",
    "--train-iters", "6", "--save-interval", "3", "--eval-interval", "3", "--skip-bad-steps", "1", "--data-path",
)  # fmt: skip
ITERATIONS = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"instruction": f"Question {n}?", "response": f"Answer {n * n}."} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def words(base: Path, data: Path, save: Path) -> tuple[str, ...]:
    return (*SETTINGS, str(data), "--valid-data-path", str(data), "--load", str(base), "--save", str(save))


@pytest.fixture(scope="module")
def whole(small_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that was not cut off."""
    save = tmp_path_factory.mktemp("whole") / "adapter"
    done = mixtral_run("finetune", *words(small_checkpoint, data, save))
    assert done.returncode == 0, done.stderr
    assert "Checkpoints take up to" in done.stdout and "(none is removed); " in done.stdout
    how = dict(re.findall(r"saved \S*/(iter_\d+) in \S+ s( in the background)?", done.stdout))
    assert how == {"iter_0000003": " in the background", "iter_0000006": ""}
    return save


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensors(folder: Path) -> Iterator[tuple[str, bytes]]:
    with Reader(folder) as reader:
        for key in sorted(reader.tensors):
            for item in sorted(reader.chunks(key), key=lambda item: item.offset or ()):
                yield f"{key} {item.offset}", b"".join(bytes(block) for block in reader.payload(item, 2**20))


def test_a_run_that_was_killed_ends_with_the_same_bits(
    own: Path, whole: Path, small_checkpoint: Path, data: Path
) -> None:
    """As if the run had been killed after its fifth iteration, in the middle of a line."""
    (own / "iter_0000006").rename(own / ".iter_0000005.partial")
    (own / LATEST).write_text("3\n")
    (own / "summary.json").unlink()
    metrics = (own / "metrics.jsonl").read_text().splitlines(keepends=True)
    (own / "metrics.jsonl").write_text("".join(metrics[:5]) + metrics[5][:20])
    done = mixtral_run("finetune", *words(small_checkpoint, data, own), "--resume")
    assert done.returncode == 0, done.stderr
    assert "iteration 4/6 |" in done.stdout and "iteration 3/6 |" not in done.stdout
    assert not done.stderr
    assert not list(own.glob(".iter_*"))
    expected, found = dict(tensors(whole / "iter_0000006")), dict(tensors(own / "iter_0000006"))
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in expected)
    assert expected == found
    assert dict(tensors(whole / "iter_0000003")) != expected
    for name, at in (("metrics.jsonl", ITERATIONS), ("validation.jsonl", [0, 3, 6])):
        assert [line["iteration"] for line in lines(own / name)] == at
        assert [line["loss"] for line in lines(own / name)] == [line["loss"] for line in lines(whole / name)]


def test_a_finished_run_says_so(own: Path, small_checkpoint: Path, data: Path) -> None:
    done = mixtral_run("finetune", *words(small_checkpoint, data, own), "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "The run is complete" in done.stdout and "iteration 6 of 6" in done.stdout
    config = FinetuneConfig(load=small_checkpoint, save=own, mock_data=True, train_iters=6, resume="yes")
    for changes, refusal in (
        ({"lora_rank": 8}, "the checkpoint has 4; found 8"),
        ({"lora_rank": 4, "lora_scaling": "rslora"}, "--lora-scaling: the checkpoint has standard; found rslora"),
    ):
        with pytest.raises(ConfigError, match=refusal):
            check_resume(replace(config, **changes), describe_base(small_checkpoint))


def test_auto_passes_over_a_damaged_checkpoint_and_may_be_repeated(
    own: Path, whole: Path, small_checkpoint: Path, data: Path
) -> None:
    shard = next((own / "iter_0000006").glob("*.distcp"))
    flip(shard, 1001)
    plain = mixtral_run("finetune", *words(small_checkpoint, data, own), "--train-iters", "7", "--resume")
    assert plain.returncode == 5 and shard.name in plain.stderr
    done = mixtral_run("finetune", *words(small_checkpoint, data, own), "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"iter_0000006 is damaged and is not used: {shard.name}" in done.stdout + done.stderr
    assert "iteration 4/6 |" in done.stdout and "iteration 3/6 |" not in done.stdout
    assert dict(tensors(whole / "iter_0000006")) == dict(tensors(own / "iter_0000006"))
    assert (own / "damaged-iter_0000006" / shard.name).is_file()
    again = mixtral_run("finetune", *words(small_checkpoint, data, own), "--resume", "auto")
    assert again.returncode == 0 and "The run is complete" in again.stdout


def test_the_random_state_counts(own: Path, whole: Path, small_checkpoint: Path, data: Path) -> None:
    """Without the state of the random numbers the same command ends with other bits: the test above can fail."""
    manifest = own / "iter_0000003" / "mixtral_run.json"
    values = json.loads(manifest.read_text())
    del values["crc32"], values["files"]
    manifest.write_text(json.dumps(values))
    (own / "iter_0000003" / "random_state.json").unlink()
    shutil.rmtree(own / "iter_0000006")
    (own / LATEST).write_text("3\n")
    done = mixtral_run("finetune", *words(small_checkpoint, data, own), "--resume")
    assert done.returncode == 0, done.stderr
    assert "Dropout differs" in done.stdout + done.stderr
    assert "has no checksums" in done.stdout
    assert dict(tensors(whole / "iter_0000006")) != dict(tensors(own / "iter_0000006"))


def load(adapter: Path) -> None:
    """What `generate` and `--resume` do first with an adapter."""
    one = LaunchConfig(device="cpu", tensor_model_parallel_size=1, expert_model_parallel_size=1)
    with open_mesh(one) as mesh:
        check_saved_files(describe_adapter(adapter), mesh)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def test_one_flipped_bit_is_found_in_any_file(own: Path, tmp_path: Path) -> None:
    verify(VerifyConfig(load=own), Report.silent()).check()
    load(own)
    files = [each for folder in ("iter_0000006", "tokenizer") for each in (own / folder).iterdir()] + [own / LATEST]
    assert len(files) > 8
    generator = torch.Generator().manual_seed(0)
    for file in files:
        content = file.read_bytes()
        some = torch.randint(8 * len(content), (2,), generator=generator).tolist()
        for bit in range(8 * len(content)) if file.name == LATEST else some:
            flip(file, bit)
            for use, errors in (
                (lambda: verify(VerifyConfig(load=own), Report.silent()).check(), (CheckFailed, WeightsError)),
                (
                    lambda: export(ExportConfig(adapter=(str(own),), output_path=tmp_path / "out"), Report.silent()),
                    WeightsError,
                ),
                (lambda: load(own), WeightsError),
            ):
                with pytest.raises(errors) as found:  # type: ignore[call-overload]
                    use()
                assert isinstance(found.value, MixtralRunError)
                assert file.name in str(found.value), (file, bit, str(found.value))
            file.write_bytes(content)
    assert not (tmp_path / "out").exists()
    load(own)


def test_a_marker_that_names_an_older_iteration_is_found(own: Path) -> None:
    (own / LATEST).write_text("3\n")
    with pytest.raises(WeightsError, match="names iteration 3, but iter_0000006 is newer"):
        load(own)
    # A save that was cut off between its two renames: the older iteration is whole, and the run continues from it.
    (own / f".{LATEST}.next").write_text("6\n")
    load(own)
    # The user asks for an older iteration by name.
    (own / f".{LATEST}.next").unlink()
    (own / LATEST).write_text("6\n")
    load(own / "iter_0000003")


def test_a_run_in_a_store_continues_on_another_machine_with_the_same_bits(
    s3: Any, whole: Path, small_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """The base is in the store as well. The first machine is lost before its last checkpoint is whole in the store."""
    for file in small_checkpoint.rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), "bucket", f"base/{file.relative_to(small_checkpoint)}")
    url, caches, outputs = "s3://bucket/runs/adapter", [tmp_path / "first", tmp_path / "second"], []
    light = ("--no-report", "--report-prompts", "0", "--no-tensorboard", "--resume", "auto", "--save", url)
    command = (*SETTINGS, str(data), "--valid-data-path", str(data), "--load", "s3://bucket/base", *light)
    for cache, more in zip(caches, ((), ("--keep-last", "1")), strict=True):
        done = mixtral_run("finetune", *command, *more, MIXTRAL_RUN_STORE_CACHE=str(cache))
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
        assert {f"runs/adapter/iter_0000006/{MARKER}"} < {*stored(s3)}
        if not more:
            for name in (MARKER, "__0_0.distcp"):
                s3.delete_object(Bucket="bucket", Key=f"runs/adapter/iter_0000006/{name}")
            shutil.rmtree(cache)
    assert "iteration 4/6 |" in outputs[1] and "iteration 3/6 |" not in outputs[1]
    found = stored(s3)
    assert not [name for name in found if "iter_0000003" in name]
    (own,) = (caches[1] / "outputs").glob("*/adapter")
    assert list(tensors(own / "iter_0000006")) == list(tensors(whole / "iter_0000006"))
    for file in (own / "iter_0000006").iterdir():
        assert found[f"runs/adapter/iter_0000006/{file.name}"] == file.stat().st_size
    losses = [json.loads(line)["loss"] for line in content(s3, "runs/adapter/metrics.jsonl").splitlines()]
    assert losses == [line["loss"] for line in lines(whole / "metrics.jsonl")]
    for text in (*outputs, *(each.read_bytes().decode(errors="replace") for each in tmp_path.rglob("*.json*"))):
        assert SECRET not in text
