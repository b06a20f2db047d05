"""The adapters of `--adapter PATH[:WEIGHT]`: opened together, and read as one weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.lora import weighted_path
from mixtral_run.errors import WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.checkpoint import OpenAdapter, check_tensors, open_adapter
from mixtral_run.weights.adapter.lora_factors import CheckpointFactors, Factors, SumOfFactors, Term
from mixtral_run.weights.manifest.adapter_files import check_adapter
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader


@dataclass(frozen=True)
class Summand:
    """An adapter with its weight in the sum."""

    path: Path
    weight: float
    adapter: OpenAdapter

    def describe(self) -> str:
        """Return the summand as reports name it."""
        return f"{self.weight:g} × {self.path} (iteration {self.adapter.checkpoint.iteration})"


@dataclass(frozen=True)
class AdapterSum:
    """The adapters that are exported or merged as one. `first` gives tokenizer, chat template and base."""

    summands: tuple[Summand, ...]

    @property
    def first(self) -> OpenAdapter:
        return self.summands[0].adapter

    @property
    def is_plain(self) -> bool:
        """Return True for one adapter of weight 1, which is written as it was trained."""
        return len(self.summands) == 1 and self.summands[0].weight == 1

    def record(self) -> dict[str, Any]:
        """Return what mixtral_run.json says of the adapters."""
        if self.is_plain:
            values = self.first.manifest.values
            return {
                "adapter": str(self.summands[0].path),
                "iteration": self.first.checkpoint.iteration,
                "lora": values["lora"],
            }
        return {
            "adapters": [
                {
                    "adapter": str(each.path),
                    "weight": each.weight,
                    "iteration": each.adapter.checkpoint.iteration,
                    "lora": each.adapter.manifest.values["lora"],
                }
                for each in self.summands
            ]
        }

    @contextmanager
    def factors(self, report: Report) -> Iterator[Factors]:
        """Check the files of every adapter, and give their factors as those of one. Raises WeightsError."""
        with ExitStack() as stack:
            terms = []
            for each in self.summands:
                check_adapter(each.adapter.checkpoint, report)
                reader = stack.enter_context(Reader(each.adapter.checkpoint.iteration_folder))
                check_tensors(each.adapter, reader)
                terms.append(Term(each.weight, _factors_of(each.adapter, reader)))
            yield terms[0].factors if self.is_plain else SumOfFactors(terms)


def _factors_of(adapter: OpenAdapter, reader: Reader) -> Factors:
    """Return the factors of one adapter: if it started from the weights, less those of its start."""
    settings = adapter.checkpoint.architecture, adapter.lora, adapter.places, reader
    trained = CheckpointFactors(*settings)
    if not adapter.lora.starts_from_weights:
        return trained
    return SumOfFactors([Term(1.0, trained), Term(-1.0, CheckpointFactors(*settings, part="initial"))])


def open_sum(texts: Sequence[str], report: Report) -> AdapterSum:
    """Open the adapters that `--adapter` names. Raises WeightsError if one is none, or if their bases differ."""
    summands = []
    for text in texts:
        given = weighted_path(text)
        summands.append(Summand(given.path, given.weight, open_adapter(given.path)))
    found = AdapterSum(tuple(summands))
    problems = [
        f"{each.path}: {', '.join(_differences(each.adapter, found.first))}"
        for each in summands[1:]
        if _differences(each.adapter, found.first)
    ]
    if problems:
        raise WeightsError(
            "The adapters were trained on different bases, so their sum belongs to none.",
            where=str(summands[0].path),
            expected=f"the base with fingerprint {found.first.base_fingerprint}",
            problems=problems,
            next_command="give --adapter only adapters of one base; mixtral-run verify --load ADAPTER shows its base",
        )
    with_weights = [each for each in summands if each.adapter.lora.train_also]
    if with_weights and not found.is_plain:
        raise WeightsError(
            "An adapter that brings weights of the base cannot be added to others, or weighted.",
            where=", ".join(str(each.path) for each in with_weights),
            expected="adapters that were trained without --train-also",
            found=f"--train-also {','.join(with_weights[0].adapter.lora.train_also)}",
            next_command="export it alone, without a weight; the others may still be added to one another",
        )
    for each in found.summands if not found.is_plain else ():
        report.say(f"  {each.describe()}")
    templates = [each.adapter.manifest.chat_template for each in summands]
    if any(each is not None and templates[0] is not None and each != templates[0] for each in templates[1:]):
        report.warn(f"The adapters were trained with different chat templates; that of {summands[0].path} is written")
    return found


def _differences(adapter: OpenAdapter, first: OpenAdapter) -> list[str]:
    """Return what tells the base of an adapter from that of the first one."""
    ours, theirs = first.checkpoint.architecture, adapter.checkpoint.architecture
    found = [f"{name} {getattr(theirs, name)}, not {getattr(ours, name)}" for name in ours.differing(theirs)]
    if adapter.base_fingerprint != first.base_fingerprint:
        found.append(f"fingerprint {adapter.base_fingerprint}")
    return found
