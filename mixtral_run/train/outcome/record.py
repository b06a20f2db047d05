"""What a run leaves for people: its record at the start; summary, plot and page at the end or after a stop."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixtral_run.config.former_settings import FormerSettings, to_values
from mixtral_run.config.verbs.training import RunConfig
from mixtral_run.errors import MixtralRunError
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.routing.router_counts import RouterCounts
from mixtral_run.results import run_files
from mixtral_run.results.kit import this_kit
from mixtral_run.results.loss_plot import import_matplotlib, write_loss_plot
from mixtral_run.results.read_run import curve, loss_summary, preference_summary, read_run
from mixtral_run.results.report_page import ExampleText, report_page
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.sources import TrainingData
from mixtral_run.train.data.templates.open_template import open_chat_template
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.train.outcome.example_texts import Decode, example_texts, prompts_of
from mixtral_run.train.outcome.generations import LONGEST_PROMPT, Generations
from mixtral_run.train.outcome.router_log import RouterLog, router_summary
from mixtral_run.train.summary import Summary
from mixtral_run.weights.io.daemon_threads import Beside
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.describe import BaseDescription

NUM_EXAMPLES = 3
"""Examples of the training data that the page shows."""


@dataclass(frozen=True)
class RunRecord:
    """What a run is, as run.json and summary.json have it.

    Attributes:
        name: of the run, for people.
        id: tells runs of one name apart; a resumed run keeps it.
        started: UTC, ISO 8601, of the first start.
        kit: version and commit of the kit.
        base: fingerprint and path of the base; hf_model: the HF model that it was converted from, or that it is.
        data: SHA-256 of --data-path (null for mock data and for a dataset on the hub), hash of all token ids, and a
            line each about the training and the validation data.
        settings: all settings of the run, with the layout that was chosen.
        former_settings: those that --resume changed: their values before, and the last iteration with them.
    """

    name: str
    id: str
    started: str
    kit: dict[str, Any]
    base: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    former_settings: list[dict[str, Any]]

    @classmethod
    def of(
        cls, config: RunConfig, base: BaseDescription, data: TrainingData, former: Sequence[FormerSettings] = ()
    ) -> RunRecord:
        """Describe a run before its first iteration. A resumed run keeps the id and the start of its record."""
        known = read_run(config.folder).run if config.resume else {}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(
            name=config.run_name or config.folder.resolve().name,
            id=_text(known.get("id")) or secrets.token_hex(4),
            started=_text(known.get("started")) or now,
            kit=asdict(this_kit()),
            base={
                "fingerprint": base.fingerprint,
                "path": str(base.folder.resolve()),
                "hf_model": base.hf_model,
            },
            data={
                "sha256": data.sha256,
                "tokens": data.identity or None,
                "training": data.samples.describe(),
                "validation": data.validation.describe() if data.validation is not None else None,
            },
            settings=config.to_mapping(),
            former_settings=to_values(former),
        )


class Outcome:
    """Everything that a run leaves for people next to its checkpoints. All ranks must construct one.

    Args:
        config: of the run, with its iterations.
        base: that is trained.
        data: of the run.
        mesh: all ranks take part in the generations; the first one writes.
        report: gets a line about what cannot be written.
        counts: of the model's routers; None if nothing is counted.
        former: settings that --resume changed.
    """

    def __init__(
        self,
        config: RunConfig,
        base: BaseDescription,
        data: TrainingData,
        mesh: Mesh,
        report: Report,
        counts: RouterCounts | None,
        former: Sequence[FormerSettings] = (),
    ) -> None:
        self._config, self._base, self._data, self._report = config, base, data, report
        self.record = RunRecord.of(config, base, data, former) if mesh.is_first else None
        wanted = config.report_prompts if config.report else 0
        prompts = prompts_of(data.validation, wanted, min(LONGEST_PROMPT, config.seq_length))
        file = config.folder / run_files.GENERATIONS
        self.router = RouterLog(counts, config.folder, config.log_interval, config.iterations, is_first=mesh.is_first)
        self.generations = Generations(prompts, config.report_tokens, self._tokenizer, file)
        self._opened: tuple[Decode, frozenset[int]] | None = None
        self._imported: Beside[None] | None = None

    def prepare_report(self) -> None:
        """Begin to import what draws the plot, which takes half a second, in a thread beside the training."""
        if self.record is not None and self._config.report:
            self._imported = Beside(import_matplotlib, "import of matplotlib")

    def start(self) -> None:
        """Write run.json. All ranks must call."""
        self.router.open()
        if self.record is not None:
            write_atomically(self._config.folder / run_files.RUN, _json(asdict(self.record)))

    def end(self, summary: Summary, num_retaken: int) -> None:
        """Write summary.json, loss.png and report.html. num_retaken: see router_summary. One process calls.

        A plot or a page that cannot be written is reported and ends no run.
        """
        assert self.record is not None, "the first rank writes"
        save = self._config.folder
        written = read_run(save)
        found = {"losses": loss_summary(written), "router": router_summary(written, num_retaken)}
        if preferences := preference_summary(written):
            found["preferences"] = preferences
        document = {**asdict(summary), **found, **asdict(self.record)}
        write_atomically(save / run_files.SUMMARY, _json(document))
        if not self._config.report:
            return
        data = read_run(save)
        best = save if summary.validation is None else summary.validation.best_adapter(save)
        try:
            if self._imported is not None:
                self._imported.result()
            training, validation = curve(data.metrics, "loss"), curve(data.validation, "loss")
            title = f"Loss of {self.record.name}"
            write_loss_plot(save / run_files.LOSS_PLOT, training, validation, title=title, label=self._config.loss_name)
            write_atomically(save / run_files.REPORT, report_page(data, self._examples(), str(best)))
            self._report.say(f"  report: {save / run_files.REPORT}")
        except (OSError, ImportError) as error:
            self._report.warn(f"The report of the run was not written: {error}")

    def _examples(self) -> list[ExampleText]:
        try:
            return example_texts(self._data.samples, lambda: self._tokenizer()[0], NUM_EXAMPLES)
        except MixtralRunError as error:
            self._report.warn(f"The report shows no examples: {error.what}")
            return []

    def _tokenizer(self) -> tuple[Decode, frozenset[int]]:
        """Return the function that decodes tokens, and the ids that end an answer. Raises MixtralRunError."""
        if self._opened is None:
            tokenizer = load_tokenizer(self._base.tokenizer)

            def decode(tokens: list[int]) -> str:
                return str(tokenizer.decode(tokens, skip_special_tokens=False))

            self._opened = decode, open_chat_template(self._config.chat_template, tokenizer).stop_ids
        return self._opened


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) < 100 and value.isprintable() else None
