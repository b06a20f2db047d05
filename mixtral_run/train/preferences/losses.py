"""Losses over log-probabilities of answers. torch only.

Each is that of TRL's trainer of the method, for a batch that is the whole global batch. All tensors are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_losses(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str, label_smoothing: float) -> Tensor:
    """Return DPO's loss of each pair (arXiv:2305.18290), with label smoothing that of cDPO.

    Args:
        chosen: log-probability of the chosen answers over that of the reference [pairs]; with ipo, per token.
        rejected: the same of the rejected answers.
        beta: factor of the reward.
        loss_type: sigmoid, ipo (arXiv:2310.12036) or hinge (arXiv:2305.10425).
        label_smoothing: probability that the answers of a pair are interchanged.
    """
    margins = chosen - rejected
    if loss_type == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return torch.relu(1 - beta * margins)
    return _smoothed(beta * margins, label_smoothing)


def simpo_losses(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """Return SimPO's loss of each pair (arXiv:2405.14734). chosen, rejected: log-probability per token [pairs]."""
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return the odds-ratio term of ORPO's loss of each pair (arXiv:2403.07691).

    chosen, rejected: log-probability per token [pairs].
    """
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto_losses(ratios: Tensor, is_chosen: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Return KTO's loss of each answer (arXiv:2402.01306).

    Args:
        ratios: log-probability of each answer over that of the reference [answers].
        is_chosen: True for a desirable answer [answers].
        kl: estimate of the divergence from the reference, a scalar of at least 0, without gradient.
        beta: factor of the reward.
        weights: of desirable and of undesirable answers.
    """
    desirable = weights[0] * (1 - torch.sigmoid(beta * (ratios - kl)))
    undesirable = weights[1] * (1 - torch.sigmoid(beta * (kl - ratios)))
    return torch.where(is_chosen, desirable, undesirable)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -logsigmoid(logits) * (1 - label_smoothing) - logsigmoid(-logits) * label_smoothing


def _log_odds(log_probability: Tensor) -> Tensor:
    """Return log(p / (1 − p)). A probability of 1 would have infinite odds."""
    return log_probability - torch.log(-torch.expm1(log_probability.clamp(max=-1e-12)))
