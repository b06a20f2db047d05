"""Experts in 8 bit on the GPU: kernels compared with torch bit for bit, products with float64."""

import pytest
import torch

from mixtral_run.model.kernels.grouped_mm import grouped_linear
from mixtral_run.model.kernels.quantized import nf4
from mixtral_run.model.kernels.quantized.quantized_mm import (
    dequantize,
    has_scaled_product,
    quantize,
    quantized_linear,
    quantized_with_inner,
)
from tests.support.references.experts_reference import PRODUCT_ROUTINGS, ROUTINGS

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("width", [64, 4096, 28672])
@pytest.mark.parametrize("with_columns", [False, True])
def test_rows_are_quantized_as_in_torch(width: int, with_columns: bool) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows

    routing = (3, 0, 40, 21)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    rows = (torch.randn(64, width, device="cuda") * torch.logspace(-8, 8, 64, device="cuda")[:, None]).bfloat16()
    rows[5] = 0
    columns = torch.rand(4, width, device="cuda") if with_columns else None
    values, scales = quantize_rows(rows, columns, offsets)
    owner = torch.repeat_interleave(torch.arange(4, device="cuda"), torch.tensor(routing, device="cuda"))
    exact = rows.float() * columns[owner] if columns is not None else rows.float()
    expected, expected_scales = quantize(exact)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    # A division rounded otherwise may fall on the other side of a tie, and then by one step.
    unequal = values.view(torch.uint8) != expected.view(torch.uint8)
    assert float(unequal.float().mean()) < 1e-3
    again = dequantize(values, scales, torch.float32)
    assert bool(((again - exact).abs() <= exact.abs() * 2**-4 * 1.01 + scales[:, None] * 2**-10 * 1.01).all())


@pytest.mark.parametrize("width", [64, 1000, 4096])
def test_rows_are_quantized_through_an_index(width: int) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows

    rows, offsets = torch.randn(30, width, device="cuda").bfloat16(), torch.tensor([70], device="cuda").int()
    source = torch.randint(0, 30, (70,), device="cuda")
    for found, expected in zip(
        quantize_rows(rows, None, offsets, source), quantize_rows(rows[source], None, offsets), strict=True
    ):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("routing", [(3, 0, 40, 21), (5, 36), (33, 32, 0, 1, 96)])
@pytest.mark.parametrize("width", [64, 1000, 28672])
def test_rows_are_quantized_with_known_scales(width: int, routing: tuple[int, ...]) -> None:
    """Rows of no expert follow; their scales are whatever was in memory."""
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows, quantize_with

    count = sum(routing)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    rows = torch.randn(count + 9, width, device="cuda").bfloat16()
    columns = torch.rand(len(routing), width, device="cuda")
    expected, scales = quantize_rows(rows, columns, offsets)
    scales[count:] = float("nan")
    found = quantize_with(rows, columns, scales, offsets)
    assert torch.equal(found[:count].view(torch.uint8), expected[:count].view(torch.uint8))


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use plain torch")
@pytest.mark.parametrize("routing", [(3, 0, 40, 21), (33, 32, 0, 1, 96)])
@pytest.mark.parametrize("ffn", [128, 14336])
def test_the_backward_pass_of_swiglu_knows_the_scales(ffn: int, routing: tuple[int, ...]) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import quantize_rows
    from mixtral_run.model.kernels.swiglu import recomputing_backward

    count, experts = sum(routing), len(routing)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    hidden, inner, gradient = (torch.randn(count + 9, size, device="cuda").bfloat16() for size in (2 * ffn, 16, ffn))
    outer = torch.randn(experts, 2 * ffn, 16, device="cuda").bfloat16()
    factors = torch.rand(experts, 2 * ffn, device="cuda")
    for_hidden, *_, scales = recomputing_backward(hidden, inner, outer, 2.0, offsets, gradient, None, factors)
    assert scales is not None
    assert torch.equal(scales[:count], quantize_rows(for_hidden, factors, offsets)[1][:count])


@pytest.mark.parametrize("shape", [(3, 128, 256), (8, 200, 72), (2, 4096, 14336)])
def test_transposed(shape: tuple[int, int, int]) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import transposed

    numbers = torch.randint(0, 120, shape, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = numbers.view(torch.uint8).transpose(1, 2).contiguous()
    assert torch.equal(transposed(numbers).view(torch.uint8), expected)


@pytest.mark.skipif(not ON_HOPPER, reason="products in 8 bit are Hopper's")
@pytest.mark.parametrize("with_scales", [True, False])
@pytest.mark.parametrize("routing", [(700, 310, 0, 1, 420, 480, 590, 444), (0, 0, 0, 0, 300, 0, 0, 0)])
def test_tiles_give_what_torchs_product_gives(routing: tuple[int, ...], with_scales: bool) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import fits_tiles, tiled_product

    rows, row_scales = quantize(torch.randn(sum(routing), 4096, device="cuda"))
    values, scales = quantize(torch.randn(8, 1024, 4096, device="cuda"))
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    assert fits_tiles(values) and not fits_tiles(values[:, :1000]) and not fits_tiles(values[:3])
    expected = torch._scaled_grouped_mm(
        rows,
        values.transpose(1, 2),
        row_scales,
        scales if with_scales else torch.ones_like(scales),
        offs=offsets,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    found = tiled_product(rows, values, row_scales, scales if with_scales else None, offsets)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=float(expected.abs().max()) * 1e-3)


# 66 pairs of programs: few tiles with long sums are split into pieces, many are assigned in rounds.
@pytest.mark.skipif(not ON_HOPPER, reason="products in 8 bit are Hopper's")
@pytest.mark.parametrize("width", [256, 2816, 8192])
@pytest.mark.parametrize("depth", [128, 384, 4096])
@pytest.mark.parametrize("rank", [None, 0, 8, 16, 40, 64])
@pytest.mark.parametrize("routing", PRODUCT_ROUTINGS)
def test_our_own_product_in_8_bit(routing: tuple[int, ...], rank: int | None, depth: int, width: int) -> None:
    """rank: of the gradient's adapter; None for the forward product. Rows after the last offset belong to no expert."""
    from mixtral_run.model.kernels.hopper_grouped_mm import scaled_product as own_product

    count, experts = sum(routing), len(routing)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    rows, row_scales = quantize(torch.randn(count + 40, depth, device="cuda"))
    shape = (width, depth) if rank is None else (depth, width)
    matrices = torch.randn(experts, *shape, device="cuda").to(rows.dtype)
    scales = torch.rand(experts, width, device="cuda") if rank is None else None
    inner, half = (
        torch.randn(size, device="cuda").bfloat16() for size in ((count + 40, rank or 8), (experts, rank or 8, width))
    )
    adapter = (inner, half) if rank else None
    found, again = (
        own_product(rows, matrices, row_scales, scales, offsets, adapter, transposed=rank is None)[:count]
        for _ in range(2)
    )
    assert torch.equal(found, again)
    expected = []
    for expert, (begin, size) in enumerate(zip([0, *offsets.tolist()], routing, strict=False)):
        part = slice(begin, begin + size)
        matrix = matrices[expert].double()
        one = rows[part].double() @ (matrix.T if rank is None else matrix) * row_scales[part, None].double()
        if scales is not None:
            one *= scales[expert].double()
        if rank:
            one += inner[part].double() @ half[expert].double()
        expected.append(one)
    right = torch.cat(expected)
    assert float((found - right).norm()) <= 4e-3 * float(right.norm())


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_with_an_adapters_lesser_half(routing: tuple[int, ...], rank: int) -> None:
    """Rank 8 uses transposed weights, rank 16 does not."""
    drawn = torch.randn(sum(routing), 512, device="cuda").bfloat16()
    values, scales = quantize(torch.randn(4, 768, 512, device="cuda"))
    half = torch.randn(4, rank, 512, device="cuda").bfloat16()
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    found = []
    for together in (False, True):
        rows, linear_in = drawn.clone().requires_grad_(True), half.clone().requires_grad_(True)
        if together:
            output, inner = quantized_with_inner(rows, values, scales, offsets, linear_in, None)
        else:
            output, inner = quantized_linear(rows, values, scales, offsets), grouped_linear(rows, linear_in, offsets)
        (output.float().sin().sum() + inner.float().cos().sum()).backward()
        found.append((output.detach(), inner.detach(), rows.grad, linear_in.grad))
    for expected, mine in zip(*found, strict=True):
        if mine.numel():
            assert float((mine - expected).float().norm()) <= 6e-3 * float(expected.float().norm())


@pytest.mark.parametrize("shape", [(768, 512), (80, 48)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients(routing: tuple[int, ...], shape: tuple[int, int], kernels: str) -> None:
    outputs, inputs = shape
    generator = torch.Generator("cuda").manual_seed(sum(routing))
    drawn = torch.randn(sum(routing), inputs, device="cuda", generator=generator).bfloat16()
    sizes = torch.logspace(-3, 1, outputs, device="cuda")[torch.randperm(outputs, device="cuda")]
    values, scales = quantize(torch.randn(4, outputs, inputs, device="cuda", generator=generator) * sizes[:, None])
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    if sum(routing):
        assert has_scaled_product(drawn, values) == (ON_HOPPER and kernels == "auto")
    results = []
    for exact in (False, True):
        rows = (drawn.double() if exact else drawn.clone()).requires_grad_(True)
        if exact:
            matrices = dequantize(values, scales, torch.float64)
            starts = [0, *offsets.tolist()]
            output = torch.cat([rows[s : starts[e + 1]] @ matrices[e].t() for e, s in enumerate(starts[:-1])])
        else:
            output = quantized_linear(rows, values, scales, offsets)
        weights = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=torch.float64).view_as(output)
        (output * weights.to(output)).sum().backward()
        results.append((output.detach(), rows.grad))
    for mine, expected in zip(*results, strict=True):
        assert not torch.isnan(mine).any()
        if mine.numel():
            # Both the rows and the gradients are rounded to 8 bit on Hopper, to 16 elsewhere.
            assert float((mine.double() - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("shape", [(3, 8, 96), (2, 100, 4096), (8, 64, 14336)])
def test_four_bits_come_back_as_in_torch(shape: tuple[int, int, int]) -> None:
    codes, scales = nf4.quantize(torch.randn(shape, device="cuda"))
    expected = nf4.plain_dequantize(codes, scales, torch.bfloat16)
    assert torch.equal(nf4.dequantize(codes, scales, torch.bfloat16), expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_products_in_four_bits(routing: tuple[int, ...]) -> None:
    weight = torch.randn(4, 768, 512, device="cuda")
    codes, scales = nf4.quantize(weight)
    matrices = nf4.plain_dequantize(codes, scales, torch.float64)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    drawn = torch.randn(sum(routing), 512, device="cuda").bfloat16()
    rows = drawn.clone().requires_grad_(True)
    output = quantized_linear(rows, codes, scales, offsets)
    output.backward(torch.ones_like(output))
    starts = [0, *offsets.tolist()]
    owner = torch.repeat_interleave(torch.arange(4, device="cuda"), torch.tensor(routing, device="cuda"))
    expected = torch.cat([drawn[s : starts[e + 1]].double() @ matrices[e].t() for e, s in enumerate(starts[:-1])])
    for mine, exact in ((output.detach(), expected), (rows.grad, matrices.sum(1)[owner])):
        if mine.numel():
            assert float((mine.double() - exact).norm() / exact.norm()) < 1e-2
