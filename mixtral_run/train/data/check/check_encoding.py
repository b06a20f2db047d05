"""Tokenizer and chat template of the run that `data check` is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.train.data.check.rendering import Decode
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.templates.encoded import EncodedExample

Encode = Callable[[Example], EncodedExample]


def _spells_nothing(example: Example, encoded: EncodedExample) -> Mapping[str, str]:  # noqa: ARG001
    return {}


def _all_ids_fit(highest_id: int, where: str) -> None:
    pass


@dataclass(frozen=True, eq=False)
class CheckEncoding:
    """The functions of a tokenizer with a chat template.

    Attributes:
        encode: returns the tokens of an example, or raises ExampleProblem.
        decode: returns the text of tokens.
        control_ids: ids of the control tokens.
        spelled: returns the control tokens that an example's texts spell, with how each is encoded.
        check_ids: raises WeightsError if the model has no row for the highest id of the data.
    """

    encode: Encode
    decode: Decode
    control_ids: frozenset[int] = frozenset()
    spelled: Callable[[Example, EncodedExample], Mapping[str, str]] = _spells_nothing
    check_ids: Callable[[int, str], None] = _all_ids_fit


def load_encoding(folder: Path, chat_template: str, vocab_size: int | None = None) -> CheckEncoding:
    """Return the encoding of a run.

    Args:
        folder: of the tokenizer.
        chat_template: of --chat-template.
        vocab_size: rows of the model's embedding; None checks no ids.

    Raises:
        MixtralRunError: the tokenizer or the template cannot be used.
    """
    from mixtral_run.train.data.templates.open_template import open_chat_template
    from mixtral_run.train.data.templates.prompt import check_token_ids, load_tokenizer
    from mixtral_run.train.data.templates.spelled_tokens import SpelledTokens

    tokenizer = load_tokenizer(folder)
    template = open_chat_template(chat_template, tokenizer)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False))

    def check_ids(highest_id: int, where: str) -> None:
        if vocab_size is not None:
            check_token_ids(tokenizer, highest_id, vocab_size, folder, where)

    return CheckEncoding(template.encode, decode, template.control_ids, SpelledTokens(template).find, check_ids)
