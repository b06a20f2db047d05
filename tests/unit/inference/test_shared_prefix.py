"""The tokens that prompts begin with are computed once, and the answers are those of whole prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mixtral_run.inference import shared_prefix
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding, FixedShapeDecoding
from mixtral_run.inference.shared_prefix import PrefixMemory, common
from mixtral_run.model.mixtral import MixtralModel
from tests.multiprocess.conftest import SMALL
from tests.unit.inference.test_decode import random_model

GREEDY = Sampling(6, 0.0, 1.0, 0)
SHARED = tuple(range(300, 320))


@contextmanager
def passed_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Collect the shapes [rows, length] of all passes."""
    shapes: list[tuple[int, int]] = []
    whole = MixtralModel.logits

    def logits(model: MixtralModel, tokens: torch.Tensor, **named: Any) -> torch.Tensor:
        shapes.append((tokens.shape[0], tokens.shape[1]))
        return whole(model, tokens, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MixtralModel, "logits", logits)
        yield shapes


def greedy(model: MixtralModel, row: tuple[int, ...]) -> list[int]:
    """Continue a row by passes over all of it: no cache."""
    found = list(row)
    for _ in range(GREEDY.max_new_tokens):
        found.append(int(model.logits(torch.tensor([found]))[0, -1].argmax()))
    return found[len(row) :]


@pytest.mark.parametrize("kind", [Decoding, FixedShapeDecoding])
@pytest.mark.parametrize("ends", [((5, 9, 200), (7,), (1, 2)), ((5,), (6,), (7,)), ((), (6, 3), (7,))])
def test_a_batch_computes_its_prefix_once(
    kind: type[Decoding], ends: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a row is the prefix itself: its last token is left, as something must be passed."""
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_TOKENS", 30)
    rows = [SHARED + end for end in ends]
    prefix = min(len(SHARED), min(map(len, rows)) - 1)
    with random_model() as model:
        with passed_tokens(monkeypatch) as shapes:
            found = continue_rows(model, rows, (), GREEDY, decoding=kind)
        assert found == [greedy(model, row) for row in rows]
    assert shapes[:2] == [(1, prefix), (3, max(map(len, rows)) - prefix)]
    assert shapes[2:] == [(3, 1)] * (GREEDY.max_new_tokens - 1)


def test_a_later_batch_takes_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_TOKENS", 30)
    memory = PrefixMemory()
    with random_model() as model:
        for first, expected in (((5, 6, 7), [(1, 20), (3, 1)]), ((8, 9, 10), [(3, 1)])):
            rows = [(*SHARED, end) for end in first]
            with passed_tokens(monkeypatch) as shapes:
                found = continue_rows(model, rows, (), GREEDY, memory=memory)
            assert found == [greedy(model, row) for row in rows]
            assert shapes[: len(expected)] == expected and shapes[len(expected)] == (3, 1)


@pytest.mark.parametrize("kind", [Decoding, FixedShapeDecoding])
def test_a_conversation_is_not_computed_again(kind: type[Decoding], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PrefixMemory()
    with random_model() as model:
        row = SHARED
        for turn, (more, new) in enumerate([((), 20), ((11, 12, 13), 4), ((14,), 2)]):
            row = (*row, *more)
            with passed_tokens(monkeypatch) as shapes:
                answer = continue_rows(model, [row], (), GREEDY, decoding=kind, memory=memory)[0]
            assert answer == greedy(model, row), turn
            # The last token of an answer was chosen and not passed.
            assert shapes[0] == (1, new), turn
            row = (*row, *answer)


def test_one_that_changes_is_computed_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PrefixMemory()
    with random_model() as model:
        continue_rows(model, [SHARED], (), GREEDY, memory=memory)
        changed = (*SHARED[:12], 5, *SHARED[13:])
        with passed_tokens(monkeypatch) as shapes:
            assert continue_rows(model, [changed], (), GREEDY, memory=memory) == [greedy(model, changed)]
        assert shapes[0] == (1, 8)
        memory.forget()
        with passed_tokens(monkeypatch) as shapes:
            continue_rows(model, [changed], (), GREEDY, memory=memory)
        assert shapes[0] == (1, 20)


def test_no_pass_is_added_that_saves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    with random_model() as model, passed_tokens(monkeypatch) as shapes:
        continue_rows(model, [(*SHARED, 5), (*SHARED, 6)], (), GREEDY)
    assert shapes[0] == (2, 21)


def test_a_kept_row_is_held_once() -> None:
    """Its memory goes to the next turn, which is as long as the model's context: two copies would not fit."""
    memory = PrefixMemory()
    with random_model() as model:
        continue_rows(model, [SHARED], (), GREEDY, memory=memory)
        prefix = memory.of(model, [(*SHARED, 5, 6)])
        assert prefix is not None and len(prefix.tokens) == 20
        assert memory.of(model, [SHARED]) is None
        passes = Decoding(model, torch.zeros(1, dtype=torch.int64), 40, prefix)
    assert prefix.cache.keys == {} == prefix.cache.values
    assert sorted(passes.cache.keys) == list(range(1, SMALL.num_layers + 1))


def test_what_rows_have_in_common() -> None:
    assert common([(1, 2, 3), (1, 2, 4), (1, 2)]) == (1, 2)
    assert common([(1, 2, 3)]) == (1, 2, 3)
    assert common([(2, 1), (1, 1), (2, 1)]) == ()
    assert common([(3, 9), (3, 1, 5), (3, 5)]) == (3,)
