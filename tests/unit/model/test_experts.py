"""The experts' products and SwiGLU compared with a reference, forward and backward, for every kind of routing."""

import pytest
import torch

from mixtral_run.model.kernels.grouped_mm import each_experts, grouped_linear
from mixtral_run.model.kernels.swiglu import swiglu_with_adapter
from tests.support.references.experts_reference import ROUTINGS, AdaptedCase, Case, reference


def ours(case: Case, scale: float) -> torch.Tensor:
    hidden = grouped_linear(case.rows, case.first, case.offsets)
    inner = grouped_linear(case.rows, case.inner_first, case.offsets)
    return grouped_linear(
        swiglu_with_adapter(hidden, inner, case.outer_first, scale, case.offsets), case.second, case.offsets
    )


@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients(routing: tuple[int, ...]) -> None:
    case = Case.random(routing, hidden=12, ffn=20, rank=4, seed=sum(routing))
    results = []
    for compute in (ours, reference):
        for tensor in case.tensors():
            tensor.requires_grad_(True).grad = None
        output = compute(case, 2.0)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        results.append([output.detach(), *(tensor.grad.clone() for tensor in case.tensors())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    case = Case.random((5, 3, 0, 2), hidden=12, ffn=20, rank=4, seed=1)
    case.rows.requires_grad_(True)
    case.inner_first.requires_grad_(True)
    ours(case, 2.0).sum().backward()
    assert case.rows.grad is not None and case.inner_first.grad is not None
    # The gradient of an expert without rows is zeros, not None: its process takes part in the all-reduce.
    assert torch.equal(case.inner_first.grad[2], torch.zeros_like(case.inner_first.grad[2]))
    assert case.first.grad is None and case.second.grad is None


def test_each_experts_rows() -> None:
    rows = torch.arange(12)[:, None]
    parts = each_experts(rows, torch.tensor([3, 3, 10], dtype=torch.int32))
    assert [part.flatten().tolist() for part in parts] == [[0, 1, 2], [], [3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_of_no_expert_leave_no_trace(routing: tuple[int, ...]) -> None:
    case = AdaptedCase.random(routing, hidden=24, ffn=16, rank=4, by_token=False, seed=sum(routing))
    for mine, theirs in zip(case.fast("cpu", torch.float64, strange=9), case.exact(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS[:-1])
def test_both_layers_as_one_step(routing: tuple[int, ...], by_token: bool) -> None:
    """Compare outputs and all gradients, those of the routing probabilities included, with the reference."""
    case = AdaptedCase.random(routing, hidden=24, ffn=16, rank=4, by_token=by_token, seed=sum(routing))
    found, expected = case.fast("cpu", torch.float64), case.exact()
    assert len(found) == len(expected) == 7
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_token", [False, True])
def test_gradients_need_no_outputs(by_token: bool) -> None:
    """A layer that runs again computes none, and has the same gradients bit for bit."""
    case = AdaptedCase.random((5, 0, 8, 3), hidden=24, ffn=16, rank=4, by_token=by_token, seed=6)
    expected, found = (case.fast("cpu", torch.float64, 0 if by_token else 3, unread=unread) for unread in (False, True))
    assert float(expected[0].abs().max()) > 0 == float(found[0].abs().max())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], expected[1:], strict=True))
