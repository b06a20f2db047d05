"""`mixtral-run export`: the PEFT directory loads in peft as it is, the merged model is W + alpha/r · B·A."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import CheckFailed, ConfigError, MixtralRunError, WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.manifest.manifest import read_values, write_manifest
from tests.multiprocess.weights.test_convert import convert_quietly, run_cli
from tests.support.tiny import write_shards, write_tiny

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
RANK, ALPHA = 4, 10.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and its converted checkpoint base/."""
    root = tmp_path_factory.mktemp("base")
    write_tiny(root / "hf")
    convert_quietly(root / "hf", root / "base", 2, 4)
    return root


def adapter_shapes(a: MixtralArchitecture, rank: int = RANK) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """A and B of every linear layer, as docs/formats.md has them."""
    layers, experts, hidden, ffn = a.num_layers, a.num_experts, a.hidden_size, a.ffn_hidden_size
    attention, moe = "decoder.layers.self_attention.", "decoder.layers.mlp.experts.experts."
    return {
        attention + "linear_qkv": ((layers, rank, hidden), (layers, a.qkv_size, rank)),
        attention + "linear_proj": ((layers, rank, a.projection_size), (layers, hidden, rank)),
        moe + "linear_fc1": ((layers, experts, rank, hidden), (layers, experts, 2 * ffn, rank)),
        moe + "linear_fc2": ((layers, experts, rank, ffn), (layers, experts, hidden, rank)),
    }


def write_adapter(
    base: Path, folder: Path, targets: tuple[str, ...], *, rank: int = RANK, seed: int = 3, **lora: Any
) -> dict[str, torch.Tensor]:
    """An adapter checkpoint with random A and B, optimizer state beside them, written by torch itself."""
    import torch.distributed.checkpoint as dcp

    architecture = MixtralArchitecture.from_hf_directory(base / "hf")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear, (a, b) in adapter_shapes(architecture, rank).items():
        if linear.rpartition(".")[2] in targets:
            tensors[linear + ".adapter.linear_in.weight"] = torch.randn(a, generator=generator) * 0.2
            tensors[linear + ".adapter.linear_out.weight"] = torch.randn(b, generator=generator) * 0.2
    iteration = folder / "iter_0000010"
    iteration.mkdir(parents=True)
    state = {f"optimizer.exp_avg.{key}": torch.zeros_like(value) for key, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**tensors, **state}, checkpoint_id=iteration, no_dist=True)
    values = {"lora_rank": rank, "lora_alpha": ALPHA, "lora_dropout": 0.1, "lora_target_modules": list(targets)}
    write_manifest(
        iteration,
        "adapter",
        architecture=architecture.to_mapping(),
        dtype="float32",
        iteration=10,
        lora=values | lora,
        base={"fingerprint": read_values(base / "base")["fingerprint"], "path": str(base / "base")},
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    return tensors


def deltas(
    a: MixtralArchitecture, adapter: dict[str, torch.Tensor], scale: float = ALPHA / RANK
) -> dict[str, torch.Tensor]:
    """scale · B·A by HF tensor, made with torch operations and not with the kit's mapping."""
    found: dict[str, torch.Tensor] = {}
    groups, hd = a.num_query_groups, a.kv_channels
    heads = a.num_attention_heads // groups
    for key, b in adapter.items():
        if not key.endswith("linear_out.weight"):
            continue
        product = scale * (b @ adapter[key.replace("linear_out", "linear_in")])
        linear = key.split(".adapter.")[0].rpartition(".")[2]
        for layer in range(a.num_layers):
            prefix = f"model.layers.{layer}."
            if linear == "linear_qkv":
                parts = product[layer].view(groups, heads + 2, hd, -1).split([heads, 1, 1], dim=1)
                for name, part in zip("qkv", parts, strict=True):
                    found[f"{prefix}self_attn.{name}_proj.weight"] = part.reshape(-1, a.hidden_size)
            elif linear == "linear_proj":
                found[f"{prefix}self_attn.o_proj.weight"] = product[layer]
            else:
                for expert in range(a.num_experts):
                    name = f"{prefix}block_sparse_moe.experts.{expert}."
                    if linear == "linear_fc1":
                        found[name + "w1.weight"], found[name + "w3.weight"] = product[layer, expert].chunk(2)
                    else:
                        found[name + "w2.weight"] = product[layer, expert]
    return found


def hf_tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merged_by_hand(
    base: Path, adapter: dict[str, torch.Tensor], scale: float = ALPHA / RANK
) -> dict[str, torch.Tensor]:
    tensors = hf_tensors_of(base / "hf")
    for name, delta in deltas(MixtralArchitecture.from_hf_directory(base / "hf"), adapter, scale).items():
        tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    return tensors


TOKENS = torch.tensor([[1, 5, 9, 30, 77, 2, 111, 64, 8, 9]])


def hf_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
@pytest.mark.parametrize("targets", [ALL, ALL[:2], ALL[2:], ("linear_fc1",), ("linear_fc2",)])
def test_peft_loads_it_as_it_is(base: Path, tmp_path: Path, targets: tuple[str, ...], layout: str) -> None:
    from peft import PeftModel

    scaling, scale = ("rslora", ALPHA / math.sqrt(RANK)) if len(targets) == 2 else ("standard", ALPHA / RANK)
    adapter = write_adapter(base, tmp_path / "adapter", targets, lora_scaling=scaling)
    export(
        ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "peft", format=layout),
        Report.silent(),
    )
    (tmp_path / "byhand").mkdir()
    write_shards(tmp_path / "byhand", merged_by_hand(base, adapter, scale), 1)
    (tmp_path / "byhand" / "config.json").write_text((base / "hf" / "config.json").read_text())
    expected = logits_of(hf_model(tmp_path / "byhand"))
    plain = hf_model(base / "hf")
    before = logits_of(plain)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    found = logits_of(model)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - before).abs().max() > 0.05


def test_the_axis_order_is_named_and_heeded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order has the same shapes: PEFT loads it and computes something else."""
    import peft

    from mixtral_run.trial.logits_parity import reference_logits

    write_adapter(base, tmp_path / "adapter", ALL)
    folder = tmp_path / "peft"
    export(ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=folder, format="peft-fused"), Report.silent())
    assert peft.PeftConfig.from_pretrained(str(folder)).peft_version == "0.21.0"
    assert read_values(folder)["peft"] == {
        "version": ">=0.21.0",
        "axis_order": {"lora_A": "[experts * r, in]", "lora_B": "[out, r * experts]"},
    }
    right = logits_of(peft.PeftModel.from_pretrained(hf_model(base / "hf"), str(folder)).eval())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        if ".experts." in key and "lora_B" in key:
            rows, width = value.shape
            tensors[key] = value.view(rows, RANK, width // RANK).transpose(1, 2).reshape(rows, width).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    wrong = logits_of(peft.PeftModel.from_pretrained(hf_model(base / "hf"), str(folder)).eval())
    assert (right - wrong).abs().max() > 1e-3
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(WeightsError, match="another axis order"):
        reference_logits(base / "hf", folder, [[1, 2]], torch.float32)
    export(ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "apart"), Report.silent())
    reference_logits(base / "hf", tmp_path / "apart", [[1, 2]], torch.float32)


@pytest.mark.parametrize("target", ALL)
def test_targets_not_chosen_are_absent(base: Path, tmp_path: Path, target: str) -> None:
    write_adapter(base, tmp_path / "adapter", (target,))
    export(ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "peft"), Report.silent())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    names = {"linear_qkv": ["q_proj", "k_proj", "v_proj"], "linear_proj": ["o_proj"]}
    # PEFT loads w1 and w3 only beside w2, which is then zero.
    names |= {"linear_fc1": ["w1", "w3", "w2"], "linear_fc2": ["w2"]}
    assert config["target_modules"] == names[target]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, 10, 0.0)
    assert read_values(tmp_path / "peft")["lora"]["lora_dropout"] == 0.1
    assert config["base_model_name_or_path"] == str(base / "hf")
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in keys} == set(names[target])
    if target == "linear_fc1":
        assert not any(tensor.any() for key, tensor in keys.items() if ".w2." in key)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model(tmp_path: Path, dtype: torch.dtype, fused: bool) -> None:
    tensors = write_tiny(tmp_path / "hf", dtype=dtype, fused=fused)
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    adapter = write_adapter(tmp_path, tmp_path / "adapter", ALL)
    config = ExportConfig(
        adapter=(str(tmp_path / "adapter"),), hf_model_path=tmp_path / "hf", output_path=tmp_path / "merged", merge=True
    )
    export(config, Report.silent())
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted(
        [path.name for path in (tmp_path / "hf").iterdir()] + ["mixtral_run.json"]
    )
    found = hf_tensors_of(tmp_path / "merged")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in hf_tensors_of(tmp_path / "hf").items()
    }
    if fused:
        return
    changed = deltas(MixtralArchitecture.from_hf_directory(tmp_path / "hf"), adapter)
    for name, tensor in tensors.items():
        if name not in changed:
            assert torch.equal(found[name], tensor)
            continue
        exact = tensor.float() + changed[name]
        # Rounded once: half a unit in the last place of bf16's 8 bits, and the fp32 sum's own error.
        allowed = exact.abs() * (2**-8 if dtype == torch.bfloat16 else 0) + 2e-6
        assert ((found[name].float() - exact).abs() <= allowed).all(), name


def test_merged_logits_through_the_command_line(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", ALL)
    flags = ("--adapter", tmp_path / "adapter", "--output-path", tmp_path / "merged", "--hf-model-path", base / "hf")
    done = run_cli("export", *flags, "--merge")
    assert done.returncode == 0, done.stderr
    assert "✓ Export complete\n" in done.stdout
    assert f"next: mixtral-run generate --load {tmp_path / 'merged'} --instruction …" in done.stdout
    (tmp_path / "byhand").mkdir()
    write_shards(tmp_path / "byhand", merged_by_hand(base, adapter), 1)
    (tmp_path / "byhand" / "config.json").write_text((base / "hf" / "config.json").read_text())
    difference = logits_of(hf_model(tmp_path / "merged")) - logits_of(hf_model(tmp_path / "byhand"))
    assert difference.abs().max() <= 1e-5
    again = run_cli("export", *flags, "--merge")
    assert again.returncode == ConfigError.exit_code
    assert "--overwrite replaces it" in again.stderr
    assert run_cli("export", *flags, "--merge", "--overwrite").returncode == 0


def refused(**settings: Any) -> MixtralRunError:
    with pytest.raises(MixtralRunError) as caught:
        export(ExportConfig(**settings), Report.silent())
    assert not settings["output_path"].exists()
    assert not list(settings["output_path"].parent.glob(".*unfinished"))
    return caught.value


def test_another_base_is_refused_at_the_start_and_at_the_end(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "adapter", ALL)
    common = {"adapter": (str(tmp_path / "adapter"),), "output_path": tmp_path / "out", "merge": True}
    write_tiny(tmp_path / "other", seed=9)
    error = refused(**common, hf_model_path=tmp_path / "other")
    assert isinstance(error, WeightsError)
    assert "another base" in str(error)
    write_tiny(tmp_path / "wide", intermediate_size=128)
    assert "ffn_hidden_size 96" in str(refused(**common, hf_model_path=tmp_path / "wide"))
    # One expert's weight alone: norms and routers are those of the base.
    tensors = write_tiny(tmp_path / "near")
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][0, 0] += 1
    write_shards(tmp_path / "near", tensors, 3)
    error = refused(**common, hf_model_path=tmp_path / "near")
    assert read_values(base / "base")["fingerprint"] in str(error)


def test_what_is_no_adapter_or_not_a_whole_one(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "not an adapter" in str(refused(adapter=(str(base / "base"),), output_path=out))
    assert "There is no such folder" in str(refused(adapter=(str(tmp_path / "nothing"),), output_path=out))
    write_adapter(base, tmp_path / "adapter", ("linear_qkv",), lora_target_modules=["linear_qkv", "linear_fc2"])
    assert "linear_fc2.adapter.linear_in.weight: missing" in str(
        refused(adapter=(str(tmp_path / "adapter"),), output_path=out)
    )
    write_adapter(base, tmp_path / "wrong", ("linear_qkv",), lora_rank=8)
    assert "expected shape [2, 8, 64]; found [2, 4, 64]" in str(
        refused(adapter=(str(tmp_path / "wrong"),), output_path=out)
    )


def test_verify_describes_an_adapter_and_knows_its_base(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "adapter", ALL)
    done = run_cli("verify", "--load", tmp_path / "adapter", "--json", "--against", base / "hf")
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    assert (reported["kind"], reported["iteration"], reported["ok"]) == ("adapter", 10, True)
    assert reported["num_tensors"] == 8  # optimizer state is no part of it
    assert reported["num_parameters"] == sum(
        torch.Size(shape).numel() for pair in adapter_shapes(tiny_architecture(base)).values() for shape in pair
    )
    assert reported["record"]["lora"]["lora_rank"] == RANK
    write_tiny(tmp_path / "other", seed=4)
    refusal = run_cli("verify", "--load", tmp_path / "adapter", "--against", tmp_path / "other")
    assert refusal.returncode == CheckFailed.exit_code
    assert "the adapter was trained on" in refusal.stderr


def tiny_architecture(base: Path) -> MixtralArchitecture:
    return MixtralArchitecture.from_hf_directory(base / "hf")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_of_an_export_that_is_ended(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    write_adapter(base, tmp_path / "adapter", ALL)

    def begin_and_end(_config: Any, _adapter: Any, _peft: Any, folder: Path, _report: Any) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"begun")
        os.kill(os.getpid(), number)

    monkeypatch.setattr("mixtral_run.weights.adapter.export._write_peft", begin_and_end)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig(adapter=(str(tmp_path / "adapter"),), output_path=tmp_path / "peft"), Report.silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert signal.getsignal(number) is before
