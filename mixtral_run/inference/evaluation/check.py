"""Checks of `evaluate` before any process starts. All problems are reported together."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.errors import ConfigError, MixtralRunError, joined
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.preflight import check_inference
from mixtral_run.weights.io.atomic_folder import writing_problems


def check_evaluation(config: EvaluateConfig) -> None:
    """Check base, adapter, data, output and the packages that are needed. Raises one error with all problems."""
    errors: list[MixtralRunError] = []
    options = ReadOptions.of(config)
    options = ReadOptions(options.data_format, options.fields, config.skip_bad_examples)
    checks: list[Callable[[], object]] = [lambda: check_inference(config, "evaluate")]
    if config.data_path:
        checks.append(lambda: read_examples(config.data_path, options, "data_path").check())
    if config.tasks:
        checks.append(check_harness)
    for check in checks:
        try:
            check()
        except MixtralRunError as error:
            errors.append(error)
    if config.output_file is not None:
        flag = f"--output-file {config.output_file}"
        problems = writing_problems(config.output_file.parent, flag)
        problems += [f"{flag}: expected a file; found a folder"] if config.output_file.is_dir() else []
        errors += [ConfigError("The result cannot be written.", problems=problems)] if problems else []
    if errors:
        raise joined(errors)


def check_harness() -> None:
    """Raise ConfigError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks runs lm-eval, which is not installed here.",
            expected="the package lm_eval, 0.4.9 or newer",
            found="no module named 'lm_eval'",
            next_command="pip install 'lm_eval>=0.4.9'; or leave --tasks out",
        )
