"""Map HF tensor names to Megatron keys and back, as ranges of elements. Pure: no tensor is touched here.

The map is a bijection: every element of the HF model has one place in the Megatron checkpoint and the other way round.
It consists of `Unit`s, the smallest groups of tensors that have to be copied together: a whole expert weight is a unit,
the queries, keys and values of a layer are one because Megatron interleaves their rows by query group.

Sources: the released layout of mistralai/Mixtral-8x7B-v0.1; Megatron's side was read off checkpoints that megatron-core
0.16.1 itself wrote (homogeneous layers: the layer axis is part of the tensor; SwiGLU's gate and up are two chunks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod

from mixtral_run.model.architecture import MixtralArchitecture

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_LAYER_KEY = "output_layer.weight"
FINAL_LAYERNORM_KEY = "decoder.final_layernorm.weight"
# Megatron keeps the norm before attention with the linear layer that follows it: Transformer Engine fuses the two, and
# the local layer spec renames its own. The norm before the experts is a layer of its own with Transformer Engine.
INPUT_LAYERNORM_KEY = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
PRE_MLP_LAYERNORM_KEY = "decoder.layers.pre_mlp_layernorm.weight"
LOCAL_PRE_MLP_LAYERNORM_KEY = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
"""The key of PRE_MLP_LAYERNORM_KEY in megatron-core's layers without Transformer Engine (gpt_layer_specs.py)."""
LINEAR_QKV_KEY = "decoder.layers.self_attention.linear_qkv.weight"
LINEAR_PROJ_KEY = "decoder.layers.self_attention.linear_proj.weight"
ROUTER_KEY = "decoder.layers.mlp.router.weight"
LINEAR_FC1_KEY = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
LINEAR_FC2_KEY = "decoder.layers.mlp.experts.experts.linear_fc2.weight"

VOCABULARY_KEYS = frozenset({EMBEDDING_KEY, OUTPUT_LAYER_KEY})
"""Keys whose rows are the vocabulary, and may be padded."""

VECTOR_KEYS = frozenset({FINAL_LAYERNORM_KEY, INPUT_LAYERNORM_KEY, PRE_MLP_LAYERNORM_KEY})
"""Keys whose tensors have one axis after those for layers; the others have rows and columns."""


@dataclass(frozen=True)
class Chunk:
    """A block of one Megatron tensor as one rank writes it: contiguous, row-major."""

    key: str
    offset: Shape  # of its first element in the global tensor
    shape: Shape  # as many axes as the global tensor; 1 along layers and experts
    rank: int  # the first rank of the layout that holds it

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def leading(self) -> Shape:
        """Return its layer and expert, if it has them: the axes before the rows."""
        return self.offset[: -1 if self.key in VECTOR_KEYS else -2]

    @property
    def first_row(self) -> int:
        """Return its first row in the global tensor; a vector is one row."""
        return 0 if self.key in VECTOR_KEYS else self.offset[-2]


@dataclass(frozen=True)
class Piece:
    """`count` runs of `length` elements of an HF tensor, `source_step` apart, which are contiguous in a chunk."""

    source: str
    source_start: int
    chunk: int  # index in Unit.chunks
    chunk_start: int
    length: int
    count: int = 1
    source_step: int = 0

    @property
    def num_elements(self) -> int:
        return self.length * self.count


@dataclass(frozen=True)
class Unit:
    """Chunks and the pieces that fill them.

    Either every piece is one run, and then the pieces of each source and those of each chunk follow one another without
    a gap, in this order; or the unit splits the columns of one source: its pieces have a run a row, side by side.
    Elements of a chunk that no piece fills are padding of the vocabulary, at its end; they are zeros.
    """

    chunks: tuple[Chunk, ...]
    pieces: tuple[Piece, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the HF tensors of the unit, in the order of their first piece."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))

    def num_filled(self, chunk: int) -> int:
        """Return the number of elements of a chunk that pieces fill; padding of the vocabulary follows them."""
        return sum(piece.num_elements for piece in self.pieces if piece.chunk == chunk)

    @property
    def splits_columns(self) -> bool:
        return any(piece.count > 1 for piece in self.pieces)


def num_ranks(tensor_parallel_size: int, expert_parallel_size: int) -> int:
    """Return the smallest number of ranks that can hold this layout."""
    return lcm(tensor_parallel_size, expert_parallel_size)


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Return HF's name of w1 (gate), w2 (down) or w3 (up) of one expert, in the released layout."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight"


def hf_tensors(architecture: MixtralArchitecture) -> dict[str, Shape]:
    """Return every tensor of the HF model in the released layout, with its shape."""
    a = architecture
    hidden, ffn, kv = a.hidden_size, a.ffn_hidden_size, a.num_query_groups * a.kv_channels
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (a.vocab_size, hidden)}
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (a.projection_size, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, a.projection_size),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "block_sparse_moe.gate.weight": (a.num_experts, hidden),
        }
        for expert in range(a.num_experts):
            tensors[expert_name(layer, expert, "w1")] = (ffn, hidden)
            tensors[expert_name(layer, expert, "w2")] = (hidden, ffn)
            tensors[expert_name(layer, expert, "w3")] = (ffn, hidden)
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (a.vocab_size, hidden)
    return tensors


def fused_tensors(architecture: MixtralArchitecture) -> dict[str, Shape]:
    """Return the tensors that replace experts and routers in the in-memory layout that transformers 5 writes."""
    a = architecture
    tensors: dict[str, Shape] = {}
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}.mlp."
        tensors[prefix + "gate.weight"] = (a.num_experts, a.hidden_size)
        tensors[prefix + "experts.gate_up_proj"] = (a.num_experts, 2 * a.ffn_hidden_size, a.hidden_size)
        tensors[prefix + "experts.down_proj"] = (a.num_experts, a.hidden_size, a.ffn_hidden_size)
    return tensors


def fused_place(architecture: MixtralArchitecture, name: str) -> tuple[str, int] | None:
    """Return the fused tensor that holds a tensor of the released layout, and its first element there, or None."""
    before, moe, after = name.partition(".block_sparse_moe.")
    if not moe:
        return None
    prefix = before + ".mlp."
    if after == "gate.weight":
        return prefix + "gate.weight", 0
    _, expert, projection, _ = after.split(".")
    size = architecture.ffn_hidden_size * architecture.hidden_size
    if projection == "w2":
        return prefix + "experts.down_proj", int(expert) * size
    return prefix + "experts.gate_up_proj", (2 * int(expert) + (projection == "w3")) * size


def megatron_tensors(architecture: MixtralArchitecture, tensor_parallel_size: int = 1) -> dict[str, Shape]:
    """Return every tensor of the Megatron checkpoint with its global shape, which TP may pad along the vocabulary."""
    a, vocabulary = architecture, architecture.padded_vocab_size(tensor_parallel_size)
    layers, experts, hidden, ffn = a.num_layers, a.num_experts, a.hidden_size, a.ffn_hidden_size
    return {
        EMBEDDING_KEY: (vocabulary, hidden),
        INPUT_LAYERNORM_KEY: (layers, hidden),
        LINEAR_QKV_KEY: (layers, a.qkv_size, hidden),
        LINEAR_PROJ_KEY: (layers, hidden, a.projection_size),
        PRE_MLP_LAYERNORM_KEY: (layers, hidden),
        ROUTER_KEY: (layers, experts, hidden),
        LINEAR_FC1_KEY: (layers, experts, 2 * ffn, hidden),
        LINEAR_FC2_KEY: (layers, experts, hidden, ffn),
        FINAL_LAYERNORM_KEY: (hidden,),
        OUTPUT_LAYER_KEY: (vocabulary, hidden),
    }


def extra_states(architecture: MixtralArchitecture, expert_parallel_size: int) -> Iterator[tuple[str, int]]:
    """Yield (key, rank) of the objects that Megatron's strict loading expects for all linear layers but the output.

    They hold None where no Transformer Engine wrote them.
    """
    layers, experts = architecture.num_layers, architecture.num_experts
    for layer in range(layers):
        for linear in ("linear_qkv", "linear_proj"):
            yield f"decoder.layers.self_attention.{linear}._extra_state/shard_{layer}_{layers}", 0
        for expert in range(experts):
            rank = expert // (experts // expert_parallel_size)
            for linear in ("linear_fc1", "linear_fc2"):
                yield (
                    f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
                    f"shard_{layer}.{expert}_{layers}.{experts}",
                    rank,
                )


def units(
    architecture: MixtralArchitecture, tensor_parallel_size: int = 1, expert_parallel_size: int = 1
) -> Iterator[Unit]:
    """Yield the whole map for one layout, which must fit the architecture (`MixtralArchitecture.layout_problems`)."""
    a, tp = architecture, tensor_parallel_size
    hidden, ffn = a.hidden_size, a.ffn_hidden_size
    vocabulary = a.padded_vocab_size(tp)
    yield _rows("model.embed_tokens.weight", EMBEDDING_KEY, (a.vocab_size, hidden), vocabulary, tp)
    for layer in range(a.num_layers):
        prefix, at = f"model.layers.{layer}.", (layer,)
        yield _whole(prefix + "input_layernorm.weight", INPUT_LAYERNORM_KEY, at, (hidden,))
        yield _qkv(a, layer, tp)
        yield _columns(prefix + "self_attn.o_proj.weight", LINEAR_PROJ_KEY, at, (hidden, a.projection_size), tp)
        yield _whole(prefix + "post_attention_layernorm.weight", PRE_MLP_LAYERNORM_KEY, at, (hidden,))
        yield _whole(prefix + "block_sparse_moe.gate.weight", ROUTER_KEY, at, (a.num_experts, hidden))
        for expert in range(a.num_experts):
            rank, slot = expert // (a.num_experts // expert_parallel_size), (layer, expert)
            yield _whole(expert_name(layer, expert, "w1"), LINEAR_FC1_KEY, slot, (ffn, hidden), rank)
            yield _whole(expert_name(layer, expert, "w3"), LINEAR_FC1_KEY, slot, (ffn, hidden), rank, first_row=ffn)
            yield _whole(expert_name(layer, expert, "w2"), LINEAR_FC2_KEY, slot, (hidden, ffn), rank)
    yield _whole("model.norm.weight", FINAL_LAYERNORM_KEY, (), (hidden,))
    yield _rows("lm_head.weight", OUTPUT_LAYER_KEY, (a.vocab_size, hidden), vocabulary, tp)


@dataclass(frozen=True)
class RowRanges:
    """The rows of one Megatron tensor that make up an HF tensor, in order."""

    key: str
    leading: Shape  # layer, or layer and expert
    columns: int
    rows: tuple[tuple[int, int], ...]


def row_ranges(architecture: MixtralArchitecture) -> dict[str, RowRanges]:
    """Return the inverse map: HF tensor → its rows in the Megatron checkpoint; a vector is one row."""
    found: dict[str, RowRanges] = {}
    for unit in units(architecture):
        (chunk,) = unit.chunks
        columns = chunk.shape[-1]
        rows: dict[str, list[tuple[int, int]]] = {}
        for piece in unit.pieces:
            first = chunk.first_row + piece.chunk_start // columns
            rows.setdefault(piece.source, []).append((first, first + piece.num_elements // columns))
        for source, ranges in rows.items():
            found[source] = RowRanges(chunk.key, chunk.leading, columns, tuple(ranges))
    return found


def _ones(leading: Shape) -> Shape:
    return (1,) * len(leading)


def _whole(name: str, key: str, leading: Shape, shape: Shape, rank: int = 0, first_row: int = 0) -> Unit:
    """Return the unit of an HF tensor that is one chunk; `first_row` moves it along the axis after the leading ones."""
    offset = (*leading, first_row, *(0,) * (len(shape) - 1))
    chunk = Chunk(key, offset, _ones(leading) + shape, rank)
    return Unit((chunk,), (Piece(name, 0, 0, 0, prod(shape)),))


def _rows(name: str, key: str, shape: Shape, padded_rows: int, tp: int) -> Unit:
    """Return the unit of a matrix whose rows are split over TP, after padding them to `padded_rows`."""
    rows, columns = padded_rows // tp, shape[1]
    chunks = tuple(Chunk(key, (t * rows, 0), (rows, columns), t) for t in range(tp))
    filled = [min(rows, max(0, shape[0] - t * rows)) for t in range(tp)]
    pieces = tuple(Piece(name, t * rows * columns, t, 0, count * columns) for t, count in enumerate(filled) if count)
    return Unit(chunks, pieces)


def _columns(name: str, key: str, leading: Shape, shape: Shape, tp: int) -> Unit:
    if tp == 1:
        return _whole(name, key, leading, shape)
    rows, all_columns = shape
    columns = all_columns // tp
    chunks = tuple(Chunk(key, (*leading, 0, t * columns), (*_ones(leading), rows, columns), t) for t in range(tp))
    pieces = tuple(Piece(name, t * columns, t, 0, columns, rows, all_columns) for t in range(tp))
    return Unit(chunks, pieces)


def _qkv(architecture: MixtralArchitecture, layer: int, tp: int) -> Unit:
    """Return the unit of linear_qkv. Rows go by query group: its queries, its key, its value (Megatron's order)."""
    a = architecture
    prefix = f"model.layers.{layer}.self_attn."
    rows = a.qkv_size // tp
    chunks = tuple(Chunk(LINEAR_QKV_KEY, (layer, t * rows, 0), (1, rows, a.hidden_size), t) for t in range(tp))
    head = a.kv_channels * a.hidden_size
    sizes = {"q_proj": a.num_attention_heads // a.num_query_groups * head, "k_proj": head, "v_proj": head}
    groups_of_rank = a.num_query_groups // tp
    pieces = []
    for group in range(a.num_query_groups):
        rank, within = divmod(group, groups_of_rank)
        place = within * sum(sizes.values())
        for projection, size in sizes.items():
            pieces.append(Piece(f"{prefix}{projection}.weight", group * size, rank, place, size))
            place += size
    return Unit(chunks, tuple(pieces))
