"""The samples of a run from examples that are tokenized already: which are used, for what, and what is reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_run.config.data_sources import DataSource
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.train.data.cache.cached_examples import CachedExamples
from mixtral_run.train.data.packing import PackedSamples
from mixtral_run.train.data.preferences import PreferenceSamples
from mixtral_run.train.data.samples import MockSamples, Samples
from mixtral_run.train.data.sources import TrainingData, _mixed, _training_data
from tests.support.samples import arrays_by_hand

BASE: Any = SimpleNamespace(architecture=SimpleNamespace(vocab_size=50))


def finetune(**changes: Any) -> FinetuneConfig:
    given: dict[str, Any] = {"load": Path("b"), "save": Path("s"), "data_path": ("x",), "seq_length": 5, **changes}
    return FinetuneConfig(**given)


def align(method: str, **changes: Any) -> AlignConfig:
    given: dict[str, Any] = {
        "load": Path("b"),
        "save": Path("s"),
        "data_path": ("x",),
        "seq_length": 5,
        "method": method,
        **changes,
    }
    return AlignConfig(**given)


def examples(name: str, *lengths: int, prompt: int = 1, rows_each: int = 1, **more: Any) -> CachedExamples:
    """Examples of so many tokens, which are numbered, each after a prompt of `prompt` tokens. 0: no answer."""
    encoded = [
        ([number] * each, [(min(prompt, each - 1), each)] if each else []) for number, each in enumerate(lengths)
    ]
    arrays = arrays_by_hand(*encoded, rows_each=rows_each, digests=more.pop("digests", ()))
    cache: Any = SimpleNamespace(arrays=arrays, folder=Path("cache"), identity=f"identity of {name}")
    given: dict[str, Any] = {
        "sources": (DataSource(name, name),),
        "counts": (len(lengths) // rows_each,),
        "remarks": (),
        **more,
    }
    return CachedExamples(
        cache, f"--data-path {name}", given["sources"], given["counts"], given["remarks"], 2, f"sha256 of {name}",
        {"name": f"template of {name}"}, rows_each,
    )  # fmt: skip


def data_of(config: Any, **opened: CachedExamples) -> TrainingData:
    return _training_data(config, BASE, opened)


def numbers_of(samples: Any) -> list[int]:
    """The number of each example, which is the id of its tokens."""
    return [int(samples.row(index).tokens[0]) for index in range(len(samples))]


def test_examples_are_padded_or_packed_as_the_run_wants() -> None:
    given = examples("x", 3, 4, 2)
    alone, packed = data_of(finetune(), data_path=given), data_of(finetune(pack=True), data_path=given)
    assert type(alone.samples) is Samples and alone.num_samples == 3
    assert type(packed.samples) is PackedSamples and packed.num_samples == 2
    assert (alone.sha256, alone.identity, alone.validation) == ("sha256 of x", "identity of x", None)
    assert alone.chat_template == {"name": "template of x"} and alone.remarks == ()


def test_training_and_validation_data_together() -> None:
    training = examples("t", 3, 4, 2, digests=[11, 12, 13], remarks=("odd",))
    validation = examples("v", 3, 3, 3, digests=[13, 99, 11], remarks=("even",))
    data = data_of(finetune(), data_path=training, valid_data_path=validation)
    assert len(data.samples) == 3 and data.validation is not None and len(data.validation) == 3  # type: ignore[arg-type]
    assert (data.sha256, data.identity) == ("sha256 of t", "identity of t identity of v")
    assert data.chat_template == {"name": "template of t"}
    assert data.remarks == (
        "--data-path t: odd",
        "--data-path v: even",
        "--data-path v: 2 of 3 examples are in the training data as well; their loss does not show how the model does "
        "on new data.",
    )
    other = examples("v", 3, 3, 3, digests=[14, 99, 15])
    assert data_of(finetune(), data_path=training, valid_data_path=other).remarks == ("--data-path t: odd",)


def test_mock_data_beside_a_validation_set() -> None:
    data = data_of(finetune(seed=7), valid_data_path=examples("v", 3, 3))
    assert isinstance(data.samples, MockSamples) and data.num_samples is None
    assert data.samples.describe() == "mock data: random tokens below 50, seq_length 5"
    assert np.array_equal(data.samples.row(3).tokens, MockSamples(50, 5, 7).row(3).tokens)
    assert data.validation is not None and len(data.validation) == 2
    assert (data.sha256, data.chat_template, data.identity, data.remarks) == (None, None, "identity of v", ())


def test_examples_that_are_too_long_are_left_out_on_request() -> None:
    """Responses begin behind 6 tokens, which a row of 5 does not reach, in three of six."""
    given = examples("x", 3, 9, 4, 8, 9, 2, prompt=6)
    data = data_of(finetune(skip_bad_examples=True), data_path=given)
    assert numbers_of(data.samples) == [0, 2, 5]
    assert data.remarks == (
        "--data-path x: 3 examples are longer than --seq-length 5 before their response begins, and are left out.",
    )
    # Those of a validation set too; the others are whole.
    both = data_of(
        finetune(skip_bad_examples=True),
        data_path=examples("x", 3, 4, digests=[1, 2]),
        valid_data_path=examples("v", 9, 3, 9, 4, 9, prompt=6, digests=[3, 4, 5, 6, 7]),
    )
    assert numbers_of(both.samples) == [0, 1] and numbers_of(both.validation) == [1, 3]
    assert [each.split(" before")[0] for each in both.remarks] == [
        "--data-path v: 3 examples are longer than --seq-length 5"
    ]
    with pytest.raises(ConfigError) as caught:
        data_of(finetune(skip_bad_examples=True), data_path=examples("x", 9, 8, prompt=6))
    assert caught.value.what == (
        "No example is left: all 2 are longer than --seq-length 5 before their response begins."
    )
    assert (caught.value.where, str(caught.value.next_command)[:22]) == ("--data-path x", "a larger --seq-length;")


def test_problems_of_both_sets_are_in_one_error() -> None:
    with pytest.raises(MixtralRunError) as caught:
        data_of(finetune(), data_path=examples("x", 9, prompt=6), valid_data_path=examples("v", 8, 3, prompt=6))
    text = str(caught.value)
    assert "1 of 1 example is" in text and "1 of 2 examples is" in text


def test_a_part_is_held_back_of_what_is_left() -> None:
    """The halves of all 64-bit numbers: those of even examples are below, the last two examples are too long."""
    low, high = 5, 2**63 + 5
    given = examples("x", 3, 3, 4, 4, 9, 9, prompt=6, digests=[low, high, low + 1, high + 1, low + 2, high + 2])
    data = data_of(finetune(skip_bad_examples=True, valid_fraction=0.5), data_path=given)
    assert numbers_of(data.validation) == [0, 2] and numbers_of(data.samples) == [1, 3]
    whole = data_of(finetune(valid_fraction=0.5), data_path=examples("x", 3, 3, 4, digests=[high, low, high]))
    assert numbers_of(whole.validation) == [1] and numbers_of(whole.samples) == [0, 2]
    with pytest.raises(ConfigError, match="leaves no example for validation"):
        data_of(finetune(valid_fraction=0.5), data_path=examples("x", 3, 3, digests=[high, high]))


def weighted(*weights: float | None) -> tuple[DataSource, ...]:
    return tuple(DataSource(name, name, weight=weight) for name, weight in zip("abc", weights, strict=False))


def test_shares_are_those_of_the_examples_that_are_used() -> None:
    """Two examples each are left of two sources of 3 and 4, and the second has twice the weight: each twice."""
    given = examples("x", 3, 9, 4, 9, 9, 3, 2, prompt=6, sources=weighted(1.0, 2.0), counts=(3, 4))
    data = data_of(finetune(skip_bad_examples=True), data_path=given)
    assert numbers_of(data.samples) == [0, 2, 5, 6, 5, 6]
    assert data.remarks[1:] == (
        "An epoch takes a: 2 examples, 33.3% of the samples, each 1.0 times; b: 2 examples, 66.7% of the samples, "
        "each 2.0 times",
    )
    whole = examples("x", 3, 3, 4, sources=weighted(1.0, 1.0), counts=(1, 2))
    found = _mixed(whole, None, [])
    assert found is not None and found.tolist() == [0, 0, 1, 2]
    remarks: list[str] = []
    chosen = np.asarray([1, 2])
    assert _mixed(examples("x", 3, 3, 4, sources=weighted(None), counts=(3,)), chosen, remarks) is chosen
    assert _mixed(examples("x", 3, 3), None, remarks) is None and remarks == []


def test_preferences_are_pairs_or_single_answers() -> None:
    given = examples("x", 3, 2, 4, 3, 2, 2, rows_each=2)
    pairs = data_of(align("dpo"), data_path=given).samples
    assert isinstance(pairs, PreferenceSamples) and pairs.paired and len(pairs) == 3
    assert pairs.folder == Path("cache")
    singles = data_of(align("kto"), data_path=given).samples
    assert isinstance(singles, PreferenceSamples) and not singles.paired and len(singles) == 6
    packed = data_of(align("orpo", pack=True), data_path=given).samples
    assert isinstance(packed, PreferenceSamples) and packed.paired and len(packed) == 2
    assert "packed into 2 rows" in packed.describe()


@pytest.mark.parametrize(
    ("method", "pack", "left"),
    [("dpo", False, [0, 2, 3]), ("dpo", True, [0, 3]), ("kto", True, [0, 2, 3]), ("kto", False, [0, 2, 3])],
)
def test_preferences_that_are_too_long_are_left_out_on_request(method: str, pack: bool, left: list[int]) -> None:
    """Positions 2 + 1, 6 + 2, 3 + 3, 1 + 1 and 2 + 7: a row of 5 takes each answer, or under --pack both of a pair."""
    given = examples("x", 3, 2, 7, 3, 4, 4, 2, 2, 3, 8, rows_each=2)
    data = data_of(align(method, pack=pack, skip_bad_examples=True), data_path=given)
    samples: Any = data.samples
    used = sorted({entry // 2 for index in range(len(samples)) for entry in samples.entries_of(index)})
    assert used == left
    assert data.remarks == (
        f"--data-path x: {5 - len(left)} examples are longer than --seq-length 5, and are left out.",
    )
    with pytest.raises(ConfigError) as caught:
        data_of(align(method, pack=pack, skip_bad_examples=True), data_path=examples("x", 9, 9, rows_each=2))
    assert caught.value.what == "No example is left: the only one is longer than --seq-length 5."


def test_remarks_about_answers_name_the_set() -> None:
    desirable, undesirable = (3, 0, 4, 0), (0, 3, 0, 3)
    data = data_of(
        align("kto"),
        data_path=examples("t", *desirable, rows_each=2, digests=[1, 1, 2, 2]),
        valid_data_path=examples("v", *undesirable, rows_each=2, digests=[3, 3, 4, 4]),
    )
    assert data.remarks == (
        "--data-path: No answer is undesirable: kto learns from both kinds.",
        "--valid-data-path: No answer is desirable: kto learns from both kinds.",
    )
    assert isinstance(data.validation, PreferenceSamples) and len(data.validation) == 2


@pytest.mark.parametrize(("size", "lengths"), [(None, (2, 1)), (1, (2, 1)), (4, (2, 1, 1))])
def test_a_packed_row_of_mismatched_answers_can_be_split_by_tp(size: int | None, lengths: tuple[int, ...]) -> None:
    """The first prompt with the second answer's 2 tokens and the second with the first's 1: 3 positions."""
    config = align("kto", pack=True, tensor_model_parallel_size=size)
    samples = data_of(config, data_path=examples("x", 2, 0, 0, 3, rows_each=2)).samples
    assert isinstance(samples, PreferenceSamples)
    micro = samples.mismatched(np.asarray([0, 3]), torch.ones(2).double())
    assert micro.lengths == (lengths,)
