"""Evaluation between captured steps: training is unchanged, and the loss is right."""

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import MockSamples, batches, stacked
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
from mixtral_run.train.steps.step import losses_of, train_step, trainable
from mixtral_run.train.validation import Validation
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model


class FewSamples(MockSamples):
    num_loss_tokens_total = 5 * SEQ_LENGTH

    def __len__(self) -> int:
        return 5


def test_an_evaluation_between_captured_steps_changes_nothing() -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    validation_samples = FewSamples(1024, SEQ_LENGTH, 9)
    losses: list[list[float]] = []
    with open_mesh(config) as mesh:
        for evaluates in (False, True):
            model = small_model(mesh, "none", "bf16")
            validation = Validation(validation_samples, 2, Report.silent(), None)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, SEQ_LENGTH, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            losses.append([])
            with backward_of(model, 2 * SEQ_LENGTH) as backward:
                assert isinstance(backward, CapturedBackward)
                for step in range(6):
                    if evaluates:
                        assert validation.evaluate(model, step, lambda: False) is not None
                    losses[-1].append(train_step(model, optimizer, next(stream), 1.0, backward).loss)
            if evaluates:
                with torch.no_grad():
                    total = sum(float(losses_of(model, stacked([validation_samples.row(index)]))) for index in range(5))
                last = validation.evaluate(model, 6, lambda: False)
                assert last is not None
                assert last.loss == pytest.approx(total / (5 * SEQ_LENGTH), rel=1e-3)
                assert len({each.loss for each in validation.results}) == 7
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
