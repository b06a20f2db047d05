"""The weight mapping is a bijection, in every layout, for architectures drawn at random."""

from __future__ import annotations

import dataclasses
import random
from math import prod

import pytest

from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.mapping.row_index import slice_index


def random_architecture(seed: int) -> MixtralArchitecture:
    draw = random.Random(seed)
    groups = draw.choice([4, 8])
    return MixtralArchitecture(
        num_layers=draw.randint(1, 3),
        hidden_size=draw.choice([5, 6, 7]),
        ffn_hidden_size=draw.choice([3, 4]),
        num_attention_heads=groups * draw.choice([1, 2, 3]),
        num_query_groups=groups,
        kv_channels=draw.choice([2, 3]),
        num_experts=8,
        moe_router_topk=2,
        vocab_size=draw.choice([8, 16]),
        max_position_embeddings=64,
        rotary_base=1e6,
        layernorm_epsilon=1e-5,
    )


def flat_index(shape: tuple[int, ...], position: tuple[int, ...]) -> int:
    index = 0
    for size, at in zip(shape, position, strict=True):
        assert 0 <= at < size
        index = index * size + at
    return index


def positions(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    result: list[tuple[int, ...]] = [()]
    for size in shape:
        result = [(*head, at) for head in result for at in range(size)]
    return result


def element_map(
    architecture: MixtralArchitecture, tensor_parallel_size: int, expert_parallel_size: int
) -> dict[tuple[str, int], tuple[str, int]]:
    """(HF tensor, element) → (Megatron key, element of the global tensor), spelled out element by element."""
    global_shapes = hf_to_megatron.megatron_tensors(architecture)
    places: dict[tuple[str, int], tuple[str, int]] = {}
    for unit in hf_to_megatron.units(architecture, tensor_parallel_size, expert_parallel_size):
        in_global = []
        for chunk in unit.chunks:
            shape = global_shapes[chunk.key]
            assert len(chunk.shape) == len(shape)
            in_global.append(
                [
                    flat_index(shape, tuple(o + p for o, p in zip(chunk.offset, position, strict=True)))
                    for position in positions(chunk.shape)
                ]
            )
        for piece in unit.pieces:
            for run in range(piece.count):
                for element in range(piece.length):
                    source = (piece.source, piece.source_start + run * piece.source_step + element)
                    assert source not in places
                    within = piece.chunk_start + run * piece.length + element
                    places[source] = (unit.chunks[piece.chunk].key, in_global[piece.chunk][within])
    return places


LAYOUTS = [(1, 1), (2, 1), (1, 4), (2, 4), (4, 8)]


@pytest.mark.parametrize("seed", range(3))
def test_every_element_has_one_place_and_it_is_the_same_in_every_layout(seed: int) -> None:
    architecture = random_architecture(seed)
    first = element_map(architecture, 1, 1)
    assert set(first) == {
        (name, element)
        for name, shape in hf_to_megatron.hf_tensors(architecture).items()
        for element in range(prod(shape))
    }
    assert sorted(first.values()) == sorted(
        (key, element)
        for key, shape in hf_to_megatron.megatron_tensors(architecture).items()
        for element in range(prod(shape))
    )
    for layout in LAYOUTS[1:]:
        assert element_map(architecture, *layout) == first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_follow_one_another_without_a_gap(layout: tuple[int, int]) -> None:
    # The copying loop relies on it: it computes checksums of sources and of chunks while it goes.
    architecture = random_architecture(7)
    for unit in hf_to_megatron.units(architecture, *layout):
        read: dict[str, int] = {}
        written: dict[int, int] = {}
        for piece in unit.pieces:
            assert piece.chunk_start == written.get(piece.chunk, 0)
            written[piece.chunk] = piece.chunk_start + piece.num_elements
            if not unit.splits_columns:
                assert piece.source_start == read.get(piece.source, 0)
                read[piece.source] = piece.source_start + piece.num_elements
        assert written == {index: chunk.num_elements for index, chunk in enumerate(unit.chunks)}
        if unit.splits_columns:
            assert len(unit.sources) == 1
            assert {(piece.count, piece.source_step) for piece in unit.pieces} == {
                (unit.pieces[0].count, unit.pieces[0].source_step)
            }
            assert sum(piece.length for piece in unit.pieces) == unit.pieces[0].source_step


def test_qkv_rows_go_group_by_group() -> None:
    architecture = random_architecture(1)
    places = element_map(architecture, 2, 1)
    a, hidden = architecture, architecture.hidden_size
    heads_of_group = a.num_attention_heads // a.num_query_groups
    for group in range(a.num_query_groups):
        first_row = group * (heads_of_group + 2) * a.kv_channels
        for name, size, before in (
            ("q_proj", heads_of_group * a.kv_channels, 0),
            ("k_proj", a.kv_channels, heads_of_group * a.kv_channels),
            ("v_proj", a.kv_channels, (heads_of_group + 1) * a.kv_channels),
        ):
            place = places[(f"model.layers.0.self_attn.{name}.weight", group * size * hidden)]
            assert place == (hf_to_megatron.LINEAR_QKV_KEY, (first_row + before) * hidden)


@pytest.mark.parametrize("layout", [(1, 1), (2, 4), (2, 8)])
def test_ranks_are_those_of_the_layout(layout: tuple[int, int]) -> None:
    architecture = random_architecture(2)
    tp, ep = layout
    ranks = {chunk.rank for unit in hf_to_megatron.units(architecture, tp, ep) for chunk in unit.chunks}
    assert ranks == set(range(hf_to_megatron.num_ranks(tp, ep)))
    for unit in hf_to_megatron.units(architecture, tp, ep):
        for chunk in unit.chunks:
            if "experts.experts" in chunk.key:
                assert chunk.rank == chunk.offset[1] // (architecture.num_experts // ep)
    assert {rank for _, rank in hf_to_megatron.extra_states(architecture, ep)} == set(range(ep))


def test_fused_places_cover_the_fused_tensors() -> None:
    architecture = random_architecture(3)
    covered: dict[str, set[int]] = {name: set() for name in hf_to_megatron.fused_tensors(architecture)}
    for name, shape in hf_to_megatron.hf_tensors(architecture).items():
        place = hf_to_megatron.fused_place(architecture, name)
        if "block_sparse_moe" not in name:
            assert place is None
            continue
        assert place is not None
        elements = set(range(place[1], place[1] + prod(shape)))
        assert not covered[place[0]] & elements
        covered[place[0]] |= elements
    for name, shape in hf_to_megatron.fused_tensors(architecture).items():
        assert covered[name] == set(range(prod(shape)))


def test_full_size_counts() -> None:
    assert sum(prod(shape) for shape in hf_to_megatron.hf_tensors(MIXTRAL_8X7B).values()) == MIXTRAL_8X7B.num_parameters
    assert (
        sum(prod(shape) for shape in hf_to_megatron.megatron_tensors(MIXTRAL_8X7B).values())
        == MIXTRAL_8X7B.num_parameters
    )
    assert len(hf_to_megatron.hf_tensors(MIXTRAL_8X7B)) == 995


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_that_tp_does_not_divide_is_padded_at_its_end(tp: int) -> None:
    architecture = dataclasses.replace(random_architecture(4), vocab_size=2 * 128 + 3)
    padded, width = 128 * tp * (2 if tp == 2 else 1), architecture.hidden_size
    assert hf_to_megatron.megatron_tensors(architecture, tp)[hf_to_megatron.EMBEDDING_KEY] == (padded, width)
    units = {unit.sources: unit for unit in hf_to_megatron.units(architecture, tp)}
    for source in ("model.embed_tokens.weight", "lm_head.weight"):
        unit, rows = units[(source,)], padded // tp
        assert [chunk.offset for chunk in unit.chunks] == [(rank * rows, 0) for rank in range(tp)]
        filled = [unit.num_filled(rank) // width for rank in range(tp)]
        assert filled == [max(0, min(rows, 259 - rank * rows)) for rank in range(tp)] and sum(filled) == 259
        assert [piece.source_start for piece in unit.pieces] == [piece.chunk * rows * width for piece in unit.pieces]
    # A model at another TP, with another padding, finds its rows, and nothing beyond the vocabulary.
    index = slice_index(architecture)
    (found,) = index.slices(hf_to_megatron.OUTPUT_LAYER_KEY, (256, 0), (128, width))
    assert (found.first_row, found.num_rows, found.target_row) == (256, 3, 0)
    assert index.slices(hf_to_megatron.OUTPUT_LAYER_KEY, (384, 0), (128, width)) == []


@pytest.mark.parametrize(
    ("key", "offset", "leading", "first_row"),
    [
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 5, 7, 0), (3, 5), 7),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (3, 5, 0, 9), (3, 5), 0),
        ("decoder.layers.self_attention.linear_qkv.weight", (2, 6, 0), (2,), 6),
        ("embedding.word_embeddings.weight", (80, 0), (), 80),
        ("decoder.layers.pre_mlp_layernorm.weight", (4, 0), (4,), 0),
        ("decoder.final_layernorm.weight", (0,), (), 0),
    ],
)
def test_layer_expert_and_row_of_a_chunk(
    key: str, offset: tuple[int, ...], leading: tuple[int, ...], first_row: int
) -> None:
    chunk = hf_to_megatron.Chunk(key, offset, (1,) * len(offset), 0)
    assert (chunk.leading, chunk.first_row) == (leading, first_row)
