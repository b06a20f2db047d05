"""Exchanges through symmetric memory compared with collectives."""

from pathlib import Path

import pytest
import torch

from tests.multiprocess.conftest import torchrun

WORKER = Path(__file__).parent / "symmetric_memory_worker.py"


@pytest.mark.parametrize("count", [2, 4])
def test_reading_brings_what_collectives_bring(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    torchrun(count, WORKER)
