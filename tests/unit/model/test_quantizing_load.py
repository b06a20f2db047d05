"""Quantizing the experts while a base is loaded: how many bytes exist at once, and that the plan counts them."""

import dataclasses
import math

import pytest
import torch

from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.model import experts as experts_module
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.kernels.quantized.formats import levels_on
from mixtral_run.model.kernels.quantized.quantized_mm import quantize_to
from mixtral_run.model.kernels.requirements import QUANTIZED_AT_ONCE, QUANTIZING_BYTES
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.planner import memory_model
from mixtral_run.planner.memory_model import EXPERT_BYTES, loading_bytes, memory
from mixtral_run.planner.workload import Layout, Workload
from mixtral_run.train.checkpoints.adapter_shards import shards_of
from mixtral_run.train.checkpoints.checkpoint import _expert_shards
from tests.multiprocess.conftest import SMALL
from tests.support.live_tensors import LiveBytes

WIDE = dataclasses.replace(SMALL, num_layers=3, hidden_size=128, ffn_hidden_size=320)
MIXTRAL_8X22B = dataclasses.replace(
    MIXTRAL_8X7B, num_layers=56, hidden_size=6144, ffn_hidden_size=16384, num_attention_heads=48
)
ONE = Layout(1, 1, "none")
AT_ONCE = 20 * 128
"""Numbers that are quantized at a time: 20 rows of linear_fc1, and 8 of linear_fc2."""


def model_of(mesh: Mesh, precision: str) -> MixtralModel:
    lora = LoraSettings(4, 8.0, 0.0, LORA_TARGET_MODULES, 1)
    return build_model(WIDE, ModelSettings(torch.bfloat16, True, lora, "none", precision), mesh)


def fill(model: MixtralModel) -> None:
    """Give the weights that have memory at the moment numbers of their own."""
    for number, layer in enumerate(model.experts):
        for name, linear in layer.linears.items():
            if linear.weight is not None and linear.has_weight:
                linear.weight.data.copy_(weight_of(number, name, linear.weight.shape))


def weight_of(layer: int, name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * layer + (name == "linear_fc1"))
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_the_plan_counts_what_exists_at_once(mesh: Mesh, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear layer of all experts in 16 bit, and some rows of one expert, beside what stays."""
    for module in (experts_module, memory_model):
        monkeypatch.setattr(module, "QUANTIZED_AT_ONCE", AT_ONCE)
    model = model_of(mesh, precision)
    workload = Workload(
        architecture=WIDE, gpus=1, seq_length=8, lora_rank=4, expert_bytes=EXPERT_BYTES[precision], cuda_graphs=False
    )
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), levels_on(model.mesh.device)]) as live:
        model.quantize_experts(lambda: None)
    stays = sum(part.nbytes for layer in model.experts for each in layer.linears.values() for part in parts(each))
    assert live.held == stays, "the buffer is freed"
    adapters = 4 * sum(each.numel() for each in model.parameters() if each.requires_grad)
    planned = loading_bytes(workload, ONE) - adapters
    buffer = 8 * 2 * 320 * 128 * 2
    assert buffer < live.peak - stays <= planned + 256, "besides the borders between levels"
    assert planned - buffer < 1.1 * AT_ONCE * 13


def parts(linear: experts_module.ExpertLinear) -> tuple[torch.Tensor, torch.Tensor]:
    assert linear.values is not None and linear.scales is not None and linear.weight is None
    return linear.values, linear.scales


def test_loading_is_the_peak_of_a_run_that_trains_with_less() -> None:
    workload = Workload(
        architecture=MIXTRAL_8X22B, gpus=1, seq_length=8, lora_rank=1, expert_bytes=1,
        lora_target_modules=("linear_qkv",), cuda_graphs=False,
    )  # fmt: skip
    needed = memory(workload, ONE)
    assert needed.allocated == pytest.approx(needed.weights + loading_bytes(workload, ONE))
    longer = memory(dataclasses.replace(workload, seq_length=2048), ONE)
    assert longer.allocated > longer.weights + loading_bytes(workload, ONE)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_rows_at_a_time_give_the_bits_of_a_whole_expert(
    mesh: Mesh, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "QUANTIZED_AT_ONCE", 7 * 128)
    model = model_of(mesh, precision)
    done: list[int] = []
    with torch.no_grad():
        model.quantize_experts(lambda: fill(model), lambda number, _: done.append(number))
    assert done == [0, 1, 2]
    for number, layer in enumerate(model.experts):
        for name, linear in layer.linears.items():
            shape = torch.Size((8, 640, 128) if name == "linear_fc1" else (8, 128, 320))
            whole = [quantize_to(each, precision) for each in weight_of(number, name, shape)]
            for found, expected in zip(parts(linear), map(torch.stack, zip(*whole, strict=True)), strict=True):
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_temporary_bytes_of_a_number(precision: str) -> None:
    weight = torch.ones(2048, 256, dtype=torch.bfloat16)
    with LiveBytes([weight]) as live:
        quantize_to(weight, precision)
    assert math.floor(live.peak / weight.numel()) == QUANTIZING_BYTES[precision]


def test_expert_shards_are_those_of_the_whole_model(mesh: Mesh) -> None:
    model = model_of(mesh, "fp8")
    assert _expert_shards(model) == {}
    model.experts[1].linear_fc2.allocate()
    mine, everything = _expert_shards(model), shards_of(model, adapters=False)

    def places(shards: dict[str, object]) -> set[object]:
        return {
            (each.key, each.global_shape, each.global_offset, each.data.data_ptr(), each.data.shape)  # type: ignore[attr-defined]
            for each in shards.values()
        }

    assert len(mine) == 8
    assert places(mine) == places({name: each for name, each in everything.items() if ".experts." in name})


@pytest.mark.parametrize("architecture", [MIXTRAL_8X7B, MIXTRAL_8X22B])
@pytest.mark.parametrize("experts", [1, 8])
def test_buffers_of_whole_models(architecture: object, experts: int) -> None:
    """By hand, in bytes: fc1 of all local experts in bf16, and 13 bytes of the numbers that are quantized at a time."""
    wide = architecture is MIXTRAL_8X22B
    workload = Workload(architecture=MIXTRAL_8X22B if wide else MIXTRAL_8X7B, gpus=experts, expert_bytes=1)
    layout = Layout(1, experts, "none")
    held = loading_bytes(dataclasses.replace(workload, expert_bytes=2), layout)
    of_expert = 2 * 16384 * 6144 if wide else 2 * 14336 * 4096
    expected = 8 // experts * of_expert * 2 + 13 * QUANTIZED_AT_ONCE
    assert loading_bytes(workload, layout) - held == pytest.approx(expected)
    # Whole models train with more than loading needs.
    needed = memory(workload, layout)
    assert needed.allocated - needed.weights > loading_bytes(workload, layout)
