"""Choice of the chat template: `--chat-template auto|mixtral|FILE`, or the one that an adapter's manifest records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_run.config.data import AUTO_TEMPLATE, CHAT_TEMPLATES, MIXTRAL_TEMPLATE
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.jinja_template import JinjaTemplate
from mixtral_run.train.data.templates.mixtral_form import MixtralForm
from mixtral_run.train.data.templates.template_sandbox import SandboxedTemplate, TemplateFailed
from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.weights.manifest.template_record import OF_TOKENIZER, TemplateRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FLAG = "--chat-template"


def open_chat_template(choice: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the template that --chat-template chooses.

    Args:
        choice: "auto": the tokenizer's own template, or Mixtral-Instruct's form if it has none; "mixtral"; or a file.
        tokenizer: of the model, from `load_tokenizer`.

    Raises:
        ConfigError: the file or the tokenizer's template cannot be used.
        WeightsError: the tokenizer cannot be used.
    """
    if choice == MIXTRAL_TEMPLATE:
        return template_of(TemplateRecord(MIXTRAL_TEMPLATE), tokenizer)
    if choice != AUTO_TEMPLATE:
        return template_of(TemplateRecord(Path(choice).name, _read(Path(choice))), tokenizer, f"{FLAG} {choice}")
    record = own_template(tokenizer)
    if record is None:
        return template_of(TemplateRecord(MIXTRAL_TEMPLATE), tokenizer)
    if "[INST]" in (record.text or ""):
        # The form's tokens equal mistral-common's, which those of the Jinja template do not with every tokenizer.json.
        form = template_of(TemplateRecord(MIXTRAL_TEMPLATE), tokenizer)
        if isinstance(form, MixtralForm) and _writes_mixtral_form(record, tokenizer, form):
            return form
    return template_of(record, tokenizer)


def template_of_adapter(
    choice: str, recorded: TemplateRecord | None, tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> tuple[ChatTemplate, list[str]]:
    """Return the template for generation with an adapter, and what differs from the adapter's training.

    Args:
        choice: of --chat-template. "auto" is the template that the adapter was trained with.
        recorded: the template in the adapter's manifest. None: a version of the kit that knew Mixtral-Instruct's form
            only saved it.
        tokenizer: of the base.
        adapter: its folder.

    Raises:
        ConfigError, WeightsError: as `open_chat_template`.
    """
    trained = recorded or TemplateRecord(MIXTRAL_TEMPLATE)
    if choice != AUTO_TEMPLATE:
        template = open_chat_template(choice, tokenizer)
        if template.record.fingerprint == trained.fingerprint:
            return template, []
        return template, [f"{FLAG} {choice}: the adapter was trained with another chat template, {trained.name!r}"]
    template = template_of(trained, tokenizer, f"chat template in {adapter}")
    own = open_chat_template(AUTO_TEMPLATE, tokenizer).record if trained.name == OF_TOKENIZER else trained
    if own.fingerprint == trained.fingerprint:
        return template, []
    return template, [
        f"{adapter} was trained with another chat template than the tokenizer of the base has; the adapter's is used"
    ]


def file_problems(choice: str) -> list[str]:
    """Return the reason why the file of --chat-template cannot be read; an empty list if it can, or is none."""
    try:
        if choice not in CHAT_TEMPLATES:
            _read(Path(choice))
    except ConfigError as error:
        return [f"{error.where}: expected {error.expected}; found {error.found}"]
    return []


def template_of(record: TemplateRecord, tokenizer: PreTrainedTokenizerBase, where: str | None = None) -> ChatTemplate:
    """Return a recorded template with a tokenizer. Raises as `open_chat_template` does. where: for errors."""
    bos_id, eos_id = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    if record.text is None:
        return MixtralForm(TextEncoder(tokenizer), bos_id, eos_id)
    encoder = TextEncoder(tokenizer, record.text + (record.tools_text or ""))
    return JinjaTemplate(record, encoder, tokenizer.special_tokens_map, bos_id, eos_id, where or _place(tokenizer))


def _place(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"chat template of {tokenizer.name_or_path}"


def own_template(tokenizer: PreTrainedTokenizerBase) -> TemplateRecord | None:
    """Return the tokenizer's own template, None if it has none. Raises ConfigError if it has several and no default."""
    try:
        return TemplateRecord.of_tokenizer(tokenizer.chat_template)
    except ValueError as error:
        raise ConfigError(
            "The tokenizer has several chat templates, and none is its default.",
            where=str(tokenizer.name_or_path),
            expected="one with the name 'default'",
            found=", ".join(sorted(tokenizer.chat_template)),
            next_command=f"the same with {FLAG} FILE, a file with one of them; or {FLAG} {MIXTRAL_TEMPLATE}",
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The chat template cannot be read.",
            where=f"{FLAG} {path}",
            expected=f"{AUTO_TEMPLATE}, {MIXTRAL_TEMPLATE}, or a file with a Jinja template, in UTF-8",
            found=getattr(error, "strerror", None) or str(error),
        ) from error


def _writes_mixtral_form(record: TemplateRecord, tokenizer: PreTrainedTokenizerBase, form: MixtralForm) -> bool:
    """Return True if a template writes Mixtral-Instruct's form, apart from blanks that differ between releases.

    It is rendered, not compared as a text: fine-tunes contain it in many spellings.
    """
    if (form.is_v3 and not form.adds_blank) or (record.tools_text and not form.is_v3):
        return False
    question = r"\[INST\] ?{0} ?\[/INST\]" if form.is_v3 else r"\[INST\] {0} \[/INST\]"
    bos, eos = re.escape(str(tokenizer.bos_token)), re.escape(str(tokenizer.eos_token))
    conversation = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]

    def pattern(first: str, second: str) -> str:
        turns = [rf" ?{question.format(text)} ?{answer}{eos}" for text, answer in ((first, "A1"), (second, "A2"))]
        return rf"{bos}{''.join(turns)} ?"

    template = SandboxedTemplate(record.text or "", _place(tokenizer), tokenizer.special_tokens_map)
    with_system = pattern("Q1", r"S\n\nQ2") if form.is_v3 else pattern(r"S\n\nQ1", "Q2")
    # The first releases refuse a system message.
    return _renders(template, conversation, pattern("Q1", "Q2")) and _renders(
        template, [("system", "S"), *conversation], with_system, may_fail=True
    )


def _renders(
    template: SandboxedTemplate, conversation: list[tuple[str, str]], pattern: str, *, may_fail: bool = False
) -> bool:
    messages = [{"role": role, "content": text} for role, text in conversation]
    try:
        with template.bounded():
            text = template.render(messages, None, add_generation_prompt=False).text
    except TemplateFailed:
        return may_fail
    return re.fullmatch(pattern, text) is not None
