"""The tensors of an adapter, with shapes and rows written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.weights.adapter.checkpoint import check_tensors, parts_of_vocabulary
from mixtral_run.weights.adapter.lora_factors import CheckpointFactors
from mixtral_run.weights.adapter.schema import adapter_tensors, is_of_optimizer, trained_also
from mixtral_run.weights.adapter.schema import places as product_places
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from tests.support.stored_checkpoint import store
from tests.unit.weights.adapter.tiny_factors import ROWS, TINY, places

QKV = "decoder.layers.self_attention.linear_qkv.adapter."
PROJ = "decoder.layers.self_attention.linear_proj.adapter."
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.adapter."
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.adapter."
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LORA = LoraSettings(2, 6.0, 0.0, ALL, expert_rank=3, expert_alpha=12.0)
SHAPES = {
    QKV + "linear_in.weight": (2, 2, 8),
    QKV + "linear_out.weight": (2, 32, 2),
    PROJ + "linear_in.weight": (2, 2, 16),
    PROJ + "linear_out.weight": (2, 8, 2),
    FC1 + "linear_in.weight": (2, 3, 3, 8),
    FC1 + "linear_out.weight": (2, 3, 12, 3),
    FC2 + "linear_in.weight": (2, 3, 3, 6),
    FC2 + "linear_out.weight": (2, 3, 8, 3),
}
NORM = {"model.norm.weight", *(f"model.layers.{layer}.{name}_layernorm.weight" for layer in (0, 1)
        for name in ("input", "post_attention"))}  # fmt: skip


def test_shapes_of_all_modules() -> None:
    assert adapter_tensors(TINY, LORA) == SHAPES
    only = dataclasses.replace(LORA, target_modules=("linear_fc2",), shared=True)
    assert adapter_tensors(TINY, only) == {FC2 + "linear_in.weight": (2, 3, 6), FC2 + "linear_out.weight": (2, 8, 3)}
    started = dataclasses.replace(LORA, target_modules=("linear_qkv",), init="pissa")
    assert adapter_tensors(TINY, started) == {
        QKV + f"{part}_{end}.weight": shape
        for part in ("linear", "initial")
        for end, shape in (("in", (2, 2, 8)), ("out", (2, 32, 2)))
    }
    also = dataclasses.replace(LORA, target_modules=(), train_also=("embeddings", "lm_head", "norms", "router"))
    # Ten words over TP 3 are padded to 3 times 128.
    assert adapter_tensors(TINY, also, 3) == {
        "embedding.word_embeddings.weight": (384, 8),
        "output_layer.weight": (384, 8),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 8),
        "decoder.layers.pre_mlp_layernorm.weight": (2, 8),
        "decoder.final_layernorm.weight": (8,),
        "decoder.layers.mlp.router.weight": (2, 3, 8),
    }


def test_rows_of_each_hf_tensor() -> None:
    assert dict(product_places(TINY, LORA)) == places(*ALL)
    found = product_places(TINY, dataclasses.replace(LORA, target_modules=("linear_proj",)))
    assert dict(found) == places("linear_proj")
    assert {name: each.num_rows for name, each in found.items()} == {
        f"model.layers.{layer}.self_attn.o_proj.weight": 8 for layer in (0, 1)
    }
    assert {each.num_rows for each in places("linear_qkv").values()} == {8, 16}
    assert {name: rows for name, (_, rows) in ROWS.items() if name == "w3"} == {"w3": ((6, 12),)}


def test_weights_of_the_base_that_are_trained() -> None:
    assert trained_also(TINY, LORA) == {}
    assert set(trained_also(TINY, dataclasses.replace(LORA, train_also=("norms",)))) == NORM
    found = trained_also(TINY, dataclasses.replace(LORA, train_also=("router", "lm_head")))
    assert set(found) == {"lm_head.weight", *(f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1))}
    assert found["lm_head.weight"].rows == ((0, 10),)
    assert is_of_optimizer("optimizer.state.exp_avg") and not is_of_optimizer(QKV + "linear_in.weight")


def stored(folder: Path, lora: LoraSettings, **changes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in adapter_tensors(TINY, lora, 3).items()}
    tensors |= changes
    store(folder, {key: each for key, each in tensors.items() if each is not None})
    return tensors


def test_factors_of_a_checkpoint(tmp_path: Path) -> None:
    lora = dataclasses.replace(LORA, train_also=("lm_head", "router", "norms"))
    tensors = stored(tmp_path, lora)
    with Reader(tmp_path) as reader:
        factors = CheckpointFactors(TINY, lora, places(*ALL), reader)
        assert (factors.dtype, factors.target_modules) == (("float32", 4), ALL)
        assert [factors.rank(module) for module in ALL] == [2, 2, 3, 3]
        assert [factors.scale(module) for module in ALL] == [3.0, 3.0, 4.0, 4.0]
        for name, place in places(*ALL).items():
            prefix = {"linear_qkv": QKV, "linear_proj": PROJ, "linear_fc1": FC1, "linear_fc2": FC2}[place.module]
            a, b = (tensors[f"{prefix}linear_{end}.weight"][place.leading] for end in ("in", "out"))
            assert torch.equal(factors.a(name), a)
            assert torch.equal(factors.b(name), torch.cat([b[start:stop] for start, stop in place.rows]))
        assert torch.equal(factors.outer("linear_fc1", (1, 2)), tensors[FC1 + "linear_out.weight"][1, 2])
        # Vocabulary: without the padded rows. Norms: a vector.
        assert torch.equal(factors.trained("lm_head.weight"), tensors["output_layer.weight"][:10])
        router = tensors["decoder.layers.mlp.router.weight"]
        assert torch.equal(factors.trained("model.layers.1.block_sparse_moe.gate.weight"), router[1])
        norms = tensors["decoder.layers.pre_mlp_layernorm.weight"]
        assert torch.equal(factors.trained("model.layers.1.post_attention_layernorm.weight"), norms[1])
        assert set(factors.trained_also) == NORM | {
            "lm_head.weight", *(f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1)),
        }  # fmt: skip


def test_factors_that_the_experts_of_a_layer_share_and_those_of_the_start(tmp_path: Path) -> None:
    lora = LoraSettings(2, 4.0, 0.0, ("linear_fc1",), shared=True, init="pissa")
    key = FC1 + "{}_{}.weight"
    tensors = {
        key.format(part, end): torch.randn(2, *shape)
        for part in ("linear", "initial")
        for end, shape in (("in", (2, 8)), ("out", (12, 2)))
    }
    store(tmp_path, tensors)
    with Reader(tmp_path) as reader:
        for part in ("linear", "initial"):
            factors = CheckpointFactors(TINY, lora, places("linear_fc1"), reader, part)
            for expert in range(3):
                assert torch.equal(factors.inner("linear_fc1", (1, expert)), tensors[key.format(part, "in")][1])
                found = factors.outer("linear_fc1", (0, expert), ((6, 12), (0, 1)))
                whole = tensors[key.format(part, "out")][0]
                assert torch.equal(found, torch.cat([whole[6:12], whole[:1]]))


def test_bits_of_bfloat16_are_kept(tmp_path: Path) -> None:
    from mixtral_run.weights.adapter.lora_factors import as_bytes, as_tensor

    values = torch.tensor([[1.5, -2.0], [0.1, float("inf")]], dtype=torch.bfloat16)
    raw = values.view(torch.int16).numpy().tobytes()
    assert as_bytes(values).tobytes() == raw
    assert as_bytes(values.T).tobytes() == values.T.contiguous().view(torch.int16).numpy().tobytes()
    bits = np.frombuffer(bytearray(raw), np.uint16).reshape(2, 2)
    assert as_tensor(bits, "bfloat16").dtype == torch.bfloat16
    assert torch.equal(as_tensor(bits, "bfloat16"), values)
    assert as_bytes(values.float()).tobytes() == values.float().numpy().tobytes()


def opened(lora: LoraSettings) -> Any:
    checkpoint = SimpleNamespace(architecture=TINY, iteration_folder=Path("/adapter/iter_0000001"))
    return SimpleNamespace(checkpoint=checkpoint, lora=lora)


def test_tensors_are_checked_one_by_one(tmp_path: Path) -> None:
    stored(tmp_path / "whole", LORA)
    with Reader(tmp_path / "whole") as reader:
        check_tensors(opened(LORA), reader)
        assert parts_of_vocabulary(reader) == 1
    changes = {
        QKV + "linear_in.weight": None,
        FC1 + "linear_out.weight": torch.zeros(2, 3, 11, 3),
        FC2 + "linear_in.weight": torch.zeros(2, 3, 3, 6, dtype=torch.bfloat16),
    }
    stored(tmp_path / "odd", LORA, **changes)
    with Reader(tmp_path / "odd") as reader, pytest.raises(WeightsError) as caught:
        check_tensors(opened(LORA), reader)
    assert caught.value.where == "/adapter/iter_0000001"
    assert caught.value.problems == (
        f"{QKV}linear_in.weight: missing",
        f"{FC1}linear_out.weight: expected shape [2, 3, 12, 3]; found [2, 3, 11, 3]",
        "dtype: expected one for all tensors; found bfloat16, float32",
    )


def test_the_parts_of_the_vocabulary_tell_the_padding(tmp_path: Path) -> None:
    key = "output_layer.weight"
    lora = LoraSettings(2, 4.0, 0.0, (), train_also=("lm_head",))
    store(tmp_path, {key: torch.zeros(384, 8)}, {key: [((at, 0), (128, 8)) for at in (0, 128, 256)]})
    with Reader(tmp_path) as reader:
        assert parts_of_vocabulary(reader) == 3
        check_tensors(opened(lora), reader)
