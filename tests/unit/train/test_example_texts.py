"""Examples for the report of a run."""

from mixtral_run.train.data.samples import MockSamples
from mixtral_run.train.outcome.example_texts import Decode, example_texts


def no_tokenizer() -> Decode:
    raise AssertionError("opening a tokenizer takes seconds, and mock data have no text")


def test_mock_data_have_no_examples_and_open_no_tokenizer() -> None:
    assert example_texts(MockSamples(100, 8, 1), no_tokenizer, 3) == []
