"""Cost of several hosts: figures computed by hand, a ring that is walked, and the tables of the document."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.verbs.plan import PlanConfig, network_bytes
from mixtral_run.errors import ConfigError
from mixtral_run.planner.policy import has_peer_access
from mixtral_run.planner.scaling import LAST_SHARE, Exchange, exchange, shown_hosts
from mixtral_run.planner.scaling_table import ATTENTION_SAVES, MEASURED_RATES, scaling
from mixtral_run.planner.table import planned_gpu, ranked, workload_of
from mixtral_run.planner.workload import Layout, Workload
from mixtral_run.train.steps.exchange import STAGES

DOCS = Path(__file__).parents[3] / "docs"
ATTENTION, EXPERTS = 37_748_736, 838_860_800
"""Bytes of Mixtral's adapters of rank 16 in fp32: 32 layers of 16 x (4096 + 6144 + 4096 + 4096), and of 8 experts of
16 x (4096 + 2 x 14336 + 14336 + 4096)."""


@pytest.mark.parametrize(
    ("layout", "hosts", "sent"),
    [
        (Layout(1, 1, "none"), 1, 0),
        (Layout(1, 1, "none"), 2, (EXPERTS + ATTENTION) * 2 * 15 / 16),
        # With EP8 each expert's ring has one rank in each host.
        (Layout(1, 8, "none"), 2, EXPERTS * 2 * 1 / 2 + ATTENTION * 2 * 15 / 16),
        (Layout(1, 8, "none"), 16, EXPERTS * 2 * 15 / 16 + ATTENTION * 2 * 127 / 128),
        # TP2 splits qkv's outputs and proj's inputs: 16 x (4096 + 3072 + 2048 + 4096) on each of two ranks.
        (Layout(2, 4, "full"), 4, EXPERTS * 2 * 7 / 8 + 2 * 27_262_976 * 2 * 15 / 16),
    ],
)
def test_bytes_by_hand(layout: Layout, hosts: int, sent: float) -> None:
    found = exchange(Workload(gpus=8), layout, hosts, network=50e9)
    assert found.host_bytes == pytest.approx(sent)
    assert found.seconds == pytest.approx(sent / 40e9)


def test_weights_that_are_trained_also_are_exchanged() -> None:
    layout, more = Layout(1, 1, "none"), Workload(gpus=8, train_also=("embeddings", "lm_head"))
    sent = exchange(more, layout, 2, network=1).host_bytes - exchange(Workload(gpus=8), layout, 2, network=1).host_bytes
    # Two matrices of 32,000 x 4,096 in fp32, in a ring of 16.
    assert sent == pytest.approx(2 * 32_000 * 4_096 * 4 * 2 * 15 / 16)


@pytest.mark.parametrize(("hosts", "each"), [(2, 1), (2, 8), (3, 4), (16, 2)])
def test_a_ring_that_is_walked_sends_as_much(hosts: int, each: int) -> None:
    """Ranks of one host stand side by side in the ring; every rank sends a piece to the next one at every turn."""
    ranks, sent = hosts * each, Counter[int]()
    for _ in range(2 * (ranks - 1)):
        for rank in range(ranks):
            if rank // each != (rank + 1) % ranks // each:
                sent[rank // each] += ATTENTION / ranks
    found = exchange(
        Workload(gpus=each, lora_target_modules=("linear_qkv", "linear_proj")), Layout(1, 1, "none"), hosts, 1
    )
    assert set(sent) == {*range(hosts)}
    assert {round(value) for value in sent.values()} == {round(found.host_bytes)}


def test_speed_by_hand() -> None:
    """Half of 0.2 s is the backward pass. 1/16 of it passes before the exchange begins."""
    quick, slow, none = Exchange(2, 0, 0.04, 0.006), Exchange(2, 0, 0.3, 0.02), Exchange(1, 0, 0, 0)
    assert quick.speed(0.2, 1) == pytest.approx(0.2 / 0.24)
    assert quick.speed(0.2, 8) == pytest.approx(1.6 / 1.64)
    # The pass limits: in 0.034 s it gets as far as alone in 0.02 s.
    assert quick.added_seconds(0.1) == pytest.approx(0.014 + 0.006)
    assert quick.speed(0.2, 1, overlapped=True) == pytest.approx(0.2 / 0.22)
    assert quick.speed(0.2, 8, overlapped=True) == pytest.approx(1.6 / 1.62)
    # The network limits: 0.28 s, of which 0.1 - 0.1 / 16 are hidden, and 0.02 s after the pass.
    assert slow.speed(0.2, 1, overlapped=True) == pytest.approx(0.2 / (0.1 + 0.1 / 16 + 0.28 + 0.02))
    assert none.speed(0.2, 1, overlapped=True) == 1.0


@pytest.mark.parametrize(
    ("layout", "more", "late"),
    [
        (Layout(1, 1, "none"), {}, (EXPERTS + ATTENTION) / 16 * 2 * 15 / 16),
        (Layout(1, 1, "none"), {"expert_adapters": "shared"}, (EXPERTS / 8 + ATTENTION) / 16 * 2 * 15 / 16),
        # The embedding comes last: 32,000 x 4,096 in fp32.
        (Layout(1, 1, "none"), {"train_also": ("embeddings",)}, (EXPERTS / 16 + 524_288_000) * 2 * 15 / 16),
    ],
)
def test_what_no_backward_pass_hides(layout: Layout, more: dict[str, Any], late: float) -> None:
    found = exchange(Workload(gpus=8, **more), layout, 2, network=50e9)
    assert found.late_seconds == pytest.approx(late / 40e9)


@pytest.mark.parametrize(
    "layout",
    [Layout(1, 8, "none"), Layout(2, 1, "none"), Layout(2, 4, "none"), Layout(1, 1, "none", context_parallel_size=2)],
)
def test_with_other_parallelism_nothing_is_hidden(layout: Layout) -> None:
    """The pass has collectives of its own, and training sums after it."""
    found = exchange(Workload(gpus=8), layout, 2, network=50e9)
    assert found.late_seconds == found.seconds > 0
    for count in (1, 8):
        assert found.speed(0.2, count, overlapped=True) == pytest.approx(found.speed(0.2, count)) and (
            found.speed(0.2, count) < 1
        )


def test_plan_says_why_the_exchange_follows_the_pass() -> None:
    words = ("--seq-length", "2048", "--hosts", "2", "--tokens-per-second", "8192")
    alone, spread = plan("--gpu", "h200", *words), plan("--gpu", "h100", *words)
    assert "TP1/EP1 inside each host" in alone and "in brackets as training does it" in alone and "%)" in alone
    assert "TP1/EP2 inside each host" in spread and "brackets" not in spread and "%)" not in spread
    assert "follows the backward pass, because the pass has collectives of its own under TP1/EP2" in spread


def test_the_last_stage_is_that_of_training() -> None:
    assert LAST_SHARE == 1 / STAGES


def test_shown_hosts() -> None:
    assert [shown_hosts(most) for most in (1, 2, 3, 16, 20)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16], [1, 2, 4, 8, 16, 20]
    ]  # fmt: skip


def test_rates_of_networks() -> None:
    assert [network_bytes(text) for text in ("400Gb", "50GB", "3.2Tb/s", "1 GB/s", "100Gbit")] == [
        50e9, 50e9, 400e9, 1e9, 12.5e9
    ]  # fmt: skip
    for text in ("400", "400gb", "fast", "0Gb", "-1Gb", "400Gb "):
        with pytest.raises(ValueError, match="expected a rate"):
            network_bytes(text)


def test_measured_rates_are_those_of_the_benchmarks() -> None:
    names = {"H200": "h200", "H100": "h100"}
    records = json.loads((DOCS / "lab_notes/2026-11-gpu.json").read_text())
    measured = {}
    for each in records:
        machine, case = each["machine"].split(), each["case"].replace(" base", "")
        if machine[:2] == ["1", "×"] and case.startswith("LoRA, ") and case.endswith(", 2,048 × 1, none"):
            measured[names[machine[2]], case.split(", ")[1]] = each["value"]
    both = measured.pop(("h200", "fp8 and attention"))
    assert measured == MEASURED_RATES
    assert 1 / measured["h200", "fp8"] - 1 / both == pytest.approx(ATTENTION_SAVES, rel=0.01)


def plan(*words: str) -> str:
    done = CliRunner().invoke(root, ["plan", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def cells(text: str, mark: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(mark)[1:-1]] for line in text.splitlines() if line.startswith(mark)]
    return [row for row in rows if len(row) == 6 and row[0].isdigit()]


def test_the_tables_of_the_document_are_what_plan_prints() -> None:
    given = "--seq-length", "2048", "--hosts", "16"
    first = plan("--gpu", "h200", *given, "--network", "400Gb")
    second = plan("--gpu", "h100", "--base-precision", "fp8", *given, "--network", "100Gb")
    third = plan("--gpu", "h200", "--gpus", "1", "--seq-length", "2048", "--hosts", "2", "--network", "450GB")
    shown = [row for text in (first, second, third) for row in cells(text, "│")]
    assert len(shown) == 12 and shown == cells((DOCS / "concepts/scaling.md").read_text(), "|")
    assert "not measured" in first and "measured on one GPU" in first


def test_without_a_known_rate_there_are_no_speeds() -> None:
    shown = plan("--gpu", "b200", "--hosts", "2")
    assert "give --tokens-per-second" in shown and "400Gb a host" in shown and "micro batch" not in shown
    assert "hosts" not in plan("--gpu", "h200").splitlines()[0]


def test_attention_in_8_bit_is_faster_by_what_was_measured() -> None:
    words = ("--gpu", "h200", "--base-precision", "fp8", "--seq-length", "2048", "--hosts", "2")
    without = values(*words)["tokens_per_second"]
    found = values(*words, "--attention-precision", "fp8")["tokens_per_second"]
    assert found == pytest.approx(without * 14378 / 13652, rel=2e-3)


def test_a_plan_for_a_gpu_without_the_products_is_refused() -> None:
    error = CliRunner().invoke(root, ["plan", "--gpu", "a100-80g", "--attention-precision", "fp8"]).exception
    assert isinstance(error, ConfigError)
    assert [each.split(" (")[0] for each in error.problems] == [
        "--attention-precision fp8: expected GPUs of compute capability 9.0"
    ]


def values(*words: str) -> Any:
    return json.loads(plan(*words, "--json"))["scaling"]


def test_json_has_the_table() -> None:
    words = ("--gpu", "h200", "--seq-length", "2048", "--hosts", "2", "--tokens-per-second", "8192")
    found = values(*words)
    assert (found["tokens_per_second"], found["rate_source"], found["micro_batch_seconds"]) == (8192, "flag", 0.25)
    assert [row["hosts"] for row in found["rows"]] == [1, 2]
    assert found["rows"][1]["host_bytes"] == pytest.approx((EXPERTS + ATTENTION) * 15 / 8)
    assert found["rows"][1]["speeds"][0] == pytest.approx(0.25 / (0.25 + (EXPERTS + ATTENTION) * 15 / 8 / 40e9))
    assert values("--gpu", "h200") is None


def test_tokens_reach_experts_of_the_same_host_alike_in_a_job_of_several() -> None:
    """With EP8 the GPUs of a host read each other's memory, whether a job has one host or two."""
    speeds = []
    for hosts in (1, 2):
        config = PlanConfig(gpus=8, hosts=2, gpu="h200", seq_length=2048, tokens_per_second=8192.0, network="100Tb")
        workload = dataclasses.replace(workload_of(config, planned_gpu(config)), gpus=8 * hosts)
        (choice,) = [each for each in ranked(workload, 150e9) if each.layout == Layout(1, 8, "none")]
        speeds.append(choice.relative_speed)
        assert scaling(config, workload, choice).rows[0].speeds == (1.0, 1.0)
    assert speeds[0] == speeds[1] == pytest.approx(0.92, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "gpus", "each", "able"),
    [(8, 8, 8, True), (8, 16, 8, True), (4, 16, 8, True), (8, 16, 4, False), (2, 12, 6, True), (4, 12, 6, False)],
)
def test_gpus_read_each_other_where_each_group_of_experts_is_in_one_host(
    experts: int, gpus: int, each: int, able: bool
) -> None:
    assert has_peer_access(experts, gpus, each) == able


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--network 400Gb", "--network: expected --hosts 2 or more"),
        ("--tokens-per-second 9", "--tokens-per-second: expected --hosts 2 or more"),
        ("--hosts 2 --network fast", "--network: expected a rate such as 400Gb"),
        ("--hosts 2 --gpus 16", "--gpus: expected at most the 8 of one host"),
        ("--hosts 0", "--hosts: expected at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: str, problem: str) -> None:
    refused = CliRunner().invoke(root, ["plan", *words.split()])
    assert problem in str(refused.exception)
