"""Settings for long rows, and what the length of a row must be a multiple of. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mixtral_run.config.fields import LAYOUT, MEMORY, Config, flag_of, setting
from mixtral_run.config.launch import LaunchConfig

MOST_LOGITS = 8192
"""Most tokens of a rank whose logits exist at the same time. Up to here the loss is computed as a whole: for 8,192
tokens and 32,000 words it takes 2 GiB, which is less than a layer's backward pass needs."""

EXPERT_CHUNK_TOKENS = 8192
"""Tokens of a rank in a chunk of the experts (model/routing/expert_chunks.py), if the planner chooses. Two experts of
eight a token are 2,048 rows for each, with which its products are about as fast as with more."""


def row_multiple(tensor_size: int, context_size: int) -> int:
    """Return the factor that the length of a row must have, so that TP and CP can split it.

    Context parallelism cuts a row into 2 · CP chunks; sequence parallelism splits the part of each rank over TP.
    """
    return math.lcm(2 * context_size, context_size * tensor_size) if context_size > 1 else tensor_size


def row_problems(seq_length: int, tensor_size: int, context_size: int) -> list[str]:
    """Return the problem of a row that --context-parallel-size cannot cut, or an empty list."""
    multiple = row_multiple(tensor_size, context_size)
    if context_size <= 1 or seq_length % multiple == 0:
        return []
    return [
        f"--seq-length: expected a multiple of {multiple}, as --context-parallel-size {context_size} cuts a row into "
        f"{2 * context_size} equal chunks; found {seq_length}"
    ]


def chunk_problems(expert_chunks: int | None, tokens: int) -> list[str]:
    """Return the problem of more --expert-chunks than a process has tokens in a micro batch, or an empty list."""
    if (expert_chunks or 1) <= max(tokens, 1):
        return []
    return [
        f"--expert-chunks: expected at most {tokens}, the tokens that a process has in a micro batch; found "
        f"{expert_chunks}"
    ]


@dataclass(frozen=True, kw_only=True)
class SplitRowsConfig(Config):
    """Setting for long rows: the processes that share a row."""

    context_parallel_size: int | None = setting(
        None,
        help="Processes that share each row of tokens (CP), for rows that do not fit on one GPU. Default: 1, or what "
        "the planner chooses where no layout fits without.",
        minimum=1,
        section=LAYOUT,
    )


@dataclass(frozen=True, kw_only=True)
class ContextConfig(SplitRowsConfig):
    """Settings for long rows: the processes that share a row, and the chunks in which the experts compute it."""

    expert_chunks: int | None = setting(
        None,
        help="Chunks of the tokens of a micro batch that the experts compute one after the other, so that the "
        "activations of one chunk exist at a time. Needs --recompute full, except-attention or offload. Default: 1, "
        "or what the planner chooses where long rows do not fit without.",
        minimum=1,
        section=MEMORY,
    )


@dataclass(frozen=True, kw_only=True)
class SplitRowsLaunchConfig(SplitRowsConfig, LaunchConfig):
    """A job that may split rows over processes."""

    VERB: ClassVar[str] = "finetune"
    SPLITS_ROWS: ClassVar[tuple[str, ...]] = ("finetune", "pretrain")
    """Verbs whose loss is a sum over tokens."""

    @property
    def context_size(self) -> int:
        return self.context_parallel_size or 1

    @property
    def needs_whole_rows(self) -> str | None:
        """The verb or the setting that needs each row on one rank; None if rows may be split.

        A rank has the losses of its part of a row only. The loss of `finetune` and `pretrain` is their sum; that of
        another verb may compare rows.
        """
        return None if self.VERB in self.SPLITS_ROWS else f"`{self.VERB}`"

    @property
    def planned_context_size(self) -> int | None:
        """CP for the planner: None if it may split rows where nothing fits otherwise."""
        return self.context_size if self.has_layout or self.needs_whole_rows else self.context_parallel_size

    def problems(self) -> list[str]:
        found = super().problems()
        if self.context_size > 1 and self.needs_whole_rows:
            found.append(
                f"--context-parallel-size: expected 1 with {self.needs_whole_rows}, which needs whole rows; found "
                f"{self.context_size}"
            )
        return found

    def world_size_problems(self, world_size: int) -> list[str]:
        found = super().world_size_problems(world_size)
        tp, cp = self.tensor_model_parallel_size or 1, self.context_size
        if cp > 1 and world_size % tp == 0 and world_size % (tp * cp):
            found.append(
                f"{flag_of('context_parallel_size')}: expected a divisor of {world_size // tp}, the {world_size} "
                f"processes started over {flag_of('tensor_model_parallel_size')} {tp}; found {cp}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ContextLaunchConfig(ContextConfig, SplitRowsLaunchConfig):
    """A job that may split rows over processes, and their experts' work into chunks."""
