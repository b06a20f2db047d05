"""The number of processes of a job, and layouts that do not fit it."""

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch.processes import num_processes


def test_more_processes_are_suggested_only_if_there_are_gpus_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, proposed, experts in ((2, False, 2), (3, False, 1), (6, True, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(ConfigError) as caught:
            num_processes(config)
        assert ("--nproc-per-node 4" in str(caught.value)) == proposed
        assert f"--expert-model-parallel-size {experts}" in str(caught.value)
