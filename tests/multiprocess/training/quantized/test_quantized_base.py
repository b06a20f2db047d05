"""A checkpoint loaded with its experts in 8 or 4 bit, and the verb that trains on it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.kernels.quantized.quantized_mm import quantize_to
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.load_model import load_for_training
from mixtral_run.train.metrics import read_metrics
from mixtral_run.trial.sizes import INSTRUCTIONS
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from tests.multiprocess.conftest import mixtral_run


@pytest.mark.parametrize(("precision", "start"), [("fp8", "checkpoint"), ("nf4", "checkpoint"), ("nf4", "hf_model")])
def test_every_layer_is_the_bases_quantized(
    small_checkpoint: Path, small_hf_model: Path, tmp_path: Path, precision: str, start: str
) -> None:
    config = FinetuneConfig(
        load={"checkpoint": small_checkpoint, "hf_model": small_hf_model}[start],
        save=tmp_path / "a",
        mock_data=True,
        device="cpu",
        tensor_model_parallel_size=1,
        expert_model_parallel_size=1,
        base_precision=precision,
        attention_precision="fp8" if precision == "nf4" else "bf16",
    ).check()
    base, whole_base = describe_base(config.load), describe_base(small_checkpoint)
    lora = LoraSettings(4, 8.0, 0.0, config.lora_target_modules, 1)
    with open_mesh(config) as mesh:
        in_bf16 = dataclasses.replace(config, attention_precision="bf16")
        whole = load_for_training(in_bf16, whole_base, mesh, lora, recompute="none")
        small = load_for_training(config, base, mesh, lora, recompute="none", base_precision=precision)
        pairs = list(zip(whole.gpt.decoder.layers, small.gpt.decoder.layers, strict=True))
        assert len(pairs) == 2
        for full, eight in pairs:
            for name in ("linear_fc1", "linear_fc2"):
                values, scales = quantize_to(getattr(full.mlp.experts, name).weight, precision)
                linear = getattr(eight.mlp.experts, name)
                assert linear.weight is None
                assert torch.equal(linear.values.view(torch.uint8), values.view(torch.uint8))
                assert torch.equal(linear.scales, scales)
            assert_attention(full.self_attention, eight.self_attention, config.attention_precision)


def assert_attention(full: Any, eight: Any, precision: str) -> None:
    for name in ("linear_qkv", "linear_proj"):
        mine, weight = getattr(eight, name), getattr(full, name).weight
        if precision == "bf16":
            assert torch.equal(mine.weight, weight)
            continue
        values, scales = quantize_to(weight, precision)
        assert mine.weight is None and torch.equal(mine.quantized.scales[0], scales)
        assert torch.equal(mine.quantized.values.view(torch.uint8), values.view(torch.uint8))


def test_the_verb_trains_packed_on_two_processes_and_resumes(own_checkpoint: Path, tmp_path: Path) -> None:
    words = ["finetune", "--load", str(own_checkpoint), "--data-path", str(INSTRUCTIONS), "--save"]
    settings = ["--layout", "auto", "--device", "cpu", "--seq-length", "128", "--lr", "3e-3", "--pack"]
    losses = {}
    for precision in ("bf16", "fp8"):
        save = tmp_path / precision
        flags = [*words, str(save), *settings, "--base-precision", precision, "--recompute", "selective"]
        flags += ["--attention-precision", precision]
        done = mixtral_run(*flags, "--train-iters", "3", "--save-interval", "2")
        assert done.returncode == 0, done.stderr
        assert "as TP1/EP2" in done.stdout and "examples packed into" in done.stdout
        losses[precision] = [each["loss"] for each in read_metrics(save / "metrics.jsonl")]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.01)
    assert losses["fp8"] != losses["bf16"]
    assert json.loads((tmp_path / "fp8" / "summary.json").read_text())["attention_precision"] == "fp8"
    more = mixtral_run(*flags, "--train-iters", "4", "--resume")
    assert more.returncode == 0, more.stderr
    assert describe_adapter(tmp_path / "fp8").iteration == 4
