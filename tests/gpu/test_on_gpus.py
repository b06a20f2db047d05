"""The whole job on this machine's GPUs: NCCL instead of gloo, bf16, full width."""

import json
from pathlib import Path

import pytest
import torch

from tests.multiprocess.conftest import mixtral_run, small_checkpoint, small_hf_model, torchrun  # noqa: F401
from tests.multiprocess.training.layouts_worker import ROWS

NUM_GPUS = torch.cuda.device_count()
WORKERS = Path(__file__).parent.parent / "multiprocess"
WORKER = WORKERS / "training" / "layouts_worker.py"
DIRECT_WORKER = WORKERS / "weights" / "direct_load_worker.py"


def test_rehearse(tmp_path: Path) -> None:
    done = mixtral_run("rehearse", "--work-path", str(tmp_path / "r"), "--device", "cuda")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["passed"]
    assert report["layout"]["device"] == "cuda"


def test_layouts_agree(small_checkpoint: Path, small_hf_model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Logits, losses and resumed runs in every layout that these GPUs take, beside HF's on the CPU."""
    from transformers import AutoModelForCausalLM

    layouts = ["1x1"] + (["2x1", "1x2", "2x2"] if NUM_GPUS >= 2 else []) + (["2x4"] if NUM_GPUS >= 4 else [])
    count = 4 if NUM_GPUS >= 4 else min(NUM_GPUS, 2)
    out = tmp_path / "layouts.json"
    torchrun(count, WORKER, str(small_checkpoint), str(out), *layouts)
    results = json.loads(out.read_text())
    model = AutoModelForCausalLM.from_pretrained(str(small_hf_model), dtype=torch.float32)
    with torch.inference_mode():
        expected = [model(torch.tensor([row])).logits[0].double() for row in ROWS]
    reference = results["1x1"]["figures"]
    for layout in layouts:
        for ours, theirs in zip(results[layout]["logits"], expected, strict=True):
            assert float((torch.tensor(ours, dtype=torch.float64) - theirs).abs().max()) <= 1e-5, layout
        for name, start in (("figures", 0), ("resumed", 2), ("recomputed", 0)):
            if name in results[layout]:
                for (loss, norm), (expected_loss, expected_norm) in zip(
                    results[layout][name], reference[start:], strict=False
                ):
                    assert loss == pytest.approx(expected_loss, abs=1e-5), (layout, name)
                    assert norm == pytest.approx(expected_norm, rel=1e-3), (layout, name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_hf_directory_loads_as_its_checkpoint(
    small_checkpoint: Path,  # noqa: F811
    small_hf_model: Path,  # noqa: F811
    tmp_path: Path,
    dtype: str,
) -> None:
    """Through pinned buffers and a stream a thread: every rank's parameters, the first losses and the fingerprint."""
    size = min(NUM_GPUS, 2)
    out = tmp_path / "out.json"
    paths = (str(small_hf_model), str(small_checkpoint), str(out))
    torchrun(size, DIRECT_WORKER, *paths, f"{size}x{size}", dtype)
    for rank in json.loads(out.read_text()):
        assert rank["unequal"] == []
        # Of the checkpoint, which was saved as TP2, no byte twice and none by torch.
        read, own = rank["checkpoint_bytes"]
        assert read == own
        assert rank["fingerprints"][0] == rank["fingerprints"][1]
        # Kernels that sum in no fixed order give losses that differ in the last bits; the parameters did not.
        for (loss, norm), (other_loss, other_norm) in zip(*rank["figures"], strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-5 if dtype == "fp32" else 1e-2)
            assert norm == pytest.approx(other_norm, rel=1e-3 if dtype == "fp32" else 5e-2)


def test_smoke_at_full_width(tmp_path: Path) -> None:
    """Four layers of Mixtral's full width in bf16: convert, pretrain, LoRA, generate."""
    size = min(NUM_GPUS, 2)
    done = mixtral_run(
        "smoke",
        "--random-layers",
        "4",
        "--load",
        str(tmp_path / "c"),
        "--work-path",
        str(tmp_path / "s"),
        "--tensor-model-parallel-size",
        str(size),
        "--expert-model-parallel-size",
        str(size),
        "--nproc-per-node",
        str(size),
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert json.loads((tmp_path / "s" / "report.json").read_text())["passed"]
