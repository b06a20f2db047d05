"""The guide's commands, word by word as the documentation has them: torchrun with 8 processes, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from mixtral_run.cli.command import PROBLEMS
from mixtral_run.cli.config_template import CONFIGS
from mixtral_run.cli.main import root
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import tokenizer_texts
from tests.multiprocess.conftest import SMALL, environment_of
from tests.support.processes.commands import forked_python

GUIDE = Path(__file__).parents[3] / "docs" / "from_the_guide.md"
COMMANDS = [line.strip() for line in GUIDE.read_text().splitlines() if line.startswith("    torchrun ")]


def run(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = environment_of(PATH=path, CUDA_VISIBLE_DEVICES="", **variables)
    words = shlex.split(command)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_guides_commands_run_as_they_stand(tmp_path: Path) -> None:
    write_random_mixtral(
        tmp_path / "Mixtral-8x7B-v0.1",
        architecture=dataclasses.replace(SMALL, max_position_embeddings=512),
        dtype="float32",
        seed=7,
        texts=tokenizer_texts(),
        num_shards=2,
        initializer_range=0.1,
    )
    pairs = [{"instruction": f"Say {word}.", "response": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    convert, _, finetune, _ = COMMANDS
    # torchrun starts its eight processes with this program; those of the wrong flag below are new interpreters.
    (tmp_path / "bin").mkdir()
    forked = {"PYTHON_EXEC": forked_python(tmp_path / "bin")}
    done = run(convert, tmp_path, **forked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓ Conversion complete") == 1
    assert (tmp_path / "mixtral" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
    done = run(finetune, tmp_path, **forked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓ LoRA fine-tuning complete: 10 iterations") == 1
    assert "onto 8 × cpu as TP2/EP4, data-parallel 4" in done.stdout
    losses = [json.loads(line)["loss"] for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0]
    # A mistake: one error for all processes, the kit's exit code, and nothing of torchrun's behind it.
    few = finetune.replace("--nproc_per_node 8", "--nproc_per_node 2")
    done = run(few.replace("--lora_rank 16", "--lora_rnk 16"), tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "torch/distributed/run.py" not in line]
    assert lines == [
        "✗ Some settings are wrong.",
        "  - --lora-rnk: there is no such flag; did you mean --lora-rank, --lora-rank-experts or --lora-scaling?",
        "  where:    command line",
        "  next:     mixtral-run finetune --help",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_is_understood(command: str) -> None:
    words = shlex.split(command)
    assert words[:5] == ["torchrun", "--nproc_per_node", "8", "-m", "mixtral_run"]
    verb = root.get_command(click.Context(root), words[5])
    assert verb is not None
    context = verb.make_context(words[5], words[6:], parent=click.Context(root, **root.context_settings))
    assert context.meta[PROBLEMS] == []
    given = {name: value for name, value in context.params.items() if value not in (None, (), False)}
    given = {name: value for name, value in given.items() if name in {each.name for each in verb.params}}
    config = CONFIGS[words[5]].from_mapping(given).check()
    # Every flag of the guide has arrived, under the kit's name.
    flags = {word[2:] for word in words[6:] if word.startswith("--")}
    renamed = {"output_path": "save"} if words[5] == "finetune" else {}
    assert flags and all(getattr(config, renamed.get(flag, flag)) for flag in flags)


def test_readme_and_document_have_the_same_steps() -> None:
    readme = (GUIDE.parents[1] / "README.md").read_text().splitlines()
    rows = [line for line in readme[readme.index("| manual step | command of the kit |") :] if line.startswith("|")]
    steps = GUIDE.read_text().split("## Steps")[1].split("## ")[0].split("\n")
    shown = [line for line in steps if line.startswith("|")]
    assert len(shown) > 10 and rows[: len(shown)] == shown
