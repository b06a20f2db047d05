"""The safetensors reader with good and damaged files, and the torch_dist reader with damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.hf.safetensors_files import read_header
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from tests.support.tiny import write_tiny

SHARD_2 = "model-00002-of-00003.safetensors"


def problems_of(directory: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_hf_weights(directory)
    return str(caught.value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_lie_where_it_says(tmp_path: Path, dtype: torch.dtype, fused: bool) -> None:
    tensors = write_tiny(tmp_path, dtype=dtype, fused=fused)
    weights = open_hf_weights(tmp_path)
    assert weights.dtype == str(dtype).removeprefix("torch.")
    assert set(weights.sources) == set(tensors)
    for name, source in weights.sources.items():
        with source.file.open("rb") as stream:
            stream.seek(source.start)
            stored = stream.read(source.num_bytes)
        assert stored == tensors[name].view(torch.uint8).numpy().tobytes()


def test_one_file_without_an_index(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path, num_shards=1)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    assert set(open_hf_weights(tmp_path).sources) == set(tensors)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path, num_shards=4)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].unlink()
    size = files[1].stat().st_size
    with files[1].open("r+b") as stream:
        stream.truncate(size - 1000)
    with files[2].open("r+b") as stream:
        stream.write((10**12).to_bytes(8, "little"))
    files[3].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    reported = problems_of(tmp_path)
    assert f"{files[0].name}: missing" in reported
    assert (
        f"{files[1].name}: truncated: expected {size:,} bytes; found {size - 1000:,} (1,000 bytes missing)" in reported
    )
    assert f"{files[2].name}: corrupt header: it says 1,000,000,000,000 bytes long" in reported
    assert f"{files[2].stat().st_size:,} bytes" in reported
    assert f"{files[3].name}: a Git LFS pointer" in reported
    assert "tensor" not in reported.replace("safetensors", "")  # what follows from the above is not reported again


def rewrite_header(file: Path, change: dict[str, dict[str, object]]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, values in change.items():
        header[name] |= values
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def test_offsets_that_overlap_or_do_not_fit_the_shape(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {name: torch.zeros(4) for name in "abc"}
    save_file(tensors, file)
    rewrite_header(file, {"b": {"data_offsets": [0, 16]}})
    with pytest.raises(WeightsError) as caught:
        read_header(file)
    assert any(
        "tensor b overlaps a" in problem or "tensor a overlaps b" in problem for problem in caught.value.problems
    )
    assert any("tensor c leaves a gap" in problem for problem in caught.value.problems)
    save_file(tensors, file)
    rewrite_header(file, {"a": {"shape": [5]}, "c": {"dtype": "X9"}})
    with pytest.raises(WeightsError) as caught:
        read_header(file)
    assert caught.value.problems == (
        "model.safetensors: tensor a: F32 [5] takes 20 bytes; its offsets span 16",
        "model.safetensors: tensor c: unknown dtype 'X9'",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it says 0 bytes long, the file has 0 bytes"),
        (b"\x05", "the file has 1 bytes"),
        (b"\x04\0\0\0\0\0\0\0{{{{", "4 bytes that are not JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "a JSON list, not an object"),
        (b'\x0b\0\0\0\0\0\0\0{"a": true}', "expected dtype, shape and data_offsets"),
    ],
)
def test_corrupt_headers(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_header(file)
    assert said in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_missing_foreign_and_misshapen_tensors(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    file = tmp_path / SHARD_2
    tensors = load_file(file)
    gone, odd, *_ = tensors
    del tensors[gone]
    tensors[odd] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, file)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["vision.weight"] = SHARD_2
    index_file.write_text(json.dumps(index))
    reported = problems_of(tmp_path)
    assert f"{SHARD_2}: tensor {gone} is missing" in reported
    assert f"{SHARD_2}: tensor vision.weight is missing" in reported
    assert f"{odd}: expected shape" in reported
    assert "found [3, 5]" in reported
    assert "the named files again" in reported
    assert "inv_freq" not in reported


def test_tensor_of_another_model(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    tensors = load_file(tmp_path / SHARD_2)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)
    save_file(tensors, tmp_path / SHARD_2)
    assert "q_proj.bias is not part of a Mixtral model" in problems_of(tmp_path)


def test_no_weights_or_pickled_ones(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in problems_of(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    assert (
        "neither pytorch_model.bin.index.json nor pytorch_model.bin is there; found pytorch_model-00001-of-00002.bin"
        in (problems_of(tmp_path))
    )
    assert "does not exist" in problems_of(tmp_path / "nowhere")


def test_an_index_that_is_not_one(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "not a safetensors index" in problems_of(tmp_path)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(WeightsError, match=r"would run code(.|\n)*\.metadata(.|\n)*posix\.system"):
        Reader(tmp_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(WeightsError, match="not a torch_dist checkpoint"):
        Reader(tmp_path / "nowhere")
