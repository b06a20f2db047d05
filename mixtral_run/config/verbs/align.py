"""Settings of `align`: training on preferences. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mixtral_run.config.data import AUTO, DPO, KTO, METHODS, ORPO, PAIRS, SIMPO, UNPAIRED
from mixtral_run.config.fields import DATA, LAYOUT, LORA, OPTIMIZER, PREFERENCES, setting
from mixtral_run.config.lora import TRAINED_ALSO
from mixtral_run.config.verbs.training import FinetuneConfig

WITH_REFERENCE = (DPO, KTO)
"""Methods that compare the model with a reference."""
START, BASE = REFERENCES = ("start", "base")
"""The reference: the model before the first iteration, or the base with the adapters off."""
SIGMOID, IPO, HINGE = LOSS_TYPES = ("sigmoid", "ipo", "hinge")
"""Forms of the loss of dpo."""
DEFAULT_BETA = {SIMPO: 2.0}
"""Where it differs from 0.1."""
SIMPO_GAMMA = 0.5
"""Default of --simpo-gamma, as in TRL."""


def rows_per_sample(method: str | None, *, pack: bool = False) -> int:
    """Return the rows of a sample of --micro-batch-size: two for a pair of answers. None: the method of finetune."""
    return 2 if method in (DPO, ORPO, SIMPO) and not pack else 1


def loss_of(settings: Mapping[str, Any]) -> tuple[object, ...] | None:
    """Return the method with the values that decide its loss, from settings as JSON values; None for other verbs.

    A value that was not given and its default are the same.
    """
    method = settings.get("method")
    if method is None:
        return None
    defaults = {
        "beta": DEFAULT_BETA.get(str(method), 0.1), "reference": START, "loss_type": SIGMOID, "label_smoothing": 0.0,
        "simpo_gamma": SIMPO_GAMMA, "desirable_weight": 1.0, "undesirable_weight": 1.0,
    }  # fmt: skip
    given = {name: settings.get(name) for name in defaults}
    return (method, *(defaults[name] if value is None else value for name, value in given.items()))


@dataclass(frozen=True, kw_only=True)
class AlignConfig(FinetuneConfig):
    """LoRA fine-tuning of a base model on preferences."""

    VERB: ClassVar[str] = "align"
    WHAT: ClassVar[str] = "alignment"

    method: str = setting(
        help="Loss. dpo (arXiv:2305.18290), orpo (arXiv:2403.07691) and simpo (arXiv:2405.14734) learn from pairs of "
        "a chosen and a rejected answer; kto (arXiv:2402.01306) from single answers with a label, or from pairs. dpo "
        "and kto compare with a reference, whose log-probabilities are computed once, before the first iteration.",
        choices=METHODS,
        section=PREFERENCES,
    )
    beta: float | None = setting(
        None,
        help="Factor of the reward; with orpo, weight of the odds ratio. Default: 0.1; with simpo 2.",
        above=0,
        section=PREFERENCES,
    )
    reference: str | None = setting(
        None,
        help="With --method dpo and kto: what the model is compared with. start: the model as the run starts, which is "
        "the base, with --init-adapter the base with that adapter. base: the base alone. Default: start.",
        choices=REFERENCES,
        section=PREFERENCES,
    )
    loss_type: str | None = setting(
        None,
        help="With --method dpo: form of the loss. sigmoid: DPO's. ipo (arXiv:2310.12036). hinge (SLiC, "
        "arXiv:2305.10425). Default: sigmoid.",
        choices=LOSS_TYPES,
        section=PREFERENCES,
    )
    label_smoothing: float = setting(
        0.0,
        help="With --method dpo (sigmoid) and simpo: share of the pairs whose answers are assumed to be interchanged.",
        minimum=0,
        maximum=0.5,
        section=PREFERENCES,
    )
    simpo_gamma: float | None = setting(
        None,
        help="With --method simpo: margin of the rewards. Default: 0.5.",
        minimum=0,
        section=PREFERENCES,
    )
    desirable_weight: float | None = setting(
        None,
        help="With --method kto: weight of answers with the label true. Default: 1.",
        above=0,
        section=PREFERENCES,
    )
    undesirable_weight: float | None = setting(
        None,
        help="With --method kto: weight of answers with the label false. Default: 1.",
        above=0,
        section=PREFERENCES,
    )
    data_format: str = setting(
        AUTO,
        help="Shape of the examples. pairs: prompt, chosen, rejected. unpaired, with --method kto: prompt, completion, "
        "label. auto: recognize it in each example by its keys. Each of prompt, chosen, rejected and completion is a "
        "text or a list of messages; without a prompt, chosen and rejected are whole conversations.",
        choices=(AUTO, PAIRS, UNPAIRED),
        section=DATA,
    )
    field: tuple[str, ...] = setting(
        (),
        help="Other name of a key: --field chosen=preferred takes 'preferred' as the chosen answer. Repeat it for "
        "several.",
        section=DATA,
    )
    mock_data: bool = setting(False, help="Not used: random tokens have no preferences.", section=DATA, hidden=True)
    context_parallel_size: int | None = setting(
        None, help="Not used: the losses of align compare whole rows.", minimum=1, section=LAYOUT, hidden=True
    )
    train_also: tuple[str, ...] = setting(
        (), help="Not used: align trains adapters only.", choices=TRAINED_ALSO, section=LORA, hidden=True
    )
    router_aux_loss: float = setting(
        0.0, help="Not used: align does not train routers.", minimum=0, section=LORA, hidden=True
    )
    seq_length: int = setting(
        512,
        help="Tokens per row, which is a prompt with one answer. A longer one is refused, because a part of an answer "
        "would be compared with a whole one.",
        minimum=2,
        section=DATA,
    )
    micro_batch_size: int = setting(
        1,
        help="Pairs (with --method kto: answers) per process and forward pass. A pair is two rows.",
        minimum=1,
        section=DATA,
    )
    global_batch_size: int = setting(
        8,
        help="Pairs (with --method kto: answers) per iteration over all processes.",
        minimum=1,
        section=DATA,
    )
    pack: bool = setting(
        False,
        help="Pack several pairs, or with --method kto answers, into one row of --seq-length tokens, without attention "
        "between the answers. Batch sizes then count rows.",
        section=DATA,
    )
    lr: float = setting(2e-5, help="Peak learning rate, reached after the warmup.", above=0, section=OPTIMIZER)
    min_lr: float = setting(
        2e-6,
        help="Learning rate of the last iteration under --lr-scheduler cosine and linear.",
        minimum=0,
        section=OPTIMIZER,
    )

    @property
    def rows_per_sample(self) -> int:
        return rows_per_sample(self.method, pack=self.pack)

    @property
    def loss_name(self) -> str:
        return f"{self.method} loss"

    @property
    def has_reference(self) -> bool:
        """True if the loss compares the model with the base."""
        return self.method in WITH_REFERENCE

    @property
    def compares_with_adapter(self) -> bool:
        """True if the reference is the base with --init-adapter."""
        return self.init_adapter is not None and self.reference != BASE

    @property
    def reward_factor(self) -> float:
        """The value of --beta, or its default."""
        return DEFAULT_BETA.get(self.method, 0.1) if self.beta is None else self.beta

    def problems(self) -> list[str]:
        found = super().problems()
        if self.mock_data:
            found.append("--mock-data: expected --data-path; random tokens have no preferences")
        if self.train_also:
            found.append(
                "--train-also: align trains adapters only, since its reference is the base with the adapters off; "
                f"found {','.join(self.train_also)}"
            )
        given = {
            "--reference": (self.reference is not None, WITH_REFERENCE),
            "--loss-type": (self.loss_type is not None, (DPO,)),
            "--label-smoothing": (bool(self.label_smoothing), (DPO, SIMPO)),
            "--simpo-gamma": (self.simpo_gamma is not None, (SIMPO,)),
            "--desirable-weight": (self.desirable_weight is not None, (KTO,)),
            "--undesirable-weight": (self.undesirable_weight is not None, (KTO,)),
            "--data-format unpaired": (self.data_format == UNPAIRED, (KTO,)),
        }
        if self.method in METHODS:
            found += [
                f"{flag}: expected --method {' or '.join(methods)} with it; found --method {self.method}"
                for flag, (is_given, methods) in given.items()
                if is_given and self.method not in methods
            ]
        if self.label_smoothing and self.loss_type in (IPO, HINGE):
            found.append(f"--label-smoothing: expected --loss-type sigmoid with it; found {self.loss_type}")
        if self.label_smoothing == 0.5:
            found.append("--label-smoothing: expected less than 0.5, with which nothing is learned; found 0.5")
        return found
