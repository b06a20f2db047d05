"""The random Mixtral: the released layout, loadable by transformers, the same for any number of shards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mixtral_run.errors import ConfigError
from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.trial.random_mixtral import split_into_shards, tensor_shapes, write_random_mixtral
from mixtral_run.trial.sizes import PLAN, TINY, tokenizer_texts, write_rehearsal_examples
from tests.support.examples import examples_of
from tests.support.samples import samples_of

SMALL = replace(TINY, num_layers=2, hidden_size=64, ffn_hidden_size=96, kv_channels=8)


def write(folder: Path, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"architecture": SMALL, "dtype": "float32", "seed": 3, "num_shards": 3}
    write_random_mixtral(folder, texts=tokenizer_texts(), **{**defaults, **settings})
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hf") / "tiny", initializer_range=0.15)


def test_the_folder_holds_the_files_of_a_release(model_folder: Path) -> None:
    assert sorted(file.name for file in model_folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_index_tells_where_each_tensor_is(model_folder: Path) -> None:
    index = json.loads((model_folder / "model.safetensors.index.json").read_text("utf-8"))
    held: dict[str, str] = {}
    for file in model_folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), file.name)
            assert shard.metadata() == {"format": "pt"}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == SMALL.num_parameters * 4
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(model_folder).items()} == dict(
        tensor_shapes(SMALL)
    )


@pytest.mark.parametrize("architecture", [SMALL, TINY, MIXTRAL_8X7B])
def test_the_shapes_add_up_to_the_parameters(architecture: MixtralArchitecture) -> None:
    counts = [torch.Size(shape).numel() for _, shape in tensor_shapes(architecture)]
    assert sum(counts) == architecture.num_parameters


def test_config_json_is_read_back_as_the_same_architecture(model_folder: Path) -> None:
    assert MixtralArchitecture.from_hf_directory(model_folder) == SMALL


def test_transformers_loads_it_whole_and_runs_it(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(model_folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.rope_parameters["rope_theta"] == SMALL.rotary_base
    assert sum(parameter.numel() for parameter in model.parameters()) == SMALL.num_parameters
    tokens = AutoTokenizer.from_pretrained(model_folder)("Why is the sky blue?", return_tensors="pt")
    assert tokens["input_ids"][0, 0] == 1
    with torch.no_grad():
        logits = model(**tokens).logits
    assert logits.isfinite().all()
    # Wide enough for an answer to become certain: see RehearsalPlan.initializer_range.
    assert 0.6 < logits.std() / (0.15 * SMALL.hidden_size**0.5) < 1.4


def test_weights_are_normal_with_the_range_asked_for(model_folder: Path) -> None:
    for name, tensor in tensors_of(model_folder).items():
        if "norm" in name:
            assert (tensor == 1).all()
        else:
            assert tensor.mean().abs() < 0.15 * 5 / tensor.numel() ** 0.5
            assert abs(tensor.std() / 0.15 - 1) < 5 / (2 * tensor.numel()) ** 0.5


def test_the_number_of_shards_does_not_change_the_weights_and_the_seed_does(tmp_path: Path) -> None:
    one, four, other = (
        tensors_of(write(tmp_path / name, num_shards=shards, seed=seed))
        for name, shards, seed in (("one", 1, 3), ("four", 4, 3), ("other", 1, 4))
    )
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("norm" in name) for name in one)
    drawn = [tensor for name, tensor in one.items() if "experts" in name and name.endswith("w1.weight")]
    assert len({tuple(tensor.flatten()[:8].tolist()) for tensor in drawn}) == len(drawn)


def test_bf16_is_the_same_draw_rounded(tmp_path: Path) -> None:
    exact, rounded = (tensors_of(write(tmp_path / dtype, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text("utf-8"))["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("num_shards", [1, 2, 5, 19, 100])
def test_shards_are_of_about_the_same_size(num_shards: int) -> None:
    shards = split_into_shards(TINY, num_shards)
    assert len(shards) == num_shards
    assert [item for shard in shards for item in shard] == list(tensor_shapes(TINY))
    sizes = [sum(torch.Size(shape).numel() for _, shape in shard) for shard in shards]
    largest = max(torch.Size(shape).numel() for _, shape in tensor_shapes(TINY))
    assert max(sizes) <= TINY.num_parameters / num_shards + largest
    assert min(sizes) > 0


def test_a_shard_for_every_tensor_is_the_most(tmp_path: Path) -> None:
    count = len(list(tensor_shapes(SMALL)))
    assert [len(shard) for shard in split_into_shards(SMALL, count)] == [1] * count
    with pytest.raises(ValueError, match="num_shards"):
        split_into_shards(SMALL, count + 1)


def test_a_folder_that_is_not_empty_is_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", "utf-8")
    with pytest.raises(ConfigError, match="is not empty"):
        write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_write_that_breaks_off_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    whole = safetensors.torch.save_file

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        whole(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "hf")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert not names & {"config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"}


def test_the_tokenizer_gives_back_any_text(tiny_tokenizer: Any) -> None:
    for text in (*tokenizer_texts(), "日本語 – naïve\r\n\ttabs  and   spaces 🙂", "\x00\x7f"):
        numbers = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tiny_tokenizer.decode(numbers) == text
        assert max(numbers) < TINY.vocab_size
    assert len(tiny_tokenizer) == TINY.vocab_size


@pytest.mark.parametrize("tensor_model_parallel_size", [1, 2, 4])
def test_the_tiny_model_can_be_split(tensor_model_parallel_size: int) -> None:
    assert TINY.layout_problems(tensor_model_parallel_size, 8) == []
    assert TINY.vocab_size % (128 * 8) == 0


def test_the_plan_fits_its_examples(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_rehearsal_examples(path)
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    examples = examples_of(path)
    samples = samples_of(examples, tokenizer, PLAN.seq_length)
    assert len(samples) == PLAN.num_examples
    assert samples.num_truncated == 0
    answers = [samples.num_loss_tokens(index) for index in range(len(samples))]
    assert max(answers) <= PLAN.max_new_tokens
