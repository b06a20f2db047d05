"""Settings that name a folder in an object store: the verb gets a folder of this machine in place of each URL.

Inputs are copied here before the verb begins, outputs are copied there while it runs and at its end. A command ends
with 0 only if everything is copied.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mixtral_run.config.names.store_names import store_url, without_weight
from mixtral_run.errors import ConfigError, MixtralRunError

if TYPE_CHECKING:
    from types import FrameType

    from mixtral_run.config.fields import Config
    from mixtral_run.terminal.report import Report

ConfigT = TypeVar("ConfigT", bound="Config")
Finish = Callable[[Callable[[], float | None]], None]

_SAME_SECONDS = 1.0
GRACE_SECONDS = 240.0
"""Time that a copy gets after the job was asked to stop. Engines and schedulers of the kit kill after 330 seconds."""


def run_with_stores(verb: Callable[[ConfigT], None], config: ConfigT) -> None:
    """Call a verb with its config, in which folders of this machine have taken the place of URLs."""
    urls = urls_of(config)
    if not urls:
        verb(config)
        return
    from mixtral_run.launch import processes
    from mixtral_run.terminal.report import Report

    as_json = bool(getattr(config, "json", False))
    is_first = processes.rank() == 0
    report = Report.silent() if not is_first else Report.on_stderr() if as_json else Report()
    _refuse_scattered(urls)
    outputs = {name: texts for name, texts in urls.items() if _kind(config, name) == "output"}
    with ExitStack() as stack:
        if is_first:
            if "save" in outputs and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                from mixtral_run.weights.store.outputs import begun_here

                stack.enter_context(begun_here(outputs["save"][0]))
            _check_other_inputs(config, urls)
        finishes = [stack.enter_context(_output(config, name, report)) for name in outputs] if is_first else []
        if None in finishes:
            return
        if "save" in outputs and not is_first:
            from mixtral_run.weights.store.outputs import wait_for_first_process

            wait_for_first_process(outputs["save"][0])
        config = _with_inputs(config, [name for name in urls if name not in outputs], report)
        verb(_with_folders(config, outputs))
        for finish in finishes:
            assert finish is not None
            _finish(finish, processes.was_stopped())


def urls_of(config: Config) -> dict[str, list[str]]:
    """Return the URLs that the settings of a config hold, by the names of the settings."""
    found: dict[str, list[str]] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("store"):
            texts = value if isinstance(value, tuple) else (value,)
            urls = [url for url in (store_url(without_weight(each)) for each in texts) if url is not None]
            found |= {item.name: urls} if urls else {}
    return found


def _kind(config: Config, name: str) -> str:
    kind: str = next(item.metadata["store"] for item in dataclasses.fields(config) if item.name == name)
    return kind


def _refuse_scattered(urls: dict[str, list[str]]) -> None:
    """Raise ConfigError for a job on several hosts that would save on the disk of each."""
    here, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if "save" in urls and here != everywhere and not os.environ.get("MIXTRAL_RUN_STORE_CACHE"):
        raise ConfigError(
            "Some settings are wrong.",
            problems=[
                f"--save {urls['save'][0]}: expected MIXTRAL_RUN_STORE_CACHE in the environment of all hosts, a folder "
                f"that they share, as each process writes its part of a checkpoint there; found none"
            ],
            next_command="the same command with --env MIXTRAL_RUN_STORE_CACHE=/checkpoints/stores",
        )


def _check_other_inputs(config: Config, urls: dict[str, list[str]]) -> None:
    """Raise ConfigError for other inputs that are missing, before anything large is copied."""
    from mixtral_run.cli.input_problems import input_problems

    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.name not in urls}
    problems = input_problems(type(config), values)
    if problems:
        raise ConfigError("Some settings are wrong.", problems=problems)


def _with_inputs(config: ConfigT, names: list[str], report: Report) -> ConfigT:
    from mixtral_run.weights.store.inputs import bring_here

    def here(value: Any) -> Any:
        url = store_url(without_weight(value))
        if url is None:
            return value
        folder = bring_here(url, report)
        weight = re.search(r":[-+.0-9eE]+$", value) if isinstance(value, str) else None
        return f"{folder}{weight[0] if weight else ''}" if isinstance(value, str) else folder

    changed = {}
    for name in names:
        value = getattr(config, name)
        changed[name] = tuple(map(here, value)) if isinstance(value, tuple) else here(value)
    return dataclasses.replace(config, **changed)


def _with_folders(config: ConfigT, outputs: dict[str, list[str]]) -> ConfigT:
    if not outputs:
        return config
    from mixtral_run.weights.store.outputs import folder_of

    return dataclasses.replace(config, **{name: folder_of(urls[0]) for name, urls in outputs.items()})


@contextmanager
def _output(config: Config, name: str, report: Report) -> Iterator[Finish | None]:
    """Prepare an output, yield what copies it at the end, and after an error copy what is there as far as possible."""
    from mixtral_run.weights.store.outputs import folder_output, run_output
    from mixtral_run.weights.store.run_mirror import Retention

    url = urls_of(config)[name][0]
    if name != "save":
        overwrite = bool(getattr(config, "overwrite", False))
        with folder_output(url, overwrite, config.to_mapping(), report) as finish:
            yield finish
        return
    keep_last, keep_best = getattr(config, "keep_last", None), bool(getattr(config, "keep_best", False))
    lines = _Lines(report)
    with run_output(
        url, getattr(config, "resume", None), Retention(keep_last, keep_best), report, lines.say
    ) as finish_run:
        began: list[bool] = []

        def finish_and_print(seconds: Callable[[], float | None]) -> None:
            began.append(True)
            lines.release()
            report.say(f"Copying what is left to {url} …")
            finish_run(seconds)
            report.done(f"all checkpoints are in {url}")

        try:
            yield finish_and_print
        except BaseException:
            lines.release()
            if not began:
                _rescue(finish_run, url, report)
            raise


def _rescue(finish: Finish, url: str, report: Report) -> None:
    """Copy the checkpoints of a run that failed, and report what cannot be copied; the run's error is raised after."""
    try:
        _finish(finish, True)
    except MixtralRunError as error:
        report.warn(f"{error.what} {'; '.join(error.problems)}")
    except KeyboardInterrupt:
        report.warn(f"The copy to {url} was interrupted; the checkpoints are on this machine")


def _finish(finish: Finish, stopped: bool) -> None:
    """Call what copies an output. A signal, now or before (`stopped`), leaves GRACE_SECONDS; a second one ends it."""
    asked: list[float] = [time.monotonic()] if stopped else []

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        # Engines signal a process and its group, which counts as one.
        if not asked or time.monotonic() - asked[-1] > _SAME_SECONDS:
            asked.append(time.monotonic())

    def seconds() -> float | None:
        if len(asked) > 1:
            return 0.0
        return GRACE_SECONDS - (time.monotonic() - asked[0]) if asked else None

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        finish(seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Lines:
    """Lines of the thread that copies. On a terminal, which another process redraws, they wait until the run's end."""

    def __init__(self, report: Report) -> None:
        from mixtral_run.terminal.live import is_live

        self._report = report
        self._waiting: list[str] | None = [] if is_live(sys.stdout) else None

    def say(self, text: str) -> None:
        if self._waiting is None:
            self._report.say(text)
        else:
            self._waiting.append(text)

    def release(self) -> None:
        for text in self._waiting or ():
            self._report.say(text)
        self._waiting = None
