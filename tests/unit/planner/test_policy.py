"""The planner promises what a run does: both ask planner/policy.py, with the same sizes."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.gpus import GPU_MODELS, HOPPER
from mixtral_run.config.lora import LORA_TARGET_MODULES
from mixtral_run.config.recompute import RECOMPUTE
from mixtral_run.inference.decode import CapturedDecoding, Decoding, decoding_of
from mixtral_run.model.adapters.lora import LoraSettings
from mixtral_run.model.kernels.requirements import KernelSet, attention_problems, kernel_problems, kernel_set_of
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.planner import policy, table
from mixtral_run.planner.available import AvailableGpu
from mixtral_run.planner.memory_model import execution, memory
from mixtral_run.planner.policy import Dispatch, Execution
from mixtral_run.planner.ranking import relative_speed
from mixtral_run.planner.workload import GIB, Layout, Workload
from mixtral_run.train.steps import cuda_graph
from tests.multiprocess.conftest import SMALL


@pytest.mark.parametrize(
    ("capabilities", "dispatch", "captured", "gib", "speed"),
    [
        ({each.compute_capability for each in GPU_MODELS.values()}, Dispatch.SYMMETRIC_MEMORY, True, 36.9, 0.92),
        ({(7, 0), (7, 5)}, Dispatch.ALL_TO_ALL, False, 28.8, 0.78),
    ],
)
def test_each_gpu_generation_has_its_own_figures(
    capabilities: set[tuple[int, int]], dispatch: Dispatch, captured: bool, gib: float, speed: float
) -> None:
    layout = Layout(1, 8, "none")
    for capability in capabilities:
        workload = Workload(gpus=8, seq_length=2048, compute_capability=capability)
        assert execution(workload, layout) == Execution(dispatch, captured)
        assert round(memory(workload, layout).total / GIB, 1) == gib
        assert relative_speed(workload, layout) == speed
        local = Layout(1, 1, "none")
        assert execution(workload, local) == Execution(Dispatch.LOCAL, captured)


def plan_of(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CliRunner().invoke(root, ["plan", "--seq-length", "2048", *words]).output)
    return found


def layout_of(plan: dict[str, Any]) -> tuple[float, float]:
    """Return GiB and speed of TP1/EP8 without recomputation."""
    wanted = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 8, "recompute": "none"}
    (found,) = (each for each in plan["layouts"] if wanted.items() <= each.items())
    return found["total_gib"], found["relative_speed"]


def test_the_verb_plans_for_a_named_gpu() -> None:
    a40 = plan_of("--gpu", "a40", "--json")
    assert (a40["gpu_memory_gib"], a40["compute_capability"], a40["compute_capability_source"]) == (44.3, "8.6", "flag")
    assert layout_of(a40) == (36.95, 0.92)
    assert layout_of(plan_of("--gpu", "h100", "--json")) == (36.95, 0.92)
    assert plan_of("--gpu", "a40", "--gpu-memory", "40", "--json")["gpu_memory_gib"] == 40
    refused = CliRunner().invoke(root, ["plan", "--gpu", "v100"])
    assert "--gpu: expected one of a100-40g, a100-80g, a40, h100, h200, b200; found v100" in str(refused.exception)


def test_the_verb_plans_for_this_machines_gpu_and_says_if_it_assumes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["plan", "--seq-length", "2048"]
    monkeypatch.setattr(table, "local_gpu", lambda: None)
    assert "GPU: Hopper (H100, H200) is assumed; plan with --gpu" in CliRunner().invoke(root, words).output
    assert "assumed" not in CliRunner().invoke(root, [*words, "--gpu", "h200"]).output
    assumed = plan_of("--json")
    assert (assumed["gpu_memory_gib"], assumed["compute_capability_source"]) == (80.0, "assumed")
    monkeypatch.setattr(table, "local_gpu", lambda: AvailableGpu(8, 8, (8, 0)))
    assert "GPU: compute capability 8.0, as in this machine" in CliRunner().invoke(root, words).output
    local = plan_of("--json")
    assert (local["compute_capability"], local["compute_capability_source"]) == ("8.0", "this machine")
    assert layout_of(local) == (36.95, 0.92)
    assert layout_of(plan_of("--gpu", "h100", "--json")) == (36.95, 0.92)


@pytest.mark.parametrize(
    ("capability", "element_bytes", "rank", "expected"),
    [
        (HOPPER, 2, 16, False),
        ((10, 0), 2, 16, False),
        ((8, 0), 2, 16, False),
        ((8, 6), 2, 16, False),
        ((12, 0), 2, 16, False),
        ((7, 5), 2, 16, True),
        ((8, 0), 4, 16, True),
        (HOPPER, 4, 16, True),
        (HOPPER, 2, 4, True),  # rows of 8 bytes
        (None, 2, 16, True),
    ],
)
def test_products_that_sync_with_the_host(
    capability: tuple[int, int] | None, element_bytes: int, rank: int, expected: bool
) -> None:
    assert policy.products_sync_with_host(capability, element_bytes, 4096, 14336, rank) == expected


@pytest.mark.parametrize(
    ("capability", "wanted", "expected"),
    [
        ((7, 5), "auto", None),
        ((7, 5), "portable", None),
        ((8, 0), "auto", KernelSet.PORTABLE),
        ((8, 6), "portable", KernelSet.PORTABLE),
        ((8, 0), "hopper", None),
        (HOPPER, "auto", KernelSet.HOPPER),
        (HOPPER, "portable", KernelSet.PORTABLE),
        ((10, 0), "hopper", KernelSet.HOPPER),
        ((12, 0), "auto", KernelSet.PORTABLE),
        (None, "auto", None),
    ],
)
def test_the_kernels_of_a_gpu(capability: tuple[int, int] | None, wanted: str, expected: KernelSet | None) -> None:
    assert kernel_set_of(capability, wanted) is expected
    refused = wanted != "auto" and expected is None
    assert bool(kernel_problems(capability, wanted)) == refused


@pytest.mark.parametrize(
    ("capability", "kernels", "element_bytes", "widths", "expected"),
    [
        (HOPPER, "auto", 2, (4096, 6144, 32000), []),
        (None, "auto", 4, (30,), []),
        ((8, 0), "auto", 2, (4096,), ["found 8.0"]),
        ((10, 0), "auto", 2, (4096,), ["found 10.0"]),
        (HOPPER, "portable", 2, (4096,), ["found --kernels portable"]),
        (HOPPER, "auto", 4, (4096,), ["expected --dtype bf16"]),
        ((8, 9), "auto", 4, (4096, 32002), ["found 8.9", "expected --dtype bf16", "multiples of 16; found 32002"]),
    ],
)
def test_attention_in_8_bit_is_refused_where_it_is_not_multiplied(
    capability: tuple[int, int] | None, kernels: str, element_bytes: int, widths: tuple[int, ...], expected: list[str]
) -> None:
    problems = attention_problems(capability, kernels, element_bytes, widths)
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert problem.startswith("--attention-precision fp8: expected") and part in problem


def test_kernels_that_a_gpu_lacks_are_refused() -> None:
    refused = CliRunner().invoke(root, ["plan", "--gpu", "a100-80g", "--kernels", "hopper"])
    assert (
        "--kernels hopper: expected GPUs of compute capability 9.x or 10.x (H100, H200, B200); found compute "
        "capability 8.0" in str(refused.exception)
    )


def test_fp8_takes_memory_for_16_bit_where_it_is_not_multiplied_in_8_bit() -> None:
    """The experts of linear_fc1: 8 × 28,672 × 4,096 numbers of 2 bytes are 1.75 GiB; the 8-bit input is 112 MiB."""
    workload, layout = Workload(gpus=1, seq_length=2048, expert_bytes=1), Layout(1, 1, "none")
    portable = dataclasses.replace(workload, kernels="portable")
    assert memory(portable, layout).buffers - memory(workload, layout).buffers == 8 * 28672 * 4096 * 2 - 4096 * 28672


def model_of(mesh: Mesh, dropout: float, targets: tuple[str, ...]) -> MixtralModel:
    lora = LoraSettings(16, 32.0, dropout, targets, 1)
    return build_model(SMALL, ModelSettings(torch.bfloat16, True, lora), mesh).train()


@pytest.mark.parametrize("capability", [HOPPER, (8, 0), (7, 5)])
@pytest.mark.parametrize("targets", [LORA_TARGET_MODULES, ("linear_qkv",)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_decides_as_the_planner(
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
    targets: tuple[str, ...],
    capability: tuple[int, int],
) -> None:
    """STAND-IN for the GPU: `is_capturable` is what a GPU of this capability would answer."""
    widths = (SMALL.hidden_size, SMALL.ffn_hidden_size, 16)
    is_capturable = not policy.products_sync_with_host(capability, 2, *widths)
    monkeypatch.setattr(MixtralModel, "is_capturable", property(lambda _: is_capturable))
    model, seen = model_of(mesh, dropout, targets), set()
    for recompute, expert_size in itertools.product(RECOMPUTE, (1, 2, 4)):
        model.settings = dataclasses.replace(model.settings, recompute=recompute)
        model.mesh = dataclasses.replace(mesh, expert_size=expert_size)
        for tokens, peer_access in itertools.product((512, 2048, 4096, 8192), (True, False)):
            workload = Workload(
                architecture=SMALL,
                seq_length=tokens,
                lora_dropout=dropout,
                lora_target_modules=targets,
                compute_capability=capability,
                peer_access=peer_access,
            )
            planned = execution(workload, Layout(1, expert_size, recompute))
            assert cuda_graph.execution_of(model, tokens, peer_access=peer_access) == planned
            seen.add(planned)
    # Neither side may answer the same to everything.
    assert len(seen) == (2 if capability < (8, 0) else 7 if not dropout and len(targets) == 4 else 3)


def test_planner_and_training_ask_the_same_function(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mesh, 0.0, LORA_TARGET_MODULES)
    workload, layout = Workload(gpus=8, seq_length=2048), Layout(1, 8, "none")
    before = memory(workload, layout).total
    assert cuda_graph.execution_of(model, 2048) == Execution(Dispatch.LOCAL, False)  # as on a CPU
    for answer in (Execution(Dispatch.ALL_TO_ALL, False), Execution(Dispatch.ALL_GATHER, True)):
        monkeypatch.setattr(policy, "execution_of", lambda _, answer=answer: answer)
        assert execution(workload, layout) == cuda_graph.execution_of(model, 2048) == answer
        assert (memory(workload, layout).total == before) == answer.captured


def test_generation_asks_the_policy(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mesh, 0.0, LORA_TARGET_MODULES)
    model.mesh = dataclasses.replace(mesh, expert_size=8)
    monkeypatch.setattr(MixtralModel, "is_capturable", property(lambda _: True))
    few, many = 4, 4096
    assert policy.decoding_dispatch(few, 8) is Dispatch.ALL_GATHER
    assert policy.decoding_dispatch(many, 8) is Dispatch.ALL_TO_ALL
    assert policy.decoding_dispatch(many, 1) is Dispatch.LOCAL
    assert decoding_of(model, few, 8) is CapturedDecoding
    assert decoding_of(model, few, 7) is decoding_of(model, many, 8) is Decoding
    monkeypatch.setattr(policy, "captures_decoding", lambda *_, **__: False)
    assert decoding_of(model, few, 8) is Decoding
