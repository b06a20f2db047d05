"""Routing, experts and linear layers of passes over few tokens, without gradients: generation.

A kernel for many tokens takes a few microseconds for a single one too, and a pass of generation has hundreds of them.
Here few kernels compute the same. They are used in inference mode only: a layer that training runs again for its
gradients must route as it did the first time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mixtral_run.model.kernels.decoding.halves import Adapters, Halves
from mixtral_run.model.kernels.quantized.formats import FP8
from mixtral_run.model.kernels.selected import kernels_of
from mixtral_run.model.kernels.swiglu import swiglu

FEW = 32
"""Most tokens of a pass for which these kernels are made."""
ROWS, DEPTH = 8, 64
"""The products take matrices of so many rows, and of so many columns, or multiples."""


def are_few(tokens: Tensor, *matrices: Tensor) -> bool:
    """Return True if kernels of this module take tokens [.., width] and these matrices [.., out, in]: no more than FEW
    tokens in bf16 on a GPU, in inference mode.
    """
    return (
        0 < tokens.numel() <= FEW * tokens.shape[-1]
        and torch.is_inference_mode_enabled()
        and kernels_of(tokens.device) is not None
        and tokens.shape[-1] % DEPTH == 0
        and all(each.dtype is torch.bfloat16 and each.is_contiguous() for each in (tokens, *matrices))
    )


def is_one(token: Tensor, *matrices: Tensor) -> bool:
    """Return True if there is one token for `outputs_of_one` or `product_of_one`."""
    return (
        token.numel() == token.shape[-1]
        and are_few(token, *matrices)
        and all(each.shape[-2] % ROWS == 0 and each.shape[-1] % DEPTH == 0 for each in matrices)
    )


def route(tokens: Tensor, weight: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the routing probabilities fp32 and the experts int64, both [tokens, topk], of tokens [tokens, hidden].

    weight: of the router, [experts, hidden]. They must be `are_few`. The reference is moe.router_logits and moe.choose.
    """
    from mixtral_run.model.kernels.decoding.few_tokens_triton import route as on_gpu

    return on_gpu(tokens, weight, topk)


def sorted_rows(tokens: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the permuted tokens [tokens·topk, hidden], and the order, inverse and offsets of the permutation.

    tokens: [tokens, hidden], which must be `are_few`. experts: int64 [tokens, topk], numbers below `count`. The
    reference is dispatch/permute.sort_by_expert and a gather.
    """
    from mixtral_run.model.kernels.decoding.few_tokens_triton import sorted_rows as on_gpu

    return on_gpu(tokens, experts.contiguous(), count)


def outputs_of_one(
    token: Tensor,
    experts: Tensor,
    probs: Tensor,
    first: Tensor,
    second: Tensor,
    adapters: Adapters = (None, None),
) -> Tensor:
    """Return the sum of the experts' outputs times probs for one token: [1, hidden]. They must be `is_one`.

    Args:
        token: [1, hidden].
        experts, probs: int64 and fp32 [1, topk].
        first, second: weights of all experts, [experts, 2·ffn, hidden], gate rows first, and [experts, hidden, ffn].
    """
    from mixtral_run.model.kernels.decoding.few_tokens_triton import outputs_of_one as on_gpu

    return on_gpu(token, experts.contiguous(), probs.contiguous(), first, second, adapters)


def plain_outputs_of_one(
    token: Tensor,
    experts: Tensor,
    probs: Tensor,
    first: Tensor,
    second: Tensor,
    adapters: Adapters = (None, None),
) -> Tensor:
    """Compute `outputs_of_one` in plain torch, in the dtype of its arguments."""

    def product(row: Tensor, matrices: Tensor, expert: int, halves: Halves | None) -> Tensor:
        output = linear(row, matrices[expert])
        return output if halves is None else output + _adapted(row, halves, expert)

    outputs = [
        product(swiglu(product(token, first, expert, adapters[0])), second, expert, adapters[1])
        for expert in experts[0].tolist()
    ]
    return (torch.cat(outputs) * probs[0, :, None].to(token.dtype)).sum(0, keepdim=True)


def _adapted(row: Tensor, halves: Halves, number: int) -> Tensor:
    number = min(number, len(halves.linear_in) - 1)
    return linear(linear(row, halves.linear_in[number]), halves.linear_out[number]) * halves.scale


def takes_quantized(token: Tensor, values: Tensor) -> bool:
    """Return True if `quantized_outputs_of_one` takes this token and values in fp8 or nf4 [experts, out, in]."""
    numbers = values.shape[-1] * (1 if values.dtype is FP8 else 2)
    return (
        token.numel() == token.shape[-1]
        and are_few(token)
        and values.is_contiguous()
        and values.shape[-2] % ROWS == 0
        and numbers % DEPTH == 0
    )


def quantized_outputs_of_one(
    token: Tensor,
    experts: Tensor,
    probs: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    adapters: Adapters = (None, None),
) -> Tensor:
    """Compute `outputs_of_one` with values and scales of the weights (quantized_mm.py), which `takes_quantized`.

    The token is not quantized. The reference is `plain_outputs_of_one` with dequantized weights.
    """
    from mixtral_run.model.kernels.decoding.one_token_triton import outputs_of_one as on_gpu

    return on_gpu(token, experts.contiguous(), probs.contiguous(), first, second, adapters)


def product_of_one(row: Tensor, weight: Tensor, adapter: Halves | None = None) -> Tensor:
    """Return torch.nn.functional.linear of one row [.., in] and weight [out, in], plus the part of its adapter, of one
    matrix. They must be `is_one`.
    """
    from mixtral_run.model.kernels.decoding.few_tokens_triton import product_of_one as on_gpu

    return on_gpu(row, weight, adapter)


def plain_product_of_one(row: Tensor, weight: Tensor, adapter: Halves | None = None) -> Tensor:
    """Compute `product_of_one` in plain torch, in the dtype of its arguments."""
    output = linear(row, weight)
    return output if adapter is None else output + _adapted(row, adapter, 0)
