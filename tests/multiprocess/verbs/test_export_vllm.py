"""`export --format vllm`, read by a loader written from vLLM's key scheme (not vLLM itself).

The loader is tests/support/references/vllm_lora_loader.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.adapter.peft_layouts import max_lora_rank
from tests.multiprocess.verbs.test_export import (
    ALL,
    ALPHA,
    RANK,
    hf_model,
    hf_tensors_of,
    logits_of,
    merged_by_hand,
    write_adapter,
)
from tests.multiprocess.weights.test_convert import convert_quietly, run_cli
from tests.support.references import vllm_lora_loader
from tests.support.tiny import write_shards, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and its converted checkpoint base/."""
    root = tmp_path_factory.mktemp("base")
    write_tiny(root / "hf")
    convert_quietly(root / "hf", root / "base", 2, 4)
    return root


def model_of(base: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    folder.mkdir()
    write_shards(folder, tensors, 1)
    (folder / "config.json").write_text((base / "hf" / "config.json").read_text())
    return logits_of(hf_model(folder))


@pytest.mark.parametrize("targets", [ALL, ALL[:2], ("linear_fc1",), ("linear_fc2",), ("linear_qkv",), ("linear_proj",)])
def test_a_loader_of_its_scheme_gives_the_merged_models_logits(
    base: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", targets)
    export(
        ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "vllm", format="vllm"),
        Report.silent(),
    )
    a = MixtralArchitecture.from_hf_directory(base / "hf")
    modules, scaling = vllm_lora_loader.load(tmp_path / "vllm", a.num_layers, a.num_experts, 16)
    assert scaling == ALPHA / RANK
    found = model_of(base, tmp_path / "found", vllm_lora_loader.add_to(hf_tensors_of(base / "hf"), modules, scaling))
    expected = model_of(base, tmp_path / "expected", merged_by_hand(base, adapter))
    assert (found - expected).abs().max() <= 1e-5
    assert (found - logits_of(hf_model(base / "hf"))).abs().max() > 0.01


@pytest.mark.parametrize("target", ["linear_fc1", "linear_fc2"])
def test_every_expert_has_all_three(base: Path, tmp_path: Path, target: str) -> None:
    write_adapter(base, tmp_path / "adapter", (target,))
    flags = ("--adapter", tmp_path / "adapter", "--output-path", tmp_path / "vllm", "--format", "vllm")
    done = run_cli("export", *flags)
    assert done.returncode == 0, done.stderr
    added = "linear_fc2" if target == "linear_fc1" else "linear_fc1"
    assert f"{added} was not trained and is written as zeros" in done.stdout
    assert "--enable-lora --max-lora-rank 8" in done.stdout
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    a = MixtralArchitecture.from_hf_directory(base / "hf")
    assert len(tensors) == a.num_layers * a.num_experts * 3 * 2
    zeros = {key.split(".")[-3] for key, tensor in tensors.items() if not tensor.any()}
    assert zeros == ({"w2"} if target == "linear_fc1" else {"w1", "w3"})
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["w1", "w2", "w3"]
    assert (config["r"], config["lora_alpha"], config["bias"], config["target_parameters"]) == (RANK, 10, "none", None)


def test_the_loader_refuses_what_vllm_refuses(base: Path, tmp_path: Path) -> None:
    """The layout for PEFT with linear_fc2 alone leaves w1 and w3 out: without the third layout vLLM would fail."""
    write_adapter(base, tmp_path / "adapter", ("linear_fc2",))
    export(ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "peft"), Report.silent())
    with pytest.raises(AssertionError, match="w1, w2 and w3"):
        vllm_lora_loader.load(tmp_path / "peft", 2, 8, 16)
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        vllm_lora_loader.load(tmp_path / "peft", 2, 8, 2)
    write_adapter(base, tmp_path / "all", ALL)
    fused = ExportConfig(adapter=(str(tmp_path / "all"),), output_path=tmp_path / "fused", format="peft-fused")
    export(fused, Report.silent())
    with pytest.raises(ValueError, match="expected target modules"):
        vllm_lora_loader.load(tmp_path / "fused", 2, 8, 16)


def test_max_lora_rank() -> None:
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 16, 64, 300, 513)] == [1, 8, 16, 16, 64, 320, 513]
