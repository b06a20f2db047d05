"""The job of `data check`: read, print, and end with an error if examples cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.config.data import CheckConfig
from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.errors import ConfigError, MixtralRunError, joined
from mixtral_run.terminal.report import Report, json_document, repeating
from mixtral_run.train.data.check.check import CheckResult, check_data, problem_error
from mixtral_run.train.data.check.check_encoding import CheckEncoding, load_encoding
from mixtral_run.train.data.check.check_screen import check_lines, colored
from mixtral_run.train.data.reading.stdin_copy import with_stdin_copied
from mixtral_run.train.data.templates.open_template import file_problems
from mixtral_run.train.model_limits import length_problems

if TYPE_CHECKING:
    from mixtral_run.weights.manifest.describe import BaseDescription

_PROGRESS_SECONDS = 5.0


def run_check(config: CheckConfig) -> None:
    """Check data and print the result. Raises one error if examples cannot be used or the tokenizer cannot be read."""
    with json_document(config.json) as document:
        report = Report.on_stderr() if config.json else Report()
        config = with_stdin_copied(config)
        encoding, errors = _encoding(config, report)
        result = _check_with_progress(config, encoding)
        document |= _encodable(result.to_mapping())
        if not config.json:
            for line in check_lines(result, color=colored(sys.stdout)):
                report.say(line)
        errors += [problem_error(result)] if result.num_bad else []
        errors += result.errors
        if errors:
            raise joined(errors)


def _encoding(config: CheckConfig, report: Report) -> tuple[CheckEncoding | None, list[MixtralRunError]]:
    """Return tokenizer and chat template of the run, None without them, and why it would refuse base or template."""
    if config.load is None:
        # Nothing else reads the file then.
        problems = file_problems(config.chat_template)
        return None, [ConfigError(SETTINGS_ERROR, problems=problems)] if problems else []
    errors: list[MixtralRunError] = []
    encoding = None
    try:
        folder, base = _base(config.load, report, errors)
        vocab_size = base.architecture.vocab_size if base is not None else None
        problems = length_problems("--seq-length", config.seq_length, base) if base is not None else []
        errors += [ConfigError(SETTINGS_ERROR, problems=problems)] if problems else []
        encoding = load_encoding(folder, config.chat_template, vocab_size)
    except MixtralRunError as error:
        # The data are checked all the same, without counting tokens.
        errors.append(error)
    return encoding, errors


def _check_with_progress(config: CheckConfig, encoding: CheckEncoding | None) -> CheckResult:
    """Check data, and print the number of examples to standard error from time to time."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    report = Report(sys.stderr)
    with repeating(_PROGRESS_SECONDS, lambda: report.say(f"… {done:,} examples")):
        return check_data(config, encoding, advance)


def _encodable(value: Any) -> Any:
    """Return JSON values in which halves of surrogate pairs, which UTF-8 does not have, are written out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, (list, tuple)) else value


def _base(load: Path, report: Report, errors: list[MixtralRunError]) -> tuple[Path, BaseDescription | None]:
    """Return the folder of a model's tokenizer, and the model; None if it is not one that a run takes.

    Of a model on the hub only the small files are downloaded. Errors about its architecture are added.
    """
    from mixtral_run.model.architecture import MixtralArchitecture
    from mixtral_run.weights.hf.hub import is_on_hub, resolve_description
    from mixtral_run.weights.manifest.describe import BaseDescription, describe_base
    from mixtral_run.weights.manifest.manifest import UNKNOWN_FINGERPRINT

    if not is_on_hub(load):
        base = describe_base(load)
        return base.tokenizer, base
    folder = resolve_description(str(load), report)
    try:
        architecture = MixtralArchitecture.from_hf_directory(folder)
    except MixtralRunError as error:
        errors.append(error)
        return folder, None
    return folder, BaseDescription(folder, architecture, "bfloat16", UNKNOWN_FINGERPRINT)
