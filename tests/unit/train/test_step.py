"""A step whose gradients came out short is taken again another way, and after some that way at once."""

import torch
from torch import Tensor

from mixtral_run.config import LaunchConfig
from mixtral_run.model.parallel import processes
from mixtral_run.train.data import GlobalBatch, MicroBatch
from mixtral_run.train.step import MOST_SHORT, Backward, EagerBackward, train_step, trainable
from tests.unit.model.test_packing import micro_batches
from tests.unit.model.test_recompute import model_of


class Short(Backward):
    """Leaves nonsense, and says so at these of its steps."""

    at: frozenset[int] = frozenset()
    num_steps = 0

    def __call__(self, micro: MicroBatch, num_loss_tokens: int) -> Tensor:
        loss = EagerBackward(self.model)(micro, num_loss_tokens)
        if self.num_steps in self.at:
            for parameter in trainable(self.model):
                parameter.grad = torch.full_like(parameter, torch.nan)
        return loss

    def was_whole(self) -> bool:
        whole = self.num_steps not in self.at
        self.num_steps += 1
        self.num_short = 0 if whole else self.num_short + 1
        return whole


def test_short_steps_are_taken_again() -> None:
    row, _ = micro_batches()
    batch = GlobalBatch((row, row), 20, 2)
    results = []
    with processes(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")) as here:
        # Two on end are followed by one that is whole: it is tried on. Three on end, and never again.
        for at, tried in ((frozenset(), 9), (frozenset({1, 2, 4}), 9), (frozenset({1, 3, 4, 5}), 3 + MOST_SHORT)):
            model = model_of(here, "none")
            optimizer, backward = torch.optim.AdamW(trainable(model), lr=1e-2), Short(model)
            backward.at = at
            results.append([train_step(model, optimizer, batch, 1.0, backward) for _ in range(9)])
            assert backward.num_steps == tried
    assert results[0] == results[1] == results[2]
    assert results[0][0].loss != results[0][-1].loss
