"""Rows of HF tensors for a block in the middle of a Megatron tensor, written out by hand."""

import dataclasses

import pytest

from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.weights.mapping.row_index import Slice, slice_index

INDEX = slice_index(dataclasses.replace(MIXTRAL_8X7B, num_layers=2))
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.5"
ATTENTION = "model.layers.1.self_attn"


def found(key: str, offset: tuple[int, ...], rows: int, columns: int) -> list[Slice]:
    slices = INDEX.slices(key, offset, (*(1,) * (len(offset) - 2), rows, columns))
    return sorted(slices, key=lambda each: each.target_row)


def test_rows_in_the_middle_of_one_tensor() -> None:
    assert found(PROJ, (1, 5, 100), 4, 50) == [Slice(f"{ATTENTION}.o_proj.weight", 5, 4, 4096, 100, 50, 0)]


def test_rows_over_the_border_of_gate_and_up() -> None:
    assert found(FC1, (1, 5, 14334, 0), 5, 4096) == [
        Slice(f"{EXPERT}.w1.weight", 14334, 2, 4096, 0, 4096, 0),
        Slice(f"{EXPERT}.w3.weight", 0, 3, 4096, 0, 4096, 2),
    ]


def test_rows_over_the_borders_of_a_query_group() -> None:
    """A group has four heads of queries, then its keys and its values, 128 rows each: 768 rows. This is the third."""
    assert found(QKV, (1, 2 * 768 + 510, 0), 2 + 128 + 128 + 1, 4096) == [
        Slice(f"{ATTENTION}.q_proj.weight", 2 * 512 + 510, 2, 4096, 0, 4096, 0),
        Slice(f"{ATTENTION}.k_proj.weight", 2 * 128, 128, 4096, 0, 4096, 2),
        Slice(f"{ATTENTION}.v_proj.weight", 2 * 128, 128, 4096, 0, 4096, 130),
        Slice(f"{ATTENTION}.q_proj.weight", 3 * 512, 1, 4096, 0, 4096, 258),
    ]


@pytest.mark.parametrize(("most", "cuts"), [(3, [(10, 3, 2), (13, 3, 5), (16, 1, 8)]), (7, [(10, 7, 2)]), (0, None)])
def test_rows_are_cut_into_parts(most: int, cuts: list[tuple[int, int, int]] | None) -> None:
    """A limit below one row means rows one by one."""
    whole = Slice("a", 10, 7, 64, 8, 16, 2)
    expected = cuts or [(10 + row, 1, 2 + row) for row in range(7)]
    assert list(whole.parts(most)) == [Slice("a", first, rows, 64, 8, 16, target) for first, rows, target in expected]
    assert not whole.is_whole_rows and dataclasses.replace(whole, num_columns=64).is_whole_rows
