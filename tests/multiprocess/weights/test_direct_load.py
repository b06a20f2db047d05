"""Starting from an HF directory: the same parameters, losses and fingerprint as from its converted checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import ConfigError, MixtralRunError, WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.hf.fingerprint import fingerprint, fingerprint_of_checksums
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.load import read_parts as direct
from mixtral_run.weights.load.read_parts import PartSum, Target, checksums_of, read_into
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.manifest.manifest import read_values
from mixtral_run.weights.mapping import hf_to_megatron
from tests.multiprocess.conftest import mixtral_run, torchrun
from tests.multiprocess.verbs.test_export import hf_tensors_of, write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.tiny import write_shards, write_tiny

WORKER = Path(__file__).parent / "direct_load_worker.py"


@pytest.mark.parametrize(
    ("layout", "stored", "dtype", "fused"),
    [
        ("1x1", torch.float32, "fp32", False),
        ("2x2", torch.float32, "fp32", False),
        ("2x2", torch.bfloat16, "bf16", False),
        ("2x1", torch.float32, "bf16", True),
        ("1x2", torch.float16, "fp32", False),
    ],
)
def test_every_rank_is_equal(tmp_path: Path, layout: str, stored: torch.dtype, dtype: str, fused: bool) -> None:
    write_tiny(tmp_path / "hf", dtype=stored, fused=fused)
    expected = convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    out = tmp_path / "out.json"
    processes = max(int(size) for size in layout.split("x"))
    torchrun(processes, WORKER, str(tmp_path / "hf"), str(tmp_path / "base"), str(out), layout, dtype)
    ranks = json.loads(out.read_text())
    assert len(ranks) == processes
    for rank in ranks:
        assert rank["unequal"] == []
        # Of the checkpoint, which was saved as TP2, no byte twice and none by torch.
        read, own = rank["checkpoint_bytes"]
        assert read == own
        read, own = rank["bytes"]
        assert read == own  # its own slices, each once
        assert rank["fingerprints"] == [expected, expected]
        converted, direct = rank["figures"]
        assert converted == direct
        assert len(converted) == 2


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from mixtral_run.weights.load import read_parts as direct
from mixtral_run.weights.mapping import hf_to_megatron as mapping
from mixtral_run.weights.hf.hf_weights import open_hf_weights

hf, dtype, workers = Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
weights = open_hf_weights(hf)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

targets = []
for unit in mapping.units(weights.architecture):
    for chunk in unit.chunks:
        data = torch.ones(chunk.shape, dtype=dtype)  # in memory from here on
        targets.append(direct.Target(chunk.key, chunk.offset, chunk.shape, data))
direct.read_into(weights, targets[:1], workers=workers)  # what threads and libraries take once
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watching = threading.Thread(target=watch)
watching.start()
read = []
direct.read_into(weights, targets, workers=workers, advance=read.append)
done.set()
watching.join()
print(sum(read), peak[0] - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_the_parameters_and_a_bounded_buffer(tmp_path: Path, dtype: str) -> None:
    """Whatever the files' size: as they are stored, and rounded on the way."""
    tensors = write_tiny(tmp_path / "hf", num_shards=1, vocab_size=200_000)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    workers = 2
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "hf"), dtype, str(workers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, taken = map(int, done.stdout.split())
    assert read == num_bytes
    # A buffer and what it is rounded into, for each; the allocator's own on top.
    allowed = workers * 3 * direct.BLOCK_BYTES + 8 * 2**20
    assert taken < allowed < num_bytes / 4


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 4), (4, 8)])
def test_slices_of_all_ranks_are_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int, ep: int) -> None:
    """Chunk by chunk of any layout, in small blocks, against the mapping that converts."""
    monkeypatch.setattr(direct, "PART_BYTES", 3000)
    monkeypatch.setattr(direct, "BLOCK_BYTES", 700)
    tensors = write_tiny(tmp_path / "hf")
    weights = open_hf_weights(tmp_path / "hf")
    sums: list[PartSum] = []
    for unit in hf_to_megatron.units(weights.architecture, tp, ep):
        expected = [torch.zeros(chunk.num_elements) for chunk in unit.chunks]
        for piece in unit.pieces:
            flat = tensors[piece.source].flatten()
            for number in range(piece.count):
                start = piece.source_start + number * piece.source_step
                at = piece.chunk_start + number * piece.length
                expected[piece.chunk][at : at + piece.length] = flat[start : start + piece.length]
        for chunk, values in zip(unit.chunks, expected, strict=True):
            data = torch.full(chunk.shape, float("nan"))
            sums += read_into(weights, [Target(chunk.key, chunk.offset, chunk.shape, data)], workers=2)
            assert torch.equal(data.flatten(), values), chunk
    checksums = checksums_of(weights.sources, sums)
    assert fingerprint_of_checksums(weights.architecture, weights.dtype, checksums) == fingerprint(weights)


def test_ranks_that_read_other_bytes_are_reported(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf")
    weights = open_hf_weights(tmp_path / "hf")
    shape = (weights.architecture.vocab_size, weights.architecture.hidden_size)
    sums = read_into(weights, [Target(hf_to_megatron.EMBEDDING_KEY, (0, 0), shape, torch.empty(shape))])
    other = PartSum(sums[0].source, sums[0].start, sums[0].num_bytes, sums[0].crc ^ 1)
    with pytest.raises(WeightsError, match="changed while they were read"):
        checksums_of(weights.sources, [*sums, other])


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", num_shards=1)
    weights = open_hf_weights(tmp_path / "hf")
    for file in weights.files:
        os.truncate(file, 5000)
    shape = (weights.architecture.vocab_size, weights.architecture.hidden_size)
    targets = [
        Target(key, (0, 0), shape, torch.empty(shape))
        for key in (hf_to_megatron.EMBEDDING_KEY, hf_to_megatron.OUTPUT_LAYER_KEY)
    ]
    with pytest.raises(WeightsError, match="became shorter"):
        read_into(weights, targets)


def test_an_adapter_fits_both(small_hf_model: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    """Trained from the HF directory, it goes on and answers over the checkpoint; and the other way round."""
    common = ("--mock-data", "--device", "cpu", "--seq-length", "16", "--global-batch-size", "2", "--lr", "1e-2")
    layout = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2")
    answers = []
    for name, base, other in (
        ("direct", small_hf_model, small_checkpoint),
        ("converted", small_checkpoint, small_hf_model),
    ):
        adapter = tmp_path / name
        for load, more in ((base, ("--train-iters", "1")), (other, ("--train-iters", "2", "--resume"))):
            done = mixtral_run("finetune", "--load", str(load), "--save", str(adapter), *layout, *common, *more)
            assert done.returncode == 0, done.stderr
        assert (adapter / "tokenizer" / "tokenizer.json").is_file()
        for load in (base, other):
            done = mixtral_run(
                *("generate", "--load", str(load), "--adapter", str(adapter), "--instruction", "Say a word."),
                *("--max-new-tokens", "4", "--device", "cpu", "--json", *layout),
            )
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout))
        merged = ExportConfig(
            adapter=(str(adapter),), output_path=tmp_path / f"{name}-merged", hf_model_path=small_hf_model, merge=True
        )
        export(merged, Report.silent())
    assert all(answer == answers[0] for answer in answers)
    first, second = (read_values(tmp_path / name / "iter_0000001") for name in ("direct", "converted"))
    assert first["base"]["fingerprint"] == second["base"]["fingerprint"] == read_values(small_checkpoint)["fingerprint"]
    left, right = (hf_tensors_of(tmp_path / f"{name}-merged") for name in ("direct", "converted"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    config = ExportConfig(adapter=(str(tmp_path / "direct"),), output_path=tmp_path / "peft")
    export(config, Report.silent())
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(small_hf_model)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    """Refused at once where norms or routers differ, else once all bytes are read."""
    write_tiny(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    write_adapter(tmp_path, tmp_path / "adapter", ("linear_qkv",))
    write_tiny(tmp_path / "other", seed=9)
    near = write_tiny(tmp_path / "near")
    near["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0, 0] += 1
    write_shards(tmp_path / "near", near, 3)
    from mixtral_run.weights.manifest.describe import check_adapter_fits, describe_adapter

    adapter = describe_adapter(tmp_path / "adapter")
    check_adapter_fits(adapter, describe_base(tmp_path / "hf"))
    check_adapter_fits(adapter, describe_base(tmp_path / "base"))
    check_adapter_fits(adapter, describe_base(tmp_path / "near"))
    with pytest.raises(WeightsError, match="another base"):
        check_adapter_fits(adapter, describe_base(tmp_path / "other"))
    from mixtral_run.config.verbs.weights import VerifyConfig
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.load_model import load_for_inference

    config = VerifyConfig(load=tmp_path / "near", device="cpu")
    with open_mesh(config) as mesh, pytest.raises(WeightsError, match="another base"):
        load_for_inference(config, describe_base(tmp_path / "near"), mesh, adapter)


def bad_hf_directories(tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("missing", "truncated", "architecture", "config")}
    for folder in made.values():
        write_tiny(folder)
    files = {name: sorted(folder.glob("*.safetensors")) for name, folder in made.items()}
    files["missing"][1].unlink()
    os.truncate(files["truncated"][0], files["truncated"][0].stat().st_size - 10)
    config = json.loads((made["architecture"] / "config.json").read_text())
    (made["architecture"] / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (made["config"] / "config.json").unlink()
    return made


def test_a_bad_hf_directory_is_reported_as_convert_reports_it(tmp_path: Path) -> None:
    from mixtral_run.config.verbs.weights import ConvertConfig
    from mixtral_run.weights.convert.to_megatron import convert

    for name, folder in bad_hf_directories(tmp_path).items():
        with pytest.raises(MixtralRunError) as converting:
            convert(ConvertConfig(hf_model_path=str(folder), output_path=tmp_path / "out"), Report.silent())
        with pytest.raises(WeightsError) as loading:
            describe_base(folder)
        assert str(loading.value) == str(converting.value), name


def test_bad_directories_through_the_command_line(tmp_path: Path) -> None:
    folders = bad_hf_directories(tmp_path)
    done = mixtral_run(
        *("finetune", "--load", str(folders["missing"]), "--save", str(tmp_path / "adapter"), "--mock-data"),
        *("--device", "cpu", "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1"),
    )
    assert done.returncode == WeightsError.exit_code
    assert "model-00002-of-00003.safetensors: missing" in done.stderr
    write_tiny(tmp_path / "good")
    done = mixtral_run(
        *("generate", "--load", str(tmp_path / "good"), "--prompt", "x", "--device", "cpu", "--nproc-per-node", "3"),
        *("--tensor-model-parallel-size", "3", "--expert-model-parallel-size", "3"),
    )
    assert done.returncode == ConfigError.exit_code
    neither = mixtral_run("verify", "--load", str(tmp_path))
    assert neither.returncode == WeightsError.exit_code
    assert "an HF model's directory" in neither.stderr


def test_verify_of_an_hf_directory(small_hf_model: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    done = mixtral_run(
        *("verify", "--load", str(small_hf_model), "--against", str(small_hf_model), "--device", "cpu", "--json"),
        *("--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
        *("--logits-file", str(tmp_path / "logits.json")),
    )
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    assert (reported["kind"], reported["ok"]) == ("hf", True)
    assert reported["record"]["fingerprint"] == read_values(small_checkpoint)["fingerprint"]
    assert reported["num_parameters"] == MixtralArchitecture.from_hf_directory(small_hf_model).num_parameters
    assert json.loads((tmp_path / "logits.json").read_text())["largest_difference"] <= 1e-5
    write_tiny(tmp_path / "other")
    done = mixtral_run("verify", "--load", str(small_hf_model), "--against", str(tmp_path / "other"))
    assert done.returncode == 4
