"""`mixtral-run verify`: what a checkpoint is, and the exact tensor, element and file that differ."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.config.verbs.weights import VerifyConfig
from mixtral_run.errors import CheckFailed, ConfigError, MixtralRunError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.verify.result import VerifyResult
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.weights.test_convert import convert_quietly, run_cli
from tests.support.tiny import write_tiny


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "hf", dtype=torch.bfloat16)
    convert_quietly(tmp_path / "hf", tmp_path / "out", 2, 4)
    return tmp_path / "out"


def verified(load: Path, against: Path | None = None) -> VerifyResult:
    return verify(VerifyConfig(load=load, against=against), Report.silent())


@pytest.mark.parametrize("layout", [(1, 1), (2, 4), (4, 8)])
@pytest.mark.parametrize("fused", [False, True])
def test_equal_in_every_layout(tmp_path: Path, layout: tuple[int, int], fused: bool) -> None:
    write_tiny(tmp_path / "hf", fused=fused)
    fingerprint = convert_quietly(tmp_path / "hf", tmp_path / "out", *layout)
    result = verified(tmp_path / "out", tmp_path / "hf").check()
    assert result.layout == f"TP{layout[0]}/EP{layout[1]}"
    assert result.num_parameters == 365_888
    assert result.num_bytes == 4 * 365_888
    assert result.comparison is not None
    assert (result.comparison.num_tensors, result.comparison.fingerprint) == (65, fingerprint)


def test_small_blocks_give_the_same(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows split over many reads, as at full size.
    monkeypatch.setattr("mixtral_run.weights.convert.copy.BLOCK_BYTES", 1000)
    monkeypatch.setattr("mixtral_run.weights.verify.compare_tensors._BLOCK_BYTES", 777)
    convert_quietly(tmp_path / "hf", tmp_path / "small", 2, 4)
    verified(tmp_path / "small", tmp_path / "hf").check()
    for file in (converted / "iter_0000001").glob("*.distcp"):
        assert file.read_bytes() == (tmp_path / "small" / "iter_0000001" / file.name).read_bytes()


def flip_bit(checkpoint: Path, key: str, leading: tuple[int, ...], row: int, column: int) -> str:
    """Flip the lowest bit of one bf16 element; returns the file's name."""
    folder = checkpoint / "iter_0000001"
    with Reader(folder) as reader:
        before = reader.matrix(key, leading)[row, column]
        name = reader.file_of(key, leading, row)
        (item,) = [
            item
            for item in reader.chunks(key)
            if item.file == name
            and item.shape is not None
            and item.offset is not None
            and item.offset[: len(leading)] == leading
            and item.offset[-2] <= row < item.offset[-2] + item.shape[-2]
        ]
        assert item.shape is not None
        assert item.offset is not None
        position = reader._payload_start(item) + ((row - item.offset[-2]) * item.shape[-1] + column) * 2
    with (folder / name).open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
    with Reader(folder) as reader:
        assert reader.matrix(key, leading)[row, column] == before ^ 1
    return name


def test_a_flipped_bit_is_found_and_named_with_exit_code_4(converted: Path, tmp_path: Path) -> None:
    file = flip_bit(converted, hf_to_megatron.LINEAR_FC1_KEY, (1, 5), 96 + 7, 3)  # row 7 of expert 5's up projection
    done = run_cli("verify", "--load", converted, "--against", tmp_path / "hf", "--json", "--no-logits")
    assert done.returncode == CheckFailed.exit_code
    name = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    assert name in done.stderr
    assert file in done.stderr
    reported = json.loads(done.stdout)
    assert reported["ok"] is False
    assert reported["comparison"]["differences"] == [
        {
            "tensor": name,
            "key": hf_to_megatron.LINEAR_FC1_KEY,
            "file": file,
            "first_element": 7 * 64 + 3,
            "num_different": 1,
            "num_elements": 96 * 64,
        }
    ]


def test_proof_names_the_tensors_and_the_file_of_a_flipped_bit(converted: Path) -> None:
    def checked() -> VerifyResult:
        return verify(VerifyConfig(load=converted, proof=True), Report.silent())

    assert checked().problems == ()
    files = [
        flip_bit(converted, hf_to_megatron.LINEAR_FC2_KEY, (0, 7), 5, 5),
        flip_bit(converted, hf_to_megatron.LINEAR_QKV_KEY, (1,), 200, 0),
    ]
    first, second = sorted(checked().problems, reverse=True)
    assert first.startswith("model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.k_proj.weight")
    assert second.startswith("model.layers.0.block_sparse_moe.experts.7.w2.weight: expected CRC-32")
    assert files[1] in first
    assert files[0] in second
    (converted / "proof.json").unlink()
    with pytest.raises(WeightsError, match="proof cannot be read"):
        checked()


def test_proof_names_every_small_file_with_a_flipped_bit(converted: Path) -> None:
    def checked() -> VerifyResult:
        return verify(VerifyConfig(load=converted, proof=True), Report.silent())

    files = [path for path in converted.rglob("*") if path.is_file() and path.suffix != ".distcp"]
    names = {path.relative_to(converted).as_posix(): path for path in files}
    assert {f"iter_0000001/{name}" for name in ("common.pt", ".metadata", "metadata.json", "run_config.yaml")} < set(
        names
    )
    assert {"tokenizer/tokenizer.json", "tokenizer/config.json", "mixtral_run.json"} < set(names)
    for name, path in names.items():
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(MixtralRunError) as caught:
                checked().check()
            if name != "proof.json":
                assert name in str(caught.value)
        path.write_bytes(whole)
    (converted / "iter_0000001" / "common.pt").unlink()
    with pytest.raises(CheckFailed, match=r"common\.pt: missing"):
        checked()


def test_a_proof_of_an_earlier_version_names_no_files(converted: Path) -> None:
    path = converted / "proof.json"
    content = json.loads(path.read_text())
    content.pop("files")
    path.write_text(json.dumps(content))
    assert verify(VerifyConfig(load=converted, proof=True), Report.silent()).problems == ()


def test_damaged_metadata_is_reported_whatever_the_byte(converted: Path) -> None:
    path = converted / "iter_0000001" / ".metadata"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 400)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with contextlib.suppress(WeightsError):  # some bytes change nothing that is read
            verified(converted)


def test_another_hf_model_differs_in_its_tensors(converted: Path, tmp_path: Path) -> None:
    shard = tmp_path / "hf" / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"):
        tensors[name].view(torch.int16)[5] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    result = verified(converted, tmp_path / "hf")
    assert result.comparison is not None
    assert [(each.tensor, each.first_element, each.num_different) for each in result.comparison.differences] == [
        ("model.embed_tokens.weight", 5 * 64, 64),
        ("model.layers.0.self_attn.k_proj.weight", 5 * 64, 64),
    ]
    with pytest.raises(CheckFailed):
        result.check()


def test_another_size_or_dtype_is_reported_in_words(converted: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "wide", dtype=torch.bfloat16, intermediate_size=128)
    assert "ffn_hidden_size: the checkpoint has 96, the HF model 128" in verified(converted, tmp_path / "wide").problems
    write_tiny(tmp_path / "fp32")
    assert verified(converted, tmp_path / "fp32").problems == (
        "dtype: the checkpoint has bfloat16, the HF model float32",
    )


def test_description_without_a_source(converted: Path) -> None:
    done = run_cli("verify", "--load", converted / "iter_0000001")
    assert done.returncode == 0, done.stderr
    for word in ("base", "TP2/EP4", "365,888", "bfloat16", "compared with nothing", "--against HF_MODEL, or --proof"):
        assert word in done.stdout
    assert "Verified." not in done.stdout


def test_what_is_not_whole_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = converted / "iter_0000001"
    size = (folder / "__3_0.distcp").stat().st_size
    (folder / "__2_0.distcp").unlink()
    with (folder / "__3_0.distcp").open("r+b") as stream:
        stream.truncate(size - 5)
    with pytest.raises(WeightsError) as caught:
        verified(converted)
    assert "__2_0.distcp: missing" in str(caught.value)
    assert f"__3_0.distcp: truncated: expected {size:,} bytes; found {size - 5:,}" in str(caught.value)
    (converted / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(WeightsError, match="not a whole checkpoint"):
        verified(converted)
    with pytest.raises(WeightsError, match="There is no such folder"):
        verified(tmp_path / "nowhere")


def damage_small_file(converted: Path) -> None:
    (converted / "tokenizer" / "config.json").write_text("{}")


def damage_metadata(converted: Path) -> None:
    (converted / "iter_0000001" / ".metadata").write_bytes(b"no pickle")


def remove_marker(converted: Path) -> None:
    (converted / "latest_checkpointed_iteration.txt").unlink()


def nothing(converted: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "flags", "exit_code", "said"),
    [
        (damage_small_file, ("--proof",), CheckFailed.exit_code, "tokenizer/config.json"),
        (damage_metadata, (), WeightsError.exit_code, ".metadata"),
        (remove_marker, (), WeightsError.exit_code, "latest_checkpointed_iteration.txt"),
        (nothing, ("--against", "no/such/model/here"), WeightsError.exit_code, "no/such/model/here"),
        (nothing, ("--adapter", "a"), ConfigError.exit_code, "--peft-path"),
    ],
)
def test_whatever_comes_out_is_one_json_object(
    converted: Path, damage: Callable[[Path], None], flags: tuple[str, ...], exit_code: int, said: str
) -> None:
    damage(converted)
    done = run_cli("verify", "--load", converted, *flags, "--json")
    assert done.returncode == exit_code, done.stderr
    reported = json.loads(done.stdout)
    assert reported["ok"] is False
    assert reported["error"]["exit_code"] == exit_code
    assert said in json.dumps(reported["error"])
    assert said in done.stderr


def test_logits_that_differ_are_not_ok_in_json(small_checkpoint: Path, small_hf_model: Path) -> None:
    """Told by processes of their own, after every tensor was found equal."""
    words = ("--load", small_checkpoint, "--against", small_hf_model, "--device", "cpu", "--logits-tolerance", "1e-30")
    done = run_cli("verify", *words, "--json")
    assert done.returncode == CheckFailed.exit_code, done.stderr
    reported = json.loads(done.stdout)
    assert reported["comparison"]["differences"] == []
    assert reported["ok"] is False
    assert "does not compute the logits of HF" in reported["error"]["what"]


def test_an_hf_model_alone_is_not_called_verified(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a model", dtype=torch.bfloat16)
    done = run_cli("verify", "--load", tmp_path / "a model")
    assert done.returncode == 0, done.stderr
    assert "Verified." not in done.stdout
    assert "compared with nothing" in done.stdout
    assert f"next: mixtral-run verify --load '{tmp_path / 'a model'}' --against HF_MODEL" in done.stdout
