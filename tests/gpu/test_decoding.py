"""Generation's recorded passes beside those that the host launches, on one GPU and on several."""

import json
from pathlib import Path

import pytest
import torch

from mixtral_run.inference.decode import CAPTURE_TOLERANCE
from tests.multiprocess.conftest import torchrun

WORKER = Path(__file__).parent / "workers" / "decoding_worker.py"
ONE = ["1x1:bf16:adapted", "1x1:bf16:base", "1x1:fp8:adapted", "1x1:nf4:adapted"]
SEVERAL = {2: ["1x2:bf16:adapted", "1x2:bf16:base", "2x1:bf16:adapted", "2x2:bf16:base"], 4: ["1x4:bf16:adapted"]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_captured_passes_give_the_logits_of_those_that_are_launched(count: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    out = tmp_path / "out.json"
    torchrun(count, WORKER, str(out), *(ONE if count == 1 else SEVERAL[count]))
    for case, passes in json.loads(out.read_text()).items():
        for number, (difference, largest) in enumerate(passes):
            assert difference <= CAPTURE_TOLERANCE * largest, (case, number)
            assert largest > 0.1, case
