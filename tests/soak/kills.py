"""Kill conversions and trainings at random times, run them again, and compare the result with an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import tokenizer_texts
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

ARCHITECTURE = MixtralArchitecture(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, kv_channels=16,
    num_experts=8, moe_router_topk=2, vocab_size=512, max_position_embeddings=256, rotary_base=1e6,
    layernorm_epsilon=1e-5,
)  # fmt: skip
TRAINING = (
    "--mock-data", "--seq-length", "32", "--global-batch-size", "2", "--train-iters", "24",
    # A save in the background is pending almost always: an iteration is shorter.
    "--save-interval", "2", "--keep-last", "2",
    "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--nproc-per-node", "1",
    "--lora-dropout", "0.1",
)  # fmt: skip
MOST_KILLS_IN_A_TRIAL = 4
LAST_WAITED_FOR = 12
"""Iteration of the last checkpoint that a kill waits for: twelve iterations are left then."""
SHARE_AFTER_CHECKPOINT = 0.02
MOST_AFTER_KILL = 4
"""Iterations that may come between the look at the checkpoints and the death of all processes."""
SECONDS_TO_END = 10
"""Time in which the processes of a killed job have to be gone."""


Start = Callable[[Sequence[str]], "subprocess.Popen[str]"]
"""Start `mixtral-run` with arguments. The process leads a process group; its stdout has all that it prints."""


def new_interpreter(words: Sequence[str]) -> subprocess.Popen[str]:
    """Start the command as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "mixtral_run", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@dataclass
class Kills:
    """Result of the trials of one verb. in_saves: kills that cut off a checkpoint. resumes: starts with --resume."""

    name: str
    trials: int = 0
    kills: int = 0
    resumes: int = 0
    in_saves: int = 0
    problems: tuple[str, ...] = ()


def kill_conversions(
    folder: Path, count: int, deadline: float, number: int = 0, start: Start = new_interpreter
) -> Kills:
    """Kill `convert` at least `count` times; the files must be those of an undisturbed conversion."""
    model, whole = folder / "model", folder / "whole"
    write_random_mixtral(
        model, architecture=ARCHITECTURE, dtype="float32", seed=7, texts=tokenizer_texts(), num_shards=2,
        initializer_range=0.1,
    )  # fmt: skip
    words = ["convert", "--hf-model-path", str(model), "--output-path"]
    seconds = _run(start, [*words, str(whole)])
    found, draw = Kills("convert"), random.Random(number)
    while found.kills < count and time.monotonic() < deadline:
        output = folder / "output"

        def more() -> list[str] | None:
            return None if output.exists() else []  # noqa: B023 - called within this turn

        found.kills += _until_done(start, [*words, str(output)], more, seconds, draw, found)
        if _files(output) != _files(whole):
            found.problems += (f"trial {found.trials}: the files differ",)
        shutil.rmtree(output)
        left = sorted(entry.name for entry in folder.iterdir() if entry not in (model, whole))
        if left:
            found.problems += (f"trial {found.trials}: left over: {', '.join(left)}",)
            for name in left:
                shutil.rmtree(folder / name, ignore_errors=True)
    return found


def kill_trainings(folder: Path, count: int, deadline: float, number: int = 0, start: Start = new_interpreter) -> Kills:
    """Kill `finetune` at least `count` times and resume it; the result must be that of an undisturbed run."""
    model, whole, save = folder / "model", folder / "whole", folder / "save"
    if not model.exists():
        raise ValueError("kill_conversions writes the model")
    words = ["finetune", "--load", str(model), *TRAINING, "--save"]
    shutil.rmtree(whole, ignore_errors=True)
    seconds = _run(start, [*words, str(whole)])
    expected, metrics = _adapter(whole), _losses(whole)
    found, draw = Kills("finetune"), random.Random(number)
    while (found.kills < count or not found.resumes) and time.monotonic() < deadline:

        def more() -> list[str] | None:
            if any(save.glob("iter_*")):
                return ["--resume"] if _adapter(save)[0] < expected[0] else None
            shutil.rmtree(save, ignore_errors=True)
            return []

        found.kills += _until_done(start, [*words, str(save)], more, seconds, draw, found, save)
        if _adapter(save) != expected:
            found.problems += (f"trial {found.trials}: the adapter differs",)
        if _losses(save) != metrics:
            found.problems += (f"trial {found.trials}: metrics.jsonl differs",)
        shutil.rmtree(save)
    return found


def _until_done(
    start: Start,
    words: Sequence[str],
    more: Callable[[], list[str] | None],
    seconds: float,
    draw: random.Random,
    found: Kills,
    save: Path | None = None,
) -> int:
    """Run the command until it ends by itself, killing it at random times before; return the number of kills.

    more: returns further arguments for the next start, or None if a killed process had finished its work. save: the
    folder of a training: a kill of its launcher alone comes after a checkpoint, however long the start takes.
    """
    found.trials += 1
    kills = 0
    while True:
        arguments = more()
        if arguments is None:
            return kills
        process = start([*words, *arguments])
        found.resumes += "--resume" in arguments
        limit = draw.uniform(0.05, 1.0) * seconds if kills < MOST_KILLS_IN_A_TRIAL else 20 * seconds
        if save is not None and kills % 2:
            _wait_for_checkpoint(process, save, draw.randint(1, LAST_WAITED_FOR))
            limit *= SHARE_AFTER_CHECKPOINT
        try:
            output = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            if kills == MOST_KILLS_IN_A_TRIAL:
                raise
            # Alternately the launcher alone, which takes its processes along, and all at once, as a power cut does.
            newest = _newest(save)
            (os.kill if kills % 2 else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            found.in_saves += save is not None and any(save.glob(".iter_*.partial"))
            if not _is_gone(process.pid):
                found.problems += (f"trial {found.trials}: processes live {SECONDS_TO_END} s after their launcher",)
                os.killpg(process.pid, signal.SIGKILL)
            if _newest(save) > newest + MOST_AFTER_KILL:
                found.problems += (f"trial {found.trials}: the training went on after its launcher was killed",)
            # Processes that live on hold the other end of its output.
            process.communicate()
            continue
        if process.returncode:
            last = output.strip()[-500:]
            found.problems += (f"trial {found.trials}: exit code {process.returncode} after {kills} kills: {last}",)
        return kills


def _wait_for_checkpoint(process: subprocess.Popen[str], save: Path, iteration: int) -> None:
    """Wait until a checkpoint of this iteration or a later one is there, a new one, or the process has ended."""
    wanted = max(iteration, _newest(save) + 1)
    while process.poll() is None and _newest(save) < wanted:
        time.sleep(0.005)


def _newest(save: Path | None) -> int:
    """Return the iteration of the newest checkpoint; 0 without one."""
    names = [] if save is None else [entry.name for entry in save.glob("iter_*")]
    return int(max(names).removeprefix("iter_")) if names else 0


def _run(start: Start, words: Sequence[str]) -> float:
    """Run a command undisturbed and return its seconds."""
    began = time.monotonic()
    process = start(words)
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(output)
    return time.monotonic() - began


def _is_gone(group: int) -> bool:
    end = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def _files(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _adapter(save: Path) -> tuple[str, dict[str, str]]:
    """Return the name of the newest iteration and the hash of every stored part of its tensors."""
    newest = sorted(save.glob("iter_*"))[-1]
    hashes = {}
    with Reader(newest) as reader:
        for key in sorted(reader.tensors):
            for item in reader.chunks(key):
                content = b"".join(bytes(block) for block in reader.payload(item, 2**20))
                hashes[f"{key} {item.offset}"] = hashlib.sha256(content).hexdigest()
    return newest.name, hashes


def _losses(save: Path) -> list[tuple[int, float]]:
    """Return iteration and loss of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["iteration"], line["loss"]) for line in lines]
