"""benchmarks/rivals: which trainers are measured, missing ones, memory that ends, and the ratio to the fastest."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import generation, lora
from benchmarks.rivals import harness, table
from benchmarks.rivals.longest import measure_lengths
from benchmarks.rivals.placeholders import placeholders
from benchmarks.rivals.with_hf import prepare

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SETTINGS = Namespace(attention_only=False, rival_checkpointing="own", layers=2, steps=2)


def test_sides_are_read_from_a_list_with_the_old_name() -> None:
    assert table.sides_of("ours,peer,unsloth,axolotl") == ("ours", "hf", "unsloth", "axolotl")
    with pytest.raises(ValueError, match="expected ours, hf, unsloth, axolotl, separated by commas; found megatron"):
        table.sides_of("ours,megatron")


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)


def test_a_missing_rival_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "unsloth_zoo", "liger-kernel")
    monkeypatch.setattr(lora, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["lora.py", "--sides", "ours,unsloth,axolotl"])
    with pytest.raises(SystemExit) as told:
        lora.main()
    lines = str(told.value).splitlines()
    assert lines[0] == "unsloth: not installed: unsloth_zoo. Install with:"
    assert lines[1].startswith(
        "    pip install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.14.1 'datasets<5'"
    )
    assert lines[2] == "axolotl: not installed: liger-kernel. Install with:"
    assert "axolotl==0.21.0 liger-kernel==0.8.4" in lines[3]


def reported(
    found: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, Any]]:
    without(monkeypatch)
    monkeypatch.setattr(lora, "measure", lambda side, *_: {"tflops": 750.0} if side == "matmul" else found[side])
    lora.report(Namespace(layers=32, gpus=1, sides=tuple(found), rival_checkpointing="none"), [(2048, 1)])
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_the_ratio_is_to_the_fastest_rival(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, Any]] = {
        "ours": {"tok_s": 9000.0, "peak_gib": 101.0},
        "hf": {"tok_s": 2000.0, "peak_gib": 95.0},
        "unsloth": {"tok_s": 6000.0, "peak_gib": 105.0, "experts": "moe_utils, grouped_mm", "trained": 226_492_416},
        "axolotl": {"tok_s": float("nan"), "peak_gib": float("nan"), "out_of_memory": True},
    }
    printed, summary = reported(found, capsys, monkeypatch)
    assert summary["ratio"] == 1.5
    assert summary["fastest_rival"] == "unsloth"
    assert summary["versions"]["unsloth"] == {"unsloth": "1.0", "unsloth_zoo": "1.0"}
    assert "ratio 1.50 to unsloth, the fastest rival" in printed
    assert "unsloth: unsloth 1.0, unsloth_zoo 1.0; gradient checkpointing: none" in printed
    assert "moe_utils, grouped_mm; 226,492,416 trained parameters" in printed
    assert "  2048x1 axolotl out of memory" in printed


def test_rivals_without_a_rate_make_no_ratio(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"tok_s": float("nan"), "peak_gib": float("nan"), "out_of_memory": True}
    printed, summary = reported({"ours": {"tok_s": 9000.0, "peak_gib": 101.0}, "hf": lost}, capsys, monkeypatch)
    assert "ratio" not in summary
    assert "fastest" not in printed


def test_a_rival_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace(prepare=prepare_too_much))
    assert lora.run_child("unsloth", 2, 512, 1, SETTINGS)["out_of_memory"] is True


def test_lengths_grow_until_memory_ends(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []

    @contextmanager
    def step_of(seq: int) -> Iterator[Any]:
        def step() -> None:
            taken.append(seq)
            if seq > 32768:
                raise torch.OutOfMemoryError("too much")

        yield step

    rows = measure_lengths([2048, 16384, 32768, 65536, 131072], step_of)
    assert [row["seq"] for row in rows] == [2048, 16384, 32768, 65536]
    assert [row.get("out_of_memory", False) for row in rows] == [False, False, False, True]
    assert taken == [2048] * 8 + [16384] * 4 + [32768] * 3 + [65536]
    assert "65536 out of memory" in capsys.readouterr().out


def test_placeholders_import_and_refuse_to_work() -> None:
    with placeholders("bits_and_more", "json") as used:
        from bits_and_more.nn import Params4bit  # type: ignore[import-not-found]

        library: Any = importlib.import_module("bits_and_more")
        function = library.lib.cdequantize_blockwise
        assert not isinstance(torch.zeros(1), Params4bit)
        with pytest.raises(RuntimeError, match="cdequantize_blockwise is a placeholder"):
            function(1)
    assert used == {"bits_and_more"}
    assert "bits_and_more" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bits_and_more")


def test_the_expected_parameters_by_hand() -> None:
    # q and o: 8,192 inputs and outputs each; k and v: 5,120; an expert: 32,768 + 18,432.
    assert harness.expected_parameters(1, attention_only=True) == 16 * (2 * 8192 + 2 * 5120)
    assert harness.expected_parameters(1, attention_only=False) == 16 * (26_624 + 8 * 51_200)


def test_a_rival_proves_what_it_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF transformers on a tiny model: as many parameters as counted, gradients for all adapters and nothing else."""
    monkeypatch.setattr(harness, "SIZES", harness.SIZES | TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(1)
    ready = prepare(2, 8, SETTINGS)
    found = harness.measured(ready, 8, 2, SETTINGS)
    assert found["experts"] == "transformers grouped_mm"
    assert found["expert_adapters"] == 2 * 2 * 2
    assert found["trained"] == harness.expected_parameters(2, attention_only=False)
    assert found["tok_s"] > 0

    frozen = next(each for name, each in ready.model.named_parameters() if "q_proj.base" in name)
    frozen.grad = torch.ones_like(frozen)
    tokens = torch.randint(0, 64, (1, 8))
    ready.model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match=r"1 frozen weights have a gradient, such as .*q_proj"):
        harness.check_gradients(ready.model, attention_only=False)
    next(each for name, each in ready.model.named_parameters() if "experts" in name and each.requires_grad).grad = None
    with pytest.raises(RuntimeError, match=r"1 adapters have no gradient, such as .*experts"):
        harness.check_gradients(ready.model, attention_only=False)


def test_a_peer_of_many_rows_generates_fewer_tokens() -> None:
    assert [generation.tokens_of("peer", rows, 128) for rows in (1, 8, 32)] == [128, 32, 16]
    assert generation.tokens_of("captured", 32, 128) == 128
