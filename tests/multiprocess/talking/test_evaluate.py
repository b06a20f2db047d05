"""`evaluate`: the losses are HF's and those of finetune's validation, the answers HF's greedy ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import MixtralRunError
from mixtral_run.inference.evaluation import check, scores
from mixtral_run.inference.evaluation.evaluate import evaluate
from mixtral_run.train.loop import finetune
from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.talking.conftest import Adapted, Oracle, rendered
from tests.support import standin_packages

PAIRS = [
    ("Add one and two.", "Three."), ("Say hello.", "Hello there, friend."), ("Name a color.", "Blau, grün oder rot."),
    ("Count.", "one two three four five"), ("Why?", "Because."),
]  # fmt: skip
COUNT = 8
ONE: dict[str, Any] = {"device": "cpu", "tensor_model_parallel_size": 1, "expert_model_parallel_size": 1}


@pytest.fixture
def pairs(tmp_path: Path, adapted: Adapted) -> Path:
    """The last pair's answer is the one that the adapted model gives."""
    file = tmp_path / "test.jsonl"
    known = adapted.merged.greedy(rendered([("Go on.", None)]), COUNT)
    lines = [*PAIRS, ("Go on.", known)]
    file.write_text("".join(json.dumps({"instruction": task, "response": answer}) + "\n" for task, answer in lines))
    return file


def hf_losses(oracle: Oracle, file: Path) -> list[tuple[float, int]]:
    """The summed loss of each example's answer with </s>, and the number of its tokens, by HF's model."""
    found = []
    for line in map(json.loads, file.read_text().splitlines()):
        prompt = oracle.tokenizer(rendered([(line["instruction"], None)]), add_special_tokens=False).input_ids
        whole = oracle.tokenizer(
            rendered([(line["instruction"], line["response"])]), add_special_tokens=False
        ).input_ids
        assert whole[: len(prompt)] == prompt
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        labels = torch.tensor(whole[len(prompt) :])
        found.append((float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")), len(labels)))
    return found


def test_base_and_adapter_side_by_side(
    adapted: Adapted, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    evaluate(
        EvaluateConfig(
            load=adapted.base, adapter=adapted.adapter, data_path=(str(pairs),), max_new_tokens=COUNT, batch_size=4,
            output_file=result, **ONE,
        )
    )  # fmt: skip
    found = json.loads(result.read_text())
    for name, oracle in (("base", adapted.hf), ("adapter", adapted.merged)):
        losses = hf_losses(oracle, pairs)
        tokens = sum(count for _, count in losses)
        mean = sum(loss for loss, _ in losses) / tokens
        assert found["num_loss_tokens"] == tokens
        assert found["models"][name]["loss"] == pytest.approx(mean, rel=1e-5)
        assert found["models"][name]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        for answer, (task, _), (loss, count) in zip(found["answers"], [*PAIRS, ("Go on.", "")], losses, strict=True):
            assert answer[name]["text"] == oracle.greedy(rendered([(task, None)]), COUNT)
            assert answer[name]["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert found["models"]["adapter"]["exact_match"] == pytest.approx(1 / 6)
    assert found["models"]["base"]["exact_match"] == 0
    assert found["answers"][5]["adapter"]["rouge_l"] == 1
    shown = capsys.readouterr().out
    assert "Worst answers of the adapter" in shown
    worst = [line for line in shown.splitlines() if "│ line" in line]
    assert len(worst) == 6 and "Go on." in worst[-1]


def test_the_loss_is_finetunes_validation_loss(adapted: Adapted, pairs: Path, tmp_path: Path) -> None:
    """Cut at the same length, which truncates some examples."""
    length = 24
    finetune(
        FinetuneConfig(
            load=adapted.base, save=tmp_path / "adapter", data_path=(str(pairs),), valid_data_path=(str(pairs),),
            seq_length=length, train_iters=1, global_batch_size=1, micro_batch_size=1, lora_rank=2, lr=1e-2,
            tensorboard=False, **ONE,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "validation.jsonl").read_text().splitlines()]
    expected = {line["iteration"]: line for line in lines}
    result = tmp_path / "result.json"
    evaluate(
        EvaluateConfig(
            load=adapted.base, adapter=tmp_path / "adapter", data_path=(str(pairs),), answers=False, seq_length=length,
            output_file=result, **ONE,
        )
    )  # fmt: skip
    found = json.loads(result.read_text())
    assert found["num_truncated"] > 0
    assert found["num_loss_tokens"] == expected[0]["num_tokens"]
    assert found["models"]["base"]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found["models"]["adapter"]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-6)
    assert found["models"]["adapter"]["loss"] != pytest.approx(expected[0]["loss"], rel=1e-6)


def test_two_ranks_from_the_command_line(adapted: Adapted, pairs: Path) -> None:
    done = mixtral_run(
        "evaluate", "--load", str(adapted.base), "--adapter", str(adapted.adapter), "--data-path", str(pairs), "--json",
        "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--device", "cpu", "--num-answers",
        "2", "--max-new-tokens", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    losses = hf_losses(adapted.merged, pairs)
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert found["models"]["adapter"]["loss"] == pytest.approx(mean, rel=1e-5)
    assert len(found["answers"]) == 2


def test_tasks_of_lm_eval_on_two_ranks(adapted: Adapted, tmp_path: Path) -> None:
    """With a STAND-IN for the package (tests/support/standin_packages): the scores are those of HF's models."""
    pairs, whole = [("Name a color.", " blue green"), ("Count: one ", "two"), ("", "once")], "Count one two three."
    asked = ("Say hello", {"until": ["\n"], "max_gen_toks": COUNT})
    tasks = {"all": {"loglikelihood": pairs, "loglikelihood_rolling": [(whole,)], "generate_until": [asked]}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    done = mixtral_run(
        "evaluate", "--load", str(adapted.base), "--adapter", str(adapted.adapter), "--tasks", "all", "--tasks-path",
        str(tmp_path), "--json", "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--device",
        "cpu", PYTHONPATH=str(Path(standin_packages.__file__).parent),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]
    for name, oracle in (("base", adapted.hf), ("adapter", adapted.merged)):
        encode = oracle.tokenizer.encode
        scores = []
        for context, continuation in pairs:
            # With the token that begins every text of Mixtral.
            ids = encode(context + continuation)
            begin = len(encode(context.rstrip())) if context else 1
            scores.append(hf_score(oracle, ids, begin))
        assert found[name]["all"]["score,none"] == pytest.approx(sum(scores), rel=1e-4)
        text = [oracle.tokenizer.bos_token_id, *encode(whole)]
        assert found[name]["all"]["rolling,none"] == pytest.approx(hf_score(oracle, text, 1), rel=1e-4)
        answer = oracle.model.generate(torch.tensor([encode("Say hello")]), max_new_tokens=COUNT, do_sample=False,
                                       pad_token_id=0)[0, len(encode("Say hello")) :]  # fmt: skip
        expected = oracle.tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0]
        assert found[name]["all"]["characters,none"] == len(expected)
    assert "lm-eval" in done.stderr and "score,none" in done.stderr


def hf_score(oracle: Oracle, ids: list[int], begin: int) -> float:
    """The sum of the log probabilities of the tokens from `begin` on, by HF's model."""
    with torch.inference_mode():
        logits = oracle.model(torch.tensor([ids])).logits[0, begin - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(ids[begin:])[:, None]).sum())


def test_everything_that_is_missing_is_reported_at_once(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"foo": 1}\n')
    monkeypatch.setattr(check, "find_spec", lambda _: None)
    config = EvaluateConfig(
        load=adapted.base, adapter=tmp_path / "none", data_path=(str(tmp_path / "bad.jsonl"),), tasks=("hellaswag",),
        output_file=tmp_path, nproc_per_node=1, **ONE,
    )  # fmt: skip
    with pytest.raises(MixtralRunError) as caught:
        check.check_evaluation(config)
    text = str(caught.value)
    for part in ("none", "'foo'", "pip install 'lm_eval", "--output-file"):
        assert part in text, part


def test_rouge_l_of_texts_by_hand() -> None:
    """2 · LCS / (words + words), with words of every script."""
    rouge = scores.open_rouge()
    assert rouge is not None
    assert rouge("the cat sat", "The cat ran") == pytest.approx(2 * 2 / 6)
    assert rouge("Größe der Straße", "größe straße") == pytest.approx(2 * 2 / 5)
    assert rouge("слон идёт", "идёт слон") == pytest.approx(0.5)
    assert (rouge("...", "..."), rouge("...", "!"), rouge("a", "")) == (1, 0, 0)
    assert scores.exact_match(" a b\n", "a b") and not scores.exact_match("a b", "a  b")


def test_without_rouge_score_the_other_measures_are_reported(
    adapted: Adapted, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scores, "find_spec", lambda _: None)
    result = tmp_path / "result.json"
    config = EvaluateConfig(
        load=adapted.base, data_path=(str(pairs),), max_new_tokens=2, num_answers=1, output_file=result, **ONE
    )
    evaluate(config)
    found = json.loads(result.read_text())["models"]["base"]
    assert (found["rouge_l"], found["exact_match"]) == (None, 0)
    assert "pip install 'rouge-score" in capsys.readouterr().out
