"""lm-eval on the loaded model: log probabilities are HF's. Runs where lm_eval is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.evaluate import EvaluateConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.evaluation.evaluate import evaluate
from tests.multiprocess.talking.conftest import Adapted, Oracle

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CHOICES = [" one", " two words", " drei"]
QUESTIONS = [f"What is {number}?" for number in range(12)]


def likeliest(oracle: Oracle, question: str) -> int:
    """The choice with the highest log probability, by HF's model."""
    context = oracle.tokenizer(question, add_special_tokens=False).input_ids
    scores = []
    for choice in CHOICES:
        whole = oracle.tokenizer(question + choice, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = oracle.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        at = range(len(context), len(whole))
        scores.append(sum(float(logits[place - 1, whole[place]]) for place in at))
    return max(range(len(CHOICES)), key=scores.__getitem__)


def test_tasks_on_base_and_adapter(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    file = tmp_path / "qa.jsonl"
    gold = [likeliest(adapted.merged, question) for question in QUESTIONS]
    lines = [{"question": q, "choices": CHOICES, "gold": g} for q, g in zip(QUESTIONS, gold, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.replace("FILE", str(file)))
    settings: dict[str, Any] = {
        "load": adapted.base, "adapter": adapted.adapter, "tasks_path": tmp_path / "tasks", "device": "cpu",
        "tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "output_file": tmp_path / "result.json",
    }  # fmt: skip
    evaluate(EvaluateConfig(tasks=("mine",), batch_size=5, **settings))
    found = json.loads((tmp_path / "result.json").read_text())["tasks"]
    assert found["adapter"]["mine"]["acc,none"] == 1
    right = [likeliest(adapted.hf, question) == answer for question, answer in zip(QUESTIONS, gold, strict=True)]
    assert found["base"]["mine"]["acc,none"] == pytest.approx(sum(right) / len(right))
    with pytest.raises(ConfigError, match="no such task"):
        evaluate(EvaluateConfig(tasks=("nonsense",), **settings))
