"""`generate`: answers to prompts in batches, shown as they come, and written as JSON or JSONL."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import torch.distributed as dist

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.errors import ConfigError, shortened
from mixtral_run.inference.answers import Answer, AnswersFile, run_hash
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.delivery import Delivery
from mixtral_run.inference.session import Session, open_session
from mixtral_run.inference.shared_prefix import PrefixMemory
from mixtral_run.launch.stop_request import StopRequest, stop_requests
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.run_lock import lock_file_of
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.run_folder import own_output
from mixtral_run.train.data.reading.example import USER, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.reading.prompts import Prompt, read_prompts
from mixtral_run.weights.io.files import write_atomically


def generate(config: GenerateConfig) -> None:
    """Load the model, generate a text for every prompt, and print or write the texts. All ranks must call."""
    session = open_session(config)
    prompts, remarks = _prompts(config)
    rows = _rows(prompts, session)
    session.check_rows(rows, config.max_new_tokens)
    lock = lock_file_of(config.output) if config.output is not None else None
    with own_output(lock, "generate"), open_mesh(config) as mesh:
        report = _report(config, mesh)
        for warning in (*session.warnings, *remarks):
            report.warn(warning)
        if any(each.messages for each in prompts):
            report.say(f"Chat template: {session.template.describe()}")
        with _answers_file(config, session, rows, mesh) as (file, num_done):
            if num_done:
                report.say(f"{config.output} has {num_done:,} of {len(prompts):,} answers; the others follow")
            if num_done == len(prompts):
                report.done(f"All {len(prompts):,} prompts are answered")
                return
            model = session.load(config, mesh, report)
            _generate(config, session, model, prompts, rows, file, num_done, report)


def _generate(
    config: GenerateConfig,
    session: Session,
    model: MixtralModel,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    file: AnswersFile | None,
    num_done: int,
    report: Report,
) -> None:
    """Answer the prompts after the first `num_done`. All ranks must call."""
    mesh, written = model.mesh, config.output is not None
    answers: dict[int, Answer] = {}

    def deliver(number: int, answer: Answer) -> None:
        answers[number] = answer
        if file is not None:
            file.write(number, answer)
        elif live is None and not (config.json or written):
            report.say(f"\n> {answer.prompt}\n{answer.text}")

    live = sys.stdout if report.enabled and not (config.json or written) and sys.stdout.isatty() else None
    stop_ids = session.template.stop_ids
    delivery = Delivery([each.shown for each in prompts], session.tokenizer, stop_ids, live, deliver)
    delivery.skip(num_done)
    started = time.perf_counter()
    count = len(prompts) - num_done
    progress = nullcontext(None) if live else report.progress(count, "generating", "answers")
    with stop_requests(mesh) as stop, progress as bar:
        stopped = False

        def asked() -> bool:
            nonlocal stopped
            stopped = stop.agreed()
            return stopped

        memory = PrefixMemory()
        for first in range(num_done, len(rows), config.batch_size):
            batch = rows[first : first + config.batch_size]
            outputs = continue_rows(
                model,
                batch,
                stop_ids,
                Sampling.of(config),
                # Only the first rank prints and writes, and decoding the tokens takes time.
                partial(delivery.passed, first) if mesh.is_first else None,
                None if config.cuda_graphs else Decoding,
                asked,
                memory,
            )
            # The rest of a batch that was stopped is shown as it is, but is no answer that a file may hold.
            if mesh.is_first and not (stopped and written):
                delivery.passed(first, outputs, [False] * len(outputs))
            if stopped:
                break
            if bar is not None:
                bar.advance(len(batch))
    if mesh.is_first:
        _finish(config, report, list(answers.values()), len(prompts) - num_done, time.perf_counter() - started)


def _finish(config: GenerateConfig, report: Report, answers: list[Answer], count: int, seconds: float) -> None:
    """Print or write the document of --json, and the sum."""
    document = json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False) + "\n"
    if config.output_file is not None:
        write_atomically(config.output_file, document)
    if config.json:
        print(document, end="", flush=True)
    elif config.output is None:
        report.say()
    tokens = sum(answer.num_tokens for answer in answers)
    report.done(f"Generated {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)")
    if config.output is not None:
        report.say(f"  answers: {config.output}")
    if not StopRequest.ended_a_run:
        return
    if config.output is None:
        report.warn("Stopped as requested: these are the texts so far")
    else:
        report.warn(
            f"Stopped as requested: {len(answers):,} of {count:,} answers are complete and written; the same command "
            "continues after them"
        )


@contextmanager
def _answers_file(
    config: GenerateConfig, session: Session, rows: Sequence[Sequence[int]], mesh: Mesh
) -> Iterator[tuple[AnswersFile | None, int]]:
    """Yield the file of --output on the first rank, and on all ranks the number of answers that it has."""
    if config.output is None:
        yield None, 0
        return
    file = None
    if mesh.is_first:
        settings = run_hash(session, Sampling.of(config), config.dtype, config.base_precision)
        file = AnswersFile(config.output, rows, settings)
    found = [file.num_done if file is not None else 0]
    if mesh.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    try:
        yield file, found[0]
    finally:
        if file is not None:
            file.close()


def _report(config: GenerateConfig, mesh: Mesh) -> Report:
    if not mesh.is_first:
        return Report.silent()
    return Report.on_stderr() if config.json else Report()


def _prompts(config: GenerateConfig) -> tuple[list[Prompt], tuple[str, ...]]:
    """Return the prompts of all flags, and lines about what of a file is not used."""
    prompts = [Prompt(f"--prompt {number}", text=text) for number, text in enumerate(config.prompt, start=1)]
    instructions = list(config.instruction)
    if config.prompts_file is not None:
        try:
            lines = config.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "The prompts cannot be read.", where=str(config.prompts_file), found=str(error)
            ) from error
        instructions += [line.strip() for line in lines if line.strip()]
    prompts += [
        Prompt(f"instruction {number}", (Message(USER, text),)) for number, text in enumerate(instructions, start=1)
    ]
    remarks: tuple[str, ...] = ()
    if config.prompts is not None:
        found = read_prompts(config.prompts)
        prompts += found.prompts
        remarks = found.remarks
    if not prompts:
        raise ConfigError("There is no prompt.", where=str(config.prompts_file), found="an empty file")
    return prompts, remarks


def _rows(prompts: Sequence[Prompt], session: Session) -> list[list[int]]:
    """Return the token ids of each prompt. Raises ConfigError with all prompts that the template cannot take."""
    rows, problems = [], []
    for prompt in prompts:
        try:
            rows.append(
                session.tokenizer.encode(prompt.text)
                if prompt.text is not None
                else session.template.prompt(prompt.messages, prompt.tools)
            )
        except ExampleProblem as error:
            problems.append(f"{prompt.place}: {error.problem}")
    if problems:
        raise ConfigError("Some prompts do not fit the chat template.", problems=shortened(problems))
    return rows
