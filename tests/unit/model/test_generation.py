"""What generation asks of the model beside training."""

import torch

from mixtral_run.config import LaunchConfig
from mixtral_run.model.build import ModelSettings, build_model
from mixtral_run.model.parallel import processes
from tests.integration.conftest import SMALL


def test_logits_of_the_last_position_alone() -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
    with processes(config) as here, torch.inference_mode():
        model = build_model(SMALL, ModelSettings(torch.float32, False), here).eval()
        for index, weight in enumerate(model.parameters()):
            weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(index))
        tokens = torch.tensor([[1, 5, 9, 200], [1, 2, 3, 4]])
        last = model.logits(tokens, last_only=True)
        every = model.logits(tokens)
    assert last.shape == (2, 1, SMALL.vocab_size)
    assert every.shape == (2, 4, SMALL.vocab_size)
    torch.testing.assert_close(last, every[:, -1:], rtol=1e-6, atol=1e-6)
