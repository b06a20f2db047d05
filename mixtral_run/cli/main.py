"""Root of the command line. It imports a verb only if it is called, and prints every error and sets the exit code."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import traceback
from typing import Any, NoReturn

import click

from mixtral_run import __version__
from mixtral_run.cli.command import CONFIG_SUFFIXES, close_to, one_of, or_words
from mixtral_run.cli.json_errors import errors_as_json
from mixtral_run.config.names.foreign_verbs import FOREIGN_VERBS
from mixtral_run.errors import ConfigError, MixtralRunError, from_os_error
from mixtral_run.launch.process_exit import INTERRUPTED, INTERRUPTED_WORD, exit_with
from mixtral_run.terminal.report import DEBUG_VARIABLE, debugging, quiet_libraries

VERBS: dict[str, str] = {
    "bootstrap": "Set up bare hosts over SSH: Docker, NVIDIA toolkit, swap, HF cache, image, acceptance test.",
    "teardown": "Take back from hosts what bootstrap added; checkpoints and models stay.",
    "status": "Show the state of every host and where hosts differ: table, JSON or HTML page.",
    "cordon": "Let no new job start on hosts; who, when and why is recorded there.",
    "uncordon": "Let hosts take jobs again.",
    "explain": "Explain a failure and what to do.",
    "up": "Go from a bare host to an adapter here: bootstrap, convert, finetune, export, fetch.",
    "jobs": "List the jobs that --on started.",
    "logs": "Show the output of a job; -f follows it.",
    "stop": "Ask a job to save and stop.",
    "fetch": "Copy the output of a job to this machine.",
    "shell": "Open a shell in the container of a job on a host.",
    "convert": "Convert HF weights to a Megatron torch_dist checkpoint, streamed.",
    "verify": "Describe a checkpoint; compare it with its source bit by bit.",
    "plan": "Print the memory per GPU of each layout of a LoRA run; the best that fits comes first.",
    "data": "Check data before a training run: shapes, lengths, what is learned, what is wrong.",
    "finetune": "Fine-tune a base model with LoRA, one adapter per expert.",
    "align": "Fine-tune a base model with LoRA on preferences: DPO, KTO, ORPO or SimPO.",
    "runs": "List the runs of finetune and align; compare two; find the best.",
    "pretrain": "Train all weights: full fine-tuning with --save, else a few iterations to prove that a layout trains.",
    "generate": "Continue prompts with a base model, with or without an adapter.",
    "chat": "Talk with a base model, with or without an adapter, in a terminal.",
    "evaluate": "Measure a base model, and an adapter next to it, on a test set or with lm-eval.",
    "serve": "Serve a model on a host with OpenAI's API, or prove that a server answers as generate does.",
    "export": "Write an adapter as a PEFT directory, or merged into an HF model.",
    "smoke": "Convert, train, fine-tune and generate on this machine; pass or fail.",
    "config": "Write a config file with all settings of a verb, commented.",
    "rehearse": "Run the whole job at small size and prove every step.",
}
"""Line of each verb in `mixtral-run --help`. The verb is a function of that name in `commands/VERB.py`, or in the
module that MODULES names."""

TRAIN_MODULES = (
    "huggingface_hub", "isal", "matplotlib", "megatron", "numpy", "peft", "psutil", "safetensors", "tensorboard",
    "tokenizers", "torch", "transformers",
)  # fmt: skip
"""Modules of the extra `train`. An operator's laptop does without them."""

MODULES = {**dict.fromkeys(("jobs", "logs", "stop", "fetch"), "fleet_jobs"), "uncordon": "cordon"}


class LazyGroup(click.Group):
    """Group of the verbs. It imports the module of a verb only if the verb is called, so that --help is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"mixtral_run.cli.commands.{MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and _with_dashes(args[0]) not in VERBS:
            raise _no_verb(args)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_as_json(ctx):
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _no_verb(words: list[str]) -> ConfigError:
    """Return the error for a command line whose first word is no verb. It lists the verbs if it can propose none."""
    word = _with_dashes(words[0]).lower()
    command = FOREIGN_VERBS.get(word)
    meant = or_words(close_to(word, VERBS))
    if command is not None:
        files = [each for each in words[1:] if each.lower().endswith(CONFIG_SUFFIXES)]
        is_training = command.startswith(("mixtral-run finetune --load", "mixtral-run pretrain"))
        verb = " ".join(command.split()[:2])
        next_command = f"{verb} --config {shlex.quote(files[0])}" if is_training and files else command
    else:
        next_command = f"mixtral-run {meant}" if meant else "mixtral-run --help"
    return ConfigError(
        f"There is no verb {words[0]!r}.",
        expected=None if command or meant else one_of(VERBS),
        next_command=next_command,
    )


def _with_dashes(token: str) -> str:
    """Return the token with dashes, so that `--hf_model_path` is the same flag as `--hf-model-path`."""
    return token.replace("_", "-")


@click.group(
    cls=LazyGroup,
    subcommand_metavar="VERB [FLAGS]...",
    context_settings={
        "token_normalize_func": _with_dashes,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="mixtral-run")
@click.option("--debug", is_flag=True, help="Show the traceback of an error and the warnings of libraries.")
def root(debug: bool) -> None:
    """Convert and LoRA-fine-tune Mixtral 8x7B with Megatron.

    A verb that needs several processes starts them itself. Under torchrun it uses the processes of torchrun.
    """
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    quiet_libraries()


def main() -> NoReturn:
    """Run the command line. Exit codes: 0, 2 settings, 3 host, 4 check, 5 weights, 6 training, 130 interrupted."""
    try:
        root.main(standalone_mode=False, prog_name="mixtral-run")
    except (click.exceptions.Abort, KeyboardInterrupt):
        exit_with(INTERRUPTED_WORD, INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except MixtralRunError as error:
        _fail(error, error)
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        _fail(known, error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_MODULES:
            raise
        _fail(_missing_extra(str(error.name)), error)
    except RuntimeError as error:
        from mixtral_run.launch.processes import is_worker
        from mixtral_run.launch.worker_errors import is_consequence

        # The process that failed first reports the reason.
        if not is_worker() or debugging() or not is_consequence(error):
            raise
        sys.exit(1)
    sys.exit(0)


def _missing_extra(name: str) -> ConfigError:
    return ConfigError(
        "This verb needs packages that are not installed here.",
        expected="the extra `train` of mixtral-run: torch, megatron-core, transformers and others",
        found=f"no module named {name!r} in {sys.prefix}",
        next_command="pip install '.[train]' in a checkout, or with a wheel in place of the dot; or run the verb on a "
        "host, which has them: --on HOST",
    )


def _fail(error: MixtralRunError, cause: Exception) -> NoReturn:
    """Print the error, or with --debug the traceback of its cause, and exit with its code."""
    if debugging():
        traceback.print_exception(cause)
        sys.exit(error.exit_code)
    exit_with(f"✗ {error}", error.exit_code)
