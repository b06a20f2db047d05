"""Samples and batches: the tokens that the loss covers, and one order for all layouts."""

from itertools import islice
from typing import Any

import pytest
import torch

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.samples import GlobalBatch, MockSamples, Samples, SampleSource, ShuffledOrder, batches
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.support.examples import conversation, examples_of, turns_of
from tests.support.samples import encode_conversation, encode_turn, samples_of

BOS, EOS = 1, 2
EXAMPLES = examples_of(INSTRUCTIONS)
SEQ = 104
LAYOUTS = [(1, 12), (1, 4), (1, 1), (2, 3), (2, 6), (3, 2), (4, 3), (6, 1), (12, 1)]  # DP size, micro batch size


@pytest.fixture(scope="module")
def samples(tiny_tokenizer: Any) -> Samples:
    return samples_of(EXAMPLES, tiny_tokenizer, SEQ)


def take(source: SampleSource, count: int, **settings: int) -> list[GlobalBatch]:
    defaults = {"seed": 5, "micro_batch_size": 4, "global_batch_size": 12}
    return list(islice(batches(source, **{**defaults, **settings}), count))


def rows_of(batch: GlobalBatch) -> torch.Tensor:
    """Tokens, labels and mask of this rank's samples, [samples, 3, seq]."""
    parts = [torch.stack((m.tokens, m.labels, m.loss_mask.long()), dim=1) for m in batch.micro_batches]
    return torch.cat(parts)


def test_the_loss_covers_the_response_and_its_end_alone(samples: Samples, tiny_tokenizer: Any) -> None:
    for index, example in enumerate(EXAMPLES):
        row = samples.row(index)
        counted = row.labels[row.loss_mask == 1].tolist()
        assert counted[-1] == EOS
        assert tiny_tokenizer.decode(counted[:-1]) == f" {turns_of(example)[0][1]}"
        assert len(counted) == samples.num_loss_tokens(index)


def test_labels_are_the_tokens_one_place_on(samples: Samples, tiny_tokenizer: Any) -> None:
    for index, example in enumerate(EXAMPLES):
        row = samples.row(index)
        prompt, answer = encode_turn(tiny_tokenizer, *turns_of(example)[0])
        whole = prompt + answer
        assert row.tokens[: len(whole) - 1].tolist() == whole[:-1]
        assert row.labels[: len(whole) - 1].tolist() == whole[1:]
        assert (row.labels[:-1] == row.tokens[1:]).all()
        assert row.loss_mask[len(whole) - 1 :].sum() == 0


def test_dtypes_and_shapes_are_what_the_model_takes(samples: Samples) -> None:
    (batch,) = take(samples, 1)
    assert len(batch.micro_batches) == 3
    for micro in batch.micro_batches:
        for tensor, dtype in (
            (micro.tokens, torch.int64),
            (micro.labels, torch.int64),
            (micro.loss_mask, torch.float32),
            (micro.position_ids, torch.int64),
        ):
            assert tensor.shape == (4, SEQ)
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
        assert micro.position_ids[2].tolist() == list(range(SEQ))


def test_padding_and_truncation_are_counted(tiny_tokenizer: Any) -> None:
    lengths = [sum(map(len, encode_turn(tiny_tokenizer, *turns_of(p)[0]))) for p in EXAMPLES]
    whole = samples_of(EXAMPLES, tiny_tokenizer, max(lengths) - 1)
    assert whole.num_truncated == 0
    assert whole.longest == max(lengths)
    assert whole.num_tokens == sum(lengths)
    assert whole.num_padding_tokens == sum(max(lengths) - length for length in lengths)

    seq = max(lengths) - 10
    cut = samples_of(EXAMPLES, tiny_tokenizer, seq)
    assert cut.num_truncated == sum(length > seq + 1 for length in lengths) > 0
    assert cut.num_padding_tokens == sum(max(0, seq + 1 - length) for length in lengths)
    assert f"truncated {cut.num_truncated}" in cut.describe()
    masks = sum(int(cut.row(index).loss_mask.sum()) for index in range(len(cut)))
    assert masks == cut.num_loss_tokens_total == whole.num_loss_tokens_total - (whole.num_tokens - cut.num_tokens)


def test_a_truncated_sample_ends_without_an_end_of_sequence(tiny_tokenizer: Any) -> None:
    example = EXAMPLES[30]
    prompt, answer = encode_turn(tiny_tokenizer, *turns_of(example)[0])
    row = samples_of([example], tiny_tokenizer, len(prompt) + 2).row(0)
    assert row.labels[row.loss_mask == 1].tolist() == answer[:3]
    assert row.loss_mask[-1] == 1


def test_the_shortest_length_that_leaves_one_token_of_the_response_is_accepted(tiny_tokenizer: Any) -> None:
    example = conversation("Say it.", "Gladly, and more than once.", place="line 7")
    prompt, answer = encode_turn(tiny_tokenizer, *turns_of(example)[0])
    row = samples_of([example], tiny_tokenizer, len(prompt)).row(0)
    assert row.labels[row.loss_mask == 1].tolist() == answer[:1]
    with pytest.raises(ConfigError, match="line 7: "):
        samples_of([example], tiny_tokenizer, len(prompt) - 1)


def test_of_a_conversation_every_answer_counts(tiny_tokenizer: Any) -> None:
    turns = (("Say it.", "Gladly, and more than once."), ("Again.", "No."), ("Why?", "Once is enough."))
    example = conversation(*(text for turn in turns for text in turn))
    parts = encode_conversation(tiny_tokenizer, turns)
    whole = [token for part in parts for token in (*part[0], *part[1])]
    samples = samples_of([example], tiny_tokenizer, len(whole) + 3)
    row = samples.row(0)
    assert row.tokens[: len(whole)].tolist() == whole
    assert row.labels[row.loss_mask == 1].tolist() == [token for _, answer in parts for token in answer]
    assert samples.num_loss_tokens(0) == samples.num_loss_tokens_total == sum(len(answer) for _, answer in parts)
    # Cut within the second answer, and before it.
    cut = len(parts[0][0]) + len(parts[0][1]) + len(parts[1][0])
    for length, answers in ((cut, [*parts[0][1], parts[1][1][0]]), (cut - 1, parts[0][1])):
        shorter = samples_of([example], tiny_tokenizer, length)
        row = shorter.row(0)
        assert row.labels[row.loss_mask == 1].tolist() == answers
        assert shorter.num_loss_tokens(0) == len(answers) and shorter.num_truncated == 1


def test_examples_without_room_for_their_response_are_all_listed(tiny_tokenizer: Any) -> None:
    examples = [
        conversation("short", "fine"),
        *(conversation("word " * 60, "lost", place=f"line {line}") for line in range(2, 15)),
    ]
    with pytest.raises(ConfigError) as caught:
        samples_of(examples, tiny_tokenizer, 32)
    assert "13 of 14 examples are longer than --seq-length 32" in str(caught.value)
    assert [problem.split(":")[0] for problem in caught.value.problems[:10]] == [
        f"line {line}" for line in range(2, 12)
    ]
    assert caught.value.problems[10:] == ("and 3 more",)


@pytest.mark.parametrize("kind", ["examples", "mock"])
@pytest.mark.parametrize(("data_parallel_size", "micro_batch_size"), LAYOUTS)
def test_every_layout_sees_the_same_global_batches(
    samples: Samples, kind: str, data_parallel_size: int, micro_batch_size: int
) -> None:
    source = samples if kind == "examples" else MockSamples(1024, 32, seed=5)
    reference = take(source, 20, micro_batch_size=12)  # 240 samples: more than an epoch of examples
    ranks = [
        take(
            source,
            20,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=rank,
        )
        for rank in range(data_parallel_size)
    ]
    for step, expected in enumerate(reference):
        parts = [batches_of_rank[step] for batches_of_rank in ranks]
        assert torch.equal(torch.cat([rows_of(part) for part in parts]), rows_of(expected))
        assert {part.num_loss_tokens for part in parts} == {expected.num_loss_tokens}
        assert {len(part.micro_batches) for part in parts} == {12 // data_parallel_size // micro_batch_size}
        counted = sum(int(micro.loss_mask.sum()) for part in parts for micro in part.micro_batches)
        assert counted == expected.num_loss_tokens


@pytest.mark.parametrize("steps", [1, 17, 18, 40])
def test_a_resumed_run_goes_on_where_it_stopped(samples: Samples, steps: int) -> None:
    through = take(samples, steps + 3)
    assert through[steps - 1].consumed_samples == steps * 12
    resumed = take(samples, 3, consumed_samples=through[steps - 1].consumed_samples)
    for expected, found in zip(through[steps:], resumed, strict=True):
        assert torch.equal(rows_of(expected), rows_of(found))
        assert expected.consumed_samples == found.consumed_samples


def test_resuming_with_another_global_batch_size_keeps_the_order(samples: Samples) -> None:
    small = torch.cat([rows_of(batch) for batch in take(samples, 6)])
    large = torch.cat([rows_of(batch) for batch in take(samples, 2, global_batch_size=24, consumed_samples=24)])
    assert torch.equal(small[24:], large)


def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own(samples: Samples) -> None:
    size = len(samples)
    epochs = [[samples.index_of(epoch * size + place, 5) for place in range(size)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [samples.index_of(place, 6) for place in range(size)] != epochs[0]


def test_the_order_is_that_of_earlier_releases() -> None:
    order = ShuffledOrder(1000)
    places = (0, 1, 2, 999, 1000, 1001, 2500)
    assert [order.index_of(place, 5) for place in places] == [559, 640, 569, 914, 120, 46, 729]
    assert [order.index_of(place, 1234) for place in range(5)] == [117, 947, 680, 102, 258]


def test_a_global_batch_larger_than_the_data_goes_round(tiny_tokenizer: Any) -> None:
    few = samples_of(EXAMPLES[:3], tiny_tokenizer, 40)
    (batch,) = take(few, 1, micro_batch_size=3)
    rows = [tuple(row[0].tolist()) for row in rows_of(batch)]
    assert {rows.count(row) for row in rows} == {4}


def test_mock_data_depend_on_the_seed_and_cover_the_vocabulary() -> None:
    first, again, other = (MockSamples(50, 400, seed).row(3) for seed in (1, 1, 2))
    assert (first.tokens == again.tokens).all()
    assert (first.tokens != other.tokens).any()
    assert (first.tokens[1:] == first.labels[:-1]).all()
    assert set(first.tokens.tolist()) == set(range(50))
    assert first.loss_mask.sum() == 400


def test_a_batch_that_cannot_be_shared_out_is_refused_before_the_first_one(samples: Samples) -> None:
    with pytest.raises(ConfigError, match="expected a multiple of 8"):
        batches(samples, seed=1, micro_batch_size=4, global_batch_size=12, data_parallel_size=2)
