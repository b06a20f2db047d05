"""Settings of `evaluate`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.data import ExampleConfig
from mixtral_run.config.data_sources import STANDARD_INPUT
from mixtral_run.config.fields import COMPARISON, DATA, OUTPUT, PROMPTS, setting
from mixtral_run.config.precision import StoredBaseConfig
from mixtral_run.config.verbs.generate import InferenceConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StoredBaseConfig, InferenceConfig, ExampleConfig):
    """Evaluation of a base model, and of an adapter next to it, on a test set."""

    data_path: tuple[str, ...] = setting(
        (),
        help="Test data: a file or folder of any format that training takes, or OWNER/NAME[@REVISION][:SPLIT] on the "
        "hub. Repeat it for several.",
        section=DATA,
    )
    skip_bad_examples: bool = setting(
        False, help="Leave out examples that cannot be used, and report how many, instead of ending.", section=DATA
    )
    seq_length: int | None = setting(
        None,
        help="Tokens per sample that count in the loss; longer samples are cut. Default: those of the longest sample. "
        "Give that of the training to compare with its validation loss.",
        minimum=2,
        section=DATA,
    )
    answers: bool = setting(
        True,
        help="Generate an answer to each example, greedily, and compare it with that of the example: exact match and "
        "ROUGE-L.",
        section=COMPARISON,
    )
    num_answers: int | None = setting(
        None, help="Answers to generate, to the first examples. Default: to all.", minimum=1, section=COMPARISON
    )
    num_worst: int = setting(10, help="Worst answers to show.", minimum=0, section=COMPARISON)
    max_new_tokens: int = setting(256, help="Largest number of tokens of an answer.", minimum=1, section=PROMPTS)
    batch_size: int = setting(16, help="Examples that are computed together.", minimum=1, section=PROMPTS)
    tasks: tuple[str, ...] = setting(
        (),
        help="Tasks of lm-eval to run on the model, such as hellaswag. Needs the package lm_eval. May be repeated.",
        section=COMPARISON,
    )
    tasks_path: Path | None = setting(
        None, help="With --tasks: folder with your own tasks of lm-eval, as YAML.", section=COMPARISON
    )
    tasks_limit: int | None = setting(
        None, help="With --tasks: use only the first examples of each task.", minimum=1, section=COMPARISON
    )
    json: bool = setting(False, help="Print the result as JSON, with all answers.", section=OUTPUT)
    output_file: Path | None = setting(None, help="JSON file to write the result to as well.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.data_path and not self.tasks:
            found.append("--data-path or --tasks: expected at least one; found neither")
        if STANDARD_INPUT in self.data_path:
            found.append("--data-path -: expected a file; evaluate does not read standard input")
        if self.tasks_path is not None and not self.tasks:
            found.append("--tasks-path: expected --tasks NAME with it; found none")
        found += ["--tasks: expected the name of a task; found ''" for task in self.tasks if not task.strip()]
        return found
