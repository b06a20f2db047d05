"""Captured steps with dropout: from the stored random state a run draws what an uninterrupted one draws."""

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh, seed_everything
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
from mixtral_run.train.steps.step import trainable
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model

STEPS, CUT = 5, 2


def with_dropout(mesh: Mesh) -> MixtralModel:
    model = small_model(mesh, "none", "bf16", dropout=0.5)
    for parameter in trainable(model):
        with torch.no_grad():
            parameter.normal_(0.0, 0.1, generator=torch.Generator(parameter.device).manual_seed(parameter.numel()))
    return model


def losses(mesh: Mesh, count: int, state: torch.Tensor | None) -> tuple[list[float], torch.Tensor]:
    """Return the losses of one batch, which differ by dropout alone, and the random state after them."""
    model = with_dropout(mesh)
    batch = next(batches(MockSamples(1024, SEQ_LENGTH, 1), seed=1, micro_batch_size=2, global_batch_size=2))
    with backward_of(model, 2 * SEQ_LENGTH) as backward:
        assert isinstance(backward, CapturedBackward)
        if state is None:
            seed_everything(7, 0)
        else:
            torch.cuda.set_rng_state(state)
        found = []
        for _ in range(count):
            for parameter in trainable(model):
                parameter.grad = None
            found.append(float(backward(batch.micro_batches[0], batch.num_loss_tokens)))
        return found, torch.cuda.get_rng_state()


def test_dropout_continues_after_a_new_capture() -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    with open_mesh(config) as mesh:
        whole, _ = losses(mesh, STEPS, None)
        first, state = losses(mesh, CUT, None)
        rest, _ = losses(mesh, STEPS - CUT, state)
    assert len(set(whole)) == STEPS
    assert [*first, *rest] == whole
