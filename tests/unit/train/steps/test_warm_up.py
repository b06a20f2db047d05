"""Preparation beside the weights: one collective for each group that training uses, the same on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mixtral_run.train.steps import warm_up


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def test_each_group_of_several_ranks_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world, experts, alone = Group(4), Group(2), Group(1)
    summed: list[Any] = []

    def all_reduce(tensor: torch.Tensor, group: Group) -> None:
        summed.append((float(tensor), group))

    monkeypatch.setattr(warm_up, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=world), all_reduce=all_reduce))
    mesh = MagicMock(
        device=torch.device("cpu"), data_group=world, expert_group=experts, tensor_group=alone, context_size=1,
        expert_data_group=Group(2),
    )  # fmt: skip
    warm_up.open_communicators(mesh)
    assert summed == [(0.0, world), (0.0, experts), (0.0, mesh.expert_data_group)]
    summed.clear()
    mesh.context_size, mesh.context_group = 2, Group(2)
    warm_up.open_communicators(mesh)
    assert [group for _, group in summed][-1] is mesh.context_group and len(summed) == 4


def test_nothing_is_prepared_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "dist", None)
    warm_up.warm_up(MagicMock(device=torch.device("cpu")), torch.bfloat16)
