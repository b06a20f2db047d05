"""Model of vLLM's reader of a LoRA directory for Mixtral, written from its documented key scheme. vLLM is not run.

Sources in vllm-project/vllm: vllm/lora/peft_helper.py (fields of adapter_config.json, and refused values),
lora_model.py (expected names), utils.py (names of modules, and of the three linear layers of every expert),
lora_weights.py (`pack_moe`: these three of all experts, stacked), docs/features/lora.md. Scaling is lora_alpha / r.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
LINEARS = ("o_proj",)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Stacked:
    """Module as vLLM computes with it: A [E, r, in] and B [E, out, r] of each slice, or without the dimension E."""

    a: list[torch.Tensor | None]
    b: list[torch.Tensor | None]


def expected_modules(num_experts: int) -> list[str]:
    """Return the allowed suffixes of module names, with the experts in the order in which they are stacked."""
    experts = [f"experts.{e}.{w}" for e in range(num_experts) for w in ("w1", "w2", "w3")]
    return [*(name for names in PACKED.values() for name in names), *LINEARS, *experts]


def load(folder: Path, num_layers: int, num_experts: int, max_lora_rank: int) -> tuple[dict[str, Stacked], float]:
    """Return the modules by vLLM's own names, and the scaling. Raise ValueError or AssertionError as vLLM does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    missing = {"r", "lora_alpha", "target_modules"} - set(config)
    if missing:
        raise ValueError(f"Missing required configuration fields: {missing}")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError("not supported: modules_to_save, DoRA, bias")
    if config["r"] > max_lora_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    expected = expected_modules(num_experts)
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, half = _module_of(key)
        at = name.find(".experts")
        suffix = name[at + 1 :] if at >= 0 else name.rsplit(".", 1)[-1]
        if suffix not in expected:
            raise ValueError(f"expected target modules in {expected} but received {name}")
        if tensor.dim() != 2:
            raise ValueError(f"{key}: expected a matrix; found {list(tensor.shape)}")
        halves.setdefault(name, {})[half] = tensor
    modules: dict[str, Stacked] = {}
    for layer in range(num_layers):
        attention, moe = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.block_sparse_moe."
        packed = [halves.pop(f"{attention}{name}", None) for name in PACKED["qkv_proj"]]
        if any(packed):
            a, b = ([each[half] if each else None for each in packed] for half in ("lora_A", "lora_B"))
            modules[f"{attention}qkv_proj"] = Stacked(a, b)
        if f"{attention}o_proj" in halves:
            one = halves.pop(f"{attention}o_proj")
            modules[f"{attention}o_proj"] = Stacked([one["lora_A"]], [one["lora_B"]])
        experts = [halves.pop(f"{moe}experts.{e}.{w}", None) for e in range(num_experts) for w in ("w1", "w2", "w3")]
        if any(experts):
            assert all(experts), "pack_moe: every expert needs w1, w2 and w3"
            slices = [[each for each in experts[first::3] if each] for first in range(3)]
            modules[f"{moe}experts"] = Stacked(
                [torch.stack([each["lora_A"] for each in one]) for one in slices],
                [torch.stack([each["lora_B"] for each in one]) for one in slices],
            )
    assert not halves, f"no module takes {sorted(halves)}"
    return modules, config["lora_alpha"] / config["r"]


def _module_of(key: str) -> tuple[str, str]:
    parts = key.split(".")
    if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B") or not key.startswith(PREFIX):
        raise ValueError(f"{key} is unsupported LoRA weight")
    return ".".join(parts[2:-2]), parts[-2]


def add_to(tensors: dict[str, torch.Tensor], modules: dict[str, Stacked], scaling: float) -> dict[str, torch.Tensor]:
    """Return the HF model's tensors with the LoRA of each module added to its weight: `W + scaling · B·A`."""
    merged = dict(tensors)
    for module, stacked in modules.items():
        prefix, _, kind = module.rpartition(".")
        names = {"qkv_proj": PACKED["qkv_proj"], "o_proj": ("o_proj",), "experts": ("w1", "w2", "w3")}[kind]
        for name, a, b in zip(names, stacked.a, stacked.b, strict=True):
            if a is None or b is None:
                continue
            if kind != "experts":
                merged[f"{prefix}.{name}.weight"] = merged[f"{prefix}.{name}.weight"] + scaling * (b @ a)
                continue
            for expert, delta in enumerate(scaling * torch.bmm(b, a)):
                key = f"{module}.{expert}.{name}.weight"
                merged[key] = merged[key] + delta
    return merged
