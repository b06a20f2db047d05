"""A rank's part of a PEFT adapter: the right block of the right expert's matrix, numbers written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mixtral_run.train.checkpoints.checkpoint import _fill_from_peft
from mixtral_run.weights.load.read_parts import Target

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.adapter."


def factors() -> Any:
    """STAND-IN for a PEFT adapter: an element is 1000 · layer + 100 · expert + 10 · row + column, A's are negative."""

    def matrix(_: str, place: tuple[int, int]) -> torch.Tensor:
        layer, expert = place
        return 1000.0 * layer + 100 * expert + 10 * torch.arange(6.0)[:, None] + torch.arange(5.0)

    return SimpleNamespace(linear_in=lambda *given: -matrix(*given), linear_out=matrix)


def test_rows_and_columns_of_two_experts() -> None:
    """Layer 1, experts 2 and 3, rows 3 and 4, columns 1 … 3."""
    for half, sign in (("linear_in", -1.0), ("linear_out", 1.0)):
        target = Target(f"{FC1}{half}.weight", (1, 2, 3, 1), (1, 2, 2, 3), torch.zeros(12))
        _fill_from_peft(target, factors())
        assert (sign * target.data.view(2, 2, 3)).tolist() == [
            [[1231.0, 1232.0, 1233.0], [1241.0, 1242.0, 1243.0]],
            [[1331.0, 1332.0, 1333.0], [1341.0, 1342.0, 1343.0]],
        ]
