"""Attention of a rank's chunks by torch's variable-length kernel, against attention by a mask over whole rows."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.attention.context_attention import ContextInputs, attention_of_chunks
from mixtral_run.model.attention.packed_attention import Packed, PackedSizes
from mixtral_run.model.parallel.context import ContextPart

LENGTH, BATCH, HEADS, GROUPS, SIZE = 1024, 2, 8, 2, 128
PACKED = ((300, 1, 211, 512), (1000, 24))


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Return causal attention within samples for whole rows, in fp32."""
    mask = (owner[:, None, :, None] == owner[:, None, None, :]).tril()
    parts = (each.float() for each in (query, key, value))
    return scaled_dot_product_attention(*parts, attn_mask=mask, scale=1 / math.sqrt(SIZE), enable_gqa=True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", [None, PACKED])
@pytest.mark.parametrize("most", [None, PackedSizes(7, 1000)])
def test_chunks_attend_as_whole_rows_do(
    size: int, lengths: tuple[tuple[int, ...], ...] | None, most: PackedSizes | None
) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(3)
    shapes = [(BATCH, heads, LENGTH, SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    query, key, value, upstream = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    leaves = [each.requires_grad_() for each in (query, key, value)]
    packed = Packed.of(lengths, device, most) if lengths is not None else None
    owner = packed.owner if packed is not None else torch.zeros(BATCH, LENGTH, device=device)
    expected = reference(query, key, value, owner)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream.float())
    output = torch.zeros_like(expected)
    for rank in range(size):
        part = ContextPart(rank, size)
        inputs = ContextInputs.of(part, LENGTH, packed, BATCH, masked=False, device=device)
        assert inputs.bounds is not None
        places = part.places(LENGTH, device)
        own = attention_of_chunks(query[:, :, places], key, value, inputs.bounds)
        output = output.index_copy(2, places, own.float())
    gradients = torch.autograd.grad(output, leaves, upstream.float())
    for found, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(error) < 1e-2
