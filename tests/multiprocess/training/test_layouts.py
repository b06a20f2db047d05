"""One model in every layout: HF's logits, the same losses, the same continuations, resumed across layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess.conftest import torchrun
from tests.multiprocess.training.layouts_worker import ROWS, UnevenSamples

WORKER = Path(__file__).parent / "layouts_worker.py"
FOUR = ("1x1", "2x1", "1x2", "2x2", "2x4")


@pytest.fixture(scope="session")
def results(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By '<processes>:<TP>x<EP>'. On four processes the layouts differ in data parallelism too, from 4 down to 2."""
    folder = tmp_path_factory.mktemp("layouts")
    found: dict[str, dict[str, Any]] = {}
    for count, layouts in ((1, ("1x1",)), (2, ("2x2",)), (4, FOUR)):
        out = folder / f"on{count}.json"
        torchrun(count, WORKER, str(small_checkpoint), str(out), *layouts)
        for layout, values in json.loads(out.read_text()).items():
            found[f"{count}:{layout}"] = values
    return found


@pytest.fixture(scope="session")
def hf_logits(small_hf_model: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(small_hf_model), dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([row])).logits[0].double() for row in ROWS]


@pytest.fixture(scope="session")
def hf_choices(small_hf_model: Path) -> list[list[int]]:
    """The tokens of each expert, layer by layer, in the first batch of the runs: by HF's model, and top 2 by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(small_hf_model), dtype=torch.float32)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda gate, inputs: seen.append((inputs[0], gate.weight)))
    samples = UnevenSamples(model.config.vocab_size, 16, 1234)
    counts = [[0] * 8 for _ in model.model.layers]
    with torch.inference_mode():
        for index in range(8):
            seen.clear()
            model(torch.tensor([samples.row(index).tokens.tolist()]))
            for layer, (hidden, weight) in enumerate(seen):
                logits = (hidden.reshape(16, -1).double() @ weight.double().T).tolist()
                for token in logits[: samples.num_loss_tokens(index)]:
                    for expert in sorted(range(8), key=lambda each: -token[each])[:2]:
                        counts[layer][expert] += 1
    return counts


CASES = ["1:1x1", "2:2x2", *(f"4:{layout}" for layout in FOUR)]
SPREAD = [case for case in CASES if not case.endswith("x1")]
"""Cases whose experts are on several processes, which only then gather tokens."""


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hfs(case: str, results: dict[str, Any], hf_logits: list[torch.Tensor]) -> None:
    for ours, theirs in zip(results[case]["logits"], hf_logits, strict=True):
        assert float((torch.tensor(ours, dtype=torch.float64) - theirs).abs().max()) <= 5e-6


@pytest.mark.parametrize("case", CASES)
def test_the_routers_choices_are_counted(case: str, results: dict[str, Any], hf_choices: list[list[int]]) -> None:
    """With all ways of recomputation and dispatch; in one of them each step is taken twice."""
    found, reference = results[case]["router"], results["1:1x1"]["router"]["plain"]
    assert len(found) == 4 + 7 * (case in SPREAD)
    for name, (first, second) in found.items():
        assert first == hf_choices, name
        assert second == reference[1] != first, name


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_equal(case: str, results: dict[str, Any]) -> None:
    reference = results["1:1x1"]["figures"]
    assert len(reference) == 4
    # The losses do move: equality of standing still would show nothing.
    assert abs(reference[0][0] - reference[-1][0]) > 1e-3
    for (loss, norm), (expected_loss, expected_norm) in zip(results[case]["figures"], reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=3e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("4:") and case != "4:1x1"])
def test_a_run_saved_in_another_layout_goes_on_the_same(case: str, results: dict[str, Any]) -> None:
    reference = results["1:1x1"]["figures"][2:]
    for (loss, norm), (expected_loss, expected_norm) in zip(results[case]["resumed"], reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=3e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["recomputed", "selective", "expert_chunks", "whole_batch"])
def test_recomputing_and_micro_batches_change_nothing(case: str, variant: str, results: dict[str, Any]) -> None:
    reference = results["1:1x1"]["figures"][:2]
    for (loss, norm), (expected_loss, expected_norm) in zip(results[case][variant], reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=3e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_attention_in_8_bit_is_the_same_in_every_layout(case: str, results: dict[str, Any]) -> None:
    found, reference = results[case]["attention_fp8"], results["1:1x1"]["attention_fp8"]
    plain = results["1:1x1"]["figures"]
    for (loss, norm), expected, (near, _) in zip(found["figures"], reference["figures"], plain[:2], strict=True):
        assert (loss, norm) == (pytest.approx(expected[0], abs=3e-6), pytest.approx(expected[1], rel=1e-4))
        assert 1e-5 < abs(loss - near) < 0.1
    # After two steps, by which adapters of two layouts differ a little.
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(reference["logits"]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", SPREAD)
def test_gathered_tokens_give_what_rows_sent_one_by_one_give(case: str, results: dict[str, Any]) -> None:
    """Also where there is too little room, and the step is taken again."""
    reference = results["1:1x1"]["figures"][:2]
    assert len(results[case]["gathered"]) == 7
    for variant, figures in results[case]["gathered"].items():
        for (loss, norm), (expected_loss, expected_norm) in zip(figures, reference, strict=True):
            assert loss == pytest.approx(expected_loss, abs=3e-6), variant
            assert norm == pytest.approx(expected_norm, rel=1e-4), variant


@pytest.mark.parametrize("case", SPREAD)
def test_gathered_tokens_all_have_room_where_they_are_to(case: str, results: dict[str, Any]) -> None:
    """All processes have the same tokens, so that most rows may be one process's."""
    assert results[case]["unlimited"] <= 5e-6


@pytest.mark.parametrize("case", CASES)
def test_the_validation_loss_is_the_same_in_every_layout(case: str, results: dict[str, Any]) -> None:
    """Seven rows, one and three at once: some processes have none to look at in the last pass."""
    reference = results["1:1x1"]["validation"][0][1]
    assert reference > 1
    for loss, one_by_one in results[case]["validation"]:
        assert loss == pytest.approx(reference, abs=3e-6)
        assert one_by_one == pytest.approx(reference, abs=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_packed_samples_have_the_loss_they_have_alone(case: str, results: dict[str, Any]) -> None:
    packed, alone = results[case]["packed"]
    assert packed == pytest.approx(alone, rel=1e-6)
    if case in SPREAD:
        assert results[case]["packed, gathered"] == pytest.approx((packed, alone), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_the_same_however_much_is_computed_again(case: str, results: dict[str, Any]) -> None:
    dropped = results[case]["dropout"]
    # Dropout changes the second step's loss: the first has B = 0.
    assert abs(dropped["none"][1][0] - results[case]["figures"][1][0]) > 1e-6
    assert dropped["offload"] == dropped["except-attention"] == dropped["full"]
    for mode in ("selective", "full"):
        for (loss, norm), (expected_loss, expected_norm) in zip(dropped[mode], dropped["none"], strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "variant", ["full", "full_within", "full_within_recomputed", "full_within_selective", "full_within_offload"]
)
def test_full_training_steps_within_the_backward_pass_as_after_it(
    case: str, variant: str, results: dict[str, Any]
) -> None:
    reference = results["1:1x1"]["full"]
    assert abs(reference[0][0] - reference[-1][0]) > 1e-2
    for (loss, norm), (expected_loss, expected_norm) in zip(results[case][variant], reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.fixture(scope="module")
def hf_continuations(small_hf_model: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(small_hf_model), dtype=torch.float32)
    found = []
    for row in ROWS:
        ids = torch.tensor([row])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        found.append(whole[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("case", CASES)
def test_continuations_equal_hfs(case: str, results: dict[str, Any], hf_continuations: list[list[int]]) -> None:
    # A batch of rows of different length gives each row what it gets alone.
    assert results[case]["greedy"] == hf_continuations
    assert results[case]["greedy_alone"] == hf_continuations
    # In shapes that stay, as GPUs have it recorded.
    assert results[case]["greedy_staying"] == hf_continuations


def test_drawing_is_seeded_and_the_same_everywhere(results: dict[str, Any]) -> None:
    drawn = [results[case]["drawn"] for case in CASES]
    assert all(each == drawn[0] for each in drawn)
    assert drawn[0] != results["1:1x1"]["greedy"]
