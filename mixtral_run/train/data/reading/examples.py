"""Examples of all sources of a setting: files to records, records to examples. They stream, in bounded memory.

All problems are reported in one error after the last record, or counted with --skip-bad-examples.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mixtral_run.config.data import AUTO, DPO, KTO, PAIRS, UNPAIRED, DataConfig, ExampleConfig
from mixtral_run.config.data_sources import DataSource, parse_source
from mixtral_run.config.fields import flag_of
from mixtral_run.errors import ConfigError, MixtralRunError, joined
from mixtral_run.train.data.reading.data_files import DataFile, files_of
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.reading.preferences import PREFERENCE_LINES, convert_preference
from mixtral_run.train.data.reading.records import BadRecord, Record
from mixtral_run.train.data.reading.shapes import IS_PREFERENCE, REQUIRED, Converted, convert, value_at

NUM_PROBLEMS_SHOWN = 10
EXAMPLE_LINES = (
    '{"instruction": "What is 7 times 8?", "response": "56"}',
    '{"messages": [{"role": "user", "content": "What is 7 times 8?"}, {"role": "assistant", "content": "56"}]}',
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How records become examples.

    Attributes:
        data_format: a shape, or auto.
        fields: the record's key for each key of a shape that has another name there.
        skip_bad_examples: leave bad examples out instead of raising.
        preferences: pairs or unpaired, if the examples are preferences (preferences.py).
    """

    data_format: str = AUTO
    fields: Mapping[str, str] = field(default_factory=dict)
    skip_bad_examples: bool = False
    preferences: str | None = None

    @classmethod
    def of(cls, config: ExampleConfig) -> ReadOptions:
        """Return the options that a config sets."""
        pairs = [pair.partition("=") for pair in config.field]
        skip = isinstance(config, DataConfig) and config.skip_bad_examples
        return cls(config.data_format, {name: key for name, _, key in pairs}, skip, config.preferences)


class Problems:
    """The first problems, and the number of bad examples. More are not kept, so that memory stays bounded.

    num_kept: how many lines are kept.
    """

    def __init__(self, num_kept: int = NUM_PROBLEMS_SHOWN) -> None:
        self._num_kept = num_kept
        self.first: list[str] = []
        self.num_lines = 0
        self.num_examples = 0

    def add(self, place: str, lines: Sequence[str]) -> None:
        self.num_examples += 1
        self.num_lines += len(lines)
        free = self._num_kept - len(self.first)
        self.first += [f"{place}: {line}" if place else line for line in lines[:free]]

    def lines(self) -> list[str]:
        """Return the first ten problems and, if there are more, their number."""
        shown = self.first[:NUM_PROBLEMS_SHOWN]
        more = self.num_lines - len(shown)
        return [*shown, f"and {more:,} more"] if more else shown


class ExampleStream:
    """The examples of the sources in their order. Each iteration reads the files anew, in bounded memory.

    After the end of an iteration:

    Attributes:
        problems: of bad examples.
        unused_keys: keys that are not used, with the number of examples that have them.
        counts_by_shape: number of examples of each shape.
        counts_by_source: number of examples of each source, in the order of `sources`.
        num_trimmed: conversations of which the end was trimmed: messages after the assistant's last one.
        adjacent: conversations with adjacent messages of one role: their number, and the first places.
        notes: lines about files that were left out.
        empty: names of files without a record.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        options: ReadOptions,
        setting: str,
        num_kept: int = NUM_PROBLEMS_SHOWN,
    ) -> None:
        self._num_kept = num_kept
        self.sources = tuple(sources)
        self.options = options
        self._setting = setting
        self._reset()

    def _reset(self) -> None:
        self.problems = Problems(self._num_kept)
        self.unused_keys: Counter[str] = Counter()
        self.counts_by_shape: Counter[str] = Counter()
        self.counts_by_source = [0] * len(self.sources)
        self.num_trimmed = 0
        self.adjacent = Problems()
        self.notes: list[str] = []
        self.empty: list[str] = []
        self._missing_fields = dict(self.options.fields)

    @property
    def where(self) -> str:
        """The flag and its sources, for errors."""
        return where_of(self._setting, *(source.name for source in self.sources))

    def __iter__(self) -> Iterator[Example]:
        """Yield the good examples. At the end raise ConfigError with all problems, unless bad ones are left out."""
        yield from self.examples()
        self.raise_problems()

    def examples(self) -> Iterator[Example]:
        """Yield the good examples. Raises ConfigError at the end only for files that cannot be read."""
        self._reset()
        errors: list[MixtralRunError] = []
        found: list[tuple[int, DataFile]] = []
        for number, source in enumerate(self.sources):
            try:
                files = files_of(source, self._where(source))
            except MixtralRunError as error:
                errors.append(error)
                continue
            found += [(number, file) for file in files.files]
            if files.left_out:
                self.notes.append(f"{source.name} {files.left_out}.")
        several = len(found) > 1
        for number, file in found:
            try:
                record = None
                for record in file.records(self._where(file.source, file.name)):
                    example = self._example(record, f" of {file.name}" if several else "")
                    if example is not None:
                        self.counts_by_source[number] += 1
                        yield example
                self.empty += [file.name] if record is None else []
            except MixtralRunError as error:
                errors.append(error)
        if self._missing_fields and self._setting == "data_path" and not errors and len(self.empty) < len(found):
            # The record's own key of that name would be learned in its place.
            errors.append(self._no_such_fields())
        if errors:
            if self.problems.num_examples and not self.options.skip_bad_examples:
                errors.append(self._error())
            raise joined(errors)

    def numbered(self) -> Iterator[tuple[int, Example]]:
        """Yield `examples`, each with the number of its source."""
        for example in self.examples():
            # Sources follow each other, so that the last one with an example is the example's.
            yield max(number for number, count in enumerate(self.counts_by_source) if count), example

    def refuse(self, source: int, place: str, problem: str) -> None:
        """Take back an example that was yielded, and add its problem. source: its number."""
        self.problems.add(place, [problem])
        self.counts_by_source[source] -= 1

    def check(self) -> None:
        """Read everything. Raises ConfigError with all problems."""
        for _ in self:
            pass

    def raise_problems(self) -> None:
        """Raise ConfigError if examples are bad and are not left out, or if there is no example at all."""
        if self.problems.num_examples and not self.options.skip_bad_examples:
            raise self._error()
        if not any(self.counts_by_source):
            left, texts = self.problems.num_examples, [source.text for source in self.sources]
            raise ConfigError(
                f"The {self._what} data contain no {'usable ' if left else ''}example.",
                where=self.where,
                problems=self.problems.lines(),
                expected=f"a JSON object a line: {' or '.join(self._example_lines)}",
                found=f"{left:,} that cannot be used" if left else "an empty file",
                next_command=f"mixtral-run data check {shlex.join(texts)}{self._method}"
                if left
                else "the same command with a file that contains examples",
            )

    def _no_such_fields(self) -> ConfigError:
        return ConfigError(
            "No record has the keys that --field names.",
            where=self.where,
            problems=[f"--field {name}={key}: found no key {key!r}" for name, key in self._missing_fields.items()],
            next_command=f"mixtral-run data check{self._method}, without --field, which reports the keys",
        )

    def remarks(self) -> list[str]:
        """Return lines about everything that is not learned: for the user, after the end of an iteration."""
        return self.notes + self.remarks_on_content()

    def remarks_on_content(self) -> list[str]:
        """Return those of the lines that depend on the content of the files only."""
        found = []
        if self.empty:
            shown = ", ".join(self.empty[:NUM_PROBLEMS_SHOWN]) + (", …" if self.empty[NUM_PROBLEMS_SHOWN:] else "")
            found.append(f"{counted(len(self.empty), 'file')} without a record: {shown}.")
        if self.unused_keys:
            found.append(f"{_unused(self.unused_keys)} Their texts are not trained on.")
        if self.num_trimmed:
            found.append(
                f"{counted(self.num_trimmed, 'conversation')} {'does' if self.num_trimmed == 1 else 'do'} not end with "
                "the assistant: what follows its last answer is left out."
            )
        if self.adjacent.num_examples:
            places = "; ".join(self.adjacent.first) + "; …" * (self.adjacent.num_lines > NUM_PROBLEMS_SHOWN)
            found.append(
                f"{counted(self.adjacent.num_examples, 'conversation')} "
                f"{'has' if self.adjacent.num_examples == 1 else 'have'} adjacent messages of one role ({places}): "
                "Mixtral-Instruct's form joins them with an empty line, a Jinja template gets them as they are."
            )
        if self.problems.num_examples and self.options.skip_bad_examples:
            first = self.problems.first[:NUM_PROBLEMS_SHOWN]
            places = "; ".join(first)
            more = self.problems.num_lines - len(first)
            found.append(
                f"{counted(self.problems.num_examples, 'example')} left out, as not usable: {places}"
                f"{f'; and {more:,} more' if more else ''}."
            )
        return found

    def _example(self, record: Record | BadRecord, of: str) -> Example | None:
        """Return the example of a record, or None, and count."""
        place = record.place + of
        if self._missing_fields and isinstance(record, Record):
            for name in [
                name for name, key in self._missing_fields.items() if value_at(record.values, key) is not None
            ]:
                del self._missing_fields[name]
        if isinstance(record, BadRecord):
            self.problems.add(place, [record.problem])
            return None
        try:
            found = self._converted(record)
        except RecursionError:
            found = Converted(problems=["nested too deeply"])
        if found.problems:
            column = _surrogate_column(record.line) if any("surrogate" in each for each in found.problems) else ""
            self.problems.add(place, [each + (column if "surrogate" in each else "") for each in found.problems])
            return None
        self.unused_keys.update(found.unused)
        self.counts_by_shape[str(found.shape)] += 1
        self.num_trimmed += found.num_trimmed > 0
        if found.num_adjacent:
            self.adjacent.add("", [place])
        return Example(place, found.messages, found.text, found.tools, found.rejected, found.label)

    def _error(self) -> ConfigError:
        total = self.problems.num_examples + sum(self.counts_by_source)
        return ConfigError(
            f"Some {self._what} data cannot be used.",
            where=self.where,
            problems=self.problems.lines(),
            expected=_expected(self.options),
            found=f"{self.problems.num_examples:,} of {counted(total, 'example')} that cannot be used",
            next_command=self._next_step(self.problems.num_examples < total),
        )

    def _next_step(self, others_are_left: bool) -> str:
        lines = self.problems.first
        if lines and all(each.endswith(IS_PREFERENCE) for each in lines):
            return "mixtral-run align --method dpo …, which learns from preferences"
        # If nothing else is left, there is nothing to train on.
        return "correct them" + (", or --skip-bad-examples to leave them out" if others_are_left else "")

    def _converted(self, record: Record) -> Converted:
        options = self.options
        if options.preferences is not None:
            return convert_preference(record.values, options.preferences, options.data_format, options.fields)
        return convert(record.values, options.data_format, options.fields)

    @property
    def _method(self) -> str:
        """Return the flag of `data check` for the same examples."""
        return {None: "", PAIRS: f" --method {DPO}", UNPAIRED: f" --method {KTO}"}[self.options.preferences]

    @property
    def _example_lines(self) -> Sequence[str]:
        return EXAMPLE_LINES if self.options.preferences is None else PREFERENCE_LINES[self.options.preferences]

    @property
    def _what(self) -> str:
        return "validation" if self._setting == "valid_data_path" else "training"

    def _where(self, source: DataSource, name: str | None = None) -> str:
        inside = f" ({name})" if name and not source.on_hub and source.path.name != name else ""
        return where_of(self._setting, source.name) + inside


def read_examples(
    sources: Iterable[str],
    options: ReadOptions | None = None,
    setting: str = "data_path",
    *,
    num_kept: int = NUM_PROBLEMS_SHOWN,
) -> ExampleStream:
    """Return the examples of sources, as `--data-path` names them.

    setting: the setting, for errors. num_kept: problems that are kept.
    """
    return ExampleStream([parse_source(text) for text in sources], options or ReadOptions(), setting, num_kept)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 example", "2,000 examples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def where_of(setting: str, *texts: str) -> str:
    """Return `--data-path FILE`, the place that errors name."""
    return f"{flag_of(setting)} {' '.join(texts)}"


def _expected(options: ReadOptions) -> str:
    if options.preferences is not None:
        return " or ".join(PREFERENCE_LINES[options.preferences])
    if options.data_format != AUTO:
        return f"examples of the shape {options.data_format}: {', '.join(REQUIRED[options.data_format])}"
    return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in REQUIRED.items())


def _unused(keys: Counter[str]) -> str:
    shown = keys.most_common(NUM_PROBLEMS_SHOWN)
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return (
        "Keys that are not used, with the number of examples: "
        + ", ".join(f"{key[:80]!r} ({count:,})" for key, count in shown)
        + f"{more}."
    )


def _surrogate_column(line: str | None) -> str:
    """Return the column of the escape of half a surrogate pair in a line of JSON, if only one place can be meant."""
    if line is None:
        return ""
    columns, high = [], None
    for escape in _ESCAPE.finditer(line):
        code = int(escape[1], 16) if escape[1] else 0
        if high is not None and 0xDC00 <= code < 0xE000 and escape.start() == high + 6:
            columns.pop()
            high = None
            continue
        high = escape.start() if 0xD800 <= code < 0xDC00 else None
        if 0xD800 <= code < 0xE000:
            columns.append(escape.start() + 1)
    return f" (column {columns[0]} of the line)" if len(columns) == 1 else ""
