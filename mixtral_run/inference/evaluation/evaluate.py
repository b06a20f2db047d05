"""`evaluate`: loss and answers of a base, and of an adapter next to it, on a test set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.errors import Stopped
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.evaluation.scores import NO_ROUGE, Rouge, exact_match, open_rouge
from mixtral_run.inference.evaluation.test_set import Question, TestSet, open_test_set
from mixtral_run.inference.session import Session, as_model, models_of, open_session
from mixtral_run.inference.shared_prefix import PrefixMemory
from mixtral_run.inference.text_stream import printable, text_of
from mixtral_run.launch.stop_request import stop_requests
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import open_mesh, sum_over
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.samples import Samples, micro_batch
from mixtral_run.train.validation import evaluating, rows_by_pass
from mixtral_run.weights.io.files import write_atomically


@dataclass(frozen=True)
class Judged:
    """An answer of one model to a question. loss: mean over the tokens of the example that count."""

    text: str
    exact: bool
    rouge_l: float | None
    loss: float
    finished: bool


@dataclass(frozen=True)
class Totals:
    """What one model reaches on the test set. None: no answer was generated, or it is not known."""

    loss: float
    perplexity: float
    exact_match: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class Evaluation:
    """Losses and answers of one model. losses: summed over each example's tokens."""

    totals: Totals
    answers: tuple[Judged, ...]


def evaluate(config: EvaluateConfig) -> None:
    """Load the model, evaluate it, and print or write the result. All ranks must call."""
    session = open_session(config)
    data = open_test_set(config, session) if config.data_path else None
    questions = data.questions[: config.num_answers] if data is not None and config.answers else ()
    if questions:
        session.check_rows([question.row for question in questions], config.max_new_tokens)
    with open_mesh(config) as mesh:
        report = Report() if not config.json else Report.on_stderr()
        report = report if mesh.is_first else Report.silent()
        for warning in (*session.warnings, *(data.remarks if data is not None else ())):
            report.warn(warning)
        if data is not None:
            report.say(f"Chat template: {session.template.describe()}")
            report.say(f"Test set: {data.samples.describe()}; {len(questions):,} answers to generate")
        model = session.load(config, mesh, report)
        document: dict[str, Any] = {
            "load": str(config.load),
            "adapter": str(config.adapter) if config.adapter else None,
            "base_precision": model.settings.base_storage,
        }
        if data is not None:
            document |= _on_test_set(config, session, model, data, questions, report)
        if config.tasks:
            from mixtral_run.inference.evaluation.harness import run_tasks

            document["tasks"] = run_tasks(config, session, model, report)
        if mesh.is_first:
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            if config.output_file is not None:
                config.output_file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(config.output_file, text)
            if config.json:
                print(text, end="", flush=True)
            report.done("Evaluation complete" + (f": {config.output_file}" if config.output_file else ""))


def _on_test_set(
    config: EvaluateConfig,
    session: Session,
    model: MixtralModel,
    data: TestSet,
    questions: Sequence[Question],
    report: Report,
) -> dict[str, Any]:
    """Evaluate on the test set, print the tables, and return the part of the document. All ranks must call."""
    found: dict[str, Evaluation] = {}
    rouge = open_rouge() if questions else None
    if questions and rouge is None:
        report.warn(NO_ROUGE)
    with stop_requests(model.mesh) as stop:
        for name in models_of(session):
            with as_model(name, model), report.progress(len(data.samples) + len(questions), name, "examples") as bar:
                losses = losses_of_examples(model, data.samples, config.batch_size, stop.agreed, bar.advance)
                outputs = _answers(config, session, model, questions, stop.agreed, bar.advance)
            found[name] = _evaluation(session, data, questions, losses, outputs, rouge)
    if model.mesh.is_first:
        _print(config, found, questions, report)
    samples = data.samples
    return {
        "data": data.where,
        "num_examples": len(samples),
        "num_truncated": samples.num_truncated,
        "seq_length": samples.seq_length,
        "num_loss_tokens": samples.num_loss_tokens_total,
        "num_answers": len(questions),
        "models": {name: asdict(each.totals) for name, each in found.items()},
        "answers": [
            {"place": question.place, "question": question.text, "reference": question.reference}
            | {name: asdict(each.answers[number]) for name, each in found.items()}
            for number, question in enumerate(questions)
        ],
    }


def losses_of_examples(
    model: MixtralModel,
    samples: Samples,
    micro_batch_size: int,
    stopped: Callable[[], bool],
    advance: Callable[[int], object],
) -> list[float]:
    """Return the sum of each example's losses, the same on every rank. All ranks must call.

    The passes are those of finetune's validation. Raises Stopped if a stop was requested.
    """
    mesh = model.mesh
    sums = torch.zeros(len(samples), dtype=torch.float64, device=mesh.device)
    with evaluating(model):
        for rows in rows_by_pass(len(samples), micro_batch_size, mesh):
            if stopped():
                raise _stopped()
            micro = micro_batch(samples, rows)
            losses = model.losses(micro.tokens.to(mesh.device), micro.labels.to(mesh.device))
            for row, each in zip(rows, (losses * micro.loss_mask.to(mesh.device)).sum(1), strict=True):
                if row is not None:
                    sums[row] = each.double()
            advance(min(micro_batch_size * mesh.data_size, len(samples)))
    return [float(each) for each in sum_over(sums, mesh.data_group)]


def _answers(
    config: EvaluateConfig,
    session: Session,
    model: MixtralModel,
    questions: Sequence[Question],
    stopped: Callable[[], bool],
    advance: Callable[[int], object],
) -> list[list[int]]:
    """Return the tokens of the greedy answers. All ranks must call. Raises Stopped if a stop was requested."""
    outputs: list[list[int]] = []
    sampling = Sampling(config.max_new_tokens, 0.0, 1.0, config.seed)
    was_stopped = False

    def asked() -> bool:
        nonlocal was_stopped
        was_stopped = stopped()
        return was_stopped

    memory = PrefixMemory()
    for first in range(0, len(questions), config.batch_size):
        rows = [question.row for question in questions[first : first + config.batch_size]]
        decoding = None if config.cuda_graphs else Decoding
        outputs += continue_rows(model, rows, session.template.stop_ids, sampling, None, decoding, asked, memory)
        if was_stopped:
            raise _stopped()
        advance(len(rows))
    return outputs


def _stopped() -> Stopped:
    return Stopped("The evaluation was stopped.", next_command="the same command, which begins anew")


def _evaluation(
    session: Session,
    data: TestSet,
    questions: Sequence[Question],
    losses: Sequence[float],
    outputs: Sequence[list[int]],
    rouge: Rouge | None,
) -> Evaluation:
    samples, stop_ids = data.samples, session.template.stop_ids
    answers = []
    for question, output in zip(questions, outputs, strict=True):
        text = text_of(output, session.tokenizer, stop_ids)
        loss = losses[question.index] / samples.num_loss_tokens(question.index)
        finished = bool(output) and output[-1] in stop_ids
        score = rouge(question.reference, text) if rouge is not None else None
        answers.append(Judged(text, exact_match(question.reference, text), score, loss, finished))
    mean = math.fsum(losses) / samples.num_loss_tokens_total
    count = len(answers)
    totals = Totals(
        mean,
        math.exp(min(mean, 700.0)),
        sum(each.exact for each in answers) / count if count else None,
        math.fsum(each.rouge_l or 0.0 for each in answers) / count if count and rouge is not None else None,
    )
    return Evaluation(totals, tuple(answers))


def _print(config: EvaluateConfig, found: dict[str, Evaluation], questions: Sequence[Question], report: Report) -> None:
    """Print the totals side by side, and the worst answers of the adapter, or else of the base."""
    rows = [
        ("loss", *(f"{each.totals.loss:.6f}" for each in found.values())),
        ("perplexity", *(f"{each.totals.perplexity:,.3f}" for each in found.values())),
    ]
    if questions:
        rows += [
            ("exact match", *(f"{each.totals.exact_match:.1%}" for each in found.values())),
            ("ROUGE-L", *(_score(each.totals.rouge_l, 4) for each in found.values())),
        ]
    report.table(("", *found), rows)
    last = list(found)[-1]
    judged = found[last].answers
    worst = sorted(range(len(judged)), key=lambda at: _rank(judged[at]))[: config.num_worst]
    if worst:
        cells = [
            [questions[at].place, _score(judged[at].rouge_l, 2), f"{judged[at].loss:.3f}"]
            + [_short(text) for text in (questions[at].text, questions[at].reference, judged[at].text)]
            for at in worst
        ]
        columns = ("example", "ROUGE-L", "loss", "question", "expected", "answer")
        report.table(columns, cells, title=f"Worst answers of the {last}")


def _rank(answer: Judged) -> tuple[bool, float, float]:
    """Return a key that sorts the worst answers first."""
    return answer.exact, answer.rouge_l or 0.0, -answer.loss


def _score(score: float | None, digits: int) -> str:
    return "not known" if score is None else f"{score:.{digits}f}"


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= 60 else line[:59] + "…"
