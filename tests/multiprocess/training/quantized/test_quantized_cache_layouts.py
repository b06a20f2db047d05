"""Experts kept beside the base, in several layouts: bit by bit what a run that quantizes has, and the same losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.multiprocess.conftest import SMALL, torchrun

WORKER = Path(__file__).parent / "quantized_cache_worker.py"


@pytest.mark.parametrize(
    ("start", "precision", "dtype", "num_processes", "layouts"),
    [
        ("checkpoint", "fp8", "fp32", 1, ["1x1"]),
        ("checkpoint", "fp8", "bf16", 4, ["2x2", "1x2", "2x4"]),
        ("hf_model", "nf4", "fp32", 4, ["2x2", "1x1", "2x4"]),
    ],
)
def test_all_layouts_read_what_they_would_quantize(
    small_checkpoint: Path,
    small_hf_model: Path,
    tmp_path: Path,
    start: str,
    precision: str,
    dtype: str,
    num_processes: int,
    layouts: list[str],
) -> None:
    base, out = tmp_path / "base", tmp_path / "out.json"
    shutil.copytree(small_checkpoint if start == "checkpoint" else small_hf_model, base)
    torchrun(num_processes, WORKER, str(base), str(out), precision, dtype, *layouts)
    outcomes = json.loads(out.read_text())
    files = outcomes[layouts[0]][0]["files"]
    assert sorted(files) == ["layer_00.safetensors", "layer_01.safetensors"]
    for layout in layouts:
        ranks = outcomes[layout]
        assert len(ranks) == num_processes
        for rank in ranks:
            quantized, kept, read = (rank[name] for name in ("quantised", "kept", "read"))
            assert (quantized["folder"], kept["folder"]) == (False, True)
            for run in (kept, read):
                assert run["sums"] == quantized["sums"]
                assert run["figures"] == quantized["figures"]
                assert run["fingerprint"] == quantized["fingerprint"] != ""
            assert len(quantized["figures"]) == 2
            assert any(name.endswith("experts.linear_fc1.values") for name in quantized["sums"])
            # Whatever the layout that made them, the same bytes: a folder of one layout is one of any other.
            assert rank["files"] == files
            assert rank["left"] == []
            # From there its own experts, each once; of the base what is no expert's.
            own = read["expert_bytes"]
            in_full = read["num_experts"] * 3 * SMALL.hidden_size * SMALL.ffn_hidden_size * 4
            assert quantized["read"] - in_full == read["read"] - own > 0
