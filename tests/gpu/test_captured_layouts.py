"""Captured steps with experts over several processes compared with eager steps that dispatch by all-to-all."""

import json
from pathlib import Path

import pytest
import torch

from tests.multiprocess.conftest import torchrun

WORKER = Path(__file__).parent / "workers" / "captured_worker.py"
TWO = [
    "1x2:none:bf16",
    "1x2:full:bf16",
    "1x2:except-attention:bf16",
    "1x2:selective:fp8",
    "2x2:none:bf16",
    "2x2:full:bf16",
    "2x1:none:bf16",
]
FOUR = ["1x4:none:bf16", "2x4:full:bf16"]
"""Rows may exceed the capacity here: such a step is taken again."""

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_a_captured_step_is_the_eager_step(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    four = torch.cuda.device_count() >= 4
    torchrun(4 if four else 2, WORKER, str(out), *TWO, *(FOUR if four else []))
    for case, (eager, *others) in json.loads(out.read_text()).items():
        assert abs(eager[0][0] - eager[-1][0]) > 0.01, case
        for captured in others:
            assert captured[0][1] == pytest.approx(eager[0][1], rel=5e-3), case
            # AdamW's first steps go by the gradients' signs alone, also of those that a rounding turns.
            assert [loss for loss, _ in captured] == pytest.approx([loss for loss, _ in eager], rel=1e-2), case
