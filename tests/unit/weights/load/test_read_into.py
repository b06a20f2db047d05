"""An HF directory read straight into Megatron's tensors: what the tensors, joined here by hand, have."""

from __future__ import annotations

import zlib
from itertools import product
from pathlib import Path

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.hf_weights import HFWeights, open_hf_weights
from mixtral_run.weights.load import read_parts
from mixtral_run.weights.load.read_parts import PartSum, Target, checksums_of, default_workers, read_into
from tests.support.tiny import write_tiny

CONFIG = {
    "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "num_local_experts": 3, "vocab_size": 10, "max_position_embeddings": 64,
}  # fmt: skip
QKV = "decoder.layers.self_attention.linear_qkv.weight"
Weights = tuple[HFWeights, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("hf") / "model"
    tensors = write_tiny(folder, dtype=torch.bfloat16, num_shards=2, **CONFIG)
    return open_hf_weights(folder), tensors


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's tensors by key. A query group has two heads of queries, a key and a value of four rows each."""

    def of(layer: int, name: str) -> torch.Tensor:
        return tensors[f"model.layers.{layer}.{name}.weight"]

    def expert(layer: int, number: int, name: str) -> torch.Tensor:
        return of(layer, f"block_sparse_moe.experts.{number}.{name}")

    def qkv(layer: int) -> torch.Tensor:
        q, k, v = (of(layer, f"self_attn.{each}_proj") for each in "qkv")
        return torch.cat([q[:8], k[:4], v[:4], q[8:], k[4:], v[4:]])

    layers, experts = range(2), range(3)
    gate_up = [[torch.cat([expert(n, e, "w1"), expert(n, e, "w3")]) for e in experts] for n in layers]
    down = [[expert(n, e, "w2") for e in experts] for n in layers]
    return {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.stack(
            [of(n, "input_layernorm") for n in layers]
        ),
        "decoder.layers.pre_mlp_layernorm.weight": torch.stack([of(n, "post_attention_layernorm") for n in layers]),
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack([qkv(n) for n in layers]),
        "decoder.layers.self_attention.linear_proj.weight": torch.stack([of(n, "self_attn.o_proj") for n in layers]),
        "decoder.layers.mlp.router.weight": torch.stack([of(n, "block_sparse_moe.gate") for n in layers]),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.stack([torch.stack(each) for each in gate_up]),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": torch.stack([torch.stack(each) for each in down]),
    }


def targets(whole: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[tuple[str, tuple[int, ...]], Target]:
    """One target for each layer and expert of every tensor."""
    found = {}
    for key, tensor in whole.items():
        axes = 1 if "norm" in key else 2
        leading = tensor.shape[: tensor.dim() - axes]
        for index in product(*map(range, leading)):
            shape = (*(1 for _ in leading), *tensor.shape[tensor.dim() - axes :])
            offset = (*index, *(0 for _ in range(axes)))
            found[key, index] = Target(key, offset, shape, torch.full(shape, -1.0, dtype=dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("part_bytes", [20, 2**20])
def test_all_tensors_and_their_checksums(
    source: Weights,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    part_bytes: int,
) -> None:
    weights, tensors = source
    monkeypatch.setattr(read_parts, "PART_BYTES", part_bytes)
    monkeypatch.setattr(read_parts, "BLOCK_BYTES", 24)
    whole = joined(tensors)
    wanted = targets(whole, dtype)
    steps: list[int] = []
    sums = read_into(weights, wanted.values(), workers=3, advance=steps.append)
    for (key, index), target in wanted.items():
        expected = whole[key][index]
        assert torch.equal(target.data.view(expected.shape), expected.to(dtype)), (key, index)
    assert sum(steps) == sum(each.nbytes for each in tensors.values())
    crcs = {name: zlib.crc32(each.view(torch.int16).numpy().tobytes()) for name, each in tensors.items()}
    assert checksums_of(weights.sources, sums) == crcs
    # A second rank may read the same bytes, but not others.
    assert checksums_of(weights.sources, [*sums, *sums]) == crcs
    odd = PartSum(sums[0].source, sums[0].start, sums[0].num_bytes, sums[0].crc ^ 1)
    with pytest.raises(WeightsError, match="changed while they were read") as caught:
        checksums_of(weights.sources, [*sums, odd])
    assert caught.value.expected == f"CRC-32 {sums[0].crc:08x} of {sums[0].num_bytes:,} bytes, as another process read"
    for lost in sums[:1], [each for each in sums if each.source == "lm_head.weight"][-1:]:
        others = [each for each in sums if each.source == lost[0].source and each not in lost]
        if others:
            with pytest.raises(AssertionError, match="belong to no rank"):
                checksums_of(weights.sources, others)


def test_some_columns_and_padded_rows(source: Weights) -> None:
    weights, tensors = source
    head = Target("output_layer.weight", (8, 2), (4, 5), torch.full((4, 5), -1.0, dtype=torch.bfloat16))
    qkv = Target(
        "decoder.layers.self_attention.linear_qkv.weight",
        (1, 10, 0),
        (1, 8, 8),
        torch.zeros(8, 8, dtype=torch.bfloat16),
    )
    read_into(weights, [head, qkv], workers=1)
    assert torch.equal(head.data[:2], tensors["lm_head.weight"][8:10, 2:7])
    # Two rows are padding: nothing fills them.
    assert head.data[2:].eq(-1).all()
    whole = joined(tensors)["decoder.layers.self_attention.linear_qkv.weight"]
    assert torch.equal(qkv.data, whole[1, 10:18])


def test_an_error_in_one_thread_ends_all(source: Weights) -> None:
    weights, tensors = source
    wanted = targets(joined(tensors), torch.bfloat16)

    def advance(_: int) -> None:
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        read_into(weights, wanted.values(), workers=4, advance=advance)


def test_threads_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, expected in ((64, "8", 8), (64, "1", 16), (8, "8", 2), (24, "2", 12), (12, None, 12)):
        monkeypatch.setattr(read_parts, "num_cores", lambda cores=cores: cores)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == expected


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", dtype=torch.bfloat16, num_shards=1, **CONFIG)
    weights = open_hf_weights(tmp_path / "model")
    weights.files[0].unlink()
    head = Target("output_layer.weight", (0, 0), (10, 8), torch.zeros(10, 8, dtype=torch.bfloat16))
    with pytest.raises(WeightsError) as caught:
        read_into(weights, [head])
    assert (caught.value.found, caught.value.where) == ("No such file or directory", str(weights.files[0]))
