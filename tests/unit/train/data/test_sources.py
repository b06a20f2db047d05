"""The samples of a run from its data files: the token cache behind them, shares, the validation part, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, MixtralRunError, TrainingError, WeightsError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.terminal.report import Report
from mixtral_run.train.data import sources
from mixtral_run.train.data.cache import cached_examples
from mixtral_run.train.data.mixture import check_mixture, describe_mixture, mixed_indices
from mixtral_run.train.data.samples import MockSamples
from mixtral_run.train.data.sources import TrainingData, check_same, open_data
from mixtral_run.weights.manifest.describe import BaseDescription


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer_folder: Path) -> BaseDescription:
    shutil.copytree(tiny_tokenizer_folder, tmp_path / "base" / "tokenizer")
    return BaseDescription(tmp_path / "base", MIXTRAL_8X7B, "bfloat16", "0-0")


def write(path: Path, *pairs: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"instruction": one, "response": two}) + "\n" for one, two in pairs))
    return str(path)


def numbers(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"Say {number}.", f"It is {number}.") for number in range(first, last)]


@pytest.fixture
def opened(tmp_path: Path, base: BaseDescription) -> Callable[..., TrainingData]:
    def open_with(*data: str, **more: Any) -> TrainingData:
        described = more.pop("base", base)
        settings = {"load": base.folder, "save": tmp_path / "adapter", "data_path": data, "seq_length": 64, **more}
        return open_data(FinetuneConfig(**settings).check(), described, Report.silent(), verify=True)

    return open_with


def texts_of(samples: Any, tokenizer: Any) -> list[str]:
    rows = [samples.row(index) for index in range(len(samples))]
    return [tokenizer.decode(row.labels[row.loss_mask == 1][:-1].tolist()).strip() for row in rows]


def test_another_start_tokenizes_nothing(
    opened: Callable[..., TrainingData], tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "a.jsonl", *numbers(0, 20))
    first = opened(data)
    calls: list[str] = []
    real = cached_examples.tokenized
    monkeypatch.setattr(cached_examples, "tokenized", lambda *args: calls.append("tokenized") or real(*args))
    # Neither the length of samples nor the name of the file nor where the adapter is saved matters.
    shutil.copy(data, tmp_path / "b.jsonl")
    again = opened(str(tmp_path / "b.jsonl"), seq_length=32, pack=True, save=tmp_path / "other")
    assert not calls and again.identity == first.identity and again.sha256 == first.sha256
    assert texts_of(first.samples, tiny_tokenizer) == [f"It is {n}." for n in range(20)]
    # Other content, another template or other options of the reading do.
    write(tmp_path / "a.jsonl", *numbers(0, 21))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for message in messages %}{{ bos_token if loop.first }}{{ message['role'] + ': ' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    changed = [opened(data), opened(data, chat_template=str(template)), opened(data, skip_bad_examples=True)]
    assert len(calls) == 3 and len({first.identity, *(each.identity for each in changed)}) == 4
    assert changed[0].num_samples == 21 and first.chat_template != changed[1].chat_template


def test_shares_and_the_validation_part_go_together(
    opened: Callable[..., TrainingData], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    small = write(tmp_path / "small.jsonl", *numbers(0, 40))
    large = write(tmp_path / "large.jsonl", *numbers(1000, 1200), *numbers(0, 3))
    found = opened(f"{small}:1", f"{large}:1", valid_fraction=0.3)
    assert found.validation is not None
    training, held_back = (texts_of(each, tiny_tokenizer) for each in (found.samples, found.validation))
    assert not set(training) & set(held_back)
    expected = {two for _, two in [*numbers(0, 40), *numbers(1000, 1200)]}
    assert {*training, *held_back} == expected and 0.2 < len(set(held_back)) / len(expected) < 0.4
    # Half of the samples are from each; an example of the large one is there once.
    of_large = [text for text in training if len(text) == len("It is 1000.")]
    assert len(of_large) == len(set(of_large))
    assert abs(len(training) - 2 * len(of_large)) <= 6
    assert any("An epoch takes" in remark for remark in found.remarks)
    # The same side without shares, in one file, in another order.
    joined = write(tmp_path / "joined.jsonl", *reversed([*numbers(0, 40), *numbers(1000, 1200)]))
    alone = opened(joined, valid_fraction=0.3)
    assert alone.validation is not None and set(texts_of(alone.validation, tiny_tokenizer)) == set(held_back)


def test_ids_above_the_vocabulary_are_refused_from_the_cache_as_well(
    opened: Callable[..., TrainingData], tmp_path: Path, base: BaseDescription
) -> None:
    import dataclasses

    data = write(tmp_path / "a.jsonl", *numbers(0, 5))
    small = dataclasses.replace(base, architecture=dataclasses.replace(MIXTRAL_8X7B, vocab_size=60))
    for _ in range(2):
        with pytest.raises(WeightsError, match="tokens that the model lacks") as caught:
            opened(data, base=small)
        assert data in str(caught.value) and "ids end at 59" in str(caught.value)
    assert opened(data).num_samples == 5


def test_examples_without_space_for_their_response(
    opened: Callable[..., TrainingData], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    data = write(tmp_path / "a.jsonl", *numbers(0, 3), ("word " * 90, "lost"), *numbers(3, 4))
    with pytest.raises(ConfigError, match="1 of 5 examples is longer") as caught:
        opened(data)
    assert "line 4: " in str(caught.value)
    found = opened(data, skip_bad_examples=True)
    assert texts_of(found.samples, tiny_tokenizer) == [f"It is {n}." for n in range(4)]
    remark = "1 example is longer than --seq-length 64 before its response begins, and is left out."
    assert any(remark in each for each in found.remarks)
    only_one = "No example is left: the only one is longer than --seq-length 64 before its response begins"
    with pytest.raises(ConfigError, match=only_one) as caught:
        opened(data, valid_data_path=(write(tmp_path / "v.jsonl", ("word " * 90, "lost")),), skip_bad_examples=True)
    assert "v.jsonl" in str(caught.value)


def test_problems_of_all_files_are_reported_together(opened: Callable[..., TrainingData], tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *numbers(0, 3))
    bad = tmp_path / "bad.jsonl"
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    bad.write_text(f"{json.dumps(tool)}\n{{broken\n" + (tmp_path / "good.jsonl").read_text())
    with pytest.raises(MixtralRunError) as caught:
        opened(str(bad), valid_data_path=(str(tmp_path / "missing.jsonl"),))
    text = str(caught.value)
    assert "line 2: broken JSON" in text and "missing.jsonl" in text
    left = opened(good, str(bad), skip_bad_examples=True)
    assert left.num_samples == 6
    (remark,) = [each for each in left.remarks if "not usable" in each]
    assert "line 1 of bad.jsonl: tools: " in remark and "line 2 of bad.jsonl: broken JSON" in remark


def test_ranks_with_other_tokens_are_refused() -> None:
    check_same(["a", "a", "a"])
    with pytest.raises(TrainingError, match="do not have the same data") as caught:
        check_same(["a-1", "a-1", "b-2", "a-1"])
    assert "ranks 0, 1, 3: tokens a-1" in str(caught.value) and "ranks 2: tokens b-2" in str(caught.value)
    with pytest.raises(TrainingError) as caught:
        check_same(["a"] * 9 + ["b"] * 8)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, …: tokens a" in str(caught.value) and "15, 16: tokens b" in str(caught.value)


def test_an_error_of_any_rank_and_other_tokens_end_all(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = ["same"]

    def gather(into: list[Any], own: Any) -> None:
        into[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    data = TrainingData(MockSamples(10, 4, 1), identity="same")
    monkeypatch.setattr(sources, "open_data", lambda *_: data)
    everywhere = lambda: sources.open_data_everywhere(None, None, None)  # type: ignore[arg-type] # noqa: E731
    assert everywhere() is data
    others[0] = "other"
    with pytest.raises(TrainingError, match="do not have the same data"):
        everywhere()
    others[0] = ConfigError("Of the other rank.")
    with pytest.raises(ConfigError, match="Of the other rank"):
        everywhere()

    def refused(*_: object) -> None:
        raise ConfigError("Of this rank.")

    others[0] = "same"
    monkeypatch.setattr(sources, "open_data", refused)
    with pytest.raises(ConfigError, match="Of this rank"):
        everywhere()


def test_what_a_run_says_of_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    """12 iterations of 5 samples are 60, of which an epoch has 8: 7.5 epochs."""

    class Eight(SimpleNamespace):
        def __len__(self) -> int:
            return 8

    config: Any = SimpleNamespace(iterations=12, global_batch_size=5)
    samples: Any = Eight(describe=lambda: "eight examples")
    data = TrainingData(samples, samples, remarks=("odd",))
    data.describe(config, Report())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == ["Data: eight examples", "12 iterations of 5 are 7.5 epochs", "Validation set: eight examples"]
    assert "odd" in lines[0] and data.num_samples == 8
    endless = TrainingData(MockSamples(1000, 64, 1))
    endless.describe(config, Report())
    assert capsys.readouterr().out == "Data: mock data: random tokens below 1,000, seq_length 64\n"
    assert endless.num_samples is None


def test_shares_in_numbers() -> None:
    """Weights 1 and 4 of 3 and 2 examples: the first source once, so that the second has four times 3 samples."""
    found = mixed_indices([3, 2], [1, 4])
    assert found is not None and found.tolist() == [0, 1, 2, *[3, 4] * 6]
    assert describe_mixture(["a"], [3], [None]) is None
    # 1 sample of the first source for each 199,999,999 of the second: the largest epoch.
    check_mixture([1, 1], [1.0, 199_999_999.0])
    with pytest.raises(ConfigError, match="too far apart") as caught:
        check_mixture([1, 1], [1.0, 200_000_000.0])
    assert (caught.value.expected, caught.value.found) == (
        "an epoch of at most 200,000,000 samples", "200,000,001 samples from 2 examples",
    )  # fmt: skip
