"""Every verb's --help: fast, with heavy modules blocked; sections; examples that the command line accepts."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mixtral_run.cli.command import PROBLEMS, SECTIONS, VerbCommand
from mixtral_run.cli.main import VERBS, root
from mixtral_run.config import data
from mixtral_run.config.fields import Config, flag_of
from mixtral_run.config.verbs import align, evaluate, generate, plan, pretrain, serve, training, trial, weights
from mixtral_run.fleet.jobs.job_spec import JobOptions

BLOCKED = (
    "torch", "ansible_runner", "ansible", "megatron", "transformers", "numpy", "rich", "safetensors", "yaml",
    "matplotlib", "pyarrow", "datasets", "pandas",
)  # fmt: skip
PROGRAM = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import runpy
sys.argv = ["mixtral-run", *sys.argv[1:]]
try:
    runpy.run_module("mixtral_run", run_name="__main__")
finally:
    print("MODULES", len(sys.modules), file=sys.stderr)
"""
GROUPS = {"data": ("check",)}
LEAVES = [f"{verb} {below}".strip() for verb in VERBS for below in GROUPS.get(verb, ("",))]
"""All verbs, with those below another one."""
LIMIT_MODULES = 300


@pytest.mark.parametrize("verb", ["", *GROUPS, *LEAVES])
def test_help_is_fast_and_needs_nothing_heavy(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *verb.split(), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: mixtral-run" in done.stdout
    assert int(done.stderr.split("MODULES")[1]) < LIMIT_MODULES


def command(verb: str) -> VerbCommand:
    first, *below = verb.split()
    found = root.get_command(click.Context(root), first)
    for name in below:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert isinstance(found, VerbCommand)
    return found


@pytest.mark.parametrize("verb", LEAVES)
def test_examples_are_accepted_by_the_command_line(verb: str) -> None:
    examples = command(verb).examples
    assert len(examples) == 2
    for example in examples:
        words = shlex.split(example)
        depth = len(verb.split())
        assert words[:depth] == verb.split()
        parent = click.Context(root, **root.context_settings)
        context = command(verb).make_context(words[depth - 1], words[depth:], parent=parent)
        assert not context.meta[PROBLEMS]
        if "config" in context.params:
            assert not _config_problems(context)


def _config_problems(context: click.Context) -> list[str]:
    """Problems of the settings of an example: it must name what the verb needs."""
    name = f"{str(context.info_name).capitalize()}Config"
    config_class: type[Config] = next(
        vars(module)[name]
        for module in (align, pretrain, training, weights, generate, evaluate, serve, plan, trial, data)
        if name in vars(module)
    )
    fields = {item.name for item in dataclasses.fields(config_class)}
    values = {
        key: value for key, value in context.params.items() if key in fields and value is not None and value != ()
    }
    return config_class.from_mapping(values).problems()


@pytest.mark.parametrize("verb", LEAVES)
def test_help_ends_with_whole_examples(verb: str) -> None:
    shown = CliRunner().invoke(root, [*verb.split(), "--help"], env={"COLUMNS": "80"}).output
    assert shown.split("Examples:\n")[1].splitlines() == [f"  mixtral-run {each}" for each in command(verb).examples]


def test_help_of_finetune_has_its_sections_in_order() -> None:
    lines = CliRunner().invoke(root, ["finetune", "--help"]).output.splitlines()
    shown = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert shown == [
        "Model and layout", "Data", "Optimizer", "LoRA", "Memory and precision", "Processes", "Output", "On hosts",
        "Schedulers", "Slurm", "Kubernetes", "Other", "Examples",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", LEAVES)
def test_every_option_is_in_a_known_section(verb: str) -> None:
    context = click.Context(command(verb), parent=click.Context(root, **root.context_settings))
    for each in command(verb).get_params(context):
        assert getattr(each, "section", "Other") in SECTIONS


def _defaults(verb: str) -> dict[str, str]:
    """Return the help of each visible option of a verb, by its first name."""
    context = click.Context(command(verb), parent=click.Context(root, **root.context_settings))
    options = [each for each in command(verb).get_params(context) if isinstance(each, click.Option)]
    return {each.opts[0]: each.help or "" for each in options if not each.hidden and "--help" not in each.opts}


@pytest.mark.parametrize("verb", LEAVES)
def test_every_option_shows_one_default(verb: str) -> None:
    for name, text in _defaults(verb).items():
        shown = len(re.findall(r"\[default: [^]]+\]|\bDefault: |\[required\]", text))
        assert shown == 1 and "None" not in text.split("[default")[-1], (name, text)


def test_zero_switches_and_unset_values_are_shown_as_defaults() -> None:
    found = {name: text.split("  [default: ")[-1] for name, text in _defaults("finetune").items()}
    assert found["--early-stopping-patience"] == found["--lr-warmup-iters"] == "0]"
    assert (found["--report"], found["--mock-data"], found["--detach"]) == ("on]", "off]", "off]")
    assert found["--valid-data-path"] == found["--wait"] == "not set]"


def test_defaults_of_jobs_are_those_of_their_options() -> None:
    options, shown = JobOptions(), _defaults("finetune")
    for name in ("image", "shm_size", "rendezvous_port"):
        assert shown[flag_of(name)].endswith(f"  [default: {getattr(options, name)}]")
    assert all(limit in shown["--ulimit"] for limit in options.ulimits)
    own = "  [default: that of the inventory or the last bootstrap]"
    assert shown["--hf-home"].endswith(own)
    assert all(_defaults(verb)["--checkpoints-folder"].endswith(own) for verb in ("finetune", "fetch", "status"))
