"""A step that exceeds the dispatch's capacity is repeated with all-to-all; after some, all-to-all is used at once."""

import torch
from torch import Tensor

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.dispatch.local import LocalDispatcher
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.step import MOST_SHORT, Backward, EagerBackward, train_step, trainable
from tests.unit.model.attention.test_packed_attention import micro_batches
from tests.unit.model.recompute.test_recompute import model_of


class TooSmall(LocalDispatcher):
    """Dispatcher that reports an overflow in these of the steps."""

    def __init__(self, steps: set[int]) -> None:
        super().__init__(num_experts=8)
        self.steps = steps
        self.num_steps = 0

    def overflowed(self, mesh: Mesh) -> bool:
        del mesh
        self.num_steps += 1
        return self.num_steps - 1 in self.steps


class Short(Backward):
    """Leaves NaN gradients where the dispatcher reports an overflow."""

    dispatcher: TooSmall

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        loss = EagerBackward(self.model)(micro, num_loss_tokens)
        if self.dispatcher.num_steps in self.dispatcher.steps:
            for parameter in trainable(self.model):
                parameter.grad = torch.full_like(parameter, torch.nan)
        return loss


def test_short_steps_are_taken_again() -> None:
    row, _ = micro_batches()
    batch = GlobalBatch((row, row), 20, 2)
    results = []
    with open_mesh(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")) as mesh:
        # Two on end are followed by one that is whole: it is tried on. Three on end, and never again.
        for short, tried in ((set(), 9), ({0, 1, 4}, 9), ({1, 3, 4, 5}, 3 + MOST_SHORT)):
            model = model_of(mesh, "none")
            optimizer, backward = torch.optim.AdamW(trainable(model), lr=1e-2), Short(model, TooSmall(short))
            results.append([train_step(model, optimizer, batch, 1.0, backward) for _ in range(9)])
            assert (backward.dispatcher.num_steps, backward.num_retaken) == (tried, len(short))
    assert results[0] == results[1] == results[2]
    assert results[0][0].loss != results[0][-1].loss


def test_one_rank_exchanges_nothing_and_watches_no_parameter() -> None:
    with open_mesh(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")) as mesh:
        model = model_of(mesh, "none")
        with backward_of(model, 16) as backward:
            assert backward.exchange is None
            assert not any(each._post_accumulate_grad_hooks for each in model.parameters())
