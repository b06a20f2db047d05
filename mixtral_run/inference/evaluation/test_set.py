"""A test set in memory: its samples for the loss, and its questions with the answers that are expected."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.session import Session
from mixtral_run.train.data.cache.token_arrays import TokenArrays
from mixtral_run.train.data.reading.example import ASSISTANT, Example
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.data.templates.encoded import EncodedExample


@dataclass(frozen=True)
class Question:
    """An example whose last answer is to be generated. index: of its sample."""

    index: int
    place: str
    text: str
    reference: str
    row: tuple[int, ...]


@dataclass(frozen=True)
class TestSet:
    """Samples of all examples, questions of those that end with a text of the assistant, and lines for the user."""

    where: str
    samples: Samples
    questions: tuple[Question, ...]
    places: tuple[str, ...]
    remarks: tuple[str, ...]


def open_test_set(config: EvaluateConfig, session: Session) -> TestSet:
    """Read and encode the test data. Raises ConfigError with all problems."""
    options = ReadOptions.of(config)
    if config.skip_bad_examples:
        options = ReadOptions(options.data_format, options.fields, skip_bad_examples=True)
    stream = read_examples(config.data_path, options, "data_path")
    encoded: list[EncodedExample] = []
    questions: list[Question] = []
    places: list[str] = []
    for example in stream.examples():
        try:
            encoded.append(session.template.encode(example))
            questions += _questions(example, len(places), session)
            places.append(example.place)
        except ExampleProblem as error:
            del encoded[len(places) :]
            stream.problems.add(example.place, [error.problem])
            stream.counts_by_source[0] -= 1
    stream.raise_problems()
    longest = max(len(each.tokens) for each in encoded)
    # A sample of n tokens has n - 1 positions with a label.
    length = config.seq_length or max(2, min(longest - 1, session.base.architecture.max_position_embeddings))
    if length > session.base.architecture.max_position_embeddings:
        raise ConfigError(
            "--seq-length exceeds the model's positions.",
            expected=f"at most {session.base.architecture.max_position_embeddings:,}",
            found=f"{length:,}",
        )
    padding = int(session.tokenizer.eos_token_id)
    samples = Samples(TokenArrays.of(places, encoded), length, padding, stream.where)
    return TestSet(stream.where, samples, tuple(questions), tuple(places), tuple(stream.remarks()))


def _questions(example: Example, index: int, session: Session) -> list[Question]:
    """Return the question of an example; nothing for a plain text, and where the last message calls a tool."""
    if not example.messages or example.messages[-1].role != ASSISTANT or example.messages[-1].tool_calls:
        return []
    before, last = example.messages[:-1], example.messages[-1]
    row = session.template.prompt(before, example.tools)
    return [Question(index, example.place, before[-1].content, last.content, tuple(row))]
