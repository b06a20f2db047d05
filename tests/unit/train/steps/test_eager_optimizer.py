"""Optimizers without the compiler's wrappers take the steps that torch's take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_run.train.steps import eager_optimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1, "fused": True},
    "SGD": {"lr": 1e-2, "momentum": 0.5},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_steps_hooks_and_states_are_torchs(name: str) -> None:
    start = torch.linspace(-1, 1, 12).view(3, 4)
    found = []
    for kind in (getattr(torch.optim, name), getattr(eager_optimizer, name)):
        weights = [start.clone().requires_grad_(), start.neg().requires_grad_()]
        optimizer = kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 3e-2}], **SETTINGS[name])
        called: list[object] = []
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append("before"))
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("after"))
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack([each.pow(3).sum() for each in weights]).sum().backward()
            optimizer.step()
            called.append(torch.is_grad_enabled())
        again = kind([{"params": weights[:1]}, {"params": weights[1:]}], **SETTINGS[name])
        again.load_state_dict(optimizer.state_dict())
        again.step()
        assert isinstance(optimizer, getattr(torch.optim, name))
        found.append((torch.stack([each.detach() for each in weights]), called, again.state_dict()["param_groups"]))
    (expected, expected_calls, expected_groups), (values, calls, groups) = found
    assert torch.equal(values, expected) and not torch.equal(expected[0], start)
    assert calls == expected_calls == ["before", "after", True] * 3
    assert groups == expected_groups
