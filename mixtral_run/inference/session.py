"""What generation, chat, evaluation and the proof of a server share: base, adapter, tokenizer and chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mixtral_run.config.data import AUTO_TEMPLATE
from mixtral_run.config.verbs.generate import InferenceConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.open_template import open_chat_template, own_template, template_of_adapter
from mixtral_run.train.data.templates.prompt import check_token_ids, load_tokenizer
from mixtral_run.train.load_model import load_for_inference
from mixtral_run.train.model_limits import length_problems
from mixtral_run.weights.adapter.given_adapter import PeftDescription, describe_given_adapter
from mixtral_run.weights.manifest.adapter_files import report_without_checksums
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription, check_adapter_fits, describe_base

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Session:
    """A base with or without an adapter, before its weights are loaded. warnings: lines about the chat template."""

    base: BaseDescription
    adapter: AdapterDescription | None
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    warnings: tuple[str, ...]

    def load(self, config: InferenceConfig, mesh: Mesh, report: Report) -> MixtralModel:
        """Load the model in evaluation mode, and report how long it took. All ranks must call."""
        started = time.perf_counter()
        if self.adapter is not None and not isinstance(self.adapter, PeftDescription):
            report_without_checksums(self.adapter.files, self.adapter.folder, report)
        model = load_for_inference(config, self.base, mesh, self.adapter, report)
        report.say(
            f"Loaded {config.load}{' with ' + str(config.adapter) if self.adapter else ''} "
            f"in {time.perf_counter() - started:.1f} s"
        )
        return model

    def check_rows(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raise an error if the model has no room or no embedding for prompts with that many new tokens."""
        check_token_ids(self.tokenizer, max(max(row) for row in rows), self.base.architecture.vocab_size,
                        self.base.tokenizer)  # fmt: skip
        longest = max(len(row) for row in rows) + max_new_tokens
        if longest > self.base.architecture.max_position_embeddings:
            raise ConfigError(
                "A prompt and its generated tokens exceed the model's positions.",
                expected=f"at most {self.base.architecture.max_position_embeddings} tokens",
                found=f"{longest} tokens",
                next_command="a smaller --max-new-tokens, or a shorter prompt",
            )
        too_long = length_problems("a prompt and --max-new-tokens, together", longest, self.base)
        if too_long:
            raise ConfigError("A prompt and its generated tokens exceed the model's window.", problems=too_long)


def open_session(config: InferenceConfig) -> Session:
    """Describe base and adapter, and open tokenizer and chat template. Raises ConfigError or WeightsError."""
    base = describe_base(config.load)
    adapter = describe_given_adapter(config.adapter, base.architecture) if config.adapter is not None else None
    if adapter is not None:
        check_adapter_fits(adapter, base)
    tokenizer = load_tokenizer(base.tokenizer)
    template, warnings = _template(config, adapter, tokenizer)
    return Session(base, adapter, tokenizer, template, tuple(warnings))


def _template(
    config: InferenceConfig, adapter: AdapterDescription | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[ChatTemplate, list[str]]:
    """Return the chat template, and what differs from the adapter's training."""
    if adapter is None or config.adapter is None:
        return open_chat_template(config.chat_template, tokenizer), []
    recorded, choice = adapter.chat_template, config.chat_template
    # What PEFT saved without the kit says nothing of a template, or has the files of the base's tokenizer.
    if isinstance(adapter, PeftDescription) and (
        recorded is None or (choice == AUTO_TEMPLATE and recorded == own_template(tokenizer))
    ):
        return open_chat_template(choice, tokenizer), []
    return template_of_adapter(choice, recorded, tokenizer, config.adapter)


def models_of(session: Session) -> tuple[str, ...]:
    """Return the models to evaluate: the base, and the base with the adapter."""
    return (BASE, ADAPTER) if session.adapter is not None else (BASE,)


def as_model(name: str, model: MixtralModel) -> AbstractContextManager[None]:
    """Return a context in which the model computes as the one of that name."""
    return without_adapters(model) if name == BASE else nullcontext()
