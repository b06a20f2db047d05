"""Plans of long rows and of Mixtral 8x22B against sums that are written out here, from the models' published sizes.

Nothing of the planner is used but its result: each tensor is counted as the model's code allocates it, in bytes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.planner import table
from mixtral_run.weights.manifest.describe import BaseDescription
from tests.support.references.model_cases import RELEASED_CONFIGS

GIB = 1024**3
BF16, FP32 = 2, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a Mixtral, as in its config.json."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    groups: int = 8
    head: int = 128
    experts: int = 8


EIGHT_BY_SEVEN = Sizes(layers=32, hidden=4096, ffn=14336, heads=32, vocabulary=32000)
EIGHT_BY_22 = Sizes(layers=56, hidden=6144, ffn=16384, heads=48, vocabulary=32768)


def weights(of: Sizes, tp: int, ep: int, expert_bytes: float) -> float:
    """Query, key, value and output projections, embedding and output layer over TP; experts over EP; the rest whole."""
    queries, keys = of.heads * of.head, of.groups * of.head
    attention = of.layers * of.hidden * (queries + 2 * keys + queries)
    experts = of.layers * of.experts * 3 * of.hidden * of.ffn
    norms_and_routers = of.layers * (2 * of.hidden + of.experts * of.hidden) + of.hidden
    split = attention + 2 * of.vocabulary * of.hidden
    return BF16 * (split / tp + norms_and_routers) + expert_bytes * experts / ep


def adapters(of: Sizes, tp: int, ep: int, rank: int = 16) -> float:
    """A reads all inputs, B writes a TP rank's outputs, for qkv; the other way round for the output projection."""
    queries, keys = of.heads * of.head, of.groups * of.head
    attention = (of.hidden + (queries + 2 * keys) / tp) + (queries / tp + of.hidden)
    experts = of.experts / ep * ((of.hidden + 2 * of.ffn) + (of.ffn + of.hidden))
    return of.layers * rank * (attention + experts)


def layer_that_runs_again(of: Sizes, tokens: float, chunk: float, tp: int, ep: int) -> float:
    """A layer's activations and the gradients of its experts, all in bf16. tokens, chunk: of a rank, before TP."""
    queries, keys = of.heads * of.head, of.groups * of.head
    attention = 3 * of.hidden + (queries + 2 * keys) + queries  # norms' inputs, qkv's input, q, k, v, context
    whole = BF16 * attention + FP32 * of.heads  # log-sum-exp
    if chunk < tokens:
        # Inputs of the experts with their gradient, the layer's output with its gradient.
        whole += BF16 * 4 * of.hidden
    rows = 2 * chunk * (1 if ep == 1 else 1.1)
    # Gate and up, their gradients, the activation and its gradient; the rows and their gradient, of an exchange more.
    each = BF16 * (2 * of.ffn + 2 * of.ffn + 2 * of.ffn + of.hidden * (2 if ep == 1 else 6))
    indexed = BF16 * of.hidden * chunk if ep == 1 else 0.0
    return (tokens * whole + rows * each + indexed) / tp


def plan_of(*words: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(root, ["plan", *words, "--json"])
    assert shown.exit_code == 0, shown.output
    found: list[dict[str, Any]] = json.loads(shown.output)["layouts"]
    return found


def check(found: dict[str, Any], of: Sizes, tokens: int, limit: float, expert_bytes: float = 2) -> None:
    """Compare a planned layout whose layers all run again with the sums, to 0.05 GiB for each part."""
    tp, ep, chunks = (
        found[name] for name in ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_chunks")
    )
    assert found["fits"] and found["context_parallel_size"] == 1 and found["recompute_layers"] is None
    # Except attention: its result and log-sum-exp stay from the forward pass on.
    kept = {"full": 0, "except-attention": BF16 * of.heads * of.head + FP32 * of.heads}[found["recompute"]]
    parts, count = found["parts_gib"], adapters(of, tp, ep)
    expected = {
        "weights": weights(of, tp, ep, expert_bytes),
        "adapters": FP32 * count,
        "gradients": FP32 * count,
        "optimizer": 2 * FP32 * count,
        # The input of each layer.
        "activations": of.layers * tokens * (of.hidden * BF16 + kept) / tp,
        "buffers": layer_that_runs_again(of, tokens, tokens / chunks, tp, ep) - tokens * kept / tp,
        # CUDA and NCCL, as measured.
        "context": 1.4 * GIB,
    }
    if expert_bytes < 1:
        # The experts of linear_fc1 in 16 bit.
        expected["buffers"] += of.experts / ep * 2 * of.ffn * of.hidden * BF16
    assert parts == pytest.approx({name: size / GIB for name, size in expected.items()}, abs=0.05)
    total = sum(expected.values()) / GIB
    assert found["total_gib"] == pytest.approx(total, abs=0.1) and total < 0.97 * limit


def test_32768_tokens_on_eight_gpus_of_40_gb() -> None:
    """39.4 GiB each. TP1/EP8 fits with experts in four chunks of 8,192, and is faster than TP2, which fits without."""
    best, *others = plan_of("--gpus", "8", "--gpu", "a100-40g", "--seq-length", "32768")
    assert (best["tensor_model_parallel_size"], best["expert_model_parallel_size"], best["expert_chunks"]) == (1, 8, 4)
    assert best["recompute"] == "except-attention"
    check(best, EIGHT_BY_SEVEN, 32768, 39.4)
    second = next(
        each for each in others if each["fits"] and each["recompute"] == "full" and each["expert_chunks"] == 1
    )
    assert second["tensor_model_parallel_size"] == 2
    whole = next(
        each for each in others
        if (each["tensor_model_parallel_size"], each["expert_model_parallel_size"], each["recompute"]) == (1, 8, "full")
        and each["expert_chunks"] == 1
    )  # fmt: skip
    assert not whole["fits"] and whole["total_gib"] > 0.97 * 39.4


@pytest.mark.parametrize(("precision", "each"), [("fp8", 1.0), ("nf4", 0.53125)])
def test_32768_tokens_on_eight_gpus_of_40_gb_with_a_quantized_base(precision: str, each: float) -> None:
    words = ("--gpus", "8", "--gpu", "a100-40g", "--seq-length", "32768", "--base-precision", precision)
    best = plan_of(*words, "--expert-chunks", "4")[0]
    found = {**best, "parts_gib": dict(best["parts_gib"])}
    if precision == "fp8":
        # An A100 expands the experts of a linear layer too, and each output channel has a scale.
        found["parts_gib"]["buffers"] -= 2 * 14336 * 4096 * BF16 / GIB
        found["total_gib"] -= 2 * 14336 * 4096 * BF16 / GIB
    check(found, EIGHT_BY_SEVEN, 32768, 39.4, each)


def test_32768_tokens_on_one_h200_with_as_many_stored_layers_as_fit() -> None:
    """139.7 GiB, experts in 8 bit: 19 layers run again except attention, 13 behind them are selective."""
    best, *others = plan_of("--gpus", "1", "--gpu", "h200", "--seq-length", "32768", "--base-precision", "fp8")
    assert (best["recompute"], best["recompute_layers"], best["fits"]) == ("except-attention", 19, True)
    of, tokens, rows = EIGHT_BY_SEVEN, 32768, 2 * 32768
    queries, keys = of.heads * of.head, of.groups * of.head
    attention = BF16 * queries + FP32 * of.heads
    # Inputs of both norms, query, key, value, attention's result, and the output of linear_fc1 for two experts a token.
    selective = BF16 * (2 * of.hidden + queries + 2 * keys) + attention + 2 * BF16 * 2 * of.ffn
    # Gradients of that and of the activation, the activation, the rows and their gradients, and an input in 8 bit.
    backward = rows * (BF16 * (2 * of.ffn + 2 * of.ffn + 3 * of.hidden) + 2 * of.ffn)
    expected = {
        "weights": weights(of, 1, 1, 1) + of.layers * of.experts * FP32 * (2 * of.ffn + of.hidden),
        # Copies in bf16 for the layers that are not run again.
        "adapters": adapters(of, 1, 1) * (FP32 + BF16 * 13 / 32),
        "activations": tokens * (19 * (BF16 * of.hidden + attention) + 13 * selective),
        # And what the pool of a CUDA graph loses.
        "buffers": backward + 1.5 * GIB,
        "context": 0.6 * GIB,
    }
    expected["gradients"] = FP32 * adapters(of, 1, 1)
    expected["optimizer"] = 2 * expected["gradients"]
    assert best["parts_gib"] == pytest.approx({name: size / GIB for name, size in expected.items()}, abs=0.02)
    # One layer more would be over 94 % of the GPU.
    more = (tokens * (selective - BF16 * of.hidden - attention) + BF16 * adapters(of, 1, 1) / 32) / GIB
    assert best["total_gib"] <= 0.94 * 139.7 < best["total_gib"] + more
    (whole,) = (
        each for each in others
        if (each["recompute"], each["recompute_layers"], each["expert_chunks"]) == ("except-attention", None, 1)
    )  # fmt: skip
    assert whole["parts_gib"]["activations"] == pytest.approx(32 * 32768 * (8192 + 8320) / GIB, abs=0.006)
    assert best["relative_speed"] > whole["relative_speed"] > 0.78


def test_65536_tokens_on_two_h200() -> None:
    """139.7 GiB each: with all experts on each GPU, with half of them, and in chunks."""
    found = {
        (each["tensor_model_parallel_size"], each["expert_model_parallel_size"], each["expert_chunks"]): each
        for each in plan_of("--gpus", "2", "--gpu", "h200", "--seq-length", "65536", "--context-parallel-size", "1")
        if each["recompute"] == "full" and each["recompute_layers"] is None
    }
    for layout in ((1, 1, 1), (1, 2, 1), (1, 1, 8), (1, 2, 8)):
        check(found[layout], EIGHT_BY_SEVEN, 65536, 139.7)


def test_65536_tokens_split_over_two_h200() -> None:
    """The run that was measured: TP1/CP2/EP2. Each GPU has half of the tokens, and the keys and values of the row."""
    of, tokens = EIGHT_BY_SEVEN, 32768
    keys_and_values = 2 * of.groups * of.head * BF16
    for chunks in (1, 8):
        words = ("--context-parallel-size", "2", "--expert-chunks", str(chunks))
        (found,) = (
            each for each in plan_of("--gpus", "2", "--gpu", "h200", "--seq-length", "65536", *words)
            if (each["expert_model_parallel_size"], each["recompute"]) == (2, "full")
            and each["recompute_layers"] is None
        )  # fmt: skip
        expected = layer_that_runs_again(of, tokens, tokens / chunks, 1, 2) + tokens * keys_and_values
        if chunks == 8:
            # The attention's gradients are more than those of 4,096 tokens of the experts, which are counted above: of
            # each token that of the output projection's input; of queries, keys and values, before and after rotation;
            # of half of the queries in fp32; of the keys and values of the row for each of 32 heads, their sums for
            # each of 8 groups, and those of the other chunk.
            queries = of.heads * of.head
            of_experts = 2 * 4096 * 1.1 * BF16 * (2 * of.ffn + of.ffn + of.ffn + 4 * of.hidden)
            of_attention = tokens * (BF16 * queries + 2 * (BF16 * queries + keys_and_values) + FP32 * queries / 2)
            of_attention += 2 * tokens * (2 * BF16 * queries + 2 * keys_and_values)
            # Of the four rows of `layer_that_runs_again`, the gradient of the experts' inputs goes with the experts.
            expected += of_attention - of_experts - tokens * BF16 * of.hidden
        assert found["parts_gib"]["buffers"] == pytest.approx(expected / GIB, abs=0.05)
        assert found["parts_gib"]["activations"] == pytest.approx(of.layers * tokens * of.hidden * BF16 / GIB, abs=0.05)


@pytest.fixture
def eight_by_22(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Mixtral 8x22B Instruct of which there is only config.json, as on a laptop."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIGS["Mixtral-8x22B-Instruct-v0.1"]))
    sizes = MixtralArchitecture.from_hf_directory(tmp_path)
    monkeypatch.setattr(table, "_base", lambda load: BaseDescription(load, sizes, "bfloat16", ""))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "gib", "words", "tokens", "each"),
    [
        ("h100", 79.1, (), 8192, 2),
        ("h100", 79.1, (), 32768, 2),
        ("h200", 139.7, ("--expert-chunks", "4"), 32768, 2),
        ("a100-40g", 39.4, ("--base-precision", "nf4"), 8192, 0.53125),
    ],
)
def test_8x22b_on_eight_gpus(
    eight_by_22: str, gpu: str, gib: float, words: tuple[str, ...], tokens: int, each: float
) -> None:
    """140.6 B parameters: 41 GiB of weights on each of eight GPUs in bf16, 18 GiB in NF4."""
    layouts = plan_of("--gpus", "8", "--gpu", gpu, "--load", eight_by_22, "--seq-length", str(tokens), *words)
    found = next(
        layout for layout in layouts
        if (layout["tensor_model_parallel_size"], layout["expert_model_parallel_size"], layout["recompute"])
        == (1, 8, "full") and layout["fits"] and layout["recompute_layers"] is None
    )  # fmt: skip
    check(found, EIGHT_BY_22, tokens, gib, each)


def test_8x22b_is_planned_in_all_layouts(eight_by_22: str) -> None:
    """Six heads a group: TP divides the 8 groups and 48 heads, EP the 8 experts. Weights in bf16, each by hand."""
    layouts = plan_of("--gpus", "8", "--gpu", "h200", "--load", eight_by_22, "--seq-length", "2048", "--all")
    found = {
        (each["tensor_model_parallel_size"], each["expert_model_parallel_size"]): each["parts_gib"]["weights"]
        for each in layouts
    }
    assert found.keys() == {(tp, ep) for tp in (1, 2, 4, 8) for ep in (1, 2, 4, 8)}
    assert found == pytest.approx({(tp, ep): weights(EIGHT_BY_22, tp, ep, 2) / GIB for tp, ep in found}, abs=0.006)
    assert found[1, 1] * GIB / 2 == pytest.approx(140.63e9, rel=1e-4)
    # 262 GiB are on no GPU alone; 8 × 40 GB hold them in bf16 with TP4/EP8 or TP8/EP8.
    small = plan_of("--gpus", "8", "--gpu", "a100-40g", "--load", eight_by_22, "--seq-length", "2048")
    assert {
        (each["tensor_model_parallel_size"], each["expert_model_parallel_size"]) for each in small if each["fits"]
    } <= {(4, 8), (8, 8)}
    assert small[0]["fits"]
