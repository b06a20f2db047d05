"""Weights in 4 bit: the published levels, rounding to the nearest level, products with dequantized weights."""

from statistics import NormalDist

import pytest
import torch

from mixtral_run.model.kernels.quantized import nf4
from mixtral_run.model.kernels.quantized.formats import LEVELS
from mixtral_run.model.kernels.quantized.quantized_mm import quantized_linear
from tests.support.references.experts_reference import ROUTINGS
from tests.unit.model.kernels.test_quantized_mm import results, written_out


def test_the_levels_are_at_equal_shares_of_a_normal_distribution() -> None:
    # Appendix E of the paper: 8 quantiles above zero, 7 below, zero itself, scaled to ±1 at the ends.
    quantile, end = NormalDist().inv_cdf, 0.9677083

    def shares(count: int) -> list[float]:
        return [quantile(end + (0.5 - end) * step / count) / quantile(end) for step in range(count)]

    expected = sorted([*shares(8), 0.0, *(-each for each in shares(7))])
    torch.testing.assert_close(torch.tensor(LEVELS), torch.tensor(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", [64, 96, 4096])
def test_each_number_is_at_its_nearest_level(width: int) -> None:
    weight = torch.randn(3, 20, width) * torch.logspace(-3, 2, 20)[:, None]
    weight[0, 0] = 0
    codes, scales = nf4.quantize(weight)
    block = 64 if width % 64 == 0 else 32
    assert (codes.dtype, codes.shape) == (torch.uint8, (3, 20, width // 2))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (3, 20, width // block))
    back = nf4.dequantize(codes, scales, torch.float32)
    places = torch.tensor(LEVELS) * scales.float().repeat_interleave(block, -1)[..., None]
    nearest = (places - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((back - weight).abs(), nearest, rtol=1e-5, atol=1e-7)
    # For normally distributed numbers the paper reports an error of about 0.09 of their size.
    assert 0.05 < float((back - weight).norm() / weight.norm()) < 0.11


def test_rows_that_no_block_divides_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        nf4.quantize(torch.ones(2, 40))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_products_are_those_of_what_comes_back(routing: tuple[int, ...]) -> None:
    torch.manual_seed(sum(routing))
    rows, weight = torch.randn(sum(routing), 64).double(), torch.randn(4, 48, 64)
    offsets = torch.tensor(routing).cumsum(0).int()
    parts = [nf4.quantize(expert) for expert in weight]
    codes, scales = (torch.stack(each) for each in zip(*parts, strict=True))
    mine = results(quantized_linear, rows, codes, scales, offsets)
    expected = results(written_out, rows, nf4.dequantize(codes, scales, torch.float64), offsets)
    for found, same in zip(mine, expected, strict=True):
        torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-10)
