"""When GPUs read from each other: what is asked before any memory is shared."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mixtral_run.model.peers import _read_each_other

GPU = torch.device("cuda", 1)
GROUP: Any = object()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four processes on a machine of four GPUs, which read from each other; the group is of GPUs 0 and 1."""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    return monkeypatch


def test_gpus_of_one_machine_do(machine: pytest.MonkeyPatch) -> None:
    assert _read_each_other(GROUP, GPU)
    asked: list[Any] = []
    machine.setattr(torch.cuda, "can_device_access_peer", lambda *gpus: asked.append(gpus) or True)
    assert _read_each_other(GROUP, GPU)
    assert asked == [(GPU, 0)]


def test_cpus_do_not(machine: pytest.MonkeyPatch) -> None:
    assert not _read_each_other(GROUP, torch.device("cpu"))


def test_gpus_of_several_machines_do_not(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("LOCAL_WORLD_SIZE", "2")
    assert not _read_each_other(GROUP, GPU)


def test_gpus_that_the_driver_keeps_apart_do_not(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
    assert not _read_each_other(GROUP, GPU)


def test_gpus_that_a_process_does_not_see_are_not_asked(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr(dist, "get_process_group_ranks", lambda _: [0, 1, 2])
    assert not _read_each_other(GROUP, GPU)


def test_who_turns_it_off_for_nccl_turns_it_off(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("NCCL_P2P_DISABLE", "1")
    assert not _read_each_other(GROUP, GPU)
    machine.setenv("NCCL_P2P_DISABLE", "0")
    assert _read_each_other(GROUP, GPU)
