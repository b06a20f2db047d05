"""The planner's figures and choices for rows that are split over GPUs, and the settings that ask for it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.context import MOST_LOGITS, row_multiple
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError
from mixtral_run.launch.processes import num_processes
from mixtral_run.planner.memory_model import memory
from mixtral_run.planner.ranking import ranked
from mixtral_run.planner.spread import allows
from mixtral_run.planner.workload import GIB, Layout, Workload
from mixtral_run.train.data.samples import batch_size_problems

LONG = Workload(gpus=8, seq_length=65536, compute_capability=(8, 0))


def plan(*words: str) -> list[dict[str, object]]:
    shown = CliRunner().invoke(root, ["plan", *words, "--json"])
    found: list[dict[str, object]] = json.loads(shown.output)["layouts"]
    return found


def test_rows_are_split_only_where_nothing_else_fits() -> None:
    # Sixteen GPUs of 40 GB hold 131,072 tokens without; of a million only rows that are split as well.
    short, long = (
        plan("--gpus", "16", "--gpu-memory", "39.4", "--seq-length", str(length)) for length in (131072, 1048576)
    )
    assert short[0]["fits"] and {each["context_parallel_size"] for each in short} == {1}
    assert long[0]["fits"] and long[0]["context_parallel_size"] != 1
    assert not any(each["fits"] for each in long if each["context_parallel_size"] == 1)


def test_a_given_size_is_kept() -> None:
    layouts = plan("--gpus", "8", "--gpu", "a100-40g", "--seq-length", "32768", "--context-parallel-size", "4")
    assert {each["context_parallel_size"] for each in layouts} == {4}
    assert {each["tensor_model_parallel_size"] for each in layouts} == {1, 2}
    assert layouts[0]["fits"]
    text = (
        CliRunner()
        .invoke(
            root,
            ["plan", "--gpus", "8", "--gpu", "a100-40g", "--seq-length", "32768", "--context-parallel-size", "4"],
            env={"COLUMNS": "200"},
        )
        .output
    )
    assert "TP1/CP4/EP8" in text and "--context-parallel-size 4 --expert-model-parallel-size 8" in text


def test_a_rank_holds_its_part_of_the_activations() -> None:
    whole, half = (memory(LONG, Layout(1, 8, "full", size)) for size in (1, 2))
    assert half.activations == whole.activations / 2
    assert half.weights == whole.weights and half.adapters == whole.adapters


def test_keys_and_values_of_the_row_are_on_every_rank() -> None:
    """Without recomputation each layer saves them: 8 groups of 128, a key and a value, in bf16."""
    quarter = dataclasses.replace(LONG, seq_length=LONG.seq_length // 4)
    apart = memory(LONG, Layout(1, 8, "none", 4)).activations - memory(quarter, Layout(1, 8, "none")).activations
    others = 32 * (LONG.seq_length * 3 // 4) * 2 * 8 * 128 * 2
    assert apart == pytest.approx(others)


def test_logits_of_a_chunk_are_counted() -> None:
    """The model's other parts are made so small that the loss is the largest."""
    shape = dataclasses.replace(LONG.architecture, ffn_hidden_size=8, vocab_size=320000)
    buffers = [
        memory(dataclasses.replace(LONG, architecture=shape, seq_length=count * MOST_LOGITS), Layout(1, 8, "full"))
        .buffers / GIB
        for count in (1, 2, 4)
    ]  # fmt: skip
    logits = MOST_LOGITS * shape.padded_vocab_size(1) * 4 / GIB
    hidden = 2 * MOST_LOGITS * shape.hidden_size * 2 / GIB
    assert buffers == pytest.approx([logits, logits + 2 * hidden, logits + 4 * hidden])


def test_speed_falls_with_the_size() -> None:
    speeds = [
        ranked(dataclasses.replace(LONG, context_parallel_size=size), math.inf)[0].relative_speed for size in (1, 2, 4)
    ]
    assert speeds[0] > speeds[1] > speeds[2]


def config(**settings: object) -> FinetuneConfig:
    given = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "seq_length": 16, **settings}
    return FinetuneConfig(load=Path("base"), save=Path("out"), mock_data=True, train_iters=1, device="cpu", **given)


@pytest.mark.parametrize(("tp", "cp", "multiple"), [(1, 1, 1), (4, 1, 4), (1, 2, 4), (2, 2, 4), (4, 2, 8), (3, 2, 12)])
def test_what_a_row_must_be_a_multiple_of(tp: int, cp: int, multiple: int) -> None:
    lengths = [
        length
        for length in range(1, 100)
        if (cp == 1 or length % (2 * cp) == 0) and length % cp == 0 and length // cp % tp == 0
    ]
    assert lengths == list(range(multiple, 100, multiple))
    assert row_multiple(tp, cp) == multiple


def test_a_row_that_cannot_be_cut_is_refused() -> None:
    assert config(context_parallel_size=4).problems() == []
    (problem,) = config(context_parallel_size=4, seq_length=20).problems()
    assert problem == (
        "--seq-length: expected a multiple of 8, as --context-parallel-size 4 cuts a row into 8 equal chunks; found 20"
    )


def test_a_plan_refuses_what_no_run_takes() -> None:
    assert PlanConfig(gpus=6, context_parallel_size=4, seq_length=20).problems() == [
        "--context-parallel-size: expected a divisor of 6, the GPUs of the job; found 4",
        "--seq-length: expected a multiple of 8, as --context-parallel-size 4 cuts a row into 8 equal chunks; found 20",
    ]
    assert PlanConfig(gpus=2, hosts=2, context_parallel_size=4, full=True).problems() == []
    # What is checked are the GPUs that are planned with: each of these has a layout with this size, or a problem.
    for gpus, hosts, size in ((2, 3, 3), (8, 2, 16)):
        split = {"hosts": hosts, "context_parallel_size": size, "seq_length": 6144}
        assert PlanConfig(gpus=gpus, **split).problems() == [
            f"--context-parallel-size: expected a divisor of {gpus}, the GPUs of one host, on which --hosts plans each "
            f"row; found {size}; --gpus {gpus * hosts} without --hosts splits rows over all of them"
        ]
        assert PlanConfig(gpus=gpus * hosts, **{**split, "hosts": 1}).problems() == []
    most = "--expert-chunks: expected at most 24, the tokens that a process has in a micro batch; found 25"
    pairs = {"seq_length": 24, "context_parallel_size": 2}
    assert PlanConfig(gpus=2, expert_chunks=25, **pairs).problems() == [most.replace("24", "12")]
    assert PlanConfig(method="orpo", seq_length=12, expert_chunks=25).problems() == [most]
    assert config(seq_length=24, expert_chunks=25).problems() == [most]
    assert config(seq_length=24, expert_chunks=24).problems() == []


def test_the_balance_of_the_routers_needs_whole_rows() -> None:
    balanced = {"train_also": ("router",), "router_aux_loss": 0.02}
    assert config(**balanced).problems() == []
    (problem,) = config(context_parallel_size=2, **balanced).problems()
    assert problem == "--context-parallel-size: expected 1 with --router-aux-loss, which needs whole rows; found 2"
    assert config(**balanced).planned_context_size == 1


def test_the_processes_must_be_a_multiple_of_both_sizes() -> None:
    fitting = config(context_parallel_size=2, tensor_model_parallel_size=2, nproc_per_node=4)
    assert num_processes(fitting) == 4
    with pytest.raises(ConfigError) as refused:
        num_processes(dataclasses.replace(fitting, nproc_per_node=2))
    assert refused.value.problems == (
        "--context-parallel-size: expected a divisor of 1, the 2 processes started over --tensor-model-parallel-size "
        "2; found 2",
    )
    assert refused.value.what == "The layout TP2/CP2/EP1 does not fit 2 processes."
    assert refused.value.next_command == (
        "--nproc-per-node 4, or --tensor-model-parallel-size 2 --context-parallel-size 1 --expert-model-parallel-size 1"
    )


class Comparing(FinetuneConfig):
    """A verb whose loss is no sum over tokens."""

    VERB = "compare"


def test_a_loss_of_whole_rows_is_refused_and_planned_without() -> None:
    settings = {"load": Path("base"), "save": Path("out"), "mock_data": True, "train_iters": 1, "seq_length": 16}
    (problem,) = Comparing(**settings, context_parallel_size=2).problems()
    assert problem == "--context-parallel-size: expected 1 with `compare`, which needs whole rows; found 2"
    assert Comparing(**settings).problems() == []
    assert Comparing(**settings).planned_context_size == 1
    assert FinetuneConfig(**settings).planned_context_size is None
    assert config().planned_context_size == 1


def test_ranks_of_a_row_share_its_samples() -> None:
    """Eight processes are two replicas of CP 4: a batch of two rows is enough."""
    two = config(context_parallel_size=4, global_batch_size=2)
    assert allows(two, Layout(1, 1, "none", 4), 8)
    assert not allows(two, Layout(1, 1, "none", 1), 8)
    assert batch_size_problems(2, 1, 2) == []
