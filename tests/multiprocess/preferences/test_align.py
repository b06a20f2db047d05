"""`align` as a user calls it: a run that was cut off, what takes its adapter, and the same figures in every layout."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from tests.multiprocess.conftest import mixtral_run, torchrun

WORKER = Path(__file__).with_name("preferences_worker.py")
LATEST = "latest_checkpointed_iteration.txt"
DOCUMENT = Path(__file__).parents[3] / "docs/concepts/preferences.md"
COMMANDS = [shlex.split(line)[1:] for line in DOCUMENT.read_text().splitlines() if line.startswith("    mixtral-run ")]
CPU = ("--device", "cpu", "--nproc-per-node")
SETTINGS = (
    *CPU, "2", "--tensor-model-parallel-size", "2",
    "--expert-model-parallel-size", "2", "--seq-length", "48", "--global-batch-size", "4", "--lora-rank", "4",
    "--lora-dropout", "0.3", "--lr", "1e-2", "--train-iters", "4", "--save-interval", "2", "--eval-interval", "2",
    "--report-tokens", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"Question {n}?", "chosen": f"Answer {n * n}.", "rejected": f"No, {n}"} for n in range(20)]
    singles = [
        {"prompt": each["prompt"], "completion": each["chosen"], "label": n % 3 > 0} for n, each in enumerate(pairs)
    ]
    for name, records in (("pairs", pairs), ("labels", singles)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensors(folder: Path) -> Iterator[tuple[str, bytes]]:
    with Reader(folder) as reader:
        for key in sorted(reader.tensors):
            for item in sorted(reader.chunks(key), key=lambda item: item.offset or ()):
                yield f"{key} {item.offset}", b"".join(bytes(block) for block in reader.payload(item, 2**20))


def test_a_run_that_was_cut_off_ends_with_the_same_bits(small_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    names = {
        "mixtral": small_checkpoint, "pairs.jsonl": data / "pairs.jsonl", "aligned": whole,
        "peft-adapter": tmp_path / "peft",
    }  # fmt: skip
    check, words, *after = [[str(names.get(word, word)) for word in command] for command in COMMANDS]
    done = mixtral_run(*check)
    assert done.returncode == 0 and "shapes: pairs 20" in done.stdout, done.stderr
    done = mixtral_run(*words, *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics, validation = lines(whole / "metrics.jsonl"), lines(whole / "validation.jsonl")
    assert validation[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert validation[-1]["loss"] < 0.6 and validation[-1]["rewards/accuracies"] > 0.5
    assert "iteration 4/4 | consumed samples: 16" in done.stdout and "dpo loss: " in done.stdout
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["settings"]["method"] == "dpo"
    assert summary["preferences"]["training"]["rewards/margins"] == metrics[-1]["rewards/margins"]
    page = (whole / "report.html").read_text()
    for text in ("Rewards", "Share of pairs in the right order", "mixtral-run align", ", rejected<"):
        assert text in page, text

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "iter_0000004")
    (cut / LATEST).write_text("2\n")
    words[words.index(str(whole))] = str(cut)
    again = mixtral_run(*words, *SETTINGS, "--resume", "auto")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "iteration 3/4 |" in again.stdout and "iteration 2/4 |" not in again.stdout
    assert again.stdout.count("Reference: the log-probabilities of") == 2
    assert dict(tensors(whole / "iter_0000004")) == dict(tensors(cut / "iter_0000004"))
    assert dict(tensors(whole / "iter_0000002")) != dict(tensors(cut / "iter_0000004"))
    names = [name for name in metrics[0] if "/" in name or name in ("loss", "grad_norm")]
    assert [[line[name] for name in names] for line in lines(cut / "metrics.jsonl")] == [
        [line[name] for name in names] for line in metrics
    ]

    export, generate = after
    assert mixtral_run(*export).returncode == 0 and (tmp_path / "peft/adapter_model.safetensors").is_file()
    answer = mixtral_run(*generate, *CPU, "1", "--max-new-tokens", "2")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_figures_are_the_same_in_every_layout(small_checkpoint: Path, data: Path, tmp_path: Path, method: str) -> None:
    found = []
    for count, layout in ((1, "1x1"), (2, "2x2"), (2, "1x2")):
        out = tmp_path / f"{layout}.json"
        if layout == "1x2" and method == "orpo":
            continue
        torchrun(count, WORKER, str(small_checkpoint), str(data), str(out), method, layout)
        found.append(lines_of(out))
    alone, *others = found
    assert len(alone) == 4 and alone[0]["loss"] != alone[2]["loss"]
    for other in others:
        for number, (expected, line) in enumerate(zip(alone, other, strict=True)):
            if number == 0:
                # Before the first step both answers of a pair have a reward of 0, up to rounding.
                line["rewards/accuracies"] = expected["rewards/accuracies"] = 0.0
            assert line == pytest.approx(expected, rel=1e-4, abs=2e-5)


def lines_of(file: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(file.read_text())
    return found
