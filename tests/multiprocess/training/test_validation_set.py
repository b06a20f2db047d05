"""`finetune --valid-data-path` as a user calls it: what it prints, what it leaves, and that it changes nothing."""

import hashlib
import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from matplotlib.image import imread

from mixtral_run.cli.main import root
from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.verbs.test_verbs import TINY_RUN, TWO, pairs  # noqa: F401
from tests.support.html_page import Page, is_shown, value_at

HOSTILE = "<script>x</script>"


def test_the_validation_set_is_evaluated(
    small_checkpoint: Path,
    pairs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before the first iteration, at intervals and after the last; it is not trained on."""
    validation_file, save = tmp_path / "validation.jsonl", tmp_path / "adapter"
    lines = [{"instruction": f"Say {word}.", "response": word} for word in ("five", HOSTILE, "seven")]
    validation_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--load", str(small_checkpoint), "--data-path", str(pairs), *TWO, *TINY_RUN, "--lr", "1e-3")
    evaluation = ("--valid-data-path", str(validation_file), "--eval-interval", "2")
    done = mixtral_run("finetune", "--save", str(save), *words, *evaluation, "--train-iters", "5")
    assert done.returncode == 0, done.stderr
    assert "Validation set: 3 examples" in done.stdout
    shown = re.findall(r"validation (\d)/5 \| lm loss: (\S+) \| perplexity: ", done.stdout)
    found = [json.loads(line) for line in (save / "validation.jsonl").read_text().splitlines()]
    assert [int(iteration) for iteration, _ in shown] == [each["iteration"] for each in found] == [0, 2, 4, 5]
    assert [float(loss) for _, loss in shown] == pytest.approx([each["loss"] for each in found], rel=1e-6)
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(each["perplexity"] == pytest.approx(math.exp(each["loss"])) for each in found)
    record = check_record(save, pairs)
    check_report(save, lines)
    check_router(save, record)
    summary = json.loads((save / "summary.json").read_text())["validation"]
    lowest = min(found, key=lambda each: each["loss"])
    assert summary == {
        "first_iteration": 0,
        "first_loss": found[0]["loss"],
        "last_loss": found[-1]["loss"],
        "lowest_loss": lowest["loss"],
        "lowest_iteration": lowest["iteration"],
    }
    assert f"validation loss {found[0]['loss']:.4f} before, {found[-1]['loss']:.4f} at the end" in done.stdout
    # The adapter is that of a run without a validation set, bit by bit.
    alone = mixtral_run("finetune", "--save", str(tmp_path / "alone"), *words, "--train-iters", "5")
    assert alone.returncode == 0, alone.stderr
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (save, tmp_path / "alone")
    ]
    assert losses[0] == losses[1]
    more = mixtral_run("finetune", "--save", str(save), *words, *evaluation, "--train-iters", "6", "--resume")
    assert more.returncode == 0, more.stderr
    again = json.loads((save / "summary.json").read_text())
    assert (again["id"], again["started"]) == (record["id"], record["started"])
    assert again["settings"]["train_iters"] == 6 and again["losses"]["first_loss"] == losses[0][0]
    resumed = [json.loads(line) for line in (save / "validation.jsonl").read_text().splitlines()]
    # The evaluation of the iteration from which it continues is repeated, and its line replaced.
    assert [each["iteration"] for each in resumed] == [0, 2, 4, 5, 6]
    # The saved adapter is the one that was evaluated.
    assert resumed[3]["loss"] == pytest.approx(found[3]["loss"], rel=1e-6)


def check_record(save: Path, data: Path) -> dict[str, Any]:
    """Compare run.json, summary.json and loss.png with the other files of the run. Return run.json."""
    record, summary = (json.loads((save / name).read_text()) for name in ("run.json", "summary.json"))
    assert {name: summary[name] for name in record} == record
    manifest = json.loads((save / "iter_0000005" / "mixtral_run.json").read_text())
    assert record["settings"] == manifest["training"]
    assert record["base"]["fingerprint"] == manifest["base"]["fingerprint"]
    assert record["name"] == save.name
    assert record["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert record["data"]["training"].startswith("4 examples") and record["data"]["validation"].startswith("3 examples")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert record["kit"]["commit"] == (head.stdout.strip() or None)
    losses = [json.loads(line)["loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert summary["losses"] == {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "lowest_loss": min(losses),
        "lowest_iteration": losses.index(min(losses)) + 1,
    }
    assert imread(save / "loss.png").std() > 0.01
    return record


def check_report(save: Path, examples: list[dict[str, str]]) -> None:
    """Compare report.html with the files of the run and with the examples of its validation set."""
    page = Page((save / "report.html").read_text(encoding="utf-8"))
    page.check_offline_and_inert()
    summary = json.loads((save / "summary.json").read_text())
    summary["peak_memory_gib"] = max(summary["peak_memory_gib"])
    summary["router"]["choices"] = sum(summary["router"]["tokens"][0])
    shown = page.values()
    assert {f"settings.{name}" for name in summary["settings"]} < {path for path, _ in shown}
    for path, text in shown:
        assert is_shown(text, value_at(summary, path)), (path, text)
    curves = page.curves()
    for name, file, key in (
        ("loss", "metrics.jsonl", "loss"),
        ("validation_loss", "validation.jsonl", "loss"),
        ("learning_rate", "metrics.jsonl", "learning_rate"),
        ("tokens_per_second", "metrics.jsonl", "tokens_per_second"),
        ("peak_memory_gib", "metrics.jsonl", "peak_memory_gib"),
        ("grad_norm", "metrics.jsonl", "grad_norm"),
    ):
        lines = [json.loads(line) for line in (save / file).read_text().splitlines()]
        assert [point[0] for point in curves[name]] == pytest.approx([each["iteration"] for each in lines], abs=0.01)
        assert [point[1] for point in curves[name]] == pytest.approx([each[key] for each in lines], rel=1e-3)
    generated = [json.loads(line) for line in (save / "generations.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in generated] == [0, 5]
    texts = [each.text for each in page.all("pre")]
    for line in generated:
        for example, answer in zip(examples[:2], line["answers"], strict=True):
            assert example["instruction"] in answer["prompt"] and example["response"].startswith(
                answer["expected"].strip()
            )
            assert 0 < answer["num_tokens"] <= 32
            assert {as_shown(answer[name]) for name in ("prompt", "expected", "text")} <= set(texts)
    assert {each.text.strip() for each in page.all("mark")} >= {"one</s>", "two</s>"}
    about, layout, *_ = [each.text for each in page.all("p")]
    kit = f"mixtral-run {summary['kit']['version']}, commit {summary['kit']['commit'][:12]}"
    assert about.startswith(f"Complete: 5 iterations · started {summary['started']} · {kit}")
    assert layout == f"2 × cpu, TP2/EP2, base in fp32, recompute {summary['recompute']}"
    assert {f"Lowest validation loss, at iteration {summary['validation']['lowest_iteration']}"} <= {
        each.text for each in page.all("span")
    }
    check_commands([words_of(text) for text in texts if text.startswith("mixtral-run ")], save, summary)


def words_of(text: str) -> list[list[str]]:
    """Return the words of each command of a text."""
    return [shlex.split(line) for line in text.replace("\\\n", "").splitlines()]


def check_commands(found: list[list[list[str]]], save: Path, summary: dict[str, Any]) -> None:
    """Compare the report's commands with the run. Every flag must be one of its verb."""
    [[resume], [export], [serve, prove], [chat, generate]] = found
    verbs = [words[1] for words in (resume, export, serve, prove, chat, generate)]
    assert verbs == ["finetune", "export", "serve", "serve", "chat", "generate"]
    for words in (resume, export, serve, prove, chat, generate):
        command = root.get_command(click.Context(root), words[1])
        flags = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= flags, words
    assert resume[-1] == "--resume" and resume[resume.index("--save") + 1] == str(save)
    source = json.loads((Path(summary["base"]["path"]) / "mixtral_run.json").read_text())["source"]
    assert serve[serve.index("--load") + 1] == summary["base"]["hf_model"] == source
    assert serve[serve.index("--adapter") + 1] == export[export.index("--output-path") + 1]
    for words in (export, prove, chat, generate):
        assert words[words.index("--adapter") + 1].startswith(str(save))


def as_shown(text: str) -> str:
    """Return a text with its control characters by their codes: a random model generates any."""
    return "".join(each if each.isprintable() or each in "\n\t" else f"\\u{ord(each):04x}" for each in text)


def check_router(save: Path, record: dict[str, Any]) -> None:
    """Compare router.jsonl with the number of tokens of the data, and summary.json with router.jsonl."""
    lines = [json.loads(line) for line in (save / "router.jsonl").read_text().splitlines()]
    by_kind = {of: [line for line in lines if line["of"] == of] for of in ("training", "validation")}
    assert [line["iteration"] for line in by_kind["training"]] == [1, 2, 3, 4, 5]
    assert [line["iteration"] for line in by_kind["validation"]] == [0, 2, 4, 5]
    for of, found in by_kind.items():
        # Each iteration has all 4 examples. n tokens are n - 1 positions, each with 2 experts; padding does not count.
        examples, tokens = (
            int(each) for each in re.match(r"(\d+) examples, (\d+) tokens", record["data"][of]).groups()
        )
        for line in found:
            assert {sum(row) for row in line["tokens"]} == {2 * (tokens - examples)} and len(line["tokens"]) == 2
            first, now = ([[each / sum(row) for each in row] for row in one["tokens"]] for one in (found[0], line))
            moved = [sum(abs(a - b) for a, b in zip(*rows, strict=True)) / 2 for rows in zip(first, now, strict=True)]
            assert line["drift"] == pytest.approx(moved, abs=1e-6)
    summary = json.loads((save / "summary.json").read_text())["router"]
    training = [line["tokens"] for line in by_kind["training"]]
    assert summary["tokens"] == [
        [sum(each) for each in zip(*rows, strict=True)] for rows in zip(*training, strict=True)
    ]
    assert (summary["drift_of"], summary["drift"]) == ("validation", by_kind["validation"][-1]["drift"])
    assert (summary["dropped_tokens"], summary["retaken_steps"]) == (0, 0)
