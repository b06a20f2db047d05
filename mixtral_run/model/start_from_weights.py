"""Adapters that start from the weights: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775).

Both start with factors A₀, B₀ of the weight's largest part, and take `scale · B₀·A₀` out of the frozen weight, so that
the model starts unchanged. Here the weight stays as it is, on the disk and in memory, quantized or not: the layer
computes

    W·x + scale · (B·A - B₀·A₀)·x

with A₀ and B₀ frozen next to A and B. This is the same function with the same gradients. The base can then be used
alone (without_adapters.py), a quantized cache fits, and an export is plain LoRA of twice the rank on the unchanged
base. It costs products of twice the rank, and the memory of the second pair.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.adapters.lora import ColumnLinear, LinearAdapter, RowLinear
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.experts import ExpertLinear
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.frozen_linear import dense_weight

LARGEST_EXACT = 1024
"""The smaller side of a weight up to which PiSSA's decomposition is exact; above, it is randomized, as in PEFT."""
_ITERATIONS, _MORE = 16, 8
"""Iterations of the randomized decomposition, and the ranks beyond those asked for that make it converge."""


def factors_of(weight: Tensor, lora: LoraSettings, seed: str) -> tuple[Tensor, Tensor]:
    """Return A₀ [r, in] and B₀ [out, r], fp32, of a weight [out, in].

    seed: for the random start of the decomposition of a large weight.
    """
    exact, rank = weight.float(), lora.rank
    if lora.init == "olora":
        outer = torch.linalg.qr(exact[:, :rank])[0]
        return outer.t() @ exact, outer
    if min(exact.shape) <= LARGEST_EXACT:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[exact.device] if exact.is_cuda else []):
            torch.manual_seed(zlib.crc32(seed.encode()))
            left, values, right = torch.svd_lowrank(exact, min(rank + _MORE, *exact.shape), niter=_ITERATIONS)
            left, values, right = left[:, :rank], values[:rank], right.t()[:rank]
    roots = (values / lora.scale).sqrt()
    return roots[:, None] * right, left * roots


@torch.no_grad()
def start_from_weights(model: MixtralModel) -> None:
    """Fill all adapters, and their frozen counterparts, from the weights of the base. All ranks must call.

    Each matrix is computed by the ranks that hold it, and taken from the first of them, so that all bits agree.
    """
    lora = model.settings.lora
    if lora is None or not lora.starts_from_weights:
        return
    mesh = model.mesh
    for number, layer in enumerate(model.gpt.decoder.layers):
        attention = layer.self_attention
        for name, linear in (("linear_qkv", attention.linear_qkv), ("linear_proj", attention.linear_proj)):
            if linear.adapter is not None:
                axis = 0 if isinstance(linear, ColumnLinear) else 1
                whole = _gathered(dense_weight(linear), axis, mesh.tensor_group)
                factors = factors_of(whole, lora.of(name), f"{lora.seed} {name} {number}")
                _fill(linear, *_agreed(factors, (mesh.tensor_group, mesh.data_group)))
        for name, experts in layer.mlp.experts.linears.items():
            if experts.lora is None:
                continue
            for index in range(experts.linear_in.shape[0]):
                place = f"{lora.seed} {name} {number} {mesh.expert_rank * experts.linear_in.shape[0] + index}"
                factors = factors_of(experts.dense_weight(index), experts.lora, place)
                _fill_expert(experts, index, *_agreed(factors, (mesh.expert_data_group,)))


def _fill(linear: ColumnLinear | RowLinear, first: Tensor, second: Tensor) -> None:
    adapter = linear.adapter
    assert isinstance(adapter, LinearAdapter)
    for half, values in ((adapter.linear_in, first), (adapter.linear_out, second)):
        if half.partition is not None:
            size = half.weight.shape[half.partition]
            values = values.narrow(half.partition, size * dist.get_rank(linear.tp_group), size)
        half.weight.copy_(values)
    adapter.remember_start()


def _fill_expert(experts: ExpertLinear, index: int, first: Tensor, second: Tensor) -> None:
    assert experts.initial_in is not None and experts.initial_out is not None
    for parameter, values in (
        (experts.linear_in, first),
        (experts.initial_in, first),
        (experts.linear_out, second),
        (experts.initial_out, second),
    ):
        parameter[index].copy_(values)


def _gathered(part: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=axis)


def _agreed(factors: tuple[Tensor, Tensor], groups: tuple[dist.ProcessGroup, ...]) -> tuple[Tensor, Tensor]:
    first, second = (each.contiguous() for each in factors)
    for group in groups:
        if group.size() > 1:
            for each in (first, second):
                dist.broadcast(each, group=group, group_src=0)
    return first, second
