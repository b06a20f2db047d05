"""Variable-length attention beside the mask of diagonal blocks in float64, forward and backward."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.attention.packed_attention import Packed, PackedSizes, has_packed_attention, packed_attention

CASES = [((2048,),), ((1, 700, 300, 23), (1024,)), ((16,) * 64,), ((3, 5, 8), (15, 1), (16,))]


@pytest.mark.parametrize("most", [None, PackedSizes(70, 2048)])
@pytest.mark.parametrize("heads", [(32, 8), (4, 4)])
@pytest.mark.parametrize("lengths", CASES)
def test_outputs_and_gradients(
    lengths: tuple[tuple[int, ...], ...], heads: tuple[int, int], most: PackedSizes | None
) -> None:
    """most: with samples of no tokens behind the others, as where passes are recorded."""
    batch, sequence = len(lengths), sum(lengths[0])
    packed = Packed.of(lengths, torch.device("cuda"), most)
    # As the layer has them: positions before samples.
    drawn = [torch.randn(sequence, batch, count, 128, device="cuda").bfloat16() for count in (*heads, heads[1])]
    results = []
    for fast in (True, False):
        tensors = [each.detach().to(torch.bfloat16 if fast else torch.float64).requires_grad_(True) for each in drawn]
        query, key, value = (each.permute(1, 2, 0, 3) for each in tensors)
        if fast:
            assert has_packed_attention(query)
            output = packed_attention(query, key, value, packed)
        else:
            output = scaled_dot_product_attention(query, key, value, packed.mask(), enable_gqa=heads[0] != heads[1])
        weights = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=torch.float64).view_as(output)
        (output * weights.to(output)).sum().backward()
        results.append([output.detach(), *(each.grad for each in tensors)])
    for mine, expected in zip(*results, strict=True):
        error = (mine.double() - expected).norm() / expected.norm()
        assert float(error) < 1e-2
