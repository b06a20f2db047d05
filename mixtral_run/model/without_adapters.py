"""Compute as the base alone with a model that has adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mixtral_run.model.adapters.lora import ColumnLinear, LinearAdapter, RowLinear
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.adapters.trained_also import base_of, is_trained_also
from mixtral_run.model.experts import ExpertLinear
from mixtral_run.model.mixtral import MixtralModel


@contextmanager
def without_adapters(model: MixtralModel) -> Iterator[None]:
    """Take the adapters out of the computation within the block. All ranks must do the same.

    The layers compute what those of a model without adapters compute; nothing is multiplied by zero.
    """
    linear: list[tuple[ColumnLinear | RowLinear, LinearAdapter]] = []
    experts: list[tuple[ExpertLinear, LoraSettings]] = []
    others = [each for name, each in model.named_parameters() if is_trained_also(name, model.settings.lora)]
    for module in model.modules():
        if isinstance(module, (ColumnLinear, RowLinear)) and module.adapter is not None:
            linear.append((module, module.adapter))
        elif isinstance(module, ExpertLinear) and module.lora is not None:
            experts.append((module, module.lora))
    for layer, _ in linear:
        layer.adapter = None
    for each, _ in experts:
        each.lora = None
    trained = [each.data for each in others]
    for parameter in others:
        parameter.data = base_of(parameter)
    try:
        yield
    finally:
        for layer, adapter in linear:
            layer.adapter = adapter
        for each, lora in experts:
            each.lora = lora
        for parameter, values in zip(others, trained, strict=True):
            parameter.data = values
