"""Exports of a stored adapter, whole: files, card, record and refusals. The sums are computed here."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run import __version__
from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.adapter_sum import open_sum
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.adapter.model_card import published_name
from mixtral_run.weights.hf.fingerprint import fingerprint
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.manifest.manifest import read_values, write_manifest
from tests.support.stored_checkpoint import store
from tests.support.tiny import write_tiny
from tests.unit.weights.adapter.test_merge import CONFIG
from tests.unit.weights.adapter.tiny_factors import TINY, places

PROJ = "decoder.layers.self_attention.linear_proj.adapter."
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.adapter."
LORA = LoraSettings(2, 3.0, 0.25, ("linear_proj", "linear_fc1"))
SHAPES = {
    PROJ + "linear_in.weight": (2, 2, 16),
    PROJ + "linear_out.weight": (2, 8, 2),
    FC1 + "linear_in.weight": (2, 3, 2, 8),
    FC1 + "linear_out.weight": (2, 3, 12, 2),
}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mixtral_run.json"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_tiny(folder, dtype=torch.float32, num_shards=2, **CONFIG)
    return folder


@pytest.fixture(scope="module")
def base(hf: Path) -> dict[str, Any]:
    return {"fingerprint": fingerprint(open_hf_weights(hf)), "path": "/no/such/base"}


def adapter(
    folder: Path, base: dict[str, Any], lora: LoraSettings = LORA, seed: int = 0, **values: Any
) -> dict[str, Any]:
    """Write an adapter's folder. Return its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    iteration = folder / "iter_0000007"
    store(iteration, tensors)
    files = {each.name: f"{zlib.crc32(each.read_bytes()):08x}" for each in iteration.iterdir()}
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    values = {
        "architecture": TINY.to_mapping(), "iteration": 7, "dtype": "float32", "lora": lora.to_mapping(), "base": base,
        "training": {"lr": 1e-4, "seed": 3, "train_iters": 7, "data": "/secret/place"}, "data_sha256": "ab12",
        "files": files, **values,
    }  # fmt: skip
    write_manifest(iteration, "adapter", **values)
    return tensors


def added(tensors: dict[str, Any], name: str, scale: float) -> torch.Tensor:
    place = places("linear_proj", "linear_fc1")[name]
    prefix = PROJ if place.module == "linear_proj" else FC1
    a, b = (tensors[f"{prefix}linear_{end}.weight"][place.leading] for end in ("in", "out"))
    whole = scale * b @ a
    return torch.cat([whole[start:stop] for start, stop in place.rows])


@pytest.mark.parametrize("layout", ["peft", "vllm", "peft-fused"])
def test_a_directory_for_peft(
    tmp_path: Path, base: dict[str, Any], layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    config = ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=out, format="".join(layout))
    result = export(config, Report())
    written = load_file(out / "adapter_model.safetensors")
    assert {each.name for each in out.iterdir()} == FILES
    assert (result.output_path, result.kind, result.num_tensors) == (out, "peft", len(written))
    assert result.num_bytes == sum(each.nbytes for each in written.values()) and 0 <= result.seconds < 60
    if layout != "peft-fused":
        for name in places("linear_proj", "linear_fc1"):
            a, b = (written[f"base_model.model.{name[:-7]}.lora_{half}.weight"] for half in "AB")
            torch.testing.assert_close(1.5 * b @ a, added(tensors, name, 1.5))
    record = json.loads((out / "mixtral_run.json").read_text())
    expected = {
        "format": 1, "kind": "peft", "kit_version": __version__, "adapter": str(tmp_path / "adapter"), "iteration": 7,
        "lora": LORA.to_mapping(), "layout": layout, "base": base,
    }  # fmt: skip
    if layout == "peft-fused":
        order = {"lora_A": "[experts * r, in]", "lora_B": "[out, r * experts]"}
        expected["peft"] = {"version": ">=0.21.0", "axis_order": order}
    assert record == expected
    output = "".join(capsys.readouterr())
    hints = {
        "peft": f"next: PeftModel.from_pretrained(model, '{out}')",
        "vllm": f"--max-lora-rank 8 --lora-modules adapter={out}",
        "peft-fused": f"next: PeftModel.from_pretrained(model, '{out}')",
    }
    assert hints[layout] in output
    zeros = "linear_fc2 was not trained and is written as zeros"
    assert (zeros in output) == (layout != "peft-fused")
    assert "iteration 7, rank 2, alpha 3, linear_proj, linear_fc1: 14 HF tensors" in output


def test_the_card(tmp_path: Path, base: dict[str, Any]) -> None:
    validation = {"best_loss": 1.25, "best_iteration": 1000}
    state = {"recent_losses": [2.0, 1.5], "validation_loss": 1.75}
    training = {"lr": 1e-4, "seed": 3, "train_iters": 7, "data": "/secret/place", "attention_precision": "bf16"} | {
        "lr_scheduler": "cosine"
    }
    former = [
        {"iteration": 2, "settings": {"attention_precision": "fp8", "init_adapter": "/secret/place"}},
        {"iteration": 5, "settings": {"attention_precision": "bf16", "lora_dropout": 0.5}},
    ]
    adapter(tmp_path / "adapter", base, validation=validation, state=state, training=training, former_settings=former)
    (tmp_path / "adapter" / "mine").mkdir()
    config = ExportConfig(
        adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "out", format="vllm",
        hf_model_path=None,
    )  # fmt: skip
    export(config, Report.silent())
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert card[:7] == [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "  - lora",
        "  - mixtral",
        "---",
    ]
    for line in (
        "| base | a Mixtral model that was read from a directory |",
        f"| fingerprint of the base | `{base['fingerprint']}` |",
        "| iteration | 7 |",
        "| LoRA | rank 2, alpha 3, dropout 0.25 (0.5 until iteration 5), linear_proj, linear_fc1 |",
        "| attention_precision | bf16 (fp8 until iteration 2, bf16 until iteration 5) |",
        "| data, SHA-256 | `ab12` |",
        "| chat template | not recorded |",
        "| training loss, last | 1.5000 |",
        "| validation loss of this iteration | 1.7500 |",
        "| validation loss, lowest of the run | 1.2500 at iteration 1,000 |",
        "| train_iters | 7 |",
        "| lr | 0.0001 |",
        "| lr_scheduler | cosine |",
        "| seed | 3 |",
        "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules adapter=FOLDER",
        "base = AutoModelForCausalLM.from_pretrained(\"BASE\", dtype='bfloat16')",
        "model = PeftModel.from_pretrained(base, 'FOLDER')",
        f"Written by mixtral-run {__version__}.",
    ):
        assert card.count(line) == 1, line
    text = "\n".join(card)
    assert str(tmp_path) not in text and "/secret/place" not in text
    assert "Layout `vllm`: for vLLM and SGLang; PEFT reads it as well." in text


def test_the_base_that_peft_is_told(tmp_path: Path, hf: Path, base: dict[str, Any]) -> None:
    """As given; else the base itself, or the model that it was converted from; none if it is gone."""
    converted = tmp_path / "base"
    (converted / "iter_0000001").mkdir(parents=True)
    (converted / "latest_checkpointed_iteration.txt").write_text("1\n")
    values = {"architecture": TINY.to_mapping(), "dtype": "float32", "tensor_model_parallel_size": 1,
              "expert_model_parallel_size": 1, "source": "owner/name", "fingerprint": base["fingerprint"]}  # fmt: skip
    write_manifest(converted, "base", **values)
    cases = {
        "given": (str(converted), hf, str(hf)),
        "source": (str(converted), None, "owner/name"),
        "itself": (str(hf), None, str(hf)),
        "gone": ("/no/such/base", None, None),
        "none": (None, None, None),
    }
    for name, (path, given, expected) in cases.items():
        adapter(tmp_path / name, {**base, "path": path})
        words: dict[str, Any] = {"adapter": (str(tmp_path / name),), "output_path": tmp_path / f"out-{name}"}
        export(ExportConfig(**words, hf_model_path=given), Report.silent())
        config = json.loads((tmp_path / f"out-{name}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected, name


def test_names_that_a_card_may_show(tmp_path: Path) -> None:
    assert published_name("mistralai/Mixtral-8x7B-v0.1") == "mistralai/Mixtral-8x7B-v0.1"
    assert published_name("owner/name@0123abc") == "owner/name"
    assert [published_name(each) for each in (None, str(tmp_path), "a/b/c", "")] == [None] * 4


def test_a_sum_of_two(tmp_path: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = adapter(tmp_path / "one", base), adapter(tmp_path / "two", base, seed=5)
    words = (f"{tmp_path / 'one'}:0.5", f"{tmp_path / 'two'}:-2")
    export(ExportConfig(adapter=words, output_path=tmp_path / "out"), Report())
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    for name in places("linear_proj", "linear_fc1"):
        a, b = (written[f"base_model.model.{name[:-7]}.lora_{half}.weight"] for half in "AB")
        expected = 0.5 * added(one, name, 1.5) - 2 * added(two, name, 1.5)
        torch.testing.assert_close(1.5 * b @ a, expected, atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "mixtral_run.json").read_text())
    assert record["adapters"] == [
        {"adapter": str(tmp_path / name), "weight": weight, "iteration": 7, "lora": LORA.to_mapping()}
        for name, weight in (("one", 0.5), ("two", -2))
    ]
    output = "".join(capsys.readouterr())
    assert f"0.5 × {tmp_path / 'one'} (iteration 7)" in output
    assert "their sum: rank 4, linear_proj, linear_fc1: 14 HF tensors" in output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| adapter 1: weight | 0.5 |" in card and "| adapter 2: weight | -2 |" in card
    assert "| adapter 2: iteration | 7 |" in card and "Settings of the training" not in card
    # A single adapter with a weight is a sum as well; with weight 1 it is written as trained.
    assert open_sum([f"{tmp_path / 'one'}"], Report.silent()).is_plain
    assert not open_sum([f"{tmp_path / 'one'}:0.5"], Report.silent()).is_plain


def test_sums_that_have_no_meaning(tmp_path: Path, base: dict[str, Any]) -> None:
    adapter(tmp_path / "one", base)
    adapter(tmp_path / "two", {**base, "fingerprint": "abc-def"})
    with pytest.raises(WeightsError, match="different bases") as caught:
        open_sum([str(tmp_path / "one"), str(tmp_path / "two")], Report.silent())
    assert caught.value.problems == (f"{tmp_path / 'two'}: fingerprint abc-def",)
    assert caught.value.where == str(tmp_path / "one")
    adapter(tmp_path / "three", base, LoraSettings(2, 3.0, 0.0, LORA.target_modules, train_also=("norms",)))
    with pytest.raises(WeightsError, match="cannot be added to others"):
        open_sum([str(tmp_path / "one"), str(tmp_path / "three")], Report.silent())
    assert open_sum([str(tmp_path / "three")], Report.silent()).is_plain


def test_a_merged_model(tmp_path: Path, hf: Path, base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tensors = adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    config = ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=out, merge=True, hf_model_path=hf)
    result = export(config, Report())
    names = set()
    for file in sorted(hf.glob("*.safetensors")):
        before, after = load_file(file), load_file(out / file.name)
        for name, each in before.items():
            expected = each + added(tensors, name, 1.5) if name in places("linear_proj", "linear_fc1") else each
            torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)
            names.add(name)
    assert (result.kind, result.num_tensors, result.output_path) == ("hf", len(names), out)
    assert {each.name for each in hf.iterdir()} | {"mixtral_run.json"} == {each.name for each in out.iterdir()}
    assert read_values(out)["layout"] is None and read_values(out)["kind"] == "hf"
    assert f"next: mixtral-run generate --load {out} --instruction" in "".join(capsys.readouterr())
    assert not list(tmp_path.glob(".*unfinished*"))


def refused(**settings: Any) -> ConfigError | WeightsError:
    with pytest.raises((ConfigError, WeightsError)) as caught:
        export(ExportConfig(**settings), Report.silent())
    return caught.value


def test_what_is_refused_before_anything_is_written(
    tmp_path: Path, hf: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "adapter", base)
    words = {"adapter": (str(tmp_path / "adapter"),), "output_path": tmp_path / "out"}
    write_tiny(tmp_path / "other", dtype=torch.float32, num_shards=2, seed=1, **CONFIG)
    error = refused(**words, merge=True, hf_model_path=tmp_path / "other")
    assert "was trained on another base" in str(error)
    quick = base["fingerprint"].split("-")[0]
    assert error.expected == f"fingerprint {base['fingerprint']} (converted at /no/such/base)"
    assert error.found is not None and error.found.endswith("-…") and quick not in error.found
    write_tiny(tmp_path / "wider", dtype=torch.float32, num_shards=1, **{**CONFIG, "intermediate_size": 12})
    error = refused(**words, hf_model_path=tmp_path / "wider")
    assert (error.expected, error.found) == ("ffn_hidden_size 6 (converted at /no/such/base)", "ffn_hidden_size 12")
    # Files, and 16 MiB for the small ones.
    needed: list[int] = []
    monkeypatch.setattr(
        "mixtral_run.weights.adapter.export.disk_problems", lambda _, count: needed.append(count) or ["no space"]
    )
    assert refused(**words).problems == ("no space",)
    refused(**words, merge=True, hf_model_path=hf)
    columns = {"linear_proj": 16, "linear_fc1": 8}
    sizes = sum(2 * (each.num_rows + columns[each.module]) for each in places(*columns).values())
    zeros = 2 * 3 * 2 * (8 + 6)
    assert needed[0] == 4 * (sizes + zeros) + 2**24
    assert needed[1] == sum(each.stat().st_size for each in hf.glob("*.safetensors")) + 2**24
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_not_exported(tmp_path: Path, base: dict[str, Any]) -> None:
    adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "iter_0000007" / "a.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    error = refused(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "out")
    assert "a.distcp: expected CRC-32" in str(error) and not (tmp_path / "out").exists()
