"""Scalars of a run for TensorBoard, Weights & Biases and MLflow, with the run's name, settings, kit and data.

The packages of the latter two are extras. Their servers and keys are found by their own environment variables. A server
that fails during a run is reported once and ends no run.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import TrainingError
from mixtral_run.terminal.report import Report
from mixtral_run.train.metrics import tensorboard_scalars

if TYPE_CHECKING:
    from mixtral_run.train.outcome.record import RunRecord

Write = Callable[[int, Mapping[str, float]], None]
PROJECT = "mixtral-run"
"""Name of the project or experiment unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set."""
_MOST_CHARACTERS = 500
_REMEDIES = {
    "wandb": "WANDB_MODE=offline, or wandb login",
    "mlflow": "MLFLOW_TRACKING_URI of a server that answers; in a folder: MLFLOW_TRACKING_URI=file:mlruns "
    "MLFLOW_ALLOW_FILE_STORE=true",
}


def logger_problems(names: Sequence[str]) -> list[str]:
    """Return a line for each logger of --log-to whose package is missing."""
    return [
        f"--log-to {name}: expected its package; found no module named {name!r} (pip install 'mixtral-run[{name}]')"
        for name in names
        if importlib.util.find_spec(name) is None
    ]


class Logger(ABC):
    """A service that gets the scalars of a run."""

    @abstractmethod
    def write(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    @abstractmethod
    def close(self, *, failed: bool) -> None: ...


class WandbLogger(Logger):
    """A run of Weights & Biases. A resumed run continues it."""

    def __init__(self, record: RunRecord, save: Path) -> None:
        import wandb

        # The output of the run is a terminal's, and the kit's commit is part of the configuration.
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=record.name,
            id=record.id,
            resume="allow",
            dir=str(save),
            config=configuration(record),
            settings=settings,
        )

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowLogger(Logger):
    """A run of MLflow. A resumed run continues it: it has a tag with the id of the kit's run."""

    def __init__(self, record: RunRecord) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        found = self._client.search_runs([number], filter_string=f"tags.`mixtral_run.id` = '{record.id}'")
        tags = {"mixtral_run.id": record.id, "mlflow.runName": record.name}
        run = found[0] if found else self._client.create_run(number, tags=tags, run_name=record.name)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        known = run.data.params
        # A parameter cannot change; of a resumed run only the new ones are added.
        for key, value in flat(configuration(record)).items():
            if key not in known:
                self._client.log_param(self._id, key, value[:_MOST_CHARACTERS])

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._id, name, value, step=iteration)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def configuration(record: RunRecord) -> dict[str, Any]:
    """Return what identifies a run and decides its result, for a logger."""
    values = asdict(record)
    return {**values["settings"], **{name: values[name] for name in ("kit", "base", "data", "started")}}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return nested values as texts with dots in their names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = str(value)
    return found


@contextmanager
def scalar_loggers(
    names: Sequence[str], record: RunRecord | None, save: Path, report: Report, *, tensorboard: Path | None
) -> Iterator[Write]:
    """Yield a function that writes an iteration's scalars to all loggers. Without a record nothing is written.

    Args:
        names: of --log-to.
        record: of the run, in the first rank.
        save: folder of the run.
        report: gets a line if a logger fails.
        tensorboard: folder of TensorBoard's scalars, if they are wanted.

    Raises:
        TrainingError: a logger cannot begin.
    """
    with ExitStack() as stack:
        board = stack.enter_context(tensorboard_scalars(tensorboard))
        loggers: dict[str, Logger] = {}
        failed = True
        try:
            for name in names if record is not None else ():
                assert record is not None
                loggers[name] = _opened(name, record, save)

            def write(iteration: int, scalars: Mapping[str, float]) -> None:
                board(iteration, scalars)
                for name in list(loggers):
                    _or_report(name, loggers, report, lambda logger: logger.write(iteration, scalars))

            yield write
            failed = False
        finally:
            for name in list(loggers):
                _or_report(name, loggers, report, lambda logger: logger.close(failed=failed))


def _opened(name: str, record: RunRecord, save: Path) -> Logger:
    try:
        return WandbLogger(record, save) if name == "wandb" else MlflowLogger(record)
    except Exception as error:
        raise TrainingError(
            f"The run cannot be logged to {name}.",
            where=f"--log-to {name}",
            found=(str(error) or type(error).__name__).splitlines()[0],
            next_command=f"the same command with {_REMEDIES[name]}; or without --log-to",
        ) from error


def _or_report(name: str, loggers: dict[str, Logger], report: Report, action: Callable[[Logger], object]) -> None:
    """Call a logger. After an error it is reported and left out from then on: the training is worth more."""
    try:
        action(loggers[name])
    except Exception as error:
        del loggers[name]
        found = (str(error) or type(error).__name__).splitlines()[0]
        report.warn(f"The run is no longer logged to {name}: {found}")
