"""The number of processes of a job, layouts that do not fit it, and the imports that the processes share."""

import subprocess
import sys

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch.heartbeat import DIRECTORY_VARIABLE
from mixtral_run.launch.processes import num_processes

PRELOAD = """
import gc, sys
import mixtral_run.launch.preload
print(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))
print(*(each for each in sys.argv[1:] if each in sys.modules))
"""


def test_processes_are_forked_with_frozen_imports_and_without_torchs_compiler() -> None:
    """A collection in a forked process would visit all objects of the imports, which copies their memory."""
    words = ["torch._dynamo", "torch._inductor", "torch"]
    found = subprocess.run([sys.executable, "-c", PRELOAD, *words], capture_output=True, text=True, check=True)
    enabled, frozen, others, *imported = found.stdout.split()
    assert enabled == "True" and imported == ["torch"]
    assert int(frozen) > 100_000 and int(others) < 1_000


def test_more_processes_are_suggested_only_if_there_are_gpus_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, proposed, experts in ((2, False, 2), (3, False, 1), (6, True, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(ConfigError) as caught:
            num_processes(config)
        assert ("--nproc-per-node 4" in str(caught.value)) == proposed
        assert f"--expert-model-parallel-size {experts}" in str(caught.value)


@pytest.mark.parametrize(
    ("world", "on_each_host", "proposed"), [("2", "2", 4), ("2", "1", 2), ("6", "2", None), ("3", "3", 4)]
)
def test_under_torchrun_its_own_flag_is_proposed(
    world: str, on_each_host: str, proposed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": on_each_host}.items():
        monkeypatch.setenv(name, value)
    config = LaunchConfig(tensor_model_parallel_size=2, expert_model_parallel_size=4, device="cpu")
    with pytest.raises(ConfigError) as caught:
        num_processes(config)
    found = str(caught.value.next_command)
    assert "--nproc-per-node" not in found
    assert (f"torchrun --nproc_per_node {proposed} …, or " in found) == (proposed is not None), found
    monkeypatch.setenv(DIRECTORY_VARIABLE, "/tmp")  # As in a job of --on on several hosts.
    with pytest.raises(ConfigError) as caught:
        num_processes(config)
    assert str(caught.value.next_command).startswith(f"--nproc-per-node {proposed}, or " if proposed else "--tensor")
