"""The parts of a row that ranks get, and the bounds of their attention. No process is started."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.attention.context_attention import ContextInputs
from mixtral_run.model.attention.packed_attention import Packed, PackedSizes
from mixtral_run.model.parallel.context import ContextPart, in_row_order

CPU = torch.device("cpu")
LENGTH = 24
ROWS = ((5, 1, 12, 6), (24,))


def test_ranks_get_an_early_and_a_late_chunk() -> None:
    places = [ContextPart(rank, 3).places(12, CPU).tolist() for rank in range(3)]
    assert places == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_causal_attention_is_as_much_work_on_every_rank(size: int) -> None:
    work = {int((ContextPart(rank, size).places(LENGTH, CPU) + 1).sum()) for rank in range(size)}
    assert len(work) == 1


def test_a_row_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row of 10 tokens cannot be cut into 4 chunks"):
        ContextPart(0, 2).places(10, CPU)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_all_ranks_become_the_row_again(size: int) -> None:
    row = torch.randn(LENGTH, 2, 3)
    parts = [ContextPart(rank, size).of_row(row.transpose(0, 1)).transpose(0, 1) for rank in range(size)]
    assert torch.equal(in_row_order(torch.cat(parts), size), row)


@pytest.mark.parametrize("size", [2, 4])
def test_losses_return_to_their_places(size: int) -> None:
    losses = torch.arange(1.0, 2 * LENGTH + 1).view(2, LENGTH).requires_grad_()
    rows = [part.into_row(part.of_row(losses)) for part in (ContextPart(rank, size) for rank in range(size))]
    assert torch.equal(sum(rows, torch.zeros(2, LENGTH)), losses)
    assert [int((row != 0).sum()) for row in rows] == [2 * LENGTH // size] * size
    (gradient,) = torch.autograd.grad(rows[0].sum(), losses)
    assert torch.equal(gradient, (rows[0] != 0).float())


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the attention of the last queries of a sample; key and value are those of its tokens so far. By hand."""
    scores = query @ key.transpose(0, 1) / math.sqrt(query.shape[-1])
    for index in range(len(query)):
        scores[index, len(key) - len(query) + index + 1 :] = -torch.inf
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("most", [None, PackedSizes(6, 24)])
def test_bounds_and_mask_describe_the_attention_of_whole_rows(
    size: int, rows: tuple[tuple[int, ...], ...] | None, most: PackedSizes | None
) -> None:
    """The bounds are followed by hand, as the kernel for GPUs does: the mask of a sample ends at its last key."""
    query, key, value = (torch.randn(2, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    lengths = rows or ((LENGTH,), (LENGTH,))
    expected = torch.cat([
        scaled_dot_product_attention(*(each.split(lengths[row])[index] for each in (query[row], key[row], value[row])),
                                     is_causal=True)
        for row in range(2)
        for index in range(len(lengths[row]))
    ]).view(2, LENGTH, 8)  # fmt: skip
    packed = Packed.of(rows, CPU, most) if rows is not None else None
    for rank in range(size):
        part = ContextPart(rank, size)
        places = part.places(LENGTH, CPU)
        own = query[:, places]
        masked = ContextInputs.of(part, LENGTH, packed, 2, masked=True, device=CPU)
        assert masked.bounds is None and masked.mask is not None
        by_mask = scaled_dot_product_attention(own, key, value, attn_mask=masked.mask[:, 0])
        torch.testing.assert_close(by_mask, expected[:, places])
        bounds = ContextInputs.of(part, LENGTH, packed, 2, masked=False, device=CPU).bounds
        assert bounds is not None
        for chunk, each, wanted in zip(own.chunk(2, 1), bounds, expected[:, places].chunk(2, 1), strict=True):
            queries, keys, values = (
                tensor.flatten(0, 1) for tensor in (chunk, key[:, : each.num_keys], value[:, : each.num_keys])
            )
            assert int(each.queries[-1]) == len(queries)
            assert int(each.keys[-1]) == len(keys)
            parts = [
                _attend(queries[first:last], keys[begin:end], values[begin:end])
                for first, last, begin, end in zip(
                    *(each.queries[:-1], each.queries[1:], each.keys[:-1], each.keys[1:]), strict=True
                )
            ]
            sizes = [len(part_of) for part_of in parts]
            assert max(sizes) <= each.longest[0] and int(each.keys.diff().max()) <= each.longest[1]
            torch.testing.assert_close(torch.cat(parts).view_as(wanted), wanted)
