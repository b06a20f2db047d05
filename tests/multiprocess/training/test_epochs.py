"""--epochs, --valid-fraction, schedules, early stopping and the token cache, as a user calls them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.verbs.test_verbs import TINY_RUN, TWO

ONE = ("--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--nproc-per-node", "1")
SPLIT = ("--valid-fraction", "0.3", "--eval-interval", "2")


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 examples, of which 6 are there twice."""
    file = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    lines = [{"instruction": f"Say {n % 34}.", "response": f"It is {n % 34}"} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def metrics_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_epochs_are_the_same_on_every_layout_and_after_a_resume(
    small_checkpoint: Path, numbers: Path, tmp_path: Path
) -> None:
    save = tmp_path / "two" / "adapter"
    words = ("--load", str(small_checkpoint), "--data-path", str(numbers), *TINY_RUN, *SPLIT, "--lr", "1e-3")
    words = (*words, "--epochs", "1.5", "--lr-scheduler", "linear", "--warmup-ratio", "0.2", "--save-interval", "4")
    done = mixtral_run("finetune", "--save", str(save), *words, *TWO)
    assert done.returncode == 0, done.stderr
    whole = metrics_of(save)
    # The hash of the content decides which of the 40 are trained on; the run reports how many.
    count = len(whole)
    summary = json.loads((save / "summary.json").read_text())
    trained = int(done.stdout.split("Data: ")[1].split(" examples")[0])
    held_back = int(done.stdout.split("Validation set: ")[1].split(" examples")[0])
    assert trained + held_back == 40 and 4 <= held_back <= 24
    assert count == -(-trained * 3 // 8) > 4
    assert f"{count} iterations of 4 are {4 * count / trained:.1f} epochs" in done.stdout
    assert (summary["train_iters"], summary["last_iteration"], summary["epochs"]) == (count, count, 1.5)
    assert not summary["stopped_early"]
    assert summary["best_iteration"] == min(metrics_of(save, "validation.jsonl"), key=lambda e: e["loss"])["iteration"]
    warmup = -(-count // 5)
    rates = [each["learning_rate"] for each in whole]
    assert rates[warmup - 1 : warmup + 1] == [1e-3, 1e-3] and rates[0] == pytest.approx(1e-3 / warmup)
    assert rates[-1] == pytest.approx(1e-5) and rates[-2] - rates[-1] == pytest.approx(rates[-3] - rates[-2])
    manifest = json.loads((save / f"iter_{count:07d}" / "mixtral_run.json").read_text())
    assert manifest["training"]["train_iters"] == count and manifest["training"]["epochs"] == 1.5
    assert manifest["validation"]["iteration"] == count

    # Continue from iteration 4 in another layout: the same samples, rates and losses, from the same token cache.
    other = tmp_path / "one" / "adapter"
    shutil.copytree(save, other)
    for folder in other.glob("iter_*"):
        if folder.name != "iter_0000004":
            shutil.rmtree(folder)
    (other / "latest_checkpointed_iteration.txt").write_text("4\n")
    cache = next(
        each for each in (tmp_path / "two" / ".mixtral-run-tokens").iterdir() if (each / "cache.json").exists()
    )
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*.bin")}
    words = (*words, "--data-cache", str(cache.parent))
    more = mixtral_run("finetune", "--save", str(other), *words, *ONE, "--resume")
    assert more.returncode == 0, more.stderr
    assert "Samples may repeat" not in more.stdout and "Token cache" not in more.stdout
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.bin")} == made and len(made) == 7
    # The lines of the iterations that are repeated were removed.
    resumed = metrics_of(other)[4:]
    assert [each["iteration"] for each in resumed] == list(range(5, count + 1))
    for one, again in zip(whole[4:], resumed, strict=True):
        assert again["learning_rate"] == one["learning_rate"]
        assert again["loss"] == pytest.approx(one["loss"], rel=1e-5)
    losses = [{e["iteration"]: e["loss"] for e in metrics_of(folder, "validation.jsonl")} for folder in (save, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert json.loads((other / "summary.json").read_text())["best_iteration"] == summary["best_iteration"]


def test_a_run_that_does_not_get_better_stops(small_checkpoint: Path, numbers: Path, tmp_path: Path) -> None:
    """With a rate too small to change a float, the validation loss stays what it was."""
    save = tmp_path / "adapter"
    words = ("finetune", "--save", str(save), "--load", str(small_checkpoint), "--data-path", str(numbers), *TINY_RUN)
    words = (*words, *TWO, *SPLIT, "--lr", "1e-30", "--lr-scheduler", "constant", "--train-iters", "50")
    done = mixtral_run(*words, "--early-stopping-patience", "2")
    assert done.returncode == 0, done.stderr
    assert "Stopped early at iteration 4 of 50: 2 evaluations without a validation loss below" in done.stdout
    assert "that of iteration 0" in done.stdout and "fine-tuning complete" in done.stdout
    summary = json.loads((save / "summary.json").read_text())
    assert (summary["stopped_early"], summary["last_iteration"], summary["best_iteration"]) == (True, 4, 0)
    assert [each["iteration"] for each in metrics_of(save, "validation.jsonl")] == [0, 2, 4]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    # The same command again has nothing to do, and says how it could go on. A damaged cache is no hindrance.
    (cache,) = (file.parent for file in (tmp_path / ".mixtral-run-tokens").glob("*/cache.json"))
    with (cache / "tokens.bin").open("r+b") as file:
        file.write(os.urandom(8))
    again = mixtral_run(*words, "--early-stopping-patience", "2", "--resume")
    assert again.returncode == 0
    assert "The run is complete: it stopped early" in again.stdout and "--early-stopping-patience" in again.stdout
    more = mixtral_run(*words[:-1], "6", "--early-stopping-patience", "4", "--resume")
    assert more.returncode == 0, more.stderr
    assert f"The token cache {cache} is damaged and is made again (tokens.bin: expected CRC-32" in more.stdout
    assert [each["iteration"] for each in metrics_of(save, "validation.jsonl")] == [0, 2, 4, 6]
