"""A model whose adapters are taken out computes what the base alone computes."""

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.mixtral import ModelSettings, build_model, is_adapter
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.model.without_adapters import without_adapters
from tests.multiprocess.conftest import SMALL


def test_it_is_the_base_within_the_block_only() -> None:
    lora = LoraSettings(4, 8.0, 0.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
    tokens = torch.tensor([[1, 5, 9, 200, 31, 7]])
    with open_mesh(config) as mesh, torch.inference_mode():
        base = build_model(SMALL, ModelSettings(torch.float32, False), mesh).eval()
        model = build_model(SMALL, ModelSettings(torch.float32, False, lora), mesh).eval()
        adapters = 0
        weights = dict(base.named_parameters())
        for index, (name, weight) in enumerate(model.named_parameters()):
            weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(index))
            adapters += is_adapter(name)
            if not is_adapter(name):
                weights[name].copy_(weight)
        assert adapters == 2 * 4 * SMALL.num_layers
        adapted, expected = model.logits(tokens), base.logits(tokens)
        with without_adapters(model):
            assert torch.equal(model.logits(tokens), expected)
        assert torch.equal(model.logits(tokens), adapted)
        assert (adapted - expected).abs().max() > 0.05
        assert sum(is_adapter(name) for name, _ in model.named_parameters()) == adapters
