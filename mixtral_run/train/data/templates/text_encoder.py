"""Texts to token ids, in which a control token's text is either text or the token, as the caller decides.

Control tokens are those that steer a model: the special tokens of the tokenizer, and the added tokens that a template
writes. A user's text that contains `</s>` or `<|im_start|>` must not end or begin a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import WeightsError
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates.word_cache import WordCache, gives_the_same_ids

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Planes 15 and 16 of Unicode are for private use. A stand-in is as long as the token's text, so that places in a text
# stay the same: one character that names the token, and filling.
_TOKEN, _TEXT, _FILLING = 0xF0000, 0x100000, "\ufdd0"
_NOTHING = "(?!)"
"""A pattern that no text matches."""


class TextEncoder:
    """Encodes texts with a fast tokenizer as transformers does without `add_special_tokens`.

    It works on copies of the tokenizer: transformers switches settings of the original at every call.

    Args:
        tokenizer: the tokenizer.
        template: the text of a chat template. Added tokens that occur in it are control tokens, too.

    Raises:
        WeightsError: the tokenizer has no tokenizer.json and none can be made of its files.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise WeightsError(
                "The tokenizer has no tokenizer.json.",
                where=str(tokenizer.name_or_path),
                expected="a tokenizer that transformers reads as a fast one",
                found=type(tokenizer).__name__,
                next_command="put the tokenizer.json of the model's repository next to the tokenizer's other files",
            )
        self.definition: str = backend.to_str()
        self.control: Mapping[str, int] = {
            token.content: number
            for number, token in sorted(tokenizer.added_tokens_decoder.items())
            if (token.special or token.content in template) and token.content.strip()
        }
        self._added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._in_text = dict(zip(self.control, map(chr, count(_TEXT)), strict=False))
        self._in_tokens = dict(zip(self.control, map(chr, count(_TOKEN)), strict=False))
        self._shown = {character: name for name, character in self._in_text.items()}
        longest_first = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or _NOTHING)
        self._hidden = re.compile(f"(?:{'|'.join(self._shown) or _NOTHING}){_FILLING}*")
        self._as_text, self._ids = self._tokenizer_with_stand_ins()

    @cached_property
    def _plain(self) -> Tokenizer:
        return _copied(self.definition)

    @cached_property
    def _words(self) -> WordCache | None:
        return WordCache(self.definition) if gives_the_same_ids(self.definition) else None

    @cached_property
    def _not_by_words(self) -> re.Pattern[str]:
        """A pattern of texts with stand-ins, surrogates, or added tokens that are not control tokens."""
        others = [re.escape(content) for content in self._added.values() if content and content not in self.control]
        return re.compile("|".join(["[\ud800-\udfff\U000f0000-\U0010ffff]", *others]))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are plain text.

        Raises ExampleProblem for a text with the stand-in of a control token.
        """
        if self._words is not None and self._not_by_words.search(text) is None:
            return self._words.text_ids(text)
        ids: list[int] = _encoded(self._as_text, text).ids
        if not self._stand_in_ids.isdisjoint(ids):
            raise ExampleProblem(
                "a text contains characters of Unicode's plane 15, which stand for control tokens here"
            )
        return [self._ids.get(number, number) for number in ids] if self._ids else ids

    def has_control(self, text: str) -> bool:
        """Return True if a text contains the text of a control token."""
        return self._pattern.search(text) is not None

    def hide(self, text: str) -> str:
        """Return a text of the same length in which control tokens are replaced by stand-ins, for `encode`."""
        return self._pattern.sub(lambda found: self._stand_in_of_text(found[0]), text)

    def show(self, text: str) -> str:
        """Undo `hide`."""
        return self._hidden.sub(lambda found: self._shown[found[0][0]], text)

    def encode(self, text: str, *, hidden: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the places [begin, end) of the tokens in `text`.

        Control tokens in the text become tokens. hidden: stand-ins of `hide` in the text become plain text. Raises
        ExampleProblem if that cannot be told apart.
        """
        if not hidden:
            encoding = _encoded(self._plain, text)
            return encoding.ids, encoding.offsets
        marked, num_tokens = self._pattern.subn(lambda found: self._stand_in_of_token(found[0]), text)
        encoding = _encoded(self._as_text, self.show(marked))
        ids: list[int] = encoding.ids
        if sum(number in self._stand_in_ids for number in ids) != num_tokens:
            # As with `normalized: true`, with which a token is found at the begin of a word only.
            raise ExampleProblem("a text contains a control token, and the tokenizer does not find all those around it")
        return [self._ids.get(number, number) for number in ids], encoding.offsets

    def is_added(self, number: int, text: str) -> bool:
        """Return True if an id is that of an added token, and stands for its text: bytes have ids as well."""
        return self._added.get(number) == text.strip()

    def _stand_in_of_text(self, name: str) -> str:
        return self._in_text[name] + _FILLING * (len(name) - 1)

    def _stand_in_of_token(self, name: str) -> str:
        return self._in_tokens[name] + _FILLING * (len(name) - 1)

    def _tokenizer_with_stand_ins(self) -> tuple[Tokenizer, dict[int, int]]:
        """Return a copy in which stand-ins take the place of control tokens, and the ids that its other ids stand for.

        An added token that is not in the model's vocabulary may get another id in the copy.
        """
        values: dict[str, Any] = json.loads(self.definition)
        numbers = {}
        for token in values.get("added_tokens", ()):
            if token["content"] in self.control:
                token["content"] = self._stand_in_of_token(token["content"])
            numbers[token["content"]] = token["id"]
        # The post-processor refers to control tokens by their texts, and is not used.
        values["post_processor"] = None
        copy = _copied(json.dumps(values))
        self._stand_in_ids = {copy.token_to_id(self._stand_in_of_token(name)) for name in self.control}
        found = {copy.token_to_id(text): number for text, number in numbers.items()}
        return copy, {copied: number for copied, number in found.items() if copied not in (None, number)}


def _encoded(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        # Half of a surrogate pair, which also a command line has that is not UTF-8.
        raise ExampleProblem(f"a text cannot be written as UTF-8: {text[:40]!a}") from error


def _copied(definition: str) -> Tokenizer:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(definition)
    copy.no_truncation()
    copy.no_padding()
    return copy


def texts_of(value: object) -> Iterable[str]:
    """Yield all texts of JSON values, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts_of(each)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return JSON values with `change` applied to their texts, except for roles and the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each if key == "role" else mapped(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(each, change) for each in value)
    return value
