"""The job of `data check`: read, print, and end with an error if examples cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import MixtralRunError, joined
from mixtral_run.terminal.report import Report, json_document, repeating
from mixtral_run.train.data.check.check import CheckResult, Encode, check_data, load_encoder, problem_error
from mixtral_run.train.data.check.check_screen import check_lines, colored
from mixtral_run.train.data.reading.stdin_copy import with_stdin_copied

_PROGRESS_SECONDS = 5.0


def run_check(config: CheckConfig) -> None:
    """Check data and print the result. Raises one error if examples cannot be used or the tokenizer cannot be read."""
    with json_document(config.json) as document:
        report = Report.on_stderr() if config.json else Report()
        config = with_stdin_copied(config)
        encode: Encode | None = None
        decode = None
        errors: list[MixtralRunError] = []
        if config.load is not None:
            try:
                encode, decode = load_encoder(_tokenizer_folder(config.load, report), config.chat_template)
            except MixtralRunError as error:
                # The data are checked all the same, without counting tokens.
                errors.append(error)
        result = _check_with_progress(config, encode, decode)
        document |= _encodable(result.to_mapping())
        if not config.json:
            for line in check_lines(result, color=colored(sys.stdout)):
                report.say(line)
        errors += [problem_error(result)] if result.num_bad else []
        if errors:
            raise joined(errors)


def _check_with_progress(
    config: CheckConfig, encode: Encode | None, decode: Callable[[list[int]], str] | None
) -> CheckResult:
    """Check data, and print the number of examples to standard error from time to time."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    report = Report(sys.stderr)
    with repeating(_PROGRESS_SECONDS, lambda: report.say(f"… {done:,} examples")):
        return check_data(config, encode, decode, advance)


def _encodable(value: Any) -> Any:
    """Return JSON values in which halves of surrogate pairs, which UTF-8 does not have, are written out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, (list, tuple)) else value


def _tokenizer_folder(load: Path, report: Report) -> Path:
    """Return the folder of a model's tokenizer. Of a model on the hub only the small files are downloaded."""
    from mixtral_run.weights.hf.hub import is_on_hub, resolve_description
    from mixtral_run.weights.manifest.describe import describe_base

    if is_on_hub(load):
        return resolve_description(str(load), report)
    return describe_base(load).tokenizer
