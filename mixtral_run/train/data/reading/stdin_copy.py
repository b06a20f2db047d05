"""Copy of standard input, which can be read once only: the check and every process of a job read the data."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TypeVar

from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.data_sources import STANDARD_INPUT, STDIN_COPY_PREFIX, parse_source
from mixtral_run.config.fields import Config, flag_of
from mixtral_run.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Config)


def with_stdin_copied(config: ConfigT, *, is_worker: bool = False) -> ConfigT:
    """Return the config with `-` replaced by the path of a temporary copy, which is removed when this process ends.

    Args:
        is_worker: True in a process that torchrun started: only one of them could read the input.

    Raises:
        ConfigError: standard input is a terminal or empty, or this is a worker.
    """
    changed: dict[str, tuple[str, ...]] = {}
    copy: Path | None = None
    for name in DATA_SETTINGS:
        texts: tuple[str, ...] = getattr(config, name, ())
        sources = [parse_source(text) for text in texts]
        if not any(source.location == STANDARD_INPUT for source in sources):
            continue
        if is_worker:
            raise ConfigError(
                "Standard input cannot be read under torchrun, which starts several processes.",
                where=f"{flag_of(name)} -",
                next_command="the same verb without torchrun, or a file",
            )
        copy = copy or _copied(name)
        changed[name] = tuple(
            text if source.location != STANDARD_INPUT else f"{copy}{text.removeprefix(STANDARD_INPUT)}"
            for text, source in zip(texts, sources, strict=True)
        )
    return dataclasses.replace(config, **changed) if changed else config


def _copied(name: str) -> Path:
    where = f"{flag_of(name)} -"
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(
            "Standard input is a terminal.", where=where, next_command="zcat FILE.gz | mixtral-run … -, or a file"
        )
    handle, text = tempfile.mkstemp(prefix=STDIN_COPY_PREFIX)
    path = Path(text)
    owner = os.getpid()
    # A process that is forked later must not remove it.
    atexit.register(lambda: path.unlink(missing_ok=True) if os.getpid() == owner else None)
    with os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path
