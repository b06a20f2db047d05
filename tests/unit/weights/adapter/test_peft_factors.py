"""Adapters that PEFT saved: what they add to each weight is what PEFT itself merges into it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.adapter.given_adapter import PeftDescription, describe_given_adapter
from mixtral_run.weights.adapter.schema import LINEAR_KEYS
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors, row_ranges
from tests.support.references.model_cases import write_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")
FUSED = "base_model.model.model.layers.{}.mlp.experts.{}lora_{}.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model", torch.float32, intermediate_size=48)


def hf_model(hf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)


def trained_by_peft(hf: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors as PEFT saves it. Return what PEFT adds to each tensor of the base."""
    import peft

    plain = {name: each.clone() for name, each in hf_model(hf).state_dict().items()}
    model = peft.get_peft_model(hf_model(hf), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return {name: merged[name] - plain[name] for name in plain}


def in_released_layout(architecture: MixtralArchitecture, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found, ffn = {}, architecture.ffn_hidden_size
    for name in hf_tensors(architecture):
        before, _, after = name.partition(".block_sparse_moe.")
        if not after or after == "gate.weight":
            found[name] = state[name.replace("block_sparse_moe", "mlp")]
            continue
        _, expert, projection, _ = after.split(".")
        fused = state[f"{before}.mlp.experts.{'down_proj' if projection == 'w2' else 'gate_up_proj'}"][int(expert)]
        found[name] = {"w1": fused[:ffn], "w3": fused[ffn:], "w2": fused}[projection]
    return found


def added(description: PeftDescription, architecture: MixtralArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """What the kit's adapter adds to each HF tensor, with its rows taken out of Megatron's by the map of weights."""
    factors, lora = description.factors, description.lora
    modules = {LINEAR_KEYS[module]: module for module in lora.target_modules}
    for name, place in row_ranges(architecture).items():
        if place.key in modules:
            a = factors.linear_in(modules[place.key], place.leading)
            b = factors.linear_out(modules[place.key], place.leading)
            assert a.shape[0] == b.shape[1] == lora.rank
            rows = torch.cat([b[start:stop] for start, stop in place.rows])
            yield name, lora.scale * rows @ a


def check_equal(folder: Path, hf: Path, expected: dict[str, torch.Tensor]) -> PeftDescription:
    architecture = MixtralArchitecture.from_hf_directory(hf)
    description = describe_given_adapter(folder, architecture)
    assert isinstance(description, PeftDescription)
    wanted, found = in_released_layout(architecture, expected), dict(added(description, architecture))
    for name, change in wanted.items():
        if name in found:
            torch.testing.assert_close(found[name], change, atol=1e-6, rtol=1e-5, msg=name)
        else:
            assert not change.any(), name
    assert any(change.any() for change in wanted.values())
    return description


@pytest.mark.parametrize(
    ("settings", "rank", "targets"),
    [
        # q, k and v have an A each: their ranks add up.
        ({"target_modules": list(ATTENTION)}, 12, ("linear_qkv", "linear_proj")),
        ({"target_modules": ["q_proj", "v_proj"]}, 8, ("linear_qkv",)),
        ({"target_modules": ["o_proj"], "use_rslora": True}, 4, ("linear_proj",)),
        ({"target_modules": ["k_proj"], "layers_to_transform": [1]}, 4, ("linear_qkv",)),
        (
            {
                "target_modules": list(ATTENTION),
                "rank_pattern": {"q_proj": 7},
                "alpha_pattern": {"layers.1.*.v_proj": 3},
            },
            15,
            ("linear_qkv", "linear_proj"),
        ),
        (
            {"target_modules": ["o_proj"], "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS]},
            4,
            ("linear_proj", "linear_fc1", "linear_fc2"),
        ),
        ({"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, 4, ("linear_fc2",)),
    ],
)
def test_what_peft_saved_adds_what_peft_merges(
    hf: Path, tmp_path: Path, settings: dict[str, Any], rank: int, targets: tuple[str, ...]
) -> None:
    expected = trained_by_peft(hf, tmp_path / "peft", **settings)
    description = check_equal(tmp_path / "peft", hf, expected)
    assert (description.lora.rank, description.lora.target_modules) == (rank, targets)


@pytest.mark.parametrize("old", [False, True])
def test_stacked_experts_of_both_axis_orders(hf: Path, tmp_path: Path, old: bool) -> None:
    """PEFT before 0.20 exchanged the axes: A had the outputs, B the inputs of the weight."""
    parameters = [f"mlp.experts.{name}" for name in EXPERTS]
    expected = trained_by_peft(hf, tmp_path / "peft", target_modules=[], target_parameters=parameters)
    if old:
        file = tmp_path / "peft" / "adapter_model.safetensors"
        tensors, experts, exchanged = load_file(file), 4, {}
        for layer in range(2):
            for inner in ("", "base_layer."):
                a, b = (tensors[FUSED.format(layer, inner, half)] for half in "AB")
                a, b = a.view(experts, 4, -1), b.view(b.shape[0], 4, experts)
                exchanged[FUSED.format(layer, inner, "A")] = b.permute(2, 1, 0).reshape(experts * 4, -1).contiguous()
                exchanged[FUSED.format(layer, inner, "B")] = a.permute(2, 1, 0).reshape(a.shape[2], -1).contiguous()
        save_file(exchanged, file)
    check_equal(tmp_path / "peft", hf, expected)


def test_an_adapter_for_each_expert_and_a_pickled_one(hf: Path, tmp_path: Path) -> None:
    """As PEFT saved them with transformers 4: a pair of factors for each expert's w1, w2 and w3."""
    architecture = MixtralArchitecture.from_hf_directory(hf)
    generator, tensors, expected = torch.Generator().manual_seed(1), {}, {}
    for name, shape in hf_tensors(architecture).items():
        expected[name] = torch.zeros(shape)
        if ".experts." in name:
            a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
            expected[name] = 2.0 * b @ a
    (tmp_path / "peft").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    description = describe_given_adapter(tmp_path / "peft", architecture)
    assert isinstance(description, PeftDescription) and description.lora.rank == 8
    found = dict(added(description, architecture))
    assert len(found) == 2 * 4 * 3
    for name, change in found.items():
        torch.testing.assert_close(change, expected[name], atol=1e-4, rtol=1e-5, msg=name)


def test_the_config_of_this_peft_has_no_problems_and_unknown_settings_are_refused_by_name(
    hf: Path, tmp_path: Path
) -> None:
    trained_by_peft(hf, tmp_path / "peft", target_modules=["o_proj"])
    architecture, file = MixtralArchitecture.from_hf_directory(hf), tmp_path / "peft" / "adapter_config.json"
    original = json.loads(file.read_text())
    describe_given_adapter(tmp_path / "peft", architecture)
    for changes in (
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 1]]},
        {"something_new": 3},
        {"r": 0},
        {"rank_pattern": {"o_proj": "x"}},
    ):
        file.write_text(json.dumps({**original, **changes}))
        with pytest.raises(WeightsError) as caught:
            describe_given_adapter(tmp_path / "peft", architecture)
        assert f"adapter_config.json: {next(iter(changes))}: " in str(caught.value), changes


@pytest.mark.parametrize("target", ["gate", "lm_head", "embed_tokens"])
def test_modules_without_an_adapter_in_the_kit_are_refused_by_name(hf: Path, tmp_path: Path, target: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained_by_peft(hf, tmp_path / "peft", target_modules=["o_proj", target])
    with pytest.raises(WeightsError, match="cannot be used with this model") as caught:
        describe_given_adapter(tmp_path / "peft", MixtralArchitecture.from_hf_directory(hf))
    assert all(target in problem for problem in caught.value.problems)


def test_an_adapter_of_another_size_and_a_missing_file_are_refused(hf: Path, tmp_path: Path) -> None:
    trained_by_peft(hf, tmp_path / "peft", target_modules=["o_proj"])
    other = write_model(tmp_path / "other", hidden_size=64, head_dim=16)
    with pytest.raises(WeightsError) as caught:
        describe_given_adapter(tmp_path / "peft", MixtralArchitecture.from_hf_directory(other))
    assert "expected lora_A [r, 64] and lora_B [64, r]; found [4, 32] and [32, 4]" in caught.value.problems[0]
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither adapter_model\.safetensors"):
        describe_given_adapter(tmp_path / "peft", MixtralArchitecture.from_hf_directory(hf))
    shutil.rmtree(tmp_path / "peft")
    with pytest.raises(WeightsError, match="There is no such folder"):
        describe_given_adapter(tmp_path / "peft", MixtralArchitecture.from_hf_directory(hf))


def _with_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_wrong_ranks_and_patterns_and_weights_that_are_no_numbers_are_refused(hf: Path, tmp_path: Path) -> None:
    architecture = MixtralArchitecture.from_hf_directory(hf)
    folder = tmp_path / "peft"
    trained_by_peft(hf, folder, target_modules=["o_proj"])
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    _with_config(folder, r=rank + 1)
    with pytest.raises(WeightsError) as caught:
        describe_given_adapter(folder, architecture)
    assert f"expected the r of adapter_config.json, {rank + 1}; found {rank}" in caught.value.problems[0]
    for pattern in ("(", "([a-z_.]+)+!"):
        _with_config(folder, r=rank, alpha_pattern={pattern: 8})
        with pytest.raises(WeightsError, match="without a repeated group"):
            describe_given_adapter(folder, architecture)
    _with_config(folder, alpha_pattern={})
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    description = describe_given_adapter(folder, architecture)
    with pytest.raises(WeightsError, match="no numbers") as caught:
        dict(added(description, architecture))
    assert name in str(caught.value.where)
