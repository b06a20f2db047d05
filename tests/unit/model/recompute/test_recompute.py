"""Recomputation changes only which tensors are saved: losses and gradients are equal, also with dropout."""

from collections import Counter

import pytest
import torch

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, seed_everything
from mixtral_run.planner.memory_model import activation_bytes_per_token
from mixtral_run.planner.workload import Layout, Workload
from tests.multiprocess.conftest import SMALL

BATCH, SEQUENCE = 2, 24


def model_of(
    mesh: Mesh,
    recompute: str,
    dropout: float = 0.0,
    modules: tuple[str, ...] = LORA_TARGET_MODULES,
    architecture: MixtralArchitecture = SMALL,
) -> MixtralModel:
    lora = LoraSettings(4, 8.0, dropout, modules, 1)
    model = build_model(architecture, ModelSettings(torch.float32, True, lora, recompute), mesh).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and ".linear_in" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def loss_of(model: MixtralModel) -> torch.Tensor:
    tokens = torch.randint(0, SMALL.vocab_size, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(9))
    seed_everything(3, 0)
    return model.losses(tokens[:, :-1], tokens[:, 1:]).mean()


@pytest.mark.parametrize("modules", [LORA_TARGET_MODULES, ("linear_fc2",), ("linear_qkv", "linear_proj")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_losses_and_gradients_stay(mesh: Mesh, recompute: str, dropout: float, modules: tuple[str, ...]) -> None:
    results = []
    for mode in ("none", recompute):
        model = model_of(mesh, mode, dropout, modules)
        loss = loss_of(model)
        loss.backward()
        results.append(
            (loss.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None})
        )
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) > 0, name
        # The routing probabilities get their gradient from other sums (test_router_probs.py): equal up to rounding.
        largest = float(gradient.abs().max())
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=2e-6 * largest)


def test_dropout_drops(mesh: Mesh) -> None:
    assert not torch.equal(loss_of(model_of(mesh, "selective", 0.3)), loss_of(model_of(mesh, "selective")))


def saved(model: MixtralModel) -> Counter[tuple[tuple[int, ...], int]]:
    """Return shapes and bytes of the tensors that autograd saves in one pass, each storage once, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage, tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model)
    return Counter((shape, storage.nbytes()) for storage, shape in found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_selective_keeps_as_much_less_as_the_plan_says(mesh: Mesh, dropout: float) -> None:
    workload = Workload(
        architecture=SMALL,
        gpus=1,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        lora_rank=4,
        lora_dropout=dropout,
        weight_bytes=4,
    )
    none, selective = (activation_bytes_per_token(workload, Layout(1, 1, mode)) for mode in ("none", "selective"))
    expected = (none - selective) * SMALL.num_layers * BATCH * SEQUENCE
    if not dropout:
        # The first layer's input, which nothing else keeps, is kept to make its norm again: of what is gone, of the
        # same shape, one less is counted.
        expected -= BATCH * SEQUENCE * SMALL.hidden_size * 4
    # Shapes that are no longer saved. There is no sum, as the CPU's kernels save other tensors than the GPU's.
    gone = saved(model_of(mesh, "none", dropout)) - saved(model_of(mesh, "selective", dropout))
    assert sum(size * count for (_, size), count in gone.items()) == expected
