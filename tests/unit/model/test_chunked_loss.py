"""Losses of chunks of tokens against those of all logits at once."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import cross_entropy

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model import chunked_loss, mixtral
from mixtral_run.model.chunked_loss import chunked_cross_entropy
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from tests.multiprocess.conftest import SMALL
from tests.unit.model.recompute.test_recompute import model_of


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
    with open_mesh(config) as joined:
        yield joined


class Layer:
    """An output layer without parallelism."""

    sequence_parallel = False

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows @ self._weight.t(), None


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, 2, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(0, 50, (2, 10), generator=generator)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("most", [1, 3, 4, 20])
def test_losses_and_gradients_are_torchs(most: int) -> None:
    hidden, weight, labels = inputs(torch.float64)
    found = chunked_cross_entropy(hidden, labels, Layer(weight), most)
    expected = cross_entropy((hidden @ weight.t()).permute(1, 2, 0), labels, reduction="none")
    upstream = torch.linspace(-1, 2, 20).view(2, 10)
    results = [torch.autograd.grad((each * upstream).sum(), (hidden, weight)) for each in (found, expected)]
    # The cross entropy of megatron-core computes in fp32.
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("mesh")
def test_no_more_logits_exist_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(logits.shape[0])
        return cross_entropy(logits, labels, reduction="none")

    monkeypatch.setattr(chunked_loss, "vocab_parallel_cross_entropy", spy)
    hidden, weight, labels = inputs(torch.float32)
    found = chunked_cross_entropy(hidden, labels, Layer(weight), 8)
    assert seen == [8, 8, 4]
    found.sum().backward()
    # The backward pass computes them again, the last chunk first.
    assert seen == [8, 8, 4, 4, 8, 8]


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
