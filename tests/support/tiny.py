"""Tiny random Mixtral in the released HF layout with several shards, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.mapping.hf_to_megatron import hf_tensors

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 160,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "output_router_logits": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_tensors(architecture: MixtralArchitecture, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_tensors(architecture).items():
        values = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.02)
        tensors[name] = (values + (1.0 if len(shape) == 1 else 0.0)).to(dtype)
    return tensors


def write_tiny(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_shards: int = 3,
    fused: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Write the model and return its tensors by their released names."""
    directory.mkdir(parents=True, exist_ok=True)
    config = TINY_CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    architecture = MixtralArchitecture.from_hf_config(config, where="tiny")
    tensors = tiny_tensors(architecture, dtype, seed)
    write_shards(directory, fuse(architecture, tensors) if fused else tensors, num_shards)
    return tensors


def fuse(architecture: MixtralArchitecture, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same weights under the names that Transformers 5 uses in memory.

    Written out, and not by the map of the product: a wrong map would write what it reads.
    """
    stored = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(architecture.num_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        experts = [f"{old}experts.{expert}." for expert in range(architecture.num_experts)]
        gate_up = [torch.cat([tensors[each + "w1.weight"], tensors[each + "w3.weight"]]) for each in experts]
        stored[new + "gate.weight"] = tensors[old + "gate.weight"]
        stored[new + "experts.gate_up_proj"] = torch.stack(gate_up)
        stored[new + "experts.down_proj"] = torch.stack([tensors[each + "w2.weight"] for each in experts])
    return stored


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    names = list(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        save_file({name: tensors[name].contiguous() for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
