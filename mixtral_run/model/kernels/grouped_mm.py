"""Grouped matrix products: one call multiplies the rows of each expert by that expert's matrix.

On GPUs the row offsets are read on the device, so that the host never waits. There are two sets of kernels
(requirements.py, selected.py): for Hopper a product of our own (hopper_grouped_mm.py) and torch's grouped product, for
older GPUs portable ones in Triton (portable_mm_triton.py). The products with an adapter's matrices are kernels of our
own in both (narrow_mm_triton.py). Elsewhere it is a loop over the experts, which is also the reference of the tests.

No gradient is computed for frozen weights. Shapes: rows [tokens, in], sorted by expert; weight [experts, out, in];
offsets int32 [experts], the end of each expert's rows. Rows at or after the last offset belong to no expert, and their
results are undefined (dispatch/all_gather.py).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixtral_run.model.kernels.requirements import KernelSet, grouped_mm_runs_on_device
from mixtral_run.model.kernels.selected import capability_of, kernels_of
from mixtral_run.model.recompute.recipe import Recipe

log = logging.getLogger(__name__)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, recipe: Recipe | None = None) -> Tensor:
    """Return each row times the transpose of its expert's matrix: [tokens, out].

    The gradient of the weight needs the rows: they are saved, or recomputed by `recipe`.
    """
    make, saved = (recipe.make, recipe.sources) if recipe is not None else (None, (rows.detach(),))
    if not weight.requires_grad:
        saved = ()
    output: Tensor = _GroupedLinear.apply(rows, weight, offsets, make, *saved)  # type: ignore[no-untyped-call]
    return output


def added_linear(base: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor) -> Tensor:
    """Return base [tokens, out] + scale · inner [tokens, r] · outerᵀ, outer [experts, out, r]."""
    if has_grouped_product(base, base.shape[1], inner.shape[1]):
        from mixtral_run.model.kernels.narrow_mm_triton import WIDTHS

        if inner.shape[1] in WIDTHS:
            output: Tensor = _AddedLinear.apply(base, inner, outer, scale, offsets)  # type: ignore[no-untyped-call]
            return output
    return base + grouped_linear(inner * scale, outer, offsets)


def has_grouped_product(rows: Tensor, *widths: int) -> bool:
    """Return True if a grouped kernel runs here on matrices of these widths without waiting for the GPU: in bf16, on
    GPUs that have one of the sets of kernels.
    """
    return (
        rows.is_cuda
        # A process of an expert group may receive no tokens.
        and rows.shape[0] > 0
        and rows.dtype is torch.bfloat16
        and grouped_mm_runs_on_device(kernels_of(rows.device), rows.element_size(), *widths)
    )


def is_portable(rows: Tensor) -> bool:
    """Return True if the portable set of kernels is selected on the device of `rows`."""
    return kernels_of(rows.device) is KernelSet.PORTABLE


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, make: Callable[..., Tensor] | None, *saved: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, offsets, *saved)
        ctx.make = make
        if not weight.requires_grad:
            return frozen_product(rows, weight, offsets)
        return product(rows, weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, offsets, *saved = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_rows = for_weight = None
        if ctx.needs_input_grad[0]:
            back = product if ctx.needs_input_grad[1] else frozen_gradient
            for_rows = back(gradient, weight, offsets)
        if ctx.needs_input_grad[1]:
            rows = ctx.make(*saved) if ctx.make is not None else saved[0]
            for_weight = outer_product(gradient, rows, offsets)
        return (for_rows, for_weight, None, None, *(None for _ in saved))


class _AddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, inner: Tensor, outer: Tensor, scale: float, offsets: Tensor) -> Tensor:
        from mixtral_run.model.kernels.narrow_mm_triton import narrow_added

        ctx.save_for_backward(inner, outer, offsets)
        ctx.scale = scale
        return narrow_added(base.contiguous(), inner.contiguous(), outer.contiguous(), scale, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        inner, outer, offsets = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_inner = product(gradient, outer, offsets, scale=ctx.scale)
        return gradient, for_inner, outer_product(gradient, inner, offsets, scale=ctx.scale), None, None


def product(
    rows: Tensor, matrices: Tensor, offsets: Tensor, source: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return scale · rows [tokens, k] · matrices [experts, k, n]: [tokens, n].

    source: int64 [tokens], the index in `rows` of each token; None if the rows are in order already.
    """
    if has_grouped_product(rows, matrices.shape[1], matrices.shape[2]):
        from mixtral_run.model.kernels.narrow_mm_triton import WIDTHS, narrow_product

        if matrices.shape[2] in WIDTHS and rows.is_contiguous():
            return narrow_product(rows, matrices, offsets, source, scale)
    output = _plain_product(rows, matrices, offsets, source)
    return output if scale == 1.0 else output * scale


def _plain_product(rows: Tensor, matrices: Tensor, offsets: Tensor, source: Tensor | None) -> Tensor:
    grouped = has_grouped_product(rows, matrices.shape[1], matrices.shape[2])
    if grouped and is_portable(rows):
        from mixtral_run.model.kernels.portable_mm_triton import grouped_product

        return grouped_product(rows.contiguous(), matrices, offsets, source=source)
    if source is not None:
        rows = rows.index_select(0, source)
    if grouped:
        output: Tensor = torch._grouped_mm(rows, matrices, offs=offsets)
        return output
    parts = [part @ matrix for part, matrix in zip(each_experts(rows, offsets), matrices.unbind(0), strict=True)]
    return filled_up(parts, rows.shape[0])


def outer_product(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    *,
    source: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return leftᵀ · scale · right summed over each expert's rows: left [tokens, m], right [tokens, n] → [experts, m,
    n].

    source: index into `right`, see `product`. dtype: of the result; default left's. scale: see `_is_exact`.
    """
    if not _is_exact(scale):
        right, scale = right * scale, 1.0
    if has_grouped_product(left, left.shape[1], right.shape[1]):
        from mixtral_run.model.kernels.narrow_mm_triton import WIDTHS, narrow_outer_product

        if left.is_contiguous() and right.is_contiguous():
            if left.shape[1] in WIDTHS:
                return narrow_outer_product(
                    right, left, offsets, narrow_first=True, source=source, dtype=dtype, scale=scale
                )
            if right.shape[1] in WIDTHS and source is None:
                return narrow_outer_product(left, right, offsets, narrow_first=False, dtype=dtype, scale=scale)
    right = right if scale == 1.0 else right * scale
    if source is not None:
        right = right.index_select(0, source)
    if has_grouped_product(left, left.shape[1], right.shape[1]):
        if is_portable(left):
            from mixtral_run.model.kernels import portable_mm_triton

            output = portable_mm_triton.outer_product(left.contiguous(), right.contiguous(), offsets)
        else:
            output = torch._grouped_mm(left.t(), right, offs=offsets)
    else:
        pairs = zip(each_experts(left, offsets), each_experts(right, offsets), strict=True)
        output = torch.stack([first.t() @ second for first, second in pairs])
    return output.to(dtype or left.dtype)


def _is_exact(scale: float) -> bool:
    """Return True for a power of two: it may multiply the sum instead of what is summed, with the same result bit for
    bit.
    """
    return math.frexp(scale)[0] == 0.5


def products_of_gradient(
    gradient: Tensor, matrices: Tensor, inner: Tensor, scale: float, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return both products of a gradient [tokens, m] for an adapter, times scale: `product` with matrices [experts, m,
    r], and `outer_product` with inner [tokens, r], which is [experts, m, r] in dtype.
    """
    if has_grouped_product(gradient, gradient.shape[1], inner.shape[1]):
        from mixtral_run.model.kernels.narrow_mm_triton import WIDTHS, both_narrow_products, both_pay

        if inner.shape[1] in WIDTHS and both_pay(gradient):
            return both_narrow_products(
                gradient.contiguous(), matrices.contiguous(), inner.contiguous(), scale, offsets, dtype
            )
    for_inner = product(gradient, matrices, offsets, scale=scale)
    return for_inner, outer_product(gradient, inner, offsets, dtype=dtype, scale=scale)


def add_product(base: Tensor, inner: Tensor, matrices: Tensor, scale: float, offsets: Tensor) -> Tensor:
    """Return base [tokens, n] + scale · inner [tokens, r] · matrices [experts, r, n]; it may reuse base's memory."""
    if has_grouped_product(base, base.shape[1], inner.shape[1]):
        from mixtral_run.model.kernels.narrow_mm_triton import WIDTHS, narrow_added

        if inner.shape[1] in WIDTHS:
            return narrow_added(base, inner, matrices.transpose(1, 2), scale, offsets, in_place=True)
    return base + product(inner * scale, matrices, offsets)


def frozen_product(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    source: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return rows · weightᵀ for weight [experts, out, in]: [tokens, out]. source: see `product`.

    adapter: inner [tokens, r] and linear_out [experts, out, r]; inner · linear_outᵀ is added.
    """
    _, outputs, inputs = weight.shape
    if has_grouped_product(rows, outputs, inputs) and is_portable(rows):
        half = None if adapter is None else (adapter[0], adapter[1].transpose(1, 2))
        return _portable_product(rows, weight.transpose(1, 2), offsets, half, source)
    if not _takes_own_product(rows, weight, outputs, inputs, 0 if adapter is None else adapter[0].shape[1]):
        base = product(rows, weight.transpose(1, 2), offsets, source)
        return base if adapter is None else add_product(base, adapter[0], adapter[1].transpose(1, 2), 1.0, offsets)
    from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

    rows = rows if source is None else rows.index_select(0, source)
    if adapter is not None:
        adapter = (adapter[0].contiguous(), adapter[1].contiguous())
    return grouped_product(rows.contiguous(), weight, offsets, adapter, transposed=True)


def frozen_gradient(
    gradient: Tensor, weight: Tensor, offsets: Tensor, inner: Tensor | None = None, linear_in: Tensor | None = None
) -> Tensor:
    """Return gradient [tokens, out] · weight [experts, out, in], plus inner [tokens, r] · linear_in [experts, r, in] if
    both are given.
    """
    _, outputs, inputs = weight.shape
    adapter = None if inner is None or linear_in is None else (inner, linear_in)
    if has_grouped_product(gradient, outputs, inputs) and is_portable(gradient):
        return _portable_product(gradient, weight, offsets, adapter)
    if not _takes_own_product(gradient, weight, inputs, outputs, 0 if adapter is None else adapter[0].shape[1]):
        base = product(gradient, weight, offsets)
        return base if adapter is None else add_product(base, *adapter, 1.0, offsets)
    from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

    if adapter is not None:
        adapter = (adapter[0].contiguous(), adapter[1].contiguous())
    return grouped_product(gradient.contiguous(), weight, offsets, adapter, transposed=False)


def _portable_product(
    rows: Tensor,
    matrices: Tensor,
    offsets: Tensor,
    adapter: tuple[Tensor, Tensor] | None,
    source: Tensor | None = None,
) -> Tensor:
    """Return rows · matrices [experts, k, n], plus inner · the other half [experts, r, n] of an adapter."""
    from mixtral_run.model.kernels.portable_mm_triton import RANKS, grouped_product

    rows = rows.contiguous()
    if adapter is None or adapter[0].shape[1] in RANKS:
        half = None if adapter is None else (adapter[0].contiguous(), adapter[1])
        return grouped_product(rows, matrices, offsets, half, source)
    return add_product(grouped_product(rows, matrices, offsets, source=source), *adapter, 1.0, offsets)


def _takes_own_product(rows: Tensor, weight: Tensor, width: int, depth: int, rank: int) -> bool:
    """Return True if hopper_grouped_mm.py takes this product: on Hopper, for sizes that it fits, and if its self-test
    passed.
    """
    if not has_grouped_product(rows, width, depth) or capability_of(rows.device) != (9, 0):
        return False
    if not _own_product_runs(rows.device):
        return False
    from mixtral_run.model.kernels.hopper_grouped_mm import fits

    return fits(weight.shape[0], width, depth, rank)


def prepare_products(probe: Tensor) -> None:
    """Load the products of the experts, and test them as their first call would. probe: any tensor on the device."""
    if capability_of(probe.device) == (9, 0) and not is_portable(probe):
        _own_product_runs(probe.device)


@functools.cache
def _own_product_runs(device: torch.device) -> bool:
    """Return True if hopper_grouped_mm.py compiles on this machine and small products of it are right."""

    def small() -> tuple[Tensor, Tensor]:
        # More tiles than the GPU has pairs of multiprocessors, and few tiles, which are cut into pieces.
        cases = itertools.product(((128, 10240), (2048, 768)), (False, True))
        results = [_small_products(device, *size, transposed=transposed) for size, transposed in cases]
        return torch.cat([found.view(-1) for found, _ in results]), torch.cat([right.view(-1) for _, right in results])

    why = why_not(small)
    if why:
        log.warning("bf16 experts go through torch's products, slower (%s); ours need cuda-bindings and NVRTC.", why)
    return not why


def _small_products(device: torch.device, depth: int, width: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return a product of hopper_grouped_mm.py and its reference."""
    from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

    counts, rank = [230, 70], 16
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    rows, inner = draw(sum(counts), depth), draw(sum(counts), rank)
    weight, half = (draw(2, *((width, size) if transposed else (size, width))) for size in (depth, rank))
    offsets = torch.tensor(counts, device=device).cumsum(0).int()
    found = grouped_product(rows, weight, offsets, (inner, half), transposed=transposed)
    lefts = torch.cat((rows, inner), dim=1).float().split(counts)
    rights = torch.cat((weight, half), dim=2 if transposed else 1).float()
    rights = rights.transpose(1, 2) if transposed else rights
    return found, torch.cat([left @ right for left, right in zip(lefts, rights, strict=True)])


def why_not(small: Callable[[], tuple[Tensor, Tensor]]) -> str:
    """Return why a kernel cannot be used on this machine; "" if it can.

    small: computes the kernel's result in a small case, and the reference. Any exception counts: compilers
    change from version to version.
    """
    try:
        found, expected = small()
        return (
            "" if bool((found.float() - expected).norm() < 1e-2 * expected.norm()) else "its product is not right here"
        )
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]


def each_experts(rows: Tensor, offsets: Tensor) -> list[Tensor]:
    """Return the rows of each expert. Waits for the GPU."""
    return [rows[begin:end] for begin, end in itertools.pairwise([0, *offsets.tolist()])]


def filled_up(parts: list[Tensor], count: int) -> Tensor:
    """Concatenate the parts, followed by rows of zeros up to `count` rows."""
    missing = count - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(missing, parts[0].shape[1])] if missing else parts)
