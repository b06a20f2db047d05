"""Weights of the base that are trained with the adapters (`--train-also`): embeddings, output layer, norms, routers.

They are stored in fp32, as adapters are: steps smaller than the last bit of a bf16 number would be lost. Each is cast
to the model's dtype where it is used. A checkpoint of the adapter holds them under the keys of the base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.adapters.lora_settings import LoraSettings

_PARTS = {"embeddings": ".word_embeddings.", "lm_head": "output_layer.", "norms": "layernorm.", "router": ".router."}
"""A part of the names of the parameters in the model, by the values of `--train-also`."""


def is_trained_also(parameter_name: str, lora: LoraSettings | None) -> bool:
    """Return True if a parameter, by its name in the model or in its sharded state, is trained with the adapters."""
    return lora is not None and any(_PARTS[each] in parameter_name for each in lora.train_also)


def is_norm(parameter_name: str) -> bool:
    """Return True for the weight of a norm."""
    return _PARTS["norms"] in parameter_name


def store_in_fp32(gpt: Any, lora: LoraSettings, dtype: torch.dtype) -> None:
    """Give these weights fp32 memory, and have Megatron's embedding and output layer compute in dtype.

    The kit's own norms and routers cast their weights themselves.
    """
    for name, parameter in gpt.named_parameters():
        if is_trained_also(name, lora):
            parameter.data = parameter.data.float()
    if dtype is torch.float32:
        return
    if "embeddings" in lora.train_also:
        gpt.embedding.register_forward_hook(lambda _, __, output: output.to(dtype))
    if "lm_head" in lora.train_also:
        gpt.output_layer.register_forward_pre_hook(_with_cast_weight, with_kwargs=True)


def _with_cast_weight(layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return inputs, {**named, "weight": layer.weight.to(inputs[0].dtype)}


def remember_base(model: torch.nn.Module, lora: LoraSettings | None) -> None:
    """Keep what the base has in place of these weights, so that it can be used alone (without_adapters.py).

    Call it between loading the base and loading the adapter.
    """
    for name, parameter in model.named_parameters():
        if is_trained_also(name, lora):
            parameter._mixtral_run_base = parameter.detach().clone()  # type: ignore[attr-defined]


def base_of(parameter: Tensor) -> Tensor:
    """Return what `remember_base` kept."""
    found = getattr(parameter, "_mixtral_run_base", None)
    assert isinstance(found, Tensor), "call remember_base before the adapter is loaded"
    return found
