"""State of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixtral_run.config.former_settings import FormerSettings
from mixtral_run.config.verbs.training import TrainingConfig
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.terminal.live import TrainingRow
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.sources import TrainingData
from mixtral_run.train.early_stopping import BestLoss
from mixtral_run.train.metrics import Meter
from mixtral_run.train.steps.bad_steps import BadSteps
from mixtral_run.train.steps.step import Step
from mixtral_run.train.validation import Validation


@dataclass
class Run:
    """State of a training run, the same on every rank.

    start: iterations before the first one of this process; last: the last one; saved: that of the newest checkpoint.
    view: on a terminal, in the first rank. former: settings that --resume changed, of this process and of earlier ones.
    """

    config: TrainingConfig
    mesh: Mesh
    report: Report
    model: MixtralModel
    data: TrainingData
    meter: Meter
    step: Step
    load_seconds: float
    bad_steps: BadSteps
    start: int = 0
    last: int = 0
    saved: int = 0
    view: TrainingRow | None = None
    validation: Validation | None = None
    former: tuple[FormerSettings, ...] = ()
    best: BestLoss = field(default_factory=BestLoss)
