"""`data check`: what a training run would make of data. One pass; memory grows by about 100 bytes an example."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mixtral_run.config.data import CheckConfig
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.train.data.check.check_encoding import CheckEncoding
from mixtral_run.train.data.check.length_count import LengthCount, Lengths
from mixtral_run.train.data.check.rendering import Rendered, rendered_example, rendered_messages
from mixtral_run.train.data.mixture import check_mixture, describe_mixture
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.reading.examples import (
    NUM_PROBLEMS_SHOWN,
    ExampleStream,
    ReadOptions,
    counted,
    read_examples,
)
from mixtral_run.train.data.reading.shapes import IS_PREFERENCE
from mixtral_run.train.data.split import split_by_digest
from mixtral_run.train.data.templates.encoded import EncodedExample
from mixtral_run.train.data.templates.encoding import content_digest as digest_of_split

NUM_RENDERED = 3
MOST_PROBLEMS = 1000
"""Lines about problems that --json lists. The screen has fewer."""
WITHOUT_TOKENS = (
    "No tokens are counted without the tokenizer of --load: chat template, lengths and vocabulary are not checked, for "
    "which a run may refuse examples."
)


@dataclass(slots=True)
class Spelled:
    """Examples whose texts spell a control token or a marker of the template.

    Attributes:
        token: its text.
        encoded_as: how those texts are encoded (templates/spelled_tokens.py).
        num_examples: that have it.
        places: the first of them.
    """

    token: str
    encoded_as: str
    num_examples: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(slots=True)
class CheckResult:
    """What was found.

    Attributes:
        num_bad: examples that the run would refuse, for whatever reason.
        problems: the first MOST_PROBLEMS lines about them, of num_problems.
        num_too_long: those of the examples that are refused for their length alone.
        lengths: None without a tokenizer.
        errors: the run would refuse the data as a whole.
    """

    sources: tuple[str, ...]
    seq_length: int
    method: str | None = None
    pack: bool = False
    num_examples: int = 0
    counts_by_shape: dict[str, int] = field(default_factory=dict)
    unused_keys: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    num_trimmed: int = 0
    num_duplicates: int = 0
    duplicates: list[str] = field(default_factory=list)
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    num_too_long: int = 0
    spelled: list[Spelled] = field(default_factory=list)
    lengths: Lengths | None = None
    rendered: list[Rendered] = field(default_factory=list)
    errors: list[MixtralRunError] = field(default_factory=list)

    def to_mapping(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        values = asdict(replace(self, errors=[]))
        del values["errors"]
        return {"ok": not self.num_bad and not self.errors, **values}


def check_data(
    config: CheckConfig, encoding: CheckEncoding | None, advance: Callable[[int], None] = lambda _: None
) -> CheckResult:
    """Read all data and return what was found. Problems of examples are in the result.

    Args:
        config: the sources; standard input is already copied to a file.
        encoding: gives the tokens of an example; None counts none, and cannot find examples that are too long.
        advance: called with 1 after each example.

    Raises:
        ConfigError: a file cannot be read, or there is no example at all.
    """
    stream = read_examples(config.data_path, ReadOptions.of(config), "data_path", num_kept=MOST_PROBLEMS)
    result = CheckResult(tuple(source.name for source in stream.sources), config.seq_length, config.method, config.pack)
    lengths = LengthCount(config)
    seen: set[bytes] = set()
    shown, spelled = _Shown(), _SpelledCount()
    digests = array("Q")
    for source, example in stream.numbered():
        advance(1)
        digest = content_digest(example)
        is_new = digest not in seen
        if not is_new:
            result.num_duplicates += 1
            result.duplicates += [example.place] if len(result.duplicates) < NUM_PROBLEMS_SHOWN else []
        seen.add(digest)
        answers = example.named_answers()
        encoded = None
        if encoding is not None:
            encoded = _encoded(encoding, answers, stream, source)
            if encoded is None:
                continue
            spelled.add(example.place, encoding, answers, encoded)
            if problem := lengths.add(example, encoded):
                stream.refuse(source, example.place, problem)
                result.num_too_long += 1
                continue
        if config.valid_fraction:
            digests.append(digest_of_split(example))
        if is_new:
            shown.offer(answers, encoded)
    _take_over(stream, result)
    result.rendered = [
        _rendered(each, encoded[number] if encoded is not None else None, encoding)
        for answers, encoded in shown.chosen()
        for number, each in enumerate(answers)
    ]
    if not result.num_examples and not result.num_bad:
        stream.raise_problems()
    result.spelled = spelled.result()
    result.lengths = lengths.result() if len(lengths.lengths) else None
    if encoding is None:
        result.remarks.append(WITHOUT_TOKENS)
    if not result.num_bad:
        _check_run(config, stream, digests, result)
    if encoding is not None and result.lengths is not None:
        try:
            encoding.check_ids(lengths.highest_id, stream.where)
        except MixtralRunError as error:
            result.errors.append(error)
    return result


def _check_run(config: CheckConfig, stream: ExampleStream, digests: array[int], result: CheckResult) -> None:
    """Check what the run makes of all examples together: validation split, and shares of the sources."""
    names, weights = [source.name for source in stream.sources], [source.weight for source in stream.sources]
    counts = list(stream.counts_by_source)
    try:
        if config.valid_fraction:
            fraction = config.valid_fraction
            training, validation = split_by_digest(np.frombuffer(digests, np.uint64), fraction, stream.where)
            counts = np.diff(np.searchsorted(training, np.cumsum([0, *counts]))).tolist()
            result.remarks.append(
                f"--valid-fraction {fraction:g}: {len(training):,} of the examples for training, {len(validation):,} "
                "for validation."
            )
        check_mixture(counts, weights)
        described = describe_mixture(names, counts, weights)
        result.remarks += [described + "."] if described else []
    except ConfigError as error:
        result.errors.append(error)


def content_digest(example: Example) -> bytes:
    """Return a hash of what an example holds, apart from its place."""
    messages = [
        (each.role, each.content, each.learned, each.tool_calls, each.tool_call_id, each.name)
        for each in (*example.messages, *(example.rejected or ()))
    ]
    content = json.dumps([messages, example.text, example.tools, example.label], default=str, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).digest()


def _encoded(
    encoding: CheckEncoding, answers: Sequence[Example], stream: ExampleStream, source: int
) -> list[EncodedExample] | None:
    """Return the tokens of an example's answers, or None and note a problem if the chat template does not take it."""
    found = []
    for answer in answers:
        try:
            found.append(encoding.encode(answer))
        except ConfigError as error:
            stream.refuse(source, answer.place, getattr(error, "problem", None) or error.what)
            return None
    return found


def _rendered(example: Example, encoded: EncodedExample | None, encoding: CheckEncoding | None) -> Rendered:
    if encoded is None or encoding is None:
        return rendered_messages(example)
    return rendered_example(example.place, encoded, encoding.decode, encoding.control_ids)


def _take_over(stream: ExampleStream, result: CheckResult) -> None:
    result.num_examples = sum(stream.counts_by_source)
    result.counts_by_shape = dict(stream.counts_by_shape.most_common())
    result.unused_keys = dict(stream.unused_keys.most_common())
    result.num_trimmed = stream.num_trimmed
    result.remarks = stream.remarks()
    result.num_bad = stream.problems.num_examples
    result.problems, result.num_problems = list(stream.problems.first), stream.problems.num_lines


class _Shown:
    """The first examples of each kind, of which a few are rendered: of different kinds if there are several."""

    def __init__(self) -> None:
        self._kinds: dict[object, list[tuple[Sequence[Example], list[EncodedExample] | None]]] = {}

    def offer(self, answers: Sequence[Example], encoded: list[EncodedExample] | None) -> None:
        roles = tuple(message.role for message in answers[0].messages[:4])
        kept = self._kinds.setdefault(roles, [])
        if len(kept) < NUM_RENDERED:
            kept.append((answers, encoded))

    def chosen(self) -> list[tuple[Sequence[Example], list[EncodedExample] | None]]:
        """Return the examples to render: the first of each kind, then the second of each, and so on."""
        rounds = itertools.zip_longest(*self._kinds.values())
        return [each for one in rounds for each in one if each is not None][:NUM_RENDERED]


class _SpelledCount:
    """Counts the examples whose texts spell a control token."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Spelled] = {}

    def add(
        self, place: str, encoding: CheckEncoding, answers: Sequence[Example], encoded: Sequence[EncodedExample]
    ) -> None:
        names: dict[str, str] = {}
        for answer, tokens in zip(answers, encoded, strict=True):
            names |= encoding.spelled(answer, tokens)
        for key in names.items():
            found = self._found.setdefault(key, Spelled(*key))
            found.num_examples += 1
            found.places += [place] if len(found.places) < NUM_PROBLEMS_SHOWN else []

    def result(self) -> list[Spelled]:
        return sorted(self._found.values(), key=lambda each: (-each.num_examples, each.token))


def problem_error(result: CheckResult) -> ConfigError:
    """Return the error for data with bad examples. Their problems are in the result, which is printed before it."""
    verb = "finetune" if result.method is None else "align"
    if result.method is None and result.problems and all(each.endswith(IS_PREFERENCE) for each in result.problems):
        return ConfigError(
            f"{counted(result.num_bad, 'example')} cannot be used, since finetune does not learn from preferences.",
            where=" ".join(result.sources),
            next_command=f"mixtral-run data check {shlex.join(result.sources)} --method dpo, with the other flags",
        )
    helps = ["correct them"] if result.num_too_long < result.num_bad else []
    if result.num_too_long and result.lengths is not None:
        helps.append(f"--seq-length {result.lengths.longest_row} or more for those that are too long")
    if result.num_examples:
        # If nothing else is left, there is nothing to train on.
        helps.append(f"mixtral-run {verb} … --skip-bad-examples, which leaves them out")
    return ConfigError(
        f"{counted(result.num_bad, 'example')} cannot be used.",
        where=" ".join(result.sources),
        next_command=", or ".join(helps),
    )
