"""Answers to a few prompts of the validation set, before the first iteration and after the last one.

The passes have no cache of keys and values: the model of a training run splits sequences over tensor-parallel ranks,
which one token cannot be. A few prompts and tokens cost seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.errors import MixtralRunError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.metrics import append
from mixtral_run.train.outcome.example_texts import Prompt
from mixtral_run.train.validation import evaluating

LONGEST_PROMPT = 192
"""Tokens of the longest prompt that is answered."""


class Generations:
    """Prompts and the file that gets their answers. All ranks must construct one with the same prompts.

    Args:
        prompts: to answer.
        max_new_tokens: of an answer.
        open_tokenizer: returns the function that decodes tokens, and the ids that end an answer; the first rank calls.
        file: of the answers; the first rank writes.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        open_tokenizer: Callable[[], tuple[Callable[[list[int]], str], Collection[int]]],
        file: Path,
    ) -> None:
        self._prompts, self._max_new_tokens = prompts, max_new_tokens
        self._open_tokenizer, self._file = open_tokenizer, file

    def write(self, model: MixtralModel, iteration: int, stopped: Callable[[], bool], report: Report) -> None:
        """Answer the prompts and append a line to the file. All ranks must call.

        Does nothing without prompts, if a stop is requested meanwhile, or if there is no tokenizer, which is reported.
        """
        if not self._prompts:
            return
        mesh = model.mesh
        opened, stop_ids = None, None
        if mesh.is_first:
            try:
                opened = self._open_tokenizer()
                stop_ids = tuple(opened[1])
            except MixtralRunError as error:
                report.warn(f"No answers are generated for the report: {error.what}")
        stop_ids = _from_first(stop_ids, mesh)
        if stop_ids is None:
            return
        report.say(f"Answering {len(self._prompts)} prompts of the validation set for the report …")
        rows = [each.tokens for each in self._prompts]
        outputs = greedy(model, rows, stop_ids, self._max_new_tokens, stopped)
        if outputs is None or opened is None:
            return
        decode = opened[0]
        answers = [
            _answer(prompt, output, decode, stop_ids) for prompt, output in zip(self._prompts, outputs, strict=True)
        ]
        append(self._file, json.dumps({"iteration": iteration, "answers": answers}, ensure_ascii=False) + "\n")


def greedy(
    model: MixtralModel,
    rows: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
    stopped: Callable[[], bool],
) -> list[list[int]] | None:
    """Return the likeliest tokens after each row, up to and including one of `stop_ids`.

    Returns None if a stop is requested meanwhile. The model is in its previous mode afterwards. All ranks must call
    with the same rows.
    """
    mesh = model.mesh
    width = max(map(len, rows)) + max_new_tokens
    width += -width % mesh.tensor_size  # sequence parallelism splits it
    # Attention is causal: what follows a row does not change its tokens. Any id will do there.
    tokens = torch.full((len(rows), width), rows[0][0], dtype=torch.int64, device=mesh.device)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, device=mesh.device)
    lengths = torch.tensor([len(row) for row in rows], device=mesh.device)
    each = torch.arange(len(rows), device=mesh.device)
    outputs: list[list[int]] = [[] for _ in rows]
    running = [True] * len(rows)
    with evaluating(model):
        for _ in range(max_new_tokens):
            if stopped():
                return None
            chosen = model.logits(tokens)[each, lengths - 1].argmax(-1)
            if mesh.world_size > 1:
                # Replicas may round differently; all must continue with the same token.
                dist.broadcast(chosen, src=0)
            tokens[each, lengths] = chosen
            lengths += 1
            for index, token in enumerate(chosen.tolist()):
                if running[index]:
                    outputs[index].append(token)
                    running[index] = token not in stop_ids
            if not any(running):
                break
    return outputs


def _answer(
    prompt: Prompt, output: list[int], decode: Callable[[list[int]], str], stop_ids: Collection[int]
) -> dict[str, Any]:
    finished = bool(output) and output[-1] in stop_ids
    expected = list(prompt.expected)
    return {
        "place": prompt.place,
        "prompt": decode(list(prompt.tokens)),
        "expected": decode(expected[:-1] if expected and expected[-1] in stop_ids else expected).strip(),
        "text": decode(output[:-1] if finished else output).strip(),
        "num_tokens": len(output),
        "finished": finished,
    }


def _from_first(value: tuple[int, ...] | None, mesh: Mesh) -> tuple[int, ...] | None:
    """Return the first rank's value on every rank. All ranks must call."""
    values = [value]
    if mesh.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
