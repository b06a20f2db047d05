"""The loss of `align` as the step takes it: from losses of tokens to log-probabilities of answers, and to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mixtral_run.config.data import DPO, KTO, ORPO, SIMPO
from mixtral_run.config.verbs.align import IPO, SIGMOID, SIMPO_GAMMA, AlignConfig
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import sum_over
from mixtral_run.train.data.samples import Answers, MicroBatch
from mixtral_run.train.preferences.losses import dpo_losses, kto_losses, orpo_losses, simpo_losses
from mixtral_run.train.steps.captured_losses import pinned
from mixtral_run.train.steps.objective import Losses, Objective, token_losses
from mixtral_run.train.steps.step import begin_reading
from mixtral_run.train.validation import evaluating


class PreferenceObjective(Objective):
    """The loss of a method over pairs of answers, or with KTO over single answers.

    The losses and figures are those of TRL; `figures` has TRL's names. Log-probabilities are summed in float64.
    """

    def __init__(self, config: AlignConfig) -> None:
        self._config = config
        self._kl = torch.zeros((), dtype=torch.float64)
        self._read_kl: Callable[[], list[float]] = self._kl.reshape(1).tolist
        self._text_weight = 0.0

    def prepare(
        self,
        model: MixtralModel,
        micros: Iterable[MicroBatch],
        count: int,
        num_text_tokens: int,
        losses_of: Losses | None = None,
    ) -> None:
        """Set the weight of ORPO's cross entropy, and estimate KTO's divergence from the reference."""
        self._text_weight = count / num_text_tokens if num_text_tokens else 0.0
        if self._config.method == KTO:
            self._kl = _divergence(model, micros, losses_of)
            self._read_kl = begin_reading(self._kl.reshape(1))

    def inputs(self, micro: MicroBatch, count: int, most: PackedSizes | None = None) -> list[Tensor]:
        answers = _answers(micro)
        constants = torch.tensor([1 / count, self._text_weight], dtype=torch.float64)
        each = torch.stack((answers.counts, answers.reference, answers.num_tokens.double(), answers.is_chosen.double()))
        spans = _spans(answers)
        if most is not None:
            each, spans = _filled_up(each, spans, len(micro.tokens), most)
        return [micro.loss_mask, answers.text_mask, each, constants, self._kl, *spans]

    def parts(self, losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        mask, text_mask, each, constants, kl, *spans = inputs
        counts, reference, num_tokens, chosen_or_not = each
        per_answer, text_weight = constants
        logps = -summed(losses, mask, spans)
        is_chosen = chosen_or_not > 0
        total, rewards = self._losses(logps, reference, num_tokens, is_chosen, counts, kl)
        nll = (losses.double() * text_mask).sum()
        if self._config.method == ORPO:
            total = total + text_weight * nll
        return torch.stack((total * per_answer, *self._sums(rewards.detach(), logps.detach(), counts, is_chosen, nll)))

    def _losses(
        self, logps: Tensor, reference: Tensor, num_tokens: Tensor, is_chosen: Tensor, counts: Tensor, kl: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the reward of each answer."""
        config, beta = self._config, self._config.reward_factor
        if config.method == KTO:
            weights = (config.desirable_weight or 1.0, config.undesirable_weight or 1.0)
            ratios = logps - reference
            return (kto_losses(ratios, is_chosen, kl, beta, weights) * counts).sum(), beta * ratios
        averages = config.method in (ORPO, SIMPO) or config.loss_type == IPO
        scores = logps - reference if config.method == DPO else logps
        scores = scores / num_tokens if averages else scores
        chosen, rejected = scores.view(-1, 2).unbind(1)
        if config.method == DPO:
            found = dpo_losses(chosen, rejected, beta, config.loss_type or SIGMOID, config.label_smoothing)
        elif config.method == ORPO:
            found = orpo_losses(chosen, rejected, beta)
        else:
            gamma = SIMPO_GAMMA if config.simpo_gamma is None else config.simpo_gamma
            found = simpo_losses(chosen, rejected, beta, gamma, config.label_smoothing)
        return (found * counts.view(-1, 2)[:, 0]).sum(), beta * scores

    def _sums(
        self, rewards: Tensor, logps: Tensor, counts: Tensor, is_chosen: Tensor, nll: Tensor
    ) -> tuple[Tensor, ...]:
        of_chosen, of_rejected = counts * is_chosen, counts * ~is_chosen
        correct = torch.zeros_like(nll, dtype=torch.float64)
        if self._config.method != KTO:
            pairs = rewards.view(-1, 2)
            correct = ((pairs[:, 0] > pairs[:, 1]) * counts.view(-1, 2)[:, 0]).sum()
        return (
            of_chosen.sum(), of_rejected.sum(), (rewards * of_chosen).sum(), (rewards * of_rejected).sum(), correct,
            (logps * of_chosen).sum(), (logps * of_rejected).sum(), nll.detach(),
        )  # fmt: skip

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        num_chosen, num_rejected, chosen, rejected, correct, chosen_logps, rejected_logps, nll = sums
        found: dict[str, float] = {}
        if num_chosen:
            found |= {"rewards/chosen": chosen / num_chosen, "logps/chosen": chosen_logps / num_chosen}
        if num_rejected:
            found |= {"rewards/rejected": rejected / num_rejected, "logps/rejected": rejected_logps / num_rejected}
        if num_chosen and num_rejected:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        if self._config.method == KTO:
            (found["kl"],) = self._read_kl()
        else:
            found["rewards/accuracies"] = correct / num_chosen
        if self._config.method == ORPO:
            # The weight is pairs over tokens.
            found["nll_loss"] = nll * self._text_weight / num_chosen
        return found


def summed(losses: Tensor, mask: Tensor, spans: Sequence[Tensor] = ()) -> Tensor:
    """Return the sum of the losses over each answer, float64 [answers].

    Args:
        losses: of the tokens, [rows, sequence].
        mask: 1 where a token belongs to an answer.
        spans: of packed rows: the lengths of all samples and paddings, and which of them are answers.
    """
    counted = losses.double() * mask
    if not spans:
        return counted.sum(dim=1)
    lengths, which = spans
    # Unlike adding by index, this has one order of the additions. A check of the lengths would wait for the GPU.
    found: Tensor = torch.segment_reduce(counted.flatten(), "sum", lengths=lengths, unsafe=losses.is_cuda)
    return found[which]


def log_probabilities(model: MixtralModel, micro: MicroBatch, losses_of: Losses | None = None) -> Tensor:
    """Return the log-probability of each answer of a micro batch, float64 [answers] on the device.

    losses_of: forward pass of a model that is evaluated. Default: eager. All ranks must call.
    """
    losses = losses_of(micro) if losses_of is not None else token_losses(model, micro, count_choices=False)
    mask, *spans = (_moved(each, model) for each in (micro.loss_mask, *_spans(_answers(micro))))
    return -summed(losses, mask, spans)


def _spans(answers: Answers) -> list[Tensor]:
    """Return the spans of packed rows, and which of them are answers; nothing if rows are not packed."""
    return [] if answers.spans is None or answers.answer_spans is None else [answers.spans, answers.answer_spans]


def _filled_up(each: Tensor, spans: list[Tensor], num_rows: int, most: PackedSizes) -> tuple[Tensor, list[Tensor]]:
    """Append answers without tokens, which do not count, and their spans, up to as many as the fullest rows have.

    Args:
        each: numbers of the answers, [4, answers], in the order of `PreferenceObjective.inputs`.
        spans: lengths of the spans, and which of them are answers.
        num_rows: of the micro batch.
        most: of the run's rows. A row has one span more than answers, for its padding.
    """
    lengths, which = spans
    missing = num_rows * (most.samples - 1) - each.shape[1]
    # The mean over the tokens of an answer stays finite.
    empty = torch.tensor([[0.0], [0.0], [1.0], [0.0]], dtype=each.dtype).expand(-1, missing)
    further = torch.arange(len(lengths), len(lengths) + missing)
    lengths = torch.nn.functional.pad(lengths, (0, num_rows * most.samples - len(lengths)))
    return torch.cat((each, empty), dim=1), [lengths, torch.cat((which, further))]


def _moved(values: Tensor, model: MixtralModel) -> Tensor:
    """Return a tensor of the host on the model's device, without waiting for the GPU."""
    device = model.mesh.device
    return pinned(values, device).to(device, non_blocking=True)


def _divergence(model: MixtralModel, micros: Iterable[MicroBatch], losses_of: Losses | None) -> Tensor:
    """Return KTO's estimate of the divergence from the reference, at least 0: a float64 scalar on the device.

    It is the mean log-probability over that of the reference, of the answers of other prompts. All ranks must call.
    """
    mesh = model.mesh
    found = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    with evaluating(model):
        for micro in micros:
            other = _answers(micro).mismatched
            assert other is not None, "KTO needs mismatched answers"
            reference, counts = (_moved(each, model) for each in (_answers(other).reference, _answers(other).counts))
            ratios = log_probabilities(model, other, losses_of) - reference
            found += torch.stack(((ratios * counts).sum(), counts.sum()))
    total, count = sum_over(found, mesh.data_group)
    # What is not a number stays so, and the step is a bad one.
    divergence: Tensor = (total / count).clamp(min=0.0)
    return divergence


def _answers(micro: MicroBatch) -> Answers:
    assert micro.answers is not None, "the samples are preferences"
    return micro.answers
