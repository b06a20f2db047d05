"""`mixtral-run convert --from-megatron`: the HF model again, bit by bit, from any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.manifest.manifest import read_values
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from tests.multiprocess.conftest import torchrun
from tests.multiprocess.verbs.test_export import ALL, hf_tensors_of, write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly, run_cli
from tests.multiprocess.weights.test_verify import flip_bit
from tests.support.tiny import write_tiny


@pytest.mark.parametrize("layout", [(1, 1), (2, 4), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr("mixtral_run.weights.convert.to_hf.SHARD_BYTES", 300_000)
    monkeypatch.setattr("mixtral_run.weights.hf.stored_tensors._BLOCK_BYTES", 3000)
    tensors = write_tiny(tmp_path / "hf", dtype=dtype)
    fingerprint = convert_quietly(tmp_path / "hf", tmp_path / "megatron", *layout)
    config = ConvertConfig(from_megatron=tmp_path / "megatron", output_path=tmp_path / "again")
    result = to_hf(config, Report.silent())
    assert result.fingerprint == fingerprint
    assert result.num_files == len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    found = hf_tensors_of(tmp_path / "again")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert convert_quietly(tmp_path / "again", tmp_path / "third", 2, 2) == fingerprint


@pytest.mark.parametrize("layout", [(1, 1), (2, 4), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_an_adapter_it_is_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit by bit what `export --merge` makes of the HF model, in blocks that cut through query groups."""
    monkeypatch.setattr("mixtral_run.weights.adapter.merge.BLOCK_BYTES", 3000)
    tensors = write_tiny(tmp_path / "hf", dtype=dtype)
    convert_quietly(tmp_path / "hf", tmp_path / "base", *layout)
    write_adapter(tmp_path, tmp_path / "adapter", ALL)
    merged = ExportConfig(
        adapter=(str(tmp_path / "adapter"),), hf_model_path=tmp_path / "hf", output_path=tmp_path / "merged", merge=True
    )
    export(merged, Report.silent())
    config = ConvertConfig(
        from_megatron=tmp_path / "base", adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "again"
    )
    to_hf(config, Report.silent())
    expected, found = (hf_tensors_of(tmp_path / name) for name in ("merged", "again"))
    assert set(found) == set(expected) == set(tensors)
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert sum(not torch.equal(found[name], tensors[name]) for name in tensors) == 2 * (4 + 3 * 8)
    assert "fingerprint" not in read_values(tmp_path / "again")
    # It is a model like any other: another conversion takes it, with a fingerprint of its own.
    assert (
        convert_quietly(tmp_path / "again", tmp_path / "third", 2, 2) != read_values(tmp_path / "base")["fingerprint"]
    )


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    write_adapter(tmp_path, tmp_path / "adapter", ("linear_qkv",))
    write_tiny(tmp_path / "other", seed=5)
    convert_quietly(tmp_path / "other", tmp_path / "elsewhere", 2, 4)
    flags = ("--output-path", tmp_path / "out", "--adapter", tmp_path / "adapter")
    done = run_cli("convert", "--from-megatron", tmp_path / "elsewhere", *flags)
    assert done.returncode == WeightsError.exit_code
    assert "trained on another base" in done.stderr
    done = run_cli("convert", "--hf-model-path", tmp_path / "hf", *flags)
    assert done.returncode == ConfigError.exit_code
    assert "--adapter: expected --from-megatron" in done.stderr
    assert not (tmp_path / "out").exists()


def test_written_in_a_pipeline(tmp_path: Path) -> None:
    """megatron-core loads the checkpoint into two pipeline stages and saves it again: the same HF model comes back."""
    tensors = write_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    shutil.copytree(tmp_path / "base", tmp_path / "pipeline")
    written = tmp_path / "pipeline" / "iter_0000001"
    shutil.rmtree(written)
    written.mkdir()
    worker = Path(__file__).parent / "pipeline_worker.py"
    torchrun(2, worker, str(tmp_path / "base" / "iter_0000001"), str(written))
    with Reader(written) as reader:
        # A stage writes its own layers: no file has both.
        files = {item.offset[0]: item.file for item in reader.chunks(hf_to_megatron.LINEAR_QKV_KEY) if item.offset}
        assert len(set(files.values())) == len(files) == 2
    to_hf(ConvertConfig(from_megatron=tmp_path / "pipeline", output_path=tmp_path / "again"), Report.silent())
    found = hf_tensors_of(tmp_path / "again")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (
        run_cli("verify", "--load", tmp_path / "pipeline", "--against", tmp_path / "hf", "--no-logits").returncode == 0
    )


def trained_elsewhere(base: Path, folder: Path, keys: str) -> None:
    """BASE trained on to iteration 100 in FOLDER, which has what Megatron-LM writes."""
    written = folder / "iter_0000100"
    written.mkdir(parents=True)
    worker = Path(__file__).parent / "trained_elsewhere_worker.py"
    torchrun(2, worker, str(base / "iter_0000001"), str(written), keys)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


@pytest.mark.parametrize("keys", ["te", "local"])
def test_trained_on_by_megatron(tmp_path: Path, keys: str) -> None:
    """No file of ours, the optimizer beside the weights, other numbers: the HF model of those, and a warning."""
    tensors = write_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    fingerprint = convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    trained = tmp_path / "trained"
    trained_elsewhere(tmp_path / "base", trained, keys)
    flags = ("--from-megatron", trained, "--output-path", tmp_path / "again")
    refusal = run_cli("convert", *flags)
    assert refusal.returncode == WeightsError.exit_code
    assert "with --hf-model-path HF_DIR" in refusal.stderr
    done = run_cli("convert", *flags, "--hf-model-path", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "has no proof.json" in done.stdout

    def is_doubled(folder: Path) -> bool:
        found = hf_tensors_of(folder)
        assert set(found) == set(tensors)
        return all(torch.equal(found[name], tensor * 2) for name, tensor in tensors.items())

    assert is_doubled(tmp_path / "again")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    # It is a model like any other, and known by what it holds.
    assert (
        convert_quietly(tmp_path / "again", tmp_path / "third", 2, 2) == read_values(tmp_path / "again")["fingerprint"]
    )
    # Saved into the folder of the conversion, which says what it is.
    shutil.copytree(trained, tmp_path / "base", dirs_exist_ok=True)
    done = run_cli("convert", "--from-megatron", tmp_path / "base", "--output-path", tmp_path / "within")
    assert done.returncode == 0, done.stderr
    assert f"not those that were converted ({fingerprint})" in done.stdout
    assert is_doubled(tmp_path / "within")
    # The converted iteration is still there, and has to be what it was.
    first = ConvertConfig(from_megatron=tmp_path / "base" / "iter_0000001", output_path=tmp_path / "first")
    assert to_hf(first, Report.silent()).fingerprint == fingerprint


def test_what_an_hf_model_cannot_hold_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    write_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    convert_quietly(tmp_path / "hf", tmp_path / "base", 1, 1)
    with Reader(tmp_path / "base" / "iter_0000001") as reader:
        state = {key: torch.zeros(info.shape, dtype=torch.bfloat16) for key, info in reader.tensors.items()}
    vocabulary, hidden = state[hf_to_megatron.EMBEDDING_KEY].shape
    state[hf_to_megatron.EMBEDDING_KEY] = torch.zeros(vocabulary + 64, hidden, dtype=torch.bfloat16)
    state[hf_to_megatron.LINEAR_QKV_KEY.replace("weight", "bias")] = torch.zeros(2, 5)
    state[hf_to_megatron.ROUTER_KEY] = torch.zeros(2, 4, hidden)
    iteration = tmp_path / "other" / "iter_0000007"
    dcp.save(state, checkpoint_id=iteration, no_dist=True)
    config = ConvertConfig(from_megatron=iteration, hf_model_path=str(tmp_path / "hf"), output_path=tmp_path / "again")
    with pytest.raises(WeightsError) as caught:
        to_hf(config, Report.silent())
    assert len(caught.value.problems) == 2  # the vocabulary's padding is no fault
    assert "linear_qkv.bias: a Mixtral model has no such weights" in str(caught.value)
    assert f"{hf_to_megatron.ROUTER_KEY}: expected shape [2, 8, {hidden}]; found [2, 4, {hidden}]" in str(caught.value)
    state.pop(hf_to_megatron.LINEAR_QKV_KEY.replace("weight", "bias"))
    state[hf_to_megatron.ROUTER_KEY] = torch.zeros(2, 8, hidden)  # fp32, as some runs keep it
    shutil.rmtree(iteration)
    dcp.save(state, checkpoint_id=iteration, no_dist=True)
    to_hf(config, Report.silent())
    found = hf_tensors_of(tmp_path / "again")
    assert found["model.embed_tokens.weight"].shape == (vocabulary, hidden)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_through_the_command_line(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "megatron", 2, 4)
    flags = ("--from-megatron", tmp_path / "megatron", "--output-path", tmp_path / "again")
    done = run_cli("convert", *flags)
    assert done.returncode == 0, done.stderr
    assert "✓ Conversion complete\n" in done.stdout
    assert f"next: mixtral-run generate --load {tmp_path / 'again'} --instruction …" in done.stdout
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens) for name in ("hf", "again"))
    assert torch.equal(first.logits, second.logits)
    neither = run_cli("convert", "--output-path", tmp_path / "again")
    assert neither.returncode == ConfigError.exit_code
    assert "found neither" in neither.stderr


def test_a_checkpoint_that_is_not_what_was_converted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    convert_quietly(tmp_path / "hf", tmp_path / "megatron", 2, 4)
    flip_bit(tmp_path / "megatron", hf_to_megatron.LINEAR_PROJ_KEY, (1,), 3, 7)
    config = ConvertConfig(from_megatron=tmp_path / "megatron", output_path=tmp_path / "again")
    with pytest.raises(WeightsError, match="not those that were converted"):
        to_hf(config, Report.silent())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "megatron"]
