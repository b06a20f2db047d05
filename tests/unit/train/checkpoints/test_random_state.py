"""The state of random numbers belongs to a layout, in which the ranks that share a row count."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.checkpoints.random_state import (
    RANDOM_STATE,
    own_random_state,
    restore_random_state,
    write_random_state,
)


def mesh(context: int, rank: int = 0) -> Mesh:
    return Mesh(torch.device("cpu"), rank, 2, 0, 1, 0, 1, 0, 2 // context, 0, context)


@pytest.mark.parametrize("saved", [1, 2])
@pytest.mark.parametrize("resumed", [1, 2])
def test_another_size_of_context_parallelism_draws_other_numbers(tmp_path: Path, saved: int, resumed: int) -> None:
    torch.manual_seed(5)
    write_random_state(tmp_path, mesh(saved), [own_random_state(mesh(saved))] * 2)
    expected = torch.rand(3)
    torch.manual_seed(6)
    why = restore_random_state(tmp_path, mesh(resumed))
    assert (why is None) == (saved == resumed)
    assert torch.equal(torch.rand(3), expected) == (saved == resumed)


def test_a_state_of_an_earlier_version_is_one_without(tmp_path: Path) -> None:
    write_random_state(tmp_path, mesh(1), [own_random_state(mesh(1))] * 2)
    values = json.loads((tmp_path / RANDOM_STATE).read_text())
    del values["context_size"]
    (tmp_path / RANDOM_STATE).write_text(json.dumps(values))
    assert restore_random_state(tmp_path, mesh(1)) is None
    assert restore_random_state(tmp_path, mesh(2)) is not None


def test_each_rank_draws_its_own_numbers_again(tmp_path: Path) -> None:
    states, expected = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        random.seed(seed)
        states.append(own_random_state(mesh(1)))
        expected.append((torch.rand(3).tolist(), random.random()))
    write_random_state(tmp_path, mesh(1), states)
    for rank in (1, 0):
        assert restore_random_state(tmp_path, mesh(1, rank)) is None
        assert (torch.rand(3).tolist(), random.random()) == expected[rank]
    other = Mesh(torch.device("cpu"), 0, 2, 0, 2, 0, 1, 0, 1)
    assert "the layout or the device is another one" in str(restore_random_state(tmp_path, other))
    (tmp_path / RANDOM_STATE).unlink()
    assert "an earlier version of mixtral-run wrote it" in str(restore_random_state(tmp_path, mesh(1)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("tensor_size"),
        lambda values: values["ranks"].pop(),
        lambda values: values.update(ranks=None),
        lambda values: values["ranks"][1].pop("python"),
        lambda values: values["ranks"][1].update(python=[3, [1, 2]]),
        lambda values: values["ranks"][1].update(python=[3, "ab", None]),
        lambda values: values["ranks"][1].update(torch="AAAA"),
        lambda values: values["ranks"][1].update(torch="A*"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    write_random_state(tmp_path, mesh(1), [own_random_state(mesh(1))] * 2)
    file = tmp_path / RANDOM_STATE
    values = json.loads(file.read_text())
    damage(values)
    for text in (json.dumps(values), "[" * 100_000, '{"ranks": '):
        file.write_text(text)
        with pytest.raises(WeightsError, match="The state of the random numbers is damaged") as caught:
            restore_random_state(tmp_path, mesh(1, rank=1))
        assert caught.value.where == str(file) and str(file) in str(caught.value.next_command)
        assert caught.value.found and len(caught.value.found) <= 200
