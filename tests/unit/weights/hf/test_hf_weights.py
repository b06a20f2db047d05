"""HF weights in other forms than the released one: read as they are meant, or refused with what helps."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.fingerprint import fingerprint
from mixtral_run.weights.hf.hf_weights import HFWeights, open_hf_weights
from tests.support.references.model_cases import change_config, change_weights, write_model

NORM, GATE = "model.layers.0.input_layernorm.weight", "model.layers.1.block_sparse_moe.gate.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def error_of(folder: Path) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        open_hf_weights(folder)
    return caught.value


def tensor_of(weights: HFWeights, name: str) -> torch.Tensor:
    source = weights.sources[name]
    data = bytearray(source.file.read_bytes()[source.start : source.start + source.num_bytes])
    return torch.frombuffer(data, dtype=getattr(torch, weights.dtype))


def test_tensors_of_other_dtypes_are_cast_to_the_dtype_of_config_json_as_torch_casts_them(model: Path) -> None:
    precise = {name: torch.rand(each.shape) + 1 for name, each in load_file(model / "model.safetensors").items()}
    names = [name for name in precise if "norm" in name]
    change_weights(model, lambda tensors: {**tensors, **{name: precise[name] for name in names}})
    weights = open_hf_weights(model)
    assert weights.dtype == "bfloat16" and set(weights.recast) == set(names) and not weights.as_stored
    assert torch.equal(tensor_of(weights, NORM), precise[NORM].bfloat16())
    assert f"{len(names)} tensors are stored in float32 and cast to bfloat16: {names[0]}" in weights.notes[0]
    # The same fingerprint as the model that is stored in one dtype.
    found = fingerprint(weights)
    change_weights(model, lambda tensors: {**tensors, **{name: precise[name].bfloat16() for name in names}})
    plain = open_hf_weights(model)
    assert plain.as_stored and not plain.notes and fingerprint(plain) == found


def test_without_a_dtype_in_config_json_most_of_the_bytes_decide(model: Path) -> None:
    change_config(model, torch_dtype=None)
    change_weights(model, lambda tensors: {**tensors, NORM: tensors[NORM].half()})
    assert open_hf_weights(model).dtype == "bfloat16"
    change_config(model, dtype="float16")
    assert open_hf_weights(model).dtype == "float16"


def test_values_that_the_dtype_cannot_hold_and_too_much_to_cast_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(model, torch_dtype="float16")
    change_weights(model, lambda tensors: {**{n: t.half() for n, t in tensors.items()}, NORM: torch.full((32,), 1e5)})
    error = error_of(model)
    assert f"{NORM}: has values that float16 cannot hold" in error.problems[0]
    assert "dtype=torch.float16" in str(error.next_command) and "ownload" not in str(error)
    monkeypatch.setattr("mixtral_run.weights.hf.recast.MOST_BYTES", 10)
    assert "at most 10 bytes to cast to float16" in error_of(model).problems[0]


def test_pytorch_model_bin_is_read_in_place(model: Path) -> None:
    expected = fingerprint(open_hf_weights(model))
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    weights = open_hf_weights(model)
    assert fingerprint(weights) == expected and not weights.as_stored and "pytorch_model.bin" in weights.notes[0]
    # In several files, with an index.
    names, index = list(tensors), {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, model / file)
        index |= dict.fromkeys(part, file)
    (model / "pytorch_model.bin").unlink()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert fingerprint(open_hf_weights(model)) == expected
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin: cannot be read" in str(error_of(model))


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("/nonexistent/ran"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": _Runs()}, "its pickle would run"),
        ({"state_dict": {"a": torch.zeros(1)}}, "a training checkpoint, with the weights under 'state_dict'"),
        ([torch.zeros(1)], "holds a list"),
        ({"a": 1}, "holds other things than tensors by name"),
    ],
)
def test_pickles_that_are_no_weights_are_refused_and_not_run(model: Path, content: object, said: str) -> None:
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    assert said in str(error_of(model))


def test_a_cut_pickle_and_one_of_old_torch_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    content = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    assert "pytorch_model.bin: damaged" in str(error_of(model))
    torch.save(tensors, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "torch before version 1.6" in str(error_of(model))


@pytest.mark.parametrize(
    ("prefix", "word"), [("_orig_mod.", "_orig_mod."), ("module.", "module."), ("_fsdp_wrapped_module.", "FSDP")]
)
def test_names_of_wrapped_modules_are_read_without_the_wrapper(model: Path, prefix: str, word: str) -> None:
    expected = fingerprint(open_hf_weights(model))
    change_weights(model, lambda tensors: {prefix + name: each for name, each in tensors.items()})
    weights = open_hf_weights(model)
    assert fingerprint(weights) == expected and word in weights.notes[0] and not weights.as_stored


@pytest.mark.parametrize("rows", [128, 100])
def test_embeddings_of_another_size_are_named_and_the_printed_command_helps(model: Path, rows: int) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(model, lambda tensors: {**tensors, **{n: torch.ones(rows, 32).bfloat16() for n in names}})
    error = error_of(model)
    (problem,) = error.problems
    assert "config.json says 104" in problem and f"lm_head.weight {rows} rows" in problem
    subprocess.run(shlex.split(str(error.next_command)), check=True)
    assert open_hf_weights(model).architecture.vocab_size == rows


def test_only_one_resized_embedding_is_named(model: Path) -> None:
    change_weights(model, lambda tensors: {**tensors, "lm_head.weight": torch.ones(106, 32).bfloat16()})
    error = error_of(model)
    assert "only one of them was resized" in error.problems[0] and "save_pretrained" in str(error.next_command)


PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("added", "said", "advice"),
    [
        ({f"{PROJECTION}.qweight": torch.zeros(2), f"{PROJECTION}.g_idx": torch.zeros(2)}, "GPTQ", "was quantized"),
        ({f"{PROJECTION}.qweight": torch.zeros(2), f"{PROJECTION}.qzeros": torch.zeros(2)}, "AWQ", "was quantized"),
        ({f"{PROJECTION}.weight.absmax": torch.zeros(2)}, "bitsandbytes, 4 bit", "was quantized"),
        ({f"{PROJECTION}.SCB": torch.zeros(2)}, "bitsandbytes, 8 bit", "was quantized"),
        ({f"{PROJECTION}.weight_scale_inv": torch.zeros(2)}, "fp8", "was quantized"),
        ({f"{PROJECTION}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}, "fp8", "was quantized"),
        ({f"{PROJECTION}.lora_A.default.weight": torch.zeros(2)}, "PEFT adapter", "merge_and_unload"),
        ({"score.weight": torch.zeros(2, 32)}, "sequence classification", "was made from"),
        ({"tok_embeddings.weight": torch.zeros(2)}, "Mistral AI's own format", "model-*.safetensors"),
    ],
)
def test_other_forms_are_recognized_by_their_tensors(model: Path, added: Tensors, said: str, advice: str) -> None:
    change_weights(model, lambda tensors: {**tensors, **added})
    error = error_of(model)
    (problem,) = error.problems
    assert said in problem and advice in str(error.next_command) and "ownload" not in str(error)


def test_downloading_again_is_advised_only_for_files_that_are_not_whole(model: Path) -> None:
    change_weights(model, lambda tensors: {name: each for name, each in tensors.items() if name != GATE})
    error = error_of(model)
    assert error.problems == (f"tensor {GATE} is missing",) and "download" not in str(error.next_command).split(";")[0]
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert str(error_of(model).next_command).startswith("download the named files again")
