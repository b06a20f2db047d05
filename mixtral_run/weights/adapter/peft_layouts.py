"""An adapter's tensors in the layouts of PEFT and vLLM: key, shape and reader of each.

`peft`: one pair of 2-D factors for each HF tensor of the released layout, with separate experts. PEFT 0.21 converts it
to its own form when it loads it; readers with separate experts take it as it is.

`peft-fused`: PEFT's own form for transformers' stacked experts (0.21, lora/layer.py, ParamWrapper): A's rows go expert
by expert, B's columns rank by rank with the experts within. Gate and up share one adapter of rank r, as in Megatron's
linear_fc1; PEFT's conversion of the other layout makes rank 2r of it.

`vllm`: the keys of `peft`, with all three matrices of every expert or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixtral_run.config.names.hub_names import hub_name_and_revision
from mixtral_run.weights.adapter.lora_factors import Factors
from mixtral_run.weights.adapter.schema import places_of
from mixtral_run.weights.mapping.hf_to_megatron import Shape, hf_tensors

if TYPE_CHECKING:
    import torch

_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("w1", "w3"),
    "linear_fc2": ("w2",),
}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks; v0.14 and later
FUSED_PEFT_VERSION = "0.21.0"
"""The PEFT version whose axis order `peft-fused` has; it changed in 2026-04, which the shapes do not show."""
FUSED_AXIS_ORDER = {"lora_A": "[experts * r, in]", "lora_B": "[out, r * experts]"}
_PARAMETERS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}


@dataclass(frozen=True)
class Entry:
    """A tensor of adapter_model.safetensors."""

    key: str
    shape: Shape
    read: Callable[[], torch.Tensor]


def completed(trained: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return the modules with those that the layout needs in addition; they are written as zeros, without effect.

    PEFT 0.21 finds the factors of w1 and w3 only if those of w2 are wrapped around them: without w2 they are silently
    left out. vLLM fails on an expert that has some of its three matrices and not all.
    """
    needed = {"linear_fc1": ("linear_fc2",), "linear_fc2": ("linear_fc1",) if layout == "vllm" else ()}
    return (*trained, *(each for module in trained for each in needed.get(module, ()) if each not in trained))


def fused_entries(factors: Factors) -> list[Entry]:
    """Return the tensors of the `peft-fused` layout."""
    a = factors.architecture
    entries = per_expert_entries(factors, tuple(each for each in factors.target_modules if each not in _PARAMETERS))
    stacked = [module for module in ("linear_fc1", "linear_fc2") if module in factors.target_modules]
    sizes = {"linear_fc1": (2 * a.ffn_hidden_size, a.hidden_size), "linear_fc2": (a.hidden_size, a.ffn_hidden_size)}
    for layer in range(a.num_layers):
        for module in stacked:
            # PEFT nests the wrappers of one module's parameters: the last one is the outermost.
            inner = "base_layer." if module != stacked[-1] else ""
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}"
            rows, columns = sizes[module]
            width = a.num_experts * factors.rank(module)
            entries += [
                Entry(f"{prefix}lora_A.weight", (width, columns), _bound(factors.stacked_a, module, layer)),
                Entry(f"{prefix}lora_B.weight", (rows, width), _bound(factors.stacked_b, module, layer)),
            ]
    return entries


def per_expert_entries(factors: Factors, modules: tuple[str, ...]) -> list[Entry]:
    """Return the tensors of these modules in the layouts `peft` and `vllm`; those without factors are zeros."""
    shapes = hf_tensors(factors.architecture)
    entries = []
    for name, place in places_of(factors.architecture, modules).items():
        rows, columns = shapes[name]
        prefix = f"base_model.model.{name.removesuffix('.weight')}."
        trained = name in factors.places
        rank = factors.rank(place.module) if trained else default_rank(factors)
        a, b = (rank, columns), (rows, rank)
        read_a = _bound(factors.a, name) if trained else _bound(factors.zeros, a)
        read_b = _bound(factors.b, name) if trained else _bound(factors.zeros, b)
        entries += [Entry(f"{prefix}lora_A.weight", a, read_a), Entry(f"{prefix}lora_B.weight", b, read_b)]
    return entries


def trained_entries(factors: Factors) -> list[Entry]:
    """Return the weights of the base that were trained with the adapter, as PEFT's `modules_to_save` has them.

    PEFT 0.21 looks for them by the names of the model in memory, which differ from the released ones for routers.
    """
    shapes = hf_tensors(factors.architecture)
    return [
        Entry(
            f"base_model.model.{name.replace('.block_sparse_moe.', '.mlp.')}",
            shapes[name],
            _bound(factors.trained, name),
        )
        for name in factors.trained_also
    ]


def default_rank(factors: Factors) -> int:
    """Return PEFT's `r`, which modules have that no pattern names.

    PEFT 0.21 gives the experts' gate and up 2·r when it joins w1 and w3, without a look at patterns: so r is theirs.
    """
    return factors.rank(_leading_module(factors))


def _leading_module(factors: Factors) -> str:
    modules = factors.target_modules
    return "linear_fc1" if "linear_fc1" in modules else modules[0]


def _bound(read: Callable[..., torch.Tensor], *arguments: Any) -> Callable[[], torch.Tensor]:
    return lambda: read(*arguments)


def adapter_config(
    factors: Factors, targets: tuple[str, ...], base_model: str | None, *, fused: bool
) -> dict[str, Any]:
    """Return PEFT's LoraConfig. Dropout is zero: it belongs to training, and PEFT refuses to load experts with any."""
    modules = [module for module in targets if not (fused and module in _PARAMETERS)]
    parameters = [name for module, name in _PARAMETERS.items() if fused and module in targets]
    # Not `use_rslora`: PEFT 0.21 joins w1 and w3 to one matrix of rank 2·r and alpha 2·α, and divides by √(2·r).
    rank, scale = default_rank(factors), factors.scale(_leading_module(factors))
    name, revision = (None, None) if base_model is None else hub_name_and_revision(base_model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        # PEFT's own field for the base's.
        "revision": revision,
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        **_patterns(factors, rank, scale),
        "lora_dropout": 0.0,
        "target_modules": [target for module in modules for target in _TARGETS[module]],
        "target_parameters": parameters or None,
        "modules_to_save": _modules_to_save(factors.trained_also) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        # PEFT's own field for the version that a directory is of.
        **({"peft_version": FUSED_PEFT_VERSION} if fused else {}),
    }


def _modules_to_save(names: tuple[str, ...]) -> list[str]:
    """Return the modules that PEFT replaces by what was trained: the last parts of their names, each once."""
    return list(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in names))


def _patterns(factors: Factors, rank: int, scale: float) -> dict[str, dict[str, float]]:
    """Return `rank_pattern` and `alpha_pattern` of the modules that differ from the default; none if none does."""
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for module in factors.target_modules:
        mine = factors.rank(module), factors.scale(module)
        if mine == (rank, scale):
            continue
        # One pattern for the names of transformers 4 and 5: PEFT warns of one that matches nothing.
        name = "|".join((*_TARGETS[module], *((_PARAMETERS[module],) if module in _PARAMETERS else ())))
        ranks[name], alphas[name] = mine[0], _whole(mine[0] * mine[1])
    return {"rank_pattern": ranks, "alpha_pattern": alphas} if ranks else {}


def _whole(number: float) -> float:
    """Return the number as an int if it is whole but for the last bits, which a division by the rank costs."""
    return round(number) if number and abs(number - round(number)) <= 1e-12 * abs(number) else number


def max_lora_rank(rank: int) -> int:
    """Return the smallest value of `vllm serve --max-lora-rank` that admits the adapter."""
    return next((each for each in _VLLM_RANKS if each >= rank), rank)
