"""`--train-also` and `--router-aux-loss` against HF's Mixtral, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.config.lora import TRAINED_ALSO
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.adapters.trained_also import is_trained_also
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.checkpoint import load_adapter
from mixtral_run.train.checkpoints.init_adapter import with_adapter_settings
from mixtral_run.train.data.samples import MicroBatch
from mixtral_run.train.load_model import load_for_inference, load_for_training
from mixtral_run.train.steps.step import EagerBackward, adapter_optimizer
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.adapter.given_adapter import describe_given_adapter
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from tests.multiprocess.verbs.test_export import hf_model, hf_tensors_of
from tests.support.adapters import save_adapter

LENGTHS = (9, 5)


def config_of(load: Path, **more: Any) -> FinetuneConfig:
    values = {"load": load, "save": Path("s"), "mock_data": True, "dtype": "fp32", "train_also": TRAINED_ALSO}
    return FinetuneConfig(**values | more).check()


def model_of(config: FinetuneConfig, mesh: Mesh) -> MixtralModel:
    lora = LoraSettings.from_config(config)
    return load_for_training(config, describe_base(config.load), mesh, lora, recompute=config.recomputation)


def batch() -> MicroBatch:
    """Two rows of different lengths, padded with zeros; their last tokens are learned."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 500, (2, 9), generator=generator)
    labels, mask = tokens.roll(-1, 1), torch.zeros(2, 9)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = 0
        mask[row, 2:length] = 1
    return MicroBatch(tokens, labels, mask, torch.arange(9).expand(2, 9))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_losses_and_gradients_are_those_of_hf(mesh: Mesh, small_hf_model: Path, recompute: str) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    micro = batch()
    model = model_of(config_of(small_hf_model, router_aux_loss=0.5, recompute=recompute), mesh)
    loss = EagerBackward(model)(micro, int(micro.loss_mask.sum()))
    theirs = hf_model(small_hf_model)
    attention = torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]
    found = theirs(micro.tokens, attention_mask=attention.long(), output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(found.logits.transpose(1, 2), micro.labels, reduction="none")
    plain = (cross_entropy * micro.loss_mask).sum() / micro.loss_mask.sum()
    balance = load_balancing_loss_func(found.router_logits, 8, 2, attention.long())
    (plain + 0.5 * balance).backward()
    assert balance > 1.9
    assert float(loss) == pytest.approx(float(plain + 0.5 * balance), abs=1e-5)
    ours = dict(model.gpt.named_parameters())
    pairs = {
        "embedding.word_embeddings.weight": theirs.model.embed_tokens,
        "output_layer.weight": theirs.lm_head,
        "decoder.final_layernorm.weight": theirs.model.norm,
    }
    for number, layer in enumerate(theirs.model.layers):
        pairs |= {
            f"decoder.layers.{number}.mlp.router.weight": layer.mlp.gate,
            f"decoder.layers.{number}.input_layernorm.weight": layer.input_layernorm,
            f"decoder.layers.{number}.pre_mlp_layernorm.weight": layer.post_attention_layernorm,
        }
    trained = {name for name, each in ours.items() if each.requires_grad and "linear_" not in name}
    assert trained == set(pairs)
    for name, module in pairs.items():
        gradient = module.weight.grad
        assert (ours[name].grad[: len(gradient)] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_a_model_in_bf16_computes_as_a_frozen_one_and_has_fp32_weights(mesh: Mesh, small_hf_model: Path) -> None:
    plain, also = (
        model_of(config_of(small_hf_model, dtype="bf16", train_also=each), mesh) for each in ((), TRAINED_ALSO)
    )
    micro = batch()
    for name, parameter in also.named_parameters():
        if is_trained_also(name, also.settings.lora):
            assert parameter.dtype is torch.float32
            # The file has more digits than the frozen model in bf16.
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        assert torch.equal(plain.logits(micro.tokens), also.logits(micro.tokens))
    EagerBackward(also)(micro, 9)
    trained = [each for name, each in also.named_parameters() if each.requires_grad]
    assert all(each.dtype is torch.float32 and each.grad is not None for each in trained)
    norms = adapter_optimizer(also, config_of(small_hf_model)).param_groups[1]
    assert (norms["weight_decay"], len(norms["params"])) == (0.0, 5)


@pytest.fixture(scope="module")
def trained(mesh: Mesh, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose norms, routers and vocabulary are not those of the base."""
    folder, config = tmp_path_factory.mktemp("also") / "adapter", config_of(small_checkpoint, lora_rank=2)
    model, base = model_of(config, mesh), describe_base(small_checkpoint)
    optimizer = adapter_optimizer(model, config)
    EagerBackward(model)(batch(), 9)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step()
    description = {
        "dtype": "float32",
        "lora": LoraSettings.from_config(config).to_mapping(),
        "base": {"fingerprint": base.fingerprint, "path": None},
    }
    save_adapter(model, optimizer, folder, 1, description)
    return folder


def test_the_base_alone_is_the_base(mesh: Mesh, trained: Path, small_checkpoint: Path) -> None:
    config, base, tokens = config_of(small_checkpoint), describe_base(small_checkpoint), batch().tokens
    expected = load_for_inference(config, base, mesh, None).logits(tokens)
    model = load_for_inference(config, base, mesh, describe_adapter(trained))
    before = model.logits(tokens)
    with without_adapters(model):
        assert torch.equal(model.logits(tokens), expected)
    assert torch.equal(model.logits(tokens), before)
    assert (before - expected).abs().max() > 0.05


def test_an_adapter_without_such_weights_is_a_start_for_them(
    mesh: Mesh, trained: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """An adapter that trained the norms, and one that PEFT saved: what they lack stays that of the base."""
    config = config_of(small_checkpoint, lora_rank=2, train_also=("norms",))
    model = model_of(config, mesh)
    description = {
        "dtype": "float32",
        "lora": LoraSettings.from_config(config).to_mapping(),
        "base": {"fingerprint": describe_base(small_checkpoint).fingerprint, "path": None},
    }
    with torch.no_grad():
        model.gpt.decoder.final_layernorm.weight.fill_(3.0)
    save_adapter(model, adapter_optimizer(model, config), tmp_path / "norms", 1, description)
    peft = ExportConfig(adapter=(str(tmp_path / "norms"),), output_path=tmp_path / "peft")
    write_adapter_config_without_norms(export(peft, Report.silent()).output_path)
    started = with_adapter_settings(
        config_of(small_checkpoint, init_adapter=tmp_path / "norms", train_also=("router",))
    )
    assert (started.lora_rank, started.train_also) == (2, ("norms", "router"))
    for folder, norm in ((tmp_path / "norms", 3.0), (tmp_path / "peft", None)):
        fresh = model_of(config_of(small_checkpoint, lora_rank=2), mesh)
        before = {name: each.detach().clone() for name, each in fresh.gpt.named_parameters()}
        load_adapter(fresh, describe_given_adapter(folder, fresh.architecture))
        after = dict(fresh.gpt.named_parameters())
        assert torch.equal(after["output_layer.weight"], before["output_layer.weight"])
        expected = before["decoder.final_layernorm.weight"] if norm is None else torch.full((64,), norm)
        assert torch.equal(after["decoder.final_layernorm.weight"], expected)


def write_adapter_config_without_norms(folder: Path) -> None:
    """Leave out of a PEFT directory what is no LoRA, which `--init-adapter` refuses."""
    file, tensors = folder / "adapter_config.json", load_file(folder / "adapter_model.safetensors")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    assert len(lora) < len(tensors)
    save_file(lora, folder / "adapter_model.safetensors")


def test_merged_weights_are_those_that_were_trained(
    mesh: Mesh, trained: Path, small_checkpoint: Path, small_hf_model: Path, tmp_path: Path
) -> None:
    merged = ExportConfig(
        adapter=(str(trained),), output_path=tmp_path / "merged", merge=True, hf_model_path=small_hf_model
    )
    export(merged, Report.silent())
    to_hf(
        ConvertConfig(from_megatron=small_checkpoint, adapter=(str(trained),), output_path=tmp_path / "other"),
        Report.silent(),
    )
    found, before = hf_tensors_of(tmp_path / "merged"), hf_tensors_of(small_hf_model)
    other = hf_tensors_of(tmp_path / "other")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], other[name]) for name in before)
    changed = [name for name in before if not torch.equal(found[name], before[name])]
    dense = [name for name in before if ".experts." not in name and "_proj." not in name]
    assert len(dense) == 3 + 3 * 2 and set(dense) <= set(changed)
    config = config_of(small_checkpoint)
    model = load_for_inference(config, describe_base(small_checkpoint), mesh, describe_adapter(trained))
    tokens = batch().tokens[:1]
    with torch.inference_mode():
        difference = hf_model(tmp_path / "merged")(tokens).logits - model.logits(tokens)
    assert difference.abs().max() < 1e-4


def test_what_cannot_carry_these_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    out = ExportConfig(adapter=(str(trained),), output_path=tmp_path / "out", format="vllm")
    with pytest.raises(ConfigError, match="engines read no modules_to_save, and the adapter has embeddings, lm_head"):
        export(out, Report.silent())
    with pytest.raises(WeightsError, match="brings weights of the base"):
        export(replace(out, format="peft", adapter=(f"{trained}:0.5",)), Report.silent())
    with pytest.raises(ConfigError, match="--router-aux-loss: expected --train-also router"):
        config_of(trained, train_also=("norms",), router_aux_loss=0.1)
