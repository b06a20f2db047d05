"""Metrics that a run writes for each iteration."""

from pathlib import Path

import pytest
import torch

from mixtral_run.errors import TrainingError
from mixtral_run.train.metrics import Meter


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    meter = Meter(
        train_iters=1, global_batch_size=1, seq_length=1, world_size=1, flops_per_token=1.0, device=torch.device("cpu"),
        file=file,
    )  # fmt: skip
    meter.tick()
    with pytest.raises(TrainingError, match="No space left on device") as caught:
        meter.measure(1, 1.0, 1.0, 1e-3)
    assert "--resume" in str(caught.value)
