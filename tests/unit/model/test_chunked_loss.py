"""Losses of chunks of tokens against those of all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mixtral_run.model import mixtral
from mixtral_run.model.chunked_loss import chunked_cross_entropy
from mixtral_run.model.parallel.mesh import Mesh
from tests.multiprocess.conftest import SMALL
from tests.unit.model.recompute.test_recompute import model_of


class Gpt:
    """An output layer without parallelism, and torch's own loss, as in Megatron's GPTModel."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.output_layer = torch.nn.Linear(1, 1)
        self.output_layer.sequence_parallel = False  # type: ignore[assignment]
        self.output_layer.forward = lambda rows: (rows @ weight.t(), None)  # type: ignore[method-assign, assignment]
        self.seen: list[int] = []

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.seen.append(logits.shape[0])
        return cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, 2, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(0, 50, (2, 10), generator=generator)


@pytest.mark.parametrize("most", [1, 3, 4, 20])
def test_losses_and_gradients_are_torchs(most: int) -> None:
    hidden, weight, labels = inputs(torch.float64)
    found = chunked_cross_entropy(hidden, labels, Gpt(weight), most)
    expected = cross_entropy((hidden @ weight.t()).permute(1, 2, 0), labels, reduction="none")
    upstream = torch.linspace(-1, 2, 20).view(2, 10)
    results = [torch.autograd.grad((each * upstream).sum(), (hidden, weight)) for each in (found, expected)]
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_more_logits_exist_than_asked_for() -> None:
    hidden, weight, labels = inputs(torch.float32)
    gpt = Gpt(weight)
    found = chunked_cross_entropy(hidden, labels, gpt, 8)
    assert gpt.seen == [8, 8, 4]
    found.sum().backward()
    # The backward pass computes them again, the last chunk first.
    assert gpt.seen == [8, 8, 4, 4, 8, 8]


@pytest.mark.parametrize("most", [40, 7])
def test_a_models_losses_and_gradients_stay_the_same(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Bit for bit where one chunk holds all tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(0, SMALL.vocab_size, (2, 20), generator=generator) for _ in range(2))
    results = []
    for chunked in (False, True):
        model = model_of(mesh, "none")
        if chunked:
            # Even one chunk takes the other way.
            monkeypatch.setattr(mixtral, "MOST_LOGITS", 0)
            monkeypatch.setattr(
                mixtral,
                "chunked_cross_entropy",
                lambda hidden, wanted, logits_of, _, **how: chunked_cross_entropy(
                    hidden, wanted, logits_of, most, **how
                ),
            )
        losses = model.losses(tokens, labels)
        losses.sum().backward()
        results.append([losses.detach(), *(each.grad for each in model.parameters() if each.requires_grad)])
    for whole, parts in zip(*results, strict=True):
        if most == 40:
            assert torch.equal(whole, parts)
        else:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
