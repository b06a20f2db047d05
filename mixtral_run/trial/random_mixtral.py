"""Writing a Mixtral with random weights in the layout in which Mistral AI released the real one.

`rehearse` runs the whole job on a tiny one; `smoke` uses one of Mixtral's full width with few layers if the real
weights are not available. Shards are written one after the other: memory holds one shard of any model.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.trial.tiny_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
# Normal numbers are drawn in float32 (torch draws bf16 five times slower) and cast in pieces of this many.
_PIECE = 1 << 24
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "transformers_version": "4.36.0.dev0",
}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
Named = tuple[str, tuple[int, ...]]
"""A tensor's name and shape."""


def tensor_shapes(architecture: MixtralArchitecture) -> Iterator[Named]:
    """Yield name and shape of every tensor of the released layout, in the order of the released shards."""
    a = architecture
    keys = a.num_query_groups * a.kv_channels
    yield "model.embed_tokens.weight", (a.vocab_size, a.hidden_size)
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (a.projection_size, a.hidden_size)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, a.hidden_size)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, a.hidden_size)
        yield f"{prefix}.self_attn.o_proj.weight", (a.hidden_size, a.projection_size)
        yield f"{prefix}.block_sparse_moe.gate.weight", (a.num_experts, a.hidden_size)
        for expert in range(a.num_experts):
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w1.weight", (a.ffn_hidden_size, a.hidden_size)
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w2.weight", (a.hidden_size, a.ffn_hidden_size)
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight", (a.ffn_hidden_size, a.hidden_size)
        yield f"{prefix}.input_layernorm.weight", (a.hidden_size,)
        yield f"{prefix}.post_attention_layernorm.weight", (a.hidden_size,)
    yield "model.norm.weight", (a.hidden_size,)
    yield "lm_head.weight", (a.vocab_size, a.hidden_size)


def hf_config(architecture: MixtralArchitecture, *, dtype: str, initializer_range: float) -> dict[str, Any]:
    """Return config.json with the keys of mistralai/Mixtral-8x7B-v0.1. dtype: torch's name, such as "bfloat16"."""
    a = architecture
    config = {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": initializer_range,
        "intermediate_size": a.ffn_hidden_size,
        "max_position_embeddings": a.max_position_embeddings,
        "model_type": "mixtral",
        "num_attention_heads": a.num_attention_heads,
        "num_experts_per_tok": a.moe_router_topk,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_query_groups,
        "num_local_experts": a.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": a.layernorm_epsilon,
        "rope_theta": a.rotary_base,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": a.vocab_size,
    }
    if a.kv_channels * a.num_attention_heads != a.hidden_size:
        config["head_dim"] = a.kv_channels
    return config


def write_random_mixtral(
    folder: Path,
    *,
    architecture: MixtralArchitecture,
    dtype: str,
    seed: int,
    texts: Iterable[str],
    num_shards: int,
    initializer_range: float = 0.02,
    embedding_range: float | None = None,
) -> None:
    """Write a Mixtral with random weights and a tokenizer trained on `texts` into `folder`, new or empty.

    Weights are drawn from N(0, initializer_range²), embeddings and output layer from N(0, embedding_range²) if that is
    given; layer norms are ones. Each tensor has its own generator, seeded by `seed` and the tensor's name, so that the
    weights do not depend on the number of shards or threads. dtype: "bfloat16", "float16" or "float32". The result
    loads with `AutoModelForCausalLM` and `AutoTokenizer`. config.json is written last, by renaming: a folder without it
    is no model. Raises ConfigError if the folder is not empty.
    """
    if dtype not in _BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_BYTES)}; found {dtype!r}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(
            "The folder for the random model is not empty.", where=str(folder), expected="a new or empty one"
        )
    # The tokenizer may be smaller than the model's vocabulary, but not larger.
    vocabulary = min(architecture.vocab_size, 32000)
    write_tokenizer(folder, texts, vocabulary, architecture.max_position_embeddings)
    ranges = dict.fromkeys(EMBEDDINGS, embedding_range or initializer_range)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return random_tensor(name, shape, dtype, seed, ranges.get(name, initializer_range))

    _write_weights(folder, architecture, dtype, num_shards, draw)
    generation = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "4.36.0.dev0",
    }
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", hf_config(architecture, dtype=dtype, initializer_range=initializer_range))


def split_into_shards(architecture: MixtralArchitecture, num_shards: int) -> list[list[Named]]:
    """Split the tensors in order into exactly `num_shards` shards of about the same size. Raises ValueError."""
    tensors = list(tensor_shapes(architecture))
    if not 1 <= num_shards <= len(tensors):
        raise ValueError(f"num_shards must be between 1 and {len(tensors)}; found {num_shards}")
    total = sum(_count(shape) for _, shape in tensors)
    shards: list[list[Named]] = [[]]
    passed = 0
    for position, (name, shape) in enumerate(tensors):
        remaining = num_shards - len(shards)
        full = passed >= total * len(shards) / num_shards
        # Each of the last shards gets a tensor even if a large tensor before them exceeded its shard's size.
        if shards[-1] and remaining and (full or len(tensors) - position <= remaining):
            shards.append([])
        shards[-1].append((name, shape))
        passed += _count(shape)
    return shards


def _write_weights(
    folder: Path, architecture: MixtralArchitecture, dtype: str, num_shards: int, draw: Callable[..., torch.Tensor]
) -> None:
    weight_map: dict[str, str] = {}
    shards = split_into_shards(architecture, num_shards)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
            # A separate call, so that its tensors are freed before the next shard's are drawn.
            _write_shard(folder / file, shard, pool, draw)
            weight_map |= {name: file for name, _ in shard}
    total = architecture.num_parameters * _BYTES[dtype]
    _write_json(
        folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _write_shard(path: Path, shard: list[Named], pool: ThreadPoolExecutor, draw: Callable[..., torch.Tensor]) -> None:
    from safetensors.torch import save_file

    drawn = [pool.submit(draw, *item) for item in shard]
    tensors = {name: future.result() for (name, _), future in zip(shard, drawn, strict=True)}
    unfinished = path.with_name(f".{path.name}.partial")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    _sync(unfinished)
    unfinished.rename(path)


def random_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int, initializer_range: float) -> torch.Tensor:
    """Return a tensor of the model, which depends only on name, shape, dtype, seed and range."""
    import torch

    if len(shape) == 1:  # layer norms
        return torch.ones(shape, dtype=getattr(torch, dtype))
    # torch's CPU generator uses only the low 32 bits of a seed, so both are hashed into them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        piece.copy_(torch.empty(piece.numel()).normal_(0.0, initializer_range, generator=generator))
    return tensor


def _count(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(unfinished)
    unfinished.rename(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
