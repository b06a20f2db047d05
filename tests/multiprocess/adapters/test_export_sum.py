"""`export --adapter A:0.7 --adapter B:-0.3`: the sum of several adapters, as peft and torch compute it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.manifest.manifest import read_values
from tests.multiprocess.verbs.test_export import ALL, deltas, hf_model, hf_tensors_of, logits_of, write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.references import vllm_lora_loader
from tests.support.tiny import write_shards, write_tiny

SOME = ("linear_qkv", "linear_fc1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, base/, two adapters that differ in all settings, and expected/: the model with 0.7·A - 0.3·B."""
    root = tmp_path_factory.mktemp("sum")
    write_tiny(root / "hf")
    convert_quietly(root / "hf", root / "base", 2, 4)
    first = write_adapter(root, root / "first", ALL)
    second = write_adapter(root, root / "second", SOME, rank=3, seed=5, lora_alpha=6.0, lora_scaling="rslora")
    architecture = MixtralArchitecture.from_hf_directory(root / "hf")
    parts = [(0.7, deltas(architecture, first)), (-0.3, deltas(architecture, second, 6 / math.sqrt(3)))]
    tensors = hf_tensors_of(root / "hf")
    for weight, part in parts:
        for name, delta in part.items():
            tensors[name] = tensors[name] + weight * delta
    (root / "expected").mkdir()
    write_shards(root / "expected", tensors, 1)
    (root / "expected" / "config.json").write_text((root / "hf" / "config.json").read_text())
    return root


@pytest.fixture(scope="module")
def expected(made: Path) -> torch.Tensor:
    return logits_of(hf_model(made / "expected"))


def summed(made: Path, folder: Path, *weights: float, **settings: object) -> Path:
    names = (f"{made / 'first'}:{weights[0]}", f"{made / 'second'}:{weights[1]}")
    export(ExportConfig(adapter=names, output_path=folder, **settings).check(), Report.silent())
    return folder


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_peft_computes_the_sum(made: Path, expected: torch.Tensor, tmp_path: Path, layout: str) -> None:
    from peft import PeftModel

    folder = summed(made, tmp_path / "peft", 0.7, -0.3, format=layout)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 7
    assert sorted(config["rank_pattern"].values()) == [4, 4]
    found = logits_of(PeftModel.from_pretrained(hf_model(made / "hf"), str(folder)).eval())
    assert (found - expected).abs().max() <= 1e-5
    assert (found - logits_of(hf_model(made / "hf"))).abs().max() > 0.05
    recorded = read_values(folder)["adapters"]
    assert [(each["weight"], each["lora"]["lora_rank"]) for each in recorded] == [(0.7, 4), (-0.3, 3)]


def test_engines_get_one_rank_and_one_scale(made: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    folder = summed(made, tmp_path / "vllm", 0.7, -0.3, format="vllm")
    modules, scaling = vllm_lora_loader.load(folder, 2, 8, 8)
    (tmp_path / "found").mkdir()
    write_shards(tmp_path / "found", vllm_lora_loader.add_to(hf_tensors_of(made / "hf"), modules, scaling), 1)
    (tmp_path / "found" / "config.json").write_text((made / "hf" / "config.json").read_text())
    assert (logits_of(hf_model(tmp_path / "found")) - expected).abs().max() <= 1e-5
    assert "rank_pattern" not in json.loads((folder / "adapter_config.json").read_text())


def test_merged_by_export_and_by_convert(made: Path, tmp_path: Path) -> None:
    merged = hf_tensors_of(summed(made, tmp_path / "merged", 0.7, -0.3, merge=True, hf_model_path=made / "hf"))
    for name, tensor in hf_tensors_of(made / "expected").items():
        assert (merged[name] - tensor).abs().max() <= 2e-6, name
    names = (f"{made / 'first'}:0.7", f"{made / 'second'}:-0.3")
    to_hf(ConvertConfig(from_megatron=made / "base", adapter=names, output_path=tmp_path / "other"), Report.silent())
    other = hf_tensors_of(tmp_path / "other")
    assert all(torch.equal(other[name], tensor) for name, tensor in merged.items())


def test_attention_equals_peft_add_weighted_adapter(made: Path, tmp_path: Path) -> None:
    """PEFT adds no adapters on experts that transformers 5 stacks; these are in the other tests."""
    from peft import PeftModel

    for name, rank, seed in (("one", 4, 7), ("two", 2, 8)):
        write_adapter(made, tmp_path / name, ALL[:2], rank=rank, seed=seed)
        export(ExportConfig(adapter=(str(tmp_path / name),), output_path=tmp_path / f"{name}-peft"), Report.silent())
    model = PeftModel.from_pretrained(hf_model(made / "hf"), str(tmp_path / "one-peft"), adapter_name="one").eval()
    model.load_adapter(str(tmp_path / "two-peft"), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.25, 1.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    names = (f"{tmp_path / 'one'}:0.25", f"{tmp_path / 'two'}:1.5")
    export(ExportConfig(adapter=names, output_path=tmp_path / "sum"), Report.silent())
    found = logits_of(PeftModel.from_pretrained(hf_model(made / "hf"), str(tmp_path / "sum")).eval())
    assert (found - logits_of(model)).abs().max() <= 1e-5


def test_what_cannot_be_added_is_refused_in_words(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "other" / "hf", seed=9)
    convert_quietly(tmp_path / "other" / "hf", tmp_path / "other" / "base", 2, 4)
    write_adapter(tmp_path / "other", tmp_path / "stranger", ALL)
    with pytest.raises(WeightsError, match="different bases") as caught:
        export(ExportConfig(adapter=(str(made / "first"), "stranger"), output_path=tmp_path / "out"), Report.silent())
    assert "stranger: fingerprint" in str(caught.value)
    for folder in ("plain", "both", "both:2"):
        (tmp_path / folder).mkdir()
    wrong = {
        ("plain:much",): "expected a number after the last colon, as in plain:0.5; found 'much'",
        ("plain:nan",): "expected a finite weight other than 0; found nan",
        ("plain:0", "both:1"): "expected a finite weight other than 0; found 0",
        ("both:2",): "both:2 and both are both there",
        ("plain", "plain:1"): "expected a weight for every adapter or for none; found none for plain",
        ("",): r"expected PATH\[:WEIGHT\]; found ''",
    }
    for texts, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            ExportConfig(adapter=texts, output_path=tmp_path / "out").check()
    assert ExportConfig.from_mapping({"adapter": "plain:0.5", "output_path": "o"}).check().adapter == ("plain:0.5",)
    assert not (tmp_path / "out").exists()
