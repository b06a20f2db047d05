"""Greedy or sampled continuation of rows of tokens: a pass over the prompts, then one for each new token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.config.verbs.generate import SamplingConfig
from mixtral_run.inference.decode import Decoding, decoding_of
from mixtral_run.inference.shared_prefix import PrefixMemory
from mixtral_run.model.mixtral import MixtralModel


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token. temperature 0: greedy; top_p: nucleus sampling (Holtzman et al. 2019)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    @classmethod
    def of(cls, config: SamplingConfig) -> Sampling:
        return cls(config.max_new_tokens, config.temperature, config.top_p, config.seed)


@torch.inference_mode()
def continue_rows(
    model: MixtralModel,
    rows: Sequence[Sequence[int]],
    end_tokens: Collection[int],
    sampling: Sampling,
    on_pass: Callable[[Sequence[list[int]], Sequence[bool]], None] | None = None,
    decoding: type[Decoding] | None = None,
    stopped: Callable[[], bool] | None = None,
    memory: PrefixMemory | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, up to and including one of `end_tokens`.

    All ranks must call with the same rows.

    Rows of different length are padded on the left; padding is masked out of attention and takes no position. What all
    rows begin with is computed once.

    Args:
        model: in evaluation mode.
        rows: token ids of each prompt.
        end_tokens: ids of the tokens that end a text.
        sampling: how tokens are chosen, and how many.
        on_pass: called after each pass with the new tokens of each row so far, and with True for each row that goes on.
        decoding: class of the passes (decode.py). Default: the fastest.
        stopped: called after each pass by all ranks; True on all of them ends the generation with the tokens so far.
        memory: of the calls before with the same model and adapter, whose tokens are not computed again.
    """
    mesh = model.mesh
    memory = memory if memory is not None else PrefixMemory()
    prefix = memory.of(model, rows)
    tokens, padding = _padded(rows, len(prefix.tokens) if prefix is not None else 0, mesh.device)
    decoding = decoding or decoding_of(model, len(rows), sampling.max_new_tokens)
    passes = decoding(model, padding, max(map(len, rows)) + sampling.max_new_tokens, prefix)
    generator = torch.Generator(device=mesh.device).manual_seed(sampling.seed)
    outputs: list[list[int]] = [[] for _ in rows]
    running = [True] * len(rows)
    for _ in range(sampling.max_new_tokens):
        chosen = choose(passes(tokens).float(), sampling, generator)
        if mesh.world_size > 1:
            # Replicas may round differently; all must continue with the same token.
            dist.broadcast(chosen, src=0)
        for index, token in enumerate(chosen.tolist()):
            if running[index]:
                outputs[index].append(token)
                running[index] = token not in end_tokens
        if on_pass is not None:
            on_pass(outputs, running)
        if not any(running) or (stopped is not None and stopped()):
            break
        tokens = chosen[:, None]
    passes.end()
    if len(rows) == 1:
        memory.keep([*rows[0], *outputs[0]], passes.cache)
    return outputs


def _padded(rows: Sequence[Sequence[int]], begin: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of all rows after the first `begin`, int64 [rows, longest], and the padding on their left."""
    longest = max(map(len, rows))
    # Padding is masked: any id of the model will do.
    tokens = torch.full((len(rows), longest - begin), rows[0][0], dtype=torch.int64, device=device)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = torch.tensor(row[begin:], device=device)
    return tokens, torch.tensor([longest - len(row) for row in rows], device=device)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose the next tokens, int64 [rows], from fp32 logits [rows, vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The likeliest token is never masked: no probability precedes it.
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
