"""Inputs of a command line that are missing or wrong, for the error that reports problems of its settings.

A command line whose settings are right has its inputs checked by its verb. One whose settings are wrong would otherwise
report them only in the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_run.config.data import DATA_SETTINGS, DataConfig
from mixtral_run.config.data_sources import near_names, parse_source, source_problems
from mixtral_run.config.fields import Config, flag_of
from mixtral_run.config.lora import weighted_path
from mixtral_run.config.names.hub_names import HF_MODEL_SETTINGS, may_be_hub_name
from mixtral_run.config.names.store_names import store_url
from mixtral_run.config.verbs.training import TrainingConfig
from mixtral_run.errors import MixtralRunError

FOLDERS = ("load", "adapter", "init_adapter", "from_megatron", "hf_model_path", "against", "peft_path")
FILES = ("data_path", "valid_data_path", "prompts_file", "prompts")
"""Settings that name an input: a folder, or a file or folder."""
LARGEST_READ = 2**26
"""Bytes of data files up to which their content is read before an error of the settings: about a second."""


def input_problems(config_class: type[Config], values: Mapping[str, Any], doubtful: Collection[str] = ()) -> list[str]:
    """Return a line for each input in `values`, by setting, that does not exist or cannot be read here.

    doubtful: words that may be no inputs, but values of flags that were not understood; they are left out.
    """
    found = []
    for item in dataclasses.fields(config_class):
        is_folder = item.name in FOLDERS
        # A setting with a default path names a folder that the verb may create.
        if not (is_folder or item.name in FILES) or isinstance(item.default, (Path, str)):
            continue
        given = values.get(item.name)
        several = isinstance(given, (tuple, list))
        for each in given if isinstance(given, (tuple, list)) else [given]:
            if not isinstance(each, (str, Path)) or str(each) in ("", *doubtful):
                continue
            if not _may_be_elsewhere(item.name, str(each)):
                problem = _problem(_path_of(item.name, str(each), several=several), is_folder)
                found += [f"{flag_of(item.name)} {each}: {problem}"] if problem else []
    return found


def _path_of(name: str, value: str, *, several: bool) -> Path:
    """Return the path that a value of a setting names, without its weight."""
    if name in DATA_SETTINGS:
        return parse_source(value).path
    return weighted_path(value).path if several and name == "adapter" else Path(value)


def errors_of_inputs(
    config_class: type[Config], values: Mapping[str, Any], doubtful: Collection[str] = ()
) -> list[MixtralRunError]:
    """Return the errors of the contents of inputs that exist: the base, and the data if they are small.

    values, doubtful: as for `input_problems`.
    """
    config, unusable = config_class.rest_of(values)
    found: list[MixtralRunError] = []
    if isinstance(config, TrainingConfig) and "load" not in unusable and config.load.is_dir():
        from mixtral_run.weights.manifest.describe import describe_base

        with _collected_in(found):
            describe_base(config.load)
    if isinstance(config, DataConfig):
        from mixtral_run.train.data.reading.examples import ReadOptions, read_examples

        for setting in DATA_SETTINGS:
            texts = getattr(config, setting, ())
            is_usable = unusable.isdisjoint({setting, "field", "data_format"}) and not source_problems(setting, texts)
            if texts and is_usable and not {*texts} & {*doubtful} and _can_be_read_quickly(texts):
                with _collected_in(found):
                    read_examples(texts, ReadOptions.of(config), setting).check()
    return found


@contextlib.contextmanager
def _collected_in(errors: list[MixtralRunError]) -> Iterator[None]:
    """Append an error of the block to `errors` instead of raising it."""
    try:
        yield
    except MixtralRunError as error:
        errors.append(error)


def _can_be_read_quickly(texts: Collection[str]) -> bool:
    """Return True if all sources are files or folders of this host that exist and are small."""
    num_bytes = 0
    try:
        for text in texts:
            path = parse_source(text).path
            if text == "-" or not path.exists():
                return False
            files = [path] if path.is_file() else path.rglob("*")
            num_bytes += sum(each.stat().st_size for each in files if each.is_file())
    except OSError:
        return False
    return num_bytes <= LARGEST_READ


def _may_be_elsewhere(name: str, value: str) -> bool:
    """Return True for standard input, and for what may be a name on the hub; only the verb can ask the hub."""
    if value == "-" or store_url(value) is not None:
        return True
    if name in HF_MODEL_SETTINGS:
        return may_be_hub_name(value)
    return name in FILES and may_be_hub_name(value.partition(":")[0]) and "." not in Path(value).name


def _problem(path: Path, is_folder: bool) -> str | None:
    wanted = "a folder" if is_folder else "a file"
    try:
        if not path.exists():
            near = near_names(path)
            like = f"; like it: {', '.join(near)}" if near else ""
            return f"expected {wanted}; found nothing of that name{like}"
    except OSError as error:
        return f"expected {wanted}; found {error.strerror}"
    if is_folder and not path.is_dir():
        return "expected a folder; found a file"
    if not os.access(path, os.R_OK):
        return f"expected {wanted} that this user may read; found no permission"
    return None
