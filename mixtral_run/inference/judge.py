"""Judge a server's greedy answer by the logits of the model that is loaded here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from mixtral_run.config.verbs.serve import TIE_BF16, TIE_FP32, ServeConfig
from mixtral_run.model.mixtral import MixtralModel


@dataclass(frozen=True)
class Scores:
    """The server's tokens as the model here sees them, each after the prompt and the server's tokens before it.

    best: the token with the largest logit at each position, and at the one after the last. gaps: by how much its logit
    exceeds that of the server's token. end_gap: the same for the end of the text after the last token. logprobs: of the
    server's tokens.
    """

    best: tuple[int, ...]
    gaps: tuple[float, ...]
    end_gap: float
    logprobs: tuple[float, ...]


@torch.inference_mode()
def score(model: MixtralModel, row: Sequence[int], tokens: Sequence[int], stop_ids: Collection[int]) -> Scores:
    """Return the scores of an answer to a prompt, from one pass over both. All ranks must call."""
    device = model.mesh.device
    whole = torch.tensor([[*row, *tokens]], dtype=torch.int64, device=device)
    logits = model.logits(whole)[0, len(row) - 1 :].float()
    largest, best = logits.max(-1)
    wanted = torch.tensor(list(tokens), dtype=torch.int64, device=device)[:, None]
    found = logits[:-1].gather(-1, wanted)[:, 0]
    logprobs = logits[:-1].log_softmax(-1).gather(-1, wanted)[:, 0]
    end_gap = largest[-1] - logits[-1, sorted(stop_ids)].max()
    gaps = (largest[:-1] - found).tolist()
    return Scores(tuple(best.tolist()), tuple(gaps), float(end_gap), tuple(logprobs.tolist()))


def tolerance(config: ServeConfig, model: MixtralModel) -> float:
    """Return the largest difference of logits at which two tokens count as equally good."""
    if config.logits_tolerance is not None:
        return config.logits_tolerance
    return TIE_FP32 if model.settings.dtype is torch.float32 else TIE_BF16


@dataclass(frozen=True)
class Judgement:
    """What the scores say about an answer.

    gap: position and difference of the logits of the first token that is not as good as the best one, None if all are.
    largest_gap: of all tokens. logprob: position of the first log probability that differs by more than the tolerance,
    None if there is none. largest_logprob: largest difference of log probabilities, None if the server reports none.
    """

    gap: tuple[int, float] | None
    largest_gap: float
    logprob: int | None
    largest_logprob: float | None


def judge(scores: Scores, logprobs: Sequence[float] | None, limit: float, *, ended: bool) -> Judgement:
    """Judge an answer.

    Args:
        scores: of its tokens.
        logprobs: of its tokens, by the server; None if it reports none.
        limit: largest difference that counts as none.
        ended: the server chose the end of the text after the last token.
    """
    gaps = [*scores.gaps, *([scores.end_gap] if ended else [])]
    differences = [abs(a - b) for a, b in zip(scores.logprobs, logprobs or (), strict=False)]
    # Written so that NaN counts as different.
    return Judgement(
        gap=next(((at, gap) for at, gap in enumerate(gaps) if not gap <= limit), None),
        largest_gap=max(gaps, default=0.0),
        logprob=next((at for at, each in enumerate(differences) if not each <= limit), None),
        largest_logprob=max(differences, default=None),
    )
