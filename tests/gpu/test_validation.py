"""Looking at pairs kept back between recorded steps: what training does stays as it is, and the loss is right."""

import pytest
import torch

from mixtral_run.config.verbs import LaunchConfig
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.report import Report
from mixtral_run.train.cuda_graph import RecordedBackward, backward_of
from mixtral_run.train.data.samples import MockSamples, batches, stacked
from mixtral_run.train.step import losses_of, train_step, trainable
from mixtral_run.train.validation import Validation
from tests.gpu.test_kernels import SEQ_LENGTH, small_model


class FewSamples(MockSamples):
    def __len__(self) -> int:
        return 5


def test_a_look_between_recorded_steps_changes_nothing() -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    kept_back = FewSamples(1024, SEQ_LENGTH, 9)
    losses: list[list[float]] = []
    with open_mesh(config) as mesh:
        for looks in (False, True):
            model = small_model(mesh, "none", "bf16")
            validation = Validation(kept_back, 2, Report.silent(), None)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, SEQ_LENGTH, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            losses.append([])
            with backward_of(model, 2 * SEQ_LENGTH) as backward:
                assert isinstance(backward, RecordedBackward)
                for step in range(6):
                    if looks:
                        assert validation.look(model, step, lambda: False) is not None
                    losses[-1].append(train_step(model, optimizer, next(stream), 1.0, backward).loss)
            if looks:
                with torch.no_grad():
                    total = sum(float(losses_of(model, stacked([kept_back.row(index)]))) for index in range(5))
                last = validation.look(model, 6, lambda: False)
                assert last is not None
                assert last.loss == pytest.approx(total / (5 * SEQ_LENGTH), rel=1e-3)
                assert len({each.loss for each in validation.found}) == 7
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
