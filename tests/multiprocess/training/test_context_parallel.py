"""Rows that are split over ranks: losses, gradients, counts of the routers and resumed runs equal those without."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.conftest import mixtral_run, torchrun

WORKER = Path(__file__).parent / "context_worker.py"
TWO, FOUR = ("1x1x2", "1x2x2"), ("2x1x2", "1x2x2", "1x1x4")
CASES = [*(f"2:{layout}" for layout in TWO), *(f"4:{layout}" for layout in FOUR)]
KINDS = ("UnevenSamples", "PackedRows")


@pytest.fixture(scope="module")
def results(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By '<processes>:<TP>x<EP>x<CP>'. The first layout of a job saves, the others resume."""
    folder = tmp_path_factory.mktemp("context")
    found: dict[str, dict[str, Any]] = {}
    for count, layouts in ((1, ("1x1x1",)), (2, TWO), (4, FOUR)):
        out = folder / f"on{count}.json"
        torchrun(count, WORKER, str(small_checkpoint), str(out), *layouts)
        found |= {f"{count}:{layout}": values for layout, values in json.loads(out.read_text()).items()}
    return found


def check_figures(found: list[list[float]], expected: list[list[float]]) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=3e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_norms_and_router_counts_equal(case: str, kind: str, results: dict[str, Any]) -> None:
    """Over three steps: the later losses are those of adapters that these gradients trained."""
    expected, found = results["1:1x1x1"][kind], results[case][kind]
    assert abs(expected["figures"][0][0] - expected["figures"][2][0]) > 1e-3
    check_figures(found["figures"], expected["figures"])
    assert found["router"] == expected["router"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_gradients_equal(kind: str, results: dict[str, Any]) -> None:
    expected, found = results["1:1x1x1"][kind]["gradients"], results["2:1x1x2"][kind]["gradients"]
    assert len(expected) > 10
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        scale = max(map(abs, values))
        assert scale > 0, name
        assert found[name] == pytest.approx(values, abs=2e-5 * scale), name


@pytest.mark.parametrize("case", ["1:1x1x1", *CASES])
def test_only_weights_and_gradients_live_after_a_pass(case: str, results: dict[str, Any]) -> None:
    """tests/unit/train/steps/test_live_tensors.py has all that needs one process."""
    assert results[case]["left"] == []


def test_packing_matters(results: dict[str, Any]) -> None:
    """Otherwise the equality of packed rows would show nothing."""
    packed, plain = (results["1:1x1x1"][kind]["figures"] for kind in ("PackedRows", "UnevenSamples"))
    assert abs(packed[0][0] - plain[0][0]) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_validation_loss_equals(case: str, results: dict[str, Any]) -> None:
    expected, found = results["1:1x1x1"], results[case]
    assert found["validation"][0] == pytest.approx(expected["validation"][0], abs=3e-6)
    assert found["packed_validation"] == pytest.approx(expected["packed_validation"], rel=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_whole_rows(case: str, results: dict[str, Any]) -> None:
    """Generation does not split rows; eight tokens could not be cut for CP 4 either."""
    for found, expected in zip(results[case]["logits"], results["1:1x1x1"]["logits"], strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_recomputation_and_chunks_of_losses_and_experts_change_nothing(case: str, results: dict[str, Any]) -> None:
    expected = results["1:1x1x1"]["PackedRows"]["figures"][:1]
    for mode in ("selective", "full", "chunked", "expert_chunks"):
        check_figures(results[case][mode], expected)
    assert results[case]["except-attention"] == results[case]["full"]


@pytest.mark.parametrize("case", CASES)
def test_recomputation_draws_the_same_dropout(case: str, results: dict[str, Any]) -> None:
    none, full, except_attention = results[case]["dropout"]
    check_figures(full, none)
    assert except_attention == full
    assert abs(none[0][1] - results[case]["PackedRows"]["figures"][0][1]) > 1e-3


@pytest.mark.parametrize("case", ["2:1x2x2", *(f"4:{layout}" for layout in FOUR[1:])])
def test_a_run_saved_with_another_size_goes_on_the_same(case: str, results: dict[str, Any]) -> None:
    check_figures(results[case]["resumed"], results["1:1x1x1"]["PackedRows"]["figures"][2:])


def test_the_verb_splits_packed_rows_and_resumes_without(small_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [
        {"instruction": f"Count to {number}.", "output": " ".join(map(str, range(number)))} for number in range(1, 13)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (
        "finetune", "--load", str(small_checkpoint), "--data-path", str(data), "--valid-data-path", str(data),
        "--pack", "--seq-length", "128", "--global-batch-size", "2", "--train-iters", "4", "--lr", "1e-2",
        "--min-lr", "1e-2", "--device", "cpu", "--save-interval", "2", "--eval-interval", "2", "--report-tokens", "2",
        "--no-tensorboard",
    )  # fmt: skip

    def run(save: str, *words: str) -> str:
        done = mixtral_run(*common, "--save", str(tmp_path / save), *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("whole", "--nproc-per-node", "1")
    shown = run("split", "--nproc-per-node", "2", "--context-parallel-size", "2", "--train-iters", "2")
    assert "TP1/CP2/EP2, data-parallel 1" in shown
    run("split", "--nproc-per-node", "2", "--resume")
    whole, split = (
        [json.loads(line) for line in (tmp_path / save / "metrics.jsonl").read_text().splitlines()]
        for save in ("whole", "split")
    )
    assert [each["iteration"] for each in split] == [1, 2, 3, 4]
    for found, expected in zip(split, whole, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    found, expected = (
        {each["iteration"]: each["loss"] for each in map(json.loads, (tmp_path / save / "validation.jsonl").open())}
        for save in ("whole", "split")
    )
    assert found == pytest.approx(expected, abs=2e-5)
    assert len(found) == 3
