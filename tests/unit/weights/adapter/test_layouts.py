"""What export writes adds to each weight what the adapter adds, in every layout; numbers are computed here."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.lora_factors import Factors, SumOfFactors, Term, UniformFactors
from mixtral_run.weights.adapter.peft_directory import PeftDirectory, check_peft
from mixtral_run.weights.adapter.peft_layouts import completed, max_lora_rank
from tests.unit.weights.adapter.tiny_factors import SIZES, TINY, Held, places

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
EVEN = Held(dict.fromkeys(ALL, 2), dict.fromkeys(ALL, 3.0))
UNEVEN = Held(
    {"linear_qkv": 2, "linear_proj": 2, "linear_fc1": 3, "linear_fc2": 3},
    {"linear_qkv": 1.5, "linear_proj": 1.5, "linear_fc1": 4.0, "linear_fc2": 4.0},
    seed=1,
)


def written(factors: Factors, layout: str, folder: Path, base: str | None = "owner/name") -> tuple[Any, dict[str, Any]]:
    folder.mkdir()
    directory = PeftDirectory(factors, layout)
    steps: list[int] = []
    directory.write(folder, base, steps.append)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(steps) == directory.num_bytes == sum(each.nbytes for each in tensors.values())
    assert len(tensors) == len(directory.entries)
    text = (folder / "adapter_config.json").read_text()
    assert text.endswith("}\n")
    return tensors, json.loads(text)


def scale_in(config: dict[str, Any], name: str) -> float:
    """Return alpha / r of a module as PEFT finds them: a pattern whose words contain the last part of the name."""

    def found(key: str, default: float) -> float:
        patterns = config.get(f"{key}_pattern", {})
        return next((value for words, value in patterns.items() if name in words.split("|")), default)

    return found("alpha", config["lora_alpha"]) / found("rank", config["r"])


@pytest.mark.parametrize("layout", ["peft", "vllm"])
@pytest.mark.parametrize("factors", [EVEN, UNEVEN])
def test_a_pair_for_each_weight_adds_what_the_adapter_adds(tmp_path: Path, layout: str, factors: Held) -> None:
    tensors, config = written(factors, layout, tmp_path / "out")
    for name in places(*ALL):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        a, b = tensors.pop(key.format("A")), tensors.pop(key.format("B"))
        scale = scale_in(config, name.split(".")[-2]) if layout == "peft" else config["lora_alpha"] / config["r"]
        torch.testing.assert_close(scale * b @ a, factors.added(name), atol=1e-5, rtol=1e-5)
        assert (
            a.shape[0]
            == b.shape[1]
            == (config["r"] if layout == "vllm" else factors.ranks[factors.places[name].module])
        )
    assert not tensors
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2"]
    assert (layout == "peft" and factors is UNEVEN) == ("rank_pattern" in config)


def test_stacked_experts_as_peft_reads_them(tmp_path: Path) -> None:
    """PEFT 0.21: A [experts, r, in]; B [out, r, experts]; the wrapper of down_proj is the outer one."""
    tensors, config = written(UNEVEN, "peft-fused", tmp_path / "out")
    for layer in range(2):
        for module, inner in (("linear_fc1", "base_layer."), ("linear_fc2", "")):
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}lora_"
            rows, columns = SIZES[module]
            a = tensors.pop(f"{prefix}A.weight").reshape(3, 3, columns)
            b = tensors.pop(f"{prefix}B.weight").reshape(rows, 3, 3)
            for expert in range(3):
                held_a, held_b = UNEVEN.held[module, (layer, expert)]
                torch.testing.assert_close(b[:, :, expert] @ a[expert], held_b @ held_a)
    assert {key.split(".")[5] for key in tensors} == {"self_attn"} and len(tensors) == 16
    assert (config["target_modules"], config["target_parameters"]) == (
        ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_up_proj", "down_proj"],
    )  # fmt: skip
    assert config["peft_version"] == "0.21.0"
    # One stack alone has no wrapper around it.
    tensors, config = written(Held({"linear_fc1": 2}, {"linear_fc1": 3.0}), "peft-fused", tmp_path / "alone")
    assert {key.split(".experts.")[1] for key in tensors} == {"lora_A.weight", "lora_B.weight"}
    assert (config["target_modules"], config["target_parameters"]) == ([], ["gate_up_proj"])


def test_the_config_is_written_out(tmp_path: Path) -> None:
    _, config = written(EVEN, "peft", tmp_path / "even", "owner/name@0123abc")
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/name",
        "revision": "0123abc", "r": 2, "lora_alpha": 6, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2"], "target_parameters": None,
        "modules_to_save": None, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "inference_mode": True,
    }  # fmt: skip
    # The experts' rank is the default; whole numbers stay whole, others do not become whole.
    _, config = written(UNEVEN, "peft", tmp_path / "uneven", None)
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    assert (config["r"], config["lora_alpha"]) == (3, 12)
    assert config["rank_pattern"] == {"q_proj|k_proj|v_proj": 2, "o_proj": 2}
    assert config["alpha_pattern"] == {"q_proj|k_proj|v_proj": 3, "o_proj": 3}
    # 0.1 * 3 is 0.30000000000000004, and 4.9 / 49 * 49 is not quite 4.9.
    odd = Held({"linear_qkv": 3, "linear_fc2": 49}, {"linear_qkv": 1 / 3, "linear_fc2": 0.1})
    _, config = written(odd, "peft", tmp_path / "odd", None)
    assert config["lora_alpha"] == 1 and isinstance(config["lora_alpha"], int)
    assert config["alpha_pattern"] == {"w2|down_proj": pytest.approx(4.9)}
    assert config["rank_pattern"] == {"w2|down_proj": 49}


def test_what_a_layout_needs_is_written_as_zeros(tmp_path: Path) -> None:
    assert completed(("linear_fc1",), "peft") == ("linear_fc1", "linear_fc2")
    assert completed(("linear_fc2", "linear_qkv"), "peft") == ("linear_fc2", "linear_qkv")
    assert completed(("linear_fc2",), "vllm") == ("linear_fc2", "linear_fc1")
    assert completed(ALL, "vllm") == ALL
    only = Held({"linear_fc1": 2, "linear_qkv": 3}, {"linear_fc1": 3.0, "linear_qkv": 3.0}, dtype=torch.bfloat16)
    tensors, config = written(only, "peft", tmp_path / "out")
    zeros = {key: each for key, each in tensors.items() if ".w2." in key}
    assert {tuple(each.shape) for each in zeros.values()} == {(2, 6), (8, 2)} and len(zeros) == 12
    assert not any(each.any() for each in zeros.values())
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert config["target_modules"] == ["w1", "w3", "q_proj", "k_proj", "v_proj", "w2"]
    head = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert len(head) == 8 + struct.unpack("<Q", head[:8])[0] + sum(each.nbytes for each in tensors.values())


def test_weights_of_the_base_go_along(tmp_path: Path) -> None:
    also = {"model.layers.1.block_sparse_moe.gate.weight": torch.randn(3, 8), "model.norm.weight": torch.randn(8)}
    factors = Held({"linear_proj": 2}, {"linear_proj": 1.0}, also=also)
    tensors, config = written(factors, "peft", tmp_path / "out")
    assert torch.equal(tensors["base_model.model.model.layers.1.mlp.gate.weight"], also[next(iter(also))])
    assert torch.equal(tensors["base_model.model.model.norm.weight"], also["model.norm.weight"])
    assert config["modules_to_save"] == ["gate", "norm"]
    with pytest.raises(KeyError):
        Held.__mro__[1].trained(EVEN, "model.norm.weight")
    assert Held.__mro__[1].trained_also.fget(EVEN) == ()  # type: ignore[attr-defined]


def added_by(factors: Factors, name: str) -> torch.Tensor:
    return factors.scale(factors.places[name].module) * factors.b(name).float() @ factors.a(name).float()


def test_a_weighted_sum_is_exact() -> None:
    other = Held(
        {"linear_proj": 4, "linear_fc1": 1}, {"linear_proj": 3.0, "linear_fc1": 0.5}, seed=7, dtype=torch.bfloat16
    )
    total = SumOfFactors([Term(0.7, EVEN), Term(-2.0, other)])
    assert total.target_modules == ALL and total.dtype == ("float32", 4)
    assert [total.rank(module) for module in ALL] == [2, 6, 3, 2]
    # Equal scales stay; those that differ become 1.
    assert [total.scale(module) for module in ALL] == [3.0, 3.0, 1.0, 3.0]
    assert set(total.places) == set(places(*ALL))
    for name in places(*ALL):
        expected = 0.7 * EVEN.added(name) + (-2.0 * other.added(name) if name in other.places else 0)
        torch.testing.assert_close(added_by(total, name), expected, atol=1e-4, rtol=1e-4)
    assert total.outer("linear_fc1", (0, 0)).shape == (12, 3)
    assert total.architecture is TINY
    first = Held({"linear_proj": 1}, {"linear_proj": 1.0}, also={"model.norm.weight": torch.ones(8)})
    assert SumOfFactors([Term(1.0, first), Term(-1.0, EVEN)]).trained_also == ("model.norm.weight",)
    assert torch.equal(SumOfFactors([Term(1.0, first), Term(-1.0, EVEN)]).trained("model.norm.weight"), torch.ones(8))


def test_one_rank_and_one_scale_for_engines() -> None:
    uniform = UniformFactors(UNEVEN)
    assert [(uniform.rank(module), uniform.scale(module)) for module in ALL] == [(3, 1.0)] * 4
    assert (uniform.target_modules, uniform.dtype, uniform.architecture) == (ALL, ("float32", 4), TINY)
    same = UniformFactors(EVEN)
    assert [(same.rank(module), same.scale(module)) for module in ALL] == [(2, 3.0)] * 4
    for factors, whole in ((uniform, UNEVEN), (same, EVEN)):
        for name in places(*ALL):
            torch.testing.assert_close(added_by(factors, name), whole.added(name), atol=1e-5, rtol=1e-5)
    # Ranks that are filled up are zeros, at the end.
    assert torch.equal(uniform.inner("linear_qkv", (1,))[:2], UNEVEN.held["linear_qkv", (1,)][0])
    assert not uniform.inner("linear_qkv", (1,))[2:].any() and not uniform.outer("linear_qkv", (1,))[:, 2:].any()
    # Bits stay where nothing is multiplied.
    assert torch.equal(same.outer("linear_fc2", (1, 2)), EVEN.held["linear_fc2", (1, 2)][1])


def test_the_rank_that_vllm_is_started_with() -> None:
    ranks = [1, 2, 8, 9, 16, 17, 33, 64, 65, 129, 257, 321, 512, 513]
    assert [max_lora_rank(rank) for rank in ranks] == [1, 8, 8, 16, 16, 32, 64, 64, 128, 256, 320, 512, 512, 513]


def test_an_older_peft_is_refused_for_stacked_experts_alone(tmp_path: Path) -> None:
    def config(**values: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))

    config(peft_version="0.21.0", target_parameters=["gate_up_proj"])
    for installed in ("0.21.0", "0.21.2.dev0@abc", "0.22", "1.0.0"):
        check_peft(tmp_path, installed)
    for installed in ("0.20.9", "0.9.0"):
        with pytest.raises(WeightsError, match="another axis order") as caught:
            check_peft(tmp_path, installed)
        assert (caught.value.expected, caught.value.found) == ("PEFT 0.21.0 or later", f"PEFT {installed}")
    for values in (
        {"peft_version": "0.21.0"},
        {"target_parameters": ["x"]},
        {"peft_version": "0.21.0", "target_parameters": []},
    ):
        config(**values)
        check_peft(tmp_path, "0.1")
    for text in ("[]", "{"):
        (tmp_path / "adapter_config.json").write_text(text)
        check_peft(tmp_path, "0.1")
    (tmp_path / "adapter_config.json").unlink()
    check_peft(tmp_path, "0.1")
