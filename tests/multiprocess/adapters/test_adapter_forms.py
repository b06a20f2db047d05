"""Every form of adapter trains alike in every layout, resumes exactly, and gives PEFT the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from tests.multiprocess.adapters.adapter_forms_worker import FORMS, TOKENS
from tests.multiprocess.conftest import torchrun

WORKER = Path(__file__).parent / "adapter_forms_worker.py"
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def made(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Results]:
    """The folder of what one process saved, and the results of one process and of TP2/EP2."""
    root = tmp_path_factory.mktemp("forms")
    for name, count, layout, more in (("one", 1, "1x1", ()), ("two", 2, "2x2", (str(root / "one"),))):
        (root / name).mkdir()
        torchrun(count, WORKER, str(small_checkpoint), str(root / name), layout, *more)
    one, two = (json.loads((root / name / "results.json").read_text()) for name in ("one", "two"))
    return root / "one", one, two


@pytest.mark.parametrize("form", FORMS)
def test_layouts_agree_and_resuming_is_exact(made: tuple[Path, Results, Results], form: str) -> None:
    _, one, two = (each if isinstance(each, Path) else each[form] for each in made)
    assert one["resumed"] == one["losses"][2:]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-4)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-3)
    # From the checkpoint of one process.
    assert two["resumed"] == pytest.approx(one["losses"][2:], abs=2e-4)
    for name in ("logits", "loaded"):
        for each in (one, two):
            assert (torch.tensor(each[name]) - torch.tensor(one["logits"])).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
@pytest.mark.parametrize("form", FORMS)
def test_peft_gives_the_same_logits(
    made: tuple[Path, Results, Results],
    small_hf_model: Path,
    tmp_path: Path,
    form: str,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, one, _ = made
    export(ExportConfig(adapter=(str(folder / form),), output_path=tmp_path / "peft", format=layout), Report())
    assert ("share one adapter, which is written once for each expert" in capsys.readouterr().out) == (form == "shared")
    base = AutoModelForCausalLM.from_pretrained(small_hf_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        before = base(torch.tensor(TOKENS)).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()(torch.tensor(TOKENS)).logits
    assert (before - torch.tensor(one[form]["first"])).abs().max() < 1e-4
    assert (found - torch.tensor(one[form]["logits"])).abs().max() < 1e-4
    assert (found - before).abs().max() > 0.05
